"""What one client may send, hold open and keep waiting, over real sockets and under a clock that the test moves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
from tests.unit.server.raw import Connection, request

from millpond import testing
from millpond.server.config import ServerConfig
from millpond.server.connections import BODY, BUSY, LINGERING, MOST_PIPELINED, Watch
from millpond.server.context import Call, Context
from millpond.server.run import Server


class Rig:
    """A server with routes of the tests' own: /echo answers with its body's size, /stuck never, /long with 8 MiB."""

    def __init__(self, pond: testing.TestPond, server: Server) -> None:
        self.pond = pond
        self.server = server
        self.url = server.url
        self.watch: Watch = server.watch
        self.entered = asyncio.Event()
        self.gone = asyncio.Event()
        self.go = asyncio.Event()

    async def echo(self, call: Call) -> None:
        await call.answer(b"%d" % len(await call.body(100_000_000)))

    async def stuck(self, call: Call) -> None:
        self.entered.set()
        try:
            await call.body()
            await call.gone()
        finally:
            self.gone.set()

    async def long(self, call: Call) -> None:
        await call.start(200, [(b"content-length", b"%d" % (64 * 2**20))])
        for _ in range(64):
            await call.write(bytes(2**20))
        await call.end()

    async def early(self, call: Call) -> None:
        await call.answer(b"no", 403)

    async def until(self, condition: Callable[[], Any]) -> None:
        """Let real sockets catch up."""
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.001)

    async def pass_time(self, seconds: float) -> None:
        """Let the server's clock advance, and its sockets take notice."""
        for _ in range(4):
            await asyncio.sleep(0)
        self.pond.manual_clock.advance(seconds)
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def rig(**settings: Any) -> AsyncIterator[Rig]:
    async with testing.pond() as pond:
        server = Server(Context(pond, ServerConfig(port=0, shutdown_timeout=0.0, drain_grace=0.0, **settings)))
        await server.start()
        made = Rig(pond, server)
        server.app.hot.update({"/echo": made.echo, "/stuck": made.stuck, "/long": made.long, "/early": made.early})
        try:
            yield made
        finally:
            await server.stop()


async def closed(connection: Connection) -> bool:
    """Nothing more comes."""
    async with asyncio.timeout(60):
        with contextlib.suppress(ConnectionError):
            assert await connection.reader.read() == b""
    return True


async def refused(connection: Connection) -> tuple[int, str]:
    """Status and code of an answer that ends the connection."""
    answer = await connection.answer()
    assert answer.headers["connection"] == "close"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert await closed(connection)
    return answer.status, json.loads(answer.body)["error"]


# Heads


async def test_a_head_that_is_not_there_in_time_is_refused() -> None:
    async with rig(header_timeout=10) as made, Connection(made.url) as connection:
        connection.write(b"POST /echo HTTP/1.1\r\nHost: x\r\n")
        await made.until(lambda: any(one._begun for one in made.watch.connections))
        for _ in range(9):  # byte by byte does not make it any longer
            await made.pass_time(1)
            connection.write(b"a")
        assert made.watch.refused.total() == 0
        await made.pass_time(3)
        assert await refused(connection) == (408, "request_timeout")
        assert made.watch.refused == {"request_timeout": 1}


async def test_a_connection_that_says_nothing_is_closed() -> None:
    async with rig(header_timeout=10) as made, Connection(made.url) as connection:
        await made.until(lambda: made.watch.connections)
        await made.pass_time(13)
        assert await closed(connection)
        assert made.watch.refused == {"silent": 1}


