"""Enqueue: what may be given, what is refused, what is kept."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

import millpond
from millpond import Config, InvalidInput, InvalidMessageId, InvalidQueue, PayloadNotLoaded, StoreError, TooLarge
from millpond.stores.base import Remove

if TYPE_CHECKING:
    from tests.conformance.queue.conftest import World

ID = "0197a3c2-0000-7000-8000-000000000001"
LARGE = 300_000
"""More than every store keeps inside the record."""


async def _chunks(*chunks: Any) -> AsyncIterator[Any]:
    for chunk in chunks:
        yield chunk


async def _nothing_written(queue: millpond.Queue, *, enqueued: int = 0) -> None:
    counts = await queue.counts()
    assert counts[:7] == (0, 0, 0, 0, 0, 0, None)
    assert counts.enqueued in (enqueued, None)  # where the store does not count
    assert await queue.peek(10) == []


@pytest.mark.servers
async def test_a_message_comes_back_as_it_was_given(world: World) -> None:
    async with world.queue() as queue:
        receipt = await queue.enqueue(
            b"\x00\xff payload",
            priority=7,
            ttl=60.0,
            max_attempts=3,
            visibility=12.5,
            attributes={"a": 1, "b": [True, None, 1.5, "ü"]},
            ordering_key="key",
            dedup_key="once",
            content_type="application/x-thing",
            correlation_id="c-1",
        )
        assert receipt.duplicate is False
        message = await world.one(queue)
        assert message.id == receipt.message_id
        assert message.payload == b"\x00\xff payload"
        assert message.payload_size == 10
        assert (message.queue, message.namespace) == ("orders", "default")
        assert (message.priority, message.max_attempts) == (7, 3)
        assert message.attributes == {"a": 1, "b": [True, None, 1.5, "ü"]}
        assert (message.ordering_key, message.dedup_key) == ("key", "once")
        assert (message.content_type, message.correlation_id) == ("application/x-thing", "c-1")
        assert (message.attempts, message.failures, message.last_error) == (1, 0, None)
        now = world.clock.now_ms()
        assert message.enqueued_at.timestamp() * 1000 == now
        assert message.expires_at is not None
        assert message.expires_at.timestamp() * 1000 == now + 60_000
        assert message.lease.until_ms == now + 12_500
        assert message.lease.token == 1
        assert await message.read() == b"\x00\xff payload"


async def test_defaults(world: World) -> None:
    async with world.queue(config=Config(default_visibility=7, default_max_attempts=2, default_ttl=9)) as queue:
        await queue.enqueue(b"x")
        message = await world.one(queue)
        assert (message.priority, message.max_attempts, message.attributes) == (5, 2, {})
        assert message.lease.until_ms == world.clock.now_ms() + 7_000
        assert message.expires_at is not None
        assert message.expires_at.timestamp() * 1000 == world.clock.now_ms() + 9_000
        assert (message.content_type, message.correlation_id, message.ordering_key) == (None, None, None)


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(lambda: b"payload", id="bytes"),
        pytest.param(lambda: bytearray(b"payload"), id="bytearray"),
        pytest.param(lambda: memoryview(b"xpayloadx")[1:-1], id="memoryview"),
        pytest.param(lambda: io.BytesIO(b"payload"), id="file"),
        pytest.param(lambda: iter([b"pay", bytearray(b"lo"), b"", memoryview(b"ad")]), id="iterator"),
        pytest.param(lambda: _chunks(b"pay", bytearray(b"lo"), b"", memoryview(b"ad")), id="async-iterator"),
    ],
)
async def test_payload_kinds(world: World, source: Any) -> None:
    async with world.queue() as queue:
        await queue.enqueue(source())
        assert (await world.one(queue)).payload == b"payload"


async def test_empty_payloads(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue_many([b"", io.BytesIO(), _chunks()])
        messages = await queue.receive(10)
        assert [message.payload for message in messages] == [b"", b"", b""]
        assert (await queue.counts()).bytes == 0


class Point(msgspec.Struct):
    x: int
    y: int = 0


async def test_payload_helpers(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(millpond.text("grüße"))
        await queue.enqueue(millpond.json({"a": [1, None]}))
        await queue.enqueue(millpond.msgpack(Point(1, 2)))
        await queue.enqueue(millpond.json(Point(3)), content_type="application/vnd.point+json")
        text, json, msgpack, other = await queue.receive(4)
        assert (text.text(), text.content_type) == ("grüße", "text/plain; charset=utf-8")
        assert (json.json(), json.content_type) == ({"a": [1, None]}, "application/json")
        assert (msgpack.decode(Point), msgpack.content_type) == (Point(1, 2), "application/msgpack")
        assert msgpack.json() == {"x": 1, "y": 2}
        assert (other.decode(Point), other.content_type) == (Point(3), "application/vnd.point+json")
        with pytest.raises(InvalidInput, match="not a valid Point"):
            json.decode(Point)
        with pytest.raises(InvalidInput, match="UTF-8"):
            (await _raw(queue, b"\xff")).text()


async def _raw(queue: millpond.Queue, payload: bytes) -> millpond.Message:
    await queue.enqueue(payload)
    [message] = await queue.receive()
    return message


def test_helpers_refuse_what_cannot_be_encoded() -> None:
    with pytest.raises(InvalidInput):
        millpond.json(object())
    with pytest.raises(InvalidInput):
        millpond.msgpack(1 << 80)


@pytest.mark.parametrize("kind", ["bytes", "file", "iterator", "chunks"])
async def test_large_payloads_stream(world: World, kind: str) -> None:
    data = bytes(range(256)) * (3_000_000 // 256)
    sources: dict[str, Any] = {
        "bytes": data,
        "file": io.BytesIO(data),
        "iterator": (data[at : at + 70_001] for at in range(0, len(data), 70_001)),
        "chunks": _chunks(*(data[at : at + 70_001] for at in range(0, len(data), 70_001))),
    }
    async with world.queue() as queue:
        await queue.enqueue(sources[kind])
        message = await world.one(queue)
        with pytest.raises(PayloadNotLoaded):
            _ = message.payload
        assert message.payload_size == len(data)
        chunks = [chunk async for chunk in message.stream()]
        assert len(chunks) > 1
        assert b"".join(chunks) == data
        with pytest.raises(TooLarge):
            await message.read(limit=1000)
        assert (await queue.counts()).bytes == len(data)
        view = await queue.get(message.id)
        assert await view.payload() == data
        await message.ack()
        with pytest.raises(millpond.MessageNotFound):
            await view.payload()
        assert (await queue.counts()).bytes == 0


async def test_a_payload_that_breaks_midway_leaves_nothing(world: World) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"x" * LARGE
        raise ConnectionError("cut")

    async with world.pond() as pond:
        queue = pond.queue("orders")
        with pytest.raises(ConnectionError, match="cut"):
            await queue.enqueue(broken())
        await _nothing_written(queue)
        world.clock.advance(100_000)
        # What was written of it is removed at once or, at the latest, collected.
        assert (await pond.collect()).orphans <= 1
        assert await pond.verify() == []


async def test_a_batch_that_breaks_midway_leaves_nothing_of_its_chunk(world: World) -> None:
    async with world.queue() as queue:
        with pytest.raises(InvalidInput):
            await queue.enqueue_many([b"a", "not bytes", b"c"])
        await _nothing_written(queue)


@pytest.mark.servers
async def test_large_and_small_payloads_of_one_batch_keep_their_order(world: World) -> None:
    async def slow() -> AsyncIterator[bytes]:
        world.clock.advance(0.005)
        yield b"x" * LARGE

    async with world.queue() as queue:
        receipts = await queue.enqueue_many([b"first", slow(), b"last"])
        messages = await queue.receive(3)
        assert [message.id for message in messages] == [receipt.message_id for receipt in receipts]


async def test_enqueue_many(world: World) -> None:
    async with world.queue() as queue:
        receipts = await queue.enqueue_many((b"%d" % n for n in range(1200)), priority=3, attributes={"k": "v"})
        assert len({receipt.message_id for receipt in receipts}) == 1200
        assert not any(receipt.duplicate for receipt in receipts)
        messages = await queue.receive(2000)
        assert [message.payload for message in messages] == [b"%d" % n for n in range(1200)]
        assert [message.id for message in messages] == [receipt.message_id for receipt in receipts]
        assert {message.priority for message in messages} == {3}
        assert await queue.enqueue_many([]) == []


async def test_enqueue_many_from_an_async_iterable(world: World) -> None:
    async with world.queue() as queue:
        receipts = await queue.enqueue_many(_chunks(b"a", b"b", millpond.text("c")))
        assert [message.payload for message in await queue.receive(5)] == [b"a", b"b", b"c"]
        assert len(receipts) == 3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"priority": 10}, "priority"),
        ({"priority": -1}, "priority"),
        ({"priority": 4.0}, "priority"),
        ({"priority": True}, "priority"),
        ({"delay": -1}, "delay"),
        ({"delay": float("nan")}, "delay"),
        ({"delay": float("inf")}, "delay"),
        ({"delay": "1"}, "delay"),
        ({"delay": True}, "delay"),
        ({"delay": 1e12}, "century"),
        ({"ttl": 0}, "ttl"),
        ({"ttl": -5}, "ttl"),
        ({"visibility": 0}, "visibility"),
        ({"max_attempts": -1}, "max_attempts"),
        ({"max_attempts": 1.5}, "max_attempts"),
        ({"attributes": [1]}, "attributes"),
        ({"attributes": {1: 2}}, "attributes"),
        ({"attributes": {"a": object()}}, "attributes"),
        ({"attributes": {"a": 1 << 70}}, "attributes"),
        ({"dedup_key": ""}, "dedup_key"),
        ({"dedup_key": 5}, "dedup_key"),
        ({"dedup_key": "k", "dedup_window": 0}, "dedup_window"),
        ({"ordering_key": ""}, "ordering_key"),
        ({"ordering_key": "\ud800"}, "ordering_key"),
        ({"content_type": 1}, "content_type"),
        ({"correlation_id": b"x"}, "correlation_id"),
        ({"message_id": "../other"}, "message id"),
    ],
)
async def test_bad_options_are_refused_before_anything_is_written(
    world: World, options: dict[str, Any], match: str
) -> None:
    read: list[bytes] = []

    async def large() -> AsyncIterator[bytes]:
        read.append(b"")
        yield b"x" * LARGE

    async with world.queue() as queue:
        for payload in (b"x", large()):
            with pytest.raises(InvalidInput, match=match):
                await queue.enqueue(payload, **options)
        with pytest.raises(InvalidInput, match=match):
            await queue.enqueue_many([b"x"], **options)
        await _nothing_written(queue)
        assert read == []


async def test_unknown_options_and_no_payloads_are_refused(world: World) -> None:
    async with world.queue() as queue:
        with pytest.raises(InvalidInput, match="prio"):
            await queue.enqueue_many([b"x"], prio=3)
        for payloads in (b"x", "x", 5, None):
            with pytest.raises(InvalidInput, match="iterable"):
                await queue.enqueue_many(payloads)  # type: ignore[arg-type]
        for payload in ("text", 5, None, io.StringIO("text"), {"a": 1}):
            with pytest.raises(InvalidInput):
                await queue.enqueue(payload)
        with pytest.raises(InvalidInput, match="chunks are bytes"):
            await queue.enqueue(_chunks("text"))
        await _nothing_written(queue)


@pytest.mark.parametrize("payload", [b"x" * 1001, b"x" * LARGE], ids=["inline", "apart"])
async def test_the_payload_limit(world: World, payload: bytes) -> None:
    async with world.queue(config=Config(max_payload_bytes=1000)) as queue:
        for source in (payload, io.BytesIO(payload), _chunks(payload), _chunks(payload[:600], payload[600:])):
            with pytest.raises(TooLarge, match="1000"):
                await queue.enqueue(source)
        await _nothing_written(queue)
        await queue.enqueue(b"x" * 1000)
        await queue.enqueue(_chunks(b"x" * 999, b"x"))


async def test_the_payload_limit_of_a_stream_that_is_stored_apart(world: World) -> None:
    async with world.queue(config=Config(max_payload_bytes=LARGE)) as queue:
        with pytest.raises(TooLarge, match=str(LARGE)):
            await queue.enqueue(_chunks(b"x" * LARGE, b"x"))
        await _nothing_written(queue)
        await queue.enqueue(_chunks(b"x" * (LARGE - 1), b"x"))


async def test_the_limits_of_attributes_and_keys(world: World) -> None:
    async with world.queue(config=Config(max_attributes_bytes=100)) as queue:
        with pytest.raises(TooLarge, match=r"attributes take .* limit of 100"):
            await queue.enqueue(b"x", attributes={"a": "b" * 100})
        for name in ("dedup_key", "ordering_key", "content_type", "correlation_id"):
            with pytest.raises(TooLarge, match=name):
                await queue.enqueue(b"x", **{name: "ü" * 257})
        await _nothing_written(queue)
        await queue.enqueue(b"x", attributes={"a": "b" * 90}, dedup_key="ü" * 256)


async def test_attributes_are_kept_as_they_were(world: World) -> None:
    async with world.queue() as queue:
        attributes = {"list": [1]}
        await queue.enqueue(b"x", attributes=attributes)
        attributes["list"].append(2)
        message = await world.one(queue)
        assert message.attributes == {"list": [1]}


@pytest.mark.parametrize("name", ["", "  ", ".", "..", "a/b", "a b", "ä", "x" * 129, "a\x00", "a:b"])
def test_bad_names(world: World, name: str) -> None:
    pond = world.pond()
    with pytest.raises(InvalidQueue):
        pond.queue(name)
    if name:
        with pytest.raises(InvalidQueue):
            pond.queue("q", namespace=name)


async def test_names_are_normalised(world: World) -> None:
    async with world.pond() as pond:
        await pond.queue(" Orders ", namespace="Shop").enqueue(b"x")
        message = await world.one(pond.queue("orders", namespace="shop"))
        assert (message.namespace, message.queue) == ("shop", "orders")
        assert await pond.queue("orders").receive() == []


@pytest.mark.parametrize("bad", ["", "x", "../msg", "0197a3c2", 5, None, ID + "/", "{" + ID + "}"])
async def test_bad_ids(world: World, bad: Any) -> None:
    async with world.queue() as queue:
        with pytest.raises(InvalidMessageId):
            await queue.get(bad)
        with pytest.raises(InvalidMessageId):
            await queue.dead_letters.get(bad)
        with pytest.raises(InvalidMessageId):
            await queue.dead_letters.redrive([bad])
        with pytest.raises(InvalidMessageId):
            queue.handle(bad, "0" * 32, 1)


async def test_a_timedelta_is_a_duration(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x", delay=timedelta(seconds=2), ttl=timedelta(minutes=1))  # type: ignore[arg-type]
        assert await queue.receive() == []
        world.clock.advance(2)
        assert len(await queue.receive()) == 1


async def test_dedup_within_and_after_the_window(world: World) -> None:
    async with world.queue() as queue:
        first = await queue.enqueue(b"1", dedup_key="k", dedup_window=10)
        again = await queue.enqueue(b"2", dedup_key="k", dedup_window=10)
        assert again == (first.message_id, True)
        other = await queue.enqueue(b"3", dedup_key="other")
        assert other.duplicate is False
        world.clock.advance(9.999)
        assert (await queue.enqueue(b"4", dedup_key="k")).message_id == first.message_id
        world.clock.advance(0.001)
        later = await queue.enqueue(b"5", dedup_key="k")
        assert later.duplicate is False
        assert [message.payload for message in await queue.receive(10)] == [b"1", b"3", b"5"]


async def test_dedup_outlives_the_ack(world: World) -> None:
    async with world.queue() as queue:
        first = await queue.enqueue(b"1", dedup_key="k")
        await (await world.one(queue)).ack()
        assert await queue.enqueue(b"2", dedup_key="k") == (first.message_id, True)
        assert await queue.receive() == []


async def test_dedup_is_per_queue(world: World) -> None:
    async with world.pond() as pond:
        for queue in (pond.queue("a"), pond.queue("b"), pond.queue("a", namespace="other")):
            assert (await queue.enqueue(b"x", dedup_key="k")).duplicate is False


async def test_dedup_within_one_batch_and_of_large_payloads(world: World) -> None:
    async with world.queue() as queue:
        receipts = await queue.enqueue_many([b"1", b"2", b"x" * LARGE], dedup_key="k")
        assert [receipt.duplicate for receipt in receipts] == [False, True, True]
        assert len({receipt.message_id for receipt in receipts}) == 1
        [message] = await queue.receive(10)
        assert message.payload == b"1"


@pytest.mark.servers
async def test_dedup_from_two_ponds(world: World) -> None:
    async with world.queue() as here, world.queue() as there:
        first = await here.enqueue(b"1", dedup_key="k")
        assert await there.enqueue(b"2", dedup_key="k") == (first.message_id, True)


@pytest.mark.servers
async def test_the_callers_own_id(world: World) -> None:
    async with world.queue() as queue:
        assert await queue.enqueue(b"1", message_id=ID.upper()) == (ID, False)
        assert await queue.enqueue(b"2", message_id=ID) == (ID, True)
        assert await queue.enqueue(b"x" * LARGE, message_id=ID) == (ID, True)
        [message] = await queue.receive(10)
        assert (message.id, message.payload) == (ID, b"1")


async def test_the_callers_own_id_with_a_large_payload(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"1" * LARGE, message_id=ID)
        assert await queue.enqueue(b"2" * (LARGE + 1), message_id=ID) == (ID, True)
        assert await (await world.one(queue)).read() == b"1" * LARGE


async def _upload(queue: millpond.Queue, payload: bytes, begun: asyncio.Event, go_on: asyncio.Event) -> Any:
    async def source() -> AsyncIterator[bytes]:
        yield payload[:-1]
        begun.set()
        await go_on.wait()
        yield payload[-1:]

    return await queue.enqueue(source(), message_id=ID)


@pytest.mark.parametrize("winner", [0, 1])
async def test_large_payloads_under_one_id_at_once_are_not_mixed_up(world: World, winner: int) -> None:
    async with world.queue() as here, world.queue() as there:
        payloads = [b"1" * LARGE, b"2" * (LARGE + 10)]
        begun = [asyncio.Event(), asyncio.Event()]
        go_on = [asyncio.Event(), asyncio.Event()]
        uploads = []
        for number, queue in enumerate((here, there)):
            uploads.append(asyncio.ensure_future(_upload(queue, payloads[number], begun[number], go_on[number])))
            await world.soon(asyncio.ensure_future(begun[number].wait()))
        for number in (winner, 1 - winner):
            go_on[number].set()
            assert await world.soon(uploads[number]) == (ID, number != winner)
        message = await world.one(there)
        assert message.payload_size == len(payloads[winner])
        assert await message.read() == payloads[winner]
        await message.ack()


async def test_an_ack_leaves_an_upload_under_the_same_id_alone(world: World) -> None:
    async with world.queue() as queue:
        begun, go_on = asyncio.Event(), asyncio.Event()
        upload = asyncio.ensure_future(_upload(queue, b"2" * LARGE, begun, go_on))
        await world.soon(asyncio.ensure_future(begun.wait()))
        await queue.enqueue(b"1" * LARGE, message_id=ID)
        message = await world.one(queue)
        assert await message.read() == b"1" * LARGE
        await message.ack()
        go_on.set()
        assert await world.soon(upload) == (ID, False)
        assert await (await world.one(queue)).read() == b"2" * LARGE


class _Vanishing:
    """A store in which a message is gone as soon as it has been looked up."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def get(self, *where: Any, **options: Any) -> Any:
        stored = await self.inner.get(*where, **options)
        if stored is not None:
            await self.inner.write([Remove(stored.item, stored.mark)])
        return stored


@pytest.mark.servers
async def test_a_payload_is_never_lost_to_a_message_that_goes_meanwhile(world: World) -> None:
    async with world.queue(around=_Vanishing) as queue:
        await queue.enqueue(b"1" * LARGE, message_id=ID)
        with pytest.raises(StoreError, match="write it again"):
            await queue.enqueue(b"2" * LARGE, message_id=ID)
        await _nothing_written(queue, enqueued=1)
        assert await queue.enqueue(b"2" * LARGE, message_id=ID) == (ID, False)
        assert await (await world.one(queue)).read() == b"2" * LARGE
