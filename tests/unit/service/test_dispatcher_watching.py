"""The change feed of a queue: opened while somebody waits, kept a little longer, and never trusted to live for ever."""

from __future__ import annotations

import logging

import pytest
from tests.unit.service.bench import Bench, ended, served

from millpond.errors import StoreClosed, StoreError
from millpond.model.clock import ManualClock
from millpond.service.dispatcher import LINGER, TICK
from millpond.service.watch import watch_factory_from_storage
from millpond.stores.faulty import FaultyStore
from millpond.stores.memory import MemoryStore


async def test_a_change_by_others_wakes_at_once() -> None:
    async with Bench(watched=True) as bench:
        task = await bench.waiting()
        assert bench.dispatcher.has_active_watcher(None, "q")
        bench.source.foreign.clear()
        bench.source.put(1)
        bench.feed.watches[0].changed()
        assert bench.source.foreign == ["q"]
        await bench.settle()
        assert served([task]) == [1]


async def test_what_happened_before_the_feed_was_open_is_looked_for() -> None:
    async with Bench(watched=True) as bench:
        await ended(await bench.waiting())
        assert bench.source.foreign == ["q"]


async def test_one_subscription_for_each_queue_that_is_waited_on() -> None:
    async with Bench(watched=True) as bench:
        tasks = await bench.line(5, "a") + await bench.line(3, "b")
        await bench.advance(1000, step=5)
        assert [watch.queue for watch in bench.feed.watches] == ["a", "b"]
        assert not bench.dispatcher.has_active_watcher(None, "c")
        for task in tasks:
            await ended(task)


async def test_while_watched_there_are_only_safety_polls() -> None:
    async with Bench(watched=True, resilient_poll_interval=300, poll_jitter=0.5) as bench:
        task = await bench.waiting()
        await bench.advance(1000, step=1)
        assert bench.source.times() == [0, 300, 600, 900]
        await ended(task)


async def test_a_watched_queue_still_keeps_its_due_times() -> None:
    async with Bench(watched=True) as bench:
        task = await bench.waiting()
        bench.dispatcher.due("default", "q", bench.in_ms(7))
        await bench.advance(20, step=0.5)
        assert bench.source.times() == [0, 7]
        await ended(task)


async def test_without_a_feed_it_polls() -> None:
    async with Bench(poll_interval=3) as bench:
        task = await bench.waiting()
        assert not bench.dispatcher.has_active_watcher(None, "q")
        await bench.advance(3)
        assert bench.source.times() == [0, 3]
        await ended(task)


# Feeds that break


async def test_a_feed_that_closes_is_noticed_and_opened_again() -> None:
    async with Bench(watched=True) as bench:
        task = await bench.waiting()
        await bench.advance(101, step=0.5)
        assert bench.source.times() == [0]
        bench.feed.watches[0].breaks()
        assert not bench.dispatcher.has_active_watcher(None, "q")
        bench.source.put(1)  # Nobody tells of it.
        await bench.advance(TICK, step=0.5)
        assert served([task]) == [1]
        assert [watch.active for watch in bench.feed.watches] == [False, True]
        assert [watch.closed for watch in bench.feed.watches] == [True, False]
        assert bench.dispatcher.has_active_watcher(None, "q")


async def test_a_feed_that_breaks_every_time_makes_no_storm() -> None:
    async with Bench(watched=True, poll_interval=3, poll_max_interval=60) as bench:
        task = await bench.waiting()
        for _ in range(1000):
            bench.feed.watches[-1].breaks()
            await bench.advance(0.1)
        assert len(bench.feed.attempts) == len(bench.source.looks) <= 100 / 3 + 2
        assert len(bench.feed.attempts) >= 3
        await ended(task)


async def test_an_event_of_a_feed_that_was_replaced_is_harmless() -> None:
    async with Bench(watched=True) as bench:
        task = await bench.waiting()
        first = bench.feed.watches[0]
        first.breaks()
        await bench.advance(TICK, step=0.5)
        first.changed()
        await bench.settle()
        assert not task.done()
        await ended(task)