async def test_an_idle_connection_is_kept_for_its_time_and_no_longer() -> None:
    async with rig(header_timeout=10, keep_alive=60) as made, Connection(made.url) as connection:
        for _ in range(3):
            await connection.send("POST", "/echo", b"abc")
            assert (await connection.answer()).body == b"3"
            await made.pass_time(50)
        await made.pass_time(15)
        assert await closed(connection)
        assert made.watch.refused == {"idle": 1}


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_head_that_is_too_large_is_refused(at_once: bool) -> None:
    async with rig(max_header_bytes=4096) as made, Connection(made.url) as connection:
        connection.write(b"POST /echo HTTP/1.1\r\nHost: x\r\n")
        if at_once:
            connection.write(b"X-Large: " + b"a" * 5000 + b"\r\n\r\n")
        else:
            for _ in range(3):
                connection.write(b"X-Large: " + b"a" * 3000)
                await connection.writer.drain()
                await asyncio.sleep(0.01)
        assert await refused(connection) == (431, "header_too_large")
        assert (await request(made.url, "POST", "/echo", b"ab")).body == b"2"


async def test_a_flood_of_headers_is_refused_while_it_comes() -> None:
    async with rig(max_header_bytes=4096) as made, Connection(made.url) as connection:
        connection.write(b"GET /" + b"a" * 4000)
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                connection.write(b"a" * 100_000)
                await connection.writer.drain()
                if made.watch.refused:
                    break
        assert await refused(connection) == (431, "header_too_large")


async def test_too_many_headers_are_refused_and_those_allowed_are_not() -> None:
    async with rig(max_headers=20) as made:
        many = {f"X-{number}": "1" for number in range(18)}
        assert (await request(made.url, "POST", "/echo", b"a", many)).status == 200
        async with Connection(made.url) as connection:
            await connection.send("POST", "/echo", b"", {**many, "X-More": "1"})
            assert await refused(connection) == (431, "header_too_large")


async def test_a_large_body_does_not_count_as_head_of_the_request_behind_it() -> None:
    async with rig(max_header_bytes=1024) as made, Connection(made.url) as connection:
        for size in (300_000, 3):
            await connection.send("POST", "/echo", b"x" * size)
        assert (await connection.answer()).body == b"300000"
        assert (await connection.answer()).body == b"3"


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50),
        b"GET /\xff\xfe HTTP/1.1\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nContent-Length: +1\r\n\r\na",
        b"POST /echo HTTP/1.1\r\nContent-Length: 1, 1\r\n\r\na",
        b"POST /echo HTTP/1.1\r\nContent-Length : 1\r\n\r\na",
        b"POST /echo HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\na",
        b"POST /echo HTTP/1.1\nContent-Length: 1\n\na",
        b"POST /echo HTTP/1.1\r\nX: a\r\n folded\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nX: a\0b\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nX: a\rb\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: xchunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked, identity\r\n\r\n1\r\na\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: \x0bchunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\na\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff1\r\n",
        b"POST /echo HTTP/1.1\r\nBad Header: 1\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
async def test_what_is_no_request_is_refused_in_our_words(sent: bytes) -> None:
    async with rig() as made, Connection(made.url) as connection:
        connection.write(sent)
        assert await refused(connection) == (400, "bad_request")
        assert (await request(made.url, "POST", "/echo", b"ab")).body == b"2"


# Bodies


async def test_a_body_that_makes_no_progress_is_refused_and_its_handler_told() -> None:
    async with rig(body_timeout=30) as made, Connection(made.url) as connection:
        connection.write(b"POST /echo HTTP/1.1\r\nContent-Length: 100000\r\n\r\nabc")
        await made.until(lambda: made.server._state.tasks)
        await made.pass_time(33)
        assert await refused(connection) == (408, "request_timeout")
        await made.until(lambda: not made.server._state.tasks)


async def test_a_body_that_trickles_is_refused_and_a_slow_one_is_not() -> None:
    async with rig(body_timeout=10) as made, Connection(made.url) as slow, Connection(made.url) as trickle:
        for connection in (slow, trickle):
            connection.write(b"POST /echo HTTP/1.1\r\nContent-Length: 12000\r\n\r\n")
        await made.until(lambda: len(made.server._state.tasks) == 2)
        for second in range(11):
            slow.write(b"x" * 1000)
            trickle.write(b"x" * 10)
            bodies = [1000 * (second + 1), 10 * (second + 1)]
            await made.until(
                lambda bodies=bodies: sorted(one._body for one in made.watch.connections) == sorted(bodies)
            )
            await made.pass_time(1)
        assert await refused(trickle) == (408, "request_timeout")
        slow.write(b"x" * 1000)
        assert (await slow.answer()).body == b"12000"


