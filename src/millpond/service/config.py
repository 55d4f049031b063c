"""Defaults, limits and per-queue policy."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any, Literal, NamedTuple, TypedDict

import msgspec

from millpond.errors import InvalidInput, StoreCorrupt, StoreMismatch, TooLarge
from millpond.model.codec import encode_value
from millpond.model.message import DEFAULT_PRIORITY, PRIORITIES
from millpond.model.names import message_id
from millpond.model.text import clipped_to_bytes, text_of

MAX_SECONDS = 100 * 366 * 86_400.0
"""A century: longer durations are mistakes (milliseconds given as seconds), and sums stay far inside 64 bits."""
MAX_ATTEMPTS = 1_000_000
"""Largest failure budget; who wants more wants 0, which is none."""


def _duration(name: str, value: Any, *, zero: bool = False) -> None:
    # Not everything that `milliseconds` takes may stand in a record that is read back as a number.
    if value.__class__ is not float and value.__class__ is not int:
        raise InvalidInput(f"{name} must be a number of seconds, not {value!r}")
    milliseconds(value, name, positive=not zero)


def _whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    if value.__class__ is not int or value < least or (most is not None and value > most):
        upto = "" if most is None else f" and at most {most:,}"
        raise InvalidInput(f"{name} must be a whole number, at least {least}{upto}, not {value!r}")


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Defaults and limits of a pond. Durations are seconds. None of it is stored: it is this process's view."""

    default_visibility: float = 30.0
    """How long a lease lasts, where neither consumer, message nor policy says. More than 0."""
    default_max_attempts: int = 5
    """Failures until a message is a dead letter; 0 = never."""
    default_ttl: float | None = None
    """How long after its enqueue a message may be delivered, where neither it nor the policy says; None = for ever."""
    default_dedup_window: float = 300.0
    """Five minutes, the window that users of SQS FIFO queues know."""
    retry_window: float = 600.0
    """For how long at least the store knows that an enqueue by way of a server was carried out, whatever has become of
    its message, so that a client which got no reply can send it again: twenty times a client's time-out. 0: not at all.
    """
    max_payload_bytes: int = 16 * 1024**3
    """16 GiB. A larger payload is refused with TooLarge."""
    max_attributes_bytes: int = 64 * 1024
    """Of a message's attributes as MessagePack; more is TooLarge."""
    max_error_bytes: int = 16 * 1024
    """Of a last error or a reason as MessagePack; more is TooLarge, but exceptions are cut."""
    max_state_bytes: int = 1024 * 1024
    """Of a state document as MessagePack; more is TooLarge."""
    ready_cache_size: int = 4096
    """Descriptors kept per queue; what bounds memory under any backlog."""
    ready_page_size: int = 512
    """Descriptors fetched by one refill: large enough to share the read, small enough not to hold up the loop."""
    thrifty_page_size: int = 128
    """The same where requests cost money, unless more are wanted at once. A consumer begins with few and doubles that
    up to this while it meets no other, so that processes side by side do not all pay for reading the same messages."""
    policy_max_age: float | None = None
    """How old this process's copy of a queue's policy may be; another process's pause takes effect within it. None: a
    second, or a minute where requests cost money."""
    orphan_age: float = 3600.0
    """Payloads without a record are collected when older than this; an upload must finish within it."""
    poll_interval: float = 3.0
    """Until who waits looks again where nobody tells of changes; it doubles while nothing is found."""
    poll_jitter: float = 0.5
    """Up to so much more each time, by chance, so that processes do not look together. 0 or more."""
    poll_max_interval: float = 60.0
    """Longest that such an interval gets."""
    resilient_poll_interval: float = 300.0
    """Until who waits looks again where changes are told of: in case one was not."""
    max_consumers: int = 4096
    """Consumers that may wait at once in this pond; one more gets TooManyConsumers."""
    page_size: int = 32
    """Candidates asked for at once for those who wait; `ready_page_size` if that is more."""
    collect_interval: float | None = None
    """Seconds between the collector's passes (expired messages, orphans). None: 30, or 3,600 where requests cost money;
    there only a pond that has consumed since the last pass makes another."""

    def __post_init__(self) -> None:
        for name in (
            *("default_visibility", "default_dedup_window", "orphan_age"),
            *("poll_interval", "poll_max_interval", "resilient_poll_interval"),
        ):
            _duration(name, getattr(self, name))
        _duration("poll_jitter", self.poll_jitter, zero=True)
        _duration("retry_window", self.retry_window, zero=True)
        for name in ("default_ttl", "policy_max_age", "collect_interval"):
            if getattr(self, name) is not None:
                _duration(name, getattr(self, name))
        _whole("default_max_attempts", self.default_max_attempts, 0, MAX_ATTEMPTS)
        for name in ("max_payload_bytes", "max_attributes_bytes", "max_error_bytes", "max_state_bytes"):
            _whole(name, getattr(self, name), 0)
        for name in ("ready_cache_size", "ready_page_size", "thrifty_page_size", "max_consumers", "page_size"):
            _whole(name, getattr(self, name), 1)

    def policy_age(self, costs: bool) -> float:
        """`policy_max_age`, where requests cost money or do not."""
        return (60.0 if costs else 1.0) if self.policy_max_age is None else self.policy_max_age

    def collecting(self, costs: bool) -> float:
        """`collect_interval`, where requests cost money or do not."""
        return (3600.0 if costs else 30.0) if self.collect_interval is None else self.collect_interval