@pytest.mark.parametrize("error", [StoreError("no inotify"), OSError("no inotify"), NotImplementedError()], ids=repr)
async def test_without_its_feed_a_queue_is_polled(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    async with Bench(watched=True, poll_interval=3) as bench:
        bench.feed.failing = error
        with caplog.at_level(logging.WARNING, "millpond.dispatcher"):
            task = await bench.waiting()
        assert [entry.message for entry in caplog.records] == ["millpond.dispatcher.watch_failed"]
        assert not bench.dispatcher.has_active_watcher(None, "q")
        bench.source.put(1)
        await bench.advance(3)
        assert served([task]) == [1]


async def test_a_feed_that_does_not_open_is_tried_again_less_and_less() -> None:
    async with Bench(watched=True) as bench:
        bench.feed.failing = StoreError("no inotify")
        task = await bench.waiting()
        for _ in range(1600):  # Looked at all the time: the feed must not be asked for with each look.
            bench.dispatcher.notify(None, "q")
            await bench.advance(0.1)
            bench.source.looks.clear()
        gaps = [round(b - a, 3) for a, b in zip(bench.feed.attempts, bench.feed.attempts[1:], strict=False)]
        assert gaps == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30, 30], abs=0.11)
        bench.feed.failing = None
        bench.dispatcher.notify(None, "q")
        await bench.advance(30)
        bench.dispatcher.notify(None, "q")
        await bench.settle()
        assert bench.dispatcher.has_active_watcher(None, "q")
        # From here on it is trusted again, and its next failure starts from the beginning.
        bench.feed.watches[0].breaks()
        bench.feed.failing = StoreError("no inotify")
        bench.feed.attempts.clear()
        for _ in range(3):
            bench.dispatcher.notify(None, "q")
            await bench.advance(0.1)
        assert len(bench.feed.attempts) == 2
        await ended(task)


# Lingering


async def test_P8_one_subscription_for_many_waits_in_a_row() -> None:
    async with Bench(watched=True) as bench:
        for number in range(50):
            task = await bench.waiting()
            bench.source.put(number)
            bench.dispatcher.notify(None, "q")
            await bench.advance(LINGER - 1, step=1)
            assert served([task]) == [number]
            assert bench.dispatcher.has_active_watcher(None, "q")
        assert len(bench.feed.attempts) == 1


async def test_after_a_while_without_waiters_the_subscription_ends() -> None:
    async with Bench(watched=True) as bench:
        await ended(await bench.waiting())
        await bench.advance(LINGER - 0.001)
        assert bench.dispatcher.has_active_watcher(None, "q")
        await bench.advance(0.001)
        assert not bench.dispatcher.has_active_watcher(None, "q")
        assert bench.feed.watches[0].closed
        assert bench.dispatcher._states == {}
        assert bench.clock.pending_timers == 0


async def test_a_wait_that_lasts_is_not_ended_by_the_lingering_before_it() -> None:
    async with Bench(watched=True) as bench:
        await ended(await bench.waiting())
        await bench.advance(LINGER - 1)
        task = await bench.waiting()
        await bench.advance(10 * LINGER, step=1)
        assert bench.dispatcher.has_active_watcher(None, "q")
        await ended(task)
        await bench.advance(LINGER)
        assert not bench.dispatcher.has_active_watcher(None, "q")


# Over a store


def test_no_factory_without_a_feed() -> None:
    assert watch_factory_from_storage(None) is None
    store = MemoryStore(clock=ManualClock())
    assert store.capabilities.change_feed
    assert watch_factory_from_storage(store) is not None


def test_no_factory_over_a_store_that_has_none() -> None:
    import msgspec

    class Mute(FaultyStore):
        @property
        def capabilities(self):  # type: ignore[no-untyped-def]
            return msgspec.structs.replace(super().capabilities, change_feed=False)

    assert watch_factory_from_storage(Mute(MemoryStore(clock=ManualClock()))) is None


async def test_a_factory_over_a_store_is_the_stores_feed() -> None:
    store = MemoryStore(clock=ManualClock())
    factory = watch_factory_from_storage(store)
    assert factory is not None
    await store.open()
    subscription = factory.subscribe("default", "q", lambda: None)
    assert subscription.active
    subscription.close()
    assert not subscription.active
    await store.close()
    with pytest.raises(StoreClosed):
        factory.subscribe("default", "q", lambda: None)
