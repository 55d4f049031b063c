"""What has to be done when a process forks while it has a database open, so that the child can open it anew.

SQLite keeps one entry per open file in its memory, with the locks that the process holds on it. A fork copies the
entry, but not the locks. A connection that the child opens then relies on locks that it does not have; the parent, or
anybody, may take the database for unused, and remove the log into which the child is writing: what the child was told
to be durable is gone. So the child closes the connections that it inherited before it opens its own, which drops the
entry.

Closing them harms nobody as long as none was in the middle of something. Therefore the fork waits for its turn as a
writer, at which nobody in this process has a transaction under way, and has the store's other threads pause. A read
that went on all the same shows when its connection cannot be closed. Then, and where the turn was not to be had, the
child may not open that database at all, and is told so.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Protocol

import apsw

from millpond.errors import StoreError

TRIES = 100
_PAUSE = 0.01
"""Seconds between tries. A fork waits for a second to be next in line, and for another until it has its turn."""

File = tuple[int, int]
"""Device and inode: what SQLite goes by, too."""


class Holder(Protocol):
    """An open store."""

    @property
    def path(self) -> str:
        """The database file."""

    def threads(self) -> list[Callable[[Callable[[], object]], object]]:
        """To have something done in those of its threads, this one apart, that read."""

    def forked(self) -> None:
        """This is a child of the process that opened it."""


_holders: weakref.WeakSet[Holder] = weakref.WeakSet()
_connections: weakref.WeakKeyDictionary[apsw.Connection, str] = weakref.WeakKeyDictionary()
_turns: dict[str, int | None] = {}
"""During a fork: path → descriptor of the turn as a writer; None when it could not be had."""
_paused: list[_Pause] = []
"""During a fork."""
_unsafe: set[File] = set()
"""Databases that cannot be opened in this process any more."""


class _Pause:
    """Keeps a thread from doing anything for a while."""

    def __init__(self, post: Callable[[Callable[[], object]], object]) -> None:
        self._begun = threading.Event()
        self._over = threading.Event()
        post(self._rest)

    def _rest(self) -> None:
        self._begun.set()
        self._over.wait()

    def begin(self) -> None:
        """Wait until it has begun, unless that takes too long: perhaps the thread waits for us."""
        self._begun.wait(TRIES * _PAUSE)

    def end(self) -> None:
        """Let the thread go on."""
        self._over.set()


def hold(holder: Holder) -> None:
    """A store is open, or about to be opened."""
    _holders.add(holder)


def drop(holder: Holder) -> None:
    """It is closed."""
    _holders.discard(holder)


def note(connection: apsw.Connection, path: str) -> None:
    """A connection that a child has to close."""
    _connections[connection] = path


def check(path: str) -> None:
    """Raise StoreError if this process must not open that database."""
    if _unsafe and _file(path) in _unsafe:
        raise StoreError(
            f"{path} was in use by another thread when this process forked, so that it cannot be opened here; fork "
            "while the pond is idle or before it is opened, or start processes by spawn"
        )


def _file(path: str) -> File | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _turn(path: str) -> int | None:
    """The turn as a writer, by descriptors of our own: those of the store may have it already."""
    taken: list[int] = []
    try:
        for name in ("turn.lock", "write.lock"):  # in line with the others, as `Turnstile` does
            descriptor = os.open(os.path.join(f"{path}-millpond", name), os.O_RDWR | os.O_CLOEXEC)
            taken.append(descriptor)
            if not _locked(descriptor):
                return None
        return taken.pop()
    except OSError:
        return None  # being opened, or its directory was removed
    finally:
        for descriptor in taken:
            os.close(descriptor)


def _locked(descriptor: int) -> bool:
    for _ in range(TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_PAUSE)
        else:
            return True
    return False


def _before() -> None:
    for holder in list(_holders):
        path = os.path.realpath(holder.path)
        if path not in _turns:
            _turns[path] = _turn(path)
    for holder in list(_holders):
        _paused.extend(_Pause(post) for post in holder.threads())
    for pause in _paused:
        pause.begin()


def _after_in_parent() -> None:
    for pause in _paused:
        pause.end()
    _paused.clear()
    for descriptor in _turns.values():
        if descriptor is not None:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # the child has the descriptor as well: closing is not enough
            os.close(descriptor)
    _turns.clear()


def _after_in_child() -> None:
    _paused.clear()
    for path, descriptor in _turns.items():
        file = _file(path)
        if descriptor is not None:
            os.close(descriptor)
        elif file is not None:
            _unsafe.add(file)
    _turns.clear()
    for holder in list(_holders):
        holder.forked()
    _holders.clear()
    for connection, path in list(_connections.items()):
        file = _file(path)
        if file in _unsafe or not _closed(connection):
            _kept.append(connection)
            if file is not None:
                _unsafe.add(file)
    _connections.clear()


def _closed(connection: apsw.Connection) -> bool:
    try:
        connection.close()
    except apsw.Error:
        return False  # a thread that is not here is in the middle of something with it
    return True


_kept: list[apsw.Connection] = []
"""What was not closed, lest the collector do it."""

os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
