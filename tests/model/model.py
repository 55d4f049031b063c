"""The queue as its documentation describes it, in the plainest Python: what the real one is compared with.

It shares no code with Millpond. All times are ms. A rule that the documentation leaves open (when a message whose time
is over is settled, which of two competing processes gets what) is not decided here: the real queue is asked what it
did, and the model says whether it was allowed to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any


class LeaseIsLost(Exception):
    """The model refuses an answer."""


class NotAllowed(AssertionError):
    """The real queue did something that the model does not allow."""


def require(condition: object, what: str) -> None:
    """Raise NotAllowed unless ``condition`` holds."""
    if not condition:
        raise NotAllowed(what)


@dataclass
class Msg:
    """A message in the live box or the dead one."""

    id: str
    rank: int
    entered: int
    """Its place in its ordering group."""
    payload: bytes
    priority: int
    group: str | None
    max_attempts: int
    visibility: int
    ttl: int | None
    due: int
    expires: int | None
    attempts: int = 0
    failures: int = 0
    token: int = 0
    lease: tuple[str, int] | None = None
    """(lease id, token); it ends at ``due``."""
    last_error: Any = None
    dead: str | None = None
    state: Any = None

    def held(self, now: int) -> bool:
        """Somebody's lease runs."""
        return self.dead is None and self.lease is not None and self.due > now

    def over(self, now: int) -> bool:
        """Hand-out would settle it instead of delivering it."""
        failures = self.failures + (self.lease is not None)
        return (self.expires is not None and self.expires <= now) or 0 < self.max_attempts <= failures

    def facts(self) -> tuple[Any, ...]:
        """What can be seen of it in a store."""
        return (
            self.payload,
            self.priority,
            self.group,
            self.max_attempts,
            self.due,
            self.expires,
            self.attempts,
            self.failures,
            self.token,
            self.lease,
            self.last_error,
            self.dead,
            self.state,
        )


