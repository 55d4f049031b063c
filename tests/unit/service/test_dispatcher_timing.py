"""When a queue is looked at: polls, alarms, `notify_at`, jumps of the wall clock, and failing queues."""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Any

import pytest
from tests.unit.service.bench import Bench, ended, served

from millpond.errors import InvalidQueue, StoreCorrupt, StoreError
from millpond.service import dispatcher as dispatcher_module


def gaps(times: list[float]) -> list[float]:
    return [round(later - earlier, 6) for earlier, later in itertools.pairwise(times)]


# Polling


async def test_polls_back_off_while_the_queue_stays_empty() -> None:
    async with Bench(poll_interval=3, poll_max_interval=60) as bench:
        task = await bench.waiting()
        await bench.advance(300, step=1)
        assert gaps(bench.source.times()) == [3, 6, 12, 24, 48, 60, 60, 60]
        await ended(task)


async def test_polls_can_be_held_at_one_interval() -> None:
    async with Bench(poll_interval=2, poll_max_interval=2) as bench:
        task = await bench.waiting()
        await bench.advance(10, step=1)
        assert bench.source.times() == [0, 2, 4, 6, 8, 10]
        await ended(task)


async def test_a_poll_finds_what_nobody_told_of() -> None:
    async with Bench(poll_interval=3) as bench:
        task = await bench.waiting()
        bench.source.put(1)
        await bench.advance(2.999)
        assert not task.done()
        await bench.advance(0.001)
        assert served([task]) == [1]


@pytest.mark.parametrize("found", [True, False])
async def test_news_end_the_back_off(found: bool) -> None:
    async with Bench(poll_interval=3) as bench:
        tasks = await bench.line(2)
        await bench.advance(50, step=1)
        assert bench.source.times()[-1] == 45
        if found:
            bench.source.put(1)
        bench.dispatcher.notify(None, "q")
        await bench.advance(10, step=1)
        assert bench.source.times()[-3:] == [50, 53, 59]
        for task in tasks:
            await ended(task)


async def test_a_poll_that_finds_something_ends_the_back_off_too() -> None:
    async with Bench(poll_interval=3) as bench:
        tasks = await bench.line(2)
        await bench.advance(30, step=1)
        bench.source.put(1)
        await bench.advance(30, step=1)
        assert bench.source.times() == [0, 3, 9, 21, 45, 48, 54]
        for task in tasks:
            await ended(task)


async def test_jitter_lies_within_its_bounds_and_varies() -> None:
    async with Bench(poll_interval=3, poll_max_interval=3, poll_jitter=0.5) as bench:
        task = await bench.waiting()
        step = 0.02  # To which the times below are rounded up.
        await bench.advance(100, step=step)
        seen = gaps(bench.source.times())
        assert len(seen) >= 28
        assert 3 <= min(seen) < 3.1
        assert 3.4 < max(seen) < 3.5 + step
        assert len(set(seen)) > 10
        await ended(task)


# Alarms


async def test_a_due_time_is_met_exactly() -> None:
    async with Bench(poll_interval=30) as bench:
        task = await bench.waiting()
        bench.dispatcher.due("default", "q", bench.in_ms(12.345))
        await bench.advance(12, step=0.5)
        await bench.advance(0.344)
        assert bench.source.times() == [0]
        bench.source.put(1)
        await bench.advance(0.001)
        assert served([task]) == [1]


async def test_the_earliest_due_time_counts() -> None:
    async with Bench(poll_interval=30) as bench:
        task = await bench.waiting()
        for seconds in (20, 7, 15):
            bench.dispatcher.due("default", "q", bench.in_ms(seconds))
        await bench.advance(19, step=1)
        assert bench.source.times() == [0, 7]
        await ended(task)


async def test_a_due_time_that_is_past_means_now() -> None:
    async with Bench(poll_interval=30) as bench:
        task = await bench.waiting()
        bench.dispatcher.due("default", "q", bench.in_ms(-1))
        await bench.advance(20, step=1)
        assert bench.source.times() == [0, 0]
        await ended(task)


async def test_what_the_provider_knows_to_come_due_is_met_exactly() -> None:
    async with Bench(poll_interval=30) as bench:
        bench.source.due["q"] = bench.in_ms(12.5)
        task = await bench.waiting()
        await bench.advance(12, step=0.5)
        assert bench.source.times() == [0]
        bench.source.put(1)
        await bench.advance(0.5)
        assert served([task]) == [1]


async def test_a_due_time_that_yields_nothing_is_no_reason_to_look_without_rest() -> None:
    """As in a queue that is paused: what comes due there is not handed out, and stays due."""
    async with Bench(poll_interval=3) as bench:
        bench.source.due["q"] = bench.in_ms(2)
        task = await bench.waiting()
        await bench.advance(20, step=1)
        assert bench.source.times() == [0, 2, 8, 20]
        bench.source.put(1)
        bench.dispatcher.notify(None, "q")
        await bench.settle()
        assert served([task]) == [1]


