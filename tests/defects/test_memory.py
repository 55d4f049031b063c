"""M1 to M7: what grows with use and is never given back.

The numbers are the order of the rows in the analysis of lockd: M1 ready-cache entries, M2 in-flight marks, M3 entries
of messages that were deleted elsewhere, M4 queue states and caches by name, M5 the due heap, M6 process-local lease
records, M7 what a refresh keeps until it returns. docs/reference/seed-defects.md says what each was.
"""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import TYPE_CHECKING

import pytest

from millpond import Config
from millpond.service import claiming, core, dispatcher
from millpond.service.consuming import Delivery
from millpond.service.dispatcher import LINGER

if TYPE_CHECKING:
    from tests.defects.conftest import Defects

KEY = ("default", "q")
HAND_OUT = 30.0
"""Seconds for which a candidate may be out of the cache without a word from its taker."""


async def test_M1_the_ready_cache_is_bounded_and_loses_nothing(world: Defects) -> None:
    async with world.pond(config=Config(ready_cache_size=16)) as pond:
        queue = pond.queue("q")
        await queue.receive()
        for _ in range(5):
            await queue.enqueue_many([b"x"] * 100)
            assert len(pond.service.cache(KEY)) <= 16
        taken = 0
        while messages := await queue.receive(7):
            taken += len(messages)
            assert len(pond.service.cache(KEY)) <= 16
            await queue.ack_many(messages)
        assert (taken, len(pond.service.cache(KEY))) == (500, 0)


async def test_M2_in_flight_marks_end_whoever_settles_the_message(world: Defects) -> None:
    async with world.pond() as pond, world.pond() as other:
        await pond.queue("q").enqueue_many([b"x"] * 300)
        taken = await pond.service.next_candidates(None, "q", 300)
        assert len(taken) == pond.service.cache(KEY).inflight == 300
        elsewhere = other.queue("q")
        assert {answer.error for answer in await elsewhere.ack_many(await elsewhere.receive(300))} == {None}
        await world.advance(HAND_OUT)
        assert await pond.service.next_candidate(None, "q") is None
        assert pond.service.cache(KEY).inflight == 0


async def test_M2_in_flight_marks_end_with_every_answer(world: Defects) -> None:
    async with world.pond() as pond:
        queue = pond.queue("q")
        await queue.enqueue_many([b"x"] * 30)
        for answer in ("ack", "nack", "defer", "bury"):
            messages = await queue.receive(5)
            assert pond.service.cache(KEY).inflight == 0, "a lease is in the store, not in a mark"
            for message in messages:
                await (message.bury("enough") if answer == "bury" else getattr(message, answer)())
            assert pond.service.cache(KEY).inflight == 0


async def test_M3_entries_of_messages_deleted_elsewhere_go_at_once_and_together(world: Defects) -> None:
    async with world.pond() as pond, world.pond() as other:
        queue = pond.queue("q")
        await queue.enqueue_many([b"x"] * 200)
        await pond.service.refresh_ready_cache(None, "q")
        assert len(pond.service.cache(KEY)) == 200
        assert await other.queue("q").purge() == 200
        world.forget(pond)
        assert await queue.receive() == []
        asked = world.asked(pond)
        assert asked["get"] == 0
        assert asked["write"] <= 2, "what is gone is found out by one failed condition, not by one each"
        assert world.looks(pond) <= 2
        await pond.service.refresh_ready_cache(None, "q")
        assert (len(pond.service.cache(KEY)), pond.service.cache(KEY).inflight) == (0, 0)


async def test_M4_asking_about_a_queue_leaves_nothing_in_the_dispatcher(world: Defects) -> None:
    async with world.pond() as pond:
        for number in range(100):
            name = f"q{number}"
            pond.dispatcher.notify(None, name)
            pond.dispatcher.ready("default", name)
            pond.dispatcher.due("default", name, world.clock.now_ms() + 1000)
            pond.dispatcher.cancel_notify(None, name, "x")
            assert not pond.dispatcher.has_active_watcher(None, name)
            assert pond.dispatcher.queue_stats(None, name)[2:] == (0, 0, 0)
        assert pond.dispatcher._states == {}
        waiting = [await world.waiting(pond.queue(f"q{number}").receive(wait=1)) for number in range(5)]
        assert len(pond.dispatcher._states) == 5
        await world.advance(1)
        assert await asyncio.gather(*waiting) == [[]] * 5
        await world.advance(LINGER)
        assert pond.dispatcher._states == {}


