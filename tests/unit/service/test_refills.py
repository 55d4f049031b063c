"""Candidates through the service: refills and who shares them, what cannot be read, and bounded memory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.unit.service.garbled import GarbledStore

import millpond.testing
from millpond.errors import StoreError
from millpond.model.clock import ManualClock
from millpond.service import core, ready
from millpond.service.claiming import HAND_OUT_LIMIT
from millpond.service.config import Config
from millpond.service.consuming import Delivery
from millpond.service.ready import Record
from millpond.service.service import QueueService
from millpond.stores.faulty import Call, Fault, FaultyStore, Gate, fail_before, hold, nth
from millpond.stores.memory import MemoryStore
from millpond.testing import TestPond

KEY = ("default", "q")


@asynccontextmanager
async def pond_of(**limits: Any) -> AsyncIterator[tuple[TestPond, GarbledStore]]:
    """A pond, and its store."""
    clock = ManualClock()
    store = GarbledStore(MemoryStore(clock=clock))
    async with millpond.testing.pond(store=store, clock=clock, config=Config(**limits)) as pond:
        yield pond, store


def on_ready(fault: Fault) -> Any:
    def plan(call: Call) -> Fault | None:
        return fault if call.method == "ready" else None

    return plan


async def numbers(service: QueueService, candidates: Iterable[Record]) -> list[int]:
    """What these messages carry."""
    found = []
    for one in candidates:
        found += [int(chunk) async for chunk in service.payload_chunks(one)]
    return found


async def fill(pond: TestPond, count: int, **options: Any) -> list[str]:
    """Messages 0, 1, 2 … from another producer: nothing of them is in this pond's cache."""
    payloads = [b"%d" % number for number in range(count)]
    receipts = await pond.queue("q").enqueue_many(payloads, **options)
    return [receipt.message_id for receipt in receipts]


# Sharing a refill


async def test_who_comes_during_a_refill_shares_it() -> None:
    async with pond_of() as (pond, store):
        await fill(pond, 30)
        service = pond.service
        gate = Gate()
        store.plan = on_ready(hold(gate))
        tasks = [asyncio.create_task(service.next_candidates(None, "q", 3)) for _ in range(10)]
        await asyncio.wait_for(gate.reached.wait(), 10)
        await pond.settle()
        gate.open()
        found = [one for candidates in await asyncio.gather(*tasks) for one in candidates]
        assert await numbers(service, found) == list(range(30))
        assert store.count("ready") == 1
        stats = service.ready_cache_stats()
        assert (stats.next_calls, stats.list_scans, stats.refresh_waits) == (10, 1, 9)


async def test_who_shares_a_refill_shares_its_error() -> None:
    async with pond_of() as (pond, store):
        await fill(pond, 3)
        gate = Gate()
        calls = 0

        def plan(call: Call) -> Fault | None:
            nonlocal calls
            calls += call.method == "ready"
            if call.method != "ready" or calls > 1:
                return None
            return Fault(fail_before().point, error=StoreError("no disk"), gate=gate)

        store.plan = plan
        tasks = [asyncio.create_task(pond.service.next_candidates(None, "q", 1)) for _ in range(5)]
        tasks.append(asyncio.create_task(pond.service.refresh_ready_cache(None, "q")))  # type: ignore[arg-type]
        await asyncio.wait_for(gate.reached.wait(), 10)
        await pond.settle()
        gate.open()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, StoreError)
            assert str(result) == "no disk"
        # The next one asks again.
        assert await numbers(pond.service, await pond.service.next_candidates(None, "q", 5)) == [0, 1, 2]


@pytest.mark.parametrize("followers", [1, 5])
async def test_who_shares_a_refill_is_not_cancelled_with_its_leader(followers: int) -> None:
    async with pond_of() as (pond, store):
        await fill(pond, 5)
        gate = Gate()
        store.plan = on_ready(hold(gate))
        leader = asyncio.create_task(pond.service.next_candidates(None, "q", 1))
        await asyncio.wait_for(gate.reached.wait(), 10)
        tasks = [asyncio.create_task(pond.service.next_candidates(None, "q", 1)) for _ in range(followers)]
        await pond.settle()
        leader.cancel()
        gate.open()
        found = [one for candidates in await asyncio.gather(*tasks) for one in candidates]
        assert await numbers(pond.service, found) == list(range(followers))
        assert leader.cancelled()


