"""What docs/concepts/guarantees.md says is different in a bucket is different."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from millpond.errors import StoreError
from millpond.pond import Pond
from millpond.stores.base import Requests
from millpond.stores.objects import names, records
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.requests import CountedBucket
from millpond.stores.objects.store import ObjectStore
from millpond.testing import ManualClock


class Bench:
    """A bucket, and ponds on it that are not told of each other's doings: nobody waits, so nobody listens."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.bucket = MemoryBucket(clock=self.clock)

    def store(self, **options: Any) -> ObjectStore:
        return ObjectStore(self.bucket.share(), clock=self.clock, **{"measure_skew": False, **options})

    @asynccontextmanager
    async def pond(self, store: ObjectStore | None = None) -> AsyncIterator[Pond]:
        async with Pond(store or self.store(), clock=self.clock) as pond:
            yield pond


async def test_lists_are_in_order_of_when_messages_were_to_be_due() -> None:
    bench = Bench()
    async with bench.pond() as pond:
        orders = pond.queue("orders")
        late = (await orders.enqueue(b"late", delay=60, max_attempts=1)).message_id
        soon = (await orders.enqueue(b"soon", delay=30, max_attempts=1)).message_id
        bench.clock.advance(61)
        for message in await orders.receive(count=2):
            await message.nack()
        assert [dead.id for dead in await orders.dead_letters.list()] == [soon, late]

        later = (await orders.enqueue(b"later", delay=20, priority=9)).message_id
        sooner = (await orders.enqueue(b"sooner", delay=10, priority=0)).message_id
        page = await pond.service.list_messages(None, "orders")
        assert [record.item.id for record in page.records] == [sooner, later]


async def test_a_pause_holds_within_a_minute_for_processes_that_are_not_told() -> None:
    bench = Bench()
    async with bench.pond() as mine, bench.pond() as theirs:
        for _ in range(3):
            await mine.queue("orders").enqueue(b"x")
        assert len(await theirs.queue("orders").receive()) == 1
        await mine.queue("orders").pause()
        assert await mine.queue("orders").receive() == []
        bench.clock.advance(59)
        assert len(await theirs.queue("orders").receive()) == 1
        bench.clock.advance(2)
        assert await theirs.queue("orders").receive() == []


async def test_who_hands_out_what_it_looked_at_before_does_not_see_what_is_more_urgent_since() -> None:
    bench = Bench()
    async with bench.pond() as mine, bench.pond() as theirs:
        for _ in range(4):
            await mine.queue("orders").enqueue(b"old")
        assert (await theirs.queue("orders").receive())[0].payload == b"old"
        await mine.queue("orders").enqueue(b"urgent", priority=9)
        order = [(await theirs.queue("orders").receive())[0].payload for _ in range(4)]
        assert order == [b"old", b"old", b"old", b"urgent"]


async def test_acks_at_the_same_time_share_a_request_where_one_deletes_several_objects() -> None:
    for batch, expected in ((1000, 1), (1, 10)):
        bench = Bench()
        store = ObjectStore(CountedBucket(bench.bucket.share(), batch=batch), clock=bench.clock, measure_skew=False)
        async with bench.pond(store) as pond:
            orders = pond.queue("orders")
            await orders.enqueue_many([b"x"] * 10)
            messages = await orders.receive(count=10)
            pond.reset_requests()
            await orders.ack_many(messages)
            assert pond.requests().total == Requests(deletes=expected)


async def test_counts_take_a_request_for_each_thousand_messages() -> None:
    bench = Bench()
    async with bench.pond() as pond:
        orders = pond.queue("orders")
        await orders.enqueue_many([b"x"] * 2500)
        pond.reset_requests()
        assert (await orders.counts()).ready == 2500
        # Three pages of live messages, and one of dead letters that finds none.
        assert pond.requests().total == Requests(lists=4)


async def test_a_clock_that_is_wrong_is_corrected_to_the_buckets() -> None:
    bench = Bench()
    wrong = ManualClock(bench.clock.now_ms() + 40_000)
    store = ObjectStore(bench.bucket.share(), clock=wrong)
    async with Pond(store, clock=wrong) as ahead, bench.pond() as other:
        assert ahead.statistics()["store"]["clock_offset"] == pytest.approx(-40_000, abs=1000)
        await other.queue("orders").enqueue(b"x")
        await other.queue("orders").receive()
        # By its own clock the lease would have ended.
        assert await ahead.queue("orders").receive() == []


