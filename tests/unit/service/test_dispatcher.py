"""Who gets a candidate: the order of waiting, those who leave, the cap, and the end."""

from __future__ import annotations

import asyncio
import logging
import random
from contextvars import ContextVar
from typing import Any

import pytest
from tests.unit.service.bench import Bench, ended, record, served

from millpond.errors import InvalidInput, InvalidQueue, StoreClosed, StoreError, TooManyConsumers
from millpond.model.clock import ManualClock
from millpond.model.ids import IdSource
from millpond.service.dispatcher import Dispatcher, Stats

# Waiting


async def test_who_waited_longest_is_served_first() -> None:
    async with Bench() as bench:
        tasks = [await bench.waiting() for _ in range(5)]
        bench.source.put(1, 2, 3)
        bench.dispatcher.notify(None, "q")
        await bench.settle()
        assert [task.done() for task in tasks] == [True, True, True, False, False]
        assert served(tasks) == [1, 2, 3]
        bench.source.put(4)
        bench.dispatcher.notify(None, "q")
        await bench.settle()
        assert served(tasks) == [1, 2, 3, 4]
        assert not tasks[4].done()
        await ended(tasks[4])


async def test_what_is_there_already_is_had_at_once() -> None:
    async with Bench() as bench:
        [there] = bench.source.put(1)
        assert await bench.dispatcher.wait(None, "q", timeout=10) is there
        assert bench.source.times() == [0]


async def test_one_look_however_many_wait() -> None:
    async with Bench(page_size=100) as bench:
        tasks = await bench.line(50)
        assert bench.source.limits() == [50]
        bench.source.put(*range(50))
        bench.dispatcher.notify(None, "q")
        await bench.settle()
        assert served(tasks) == list(range(50))
        assert bench.source.limits() == [50, 50]
        assert bench.dispatcher.polls == 2


async def test_any_number_of_notifications_is_one_look() -> None:
    async with Bench() as bench:
        task = await bench.waiting()
        for _ in range(100):
            bench.dispatcher.notify(None, "q")
        await bench.settle()
        assert bench.source.limits() == [1, 1]
        await ended(task)


async def test_a_notification_during_a_look_is_another_look() -> None:
    async with Bench() as bench:
        gate = bench.source.gates["q"] = asyncio.Event()
        task = await bench.waiting()
        bench.dispatcher.notify(None, "q")
        # The look under way saw nothing yet.
        bench.source.on_look = lambda: bench.source.put(1) if len(bench.source.looks) == 2 else None
        gate.set()
        await bench.settle()
        assert served([task]) == [1]
        assert bench.source.times() == [0, 0]


async def test_the_page_size_bounds_a_look() -> None:
    async with Bench(page_size=4) as bench:
        bench.source.put(*range(10))
        tasks = await bench.line(10)
        assert served(tasks) == list(range(10))
        assert bench.source.limits() == [4, 4, 2]


async def test_as_many_are_asked_for_as_wait() -> None:
    async with Bench() as bench:
        bench.source.put(*range(10))
        tasks = await bench.line(3)
        assert served(tasks) == [0, 1, 2]
        assert bench.source.limits() == [3]
        assert len(bench.source.stock["q"]) == 7


async def test_names_are_normalised() -> None:
    async with Bench() as bench:
        task = asyncio.create_task(bench.dispatcher.wait("", " Q "))
        await bench.settle()
        bench.source.put(1)
        bench.dispatcher.notify("DEFAULT", "q")
        await bench.settle()
        assert served([task]) == [1]


@pytest.mark.parametrize("name", ["", " ", "a/b", "..", None, 7])
async def test_bad_names_are_refused_and_take_no_place(name: Any) -> None:
    async with Bench(max_consumers=1) as bench:
        for call in (bench.dispatcher.wait, bench.dispatcher.try_):
            with pytest.raises(InvalidQueue):
                await call(None, name)
        assert await bench.dispatcher.try_(None, "q") is None
        assert bench.source.limits() == [1]


# Time-outs


async def test_a_timeout_is_exact_and_answers_none() -> None:
    async with Bench() as bench:
        task = await bench.waiting(timeout=2.5)
        await bench.advance(2.499)
        assert not task.done()
        await bench.advance(0.001)
        assert task.done()
        assert task.result() is None


