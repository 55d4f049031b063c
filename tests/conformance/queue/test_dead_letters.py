"""Dead letters: list, get, payload, redrive, purge; by id and all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from millpond import MessageNotFound, Queue

if TYPE_CHECKING:
    from tests.conformance.queue.conftest import World

LARGE = 300_000


async def _dead(world: World, queue: Queue, *payloads: bytes) -> list[str]:
    """Dead letters with these payloads; their ids."""
    receipts = await queue.enqueue_many(payloads, attributes={"a": 1}, correlation_id="c")
    for message in await queue.receive(len(payloads)):
        await message.bury("hopeless", error={"why": "because"})
    return [receipt.message_id for receipt in receipts]


async def test_a_dead_letter_has_everything(world: World) -> None:
    async with world.queue() as here, world.queue() as there:
        await here.enqueue(b"x", attributes={"a": 1}, correlation_id="c", priority=7, ordering_key="o", dedup_key="d")
        await (await world.one(here)).nack("first")
        await (await world.one(here)).bury("hopeless", error={"why": "because"})
        [dead] = await there.dead_letters.list()
        assert (dead.state, dead.dead_reason, dead.last_error) == ("dead", "hopeless", {"why": "because"})
        assert (dead.attempts, dead.failures, dead.lease) == (2, 1, None)
        assert (dead.attributes, dead.correlation_id, dead.priority) == ({"a": 1}, "c", 7)
        assert (dead.ordering_key, dead.dedup_key, dead.payload_size) == ("o", "d", 1)
        assert dead.dead_at is not None
        assert dead.dead_at.timestamp() * 1000 == world.clock.now_ms()
        assert await dead.payload() == b"x"


async def test_they_are_never_delivered(world: World) -> None:
    async with world.queue() as queue:
        await _dead(world, queue, b"1", b"2")
        world.clock.advance(1_000_000)
        assert await queue.receive(10) == []
        assert await queue.peek(10) == []
        assert (await queue.counts())[:6] == (0, 0, 0, 0, 2, 0)


@pytest.mark.servers
async def test_list_in_pages(world: World) -> None:
    async with world.queue() as queue:
        ids = await _dead(world, queue, *(b"%d" % number for number in range(7)))
        await queue.enqueue(b"alive")
        seen: list[str] = []
        while page := await queue.dead_letters.list(after=seen[-1] if seen else None, limit=3):
            assert len(page) <= 3
            seen += [view.id for view in page]
        assert seen == ids
        assert [view.id for view in await queue.dead_letters.list()] == ids
        assert await queue.dead_letters.list(after=ids[-1]) == []


async def test_list_after_a_message_that_is_no_dead_letter(world: World) -> None:
    async with world.queue() as queue:
        receipt = await queue.enqueue(b"alive")
        with pytest.raises(MessageNotFound, match="still in queue"):
            await queue.dead_letters.list(after=receipt.message_id)


async def test_get_and_payload(world: World) -> None:
    async with world.queue() as queue:
        small, large = await _dead(world, queue, b"small", b"l" * LARGE)
        assert (await queue.dead_letters.get(small.upper())).id == small
        assert await queue.dead_letters.payload(small) == b"small"
        assert await queue.dead_letters.payload(large) == b"l" * LARGE
        # What is in the queue is no dead letter, and what is dead can be got from the queue.
        alive = (await queue.enqueue(b"alive")).message_id
        for read in (queue.dead_letters.get, queue.dead_letters.payload):
            with pytest.raises(MessageNotFound):
                await read(alive)
        assert (await queue.get(small)).dead_reason == "hopeless"


async def test_dead_letters_are_of_one_queue(world: World) -> None:
    async with world.pond() as pond:
        queue, other = pond.queue("orders"), pond.queue("orders", namespace="other")
        [id] = await _dead(world, queue, b"x")
        assert await other.dead_letters.list() == []
        for call in (other.dead_letters.get(id), other.dead_letters.redrive([id]), other.dead_letters.purge([id])):
            with pytest.raises(MessageNotFound):
                await call
        assert await other.dead_letters.redrive() == 0
        assert await other.dead_letters.purge() == 0
        assert (await queue.counts()).dead == 1


@pytest.mark.servers
async def test_redrive_by_id(world: World) -> None:
    async with world.queue() as queue:
        first, second, third = await _dead(world, queue, b"1", b"2", b"3")
        assert await queue.dead_letters.redrive([third, first, third.upper()]) == 2
        assert [view.id for view in await queue.dead_letters.list()] == [second]
        messages = await queue.receive(10)
        assert sorted(message.id for message in messages) == [first, third]
        for message in messages:
            # A new budget, the old error, and a token that no earlier holder has.
            assert (message.attempts, message.failures, message.lease.token) == (1, 0, 2)
            assert message.last_error == {"why": "because"}
            await message.ack()


async def test_redrive_all(world: World) -> None:
    async with world.queue() as queue:
        await _dead(world, queue, *(b"%d" % number for number in range(1200)))
        assert await queue.dead_letters.redrive() == 1200
        assert await queue.dead_letters.redrive() == 0
        assert (await queue.counts())[:5] == (1200, 0, 0, 0, 0)


async def test_redrive_nothing(world: World) -> None:
    async with world.queue() as queue:
        await _dead(world, queue, b"1")
        assert await queue.dead_letters.redrive([]) == 0
        assert await queue.dead_letters.purge([]) == 0
        assert (await queue.counts()).dead == 1


async def test_one_unknown_id_stops_all(world: World) -> None:
    async with world.queue() as queue:
        [id] = await _dead(world, queue, b"1")
        alive = (await queue.enqueue(b"alive")).message_id
        for unknown in ("0197a3c2-0000-7000-8000-000000000001", alive):
            for call in (queue.dead_letters.redrive, queue.dead_letters.purge):
                with pytest.raises(MessageNotFound):
                    await call([id, unknown])
        assert (await queue.counts())[:5] == (1, 0, 0, 0, 1)


async def test_a_redriven_message_wakes_who_waits(world: World) -> None:
    async with world.queue() as queue:
        [id] = await _dead(world, queue, b"1")
        waiting = await world.waiting(queue.receive(wait=1000))
        await queue.dead_letters.redrive([id])
        await world.settle()
        assert [message.id for message in await world.soon(waiting)] == [id]


async def test_a_redriven_message_has_its_time_to_live_anew(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x", ttl=10)
        await (await world.one(queue)).bury("hopeless")
        world.clock.advance(100)
        # The dead do not expire.
        assert len(await queue.dead_letters.list()) == 1
        await queue.dead_letters.redrive()
        world.clock.advance(9.999)
        message = await world.one(queue)
        await message.defer()
        world.clock.advance(0.001)
        assert await queue.receive() == []


async def test_it_can_die_again(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x", max_attempts=2)
        for _ in range(3):
            await (await world.one(queue)).nack("no")
            await (await world.one(queue)).nack("no more")
            [dead] = await queue.dead_letters.list()
            assert (dead.failures, dead.last_error) == (2, "no more")
            await queue.dead_letters.redrive()


@pytest.mark.servers
async def test_purge_by_id_and_all(world: World) -> None:
    async with world.pond() as pond:
        queue = pond.queue("orders")
        first, second, third = await _dead(world, queue, b"1", b"l" * LARGE, b"3")
        await queue.enqueue(b"alive")
        assert await queue.dead_letters.purge([second, second]) == 1
        assert [view.id for view in await queue.dead_letters.list()] == [first, third]
        with pytest.raises(MessageNotFound):
            await queue.get(second)
        assert await queue.dead_letters.purge() == 2
        assert (await queue.counts())[:5] == (1, 0, 0, 0, 0)
        await pond.collect()
        assert await pond.verify() == []


async def test_a_purge_of_the_queue_leaves_the_dead(world: World) -> None:
    async with world.queue() as queue:
        ids = await _dead(world, queue, b"1")
        await queue.enqueue(b"alive")
        assert await queue.purge() == 1
        assert [view.id for view in await queue.dead_letters.list()] == ids
