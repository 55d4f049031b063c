"""News between the processes of one machine that have one bucket open: they need no poll to hear of each other.

`ChangeFeed` does it, in a directory of this user's that is named after the store. Whoever can write into that directory
can keep consumers busy, and whoever can read it learns the names of queues. So it must be ours alone, and one that is
somebody else's, or open to others, is not used: nothing is sent there, and who would listen polls.

Other machines are not reached, and nothing is promised; see `wake`. A bucket cannot be asked for free whether it has
changed, so nobody looks in case that news were dropped: the dispatcher's polls are for that.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from millpond.errors import StoreClosed, StoreError
from millpond.model.clock import Clock
from millpond.stores.wake import ChangeFeed, FeedSubscription, Name, News

log = logging.getLogger("millpond.objects")

_MODE = 0o600
"""Of the sockets: their directory keeps others out, and this does so once more."""


class HostFeed:
    """The change feed of a bucket's store among the processes of this user on this machine."""

    def __init__(self, identity: str, *, clock: Clock, heard: Callable[[News], object] | None = None) -> None:
        """``identity`` is the same for all who have the store open, by whatever URL, and for no other store. ``heard``
        is given the news that name messages. Nothing is made or opened yet."""
        self._clock = clock
        self._heard = heard or (lambda news: None)
        self._directory = feed_directory(identity)
        self._feed: ChangeFeed | None = None
        self._closed = False
        self._warned = False

    @property
    def numbers(self) -> dict[str, int]:
        """Datagrams sent, dropped and received, and listeners removed because they had died."""
        return {} if self._feed is None else dict(self._feed.numbers)

    def announce(self, changed: Iterable[Name]) -> None:
        """Tell the others that these queues (namespace, name) changed. Never waits, never raises."""
        if self._usable():
            try:
                self._open().publish(changed)
            except OSError as error:
                log.debug("millpond.feed.failed", extra={"reason": str(error)})

    def _usable(self) -> bool:
        """Whether somebody may be listening, in a directory that is ours."""
        if self._closed:
            return False
        try:
            return _ours(self._directory.parent) and _ours(self._directory)
        except StoreError as error:
            if not self._warned:
                self._warned = True
                log.warning("millpond.feed.refused", extra={"reason": str(error)})
            return False

    @property
    def own(self) -> str:
        """This store's name among the listeners; empty while it does not listen."""
        return "" if self._feed is None else self._feed.own

    def others(self) -> list[str]:
        """The other listeners. Never raises. To be left as it is."""
        if self._usable():
            try:
                return self._open().others()
            except OSError as error:
                log.debug("millpond.feed.failed", extra={"reason": str(error)})
        return []

    def tell(self, listener: str, news: list[News], *, insist: bool = False) -> bool:
        """Tell one of `others`. Never waits, never raises; False: it is gone, or has too much to read. ``insist``: then
        it is told a moment later to look everywhere."""
        try:
            return self._open().tell(listener, news, insist=insist)
        except OSError as error:
            log.debug("millpond.feed.failed", extra={"reason": str(error)})
            return False

    def subscribe(self, namespace: str, queue: str, callback: Callable[[], object]) -> FeedSubscription:
        """Call ``callback`` on the running loop after another process of this machine changed the queue. Raises
        StoreError where that cannot be had."""
        if self._closed:
            raise StoreClosed("the store is closed")
        for directory in (self._directory.parent, self._directory):
            try:
                directory.mkdir(mode=0o700, exist_ok=True)
                there = _ours(directory)
            except OSError as error:
                raise StoreError(f"the change feed cannot use {directory}: {error}; set XDG_RUNTIME_DIR") from error
            if not there:
                raise StoreError(f"{directory} was removed while the change feed was being opened; try again")
        return self._open().subscribe(namespace, queue, callback)

    def _open(self) -> ChangeFeed:
        if self._feed is None:
            self._feed = ChangeFeed(
                str(self._directory), mode=_MODE, clock=self._clock, look=lambda answer: None, heard=self._heard
            )
        return self._feed

    def close(self) -> None:
        """End all subscriptions and remove the socket. Repeatable."""
        self._closed = True
        if self._feed is not None:
            self._feed.close()

    def abandon(self) -> None:
        """Close the descriptors and nothing else: what a forked child does with its parent's."""
        self._closed = True
        if self._feed is not None:
            self._feed.abandon()


def feed_directory(identity: str) -> Path:
    """The directory of a store's feed: below XDG_RUNTIME_DIR where that is ours alone, else below the temporary
    directory, in one with this user's number in its name."""
    name = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):
        try:
            if _ours(Path(runtime)):
                return Path(runtime, "millpond", name)
        except StoreError:
            pass  # Set by sudo and its like: another user's.
    return Path(tempfile.gettempdir(), f"millpond-{os.geteuid()}", name)


def _ours(directory: Path) -> bool:
    """Whether it is there. Raises StoreError when it is not a directory of this user's that is closed to all others."""
    try:
        found = directory.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise StoreError(f"the change feed cannot look at {directory}: {error}; set XDG_RUNTIME_DIR") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise StoreError(f"{directory} is not this user's directory, so the change feed does not use it; remove it")
    if found.st_mode & 0o077:
        raise StoreError(f"{directory} is open to other users, so the change feed does not use it; chmod 700 it")
    return True
