"""Correlation ids and transaction ids."""

from __future__ import annotations

import base64
import random

import pytest

from millpond.wire import headers, lockd


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("abc", "abc"),
        ("  a b  ", "a b"),
        ("x" * 128, "x" * 128),
        ("x" * 129, None),
        ("", None),
        ("   ", None),
        ("a\tb", None),
        ("é", None),
        (None, None),
        (b" a~ ", "a~"),
        (b"\xff", None),
        (b"a\x7f", None),
    ],
)
def test_correlation_ids_are_trimmed_and_what_cannot_stand_in_a_header_is_none(
    given: str | bytes | None, kept: str | None
) -> None:
    assert headers.correlation_id(given) == kept


def test_xids_are_base32hex_of_twelve_bytes() -> None:
    source = random.Random(1)
    for data in [bytes(12), b"\xff" * 12, *(source.randbytes(12) for _ in range(100))]:
        made = headers.xid(data)
        assert made == base64.b32hexencode(data).decode().rstrip("=").lower()
        assert headers.is_xid(made)
    with pytest.raises(ValueError, match="12 bytes"):
        headers.xid(b"short")


def test_a_transaction_id_is_made_from_the_lease_and_from_no_other() -> None:
    one, other = "00" * 16, "01" * 16
    assert headers.is_xid(lockd.transaction_id(one))
    assert lockd.transaction_id(one) == lockd.transaction_id(one) != lockd.transaction_id(other)
    for foreign in ("", "xyz", "00", "é" * 32):
        assert lockd.transaction_id(foreign) == ""
