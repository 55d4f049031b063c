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
        self._eases = False
        """It is closed still, but the last look found no reason to close it."""
        self.slowed = 0
        """Producers that had to wait."""
        self.slowed_seconds = 0.0
        """For how long, together."""
        self.refusals = {"waited": 0, "crowded": 0}
        """Producers that were sent away: after a wait, or because too many waited already."""
        self.late = 0.0
        """Seconds by which the event loop was late at the last look."""

    @property
    def refused(self) -> int:
        """Producers that were sent away."""
        return sum(self.refusals.values())

    @property
    def waiting(self) -> int:
        """Producers that wait now."""
        return len(self._waiting)

    @property
    def state(self) -> str:
        """As lockd calls it: ``disengaged``, ``engaged``, or ``recovery`` while it is closed and the load has gone."""
        if not self.closed:
            return "disengaged"
        return "recovery" if self._eases else "engaged"

    def load(self) -> dict[str, float]:
        """The signs of load, each as a part of that at which the gate closes: 1 and more closes it."""
        load = self._load()
        # Looks are made only while producers come; without any there is nothing that could stall or be late.
        busy = self._timer is not None
        stalled = self._clock.monotonic() - self._done_at if busy and load.waiting else 0.0
        return {
            "backlog": load.waiting / HIGH,
            "lateness": max(0.0, self.late) / LATE if busy else 0.0,
            "stall": stalled / STALLED,
        }

    def lets_in(self, kind: Kind) -> bool:
        """`admit` would return at once."""
        if kind != "producer":
            return True
        self._came = True
        if self._timer is None:
            self._start()
        return not self.closed

    async def admit(self, kind: Kind) -> None:
        """Return when a request may go on. Raises Throttled."""
        if not self.lets_in(kind) and not await self._wait():
            raise Throttled("the server has more to write than its store can take; send it again a little later")

    async def _wait(self) -> bool:
        if len(self._waiting) >= MAX_WAITING:
            self.refusals["crowded"] += 1
            return False
        self.slowed += 1
        began = self._clock.monotonic()
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting[future] = None
        timer = self._clock.call_later(PATIENCE, lambda: _tell(future, False))
        try:
            admitted = await future
        finally:
            timer.cancel()
            self._waiting.pop(future, None)
            self.slowed_seconds += self._clock.monotonic() - began
        self.refusals["waited"] += not admitted
        return admitted

    def _start(self) -> None:
        self._due = self._clock.monotonic() + TICK
        self._timer = self._clock.call_later(TICK, self._tick)

    def _tick(self) -> None:
        now = self._clock.monotonic()
        self._timer = None
        self.late = late = now - self._due
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
        else:
            self._eases = load.waiting <= HIGH and late <= LATE and not stalled
        if self.closed or self._came:
            self._came = False
            self._start()

    def _turn(self, closed: bool, load: Load, late: float) -> None:
        self.closed, self._eases = closed, False
        extra = {"waiting_ops": load.waiting, "late_ms": round(late * 1000)}
        if closed:
            log.warning("millpond.server.gate_closed", extra=extra)
        else:
            log.warning("millpond.server.gate_opened", extra=extra)


def _tell(future: asyncio.Future[bool], answer: bool) -> None:
    if not future.done():
        future.set_result(answer)
