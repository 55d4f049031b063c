"""The tables, and how a file comes to have them.

A message is a narrow row that each step of its life rewrites (``message``) and a wide one that is written once
(``body``). Facts that the statements in this package rely on:

- ``message.lane`` is the priority of a record that a consumer may look at, and NULL for one that is dead or blocked by
  an earlier record of its group: those fall out of the index that hand-out reads, and ``box = 0 AND lane IS NULL``
  means blocked.
- ``message.place`` orders the records of a group (NULL without one): the number with which the record entered it, its
  ``seq`` or, once it came back from the dead box, a later one of the same sequence.
- ``message_ready`` names ``seq`` and ``leased`` to be covering for counts; its order is that of hand-out.
- ``seq`` is never used twice: it comes from ``sequence``, which only grows. So (seq, version) names one version of one
  record for ever.
- ``counter`` holds how many records of a queue are in each kind and due bucket, and is kept exact by every commit.
- ``chunk.id`` is ``blob << CHUNK_BITS | number``, so that a blob's chunks are one range of the table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import apsw

from millpond.errors import StoreCorrupt, StoreMismatch
from millpond.stores.sqlite import fork
from millpond.stores.sqlite.failures import translate

APPLICATION_ID = 0x4D6C5064
"""'MlPd' in the file's header: `file` and other tools can tell what this is, and so can we."""

BUCKET = 10_000
"""Width of a due bucket of the counters, ms. ``counts`` reads one row per bucket that is in use and one index entry per
record due in the bucket that contains now: narrow buckets cost rows when delays are spread over weeks (60,000 a week at
10 s), wide ones cost entries under load (300,000 at 30,000 messages a second)."""

FREE, LEASED, BLOCKED, BLOCKED_LEASED, DEAD, BYTES, INSERTED = range(7)
"""Kinds of ``counter`` rows. BLOCKED, DEAD, BYTES and INSERTED are not divided into buckets (bucket 0); BYTES counts
payload bytes of the live box, and INSERTED the records that were ever inserted: it only grows."""

CHUNK = 1024 * 1024
"""Bytes of a blob in one row: what ``read_blob`` may hand out at once."""
CHUNK_BITS = 24
"""Chunks of one blob: 2^24 of 1 MiB, 16 TiB."""

_V1 = """
CREATE TABLE queue(
  id INTEGER PRIMARY KEY, namespace TEXT NOT NULL, name TEXT NOT NULL,
  document BLOB, version INTEGER NOT NULL DEFAULT 0,
  UNIQUE(namespace, name));
CREATE TABLE message(
  seq INTEGER PRIMARY KEY, queue INTEGER NOT NULL, lane INTEGER, due INTEGER NOT NULL, version INTEGER NOT NULL,
  leased INTEGER NOT NULL, box INTEGER NOT NULL, expires INTEGER, grp TEXT, size INTEGER NOT NULL,
  external INTEGER NOT NULL, stateful INTEGER NOT NULL, id TEXT NOT NULL, priority INTEGER NOT NULL,
  place INTEGER, status BLOB NOT NULL);
CREATE UNIQUE INDEX message_id ON message(queue, id);
CREATE INDEX message_ready ON message(queue, lane, due, seq, leased);
CREATE INDEX message_box ON message(queue, box);
CREATE INDEX message_expires ON message(expires) WHERE expires IS NOT NULL AND box = 0;
CREATE INDEX message_group ON message(queue, grp, place) WHERE grp IS NOT NULL AND box = 0;
CREATE TABLE body(seq INTEGER PRIMARY KEY, head BLOB NOT NULL, payload BLOB NOT NULL);
CREATE TRIGGER message_body AFTER DELETE ON message BEGIN DELETE FROM body WHERE seq = old.seq; END;
CREATE TABLE state(seq INTEGER PRIMARY KEY, version INTEGER NOT NULL, data BLOB NOT NULL);
CREATE TABLE unique_key(
  queue INTEGER NOT NULL, key TEXT NOT NULL, until INTEGER NOT NULL, id TEXT NOT NULL,
  PRIMARY KEY(queue, key)) WITHOUT ROWID;
CREATE INDEX unique_key_until ON unique_key(until);
CREATE TABLE counter(
  queue INTEGER NOT NULL, kind INTEGER NOT NULL, bucket INTEGER NOT NULL, n INTEGER NOT NULL,
  PRIMARY KEY(queue, kind, bucket)) WITHOUT ROWID;
CREATE TABLE blob(
  blob INTEGER PRIMARY KEY, queue INTEGER NOT NULL, id TEXT NOT NULL, created INTEGER NOT NULL, size INTEGER,
  attached INTEGER NOT NULL DEFAULT 0);
CREATE INDEX blob_id ON blob(queue, id);
CREATE INDEX blob_loose ON blob(created) WHERE attached = 0;
CREATE TABLE chunk(id INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE sequence(next INTEGER NOT NULL);
INSERT INTO sequence VALUES(1);
"""

