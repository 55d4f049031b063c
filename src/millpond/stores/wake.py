"""The change feed of one host: who writes tells who listens, by unix datagrams.

Everyone who has a subscription binds a socket in a directory beside the data; everyone who writes sends the names of
the queues that changed to all sockets there but its own. A datagram takes 0.09 ms where polling every 5 ms takes 1.9
(measured), nothing is sent while nobody listens, and a process that dies leaves nothing but a file that the next sender
removes. Nothing is promised: a full buffer drops news, a directory may be cleaned up. So each listener also asks at a
low rate whether the data has changed at all, and then looks everywhere.
"""

from __future__ import annotations

import asyncio
import enum
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
_EVERYTHING = msgspec.msgpack.encode([])

OWED = 0.01
"""Seconds until who could not be told is told to look everywhere, where senders see to that."""
OWED_TRIES = 8

Name = tuple[str, str]


class Kind(enum.IntEnum):
    """What is told of a queue."""

    CHANGED = 0
    """Look for yourself."""
    YOURS = 1
    """These appeared, and are the receiver's to take if somebody waits there."""
    OTHERS = 2
    """These are another's to take, who was told so."""
    ANYBODY = 3
    """Nobody waits for these: they are for the first who does."""
    TAKEN = 4
    """These were taken."""


class News(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What one datagram tells of one queue."""

    namespace: str
    queue: str
    kind: int = Kind.CHANGED
    names: tuple[str, ...] = ()
    """Of messages, in the store's own words."""
    due: int = 0
    """When they may be taken, ms UTC."""


_decoder = msgspec.msgpack.Decoder(list[News])


class FeedSubscription:
    """A live interest in the changes of one queue."""

    __slots__ = ("_active", "_callback", "_feed", "_scheduled", "attended", "name")

    def __init__(self, feed: ChangeFeed, name: Name, callback: Callable[[], object]) -> None:
        self._feed = feed
        self._callback = callback
        self._active = True
        self._scheduled = False
        self.name = name
        self.attended = False
        """News that name messages are somebody else's to hear, who tells its owner."""

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

    ``look`` is asked now and then whether somebody else has written, and calls back with the answer. ``heard`` is given
    the news that name messages. Belongs to one event loop.
    """

    def __init__(
        self,
        directory: str,
        *,
        mode: int,
        clock: Clock,
        look: Callable[[Callable[[bool], object]], object],
        heard: Callable[[News], object] | None = None,
    ) -> None:
        self._heard = heard
        self._owed: dict[str, int] = {}
        """Listeners that could not be told something → how often that was tried."""
        self._owing: TimerHandle | None = None
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
        named: list[News] = []
        everything = False
        count = vague = 0
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
                told = _decoder.decode(data)
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue  # not from one of us
            vague += 1
            for news in told:
                if self._heard is None or news.kind == Kind.CHANGED:
                    names.add((news.namespace, news.queue))
                else:
                    named.append(news)
            if told and named and named[-1] is told[-1]:
                vague -= 1  # Who sends names sees to it himself that none get lost.
            everything = everything or not told
        self.numbers["received"] += count
        if everything or vague >= _OVERFLOW:
            self._wake_all()
        else:
            for name in names:
                for subscription in self._subscriptions.get(name, ()):
                    subscription._wake(self._loop)
        for news in named:
            if news.kind != Kind.TAKEN:
                for subscription in self._subscriptions.get((news.namespace, news.queue), ()):
                    if not subscription.attended:
                        subscription._wake(self._loop)
            if self._heard is not None:
                self._heard(news)

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
        listeners = self.others()
        if not listeners:
            return
        named = list(names)
        data = msgspec.msgpack.encode(named if len(named) <= MAX_NAMES else [])
        for name in listeners:
            self._send(name, data, self._heard is not None)

    def tell(self, listener: str, news: list[News], *, insist: bool = False) -> bool:
        """Tell one of `others`. Never waits; False: it is gone, or has too much to read. ``insist``: if it has too
        much, it is told a moment later that it has to look everywhere."""
        return self._send(listener, msgspec.msgpack.encode(news), insist)

    def _send(self, name: str, data: bytes, insist: bool) -> bool:
        if self._sender is None:
            self._sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._sender.setblocking(False)
        try:
            self._sender.sendto(data, self._address(name))
            self.numbers["sent"] += 1
        except ConnectionRefusedError:  # its process is gone
            self._unlink(name)
            self.numbers["listeners_removed"] += 1
            self._changed_at = -1
            return False
        except FileNotFoundError:
            self._changed_at = -1
            return False
        except OSError:  # its buffer is full (it has news to read, and then looks everywhere), or is not for us
            self.numbers["dropped"] += 1
            if insist:
                # What has names does not let it look everywhere: it is told to.
                self._owed[name] = self._owed.get(name, 0) + 1
                if self._owing is None:
                    self._owing = self._clock.call_later(OWED * 2 ** (self._owed[name] - 1), self._pay)
            return False
        return True

    def _pay(self) -> None:
        self._owing = None
        owed, self._owed = self._owed, {}
        for name, tries in owed.items():
            if tries <= OWED_TRIES:
                self._owed[name] = tries
                if self._send(name, _EVERYTHING, True) or name not in self._others():
                    self._owed.pop(name, None)

    @property
    def own(self) -> str:
        """Its own name among the listeners; empty while it is none."""
        return self._own

    def others(self) -> list[str]:
        """The listeners that there are, but for itself. To be left as it is."""
        return self._others()

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
        if self._owing is not None:
            self._owing.cancel()
            self._owing = None
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
