"""What the object store asks of a bucket: conditional writes on named objects, and nothing else.

A bucket knows names and bytes. It retries nothing that it cannot decide: whether a write whose reply was lost took
place is told by the write id inside the record, which only the store can read. So there are two kinds of error: those
that say what did not happen, and `OutcomeUnknown`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple, Protocol

from millpond.errors import StoreError


class Tag(NamedTuple):
    """A version of an object, as its cloud tells versions apart."""

    etag: str | None
    version: str | None
    """The generation, where the cloud compares these (Google)."""

    def same(self, other: Tag) -> bool:
        """Both name one version. Not the same as ==: Google's listings tell no generation, its replies do."""
        if self.version is not None and other.version is not None:
            return self.version == other.version
        return self.etag is not None and self.etag == other.etag


class Entry(NamedTuple):
    """An object in a listing."""

    name: str
    size: int
    tag: Tag
    modified: int
    """When it was last written by the bucket's clock, ms UTC (some clouds know only seconds)."""


class Content(NamedTuple):
    """An object as read."""

    data: bytes
    tag: Tag
    modified: int


class Folder(NamedTuple):
    """One level of names: those that go on below it (without the final slash), and the objects in it."""

    folders: list[str]
    entries: list[Entry]


class ObjectExists(StoreError):
    """The name is taken: a create lost, or is a repetition of one that went through."""

    code = "object_exists"


class ObjectChanged(StoreError):
    """The object has another tag, or is gone: a replace lost, or is a repetition of one that went through."""

    code = "object_changed"


class Bucket(Protocol):
    """A bucket, or the part of one below a prefix. Names are relative to it, without a leading slash.

    Every method may raise StoreError: the request did not take place and will not (refused, throttled for longer than
    the bucket retries, no permission), in words that say what to do; or OutcomeUnknown.
    """

    async def create(self, name: str, data: bytes) -> Tag:
        """Write an object that is not there. Raises ObjectExists."""

    async def replace(self, name: str, data: bytes, tag: Tag) -> Tag:
        """Write an object that still is the version ``tag``. Raises ObjectChanged."""

    async def read(self, name: str) -> Content | None:
        """The whole object; None when there is none."""

    async def delete(self, name: str, *, once: bool = False) -> None:
        """Remove an object, if it is there.

        ``once``: its name will be used again, and a request of which two copies were sent might remove what comes after
        it, too; so it is not sent again unless the first one certainly did nothing."""

    async def delete_many(self, names: list[str]) -> None:
        """Remove objects, in as few requests as the cloud allows."""

    def list(self, prefix: str, *, after: str | None = None) -> AsyncIterator[list[Entry]]:
        """The objects whose names begin with ``prefix`` and, if given, are above ``after``: in pages, in order of name,
        each page one request; a reader that stops early saves the rest."""

    async def folder(self, prefix: str) -> Folder:
        """One level below ``prefix`` (which ends with a slash). Some servers show a folder for a while after its last
        object went; none hides one that holds something."""

    async def upload(self, name: str, chunks: AsyncIterator[bytes]) -> int:
        """Stream an object in without holding it in memory, unconditionally; its size. If ``chunks`` raises nothing is
        left behind and the error goes on."""

    def download(self, name: str) -> AsyncIterator[bytes]:
        """Stream an object out, in chunks of at most 1 MiB. Raises MessageNotFound when it is not there, StoreCorrupt
        when it ends early."""

    async def close(self) -> None:
        """Release connections. Repeatable."""
