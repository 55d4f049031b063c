"""A head that was read before is found by its bytes, and says what the parser would say."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest
from tests.unit.server.raw import Answer, Connection

from millpond import testing
from millpond.server.config import ServerConfig
from millpond.server.context import Call, Context
from millpond.server.exchange import FastProtocol
from millpond.server.heads import MAX_HEAD, MAX_HEADS, Head, Heads, beginning
from millpond.server.run import Server

PATH = "/v1/queue/counts"
BODY = b'{"queue":"q"}'
HEAD = b"POST %b HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (
    PATH.encode(),
    len(BODY),
)


@contextlib.asynccontextmanager
async def server(**more: int) -> AsyncIterator[Server]:
    """A server."""
    async with testing.pond() as pond:
        made = Server(Context(pond, ServerConfig(port=0, drain_grace=0.0, shutdown_timeout=1.0, **more)))  # type: ignore[arg-type]
        await made.start()
        try:
            yield made
        finally:
            await made.stop()


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The bodies of requests whose heads were known."""
    bodies: list[bytes] = []
    run_known = FastProtocol.run_known

    def spied(self: FastProtocol, head: Head, body: bytes) -> None:
        bodies.append(body)
        run_known(self, head, body)

    monkeypatch.setattr(FastProtocol, "run_known", spied)
    return bodies


async def asked(connection: Connection, *pieces: bytes) -> Answer:
    """The answer to a request in pieces."""
    for piece in pieces:
        connection.write(piece)
        await connection.writer.drain()
        await asyncio.sleep(0.01)
    return await connection.answer()


async def test_the_second_of_its_kind_is_known_on_every_connection(found: list[bytes]) -> None:
    async with server() as made, Connection(made.url) as one, Connection(made.url) as other:
        first = await asked(one, HEAD + BODY)
        assert found == []
        second = await asked(one, HEAD + BODY)
        third = await asked(other, HEAD + b'{"queue":"r"}')
        assert found == [BODY, b'{"queue":"r"}']
        for answer in (first, second, third):
            assert answer.status == 200
            assert answer.headers.keys() == first.headers.keys()
        assert first.headers["x-correlation-id"] != second.headers["x-correlation-id"]
        assert first.body == second.body


async def test_what_comes_in_pieces_or_together_is_parsed(found: list[bytes]) -> None:
    async with server() as made, Connection(made.url) as connection:
        await asked(connection, HEAD + BODY)
        assert (await asked(connection, HEAD, BODY)).status == 200
        assert (await asked(connection, HEAD + BODY[:3], BODY[3:])).status == 200
        assert (await asked(connection, HEAD[:30], HEAD[30:] + BODY)).status == 200
        connection.write((HEAD + BODY) * 3)
        assert [(await connection.answer()).status for _ in range(3)] == [200] * 3
        assert found == []
        assert (await asked(connection, HEAD + BODY)).status == 200
        assert found == [BODY]


async def test_a_known_head_can_close_its_connection(found: list[bytes]) -> None:
    closing = HEAD.replace(b"Host", b"Connection: close\r\nHost")
    async with server() as made:
        for _ in range(2):
            async with Connection(made.url) as connection:
                answer = await asked(connection, closing + BODY)
                assert answer.headers["connection"] == "close"
                assert await connection.reader.read() == b""
        assert found == [BODY]


async def test_a_body_that_is_too_large_stays_so(found: list[bytes]) -> None:
    async with server(max_body_bytes=1024) as made:
        head = HEAD.replace(b": %d" % len(BODY), b": 1025")
        for _ in range(2):
            async with Connection(made.url) as connection:
                answer = await asked(connection, head + BODY.ljust(1025))
                assert (answer.status, json.loads(answer.body)["error"]) == (413, "too_large")
        assert found == []


async def test_an_error_of_a_known_head_is_the_same(found: list[bytes]) -> None:
    async with server() as made, Connection(made.url) as connection:
        answers = [await asked(connection, HEAD + b"{" * len(BODY)) for _ in range(3)]
        assert len(found) == 2
        assert {(answer.status, answer.body) for answer in answers} == {(400, answers[0].body)}


