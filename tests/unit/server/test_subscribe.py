"""lockd's streams: each message on its way as soon as it is there, and nothing lost with who leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.unit.server.lockd import Client, Connection, Delivery, error_of, serving, until

from millpond.errors import StoreError, TooManyConsumers
from millpond.server import subscribe
from millpond.wire.multipart import Begin, Close, Data, End, Parser


class Stream:
    """A subscription, read as lockd's own client does: by parts, and by their lengths."""

    def __init__(self, connection: Connection, boundary: str) -> None:
        self.connection = connection
        self.parser = Parser(boundary.encode(), trust_lengths=True)
        self.events: list[Any] = []
        self.raw = b""
        self.closed = False

    async def _event(self) -> Any:
        while not self.events:
            chunk = await self.connection.chunk()
            self.raw += chunk
            if not chunk:
                return None
            self.events = self.parser.feed(chunk)
        return self.events.pop(0)

    async def _part(self) -> tuple[Begin, bytes] | None:
        begin = await self._event()
        if begin is None or isinstance(begin, Close):
            self.closed = isinstance(begin, Close)
            return None
        data = b""
        # A meta part has no length: it ends where the payload's begins.
        while isinstance(event := await self._event(), Data):
            data += event.data
        assert isinstance(event, End)
        return begin, data

    async def next(self) -> Delivery | None:
        """The next message; None at the end."""
        meta = await self._part()
        if meta is None:
            return None
        payload = await self._part()
        assert payload is not None
        assert (meta[0].name, payload[0].name) == ("meta", "payload")
        return Delivery(json.loads(meta[1])["message"], payload[1], payload[0].headers)


async def subscribed(client: Client, connection: Connection, route: str = "subscribe", **fields: Any) -> Stream:
    body = json.dumps({"queue": "q", "owner": "o", **fields}).encode()
    await connection.send("POST", f"/v1/queue/{route}", body)
    status, headers = await connection.head()
    assert status == 200
    kind, _, boundary = headers["content-type"].partition("; boundary=")
    assert kind == "multipart/related"
    return Stream(connection, boundary)


@pytest.mark.parametrize("payload", [b"", b"\r", b"\r\n", b"\r\n--", b"\r\n-", b"x\r\n\r\n--", b"plain"])
async def test_a_message_arrives_before_the_next_whatever_it_ends_in(payload: bytes) -> None:
    async with serving() as client, Connection(client.url) as connection:
        await client.enqueue("q", payload)
        stream = await subscribed(client, connection)
        for number in range(3):
            delivery = await stream.next()
            assert delivery is not None
            assert delivery.payload == payload
            assert delivery.message["attempts"] == 1
            # All that a reader by boundaries needs is there, too: the early delimiter and no more.
            assert stream.raw.endswith(payload + b"\r\n--" + stream.parser._delimiter[4:])
            await client.ack(delivery)
            if number < 2:
                await client.enqueue("q", payload)


async def test_no_headers_before_the_first_message_and_then_its_correlation_id() -> None:
    async with serving() as client, Connection(client.url) as connection:
        await connection.send("POST", "/v1/queue/subscribe", b'{"queue":"q","owner":"o"}')
        await until(lambda: client.pond.dispatcher.queue_stats(None, "q").waiting_consumers)
        head = asyncio.create_task(connection.head())
        await client.pond.advance(100)
        assert not head.done()
        sent = await client.enqueue("q", b"", correlation="first")
        status, headers = await head
        assert (status, headers["x-correlation-id"]) == (200, sent["correlation_id"])


async def test_an_idle_subscription_ends_with_its_wait() -> None:
    async with serving() as client:
        answer = asyncio.create_task(
            client.post("/v1/queue/subscribe", {"queue": "q", "owner": "o", "wait_seconds": 3})
        )
        await until(lambda: client.pond.dispatcher.queue_stats(None, "q").waiting_consumers)
        await client.pond.advance(3)
        assert error_of(await answer) == (409, "waiting")


async def test_without_waiting_it_ends_when_the_queue_is_empty() -> None:
    async with serving() as client, Connection(client.url) as connection:
        for number in range(5):
            await client.enqueue("q", b"%d" % number)
        stream = await subscribed(client, connection, wait_seconds=-1, page_size=2)
        found = [delivery.payload for delivery in [await stream.next() for _ in range(5)] if delivery]
        assert found == [b"0", b"1", b"2", b"3", b"4"]
        assert await stream.next() is None
        assert stream.closed


async def test_after_the_first_message_it_stays_open_beyond_its_wait() -> None:
    async with serving() as client, Connection(client.url) as connection:
        await client.enqueue("q", b"1")
        stream = await subscribed(client, connection, wait_seconds=1)
        assert await stream.next() is not None
        await client.pond.advance(500)
        await client.enqueue("q", b"2")
        delivery = await stream.next()
        assert delivery is not None
        assert delivery.payload in {b"1", b"2"}  # the first was not acked, and has come back


async def test_states_come_with_their_leases() -> None:
    async with serving() as client, Connection(client.url) as connection:
        await client.enqueue("q", b"")
        stream = await subscribed(client, connection, "subscribeWithState")
        delivery = await stream.next()
        assert delivery is not None
        message = delivery.message
        assert message["state_lease_id"] == message["lease_id"]
        assert message["state_fencing_token"] == message["fencing_token"]
        assert message["state_lease_expires_at_unix"] == message["lease_expires_at_unix"]
        assert message["state_txn_id"] == message["txn_id"]
        assert message["state_etag"]


