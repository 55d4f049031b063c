"""Receive, and each way to answer; every stale answer is refused and changes nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest

from millpond import InvalidInput, LeaseLost, Message, MessageNotFound, PayloadNotLoaded, Queue, TooLarge

if TYPE_CHECKING:
    from tests.conformance.queue.conftest import World

Step = Callable[[Message], Awaitable[Any]]

ANSWERS: dict[str, Step] = {
    "ack": lambda message: message.ack(),
    "nack": lambda message: message.nack("again"),
    "defer": lambda message: message.defer(),
    "extend": lambda message: message.extend(60),
    "bury": lambda message: message.bury("hopeless"),
    "hand-off": lambda message: message.ack(then=[("next", b"y")]),
    "save-state": lambda message: message.state.save("stale"),
    "delete-state": lambda message: message.state.delete(),
}


async def test_receive_leases(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x", visibility=30)
        message = await world.one(queue, owner="me")
        assert (message.lease.owner, message.lease.token) == ("me", 1)
        assert len(message.lease.id) == 32
        assert message.lease.until is not None
        assert message.lease.until.timestamp() * 1000 == world.clock.now_ms() + 30_000
        assert await queue.receive() == []
        view = await queue.get(message.id)
        assert view.state == "leased"
        assert view.lease is not None
        assert (view.lease.id, view.lease.token, view.lease.owner) == (message.lease.id, 1, "me")


async def test_receive_nothing(world: World) -> None:
    async with world.queue() as queue:
        assert await queue.receive() == []
        assert await queue.receive(10, wait=0) == []


@pytest.mark.parametrize("count", [0, -1, 1.5, "1", None, True])
async def test_a_bad_count(world: World, count: Any) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x")
        with pytest.raises(InvalidInput, match=r"count|at least one"):
            await queue.receive(count)
        assert len(await queue.receive()) == 1


@pytest.mark.parametrize(
    "options", [{"visibility": 0}, {"visibility": -1}, {"visibility": "1"}, {"wait": "1"}, {"wait": -1}]
)
async def test_bad_receive_options(world: World, options: dict[str, Any]) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x")
        with pytest.raises(InvalidInput, match=next(iter(options))):
            await queue.receive(**options)
        assert len(await queue.receive()) == 1


async def test_receive_takes_up_to_count(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue_many([b"1", b"2", b"3"])
        assert [message.payload for message in await queue.receive(2)] == [b"1", b"2"]
        assert [message.payload for message in await queue.receive(2)] == [b"3"]


async def test_the_consumers_visibility_does_not_stick(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x", visibility=30)
        message = await world.one(queue, visibility=5)
        assert message.lease.until_ms == world.clock.now_ms() + 5_000
        await message.extend(100)
        await message.defer()
        message = await world.one(queue)
        assert message.lease.until_ms == world.clock.now_ms() + 30_000


async def test_ack(world: World) -> None:
    async with world.pond() as pond:
        queue = pond.queue("orders")
        await queue.enqueue(b"x")
        message = await world.one(queue)
        await message.state.save({"step": 1})
        await message.ack()
        assert (await queue.counts())[:6] == (0, 0, 0, 0, 0, 0)
        with pytest.raises(MessageNotFound):
            await queue.get(message.id)
        world.clock.advance(1_000)
        assert await queue.receive() == []
        assert await pond.verify() == []
        # What it was can still be read from the object in hand.
        assert (message.payload, message.attempts, message.lease.token) == (b"x", 1, 1)


async def test_nack(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x")
        await (await world.one(queue)).nack(error={"why": "because"}, delay=2.5)
        view = await queue.get((await queue.get((await _only(queue)).id)).id)
        assert (view.state, view.attempts, view.failures, view.lease) == ("delayed", 1, 1, None)
        assert view.visible_at.timestamp() * 1000 == world.clock.now_ms() + 2_500
        world.clock.advance(2.499)
        assert await queue.receive() == []
        world.clock.advance(0.001)
        message = await world.one(queue)
        assert (message.attempts, message.failures, message.last_error) == (2, 1, {"why": "because"})
        assert message.lease.token == 2


async def _only(queue: Queue) -> Any:
    page = await queue._service.list_messages(queue.namespace, queue.name)
    [record] = page.records
    return record


async def test_nack_at_once(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x")
        await (await world.one(queue)).nack()
        message = await world.one(queue)
        assert (message.attempts, message.failures, message.last_error) == (2, 1, None)


async def test_nack_without_an_error_keeps_the_last_one(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x")
        await (await world.one(queue)).nack("first")
        await (await world.one(queue)).nack()
        assert (await world.one(queue)).last_error == "first"


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (ValueError("bad thing"), "ValueError: bad thing"),
        ("text", "text"),
        ({"a": [1, None]}, {"a": [1, None]}),
        (("a", "b"), ["a", "b"]),
        (0, 0),
    ],
)
async def test_kinds_of_errors(world: World, error: Any, kept: Any) -> None:
    async with world.queue() as here, world.queue() as there:
        await here.enqueue(b"x")
        await (await world.one(here)).nack(error)
        message = await world.one(here)
        assert message.last_error == kept
        assert type(message.last_error) is type(kept)
        assert (await there.get(message.id)).last_error == kept


async def test_an_error_that_cannot_be_kept(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x")
        message = await world.one(queue)
        with pytest.raises(TooLarge, match="16384"):
            await message.nack("x" * 16_385)
        with pytest.raises(InvalidInput, match="cannot be encoded"):
            await message.nack(object())
        with pytest.raises(TooLarge):
            await message.bury("x" * 16_385)
        with pytest.raises(InvalidInput, match="delay"):
            await message.nack(delay=-1)
        with pytest.raises(InvalidInput, match="delay"):
            await message.defer(delay=-1)
        view = await queue.get(message.id)
        assert (view.state, view.failures) == ("leased", 0)
        await message.ack()


async def test_defer(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x", max_attempts=1)
        for attempt in range(1, 6):
            message = await world.one(queue)
            assert (message.attempts, message.failures, message.lease.token) == (attempt, 0, attempt)
            await message.defer(delay=1)
            assert await queue.receive() == []
            world.clock.advance(1)


async def test_extend(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x", visibility=10)
        message = await world.one(queue)
        world.clock.advance(9)
        lease = await message.extend(20)
        assert lease.until_ms == message.lease.until_ms == world.clock.now_ms() + 20_000
        assert (lease.id, lease.token) == (message.lease.id, 1)
        world.clock.advance(19.999)
        assert await queue.receive() == []
        await message.ack()


async def test_extend_may_shorten(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x", visibility=100)
        message = await world.one(queue)
        await message.extend(1)
        world.clock.advance(1)
        assert (await world.one(queue)).attempts == 2


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), "1", None])
async def test_an_extension_of_nothing_is_refused(world: World, seconds: Any) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x", visibility=10)
        message = await world.one(queue)
        with pytest.raises(InvalidInput, match="extension"):
            await message.extend(seconds)
        assert (await queue.get(message.id)).lease is not None
        world.clock.advance(9.999)
        assert await queue.receive() == []


async def test_bury(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x")
        await (await world.one(queue)).nack("the error")
        message = await world.one(queue)
        await message.bury("poison")
        [dead] = await queue.dead_letters.list()
        assert (dead.dead_reason, dead.last_error, dead.state) == ("poison", "the error", "dead")
        assert await queue.receive() == []


async def test_bury_with_an_error(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x")
        await (await world.one(queue)).bury("poison", error=KeyError("k"))
        [dead] = await queue.dead_letters.list()
        assert dead.last_error == "KeyError: 'k'"


async def _after_ack(world: World, queue: Queue, message: Message) -> None:
    await message.ack()


async def _after_nack(world: World, queue: Queue, message: Message) -> None:
    await message.nack("first")


async def _after_redelivery(world: World, queue: Queue, message: Message) -> None:
    world.clock.advance(31)
    await (await world.one(queue)).state.save("of the second holder")


async def _after_redelivery_elsewhere(world: World, queue: Queue, message: Message) -> None:
    world.clock.advance(31)
    async with world.queue() as there:
        await (await world.one(there)).state.save("of the second holder")


async def _after_burial(world: World, queue: Queue, message: Message) -> None:
    await message.bury("first")


async def _after_burial_by_an_operator(world: World, queue: Queue, message: Message) -> None:
    async with world.pond() as pond:
        await pond.service.move_to_dlq(await pond.service.get_message("default", "orders", message.id))


async def _after_redrive(world: World, queue: Queue, message: Message) -> None:
    await message.bury("first")
    await queue.dead_letters.redrive()
    await (await world.one(queue)).state.save("of the second holder")


async def _after_purge(world: World, queue: Queue, message: Message) -> None:
    world.clock.advance(31)
    assert await queue.purge() == 1


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize(
    "event",
    [
        _after_ack,
        _after_nack,
        _after_redelivery,
        _after_redelivery_elsewhere,
        _after_burial,
        _after_burial_by_an_operator,
        _after_redrive,
        _after_purge,
    ],
)
async def test_a_stale_answer_changes_nothing(world: World, event: Any, answer: str) -> None:
    async with world.pond() as pond:
        queue = pond.queue("orders")
        await queue.enqueue(b"x", visibility=30)
        message = await world.one(queue)
        await event(world, queue, message)

        async def picture() -> list[Any]:
            seen: list[Any] = [await queue.counts(), await pond.queue("next").counts()]
            for box in (queue.peek(10), queue.dead_letters.list()):
                seen += [(view.id, view.attempts, view.failures, view.last_error) for view in await box]
            try:
                record = await pond.service.get_message("default", "orders", message.id)
            except MessageNotFound:
                return seen
            return [*seen, record.status, await pond.service._state_of(record)]

        before = await picture()
        with pytest.raises(LeaseLost):
            await ANSWERS[answer](message)
        # Also to one who has only the ids.
        lease = message.lease
        with pytest.raises(LeaseLost):
            await ANSWERS[answer](queue.handle(message.id, lease.id, lease.token))
        assert await picture() == before


@pytest.mark.parametrize("answer", ANSWERS)
async def test_a_wrong_lease_is_refused(world: World, answer: str) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x")
        message = await world.one(queue)
        lease = message.lease
        for wrong in (
            queue.handle(message.id, lease.id, lease.token + 1),
            queue.handle(message.id, "0" * 32, lease.token),
            queue.handle("0197a3c2-0000-7000-8000-000000000001", lease.id, lease.token),
        ):
            with pytest.raises(LeaseLost):
                await ANSWERS[answer](wrong)
        assert (await queue.get(message.id)).state == "leased"
        await message.ack()


@pytest.mark.parametrize("answer", ANSWERS)
async def test_a_handle_answers_like_the_message(world: World, answer: str) -> None:
    async with world.queue() as here, world.queue() as there:
        await here.enqueue(b"x")
        message = await world.one(here)
        await ANSWERS[answer](there.handle(message.id, message.lease.id, message.lease.token))
        counts = await here.counts()
        expected = {
            "ack": (0, 0, 0, 0),
            "hand-off": (0, 0, 0, 0),
            "nack": (1, 0, 0, 0),
            "defer": (1, 0, 0, 0),
            "bury": (0, 0, 0, 1),
        }.get(answer, (0, 0, 1, 0))
        assert (counts.ready, counts.delayed, counts.leased, counts.dead) == expected


async def test_a_handle_knows_only_its_ids(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x")
        message = await world.one(queue)
        handle = queue.handle(message.id, message.lease.id, message.lease.token)
        assert (handle.id, handle.queue, handle.lease.token, handle.lease.until) == (message.id, "orders", 1, None)
        for read in (lambda: handle.payload, lambda: handle.attempts, lambda: handle.attributes, handle.stream):
            with pytest.raises(PayloadNotLoaded):
                read()
        lease = await handle.extend(7)
        assert lease.until_ms == world.clock.now_ms() + 7_000


@pytest.mark.parametrize("token", [0, -1, "1", None, 1.0, True])
async def test_a_bad_token(world: World, token: Any) -> None:
    async with world.queue() as queue:
        with pytest.raises(InvalidInput, match="token"):
            queue.handle("0197a3c2-0000-7000-8000-000000000001", "0" * 32, token)


@pytest.mark.parametrize("answer", ["ack", "nack", "defer", "extend", "save-state"])
async def test_a_late_answer_counts_if_nobody_took_the_message(world: World, answer: str) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x", visibility=10)
        message = await world.one(queue)
        world.clock.advance(15)
        await ANSWERS[answer](message)
        if answer == "extend":
            world.clock.advance(59.999)
            assert await queue.receive() == []


@pytest.mark.servers
async def test_answers_at_the_same_time(world: World) -> None:
    """An extension under way must not make the ack fail, whichever comes first."""
    import asyncio

    async with world.queue() as queue:
        for _ in range(10):
            await queue.enqueue(b"x")
            message = await world.one(queue)
            results = await asyncio.gather(
                message.extend(5), message.extend(6), message.ack(), message.extend(7), return_exceptions=True
            )
            assert results[2] is None
            assert all(isinstance(result, LeaseLost) or hasattr(result, "token") for result in results[:2])
            assert (await queue.counts())[:3] == (0, 0, 0)


@pytest.mark.servers
async def test_one_of_two_acks_wins(world: World) -> None:
    import asyncio

    async with world.queue() as queue:
        await queue.enqueue(b"x")
        message = await world.one(queue)
        handle = queue.handle(message.id, message.lease.id, message.lease.token)
        results = await asyncio.gather(message.ack(), handle.ack(), return_exceptions=True)
        assert sorted(type(result).__name__ for result in results) == ["LeaseLost", "NoneType"]
