"""A request that arrives when nobody thinks of it any more."""

from __future__ import annotations

import pytest
from tests.model.hasty import HastyClock

from millpond.model.clock import ManualClock
from millpond.stores.objects.faulty_bucket import FaultyBucket, lost_later, nth
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.store import ObjectStore
from millpond.testing import pond

LONG = 10_000
"""Requests: until the test has them arrive."""


@pytest.mark.parametrize("way", ["redrive", "bury"])
async def test_what_a_move_brings_does_not_come_back_when_it_was_used_up(way: str) -> None:
    clock = ManualClock()
    inner = MemoryBucket(clock=clock)
    bucket = FaultyBucket(inner)
    acked = 0
    async with pond(store=ObjectStore(bucket, clock=HastyClock(clock), measure_skew=False), clock=clock) as live:
        queue = live.queue("q")

        async def use_up() -> int:
            await queue.dead_letters.redrive()
            messages = await queue.receive(10)
            await queue.ack_many(messages)
            return len(messages)

        await queue.enqueue(b"once")
        [message] = await queue.receive()
        if way == "bury":
            bucket.plan = nth(1, "create", lost_later(LONG))
        await message.bury("by hand")
        if way == "redrive":
            bucket.plan = nth(1, "create", lost_later(LONG))
        acked += await use_up()
        await live.advance(20)
        await bucket.settle()
        for _ in range(3):
            acked += await use_up()
            await live.advance(61)
            await live.collect()
        assert acked == 1
        assert not [name for name in inner.objects if "/m/" in name or "/d/" in name]