async def test_a_follower_that_leaves_takes_nobody_with_it() -> None:
    async with pond_of() as (pond, store):
        await fill(pond, 5)
        gate = Gate()
        store.plan = on_ready(hold(gate))
        leader = asyncio.create_task(pond.service.next_candidates(None, "q", 1))
        await asyncio.wait_for(gate.reached.wait(), 10)
        follower = asyncio.create_task(pond.service.next_candidates(None, "q", 1))
        await pond.settle()
        follower.cancel()
        await pond.settle()
        gate.open()
        assert await numbers(pond.service, await leader) == [0]
        assert follower.cancelled()


async def test_a_change_during_a_refill_asks_for_another() -> None:
    async with pond_of() as (pond, store):
        await fill(pond, 5)
        gate = Gate()
        store.plan = on_ready(hold(gate))
        task = asyncio.create_task(pond.service.next_candidates(None, "q", 1))
        await asyncio.wait_for(gate.reached.wait(), 10)
        pond.service.foreign_change(*KEY)
        gate.open()
        assert len(await task) == 1
        for asked in (2, 2):
            assert len(await pond.service.next_candidates(None, "q", 1)) == 1
            assert store.count("ready") == asked


async def test_a_change_is_not_forgotten_by_a_refill_that_failed() -> None:
    async with pond_of() as (pond, store):
        await fill(pond, 5)
        assert len(await pond.service.next_candidates(None, "q", 1)) == 1
        pond.service.foreign_change(*KEY)
        store.plan = nth(1, "ready", fail_before())
        with pytest.raises(StoreError):
            await pond.service.next_candidates(None, "q", 1)
        asked = store.count("ready")
        assert len(await pond.service.next_candidates(None, "q", 1)) == 1
        assert store.count("ready") == asked + 1


async def test_what_is_enqueued_during_a_refill_is_not_missed() -> None:
    async with pond_of() as (pond, store):
        await fill(pond, 1)
        gate = Gate()
        store.plan = on_ready(hold(gate))
        waiting = [asyncio.create_task(pond.dispatcher.wait(None, "q")) for _ in range(2)]
        await asyncio.wait_for(gate.reached.wait(), 10)
        await pond.queue("q").enqueue(b"7")
        gate.open()
        await pond.settle()
        found = [task.result() for task in waiting if task.done()]
        assert await numbers(pond.service, [one for one in found if one is not None]) == [0, 7]


# What cannot be read


async def test_a_record_that_cannot_be_read_holds_up_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async with pond_of() as (pond, store):
        ids = await fill(pond, 5)
        store.bad = {ids[0], ids[3]}
        with caplog.at_level(logging.ERROR, "millpond.service"):
            assert await numbers(pond.service, await pond.service.next_candidates(None, "q", 10)) == [1, 2, 4]
            for _ in range(3):
                assert await pond.service.next_candidates(None, "q", 10) == []
        # Said once, however often it was met.
        assert [(entry.message, vars(entry)["message_id"]) for entry in caplog.records] == [
            ("millpond.record.unreadable", ids[0]),
            ("millpond.record.unreadable", ids[3]),
        ]
        assert await numbers(pond.service, await pond.service.peek(None, "q", 10)) == [1, 2, 4]


@pytest.mark.parametrize("page", [1, 3, 10])
async def test_whole_pages_of_them_hold_up_no_other(page: int) -> None:
    async with pond_of(ready_page_size=page) as (pond, store):
        ids = await fill(pond, 12)
        store.bad = set(ids[:10])
        assert await numbers(pond.service, await pond.service.next_candidates(None, "q", 1)) == [10]
        assert await numbers(pond.service, await pond.service.next_candidates(None, "q", 1)) == [11]
        assert await pond.service.next_candidates(None, "q", 1) == []


async def test_a_queue_of_nothing_else_is_read_once_for_each_question() -> None:
    async with pond_of(ready_page_size=100) as (pond, store):
        store.bad = set(await fill(pond, 5))
        for asked in range(1, 4):
            assert await pond.service.next_candidates(None, "q", 1) == []
            assert store.count("ready") == asked


