"""A request that arrives when nobody thinks of it any more."""

from __future__ import annotations

import asyncio

import pytest
from tests.model.hasty import HastyClock

from millpond.errors import StoreError
from millpond.model.clock import ManualClock
from millpond.stores.faulty import Gate
from millpond.stores.objects.faulty_bucket import FaultyBucket, hold, lost_later, nth
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


async def test_a_dead_producers_message_does_not_arrive_beside_the_one_that_took_its_key() -> None:
    clock = ManualClock()
    inner = MemoryBucket(clock=clock)
    dead = FaultyBucket(inner)
    async with pond(store=ObjectStore(dead, clock=HastyClock(clock), measure_skew=False), clock=clock) as first:
        # The key is taken, the message is sent, and the process is killed while that is on its way.
        dead.plan = lambda request: lost_later(LONG) if "/m/" in request.name and request.method == "create" else None
        with pytest.raises(StoreError):
            await first.queue("q").enqueue(b"once", dedup_key="key")
    other = ObjectStore(inner.share(), clock=HastyClock(clock), measure_skew=False)
    async with pond(store=other, clock=clock, seed=1) as second:
        await second.queue("q").enqueue(b"once", dedup_key="key")
        await dead.share(inner.share()).settle()
        clock.advance(61)
        await second.collect()
        assert (await second.queue("q").counts()).ready == 1


async def test_a_slow_producer_learns_of_the_message_that_took_its_key() -> None:
    clock = ManualClock()
    inner = MemoryBucket(clock=clock)
    gate = Gate()
    slow = FaultyBucket(inner, lambda request: hold(gate) if "/m/" in request.name else None)
    stores = [ObjectStore(bucket, clock=HastyClock(clock), measure_skew=False) for bucket in (slow, inner.share())]
    async with pond(store=stores[0], clock=clock) as first, pond(store=stores[1], clock=clock, seed=1) as second:
        waiting = asyncio.ensure_future(first.queue("q").enqueue(b"once", dedup_key="key"))
        await gate.reached.wait()
        receipt = await second.queue("q").enqueue(b"once", dedup_key="key")
        gate.open()
        late = await waiting
        assert (late.message_id, late.duplicate, receipt.duplicate) == (receipt.message_id, True, False)
        assert (await second.queue("q").counts()).ready == 1