async def test_a_drain_ends_it_with_the_closing_boundary() -> None:
    async with serving() as client, Connection(client.url) as connection:
        await client.enqueue("q", b"")
        stream = await subscribed(client, connection)
        delivery = await stream.next()
        assert delivery is not None
        client.context.begin_drain()
        assert await stream.next() is None
        assert stream.closed
        await client.ack(delivery)


async def test_what_was_sent_is_the_clients_though_its_stream_ends() -> None:
    async with serving() as client:
        async with Connection(client.url) as connection:
            await client.enqueue("q", b"")
            stream = await subscribed(client, connection)
            delivery = await stream.next()
            assert delivery is not None
        await until(lambda: client.pond.dispatcher.queue_stats(None, "q").total_consumers == 0)
        await client.context.settle()
        await client.ack(delivery)


async def test_what_was_leased_and_could_not_be_sent_goes_back_at_once() -> None:
    """A client that does not read: the socket fills up, and most of what was leased for it is still here."""
    async with serving() as client:
        queue = client.pond.queue("q")
        await queue.enqueue_many([bytes(300_000)] * 64)
        number = 0
        async with Connection(client.url, receive_buffer=65_536) as connection:
            await subscribed(client, connection, page_size=64)
            await until(lambda: client.context.held)
            while number != (number := len(client.context.held)):
                for _ in range(50):
                    await asyncio.sleep(0.001)
            counts = await queue.counts()
            assert (counts.leased, counts.ready) == (64, 0)
            connection.writer.transport.abort()
        await until(lambda: client.pond.dispatcher.queue_stats(None, "q").total_consumers == 0)

        async def back() -> int:
            await client.context.settle()
            return (await queue.counts()).ready

        async with asyncio.timeout(60):
            while not await back():
                await asyncio.sleep(0.001)
        counts = await queue.counts()
        # The one that was on its way is among those that went back.
        assert 0 < counts.leased == number < 60
        assert counts.ready == 64 - counts.leased
        for view in await queue.peek(64):
            assert view.failures == 0


async def test_nothing_more_is_leased_while_the_client_does_not_read() -> None:
    async with serving() as client:
        queue = client.pond.queue("q")
        await queue.enqueue_many([bytes(300_000)] * 100)
        async with Connection(client.url, receive_buffer=65_536) as connection:
            await subscribed(client, connection)
            leased = -1
            while leased != (leased := (await queue.counts()).leased):
                for _ in range(50):
                    await asyncio.sleep(0.001)
            assert 0 < leased < 60
        await client.context.settle()


async def test_an_error_in_the_stream_breaks_it_off_and_does_not_look_like_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving() as client, Connection(client.url) as connection:
        await client.enqueue("q", b"")
        stream = await subscribed(client, connection)
        assert await stream.next() is not None

        async def broken(*args: Any, **more: Any) -> Any:
            raise StoreError("gone")

        monkeypatch.setattr(client.pond.service, "claim", broken)
        await client.enqueue("q", b"")
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await stream.next()
        assert not stream.closed


async def test_a_stream_is_not_lost_to_those_who_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as client, Connection(client.url) as connection:
        await client.enqueue("q", b"1")
        dispatcher, real = client.pond.dispatcher, client.pond.dispatcher.wait
        refused = asyncio.Event()

        async def busy(*args: Any, **more: Any) -> Any:
            refused.set()
            raise TooManyConsumers

        monkeypatch.setattr(dispatcher, "wait", busy)
        stream = await subscribed(client, connection)
        assert await stream.next() is not None
        await refused.wait()
        monkeypatch.setattr(dispatcher, "wait", real)
        await client.pond.settle()
        await client.pond.advance(subscribe.BUSY_PAUSE)
        await client.enqueue("q", b"2")
        delivery = await stream.next()
        assert delivery is not None
        assert delivery.payload == b"2"


async def test_many_subscribers_share_a_queue_and_none_is_given_a_message_twice() -> None:
    async with serving() as client:
        got: list[str] = []

        async def consume() -> None:
            async with Connection(client.url) as connection:
                stream = await subscribed(client, connection, page_size=3)
                while (delivery := await stream.next()) is not None:
                    got.append(delivery.message["message_id"])
                    await client.ack(delivery)

        consumers = [asyncio.create_task(consume()) for _ in range(8)]
        sent = [(await client.enqueue("q", b"x"))["message_id"] for _ in range(40)]
        await until(lambda: len(got) >= 40)
        client.context.begin_drain()
        for consumer in consumers:
            consumer.cancel()
        await asyncio.gather(*consumers, return_exceptions=True)
        assert sorted(got) == sorted(sent)


async def _chunks(data: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(data), 65536):
        yield data[at : at + 65536]


async def test_a_large_payload_is_streamed_within_the_stream() -> None:
    async with serving() as client, Connection(client.url) as connection:
        payload = bytes(range(256)) * 8192
        await client.pond.queue("q").enqueue(_chunks(payload))
        await client.enqueue("q", b"after")
        stream = await subscribed(client, connection)
        first, second = await stream.next(), await stream.next()
        assert first is not None
        assert second is not None
        assert first.payload == payload
        assert second.payload == b"after"
