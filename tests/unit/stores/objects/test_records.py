"""Records to bytes and back, and what the size of an object tells."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from millpond.errors import StoreCorrupt, StoreMismatch
from millpond.model.clock import ManualClock
from millpond.stores.base import Box, Item, Mark
from millpond.stores.objects import names, records
from millpond.stores.objects.records import Intent, Kind, Marker, Record, Target, Tombstone

NOW = ManualClock().now_ms()
ID = "0197a3c2-0000-7000-8000-000000000001"
NAME = names.message(
    "shop", "orders", Box.LIVE, key=names.key_of(NOW, 7), id=ID, priority=5, size=3, expires=None, group=None
)


def _record(**changes: Any) -> Record:
    told: dict[str, Any] = {
        "format": 1,
        "write_id": bytes(range(16)),
        "birth": b"12345678",
        "version": 4,
        "namespace": "shop",
        "queue": "orders",
        "id": ID,
        "priority": 5,
        "group": None,
        "size": 3,
        "external": False,
        "due": NOW,
        "leased": False,
        "expires": None,
        "box": 0,
        "head": b"head",
        "status": b"status",
        "payload": b"abc",
        "blob": "",
        "state": None,
        "state_version": 0,
        "via": "",
    }
    return Record(**(told | changes))


@pytest.mark.parametrize("payload", [bytes(n) for n in (0, 1, 15, 16, 17, 100, 255, 256, 257, 5000)])
@pytest.mark.parametrize(
    ("changes", "kind", "lasts"),
    [
        ({}, Kind.PLAIN, 0),
        ({"leased": True, "due": NOW + 30_000}, Kind.HELD, 16_000),
        ({"leased": True, "due": NOW + 16_000}, Kind.HELD, 16_000),
        ({"leased": True, "due": NOW + 15_999}, Kind.HELD, 8_000),
        ({"leased": True, "due": NOW + 999}, Kind.HELD, 0),
        ({"leased": True, "due": NOW - 5}, Kind.HELD, 0),
        ({"leased": True, "due": NOW}, Kind.HELD, 0),
        ({"due": NOW + 10**12}, Kind.WAITING, 16_384_000),
        ({"due": NOW + 1}, Kind.WAITING, 0),
        ({"due": NOW - 1}, Kind.WAITING, 0),
        ({"expires": NOW}, Kind.OTHER, 0),
        ({"expires": NOW, "leased": True, "due": NOW + 30_000}, Kind.OTHER, 0),
    ],
)
def test_the_size_tells_what_an_object_is(payload: bytes, changes: dict[str, Any], kind: Kind, lasts: int) -> None:
    record = _record(payload=payload, **changes)
    data = records.encode_record(record, NAME, NOW)
    assert len(data) % 16 == kind
    form = records.form(len(data))
    assert form.kind == kind
    assert records.stays(form.code) == lasts
    assert NOW + records.stays(form.code) <= max(record.due, NOW)
    assert records.decode_held(data, "x") == record
    assert len(data) < len(payload) + 500


def test_intents_and_tombstones() -> None:
    intent = Intent(1, bytes(16), bytes(16), b"12345678", 5, ID, [Target("p", b"data", b"1")], [], "blob", "via")
    stone = Tombstone(1, bytes(16), b"12345678", 5, "")
    waiting = Tombstone(1, bytes(16), b"12345678", 5, "q/shop/orders/m/4/x")
    for held, data, form in (
        (intent, records.encode_intent(intent), (Kind.MOVING, 0)),
        (stone, records.encode_tombstone(stone), (Kind.GONE, 0)),
        (waiting, records.encode_tombstone(waiting), (Kind.GONE, 1)),
    ):
        assert records.form(len(data)) == form
        assert records.decode_held(data, "x") == held


def test_damage_is_seen() -> None:
    data = records.encode_record(_record(), NAME, NOW)
    for bad in (
        b"",
        b"\x00",
        data[:50],
        data[:4],
        data[:-1] + b"\x01",
        b"\xff" * len(data),
        data[16:],
        bytes(len(data)),
    ):
        with pytest.raises(StoreCorrupt, match=r"restore it|delete it"):
            records.decode_held(bad, "q/x")


def test_a_newer_format_is_refused_by_name() -> None:
    newer = records.encode_record(_record(format=2), NAME, NOW)
    with pytest.raises(StoreMismatch, match=r"format 2.*use a newer one"):
        records.decode_held(newer, "q/x")
    with pytest.raises(StoreMismatch, match="format 9"):
        records.decode(Marker, msgspec.msgpack.encode([9, "all", "different"]), "q/x")
    with pytest.raises(StoreCorrupt):
        records.decode(Marker, msgspec.msgpack.encode([1, "all", "different"]), "q/x")


def test_fields_that_come_later_do_not_hinder() -> None:
    body = msgspec.msgpack.decode(msgspec.msgpack.encode(_record()))
    again = msgspec.msgpack.encode([*body, "a field of the future"])
    assert records.decode(Record, again, "q/x") == _record()
    # Records from before the last field was added.
    assert records.decode(Record, msgspec.msgpack.encode(body[:-1]), "q/x") == _record()


def test_an_etag_leads_to_the_object() -> None:
    text = records.etag(_record(), NAME)
    etag = records.parse_etag(text)
    assert etag is not None
    assert (etag.version, etag.birth, names.of_place("shop", "orders", etag.place)) == (4, b"12345678", NAME)
    for bad in ("", "1", "no such etag", "1-2", "1-zz-m/4/x", "-3132-x"):
        assert records.parse_etag(bad) is None


def test_records_as_the_protocol_has_them() -> None:
    record = _record(group="g", leased=True, expires=NOW + 1, box=1, state=b"s")
    stored = records.stored(record, NAME, True)
    assert stored.item == Item("shop", "orders", ID, 5, "g", 3, False, NAME.key)
    assert stored.mark == Mark(records.etag(record, NAME), NOW, True, NOW + 1, Box.DEAD)
    assert (stored.head, stored.status, stored.payload) == (b"head", b"status", b"abc")
    assert records.stored(record, NAME).payload is None
    earlier = _record(keys=((77).to_bytes(16),))
    for key, same in ((0, True), (NAME.key, True), (77, True), (78, False)):
        assert records.is_of(Item("shop", "orders", ID, 5, None, 3, False, key), earlier, NAME) is same
