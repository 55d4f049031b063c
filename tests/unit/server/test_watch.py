"""Server-sent events about a queue."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tests.unit.server.lockd import Client, Connection, error_of, serving, until

from millpond import testing
from millpond.server import watch, watches
from millpond.server.config import ServerConfig
from millpond.server.context import Context
from millpond.server.run import running
from millpond.stores.memory import MemoryStore


class Events:
    """A stream of events, read frame by frame."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.text = ""

    async def frame(self) -> dict[str, str]:
        """The next frame's fields; a comment's is ``""``."""
        while "\n\n" not in self.text:
            chunk = await self.connection.chunk()
            if not chunk:
                raise EOFError
            self.text += chunk.decode()
        frame, _, self.text = self.text.partition("\n\n")
        return dict(line.split(": ", 1) if line[0] != ":" else ("", line[2:]) for line in frame.split("\n"))

    async def event(self) -> tuple[int, dict[str, Any]]:
        """The next event's number and data."""
        frame = await self.frame()
        assert frame["event"] == "queue_watch"
        return int(frame["id"]), json.loads(frame["data"])


async def watching(client: Client, connection: Connection, queue: str = "q") -> Events:
    body = json.dumps({"queue": queue}).encode()
    await connection.send("POST", "/v1/queue/watch", body, {"X-Correlation-Id": "w"})
    status, headers = await connection.head()
    assert (status, headers["content-type"], headers["cache-control"]) == (200, "text/event-stream", "no-cache")
    assert headers["x-accel-buffering"] == "no"
    return Events(connection)


async def test_a_snapshot_first_and_then_each_change_and_nothing_is_taken() -> None:
    async with serving() as client, Connection(client.url) as connection:
        events = await watching(client, connection)
        now = client.pond.clock.now_ms() // 1000
        empty = {"namespace": "default", "queue": "q", "available": False, "changed_at_unix": now}
        assert await events.event() == (1, empty | {"correlation_id": "w"})
        await client.pond.settle()
        await client.pond.advance(watches.PAUSE)
        first = await client.enqueue("q", b"1")
        number, data = await events.event()
        assert (number, data["available"], data["head_message_id"]) == (2, True, first["message_id"])
        await client.enqueue("q", b"2")  # changes nothing of what is first
        [delivery] = await client.dequeue("q")
        assert delivery.message["attempts"] == 1
        await client.ack(delivery)
        await client.pond.advance(watches.PAUSE)
        await client.pond.advance(watches.LOOK)
        number, data = await events.event()
        assert (number, data["available"]) == (3, True)
        assert data["head_message_id"] not in {"", first["message_id"]}


async def test_an_enqueue_is_told_without_waiting_for_the_next_look() -> None:
    async with serving() as client, Connection(client.url) as connection:
        events = await watching(client, connection)
        await events.event()
        await client.pond.advance(watches.PAUSE)  # the clock stands still from here
        sent = await client.enqueue("q", b"")
        assert (await events.event())[1]["head_message_id"] == sent["message_id"]


async def test_changes_by_other_processes_are_told() -> None:
    store = MemoryStore(clock=(clock := testing.ManualClock()))
    async with serving(pond=testing.pond(store=store, clock=clock)) as client, Connection(client.url) as connection:
        events = await watching(client, connection)
        await events.event()
        await client.pond.advance(watches.PAUSE)
        other = testing.pond(store=store.share(), clock=clock, seed=1)
        sent = await other.queue("q").enqueue(b"")
        assert store.capabilities.change_feed
        assert (await events.event())[1]["head_message_id"] == sent.message_id


async def test_a_comment_shows_that_it_is_alive() -> None:
    async with serving() as client, Connection(client.url) as connection:
        events = await watching(client, connection)
        await events.event()
        for _ in range(3):
            await client.pond.advance(watch.KEEPALIVE)
            assert await events.frame() == {"": "keepalive"}


async def test_a_paused_queue_has_nothing_to_offer() -> None:
    async with serving() as client, Connection(client.url) as connection:
        await client.enqueue("q", b"")
        events = await watching(client, connection)
        assert (await events.event())[1]["available"]
        await client.pond.advance(watches.PAUSE)
        await client.pond.queue("q").pause()
        await client.pond.advance(watches.LOOK)
        assert not (await events.event())[1]["available"]


async def test_all_who_watch_a_queue_share_its_looks_and_nothing_runs_after_them() -> None:
    async with serving() as client:
        told = client.pond.service.on_ready
        looks = 0
        real = client.pond.service.peek_candidate

        async def counted(*key: Any) -> Any:
            nonlocal looks
            looks += 1
            return await real(*key)

        client.pond.service.peek_candidate = counted  # type: ignore[method-assign]
        connections = [Connection(client.url) for _ in range(20)]
        streams = []
        for connection in connections:
            await connection.__aenter__()
            streams.append(await watching(client, connection))
            await streams[-1].event()
        await client.pond.advance(watches.PAUSE)
        await client.pond.advance(watches.LOOK)
        assert looks <= 2
        for connection in connections:
            connection.writer.close()
        await until(lambda: not client.context.watches._queues)
        assert client.pond.service.on_ready is told
        await client.pond.settle()
        before = looks
        await client.pond.advance(100)
        assert looks == before


async def test_trouble_of_the_store_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as client, Connection(client.url) as connection:
        events = await watching(client, connection)
        await events.event()
        await client.pond.store.close()
        await client.pond.advance(watches.PAUSE)
        await client.pond.advance(watches.LOOK)
        await client.pond.advance(watch.KEEPALIVE)
        assert await events.frame() == {"": "keepalive"}


async def test_a_drain_ends_it() -> None:
    async with testing.pond() as pond:
        context = Context(pond, ServerConfig(port=0, shutdown_timeout=5.0))
        async with running(pond, context=context) as url, Connection(url) as connection:
            events = await watching(Client(url, pond, context), connection)
            await events.event()
            context.begin_drain()
            with pytest.raises(EOFError):
                await events.frame()


async def test_it_needs_a_queue() -> None:
    async with serving() as client:
        assert error_of(await client.post("/v1/queue/watch", {})) == (400, "missing_queue")
        assert not client.context.watches._queues


async def test_who_leaves_at_once_leaves_nothing() -> None:
    async with serving() as client:
        for _ in range(5):
            async with Connection(client.url) as connection:
                await connection.send("POST", "/v1/queue/watch", b'{"queue":"q"}')
                await asyncio.sleep(0)
        await client.pond.settle()
        await until(lambda: not client.context.watches._queues)
        assert (await client.post("/v1/queue/stats", {"queue": "q"})).status == 200
