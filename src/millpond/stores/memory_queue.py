"""One queue of the memory store: its records, and their orders kept in step with them."""

from __future__ import annotations

from millpond.stores.base import Box, Item, Mark, Stored
from millpond.stores.ordered import SortedSet


class Record:
    """A stored record. The indexes of its `QueueRecords` mirror ``item``, ``mark`` and ``blocked``."""

    __slots__ = (
        "blob",
        "blocked",
        "head",
        "item",
        "mark",
        "payload",
        "place",
        "state",
        "state_version",
        "status",
        "version",
    )

    def __init__(self, item: Item, mark: Mark, head: bytes, status: bytes, payload: bytes, blob: str = "") -> None:
        self.item = item
        self.mark = mark
        self.place = item.key
        """Its place in its ordering group: a later number each time it enters."""
        self.version = 1
        self.head = head
        self.status = status
        self.payload = payload
        self.blob = blob
        """The name of the payload where it is external."""
        self.state: bytes | None = None
        self.state_version = 0
        """Only grows, also over a delete of the state, so that no state ETag comes back."""
        self.blocked = False

    def stored(self, payload: bool = False) -> Stored:
        """As the store returns it."""
        return Stored(self.item, self.mark, self.head, self.status, self.payload if payload else None)


class QueueRecords:
    """The records of one queue and their orders. Entries are (due, key) or keys."""

    def __init__(self) -> None:
        self.by_key: dict[int, Record] = {}
        self.by_id: dict[str, Record] = {}
        self.boxes: dict[Box, SortedSet[int]] = {box: SortedSet() for box in Box}
        self.lines: dict[int, SortedSet[tuple[int, ...]]] = {}
        """priority → live records that no group blocks, leased or not."""
        self.leased: SortedSet[tuple[int, ...]] = SortedSet()
        """Those in ``lines`` that are leased."""
        self.blocked_leased: SortedSet[tuple[int, ...]] = SortedSet()
        """Leased ones that their group blocks. Nobody is given such a record; the protocol does not forbid it."""
        self.blocked = 0
        self.groups: dict[str, SortedSet[tuple[int, int]]] = {}
        """ordering group → (place, key) of its live records."""
        self.bytes = 0
        self.inserted = 0
        """Records that were ever inserted."""
        self.unique: dict[str, tuple[int, str]] = {}
        """unique key → (until, message id)."""
        self.document: bytes | None = None
        self.document_version = 0

    @property
    def holds_something(self) -> bool:
        """It has a record or a document."""
        return bool(self.by_key) or self.document is not None

    def add(self, record: Record) -> None:
        """Take in a record whose id and key are not there."""
        self.by_key[record.item.key] = self.by_id[record.item.id] = record
        self._enter(record)

    def discard(self, record: Record) -> None:
        """Take out a record."""
        self._leave(record)
        del self.by_key[record.item.key], self.by_id[record.item.id]

    def replace(self, record: Record, mark: Mark, version: int, status: bytes, place: int) -> None:
        """The new version of a record; the only way to change its mark. ``place`` counts when it enters its group."""
        moved = mark.box is not record.mark.box
        if moved:
            self._leave(record)
        else:
            self._unindex(record)
        record.mark, record.version, record.status = mark, version, status
        if moved:
            record.place = place
            self._enter(record)
        else:
            self._index(record)

    def _enter(self, record: Record) -> None:
        item = record.item
        self.boxes[record.mark.box].add(item.key)
        record.blocked = False
        if record.mark.box is Box.LIVE:
            self.bytes += item.size
            if item.group is not None:
                group = self.groups.setdefault(item.group, SortedSet())
                head = group.first
                group.add((record.place, item.key))
                if head is not None:
                    if head[0] < record.place:
                        record.blocked = True
                    else:  # A commit that is undone puts it back where it was.
                        self.block(self.by_key[head[1]], True)
        self._index(record)

    def _leave(self, record: Record) -> None:
        self._unindex(record)
        item = record.item
        self.boxes[record.mark.box].remove(item.key)
        if record.mark.box is Box.LIVE:
            self.bytes -= item.size
            if item.group is not None:
                group = self.groups[item.group]
                group.remove((record.place, item.key))
                head = group.first
                if head is None:
                    del self.groups[item.group]
                elif not record.blocked:
                    self.block(self.by_key[head[1]], False)

    def block(self, record: Record, blocked: bool) -> None:
        """Set whether the record's group blocks it."""
        self._unindex(record)
        record.blocked = blocked
        self._index(record)

    def _index(self, record: Record) -> None:
        mark = record.mark
        if mark.box is not Box.LIVE:
            return
        entry = (mark.due, record.item.key)
        if record.blocked:
            self.blocked += 1
        else:
            self.lines.setdefault(record.item.priority, SortedSet()).add(entry)
        if mark.leased:
            (self.blocked_leased if record.blocked else self.leased).add(entry)

    def _unindex(self, record: Record) -> None:
        mark = record.mark
        if mark.box is not Box.LIVE:
            return
        entry = (mark.due, record.item.key)
        if record.blocked:
            self.blocked -= 1
        else:
            line = self.lines[record.item.priority]
            line.remove(entry)
            if not line:
                del self.lines[record.item.priority]
        if mark.leased:
            (self.blocked_leased if record.blocked else self.leased).remove(entry)


def differences(queue: QueueRecords) -> list[str]:
    """What is wrong with a queue's indexes, by building them anew."""
    fresh = QueueRecords()
    for record in sorted(queue.by_key.values(), key=lambda record: record.place):
        copy = Record(record.item, record.mark, b"", b"", b"")
        copy.place = record.place
        fresh.add(copy)
        if copy.blocked != record.blocked:
            return [f"message {record.item.id} is wrongly {'' if record.blocked else 'not '}blocked"]
    wrong = []
    if {record.item.id for record in queue.by_key.values()} != set(queue.by_id):
        wrong.append("ids and keys differ")
    for what, mine, theirs in (
        ("boxes", queue.boxes, fresh.boxes),
        ("order of hand-out", queue.lines, fresh.lines),
        ("ordering groups", queue.groups, fresh.groups),
        ("leased records", {0: queue.leased, 1: queue.blocked_leased}, {0: fresh.leased, 1: fresh.blocked_leased}),
    ):
        if {key: list(values) for key, values in mine.items()} != {key: list(values) for key, values in theirs.items()}:
            wrong.append(f"the index of {what} is not that of the records")
    if (queue.bytes, queue.blocked) != (fresh.bytes, fresh.blocked):
        wrong.append("the counters are not those of the records")
    return wrong
