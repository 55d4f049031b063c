"""The change feed of one host: who writes tells who listens, by unix datagrams.

Everyone who has a subscription binds a socket in a directory beside the data; everyone who writes sends the names of
the queues that changed to all sockets there but its own. A datagram takes 0.09 ms where polling every 5 ms takes 1.9
(measured), nothing is sent while nobody listens, and a process that dies leaves nothing but a file that the next sender
removes. Nothing is promised: a full buffer drops news, a directory may be cleaned up. So each listener also asks at a
low rate whether the data has changed at all, and then looks everywhere.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from millpond.errors import StoreError
from millpond.model.clock import Clock, TimerHandle

LINGER = 1.0
"""Seconds for which the socket outlives the last subscription: a consumer that waits again finds it bound."""
POLL = 1.0
"""Seconds between looks at the data itself, in case news was dropped; a look costs 3.4 µs."""
MAX_NAMES = 100
"""Queues that one datagram names (≤ 26 KiB); more are sent as "everything"."""
_OVERFLOW = 8
"""Datagrams read in a row after which some may have been dropped: Linux keeps 10 per socket unless told otherwise."""
_UNSETTLED = 0.05
"""Seconds for which a directory that has just changed is listed anew each time: its time stamp is only as fine as the
kernel's tick (1 to 10 ms), so two changes may share one."""
_LONGEST_PATH = 100
"""Bytes that fit into a socket's address everywhere (104 on macOS, 108 on Linux)."""
_DATAGRAM = 65_536

Name = tuple[str, str]

_decoder = msgspec.msgpack.Decoder(list[tuple[str, str]])


class FeedSubscription:
    """A live interest in the changes of one queue."""

    __slots__ = ("_active", "_callback", "_feed", "_scheduled", "name")

    def __init__(self, feed: ChangeFeed, name: Name, callback: Callable[[], object]) -> None:
        self._feed = feed
        self._callback = callback
        self._active = True
        self._scheduled = False
        self.name = name

    @property
    def active(self) -> bool:
        """False once the feed broke or was closed: subscribe again."""
        return self._active

    def close(self) -> None:
        """End it; harmless when repeated."""
        if self._active:
            self._active = False
            self._feed._forget(self)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        # Through the loop, so that a callback that raises harms no other, and news that comes at once is told once.
        if not self._scheduled:
            self._scheduled = True
            loop.call_soon(self._run)

    def _run(self) -> None:
        self._scheduled = False
        if self._active:
            self._callback()

    def _break(self, loop: asyncio.AbstractEventLoop) -> None:
        self._active = False
        loop.call_soon(self._callback)  # it finds the subscription inactive, and subscribes again


