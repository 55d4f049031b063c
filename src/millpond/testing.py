"""For users' own tests: the real engine on memory, with a clock that the test moves.

    async with millpond.testing.pond() as pond:
        await pond.queue("orders").enqueue(b"…", delay=60)
        await pond.advance(60)
        [message] = await pond.queue("orders").receive()

No test needs to sleep: `TestPond.advance` lets time pass at once, and lets everything that was waiting for it run.

Consumers, tasks and periodic jobs run as a worker runs them, their messages stored and decoded for real: `in_memory`
puts a pond that they were registered with on memory for a test, and `TestPond.work` works until nothing is left to do.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from millpond.errors import InvalidInput
from millpond.model.clock import Clock, ManualClock
from millpond.pond import Pond
from millpond.service.config import Config
from millpond.stores.base import Store
from millpond.stores.memory import MemoryStore

if TYPE_CHECKING:
    from millpond.worker.line import Line
    from millpond.worker.registry import Consumer
    from millpond.worker.worker import Worker

__all__ = ["ManualClock", "TestPond", "in_memory", "pond"]

SETTLE_ROUNDS = 50
"""Turns of the event loop that `settle` gives the tasks under way; the longest chain on memory takes about ten."""
STILL = 3
"""Times of settling in which nothing changes, after which nothing will."""
HANG = 30.0
"""Real seconds after which a handler in a thread or a process has hung. Nothing waits for it; it ends what never
would."""
REGISTERED = frozenset({"consumers", "middleware", "services", "_waiters"})
"""What of a pond is no connection: it stays when `in_memory` puts another store behind it."""


class TestPond(Pond):
    """A pond whose clock the test owns."""

    __test__ = False  # Not a test class, whatever pytest thinks of its name.

    manual_clock: ManualClock
    _workers: list[Worker]

    async def settle(self) -> None:
        """Let every task that can run do so. Handlers in threads and processes are waited for; such a one must not wait
        for what the test does next."""
        loop = asyncio.get_running_loop()
        end = loop.time() + HANG
        while True:
            for _ in range(SETTLE_ROUNDS):
                await asyncio.sleep(0)
            outside = [line for line in self._lines() if line.running and line.bound.run_in != "loop"]
            if not outside:
                return
            if loop.time() > end:
                names = ", ".join(line.consumer.name for line in outside)
                raise AssertionError(f"handlers of {names} have not ended within {HANG:.0f} seconds")
            await asyncio.sleep(0.0005)

    def _lines(self) -> list[Line]:
        return [line for worker in self._workers for line in worker.lines]

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

    @asynccontextmanager
    async def working(self, consumers: Iterable[Consumer | str] | None = None) -> AsyncIterator[Worker]:
        """A worker runs the pond's consumers (those named, or all) and periodic jobs inside of the ``async with``, by
        the pond's clock. At its end, handlers that still run are cancelled and their messages given back."""
        from millpond.worker.worker import Worker

        worker = Worker(self, consumers, owner="test", grace=0.0)
        self._workers.append(worker)
        running = asyncio.create_task(worker.run(), name="millpond worker of a test")
        try:
            await self.settle()
            if running.done():
                await running
            yield worker
        finally:
            worker.stop(grace=0.0)
            worker.stop()  # at once: its time to end is the manual clock's, which stands still
            try:
                await self._ended(running)
            finally:
                self._workers.remove(worker)

    async def _ended(self, running: asyncio.Task[None]) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + HANG
        while not running.done():
            for _ in range(SETTLE_ROUNDS):
                await asyncio.sleep(0)
            if not running.done():
                await asyncio.sleep(0.0005)
                if loop.time() > end:
                    running.cancel()
                    raise AssertionError(f"a worker has not ended within {HANG:.0f} seconds")
        await running

    async def work(self, consumers: Iterable[Consumer | str] | None = None) -> dict[str, int]:
        """Run the pond's consumers (those named, or all) until none of them has a message that is ready, also those
        that handlers enqueue; how many messages came to which end (see `Worker.counts`). What is delayed, retries
        included, waits for `advance`."""
        async with self.working(consumers) as worker:
            still = 0
            while still < STILL:
                before = _standing(worker)
                await self.settle()
                still = still + 1 if _standing(worker) == before else 0
            return worker.counts()


def _standing(worker: Worker) -> object:
    """What changes as long as a worker gets on."""
    return worker.counts(), [id(job) for line in worker.lines for job in (*line.running, *line.held)]


def pond(
    *, store: Store | None = None, clock: ManualClock | None = None, config: Config | None = None, seed: int = 0
) -> TestPond:
    """A pond on memory (or on ``store``, which must use the same ``clock``), with repeatable ids; ``async with`` it."""
    clock = clock or ManualClock()
    source = random.Random(seed)
    made: Clock = clock
    result = TestPond(store or MemoryStore(clock=made), clock=clock, config=config, random_bytes=source.randbytes)
    result.manual_clock = clock
    result._workers = []
    return result


@asynccontextmanager
async def in_memory(
    registered: Pond, *, clock: ManualClock | None = None, config: Config | None = None, seed: int = 0
) -> AsyncIterator[TestPond]:
    """Put a pond that consumers, tasks and jobs were registered with on an empty memory, under a manual clock, for as
    long as the ``async with`` lasts: ``async with testing.in_memory(app.pond) as pond: …``. Raises InvalidInput when it
    is open."""
    if registered.is_open:
        raise InvalidInput("this pond is open; a test puts it on memory before anything opens it")
    kept = dict(registered.__dict__)
    temporary = pond(clock=clock, config=config or registered.config, seed=seed)
    # Two objects, one state: what the application holds works on memory now, and the test has the means to move time.
    state = registered.__dict__
    for name in state.keys() - REGISTERED:
        del state[name]  # the way to another connection to its store, say
    state.update({name: value for name, value in temporary.__dict__.items() if name not in REGISTERED})
    view = object.__new__(TestPond)
    view.__dict__ = state
    try:
        async with view:
            yield view
    finally:
        kept |= {name: state[name] for name in REGISTERED & state.keys()}
        state.clear()
        state.update(kept)
