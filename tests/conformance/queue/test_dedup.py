"""The dedup window: a second enqueue returns the first message, until the window is over, and whatever became of it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.conformance.queue.conftest import World

LARGE = 300_000


async def _ack(world: World, queue: Any) -> None:
    await (await world.one(queue)).ack()


async def _bury(world: World, queue: Any) -> None:
    await (await world.one(queue)).bury("hopeless")


async def _purge(world: World, queue: Any) -> None:
    assert await queue.purge() == 1


async def _purge_dead(world: World, queue: Any) -> None:
    await _bury(world, queue)
    assert await queue.dead_letters.purge() == 1


async def _redrive(world: World, queue: Any) -> None:
    await _bury(world, queue)
    assert await queue.dead_letters.redrive() == 1


async def _nack(world: World, queue: Any) -> None:
    await (await world.one(queue)).nack("no")


@pytest.mark.parametrize("event", [_ack, _bury, _purge, _purge_dead, _redrive, _nack])
async def test_the_window_outlives_what_becomes_of_the_first(world: World, event: Any) -> None:
    async with world.queue() as queue, world.queue() as there:
        first = await queue.enqueue(b"1", dedup_key="k", dedup_window=10)
        await event(world, queue)
        before = await queue.counts()
        assert await there.enqueue(b"2", dedup_key="k") == (first.message_id, True)
        assert await queue.counts() == before
        world.clock.advance(10)
        again = await there.enqueue(b"3", dedup_key="k")
        assert again.duplicate is False
        assert again.message_id != first.message_id


async def test_a_second_enqueue_does_not_lengthen_the_window(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"1", dedup_key="k", dedup_window=10)
        world.clock.advance(9)
        assert (await queue.enqueue(b"2", dedup_key="k", dedup_window=1000)).duplicate is True
        world.clock.advance(1)
        assert (await queue.enqueue(b"3", dedup_key="k")).duplicate is False


@pytest.mark.servers
async def test_the_next_window_begins_after_the_first(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"1", dedup_key="k", dedup_window=10)
        world.clock.advance(10)
        second = await queue.enqueue(b"2", dedup_key="k", dedup_window=10)
        world.clock.advance(9.999)
        assert await queue.enqueue(b"3", dedup_key="k") == (second.message_id, True)


async def test_the_first_stays_as_it_was_given(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"1", dedup_key="k", priority=2, attributes={"n": 1})
        await queue.enqueue(b"2" * LARGE, dedup_key="k", priority=9, attributes={"n": 2}, delay=50)
        message = await world.one(queue)
        assert (message.payload, message.priority, message.attributes) == (b"1", 2, {"n": 1})
        assert (await queue.counts()).bytes == 1


@pytest.mark.servers
async def test_of_many_at_once_one_goes_in(world: World) -> None:
    async with world.queue() as here, world.queue() as there:
        receipts = await asyncio.gather(
            *(queue.enqueue(b"%d" % number, dedup_key="k") for number in range(10) for queue in (here, there))
        )
        assert sum(not receipt.duplicate for receipt in receipts) == 1
        assert len({receipt.message_id for receipt in receipts}) == 1
        assert len(await here.receive(20)) == 1


async def test_a_collector_does_not_shorten_the_window(world: World) -> None:
    async with world.pond() as pond:
        queue = pond.queue("orders")
        await queue.enqueue(b"1", dedup_key="k", dedup_window=100_000)
        await _ack(world, queue)
        world.clock.advance(99_999)
        await pond.collect()
        assert (await queue.enqueue(b"2", dedup_key="k")).duplicate is True
        world.clock.advance(1)
        await pond.collect()
        assert (await queue.enqueue(b"3", dedup_key="k")).duplicate is False


async def test_keys_that_differ_little_differ(world: World) -> None:
    async with world.queue() as queue:
        for key in ("a", "A", "a ", "\u00e9", "e\u0301", "a\x00"):
            assert (await queue.enqueue(b"x", dedup_key=key)).duplicate is False, key


@pytest.mark.parametrize("size", [1, LARGE], ids=["inline", "apart"])
async def test_one_request_sent_twice_at_once_is_one_message(world: World, size: int) -> None:
    """Also when its payload is stored apart, and so is there before anybody knows that it is the second."""
    id = "0197a3c2-0000-7000-8000-000000000001"
    async with world.queue() as queue:
        receipts = await queue.enqueue_many([b"1" * size, b"1" * size], message_id=id)
        assert receipts == [(id, False), (id, True)]
        assert await asyncio.gather(*(queue.enqueue(b"1" * size, message_id=id) for _ in range(3))) == [(id, True)] * 3
        [message] = await queue.receive(10)
        assert await message.read() == b"1" * size
