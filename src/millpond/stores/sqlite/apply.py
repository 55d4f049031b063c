"""Ops on an open transaction: the hot path of the store, where each microsecond is paid per message.

An `Applier` lives as long as its connection. Between ``begin`` and ``finish`` it collects what is cheaper to write once
per transaction than once per op: rows of ``body``, counters, the sequence. The old values that counters need come from
the op itself (its ETag matched, so they are what is stored), not from another read.

Statements are constants, so that each is prepared once. Mind the cost of another one: about 1 µs each, of 3 per op;
`millpond.stores.sqlite.together` is about fewer of them for many ops at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import apsw

from millpond.errors import StoreError
from millpond.stores.base import (
    Box,
    Cause,
    Conflict,
    Decide,
    DocumentWritten,
    DropState,
    Insert,
    Inserted,
    Item,
    Mark,
    Op,
    Outcome,
    PutDocument,
    PutState,
    QueueName,
    Remove,
    Removed,
    Reseal,
    Serial,
    StateWritten,
    Stored,
    Update,
    Updated,
)
from millpond.stores.sqlite.heads import Heads
from millpond.stores.sqlite.rows import ETAGS
from millpond.stores.sqlite.schema import (
    BLOCKED,
    BLOCKED_LEASED,
    BUCKET,
    BYTES,
    CHUNK,
    CHUNK_BITS,
    DEAD,
    FREE,
    INSERTED,
    LEASED,
)

DIRECT_DELETE = 4 * CHUNK
"""A larger blob is only detached with its record; its chunks go later, in slices, since SQLite walks each of them."""
DOOMED = ""
"""The message id of a blob whose record is gone: no lookup finds it, the sweep does."""
QUEUE_CACHE = 65_536
"""Queue ids kept in memory, about 200 bytes each; beyond that the cache starts anew."""

_INSERT = (
    "INSERT INTO message(seq,queue,lane,due,version,leased,box,expires,grp,size,external,stateful,id,priority,place,"
    "status)VALUES(?,?,?,?,1,0,0,?,?,?,?,0,?,?,?,?)"
)
INSERT_PLAIN = (
    "INSERT INTO message(seq,queue,lane,due,version,leased,box,expires,grp,size,external,stateful,id,priority,place,"
    "status)VALUES(?1,?2,?3,?4,1,0,0,NULL,NULL,?5,0,0,?6,?3,NULL,?7)"
)
"""The same for a record without group, expiry and blob: nearly all, and each binding costs."""
_BODY = "INSERT INTO body VALUES(?,?,?)"
UPDATE = "UPDATE message SET due=?,version=version+1,leased=?,status=? WHERE seq=? AND version=?"
_UPDATE_FULL = (
    "UPDATE message SET lane=?,due=?,version=version+1,leased=?,box=?,expires=?,place=ifnull(?,place),status=? "
    "WHERE seq=? AND version=?"
)
_PAYLOAD = "SELECT payload FROM body WHERE seq=?"
REMOVE = "DELETE FROM message WHERE seq=? AND version=? AND stateful=0"
_REMOVE_STATEFUL = "DELETE FROM message WHERE seq=? AND version=?"
_ROW = "SELECT version,stateful,box=0 AND lane IS NULL FROM message WHERE seq=?"
_IN_GROUP = "SELECT EXISTS(SELECT 1 FROM message WHERE queue=? AND grp=? AND box=0)"
_HEADS = "SELECT seq,lane,priority,leased,due FROM message WHERE queue=? AND grp=? AND box=0 ORDER BY place LIMIT 2"
_SESSION = "UPDATE unique_key SET id=? WHERE queue=? AND key=? AND id<? AND until>=?"
"""A producer's session is a row among the unique keys. Its key is a BLOB, which no user's is; its end is moved on
seldom, so that the index of ends is left alone."""
_COUNT_UP = "INSERT INTO counter VALUES(?,?,?,?) ON CONFLICT DO UPDATE SET n=n+excluded.n"
_COUNT_DOWN = "UPDATE counter SET n=n+? WHERE queue=? AND kind=? AND bucket=? AND n>?"
_COUNT_OUT = "DELETE FROM counter WHERE queue=? AND kind=? AND bucket=? AND n=?"

_LIVE = Box.LIVE
_NEXT = {str(version): str(version + 1) for version in range(1, 256)}
"""ETag → the next one, for the versions that nearly all updates meet."""

KIND_BITS = 3
"""A key of `Tally.counts` is ``bucket << KIND_BITS | kind``."""


def _next(etag: str) -> str:
    return _NEXT.get(etag) or str(int(etag) + 1)


class Tally:
    """What a transaction does to the counters of one queue."""

    __slots__ = ("changed", "counts", "name", "queue")

    def __init__(self, queue: int, name: tuple[str, str]) -> None:
        self.queue = queue
        """The queue's id."""
        self.name = name
        self.counts: dict[int, int] = {}
        self.changed = False
        """Somebody may want to look at the queue after this transaction."""

    def copy(self) -> Tally:
        """As it is now."""
        copy = Tally(self.queue, self.name)
        copy.counts, copy.changed = self.counts.copy(), self.changed
        return copy

    def add(self, kind: int, due: int, n: int) -> None:
        """``n`` more of a kind that are due then."""
        key = (due // BUCKET << KIND_BITS) | kind if kind in {FREE, LEASED, BLOCKED_LEASED} else kind
        self.counts[key] = self.counts.get(key, 0) + n


class Take(NamedTuple):
    """A call of `Store.take`."""

    namespace: str
    queue: str
    now: int
    limit: int
    decide: Decide


class Applier:
    """Applies ops on ``connection`` within transactions that somebody else begins and ends."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._cursor = connection.cursor()
        self.execute: Callable[..., Any] = self._cursor.execute
        self._run: Callable[..., Any] = self._cursor.execute
        self._changes = connection.changes
        self._connection = connection
        self._queues: dict[tuple[str, str], int] = {}
        """(namespace, name) → id of queues that are committed; ids are never reused."""
        self._new_queues: dict[tuple[str, str], int] = {}
        self._tallies: dict[tuple[str, str], Tally] = {}
        self._tally = Tally(0, ("", ""))
        """The one of the queue that the op before was about: ops come in runs."""
        self._namespace: str | None = None
        self._name: str | None = None
        self._new_mark = Mark("1", 0, False, None, _LIVE)
        """The mark of the record inserted last: what is enqueued together has the same."""
        self._serial: Serial | None = None
        """The request that the insert before was of, in this call."""
        self._passed: Cause | None = None
        """Why that is refused, if it is."""
        self._bodies: list[tuple[int, bytes, bytes]] = []
        self._sequence = 0
        """The next number; 0 when it was not read in this transaction."""
        self._first = 0
        self._before = 0
        self._heads: dict[int, Heads] = {}
        self.wanted: dict[tuple[str, str], int] = {}
        """Records that the takes still to come want of each queue, roughly: how far a read should go."""
        self.volume = 0
        """Payload bytes inserted in this transaction."""
        self.changed: set[QueueName | tuple[str, str]] = set()
        """Queues in which somebody may want to look after this transaction."""
        self.doomed = False
        """This transaction left chunks behind that are to be deleted in slices."""
        self._appliers: dict[type, Callable[[Any], Outcome]] = {
            Insert: self._insert,
            Update: self._update,
            Remove: self._remove,
            PutState: self._put_state,
            DropState: self._drop_state,
            PutDocument: self._put_document,
            Reseal: self._reseal,
        }

    def begin(self) -> None:
        """Forget the transaction before this one; it was committed if ``committed`` was called."""
        self._new_queues = {}
        self._tallies = {}
        self._namespace = self._name = None
        self._bodies = []
        if self._heads:
            self._heads = {}
        self._sequence = self._first = 0
        self.volume = 0
        self.changed = set()
        self.doomed = False
        self._before = self._connection.total_changes()

    def finish(self) -> bool:
        """Write what was collected; true when the transaction has anything to commit. Raises apsw.Error."""
        self._flush_bodies()
        run = self._run
        if self._sequence != self._first:
            run("UPDATE sequence SET next=?", (self._sequence,))
        for tally in self._tallies.values():
            if tally.changed:
                self.changed.add(tally.name)
            queue = tally.queue
            for key, n in tally.counts.items():
                kind, bucket = key & ((1 << KIND_BITS) - 1), key >> KIND_BITS
                if n > 0:
                    run(_COUNT_UP, (queue, kind, bucket, n))
                elif n < 0:
                    run(_COUNT_DOWN, (n, queue, kind, bucket, -n))
                    if not self._changes():
                        run(_COUNT_OUT, (queue, kind, bucket, -n))
        return self._connection.total_changes() != self._before

    def roll_back(self) -> None:
        """Undo the open transaction, if there is one. Raises apsw.Error."""
        if self._connection.in_transaction:
            self._run("ROLLBACK")

    def committed(self) -> None:
        """The transaction is in the file: what it added to the cache of queues is true."""
        if self._new_queues:
            if len(self._queues) >= QUEUE_CACHE:
                self._queues.clear()
            self._queues.update(self._new_queues)

    def write(self, ops: Sequence[Op]) -> list[Outcome]:
        """Apply each op on its own. After an exception the transaction has to be rolled back."""
        appliers = self._appliers
        self._serial = None
        return [appliers[op.__class__](op) for op in ops]

    def commit(self, ops: Sequence[Op]) -> list[Outcome]:
        """Apply all ops or none. After an exception the transaction has to be rolled back."""
        self._flush_bodies()
        self._serial = None
        tallies = {name: tally.copy() for name, tally in self._tallies.items()}
        queues, doomed = self._new_queues.copy(), self.doomed
        self._run("SAVEPOINT atomic")
        outcomes: list[Outcome] = []
        for op in ops:
            outcome = self._appliers[op.__class__](op)
            if type(outcome) is Conflict:
                self._run("ROLLBACK TO atomic")
                self._run("RELEASE atomic")
                self._bodies = []
                self._tallies, self._new_queues, self.doomed = tallies, queues, doomed
                self._namespace = self._name = None
                aborted: list[Outcome] = [Conflict(Cause.ABORTED)] * len(ops)
                aborted[len(outcomes)] = outcome
                return aborted
            outcomes.append(outcome)
        self._flush_bodies()
        self._run("RELEASE atomic")
        return outcomes

    def take(self, take: Take) -> list[tuple[Any, Updated | Removed]]:
        """Settle ready records as ``decide`` says. After an exception the transaction has to be rolled back."""
        return self._take(take, None)

    def _take(self, take: Take, together: list[Update] | None) -> list[tuple[Any, Updated | Removed]]:
        """As `take`; plain updates that can be written later are only put into ``together``, where it is given."""
        namespace, name, now, limit, decide = take
        key = (namespace, name)
        taken: list[tuple[Any, Updated | Removed]] = []
        queue = self._queues.get(key) or self._new_queues.get(key)
        if queue is None:
            queue = self._run("SELECT id FROM queue WHERE namespace=? AND name=?", key).get
            if queue is None:
                return taken
            self._new_queues[key] = queue
        heads = self._heads.get(queue)
        if heads is None:
            # What this transaction inserted is to be found with its payload.
            self._flush_bodies()
            heads = self._heads[queue] = Heads(self._run, queue)
        rows = heads.rows
        wanted = self.wanted.get(key, 0)
        left = limit
        while left:
            if not rows:
                heads.read(now, max(left, wanted))
                if not rows:
                    break
            row = rows.popleft()
            seq, version, due, leased, expires, _, id, priority, group, size, external, status, head, payload = row
            decided = decide(
                Stored(
                    Item(namespace, name, id, priority, group, size, external == 1, seq),
                    Mark(ETAGS[version] if version < 256 else str(version), due, leased == 1, expires, _LIVE),
                    head,
                    status,
                    payload,
                )
            )
            if decided is None:
                continue
            op = decided[0]
            if together is not None and op.__class__ is Update:
                mark = op.mark
                if op.box is mark.box and op.expires == mark.expires and op.item.group is None and not op.want_payload:
                    etag = mark.etag
                    after = Mark(_NEXT.get(etag) or _next(etag), op.due, op.leased, op.expires, op.box)
                    together.append(op)
                    taken.append((decided[1], Updated(after, None)))
                    left -= 1
                    continue
            outcome = self._appliers[op.__class__](op)
            if outcome.__class__ is not Conflict:
                taken.append((decided[1], outcome))  # type: ignore[arg-type]
                left -= 1
        self.wanted[key] = wanted - limit
        return taken

    def _flush_bodies(self) -> None:
        if self._bodies:
            bodies, self._bodies = self._bodies, []
            self._cursor.executemany(_BODY, bodies)

    def queue(self, namespace: str, name: str) -> int:
        """The id of a queue, which is made if there is none."""
        key = (namespace, name)
        found = self._queues.get(key) or self._new_queues.get(key)
        if found is None:
            row = self._run("SELECT id FROM queue WHERE namespace=? AND name=?", key).fetchone()
            if row is None:
                row = self._run("INSERT INTO queue(namespace,name) VALUES(?,?) RETURNING id", key).fetchone()
            found = self._new_queues[key] = int(row[0])
        return found

    def number(self) -> int:
        """The next number of the sequence."""
        number = self._sequence
        if not number:
            number = self._first = self._run("SELECT next FROM sequence").get
        self._sequence = number + 1
        return number

    def _turn(self, namespace: str, name: str) -> Tally:
        """Make the queue the current one; it is made if there is none."""
        key = (namespace, name)
        tally = self._tallies.get(key)
        if tally is None:
            tally = self._tallies[key] = Tally(self.queue(namespace, name), key)
        self._namespace, self._name, self._tally = namespace, name, tally
        return tally

    # The three that make a message's life

    def _insert(self, op: Insert) -> Outcome:
        item = op.item
        tally = self._tally
        if item.queue is not self._name or item.namespace is not self._namespace:
            tally = self._turn(item.namespace, item.queue)
        queue = tally.queue
        unique, group = op.unique, item.group
        lane: int | None = item.priority
        key = (op.due // BUCKET << KIND_BITS) | FREE
        serial = op.serial
        if serial is not None and serial is not self._serial:
            self._serial, self._passed = serial, self._pass(queue, serial)
        if unique is not None:
            conflict = self._check_unique(queue, item.id, unique.key, unique.now)
            if conflict is not None:
                return conflict
        if serial is not None and self._passed is not None:
            return Conflict(self._passed, item.id)
        if group is not None and self._run(_IN_GROUP, (queue, group)).get:
            lane, key = None, BLOCKED
        # number(), written out
        seq = self._sequence
        if not seq:
            seq = self._first = self._run("SELECT next FROM sequence").get
        self._sequence = seq + 1
        try:
            if group is None and op.expires is None and not item.external:
                self._run(INSERT_PLAIN, (seq, queue, lane, op.due, item.size, item.id, op.status))
            else:
                self._run(
                    _INSERT,
                    (
                        seq,
                        queue,
                        lane,
                        op.due,
                        op.expires,
                        group,
                        item.size,
                        item.external,
                        item.id,
                        item.priority,
                        None if group is None else seq,
                        op.status,
                    ),
                )
        except apsw.ConstraintError as error:
            if cast(Any, error).extendedresult != apsw.SQLITE_CONSTRAINT_UNIQUE:
                raise
            self._sequence = seq
            return Conflict(Cause.EXISTS, item.id)
        payload = op.payload
        self._bodies.append((seq, op.head, payload))
        self.volume += len(payload)
        if unique is not None:
            self._run("REPLACE INTO unique_key VALUES(?,?,?,?)", (queue, unique.key, unique.until, item.id))
        if item.external:
            self._attach(queue, item, op.blob)
        counts = tally.counts
        counts[key] = counts.get(key, 0) + 1
        counts[BYTES] = counts.get(BYTES, 0) + item.size
        counts[INSERTED] = counts.get(INSERTED, 0) + 1
        tally.changed = True
        mark = self._new_mark
        if mark.due != op.due or mark.expires != op.expires:
            mark = self._new_mark = Mark("1", op.due, False, op.expires, _LIVE)
        return Inserted(item, mark, seq)

    def _pass(self, queue: int, serial: Serial) -> Cause | None:
        """Note that the request is being carried out, or say why its inserts are refused."""
        key, request = serial.session.encode(), f"{serial.number:016x}"
        now, until = serial.now, serial.until
        self._run(_SESSION, (request + serial.first, queue, key, request, until))
        if self._changes():
            return None
        row = self._run("SELECT id,until FROM unique_key WHERE queue=? AND key=?", (queue, key)).fetchone()
        if row is not None and row[1] > now and row[0] >= request:
            return Cause.EXISTS if row[0] == request + serial.first else Cause.PASSED
        self._run("REPLACE INTO unique_key VALUES(?,?,?,?)", (queue, key, until + until - now, request + serial.first))
        return None

    def _check_unique(self, queue: int, id: str, key: str, now: int) -> Conflict | None:
        row = self._run("SELECT id,until FROM unique_key WHERE queue=? AND key=?", (queue, key)).fetchone()
        if row is None or row[1] <= now:
            return None
        if self._run("SELECT EXISTS(SELECT 1 FROM message WHERE queue=? AND id=?)", (queue, id)).get:
            return Conflict(Cause.EXISTS, id)
        return Conflict(Cause.UNIQUE, row[0])

    def _attach(self, queue: int, item: Item, blob: str) -> None:
        # By name: of several of this id, only the one that this insert was made for.
        self._run(
            "UPDATE blob SET attached=1 WHERE blob=? AND queue=? AND id=? AND size IS NOT NULL AND attached=0",
            (blob, queue, item.id),
        )
        if not self._changes():
            raise StoreError(f"the payload of message {item.id} is not in the store (any more); write it again")

    def _update(self, op: Update) -> Outcome:
        item, mark = op.item, op.mark
        if op.box is not mark.box or op.expires != mark.expires or item.group is not None:
            return self._update_full(op)
        seq, etag, due, leased = item.key, mark.etag, op.due, op.leased
        self._run(UPDATE, (due, leased, op.status, seq, etag))
        if not self._changes():
            return self._refusal(item)
        payload = None
        if op.want_payload:
            payload = self._payload(item)
        if op.box is _LIVE:
            tally = self._tally
            if item.queue is not self._name or item.namespace is not self._namespace:
                tally = self._turn(item.namespace, item.queue)
            counts, before = tally.counts, mark.due
            key = (before // BUCKET << KIND_BITS) | (LEASED if mark.leased else FREE)
            counts[key] = counts.get(key, 0) - 1
            key = (due // BUCKET << KIND_BITS) | (LEASED if leased else FREE)
            counts[key] = counts.get(key, 0) + 1
            if not leased or due < before:
                tally.changed = True
        return Updated(Mark(_NEXT.get(etag) or _next(etag), due, leased, op.expires, op.box), payload)

    def _payload(self, item: Item) -> bytes:
        row = self._run(_PAYLOAD, (item.key,)).fetchone()
        if row is None:
            raise StoreError(f"the body of message {item.id} is missing; run verify")
        return cast(bytes, row[0])

    def _update_full(self, op: Update) -> Outcome:
        """Also changes the box, the expiry, and what a group blocks."""
        item, mark, group = op.item, op.mark, op.item.group
        row = self._run(_ROW, (item.key,)).fetchone()
        if row is None or str(row[0]) != mark.etag:
            return self._refusal(item)
        blocked = bool(row[2])
        tally = self._turn(item.namespace, item.queue)
        arrives, leaves = op.box is _LIVE and mark.box is not _LIVE, op.box is not _LIVE and mark.box is _LIVE
        # What comes back into a group stands behind all others, and is blocked until settle() has looked.
        block = op.box is _LIVE and group is not None and (blocked or arrives)
        place = self.number() if arrives and group is not None else None
        lane = item.priority if op.box is _LIVE and not block else None
        self._run(_UPDATE_FULL, (lane, op.due, op.leased, op.box, op.expires, place, op.status, item.key, mark.etag))
        payload = self._payload(item) if op.want_payload else None
        tally.add(_kind(mark.box, mark.leased, blocked), mark.due, -1)
        tally.add(_kind(op.box, op.leased, block), op.due, 1)
        if arrives or leaves:
            tally.add(BYTES, 0, item.size if arrives else -item.size)
            if group is not None:
                self._settle(tally, group)
        if (leaves and group is not None) or (op.box is _LIVE and (not op.leased or op.due < mark.due)):
            tally.changed = True
        return Updated(Mark(_next(mark.etag), op.due, op.leased, op.expires, op.box), payload)

    def _settle(self, tally: Tally, group: str) -> None:
        """After somebody came into or left a group: its first in the live box is not blocked, its second is.

        The others need no look: none of them was first before, and none is now.
        """
        for number, (seq, lane, priority, leased, due) in enumerate(self._run(_HEADS, (tally.queue, group)).fetchall()):
            blocked, block = lane is None, number > 0
            if blocked != block:
                self._run("UPDATE message SET lane=? WHERE seq=?", (None if block else priority, seq))
                tally.add(_kind(_LIVE, leased, blocked), due, -1)
                tally.add(_kind(_LIVE, leased, block), due, 1)

    def _remove(self, op: Remove) -> Outcome:
        item, mark = op.item, op.mark
        if item.external or item.group is not None:
            return self._remove_full(op)
        self._run(REMOVE, (item.key, mark.etag))
        if not self._changes():
            return self._remove_full(op)
        tally = self._tally
        if item.queue is not self._name or item.namespace is not self._namespace:
            tally = self._turn(item.namespace, item.queue)
        count_removed(tally, (op,))
        return REMOVED

    def _remove_full(self, op: Remove) -> Outcome:
        """Also removes state and blob, and lets the next of the group out."""
        item, mark = op.item, op.mark
        row = self._run(_ROW, (item.key,)).fetchone()
        if row is None or str(row[0]) != mark.etag:
            return self._refusal(item)
        tally = self._turn(item.namespace, item.queue)
        self._run(_REMOVE_STATEFUL, (item.key, mark.etag))
        if row[1]:
            self._run("DELETE FROM state WHERE seq=?", (item.key,))
        if item.external:
            self._detach(tally.queue, item)
        tally.add(_kind(mark.box, mark.leased, bool(row[2])), mark.due, -1)
        if mark.box is _LIVE:
            tally.add(BYTES, 0, -item.size)
            if item.group is not None:
                self._settle(tally, item.group)
                tally.changed = True
        return REMOVED

    def _detach(self, queue: int, item: Item) -> None:
        where = (queue, item.id)
        # Loose ones of this id are others': an enqueue under way, or refused.
        found = self._run("SELECT blob,size FROM blob WHERE queue=? AND id=? AND attached", where).fetchall()
        for blob, size in found:
            if size is not None and size <= DIRECT_DELETE:
                low = blob << CHUNK_BITS
                self._run("DELETE FROM chunk WHERE id BETWEEN ? AND ?", (low, low | ((1 << CHUNK_BITS) - 1)))
                self._run("DELETE FROM blob WHERE blob=?", (blob,))
            else:
                self._run("UPDATE blob SET attached=0,created=0,id=? WHERE blob=?", (DOOMED, blob))
                self.doomed = True

    def _refusal(self, item: Item) -> Conflict:
        there = self._run("SELECT EXISTS(SELECT 1 FROM message WHERE seq=?)", (item.key,)).get
        return Conflict(Cause.STALE if there else Cause.MISSING, item.id)

    # The rest

    def _check(self, item: Item, mark: Mark) -> Conflict | None:
        row = self._run(_ROW, (item.key,)).fetchone()
        if row is None:
            return Conflict(Cause.MISSING, item.id)
        return None if str(row[0]) == mark.etag else Conflict(Cause.STALE, item.id)

    def _state_version(self, item: Item) -> str | None:
        row = self._run("SELECT version FROM state WHERE seq=?", (item.key,)).fetchone()
        return None if row is None else str(row[0])

    def _put_state(self, op: PutState) -> Outcome:
        item = op.item
        conflict = self._check(item, op.mark)
        if conflict is not None:
            return conflict
        if self._state_version(item) != op.expect:
            return Conflict(Cause.STATE, item.id)
        # Versions come from the sequence: one that was seen before a delete never comes back after it.
        version = self.number()
        self._run("REPLACE INTO state VALUES(?,?,?)", (item.key, version, op.data))
        if op.expect is None:
            self._run("UPDATE message SET stateful=1 WHERE seq=?", (item.key,))
        self.volume += len(op.data)
        return StateWritten(str(version))

    def _drop_state(self, op: DropState) -> Outcome:
        item = op.item
        conflict = self._check(item, op.mark)
        if conflict is not None:
            return conflict
        if self._state_version(item) != op.expect:
            return Conflict(Cause.STATE, item.id)
        if op.expect is not None:
            self._run("DELETE FROM state WHERE seq=?", (item.key,))
            self._run("UPDATE message SET stateful=0 WHERE seq=?", (item.key,))
        return StateWritten("")

    def _put_document(self, op: PutDocument) -> Outcome:
        name = (op.namespace, op.queue)
        row = self._run("SELECT version,document IS NULL FROM queue WHERE namespace=? AND name=?", name).fetchone()
        if op.expect != (None if row is None or row[1] else str(row[0])):
            return Conflict(Cause.STATE)
        tally = self._turn(*name)
        version = self.number()
        self._run("UPDATE queue SET document=?,version=? WHERE id=?", (op.data, version, tally.queue))
        tally.changed = True
        return DocumentWritten(str(version))

    def _reseal(self, op: Reseal) -> Outcome:
        item, state = op.item, op.state
        conflict = self._check(item, op.mark)
        if conflict is not None:
            return conflict
        if state is not None:
            if self._state_version(item) != state.etag:
                return Conflict(Cause.STATE, item.id)
            self._run("UPDATE state SET data=? WHERE seq=?", (state.data, item.key))
        self._run("UPDATE message SET status=? WHERE seq=?", (op.status, item.key))
        if op.payload is None:
            self._run("UPDATE body SET head=? WHERE seq=?", (op.head, item.key))
        else:
            self._run("UPDATE body SET head=?,payload=? WHERE seq=?", (op.head, op.payload, item.key))
            self.volume += len(op.payload)
        return Updated(op.mark, None)


REMOVED = Removed()


def count_removed(tally: Tally, ops: Sequence[Remove]) -> None:
    counts, size = tally.counts, 0
    for op in ops:
        mark = op.mark
        if mark.box is _LIVE:
            key = (mark.due // BUCKET << KIND_BITS) | (LEASED if mark.leased else FREE)
            size += op.item.size
        else:
            key = DEAD
        counts[key] = counts.get(key, 0) - 1
    if size:
        counts[BYTES] = counts.get(BYTES, 0) - size


def _kind(box: Box, leased: bool, blocked: bool) -> int:
    if box is not _LIVE:
        return DEAD
    if blocked:
        return BLOCKED_LEASED if leased else BLOCKED
    return LEASED if leased else FREE
