"""Batch answers: each message stands on its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from millpond import InvalidInput, LeaseLost

if TYPE_CHECKING:
    from tests.conformance.queue.conftest import World


async def _mixed(world: World, queue: Any) -> list[Any]:
    """Five messages: acked before, redelivered, held, held from another queue object, held twice in the list."""
    await queue.enqueue_many([b"0", b"1", b"2", b"3"], visibility=30)
    messages = await queue.receive(2)
    await messages[0].ack()
    world.clock.advance(31)
    again = await queue.receive(3)
    assert sorted(message.payload for message in again) == [b"1", b"2", b"3"]
    held = [message for message in again if message.payload != b"1"]
    return [messages[0], messages[1], *held, held[0]]


@pytest.mark.servers
async def test_ack_many(world: World) -> None:
    async with world.queue() as queue:
        batch = await _mixed(world, queue)
        answers = await queue.ack_many(batch)
        assert [answer.message_id for answer in answers] == [message.id for message in batch]
        assert [type(answer.error) for answer in answers] == [LeaseLost, LeaseLost, type(None), type(None), LeaseLost]
        counts = await queue.counts()
        assert (counts.ready, counts.leased) == (0, 1)


async def test_nack_many(world: World) -> None:
    async with world.queue() as queue:
        batch = await _mixed(world, queue)
        answers = await queue.nack_many(batch, error="no", delay=5)
        assert [type(answer.error) for answer in answers] == [LeaseLost, LeaseLost, type(None), type(None), LeaseLost]
        assert (await queue.counts()).delayed == 2
        world.clock.advance(5)
        for message in await queue.receive(5):
            assert (message.failures, message.last_error) == (1, "no")


async def test_defer_many(world: World) -> None:
    async with world.queue() as queue:
        batch = await _mixed(world, queue)
        answers = await queue.defer_many(batch, delay=5)
        assert [type(answer.error) for answer in answers] == [LeaseLost, LeaseLost, type(None), type(None), LeaseLost]
        world.clock.advance(5)
        assert [message.failures for message in await queue.receive(2)] == [0, 0]


async def test_extend_many(world: World) -> None:
    async with world.queue() as queue:
        batch = await _mixed(world, queue)
        answers = await queue.extend_many(batch, 100)
        # Extending twice is no contradiction.
        assert [type(answer.error) for answer in answers] == [LeaseLost, LeaseLost, *[type(None)] * 3]
        assert batch[2].lease.until_ms == world.clock.now_ms() + 100_000
        world.clock.advance(50)
        assert [message.payload for message in await queue.receive(5)] == [b"1"]
        assert all(answer.error is None for answer in await queue.ack_many(batch[2:4]))


async def test_nack_many_gives_up_those_without_budget(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"last", max_attempts=1)
        await queue.enqueue(b"more", max_attempts=2)
        await queue.nack_many(await queue.receive(2), error="no")
        counts = await queue.counts()
        assert (counts.ready, counts.dead) == (1, 1)


async def test_bad_arguments_change_nothing(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x")
        messages = await queue.receive()
        with pytest.raises(InvalidInput):
            await queue.extend_many(messages, 0)
        with pytest.raises(InvalidInput):
            await queue.nack_many(messages, delay=-1)
        assert (await queue.counts()).leased == 1


async def test_empty_batches(world: World) -> None:
    async with world.queue() as queue:
        assert await queue.ack_many([]) == []
        assert await queue.nack_many([]) == []
        assert await queue.defer_many([]) == []
        assert await queue.extend_many([], 1) == []


async def test_large_batches(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue_many([b"%d" % number for number in range(1500)])
        messages = await queue.receive(1500)
        assert len(messages) == 1500
        assert all(answer.error is None for answer in await queue.extend_many(messages, 90))
        assert all(answer.error is None for answer in await queue.nack_many(messages[:500]))
        assert all(answer.error is None for answer in await queue.ack_many(messages[500:]))
        assert (await queue.counts())[:3] == (500, 0, 0)