async def test_M4_caches_and_policies_are_kept_of_few_queues(world: Defects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "MAX_QUEUES", 20)
    async with world.pond() as pond:
        names = [f"q{number}" for number in range(60)]
        for name in names:
            await pond.queue(name).enqueue(name.encode())
            assert len(await pond.service.peek(None, name, 1)) == 1
        assert len(pond.service._policies) <= 20
        for name in names:
            candidate = await pond.service.next_candidate(None, name)
            assert candidate is not None
            pond.service.give_back([candidate])
        assert (len(pond.service._caches), len(pond.service._policies)) == (20, 20)
        for name in names:  # Those that were dropped cost a read, and nothing else.
            assert [message.payload for message in await pond.queue(name).receive()] == [name.encode()]


async def test_M5_delayed_and_held_messages_cost_no_timer_each(world: Defects) -> None:
    async with world.pond() as pond:
        queue = pond.queue("q")
        waiting = await world.waiting(queue.receive(wait=3600))
        before = world.clock.pending_timers
        for number in range(10):
            await queue.enqueue_many([b"later"] * 100, delay=100.0 - number)
        await world.settle()
        assert world.clock.pending_timers <= before + 1
        await world.advance(91)
        assert len(await waiting) == 1


async def test_M5_explicit_wake_ups_are_bounded_and_none_is_forgotten(
    world: Defects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "MAX_TIMERS", 10)
    async with world.pond(config=Config(resilient_poll_interval=3600, poll_interval=3600)) as pond:
        waiting = await world.waiting(pond.queue("q").receive(wait=3600))
        before = world.clock.pending_timers
        soon = world.clock.now_ms() + 50_000
        for number in range(200):
            pond.dispatcher.notify_at(None, "q", f"m{number}", soon + 199 - number)
        await world.settle()
        assert world.clock.pending_timers <= before + 11
        world.forget(pond)
        await world.advance(49.9)
        assert world.asked(pond)["ready"] == 0
        await world.advance(0.1)
        assert world.asked(pond)["ready"] >= 1, "the earliest of those beyond the bound was remembered"
        waiting.cancel()
        await world.settle()


class TracedDelivery(Delivery, gc=True, weakref=True, eq=False):
    """One that tells when it is gone."""


async def test_M6_nothing_is_kept_of_a_delivery_once_its_consumer_has_dropped_it(
    world: Defects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claiming, "Delivery", TracedDelivery)
    async with world.pond() as pond, world.pond() as other:
        queue = pond.queue("q")
        await queue.enqueue_many([b"x"] * 200, visibility=600)
        messages = await queue.receive(200)
        deliveries = [weakref.ref(message._delivery) for message in messages]
        assert len(deliveries) == 200
        assert None not in [delivery() for delivery in deliveries]
        for message in messages[:100]:  # As it happens after a failover: answered by another process.
            await other.queue("q").handle(message.id, message.lease.id, message.lease.token).ack()
        del message, messages
        gc.collect()
        assert [delivery() for delivery in deliveries] == [None] * 200
        assert pond.service.cache(KEY).inflight == 0
        assert len(pond.service.tasks) == 0


async def test_M7_a_refresh_is_one_page_and_leaves_nothing_behind(world: Defects) -> None:
    async with world.pond(config=Config(ready_page_size=64)) as pond:
        queue = pond.queue("q")
        await queue.enqueue_many([b"x"] * 1000)
        timers = world.clock.pending_timers
        world.forget(pond)
        pond.service.reset_ready_cache_stats()
        await pond.service.refresh_ready_cache(None, "q")
        assert world.asked(pond) == {"ready": 1}
        stats = pond.service.ready_cache_stats()
        assert (stats.list_scans, stats.list_objects, stats.load_count) == (1, 64, 64)
        assert (world.clock.pending_timers, len(pond.service.tasks)) == (timers, 0)
