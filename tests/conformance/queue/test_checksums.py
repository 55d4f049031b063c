"""A payload that is not what was enqueued is found out where it is handed to somebody, and by `verify`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from millpond import Keyring, Pond, StoreCorrupt
from millpond.model import codec
from millpond.model.clock import ManualClock
from millpond.stores.base import Insert
from millpond.stores.encrypted import EncryptedStore
from millpond.stores.memory import MemoryStore

if TYPE_CHECKING:
    from tests.conformance.queue.conftest import World

LARGE = 300_000


def _rotten(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 0x10])


class Changing:
    """A store that keeps something else than what it is given."""

    def __init__(self, inner: Any, *, insert: Callable[[Insert], Insert], rot_blobs: bool = False) -> None:
        self.inner = inner
        self.insert = insert
        self.rot_blobs = rot_blobs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def write(self, ops: Any) -> Any:
        return await self.inner.write([self.insert(op) if isinstance(op, Insert) else op for op in ops])

    async def write_blob(self, namespace: str, queue: str, id: str, chunks: AsyncIterator[bytes], now: int) -> Any:
        async def changed() -> AsyncIterator[bytes]:
            last = b""
            async for chunk in chunks:
                yield last
                last = chunk
            yield _rotten(last)

        return await self.inner.write_blob(namespace, queue, id, changed() if self.rot_blobs else chunks, now)


def rotting(inner: Any) -> Changing:
    def insert(op: Insert) -> Insert:
        return op if op.item.external else msgspec.structs.replace(op, payload=_rotten(op.payload))

    return Changing(inner, insert=insert, rot_blobs=True)


def ageing(inner: Any) -> Changing:
    """Records as they were before there was a checksum, and payloads that rot."""

    def insert(op: Insert) -> Insert:
        fields = msgspec.msgpack.decode(op.head)
        assert isinstance(fields.pop(), int)
        old = msgspec.structs.replace(op, head=codec.encode(fields))
        return old if op.item.external else msgspec.structs.replace(old, payload=_rotten(op.payload))

    return Changing(inner, insert=insert, rot_blobs=True)


SIZES = [1, 1000, 40_000, LARGE]
"""At hand when a message is chosen, or fetched with the claim, or stored apart."""


@pytest.mark.parametrize("size", SIZES)
async def test_a_payload_that_rotted_is_the_consumers_to_know(world: World, size: int) -> None:
    async with world.queue(around=rotting) as producer, world.queue() as consumer:
        receipt = await producer.enqueue(b"x" * size, max_attempts=1)
        names_it = world.words(f"{receipt.message_id} in default/orders is damaged")
        for _ in range(2):
            with pytest.raises(StoreCorrupt, match=names_it):
                await (await consumer.get(receipt.message_id)).payload()
        message = await world.one(consumer)
        for _ in range(2):
            with pytest.raises(StoreCorrupt, match=names_it):
                await message.read()
            if size < LARGE:
                with pytest.raises(StoreCorrupt, match=names_it):
                    _ = message.payload
                with pytest.raises(StoreCorrupt, match=names_it):
                    message.json()
        await message.nack("cannot be read")
        with pytest.raises(StoreCorrupt, match=names_it):
            await consumer.dead_letters.payload(receipt.message_id)


async def test_verify_reads_the_payloads(world: World) -> None:
    async with world.pond(around=rotting) as bad, world.pond() as good:
        for size in SIZES:
            await good.queue("orders").enqueue(b"x" * size)
        assert await good.verify() == []
        rotten = [(await bad.queue("orders").enqueue(b"x" * size)).message_id for size in SIZES]
        problems = await good.verify()
        assert [problem.where for problem in problems] == [f"message {id} in default/orders" for id in rotten]
        assert all("is damaged: its checksum is" in problem.what for problem in problems)


@pytest.mark.parametrize("size", SIZES)
async def test_what_is_whole_is_read_and_checked(world: World, size: int) -> None:
    async with world.queue() as producer, world.queue() as consumer:
        data = bytes(range(256)) * (size // 256 + 1)
        await producer.enqueue(data, delay=0)
        await producer.enqueue_many([data, bytearray(data)], priority=3)
        for message in await consumer.receive(3):
            assert await message.read() == data
            assert message._known().head.checksum is not None
        assert len(await consumer.peek(9)) == 0


@pytest.mark.parametrize("size", SIZES)
async def test_records_without_a_checksum_stay_readable(world: World, size: int) -> None:
    async with world.queue(around=ageing) as producer, world.pond() as pond:
        receipt = await producer.enqueue(b"x" * size)
        consumer = pond.queue("orders")
        assert await (await consumer.get(receipt.message_id)).payload() == _rotten(b"x" * size)
        assert await pond.verify() == []
        message = await world.one(consumer)
        assert await message.read() == _rotten(b"x" * size)
        await message.ack()


@pytest.mark.parametrize("encrypted", [False, True])
async def test_a_payload_in_the_place_of_another_of_the_same_id_is_found_out(encrypted: bool) -> None:
    """Sealed for the same message, both open: which of them is the message's, the head says."""
    clock = ManualClock()
    memory = MemoryStore(clock=clock)
    store = EncryptedStore(memory, Keyring({"key": bytes(32)})) if encrypted else memory
    async with Pond(store, clock=clock) as pond:
        queue, id = pond.queue("orders"), "0197a3c2-0000-7000-8000-000000000001"

        async def overtaken() -> AsyncIterator[bytes]:
            yield b"2" * LARGE
            assert await queue.enqueue(b"1" * LARGE, message_id=id) == (id, False)

        assert await queue.enqueue(overtaken(), message_id=id) == (id, True)
        assert await (await queue.get(id)).payload() == b"1" * LARGE
        one, two = memory._data.blobs
        blobs = memory._data.blobs
        blobs[one], blobs[two] = blobs[two], blobs[one]
        with pytest.raises(StoreCorrupt, match=f"{id} in default/orders is damaged"):
            await (await queue.get(id)).payload()
