"""What Millpond keeps about a message, frozen.

A message is two records. ``Head`` is written once, at the enqueue. ``Status`` is replaced at every step of the life
cycle; it is small, because it is what each claim writes. Both are MessagePack arrays whose first element is the format
version; fields are only ever added at the end, with a default, so that old records stay readable.

All times are integer milliseconds UTC. All durations in records are integer milliseconds.
"""

from __future__ import annotations

from typing import Any

import msgspec

HEAD_FORMAT = 1
STATUS_FORMAT = 1

PRIORITIES = range(10)
DEFAULT_PRIORITY = 5


class Lease(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The right to answer for one delivery of a message."""

    id: str
    token: int
    """The fencing token: > 0, one more with each delivery of this message, for ever."""
    until: int
    """When the lease ends (ms UTC); from then on the message may be delivered again."""
    owner: str | None = None
    txn_id: str | None = None


class DeadLetter(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Why and when a message was given up."""

    reason: str
    at: int


class Head(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What never changes after the enqueue."""

    format: int
    id: str
    namespace: str
    queue: str
    enqueued_at: int
    priority: int
    max_attempts: int
    """Failures that the message survives before it is a dead letter; 0 = without limit."""
    visibility: int
    """How long a delivery may take, ms, unless the consumer asks otherwise. A lease's length never overwrites it."""
    ttl: int | None
    dedup_key: str | None
    ordering_key: str | None
    attributes: dict[str, Any] | None
    correlation_id: str | None
    content_type: str | None
    payload_size: int
    external: bool
    """The payload is a blob of its own, not part of the record."""
    checksum: int | None = None
    """CRC-32 of the payload, against decay of what it is stored on; None in records from before there was one."""


class Status(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What the life cycle changes."""

    format: int
    updated_at: int
    visible_at: int
    attempts: int
    failures: int
    token: int
    """The last fencing token given out; 0 before the first delivery."""
    expires_at: int | None
    lease: Lease | None
    last_error: Any
    dead: DeadLetter | None
