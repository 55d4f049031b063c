"""Calls that are given up at every moment of their lives: afterwards nothing is held, kept open or left running, and no
message is out of reach for longer than its lease.

MILLPOND_STORM_CALLS sets how many (1,200 by default; 100,000 to look for leaks).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

import millpond
from millpond import Pond
from millpond.errors import LeaseLost
from millpond.server.run import running

CALLS = int(os.environ.get("MILLPOND_STORM_CALLS", "1200"))
AT_ONCE = 24
WARM = 300
"""Calls after which everything that is kept for later is there."""
LEASE = 0.5


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd" if sys.platform == "linux" else "/dev/fd"))


def _memory() -> int:
    """Resident bytes; 0 where it is not known."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


class Storm:
    """Callers of one pond."""

    def __init__(self, pond: Pond, seed: int, pace: float) -> None:
        """``pace``: what a call takes by and large, in hundredths of a second."""
        self.pace = pace
        self.queue = pond.queue("storm")
        self.chance = random.Random(seed)
        self.acked: set[str] = set()
        self.told: set[str] = set()
        self.given_up = self.done = 0
        self.unexpected: list[str] = []

    async def call(self) -> None:
        """A call, given up after a time that is often too short for it."""
        chance = self.chance
        calls: list[Callable[[], Awaitable[object]]] = [
            self._enqueue, self._enqueue, self._work, self._work, self._wait, self._look, self._large,
        ]  # fmt: skip
        make = chance.choice(calls)
        try:
            async with asyncio.timeout(self.pace * chance.choice((0.0, 0.0005, 0.001, 0.003, 0.01, 0.05))):
                await make()
            self.done += 1
        except TimeoutError:
            self.given_up += 1
        except LeaseLost:
            self.done += 1
        except Exception:
            self.unexpected.append(traceback.format_exc())

    async def _enqueue(self) -> None:
        receipt = await self.queue.enqueue(b"x" * 100, max_attempts=0)
        self.told.add(receipt.message_id)

    async def _large(self) -> None:
        receipt = await self.queue.enqueue(iter([b"x" * 40_000] * 3), max_attempts=0)
        self.told.add(receipt.message_id)

    async def _work(self) -> None:
        for message in await self.queue.receive(2, visibility=LEASE):
            step = self.chance.randrange(5)
            if step == 0:
                await message.state.save({"step": 1})
            if step == 1:
                await message.extend(LEASE)
            if step == 2:
                await message.nack("storm")
                continue
            await message.read()
            await message.ack()
            self.acked.add(message.id)

    async def _wait(self) -> None:
        for message in await self.queue.receive(1, wait=0.02, visibility=LEASE):
            await message.defer()

    async def _look(self) -> None:
        await self.queue.counts()
        await self.queue.peek(3)

    async def blow(self, calls: int) -> None:
        left = calls

        async def caller() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                await self.call()

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(caller())

    async def settle(self) -> None:
        """Nothing but what was there before runs any more."""
        async with asyncio.timeout(30):
            while (await self.queue.counts()).leased:
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def _local(folder: Path) -> AsyncIterator[Pond]:
    async with millpond.connect(f"sqlite:///{folder}/storm.db") as pond:
        yield pond


@contextlib.asynccontextmanager
async def _remote(folder: Path) -> AsyncIterator[Pond]:
    async with _local(folder) as pond, running(pond) as url, millpond.connect(url, timeout=20) as remote:
        yield remote


async def _play(folder: Path, where: str) -> None:
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    seed = int(os.environ.get("MILLPOND_STORM_SEED", random.SystemRandom().randrange(2**32)))
    print(f"MILLPOND_STORM_SEED={seed}")
    async with (_local if where == "sqlite" else _remote)(folder) as pond:
        storm = Storm(pond, seed, 1.0 if where == "sqlite" else 10.0)
        await storm.blow(min(WARM, CALLS // 2))
        await storm.settle()
        tasks, threads, files, memory = len(asyncio.all_tasks()), threading.active_count(), _descriptors(), _memory()
        await storm.blow(CALLS)
        await storm.settle()
        async with asyncio.timeout(30):
            while len(asyncio.all_tasks()) > tasks:  # connections that clients have left end with the next turns
                await asyncio.sleep(0.02)
        gc.collect()
        grown = (threading.active_count() - threads, _descriptors() - files, _memory() - memory)
        print(f"{where}: {storm.done} done, {storm.given_up} given up; threads, files, bytes more: {grown}")
        assert not storm.unexpected, storm.unexpected[0]
        assert storm.given_up > CALLS / 20
        assert storm.done > CALLS / 20
        assert grown[0] == 0
        # A few connections more or less are kept for later calls; each is two, as both ends are here.
        assert grown[1] <= 4 * AT_ONCE
        assert grown[2] < 32 * 1024 * 1024 + 200 * storm.done
        left: set[str] = set()
        while any((counts := await storm.queue.counts())[:4]):
            messages = await storm.queue.receive(500, wait=1.0)
            left |= {message.id for message in messages}
            await storm.queue.ack_many(messages)
        assert counts.dead == 0
        assert not left & storm.acked, "what was acked came back"
        assert len(storm.told) > CALLS / 100
    gc.collect()
    assert complaints == []
    if where == "sqlite":
        async with _local(folder) as pond:
            assert await pond.verify() == []


@pytest.mark.parametrize("where", ["sqlite", "http"])
def test_nothing_is_left_of_calls_that_were_given_up(tmp_path: Path, where: str) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if where == "http" else None) as runner:
        runner.run(_play(tmp_path, where))
