"""Eight processes on one bucket are killed with SIGKILL at random, and started again.

Each message is acked, no ack with a stale lease is accepted, and a message is delivered twice only where its lease had
run out. MILLPOND_BUCKET_KILL_MESSAGES sets how many messages (300 by default), MILLPOND_KILL_SEED the seed, which is
printed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.servers.process import Server

import millpond

MESSAGES = int(os.environ.get("MILLPOND_BUCKET_KILL_MESSAGES", "300"))
WORKER = Path(__file__).with_name("bucket_worker.py")
PRODUCERS, CONSUMERS = 2, 6
VISIBILITY = 2.0
STEADY = 60.0
"""The first consumer's leases; it is not killed, or its messages would be held for so long. They are long enough to be
deleted without a condition."""
LIMIT = 60.0 + MESSAGES / 5
"""Seconds for all of it on a machine that is busy."""
APART = 50
"""Milliseconds that the processes' ideas of the bucket's time may differ."""


class Delivery(NamedTuple):
    """One that a consumer wrote down."""

    token: int
    at: int
    until: int


class Journals:
    """What the workers wrote."""

    def __init__(self, folder: Path) -> None:
        self.enqueued: set[int] = set()
        self.got: dict[int, list[Delivery]] = defaultdict(list)
        self.asked: dict[int, set[int]] = defaultdict(set)
        """Number → tokens that it was acked with, whatever the answer."""
        self.acked: dict[int, list[int]] = defaultdict(list)
        """Number → tokens whose ack was accepted."""
        self.lost: dict[int, set[int]] = defaultdict(set)
        self.ids: dict[int, set[str]] = defaultdict(set)
        for path in folder.glob("*.journal"):
            for line in path.read_text().splitlines(keepends=True):
                # A line that a kill cut off was not finished, so it counts for nothing.
                if line.endswith("\n"):
                    self._take(*line.split())

    def _take(self, event: str, number_: str, id: str, *rest: str) -> None:
        number = int(number_)
        self.ids[number].add(id)
        if event == "enqueued":
            self.enqueued.add(number)
            return
        token = int(rest[0])
        if event == "got":
            self.got[number].append(Delivery(token, int(rest[2]), int(rest[1])))
        elif event == "acking":
            self.asked[number].add(token)
        elif event == "acked":
            self.acked[number].append(token)
        else:
            self.lost[number].add(token)


class Fleet:
    """The processes."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url = url
        self._folder = folder
        share = -(-MESSAGES // PRODUCERS)
        self.tasks: list[tuple[object, ...]] = [
            ("produce", number * share, min(share, MESSAGES - number * share)) for number in range(PRODUCERS)
        ]
        self.tasks += [("consume", STEADY if number == 0 else VISIBILITY) for number in range(CONSUMERS)]
        self.running = [self._start(place) for place in range(len(self.tasks))]
        self.kills = 0

    def _start(self, place: int) -> subprocess.Popen[bytes]:
        task, *rest = self.tasks[place]
        journal = self._folder / f"{place}.journal"
        return subprocess.Popen([sys.executable, str(WORKER), str(task), self._url, str(journal), *map(str, rest)])

    def kill(self, place: int) -> None:
        """Kill one and start it again, unless it is a producer that has done its part."""
        process = self.running[place]
        if place < PRODUCERS and process.poll() == 0:
            return
        assert process.poll() is None, f"worker {place} ended by itself, with exit code {process.returncode}"
        process.kill()
        process.wait()
        self.kills += 1
        self.running[place] = self._start(place)

    def stop(self) -> None:
        """End all."""
        for process in self.running:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _fleet(url: str, folder: Path) -> Iterator[Fleet]:
    fleet = Fleet(url, folder)
    try:
        yield fleet
    finally:
        fleet.stop()


async def _left(url: str) -> int:
    async with millpond.connect(url) as pond:
        counts = await pond.queue("kill").counts()
        assert counts.dead == 0
        return counts.ready + counts.delayed + counts.leased + counts.blocked


async def _problems(url: str) -> list[object]:
    async with millpond.connect(url) as pond:
        return list(await pond.verify())


def test_each_message_is_acked_and_no_stale_ack_is(
    tmp_path: Path, seaweed: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    url = seaweed.url(f"kill-{time.time_ns()}")
    seed = int(os.environ.get("MILLPOND_KILL_SEED", random.SystemRandom().randrange(2**32)))
    print(f"MILLPOND_KILL_SEED={seed}")
    chance = random.Random(seed)
    end = time.monotonic() + LIMIT
    victims = [place for place in range(PRODUCERS + CONSUMERS) if place != PRODUCERS]
    with _fleet(url, tmp_path) as fleet:
        while len(Journals(tmp_path).acked) < MESSAGES * 0.95:
            assert time.monotonic() < end, f"{len(Journals(tmp_path).acked)} of {MESSAGES} acked after {LIMIT} s"
            time.sleep(chance.uniform(0.2, 1.0))  # The moment of the kill, not a wait for anything.
            fleet.kill(chance.choice(victims))
        # The last ones are left to whoever is alive: what was killed holds its messages until its leases end.
        while any(process.poll() is None for process in fleet.running[:PRODUCERS]) or asyncio.run(_left(url)):
            assert time.monotonic() < end, f"there are messages left after {LIMIT} s"
            time.sleep(0.1)  # Between two looks at the queue.
    found = Journals(tmp_path)
    print(f"{fleet.kills} kills; {sum(map(len, found.got.values()))} deliveries of {len(found.got)} messages")

    numbers = set(range(MESSAGES))
    assert found.enqueued == numbers
    assert all(len(ids) == 1 for ids in found.ids.values()), "a number became two messages"
    assert set(found.got) == numbers, "messages were lost"
    in_doubt = 0
    for number, deliveries in found.got.items():
        tokens = [delivery.token for delivery in deliveries]
        assert len(set(tokens)) == len(tokens), f"a fencing token of {number} was given out twice"
        if found.acked[number]:
            assert found.acked[number] == [max(tokens)], f"{number} was acked with {found.acked[number]} of {tokens}"
        else:
            # The kill came between the ack and its line in the journal.
            unanswered = found.asked[number] - found.lost[number]
            assert unanswered, f"{number} is gone, and nobody acked it"
            assert max(tokens) in unanswered, f"{number} was acked with a stale lease: {unanswered} of {tokens}"
            in_doubt += 1
        deliveries.sort()
        for earlier, later in itertools.pairwise(deliveries):
            early = earlier.until - later.at
            assert early <= APART, f"{number} was delivered again {early} ms before its lease ended"
    assert in_doubt <= fleet.kills * 8, "more acks went unanswered than can have been cut off"
    assert fleet.kills >= 3
    assert asyncio.run(_problems(url)) == []