async def test_with_nobody_left_to_look_for_it_rests_too() -> None:
    async with Bench(poll_interval=3) as bench:
        bench.source.due["q"] = bench.in_ms(-1)
        task = await bench.waiting(timeout=1)
        # Woken before the waiter whose time is up could leave.
        bench.dispatcher.notify(None, "q")
        bench.clock.advance(1)
        await bench.settle()
        assert task.done()
        assert bench.source.times() == [0]
        assert bench.dispatcher.queue_stats(None, "q").waiting_consumers == 0


async def test_a_clock_set_back_makes_due_times_count_again() -> None:
    async with Bench(poll_interval=3000, poll_max_interval=3000) as bench:
        task = await bench.waiting()
        bench.clock.jump(-100)
        bench.source.due["q"] = bench.in_ms(50)
        await bench.advance(60, step=1)
        assert bench.source.times() == [0, 50]
        await ended(task)


async def test_after_an_answer_in_part_what_is_due_is_looked_for_at_once() -> None:
    """The provider answered from what it had at hand; the next look makes it ask its store."""
    async with Bench(poll_interval=3) as bench:
        bench.source.due["q"] = bench.in_ms(1)
        tasks = await bench.line(2)
        bench.source.on_look = lambda: bench.source.put(2) if len(bench.source.looks) == 3 else None
        bench.source.put(1)
        await bench.advance(1)
        assert served(tasks) == [1, 2]
        assert bench.source.times() == [0, 1, 1]


# notify_at


async def test_notify_at_wakes_for_a_delayed_message() -> None:
    async with Bench(poll_interval=30) as bench:
        task = await bench.waiting()
        bench.dispatcher.notify_at(None, "q", "m", bench.in_ms(0.12))
        bench.source.put(1)
        await bench.advance(0.119)
        assert not task.done()
        await bench.advance(0.001)
        assert served([task]) == [1]
        assert bench.clock.now_ms() == bench.in_ms(0)


async def test_a_cancelled_notify_at_wakes_nobody() -> None:
    async with Bench(poll_interval=30) as bench:
        task = await bench.waiting(timeout=0.3)
        bench.dispatcher.notify_at(None, "q", "m", bench.in_ms(0.12))
        bench.dispatcher.cancel_notify("default", " Q ", " m ")
        bench.dispatcher.cancel_notify(None, "q", "m")
        bench.dispatcher.cancel_notify(None, "q", "never heard of")
        bench.source.put(1)
        await bench.advance(0.3, step=0.01)
        assert task.done()
        assert task.result() is None
        assert bench.source.times() == [0]


@pytest.mark.parametrize(("first", "then"), [(5, 9), (9, 5)])
async def test_the_last_notify_at_of_a_message_counts(first: float, then: float) -> None:
    async with Bench(poll_interval=30) as bench:
        task = await bench.waiting()
        bench.dispatcher.notify_at(None, "q", "m", bench.in_ms(first))
        bench.dispatcher.notify_at(None, "q", " m ", bench.in_ms(then))
        await bench.advance(20, step=1)
        assert bench.source.times() == [0, then]
        await ended(task)


async def test_each_message_has_a_time_of_its_own() -> None:
    async with Bench(poll_interval=30) as bench:
        task = await bench.waiting()
        for id, seconds in (("c", 9), ("a", 4), ("b", 6), ("d", 9)):
            bench.dispatcher.notify_at(None, "q", id, bench.in_ms(seconds))
        bench.dispatcher.notify_at(None, "other", "a", bench.in_ms(2))
        bench.dispatcher.cancel_notify(None, "q", "b")
        await bench.advance(20, step=1)
        assert bench.source.times() == [0, 4, 9]
        await ended(task)


@pytest.mark.parametrize(("id", "seconds"), [("", 10), ("  ", 10), ("m", 0), ("m", -5)])
async def test_without_an_id_or_with_a_past_time_notify_at_means_now(id: str, seconds: float) -> None:
    async with Bench(poll_interval=30) as bench:
        task = await bench.waiting()
        bench.dispatcher.notify_at(None, "q", id, bench.in_ms(seconds))
        await bench.settle()
        assert bench.source.times() == [0, 0]
        await bench.advance(20, step=1)
        assert bench.source.times() == [0, 0]
        await ended(task)


async def test_a_past_time_takes_the_place_of_one_to_come() -> None:
    async with Bench(poll_interval=30) as bench:
        task = await bench.waiting()
        bench.dispatcher.notify_at(None, "q", "m", bench.in_ms(10))
        bench.dispatcher.notify_at(None, "q", "m", bench.in_ms(-1))
        await bench.advance(20, step=1)
        assert bench.source.times() == [0, 0]
        await ended(task)


