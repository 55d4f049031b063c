"""A bucket that does to requests what networks do, and a clock whose pauses take no time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec

from millpond.errors import OutcomeUnknown, StoreError
from millpond.model.clock import ManualClock, TimerHandle
from millpond.stores.base import Box, Insert, Inserted, Item, Mark, Op, Outcome, Store, Stored, Unique, Update
from millpond.stores.conformance.harness import NOW, ident
from millpond.stores.objects.bucket import Content, Entry, Folder, Tag
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.store import ObjectStore

T = TypeVar("T")

QUEUE = ("default", "q")


class Hasty(ManualClock):
    """Whoever waits for it to reach a time makes it that time."""

    def call_later(self, delay: float, callback: Callable[[], object]) -> TimerHandle:
        timer = super().call_later(delay, callback)
        asyncio.get_running_loop().call_soon(lambda: self.advance(delay))
        return timer


class Crash(StoreError):
    """The process died here."""

    code = "crash"


LOST, DROPPED, REFUSED, BEFORE, AFTER = "lost", "dropped", "refused", "crash before", "crash after"


class Network:
    """``inner``, with the requests counted and some of them going wrong.

    ``plan``: number of a request (1 for the first) → what happens to it. A lost one takes place, and its reply does not
    come; a dropped one does not take place, and nobody can tell; a refused one does not, and that is known. After a
    crash no request is made any more.
    """

    def __init__(self, inner: MemoryBucket, plan: dict[int, str] | None = None) -> None:
        self.inner = inner
        self.plan = plan or {}
        self.calls: list[tuple[str, str]] = []
        self.crashed = False
        self.once: list[str] = []
        """Objects whose delete must not be sent twice."""
        self.chance: random.Random | None = None
        """Wait for some turns of the event loop around each request."""
        self.loses = self.kills = 0.0
        """Of how many requests, by that chance, the reply is lost; and before or after how many the process dies."""

    def reset(self, plan: dict[int, str] | None = None) -> None:
        """Count from the beginning."""
        self.calls.clear()
        self.plan = plan or {}

    def count(self, *kinds: str) -> int:
        """Requests of these kinds, or all."""
        return sum(not kinds or kind in kinds for kind, _ in self.calls)

    async def _wait(self) -> None:
        if self.chance is not None:
            for _ in range(self.chance.randrange(4)):
                await asyncio.sleep(0)

    async def _do(self, kind: str, name: str, request: Callable[[], Awaitable[T]]) -> T:
        if self.crashed:
            raise Crash
        self.calls.append((kind, name))
        fault = self.plan.get(len(self.calls)) or self._accident()
        if fault == BEFORE:
            self.crashed = True
            raise Crash
        if fault == DROPPED:
            raise OutcomeUnknown("the request did not arrive")
        if fault == REFUSED:
            raise StoreError("the bucket refused; try again later")
        await self._wait()
        result = await request()
        await self._wait()
        if fault == AFTER:
            self.crashed = True
        if self.crashed:
            raise Crash
        if fault == LOST:
            raise OutcomeUnknown("the reply did not arrive")
        return result

    def _accident(self) -> str | None:
        if self.chance is None:
            return None
        at = self.chance.random()
        if at < self.loses:
            return LOST
        return None if at >= self.loses + self.kills else BEFORE if self.chance.random() < 0.5 else AFTER

    async def create(self, name: str, data: bytes) -> Tag:
        return await self._do("create", name, lambda: self.inner.create(name, data))

    async def replace(self, name: str, data: bytes, tag: Tag) -> Tag:
        return await self._do("replace", name, lambda: self.inner.replace(name, data, tag))

    async def read(self, name: str) -> Content | None:
        return await self._do("read", name, lambda: self.inner.read(name))

    async def delete(self, name: str, *, once: bool = False) -> None:
        self.once += [name] if once else []
        await self._do("delete", name, lambda: self.inner.delete(name, **({"once": True} if once else {})))

    async def delete_many(self, names: list[str]) -> None:
        await self._do("delete_many", names[0], lambda: self.inner.delete_many(names))

    async def list(self, prefix: str, *, after: str | None = None) -> AsyncIterator[list[Entry]]:
        pages = self.inner.list(prefix, after=after)
        size = self.inner._page_size
        try:
            while True:
                page = await self._do("list", prefix, lambda: anext(pages))
                yield page
                if len(page) < size:
                    return
        finally:
            await pages.aclose()  # type: ignore[attr-defined]

    async def folder(self, prefix: str) -> Folder:
        return await self._do("folder", prefix, lambda: self.inner.folder(prefix))

    async def upload(self, name: str, chunks: AsyncIterator[bytes]) -> int:
        return await self._do("upload", name, lambda: self.inner.upload(name, chunks))

    async def download(self, name: str) -> AsyncIterator[bytes]:
        chunks = self.inner.download(name)
        try:
            while True:
                try:
                    chunk = await anext(chunks)
                except StopAsyncIteration:
                    return
                yield chunk
        finally:
            await chunks.aclose()  # type: ignore[attr-defined]

    async def close(self) -> None:
        await self.inner.close()


class Rig:
    """One bucket, and as many stores on it as the test wants, each over a network of its own."""

    def __init__(self, *, page_size: int = 1000, **options: Any) -> None:
        self.clock = Hasty()
        self.root = MemoryBucket(clock=self.clock, page_size=page_size)
        self.options = options
        self._made = 0
        self.networks: list[Network] = []

    async def store(self, **options: Any) -> ObjectStore:
        """Another process's store, open."""
        self._made += 1
        network = Network(self.root.share())
        self.networks.append(network)
        chance = random.Random(self._made)
        store = ObjectStore(
            network,
            clock=self.clock,
            measure_skew=False,
            random_bytes=chance.randbytes,
            **(self.options | options),
        )
        await store.open()
        network.reset()
        return store

    def network(self, store: ObjectStore) -> Network:
        """What a store made by this rig goes over."""
        network = store._counted.inner
        assert isinstance(network, Network)
        return network

    async def settle(self, store: ObjectStore) -> None:
        """Background work of the store ends."""
        while store._engine.tasks:
            await asyncio.gather(*store._engine.tasks, return_exceptions=True)

    async def rescue(self) -> ObjectStore:
        """Time passes, and somebody else looks at everything: what was left half done is finished."""
        self.clock.advance(61)
        store = await self.store()
        for _ in range(3):
            await store.expired(NOW, limit=1)
            for name in await store.queues():
                for box in Box:
                    await store.list(*name, box, limit=1000)
            await self.settle(store)
            self.clock.advance(61)
        return store


