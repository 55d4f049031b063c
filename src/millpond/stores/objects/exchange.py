"""Conditional requests whose replies may be lost.

What was written is known again by reading it back: no two writes have the same bytes, since each holds a write id of
its own. A write whose outcome cannot be told after some tries ends in `OutcomeUnknown`, never in a guess.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import NamedTuple, TypeVar

from millpond.errors import OutcomeUnknown, StoreError
from millpond.model.clock import Clock
from millpond.model.ids import IdSource
from millpond.stores.objects.bucket import Bucket, Content, Entry, Folder, ObjectChanged, ObjectExists, Tag
from millpond.stores.objects.deletes import Deletes, TooLate
from millpond.stores.objects.index import same

log = logging.getLogger("millpond.stores.objects")

T = TypeVar("T")

ATTEMPTS = 6
"""Tries of a request whose reply gets lost: with the pauses between them some three seconds, as long as a network that
changes its routes is away."""
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 2.0
REQUESTS = 64
"""Requests of one store under way at once: more only queue up elsewhere."""


class Created(NamedTuple):
    """What came of a create."""

    result: Tag | Content
    unsure: bool
    """A reply was lost on the way: a request that was given up may take place yet, should the name become free."""


class Exchange:
    """A bucket, with lost replies made good where that can be done."""

    def __init__(self, bucket: Bucket, clock: Clock, ids: IdSource, batch: int = 1) -> None:
        """``batch``: how many objects the bucket deletes by one request."""
        self.bucket = bucket
        self._deletes = Deletes(bucket, batch)
        self._clock = clock
        self._ids = ids
        self._slots = asyncio.Semaphore(REQUESTS)
        self.unknown = 0
        """Replies that were lost."""

    async def pause(self, attempt: int) -> None:
        """Wait before try number ``attempt`` + 1: twice as long each time, and by chance up to half less."""
        longest = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = self._clock.call_later(
            longest * (0.5 + self._ids.below(1024) / 2048), lambda: None if over.done() else over.set_result(None)
        )
        try:
            await over
        finally:
            timer.cancel()

    async def create(self, path: str, data: bytes, *, insist: bool) -> Tag | Content:
        """Write an object that is not there: its tag, or what is there instead.

        ``insist``: where nothing is found after a lost reply it is written again. Not for what others may have found,
        used and removed meanwhile: it would come back. Raises OutcomeUnknown, StoreError.
        """
        return (await self.create_until(path, data, insist=insist, check=None)).result

    async def create_until(self, path: str, data: bytes, *, insist: bool, check: Callable[[], None] | None) -> Created:
        """As `create`; ``check`` is called before each try, and what it raises ends them."""
        unsure = False
        for attempt in range(ATTEMPTS):
            if attempt == 0 or insist:
                try:
                    async with self._slots:
                        if check is not None:
                            check()
                        return Created(await self.bucket.create(path, data), unsure)
                except ObjectExists:
                    pass
                except OutcomeUnknown:
                    self.unknown += 1
                    unsure = True
                    await self.pause(attempt)
                except StoreError as error:
                    if unsure:
                        # This try did not take place; one before it may have.
                        raise undecided(path) from error
                    raise
            else:
                await self.pause(attempt)
            # Some clouds say "exists" when two writes met and neither took place; so this may find nothing.
            content = await self._read_back(path)
            if content is not None:
                return Created(content.tag if content.data == data else content, unsure)
            if insist:
                await self.pause(attempt)
        raise undecided(path)

    async def swap(
        self, path: str, data: bytes, tag: Tag, *, lost: Callable[[Content], bool] | None = None
    ) -> Tag | Content | None:
        """Write an object that still is the version ``tag``: its new tag, or what is there instead.

        ``lost``: whether what is there shows that this write has not taken place. Asked after a lost reply: others may
        have written over it already, and who asked for it must not be told that it was refused.
        Raises OutcomeUnknown, StoreError."""
        unsure = False
        for attempt in range(ATTEMPTS):
            try:
                async with self._slots:
                    return await self.bucket.replace(path, data, tag)
            except ObjectChanged:
                pass
            except OutcomeUnknown:
                self.unknown += 1
                unsure = True
                await self.pause(attempt)
            except StoreError as error:
                if unsure:
                    # This try did not take place; one before it may have, or may do so yet.
                    raise undecided(path) from error
                raise
            content = await self._read_back(path)
            if content is None:
                if unsure:
                    # Perhaps it was written, and what was written has had its day.
                    raise undecided(path)
                return None
            if content.data == data:
                return content.tag
            if not same(content.tag, tag):
                if unsure and lost is not None and not lost(content):
                    raise undecided(path)
                return content
            # Not there (yet). Should the first one arrive after all, this one will find the object changed, by itself.
        raise undecided(path)

    async def _read_back(self, path: str) -> Content | None:
        try:
            return await self.read(path)
        except StoreError as error:
            raise undecided(path) from error

    async def read(self, path: str) -> Content | None:
        """The object; None when there is none."""
        return await self._repeat(lambda: self.bucket.read(path))

    async def delete(self, path: str) -> None:
        """Remove an object that nobody can want any more, and whose name will not be used again."""
        await self._repeat(lambda: self.bucket.delete(path))

    async def pages(self, prefix: str, after: str | None = None) -> AsyncGenerator[list[Entry], None]:
        """A listing; after a lost reply it goes on where it was."""
        attempt = 0
        while True:
            listing = self.bucket.list(prefix, after=after)
            try:
                async for page in listing:
                    # Not every bucket keeps to the position.
                    fresh = page if after is None else [entry for entry in page if entry.name > after]
                    attempt = 0
                    yield fresh
                    if fresh:
                        after = fresh[-1].name
                return
            except OutcomeUnknown:
                self.unknown += 1
                attempt += 1
                if attempt == ATTEMPTS:
                    raise
                await self.pause(attempt - 1)
            finally:
                closing = getattr(listing, "aclose", None)
                if closing is not None:
                    await closing()

    async def folder(self, prefix: str) -> Folder:
        """One level of names."""
        return await self._repeat(lambda: self.bucket.folder(prefix))

    async def delete_many(self, paths: list[str]) -> None:
        """As `delete`, of several."""
        await self._repeat(lambda: self.bucket.delete_many(paths))

    async def upload(self, path: str, chunks: AsyncIterator[bytes]) -> int:
        """Stream an object in under a name that was never used; its size. What ``chunks`` raises goes on.

        Raises OutcomeUnknown where a listing does not show it, whole, after a lost reply."""
        sent = 0

        async def counted() -> AsyncIterator[bytes]:
            nonlocal sent
            async for chunk in chunks:
                sent += len(chunk)
                yield chunk

        try:
            return await self.bucket.upload(path, counted())
        except OutcomeUnknown:
            self.unknown += 1
            async with aclosing(self.pages(path)) as pages:
                async for page in pages:
                    if any(entry.name == path and entry.size == sent for entry in page):
                        return sent
            raise

    async def _repeat(self, request: Callable[[], Awaitable[T]]) -> T:
        for attempt in range(ATTEMPTS):
            try:
                async with self._slots:
                    return await request()
            except OutcomeUnknown:
                self.unknown += 1
                if attempt == ATTEMPTS - 1:
                    raise
                await self.pause(attempt)
        raise AssertionError("unreachable")

    async def delete_once(self, path: str, *, alone: bool, still: Callable[[], bool]) -> None:
        """Remove a message: one request, not repeated here, and shared with others' unless ``alone``; sent only if
        ``still`` says yes when its turn has come. Raises TooLate, OutcomeUnknown."""
        if not alone:
            await self._deletes.delete(path, still)
            return
        async with self._slots:
            if not still():
                raise TooLate
            await self.bucket.delete(path)

    async def delete_reusable(self, path: str, still: Callable[[], bool]) -> bool:
        """Remove an object whose name will be used again: one request, sent only if ``still`` says yes when its turn
        has come, and by nobody a second time unless the first certainly did nothing. Whether that went through; if not
        it may take place yet. Raises StoreError."""
        async with self._slots:
            if not still():
                return False
            try:
                await self.bucket.delete(path, once=True)
            except OutcomeUnknown:
                self.unknown += 1
                return False
            return True


def undecided(path: str) -> OutcomeUnknown:
    """The error for a write of which nobody can tell any more whether it took place."""
    return OutcomeUnknown(
        f"whether object {path} was written is not known: the bucket's replies got lost. Read the message or queue "
        "before trying again; an enqueue with a dedup_key or message_id may simply be repeated"
    )