MIGRATIONS: Sequence[str] = (_V1,)
"""``MIGRATIONS[n]`` takes a file from schema version n to n + 1. Append only; never change one that was released."""


STATEMENTS = 32
"""Prepared statements that a connection keeps: as many as the hot ones take turns in, since apsw looks through all."""


def connect(path: str, *, cache_bytes: int, vfs: str | None = None, create: bool = False) -> apsw.Connection:
    """A connection to an existing (or, with ``create``, perhaps new) database, durable and waiting for nobody."""
    flags = apsw.SQLITE_OPEN_READWRITE
    connection = apsw.Connection(
        path, flags | (apsw.SQLITE_OPEN_CREATE if create else 0), vfs, statementcachesize=STATEMENTS
    )
    fork.note(connection, path)
    connection.set_busy_timeout(0)
    connection.execute(f"PRAGMA cache_size = -{max(256, cache_bytes // 1024)}")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def migrate(
    connection: apsw.Connection,
    path: str,
    *,
    migrations: Sequence[str] = MIGRATIONS,
    on_create: Callable[[], object] = lambda: None,
) -> int:
    """Bring the file to the newest schema and return the version it had. The caller holds the turnstile.

    Raises StoreMismatch for a file that is not ours or newer than ``migrations``, StoreCorrupt for one that is damaged,
    StoreError for what SQLite says.
    """
    try:
        application = connection.pragma("application_id")
        version = connection.pragma("user_version")
        empty = connection.execute("SELECT NOT EXISTS(SELECT 1 FROM sqlite_master)").get
    except apsw.NotADBError as error:
        raise StoreMismatch(f"{path} is not a Millpond store: it is not an SQLite database") from error
    except apsw.Error as error:
        raise translate(error, path) from error
    fresh = bool(empty) and application == 0 and version == 0
    if not fresh and application != APPLICATION_ID:
        raise StoreMismatch(f"{path} is an SQLite database, but not a Millpond store; name another file")
    if not fresh and version < 1:
        raise StoreCorrupt(f"{path} is damaged: schema version {version} was never written. Restore it from a backup")
    if version > len(migrations):
        raise StoreMismatch(
            f"{path} has schema version {version}; this Millpond knows versions up to {len(migrations)}. "
            "Use the newer Millpond that wrote it"
        )
    try:
        if connection.pragma("journal_mode", "wal") != "wal":
            raise StoreMismatch(f"{path} cannot use a write-ahead log where it lies; use a local file system")
        if version < len(migrations):
            connection.execute("BEGIN IMMEDIATE")
            try:
                for script in migrations[version:]:
                    connection.execute(script)
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {len(migrations)}")
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
    except apsw.Error as error:
        raise translate(error, path) from error
    if fresh:
        on_create()
    return int(version)


def sync_log(path: str) -> None:
    """Make everything durable that is in the log of the database at ``path``, whoever wrote it. Raises OSError.

    For transactions that were committed with ``synchronous = NORMAL``: their frames are in the log, in order and with
    checksums, and the log is always synced before it is brought into the database."""
    descriptor = os.open(f"{path}-wal", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _sync_data(descriptor)
    finally:
        os.close(descriptor)


_sync_data = getattr(os, "fdatasync", os.fsync)
"""macOS has no fdatasync."""


def sync_directory(path: str) -> None:
    """Make the directory entry of a new file at ``path`` durable."""
    descriptor = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
