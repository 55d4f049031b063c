"""Streams of messages over HTTP: connections that break off, servers that end, and bytes in any pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.unit.client.fake import Asked, Drop, Fake, Say, fake, packed

from millpond import Forbidden, MillpondError, Pond
from millpond.client.lane import CONNECT_TIMEOUT, Connection, Lane
from millpond.client.pond import RemotePond
from millpond.client.streaming import SILENCE
from millpond.model.clock import ManualClock, SystemClock
from millpond.server.run import running
from millpond.server.streams import packed as frame
from millpond.stores.memory import MemoryStore
from millpond.wire import native

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: x\r\n\r\n"
ID = "0197a3c2-0000-7000-8000-%012d"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _opening(*frames: Any) -> bytes:
    hello = native.Hello("s", 10, 15_000)
    return HEAD + b"".join(_chunk(frame(one)) for one in (hello, *frames))


def _messages(*numbers: int) -> native.Messages:
    return native.Messages(
        [
            native.Delivery(
                namespace="default",
                queue="orders",
                message_id=ID % number,
                priority=5,
                enqueued_at_ms=0,
                updated_at_ms=0,
                visible_at_ms=30_000,
                attempts=1,
                failures=0,
                max_attempts=5,
                visibility_ms=30_000,
                payload_size=1,
                lease_id=f"lease {number}",
                fencing_token=1,
                lease_expires_at_ms=30_000,
                payload=b"x",
            )
            for number in numbers
        ]
    )


@asynccontextmanager
async def _client(*servers: Fake) -> AsyncIterator[RemotePond]:
    clock = ManualClock()
    pond = RemotePond("http://" + ",".join(f"127.0.0.1:{server.port}" for server in servers), clock=clock)
    pond.transport.io_clock = SystemClock()
    async with pond:
        yield pond


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
async def test_a_body_in_chunks_may_come_in_any_pieces(size: int) -> None:
    pieces = [b"a", b"bc" * 10, bytes(300), b"\r\n0\r\n\r\n"]
    whole = HEAD + b"".join(map(_chunk, pieces)) + b"0\r\n\r\n"
    connection = Connection(1000)
    transport = _Transport()
    connection.connection_made(transport)  # type: ignore[arg-type]
    asked = connection.ask(b"", stream=True)
    for start in range(0, len(whole), size):
        connection.data_received(whole[start : start + size])
    assert (await asked).status == 200
    found = b""
    while chunk := await connection.chunk():
        found += chunk
    assert found == b"".join(pieces)
    assert not connection.keep, "what follows such an answer is not known"


@pytest.mark.parametrize("size", [b"-5", b"0x5", b"", b"f" * 17, b"1_0"])
async def test_a_chunk_of_no_size_is_no_answer(size: bytes) -> None:
    connection = Connection(1000)
    connection.connection_made(_Transport())  # type: ignore[arg-type]
    asked = connection.ask(b"")
    connection.data_received(HEAD + size + b"\r\nxxxxx\r\n0\r\n\r\n")
    with pytest.raises(OSError, match="a chunk without a size"):
        await asked


async def test_connecting_takes_no_longer_than_the_try_that_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(*arguments: Any, **options: Any) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", hang)
    lane = Lane("http://127.0.0.1:1", None, {}, 1000)
    async with asyncio.timeout(CONNECT_TIMEOUT / 2):
        with pytest.raises(TimeoutError, match="no connection in time"):
            await lane.connection(within=0.01)


@pytest.mark.parametrize("wrong", [b"x\r\n", b"-5\r\n", b"a" * 2000])
async def test_a_chunk_without_a_size_ends_the_stream(wrong: bytes) -> None:
    connection = Connection(1000)
    connection.connection_made(_Transport())  # type: ignore[arg-type]
    asked = connection.ask(b"", stream=True)
    connection.data_received(HEAD + _chunk(b"good"))
    connection.data_received(wrong)
    await asked
    assert await connection.chunk() == b"good"
    with pytest.raises(OSError, match="something else than HTTP"):
        await connection.chunk()


class _Transport:
    def write(self, data: bytes) -> None: ...

    def abort(self) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


async def test_a_connection_that_breaks_off_is_made_anew_and_takes_its_messages_with_it() -> None:
    answers = [Drop(_opening(_messages(1, 2))), Drop(_opening(_messages(3)), close=False)]

    async def script(asked: Asked) -> Say | Drop:
        return answers.pop(0)

    async with fake(script) as server, _client(server) as pond:
        async with pond.queue("orders").stream(credit=10) as stream, asyncio.timeout(60):
            assert [(await anext(stream)).id for _ in range(2)] == [ID % 1, ID % 2]
            assert (await anext(stream)).id == ID % 3
            assert "1 of 10" in repr(stream), "the server has given back the others"
        assert [asked.path for asked in server.asked] == ["/v1/queue/stream"] * 2


async def test_a_server_that_drains_leaves_what_it_sent_and_another_goes_on() -> None:
    acked: list[str] = []

    async def first(asked: Asked) -> Say | Drop:
        return Drop(_opening(_messages(1, 2), native.End("draining")) + b"0\r\n\r\n", close=False)

    async def second(asked: Asked) -> Say | Drop:
        if asked.path.endswith("stream"):
            return Drop(_opening(_messages(3)), close=False)
        acked.extend(one["message_id"] for one in asked.data["messages"])
        return packed({"results": [{"message_id": one["message_id"]} for one in asked.data["messages"]]})

    async with fake(first) as one, fake(second) as other, _client(one, other) as pond, asyncio.timeout(60):
        async with pond.queue("orders").stream() as stream:
            got = [await anext(stream), await anext(stream)]
            pond.transport.endpoints[0].failed(pond.clock.monotonic(), "it drains")
            got.append(await anext(stream))
            assert [message.id for message in got] == [ID % 1, ID % 2, ID % 3]
            await got[0].ack()
            await got[2].ack()
        await pond._remote.close()
        assert acked == [ID % 1, ID % 3, ID % 2], "the one that was left unanswered was given back"


async def test_what_ends_a_stream_is_told_and_it_may_go_on() -> None:
    answers = [
        Drop(_opening(native.End("forbidden", "the token was withdrawn"))),
        Drop(_opening(_messages(1)), close=False),
    ]

    async def script(asked: Asked) -> Say | Drop:
        return answers.pop(0)

    async with fake(script) as server, _client(server) as pond, pond.queue("orders").stream() as stream:
        async with asyncio.timeout(60):
            with pytest.raises(Forbidden, match="withdrawn"):
                await anext(stream)
            assert (await anext(stream)).id == ID % 1


async def test_an_answer_that_is_no_stream_is_an_error() -> None:
    async def script(asked: Asked) -> Say | Drop:
        return Drop(HEAD + _chunk(b"\xff\xff\xff\xff junk"))

    async with fake(script) as server, _client(server) as pond, pond.queue("orders").stream() as stream:
        with pytest.raises(MillpondError, match="another version"):
            await anext(stream)


async def test_a_connection_without_a_sign_of_life_is_given_up() -> None:
    answers = [Drop(_opening(_messages(1)), close=False), Drop(_opening(_messages(2)), close=False)]

    async def script(asked: Asked) -> Say | Drop:
        return answers.pop(0)

    async with fake(script) as server, _client(server) as pond, pond.queue("orders").stream() as stream:
        clock = pond.transport.io_clock = ManualClock()
        async with asyncio.timeout(60):
            await anext(stream)
            waits = asyncio.ensure_future(anext(stream))
            while not clock.pending_timers:
                await asyncio.sleep(0)
            clock.advance(SILENCE - 1)
            await asyncio.sleep(0.01)
            assert not waits.done()
            clock.advance(2)
            assert (await waits).id == ID % 2


async def test_who_is_hung_up_on_again_and_again_does_not_knock_without_a_pause() -> None:
    async def script(asked: Asked) -> Say | Drop:
        return Drop(_opening())

    rests: list[int] = []
    enough = asyncio.Event()

    async def rest(times: int) -> None:
        rests.append(times)
        if times == 4:
            enough.set()
            await asyncio.Event().wait()

    async with fake(script) as server, _client(server) as pond, pond.queue("orders").stream() as stream:
        pond.transport.rest = rest  # type: ignore[method-assign]
        async with asyncio.timeout(60):
            waits = asyncio.ensure_future(anext(stream))
            await enough.wait()
            waits.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waits
        assert rests == [2, 3, 4], "the first time it is made anew at once"
        assert len(server.asked) == 4


async def test_closing_the_pond_ends_who_waits() -> None:
    clock = ManualClock()
    async with Pond(MemoryStore(clock=clock), clock=clock) as local, running(local) as url:
        pond = RemotePond(url, clock=clock)
        pond.transport.io_clock = SystemClock()
        await pond.open()
        async with pond.queue("orders").stream() as stream:
            waits = asyncio.ensure_future(anext(stream))
            async with asyncio.timeout(60):
                while not local.dispatcher.queue_stats("default", "orders").total_consumers:
                    await asyncio.sleep(0.001)
                await pond.close()
                with pytest.raises(MillpondError):
                    await waits


async def test_a_payload_that_was_read_in_part_spoils_no_connection() -> None:
    clock = ManualClock()
    async with Pond(MemoryStore(clock=clock), clock=clock) as local, running(local) as url:
        pond = RemotePond(url, clock=clock)
        pond.transport.io_clock = SystemClock()
        async with pond, asyncio.timeout(60):
            queue = pond.queue("orders")
            await queue.enqueue(bytes(3_000_000))
            [message] = await queue.receive()
            for _ in range(3):
                chunks = message.stream()
                await anext(chunks)
                await chunks.aclose()  # type: ignore[attr-defined]
                assert (await queue.counts()).leased == 1
            assert len(await message.read()) == 3_000_000
            assert pond.statistics()["transport"]["failures"] == 0
