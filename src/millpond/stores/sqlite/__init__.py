"""The SQLite store: one file, shared by the processes of one machine, durable at each commit.

    store     SqliteStore: the protocol                  opening  from a path to open connections
    schema    the tables and their migrations            lock     fair turns between processes
    apply     ops on an open transaction (hot path)      writer   group commit
    reads     statements that only read                  blobs    payloads stored apart
    check     what verify looks at                       failures SQLite's errors in our words

Beside ``work.db`` (and SQLite's own ``work.db-wal`` and ``work.db-shm``) there is a directory ``work.db-millpond`` with
two lock files and the sockets of the change feed. It holds no data and may be removed while nobody has the store open.
"""

from __future__ import annotations

from millpond.stores.sqlite.store import SqliteStore

__all__ = ["SqliteStore"]
