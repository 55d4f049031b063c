"""The collector: expired messages that nobody asks for, and what belongs to nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.unit.service.garbled import GarbledStore

import millpond.testing
from millpond.errors import LeaseLost, StoreError
from millpond.model.clock import ManualClock
from millpond.service import collector
from millpond.service.collector import Collected
from millpond.service.config import Config
from millpond.stores.base import PutDocument
from millpond.stores.faulty import Call, Fault, Gate, fail_before, hold, nth
from millpond.stores.memory import MemoryStore
from millpond.testing import TestPond

NEVER = 90_000.0
"""An interval between passes that no test here lets go by: each pass is the test's own."""


@asynccontextmanager
async def pond_of(**config: Any) -> AsyncIterator[tuple[TestPond, GarbledStore]]:
    """A pond whose collector runs when told to, and its store."""
    clock = ManualClock()
    store = GarbledStore(MemoryStore(clock=clock))
    options = {"collect_interval": NEVER, **config}
    async with millpond.testing.pond(store=store, clock=clock, config=Config(**options)) as pond:
        yield pond, store


async def later(pond: TestPond, seconds: float) -> Collected:
    """What a pass finds after so many seconds."""
    await pond.advance(seconds)
    return await pond.collect()


# Expired messages


async def test_an_expired_message_is_discarded_unless_its_queue_says_otherwise() -> None:
    async with pond_of() as (pond, _):
        queue = pond.queue("q")
        await queue.enqueue(b"short", ttl=10)
        await queue.enqueue(b"long", ttl=20)
        await queue.enqueue(b"for ever")
        assert (await later(pond, 9.999)).expired == 0
        assert await later(pond, 0.001) == Collected(expired=1, orphans=0)
        assert [await view.payload() for view in await queue.peek(5)] == [b"long", b"for ever"]
        assert (await queue.counts()).dead == 0
        assert await pond.collect() == Collected()
        assert (await later(pond, 1000)).expired == 1
        assert await pond.verify() == []


async def test_an_expired_message_is_kept_as_a_dead_letter_where_the_policy_says_so() -> None:
    async with pond_of() as (pond, _):
        queue = pond.queue("q")
        await queue.set_policy(on_expired="dead_letter")
        receipt = await queue.enqueue(b"x", ttl=10)
        assert (await later(pond, 10)).expired == 1
        dead = await queue.dead_letters.get(receipt.message_id)
        assert (dead.dead_reason, await dead.payload()) == ("expired", b"x")
        # A dead letter does not expire again.
        assert (await later(pond, 1000)).expired == 0
        assert (await queue.counts()).dead == 1


async def test_the_policy_that_counts_is_the_one_of_the_messages_queue() -> None:
    async with pond_of() as (pond, _):
        await pond.queue("kept").set_policy(on_expired="dead_letter")
        for name in ("kept", "thrown"):
            await pond.queue(name).enqueue(b"x", ttl=10)
        assert (await later(pond, 10)).expired == 2
        assert (await pond.queue("kept").counts()).dead == 1
        assert (await pond.queue("thrown").counts()).dead == 0
        assert await pond.queues() == [("default", "kept")]


async def test_a_held_message_is_its_holders_until_the_lease_ends() -> None:
    async with pond_of() as (pond, _):
        queue = pond.queue("q")
        await queue.enqueue(b"x", ttl=10)
        [held] = await queue.receive(visibility=60)
        assert (await later(pond, 59)).expired == 0
        await held.extend(60)
        assert (await later(pond, 59)).expired == 0
        assert (await later(pond, 1)).expired == 1
        with pytest.raises(LeaseLost):
            await held.ack()


async def test_a_delayed_message_can_expire_before_it_is_due() -> None:
    async with pond_of() as (pond, _):
        await pond.queue("q").enqueue(b"x", ttl=10, delay=100)
        assert (await later(pond, 10)).expired == 1


async def test_any_number_is_settled_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "BATCH", 10)
    async with pond_of() as (pond, store):
        await pond.queue("q").enqueue_many([b"x"] * 35, ttl=10)
        await pond.queue("other").enqueue_many([b"x"] * 5, ttl=10)
        writes = store.count("write")
        assert (await later(pond, 10)).expired == 40
        assert store.count("write") - writes == 4
        assert await pond.queues() == []