@pytest.mark.parametrize("timeout", [0, -1])
async def test_no_time_at_all_still_sees_what_is_there(timeout: float) -> None:
    async with Bench() as bench:
        [there] = bench.source.put(1)
        assert await bench.dispatcher.wait(None, "q", timeout=timeout) is there
        task = await bench.waiting(timeout=timeout)
        await bench.advance(0.000001)
        assert task.done()
        assert task.result() is None


async def test_a_candidate_found_for_one_whose_time_was_up_goes_to_the_next() -> None:
    async with Bench() as bench:
        gate = bench.source.gates["q"] = asyncio.Event()
        first = await bench.waiting(timeout=1)
        second = await bench.waiting()
        bench.source.put(1)
        await bench.advance(1)
        assert first.result() is None
        gate.set()
        await bench.settle()
        assert served([second]) == [1]
        assert bench.source.returned == []


async def test_a_candidate_found_for_nobody_goes_back() -> None:
    async with Bench() as bench:
        gate = bench.source.gates["q"] = asyncio.Event()
        tasks = await bench.line(3)
        tasks += [await bench.waiting(timeout=1)]
        records = bench.source.put(1, 2, 3)
        for task in tasks[:3]:
            await ended(task)
        await bench.advance(1)
        gate.set()
        await bench.settle()
        assert tasks[3].result() is None
        assert bench.source.returned == records


async def test_whoever_was_served_in_time_leaves_no_timer() -> None:
    async with Bench() as bench:
        bench.source.put(*range(5))
        for _ in range(5):
            assert await bench.dispatcher.wait(None, "q", timeout=3600) is not None
        await bench.settle()
        assert bench.clock.pending_timers == 1  # That of the queue, which lingers.


# Leaving


async def test_who_leaves_is_passed_over() -> None:
    async with Bench() as bench:
        tasks = [await bench.waiting() for _ in range(3)]
        assert isinstance(await ended(tasks[0]), asyncio.CancelledError)
        bench.source.put(1)
        bench.dispatcher.notify(None, "q")
        await bench.settle()
        assert served(tasks[1:]) == [1]
        assert not tasks[2].done()
        assert bench.dispatcher.queue_stats(None, "q").waiting_consumers == 1
        await ended(tasks[2])


async def test_L16_a_candidate_whose_waiter_leaves_goes_to_the_next() -> None:
    async with Bench() as bench:
        first, second = await bench.waiting(), await bench.waiting()
        loop = asyncio.get_running_loop()
        # The cancellation arrives after the candidate was assigned, before its waiter could take it.
        bench.source.on_look = lambda: loop.call_soon(first.cancel)
        [assigned] = bench.source.put(1)
        bench.dispatcher.notify(None, "q")
        await bench.settle()
        assert first.cancelled()
        assert bench.source.returned == [assigned]
        assert second.result() is assigned
        assert bench.source.times() == [0, 0, 0, 0]


async def test_L16_without_a_next_the_candidate_goes_back() -> None:
    async with Bench() as bench:
        task = await bench.waiting()
        loop = asyncio.get_running_loop()
        bench.source.on_look = lambda: loop.call_soon(task.cancel)
        [assigned] = bench.source.put(1)
        bench.dispatcher.notify(None, "q")
        await bench.settle()
        assert task.cancelled()
        assert bench.source.returned == [assigned]
        assert bench.dispatcher.queue_stats(None, "q") == Stats("default", "q", 0, 0, 0)


async def test_a_wait_ends_with_its_callers_cancellation_while_a_look_is_under_way() -> None:
    async with Bench() as bench:
        bench.source.gates["q"] = asyncio.Event()
        task = await bench.waiting()
        assert isinstance(await ended(task), asyncio.CancelledError)
        assert bench.dispatcher.queue_stats(None, "q").total_consumers == 0


# try_


async def test_try_answers_at_once() -> None:
    async with Bench() as bench:
        assert await bench.dispatcher.try_(None, "q") is None
        [there] = bench.source.put(1)
        assert await bench.dispatcher.try_(None, "q") is there
        assert bench.source.limits() == [1, 1]
        assert bench.clock.pending_timers == 0


async def test_try_passes_on_what_went_wrong_and_frees_its_place() -> None:
    async with Bench(max_consumers=1) as bench:
        bench.source.failing["q"] = StoreError("no disk")
        for _ in range(3):
            with pytest.raises(StoreError, match="no disk"):
                await bench.dispatcher.try_(None, "q")
        assert bench.dispatcher.queue_stats(None, "q").total_consumers == 0


