"""Workers on memory, on a file, behind a server and on a bucket, under a clock that the test moves.

``http`` is a client of a server in this process, over loopback and for real; its store is a file. What needs real time
and real processes (renewals by a thread of their own, servers that go away): tests/e2e/test_worker_elsewhere.py."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tests.conformance.queue.served import ServedPond

from millpond import testing
from millpond.model.clock import ManualClock, SystemClock
from millpond.service.config import Config
from millpond.stores.base import Store
from millpond.stores.faulty import FaultyStore
from millpond.stores.memory import MemoryStore
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.store import ObjectStore
from millpond.stores.sqlite import SqliteStore
from millpond.worker.worker import Worker

QUIET_ROUNDS = 60
"""Turns of the event loop without a store call under way, after which whatever could run has run."""
REQUEST_PATIENCE = 0.05
"""Seconds for which requests under way count as something that can run: one that waits for what the test holds up does
not end by itself."""
BOUND = 30.0
"""Seconds within which what a test waits for has happened, on the busiest machine."""


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition that other tasks and threads bring about."""
    end = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < end, "what the test waits for does not come"
        await asyncio.sleep(0.001)


class Busy:
    """A store that knows how many calls are under way in it, waiting for a disk or a lock; else the inner store's."""

    under_way = 0

    def __init__(self, inner: Store) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        target = getattr(self.inner, name)
        if not asyncio.iscoroutinefunction(target) or name in ("open", "close"):
            return target

        async def call(*args: Any, **kwargs: Any) -> Any:
            Busy.under_way += 1
            try:
                return await target(*args, **kwargs)
            finally:
                Busy.under_way -= 1

        return call


class Served(ServedPond, testing.TestPond):
    """A client of a server of its own, whose store is a file and whose clock the test owns."""

    def __init__(self, local: testing.TestPond) -> None:
        super().__init__(local, "http", random_bytes=random.Random(1).randbytes)
        self.manual_clock = local.manual_clock
        self._workers = []


class Site:
    """A pond, and workers on it."""

    def __init__(self, pond: testing.TestPond) -> None:
        self.pond = pond
        self.queue = pond.queue("q")
        self._running: list[tuple[Worker, asyncio.Task[None]]] = []

    def start(self, **options: Any) -> Worker:
        """A worker, running."""
        worker = Worker(self.pond, **options)
        self._running.append((worker, asyncio.create_task(worker.run())))
        return worker

    async def end(self, worker: Worker, **options: Any) -> None:
        """Stop it and wait until it has ended."""
        worker.stop(**options)
        await self.ended(worker)

    async def ended(self, worker: Worker) -> None:
        """Wait until it has ended; raises what it raised."""
        [task] = [task for each, task in self._running if each is worker]
        self._running = [(each, task) for each, task in self._running if each is not worker]
        await until(task.done)
        await task

    async def empty(self, *, dead: int = 0) -> None:
        """Wait until nothing is left in the queue but these dead letters."""

        async def look() -> bool:
            counts = await self.queue.counts()
            return (counts.ready, counts.delayed, counts.leased, counts.dead) == (0, 0, 0, dead)

        end = time.monotonic() + BOUND
        while not await look():
            assert time.monotonic() < end, f"{await self.queue.counts()}"
            await asyncio.sleep(0.001)

    async def pass_(self, seconds: float, *, steps: int = 1) -> None:
        """Let time pass, in steps, each of which is followed by what it brings about."""
        for _ in range(steps):
            await self.settle()
            self.pond.manual_clock.advance(seconds / steps)
            await self.settle()

    async def settle(self) -> None:
        """Let what can run do so, until nothing has been under way in the store for a while."""
        quiet = 0
        patience = time.monotonic() + REQUEST_PATIENCE
        while quiet < QUIET_ROUNDS:
            busy = bool(Busy.under_way)
            if not busy and isinstance(self.pond, Served):
                busy = self.pond.busy and time.monotonic() < patience
            await asyncio.sleep(0.001 if busy else 0)
            quiet = 0 if busy or Busy.under_way else quiet + 1

    async def close(self) -> None:
        """End what a failed test has left running, so that it fails rather than hangs."""
        for held in Held.living:
            held.go.set()
        for worker, task in self._running:
            worker.stop(grace=0)
            worker.stop()
            task.cancel()
        while not all(task.done() for _, task in self._running):
            self.pond.manual_clock.advance(1)
            await asyncio.sleep(0.001)


MakeSite = Callable[..., Any]


STORES = ("memory", "sqlite", "http", "bucket")


@pytest.fixture(params=STORES)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> MakeSite:
    """``async with site() as s``: a pond on each."""

    @asynccontextmanager
    async def make(*, plan: Any = None, config: Config | None = None) -> AsyncIterator[Site]:
        clock = ManualClock()
        store: Any
        if request.param == "memory":
            store = MemoryStore(clock=clock)
        elif request.param == "bucket":
            store = ObjectStore(MemoryBucket(clock=clock), clock=clock, measure_skew=False)
        else:
            # What it waits for in there (locks) takes real time.
            store = SqliteStore(str(tmp_path / "pond.db"), clock=SystemClock())
        store = Busy(store)
        if plan is not None:
            store = FaultyStore(store, plan)
        pond = testing.pond(store=store, clock=clock, config=config)
        async with Served(pond) if request.param == "http" else pond as opened:
            made = Site(opened)
            try:
                yield made
            finally:
                await made.close()

    return make


class Held:
    """A handler's place to wait in until the test lets it go, in a thread or on a loop."""

    living: ClassVar[list[Held]] = []

    def __init__(self) -> None:
        self.living.append(self)
        self.started: list[Any] = []
        self.ended: list[Any] = []
        self.go = threading.Event()

    def block(self, what: Any = None) -> None:
        """In a thread."""
        self.started.append(what)
        # In short waits: an exception that is raised in this thread is met between them.
        end = time.monotonic() + BOUND
        while not self.go.wait(0.002):
            assert time.monotonic() < end
        self.ended.append(what)

    async def wait(self, what: Any = None) -> None:
        """On the loop."""
        self.started.append(what)
        while not self.go.is_set():
            await asyncio.sleep(0.001)
        self.ended.append(what)


@pytest.fixture
def held() -> Any:
    found = Held()
    yield found
    found.go.set()
    Held.living.remove(found)
