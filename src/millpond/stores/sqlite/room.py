"""What is left of the file system, so that a queue that filled it can still be emptied, and then filled again.

An ack makes room, but takes some first: its pages go into the log, and the log begins anew only once all of it is in
the database. On a file system without a free byte no ack would succeed, and the queue could never shrink. So what
enlarges the store is refused a little earlier than what does not, and before that the log is made short. The database
never gets shorter; what was deleted from it is room for what comes, and counts as such. A limit of the store's own is
treated in the same way.
"""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

import apsw

from millpond.errors import StoreFull

_NO_LIMIT = 0xFFFFFFFE
"""SQLite's own limit of a database's pages."""
RESERVE = 32 * 1024 * 1024
"""Bytes left for acks: twice the largest transaction and log (16 MiB), once in the log and once in the database."""
SHARE = 8
"""At most one part in so many of a small file system is kept back."""

PLENTY = 8 * RESERVE
"""Bytes from which on nothing further is asked: more than any log that the store would write in one go."""

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What the system says when a file cannot grow: the disk, the user's quota or the limit of a file's size (ulimit -f) is
reached. SQLite calls only the first of them full."""


class Room(NamedTuple):
    """How much is left."""

    tight: bool
    """The log should give back its room."""
    refusal: StoreFull | None
    """What a write that enlarges the store has to hear."""


_AMPLE = Room(False, None)


class Gauge:
    """Measures what is left for the store at ``path``, through ``connection``."""

    def __init__(self, path: str, connection: apsw.Connection) -> None:
        self._path = path
        self._connection = connection
        self._page = 0
        self._most = 0
        """Pages to which the database is limited; 0 when it is not."""

    def measure(self) -> Room:
        """What is left. Takes a microsecond while there is plenty. Within a transaction or not."""
        try:
            if not self._page:
                self._page = int(self._connection.pragma("page_size"))
                most = int(self._connection.pragma("max_page_count"))
                self._most = most if most < _NO_LIMIT else 0
            if self._most:
                refusal = self._limit()
                if refusal is not None:
                    return Room(False, refusal)
            system = os.statvfs(self._path)
            free = system.f_bavail * system.f_frsize
            return _AMPLE if free >= PLENTY else self._file_system(free, system.f_blocks * system.f_frsize)
        except (OSError, apsw.Error):
            return _AMPLE  # the write itself will say what is wrong

    def _bytes(self, what: str) -> int:
        return int(self._connection.pragma(what)) * self._page

    def _limit(self) -> StoreFull | None:
        """As for a file system: also a claim may need a page."""
        whole = self._most * self._page
        reserve = min(RESERVE, whole // SHARE)
        if whole - self._bytes("page_count") + self._bytes("freelist_count") >= reserve:
            return None
        return self._refusal(f"{self._path} is limited to {whole >> 20} MiB and", reserve)

    def _file_system(self, free: int, whole: int) -> Room:
        size, log = os.stat(self._path).st_size, os.stat(f"{self._path}-wal").st_size
        reserve = min(RESERVE, whole // SHARE)
        free -= max(0, self._bytes("page_count") - size)  # is in the log, and the database will need it
        tight = free < 2 * reserve and log > reserve // 4
        if free >= reserve:
            return Room(tight, None)
        if min(free, self._bytes("freelist_count")) >= reserve // 2:
            return Room(tight, None)  # the database need not grow, and there is room for the log
        return Room(tight, self._refusal(f"the file system of {self._path}", reserve))

    def _refusal(self, what: str, reserve: int) -> StoreFull:
        return StoreFull(
            f"{what} has less than {max(1, reserve >> 20)} MiB left, which are kept for acks; nothing of this call was "
            "written. Free some space and try again"
        )
