"""What this process knows of objects that it wrote or read: bounded, and a hint, never the truth.

Whoever acts on it does so under a condition that fails when the object has changed, or looks whether a listing shows
the same tag.
"""

from __future__ import annotations

from collections import OrderedDict

from millpond.stores.objects.bucket import Tag
from millpond.stores.objects.names import Name
from millpond.stores.objects.records import Record

ENTRIES = 200_000
"""Records known at once, whatever their size."""
BYTES = 64 << 20
"""Bytes of records known at once."""
_OVERHEAD = 1000
"""Bytes that a known record takes beside its own."""


class Known:
    """An object as last seen or written."""

    __slots__ = ("claimed", "name", "record", "seq", "size", "tag")

    def __init__(self, name: Name, tag: Tag, record: Record, seq: int, claimed: bool) -> None:
        self.name = name
        self.tag = tag
        self.record = record
        self.seq = seq
        """Grows with each entry: tells what was known before a request was sent."""
        self.claimed = claimed
        """It is leased, by this process, and nobody but this process has written it since, as far as it knows."""
        self.size = _OVERHEAD + len(record.head) + len(record.status) + len(record.payload) + len(record.state or b"")


def same(one: Tag, other: Tag) -> bool:
    """Whether two tags are of one version. A listing may leave out what a write told."""
    if one.version is not None and other.version is not None:
        return one.version == other.version
    return one.etag is not None and one.etag == other.etag


class Index:
    """Objects of messages by name, and by message id; the least recently used go first."""

    def __init__(self, *, entries: int = ENTRIES, size: int = BYTES) -> None:
        self._entries = entries
        self._size = size
        self._used = 0
        self._known: OrderedDict[str, Known] = OrderedDict()
        self._by_id: dict[tuple[str, str, str], str] = {}
        self.seq = 0

    def __len__(self) -> int:
        return len(self._known)

    def get(self, path: str) -> Known | None:
        """What is known of an object."""
        known = self._known.get(path)
        if known is not None:
            self._known.move_to_end(path)
        return known

    def by_id(self, namespace: str, queue: str, id: str) -> Known | None:
        """What is known of a message."""
        path = self._by_id.get((namespace, queue, id))
        return None if path is None else self.get(path)

    def put(self, name: Name, tag: Tag, record: Record, *, claimed: bool = False) -> Known:
        """This process wrote the object, or has just read it."""
        self.forget(name.path)
        self.seq += 1
        known = Known(name, tag, record, self.seq, claimed)
        self._known[name.path] = known
        self._by_id[name.namespace, name.queue, name.id] = name.path
        self._used += known.size
        while self._known and (self._used > self._size or len(self._known) > self._entries):
            if len(self._known) == 1:
                break
            self.forget(next(iter(self._known)))
        return known

    def forget(self, path: str) -> None:
        """It is gone, or nothing is known of it any more."""
        known = self._known.pop(path, None)
        if known is not None:
            self._used -= known.size
            key = (known.name.namespace, known.name.queue, known.name.id)
            if self._by_id.get(key) == path:
                del self._by_id[key]
