"""SQLite's errors in Millpond's words: what happened, and what the caller should do about it."""

from __future__ import annotations

import os

import apsw

from millpond.errors import StoreBusy, StoreCorrupt, StoreError, StoreFull
from millpond.stores.sqlite.room import NO_ROOM


def translate(error: Exception, path: str, connection: apsw.Connection | None = None) -> StoreError:
    """The StoreError for what SQLite (or the file system below it) said about the database at ``path``.

    ``connection``: the one that said it, which also knows what the system told SQLite."""
    if isinstance(error, StoreError):
        return error
    system = connection.system_errno if connection is not None and isinstance(error, apsw.IOError) else 0
    if isinstance(error, apsw.FullError) or system in NO_ROOM:
        return StoreFull(f"no room left for {path}; nothing of this call was written. Free some space and try again")
    if isinstance(error, apsw.BusyError | apsw.LockedError):
        return StoreBusy(f"another writer holds {path}; nothing of this call was written. Try again")
    if isinstance(error, apsw.NotADBError | apsw.CorruptError):
        return StoreCorrupt(f"{path} is damaged or not a database: {error}. Restore it from a backup")
    if isinstance(error, apsw.ReadOnlyError | apsw.PermissionsError | apsw.AuthError):
        return StoreError(f"{path} cannot be written: {error}. Check the permissions of the file and its directory")
    if isinstance(error, apsw.CantOpenError):
        return StoreError(f"{path} cannot be opened: {error}. Check the permissions of the file and its directory")
    if isinstance(error, OSError):
        return StoreError(f"{error.filename or path}: {os.strerror(error.errno) if error.errno else error}")
    because = f" ({os.strerror(system)})" if system else ""
    return StoreError(f"{path}: {type(error).__name__}: {error}{because}")
