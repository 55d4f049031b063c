from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.errors import StoreCorrupt, StoreMismatch, UnknownKey
from millpond.model.codec import decode_head, decode_status, encode
from millpond.model.message import HEAD_FORMAT, STATUS_FORMAT, DeadLetter, Head, Lease, Status

HEAD = Head(
    HEAD_FORMAT, "0197a3c2-1111-7abc-8def-0123456789ab", "default", "q", 1_750_000_000_000, 5, 3, 30_000, 60_000,
    "dedup", "ordering", {"a": [1, None, "ü"]}, "correlation", "text/plain", 12, False, 0xDEADBEEF,
)  # fmt: skip
STATUS = Status(
    STATUS_FORMAT, 1, 2, 3, 4, 5, 6, Lease("id", 5, 2, "owner", "txn"), {"error": "boom"}, DeadLetter("why", 9)
)
DECODERS: list[Any] = [(decode_head, HEAD, "head"), (decode_status, STATUS, "status")]

times = st.integers(-(2**63), 2**63 - 1)
text = st.text(max_size=20)
values = st.recursive(
    st.none() | st.booleans() | times | text | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
heads = st.builds(
    Head, st.just(HEAD_FORMAT), text, text, text, times, times, times, times, st.none() | times, st.none() | text,
    st.none() | text, st.none() | st.dictionaries(text, values, max_size=3), st.none() | text, st.none() | text,
    times, st.booleans(), st.none() | times,
)  # fmt: skip
leases = st.builds(Lease, text, times, times, st.none() | text, st.none() | text)
statuses = st.builds(
    Status, st.just(STATUS_FORMAT), times, times, times, times, times, st.none() | times, st.none() | leases, values,
    st.none() | st.builds(DeadLetter, text, times),
)  # fmt: skip


@given(heads)
def test_heads_come_back(head: Head) -> None:
    assert decode_head(encode(head), "x") == head


@given(statuses)
def test_statuses_come_back(status: Status) -> None:
    assert decode_status(encode(status), "x") == status


def test_no_failures_are_written_as_such_and_are_not_the_attempts() -> None:
    status = msgspec.structs.replace(STATUS, attempts=4, failures=0)
    assert msgspec.msgpack.decode(encode(status))[3:5] == [4, 0]
    assert decode_status(encode(status), "x").failures == 0


@pytest.mark.parametrize(("decode", "record", "what"), DECODERS)
def test_the_format_comes_first(decode: Any, record: Any, what: str) -> None:
    assert msgspec.msgpack.decode(encode(record))[0] == 1


@pytest.mark.parametrize(("decode", "record", "what"), DECODERS)
def test_a_newer_format_is_refused_by_name(decode: Any, record: Any, what: str) -> None:
    with pytest.raises(StoreMismatch, match=f"{what} of message m-1 has format 2; this Millpond reads up to 1"):
        decode(encode(msgspec.structs.replace(record, format=2)), "m-1")


@pytest.mark.parametrize("fields", [[2], [2, {}, "other"], [99, "every", "thing", "differs"]])
@pytest.mark.parametrize(("decode", "record", "what"), DECODERS)
def test_a_newer_format_need_not_look_like_ours(decode: Any, record: Any, what: str, fields: list[Any]) -> None:
    with pytest.raises(StoreMismatch, match=f"has format {fields[0]}"):
        decode(msgspec.msgpack.encode(fields), "m-1")


@pytest.mark.parametrize(("decode", "record", "what"), DECODERS)
def test_fields_added_at_the_end_are_passed_over(decode: Any, record: Any, what: str) -> None:
    longer = [*msgspec.msgpack.decode(encode(record)), "later", {"more": 1}]
    assert decode(msgspec.msgpack.encode(longer), "m-1") == record


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\x00",
        b"garbage",
        b"\xff" * 40,
        b"\x91",
        b"\x90",
        b"\x91\x01",
        b"\x80",
        b"\x9f\x01" + b"\xa3\xff\xfe\xfd" * 14,
        msgspec.msgpack.encode({"format": 1}),
        msgspec.msgpack.encode(["1"] * 16),
        b"\x91" * 100_000,
    ],
)
@pytest.mark.parametrize(("decode", "record", "what"), DECODERS)
def test_garbage_is_reported_as_such(decode: Any, record: Any, what: str, garbage: bytes) -> None:
    with pytest.raises(StoreCorrupt, match=f"{what} of message m-1 cannot be decoded"):
        decode(garbage, "m-1")


@pytest.mark.parametrize(("decode", "record", "what"), DECODERS)
def test_deep_nesting_is_no_crash(decode: Any, record: Any, what: str) -> None:
    fields = msgspec.msgpack.decode(encode(record))
    at = 11 if what == "head" else 8
    parts = [msgspec.msgpack.encode(field) for field in fields]
    parts[at] = (b"\x81\xa1a" if what == "head" else b"") + b"\x91" * 100_000 + b"\xc0"
    start = bytes([0x90 + len(parts)]) if len(parts) < 16 else b"\xdc" + len(parts).to_bytes(2)
    with pytest.raises(StoreCorrupt, match="cannot be decoded"):
        decode(start + b"".join(parts), "m-1")


@pytest.mark.parametrize(("decode", "record", "what"), DECODERS)
def test_every_truncation_is_reported(decode: Any, record: Any, what: str) -> None:
    whole = encode(record)
    for length in range(len(whole)):
        with pytest.raises(StoreCorrupt):
            decode(whole[:length], "m-1")
    with pytest.raises(StoreCorrupt):
        decode(whole + b"\x00", "m-1")


@pytest.mark.parametrize(("decode", "record", "what"), DECODERS)
def test_a_sealed_record_asks_for_its_key(decode: Any, record: Any, what: str) -> None:
    with pytest.raises(UnknownKey, match=f"{what} of message m-1 is encrypted"):
        decode(b"\xc1sealed", "m-1")


@given(st.binary(max_size=200))
def test_bytes_from_anywhere_raise_nothing_else(data: bytes) -> None:
    for decode, kind in ((decode_head, Head), (decode_status, Status)):
        try:
            result: Any = decode(data, "m-1")
        except (StoreCorrupt, StoreMismatch, UnknownKey) as error:
            result = str(error)
        assert isinstance(result, kind) or "m-1" in result


def test_the_formats_are_as_written_down() -> None:
    """Arrays that begin with the format; a field that is moved or named would make what is stored unreadable."""
    assert msgspec.msgpack.decode(encode(HEAD)) == [
        1, "0197a3c2-1111-7abc-8def-0123456789ab", "default", "q", 1_750_000_000_000, 5, 3, 30_000, 60_000,
        "dedup", "ordering", {"a": [1, None, "ü"]}, "correlation", "text/plain", 12, False, 0xDEADBEEF,
    ]  # fmt: skip
    assert msgspec.msgpack.decode(encode(STATUS)) == [
        1, 1, 2, 3, 4, 5, 6, ["id", 5, 2, "owner", "txn"], {"error": "boom"}, ["why", 9],
    ]  # fmt: skip


def test_a_head_from_before_the_checksum_is_read() -> None:
    fields = msgspec.msgpack.decode(encode(HEAD))
    assert decode_head(encode(fields[:-1]), "x") == msgspec.structs.replace(HEAD, checksum=None)


def test_records_cannot_be_changed() -> None:
    for record, field in ((HEAD, "id"), (STATUS, "token"), (STATUS.lease, "id"), (STATUS.dead, "reason")):
        with pytest.raises(AttributeError, match="immutable"):
            setattr(record, field, None)
