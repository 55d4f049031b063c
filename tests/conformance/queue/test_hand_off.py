"""``ack(then=…)``: the message goes and its successors come in one step, or nothing happens at all."""

from __future__ import annotations

import asyncio
import io
from typing import TYPE_CHECKING, Any

import pytest

import millpond
from millpond import InvalidInput, InvalidQueue, LeaseLost, Message, StoreError, TooLarge
from millpond.service.consuming import HandOff
from millpond.stores.faulty import Plan, fail_before, nth

if TYPE_CHECKING:
    from tests.conformance.queue.conftest import World

LARGE = 300_000
ID = "0197a3c2-0000-7000-8000-000000000001"


async def _held(world: World, queue: millpond.Queue) -> Message:
    await queue.enqueue(b"x", visibility=30)
    return await world.one(queue)


async def test_the_successor_comes_with_the_ack(world: World) -> None:
    async with world.pond() as pond:
        queue, following = pond.queue("orders"), pond.queue("next")
        message = await _held(world, queue)
        options = {"priority": 8, "attributes": {"a": 1}, "ordering_key": "k", "correlation_id": message.id}
        await message.ack(then=[("Next", millpond.json({"b": 2}), options)])
        assert (await queue.counts())[:6] == (0, 0, 0, 0, 0, 0)
        after = await world.one(following)
        assert (after.json(), after.priority, after.attributes) == ({"b": 2}, 8, {"a": 1})
        assert (after.ordering_key, after.correlation_id, after.attempts) == ("k", message.id, 1)
        assert after.content_type == "application/json"
        assert await pond.verify() == []


@pytest.mark.servers
async def test_several_targets(world: World) -> None:
    async with world.pond() as pond:
        message = await _held(world, pond.queue("orders", namespace="shop"))
        await message.ack(
            then=[
                ("a", b"1"),
                ("a", b"2", {"delay": 5}),
                ("b", b"3"),
                ("a", b"4", {"namespace": "other"}),
                HandOff(None, "a", b"5"),
                ("orders", b"6"),
            ]
        )

        async def payloads(name: str, namespace: str | None) -> list[bytes]:
            return [message.payload for message in await pond.queue(name, namespace=namespace).receive(10)]

        assert await payloads("a", "shop") == [b"1"]
        assert await payloads("b", "shop") == [b"3"]
        assert await payloads("a", "other") == [b"4"]
        assert await payloads("a", None) == [b"5"]
        # Its own queue, too: that is how a message is replaced by its next step.
        assert await payloads("orders", "shop") == [b"6"]
        world.clock.advance(5)
        assert await payloads("a", "shop") == [b"2"]


async def test_targets_get_their_own_queues_policy(world: World) -> None:
    async with world.pond() as pond:
        await pond.queue("next").set_policy(max_attempts=2, default_visibility=9)
        await (await _held(world, pond.queue("orders"))).ack(then=[("next", b"y")])
        after = await world.one(pond.queue("next"))
        assert (after.max_attempts, after.lease.until_ms) == (2, world.clock.now_ms() + 9_000)


