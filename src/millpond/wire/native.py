"""Bodies of Millpond's own routes, as JSON or MessagePack by one set of types.

Invariants: a field means the same in both forms, in a request and in an answer; times are integer milliseconds UTC
(``*_at_ms``) and durations integer milliseconds (``*_ms``). A request with a field that is not here is refused, so that
a misspelt option is not lost in silence; an answer may grow fields, and whoever reads one passes over those that he
does not know. In JSON, bytes are base64 text.

A message says everything that its records say, so that a client can build them again (`head_of`, `status_of`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from millpond.model.message import DEFAULT_PRIORITY, HEAD_FORMAT, STATUS_FORMAT, DeadLetter, Head, Lease, Status

MAX_BATCH = 1000
"""Messages of one request: bounded memory on both sides, and no commit that holds others up."""
MAX_CREDIT = 1000
"""Messages that may be unanswered on one stream."""
MAX_LIST = 1000
"""Entries of one page."""
MAX_WAIT_MS = 3_600_000
"""Longest single wait of a receive; who wants to wait longer asks again."""
HEARTBEAT_MS = 15_000
"""Between the frames of an idle stream, unless the consumer asks otherwise: proxies give up after 30 to 60 seconds."""

_LARGEST = 2**53 - 1
"""What every JSON library holds exactly."""

Milliseconds = Annotated[int, Meta(ge=0, le=_LARGEST)]
PositiveMilliseconds = Annotated[int, Meta(ge=1, le=_LARGEST)]
Count = Annotated[int, Meta(ge=0, le=_LARGEST)]
Session = Annotated[str, Meta(min_length=1, max_length=128)]
"""Chance enough that nobody else has it."""
Number = Annotated[int, Meta(ge=1, le=_LARGEST)]
Token = Annotated[int, Meta(ge=1, le=2**63 - 1)]


class Request(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """What every request to a queue says."""

    queue: str
    namespace: str | None = None
    """None: ``default``."""


# Producers


class NewMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """A message to enqueue. None means the queue's policy, then the server's default."""

    payload: bytes
    delay_ms: Milliseconds = 0
    ttl_ms: PositiveMilliseconds | None = None
    priority: Annotated[int, Meta(ge=0, le=9)] = DEFAULT_PRIORITY
    """0-9, higher first."""
    max_attempts: Count | None = None
    """Failures until it is a dead letter; 0 = never."""
    visibility_ms: PositiveMilliseconds | None = None
    attributes: dict[str, Any] | None = None
    dedup_key: str | None = None
    """A second enqueue with it, within the window, is answered with the first message."""
    dedup_window_ms: PositiveMilliseconds | None = None
    ordering_key: str | None = None
    content_type: str | None = None
    correlation_id: str | None = None
    message_id: str | None = None
    """An id of the producer's own (a UUID): a second enqueue with it is answered with the first message, so that one
    whose answer was lost can be sent again."""


class EnqueueBatchRequest(Request, kw_only=True, frozen=True):
    """Each message stands on its own, but when one of them cannot be right none is stored."""

    messages: Annotated[list[NewMessage], Meta(min_length=1, max_length=MAX_BATCH)]
    session: Session | None = None
    """Who sends one such request after the other. When no answer comes, the same request may be sent again: if it was
    carried out its messages are told as duplicates, also those that have been handed out and acked since. It needs a
    ``number``, and each message its ``message_id``."""
    number: Number | None = None
    """Of this request in its session: higher than those before."""
    fresh_ids: bool = True
    """Its message ids were made for it, and no other message will ever have them. False: they may be given to others
    later, when these are gone; then a store in a bucket does not know the repetition beyond that."""


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """What an enqueue is answered with."""

    message_id: str
    duplicate: bool
    """It was there already (same dedup key or id); nothing was added."""


class Receipts(msgspec.Struct, frozen=True):
    """One for each message, in their order."""

    receipts: list[Receipt]


# Messages


class LeaseView(msgspec.Struct, frozen=True, omit_defaults=True):
    """A lease, as onlookers see it."""

    lease_id: str
    fencing_token: int
    expires_at_ms: int
    owner: str | None = None
    txn_id: str | None = None


class Refusal(msgspec.Struct, frozen=True):
    """Why something was not done: the code of one of Millpond's errors, and its text."""

    error: str
    detail: str


