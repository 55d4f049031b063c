"""A corner of a server's bucket for one test, under a clock that the test owns.

A server stamps objects by its own clock, with which a test's has nothing to do; and the store compares the two: leases
and intents are older or younger than something. So what a corner's handles write is remembered with the time that the
test's clock showed, and that is what they tell. Everything else is the server's.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from functools import cache
from typing import Any, TypeVar

from tests.servers.process import Server

from millpond.model.clock import Clock, SystemClock, TimerHandle
from millpond.stores.objects.bucket import Bucket, Content, Entry, Folder, Tag
from millpond.stores.objects.obstore_bucket import ObstoreBucket
from millpond.stores.objects.opening import open_bucket, parse_location
from millpond.stores.objects.requests import CountedBucket
from millpond.stores.objects.store import ObjectStore

T = TypeVar("T")

PLAIN, ENCRYPTED = ("seaweed", "azurite", "google"), ("seaweed-encrypted",)
CORNERS = (*PLAIN, *ENCRYPTED)
"""Where the suites are run: fixtures of `tests.servers.fixtures`, and whether what lies there is encrypted."""
ALL = os.environ.get("MILLPOND_SERVERS_ALL") == "1"
"""Run everything on every server, with thousands of messages: it takes minutes."""
_numbers = itertools.count(1)


MakeCorner = Callable[[str, Clock], "Corner"]
"""A new corner of a server, by the name of its fixture."""


class WallClock:
    """The time of day of ``clock``, and the machine's timers: pauses between requests take real time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._machine = SystemClock()

    def now_ms(self) -> int:
        return self._clock.now_ms()

    def monotonic(self) -> float:
        return self._machine.monotonic()

    def call_later(self, delay: float, callback: Callable[[], object]) -> TimerHandle:
        return self._machine.call_later(delay, callback)


class Corner:
    """A part of a server's bucket that nothing else uses; empty at first."""

    def __init__(self, server: Server, clock: Clock) -> None:
        self._bucket = _bucket_of(server)
        self.prefix = f"corner-{os.getpid()}/{next(_numbers)}/"
        self.clock = clock
        self.written: dict[str, tuple[Tag, int]] = {}
        """When, by the test's clock."""
        self.under_way = 0
        """Requests that wait for their replies."""

    def store(self, **options: Any) -> ObjectStore:
        """A store, as another process has one."""
        bucket = CountedBucket(_Stamped(self, self._bucket), batch=self._bucket.cloud.deletes)
        return ObjectStore(bucket, clock=WallClock(self.clock), measure_skew=False, **options)

    def time_of(self, name: str, tag: Tag) -> int:
        """When a version of an object was written. One that nobody has heard of is being written just now."""
        known = self.written.get(name)
        return known[1] if known is not None and known[0].same(tag) else self.clock.now_ms()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request while it is under way."""
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1


@cache
def _bucket_of(server: Server) -> ObstoreBucket:
    """Connections are kept from test to test: to set up obstore takes longer than most of them."""
    return open_bucket(parse_location(server.url("")), clock=SystemClock())


class _Stamped:
    """A corner of ``inner``, whose objects were written when the corner's clock says."""

    def __init__(self, corner: Corner, inner: Bucket) -> None:
        self._corner = corner
        self._inner = inner
        self._prefix = corner.prefix

    async def _write(self, name: str, writing: Awaitable[Tag]) -> Tag:
        tag = await self._ask(writing)
        self._corner.written[name] = (tag, self._corner.clock.now_ms())
        return tag

    async def _ask(self, asking: Awaitable[T]) -> T:
        with self._corner.request():
            return await asking

    def _entry(self, entry: Entry) -> Entry:
        name = entry.name.removeprefix(self._prefix)
        return entry._replace(name=name, modified=self._corner.time_of(name, entry.tag))

    async def create(self, name: str, data: bytes) -> Tag:
        return await self._write(name, self._inner.create(self._prefix + name, data))

    async def replace(self, name: str, data: bytes, tag: Tag) -> Tag:
        return await self._write(name, self._inner.replace(self._prefix + name, data, tag))

    async def read(self, name: str) -> Content | None:
        content = await self._ask(self._inner.read(self._prefix + name))
        return None if content is None else content._replace(modified=self._corner.time_of(name, content.tag))

    async def delete(self, name: str, *, once: bool = False) -> None:
        await self._ask(self._inner.delete(self._prefix + name, once=once))

    async def delete_many(self, names: list[str]) -> None:
        await self._ask(self._inner.delete_many([self._prefix + name for name in names]))

    async def list(self, prefix: str, *, after: str | None = None) -> AsyncIterator[list[Entry]]:
        start = None if after is None else self._prefix + after
        async with aclosing(self._inner.list(self._prefix + prefix, after=start)) as pages:
            while True:
                page = await self._ask(anext(pages, None))
                if page is None:
                    return
                yield [self._entry(entry) for entry in page]

    async def folder(self, prefix: str) -> Folder:
        found = await self._ask(self._inner.folder(self._prefix + prefix))
        return Folder(
            [path.removeprefix(self._prefix) for path in found.folders], [self._entry(entry) for entry in found.entries]
        )

    async def upload(self, name: str, chunks: AsyncIterator[bytes]) -> int:
        # What the chunks wait for is the test's; and the names of payloads say when they were written.
        return await self._inner.upload(self._prefix + name, chunks)

    async def download(self, name: str) -> AsyncIterator[bytes]:
        async with aclosing(self._inner.download(self._prefix + name)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def close(self) -> None:
        """Nothing of its own; the store in it says that it is closed."""
