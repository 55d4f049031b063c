"""Workflow state: written under the lease alone, kept until the ack, and wherever the message goes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from millpond import InvalidInput, LeaseLost, MessageNotFound, Queue, StateConflict, TooLarge
from millpond.service.config import Config

if TYPE_CHECKING:
    from tests.conformance.queue.conftest import World

VALUES: list[Any] = [
    None,
    0,
    -(1 << 63),
    (1 << 64) - 1,
    1.5,
    "",
    "gr\u00fc\u00dfe \U0001f600",
    b"\x00\xff",
    [],
    [1, [2, [None]]],
    {},
    {"a": {"b": [True]}, "": 1},
]


@pytest.mark.servers
async def test_what_was_saved_is_loaded(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x")
        message = await world.one(queue)
        assert await message.state.load() is None
        for value in VALUES:
            await message.state.save(value)
            loaded = await message.state.load()
            assert loaded == value
            assert type(loaded) is type(value)


async def test_delete(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x")
        message = await world.one(queue)
        await message.state.delete()
        await message.state.save(1)
        await message.state.delete()
        await message.state.delete()
        assert await message.state.load() is None
        await message.state.save(2)
        assert await message.state.load() == 2


async def test_what_cannot_be_saved_changes_nothing(world: World) -> None:
    nested: list[Any] = []
    for _ in range(5000):
        nested = [nested]
    async with world.queue(config=Config(max_state_bytes=1000)) as queue:
        await queue.enqueue(b"x")
        message = await world.one(queue)
        await message.state.save("kept")
        for value in (object(), {"a": {1, object()}}, "\ud800", {"\ud800": 1}, 1 << 64, nested):
            with pytest.raises(InvalidInput):
                await message.state.save(value)
        with pytest.raises(TooLarge, match="1000"):
            await message.state.save("x" * 1000)
        assert await message.state.load() == "kept"
        await message.state.save("x" * 900)


async def _nack(world: World, queue: Queue) -> None:
    await (await world.one(queue)).nack("no")


async def _defer(world: World, queue: Queue) -> None:
    await (await world.one(queue)).defer()


async def _lapse(world: World, queue: Queue) -> None:
    await world.one(queue, visibility=5)
    world.clock.advance(5)


async def _bury(world: World, queue: Queue) -> None:
    await (await world.one(queue)).bury("hopeless")
    [dead] = await queue.dead_letters.list()
    found = await queue._service.load_state(queue.namespace, queue.name, dead.id)
    assert found is not None
    assert found.document.value == {"step": 1}
    await queue.dead_letters.redrive([dead.id])


async def _exhaust(world: World, queue: Queue) -> None:
    for _ in range(4):
        await _lapse(world, queue)
    await _nack(world, queue)
    assert (await queue.counts()).dead == 1
    await queue.dead_letters.redrive()


@pytest.mark.parametrize("event", [_nack, _defer, _lapse, _bury, _exhaust])
async def test_the_state_stays_with_the_message(world: World, event: Any) -> None:
    async with world.queue() as here, world.queue() as there:
        await here.enqueue(b"x")
        message = await world.one(here)
        await message.state.save({"step": 1})
        await message.defer()
        await event(world, here)
        message = await world.one(there)
        assert await message.state.load() == {"step": 1}
        await message.state.save({"step": 2})
        assert await message.state.load() == {"step": 2}


@pytest.mark.parametrize("way", ["ack", "hand-off", "purge", "purge-dead", "expiry", "discard"])
async def test_the_state_goes_with_the_message(world: World, way: str) -> None:
    id = "0197a3c2-0000-7000-8000-000000000001"
    async with world.pond() as pond:
        queue = pond.queue("orders")
        await queue.set_policy(on_exhausted="discard")
        await queue.enqueue(b"x", ttl=60, message_id=id, max_attempts=2)
        message = await world.one(queue)
        await message.state.save("secret")
        if way == "ack":
            await message.ack()
        elif way == "hand-off":
            await message.ack(then=[("next", b"y")])
        elif way == "purge":
            await message.defer()
            await queue.purge()
        elif way == "purge-dead":
            await message.bury("hopeless")
            await queue.dead_letters.purge()
        elif way == "expiry":
            world.clock.advance(60)
            await pond.collect()
        else:
            await message.nack("no")
            await (await world.one(queue)).nack("no")
        with pytest.raises(MessageNotFound):
            await pond.service.load_state(None, "orders", id)
        assert await message.state.load() is None
        with pytest.raises(LeaseLost):
            await message.state.save("again")
        # Not even one that comes with the same id finds it.
        await queue.enqueue(b"x", message_id=id)
        assert await (await world.one(queue)).state.load() is None
        assert await pond.verify() == []


async def test_only_the_holder_writes(world: World) -> None:
    async with world.queue() as here, world.queue() as there:
        await here.enqueue(b"x", visibility=10)
        first = await world.one(here)
        await first.state.save("first")
        world.clock.advance(10)
        second = await world.one(there)
        await second.state.save("second")
        for write in (first.state.save("late"), first.state.delete()):
            with pytest.raises(LeaseLost):
                await write
        assert await second.state.load() == "second"
        # Reading is no answer.
        assert await first.state.load() == "second"


async def test_a_write_changes_nothing_about_the_message(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x", visibility=10)
        message = await world.one(queue)
        before = (await queue.get(message.id)).record.status
        await message.state.save("s" * 10_000)
        await message.state.delete()
        assert (await queue.get(message.id)).record.status == before
        assert (await queue.counts()).bytes == 1
        world.clock.advance(10)
        assert (await world.one(queue)).attempts == 2


async def test_conflicts(world: World) -> None:
    async with world.pond() as pond, world.pond() as elsewhere:
        await pond.queue("orders").enqueue(b"x")
        message = await world.one(pond.queue("orders"))
        delivery = message._delivery
        service = pond.service
        first = await service.save_state(delivery, "one", etag=None)
        with pytest.raises(StateConflict):
            await service.save_state(delivery, "other", etag=None)
        second = await service.save_state(delivery, "two", etag=first)
        assert second != first
        for stale in (service.save_state(delivery, "three", etag=first), service.delete_state(delivery, etag=first)):
            with pytest.raises(StateConflict):
                await stale
        found = await elsewhere.service.load_state(None, "orders", message.id)
        assert found is not None
        assert (found.document.value, found.etag) == ("two", second)
        assert await service.ensure_state_exists(delivery) == second
        await service.delete_state(delivery, etag=second)
        with pytest.raises(StateConflict):
            await service.delete_state(delivery, etag=second)
        with pytest.raises(StateConflict):
            await service.save_state(delivery, "three", etag=second)
        assert await message.state.load() is None


async def test_times_of_the_state(world: World) -> None:
    async with world.pond() as pond:
        await pond.queue("orders").enqueue(b"x", visibility=1000)
        message = await world.one(pond.queue("orders"))
        created = world.clock.now_ms()
        await message.state.save(1)
        world.clock.advance(5)
        await message.state.save(2)
        found = await pond.service.load_state(None, "orders", message.id)
        assert found is not None
        assert (found.document.created_at, found.document.updated_at) == (created, created + 5000)


@pytest.mark.servers
async def test_writes_at_the_same_time_by_one_holder(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x")
        message = await world.one(queue)
        handle = queue.handle(message.id, message.lease.id, message.lease.token)
        await asyncio.gather(
            *(each.state.save(number) for number in range(5) for each in (message, handle)), message.extend(90)
        )
        assert await message.state.load() in range(5)
        await message.ack()


async def test_a_state_beside_the_ack(world: World) -> None:
    async with world.pond() as pond:
        queue = pond.queue("orders")
        for _ in range(10):
            await queue.enqueue(b"x")
            message = await world.one(queue)
            results = await asyncio.gather(
                message.state.save(1), message.ack(), message.state.save(2), return_exceptions=True
            )
            assert results[1] is None
            assert all(result is None or isinstance(result, LeaseLost) for result in results)
        assert (await queue.counts())[:6] == (0, 0, 0, 0, 0, 0)
        assert await pond.verify() == []
