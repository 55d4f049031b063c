from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.cli import input as reading
from millpond.cli.input import LineTooLong, Splitter, batches, chunks, lines


@given(st.lists(st.binary(max_size=40)), st.sampled_from([b"\n", b"\0"]))
def test_lines_do_not_depend_on_where_the_chunks_are_cut(pieces: list[bytes], separator: bytes) -> None:
    splitter = Splitter(separator)
    found = [line for piece in pieces for line in splitter.feed(piece)] + splitter.finish()
    whole = b"".join(pieces)
    expected = whole.split(separator)
    assert found == (expected[:-1] if expected[-1] == b"" else expected)


def test_a_line_beyond_the_limit_is_refused_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_LINE", 10)
    splitter = Splitter()
    assert splitter.feed(b"0123456789\n") == [b"0123456789"]
    splitter.feed(b"01234")
    with pytest.raises(LineTooLong, match="--file"):
        splitter.feed(b"567890")
    with pytest.raises(LineTooLong):
        Splitter().feed(b"0123456789a\nb")


def test_a_regular_file_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "data"
    data = os.urandom(600_000)
    path.write_bytes(data)

    async def read() -> bytes:
        with path.open("rb") as file:
            return b"".join([chunk async for chunk in chunks(file.fileno())])

    assert asyncio.run(read()) == data


def test_lines_of_a_pipe_come_as_soon_as_they_are_written() -> None:
    async def read() -> list[list[bytes]]:
        source, sink = os.pipe()
        try:
            arriving = lines(source)
            os.write(sink, b"a\nb\nc")
            first, _ = await anext(arriving)
            os.write(sink, b"d\n")
            second, _ = await anext(arriving)
            os.close(sink)
            last, _ = await anext(arriving)
            return [first, second, last]
        finally:
            os.close(source)

    assert asyncio.run(read()) == [[b"a", b"b"], [b"cd"], []]


def test_batches_keep_order_and_size() -> None:
    assert list(batches([b"1", b"2", b"3"], 2)) == [[b"1", b"2"], [b"3"]]
    assert list(batches([], 2)) == []
