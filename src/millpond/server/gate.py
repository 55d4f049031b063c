"""Producers wait before consumers do, when there is more to write than the store can take.

Two signs of that: what waits for the store's next commits, and how late the event loop is. Above a high mark the gate
closes, and opens again only below a low one, so that it does not flutter. While it is closed a producer waits for a
moment, and is sent away with `Throttled` (429, Retry-After) when that was not enough. Consumers and answers pass at all
times: they are what makes room.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import NamedTuple

from millpond.errors import Throttled
from millpond.model.clock import Clock, TimerHandle
from millpond.server.limits import Kind
from millpond.stores.base import Store

log = logging.getLogger("millpond.server")

TICK = 0.1
"""Seconds between looks at the load."""
HIGH = 8_000
"""Ops that wait for the store: about a quarter of a second of what SQLite writes, by which each answer is late."""
LOW = 2_000
LATE = 0.5
"""Seconds that the event loop may be late, at one look; at two in a row it is more than a hiccup of the machine."""
IN_TIME = 0.25
STALLED = 2.0
"""Seconds without a commit, while ops wait, after which the store counts as stalled."""
PATIENCE = 1.0
"""Seconds that a producer waits at the closed gate: most loads are gone by then, and none of its work is lost."""
MAX_WAITING = 1_000
"""Producers that wait at once; their requests are in memory already."""


class Load(NamedTuple):
    """What a store has to do."""

    waiting: int
    """Ops that wait to be written."""
    done: int
    """Commits so far: that they go on, not how many they are, is what counts."""


def store_load(store: Store) -> Load:
    """What waits for a store, where the store can tell."""
    numbers = store.statistics()
    return Load(numbers.get("waiting_ops", 0), numbers.get("commits", 0))


class LoadGate:
    """Lets producers in while there is room. Looks at the load only while producers come."""

    def __init__(self, clock: Clock, load: Callable[[], Load]) -> None:
        self._clock = clock
        self._load = load
        self._timer: TimerHandle | None = None
        self._due = 0.0
        self._came = False
        self._was_late = False
        self._done = -1
        self._done_at = 0.0
        self._waiting: dict[asyncio.Future[bool], None] = {}
        self.closed = False
        """Producers are kept waiting."""
        self.refused = 0
        """Producers that were sent away."""

    async def admit(self, kind: Kind) -> None:
        """Return when a request may go on. Raises Throttled."""
        if kind != "producer":
            return
        self._came = True
        if self._timer is None:
            self._start()
        if self.closed and not await self._wait():
            self.refused += 1
            raise Throttled("the server has more to write than its store can take; send it again a little later")

    async def _wait(self) -> bool:
        if len(self._waiting) >= MAX_WAITING:
            return False
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting[future] = None
        timer = self._clock.call_later(PATIENCE, lambda: _tell(future, False))
        try:
            return await future
        finally:
            timer.cancel()
            self._waiting.pop(future, None)

    def _start(self) -> None:
        self._due = self._clock.monotonic() + TICK
        self._timer = self._clock.call_later(TICK, self._tick)

    def _tick(self) -> None:
        now = self._clock.monotonic()
        self._timer = None
        late = now - self._due
        load = self._load()
        if load.done != self._done or not load.waiting:
            self._done, self._done_at = load.done, now
        stalled = now - self._done_at >= STALLED
        was_late, self._was_late = self._was_late, late > LATE
        if not self.closed:
            if load.waiting > HIGH or (was_late and self._was_late) or stalled:
                self._turn(True, load, late)
        elif load.waiting < LOW and late < IN_TIME and not stalled:
            self._turn(False, load, late)
            for future in self._waiting:
                _tell(future, True)
        if self.closed or self._came:
            self._came = False
            self._start()

    def _turn(self, closed: bool, load: Load, late: float) -> None:
        self.closed = closed
        extra = {"waiting_ops": load.waiting, "late_ms": round(late * 1000)}
        if closed:
            log.warning("millpond.server.gate_closed", extra=extra)
        else:
            log.warning("millpond.server.gate_opened", extra=extra)


def _tell(future: asyncio.Future[bool], answer: bool) -> None:
    if not future.done():
        future.set_result(answer)