class MessageFields(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What deliveries and views have in common."""

    namespace: str
    queue: str
    message_id: str
    priority: int
    enqueued_at_ms: int
    updated_at_ms: int
    visible_at_ms: int
    """From when it can be delivered (again)."""
    attempts: int
    """Deliveries so far; of a delivery, this one included."""
    failures: int
    max_attempts: int
    """Failures after which it is a dead letter; 0 = without limit."""
    visibility_ms: int
    """How long a delivery may take unless the consumer asks otherwise."""
    payload_size: int
    stored_apart: bool = False
    """The payload is not part of the record: read it from /v1/queue/payload."""
    checksum: int | None = None
    """CRC-32 of the payload."""
    expires_at_ms: int | None = None
    ttl_ms: int | None = None
    dedup_key: str | None = None
    ordering_key: str | None = None
    attributes: dict[str, Any] | None = None
    correlation_id: str | None = None
    content_type: str | None = None
    last_error: Any = None
    etag: str = ""
    """The version of the record."""
    cursor: str = "0"
    """Where lists continue behind it."""


class Delivery(MessageFields, frozen=True, kw_only=True, omit_defaults=True):
    """A message that was handed out, and the right to answer for it."""

    lease_id: str
    fencing_token: int
    lease_expires_at_ms: int
    owner: str | None = None
    payload: bytes | None = None
    """None when it is stored apart, or cannot be read (see ``trouble``)."""
    trouble: Refusal | None = None
    """Why the payload cannot be read, if it cannot."""


class MessageView(MessageFields, frozen=True, kw_only=True, omit_defaults=True):
    """A message as it stood when it was read."""

    state: Literal["ready", "delayed", "leased", "lapsed", "dead"]
    fencing_token: int
    """The last one given out; 0 before the first delivery."""
    lease: LeaseView | None = None
    dead_reason: str | None = None
    dead_at_ms: int | None = None


def head_of(message: Delivery | MessageView) -> Head:
    """The head record that the message was made from."""
    return Head(
        HEAD_FORMAT,
        message.message_id,
        message.namespace,
        message.queue,
        message.enqueued_at_ms,
        message.priority,
        message.max_attempts,
        message.visibility_ms,
        message.ttl_ms,
        message.dedup_key,
        message.ordering_key,
        message.attributes,
        message.correlation_id,
        message.content_type,
        message.payload_size,
        message.stored_apart,
        message.checksum,
    )


def status_of(message: Delivery | MessageView) -> Status:
    """The status record that the message was made from."""
    dead: DeadLetter | None = None
    lease: Lease | None = None
    if isinstance(message, Delivery):
        lease = Lease(message.lease_id, message.fencing_token, message.lease_expires_at_ms, message.owner)
    else:
        if message.lease is not None:
            held = message.lease
            lease = Lease(held.lease_id, held.fencing_token, held.expires_at_ms, held.owner, held.txn_id)
        if message.dead_at_ms is not None:
            dead = DeadLetter(message.dead_reason or "", message.dead_at_ms)
    return Status(
        STATUS_FORMAT,
        message.updated_at_ms,
        message.visible_at_ms,
        message.attempts,
        message.failures,
        message.fencing_token,
        message.expires_at_ms,
        lease,
        message.last_error,
        dead,
    )


# Consumers


class ReceiveRequest(Request, kw_only=True, frozen=True):
    """Up to ``count`` messages, as soon as there is one."""

    count: Annotated[int, Meta(ge=1, le=MAX_BATCH)] = 1
    wait_ms: Annotated[int, Meta(ge=0, le=MAX_WAIT_MS)] = 0
    visibility_ms: PositiveMilliseconds | None = None
    """None: each message's own."""
    owner: str | None = None


class Deliveries(msgspec.Struct, frozen=True):
    """[] when nothing came."""

    messages: list[Delivery]


class Handle(msgspec.Struct, forbid_unknown_fields=True, frozen=True, gc=False):
    """A delivery, by what proves the right to answer for it."""

    message_id: str
    lease_id: str
    fencing_token: Token


Handles = Annotated[list[Handle], Meta(min_length=1, max_length=MAX_BATCH)]


class AckBatchRequest(Request, kw_only=True, frozen=True):
    """Done: they are gone for good."""

    messages: Handles


class NackBatchRequest(Request, kw_only=True, frozen=True):
    """Back into the queue."""

    messages: Handles
    delay_ms: Milliseconds = 0
    intent: Literal["failure", "defer"] = "failure"
    """``failure`` counts one; ``defer`` does not."""
    error: Any = None
    """Kept with each message; of a failure only."""


class ExtendBatchRequest(Request, kw_only=True, frozen=True):
    """The leases end ``extend_by_ms`` from now."""

    messages: Handles
    extend_by_ms: PositiveMilliseconds


class BuryRequest(Request, kw_only=True, frozen=True):
    """Given up: a dead letter."""

    message: Handle
    reason: str
    error: Any = None


class Result(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of one message of a batch."""

    message_id: str
    error: Refusal | None = None
    """None when it went through."""
    lease_expires_at_ms: int | None = None
    """Of an extension."""


class Results(msgspec.Struct, frozen=True):
    """One for each message, in their order."""

    results: list[Result]


class Target(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """A message to enqueue in the same step as an ack; None: the namespace of the message that is acked."""

    queue: str
    message: NewMessage
    namespace: str | None = None


class HandOffRequest(Request, kw_only=True, frozen=True):
    """Ack a message and enqueue others, in one commit."""

    message: Handle
    then: Annotated[list[Target], Meta(max_length=MAX_BATCH)]


# Streams


class StreamRequest(Request, kw_only=True, frozen=True):
    """Deliveries as they come, at most ``credit`` of them unanswered at a time."""

    credit: Annotated[int, Meta(ge=1, le=MAX_CREDIT)]
    owner: str | None = None
    visibility_ms: PositiveMilliseconds | None = None
    max_batch: Annotated[int, Meta(ge=1, le=MAX_CREDIT)] = 100
    """Messages of one frame."""
    heartbeat_ms: Annotated[int, Meta(ge=100, le=MAX_WAIT_MS)] = HEARTBEAT_MS


class CreditRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """More credit for a stream, from now on."""

    stream_id: str
    credit: Annotated[int, Meta(ge=1, le=MAX_CREDIT)]


class Credit(msgspec.Struct, frozen=True):
    """How many messages may be unanswered on the stream."""

    credit: int


class Hello(msgspec.Struct, frozen=True, tag_field="type", tag="hello"):
    """The first frame."""

    stream_id: str
    credit: int
    heartbeat_ms: int


class Messages(msgspec.Struct, frozen=True, tag_field="type", tag="messages"):
    """Messages that were handed out."""

    messages: list[Delivery]


class Heartbeat(msgspec.Struct, frozen=True, tag_field="type", tag="heartbeat"):
    """Nothing came for a while, and the stream is alive."""

    outstanding: int
    """Messages that the server takes for unanswered."""


class End(msgspec.Struct, frozen=True, tag_field="type", tag="end", omit_defaults=True):
    """The last frame: nothing more comes, and what is unanswered remains the consumer's to answer."""

    reason: str
    """``draining``: the server ends, ask another one; otherwise the code of an error."""
    detail: str = ""
    retry_after_seconds: int | None = None


Frame = Hello | Messages | Heartbeat | End

FRAME_HEADER = 4
"""Bytes of a frame's length, big-endian, before its MessagePack."""
MAX_FRAME_BYTES = 64 * 1024 * 1024
"""No frame is larger; a length above it is no frame's."""


# Operators


class NamespaceRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """The queues of one namespace, or of all (None)."""

    namespace: str | None = None


class QueueName(msgspec.Struct, frozen=True):
    """A queue that the store has seen."""

    namespace: str
    queue: str


class Queues(msgspec.Struct, frozen=True):
    """By namespace and name."""

    queues: list[QueueName]


class QueueRequest(Request, kw_only=True, frozen=True):
    """A queue, and nothing else."""


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """How a queue stands."""

    ready: int
    delayed: int
    leased: int
    blocked: int
    """Waiting for an earlier message of their ordering key; not in ``ready``."""
    dead: int
    bytes: int
    """Payload bytes of all live messages."""
    oldest_due_at_ms: int | None = None
    """When the longest-waiting ready message became ready."""
    oldest_age_ms: int | None = None
    enqueued: int | None = None
    """Messages that were enqueued, whatever became of them, counted from some moment on; null in a bucket."""


class PeekRequest(Request, kw_only=True, frozen=True):
    """The messages that would be handed out next."""

    count: Annotated[int, Meta(ge=1, le=MAX_LIST)] = 1


class MessageRequest(Request, kw_only=True, frozen=True):
    """One message, by its id."""

    message_id: str


class View(msgspec.Struct, frozen=True):
    """One message."""

    message: MessageView


class Views(msgspec.Struct, frozen=True):
    """Messages, in order."""

    messages: list[MessageView]


class Page(msgspec.Struct, frozen=True, omit_defaults=True):
    """Some of a list. It may be empty and yet not the last: what cannot be read is left out."""

    messages: list[MessageView]
    next_cursor: str | None = None
    """Where to continue; None: that was all."""


class PolicyChange(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """Fields of a policy to set; those left out stay, null is the server's default."""

    default_visibility_ms: PositiveMilliseconds | UnsetType | None = UNSET
    max_attempts: Count | UnsetType | None = UNSET
    ttl_ms: PositiveMilliseconds | UnsetType | None = UNSET
    on_expired: Literal["discard", "dead_letter"] | UnsetType = UNSET
    on_exhausted: Literal["dead_letter", "discard"] | UnsetType = UNSET
    dedup_window_ms: PositiveMilliseconds | UnsetType | None = UNSET
    paused: bool | UnsetType = UNSET


class PolicyRequest(Request, kw_only=True, frozen=True):
    """Read the policy; with ``set`` change it, with ``reset`` put the default in its place."""

    set: PolicyChange | None = None
    reset: bool = False


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What a queue's messages get unless their producer says otherwise; null = the server's default."""

    default_visibility_ms: int | None
    max_attempts: int | None
    ttl_ms: int | None
    on_expired: Literal["discard", "dead_letter"]
    on_exhausted: Literal["dead_letter", "discard"]
    dedup_window_ms: int | None
    paused: bool


class PolicyAnswer(msgspec.Struct, frozen=True):
    """The policy as it is now."""

    policy: Policy


class Purged(msgspec.Struct, frozen=True):
    """How many messages were removed."""

    purged: int


class NextDue(msgspec.Struct, frozen=True):
    """Until the earliest message that is not ready now comes due; null when there is none."""

    in_ms: int | None


class Done(msgspec.Struct, frozen=True):
    """It was done."""


class ListRequest(Request, kw_only=True, frozen=True):
    """Messages in order of insertion, behind the one with id ``after``, or behind ``cursor``."""

    after: str | None = None
    cursor: str | None = None
    limit: Annotated[int, Meta(ge=1, le=MAX_LIST)] = 100


class DeadLetterIdsRequest(Request, kw_only=True, frozen=True):
    """Those with these ids, or all (null)."""

    ids: Annotated[list[str], Meta(max_length=MAX_BATCH)] | None = None


class Counted(msgspec.Struct, frozen=True):
    """How many."""

    count: int


# Workflow state


class StateLoadRequest(Request, kw_only=True, frozen=True):
    """The state of a message. Looking needs no lease."""

    message_id: str


class StateSaveRequest(Request, kw_only=True, frozen=True):
    """Replace the state, under the lease. ``etag``: the version to replace, null for "there is none yet"; left out:
    whatever is there."""

    message: Handle
    value: Any
    etag: str | UnsetType | None = UNSET
    writer: Annotated[str, Meta(max_length=64)] = ""
    """Who saves: a name of chance that the client made for itself. With it, a save that comes a second time, or without
    ``etag`` after a later one or a deletion of the same writer (it was held up on its way), changes nothing."""
    number: Count = 0
    """Which of the writer's saves and deletions it is."""


class StateDeleteRequest(Request, kw_only=True, frozen=True):
    """Delete the state, under the lease; fine when there is none."""

    message: Handle
    etag: str | UnsetType = UNSET
    writer: Annotated[str, Meta(max_length=64)] = ""
    """As for a save."""
    number: Count = 0


class StateAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """A state; without one, ``exists`` is false and the rest is not there."""

    exists: bool
    value: Any = None
    etag: str | None = None
    created_at_ms: int | None = None
    updated_at_ms: int | None = None


class StateSaved(msgspec.Struct, frozen=True):
    """The new version."""

    etag: str


# Costs


class RequestCosts(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that went to a store that charges for them."""

    creates: int = 0
    replaces: int = 0
    reads: int = 0
    deletes: int = 0
    lists: int = 0
    parts: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


class QueueCosts(msgspec.Struct, frozen=True):
    """Those for one queue."""

    namespace: str
    queue: str
    requests: RequestCosts
    acknowledged: int


class Costs(msgspec.Struct, frozen=True):
    """What this server process has asked of its store since it began; empty for stores that do not charge."""

    queues: list[QueueCosts]
    other: RequestCosts
    """For no queue in particular."""
    total: RequestCosts
    acknowledged: int


class Nothing(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """An empty body."""
