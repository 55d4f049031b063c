"""What a consumer is told of a delivery is all that there is to tell, each thing by its name."""

from __future__ import annotations

import msgspec

from millpond.errors import StoreCorrupt
from millpond.model.message import Head, Lease, Status
from millpond.server import views
from millpond.service.consuming import Delivery
from millpond.service.ready import Record
from millpond.stores.base import Box, Item, Mark
from millpond.wire import native


def given() -> Delivery:
    """A delivery of which no two fields have the same value."""
    head = Head(1, "id", "ns", "q", 10, 3, 11, 12, 13, "dedup", "order", {"a": 1}, "corr", "type", 14, True, 15)
    lease = Lease("lease", 16, 17, "owner")
    status = Status(1, 18, 19, 20, 21, 16, 22, lease, "error", None)
    record = Record(Item("ns", "q", "id", 3, "order", 14, True, 23), Mark("24", 19, True, 22, Box.LIVE), head, status)
    return Delivery("ns", "q", "id", "lease", 16, record, b"payload", record, trouble=StoreCorrupt("broken"))


EXPECTED = native.Delivery(
    namespace="ns",
    queue="q",
    message_id="id",
    priority=3,
    enqueued_at_ms=10,
    updated_at_ms=18,
    visible_at_ms=19,
    attempts=20,
    failures=21,
    max_attempts=11,
    visibility_ms=12,
    payload_size=14,
    stored_apart=True,
    checksum=15,
    expires_at_ms=22,
    ttl_ms=13,
    dedup_key="dedup",
    ordering_key="order",
    attributes={"a": 1},
    correlation_id="corr",
    content_type="type",
    last_error="error",
    etag="24",
    cursor="23",
    lease_id="lease",
    fencing_token=16,
    lease_expires_at_ms=17,
    owner="owner",
    payload=b"payload",
    trouble=native.Refusal("store_corrupt", "A stored record cannot be read."),
)


def test_a_delivery_is_told_as_its_type_has_it() -> None:
    told = views.delivery(given())
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(told), type=native.Delivery) == EXPECTED
    assert msgspec.json.decode(msgspec.json.encode(told), type=native.Delivery) == EXPECTED
    assert {field.name for field in msgspec.structs.fields(type(told))} == {
        field.name for field in msgspec.structs.fields(native.Delivery)
    }


def test_what_is_as_usual_is_left_out() -> None:
    head = Head(1, "id", "ns", "q", 10, 3, 11, 12, None, None, None, None, None, None, 0, False, None)
    lease = Lease("lease", 16, 17)
    status = Status(1, 18, 19, 20, 21, 16, None, lease, None, None)
    record = Record(Item("ns", "q", "id", 3, None, 0, False, 7), Mark("", 19, True, None, Box.LIVE), head, status)
    told = msgspec.msgpack.decode(
        msgspec.msgpack.encode(views.delivery(Delivery("ns", "q", "id", "lease", 16, record, None, record)))
    )
    required = {field.name for field in msgspec.structs.fields(native.Delivery) if field.required}
    assert told.keys() == required | {"cursor"}
