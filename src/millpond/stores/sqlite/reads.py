"""Reading, on a connection of its own: statements and the rows they give.

Each method is one short read transaction, so that no reader ever keeps a checkpoint from finishing. The caller sees to
it that only one thread uses a `Reads` at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import apsw

from millpond.stores.base import (
    Box,
    Counts,
    Document,
    Page,
    QueueName,
    ReadyPage,
    Stored,
)
from millpond.stores.sqlite.apply import QUEUE_CACHE
from millpond.stores.sqlite.rows import COLUMNS, FROM, stored
from millpond.stores.sqlite.schema import (
    BLOCKED,
    BLOCKED_LEASED,
    BUCKET,
    BYTES,
    CHUNK_BITS,
    DEAD,
    FREE,
    INSERTED,
    LEASED,
)

_GET = f"SELECT {COLUMNS} {FROM} WHERE m.queue=? AND m.id=?"
_GET_PAYLOAD = f"SELECT {COLUMNS},b.payload {FROM} WHERE m.queue=? AND m.id=?"
_READY = f"SELECT {COLUMNS} {FROM} WHERE m.queue=? AND m.lane=? AND m.due<=? ORDER BY m.due,m.seq LIMIT ?"
_LIST = f"SELECT {COLUMNS} {FROM} WHERE m.queue=? AND m.box=? AND m.seq>? ORDER BY m.seq LIMIT ?"
_EXPIRED = (
    f"SELECT {COLUMNS},q.namespace,q.name {FROM} JOIN queue q ON q.id=m.queue "
    "WHERE m.expires<=? AND m.expires IS NOT NULL AND m.box=0 AND (m.leased=0 OR m.due<=?) "
    "ORDER BY m.expires,m.seq LIMIT ?"
)
_TOP_LANE = "SELECT max(lane) FROM message WHERE queue=?"
_NEXT_LANE = "SELECT max(lane) FROM message WHERE queue=? AND lane<?"
_LATER = "SELECT due FROM message WHERE queue=? AND lane=? AND due>? ORDER BY due LIMIT 1"
_FIRST = "SELECT due FROM message WHERE queue=? AND lane=? ORDER BY due LIMIT 1"
_COUNTERS = "SELECT kind,sum(n),sum(CASE WHEN bucket<? THEN n ELSE 0 END) FROM counter WHERE queue=? GROUP BY kind"
_IN_BUCKET = "SELECT count(*),sum(leased) FROM message WHERE queue=? AND lane=? AND due>=? AND due<=?"
_BLOCKED_IN_BUCKET = (
    "SELECT count(*) FROM message WHERE queue=? AND lane IS NULL AND due>=? AND due<=? AND leased AND box=0"
)


class Reads:
    """Reads on ``connection``."""

    def __init__(self, connection: apsw.Connection) -> None:
        self.connection = connection
        self._cursor = connection.cursor()
        self._run: Callable[..., Any] = self._cursor.execute
        self._queues: dict[tuple[str, str], int] = {}
        """Ids of queues that were seen; ids are never reused."""

    @contextmanager
    def _snapshot(self) -> Iterator[None]:
        """Several statements that see one state of the database, at the price of one lock."""
        self._run("BEGIN")
        try:
            yield
        finally:
            if self.connection.in_transaction:  # an I/O error ends it, and is what the caller has to hear
                self._run("COMMIT")

    def _queue(self, namespace: str, name: str) -> int | None:
        key = (namespace, name)
        found = self._queues.get(key)
        if found is None:
            found = self._run("SELECT id FROM queue WHERE namespace=? AND name=?", key).get
            if found is not None:
                if len(self._queues) >= QUEUE_CACHE:
                    self._queues.clear()
                self._queues[key] = found
        return found

    def get(self, namespace: str, queue: str, id: str, payload: bool) -> Stored | None:
        number = self._queue(namespace, queue)
        if number is None:
            return None
        rows = self._run(_GET_PAYLOAD if payload else _GET, (number, id)).fetchall()
        return stored(namespace, queue, rows[0], rows[0][13] if payload else None) if rows else None

    def payload(self, key: int) -> bytes | None:
        found: bytes | None = self._run("SELECT payload FROM body WHERE seq=?", (key,)).get
        return found

    def state(self, key: int) -> Document | None:
        rows = self._run("SELECT data,version FROM state WHERE seq=?", (key,)).fetchall()
        return Document(rows[0][0], str(rows[0][1])) if rows else None

    def document(self, namespace: str, queue: str) -> Document | None:
        rows = self._run(
            "SELECT document,version FROM queue WHERE namespace=? AND name=? AND document IS NOT NULL",
            (namespace, queue),
        ).fetchall()
        return Document(rows[0][0], str(rows[0][1])) if rows else None

    def _lanes(self, queue: int) -> Iterator[int]:
        """The priorities that the queue has, highest first: one seek each."""
        lane = self._run(_TOP_LANE, (queue,)).get
        while lane is not None:
            yield lane
            lane = self._run(_NEXT_LANE, (queue, lane)).get

    def ready(self, namespace: str, queue: str, now: int, limit: int) -> ReadyPage:
        number = self._queue(namespace, queue)
        if number is None:
            return ReadyPage([], False, None)
        rows: list[Any] = []
        next_due: int | None = None
        with self._snapshot():
            for lane in self._lanes(number):
                if len(rows) <= limit:
                    rows += self._run(_READY, (number, lane, now, limit + 1 - len(rows))).fetchall()
                later = self._run(_LATER, (number, lane, now)).get
                if later is not None and (next_due is None or later < next_due):
                    next_due = later
        more = len(rows) > limit
        return ReadyPage([stored(namespace, queue, row) for row in rows[:limit]], more, next_due)

    def expired(self, now: int, limit: int) -> list[Stored]:
        rows = self._run(_EXPIRED, (now, now, limit)).fetchall()
        return [stored(row[13], row[14], row) for row in rows]

    def queues(self) -> list[QueueName]:
        return [
            QueueName(*row)
            for row in self._run(
                "SELECT namespace,name FROM queue q WHERE document IS NOT NULL "
                f"OR EXISTS(SELECT 1 FROM counter WHERE queue=q.id AND kind<>{INSERTED}) ORDER BY namespace,name"
            )
        ]

    def counts(self, namespace: str, queue: str, now: int) -> Counts:
        """Whole buckets from the counters, and the entries of the bucket that contains ``now`` from the index."""
        number = self._queue(namespace, queue)
        if number is None:
            return Counts(ready=0, delayed=0, leased=0, blocked=0, dead=0, bytes=0, oldest_due=None, enqueued=0)
        bucket = now // BUCKET
        start = bucket * BUCKET
        oldest: int | None = None
        due = lapsed = 0
        with self._snapshot():
            total = dict.fromkeys(range(INSERTED + 1), 0)
            past = total.copy()
            for kind, n, before in self._run(_COUNTERS, (bucket, number)):
                total[kind], past[kind] = n, before
            for lane in list(self._lanes(number)):
                n, leased = self._run(_IN_BUCKET, (number, lane, start, now)).fetchall()[0]
                due += n
                lapsed += leased or 0
                first = self._run(_FIRST, (number, lane)).get
                if first is not None and first <= now and (oldest is None or first < oldest):
                    oldest = first
            blocked_lapsed = past[BLOCKED_LEASED]
            if total[BLOCKED_LEASED] > blocked_lapsed:
                blocked_lapsed += self._run(_BLOCKED_IN_BUCKET, (number, start, now)).get
        ready = past[FREE] + past[LEASED] + due
        return Counts(
            ready=ready,
            delayed=total[FREE] - past[FREE] - (due - lapsed),
            leased=total[LEASED] - past[LEASED] - lapsed + total[BLOCKED_LEASED] - blocked_lapsed,
            blocked=total[BLOCKED] + blocked_lapsed,
            dead=total[DEAD],
            bytes=total[BYTES],
            oldest_due=oldest,
            enqueued=total[INSERTED],
        )

    def blob(self, seq: int) -> tuple[int, int | None] | None:
        """(blob, size) of the payload of a message; the size is None when it was not written to its end."""
        rows = self._run(
            "SELECT b.blob,b.size FROM message m JOIN blob b ON b.queue=m.queue AND b.id=m.id "
            "WHERE m.seq=? AND b.attached",
            (seq,),
        ).fetchall()
        return rows[0] if rows else None

    def chunk(self, blob: int, number: int) -> tuple[bytes | None, bool]:
        """One chunk of a blob, and whether the blob is (still) there for anybody to read."""
        with self._snapshot():
            data = self._run("SELECT data FROM chunk WHERE id=?", (blob << CHUNK_BITS | number,)).get
            there = self._run("SELECT EXISTS(SELECT 1 FROM blob WHERE blob=? AND id<>'')", (blob,)).get
        return data, bool(there)

    def data_version(self) -> int:
        """A number that changes when another connection has written."""
        return int(self._run("PRAGMA data_version").get)

    # Last in the class: below it, ``list`` would name the method in annotations.
    def list(self, namespace: str, queue: str, box: Box, after: int | None, limit: int) -> Page:
        number = self._queue(namespace, queue)
        if number is None:
            return Page([], None)
        rows = self._run(_LIST, (number, int(box), after or 0, limit + 1)).fetchall()
        records = [stored(namespace, queue, row) for row in rows[:limit]]
        if len(rows) <= limit:
            return Page(records, None)
        return Page(records, records[-1].item.key if records else after)
