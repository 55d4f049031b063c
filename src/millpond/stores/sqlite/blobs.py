"""Payloads stored apart: rows of at most 1 MiB, written and read one after another.

Writing uses a connection of its own with a small cache, so that a large payload neither fills memory nor pushes the
index pages of the queues out of theirs. It does not wait for the disk: the commit of the record, without which no one
looks at the blob, syncs the log in which both stand.

A blob belongs to a record once the record's insert has *attached* it. All others are loose: being written, or left by
an enqueue that never came to its end, or doomed, because the record was removed and deleting that many rows at once
would have kept everybody waiting. The sweep takes loose ones by age, and doomed ones always.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import apsw

from millpond.errors import StoreError
from millpond.stores.sqlite.apply import DOOMED
from millpond.stores.sqlite.failures import translate
from millpond.stores.sqlite.room import Gauge
from millpond.stores.sqlite.schema import CHUNK_BITS, connect

SLICE = 8
"""Chunks (8 MiB) that one transaction writes or deletes: some milliseconds under the lock."""
_CACHE = 4 * 1024 * 1024
"""Page cache of the connection, bytes; a slice passes through it once, nothing is read twice."""

T = TypeVar("T")


class Bulk:
    """Writes and deletes blobs. Its methods run in the writer thread, which holds the turnstile."""

    def __init__(self, path: str, *, vfs: str | None, busy_timeout: float, checkpoint_pages: int) -> None:
        self._path = path
        self.connection = connect(path, cache_bytes=_CACHE, vfs=vfs)
        self._gauge = Gauge(path, self.connection)
        self.connection.set_busy_timeout(round(busy_timeout * 1000))
        self.connection.wal_autocheckpoint(checkpoint_pages)
        self.connection.execute("PRAGMA synchronous = NORMAL")

    def _transaction(self, work: Callable[[], T]) -> T:
        run = self.connection.execute
        run("BEGIN IMMEDIATE")
        try:
            result = work()
            run("COMMIT")
        except apsw.Error as error:
            raise translate(error, self._path, self.connection) from error
        finally:
            if self.connection.in_transaction:
                run("ROLLBACK")
        return result

    def append(
        self,
        namespace: str,
        queue: str,
        id: str,
        blob: int | None,
        first: int,
        chunks: list[bytes],
        created: int,
        end: int | None,
    ) -> int:
        """Write chunks number ``first`` … of a blob (None: begin one) and return which it is.

        ``created`` is its age so far, anew each time, lest a slow upload be taken for an orphan. ``end`` is the whole
        size, with the last of them.
        """

        refusal = self._gauge.measure().refusal
        if refusal is not None:
            raise refusal

        def work() -> int:
            run = self.connection.execute
            number = blob
            if number is None:
                name = (namespace, queue)
                run("INSERT INTO queue(namespace,name) VALUES(?,?) ON CONFLICT DO NOTHING", name)
                # From the sequence: no number is ever that of another blob, also not after the last was deleted.
                number = run("UPDATE sequence SET next=next+1 RETURNING next-1").get
                run(
                    "INSERT INTO blob(blob,queue,id,created) SELECT ?,id,?,? FROM queue WHERE namespace=? AND name=?",
                    (number, id, created, *name),
                )
            for offset, chunk in enumerate(chunks):
                run("INSERT INTO chunk VALUES(?,?)", (number << CHUNK_BITS | (first + offset), chunk))
            run("UPDATE blob SET created=?,size=? WHERE blob=? AND id<>?", (created, end, number, DOOMED))
            if not self.connection.changes():
                raise StoreError(f"the payload of message {id} was swept while it was being written; write it again")
            return number

        return self._transaction(work)

    def doom(self, blob: int) -> None:
        """Mark a blob for deletion."""
        self._transaction(
            lambda: self.connection.execute("UPDATE blob SET attached=0,created=0,id=? WHERE blob=?", (DOOMED, blob))
        )

    def reclaim(self) -> bool:
        """Delete a slice of what is doomed; false when nothing is left."""

        def work() -> bool:
            run = self.connection.execute
            blob = run("SELECT blob FROM blob WHERE attached=0 AND created=0 AND id=? LIMIT 1", (DOOMED,)).get
            if blob is None:
                return False
            low = blob << CHUNK_BITS
            run(
                "DELETE FROM chunk WHERE id IN (SELECT id FROM chunk WHERE id BETWEEN ? AND ? LIMIT ?)",
                (low, low | ((1 << CHUNK_BITS) - 1), SLICE),
            )
            if self.connection.changes() < SLICE:
                run("DELETE FROM blob WHERE blob=?", (blob,))
            return True

        return self._transaction(work)

    def sweep(self, now: int, older_than: int, limit: int) -> int:
        """Doom loose blobs that are older than that, and delete unique keys that have ended; how many."""

        def work() -> int:
            run = self.connection.execute
            run(
                "UPDATE blob SET created=0,id=? WHERE blob IN "
                "(SELECT blob FROM blob WHERE attached=0 AND created<? AND id<>? LIMIT ?)",
                (DOOMED, now - older_than, DOOMED, limit),
            )
            swept = self.connection.changes()
            run(
                "DELETE FROM unique_key WHERE (queue,key) IN (SELECT queue,key FROM unique_key WHERE until<=? LIMIT ?)",
                (now, limit),
            )
            return swept + self.connection.changes()

        return self._transaction(work)

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()
