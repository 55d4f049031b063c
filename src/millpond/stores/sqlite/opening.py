"""From a path to open connections: the checks that give a clear error, the files beside the database, the schema."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from typing import NamedTuple

import apsw

from millpond.errors import StoreBusy, StoreCorrupt, StoreError, StoreMismatch
from millpond.stores.sqlite import fork
from millpond.stores.sqlite.blobs import Bulk
from millpond.stores.sqlite.failures import translate
from millpond.stores.sqlite.lock import Turnstile
from millpond.stores.sqlite.schema import connect, migrate, sync_directory

CHECKPOINT_PAGES = 4000
"""Pages of write-ahead log (16 MiB) after which a commit copies them into the database: rarer makes each longer, and
reads slower meanwhile."""
WAL_LIMIT = 64 * 1024 * 1024
"""Bytes to which a log that grew beyond is cut back."""
NEAR_BUSY = 20
"""Milliseconds that a read on the event loop waits for a lock (it meets one while a log is being recovered)."""
_TRY = 0.01
"""Seconds between tries for the lock."""


class Opened(NamedTuple):
    """An open database."""

    write: apsw.Connection
    near: apsw.Connection
    """For reads on the event loop."""
    far: apsw.Connection
    """For reads in a thread."""
    bulk: Bulk
    lock: Turnstile
    feed: str
    """The directory of the change feed."""
    mode: int
    """Permission bits of the files beside the database."""

    def close(self) -> None:
        """Close all of it, for who opened it in vain."""
        for each in (self.bulk, self.far, self.near, self.write, self.lock):
            each.close()


def open_database(
    path: str,
    *,
    cache_bytes: int,
    max_bytes: int | None,
    vfs: str | None,
    busy_timeout: float,
    migrations: Sequence[str],
) -> Opened:
    """Open the store at ``path``, creating or migrating it. Blocks. Raises StoreMismatch, StoreBusy, StoreError."""
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        raise StoreError(f"there is no directory {parent} for {os.path.basename(path)}; create it first")
    if os.path.isdir(path):
        raise StoreError(f"{path} is a directory; name a file")
    fork.check(path)
    opened: list[apsw.Connection | Bulk | Turnstile] = []
    beside = f"{path}-millpond"
    ours = os.path.isdir(beside) or not os.path.exists(path)
    try:
        feed, mode = _beside(path)
        lock = Turnstile(os.path.dirname(feed), mode)
        opened.append(lock)
        _take(lock, path, busy_timeout)
        try:
            _keep_log(path)
            write = connect(path, cache_bytes=cache_bytes // 2, vfs=vfs, create=True)
            opened.append(write)
            if write.readonly("main"):
                raise StoreError(f"{path} is read-only; Millpond has to write it")
            write.set_busy_timeout(round(busy_timeout * 1000))
            migrate(write, path, migrations=migrations, on_create=lambda: sync_directory(path))
            write.set_busy_timeout(0)
            near = connect(path, cache_bytes=cache_bytes * 3 // 8, vfs=vfs)
            opened.append(near)
            near.set_busy_timeout(NEAR_BUSY)
            far = connect(path, cache_bytes=cache_bytes // 8, vfs=vfs)
            opened.append(far)
            far.set_busy_timeout(round(busy_timeout * 1000))
            bulk = Bulk(path, vfs=vfs, busy_timeout=busy_timeout, checkpoint_pages=CHECKPOINT_PAGES)
            opened.append(bulk)
            write.wal_autocheckpoint(CHECKPOINT_PAGES)
            write.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT}")
            if max_bytes is not None:
                pages = max(1, max_bytes // int(write.pragma("page_size")))
                for connection in (write, bulk.connection):
                    connection.execute(f"PRAGMA max_page_count = {pages}")
        finally:
            lock.release()
    except BaseException as error:
        for each in reversed(opened):
            each.close()
        if not ours and isinstance(error, StoreMismatch | apsw.NotADBError):
            # Somebody else's file, named by mistake: nothing of ours stays beside it.
            shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, apsw.NotADBError):
            raise StoreMismatch(f"{path} is not a Millpond store: it is not an SQLite database") from error
        if isinstance(error, apsw.Error | OSError):
            raise translate(error, path) from error
        raise
    return Opened(write, near, far, bulk, lock, feed, mode)


def _beside(path: str) -> tuple[str, int]:
    """Make the directory of the lock files and of the feed, for whoever may write the database."""
    try:
        mode = os.stat(path).st_mode & 0o666
        given = True
    except FileNotFoundError:
        mode, given = 0o644, False  # as SQLite creates a database, less the umask
    beside = f"{path}-millpond"
    feed = os.path.join(beside, "feed")
    for directory in (beside, feed):
        try:
            os.mkdir(directory, mode | (mode & 0o444) >> 2)
        except FileExistsError:
            continue
        if given:
            os.chmod(directory, mode | (mode & 0o444) >> 2)  # the umask has no say in who may use what exists
    return feed, mode


def _keep_log(path: str) -> None:
    """SQLite removes the log of a database that is not there, or empty; but perhaps somebody only mislaid the database,
    and nearly everything is in the log."""
    try:
        if os.stat(f"{path}-wal").st_size == 0 or (os.path.exists(path) and os.stat(path).st_size > 0):
            return
    except FileNotFoundError:
        return
    raise StoreCorrupt(
        f"{path} is missing or empty, but its log {path}-wal is there. Bring back the file that it belongs to, or "
        "remove the log to begin anew"
    )


def _take(lock: Turnstile, path: str, busy_timeout: float) -> None:
    for _ in range(max(1, round(busy_timeout / _TRY))):
        if lock.try_acquire():
            return
        time.sleep(_TRY)
    raise StoreBusy(f"another writer has held {path} for {busy_timeout:g} s; try again")
