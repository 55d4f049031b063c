"""A producer or a consumer that is cancelled in the middle of a payload leaves nothing running and nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conformance.queue.conftest import World

PIECE = 300_000
"""More than any store keeps in a record, and several chunks of an encrypted stream."""


@pytest.mark.parametrize("method", ["enqueue", "enqueue_many"])
async def test_a_producer_that_is_cancelled_stops_its_source(world: World, method: str) -> None:
    asked, closed = asyncio.Event(), asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        try:
            yield bytes(PIECE)
            asked.set()
            await asyncio.Event().wait()
        finally:
            closed.set()

    async with world.pond() as pond:
        queue = pond.queue("orders")
        source = endless()
        call = queue.enqueue(source) if method == "enqueue" else queue.enqueue_many([source])
        task = asyncio.ensure_future(call)
        await asyncio.wait_for(asked.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(closed.wait(), 10)
        assert await queue.receive() == []
        assert (await queue.counts()).bytes == 0
        world.clock.advance(100_000)
        # What was written of it is removed at once or, at the latest, collected.
        assert (await pond.collect()).orphans <= 1
        assert (await pond.collect()).orphans == 0
        assert await pond.verify() == []
        # The store goes on as if nothing had been.
        await queue.enqueue(bytes(PIECE))
        assert await (await world.one(queue)).read() == bytes(PIECE)


async def test_a_consumer_that_stops_reading_can_still_answer(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(bytes(20 * PIECE))
        message = await world.one(queue)
        got = asyncio.Event()

        async def read() -> None:
            async for _ in message.stream():
                got.set()
                await asyncio.Event().wait()

        task = asyncio.ensure_future(read())
        await asyncio.wait_for(got.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await message.read() == bytes(20 * PIECE)
        await message.ack()
        assert (await queue.counts()).bytes == 0
        await world.settle()  # The event loop closes what was being read in its own time.


async def test_what_a_store_keeps_is_plain_without_a_keyring_and_sealed_with_one(world: World) -> None:
    payload, attribute = b"payload-in-the-clear", "attribute-in-the-clear"
    async with world.queue() as queue:
        receipt = await queue.enqueue(payload, attributes={"a": attribute})
        bare = world.handle()
        await bare.open()
        stored = await bare.get("default", "orders", receipt.message_id, payload=True)
        await bare.close()
        assert stored is not None
        assert stored.payload is not None
        assert (stored.payload == payload) is not world.encrypted
        assert (payload in stored.payload) is not world.encrypted
        assert (attribute.encode() in stored.head) is not world.encrypted
        message = await world.one(queue)
        assert (message.payload, message.attributes) == (payload, {"a": attribute})