async def test_a_head_behind_another_request_is_not_taken_for_it(found: list[bytes]) -> None:
    first = b"GET /healthz HTTP/1.1\r\nHost: t\r\n\r\n"
    async with server() as made, Connection(made.url) as connection:
        connection.write(first + HEAD + BODY)
        assert [(await connection.answer()).status for _ in range(2)] == [200, 200]
        for _ in range(2):
            assert json.loads((await asked(connection, HEAD + BODY)).body)["ready"] == 0
        assert first not in made.app.heads.known
        answer = await asked(connection, first)
        assert (answer.status, answer.body) == (200, b"")


async def test_a_known_head_waits_for_the_answer_before() -> None:
    go = asyncio.Event()

    async def slow(call: Call) -> None:
        await go.wait()
        await call.answer(b"slow")

    async with server() as made:
        made.app.hot["/slow"] = slow
        made.app.quick[b"/slow"] = ("/slow", slow)
        async with Connection(made.url) as connection, Connection(made.url) as other:
            await asked(other, HEAD + BODY)
            await connection.send("POST", "/slow", b"x")
            await asyncio.sleep(0.01)
            connection.write(HEAD + BODY)
            await asked(other, HEAD + BODY)
            go.set()
            assert (await connection.answer()).body == b"slow"
            assert json.loads((await connection.answer()).body)["ready"] == 0


FIELDS = [(b"host", b"t"), (b"content-type", b"application/json"), (b"content-length", b"13")]


async def _handler(call: Call) -> None:
    await call.answer(b"")


STRANGE = {
    "lines that end with LF": (HEAD.replace(b"Host: t\r\n", b"Host: t\n"), FIELDS),
    "a line that goes on": (HEAD.replace(b"Host: t", b"Host:\r\n t"), FIELDS),
    "an end before its end": (b"POST / HTTP/1.1\r\nContent-Length: 9\n\nx\r\n\r\n", FIELDS[:1]),
    "an id of its own": (HEAD.replace(b"Host", b"X-Correlation-Id"), [(b"x-correlation-id", b"t"), *FIELDS[1:]]),
    "a trace of its own": (HEAD.replace(b"Host", b"Traceparent"), [(b"traceparent", b"t"), *FIELDS[1:]]),
    "too long": (HEAD.replace(b"Host: t", b"Host: " + b"t" * MAX_HEAD), FIELDS),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_strange_head_is_not_kept(kind: str) -> None:
    raw, fields = STRANGE[kind]
    heads = Heads()
    heads.keep(raw, Head(PATH, _handler, fields, True, len(BODY)))
    assert heads.known == {}
    heads.keep(HEAD, Head(PATH, _handler, FIELDS, True, len(BODY)))
    assert list(heads.known) == [HEAD]


def test_only_so_many_are_kept() -> None:
    heads = Heads()
    for number in range(MAX_HEADS + 1):
        heads.keep(HEAD.replace(b"Host: t", b"Host: %d" % number), Head(PATH, _handler, FIELDS, True, number))
    assert len(heads.known) == 1


def test_a_beginning_ends_with_the_first_empty_line() -> None:
    assert beginning(HEAD + BODY + b"\r\n\r\n") == HEAD
    assert beginning(HEAD[:-1]) == b""
    assert beginning(b"x" * MAX_HEAD + b"\r\n\r\n") == b""


@pytest.mark.parametrize(
    ("kind", "packed"),
    [(b"application/json", False), (b"application/msgpack", True), (b"application/json; charset=utf-8", None)],
)
def test_what_takes_a_look_is_left_to_it(kind: bytes, packed: bool | None) -> None:
    assert Head(PATH, _handler, [(b"content-type", kind)], True, 1).packed is packed
    assert Head(PATH, _handler, [], True, 1).packed is None
