"""Counting what a bucket is asked: a bucket around a bucket.

Clouds charge for requests, so these are counted always, by kind and by the queue that they are for. A refused request
is charged as one that went through is, and counted when it is made. What the bucket inside repeats on its own is
counted if it says so, by `CountedBucket.repeated`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from millpond.stores.base import QueueName, Requests
from millpond.stores.objects.bucket import Bucket, Content, Entry, Folder, Tag

MAX_QUEUES = 10_000
"""Queues that are counted apart; what further ones cost is counted under no queue."""
PART_BYTES = 5 * 1024 * 1024
"""Bytes of one part of an upload, unless told otherwise: the least that S3 takes."""
PAGE = 1000
"""Entries of one page of a listing: what S3 and Google give."""
BATCH = 1000
"""Objects that one request deletes, unless told otherwise: what S3 takes."""


def queue_of(name: str) -> QueueName | None:
    """The queue that an object belongs to, by its name ``q/<namespace>/<queue>/…``, or None."""
    parts = name.split("/", 3)
    return QueueName(parts[1], parts[2]) if len(parts) == 4 and parts[0] == "q" else None


class _Counts:
    __slots__ = Requests.__struct_fields__

    def __init__(self) -> None:
        self.creates = self.replaces = self.reads = self.deletes = self.lists = self.parts = 0
        self.bytes_sent = self.bytes_received = 0

    def copy(self) -> Requests:
        return Requests(**{name: getattr(self, name) for name in self.__slots__})


_FIELDS = {
    "create": "creates",
    "replace": "replaces",
    "read": "reads",
    "download": "reads",
    "delete": "deletes",
    "delete_many": "deletes",
    "list": "lists",
    "upload": "parts",
}


class CountedBucket:
    """``inner``, with its requests counted."""

    def __init__(
        self,
        inner: Bucket,
        *,
        part_bytes: int = PART_BYTES,
        batch: int = BATCH,
        queue_of: Callable[[str], QueueName | None] = queue_of,
    ) -> None:
        """``part_bytes``: what ``inner`` sends at once when it uploads. ``batch``: how many objects it deletes by one
        request."""
        self.inner = inner
        self._part_bytes = part_bytes
        self.batch = batch
        self._queue_of = queue_of
        self._counts: dict[QueueName | None, _Counts] = {None: _Counts()}

    def requests(self) -> dict[QueueName | None, Requests]:
        """What was asked so far, per queue; None stands for what is no queue's."""
        return {queue: counts.copy() for queue, counts in self._counts.items()}

    def _of(self, name: str) -> _Counts:
        queue = self._queue_of(name)
        counts = self._counts.get(queue)
        if counts is None:
            if len(self._counts) > MAX_QUEUES:
                return self._counts[None]
            counts = self._counts[queue] = _Counts()
        return counts

    def repeated(self, kind: str, name: str) -> None:
        """The bucket inside sent a request again: ``kind`` is its method."""
        counts, field = self._of(name), _FIELDS[kind]
        setattr(counts, field, getattr(counts, field) + 1)

    async def create(self, name: str, data: bytes) -> Tag:
        """As the bucket inside."""
        counts = self._of(name)
        counts.creates += 1
        counts.bytes_sent += len(data)
        return await self.inner.create(name, data)

    async def replace(self, name: str, data: bytes, tag: Tag) -> Tag:
        """As the bucket inside."""
        counts = self._of(name)
        counts.replaces += 1
        counts.bytes_sent += len(data)
        return await self.inner.replace(name, data, tag)

    async def read(self, name: str) -> Content | None:
        """As the bucket inside."""
        counts = self._of(name)
        counts.reads += 1
        content = await self.inner.read(name)
        if content is not None:
            counts.bytes_received += len(content.data)
        return content

    async def delete(self, name: str, *, once: bool = False) -> None:
        """As the bucket inside."""
        self._of(name).deletes += 1
        await (self.inner.delete(name, once=True) if once else self.inner.delete(name))

    async def delete_many(self, names: list[str]) -> None:
        """As the bucket inside; counted for the queue of the first."""
        if names:
            self._of(names[0]).deletes += -(-len(names) // self.batch)
        await self.inner.delete_many(names)

    async def list(self, prefix: str, *, after: str | None = None) -> AsyncIterator[list[Entry]]:
        """As the bucket inside; each page is a request, and so is finding nothing."""
        counts = self._of(prefix)
        counts.lists += 1  # now: a reader that is cancelled, or fails, has asked for the first page
        first = True
        pages = self.inner.list(prefix, after=after)
        try:
            async for page in pages:
                counts.lists += not first
                first = False
                yield page
        finally:
            await _close(pages)

    async def folder(self, prefix: str) -> Folder:
        """As the bucket inside; each thousand of what it finds is a request."""
        counts = self._of(prefix)
        counts.lists += 1
        found = await self.inner.folder(prefix)
        counts.lists += max(0, len(found.folders) + len(found.entries) - 1) // PAGE
        return found

    async def upload(self, name: str, chunks: AsyncIterator[bytes]) -> int:
        """As the bucket inside. In parts where it does not fit into one, with one request each to begin and to end."""
        counts = self._of(name)
        sent = 0

        async def passed() -> AsyncIterator[bytes]:
            nonlocal sent
            async for chunk in chunks:
                sent += len(chunk)
                yield chunk

        try:
            return await self.inner.upload(name, passed())
        finally:
            counts.bytes_sent += sent
            counts.parts += 1 if sent <= self._part_bytes else 2 - (-sent // self._part_bytes)

    async def download(self, name: str) -> AsyncIterator[bytes]:
        """As the bucket inside."""
        counts = self._of(name)
        counts.reads += 1
        chunks = self.inner.download(name)
        try:
            async for chunk in chunks:
                counts.bytes_received += len(chunk)
                yield chunk
        finally:
            await _close(chunks)

    async def close(self) -> None:
        """As the bucket inside."""
        await self.inner.close()


async def _close(source: AsyncIterator[object]) -> None:
    """End an iterator that its reader leaves early, now and not when the garbage collector comes by."""
    close = getattr(source, "aclose", None)
    if close is not None:
        await close()