@pytest.mark.parametrize("page", [2, 100])
async def test_those_that_are_gone_are_forgotten(page: int) -> None:
    async with pond_of(ready_page_size=page) as (pond, store):
        cache = pond.service.cache(KEY)
        for _ in range(3):
            ids = await fill(pond, 20)
            store.bad = set(ids[:5])
            await pond.service.refresh_ready_cache(None, "q")
            assert set(cache.bad) == set(ids[:5])
            await pond.queue("q").purge()
        await fill(pond, 20)
        await pond.service.refresh_ready_cache(None, "q")
        assert len(cache.bad) == 0


async def test_those_beyond_the_page_are_not_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    async with pond_of(ready_page_size=10) as (pond, store):
        ids = await fill(pond, 10, priority=5)
        store.bad = set(ids)
        await pond.service.refresh_ready_cache(None, "q")
        assert set(pond.service.cache(KEY).bad) == set(ids)
        # Others come to stand before them, and the page ends before it reaches them.
        await fill(pond, 40, priority=9)
        await pond.service.refresh_ready_cache(None, "q")
        assert set(pond.service.cache(KEY).bad) == set(ids)
        await pond.queue("q").receive(40)
        await pond.service.refresh_ready_cache(None, "q")
        reports = [entry for entry in caplog.records if entry.message == "millpond.record.unreadable"]
        assert len(reports) == 10


async def test_no_more_than_so_many_are_remembered_or_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ready, "MAX_BAD", 6)
    async with pond_of(ready_page_size=4) as (pond, store):
        ids = await fill(pond, 30)
        store.bad = set(ids[:8])
        for _ in range(3):
            await pond.service.refresh_ready_cache(None, "q")
            assert set(pond.service.cache(KEY).bad) == set(ids[:6])
        # Six that it knows of and a page: the two beyond are passed over all the same.
        assert await numbers(pond.service, await pond.service.next_candidates(None, "q", 2)) == [8, 9]
        reports = [entry for entry in caplog.records if entry.message == "millpond.record.unreadable"]
        assert len(reports) == 6
        store.bad = set(ids[:30])
        before = store.count("ready")
        await pond.service.refresh_ready_cache(None, "q")
        assert store.count("ready") == before + 1


# In flight


async def test_a_candidate_is_offered_once_until_it_is_given_back() -> None:
    async with pond_of() as (pond, _):
        service = pond.service
        await fill(pond, 2)
        one = await service.next_candidate(None, "q")
        assert one is not None
        await service.refresh_ready_cache(None, "q")
        assert await numbers(service, await service.next_candidates(None, "q", 5)) == [1]
        assert await service.next_candidate(None, "q") is None
        assert service.ready_cache_stats().inflight_skips >= 2
        service.give_back([one])
        service.give_back([one])
        assert await numbers(service, await service.next_candidates(None, "q", 5)) == [0]
        assert service.ready_cache_stats().inflight_clears == 1


async def test_inflight_holds_for_a_newer_version_too() -> None:
    async with pond_of() as (pond, _):
        service = pond.service
        [id] = await fill(pond, 1)
        assert await service.next_candidate(None, "q") is not None
        # Somebody else has it, gives it back, and so makes a new version of it.
        async with millpond.testing.pond(store=pond.store.inner.share(), clock=pond.manual_clock) as other:  # type: ignore[attr-defined]
            [message] = await other.queue("q").receive()
            await message.defer()
        await pond.advance(1)
        assert await service.next_candidate(None, "q") is None
        await pond.advance(HAND_OUT_LIMIT / 1000 - 1)
        again = await service.next_candidate(None, "q")
        assert again is not None
        assert (again.id, again.status.attempts) == (id, 1)


async def test_a_taker_that_vanished_blocks_its_candidate_for_a_while_only() -> None:
    async with pond_of() as (pond, _):
        await fill(pond, 1)
        assert await pond.service.next_candidate(None, "q") is not None
        await pond.advance(HAND_OUT_LIMIT / 1000 - 0.001)
        assert await pond.service.next_candidate(None, "q") is None
        await pond.advance(0.001)
        assert await pond.service.next_candidate(None, "q") is not None
        assert pond.service.ready_cache_stats().inflight_clears == 1


