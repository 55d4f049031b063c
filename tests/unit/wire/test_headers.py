"""Correlation ids and transaction ids."""

from __future__ import annotations

import base64

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


def test_a_transaction_id_is_made_from_the_lease_and_from_no_other() -> None:
    one, other = "00" * 16, "01" * 16
    assert headers.is_xid(lockd.transaction_id(one))
    for made in map(lockd.transaction_id, (one, other, "ab12" * 8)):
        # A strict reader of xids wants the padding to be nothing.
        assert base64.b32hexdecode(f"{made.upper()}====").hex()
        assert base64.b32hexencode(base64.b32hexdecode(f"{made.upper()}====")).decode().rstrip("=").lower() == made
    assert lockd.transaction_id(one) == lockd.transaction_id(one) != lockd.transaction_id(other)
    for foreign in ("", "xyz", "00", "é" * 32):
        assert lockd.transaction_id(foreign) == ""