async def test_try_looks_in_its_callers_context() -> None:
    caller: ContextVar[str] = ContextVar("caller", default="nobody")
    seen: list[str] = []
    async with Bench() as bench:
        bench.source.on_look = lambda: seen.append(caller.get())
        caller.set("me")
        await bench.dispatcher.try_(None, "q")
        assert seen == ["me"]


# The cap


async def test_no_more_consumers_than_the_cap() -> None:
    async with Bench(max_consumers=2) as bench:
        first, second = await bench.waiting("a"), await bench.waiting("b")
        for call in (bench.dispatcher.wait, bench.dispatcher.try_):
            with pytest.raises(TooManyConsumers, match="2 consumers"):
                await call(None, "c")
        assert bench.dispatcher.queue_stats(None, "c").total_consumers == 2
        assert bench.source.times("c") == []
        await ended(first)
        await ended(second)


@pytest.mark.parametrize("how", ["served", "cancelled", "timed out", "failed"])
async def test_whoever_leaves_frees_a_place(how: str) -> None:
    async with Bench(max_consumers=1) as bench:
        task = await bench.waiting(timeout=1 if how == "timed out" else None)
        if how == "served":
            bench.source.put(1)
        elif how == "failed":
            bench.source.failing["q"] = StoreError("no disk")
        bench.dispatcher.notify(None, "q")
        await bench.advance(1)
        await ended(task)
        assert bench.dispatcher.queue_stats(None, "q").total_consumers == 0
        await ended(await bench.waiting("other"))


async def test_a_try_under_way_counts() -> None:
    async with Bench(max_consumers=1) as bench:
        gate = bench.source.gates["q"] = asyncio.Event()
        task = asyncio.create_task(bench.dispatcher.try_(None, "q"))
        await bench.settle()
        assert bench.dispatcher.queue_stats(None, "other") == Stats("default", "other", 0, 0, 1)
        with pytest.raises(TooManyConsumers):
            await bench.dispatcher.try_(None, "other")
        gate.set()
        assert await task is None
        assert await bench.dispatcher.try_(None, "other") is None


# Looking at it


async def test_looking_at_a_queue_makes_nothing_of_it() -> None:
    async with Bench(watched=True) as bench:
        assert bench.dispatcher.queue_stats("NS", "Q") == Stats("ns", "q", 0, 0, 0)
        assert not bench.dispatcher.has_active_watcher(None, "q")
        bench.dispatcher.notify(None, "q")
        bench.dispatcher.ready("default", "q")
        bench.dispatcher.due("default", "q", bench.in_ms(1))
        bench.dispatcher.cancel_notify(None, "q", "m")
        await bench.advance(2)
        assert bench.dispatcher._states == {}
        assert bench.feed.attempts == []
        assert bench.source.looks == []
        assert bench.clock.pending_timers == 0
        for look in (bench.dispatcher.queue_stats, bench.dispatcher.has_active_watcher):
            with pytest.raises(InvalidQueue):
                look(None, "a/b")


async def test_queue_stats_count_who_waits() -> None:
    async with Bench() as bench:
        tasks = await bench.line(3, "a") + await bench.line(1, "b")
        assert bench.dispatcher.queue_stats(None, "a") == Stats("default", "a", 3, 0, 4)
        assert bench.dispatcher.queue_stats(None, "b") == Stats("default", "b", 1, 0, 4)
        for task in tasks:
            await ended(task)
        assert bench.dispatcher.queue_stats(None, "a") == Stats("default", "a", 0, 0, 0)


