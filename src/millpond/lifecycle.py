"""The life cycle of a message: one table, pure functions, no I/O.

Two rules. Everything that changes a message goes through `TABLE`; nothing else in Millpond adds to ``attempts``,
clears a lease or decides that a message is dead. And this file knows no store, no clock and no event loop: it is given
the message, the event and the time.

A message in a store is in one of five states, of which two are only a matter of time passing: a DELAYED message is
READY once its visible-at is reached, and a LEASED one has LAPSED once its lease has ended. A lapsed lease stays its
holder's until somebody else is given the message (or it is buried): an answer that comes late but to a message that
nobody took in between is an answer, and refusing it would only cause a duplicate.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import msgspec

from millpond.errors import InvalidInput, LeaseLost
from millpond.model.message import STATUS_FORMAT, DeadLetter, Head, Lease, Status


class State(enum.Enum):
    """Where a message stands at a given time."""

    DELAYED = "delayed"
    READY = "ready"
    LEASED = "leased"
    LAPSED = "lapsed"
    DEAD = "dead"
    GONE = "gone"

    # Members are singletons: identity is their hash. Enum's own hashes the name in Python, three times slower, and
    # every delivery looks the table up.
    __hash__ = object.__hash__


class Event(enum.Enum):
    """What can happen to a message."""

    DELIVER = "deliver"
    ACK = "ack"
    NACK = "nack"
    DEFER = "defer"
    EXTEND = "extend"
    EXHAUST = "exhaust"
    EXPIRE = "expire"
    BURY = "bury"
    DELETE = "delete"
    REDRIVE = "redrive"

    __hash__ = object.__hash__


class LeaseRule(enum.Enum):
    """What becomes of the lease."""

    GRANT = "new, token + 1"
    RENEW = "same, new end"
    CLEAR = "none"


class Change(NamedTuple):
    """The effect of an event. ``failures``/``attempts`` are added; RESET sets them to 0."""

    to: State
    attempts: int = 0
    failures: int = 0
    lease: LeaseRule = LeaseRule.CLEAR
    visible: str = "="
    """For the documentation: from when the message is visible after this event."""


RESET = -1

TABLE: dict[tuple[State, Event], Change] = {
    (State.READY, Event.DELIVER): Change(State.LEASED, 1, 0, LeaseRule.GRANT, "now + visibility"),
    (State.LAPSED, Event.DELIVER): Change(State.LEASED, 1, 1, LeaseRule.GRANT, "now + visibility"),
    (State.LEASED, Event.ACK): Change(State.GONE),
    (State.LAPSED, Event.ACK): Change(State.GONE),
    (State.LEASED, Event.NACK): Change(State.DELAYED, 0, 1, LeaseRule.CLEAR, "now + delay"),
    (State.LAPSED, Event.NACK): Change(State.DELAYED, 0, 1, LeaseRule.CLEAR, "now + delay"),
    (State.LEASED, Event.DEFER): Change(State.DELAYED, 0, 0, LeaseRule.CLEAR, "now + delay"),
    (State.LAPSED, Event.DEFER): Change(State.DELAYED, 0, 0, LeaseRule.CLEAR, "now + delay"),
    (State.LEASED, Event.EXTEND): Change(State.LEASED, 0, 0, LeaseRule.RENEW, "now + extension"),
    (State.LAPSED, Event.EXTEND): Change(State.LEASED, 0, 0, LeaseRule.RENEW, "now + extension"),
    # Exhaustion counts the failure that used up the budget: the holder's nack, or the lease that ran out.
    (State.LEASED, Event.EXHAUST): Change(State.DEAD, 0, 1),
    (State.LAPSED, Event.EXHAUST): Change(State.DEAD, 0, 1),
    (State.READY, Event.EXHAUST): Change(State.DEAD),
    (State.READY, Event.EXPIRE): Change(State.DEAD),
    (State.DELAYED, Event.EXPIRE): Change(State.DEAD),
    (State.LAPSED, Event.EXPIRE): Change(State.DEAD),
    (State.READY, Event.BURY): Change(State.DEAD),
    (State.DELAYED, Event.BURY): Change(State.DEAD),
    (State.LEASED, Event.BURY): Change(State.DEAD),
    (State.LAPSED, Event.BURY): Change(State.DEAD),
    (State.READY, Event.DELETE): Change(State.GONE),
    (State.DELAYED, Event.DELETE): Change(State.GONE),
    (State.LAPSED, Event.DELETE): Change(State.GONE),
    (State.DEAD, Event.DELETE): Change(State.GONE),
    (State.DEAD, Event.REDRIVE): Change(State.READY, RESET, RESET, LeaseRule.CLEAR, "now"),
}
"""(state, event) → what the event does. A pair that is not here cannot happen: the caller is told so."""

HELD = frozenset({State.LEASED, State.LAPSED})
assert all((state, Event.ACK) in TABLE for state in HELD), "whoever holds a message may ack it"

REASON_EXHAUSTED = "max_attempts_exceeded"
REASON_EXPIRED = "expired"


class NotPossible(Exception):
    """The event cannot happen to a message in this state."""

    def __init__(self, state: State, event: Event) -> None:
        super().__init__(f"a {state.value} message cannot {event.value}")
        self.state = state
        self.event = event


# Looking a member up in its class costs as much as making a Status (Python 3.11), so the hot functions use these.
_LEASED, _LAPSED, _DELAYED, _READY, _DEAD = State.LEASED, State.LAPSED, State.DELAYED, State.READY, State.DEAD
_GRANT, _CLEAR = LeaseRule.GRANT, LeaseRule.CLEAR
# An enum member's hash is computed in Python, too.
_DELIVER_READY, _DELIVER_LAPSED = TABLE[State.READY, Event.DELIVER], TABLE[State.LAPSED, Event.DELIVER]


def state_of(status: Status, now: int) -> State:
    """Where the message stands at ``now``."""
    if status.dead is not None:
        return _DEAD
    lease = status.lease
    if lease is not None:
        return _LEASED if lease.until > now else _LAPSED
    return _DELAYED if status.visible_at > now else _READY


def expired(status: Status, now: int) -> bool:
    """Its time to live is over. (A leased message is left to its holder all the same.)"""
    return status.expires_at is not None and status.expires_at <= now


def due(status: Status) -> int:
    """When the message is next worth looking at."""
    return status.visible_at


def new_status(now: int, delay: int, ttl: int | None) -> Status:
    """The status of a message as it is enqueued."""
    return Status(STATUS_FORMAT, now, now + delay, 0, 0, 0, now + ttl if ttl is not None else None, None, None, None)


def _apply(
    event: Event,
    status: Status,
    now: int,
    *,
    visible_at: int | None = None,
    lease: Lease | None = None,
    error: Any = None,
    reason: str | None = None,
) -> Status:
    """The status after ``event``, by the table. Raises NotPossible."""
    state = state_of(status, now)
    change = TABLE.get((state, event))
    if change is None:
        raise NotPossible(state, event)
    return _changed(change, status, now, visible_at, lease, error, reason)


def _changed(
    change: Change,
    status: Status,
    now: int,
    visible_at: int | None,
    lease: Lease | None,
    error: Any,
    reason: str | None,
) -> Status:
    to, attempts, failures, rule, _ = change
    return Status(
        STATUS_FORMAT,
        now,
        status.visible_at if visible_at is None else visible_at,
        0 if attempts == RESET else status.attempts + attempts,
        0 if failures == RESET else status.failures + failures,
        status.token + 1 if rule is _GRANT else status.token,
        status.expires_at,
        None if rule is _CLEAR else lease,
        status.last_error if error is None else error,
        DeadLetter(reason or "", now) if to is _DEAD else None,
    )


class Deliver(msgspec.Struct, frozen=True, gc=False):
    """Hand the message out with this status, which holds the new lease."""

    status: Status


class Bury(msgspec.Struct, frozen=True, gc=False):
    """Make it a dead letter with this status, which holds the reason."""

    status: Status


class Discard(msgspec.Struct, frozen=True, gc=False):
    """Remove it: the queue's policy keeps no dead letters of this kind."""

    reason: str


