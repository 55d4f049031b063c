"""Purges and redrives on a store that answers for a part of what it was asked."""

from __future__ import annotations

import pytest

from millpond.errors import StoreBusy
from millpond.model.clock import ManualClock
from millpond.stores.objects.faulty_bucket import Fault, FaultyBucket, Request, throttled
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.store import ObjectStore
from millpond.testing import pond

COUNT = 6


class World:
    """Six messages in a bucket, some of whose changes are refused."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.bucket = FaultyBucket(MemoryBucket(clock=self.clock))
        self.pond = pond(store=ObjectStore(self.bucket, clock=self.clock, measure_skew=False), clock=self.clock)

    def refuse(self, *numbers: int) -> None:
        """Of the changes of messages from now on those with these numbers, or all."""
        seen = 0

        def plan(request: Request) -> Fault | None:
            nonlocal seen
            if request.method != "replace":
                return None
            seen += 1
            return throttled() if not numbers or seen in numbers else None

        self.bucket.plan = plan


async def test_a_purge_goes_on_where_some_were_left_out() -> None:
    world = World()
    async with world.pond:
        queue = world.pond.queue("q")
        await queue.enqueue_many([b"x"] * COUNT)
        world.refuse(2, 5, 7)
        assert await queue.purge() == COUNT
        assert (await queue.counts()).ready == 0


async def test_dead_letters_are_redriven_where_some_were_left_out() -> None:
    world = World()
    async with world.pond:
        queue = world.pond.queue("q")
        await queue.enqueue_many([b"x"] * COUNT)
        for message in await queue.receive(COUNT):
            await message.bury("by hand")
        world.refuse(1, 4)
        assert await queue.dead_letters.redrive() == COUNT
        assert (await queue.counts()).ready == COUNT


async def test_a_purge_that_gets_nowhere_says_so() -> None:
    world = World()
    async with world.pond:
        queue = world.pond.queue("q")
        await queue.enqueue_many([b"x"] * COUNT)
        world.refuse()
        with pytest.raises(StoreBusy):
            await queue.purge()
        assert (await queue.counts()).ready == COUNT
