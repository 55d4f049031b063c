"""Defaults, limits and per-queue policy."""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

from millpond.errors import InvalidInput, StoreCorrupt, StoreMismatch
from millpond.model.message import DEFAULT_PRIORITY

MAX_SECONDS = 100 * 366 * 86_400.0
"""A century: longer durations are mistakes (milliseconds given as seconds), and sums stay far inside 64 bits."""


MAX_ATTEMPTS = 1_000_000
"""Largest failure budget; more is a slip, and 0 says "without limit"."""


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Defaults and limits of a pond. Durations are seconds. None of it is stored: it is this process's view."""

    default_visibility: float = 30.0
    default_max_attempts: int = 5
    """Failures until a message is a dead letter; 0 = never."""
    default_ttl: float | None = None
    default_dedup_window: float = 300.0
    """Five minutes, the window that users of SQS FIFO queues know."""
    max_payload_bytes: int = 16 * 1024**3
    max_attributes_bytes: int = 64 * 1024
    max_error_bytes: int = 16 * 1024
    max_state_bytes: int = 1024 * 1024
    ready_cache_size: int = 4096
    """Descriptors kept per queue; what bounds memory under any backlog."""
    ready_page_size: int = 512
    """Descriptors fetched by one refill: large enough to share the read, small enough not to hold up the loop."""
    policy_max_age: float = 1.0
    """How old this process's copy of a queue's policy may be; another process's pause takes effect within it."""
    orphan_age: float = 3600.0
    """Payloads without a record are collected when older than this; an upload must finish within it."""
    poll_interval: float = 3.0
    poll_jitter: float = 0.5
    poll_max_interval: float = 60.0
    resilient_poll_interval: float = 300.0
    max_consumers: int = 4096
    page_size: int = 32
    collect_interval: float = 30.0
    """Seconds between the collector's passes (expired messages, orphans)."""

    def __post_init__(self) -> None:
        for name in ("default_visibility", "default_dedup_window", "policy_max_age", "poll_interval", "orphan_age"):
            if not 0 < getattr(self, name) <= MAX_SECONDS:
                raise InvalidInput(f"{name} must be more than 0 seconds and less than a century")
        if self.default_ttl is not None and not 0 < self.default_ttl <= MAX_SECONDS:
            raise InvalidInput("default_ttl must be more than 0 seconds, or None for no expiry")
        for name in ("default_max_attempts",):
            if not 0 <= getattr(self, name) <= MAX_ATTEMPTS:
                raise InvalidInput(f"{name} must be from 1 to {MAX_ATTEMPTS:,} (0 means without limit)")
        for name in ("ready_cache_size", "ready_page_size", "max_consumers", "page_size"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} must be at least 1")


class QueuePolicy(msgspec.Struct, frozen=True, kw_only=True):
    """What a queue's messages get unless their producer says otherwise. Stored with the queue; None = the pond's
    default. Durations are seconds."""

    default_visibility: float | None = None
    max_attempts: int | None = None
    ttl: float | None = None
    on_expired: Literal["discard", "dead_letter"] = "discard"
    on_exhausted: Literal["dead_letter", "discard"] = "dead_letter"
    dedup_window: float | None = None
    paused: bool = False
    """Nothing is handed out while it is set; producers and holders go on."""

    def __post_init__(self) -> None:
        for name in ("default_visibility", "ttl", "dedup_window"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= MAX_SECONDS:
                raise InvalidInput(f"{name} must be more than 0 seconds and less than a century, or None")
        if self.max_attempts is not None and not 0 <= self.max_attempts <= MAX_ATTEMPTS:
            raise InvalidInput(f"max_attempts must be from 1 to {MAX_ATTEMPTS:,} (0 means without limit)")
        if self.on_expired not in ("discard", "dead_letter"):
            raise InvalidInput("on_expired must be 'discard' or 'dead_letter'")
        if self.on_exhausted not in ("discard", "dead_letter"):
            raise InvalidInput("on_exhausted must be 'dead_letter' or 'discard'")


POLICY_FORMAT = 1


class _PolicyDocument(msgspec.Struct, frozen=True):
    format: int
    policy: QueuePolicy


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_PolicyDocument)


def encode_policy(policy: QueuePolicy) -> bytes:
    """The policy as its queue's document."""
    return _encoder.encode(_PolicyDocument(POLICY_FORMAT, policy))


def decode_policy(data: bytes, name: str) -> QueuePolicy:
    """The policy in a queue's document. Raises StoreCorrupt, StoreMismatch."""
    try:
        document = _decoder.decode(data)
    except msgspec.DecodeError as error:
        raise StoreCorrupt(f"policy of queue {name} cannot be decoded: {error}") from error
    if document.format > POLICY_FORMAT:
        raise StoreMismatch(f"policy of queue {name} has format {document.format}; this Millpond reads {POLICY_FORMAT}")
    return document.policy


class EnqueueOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Optional parameters of an enqueue. Durations are seconds; None = the queue's policy, then the pond's default."""

    delay: float = 0.0
    ttl: float | None = None
    priority: int = DEFAULT_PRIORITY
    """0-9, higher first."""
    max_attempts: int | None = None
    visibility: float | None = None
    attributes: dict[str, Any] | None = None
    dedup_key: str | None = None
    dedup_window: float | None = None
    ordering_key: str | None = None
    content_type: str | None = None
    correlation_id: str | None = None
    message_id: str | None = None
    """An id of the caller's own (a UUID): a second enqueue with it is answered with the first message."""


DEFAULT_OPTIONS = EnqueueOptions()


def milliseconds(seconds: float, what: str, *, positive: bool = False) -> int:
    """Seconds as integer milliseconds, rounded up so that nothing is visible early. Raises InvalidInput."""
    if seconds.__class__ is not float and seconds.__class__ is not int:
        total = getattr(seconds, "total_seconds", None)
        if total is None or isinstance(seconds, bool):
            raise InvalidInput(f"{what} must be a number of seconds, not {seconds!r}")
        seconds = total()
    if not 0 <= seconds <= MAX_SECONDS:
        raise InvalidInput(f"{what} must be between 0 seconds and a century, not {seconds!r}")
    result = math.ceil(round(seconds * 1000, 3))
    if positive and result <= 0:
        raise InvalidInput(f"{what} must be more than 0 seconds")
    return result