async def test_notify_at_for_nobody_looks_at_nothing() -> None:
    async with Bench() as bench:
        bench.dispatcher.notify_at(None, "q", "m", bench.in_ms(10))
        await bench.advance(20, step=1)
        assert bench.source.looks == []
        assert bench.clock.pending_timers == 0


@pytest.mark.parametrize("name", ["", "a/b"])
async def test_notify_at_refuses_bad_names(name: str) -> None:
    async with Bench() as bench:
        with pytest.raises(InvalidQueue):
            bench.dispatcher.notify_at(None, name, "m", bench.in_ms(10))
        with pytest.raises(InvalidQueue):
            bench.dispatcher.cancel_notify(None, name, "m")
        assert bench.clock.pending_timers == 0


async def test_beyond_the_most_timers_only_the_time_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher_module, "MAX_TIMERS", 3)
    async with Bench(poll_interval=30) as bench:
        task = await bench.waiting()
        before = bench.clock.pending_timers
        for number in range(10):
            bench.dispatcher.notify_at(None, "q", f"m{number}", bench.in_ms(20 - number))
        await bench.settle()
        assert bench.clock.pending_timers == before + 3
        bench.dispatcher.notify_at(None, "q", "m0", bench.in_ms(19.5))  # It has its place already.
        bench.dispatcher.cancel_notify(None, "q", "m9")  # Of this one only the time is known: it stays.
        await bench.advance(20, step=0.5)
        assert bench.source.times() == [0, 11, 18, 19, 19.5]
        await ended(task)


async def test_a_time_that_was_met_makes_room_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher_module, "MAX_TIMERS", 1)
    async with Bench(poll_interval=30) as bench:
        task = await bench.waiting()
        bench.dispatcher.notify_at(None, "q", "first", bench.in_ms(5))
        await bench.advance(6, step=1)
        bench.dispatcher.notify_at(None, "q", "second", bench.in_ms(4))
        bench.dispatcher.cancel_notify(None, "q", "second")
        await bench.advance(10, step=1)
        assert bench.source.times() == [0, 5]
        await ended(task)


# Jumps of the wall clock


async def test_a_clock_set_back_delays_what_is_due_by_it() -> None:
    async with Bench(poll_interval=30) as bench:
        task = await bench.waiting()
        bench.dispatcher.notify_at(None, "q", "m", bench.in_ms(10))
        bench.clock.jump(-5)
        await bench.advance(14.5, step=0.5)
        assert bench.source.times() == [0]
        await bench.advance(0.5)
        assert bench.source.times() == [0, 15]
        await ended(task)


async def test_a_clock_set_forward_is_noticed_soon() -> None:
    async with Bench(poll_interval=3000, poll_max_interval=3000) as bench:
        task = await bench.waiting()
        bench.dispatcher.notify_at(None, "q", "m", bench.in_ms(1000))
        await bench.advance(20, step=0.5)
        bench.clock.jump(978)
        await bench.advance(1.5, step=0.5)
        assert bench.source.times() == [0]
        bench.clock.jump(1)
        await bench.advance(dispatcher_module.TICK, step=0.5)
        assert len(bench.source.times()) == 2
        await ended(task)


@pytest.mark.parametrize("told", ["alarm", "provider"])
async def test_alarms_follow_the_wall_clock_too(told: str) -> None:
    async with Bench(poll_interval=3000, poll_max_interval=3000) as bench:
        task = await bench.waiting()
        if told == "alarm":
            bench.dispatcher.due("default", "q", bench.in_ms(1000))
        else:
            bench.source.due["q"] = bench.in_ms(1000)
        await bench.advance(10, step=1)
        bench.clock.jump(-500)
        await bench.advance(10, step=1)
        assert bench.source.times() == [0]
        bench.clock.jump(1490)
        await bench.advance(dispatcher_module.TICK, step=1)
        assert len(bench.source.times()) == 2
        await ended(task)


async def test_polls_do_not_follow_the_wall_clock() -> None:
    async with Bench(poll_interval=3) as bench:
        task = await bench.waiting(timeout=10)
        bench.clock.jump(86_400)
        await bench.advance(1, step=0.5)
        bench.clock.jump(-2 * 86_400)
        await bench.advance(8.5, step=0.5)
        assert bench.source.times() == [0, 3, 9]
        assert not task.done()
        await bench.advance(0.5)
        assert task.result() is None


# Failing queues


