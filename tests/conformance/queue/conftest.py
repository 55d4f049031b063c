"""Ponds for the queue suite: the same tests on every store, with a clock that the test owns."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tests.conformance.queue import served
from tests.servers.corner import ALL, CORNERS, MakeCorner
from tests.unit.service.far import Far

from millpond import Config, Keyring, Message, Pond, Queue
from millpond.model.clock import ManualClock, SystemClock
from millpond.stores.base import Reach, Store
from millpond.stores.encrypted import EncryptedStore
from millpond.stores.faulty import FaultyStore, Plan
from millpond.stores.memory import MemoryStore
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.store import ObjectStore
from millpond.stores.sqlite import SqliteStore

T = TypeVar("T")

STORES = (
    "memory",
    "memory-candidates",
    "memory-paid",
    "sqlite",
    "objects",
    "memory-encrypted",
    "sqlite-encrypted",
    "objects-encrypted",
    "http-memory",
    "http-sqlite",
    "https-memory",
    "mtls-memory",
)
"""``http-…`` are ponds behind a server of their own on loopback, ``https-…`` with TLS, ``mtls-…`` with certificates of
clients besides; what cannot apply to them is in `served.LEFT_OUT`.
``memory-candidates`` cannot take: its consumers compete for candidates, as those of a bucket do. ``memory-paid``
charges for requests besides, and is reached by others over the network, so that its ponds ask for less. Tests that are
marked ``servers`` are run on servers that play clouds, too; all are with ``MILLPOND_SERVERS_ALL=1``."""
REQUEST_PATIENCE = 0.05
"""Seconds for which requests under way count as something that can run: one that waits for what the test holds up does
not end by itself."""
QUIET_ROUNDS = 30
"""Turns of the event loop without a store call under way, after which whatever could run has run."""


class Busy:
    """A store that knows how many calls are under way in it; everything else is the inner store's."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.under_way = 0
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        target = getattr(self.inner, name)
        if not asyncio.iscoroutinefunction(target) or name in ("open", "close"):
            return target

        async def call(*args: Any, **kwargs: Any) -> Any:
            self.under_way += 1
            self.calls.append(name)
            try:
                return await target(*args, **kwargs)
            finally:
                self.under_way -= 1

        return call


class World:
    """One store, as many ponds on it as the test wants, and the time."""

    def __init__(self, store: str, directory: Path, make_corner: MakeCorner | None = None) -> None:
        scheme, _, inner = store.partition("-")
        self.scheme = scheme if scheme in served.SCHEMES else ""
        """How ponds are reached, if by way of a server."""
        self.http = bool(self.scheme)
        self.store = store = inner if self.scheme else store
        self.encrypted = store.endswith("-encrypted")
        self.clock = ManualClock()
        self.path = directory / "pond.db"
        self.keyring = Keyring({"old": bytes(32), "new": bytes(range(32))})
        self.corner = make_corner(store.partition("-")[0], self.clock) if make_corner and store in CORNERS else None
        self.paid = store == "memory-paid" or store.startswith("objects") or store in CORNERS
        self._memory = MemoryStore(clock=self.clock, takes=store not in ("memory-candidates", "memory-paid"))
        self._bucket = MemoryBucket(clock=self.clock)
        self._made = 0
        self.stores: list[Busy] = []
        self.served: list[served.ServedPond] = []

    def handle(self) -> Store:
        """A new handle on the bare store. What it waits for in there (locks) takes real time."""
        if self.store.startswith("memory"):
            share = self._memory.share()
            return Far(self.clock, share, requests_cost_money=True, reach=Reach.NETWORK) if self.paid else share
        if self.corner is not None:
            return self.corner.store()
        if self.store.startswith("objects"):
            return ObjectStore(self._bucket.share(), clock=self.clock, measure_skew=False)
        return SqliteStore(self.path, clock=SystemClock())

    def pond(
        self,
        *,
        config: Config | None = None,
        plan: Plan | None = None,
        around: Callable[[Store], Store] = lambda store: store,
    ) -> Pond:
        """A pond on the store, to be used with ``async with``; with a ``plan`` its store is a `FaultyStore`.

        ``around``: a store to put around all others."""
        store: Any = Busy(self.handle())
        self.stores.append(store)
        if self.encrypted:
            store = EncryptedStore(store, self.keyring)
        if plan is not None:
            store = FaultyStore(store, plan)
        self._made += 1
        chance = random.Random(self._made)
        pond = Pond(around(store), clock=self.clock, config=config, random_bytes=chance.randbytes)
        if self.http:
            pond = served.ServedPond(pond, self.scheme, random_bytes=random.Random(-self._made).randbytes)
            self.served.append(pond)
        return pond

    @asynccontextmanager
    async def queue(self, name: str = "orders", **options: Any) -> AsyncIterator[Queue]:
        """A queue of a pond of its own."""
        async with self.pond(**options) as pond:
            yield pond.queue(name)

    async def settle(self) -> None:
        """Let everything run that can, until all of it waits for time or for somebody else."""
        quiet = 0
        loop = asyncio.get_running_loop()
        patience = loop.time() + REQUEST_PATIENCE
        while quiet < QUIET_ROUNDS:
            busy = self._busy()
            await asyncio.sleep(0.0005 if busy else 0)
            if self.served and not busy and loop.time() < patience:
                busy = any(pond.busy for pond in self.served)
            quiet = 0 if busy or self._busy() else quiet + 1

    def _busy(self) -> bool:
        # A bucket's store has work of its own beside the calls.
        return any(store.under_way for store in self.stores) or (self.corner is not None and self.corner.under_way > 0)

    async def advance(self, seconds: float) -> None:
        """Let time pass for everybody."""
        await self.settle()
        self.clock.advance(seconds)
        await self.settle()

    async def waiting(self, call: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """The call as a task, which by now waits for something."""
        task = asyncio.ensure_future(call)
        await self.settle()
        assert not task.done(), f"it did not wait: {task}"
        return task

    async def soon(self, task: asyncio.Future[T]) -> T:
        """The result of a task that has no reason left to wait, so that one which does fails instead of hanging."""
        async with asyncio.timeout(20):
            return await task

    async def eventually(self, condition: Callable[[], bool], *, seconds: float = 10.0) -> None:
        """Poll a condition that another thread makes true, or another pond over the change feed."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while not condition():
            assert loop.time() < end, "it did not happen"
            await asyncio.sleep(0.001)

    def words(self, text: str) -> str | None:
        """What an error of the store must say; over HTTP anything, for a server keeps the storage's words to itself."""
        return None if self.http else text

    async def one(self, queue: Queue, **options: Any) -> Message:
        """Receive a message that must be there."""
        messages = await queue.receive(**options)
        assert len(messages) == 1, f"expected one message, got {messages}"
        return messages[0]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """On which stores a test is run."""
    if "world" in metafunc.fixturenames:
        with_servers = ALL or any(metafunc.definition.iter_markers("servers"))
        known = [
            name
            for name in STORES
            if name.partition("-")[0] not in served.SCHEMES or served.applies(name, metafunc.definition)
        ]
        metafunc.parametrize("world", [*known, *(CORNERS if with_servers else ())], indirect=True)


@pytest.fixture
def world(request: pytest.FixtureRequest, tmp_path: Path, make_corner: MakeCorner) -> World:
    """A fresh store of each kind."""
    return World(request.param, tmp_path, make_corner)