async def test_a_client_is_not_blamed_for_what_the_server_takes_its_time_for() -> None:
    async with rig(body_timeout=10, header_timeout=10, keep_alive=10) as made, Connection(made.url) as connection:
        await connection.send("POST", "/stuck")
        await made.entered.wait()
        connection.write(b"POST /ec")  # and half of the next one
        for _ in range(100):
            await made.pass_time(1)
        assert made.watch.refused.total() == 0
        assert not made.gone.is_set()


@pytest.mark.parametrize("kind", ["trailer", "trailers", "extension"])
async def test_what_nobody_reads_behind_a_body_is_bounded(kind: str) -> None:
    async with rig(max_header_bytes=1024) as made, Connection(made.url) as connection:
        connection.write(b"POST /stuck HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
        await made.entered.wait()
        connection.write({"trailer": b"0\r\nX-T: ", "trailers": b"0\r\n", "extension": b"1;"}[kind])
        piece = b"X-Trailer: 1\r\n" * 5000 if kind == "trailers" else b"a" * 70_000
        with contextlib.suppress(ConnectionError):
            for _ in range(50):
                connection.write(piece)
                await connection.writer.drain()
                if made.watch.refused:
                    break
                await asyncio.sleep(0)
        assert await refused(connection) in {(431, "header_too_large"), (400, "bad_request")}
        await made.gone.wait()


async def test_a_body_may_come_in_pieces_of_any_size() -> None:
    """TLS decrypts what came while nothing was read in one piece."""
    async with rig() as made, Connection(made.url) as connection:
        connection.write(b"POST /echo HTTP/1.1\r\nContent-Length: 4000000\r\n\r\n")
        await made.until(lambda: any(one._stage == BODY for one in made.watch.connections))
        [there] = made.watch.connections
        for _ in range(4):
            there.data_received(bytes(1_000_000))
        assert (await connection.answer()).body == b"4000000"
        assert not made.watch.refused


async def test_an_answer_before_the_end_of_a_body_ends_the_connection_and_arrives() -> None:
    async with rig() as made, Connection(made.url) as connection:
        connection.write(b"POST /early HTTP/1.1\r\nContent-Length: 100000000\r\n\r\n" + bytes(1000))
        answer = await connection.answer()
        assert (answer.status, answer.body) == (403, b"no")
        connection.write(bytes(100_000))
        await made.pass_time(LINGERING * 1.6)
        await made.until(lambda: not made.watch.connections)


async def test_a_client_that_reads_nothing_is_cut_off() -> None:
    async with rig(write_timeout=60) as made, Connection(made.url) as connection:
        connection.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await connection.send("POST", "/long")
        await made.until(lambda: any(one._stalled is not None for one in made.watch.connections))
        await made.pass_time(50)
        assert made.watch.connections
        await made.pass_time(15)
        await made.until(lambda: not made.watch.connections)
        assert made.watch.refused == {"slow_reader": 1}


async def test_a_client_that_reads_slowly_is_not() -> None:
    async with rig(write_timeout=60) as made, Connection(made.url) as connection:
        await connection.send("POST", "/long")
        assert (await connection.head())[0] == 200
        for _ in range(64):
            await connection.reader.readexactly(2**20)
            await made.pass_time(5)
        assert made.watch.refused.total() == 0


async def test_of_answers_that_nobody_reads_only_so_much_lies_here() -> None:
    async with rig(write_timeout=60) as made, contextlib.AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(Connection(made.url)) for _ in range(5)]
        for number, connection in enumerate(connections, 1):
            connection.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await connection.send("POST", "/long")
            await made.until(lambda number=number: len(made.watch.unsent) == number)  # type: ignore[misc]
        order, watch = list(made.watch.unsent), made.watch
        # How much of an answer the system takes is its own affair: there is to be room for the last two.
        most = sum(one.unsent for one in order[-2:])
        watch.config = msgspec.structs.replace(watch.config, max_unsent_bytes=most)
        watch._shed()
        assert len(watch.connections) == 5, "they may be reading"
        for _ in range(3):
            await made.pass_time(1)
        await made.until(lambda: len(watch.connections) < 5)
        assert watch.connections == set(order[-2:]), "those who read slowly for longest go first"
        assert watch.refused == {"too_much_unsent": 3}
        # Who reads is out of it, and gets all of it.
        watch.config = msgspec.structs.replace(watch.config, max_unsent_bytes=10 * most)
        for connection in connections[-2:]:
            connection.writer.transport.resume_reading()  # type: ignore[attr-defined]
            assert (await connection.head())[0] == 200
            for _ in range(64):
                await connection.reader.readexactly(2**20)
        await made.until(lambda: not watch.unsent)
        assert watch._unsent == 0


