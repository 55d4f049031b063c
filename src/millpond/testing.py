"""For users' own tests: the real engine on memory, with a clock that the test moves.

    async with millpond.testing.pond() as pond:
        await pond.queue("orders").enqueue(b"…", delay=60)
        await pond.advance(60)
        [message] = await pond.queue("orders").receive()

No test needs to sleep: `TestPond.advance` lets time pass at once, and lets everything that was waiting for it run.
"""

from __future__ import annotations

import asyncio
import random

from millpond.model.clock import Clock, ManualClock
from millpond.pond import Pond
from millpond.service.config import Config
from millpond.stores.base import Store
from millpond.stores.memory import MemoryStore

__all__ = ["ManualClock", "TestPond", "pond"]

SETTLE_ROUNDS = 50
"""Turns of the event loop that `settle` gives the tasks under way; the longest chain on memory takes about ten."""


class TestPond(Pond):
    """A pond whose clock the test owns."""

    __test__ = False  # Not a test class, whatever pytest thinks of its name.

    manual_clock: ManualClock

    async def settle(self) -> None:
        """Let every task that can run do so."""
        for _ in range(SETTLE_ROUNDS):
            await asyncio.sleep(0)

    async def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass: delays, leases, time-outs and polls that end within them take effect."""
        await self.settle()
        self.manual_clock.advance(seconds)
        await self.settle()

    async def jump(self, seconds: float) -> None:
        """Set the wall clock forwards or back, as NTP would; timers do not notice."""
        await self.settle()
        self.manual_clock.jump(seconds)
        await self.settle()


def pond(
    *, store: Store | None = None, clock: ManualClock | None = None, config: Config | None = None, seed: int = 0
) -> TestPond:
    """A pond on memory (or on ``store``, which must use the same ``clock``), with repeatable ids; ``async with`` it."""
    clock = clock or ManualClock()
    source = random.Random(seed)
    made: Clock = clock
    result = TestPond(store or MemoryStore(clock=made), clock=clock, config=config, random_bytes=source.randbytes)
    result.manual_clock = clock
    return result