async def test_who_waits_for_the_successor_is_woken(world: World) -> None:
    async with world.pond() as pond, world.pond() as elsewhere:
        message = await _held(world, pond.queue("orders"))
        waiting = [await world.waiting(each.queue("next").receive(wait=1000)) for each in (pond, elsewhere)]
        await message.ack(then=[("next", b"1"), ("next", b"2")])
        for _ in range(30):
            if all(task.done() for task in waiting):
                break
            await world.advance(3)
        assert sorted([(await world.soon(task))[0].payload for task in waiting]) == [b"1", b"2"]


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(lambda data: data, id="bytes"),
        pytest.param(io.BytesIO, id="file"),
    ],
)
async def test_a_large_payload_is_handed_off(world: World, source: Any) -> None:
    data = bytes(range(250)) * (LARGE // 250)
    async with world.pond() as pond:
        message = await _held(world, pond.queue("orders"))
        await message.ack(then=[("next", source(data)), ("next", b"small")])
        large, small = await pond.queue("next").receive(2)
        assert await large.read() == data
        assert small.payload == b"small"
        assert await pond.verify() == []


@pytest.mark.servers
async def test_a_received_stream_can_be_handed_on(world: World) -> None:
    data = b"x" * LARGE
    async with world.pond() as pond:
        await pond.queue("orders").enqueue(data)
        message = await world.one(pond.queue("orders"))
        await message.ack(then=[("next", message.stream())])
        assert await (await world.one(pond.queue("next"))).read() == data
        assert (await pond.queue("orders").counts()).bytes == 0


async def test_duplicates_among_the_successors_do_not_stop_the_ack(world: World) -> None:
    async with world.pond() as pond:
        queue, following = pond.queue("orders"), pond.queue("next")
        first = await following.enqueue(b"there already", dedup_key="k")
        await following.enqueue(b"there as well", message_id=ID)
        message = await _held(world, queue)
        await message.ack(
            then=[
                ("next", b"again", {"dedup_key": "k"}),
                ("next", b"again", {"message_id": ID}),
                ("next", b"twice", {"dedup_key": "l"}),
                ("next", b"twice more", {"dedup_key": "l"}),
                ("next", b"new"),
            ]
        )
        assert (await queue.counts())[:6] == (0, 0, 0, 0, 0, 0)
        messages = await following.receive(10)
        assert [message.payload for message in messages] == [b"there already", b"there as well", b"twice", b"new"]
        assert messages[0].id == first.message_id


async def test_the_service_says_what_became_of_each(world: World) -> None:
    async with world.pond() as pond:
        first = await pond.queue("next").enqueue(b"1", dedup_key="k")
        message = await _held(world, pond.queue("orders"))
        done = await pond.service.ack(
            message._delivery,
            [
                HandOff(None, "next", b"2", millpond.EnqueueOptions(dedup_key="k")),
                HandOff(None, "next", b"3", millpond.EnqueueOptions(message_id=ID)),
            ],
        )
        assert [(each.message_id, each.duplicate) for each in done] == [(first.message_id, True), (ID, False)]


async def _answered(world: World, message: Message) -> None:
    await message.ack()


async def _given_back(world: World, message: Message) -> None:
    await message.defer(delay=1000)


async def _taken_by_another(world: World, message: Message) -> None:
    world.clock.advance(30)
    async with world.queue() as queue:
        await world.one(queue)


@pytest.mark.parametrize("event", [_answered, _given_back, _taken_by_another])
@pytest.mark.parametrize("payload", [b"y", b"y" * LARGE], ids=["inline", "apart"])
async def test_without_the_lease_nothing_happens(world: World, event: Any, payload: bytes) -> None:
    async with world.pond() as pond:
        queue, following = pond.queue("orders"), pond.queue("next")
        message = await _held(world, queue)
        await event(world, message)
        before = await queue.counts()
        for _ in range(2):
            with pytest.raises(LeaseLost):
                await message.ack(then=[("next", payload, {"dedup_key": "k"}), ("other", b"z")])
        assert await queue.counts() == before
        for name in ("next", "other"):
            assert (await pond.queue(name).counts())[:7] == (0, 0, 0, 0, 0, 0, None)
        # The dedup key was not taken either.
        assert (await following.enqueue(b"y", dedup_key="k")).duplicate is False
        world.clock.advance(100_000)
        await pond.collect()
        assert await pond.verify() == []


BAD: list[tuple[Any, type[Exception]]] = [
    (("next",), InvalidInput),
    (("next", b"y", {}, 1), InvalidInput),
    (["next", b"y"], InvalidInput),
    ("next", InvalidInput),
    (None, InvalidInput),
    (("..", b"y"), InvalidQueue),
    ((5, b"y"), InvalidQueue),
    (([], b"y"), InvalidQueue),
    (("next", b"y", {"namespace": "a/b"}), InvalidQueue),
    (("next", "text"), InvalidInput),
    (("next", None), InvalidInput),
    (("next", b"y", 5), InvalidInput),
    (("next", b"y", [1]), InvalidInput),
    (("next", b"y", "ab"), InvalidInput),
    (("next", b"y", {"prio": 1}), InvalidInput),
    (("next", b"y", {1: 1}), InvalidInput),
    (("next", b"y", {"priority": 10}), InvalidInput),
    (("next", b"y", {"delay": float("nan")}), InvalidInput),
    (("next", b"y", {"attributes": {"a": "\ud800"}}), InvalidInput),
    (("next", b"y", {"attributes": {"a": "b" * 70_000}}), TooLarge),
    (("next", b"y" * 2_000_000), TooLarge),
]


async def test_one_bad_successor_stops_all(world: World) -> None:
    async with world.pond(config=millpond.Config(max_payload_bytes=1_000_000)) as pond:
        message = await _held(world, pond.queue("orders"))
        for bad, error in BAD:
            with pytest.raises(error):
                await message.ack(then=[("next", b"good"), bad])
        for bad in (5, True, "next"):
            with pytest.raises(InvalidInput):
                await message.ack(then=bad)  # type: ignore[arg-type]
        assert (await pond.queue("next").counts())[:7] == (0, 0, 0, 0, 0, 0, None)
        assert (await pond.queue("orders").get(message.id)).state == "leased"
        await message.ack(then=[("next", b"good")])
        assert (await pond.queue("next").counts()).ready == 1


async def test_a_store_that_fails_leaves_the_message_held(world: World) -> None:
    plan: Plan = nth(1, "commit", fail_before())
    async with world.pond(plan=plan) as pond:
        message = await _held(world, pond.queue("orders"))
        with pytest.raises(StoreError):
            await message.ack(then=[("next", b"y")])
        assert (await pond.queue("orders").counts()).leased == 1
        assert (await pond.queue("next").counts()).ready == 0
        await message.ack(then=[("next", b"y")])
        assert (await pond.queue("orders").counts()).leased == 0
        assert (await pond.queue("next").counts()).ready == 1


@pytest.mark.servers
async def test_of_two_hand_offs_one_goes_through(world: World) -> None:
    async with world.pond() as pond:
        queue = pond.queue("orders")
        message = await _held(world, queue)
        handle = queue.handle(message.id, message.lease.id, message.lease.token)
        results = await asyncio.gather(
            message.ack(then=[("next", b"1")]), handle.ack(then=[("next", b"2")]), return_exceptions=True
        )
        assert sorted(type(result).__name__ for result in results) == ["LeaseLost", "NoneType"]
        assert (await pond.queue("next").counts()).ready == 1


async def test_a_hand_off_beside_an_extension(world: World) -> None:
    async with world.pond() as pond:
        message = await _held(world, pond.queue("orders"))
        results = await asyncio.gather(
            message.extend(60), message.ack(then=[("next", b"1")]), message.extend(70), return_exceptions=True
        )
        assert results[1] is None
        assert (await pond.queue("orders").counts()).leased == 0
        assert (await pond.queue("next").counts()).ready == 1