# How many


async def test_more_connections_than_the_server_takes_are_told_so() -> None:
    async with rig(max_connections=2) as made, contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(Connection(made.url))
        second = await stack.enter_async_context(Connection(made.url))
        await made.until(lambda: len(made.watch.connections) == 2)
        third = await stack.enter_async_context(Connection(made.url))
        assert await refused(third) == (503, "too_many_connections")
        await second.send("POST", "/echo", b"ab")
        assert (await second.answer()).body == b"2"
        first.writer.close()
        await made.pass_time(LINGERING * 1.6)
        await made.until(lambda: len(made.watch.connections) == 1)
        fourth = await stack.enter_async_context(Connection(made.url))
        await fourth.send("POST", "/echo", b"abc")
        assert (await fourth.answer()).body == b"3"


async def test_more_connections_than_one_address_may_have_are_told_so() -> None:
    async with rig(max_connections_per_address=1) as made:
        async with Connection(made.url):
            await made.until(lambda: made.watch.connections)
            async with Connection(made.url) as second:
                assert await refused(second) == (503, "too_many_connections_of_address")
        await made.until(lambda: not made.watch.connections)
        assert made.watch.addresses == {}
        assert (await request(made.url, "POST", "/echo", b"a")).status == 200


async def test_a_refused_client_that_goes_on_sending_is_cut_off() -> None:
    async with rig(max_headers=10) as made, Connection(made.url) as connection:
        await connection.send("GET", "/", headers={f"X-{number}": "1" for number in range(20)})
        assert (await connection.head())[0] == 431
        connection.write(b"x" * 1000)
        await made.pass_time(LINGERING * 1.6)
        await made.until(lambda: not made.watch.connections)


# Requests sent before the last answer


async def stuck_with_one_behind(made: Rig, connection: Connection) -> None:
    """A request that is being answered, and another that waits for its turn."""
    await connection.send("POST", "/stuck")
    await made.entered.wait()
    await connection.send("POST", "/echo")
    [one] = made.watch.connections
    await made.until(lambda: one.pipeline and one._stage == BUSY)


async def full(made: Rig, connection: Connection) -> None:
    """So much behind a request that is being answered that nothing more is read."""
    connection.write(b"POST /echo HTTP/1.1\r\nContent-Length: 100000\r\n\r\n" + bytes(70_000))
    [one] = made.watch.connections
    await made.until(lambda: one.flow.read_paused)


filled = pytest.mark.parametrize("filled", [False, True], ids=["read on", "full"])


@filled
@pytest.mark.parametrize("how", ["abort", "close", "half"])
async def test_a_client_that_goes_is_noticed_behind_a_request_that_waits_for_its_turn(how: str, filled: bool) -> None:
    async with rig() as made, Connection(made.url) as connection:
        await stuck_with_one_behind(made, connection)
        if filled:
            await full(made, connection)
        if how == "abort":
            connection.writer.transport.abort()
        elif how == "half":
            connection.writer.write_eof()
        else:
            connection.writer.close()
        if filled:
            [one] = made.watch.connections
            await made.until(one.hung_up)
            await made.pass_time(1)
        await asyncio.wait_for(made.gone.wait(), 60)
        await made.until(lambda: not made.watch.connections)


