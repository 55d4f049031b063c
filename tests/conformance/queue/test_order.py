"""In which order messages come: by priority, then first come; and one at a time under an ordering key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from millpond import Message, Queue
from millpond.service.ready import MAX_AGE, THRIFTY_AGE

if TYPE_CHECKING:
    from tests.conformance.queue.conftest import World


async def _payloads(queue: Queue, count: int = 100) -> list[bytes]:
    return [message.payload for message in await queue.receive(count)]


# Priorities


@pytest.mark.servers
async def test_all_priorities_in_order(world: World) -> None:
    async with world.queue() as here, world.queue() as there:
        for priority in (3, 9, 0, 5, 7, 1, 8, 2, 6, 4):
            await here.enqueue(b"%d" % priority, priority=priority)
        assert await _payloads(there) == [b"%d" % priority for priority in range(9, -1, -1)]


async def test_a_late_one_of_higher_priority_goes_first(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue_many([b"1", b"2", b"3"], priority=4)
        assert await _payloads(queue, 1) == [b"1"]
        await queue.enqueue(b"urgent", priority=5)
        await queue.enqueue(b"idle", priority=3)
        assert await _payloads(queue) == [b"urgent", b"2", b"3", b"idle"]


async def test_a_late_one_from_another_pond_goes_first_soon(world: World) -> None:
    async with world.queue() as here, world.queue() as there:
        await there.enqueue_many([b"1", b"2", b"3"], priority=4)
        assert await _payloads(there, 1) == [b"1"]
        await here.enqueue(b"urgent", priority=5)
        # The ready cache of another process is a second old at most, or a few where a look costs money.
        world.clock.advance(THRIFTY_AGE if world.paid else MAX_AGE)
        assert await _payloads(there, 1) == [b"urgent"]


async def test_nobody_starves_within_a_priority(world: World) -> None:
    """New and returning messages of the same priority line up behind those that wait: each is passed by few."""
    async with world.queue() as queue:
        await queue.enqueue_many([b"old %d" % number for number in range(20)])
        seen: set[bytes] = set()
        for turn in range(40):
            world.clock.advance(0.01)
            await queue.enqueue(b"new %d" % turn)
            message = await world.one(queue)
            seen.add(message.payload)
            await (message.defer() if turn % 2 else message.nack("again"))
        assert seen >= {b"old %d" % number for number in range(20)}


async def test_what_comes_due_first_goes_first_within_a_priority(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"2", delay=2)
        await queue.enqueue(b"1", delay=1)
        await queue.enqueue(b"3", delay=3)
        await queue.enqueue(b"first", delay=3, priority=6)
        world.clock.advance(3)
        assert await _payloads(queue) == [b"first", b"1", b"2", b"3"]


# Ordering keys


async def _fill(queue: Queue, *, keys: tuple[str, ...] = ("k",), count: int = 3, visibility: float = 30) -> None:
    for number in range(count):
        for key in keys:
            await queue.enqueue(f"{key}{number}".encode(), ordering_key=key, visibility=visibility)


async def test_one_at_a_time_in_order(world: World) -> None:
    async with world.queue() as queue:
        await _fill(queue, keys=("a", "b"))
        for number in range(3):
            messages = await queue.receive(10)
            assert [message.payload for message in messages] == [b"a%d" % number, b"b%d" % number]
            assert await queue.receive(10) == []
            counts = await queue.counts()
            assert (counts.ready, counts.leased, counts.blocked) == (0, 2, 2 * (2 - number))
            await queue.ack_many(messages)
        assert await queue.receive() == []


async def test_messages_without_a_key_are_not_held_up(world: World) -> None:
    async with world.queue() as queue:
        await _fill(queue)
        await queue.enqueue_many([b"x", b"y"])
        assert await _payloads(queue) == [b"k0", b"x", b"y"]


async def test_keys_are_of_one_queue(world: World) -> None:
    async with world.pond() as pond:
        queues = [pond.queue("a"), pond.queue("b"), pond.queue("a", namespace="n")]
        for queue in queues:
            await _fill(queue, count=1)
        assert [await _payloads(queue) for queue in queues] == [[b"k0"]] * 3


@pytest.mark.servers
async def test_two_ponds_take_turns(world: World) -> None:
    async with world.queue() as here, world.queue() as there:
        await _fill(here, count=6)
        ponds = [here, there]
        for number in range(6):
            holder, other = ponds[number % 2], ponds[1 - number % 2]
            message = await world.one(holder)
            assert message.payload == b"k%d" % number
            assert await other.receive(10) == []
            await message.ack()
            world.clock.advance(1)  # The other's ready cache is a second old at most.


@pytest.mark.servers
async def test_many_consumers_in_two_ponds_keep_each_key_in_order(world: World) -> None:
    import asyncio

    done: dict[str | None, list[bytes]] = {"a": [], "b": [], "c": []}
    held: set[str | None] = set()

    async def consume(queue: Queue) -> None:
        while sum(map(len, done.values())) < 24:
            for message in await queue.receive(4):
                key = message.ordering_key
                assert key not in held
                held.add(key)
                await asyncio.sleep(0)
                done[key].append(message.payload)
                held.discard(key)
                await message.ack()
            await asyncio.sleep(0)
            world.clock.advance(0.1)

    async with world.queue() as here, world.queue() as there:
        await _fill(here, keys=("a", "b", "c"), count=8, visibility=86_400)
        await asyncio.gather(*(consume(queue) for queue in (here, there, here, there)))
        for key, payloads in done.items():
            assert payloads == [f"{key}{number}".encode() for number in range(8)]


async def test_the_ack_wakes_the_one_who_waits_for_the_next(world: World) -> None:
    async with world.queue() as queue:
        await _fill(queue, count=2)
        first = await world.one(queue)
        waiting = await world.waiting(queue.receive(wait=1000))
        await first.ack()
        await world.settle()
        assert [message.payload for message in await world.soon(waiting)] == [b"k1"]


async def test_one_that_is_given_back_still_comes_first(world: World) -> None:
    async with world.queue() as queue:
        await _fill(queue)
        for answer in ("nack", "defer", "lapse"):
            message = await world.one(queue)
            assert message.payload == b"k0"
            if answer == "nack":
                await message.nack("no", delay=5)
            elif answer == "defer":
                await message.defer(delay=5)
            if answer != "lapse":
                # It keeps its place while it waits: the others may not pass it.
                assert await queue.receive() == []
                assert (await queue.counts())[:4] == (0, 1, 0, 2)
            world.clock.advance(30 if answer == "lapse" else 5)
        await (await world.one(queue)).ack()
        assert await _payloads(queue) == [b"k1"]


async def test_one_that_is_delayed_from_the_start_holds_up_its_key(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"k0", ordering_key="k", delay=10)
        await queue.enqueue(b"k1", ordering_key="k", priority=9)
        assert await queue.receive(5) == []
        world.clock.advance(10)
        assert await _payloads(queue) == [b"k0"]


async def _bury(world: World, queue: Queue, message: Message) -> None:
    await message.bury("hopeless")


async def _exhaust(world: World, queue: Queue, message: Message) -> None:
    assert (message.failures, message.max_attempts) == (1, 5)
    for _ in range(3):
        await message.nack("no")
        message = await world.one(queue)
        assert message.payload == b"k0"
    await message.nack("no")


async def _expire(world: World, queue: Queue, message: Message) -> None:
    world.clock.advance(60)


async def _hand_off(world: World, queue: Queue, message: Message) -> None:
    await message.ack(then=[("next", b"k0", {"ordering_key": "k"})])


@pytest.mark.parametrize("way", [_bury, _exhaust, _expire, _hand_off])
@pytest.mark.parametrize("where", ["here", "there"])
async def test_one_that_leaves_frees_its_key(world: World, way: Any, where: str) -> None:
    async with world.queue() as here, world.queue() as there:
        await here.enqueue(b"k0", ordering_key="k", ttl=60)
        await here.enqueue(b"k1", ordering_key="k")
        assert await there.receive(visibility=1) != []
        world.clock.advance(1)
        await way(world, here, await world.one(here))
        world.clock.advance(1)
        assert await _payloads(here if where == "here" else there) == [b"k1"]


@pytest.mark.servers
async def test_one_that_comes_back_from_the_dead_joins_at_the_end(world: World) -> None:
    async with world.queue() as queue:
        await _fill(queue)
        await (await world.one(queue)).bury("hopeless")
        held = await world.one(queue)
        assert held.payload == b"k1"
        assert await queue.dead_letters.redrive() == 1
        # Never two of one key at once, whatever came back.
        assert await queue.receive(10) == []
        await held.ack()
        for expected in (b"k2", b"k0"):
            [message] = await queue.receive(10)
            assert message.payload == expected
            await message.ack()


async def test_one_that_comes_back_to_a_free_key_is_ready(world: World) -> None:
    async with world.queue() as queue:
        await _fill(queue, count=1)
        await (await world.one(queue)).bury("hopeless")
        await queue.dead_letters.redrive()
        assert await _payloads(queue) == [b"k0"]


async def test_a_purge_leaves_the_held_one_and_the_key_in_order(world: World) -> None:
    async with world.queue() as queue:
        await _fill(queue)
        held = await world.one(queue)
        assert await queue.purge() == 2
        await queue.enqueue(b"k3", ordering_key="k")
        assert await queue.receive() == []
        await held.ack()
        assert await _payloads(queue) == [b"k3"]


async def test_a_purge_of_all_frees_the_key(world: World) -> None:
    async with world.queue() as queue:
        await _fill(queue)
        await (await world.one(queue)).nack("no", delay=1000)
        assert await queue.purge() == 3
        await queue.enqueue(b"k3", ordering_key="k")
        assert await _payloads(queue) == [b"k3"]


async def test_priority_decides_between_keys_not_within(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"a0", ordering_key="a", priority=1)
        await queue.enqueue(b"a1", ordering_key="a", priority=9)
        await queue.enqueue(b"b0", ordering_key="b", priority=5)
        messages = await queue.receive(10)
        assert [message.payload for message in messages] == [b"b0", b"a0"]
        await messages[1].ack()
        assert await _payloads(queue) == [b"a1"]


async def test_a_duplicate_of_a_keyed_message_takes_no_place(world: World) -> None:
    async with world.queue() as queue:
        for _ in range(2):
            await queue.enqueue(b"k0", ordering_key="k", dedup_key="once")
        await (await world.one(queue)).ack()
        await queue.enqueue(b"k1", ordering_key="k")
        assert await _payloads(queue) == [b"k1"]
