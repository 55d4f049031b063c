"""A receive that is cancelled over the wire, at every turn of the event loop: nothing is lost, and nothing failed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvloop
from tests.conformance.queue.served import certificates

from millpond import Pond, Queue
from millpond.client.lane import Connection
from millpond.client.pond import RemotePond
from millpond.client.transport import Attempt
from millpond.model.clock import ManualClock, SystemClock
from millpond.server import tls
from millpond.server.config import ServerConfig
from millpond.server.run import running
from millpond.stores.memory import MemoryStore

TURNS = 40
"""More turns than a receive over loopback takes."""


@asynccontextmanager
async def ponds(*, secure: bool = False) -> AsyncIterator[tuple[Pond, RemotePond]]:
    clock = ManualClock()
    paths = certificates() if secure else {}
    config = ServerConfig(tls_cert=paths.get("server"), tls_key=paths.get("server_key"))
    context = tls.context(config) if secure else None
    async with Pond(MemoryStore(clock=clock), clock=clock) as local, running(local, tls=context) as url:
        remote = RemotePond(url, clock=clock, ca=paths.get("ca"))
        remote.transport.io_clock = SystemClock()
        async with remote:
            yield local, remote


async def _back(queue: Queue, count: int) -> None:
    """All messages are ready, within a moment of real time."""
    async with asyncio.timeout(60):
        while (await queue.counts()).ready != count:
            await asyncio.sleep(0.001)


async def _cancel(call: asyncio.Future[object]) -> bool:
    """Whether it was cancelled before its end."""
    call.cancel()
    [result] = await asyncio.gather(call, return_exceptions=True)
    return isinstance(result, asyncio.CancelledError)


@pytest.mark.parametrize("wait", [0.0, 30.0])
async def test_what_is_there_is_given_back(wait: float) -> None:
    async with ponds() as (local, remote):
        here, there = local.queue("orders"), remote.queue("orders")
        await here.enqueue_many([b"1", b"2", b"3"], max_attempts=1)
        cancelled = 0
        for turns in range(TURNS):
            call = asyncio.ensure_future(there.receive(3, wait=wait))
            for _ in range(turns):
                await asyncio.sleep(0)
            if await _cancel(call):
                cancelled += 1
            else:
                await here.defer_many(call.result())
            await _back(here, 3)
        assert cancelled > 5
        assert [view.failures for view in await here.peek(9)] == [0, 0, 0]
        assert (await here.counts()).dead == 0
        await remote.queue("orders").counts()


async def test_what_comes_while_it_is_cancelled_is_given_back() -> None:
    async with ponds() as (local, remote):
        here, there = local.queue("orders"), remote.queue("orders")
        count = 0
        for turns in range(TURNS):
            call = asyncio.ensure_future(there.receive(wait=30))
            async with asyncio.timeout(60):
                while not local.dispatcher.queue_stats(None, "orders").waiting_consumers:
                    await asyncio.sleep(0)
            await here.enqueue(b"x", max_attempts=1)
            count += 1
            for _ in range(turns):
                await asyncio.sleep(0)
            if not await _cancel(call):
                await here.defer_many(call.result())
            await _back(here, count)
            # Nobody is left behind who would take the next one.
            async with asyncio.timeout(60):
                while local.dispatcher.queue_stats(None, "orders").total_consumers:
                    await asyncio.sleep(0.001)
            taken = await here.receive(count)
            assert [message.failures for message in taken] == [0] * count
            await here.ack_many(taken)
            count = 0


@pytest.mark.parametrize("secure", [False, True])
async def test_the_server_learns_at_once_that_nobody_waits_any_more(secure: bool) -> None:
    async with ponds(secure=secure) as (local, remote):
        call = asyncio.ensure_future(remote.queue("orders").receive(wait=30))
        async with asyncio.timeout(60):
            while not local.dispatcher.queue_stats(None, "orders").waiting_consumers:
                await asyncio.sleep(0.001)
            await _cancel(call)
            while local.dispatcher.queue_stats(None, "orders").total_consumers:
                await asyncio.sleep(0.001)


async def test_closing_waits_for_what_is_given_back() -> None:
    async with ponds() as (local, remote):
        here, there = local.queue("orders"), remote.queue("orders")
        await here.enqueue(b"x", max_attempts=1)
        call = asyncio.ensure_future(there.receive(wait=30))
        async with asyncio.timeout(60):
            while not (await here.counts()).leased:
                await asyncio.sleep(0)
        await _cancel(call)
        await remote.close()
        await _back(here, 1)


async def test_other_calls_that_are_cancelled_disturb_nobody() -> None:
    async with ponds() as (_, remote):
        there = remote.queue("orders")
        for turns in range(TURNS // 2):
            call = asyncio.ensure_future(there.enqueue(b"%d" % turns))
            for _ in range(turns):
                await asyncio.sleep(0)
            await _cancel(call)
            id = f"0197a3c2-0000-7000-8000-{turns:012d}"
            assert await there.enqueue(b"whole", message_id=id) == (id, False), "that is another call's answer"


def test_to_hang_up_where_the_server_has_done_so_before_is_nothing() -> None:
    """uvloop's transports raise when they are told again, which would take the place of the cancellation."""

    async def play() -> None:
        loop = asyncio.get_running_loop()
        server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        _, connection = await loop.create_connection(lambda: Connection(1000), "127.0.0.1", port)
        try:
            async with asyncio.timeout(60):
                while connection._lost is None:
                    await asyncio.sleep(0.001)
                for _ in range(10):
                    await asyncio.sleep(0)
            connection.hang_up()
            async with asyncio.timeout(60):
                with pytest.raises(OSError):
                    await connection.ask(b"x")
        finally:
            server.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(play())


async def test_a_call_that_is_given_up_after_its_end_does_not_end_the_next_ones_connection() -> None:
    async with ponds() as (_, remote):
        queue = remote.queue("orders")
        attempt = Attempt()
        await remote.transport.call("/healthz", b"", attempt=attempt)
        call = asyncio.ensure_future(queue.counts())
        await asyncio.sleep(0)
        attempt.give_up()
        await call
        assert remote.transport.failures == 0
        lane = remote.transport.endpoints[0].lane
        assert lane is not None
        assert [connection.keep for connection in lane._idle] == [True]
