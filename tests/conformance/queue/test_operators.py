"""What operators see and do: counts in every state, peek, purge; none of it takes a message from a consumer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from millpond import Queue, QueueCounts

if TYPE_CHECKING:
    from tests.conformance.queue.conftest import World


@pytest.mark.servers
async def test_counts_in_every_state(world: World) -> None:
    async with world.pond() as pond, world.queue() as there:
        queue = pond.queue("orders")
        assert (await queue.counts())[:7] == (0, 0, 0, 0, 0, 0, None)
        await queue.enqueue(b"to be buried")
        await (await world.one(queue)).bury("hopeless")
        await queue.enqueue(b"1" * 10, priority=9)
        await world.one(queue, visibility=60)
        await queue.enqueue(b"2" * 100)
        await queue.enqueue(b"3" * 100, priority=1)
        await queue.enqueue(b"4" * 1000, delay=50)
        await queue.enqueue(b"5" * 10_000, ordering_key="k")
        await queue.enqueue(b"6" * 10_000, ordering_key="k")
        await queue.enqueue(b"7" * 300_000, delay=70)
        world.clock.advance(2.5)
        expected = QueueCounts(ready=3, delayed=2, leased=1, blocked=1, dead=1, bytes=321_210, oldest_age=2.5)
        for each in (queue, there):
            counts = await each.counts()
            assert counts._replace(enqueued=None) == expected
            assert counts.enqueued == (None if world.store.startswith("objects") or world.corner else 8)
        # With time alone: a delay ends, then a lease, then another delay.
        world.clock.advance(47.5)
        assert (await queue.counts())[:7] == (4, 1, 1, 1, 1, 321_210, 50.0)
        world.clock.advance(10)
        assert (await queue.counts())[:7] == (5, 1, 0, 1, 1, 321_210, 60.0)
        world.clock.advance(10)
        assert (await there.counts())[:7] == (6, 0, 0, 1, 1, 321_210, 70.0)
        assert await pond.verify() == []


async def test_what_has_come_is_counted_however_it_came_and_whatever_became_of_it(world: World) -> None:
    """Stores write many plain messages at once by another way than one, and one with options by a third."""
    async with world.pond() as pond:
        queue = pond.queue("q")
        await queue.enqueue_many([b"x"] * 40)
        await queue.enqueue(b"x", delay=5, priority=7, dedup_key="k")
        await queue.enqueue(b"x", dedup_key="k")  # it is the one before
        for message in await queue.receive(10):
            await message.ack(then=[("q", b"next")])
        assert (await queue.counts()).enqueued == (None if world.store.startswith("objects") or world.corner else 51)


async def test_counts_follow_each_answer(world: World) -> None:
    async with world.pond() as pond:
        queue = pond.queue("orders")
        await queue.enqueue_many([b"x"] * 5)
        assert (await queue.counts())[:5] == (5, 0, 0, 0, 0)
        acked, nacked, deferred, buried, extended = await queue.receive(5)
        assert (await queue.counts())[:5] == (0, 0, 5, 0, 0)
        await acked.ack()
        assert (await queue.counts())[:6] == (0, 0, 4, 0, 0, 4)
        await nacked.nack("no", delay=5)
        assert (await queue.counts())[:5] == (0, 1, 3, 0, 0)
        await deferred.defer()
        assert (await queue.counts())[:5] == (1, 1, 2, 0, 0)
        await buried.bury("hopeless")
        assert (await queue.counts())[:6] == (1, 1, 1, 0, 1, 3)
        await extended.extend(100)
        world.clock.advance(99.999)
        assert (await queue.counts())[:5] == (2, 0, 1, 0, 1)
        world.clock.advance(0.001)
        assert (await queue.counts())[:5] == (3, 0, 0, 0, 1)
        await queue.dead_letters.redrive()
        assert (await queue.counts())[:6] == (4, 0, 0, 0, 0, 4)
        assert await pond.verify() == []


async def test_the_oldest_age_is_of_the_ready_ones(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"1", delay=10)
        world.clock.advance(4)
        assert (await queue.counts()).oldest_age is None
        world.clock.advance(8)
        assert (await queue.counts()).oldest_age == 2.0
        await queue.enqueue(b"2", priority=9)
        assert (await queue.counts()).oldest_age == 2.0
        for message in await queue.receive(2):
            await message.nack("no")
        # Since when it is ready again, not since when it is in the queue.
        assert (await queue.counts()).oldest_age == 0.0
        await queue.receive(2)
        assert (await queue.counts()).oldest_age is None


async def test_peek_takes_nothing(world: World) -> None:
    async with world.queue() as here, world.queue() as there:
        await here.enqueue_many([b"1", b"2", b"3"])
        await here.enqueue(b"0", priority=9)
        await here.enqueue(b"later", delay=10)
        for queue in (here, there, here):
            views = await queue.peek(3)
            assert [await view.payload() for view in views] == [b"0", b"1", b"2"]
            assert {(view.state, view.attempts, view.lease) for view in views} == {("ready", 0, None)}
        assert len(await here.peek()) == 1
        assert (await here.counts())[:3] == (4, 1, 0)
        assert [message.payload for message in await there.receive(10)] == [b"0", b"1", b"2", b"3"]
        assert await here.peek(10) == []


async def test_peek_shows_what_would_be_handed_out(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"a0", ordering_key="a")
        await queue.enqueue(b"a1", ordering_key="a")
        await queue.enqueue(b"x", visibility=5)
        assert [await view.payload() for view in await queue.peek(10)] == [b"a0", b"x"]
        await queue.receive(10)
        world.clock.advance(5)
        [view] = await queue.peek(10)
        assert (view.state, view.attempts) == ("lapsed", 1)
        assert view.lease is not None


async def test_peek_beside_a_waiting_consumer(world: World) -> None:
    async with world.queue() as queue:
        waiting = await world.waiting(queue.receive(wait=1000))
        assert await queue.peek(5) == []
        await queue.enqueue(b"x")
        await queue.peek(5)
        await world.settle()
        assert [message.payload for message in await world.soon(waiting)] == [b"x"]


async def test_purge_leaves_the_held_ones(world: World) -> None:
    async with world.pond() as pond:
        queue, other = pond.queue("orders"), pond.queue("others")
        await other.enqueue(b"not this queue's")
        await queue.enqueue_many([b"held", b"lapsed", b"back", b"ready", b"r" * 300_000])
        await queue.enqueue(b"delayed", delay=100)
        held, _, back = await queue.receive(3, visibility=5)
        await held.extend(60)
        await back.nack("no", delay=50)
        world.clock.advance(5)
        assert await queue.purge() == 5
        assert (await queue.counts())[:6] == (0, 0, 1, 0, 0, 4)
        assert (await other.counts()).ready == 1
        assert await queue.receive(5) == []
        # Its holder notices nothing.
        await held.state.save(1)
        await held.ack()
        assert await queue.purge() == 0
        await pond.collect()
        assert await pond.verify() == []


async def test_purge_of_a_long_queue(world: World) -> None:
    async with world.queue() as here, world.queue() as there:
        await here.enqueue_many([b"x"] * 1200)
        held = await there.receive(3)
        assert await here.purge() == 1197
        assert (await there.counts())[:3] == (0, 0, 3)
        assert await there.receive() == []
        await there.ack_many(held)


@pytest.mark.servers
async def test_queues_are_listed_by_name(world: World) -> None:
    async with world.pond() as pond, world.pond() as other:
        assert await pond.queues() == []
        for namespace, name in (("n", "b"), ("n", "a"), ("default", "z")):
            await pond.queue(name, namespace=namespace).enqueue(b"x")
        await pond.queue("only-a-policy").pause()
        expected = [("default", "only-a-policy"), ("default", "z"), ("n", "a"), ("n", "b")]
        assert await other.queues() == expected


async def _due(queue: Queue) -> float | None:
    return await queue.next_due()


async def test_next_due(world: World) -> None:
    async with world.queue() as queue:
        assert await _due(queue) is None
        await queue.enqueue(b"x", visibility=30)
        assert await _due(queue) is None
        await queue.enqueue(b"later", delay=40)
        await world.one(queue)
        assert await _due(queue) == 30.0
        world.clock.advance(30)
        assert await _due(queue) == 10.0