async def test_an_error_goes_to_one_waiter_and_retries_back_off(caplog: pytest.LogCaptureFixture) -> None:
    async with Bench() as bench:
        bench.source.failing["q"] = StoreError("no disk")
        with caplog.at_level(logging.WARNING, "millpond.dispatcher"):
            tasks = await bench.line(4)
        assert [(entry.message, vars(entry)["queue"], vars(entry)["reason"]) for entry in caplog.records] == [
            ("millpond.dispatcher.poll_failed", "q", "StoreError: no disk")
        ]
        for number, task in enumerate(tasks):
            assert [one.done() for one in tasks].count(True) == number + 1
            assert isinstance(task.exception(), StoreError)
            await bench.advance(2, step=0.1) if number == 3 else await bench.advance(0.1 * 2**number)
        assert bench.source.times() == pytest.approx([0, 0.1, 0.3, 0.7])


async def test_the_back_off_has_an_end() -> None:
    async with Bench() as bench:
        bench.source.failing["q"] = StoreError("no disk")
        tasks = await bench.line(14)
        await bench.advance(200, step=0.1)
        assert all(isinstance(task.exception(), StoreError) for task in tasks)
        assert gaps(bench.source.times()) == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30, 30, 30]


async def test_neither_news_nor_newcomers_cut_a_pause_short() -> None:
    async with Bench() as bench:
        bench.source.failing["q"] = StoreError("no disk")
        [task] = await bench.line(1)
        for pause in (0.1, 0.2, 0.4):
            # A consumer that comes back at once whenever it failed, as a loop does.
            assert isinstance(task.exception(), StoreError)
            [task] = await bench.line(1)
            for _ in range(10):
                assert not task.done()
                bench.dispatcher.notify(None, "q")
                bench.dispatcher.due("default", "q", bench.in_ms(0))
                await bench.advance(pause / 10)
        assert isinstance(task.exception(), StoreError)
        assert bench.source.times() == pytest.approx([0, 0.1, 0.3, 0.7])


async def test_a_time_out_holds_during_a_pause() -> None:
    async with Bench() as bench:
        bench.source.failing["q"] = StoreError("no disk")
        [failed] = await bench.line(1)
        task = await bench.waiting(timeout=0.05)
        await bench.advance(0.05)
        assert task.done()
        assert task.result() is None
        assert isinstance(failed.exception(), StoreError)


async def test_a_look_that_works_ends_the_back_off() -> None:
    async with Bench() as bench:
        bench.source.failing["q"] = StoreError("no disk")
        tasks = await bench.line(6)
        await bench.advance(0.7, step=0.1)
        assert bench.source.times() == pytest.approx([0, 0.1, 0.3, 0.7])
        del bench.source.failing["q"]
        await bench.advance(0.8, step=0.1)
        assert bench.source.times()[4:] == pytest.approx([1.5])
        bench.source.failing["q"] = StoreError("no disk")
        bench.dispatcher.notify(None, "q")
        await bench.advance(0.1)
        assert bench.source.times()[5:] == pytest.approx([1.5, 1.6])
        await bench.settle()
        assert all(isinstance(task.exception(), StoreError) for task in tasks)


@pytest.mark.parametrize("error", [StoreCorrupt("torn"), ValueError("a bug"), OSError("no disk")], ids=repr)
async def test_whatever_goes_wrong_reaches_the_caller_as_it_is(error: Exception) -> None:
    async with Bench() as bench:
        bench.source.failing["q"] = error
        with pytest.raises(type(error)) as caught:
            await bench.dispatcher.wait(None, "q")
        assert caught.value is error


async def test_P6_a_failing_or_a_hanging_queue_holds_up_no_other() -> None:
    async with Bench() as bench:
        bench.source.failing["broken"] = StoreError("no disk")
        bench.source.gates["hanging"] = asyncio.Event()
        broken = await bench.line(3, "broken")
        hanging = await bench.waiting("hanging", timeout=50)
        good = await bench.line(100, "good")
        for number in range(0, 100, 10):
            bench.source.put(*range(number, number + 10), queue="good")
            bench.dispatcher.notify(None, "good")
            await bench.settle()
            assert served(good) == list(range(number + 10))
        assert bench.source.times("broken") == [0]
        assert bench.source.times("hanging") == [0]
        await bench.advance(50, step=0.1)
        assert all(isinstance(task.exception(), StoreError) for task in broken)
        assert hanging.result() is None


async def test_no_time_passes_while_there_is_work() -> None:
    async with Bench() as bench:
        bench.source.put(*range(500))

        async def consumer() -> int:
            count = 0
            while (found := await bench.dispatcher.try_(None, "q")) is not None:
                count += found is not None
                if (waited := await bench.dispatcher.wait(None, "q", timeout=1)) is None:
                    break
                count += waited is not None
            return count

        # More than one look's worth of candidates, taken by a few who come again and again.
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(consumer()) for _ in range(10)]
        for _ in range(200):
            await bench.settle()
        await bench.advance(1)
        assert sum([await task for task in tasks]) == 500
        assert max(bench.source.times()) <= 1
