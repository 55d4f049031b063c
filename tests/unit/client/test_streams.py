"""Payloads in bounded memory, both ways."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from millpond import InvalidInput, OutcomeUnknown, Pond, Queue, StoreUnreachable
from millpond.client.lane import READ_AHEAD
from millpond.client.pond import RemotePond
from millpond.model.clock import ManualClock, SystemClock
from millpond.server.run import running
from millpond.service.config import EnqueueOptions
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
        async with asyncio.timeout(60):
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


WISHES: dict[str, Any] = {
    "delay": 1.5,
    "ttl": 90.25,
    "priority": 9,
    "max_attempts": 0,
    "visibility": 12.5,
    "attributes": {"a": [1, None, "ü", 1.5, b"\x00\r\n--bytes", {"b": b""}]},
    "dedup_key": "key",
    "dedup_window": 7.0,
    "ordering_key": "order",
    "content_type": "text/plain; charset=utf-8",
    "correlation_id": "wörk-17",
    "message_id": "01977420-dc00-7562-9813-410373f1aaca",
}


@pytest.mark.parametrize("name", [*WISHES, "max_attempts=3", "plain attributes", "all"])
async def test_a_streamed_message_takes_every_option_that_another_takes(name: str) -> None:
    assert set(WISHES) == {field.name for field in msgspec.structs.fields(EnqueueOptions)}
    wishes = WISHES if name == "all" else {name: WISHES.get(name)}
    wishes = {"max_attempts=3": {"max_attempts": 3}, "plain attributes": {"attributes": {"a": 1}}}.get(name, wishes)
    clock = ManualClock()
    async with (
        Pond(MemoryStore(clock=clock), clock=clock) as local,
        running(local) as url,
        RemotePond(url, clock=clock) as remote,
    ):
        remote.transport.io_clock = SystemClock()
        heads = []
        for pond, queue in ((local, "one"), (remote, "two")):
            await pond.queue(queue).enqueue(bytes(MIB), **wishes)
            [view] = await local.queue(queue).browse()
            own = {} if "message_id" in wishes else {"id": ""}
            heads.append((msgspec.structs.replace(view.record.head, queue="", **own), view.record.status.expires_at))
        assert heads[0] == heads[1]
        if name not in {"dedup_window", "content_type"}:
            return
        again = await remote.queue("two").enqueue(bytes(MIB), **wishes, dedup_key="k")
        assert (await remote.queue("two").enqueue(bytes(MIB), **wishes, dedup_key="k")).message_id == again.message_id


async def test_what_has_no_form_at_all_is_refused_before_it_is_sent() -> None:
    async with behind_a_server() as (remote, queue):
        before = remote.transport.requests
        with pytest.raises(InvalidInput):
            await queue.enqueue(bytes(MIB), attributes={"a": object()})
        assert remote.transport.requests == before


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