async def test_a_message_whose_lease_is_over_is_a_candidate() -> None:
    """The record still names its last lease; that is no reason not to hand it out."""
    async with pond_of() as (pond, _):
        await fill(pond, 1)
        [held] = await pond.queue("q").receive(visibility=10)
        assert await pond.service.next_candidate(None, "q") is None
        assert pond.service.next_due(*KEY) == pond.clock.now_ms() + 10_000
        await pond.advance(10)
        candidate = await pond.service.next_candidate(None, "q")
        assert candidate is not None
        assert candidate.id == held.id
        assert candidate.status.lease is not None


@pytest.mark.parametrize("how", ["nack", "defer"])
async def test_a_message_that_came_back_is_a_candidate_at_once(how: str) -> None:
    async with pond_of() as (pond, _):
        await fill(pond, 1)
        [message] = await pond.queue("q").receive()
        assert await pond.service.next_candidate(None, "q") is None
        await (message.nack() if how == "nack" else message.defer())
        candidate = await pond.service.next_candidate(None, "q")
        assert candidate is not None
        assert (candidate.id, candidate.status.lease) == (message.id, None)


# Single calls


async def test_peeking_takes_nothing() -> None:
    async with pond_of() as (pond, _):
        [id] = await fill(pond, 1)
        for _ in range(2):
            seen = await pond.service.peek_candidate(None, "q")
            assert seen is not None
            assert seen.id == id
        taken = await pond.service.next_candidate(None, "q")
        assert taken is not None
        assert taken.id == id
        assert (await pond.service.peek_candidate(None, "q")) is not None  # The store's answer: nobody has claimed it.
        await pond.service.claim_records([taken])
        assert await pond.service.peek_candidate(None, "q") is None


async def test_update_ready_cache_seeds_the_version_it_is_told_of() -> None:
    async with pond_of() as (pond, store):
        [id] = await fill(pond, 1)
        known = await pond.service.get_message(None, "q", id)
        await pond.service.refresh_ready_cache(None, "q")
        pond.service.update_ready_cache(known)
        asked = store.count("ready")
        candidate = await pond.service.next_candidate(None, "q")
        assert candidate is not None
        assert (candidate.id, candidate.etag) == (id, known.etag)
        assert store.count("ready") == asked


async def test_update_ready_cache_knows_due_times_and_dead_letters() -> None:
    async with pond_of() as (pond, _):
        [later] = await fill(pond, 1, delay=60)
        assert pond.service.next_due(*KEY) is None
        record = await pond.service.get_message(None, "q", later)
        pond.service.update_ready_cache(record)
        assert pond.service.next_due(*KEY) == record.status.visible_at == pond.clock.now_ms() + 60_000
        [now] = await fill(pond, 1)
        await pond.service.refresh_ready_cache(None, "q")
        pond.service.update_ready_cache(await pond.service.move_to_dlq(await pond.service.get_message(None, "q", now)))
        assert await pond.service.next_candidate(None, "q") is None


async def test_a_paused_queue_has_no_candidates() -> None:
    async with pond_of() as (pond, _):
        await fill(pond, 1)
        await pond.queue("q").pause()
        assert await pond.service.next_candidates(None, "q", 5) == []
        await pond.queue("q").resume()
        assert len(await pond.service.next_candidates(None, "q", 5)) == 1


async def test_try_finds_nothing_after_a_false_alarm() -> None:
    async with pond_of() as (pond, _):
        pond.service.foreign_change(*KEY)
        assert await pond.dispatcher.try_(None, "q") is None
        await fill(pond, 1)
        [id] = [one.id for one in [await pond.dispatcher.try_(None, "q")] if one is not None]
        assert (await pond.service.get_message(None, "q", id)).id == id


async def test_the_counters_count_and_can_be_reset() -> None:
    async with pond_of() as (pond, _):
        await fill(pond, 4)
        await pond.service.next_candidates(None, "q", 1)
        await pond.service.refresh_ready_cache(None, "q")
        stats = pond.service.ready_cache_stats()
        assert (stats.list_scans, stats.list_objects, stats.load_count, stats.next_calls) == (2, 8, 7, 1)
        assert (stats.cursor_resets, stats.inflight_skips) == (1, 1)
        await pond.service.next_candidates(None, "q", 1)
        assert stats.next_calls == 1, "a snapshot does not change"
        pond.service.reset_ready_cache_stats()
        assert pond.service.ready_cache_stats() == type(stats)()