async def test_what_was_collected_is_handed_out_to_nobody() -> None:
    async with pond_of() as (pond, _):
        queue = pond.queue("q")
        await queue.enqueue(b"x", ttl=10)
        await pond.service.refresh_ready_cache(None, "q")
        assert (await later(pond, 10)).expired == 1
        assert await queue.receive(5) == []
        assert (await queue.counts()).ready == 0


async def test_the_next_of_an_ordering_key_goes_when_the_collector_took_the_one_before() -> None:
    async with pond_of(poll_interval=1000, poll_max_interval=1000) as (pond, _):
        queue = pond.queue("q")
        await queue.enqueue(b"first", ordering_key="customer-1", ttl=10)
        second = await queue.enqueue(b"second", ordering_key="customer-1")
        [message] = await queue.receive()
        await message.nack(delay=500)
        waiting = asyncio.create_task(pond.dispatcher.wait(None, "q"))
        await pond.advance(10)
        assert not waiting.done()
        assert (await pond.collect()).expired == 1
        await pond.settle()
        candidate = await asyncio.wait_for(waiting, 10)
        assert candidate is not None
        assert candidate.id == second.message_id


# What is in the way


async def test_what_cannot_be_read_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also when there are more of it than one batch holds, and it stands first."""
    monkeypatch.setattr(collector, "BATCH", 3)
    async with pond_of() as (pond, store):
        queue = pond.queue("q")
        bad = await queue.enqueue_many([b"bad"] * 8, ttl=10)
        await queue.enqueue_many([b"good"] * 5, ttl=11)
        store.bad = {receipt.message_id for receipt in bad}
        with caplog.at_level(logging.ERROR, "millpond.collector"):
            assert (await later(pond, 11)).expired == 5
        assert [entry.message for entry in caplog.records] == ["millpond.record.unreadable"] * 8
        assert {vars(entry)["message_id"] for entry in caplog.records} == store.bad
        assert (await queue.counts()).ready == 8


async def test_a_policy_that_cannot_be_read_holds_up_no_other_queue() -> None:
    async with pond_of() as (pond, store):
        await pond.queue("broken").enqueue(b"x", ttl=10)
        await pond.queue("sound").enqueue(b"x", ttl=11)
        await store.write([PutDocument("default", "broken", None, b"\xff")])
        assert (await later(pond, 11)).expired == 1
        assert (await pond.queue("broken").counts()).ready == 1
        assert (await pond.queue("sound").counts()).ready == 0


@pytest.mark.parametrize("method", ["expired", "write", "document", "sweep"])
async def test_a_store_that_fails_is_another_matter(method: str) -> None:
    async with pond_of() as (pond, store):
        await pond.queue("q").enqueue(b"x", ttl=10)
        await pond.advance(10)
        store.plan = nth(1, method, fail_before(StoreError("no disk")))
        with pytest.raises(StoreError, match="no disk"):
            await pond.collect()
        assert (await later(pond, 1)).expired == (0 if method == "sweep" else 1)
        assert (await pond.queue("q").counts()).ready == 0


async def test_a_message_that_changed_meanwhile_is_left_to_whoever_changed_it() -> None:
    async with pond_of() as (pond, store):
        queue = pond.queue("q")
        first, second = [(await queue.enqueue(b"x", ttl=10)).message_id for _ in range(2)]
        await pond.advance(10)
        gate = Gate()
        store.plan = nth(1, "write", hold(gate))
        collecting = asyncio.create_task(pond.collect())
        await gate.reached.wait()
        await pond.service.move_to_dlq(await pond.service.get_message(None, "q", first), "by hand")
        gate.open()
        assert (await collecting).expired == 1
        assert [(dead.id, dead.dead_reason) for dead in await queue.dead_letters.list()] == [(first, "by hand")]
        assert (await queue.counts()).ready == 0
        assert await pond.service.store.get("default", "q", second) is None


async def test_a_pass_that_loses_every_race_ends() -> None:
    async with pond_of() as (pond, store):
        queue = pond.queue("q")
        id = (await queue.enqueue(b"x", ttl=10)).message_id
        await pond.advance(10)
        other = millpond.testing.pond(store=store.inner.share(), clock=pond.manual_clock, seed=1)  # type: ignore[attr-defined]
        calls = 0

        async def rival() -> None:
            # It changes the message each time just before the collector's write.
            async with other:
                record = await other.service.get_message(None, "q", id)
                await other.service._write_update(record, record.status)

        write = store.write

        async def raced(ops: Any) -> Any:
            nonlocal calls
            calls += 1
            assert calls < 10, "it tries for ever"
            await rival()
            return await write(ops)

        store.write = raced  # type: ignore[method-assign]
        assert await pond.collect() == Collected()
        assert calls == 1


async def test_two_at_once_settle_each_message_once() -> None:
    clock = ManualClock()
    store = MemoryStore(clock=clock)
    config = Config(collect_interval=NEVER)
    async with (
        millpond.testing.pond(store=store, clock=clock, config=config) as one,
        millpond.testing.pond(store=store.share(), clock=clock, config=config, seed=1) as two,
    ):
        await one.queue("q").set_policy(on_expired="dead_letter")
        await one.queue("q").enqueue_many([b"x"] * 30, ttl=10)
        await one.advance(10)
        results = await asyncio.gather(one.collect(), two.collect())
        assert sum(result.expired for result in results) == 30
        assert (await one.queue("q").counts()).dead == 30


# What belongs to nothing


async def test_payloads_without_a_record_go_when_they_are_old() -> None:
    async with pond_of(orphan_age=100) as (pond, store):
        large = bytes(200_000)
        queue = pond.queue("q")
        await queue.enqueue(large)
        store.plan = nth(1, "write", fail_before())
        with pytest.raises(StoreError):
            await queue.enqueue(large)
        assert pond.statistics()["store"]["blobs"] == 2
        assert (await later(pond, 99)).orphans == 0
        assert (await later(pond, 2)).orphans == 1
        assert pond.statistics()["store"]["blobs"] == 1
        [message] = await queue.receive()
        assert await message.read() == large


async def test_ended_dedup_keys_go() -> None:
    async with pond_of() as (pond, _):
        queue = pond.queue("q")
        await queue.enqueue(b"x", dedup_key="once", dedup_window=50)
        [message] = await queue.receive()
        await message.ack()
        assert (await later(pond, 49)).orphans == 0
        assert (await queue.enqueue(b"x", dedup_key="once")).duplicate
        assert (await later(pond, 2)).orphans == 1
        assert not (await queue.enqueue(b"x", dedup_key="once")).duplicate


async def test_a_pass_says_what_it_did(caplog: pytest.LogCaptureFixture) -> None:
    async with pond_of() as (pond, _):
        await pond.queue("q").enqueue(b"x", ttl=10)
        with caplog.at_level(logging.INFO, "millpond.collector"):
            await pond.collect()
            assert caplog.records == []
            await later(pond, 10)
        [entry] = caplog.records
        assert (entry.message, vars(entry)["expired"], vars(entry)["orphans"]) == ("millpond.collected", 1, 0)


# By itself


async def test_a_pond_collects_by_itself() -> None:
    async with pond_of(collect_interval=30) as (pond, store):
        await pond.queue("q").enqueue_many([b"x"] * 3, ttl=10)
        await pond.advance(20)
        assert store.count("sweep") == 0
        for _ in range(90):
            await pond.advance(1)
        assert await pond.queues() == []
        # Each pass comes a quarter of the interval early or late at most.
        assert 2 <= store.count("sweep") <= 4
        passes = store.count("sweep")
    assert store.count("sweep") == passes
    assert pond.manual_clock.pending_timers == 0


async def test_a_pass_that_failed_is_logged_and_followed_by_the_next(caplog: pytest.LogCaptureFixture) -> None:
    async with pond_of(collect_interval=30) as (pond, store):

        def plan(call: Call) -> Fault | None:
            return fail_before(StoreError("no disk")) if call.method == "expired" else None

        store.plan = plan
        await pond.queue("q").enqueue(b"x", ttl=10)
        with caplog.at_level(logging.WARNING, "millpond.pond"):
            for _ in range(40):
                await pond.advance(1)
        assert "millpond.collect.failed" in [entry.message for entry in caplog.records]
        assert (await pond.queue("q").counts()).ready == 1
        store.plan = {}
        for _ in range(40):
            await pond.advance(1)
        assert (await pond.queue("q").counts()).ready == 0
