"""What goes over a connection: many requests, one after the other or at once, and answers in one piece."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable

import pytest
from tests.unit.server.lockd import Connection, form

from millpond import testing
from millpond.server.config import ServerConfig
from millpond.server.context import Call, Context
from millpond.server.run import Server


@contextlib.asynccontextmanager
async def server(**handlers: Callable[[Call], object]) -> AsyncIterator[str]:
    """A server with further handlers, by path without its slash."""
    async with testing.pond() as pond:
        made = Server(Context(pond, ServerConfig(port=0, shutdown_timeout=1.0)))
        for name, handler in handlers.items():
            made.app.hot[f"/{name}"] = handler  # type: ignore[assignment]
        await made.start()
        yield made.url
        await made.stop()


async def test_requests_on_one_connection_and_all_at_once() -> None:
    async with server() as url, Connection(url) as connection:
        for _ in range(3):
            await connection.send("POST", "/v1/queue/stats", b'{"queue":"q"}')
            assert (await connection.answer()).status == 200
        one = b"POST /v1/queue/stats?queue=%d HTTP/1.1\r\nHost: t\r\nX-Correlation-Id: c%d\r\nContent-Length: 0\r\n\r\n"
        connection.write(b"".join(one % (number, number) for number in range(50)))
        for number in range(50):
            answer = await connection.answer()
            assert answer.headers["x-correlation-id"] == f"c{number}"
            assert json.loads(answer.body)["queue"] == str(number)


async def test_an_answer_goes_out_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    from millpond.server.protocol import Cycle

    written: list[bytes] = []

    async def answered(call: Call) -> None:
        cycle = call.send.__self__  # type: ignore[attr-defined]
        assert isinstance(cycle, Cycle)
        transport = cycle.transport

        class Spy:
            def __getattr__(self, name: str) -> object:
                return getattr(transport, name)

            def write(self, data: bytes) -> None:
                written.append(data)
                transport.write(data)

        cycle.transport = Spy()  # type: ignore[assignment]
        await call.answer(b"body")

    async with server(answered=answered) as url, Connection(url) as connection:
        await connection.send("POST", "/answered")
        assert (await connection.answer()).body == b"body"
    assert len(written) == 1


async def test_parts_of_a_body_without_a_length_are_chunks_and_each_is_on_its_way() -> None:
    go = asyncio.Event()

    async def parts(call: Call) -> None:
        await call.start(200, [])
        await call.write(b"")  # the head alone
        await go.wait()
        await call.write(b"one")
        await call.write(b"two")
        await call.end(b"three")

    async with server(parts=parts) as url, Connection(url) as connection:
        await connection.send("GET", "/parts")
        status, headers = await connection.head()
        assert (status, headers["transfer-encoding"]) == (200, "chunked")
        go.set()
        assert [await connection.chunk() for _ in range(4)] == [b"one", b"two", b"three", b""]
        await connection.send("GET", "/healthz")
        assert (await connection.answer()).status == 200


@pytest.mark.parametrize(("length", "body"), [(3, b"four"), (5, b"four")])
async def test_a_wrong_length_closes_the_connection(length: int, body: bytes) -> None:
    async def wrong(call: Call) -> None:
        await call.start(200, [(b"content-length", b"%d" % length)])
        await call.end(body)

    async with server(wrong=wrong) as url, Connection(url) as connection:
        await connection.send("GET", "/wrong")
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            answer = await connection.answer()
            assert answer.status == 500
        assert await connection.reader.read() == b""


@pytest.mark.parametrize("value", [b"a\r\nX-Evil: 1", b"a\nX-Evil: 1", b"a\rb"])
async def test_no_header_can_begin_another_line(value: bytes) -> None:
    async def injected(call: Call) -> None:
        await call.start(200, [(b"content-length", b"0"), (b"content-type", value)])
        await call.end()

    async with server(injected=injected) as url, Connection(url) as connection:
        await connection.send("GET", "/injected")
        everything = await connection.reader.read()
        assert b"X-Evil" not in everything
        assert everything.startswith(b"HTTP/1.1 500 ")


async def test_a_head_request_has_the_length_and_no_body() -> None:
    async with server() as url, Connection(url) as connection:
        connection.write(b"HEAD /v1/openapi.json HTTP/1.1\r\nHost: t\r\n\r\n")
        status, headers = await connection.head()
        assert (status, int(headers["content-length"]) > 10) == (200, True)
        await connection.send("GET", "/healthz")
        assert (await connection.answer()).status == 200


@pytest.mark.parametrize(
    ("request_", "closes"),
    [
        (b"GET /healthz HTTP/1.0\r\n\r\n", True),
        (b"GET /healthz HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n", True),
        (b"GET http://t/healthz HTTP/1.1\r\nHost: t\r\n\r\n", False),
        (b"GET /healthz?a=b#c HTTP/1.1\r\nHost: t\r\n\r\n", False),
    ],
)
async def test_other_forms_of_a_request(request_: bytes, closes: bool) -> None:
    async with server() as url, Connection(url) as connection:
        connection.write(request_)
        answer = await connection.answer()
        assert answer.status == 200
        assert (answer.headers.get("connection") == "close") == closes
        if closes:
            assert await connection.reader.read() == b""


async def test_a_client_that_asks_first_is_told_to_go_on() -> None:
    async with server() as url, Connection(url) as connection:
        body, kind = form({"queue": "q"}, b"x" * 1000)
        connection.write(
            f"POST /v1/queue/enqueue HTTP/1.1\r\nHost: t\r\nContent-Type: {kind}\r\n"
            f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n".encode()
        )
        assert await connection.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.write(body)
        assert (await connection.answer()).status == 200


async def test_every_answer_has_a_date_and_may_not_be_taken_for_a_page() -> None:
    async with server() as url, Connection(url) as connection:
        for path in ("/healthz", "/nothing", "/v1/queue/stats?queue=q"):
            await connection.send("POST", path)
            answer = await connection.answer()
            assert answer.headers["date"].endswith("GMT")
            assert answer.headers["x-content-type-options"] == "nosniff"