# Waiting


@pytest.mark.parametrize("what", ["delay", "lease"])
async def test_a_paused_queue_stands_still_and_nothing_else_does(what: str) -> None:
    """What comes due in a paused queue once kept its waiters' dispatcher looking without a rest."""
    async with millpond.testing.pond() as pond:
        queue = pond.queue("q")
        await queue.enqueue(b"x", delay=10 if what == "delay" else 0)
        if what == "lease":
            await queue.receive(visibility=10)
        waiting = asyncio.create_task(queue.receive(wait=1000))
        await pond.settle()
        await queue.pause()
        before = pond.statistics()["dispatcher"]["polls"]
        for _ in range(60):
            await pond.advance(1)
        assert not waiting.done()
        assert pond.statistics()["dispatcher"]["polls"] - before <= 5
        await queue.resume()
        await pond.settle()
        [message] = await waiting
        assert message.payload == b"x"


async def test_a_pause_by_another_process_ends_for_those_who_wait() -> None:
    store = MemoryStore(clock=(clock := ManualClock()))
    async with (
        millpond.testing.pond(store=store, clock=clock) as pond,
        millpond.testing.pond(store=store.share(), clock=clock, seed=1) as other,
    ):
        await other.queue("q").enqueue(b"x")
        await other.queue("q").pause()
        waiting = asyncio.create_task(pond.queue("q").receive(wait=1000))
        await pond.advance(5)
        assert not waiting.done()
        await other.queue("q").resume()
        await pond.settle()
        assert len(await waiting) == 1


# Bounded memory


@pytest.mark.parametrize("local", [True, False], ids=["enqueued here", "enqueued elsewhere"])
async def test_ten_thousand_messages_take_no_more_room_than_the_cache_has(local: bool) -> None:
    size, total = 64, 10_240
    store = MemoryStore(clock=(clock := ManualClock()))
    config = Config(ready_cache_size=size, ready_page_size=32)
    async with (
        millpond.testing.pond(store=store, clock=clock, config=config) as pond,
        millpond.testing.pond(store=store.share(), clock=clock, seed=1) as other,
    ):
        service = pond.service
        cache = service.cache(KEY)
        await service.refresh_ready_cache(None, "q")
        await (pond if local else other).queue("q").enqueue_many([b"%d" % number for number in range(total)])
        assert len(cache) <= size
        deliveries: list[Delivery] = []
        while candidates := await service.next_candidates(None, "q", 100):
            assert len(cache) <= size
            deliveries += await service.claim_records(candidates)
            assert cache.inflight == 0
        assert sorted(int(one.payload or b"") for one in deliveries) == list(range(total))
        if not local:
            assert [int(one.payload or b"") for one in deliveries] == list(range(total))


async def test_caches_of_queues_long_unused_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "MAX_QUEUES", 3)
    async with millpond.testing.pond() as pond:
        for number in range(10):
            await pond.queue(f"q{number}").enqueue(b"x")
        for _ in range(2):
            for number in range(10):
                candidate = await pond.service.next_candidate(None, f"q{number}")
                assert candidate is not None
                pond.service.give_back([candidate])
                assert len(pond.service._caches) <= 3
                assert len(pond.service._policies) <= 3


async def test_candidates_whose_claim_fails_are_at_hand_again() -> None:
    """A store that fails once must not hide the candidate from those who wait until its mark runs out."""
    clock = ManualClock()
    store = FaultyStore(MemoryStore(clock=clock))
    async with millpond.testing.pond(store=store, clock=clock) as pond:
        receipt = await pond.queue("q").enqueue(b"x")
        [candidate] = await pond.service.next_candidates(None, "q", 1)
        store.plan = nth(1, "write", fail_before())
        with pytest.raises(StoreError):
            await pond.service.claim(None, "q", candidates=(candidate,))
        [again] = await pond.service.next_candidates(None, "q", 1)
        assert again.id == receipt.message_id