async def test_what_lies_unread_hides_nothing() -> None:
    async with rig() as made, Connection(made.url) as connection:
        await stuck_with_one_behind(made, connection)
        await full(made, connection)
        connection.write(bytes(20_000))
        await connection.writer.drain()
        await made.pass_time(1)
        assert not made.gone.is_set()
        connection.writer.transport.abort()
        [one] = made.watch.connections
        await made.until(one.hung_up)
        await made.pass_time(1)
        await asyncio.wait_for(made.gone.wait(), 60)


@filled
async def test_a_client_that_waits_with_one_behind_is_not_taken_for_gone(filled: bool) -> None:
    async with rig() as made, Connection(made.url) as connection:
        await stuck_with_one_behind(made, connection)
        if filled:
            await full(made, connection)
        for _ in range(5):
            await made.pass_time(1)
        assert not made.gone.is_set()
        assert len(made.watch.connections) == 1


@pytest.mark.parametrize("wish", [{"wait_ms": 60_000}, {"owner": "me", "wait_seconds": 60}], ids=["receive", "dequeue"])
async def test_a_receive_whose_client_has_gone_takes_nothing_even_before_that_is_noticed(wish: dict[str, Any]) -> None:
    async with rig() as made, Connection(made.url) as connection:
        body = json.dumps({"queue": "q", **wish}).encode()
        path = "/v1/queue/dequeue" if "owner" in wish else "/v1/queue/receive"
        await connection.send("POST", path, body, {"Content-Type": "application/json"})
        await made.until(lambda: made.pond.dispatcher.waiting)
        await full(made, connection)
        [one] = made.watch.connections
        connection.writer.close()
        await made.until(one.hung_up)
        await made.pond.queue("q").enqueue(b"x")
        await made.until(lambda: not one.tasks)
        await made.server.context.settle()
        counts = await made.pond.queue("q").counts()
        assert (counts.ready, counts.leased) == (1, 0)
        [message] = await made.pond.queue("q").receive()
        assert (message.attempts, message.failures) == (2, 0)


async def test_the_system_asks_whether_a_silent_client_is_there_still() -> None:
    """One whose machine was switched off says nothing of it; what was leased for it is to go back some time."""
    async with rig() as made, Connection(made.url):
        await made.until(lambda: made.watch.connections)
        [one] = made.watch.connections
        sock = one.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        if hasattr(socket, "TCP_KEEPIDLE"):
            told = [
                sock.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            ]
            assert told[0] + told[1] * told[2] <= 60


async def test_requests_ahead_of_their_answers_are_bounded() -> None:
    async with rig() as made, Connection(made.url) as connection:
        one = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
        connection.write(one * MOST_PIPELINED)
        for _ in range(MOST_PIPELINED):
            assert (await connection.answer()).body == b"0"
        connection.write(one * 4000)
        assert await refused(connection) == (400, "too_many_requests_ahead")
        assert made.watch.refused == {"too_many_requests_ahead": 1}


async def test_nothing_that_follows_a_refused_request_is_done(caplog: pytest.LogCaptureFixture) -> None:
    async with rig(max_headers=10) as made:
        fields = b"".join(b"h%d: x\r\n" % number for number in range(20))
        enqueue = json.dumps({"queue": "q", "messages": [{"payload": "eA=="}]}).encode()
        head = b"POST /v1/queue/enqueueBatch HTTP/1.1\r\nContent-Type: application/json\r\n"
        follows = head + b"Content-Length: %d\r\n\r\n" % len(enqueue) + enqueue
        refusals = {
            b"POST /echo HTTP/1.1\r\n" + fields + b"Content-Length: 2\r\n\r\nab": (431, "header_too_large"),
            b"POST /echo HTTP/1.1\r\nContent-Length: 0\r\n\r\n" * 2 + b"nonsense\r\n\r\n": (400, "bad_request"),
        }
        for first, why in refusals.items():
            async with Connection(made.url) as connection:
                connection.write(first + follows)
                assert await refused(connection) == why
        await made.until(lambda: not made.server._state.tasks)
        assert await made.pond.queues() == []
    assert [record for record in caplog.records if record.exc_info] == []
