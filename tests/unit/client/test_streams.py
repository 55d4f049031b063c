"""Payloads in bounded memory, both ways."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from millpond import InvalidInput, OutcomeUnknown, Pond, Queue, StoreUnreachable
from millpond.client.lane import READ_AHEAD
from millpond.client.pond import RemotePond
from millpond.model.clock import ManualClock, SystemClock
from millpond.server.run import running
from millpond.stores.memory import MemoryStore

MIB = 1024 * 1024


@asynccontextmanager
async def behind_a_server() -> AsyncIterator[tuple[RemotePond, Queue]]:
    clock = ManualClock()
    async with (
        Pond(MemoryStore(clock=clock), clock=clock) as local,
        running(local) as url,
        RemotePond(url, clock=clock) as remote,
    ):
        remote.transport.io_clock = SystemClock()
        yield remote, remote.queue("orders")


async def _still() -> None:
    """Let pass what goes on by itself: bytes on loopback."""
    for _ in range(50):
        await asyncio.sleep(0.0005)


async def test_a_slow_reader_makes_the_server_wait() -> None:
    async with behind_a_server() as (remote, queue):
        await queue.enqueue(bytes(32 * MIB))
        [message] = await queue.receive()
        stream = message.stream()
        received = len(await anext(stream))
        lane = remote.transport.endpoints[0].lane
        assert lane is not None
        [connection] = lane._used
        await _still()
        assert connection._ahead <= READ_AHEAD + MIB
        async for chunk in stream:
            received += len(chunk)
        assert received == 32 * MIB
        await message.ack()


async def test_who_stops_reading_leaves_nothing_behind() -> None:
    async with behind_a_server() as (remote, queue):
        await queue.enqueue(bytes(4 * MIB))
        [message] = await queue.receive()
        for _ in range(3):
            stream = message.stream()
            await anext(stream)
            await stream.aclose()  # type: ignore[attr-defined]
        lane = remote.transport.endpoints[0].lane
        assert lane is not None
        assert not lane._used
        assert len(await message.read()) == 4 * MIB


async def test_a_slow_server_makes_the_source_wait() -> None:
    let_go = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"healthz" not in head:
            await let_go.wait()
            while not (await reader.read(MIB)).endswith(b"0\r\n\r\n"):
                pass
        body = b"" if b"healthz" in head else b'{"message_id":"0197a3c2-0000-7000-8000-000000000001"}'
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    drawn = 0

    async def source() -> AsyncIterator[bytes]:
        nonlocal drawn
        for _ in range(64):
            drawn += 1
            yield bytes(MIB)

    async with RemotePond(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", clock=ManualClock()) as pond:
        task = asyncio.ensure_future(pond.queue("orders").enqueue(source()))
        async with asyncio.timeout(10):
            while not drawn:
                await asyncio.sleep(0.001)
        await _still()
        assert drawn < 16, "what the kernel holds, and no more"
        let_go.set()
        assert (await task).message_id.startswith("0197a3c2")
        assert drawn == 64
    server.close()


async def test_a_server_that_stops_reading_is_given_up() -> None:
    over, ended = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"healthz" not in head:
            await over.wait()
            ended.set()
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    clock = ManualClock()
    async with RemotePond(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", clock=clock) as pond:

        async def source() -> AsyncIterator[bytes]:
            for _ in range(64):
                yield bytes(MIB)

        task = asyncio.ensure_future(pond.queue("orders").enqueue(source()))
        await _still()
        assert not task.done()
        clock.advance(11)
        with pytest.raises(OutcomeUnknown, match="no answer in time"):
            await task
    over.set()
    await ended.wait()
    await _still()
    server.close()


async def test_a_payload_that_breaks_off() -> None:
    async with behind_a_server() as (remote, queue):
        await queue.enqueue(bytes(4 * MIB))
        [message] = await queue.receive()
        stream = message.stream()
        await anext(stream)
        lane = remote.transport.endpoints[0].lane
        assert lane is not None
        [connection] = lane._used
        connection.abort()
        with pytest.raises(StoreUnreachable, match=r"broke off after \d+ bytes"):
            async for _ in stream:
                pass
        assert len(await message.read()) == 4 * MIB


async def test_attributes_of_a_streamed_message_are_json() -> None:
    async with behind_a_server() as (_, queue):
        with pytest.raises(InvalidInput, match="must be JSON"):
            await queue.enqueue(bytes(MIB), attributes={"a": b"bytes"})
        await queue.enqueue(bytes(MIB), attributes={"a": [1, None, "ü", 1.5]}, max_attempts=0)
        [message] = await queue.receive()
        assert (message.attributes, message.max_attempts) == ({"a": [1, None, "ü", 1.5]}, 0)
        assert message.content_type is None


async def test_a_payload_without_bytes_leaves_its_connection_to_one_call_only() -> None:
    """It was put back twice, so that two calls had it at once, and each other's answers."""
    async with behind_a_server() as (remote, queue):
        await queue.enqueue(b"")
        [view] = await queue.peek()
        assert await view.payload() == b""
        lane = remote.transport.endpoints[0].lane
        assert lane is not None
        assert len(lane._idle) == len(set(lane._idle)) == 1
        counts, receipt = await asyncio.gather(queue.counts(), queue.enqueue(b"x"))
        assert (counts.bytes <= 1, receipt.duplicate) == (True, False)
