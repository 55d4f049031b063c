"""What goes through a `Writer`: calls, jobs, batches of them, and how its two sides hand the lock to each other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import apsw

from millpond.errors import StoreError
from millpond.stores.base import Insert, PutDocument, PutState, QueueName, Reseal
from millpond.stores.sqlite.apply import Take
from millpond.stores.sqlite.failures import translate

GROW = (Insert, PutState, PutDocument, Reseal)
"""Ops that need room on the disk."""


class Call:
    """One ``write``, ``commit`` or ``take``, and what became of it."""

    __slots__ = ("apply", "error", "future", "outcomes", "portable", "request", "since", "singly", "size")

    def __init__(
        self,
        apply: Callable[[Any], Any],
        request: Any,
        future: asyncio.Future[Any],
        size: int,
        portable: bool,
        singly: Callable[[Any], Any] | None = None,
    ) -> None:
        self.apply = apply
        """What of the applier does ``request``."""
        self.singly = singly
        """What does the same op by op, where ``apply`` writes several together and has not given up on that."""
        self.request = request
        self.future = future
        self.size = size
        """Ops, at most."""
        self.portable = portable
        """It may be applied in the thread: it calls nothing that belongs to the event loop."""
        self.outcomes: Any = None
        self.error: BaseException | None = None
        self.since = 0.0

    @property
    def grows(self) -> bool:
        """It needs room on the disk."""
        request = self.request
        return request.__class__ is not Take and any(isinstance(op, GROW) for op in request)


class Job:
    """Work that takes the lock for a transaction of its own, wholly in the writer thread."""

    __slots__ = ("error", "future", "result", "since", "started", "work")

    def __init__(self, work: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        self.work = work
        self.future = future
        self.result: Any = None
        self.error: BaseException | None = None
        self.since = 0.0
        self.started = False


class Batch:
    """The calls of one transaction."""

    __slots__ = ("calls", "changed", "doomed", "ops", "seconds", "tight", "wrote")

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.changed: set[QueueName | tuple[str, str]] = set()
        self.doomed = False
        self.tight = False
        """The file system has little room left."""
        self.wrote = False
        self.ops = 0
        self.seconds = 0.0


class Offer:
    """A held lock, for whoever takes it first."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._taken = threading.Event()

    def take(self) -> bool:
        with self._mutex:
            if self._taken.is_set():
                return False
            self._taken.set()
            return True

    def wait(self, seconds: float) -> bool:
        return self._taken.wait(seconds)


class Place:
    """A place as the next in line for the lock. The loop looks for the lock; where it does not come, or gives up, the
    thread goes on, so that nobody behind waits for a busy loop. Whoever uses the lock holds ``mutex``."""

    def __init__(self) -> None:
        self.mutex = threading.Lock()
        self.loops = True
        """The loop may still take it."""
        self.until = 0.0
        """For how long the loop looks, by the machine's clock; 0 before its first look."""
        self._done = threading.Event()
        self.settled = False
        """The loop has entered, or stepped back."""

    def leave(self, settled: bool) -> None:
        """The loop is done with it: it has ``settled``, or the thread is to go on."""
        self.loops, self.settled = False, settled
        self._done.set()

    def wait(self, seconds: float) -> bool:
        """In the thread: give the loop so long; true when there is nothing left to do."""
        self._done.wait(seconds)
        with self.mutex:
            self.loops = False
            return self.settled


_CALLERS_FAULT = (apsw.TooBigError, apsw.ConstraintError, apsw.MismatchError, apsw.RangeError)
"""What SQLite says of one statement's values; anything else it says concerns the whole transaction."""


def blame(error: Exception, current: Call | None, calls: list[Call]) -> list[Call]:
    """Which of the calls of a transaction that failed while ``current`` was applied have to fail with it."""
    if isinstance(error, apsw.FullError):
        return [call for call in calls if call.grows] or calls
    if current is not None and (not isinstance(error, apsw.Error) or isinstance(error, _CALLERS_FAULT)):
        return [current]
    return calls


def own(error: Exception, path: str) -> Exception:
    """The error for one caller: of the store's own, each gets an instance, since a raised one grows a traceback."""
    if isinstance(error, apsw.Error):
        return translate(error, path)
    if isinstance(error, StoreError):
        return type(error)(str(error))
    return error