@pytest.mark.parametrize("name", ["", "a/b", "..", None, 7, ["a"]])
async def test_a_bad_name_in_a_notification_is_logged_only(name: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with Bench() as bench:
        task = await bench.waiting()
        with caplog.at_level(logging.WARNING, "millpond.dispatcher"):
            bench.dispatcher.notify(None, name)
        assert [entry.message for entry in caplog.records] == ["millpond.dispatcher.bad_name"]
        await bench.settle()
        assert bench.source.limits() == [1]
        await ended(task)


async def test_the_callers_logger_is_used(caplog: pytest.LogCaptureFixture) -> None:
    async with Bench(logger=logging.getLogger("mine")) as bench:
        bench.dispatcher.notify(None, "a/b")
        assert [entry.name for entry in caplog.records] == ["mine"]


@pytest.mark.parametrize(
    "options",
    [
        {"poll_interval": 0},
        {"poll_interval": -1},
        {"poll_interval": 10, "poll_max_interval": 9},
        {"poll_jitter": -0.1},
        {"resilient_poll_interval": 0},
        {"max_consumers": 0},
        {"page_size": 0},
    ],
)
def test_bad_options(options: dict[str, Any]) -> None:
    clock = ManualClock()
    with pytest.raises(InvalidInput):
        Bench(**options)
    assert clock.pending_timers == 0


def test_a_new_dispatcher_starts_nothing() -> None:
    # There is no event loop here: a task or a timer of the loop's could not even be made.
    clock = ManualClock()
    source = Bench().source
    Dispatcher(source, clock=clock, ids=IdSource(clock, random.Random(0).randbytes))
    assert (clock.pending_timers, source.looks) == (0, [])


# When nobody waits


async def test_nobody_waiting_means_nothing_running() -> None:
    async with Bench(watched=True) as bench:
        await ended(await bench.waiting())
        await bench.advance(1000, step=1)
        assert bench.source.limits() == [1]
        assert bench.clock.pending_timers == 0
        assert not any("dispatcher" in task.get_name() for task in asyncio.all_tasks())
        bench.source.put(1)
        bench.dispatcher.notify(None, "q")
        bench.feed.watches[0].changed()
        await bench.advance(1000, step=1)
        assert bench.source.limits() == [1]


async def test_a_queue_left_and_come_back_to_is_looked_at_again() -> None:
    async with Bench() as bench:
        for round in range(3):
            await ended(await bench.waiting())
            await bench.advance(100, step=1)
            assert len(bench.source.looks) == round + 1


# The end


async def test_closing_wakes_everybody() -> None:
    async with Bench(watched=True) as bench:
        tasks = await bench.line(2, "a") + await bench.line(1, "b")
        bench.dispatcher.notify_at(None, "a", "m", bench.in_ms(10))
        await bench.dispatcher.close()
        await bench.dispatcher.close()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, StoreClosed)
        assert [watch.closed for watch in bench.feed.watches] == [True, True]
        assert bench.dispatcher._states == {}
        assert bench.dispatcher.queue_stats(None, "a") == Stats("default", "a", 0, 0, 0)
        assert bench.clock.pending_timers == 0
        for call in (bench.dispatcher.wait, bench.dispatcher.try_):
            with pytest.raises(StoreClosed):
                await call(None, "a")
        bench.dispatcher.notify(None, "a")
        await bench.advance(100, step=1)
        assert len(bench.source.looks) == 2


async def test_closing_ends_a_look_under_way_and_a_pause_after_a_failure() -> None:
    async with Bench() as bench:
        bench.source.gates["slow"] = asyncio.Event()
        bench.source.failing["broken"] = StoreError("no disk")
        slow = await bench.waiting("slow")
        failed, paused = await bench.line(2, "broken")
        await bench.dispatcher.close()
        results = await asyncio.gather(slow, failed, paused, return_exceptions=True)
        assert [type(result) for result in results] == [StoreClosed, StoreError, StoreClosed]
        assert bench.clock.pending_timers == 0


async def test_closing_while_a_queue_lingers_leaves_no_timer() -> None:
    async with Bench(watched=True) as bench:
        bench.source.put(1)
        assert await bench.dispatcher.wait(None, "q") is not None
        await bench.settle()
        await bench.dispatcher.close()
        assert bench.feed.watches[0].closed
        assert bench.clock.pending_timers == 0


async def test_after_the_end_nothing_is_promised_any_more() -> None:
    async with Bench() as bench:
        await bench.dispatcher.close()
        bench.dispatcher.notify_at(None, "q", "m", bench.in_ms(10))
        assert bench.clock.pending_timers == 0


async def test_a_dispatcher_stopped_from_outside_leaves_nobody_waiting() -> None:
    async with Bench() as bench:
        tasks = await bench.line(2)
        [runner] = [task for task in asyncio.all_tasks() if task.get_name() == "millpond dispatcher default/q"]
        await ended(runner)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, StoreError)
            assert "stopped" in str(result)
        assert bench.dispatcher.queue_stats(None, "q").total_consumers == 0
        [there] = bench.source.put(1)
        assert await bench.dispatcher.wait(None, "q") is there


def test_a_candidate_is_a_record() -> None:
    one = record(1, queue="orders", etag="v1")
    assert (one.namespace, one.queue, one.etag) == ("default", "orders", "v1")
    assert one.id == one.head.id
