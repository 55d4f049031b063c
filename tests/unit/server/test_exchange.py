"""Hot requests, which go from the connection to their handlers: by whatever way one comes, its answer is the same."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from tests.unit.server.raw import Connection

from millpond import testing
from millpond.server.config import ServerConfig
from millpond.server.context import Call, Context
from millpond.server.exchange import MAX_BODY, Exchange
from millpond.server.run import Server

BODY = b'{"queue":"q"}'
HEAD = b"Host: t\r\nContent-Type: application/json\r\nX-Correlation-Id: mine\r\n"
LENGTH = b"Content-Length: %d\r\n\r\n" % len(BODY)
PATH = b"/v1/queue/counts"


@contextlib.asynccontextmanager
async def server(**handlers: Callable[[Call], Awaitable[None]]) -> AsyncIterator[Server]:
    """A server with further hot routes, by path without its slash."""
    async with testing.pond() as pond:
        made = Server(Context(pond, ServerConfig(port=0, drain_grace=0.0, shutdown_timeout=1.0)))
        for name, handler in handlers.items():
            made.app.hot[f"/{name}"] = handler
            made.app.quick[f"/{name}".encode()] = (f"/{name}", handler)
        await made.start()
        try:
            yield made
        finally:
            await made.stop()


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The bodies of requests that went directly to their handlers."""
    bodies: list[bytes] = []
    body = Exchange.body

    async def spied(self: Exchange, limit: int | None = None) -> bytes:
        found = await body(self, limit)
        bodies.append(found)
        return found

    monkeypatch.setattr(Exchange, "body", spied)
    return bodies


WAYS = {
    "plain": ([b"POST " + PATH + b" HTTP/1.1\r\n" + HEAD + LENGTH + BODY], True),
    "in pieces": ([b"POST " + PATH + b" HT", b"TP/1.1\r\n" + HEAD, LENGTH, BODY[:4], BODY[4:]], True),
    "without keeping it": ([b"POST " + PATH + b" HTTP/1.1\r\nConnection: close\r\n" + HEAD + LENGTH + BODY], True),
    "with a query": ([b"POST " + PATH + b"?x=1 HTTP/1.1\r\n" + HEAD + LENGTH + BODY], False),
    "absolute": ([b"POST http://t" + PATH + b" HTTP/1.1\r\n" + HEAD + LENGTH + BODY], False),
    "HTTP/1.0": ([b"POST " + PATH + b" HTTP/1.0\r\n" + HEAD + LENGTH + BODY], False),
    "chunked": (
        [b"POST " + PATH + b" HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n"]
        + [b"%x\r\n%b\r\n" % (len(part), part) for part in (BODY[:5], BODY[5:])]
        + [b"0\r\n\r\n"],
        False,
    ),
    "large": (
        [
            b"POST " + PATH + b" HTTP/1.1\r\n" + HEAD,
            b"Content-Length: %d\r\n\r\n%b" % (MAX_BODY + 1, BODY.ljust(MAX_BODY + 1)),
        ],
        False,
    ),
    "as large as it may be": (
        [
            b"POST " + PATH + b" HTTP/1.1\r\n" + HEAD,
            b"Content-Length: %d\r\n\r\n%b" % (MAX_BODY, BODY.ljust(MAX_BODY)),
        ],
        True,
    ),
}


@pytest.mark.parametrize("way", WAYS)
async def test_an_answer_is_the_same_by_all_ways(way: str, direct: list[bytes]) -> None:
    pieces, quick = WAYS[way]
    async with server() as made, Connection(made.url) as connection:
        for piece in pieces:
            connection.write(piece)
            await connection.writer.drain()
            await asyncio.sleep(0)
        answer = await connection.answer()
        assert answer.status == 200
        assert answer.headers["x-correlation-id"] == "mine"
        assert json.loads(answer.body)["ready"] == 0
        assert bool(direct) is quick
        closes = way in {"without keeping it", "HTTP/1.0"}
        assert (answer.headers.get("connection") == "close") is closes
        if closes:
            assert await connection.reader.read() == b""
        else:
            await connection.send("POST", PATH.decode(), BODY, {"Content-Type": "application/json"})
            assert (await connection.answer()).status == 200


