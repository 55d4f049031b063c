"""What ``top`` shows of a pond: read at one time, in a bounded number of reads, whatever is in the queues."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec

from millpond.errors import MillpondError

if TYPE_CHECKING:
    from millpond.message import MessageView
    from millpond.pond import Pond
    from millpond.queue import QueueCounts

QUEUES = 100
"""Queues that are counted each time, at most."""
MESSAGES = 500
"""Messages, and dead letters, of a queue that are looked into for holders and errors, at most: the oldest."""
SHORTEST = 0.5
"""Seconds between snapshots from which a rate is told; within less it says little."""
INTERNAL = "millpond."
"""What the names of queues begin with that Millpond keeps for itself: limits, schedules, results."""


class QueueSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """One queue."""

    namespace: str
    queue: str
    counts: QueueCounts
    paused: bool | None
    """None: its policy cannot be read."""
    change: float | None = None
    """By how many messages a second it has grown since the snapshot before (less than 0: shrunk)."""
    dead_change: float | None = None
    """The same for its dead letters."""
    enqueued_rate: float | None = None
    """Messages enqueued per second since then; None where the store does not count them (a bucket)."""
    done_rate: float | None = None
    """Messages that left for good: acked, or (rarely) expired, purged, discarded. None as above."""

    @property
    def waiting(self) -> int:
        """Live messages."""
        counts = self.counts
        return counts.ready + counts.delayed + counts.leased + counts.blocked


class Details(msgspec.Struct, frozen=True, kw_only=True):
    """What the messages of one queue tell, the oldest of them."""

    owners: tuple[tuple[str, int, float], ...] = ()
    """Who holds messages: name, how many, and seconds until the first of his leases ends."""
    errors: tuple[tuple[str, int], ...] = ()
    """Errors of messages that will be tried again, and how many have each."""
    dead: tuple[tuple[str, int], ...] = ()
    """Reasons and errors of dead letters, and how many have each."""
    partial: bool = False
    """There are more messages than were looked into."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A pond at one time."""

    at: int
    """ms UTC."""
    queues: tuple[QueueSnapshot, ...]
    left_out: int = 0
    """Queues beyond the limit."""
    basis: Snapshot | None = None
    """The snapshot from which the next rates are told, where this one came too soon after it to tell any."""


async def take(
    pond: Pond, names: list[tuple[str, str]], *, internal: bool = False, before: Snapshot | None = None
) -> Snapshot:
    """Count these queues. ``before``: the snapshot to tell changes from."""
    shown = [(at, name) for at, name in names if internal or not name.startswith(INTERNAL)]
    now = pond.clock.now_ms()
    basis = before if before is None or before.basis is None else before.basis
    passed = 0.0 if basis is None else (now - basis.at) / 1000
    too_soon = basis is not None and passed < SHORTEST
    # Looks that follow one another quickly are not each other's basis: none of them would ever tell a rate.
    known = before if too_soon else basis
    earlier = {(one.namespace, one.queue): one for one in known.queues} if known is not None else {}
    found = []
    for at, name in shown[:QUEUES]:
        queue = pond.queue(name, namespace=at)
        counts = await queue.counts()
        paused: bool | None
        try:
            paused = (await queue.policy()).paused
        except MillpondError:  # one policy that cannot be read must not hide everything else; the table says which
            paused = None
        one = QueueSnapshot(namespace=at, queue=name, counts=counts, paused=paused)
        last = earlier.get((at, name))
        if last is not None and too_soon:
            one = msgspec.structs.replace(
                one,
                change=last.change,
                dead_change=last.dead_change,
                enqueued_rate=last.enqueued_rate,
                done_rate=last.done_rate,
            )
        elif last is not None:
            one = _changed(one, last, passed)
        found.append(one)
    return Snapshot(
        at=now, queues=tuple(found), left_out=max(0, len(shown) - QUEUES), basis=basis if too_soon else None
    )


def _changed(one: QueueSnapshot, last: QueueSnapshot, passed: float) -> QueueSnapshot:
    """With its rates: what came is counted by the store, and what did not stay has gone."""
    grown, buried = one.waiting - last.waiting, one.counts.dead - last.counts.dead
    came = None
    if one.counts.enqueued is not None and last.counts.enqueued is not None:
        came = one.counts.enqueued - last.counts.enqueued
        if came < 0:  # an emptied queue may have been forgotten, and counted anew
            came = None
    return msgspec.structs.replace(
        one,
        change=grown / passed,
        dead_change=buried / passed,
        enqueued_rate=None if came is None else came / passed,
        done_rate=None if came is None else max(0, came - grown - buried) / passed,
    )


async def details(pond: Pond, one: QueueSnapshot) -> Details:
    """Look into the oldest messages and dead letters of a queue."""
    from millpond.cli.records import error_text

    queue = pond.queue(one.queue, namespace=one.namespace)
    now = pond.clock.now_ms()
    live = await queue.browse(limit=MESSAGES) if one.waiting else []
    dead = await queue.dead_letters.list(limit=MESSAGES) if one.counts.dead else []
    owners: dict[str, list[float]] = {}
    for view in live:
        lease = view.lease
        if lease is not None and lease.until_ms is not None and view.state == "leased":
            owners.setdefault(lease.owner or "(no name)", []).append((lease.until_ms - now) / 1000)
    held = sorted(((who, len(ends), min(ends)) for who, ends in owners.items()), key=lambda each: (-each[1], each[0]))
    failing = Counter(error_text(view.last_error) for view in live if view.last_error is not None)
    given_up = Counter(_why(view, error_text(view.last_error)) for view in dead)
    return Details(
        owners=tuple(held),
        errors=tuple(failing.most_common()),
        dead=tuple(given_up.most_common()),
        partial=len(live) < one.waiting or len(dead) < one.counts.dead,
    )


def _why(view: MessageView, error: str) -> str:
    reason = view.dead_reason or ""
    return f"{reason}: {error}" if error and error not in reason else reason


def record(one: QueueSnapshot, more: Details) -> dict[str, Any]:
    """A queue as a JSON line."""
    from millpond.cli.records import counts

    return {
        **counts(one.namespace, one.queue, one.counts),
        "paused": one.paused,
        "change": one.change,
        "dead_change": one.dead_change,
        "enqueued_rate": one.enqueued_rate,
        "done_rate": one.done_rate,
        "owners": [
            {"owner": who, "messages": number, "lease_ends_in": round(ends, 3)} for who, number, ends in more.owners
        ],
        "errors": [{"error": error, "messages": number} for error, number in more.errors],
        "dead_letters": [{"reason": reason, "messages": number} for reason, number in more.dead],
        "partial": more.partial,
    }
