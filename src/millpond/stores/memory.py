"""The store in memory: for tests and throw-away work, and the reference that other stores are held against.

Each statement of `millpond.stores.base` is here in its plainest form. Nothing survives the process. One event loop
only: handles from `MemoryStore.share` play several processes on one store, not several threads.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec

from millpond.errors import MessageNotFound, StoreClosed, StoreError
from millpond.model.clock import Clock
from millpond.stores.base import (
    Blob,
    Box,
    Capabilities,
    Cause,
    Change,
    Conflict,
    Counts,
    Decide,
    Document,
    DocumentWritten,
    DropState,
    Insert,
    Inserted,
    Item,
    Mark,
    Op,
    Outcome,
    Page,
    Problem,
    PutDocument,
    PutState,
    QueueName,
    Reach,
    ReadyPage,
    Remove,
    Removed,
    Requests,
    Reseal,
    Serial,
    StateWritten,
    Stored,
    Subscription,
    Unique,
    Update,
    Updated,
)
from millpond.stores.memory_queue import QueueRecords, Record, StoredBlob, differences
from millpond.stores.ordered import SortedSet

INLINE_LIMIT = 65536
"""As the SQLite store's: what runs against one runs alike against the other."""
_CHUNK = 1 << 20
"""Largest piece that ``read_blob`` may yield, by the protocol."""
TAKE_PAYLOAD = 16384
"""Payloads up to this size are handed to ``decide``, as the SQLite store does."""

SESSION = "\udcff"  # begins the key of a producer's session among the unique keys; no Unicode text holds it

_Undo = list[Callable[[], None]]


class _Data:
    """What the handles of one memory store share."""

    def __init__(self) -> None:
        self.queues: dict[QueueName, QueueRecords] = {}
        self.last_key = 0
        self.expiring: SortedSet[tuple[int, ...]] = SortedSet()
        """(expires, key) of live records that expire."""
        self.expiring_queue: dict[int, QueueRecords] = {}
        self.ending: SortedSet[tuple[Any, ...]] = SortedSet()
        """(until, namespace, queue, unique key)."""
        self.last_blob = 0
        self.blobs: dict[str, StoredBlob] = {}
        """By name."""
        self.subscriptions: dict[QueueName, list[_Subscription]] = {}


class _Subscription:
    """One callback of one handle."""

    def __init__(self, owner: MemoryStore, name: QueueName, callback: Callable[[], object]) -> None:
        self.owner = owner
        self.name = name
        self.callback = callback
        self.loop = asyncio.get_running_loop()
        self.active = True
        self._scheduled = False

    def close(self) -> None:
        if self.active:
            self.active = False
            self.owner._forget(self)

    def wake(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._run)

    def _run(self) -> None:
        self._scheduled = False
        if self.active:
            self.callback()


