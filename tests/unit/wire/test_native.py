"""Bodies of Millpond's own routes: both forms say the same, requests are strict, records survive the way."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from millpond.model.message import HEAD_FORMAT, STATUS_FORMAT, DeadLetter, Head, Lease, Status
from millpond.wire import native

HEAD = Head(
    HEAD_FORMAT,
    "0197a3c2-0000-7000-8000-000000000001",
    "tenant",
    "orders",
    1_000,
    7,
    3,
    30_000,
    60_000,
    "dedup",
    "group",
    {"a": [1, None, 2.5, {"b": "c"}]},
    "correlation",
    "text/plain",
    11,
    True,
    0xFFFF_FFFF,
)
STATUS = Status(
    STATUS_FORMAT,
    2_000,
    32_000,
    4,
    1,
    9,
    61_000,
    Lease("lease", 9, 32_000, "worker-1"),
    {"why": "it failed"},
    None,
)
COMMON: dict[str, Any] = {
    "namespace": HEAD.namespace,
    "queue": HEAD.queue,
    "message_id": HEAD.id,
    "priority": HEAD.priority,
    "enqueued_at_ms": HEAD.enqueued_at,
    "updated_at_ms": STATUS.updated_at,
    "visible_at_ms": STATUS.visible_at,
    "attempts": STATUS.attempts,
    "failures": STATUS.failures,
    "max_attempts": HEAD.max_attempts,
    "visibility_ms": HEAD.visibility,
    "payload_size": HEAD.payload_size,
    "stored_apart": HEAD.external,
    "checksum": HEAD.checksum,
    "expires_at_ms": STATUS.expires_at,
    "ttl_ms": HEAD.ttl,
    "dedup_key": HEAD.dedup_key,
    "ordering_key": HEAD.ordering_key,
    "attributes": HEAD.attributes,
    "correlation_id": HEAD.correlation_id,
    "content_type": HEAD.content_type,
    "last_error": STATUS.last_error,
    "etag": "12",
    "cursor": "34",
}
FORMS = [(msgspec.json.encode, msgspec.json.decode), (msgspec.msgpack.encode, msgspec.msgpack.decode)]
REQUESTS = [
    value
    for value in vars(native).values()
    if isinstance(value, type)
    and issubclass(value, msgspec.Struct)
    and (value.__name__.endswith("Request") or value.__name__ in {"NewMessage", "Handle", "Target", "PolicyChange"})
]


@pytest.mark.parametrize(("encode", "decode"), FORMS, ids=["json", "msgpack"])
def test_delivery_says_all_that_its_records_say(encode: Any, decode: Any) -> None:
    sent = native.Delivery(
        **COMMON, lease_id="lease", fencing_token=9, lease_expires_at_ms=32_000, owner="worker-1", payload=b"\x00\xff"
    )
    read = decode(encode(sent), type=native.Delivery)
    assert read == sent
    assert native.head_of(read) == HEAD
    assert native.status_of(read) == STATUS


@pytest.mark.parametrize(("encode", "decode"), FORMS, ids=["json", "msgpack"])
def test_view_says_all_that_its_records_say(encode: Any, decode: Any) -> None:
    held = native.MessageView(
        **COMMON, state="leased", fencing_token=9, lease=native.LeaseView("lease", 9, 32_000, "worker-1", None)
    )
    dead = native.MessageView(**COMMON, state="dead", fencing_token=9, dead_reason="spent", dead_at_ms=5)
    assert native.status_of(decode(encode(held), type=native.MessageView)) == STATUS
    expected = msgspec.structs.replace(STATUS, lease=None, dead=DeadLetter("spent", 5))
    assert native.status_of(decode(encode(dead), type=native.MessageView)) == expected
    assert native.head_of(dead) == HEAD


def test_frames_are_told_apart_by_their_type() -> None:
    delivery = native.Delivery(**COMMON, lease_id="lease", fencing_token=9, lease_expires_at_ms=32_000)
    for frame in (
        native.Hello("id", 10, 15_000),
        native.Messages([delivery]),
        native.Heartbeat(3),
        native.End("draining", retry_after_seconds=1),
    ):
        encoded = msgspec.msgpack.encode(frame)
        assert msgspec.msgpack.decode(encoded)["type"] == type(frame).__name__.lower()
        assert msgspec.msgpack.decode(encoded, type=native.Frame) == frame


@pytest.mark.parametrize("request_type", REQUESTS, ids=lambda type: type.__name__)
def test_requests_refuse_fields_that_they_do_not_know(request_type: Any) -> None:
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.json.decode(b'{"sure_not_a_field": 1}', type=request_type)


def test_answers_may_grow_fields() -> None:
    read = msgspec.json.decode(
        b'{"message_id": "a", "duplicate": false, "new_in_a_later_version": 1}', type=native.Receipt
    )
    assert read == native.Receipt("a", False)


def test_policy_fields_left_out_are_not_those_set_to_null() -> None:
    change = msgspec.json.decode(b'{"ttl_ms": null}', type=native.PolicyChange)
    assert change.ttl_ms is None
    assert change.max_attempts is msgspec.UNSET
    assert msgspec.json.encode(change) == b'{"ttl_ms":null}'
