"""docs/reference/http.md: its examples are run against a server, its tables held against the routes."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from tests.docs.test_examples import Reader, blocks, work_through

from millpond import connect
from millpond.server.native_routes import ROUTES
from millpond.server.run import running
from millpond.wire import native

PAGE = (Path(__file__).parents[2] / "docs/reference/http.md").read_text()
URL = "http://127.0.0.1:9341"


@pytest.fixture
def url() -> Iterator[str]:
    """A server on an event loop of its own thread."""
    ready = threading.Event()
    told: list[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        stop = asyncio.Event()
        async with connect("memory://") as pond, running(pond) as listening:
            told.append((listening, asyncio.get_running_loop(), stop))
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(30)
    try:
        yield told[0][0]
    finally:
        told[0][1].call_soon_threadsafe(told[0][2].set)
        thread.join(30)


def test_the_examples_run(tmp_path: Path, url: str) -> None:
    found = blocks(PAGE.replace(URL, url))
    reader = Reader(tmp_path)
    with contextlib.closing(reader):
        assert work_through(reader, "docs/reference/http.md", found) >= 7


def _rows(header: str) -> list[list[str]]:
    """The cells of every table that begins with this header."""
    rows = []
    for table in PAGE.split(f"{header}\n")[1:]:
        for line in table.splitlines()[1:]:
            if not line.startswith("|"):
                break
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_the_tables_have_every_route_with_its_scope_and_fields() -> None:
    rows = {row[0].strip("`"): row for row in _rows("| route | scope | request | answer |")}
    assert set(rows) == {route.path for route in ROUTES}
    for route in ROUTES:
        _, scope, request, _ = rows[route.path]
        assert re.search(rf"\b{route.scope}\b", scope), route.path
        named = {
            word.rstrip("?:") for word in re.findall(r"(?<![{\w])[a-z_]+\??:?", re.sub(r"\[?\{.*?\}\]?", "", request))
        }
        named |= {"namespace", "queue"} if "…" in request else set()
        fields = {field.encode_name for field in msgspec.structs.fields(route.request)}
        assert fields <= named | {"message", "then"}, f"{route.path}: {fields - named} are not in the page"


def test_every_field_of_a_new_message_and_of_a_policy_is_named() -> None:
    plain = {"etag", "cursor", "enqueued_at_ms", "updated_at_ms"}
    for struct in (native.NewMessage, native.PolicyChange, native.Delivery):
        fields = {field.encode_name for field in msgspec.structs.fields(struct)} - plain
        assert [name for name in sorted(fields) if name not in PAGE] == []


def test_the_frames_are_those_that_there_are() -> None:
    rows = {row[0].strip("`"): row[1] for row in _rows("| frame | fields | |")}
    frames = {
        frame.__struct_config__.tag: frame for frame in (native.Hello, native.Messages, native.Heartbeat, native.End)
    }
    assert set(rows) == set(frames)
    for name, frame in frames.items():
        for field in msgspec.structs.fields(frame):
            assert field.encode_name in rows[name]


def test_the_limits_are_those_in_the_code() -> None:
    for said, value in (
        ("(≤ 1,000)", native.MAX_BATCH),
        ("`credit` messages (≤ 1,000)", native.MAX_CREDIT),
        ("`heartbeat_ms` (15,000)", native.HEARTBEAT_MS),
        ("`max_batch` (100)", 100),
    ):
        assert said in PAGE
        assert re.search(r"[\d,]+(?=\)$)", said)[0].replace(",", "") == str(value)  # type: ignore[index]
    assert native.MAX_FRAME_BYTES == 64 * 1024**2