class Wait(msgspec.Struct, frozen=True, gc=False):
    """Not now; look again at ``due``."""

    due: int


Verdict = Deliver | Bury | Discard | Wait


def _give_up(event: Event, status: Status, now: int, reason: str, keep: bool, error: Any = None) -> Bury | Discard:
    if not keep:
        state = state_of(status, now)
        if (state, event) not in TABLE:
            raise NotPossible(state, event)
        return Discard(reason)
    return Bury(_apply(event, status, now, visible_at=now, error=error, reason=reason))


def deliver(
    head: Head,
    status: Status,
    now: int,
    *,
    visibility: int | None,
    lease_id: str,
    owner: str | None = None,
    txn_id: str | None = None,
    bury_exhausted: bool = True,
    bury_expired: bool = False,
) -> Verdict:
    """What hand-out may do with the message at ``now``: the one place where delay, lease, TTL and budget are judged.

    ``visibility`` is the consumer's wish in ms, None for the message's own. A message whose last lease ran out
    unanswered has failed once more by that; if that was its last chance it is given up here, undelivered.
    """
    state = state_of(status, now)
    if state is _LEASED or state is _DELAYED:
        return Wait(status.visible_at)
    if state is _DEAD:
        raise NotPossible(state, Event.DELIVER)
    change = _DELIVER_READY if state is _READY else _DELIVER_LAPSED
    if status.expires_at is not None and expired(status, now):
        return _give_up(Event.EXPIRE, status, now, REASON_EXPIRED, bury_expired)
    if head.max_attempts and status.failures + change.failures >= head.max_attempts:
        return _give_up(Event.EXHAUST, status, now, REASON_EXHAUSTED, bury_exhausted)
    until = now + (head.visibility if visibility is None else visibility)
    # _changed(), written out: this is paid per delivery.
    token = status.token + 1
    return Deliver(
        Status(
            STATUS_FORMAT,
            now,
            until,
            status.attempts + change.attempts,
            status.failures + change.failures,
            token,
            status.expires_at,
            Lease(lease_id, token, until, owner, txn_id),
            status.last_error,
            None,
        )
    )