def uuid_at(time: int, number: int) -> str:
    """A message id as an `IdSource` makes it at this time."""
    return f"{time >> 16:08x}-{time & 0xFFFF:04x}-7000-8000-{number:012x}"


def fresh(
    number: int,
    *,
    at: int = NOW,
    due: int | None = None,
    queue: str = "q",
    group: str | None = None,
    payload: bytes = b"payload",
    unique: Unique | None = None,
    chosen: bool = False,
    priority: int = 5,
    expires: int | None = None,
) -> Insert:
    """The insert of a message whose id tells when it is due, as the service makes it."""
    id = ident(number) if chosen else uuid_at(at if due is None or group is not None else due, number)
    what = Item("default", queue, id, priority, group, len(payload), False)
    return Insert(
        what, at if due is None else due, expires, b"head %d" % number, b"new", payload, unique, chosen=chosen
    )


async def apply(store: Store, op: Op) -> Outcome:
    """Write one op."""
    [outcome] = await store.write([op])
    return outcome


async def insert(store: Store, op: Insert) -> Inserted:
    """Insert; it must succeed."""
    outcome = await apply(store, op)
    assert isinstance(outcome, Inserted), outcome
    return outcome


def lease(record: Inserted | Stored, until: int, *, want_payload: bool = False) -> Update:
    """The claim of a record."""
    return Update(record.item, record.mark, until, True, record.mark.expires, Box.LIVE, b"held", want_payload)


def give_back(item: Item, mark: Mark, due: int) -> Update:
    """The nack of a record."""
    return Update(item, mark, due, False, mark.expires, Box.LIVE, b"back")


async def picture(store: ObjectStore, *queues: str) -> dict[str, Any]:
    """What is in the queues, whatever names and ETags say."""
    found: dict[str, Any] = {}
    for queue in queues or ("q", "next"):
        for box in Box:
            for record in (await store.list("default", queue, box, limit=1000)).records:
                item = record.item
                assert item.id not in found, f"{item.id} is there twice"
                state = await store.state(item)
                payload = await store.payload(item)
                if item.external:
                    payload = b"".join([chunk async for chunk in store.read_blob(item)])
                mark = record.mark
                found[item.id] = (
                    *(queue, box.name, record.head, record.status, mark.due, mark.leased, mark.expires),
                    payload,
                    None if state is None else state.data,
                )
        document = await store.document("default", queue)
        if document is not None:
            found[queue] = document.data
    return found


def replace(op: Insert, **changes: Any) -> Insert:
    """The insert with other fields."""
    return msgspec.structs.replace(op, **changes)
