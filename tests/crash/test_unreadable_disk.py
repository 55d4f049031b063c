"""Reads of the database fail for a while: each call says so, nobody waits for ever, and afterwards all goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tests.crash.power import Disk

from millpond.errors import StoreError
from millpond.model.clock import ManualClock
from millpond.stores.sqlite import SqliteStore
from millpond.testing import TestPond, pond


class Pair:
    """Two ponds on one file; the disk of the first can be made unreadable."""

    def __init__(self, path: Path) -> None:
        self.clock = ManualClock()
        self.disk = Disk()
        self.ours = pond(store=SqliteStore(path, clock=self.clock, vfs=self.disk.vfs_name), clock=self.clock)
        self.other = pond(store=SqliteStore(path, clock=self.clock), clock=self.clock, seed=1)

    async def __aenter__(self) -> Pair:
        await self.ours.open()
        await self.other.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.other.close()
        await self.ours.close()

    async def break_reads(self) -> None:
        """What is cached is out of date from here on, and nothing can be read anew."""
        await self.other.queue("elsewhere").enqueue_many([bytes(3000)] * 30)
        self.disk.broken_reads = True


CALLS: dict[str, Callable[[TestPond], Awaitable[object]]] = {
    "enqueue": lambda live: live.queue("q").enqueue(b"x"),
    "receive": lambda live: live.queue("q").receive(),
    "receive, waiting": lambda live: live.queue("q").receive(wait=1.0),
    "counts": lambda live: live.queue("q").counts(),
    "dead letters": lambda live: live.queue("q").dead_letters.list(),
    "queues": lambda live: live.queues(),
    "verify": lambda live: live.verify(),
    "collect": lambda live: live.collect(),
}


@pytest.mark.parametrize("name", CALLS)
async def test_a_call_says_what_the_matter_is_and_the_next_one_works(name: str, tmp_path: Path) -> None:
    async with Pair(tmp_path / "work.db") as pair:
        await pair.ours.queue("q").enqueue(b"there")
        for message in await pair.ours.queue("q").receive():
            await message.ack()
        await pair.break_reads()
        with pytest.raises(StoreError, match=r"work\.db.*IOError: input/output error"):
            await CALLS[name](pair.ours)
        pair.disk.broken_reads = False
        await pair.ours.queue("q").enqueue(b"something to receive")
        await CALLS[name](pair.ours)
        assert await pair.ours.verify() == []


async def test_a_waiter_and_the_writes_beside_it_outlive_it(tmp_path: Path) -> None:
    async with Pair(tmp_path / "work.db") as pair:
        waiting = asyncio.create_task(pair.ours.queue("q").receive(wait=1000.0))
        while not pair.ours.dispatcher.has_active_watcher(None, "q"):
            await asyncio.sleep(0.01)
        await pair.break_reads()
        # The change feed asks at its low rate whether others wrote: at rest, and with writes under way.
        await pair.ours.advance(1.5)
        refused = [asyncio.create_task(pair.ours.queue("elsewhere").enqueue(b"refused")) for _ in range(3)]
        await asyncio.sleep(0)
        await pair.ours.advance(1.5)
        for error in await asyncio.gather(*refused, return_exceptions=True):
            assert isinstance(error, StoreError)
        assert not waiting.done()
        pair.disk.broken_reads = False
        await pair.other.queue("q").enqueue(b"news")
        [message] = await waiting
        assert message.payload == b"news"
        assert (await pair.ours.queue("elsewhere").counts()).ready == 30
