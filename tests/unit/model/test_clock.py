from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.model.clock import CorrectedClock, ManualClock, SystemClock

START = 1_750_000_000_000


def test_a_manual_clock_stands_still() -> None:
    clock = ManualClock(START)
    assert (clock.now_ms(), clock.monotonic()) == (START, 0.0)
    assert (clock.now_ms(), clock.monotonic()) == (START, 0.0)


def test_advance_moves_both_clocks() -> None:
    clock = ManualClock(START)
    clock.advance(1.5)
    assert (clock.now_ms(), clock.monotonic()) == (START + 1500, 1.5)
    clock.advance(0)
    assert clock.now_ms() == START + 1500
    with pytest.raises(ValueError, match="only advances"):
        clock.advance(-1)


def test_jump_moves_the_wall_clock_alone() -> None:
    clock = ManualClock(START)
    fired: list[int] = []
    clock.call_later(10, lambda: fired.append(clock.now_ms()))
    clock.jump(3600)
    assert (clock.now_ms(), clock.monotonic(), fired) == (START + 3_600_000, 0.0, [])
    clock.jump(-7200)
    clock.advance(10)
    assert fired == [START - 3_600_000 + 10_000]


def test_timers_run_in_order_each_at_its_own_time() -> None:
    clock = ManualClock(START)
    fired: list[tuple[str, int, float]] = []
    for name, delay in (("c", 3.0), ("a", 1.0), ("b", 2.0), ("b2", 2.0), ("past", -5.0)):
        clock.call_later(delay, lambda name=name: fired.append((name, clock.now_ms() - START, clock.monotonic())))
    assert clock.pending_timers == 5
    clock.advance(2.5)
    assert fired == [("past", 0, 0.0), ("a", 1000, 1.0), ("b", 2000, 2.0), ("b2", 2000, 2.0)]
    assert clock.pending_timers == 1
    clock.advance(0.5)
    assert fired[-1] == ("c", 3000, 3.0)
    assert clock.pending_timers == 0


def test_a_cancelled_timer_does_not_run() -> None:
    clock = ManualClock()
    fired: list[str] = []
    timer = clock.call_later(1, lambda: fired.append("no"))
    timer.cancel()
    timer.cancel()
    assert clock.pending_timers == 0
    clock.advance(2)
    timer.cancel()
    assert fired == []


def test_a_timer_may_set_the_next_one_within_the_same_advance() -> None:
    clock = ManualClock(START)
    fired: list[int] = []

    def tick() -> None:
        fired.append(clock.now_ms() - START)
        clock.call_later(1, tick)

    clock.call_later(1, tick)
    clock.advance(3.5)
    assert fired == [1000, 2000, 3000]
    assert clock.now_ms() == START + 3500


def test_a_timer_may_jump_or_advance_the_clock() -> None:
    clock = ManualClock(START)
    clock.call_later(1, lambda: clock.jump(100))
    clock.advance(2)
    assert clock.now_ms() == START + 102_000
    clock.call_later(1, lambda: clock.advance(5))
    clock.advance(2)
    assert clock.monotonic() == 8.0


def test_small_steps_add_up() -> None:
    clock = ManualClock(START)
    fired: list[int] = []
    clock.call_later(1, lambda: fired.append(clock.now_ms() - START))
    for _ in range(10):
        clock.advance(0.1)
    assert fired == [1000]
    for _ in range(10):
        clock.advance(0.0001)
    assert clock.now_ms() == START + 1001


@given(st.lists(st.integers(0, 5000), max_size=30), st.lists(st.integers(0, 5000), max_size=30))
def test_each_timer_runs_once_at_its_millisecond(delays: list[int], steps: list[int]) -> None:
    clock = ManualClock(START)
    fired: list[tuple[int, int]] = []
    for delay in delays:
        clock.call_later(delay / 1000, lambda delay=delay: fired.append((delay, clock.now_ms() - START)))
    for step in steps:
        clock.advance(step / 1000)
    passed = sum(steps)
    assert clock.now_ms() == START + passed
    if steps:
        assert fired == [(delay, delay) for delay in sorted(delays) if delay <= passed]
    assert clock.pending_timers == len(delays) - len(fired)


def test_the_system_clock_tells_the_time() -> None:
    clock = SystemClock()
    assert clock.now_ms() > 1_600_000_000_000
    first = clock.monotonic()
    assert clock.monotonic() >= first


def test_the_system_clock_runs_timers_on_the_loop() -> None:
    async def main() -> list[str]:
        clock, done, fired = SystemClock(), asyncio.Event(), []
        clock.call_later(0, lambda: fired.append("cancelled")).cancel()
        clock.call_later(0, done.set)
        await asyncio.wait_for(done.wait(), 10)
        return fired

    assert asyncio.run(main()) == []


def test_a_corrected_clock_follows_its_offset_and_the_timers_do_not() -> None:
    inner = ManualClock(START)
    offset = 250
    clock = CorrectedClock(inner, lambda: offset)
    fired: list[int] = []
    clock.call_later(1, lambda: fired.append(clock.now_ms() - START))
    assert (clock.now_ms(), clock.monotonic()) == (START + 250, 0.0)
    inner.advance(0.5)
    offset = -1000
    assert (clock.now_ms(), clock.monotonic()) == (START - 500, 0.5)
    clock.call_later(0.1, lambda: fired.append(-1)).cancel()
    inner.advance(0.5)
    assert fired == [0]