class MemoryStore:
    """A store that lives as long as its handles do.

    ``clock`` belongs to the pond, as for every store; the memory store itself is told each time that matters.
    ``inline_limit`` is the largest payload, bytes, that belongs in the record. ``takes=False`` plays one that cannot
    choose and write in one step. Usable without ``open``.
    """

    def __init__(self, *, clock: Clock, inline_limit: int = INLINE_LIMIT, takes: bool = True) -> None:
        self._clock = clock
        self._data = _Data()
        self._closed = False
        self._writes = self._commits = self._ops = self._conflicts = 0
        # The request that the insert before was of, in this call; and why it is refused, if it is.
        self._serial: Serial | None = None
        self._passed: Cause | None = None
        self._capabilities = Capabilities(
            name="memory",
            reach=Reach.PROCESS,
            atomic_groups=True,
            conditional_delete=True,
            change_feed=True,
            durable=False,
            inline_limit=inline_limit,
            takes=takes,
        )

    def share(self) -> MemoryStore:
        """Another handle on the same data, each "someone else" to the other, as two processes on one file are.

        Also works from a closed handle: that is how a test reopens the store.
        """
        mine = self._capabilities
        other = MemoryStore(clock=self._clock, inline_limit=mine.inline_limit, takes=mine.takes)
        other._data = self._data
        return other

    @property
    def capabilities(self) -> Capabilities:
        """What a store in memory can do; ``reach`` is the process, and nothing is durable."""
        return self._capabilities

    @property
    def clock_offset(self) -> int:
        """0: all handles are of one process."""
        return 0

    async def open(self) -> None:
        """Nothing to do. Raises StoreClosed after ``close``."""
        self._check_open()

    async def close(self) -> None:
        """End this handle and its subscriptions; the data stays for the others. Repeatable."""
        self._closed = True
        for subscriptions in list(self._data.subscriptions.values()):
            for subscription in [one for one in subscriptions if one.owner is self]:
                subscription.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosed("the memory store is closed")

    # Writing

    async def write(self, ops: Sequence[Op]) -> list[Outcome]:
        """Apply each op on its own."""
        self._check_open()
        self._writes += 1
        changed: set[Change] = set()
        undo: _Undo = []
        self._serial = None
        try:
            outcomes = [self._apply(op, undo, changed) for op in ops]
        except StoreError:
            for step in reversed(undo):
                step()
            raise
        self._announce(changed)
        return outcomes

    async def commit(self, ops: Sequence[Op]) -> list[Outcome]:
        """Apply all ops or none."""
        self._check_open()
        self._commits += 1
        changed: set[Change] = set()
        undo: _Undo = []
        outcomes: list[Outcome] = []
        self._serial = None
        for index, op in enumerate(ops):
            try:
                outcome = self._apply(op, undo, changed)
            except StoreError:
                for step in reversed(undo):
                    step()
                raise
            if isinstance(outcome, Conflict):
                for step in reversed(undo):
                    step()
                aborted: list[Outcome] = [Conflict(Cause.ABORTED)] * len(ops)
                aborted[index] = outcome
                return aborted
            outcomes.append(outcome)
        self._announce(changed)
        return outcomes

    def _apply(self, op: Op, undo: _Undo, changed: set[Change]) -> Outcome:
        self._ops += 1
        if isinstance(op, Update):
            outcome = self._update(op, undo, changed)
        elif isinstance(op, Insert):
            outcome = self._insert(op, undo, changed)
        elif isinstance(op, Remove):
            outcome = self._remove(op, undo, changed)
        elif isinstance(op, Reseal):
            outcome = self._reseal(op, undo)
        elif isinstance(op, PutDocument):
            outcome = self._put_document(op, undo, changed)
        else:
            outcome = self._write_state(op, undo)
        if isinstance(outcome, Conflict):
            self._conflicts += 1
        return outcome

    def _insert(self, op: Insert, undo: _Undo, changed: set[Change]) -> Outcome:
        data, item = self._data, op.item
        name = QueueName(item.namespace, item.queue)
        queue = data.queues.get(name)
        if queue is None:
            queue = data.queues[name] = QueueRecords()
        if op.serial is not None and op.serial is not self._serial:
            self._passed = self._pass(name, queue, op.serial, undo)
            self._serial = op.serial
        if item.id in queue.by_id:
            return Conflict(Cause.EXISTS, item.id)
        if op.unique is not None:
            taken = queue.unique.get(op.unique.key)
            if taken is not None and taken[0] > op.unique.now:
                return Conflict(Cause.UNIQUE, taken[1])
        if op.serial is not None and self._passed is not None:
            return Conflict(self._passed, item.id)
        if item.external and not self._loose(op.blob, (item.namespace, item.queue, item.id)):
            raise StoreError(f"the payload of message {item.id} is not in the store (any more); write it again")
        if op.unique is not None:
            self._set_unique(name, queue, op.unique, item.id, undo)
        data.last_key += 1
        record = Record(
            msgspec.structs.replace(item, key=data.last_key),
            Mark("1", op.due, False, op.expires, Box.LIVE),
            op.head,
            op.status,
            op.payload,
            op.blob,
        )
        self._add(queue, record)
        queue.inserted += 1

        def take_back() -> None:
            self._discard(queue, record)
            queue.inserted -= 1

        undo.append(take_back)
        changed.add(Change(*name))
        return Inserted(record.item, record.mark)

    def _set_unique(self, name: QueueName, queue: QueueRecords, unique: Unique, id: str, undo: _Undo) -> None:
        def put(entry: tuple[int, str] | None) -> None:
            present = queue.unique.pop(unique.key, None)
            if present is not None:
                self._data.ending.remove((present[0], *name, unique.key))
            if entry is not None:
                queue.unique[unique.key] = entry
                self._data.ending.add((entry[0], *name, unique.key))

        before = queue.unique.get(unique.key)
        put((unique.until, id))
        undo.append(lambda: put(before))

    def _pass(self, name: QueueName, queue: QueueRecords, serial: Serial, undo: _Undo) -> Cause | None:
        """Note that the request is being carried out, or say why its inserts are refused."""
        key = SESSION + serial.session
        request = f"{serial.number:016x}"
        present = queue.unique.get(key)
        if present is not None and present[0] > serial.now and present[1] >= request:
            return Cause.EXISTS if present[1] == request + serial.first else Cause.PASSED
        self._set_unique(name, queue, Unique(key, serial.now, serial.until), request + serial.first, undo)
        return None

    def _find(self, item: Item, mark: Mark) -> tuple[QueueRecords, Record] | Conflict:
        queue = self._data.queues.get(QueueName(item.namespace, item.queue))
        record = queue.by_key.get(item.key) if queue is not None else None
        if queue is None or record is None:
            return Conflict(Cause.MISSING, item.id)
        if record.mark.etag != mark.etag:
            return Conflict(Cause.STALE, item.id)
        return queue, record

    def _update(self, op: Update, undo: _Undo, changed: set[Change]) -> Outcome:
        found = self._find(op.item, op.mark)
        if isinstance(found, Conflict):
            return found
        queue, record = found
        old, old_version, old_status, old_place = record.mark, record.version, record.status, record.place
        version, place = old_version + 1, old_place
        if op.item.group is not None and op.box is Box.LIVE and old.box is not Box.LIVE:
            # Keys and places are of one sequence: later than all that are in the group, and before all that come.
            self._data.last_key += 1
            place = self._data.last_key
        mark = Mark(str(version), op.due, op.leased, op.expires, op.box)
        self._replace(queue, record, mark, version, op.status, place)
        undo.append(lambda: self._replace(queue, record, old, old_version, old_status, old_place))
        unblocks = op.item.group is not None and old.box is Box.LIVE and op.box is not Box.LIVE
        if unblocks or (op.box is Box.LIVE and (not op.leased or op.due < old.due)):
            changed.add(Change(record.item.namespace, record.item.queue))
        return Updated(mark, record.payload if op.want_payload else None)

    def _remove(self, op: Remove, undo: _Undo, changed: set[Change]) -> Outcome:
        found = self._find(op.item, op.mark)
        if isinstance(found, Conflict):
            return found
        queue, record = found
        self._discard(queue, record)
        undo.append(lambda: self._add(queue, record))
        item = record.item
        if item.external:
            blob = self._data.blobs.pop(record.blob, None)
            if blob is not None:
                undo.append(lambda: self._data.blobs.update({record.blob: blob}))
        if item.group is not None:
            changed.add(Change(item.namespace, item.queue))
        return Removed()

    def _reseal(self, op: Reseal, undo: _Undo) -> Outcome:
        found = self._find(op.item, op.mark)
        if isinstance(found, Conflict):
            return found
        record = found[1]
        if op.state is not None and (record.state is None or str(record.state_version) != op.state.etag):
            return Conflict(Cause.STATE, op.item.id)

        def put(head: bytes, status: bytes, payload: bytes, state: bytes | None) -> None:
            record.head, record.status, record.payload, record.state = head, status, payload, state

        before = (record.head, record.status, record.payload, record.state)
        put(
            op.head,
            op.status,
            record.payload if op.payload is None else op.payload,
            record.state if op.state is None else op.state.data,
        )
        undo.append(lambda: put(*before))
        return Updated(record.mark, None)

    def _write_state(self, op: PutState | DropState, undo: _Undo) -> Outcome:
        found = self._find(op.item, op.mark)
        if isinstance(found, Conflict):
            return found
        record = found[1]
        before, version = record.state, record.state_version
        if op.expect != (None if before is None else str(version)):
            return Conflict(Cause.STATE, op.item.id)

        def put(data: bytes | None, version: int) -> None:
            record.state, record.state_version = data, version

        put(op.data if isinstance(op, PutState) else None, version + 1)
        undo.append(lambda: put(before, version))
        return StateWritten(str(record.state_version) if isinstance(op, PutState) else "")

    def _put_document(self, op: PutDocument, undo: _Undo, changed: set[Change]) -> Outcome:
        name = QueueName(op.namespace, op.queue)
        queue = self._data.queues.get(name)
        before, version = (queue.document, queue.document_version) if queue is not None else (None, 0)
        if op.expect != (None if before is None else str(version)):
            return Conflict(Cause.STATE)
        target = self._data.queues.setdefault(name, QueueRecords())

        def put(data: bytes | None, version: int) -> None:
            target.document, target.document_version = data, version

        put(op.data, version + 1)
        undo.append(lambda: put(before, version))
        changed.add(Change(*name))
        return DocumentWritten(str(version + 1))

    # The queue's own indexes and the one over all queues, kept in step

    def _add(self, queue: QueueRecords, record: Record) -> None:
        queue.add(record)
        self._index_expiry(queue, record)

    def _discard(self, queue: QueueRecords, record: Record) -> None:
        self._unindex_expiry(record)
        queue.discard(record)

    def _replace(
        self, queue: QueueRecords, record: Record, mark: Mark, version: int, status: bytes, place: int
    ) -> None:
        self._unindex_expiry(record)
        queue.replace(record, mark, version, status, place)
        self._index_expiry(queue, record)

    def _index_expiry(self, queue: QueueRecords, record: Record) -> None:
        if record.mark.expires is not None and record.mark.box is Box.LIVE:
            self._data.expiring.add((record.mark.expires, record.item.key))
            self._data.expiring_queue[record.item.key] = queue

    def _unindex_expiry(self, record: Record) -> None:
        if record.mark.expires is not None and record.mark.box is Box.LIVE:
            self._data.expiring.remove((record.mark.expires, record.item.key))
            del self._data.expiring_queue[record.item.key]

    # Reading

    async def get(self, namespace: str, queue: str, id: str, *, payload: bool = False) -> Stored | None:
        """The record, from whichever box it lies in."""
        self._check_open()
        found = self._data.queues.get(QueueName(namespace, queue))
        record = found.by_id.get(id) if found is not None else None
        return record.stored(payload) if record is not None else None

    async def ready(self, namespace: str, queue: str, now: int, *, limit: int) -> ReadyPage:
        """Due and unblocked records in hand-out order."""
        self._check_open()
        found = self._data.queues.get(QueueName(namespace, queue))
        if found is None:
            return ReadyPage([], False, None)
        records: list[Stored] = []
        more = False
        next_due: int | None = None
        for priority in sorted(found.lines, reverse=True):
            line = found.lines[priority]
            for due, key in line:
                if due > now or more:
                    break
                if len(records) == limit:
                    more = True
                else:
                    records.append(found.by_key[key].stored())
            later = next(line.since((now + 1,)), None)
            if later is not None and (next_due is None or later[0] < next_due):
                next_due = later[0]
        return ReadyPage(records, more, next_due)

    async def take(
        self, namespace: str, queue: str, now: int, *, limit: int, decide: Decide
    ) -> list[tuple[Any, Updated | Removed]]:
        """Settle the first ready records as ``decide`` says."""
        self._check_open()
        if not self._capabilities.takes:
            raise StoreError("this store cannot take")
        found = self._data.queues.get(QueueName(namespace, queue))
        taken: list[tuple[Any, Updated | Removed]] = []
        if found is None:
            return taken
        self._writes += 1
        changed: set[Change] = set()
        undo: _Undo = []
        try:
            for priority in sorted(found.lines, reverse=True):
                line = found.lines[priority]
                position: tuple[int, ...] = ()
                # A few at a time: the ops change the line.
                while chunk := list(itertools.islice(line.since(position), limit - len(taken))):
                    for entry in chunk:
                        if entry[0] > now:
                            break
                        record = found.by_key[entry[1]]
                        decided = decide(record.stored(len(record.payload) <= TAKE_PAYLOAD))
                        if decided is not None:
                            outcome = self._apply(decided[0], undo, changed)
                            assert isinstance(outcome, Updated | Removed), outcome
                            taken.append((decided[1], outcome))
                    if len(taken) == limit or chunk[-1][0] > now:
                        break
                    position = (chunk[-1][0], chunk[-1][1] + 1)
                if len(taken) == limit:
                    break
        except BaseException:
            for step in reversed(undo):
                step()
            changed.clear()
            raise
        finally:
            self._announce(changed)
        return taken

    async def expired(self, now: int, *, limit: int) -> list[Stored]:
        """Expired records that nobody holds, earliest first."""
        self._check_open()
        records: list[Stored] = []
        for expires, key in self._data.expiring:
            if expires > now or len(records) == limit:
                break
            record = self._data.expiring_queue[key].by_key[key]
            if not record.mark.leased or record.mark.due <= now:
                records.append(record.stored())
        return records

    async def payload(self, item: Item) -> bytes | None:
        """The inline payload of a record; None when the record is gone."""
        self._check_open()
        record = self._record(item)
        return record.payload if record is not None else None

    def _record(self, item: Item) -> Record | None:
        queue = self._data.queues.get(QueueName(item.namespace, item.queue))
        return queue.by_key.get(item.key) if queue is not None else None

    async def write_blob(self, namespace: str, queue: str, id: str, chunks: AsyncIterator[bytes], now: int) -> Blob:
        """Keep a payload apart. (In this store it is in memory all the same.)"""
        self._check_open()
        collected = bytearray()
        async for chunk in chunks:
            collected += chunk
        self._check_open()
        self._data.last_blob += 1
        name = str(self._data.last_blob)
        self._data.blobs[name] = StoredBlob((namespace, queue, id), bytes(collected), now)
        return Blob(len(collected), name)

    async def read_blob(self, item: Item) -> AsyncIterator[bytes]:
        """The payload's bytes in chunks. Raises MessageNotFound."""
        self._check_open()
        record = self._record(item)
        blob = self._data.blobs.get(record.blob) if record is not None else None
        if blob is None:
            raise MessageNotFound(f"the payload of message {item.id} is not (or no longer) there")
        for start in range(0, len(blob.data), _CHUNK):
            yield blob.data[start : start + _CHUNK]

    async def state(self, item: Item) -> Document | None:
        """The state document of a record."""
        self._check_open()
        record = self._record(item)
        if record is None or record.state is None:
            return None
        return Document(record.state, str(record.state_version))

    async def document(self, namespace: str, queue: str) -> Document | None:
        """The queue's own document."""
        self._check_open()
        found = self._data.queues.get(QueueName(namespace, queue))
        if found is None or found.document is None:
            return None
        return Document(found.document, str(found.document_version))

    async def queues(self) -> list[QueueName]:
        """Every queue that holds something or has a document, in name order."""
        self._check_open()
        return sorted(name for name, queue in self._data.queues.items() if queue.holds_something)

    async def counts(self, namespace: str, queue: str, now: int) -> Counts:
        """How the queue stands at ``now``."""
        self._check_open()
        found = self._data.queues.get(QueueName(namespace, queue), _EMPTY)
        later = (now + 1,)
        ready = sum(line.below(later) for line in found.lines.values())
        free = sum(len(line) for line in found.lines.values())
        leased = len(found.leased) - found.leased.below(later)
        blocked_leased = len(found.blocked_leased) - found.blocked_leased.below(later)
        firsts = [line.first[0] for line in found.lines.values() if line.first is not None]
        return Counts(
            ready=ready,
            delayed=free - ready - leased,
            leased=leased + blocked_leased,
            blocked=found.blocked - blocked_leased,
            dead=len(found.boxes[Box.DEAD]),
            bytes=found.bytes,
            enqueued=found.inserted,
            oldest_due=min((due for due in firsts if due <= now), default=None),
        )

    # Upkeep

    async def sweep(self, now: int, *, older_than: int, limit: int) -> int:
        """Remove old blobs without a record, ended unique keys, and what is left of empty queues."""
        self._check_open()
        data = self._data
        orphans = [
            name
            for name, blob in data.blobs.items()
            if now - blob.written_at > older_than and self._loose(name, blob.place)
        ]
        for name in orphans[:limit]:
            del data.blobs[name]
        ended = 0
        while ended < limit and (entry := data.ending.first) is not None and entry[0] <= now:
            data.ending.remove(entry)
            del data.queues[QueueName(entry[1], entry[2])].unique[entry[3]]
            ended += 1
        for empty in [name for name, queue in data.queues.items() if not queue.holds_something and not queue.unique]:
            del data.queues[empty]
        return len(orphans[:limit]) + ended

    def _loose(self, name: str, place: tuple[str, str, str]) -> bool:
        """Whether there is a blob of this name, written for the message at ``place``, that no record has."""
        blob = self._data.blobs.get(name)
        if blob is None or blob.place != place:
            return False
        queue = self._data.queues.get(QueueName(place[0], place[1]))
        record = queue.by_id.get(place[2]) if queue is not None else None
        return record is None or record.blob != name

    async def verify(self) -> list[Problem]:
        """Compare every index and counter with the records."""
        self._check_open()
        problems: list[Problem] = []
        expiring: set[tuple[int, ...]] = set()
        ending: set[tuple[Any, ...]] = set()
        for name, queue in self._data.queues.items():
            where = f"queue {name.namespace}/{name.queue}"
            problems += [Problem(where, what) for what in differences(queue)]
            ending |= {(until, *name, key) for key, (until, _) in queue.unique.items()}
            for record in queue.by_key.values():
                item = record.item
                if record.mark.expires is not None and record.mark.box is Box.LIVE:
                    expiring.add((record.mark.expires, item.key))
                if item.external and record.blob not in self._data.blobs:
                    problems.append(Problem(f"message {item.id}", "its payload is missing"))
        if set(self._data.expiring) != expiring:
            problems.append(Problem("store", "the index of expiry times is not that of the records"))
        if set(self._data.ending) != ending:
            problems.append(Problem("store", "the index of unique keys is not that of the queues"))
        return problems

    # The change feed

    def subscribe(self, namespace: str, queue: str, callback: Callable[[], object]) -> Subscription:
        """Call back after another handle of this store changed the queue. Needs a running event loop."""
        self._check_open()
        name = QueueName(namespace, queue)
        subscription = _Subscription(self, name, callback)
        self._data.subscriptions.setdefault(name, []).append(subscription)
        return subscription

    def _forget(self, subscription: _Subscription) -> None:
        subscriptions = self._data.subscriptions[subscription.name]
        subscriptions.remove(subscription)
        if not subscriptions:
            del self._data.subscriptions[subscription.name]

    def _announce(self, changed: set[Change]) -> None:
        if changed and self._data.subscriptions:
            for change in changed:
                for subscription in self._data.subscriptions.get(QueueName(*change), ()):
                    if subscription.owner is not self:
                        subscription.wake()

    def statistics(self) -> dict[str, Any]:
        """writes, commits, ops, conflicts of this handle; records and blobs of the store."""
        return {
            "writes": self._writes,
            "commits": self._commits,
            "ops": self._ops,
            "conflicts": self._conflicts,
            "records": sum(len(queue.by_key) for queue in self._data.queues.values()),
            "blobs": len(self._data.blobs),
        }

    def requests(self) -> dict[QueueName | None, Requests]:
        """None are made."""
        return {}

    # Last in the class: below it, ``list`` would name the method in annotations.
    async def list(self, namespace: str, queue: str, box: Box, *, after: int | None = None, limit: int = 100) -> Page:
        """Records of a box in order of insertion."""
        self._check_open()
        found = self._data.queues.get(QueueName(namespace, queue))
        records: list[Stored] = []
        if found is not None:
            for key in found.boxes[box].after(0 if after is None else after):
                if len(records) == limit:
                    return Page(records, records[-1].item.key if records else after)
                records.append(found.by_key[key].stored())
        return Page(records, None)


_EMPTY = QueueRecords()