class ChangeFeed:
    """Sends and receives changes among all who share ``directory``.

    ``look`` is asked now and then whether somebody else has written, and calls back with the answer. Belongs to one
    event loop.
    """

    def __init__(
        self, directory: str, *, mode: int, clock: Clock, look: Callable[[Callable[[bool], object]], object]
    ) -> None:
        self._directory = _short(directory)
        self._mode = mode
        self._clock = clock
        self._look = look
        self._subscriptions: dict[Name, list[FeedSubscription]] = {}
        self._socket: socket.socket | None = None
        self._own = ""
        self._inode = 0
        self._sender: socket.socket | None = None
        self._descriptor: int | None = None
        self._listeners: list[str] = []
        self._changed_at = -1
        self._noticed = 0.0
        self._poll: TimerHandle | None = None
        self._linger: TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.numbers = {"sent": 0, "dropped": 0, "received": 0, "listeners_removed": 0}

    # Receiving

    def subscribe(self, namespace: str, queue: str, callback: Callable[[], object]) -> FeedSubscription:
        """Call ``callback`` on the running loop after others changed the queue. Raises StoreError."""
        loop = asyncio.get_running_loop()
        if self._socket is None:
            try:
                self._bind(loop)
            except OSError as error:
                raise StoreError(f"the change feed cannot listen in {self._directory}: {error}") from error
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        if self._poll is None:
            self._look(lambda _: None)  # from here on
            self._poll = self._clock.call_later(POLL, self._tick)
        subscription = FeedSubscription(self, (namespace, queue), callback)
        self._subscriptions.setdefault(subscription.name, []).append(subscription)
        return subscription

    def _bind(self, loop: asyncio.AbstractEventLoop) -> None:
        os.makedirs(self._directory, exist_ok=True)
        receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            receiver.setblocking(False)
            number = 0
            while True:
                name = f"{os.getpid()}-{number}"
                try:
                    receiver.bind(self._address(name))
                    break
                except OSError as error:
                    if not os.path.lexists(os.path.join(self._directory, name)):
                        raise
                    # Taken: by another store of this process, or of a process with this number elsewhere or before.
                    number += 1
                    if number > 10_000:
                        raise error
            path = os.path.join(self._directory, name)
            os.chmod(path, self._mode)
            self._inode = os.stat(path).st_ino
            loop.add_reader(receiver.fileno(), self._receive)
        except BaseException:
            receiver.close()
            raise
        self._socket, self._own, self._loop = receiver, name, loop

    def _receive(self) -> None:
        assert self._socket is not None
        assert self._loop is not None
        names: set[Name] = set()
        everything = False
        count = 0
        while count < 64:  # then let others run; the loop calls again at once
            try:
                data = self._socket.recv(_DATAGRAM)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                self._break()
                return
            count += 1
            try:
                named = _decoder.decode(data)
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue  # not from one of us
            names.update(named)
            everything = everything or not named
        self.numbers["received"] += count
        if everything or count >= _OVERFLOW:
            self._wake_all()
            return
        for name in names:
            for subscription in self._subscriptions.get(name, ()):
                subscription._wake(self._loop)

    def _wake_all(self) -> None:
        assert self._loop is not None
        for subscriptions in self._subscriptions.values():
            for subscription in subscriptions:
                subscription._wake(self._loop)

    def _tick(self) -> None:
        self._poll = None
        if not self._subscriptions:
            return
        try:
            mine = os.stat(os.path.join(self._directory, self._own)).st_ino == self._inode
        except OSError:
            mine = False
        if not mine:
            self._break()
            return
        self._poll = self._clock.call_later(POLL, self._tick)
        self._look(self._looked)

    def _looked(self, changed: bool) -> None:
        if changed and self._subscriptions:
            self._wake_all()

    def _break(self) -> None:
        """Nobody can reach us any more: end all subscriptions and tell their owners."""
        loop, broken = self._loop, self._subscriptions
        self._subscriptions = {}
        self._unbind()
        assert loop is not None
        for subscriptions in broken.values():
            for subscription in subscriptions:
                subscription._break(loop)

    def _forget(self, subscription: FeedSubscription) -> None:
        subscriptions = self._subscriptions.get(subscription.name, [])
        if subscription in subscriptions:
            subscriptions.remove(subscription)
            if not subscriptions:
                del self._subscriptions[subscription.name]
        if not self._subscriptions and self._socket is not None and self._linger is None:
            self._linger = self._clock.call_later(LINGER, self._unbind)

    def _unbind(self) -> None:
        for timer in (self._linger, self._poll):
            if timer is not None:
                timer.cancel()
        self._linger = self._poll = None
        if self._socket is not None:
            assert self._loop is not None
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
            self._unlink(self._own)
            self._own = ""

    # Sending

    def publish(self, names: Iterable[Name]) -> None:
        """Tell all others that these queues changed. Never waits, never raises."""
        listeners = self._others()
        if not listeners:
            return
        named = list(names)
        data = msgspec.msgpack.encode(named if len(named) <= MAX_NAMES else [])
        if self._sender is None:
            self._sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._sender.setblocking(False)
        for name in listeners:
            try:
                self._sender.sendto(data, self._address(name))
                self.numbers["sent"] += 1
            except ConnectionRefusedError:  # its process is gone
                self._unlink(name)
                self.numbers["listeners_removed"] += 1
                self._changed_at = -1
            except FileNotFoundError:
                self._changed_at = -1
            except OSError:  # its buffer is full (it has news to read, and then looks everywhere), or is not for us
                self.numbers["dropped"] += 1

    def _others(self) -> list[str]:
        try:
            changed_at = os.stat(self._directory).st_mtime_ns
        except FileNotFoundError:
            return []
        now = self._clock.monotonic()
        if changed_at != self._changed_at:
            self._changed_at, self._noticed = changed_at, now
        elif now - self._noticed > _UNSETTLED:
            return self._listeners
        own = self._own
        self._listeners = [name for name in os.listdir(self._directory) if name != own]
        return self._listeners

    def _address(self, name: str) -> str:
        path = os.path.join(self._directory, name)
        if len(os.fsencode(path)) <= _LONGEST_PATH:
            return path
        if self._descriptor is None:
            self._descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._descriptor}/{name}"

    def _unlink(self, name: str) -> None:
        try:
            os.unlink(os.path.join(self._directory, name))
        except FileNotFoundError:
            pass
        except PermissionError:
            pass  # another user's, in a sticky directory: its owner's next sender removes it

    # Ending

    def close(self) -> None:
        """End all subscriptions and remove the socket. Repeatable."""
        subscriptions, self._subscriptions = self._subscriptions, {}
        for each in subscriptions.values():
            for subscription in each:
                subscription._active = False
        self._unbind()
        self.abandon()

    def abandon(self) -> None:
        """Close the descriptors and nothing else: what a forked child does with its parent's."""
        for held in (self._socket, self._sender):
            if held is not None:
                held.close()
        self._socket = self._sender = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _short(directory: str) -> str:
    """``directory``, or one that stands for it where its path is too long for a socket's address."""
    longest = len(os.fsencode(os.path.abspath(directory))) + len("/1234567890-12345")
    if longest <= _LONGEST_PATH or os.path.isdir("/proc/self/fd"):
        return directory
    import tempfile

    digest = hashlib.sha256(os.fsencode(os.path.realpath(directory))).hexdigest()[:16]
    path = Path(tempfile.gettempdir(), f"millpond-{os.getuid()}-{digest}")
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
        raise StoreError(f"{path} is not ours alone, so the change feed cannot use it; remove it")
    return str(path)
