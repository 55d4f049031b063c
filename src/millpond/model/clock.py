"""Time, as everything in a pond sees it. The only module that may ask the machine what time it is.

Records carry ``now_ms()``: wall clock, integer milliseconds UTC, comparable between machines, and able to jump.
Timers run on the monotonic side, so that a jump of the wall clock neither fires nor starves them.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from typing import Protocol


class TimerHandle(Protocol):
    """What ``call_later`` returns."""

    def cancel(self) -> None:
        """Forget the timer; harmless when it has fired."""


class Clock(Protocol):
    """A source of time and timers."""

    def now_ms(self) -> int:
        """Wall clock, integer milliseconds since 1970 UTC."""

    def monotonic(self) -> float:
        """Seconds that never go back, from an arbitrary start."""

    def call_later(self, delay: float, callback: Callable[[], object]) -> TimerHandle:
        """Run callback on the running event loop in ``delay`` seconds (≥ 0) of monotonic time."""


class SystemClock:
    """The machine's clock and the running event loop's timers."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        return time.monotonic()

    def call_later(self, delay: float, callback: Callable[[], object]) -> TimerHandle:
        return asyncio.get_running_loop().call_later(delay, callback)


def cpu_seconds() -> float:
    """Seconds for which this process has computed, on all cores together."""
    return time.process_time()


class CorrectedClock:
    """A clock whose wall time is set right by an offset that is asked for each time; its timers are the inner one's.

    For a store that several machines share: leases compare times, and each machine's clock is a little wrong."""

    def __init__(self, inner: Clock, offset: Callable[[], int]) -> None:
        """``offset``: milliseconds to add to the inner clock's wall time."""
        self._inner = inner
        self._offset = offset

    def now_ms(self) -> int:
        return self._inner.now_ms() + self._offset()

    def monotonic(self) -> float:
        return self._inner.monotonic()

    def call_later(self, delay: float, callback: Callable[[], object]) -> TimerHandle:
        return self._inner.call_later(delay, callback)


class _ManualTimer:
    __slots__ = ("callback", "cancelled")

    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class ManualClock:
    """A clock that stands still until told otherwise; for tests.

    ``advance`` moves wall and monotonic time and fires the timers that come due, in order. ``jump`` moves the wall
    clock alone, forwards or back, as NTP or an administrator would.
    """

    def __init__(self, start_ms: int = 1_750_000_000_000) -> None:
        self._start = start_ms
        # Whole nanoseconds: ten steps of 0.1 s are 1 s, which they would not be in floats.
        self._passed = 0
        self._timers: list[tuple[int, int, _ManualTimer]] = []
        self._order = itertools.count()

    def now_ms(self) -> int:
        return self._start + self._passed // 1_000_000

    def monotonic(self) -> float:
        return self._passed / 1e9

    def call_later(self, delay: float, callback: Callable[[], object]) -> TimerHandle:
        timer = _ManualTimer(callback)
        heapq.heappush(self._timers, (self._passed + round(max(0.0, delay) * 1e9), next(self._order), timer))
        return timer

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` (≥ 0) pass: both clocks move, and timers that come due are run in order."""
        if seconds < 0:
            raise ValueError("time only advances; use jump() to set the wall clock back")
        end = self._passed + round(seconds * 1e9)
        while self._timers and self._timers[0][0] <= end:
            due, _, timer = heapq.heappop(self._timers)
            if timer.cancelled:
                continue
            self._passed = max(self._passed, due)
            timer.callback()
        self._passed = max(self._passed, end)

    def jump(self, seconds: float) -> None:
        """Set the wall clock forwards or back; timers do not notice."""
        self._start += round(seconds * 1000)

    @property
    def pending_timers(self) -> int:
        """How many timers are waiting; tests wait for this to settle before they advance."""
        return sum(not timer.cancelled for _, _, timer in self._timers)