async def hurry(bench: Bench, task: asyncio.Task[Any]) -> Any:
    """Let the test's clock run until the task has ended."""
    for _ in range(1000):
        if task.done():
            break
        bench.clock.advance(0.05)
        await asyncio.sleep(0)
    if not task.done():
        task.cancel()
    return await task


async def test_a_producer_that_died_before_its_message_holds_the_key_for_some_two_seconds() -> None:
    bench = Bench()
    async with bench.pond() as dying, bench.pond() as next_one:
        slow = asyncio.Event()
        engine = dying.store._engine  # type: ignore[attr-defined]
        create = engine.create_record

        async def stopped(*arguments: Any) -> Any:
            await slow.wait()
            return await create(*arguments)

        engine.create_record = stopped
        first = asyncio.create_task(dying.queue("orders").enqueue(b"first", dedup_key="k"))
        for _ in range(20):
            await asyncio.sleep(0)
        before = bench.clock.now_ms()
        receipt = await hurry(bench, asyncio.create_task(next_one.queue("orders").enqueue(b"next", dedup_key="k")))
        assert not receipt.duplicate
        assert 1_000 < bench.clock.now_ms() - before < 6_000
        kinds = [records.form(len(data)).kind for name, data in bench.bucket.objects.items() if "/m/" in name]
        assert sorted(kinds) == [records.Kind.PLAIN, records.Kind.GONE]
        # It was not dead at all. Its message does not come any more, and it is told of the other.
        slow.set()
        late = await hurry(bench, first)
        assert (late.duplicate, late.message_id) == (True, receipt.message_id)
        assert (await next_one.queue("orders").counts()).ready == 1


async def test_a_key_whose_note_was_not_confirmed_is_confirmed_by_the_next_while_its_message_is_there() -> None:
    bench = Bench()
    async with bench.pond() as pond:
        orders = pond.queue("orders")
        markers = pond.store._markers  # type: ignore[attr-defined]
        real = markers.confirm

        async def fail(claim: Any) -> str | None:
            raise StoreError("refused")

        markers.confirm = fail
        first = (await orders.enqueue(b"x", dedup_key="k")).message_id
        markers.confirm = real
        again = await orders.enqueue(b"x", dedup_key="k")
        assert (again.message_id, again.duplicate) == (first, True)
        [message] = await orders.receive()
        await message.ack()
        after = await orders.enqueue(b"x", dedup_key="k")
        assert (after.message_id, after.duplicate) == (first, True)


async def test_a_key_whose_note_was_not_confirmed_outlives_its_message() -> None:
    bench = Bench()
    async with bench.pond() as pond:
        orders = pond.queue("orders")
        markers = pond.store._markers  # type: ignore[attr-defined]
        real = markers.confirm

        async def fail(claim: Any) -> str | None:
            raise StoreError("refused")

        markers.confirm = fail
        first = (await orders.enqueue(b"x", dedup_key="k")).message_id
        markers.confirm = real
        [message] = await orders.receive()
        await message.ack()
        after = await hurry(bench, asyncio.create_task(orders.enqueue(b"x", dedup_key="k")))
        assert (after.message_id, after.duplicate) == (first, True)


async def test_who_meets_others_chooses_by_chance_but_for_the_priority() -> None:
    bench = Bench()
    store = bench.store()
    async with bench.pond(store) as mine:
        low = [(await mine.queue("orders").enqueue(b"x")).message_id for _ in range(30)]
        high = (await mine.queue("orders").enqueue(b"x", priority=9)).message_id
    store = bench.store()
    async with bench.pond(store) as mine, bench.pond() as theirs:
        name = names.parse(next(name for name in bench.bucket.objects if "/m/4/" in name))
        for _ in range(8):
            store._engine.lost_claim(name)
        got = [message.id for message in await mine.queue("orders").receive(count=20)]
        assert got[0] == high
        assert got[1:] != low[:19]
        assert set(got) < {high, *low}
        rest = [message.id for message in await theirs.queue("orders").receive(count=20)]
        assert sorted([*got, *rest]) == sorted([*low, high])
