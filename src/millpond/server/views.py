"""From the engine's objects to those of the wire, and back where a request says what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import msgspec

from millpond.errors import InvalidInput, MillpondError
from millpond.message import MessageView
from millpond.model.message import DEFAULT_PRIORITY
from millpond.requests import PondRequests
from millpond.service.config import DEFAULT_OPTIONS, EnqueueOptions, QueuePolicy
from millpond.service.consuming import Delivery
from millpond.service.producing import Numbered
from millpond.service.ready import Record
from millpond.stores.base import Requests
from millpond.wire import faults, lockd, native


def _common(record: Record) -> dict[str, Any]:
    head, status = record.head, record.status
    return {
        "namespace": head.namespace,
        "queue": head.queue,
        "message_id": head.id,
        "priority": head.priority,
        "enqueued_at_ms": head.enqueued_at,
        "updated_at_ms": status.updated_at,
        "visible_at_ms": status.visible_at,
        "attempts": status.attempts,
        "failures": status.failures,
        "max_attempts": head.max_attempts,
        "visibility_ms": head.visibility,
        "payload_size": head.payload_size,
        "stored_apart": head.external,
        "checksum": head.checksum,
        "expires_at_ms": status.expires_at,
        "ttl_ms": head.ttl,
        "dedup_key": head.dedup_key,
        "ordering_key": head.ordering_key,
        "attributes": head.attributes,
        "correlation_id": head.correlation_id,
        "content_type": head.content_type,
        "last_error": status.last_error,
        "etag": record.mark.etag,
        "cursor": str(record.item.key),
    }


_fields = {field.name: field for field in msgspec.structs.fields(native.Delivery)}
_Told: Any = msgspec.defstruct(
    "_Told",
    # A field that must be there gets a default that no message has, so that it may stand behind one that need not.
    [(name, Any, msgspec.UNSET if field.required else field.default) for name, field in _fields.items()],
    omit_defaults=True,
    frozen=True,
    gc=False,
)
"""`native.Delivery`, made of its fields in order: that takes a fifth of the time that thirty names take."""


def delivery(given: Delivery) -> native.Delivery:
    """A delivery as its consumer is told of it, to be encoded."""
    record = given.given
    assert record is not None, "a delivery that was just made has its record"
    # Written out where `_common` would be called: this is paid for each delivery.
    head, status = record.head, record.status
    lease = status.lease
    assert lease is not None
    told: native.Delivery = _Told(
        head.namespace,
        head.queue,
        head.id,
        head.priority,
        head.enqueued_at,
        status.updated_at,
        status.visible_at,
        status.attempts,
        status.failures,
        head.max_attempts,
        head.visibility,
        head.payload_size,
        head.external,
        head.checksum,
        status.expires_at,
        head.ttl,
        head.dedup_key,
        head.ordering_key,
        head.attributes,
        head.correlation_id,
        head.content_type,
        status.last_error,
        record.mark.etag,
        str(record.item.key),
        lease.id,
        lease.token,
        lease.until,
        lease.owner,
        given.payload,
        None if given.trouble is None else refusal(given.trouble),
    )
    return told


def message(view: MessageView) -> native.MessageView:
    """A message as an onlooker is told of it."""
    record = view.record
    status = record.status
    lease, dead = status.lease, status.dead
    return native.MessageView(
        **_common(record),
        state=cast("Any", view.state),
        fencing_token=status.token,
        lease=None
        if lease is None
        else native.LeaseView(lease.id, lease.token, lease.until, lease.owner, lease.txn_id),
        dead_reason=None if dead is None else dead.reason,
        dead_at_ms=None if dead is None else dead.at,
    )


def refusal(error: MillpondError) -> native.Refusal:
    """An error as part of an answer that is not one as a whole."""
    fault = faults.native(error)[1]
    return native.Refusal(fault.error, fault.detail)


def results(ids: Sequence[str], errors: Sequence[MillpondError | None]) -> list[native.Result]:
    """What became of each message of a batch."""
    return [
        native.Result(id) if error is None else native.Result(id, refusal(error))
        for id, error in zip(ids, errors, strict=True)
    ]


def numbered(request: native.EnqueueBatchRequest | lockd.EnqueueMeta) -> Numbered | None:
    """Which request of its producer an enqueue is, if it says so. Raises InvalidInput for half of it."""
    session, number = request.session, request.number
    if session is None and number is None:
        return None
    if session is None or number is None:
        raise InvalidInput("session and number go together: give both, or neither")
    return Numbered(session, number, request.fresh_ids)


def options(new: native.NewMessage) -> EnqueueOptions:
    """What an enqueue is to do with a message, in seconds as the service has them; without the message's id."""
    if (
        new.dedup_key is None
        and new.ordering_key is None
        and new.attributes is None
        and new.content_type is None
        and new.correlation_id is None
        and new.delay_ms == 0
        and new.priority == DEFAULT_PRIORITY
        and new.ttl_ms is None
        and new.max_attempts is None
        and new.visibility_ms is None
        and new.dedup_window_ms is None
    ):
        return DEFAULT_OPTIONS
    return EnqueueOptions(
        delay=new.delay_ms / 1000,
        ttl=_seconds(new.ttl_ms),
        priority=new.priority,
        max_attempts=new.max_attempts,
        visibility=_seconds(new.visibility_ms),
        attributes=new.attributes,
        dedup_key=new.dedup_key,
        dedup_window=_seconds(new.dedup_window_ms),
        ordering_key=new.ordering_key,
        content_type=new.content_type,
        correlation_id=new.correlation_id,
    )


