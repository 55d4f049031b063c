"""A bucket in memory: the reference for the others, and what tests run the object store on.

Conditions are as strict as any cloud's, and what clouds leave open is at its least helpful: the ETag is that of the
body, so that equal bodies have equal ETags; a listing sees the bucket anew with each page; a request takes a turn of
the event loop, so that others come between.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from itertools import islice
from typing import NamedTuple

from millpond.errors import MessageNotFound, StoreClosed
from millpond.model.clock import Clock
from millpond.stores.objects.bucket import Content, Entry, Folder, ObjectChanged, ObjectExists, Tag
from millpond.stores.ordered import SortedSet

PAGE_SIZE = 1000
"""Objects in a page of a listing, as on S3."""
_CHUNK = 1 << 20
"""Largest piece that ``download`` may yield, by the protocol."""


class _Object(NamedTuple):
    data: bytes
    tag: Tag
    modified: int


class _Data:
    """What the handles of one bucket share."""

    def __init__(self) -> None:
        self.objects: dict[str, _Object] = {}
        self.names: SortedSet[str] = SortedSet()
        """Code points sort as the bytes of UTF-8 do."""
        self.generation = 0


class MemoryBucket:
    """A bucket that lives as long as its handles do.

    ``clock`` is the bucket's own, which tells when an object was written; ``resolution`` is how exactly it says so, in
    milliseconds (1,000 on S3). ``page_size``: objects in a page of a listing. ``generations``: versions are told apart
    by generation, as on Google, and not by ETag. ``turns``: turns of the event loop before a request takes effect, and
    ``reply_turns`` those after it.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        page_size: int = PAGE_SIZE,
        resolution: int = 1,
        generations: bool = False,
        turns: int = 1,
        reply_turns: int = 0,
    ) -> None:
        self._clock = clock
        self._page_size = page_size
        self._resolution = resolution
        self._generations = generations
        self._turns = turns
        self._reply_turns = reply_turns
        self._data = _Data()
        self._closed = False

    def share(self, *, clock: Clock | None = None) -> MemoryBucket:
        """Another handle on the same objects, as another process has one; from a closed handle too.

        ``clock`` stamps what is written through it, for tests that let an object be old."""
        other = MemoryBucket(
            clock=clock or self._clock,
            page_size=self._page_size,
            resolution=self._resolution,
            generations=self._generations,
            turns=self._turns,
            reply_turns=self._reply_turns,
        )
        other._data = self._data
        return other

    async def _request(self) -> None:
        if self._closed:
            raise StoreClosed("the bucket is closed")
        for _ in range(self._turns):
            await asyncio.sleep(0)

    async def _reply(self) -> None:
        for _ in range(self._reply_turns):
            await asyncio.sleep(0)

    def _put(self, name: str, data: bytes) -> Tag:
        store = self._data
        store.generation += 1
        etag = f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'
        tag = Tag(etag, str(store.generation) if self._generations else None)
        modified = self._clock.now_ms() // self._resolution * self._resolution
        if name not in store.objects:
            store.names.add(name)
        store.objects[name] = _Object(bytes(data), tag, modified)
        return tag

    def _remove(self, name: str) -> None:
        if self._data.objects.pop(name, None) is not None:
            self._data.names.remove(name)

    async def create(self, name: str, data: bytes) -> Tag:
        """Write an object that is not there. Raises ObjectExists."""
        await self._request()
        if name in self._data.objects:
            raise ObjectExists(f"object {name} is there already; read it to see whose it is")
        tag = self._put(name, data)
        await self._reply()
        return tag

    async def replace(self, name: str, data: bytes, tag: Tag) -> Tag:
        """Write an object that still is the version ``tag``. Raises ObjectChanged."""
        await self._request()
        present = self._data.objects.get(name)
        if present is None or (
            present.tag.version != tag.version if self._generations else present.tag.etag != tag.etag
        ):
            raise ObjectChanged(f"object {name} was changed or removed; read it again")
        written = self._put(name, data)
        await self._reply()
        return written

    async def read(self, name: str) -> Content | None:
        """The whole object; None when there is none."""
        await self._request()
        present = self._data.objects.get(name)
        content = None if present is None else Content(*present)
        await self._reply()
        return content

    async def delete(self, name: str, *, once: bool = False) -> None:
        """Remove an object, if it is there."""
        await self._request()
        self._remove(name)
        await self._reply()

    async def delete_many(self, names: list[str]) -> None:
        """Remove objects."""
        await self._request()
        for name in names:
            self._remove(name)
        await self._reply()

    async def list(self, prefix: str, *, after: str | None = None) -> AsyncIterator[list[Entry]]:
        """The objects whose names begin with ``prefix`` and are above ``after``, in pages; an empty one if there are
        none. Objects written or removed between two pages show in the second."""
        position = max(prefix, "" if after is None else after)
        while True:
            await self._request()
            data = self._data
            rest = data.names.since(position) if after is None else data.names.after(position)
            names = [name for name in islice(rest, self._page_size) if name.startswith(prefix)]
            page = [self._entry(name) for name in names]
            await self._reply()
            yield page
            if len(page) < self._page_size:
                return
            position = after = names[-1]

    def _entry(self, name: str) -> Entry:
        present = self._data.objects[name]
        return Entry(name, len(present.data), present.tag, present.modified)

    async def folder(self, prefix: str) -> Folder:
        """One level below ``prefix`` (which ends with a slash); folders by their whole names."""
        await self._request()
        folders: list[str] = []
        entries: list[Entry] = []
        position = prefix
        while (name := next(self._data.names.since(position), None)) is not None and name.startswith(prefix):
            head, slash, _ = name[len(prefix) :].partition("/")
            if slash:
                folders.append(prefix + head)
                # The character after the slash: past all that is in the folder.
                position = f"{prefix}{head}0"
            else:
                entries.append(self._entry(name))
                position = name + "\x00"
        await self._reply()
        return Folder(folders, entries)

    async def upload(self, name: str, chunks: AsyncIterator[bytes]) -> int:
        """Stream an object in; it is there when all of it is."""
        collected = bytearray()
        async for chunk in chunks:
            collected += chunk
        await self._request()
        self._put(name, bytes(collected))
        await self._reply()
        return len(collected)

    async def download(self, name: str) -> AsyncIterator[bytes]:
        """Stream an object out. Raises MessageNotFound."""
        await self._request()
        present = self._data.objects.get(name)
        if present is None:
            raise MessageNotFound(f"object {name} is not (or no longer) there")
        for start in range(0, len(present.data), _CHUNK):
            yield present.data[start : start + _CHUNK]

    async def close(self) -> None:
        """End this handle; the objects stay for the others. Repeatable."""
        self._closed = True

    @property
    def objects(self) -> dict[str, bytes]:
        """Every object by name, for tests to look at."""
        return {name: self._data.objects[name].data for name in self._data.names}
