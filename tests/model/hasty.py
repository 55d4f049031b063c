"""A clock for stores whose pauses are no business of a test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from millpond.model.clock import Clock, TimerHandle


class HastyClock:
    """Another clock's time; what it is asked to wait for comes at once. A store's pauses between its tries are thus not
    seen by the queue above it, whose time is that of its model."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def now_ms(self) -> int:
        return self._clock.now_ms()

    def monotonic(self) -> float:
        return self._clock.monotonic()

    def call_later(self, delay: float, callback: Callable[[], object]) -> TimerHandle:
        return asyncio.get_running_loop().call_soon(callback)
