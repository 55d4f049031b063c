"""The bodies of lockd's queue protocol. Requests are read strictly: an unknown field is an error, as lockd has it."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Annotated, Any, TypeVar

import msgspec

R = TypeVar("R", bound=msgspec.Struct)

Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class Named(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A request about a queue: stats and watch."""

    namespace: str = ""
    queue: str = ""


class Dequeue(Named, forbid_unknown_fields=True, kw_only=True):
    """dequeue, dequeueWithState, subscribe and subscribeWithState."""

    owner: str = ""
    txn_id: str = ""
    visibility_timeout_seconds: Int64 = 0
    """0 or less: the message's own."""
    wait_seconds: Int64 = 0
    """Less than 0: do not wait; 0: for ever."""
    page_size: Int64 = 0
    start_after: str = ""
    """Ignored, as by lockd."""


class Answer(Named, forbid_unknown_fields=True, kw_only=True):
    """ack, and what nack and extend have in common with it."""

    message_id: str = ""
    lease_id: str = ""
    txn_id: str = ""
    fencing_token: Int64 = 0
    meta_etag: str = ""
    state_lease_id: str = ""
    state_fencing_token: Int64 = 0


class Ack(Answer, forbid_unknown_fields=True, kw_only=True):
    """ack"""

    state_etag: str = ""


class Nack(Answer, forbid_unknown_fields=True, kw_only=True):
    """nack"""

    state_etag: str = ""
    delay_seconds: Int64 = 0
    intent: str = ""
    last_error: Any = None


class Extend(Answer, forbid_unknown_fields=True, kw_only=True):
    """extend"""

    state_etag: str = ""
    extend_by_seconds: Int64 = 0


class EnqueueMeta(msgspec.Struct, kw_only=True):
    """The ``meta`` part of an enqueue; unknown fields are ignored, as by lockd. From ``delay_ms`` on it is Millpond's
    own: what is given in milliseconds counts before the same in seconds."""

    namespace: str = ""
    queue: str = ""
    delay_seconds: Int64 = 0
    visibility_timeout_seconds: Int64 = 0
    ttl_seconds: Int64 = 0
    max_attempts: Int64 | None = None
    attributes: dict[str, Any] | None = None
    payload_content_type: str = ""
    delay_ms: Int64 | None = None
    visibility_ms: Int64 | None = None
    ttl_ms: Int64 | None = None
    priority: Int64 | None = None
    dedup_key: str | None = None
    dedup_window_ms: Int64 | None = None
    ordering_key: str | None = None
    content_type: str | None = None
    correlation_id: str | None = None
    message_id: str | None = None
    session: Annotated[str, msgspec.Meta(min_length=1, max_length=128)] | None = None
    number: Annotated[int, msgspec.Meta(ge=1, le=2**53 - 1)] | None = None
    fresh_ids: bool = True
    """As in Millpond's own enqueue: which request of its sender this is, so that it may be sent again."""
    unlimited_attempts: bool = False
    """No failure budget: lockd has no value for it, since 0 means its default."""


class Enqueued(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The answer of enqueue."""

    namespace: str
    queue: str
    message_id: str
    attempts: int
    max_attempts: int
    failure_attempts: int = 0
    not_visible_until_unix: int
    visibility_timeout_seconds: int
    payload_bytes: int
    correlation_id: str
    duplicate: bool = False
    """Millpond's own: a message with this id or dedup key was there; nothing was added."""


class Message(msgspec.Struct, omit_defaults=True, kw_only=True, gc=False):
    """A delivery."""

    namespace: str
    queue: str
    message_id: str
    attempts: int
    max_attempts: int
    failure_attempts: int = 0
    not_visible_until_unix: int
    visibility_timeout_seconds: int
    attributes: dict[str, Any] | None = None
    payload_content_type: str = ""
    payload_bytes: int
    correlation_id: str
    lease_id: str
    lease_expires_at_unix: int
    fencing_token: int
    txn_id: str
    meta_etag: str
    state_etag: str = ""
    state_lease_id: str = ""
    state_lease_expires_at_unix: int = 0
    state_fencing_token: int = 0
    state_txn_id: str = ""


class Delivered(msgspec.Struct, omit_defaults=True, gc=False):
    """A ``meta`` part."""

    message: Message
    next_cursor: str = ""


class Acked(msgspec.Struct):
    """The answer of ack."""

    acked: bool
    correlation_id: str


class Requeued(msgspec.Struct):
    """The answer of nack."""

    requeued: bool
    meta_etag: str
    correlation_id: str


class Extended(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The answer of extend."""

    lease_expires_at_unix: int
    visibility_timeout_seconds: int
    meta_etag: str
    state_lease_expires_at_unix: int = 0
    correlation_id: str = ""


class Stats(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The answer of stats."""

    namespace: str
    queue: str
    waiting_consumers: int
    pending_candidates: int
    total_consumers: int
    has_active_watcher: bool
    available: bool
    head_message_id: str = ""
    head_enqueued_at_unix: int = 0
    head_not_visible_until_unix: int = 0
    head_age_seconds: int = 0
    correlation_id: str = ""


class Watched(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The data of an event of watch."""

    namespace: str
    queue: str
    available: bool
    head_message_id: str = ""
    changed_at_unix: int
    correlation_id: str = ""


class Updated(msgspec.Struct):
    """The answer of update."""

    new_version: int
    new_state_etag: str
    bytes: int
    metadata: dict[str, Any]


class Removed(msgspec.Struct, omit_defaults=True):
    """The answer of remove."""

    removed: bool
    new_version: int = 0


class Metadata(msgspec.Struct, forbid_unknown_fields=True):
    """metadata"""

    query_hidden: bool | None = None


class MetadataUpdated(msgspec.Struct):
    """The answer of metadata."""

    namespace: str
    key: str
    version: int
    metadata: dict[str, Any]


class BadBody(ValueError):
    """A body that is not what its route takes."""


class Reader:
    """Reads the bodies of one route."""

    def __init__(self, kind: type[R], *, empty: bool = False) -> None:
        """``empty``: no body at all stands for one without fields."""
        self._kind = kind
        self._empty = empty
        self._decode = msgspec.json.Decoder(kind).decode

    def read(self, body: bytes) -> Any:
        """The request. Raises BadBody."""
        try:
            return self._decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            if self._empty and not body.strip():
                return self._kind()
            raise BadBody(str(error)) from error


encode = msgspec.json.Encoder().encode
"""A body as JSON, without the final newline."""


_LEASE = re.compile(r"[0-9a-f]{24,}")


def transaction_id(lease_id: str) -> str:
    """The transaction id of a lease. lockd gives each lease one of its own, and its clients send it back; here it says
    nothing that the lease id does not, and is made from it. Empty for a lease id that Millpond did not make."""
    # 19 digits, which hexadecimal ones are as well, and one whose last four bits are padding, as xid has it.
    return f"{lease_id[:19]}0" if _LEASE.fullmatch(lease_id) else ""


def meta_etag(token: int, until: int) -> str:
    """The version of a held message, as far as its holder needs it: another with each delivery and each extension, and
    the same wherever the record lies and however it is rewritten."""
    return f"{token:x}-{until:x}"


def state_etag(message_id: str) -> str:
    """lockd's ``state_etag`` of a delivery is the version of a marker that never changes while the message lives, not
    of the state itself."""
    return base64.b32hexencode(binascii.crc32(message_id.encode()).to_bytes(4)).decode().rstrip("=").lower()


def seconds_up(ms: int) -> int:
    """Milliseconds as whole seconds, rounded up."""
    return -(-ms // 1000)
