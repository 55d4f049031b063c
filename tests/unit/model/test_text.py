"""Text of others' making is stored whole, and within its limit."""

from __future__ import annotations

import pytest

from millpond.model.text import clipped, clipped_to_bytes, text_of


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_an_exception_without_a_text_is_told_all_the_same() -> None:
    assert text_of(ValueError("no such flour")) == "no such flour"
    assert text_of(Unprintable()) == "(its text cannot be had: RuntimeError)"


@pytest.mark.parametrize(
    ("text", "characters", "bytes_"),
    [("mühle", "müh", "mü"), ("mü\ud800le", "mü?", "mü"), ("ab", "ab", "ab"), ("", "", "")],
)
def test_a_text_is_clipped_to_whole_characters(text: str, characters: str, bytes_: str) -> None:
    assert clipped(text, 3) == characters
    assert clipped_to_bytes(text, 3) == bytes_


@pytest.mark.parametrize("limit", range(14))
def test_no_character_is_cut_in_two(limit: int) -> None:
    text = "aü€😀b\ud800c"
    found = clipped_to_bytes(text, limit)
    assert len(found.encode()) <= limit
    assert "aü€😀b?c".startswith(found)
    assert limit - len(found.encode()) < 4
