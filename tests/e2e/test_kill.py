"""Processes that enqueue and work on one SQLite file are killed with SIGKILL at random: nothing acknowledged is lost.

MILLPOND_KILL_SECONDS sets for how long (10 by default), MILLPOND_KILL_SEED the seed, which is printed.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import millpond

SECONDS = float(os.environ.get("MILLPOND_KILL_SECONDS", "10"))
WORKER = Path(__file__).with_name("kill_worker.py")


def _start(folder: Path, task: str, number: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(WORKER), task, str(folder / "kill.db"), str(folder / f"{task}-{number}")]
    )


def _events(folder: Path, task: str) -> list[list[str]]:
    # A line that a kill cut off was not finished, so it counts for nothing.
    return [
        line.split()
        for path in sorted(folder.glob(f"{task}-*"))
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]


def test_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    seed = int(os.environ.get("MILLPOND_KILL_SEED", random.SystemRandom().randrange(2**32)))
    print(f"MILLPOND_KILL_SEED={seed}")
    chance = random.Random(seed)
    tasks = ["produce", "consume", "consume"]
    count = len(tasks)
    running = [_start(tmp_path, task, number) for number, task in enumerate(tasks)]
    kills = 0
    end = time.monotonic() + SECONDS
    try:
        while time.monotonic() < end:
            time.sleep(chance.uniform(0.1, 0.8))  # The moment of the kill, not a wait for anything.
            index = chance.randrange(len(running))
            assert running[index].poll() is None, "a worker ended by itself"
            running[index].kill()
            running[index].wait()
            kills += 1
            count += 1
            running[index] = _start(tmp_path, tasks[index], count)
    finally:
        for process in running:
            process.kill()
            process.wait()

    enqueued = {event[1] for event in _events(tmp_path, "produce") if event[0] == "enqueued"}
    events = _events(tmp_path, "consume")
    acked = {event[1] for event in events if event[0] == "acked"}
    got = [(event[1], int(event[2])) for event in events if event[0] == "got"]
    assert enqueued, "the producers were killed before they did anything"
    assert acked, "the consumers were killed before they did anything"
    assert len(set(got)) == len(got), "a fencing token was given out twice"

    newest: dict[str, int] = {}
    for id, token in got:
        newest[id] = max(token, newest.get(id, 0))
    drained: set[str] = set()

    async def drain() -> None:
        async with millpond.connect(f"sqlite:///{tmp_path / 'kill.db'}") as pond:
            assert await pond.verify() == []
            queue = pond.queue("kill")
            while sum((counts := await queue.counts())[:4]):
                messages = await queue.receive(500, wait=1.0)
                for message in messages:
                    assert message.id not in drained
                    assert message.lease.token > newest.get(message.id, 0)
                    drained.add(message.id)
                assert all(answer.error is None for answer in await queue.ack_many(messages))
            assert counts.dead == 0
            assert await pond.verify() == []

    asyncio.run(drain())
    assert not acked & drained, "an acked message came back"
    # What was got and neither confirmed nor there any more was acked by a commit whose reply the kill cut off.
    unconfirmed = {id for id, _ in got} - acked - drained
    lost = enqueued - acked - drained - unconfirmed
    assert not lost, f"{len(lost)} of {len(enqueued)} acknowledged messages are lost after {kills} kills"