@dataclass
class Model:
    """One queue."""

    keep_expired: bool = False
    keep_exhausted: bool = True
    messages: dict[str, Msg] = field(default_factory=dict)
    gone: dict[str, str] = field(default_factory=dict)
    """id → how it ended: acked, purged, expired, exhausted."""
    unique: dict[str, tuple[int, str]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    """id → the last token that a delivery was seen with."""
    counter: int = 0

    def copy(self) -> Model:
        """An independent copy."""
        return copy.deepcopy(self)

    def next(self) -> int:
        """A number greater than all before."""
        self.counter += 1
        return self.counter

    # What is there

    def live(self) -> list[Msg]:
        """In order of insertion."""
        return sorted((m for m in self.messages.values() if m.dead is None), key=lambda m: m.rank)

    def dead(self) -> list[Msg]:
        """In order of insertion."""
        return sorted((m for m in self.messages.values() if m.dead is not None), key=lambda m: m.rank)

    def blocked(self, message: Msg) -> bool:
        """An earlier message of its group is live."""
        return message.group is not None and any(
            other.group == message.group and other.entered < message.entered for other in self.live()
        )

    def due(self, now: int) -> list[Msg]:
        """What hand-out may look at, in its order."""
        found = [m for m in self.live() if m.due <= now and not self.blocked(m)]
        return sorted(found, key=lambda m: (-m.priority, m.due, m.rank))

    def deliverable(self, now: int) -> list[Msg]:
        """What may be delivered, in hand-out order."""
        return [m for m in self.due(now) if not m.over(now)]

    def counts(self, now: int) -> tuple[int, ...]:
        """ready, delayed, leased, blocked, dead, bytes, age of the oldest in ms or -1."""
        live = self.live()
        due = self.due(now)
        leased = [m for m in live if m.held(now)]
        blocked = [m for m in live if self.blocked(m) and not m.held(now)]
        delayed = len(live) - len(due) - len(leased) - len(blocked)
        age = max((now - m.due for m in due), default=-1)
        return len(due), delayed, len(leased), len(blocked), len(self.dead()), sum(len(m.payload) for m in live), age

    # Producers

    def enqueue(
        self,
        id: str,
        duplicate: bool,
        now: int,
        *,
        payload: bytes,
        delay: int,
        ttl: int | None,
        priority: int,
        max_attempts: int,
        visibility: int,
        dedup: tuple[str, int] | None,
        group: str | None,
    ) -> None:
        """The queue answered an enqueue with ``id``."""
        expected = self.unique.get(dedup[0]) if dedup is not None else None
        if expected is not None and expected[0] > now:
            require((id, duplicate) == (expected[1], True), "an enqueue within the dedup window made a second message")
            return
        require(not duplicate, "a first enqueue was called a duplicate")
        require(id not in self.messages and id not in self.gone, "a message id was given out twice")
        if dedup is not None:
            self.unique[dedup[0]] = (now + dedup[1], id)
        number = self.next()
        expires = None if ttl is None else now + ttl
        self.messages[id] = Msg(
            id, number, number, payload, priority, group, max_attempts, visibility, ttl, now + delay, expires
        )

    # Consumers

    def settle(self, now: int, standing: Callable[[str], str]) -> None:
        """Take over what hand-out settled. ``standing`` tells of an id: live, dead or gone."""
        while True:
            settled = [m for m in self.due(now) if m.over(now) and standing(m.id) != "live"]
            if not settled:
                return
            for message in settled:
                self._give_up(message, now)

    def _give_up(self, message: Msg, now: int) -> None:
        expired = message.expires is not None and message.expires <= now
        if self.keep_expired if expired else self.keep_exhausted:
            if not expired and message.lease is not None:
                message.failures += 1
            self._bury(message, now, "expired" if expired else "max_attempts_exceeded")
        else:
            self._remove(message, "expired" if expired else "exhausted")

    def _bury(self, message: Msg, now: int, reason: str) -> None:
        message.lease, message.dead, message.due = None, reason, now

    def _remove(self, message: Msg, how: str) -> None:
        del self.messages[message.id]
        self.gone[message.id] = how

    def deliver(self, id: str, lease: tuple[str, int], now: int, visibility: int | None) -> None:
        """The queue delivered a message."""
        require(id not in self.gone, f"a message that was {self.gone.get(id)} was delivered again")
        require(id in self.messages, "a message was delivered that nobody enqueued")
        message = self.messages[id]
        require(not message.held(now), "a message was delivered while somebody held it")
        require(message in self.deliverable(now), "a message was delivered that must not be now")
        require(lease[1] > self.tokens.get(id, 0), "a fencing token did not rise")
        require(lease[1] == message.token + 1, "a fencing token did not rise by one")
        message.failures += message.lease is not None
        message.attempts += 1
        message.token = self.tokens[id] = lease[1]
        message.lease = lease
        message.due = now + (message.visibility if visibility is None else visibility)
        if message.group is not None:
            holders = [m for m in self.live() if m.group == message.group and m.held(now)]
            require(len(holders) <= 1, "two messages of one ordering key are held at once")

    def _held(self, id: str, lease: tuple[str, int]) -> Msg:
        message = self.messages.get(id)
        if message is None or message.lease != lease:
            raise LeaseIsLost
        return message

    def ack(self, id: str, lease: tuple[str, int]) -> None:
        """Raises LeaseIsLost."""
        self._remove(self._held(id, lease), "acked")

    def nack(self, id: str, lease: tuple[str, int], now: int, delay: int, error: Any) -> None:
        """Raises LeaseIsLost."""
        message = self._held(id, lease)
        if 0 < message.max_attempts <= message.failures + 1 and not self.keep_exhausted:
            self._remove(message, "exhausted")
            return
        message.failures += 1
        message.lease, message.due = None, now + delay
        if error is not None:
            message.last_error = error
        if 0 < message.max_attempts <= message.failures:
            self._bury(message, now, "max_attempts_exceeded")

    def defer(self, id: str, lease: tuple[str, int], now: int, delay: int) -> None:
        """Raises LeaseIsLost."""
        message = self._held(id, lease)
        message.lease, message.due = None, now + delay

    def extend(self, id: str, lease: tuple[str, int], now: int, extension: int) -> None:
        """Raises LeaseIsLost."""
        self._held(id, lease).due = now + extension

    def bury(self, id: str, lease: tuple[str, int], now: int, reason: str) -> None:
        """Raises LeaseIsLost."""
        self._bury(self._held(id, lease), now, reason)

    def save(self, id: str, lease: tuple[str, int], value: Any) -> None:
        """Raises LeaseIsLost."""
        self._held(id, lease).state = value

    # Operators

    def purge(self, now: int) -> int:
        """What nobody holds goes."""
        free = [m for m in self.live() if not m.held(now)]
        for message in free:
            self._remove(message, "purged")
        return len(free)

    def purge_dead(self, ids: Iterable[str]) -> None:
        """These dead letters go."""
        for id in ids:
            self._remove(self.messages[id], "purged")

    def redrive(self, ids: Iterable[str], now: int) -> None:
        """These dead letters come back, in this order, as the last of their groups."""
        for id in ids:
            message = self.messages[id]
            message.attempts = message.failures = 0
            message.dead, message.lease, message.due = None, None, now
            if message.ttl is not None:
                message.expires = now + message.ttl
            message.entered = self.next()

    def collect(self, now: int) -> None:
        """Whatever is over and held by nobody is settled; dedup windows that have ended are forgotten."""
        for message in self.live():
            if message.expires is not None and message.expires <= now and not message.held(now):
                self._give_up(message, now)
        self.unique = {key: entry for key, entry in self.unique.items() if entry[0] > now}