class QueuePolicy(msgspec.Struct, frozen=True, kw_only=True):
    """What a queue's messages get unless their producer says otherwise. Stored with the queue; None = the pond's
    default. Durations are seconds."""

    default_visibility: float | None = None
    """How long a lease lasts unless message or consumer say otherwise."""
    max_attempts: int | None = None
    """Failures until a message is a dead letter, up to 1,000,000; 0 = never."""
    ttl: float | None = None
    """How long after its enqueue a message may be delivered."""
    on_expired: Literal["discard", "dead_letter"] = "discard"
    """What becomes of a message whose time to live is over."""
    on_exhausted: Literal["dead_letter", "discard"] = "dead_letter"
    """What becomes of a message that has failed as often as it may."""
    dedup_window: float | None = None
    """For how long a dedup key holds."""
    paused: bool = False
    """Nothing is handed out while it is set; producers and holders go on."""

    def __post_init__(self) -> None:
        # The policy is stored: one that cannot be read back, or that no message can be enqueued under, would close its
        # queue to everybody. So types are checked, and durations by what reads them.
        for name in ("default_visibility", "ttl", "dedup_window"):
            value = getattr(self, name)
            if value is not None:
                _duration(name, value)
        if self.max_attempts is not None:
            _whole("max_attempts", self.max_attempts, 0, MAX_ATTEMPTS)
        if self.on_expired not in ("discard", "dead_letter"):
            raise InvalidInput("on_expired must be 'discard' or 'dead_letter'")
        if self.on_exhausted not in ("discard", "dead_letter"):
            raise InvalidInput("on_exhausted must be 'dead_letter' or 'discard'")
        if self.paused.__class__ is not bool:
            raise InvalidInput(f"paused must be True or False, not {self.paused!r}")


class PolicyFields(TypedDict, total=False):
    """The fields of `QueuePolicy` as keyword parameters, each of which may be left out; for type checkers."""

    default_visibility: float | None
    max_attempts: int | None
    ttl: float | None
    on_expired: Literal["discard", "dead_letter"]
    on_exhausted: Literal["dead_letter", "discard"]
    dedup_window: float | None
    paused: bool


POLICY_FORMAT = 1


class _PolicyDocument(msgspec.Struct, frozen=True):
    format: int
    policy: QueuePolicy


class _Format(msgspec.Struct, frozen=True):
    """What every format of the document has."""

    format: int


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_PolicyDocument)
_format_decoder = msgspec.msgpack.Decoder(_Format)


def encode_policy(policy: QueuePolicy) -> bytes:
    """The policy as its queue's document."""
    return _encoder.encode(_PolicyDocument(POLICY_FORMAT, policy))


def decode_policy(data: bytes, name: str) -> QueuePolicy:
    """The policy in a queue's document. Raises StoreCorrupt, StoreMismatch."""
    try:
        format = _format_decoder.decode(data).format
        if format > POLICY_FORMAT:
            raise StoreMismatch(f"policy of queue {name} has format {format}; this Millpond reads {POLICY_FORMAT}")
        return _decoder.decode(data).policy
    except msgspec.DecodeError as error:
        raise StoreCorrupt(f"policy of queue {name} cannot be decoded: {error}") from error


class EnqueueOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Optional parameters of an enqueue. Durations are seconds; None = the queue's policy, then the pond's default."""

    delay: float = 0.0
    """Not delivered before this long from now."""
    ttl: float | None = None
    """Not delivered after this long from now. More than 0."""
    priority: int = DEFAULT_PRIORITY
    """0-9, higher first."""
    max_attempts: int | None = None
    """Failures until it is a dead letter, up to 1,000,000; 0 = never."""
    visibility: float | None = None
    """How long its leases last unless the consumer says otherwise. More than 0."""
    attributes: dict[str, Any] | None = None
    """JSON-like values under text keys, kept with the message: at most `Config.max_attributes_bytes`."""
    dedup_key: str | None = None
    """A second enqueue with it within the window is answered with the first message. Up to 512 bytes."""
    dedup_window: float | None = None
    """For how long the dedup key holds; without a key it means nothing."""
    ordering_key: str | None = None
    """Messages of one key are delivered one at a time, in order of enqueueing. Up to 512 bytes."""
    content_type: str | None = None
    """Media type of the payload; `Message.decode` goes by it. Up to 512 bytes."""
    correlation_id: str | None = None
    """For tracing; Millpond only keeps it. Up to 512 bytes."""
    message_id: str | None = None
    """An id of the caller's own (a UUID): a second enqueue with it is answered with the first message."""


DEFAULT_OPTIONS = EnqueueOptions()


class EnqueueFields(TypedDict, total=False):
    """The fields of `EnqueueOptions` as keyword parameters, each of which may be left out; for type checkers."""

    delay: float
    ttl: float | None
    priority: int
    max_attempts: int | None
    visibility: float | None
    attributes: dict[str, Any] | None
    dedup_key: str | None
    dedup_window: float | None
    ordering_key: str | None
    content_type: str | None
    correlation_id: str | None
    message_id: str | None


MAX_KEY_BYTES = 512
"""For dedup and ordering keys, content types, correlation ids and owners: they stand in indexes, headers and leases."""
MAX_COUNT = 1 << 53
"""More than any store holds; larger counts mean this, because no store need know a number of 70 bits."""


def short_text(value: Any, what: str) -> str | None:
    """Text that is not empty, or None. Raises InvalidInput, TooLarge."""
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise InvalidInput(f"{what} must be text that is not empty, or None")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise InvalidInput(f"{what} is not valid Unicode text") from error
    if size > MAX_KEY_BYTES:
        raise TooLarge(f"{what} is longer than {MAX_KEY_BYTES} bytes; nothing was done")
    return value


def check_count(value: Any, what: str) -> int:
    """How many of something, at least one. Raises InvalidInput."""
    if value.__class__ is not int or value < 1:
        raise InvalidInput(f"{what} must be a whole number, at least one, not {value!r:.100}")
    return min(int(value), MAX_COUNT)


EXCEPTION_BYTES = 8 * 1024
"""Of an exception's text that are kept: half of what an error may take, and more than anybody reads."""


class Wishes(NamedTuple):
    """What a producer asks for, checked, in milliseconds; None = the queue's policy, then the pond's default."""

    delay: int
    ttl: int | None
    priority: int
    max_attempts: int | None
    visibility: int | None
    attributes: dict[str, Any] | None
    dedup_key: str | None
    dedup_window: int | None
    """Only with a dedup key."""
    ordering_key: str | None
    content_type: str | None
    correlation_id: str | None
    message_id: str | None


