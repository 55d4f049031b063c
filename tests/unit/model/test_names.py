from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.errors import InvalidMessageId, InvalidQueue
from millpond.model import names

ID = "0197a3c2-1111-7abc-8def-0123456789ab"


@pytest.mark.parametrize(
    ("given_name", "expected"),
    [
        ("orders", "orders"),
        ("Orders", "orders"),
        ("  orders\n", "orders"),
        ("a.b-c_9", "a.b-c_9"),
        ("...", "..."),
        (".a", ".a"),
        ("-", "-"),
        ("x" * 128, "x" * 128),
    ],
)
def test_names_are_normalised(given_name: str, expected: str) -> None:
    assert names.queue_name(given_name) == expected
    assert names.namespace_name(given_name) == expected
    assert names.queue_key(given_name, given_name) == (expected, expected)


BAD_NAMES = ["", "  ", "a\nb", "\ud800", "a b", "a/b", "a\\b", "a\x00b", "ä", "日本", "a:b", "a%2e", "x" * 129]


@pytest.mark.parametrize("bad", BAD_NAMES)
def test_bad_names_are_refused(bad: str) -> None:
    with pytest.raises(InvalidQueue):
        names.queue_name(bad)
    if bad:
        with pytest.raises(InvalidQueue):
            names.namespace_name(bad)


@pytest.mark.parametrize("bad", [None, 5, b"orders", object()])
def test_names_are_text(bad: Any) -> None:
    with pytest.raises(InvalidQueue, match="must be text"):
        names.queue_name(bad)
    if bad is not None:
        with pytest.raises(InvalidQueue, match="must be text"):
            names.namespace_name(bad)


def test_no_namespace_is_the_default_one() -> None:
    assert names.namespace_name(None) == "default"
    assert names.namespace_name("") == "default"
    assert names.queue_key(None, "Q") == ("default", "q")


@pytest.mark.parametrize("bad", [".", "..", " .. ", ".\n"])
def test_N1_dot_names_are_refused(bad: str) -> None:
    with pytest.raises(InvalidQueue, match="may not be"):
        names.queue_name(bad)
    with pytest.raises(InvalidQueue, match="may not be"):
        names.namespace_name(bad)
    with pytest.raises(InvalidQueue, match="may not be"):
        names.queue_key(bad, "q")


@pytest.mark.parametrize(
    "bad",
    [
        "",
        ".",
        "..",
        "../" + ID,
        ID + "/..",
        "../../other/msg/" + ID,
        ID[:-1],
        ID + "0",
        ID.replace("-", ""),
        "{" + ID + "}",
        "g" + ID[1:],
        ID.replace("-", "/"),
        ID + "\x00",
        "٠197a3c2-1111-7abc-8def-0123456789ab",
    ],
)
def test_N2_ids_are_checked(bad: str) -> None:
    with pytest.raises(InvalidMessageId, match="is not a UUID"):
        names.message_id(bad)


@pytest.mark.parametrize("bad", [None, 5, ID.encode()])
def test_ids_are_text(bad: Any) -> None:
    with pytest.raises(InvalidMessageId, match="must be text"):
        names.message_id(bad)


def test_ids_are_normalised() -> None:
    assert names.message_id(f" {ID.upper()}\n") == ID


def test_an_error_shows_no_more_than_a_part_of_what_was_given() -> None:
    with pytest.raises(InvalidMessageId) as refusal:
        names.message_id("x" * 10_000)
    assert len(str(refusal.value)) < 200
    with pytest.raises(InvalidQueue) as refused:
        names.queue_name("x" * 10_000)
    assert len(str(refused.value)) < 200


@given(st.text(max_size=140))
def test_what_passes_stays_where_it_is_put(text: str) -> None:
    try:
        name = names.queue_name(text)
    except InvalidQueue:
        return
    assert name not in {"", ".", ".."}
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-")
    assert len(name) <= names.MAX_NAME_BYTES
    assert names.queue_name(name) == name