def check_lease(status: Status | None, lease_id: str, token: int) -> Lease:
    """The message's lease, if it is the one named. Raises LeaseLost (also for None: the message is gone)."""
    lease = None if status is None else status.lease
    if lease is None or lease.token != token or lease.id != lease_id:
        raise LeaseLost(f"{_why_lost(status, lease_id, token)}; nothing was changed")
    return lease


def _why_lost(status: Status | None, lease_id: str, token: int) -> str:
    """Why the named lease is not the message's, as far as its record tells: who reads it has to find out whether a
    worker was too slow or an answer was made up."""
    if status is None:
        return "the message is gone: it was acked, removed, or never in this queue"
    if status.dead is not None:
        return f"the message is a dead letter ({status.dead.reason}), which nobody holds; redrive it to have it again"
    named = f"lease {lease_id} (token {token})"
    if token > status.token:
        given = f"its last token is {status.token}" if status.token else "it was not delivered yet"
        return f"{named} was never given for this message: {given}"
    if token < status.token:
        return f"{named} is over: the message has been delivered again since (token {status.token})"
    if status.lease is not None:
        return f"{named} was never given: token {token} belongs to another lease id"
    # The lease's id went with it; the token says which delivery it was.
    return f"{named} is over: the message was given back, or redriven, and nobody holds it now"


def ack(status: Status | None, lease_id: str, token: int) -> None:
    """The holder is done. Raises LeaseLost; otherwise record, payload and state may go."""
    lease = None if status is None else status.lease
    if lease is None or lease.token != token or lease.id != lease_id:
        check_lease(status, lease_id, token)


def nack(
    head: Head,
    status: Status | None,
    now: int,
    lease_id: str,
    token: int,
    *,
    delay: int,
    error: Any = None,
    bury_exhausted: bool = True,
) -> Status | Bury | Discard:
    """The holder failed: one more failure, visible again after ``delay`` ms; or given up at once if that was the last.

    ``error`` None keeps the error of an earlier failure. Raises LeaseLost.
    """
    check_lease(status, lease_id, token)
    assert status is not None
    if head.max_attempts and status.failures + 1 >= head.max_attempts:
        return _give_up(Event.EXHAUST, status, now, REASON_EXHAUSTED, bury_exhausted, error)
    return _apply(Event.NACK, status, now, visible_at=now + delay, error=error)


def defer(status: Status | None, now: int, lease_id: str, token: int, *, delay: int) -> Status:
    """The holder gives it back without a failure, visible after ``delay`` ms. Raises LeaseLost."""
    check_lease(status, lease_id, token)
    assert status is not None
    return _apply(Event.DEFER, status, now, visible_at=now + delay)


def extend(status: Status | None, now: int, lease_id: str, token: int, *, extension: int) -> Status:
    """The holder needs until now + ``extension`` ms. Raises LeaseLost, and InvalidInput unless ``extension`` > 0."""
    if extension <= 0:
        raise InvalidInput("an extension must be longer than 0; to give the message back, defer or nack it")
    lease = check_lease(status, lease_id, token)
    assert status is not None
    until = now + extension
    renewed = Lease(lease.id, lease.token, until, lease.owner, lease.txn_id)
    return _apply(Event.EXTEND, status, now, visible_at=until, lease=renewed)


def expire(status: Status, now: int, *, bury: bool) -> Bury | Discard | Wait:
    """What the collector may do with a message at ``now``; a held one is left to its holder.

    Raises NotPossible for a dead letter: those do not expire.
    """
    if not expired(status, now) or state_of(status, now) is State.LEASED:
        return Wait(status.visible_at)
    return _give_up(Event.EXPIRE, status, now, REASON_EXPIRED, bury)


def bury(status: Status, now: int, reason: str, *, error: Any = None) -> Status:
    """A dead letter, by decision of a person or of the holder; the last error stays unless ``error`` is given.

    Raises NotPossible if it is one already."""
    return _apply(Event.BURY, status, now, visible_at=now, error=error, reason=reason)


def annotate(status: Status, now: int, error: Any) -> Status:
    """The same status with another last error; no event of the life cycle."""
    return Status(
        status.format,
        now,
        status.visible_at,
        status.attempts,
        status.failures,
        status.token,
        status.expires_at,
        status.lease,
        error,
        status.dead,
    )


def redrive(head: Head, status: Status, now: int) -> Status:
    """Out of the dead letters, with a new budget and a new time to live; the token goes on growing."""
    fresh = _apply(Event.REDRIVE, status, now, visible_at=now)
    if head.ttl is None:
        return fresh
    return Status(
        fresh.format,
        fresh.updated_at,
        fresh.visible_at,
        fresh.attempts,
        fresh.failures,
        fresh.token,
        now + head.ttl,
        None,
        fresh.last_error,
        None,
    )


def deletable(status: Status, now: int) -> bool:
    """It may be purged: nobody holds it."""
    return (state_of(status, now), Event.DELETE) in TABLE