def check_options(options: EnqueueOptions, max_attributes_bytes: int | None = None) -> Wishes:
    """The options, if they can be right. Raises InvalidInput, TooLarge (of attributes, only if a limit is given)."""
    priority, max_attempts = options.priority, options.max_attempts
    if priority.__class__ is not int or priority not in PRIORITIES:
        raise InvalidInput(f"priority must be a whole number from 0 to 9, not {priority!r}")
    if max_attempts is not None and (max_attempts.__class__ is not int or not 0 <= max_attempts <= MAX_ATTEMPTS):
        raise InvalidInput(f"max_attempts must be a whole number from 1 to {MAX_ATTEMPTS:,} (0 means without limit)")
    dedup_key = short_text(options.dedup_key, "dedup_key")
    window = None
    if dedup_key is not None and options.dedup_window is not None:
        window = milliseconds(options.dedup_window, "dedup_window", positive=True)
    return Wishes(
        milliseconds(options.delay, "delay"),
        None if options.ttl is None else milliseconds(options.ttl, "ttl", positive=True),
        priority,
        max_attempts,
        None if options.visibility is None else milliseconds(options.visibility, "visibility", positive=True),
        _attributes(options.attributes, max_attributes_bytes),
        dedup_key,
        window,
        short_text(options.ordering_key, "ordering_key"),
        short_text(options.content_type, "content_type"),
        short_text(options.correlation_id, "correlation_id"),
        None if options.message_id is None else message_id(options.message_id),
    )


def _attributes(attributes: Any, limit: int | None) -> dict[str, Any] | None:
    if attributes is None:
        return None
    if not isinstance(attributes, dict) or not all(isinstance(name, str) for name in attributes):
        raise InvalidInput("attributes must be a dict with text keys")
    if not attributes:
        return None
    # What was encoded is what is kept: later changes of the caller's dict must not show.
    encoded, decoded = encode_value(attributes, "attributes")
    if limit is not None and len(encoded) > limit:
        raise TooLarge(f"attributes take {len(encoded)} bytes, more than the limit of {limit}")
    kept: dict[str, Any] = decoded
    return kept


def exception_text(error: BaseException, limit: int | None = None) -> str:
    """An exception by type and text, cut to what may be kept. Who nacks with what was raised to him cannot know what is
    in it; it must not keep the failure from being counted."""
    most = EXCEPTION_BYTES if limit is None else max(0, min(EXCEPTION_BYTES, limit - 5))  # 5: MessagePack's own
    return clipped_to_bytes(f"{type(error).__name__}: {text_of(error)}", most)


def error_value(error: Any, limit: int | None = None) -> Any:
    """A consumer's error as it is kept: an exception by type and the beginning of its text. Raises InvalidInput,
    TooLarge."""
    if error is None:
        return None
    if isinstance(error, BaseException):
        error = exception_text(error, limit)
    encoded, plain = encode_value(error, "the error")
    if limit is not None and len(encoded) > limit:
        raise TooLarge(f"the error takes {len(encoded)} bytes, more than the limit of {limit}; shorten it")
    # As it will be read back, for those who get it from this process's cache.
    return plain


def reason_text(reason: Any, limit: int | None = None) -> str:
    """Why a message is given up, as it is kept. Raises InvalidInput, TooLarge."""
    if not isinstance(reason, (str, BaseException)):
        raise InvalidInput(f"a reason is text, not {type(reason).__name__}")
    return str(error_value(reason, limit))


def changed_policy(policy: QueuePolicy, fields: dict[str, Any]) -> QueuePolicy:
    """The policy with these fields changed. Raises InvalidInput for unknown fields and values out of range."""
    unknown = set(fields) - set(QueuePolicy.__struct_fields__)
    if unknown:
        raise InvalidInput(f"a queue policy has no {', '.join(sorted(unknown))}")
    try:
        return QueuePolicy(**(msgspec.structs.asdict(policy) | fields))
    except TypeError as error:
        raise InvalidInput(f"a queue policy field has the wrong type: {error}") from error


def milliseconds(seconds: float | timedelta, what: str, *, positive: bool = False) -> int:
    """Seconds as integer milliseconds, rounded up so that nothing is visible early. Raises InvalidInput."""
    if seconds.__class__ is not float and seconds.__class__ is not int:
        if not isinstance(seconds, timedelta):
            raise InvalidInput(f"{what} must be a number of seconds, not {seconds!r:.100}")
        seconds = seconds.total_seconds()
    if not 0 <= seconds <= MAX_SECONDS:
        raise InvalidInput(f"{what} must be between 0 seconds and a century, not {seconds!r:.100}")
    result = math.ceil(round(seconds * 1000, 3))
    if positive and result <= 0:
        raise InvalidInput(f"{what} must be more than 0 seconds")
    return result