def with_id(chosen: EnqueueOptions, message_id: str) -> EnqueueOptions:
    """The same with an id of the producer's own."""
    return msgspec.structs.replace(chosen, message_id=message_id)


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _milliseconds(seconds: float | None) -> int | None:
    # As the service rounds when it uses them: nothing comes early.
    return None if seconds is None else math.ceil(round(seconds * 1000, 3))


def policy(given: QueuePolicy) -> native.Policy:
    """A queue's policy."""
    return native.Policy(
        default_visibility_ms=_milliseconds(given.default_visibility),
        max_attempts=given.max_attempts,
        ttl_ms=_milliseconds(given.ttl),
        on_expired=given.on_expired,
        on_exhausted=given.on_exhausted,
        dedup_window_ms=_milliseconds(given.dedup_window),
        paused=given.paused,
    )


def policy_fields(change: native.PolicyChange) -> dict[str, Any]:
    """Those fields of a policy that are to change, by the names that the service has for them."""
    fields: dict[str, Any] = {}
    for name in change.__struct_fields__:
        value = getattr(change, name)
        if value is msgspec.UNSET:
            continue
        if name.endswith("_ms"):
            name, value = name.removesuffix("_ms"), _seconds(value)
        fields[name] = value
    return fields


def _requests(given: Requests) -> native.RequestCosts:
    return native.RequestCosts(**msgspec.structs.asdict(given))


def costs(given: PondRequests) -> native.Costs:
    """What a pond's requests were."""
    return native.Costs(
        [
            native.QueueCosts(name.namespace, name.queue, _requests(one.requests), one.acknowledged)
            for name, one in given.queues.items()
        ],
        _requests(given.other),
        _requests(given.total),
        given.acknowledged,
    )


def as_json(value: Any) -> Any:
    """What JSON has no form for, as something that it has."""
    if isinstance(value, msgspec.msgpack.Ext):
        return {"code": value.code, "data": bytes(value.data)}
    raise NotImplementedError(f"{type(value).__name__} has no form in JSON")


def json_bytes(encoder: msgspec.json.Encoder, value: Any) -> bytes:
    """``value`` as JSON. In users' own values MessagePack has keys for which JSON has no form: these become text, so
    that who asks in JSON is not kept from the message."""
    try:
        return encoder.encode(value)
    except (TypeError, NotImplementedError):
        return encoder.encode(_with_text_keys(msgspec.msgpack.decode(msgspec.msgpack.encode(value))))


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key if isinstance(key, str) else str(_with_text_keys(key)): _with_text_keys(one)
            for key, one in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_with_text_keys(one) for one in value]
    return as_json(value) if isinstance(value, msgspec.msgpack.Ext) else value