async def test_a_request_waits_for_the_answer_to_the_one_before(direct: list[bytes]) -> None:
    async with server() as made, Connection(made.url) as connection:
        one = b"POST %b HTTP/1.1\r\nContent-Type: application/json\r\nX-Correlation-Id: c%d\r\n%b%b"
        connection.write(b"".join(one % (PATH, number, LENGTH, BODY) for number in range(20)))
        for number in range(20):
            assert (await connection.answer()).headers["x-correlation-id"] == f"c{number}"
        assert direct  # the first, at least, and those that came when the connection was free


async def test_a_quick_answer_does_not_overtake_a_slow_one() -> None:
    go = asyncio.Event()

    async def slow(call: Call) -> None:
        await go.wait()
        await call.answer(b"slow")

    async def quick(call: Call) -> None:
        await call.answer(b"quick")

    async with server(slow=slow, quick=quick) as made, Connection(made.url) as connection:
        await connection.send("POST", "/slow", b"x")
        await connection.send("POST", "/quick", b"x")
        async with Connection(made.url) as other:  # by when this is answered, the server has both
            await other.send("POST", "/quick", b"x")
            assert (await other.answer()).body == b"quick"
        go.set()
        assert (await connection.answer()).body == b"slow"
        assert (await connection.answer()).body == b"quick"


async def test_nothing_of_a_request_is_left_to_the_collector_of_garbage() -> None:
    def alive() -> int:
        return sum(type(one) is Exchange for one in gc.get_objects())

    async with server() as made, Connection(made.url) as connection:
        gc.collect()
        before = alive()
        gc.disable()
        try:
            for _ in range(20):
                await connection.send("POST", PATH.decode(), BODY, {"Content-Type": "application/json"})
                assert (await connection.answer()).status == 200
            assert alive() <= before + 2  # the connection knows its latest; its task may not be gone yet
        finally:
            gc.enable()


async def test_a_handler_that_answers_nothing_ends_the_connection() -> None:
    async def silent(call: Call) -> None:
        await call.body()

    async with server(silent=silent) as made, Connection(made.url) as connection:
        await connection.send("POST", "/silent", b"x")
        assert await connection.reader.read() == b""


async def test_an_answer_that_breaks_off_ends_the_connection() -> None:
    async def breaking(call: Call) -> None:
        await call.start(200, [(b"content-length", b"10")])
        await call.write(b"half")
        raise ValueError("nobody foresaw this")

    async with server(breaking=breaking) as made, Connection(made.url) as connection:
        await connection.send("POST", "/breaking", b"x")
        assert (await connection.head())[0] == 200
        assert await connection.reader.read() == b"half"


async def test_a_header_cannot_bring_another_one() -> None:
    async def injected(call: Call) -> None:
        await call.answer(b"x", more=[(b"x-name", b"a\r\nset-cookie: b")])

    async with server(injected=injected) as made, Connection(made.url) as connection:
        await connection.send("POST", "/injected", b"x")
        answer = await connection.answer()
        assert answer.status == 500
        assert "set-cookie" not in answer.headers
        assert b"cookie" not in answer.body


async def test_an_answer_may_come_in_pieces_or_be_shorter_than_it_said() -> None:
    async def pieces(call: Call) -> None:
        await call.start(200, [])
        await call.write(b"one")
        await call.write(b"")
        await call.end(b"two")

    async def short(call: Call) -> None:
        await call.start(200, [(b"content-length", b"3")])
        await call.end(b"x")

    async with server(pieces=pieces, short=short) as made, Connection(made.url) as connection:
        await connection.send("POST", "/pieces", b"x")
        assert (await connection.answer()).body == b"onetwo"
        await connection.send("POST", "/short", b"x")
        assert (await connection.head())[0] == 200
        assert await connection.reader.read() == b"x"


async def test_a_handler_is_told_that_its_client_went_away() -> None:
    waiting, gone = asyncio.Event(), asyncio.Event()

    async def patient(call: Call) -> None:
        assert await call.body() == b"x"
        assert [part async for part in call.chunks()] == []
        waiting.set()
        await call.gone()
        gone.set()

    async with server(patient=patient) as made:
        async with Connection(made.url) as connection:
            await connection.send("POST", "/patient", b"x")
            await waiting.wait()
        await asyncio.wait_for(gone.wait(), 60)


async def test_a_body_above_the_limit_of_its_route_is_refused() -> None:
    async def narrow(call: Call) -> None:
        await call.body(3)

    async with server(narrow=narrow) as made, Connection(made.url) as connection:
        await connection.send("POST", "/narrow", b"four")
        answer = await connection.answer()
        assert (answer.status, json.loads(answer.body)["error"]) == (400, "invalid_body")
