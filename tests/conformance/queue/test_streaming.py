"""Streams: messages as they come, so many unanswered at a time, the same on every store."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from millpond import InvalidInput, LeaseLost, Message, MessageStream, Queue

if TYPE_CHECKING:
    from tests.conformance.queue.conftest import World


async def _next(world: World, stream: MessageStream) -> Message:
    return await world.soon(asyncio.ensure_future(anext(stream)))


async def _until(world: World, queue: Queue, ready: int) -> None:
    """What is given back is there; by way of a server that takes a moment."""
    async with asyncio.timeout(20):
        while (await queue.counts()).ready != ready:
            await asyncio.sleep(0.001)
    assert [view.failures for view in await queue.peek(100)] == [0] * ready


async def test_messages_come_in_order_as_they_are_put_in(world: World) -> None:
    async with world.queue() as queue, queue.stream() as stream:
        await queue.enqueue_many([b"%d" % number for number in range(5)])
        for number in range(5):
            message = await _next(world, stream)
            assert (message.payload, message.attempts) == (b"%d" % number, 1)
            await message.ack()
        waits = await world.waiting(anext(stream))
        await queue.enqueue(b"late")
        await (await world.soon(waits)).ack()
        assert (await queue.counts())[:3] == (0, 0, 0)


async def test_no_more_than_the_credit_is_unanswered(world: World) -> None:
    async with world.queue() as queue, queue.stream(credit=3) as stream:
        await queue.enqueue_many([b"%d" % number for number in range(8)])
        held = [await _next(world, stream) for _ in range(3)]
        waits = await world.waiting(anext(stream))
        assert (await queue.counts())[:3] == (5, 0, 3)
        await held[1].ack()
        held[1] = await world.soon(waits)
        assert held[1].payload == b"3"
        answers = await queue.ack_many(held)
        assert [answer.error for answer in answers] == [None] * 3
        more = [(await _next(world, stream)).payload for _ in range(3)]
        assert more == [b"4", b"5", b"6"]
        assert (await queue.counts())[:3] == (1, 0, 3)


@pytest.mark.parametrize("verb", ["nack", "defer", "bury", "nack_many", "defer_many", "hand-off"])
async def test_each_answer_makes_room(world: World, verb: str) -> None:
    answers: dict[str, Any] = {
        "nack": lambda queue, message: message.nack("no", delay=60),
        "defer": lambda queue, message: message.defer(60),
        "bury": lambda queue, message: message.bury("hopeless"),
        "nack_many": lambda queue, message: queue.nack_many([message], delay=60),
        "defer_many": lambda queue, message: queue.defer_many([message], delay=60),
        "hand-off": lambda queue, message: message.ack(then=[("next", b"y")]),
    }
    async with world.queue() as queue, queue.stream(credit=1) as stream:
        await queue.enqueue_many([b"1", b"2"])
        first = await _next(world, stream)
        waits = await world.waiting(anext(stream))
        await answers[verb](queue, first)
        assert (await world.soon(waits)).payload == b"2"


async def test_what_was_not_answered_goes_back_at_once(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue_many([b"%d" % number for number in range(6)])
        async with queue.stream(credit=4) as stream:
            first, second = await _next(world, stream), await _next(world, stream)
            await first.ack()
        await _until(world, queue, 5)
        with pytest.raises(LeaseLost):
            await second.ack()
        assert (await queue.counts())[:3] == (5, 0, 0)
        with pytest.raises(InvalidInput, match="async with"):
            await anext(stream)


async def test_the_end_of_a_lease_makes_room_and_an_extension_does_not(world: World) -> None:
    async with world.queue() as queue, queue.stream(credit=1, visibility=10) as stream:
        await queue.enqueue_many([b"1", b"2"])
        message = await _next(world, stream)
        waits = await world.waiting(anext(stream))
        await world.advance(5)
        await message.extend(20)
        await world.advance(15)
        assert not waits.done()
        await world.advance(20)
        again = await world.soon(waits)
        assert again.payload in (b"1", b"2")
        assert (await queue.counts()).leased == 1


async def test_what_lay_too_long_is_not_handed_out(world: World) -> None:
    """Its lease has ended: it comes again."""
    async with world.queue() as queue, queue.stream(credit=2, visibility=10) as stream:
        await queue.enqueue_many([b"1", b"2"])
        await (await _next(world, stream)).ack()
        await world.advance(11)
        second = await _next(world, stream)
        assert (second.payload, second.attempts) == (b"2", 2), "as it lay ready it was nobody's any more"
        await second.ack()
        assert (await queue.counts())[:3] == (0, 0, 0)


async def test_who_waits_is_cancelled_and_nothing_is_lost(world: World) -> None:
    async with world.queue() as queue, queue.stream(credit=2) as stream:
        waits = await world.waiting(anext(stream))
        waits.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waits
        await queue.enqueue(b"x")
        message = await _next(world, stream)
        assert (message.payload, message.failures) == (b"x", 0)
        await message.ack()


async def test_several_tasks_may_share_one(world: World) -> None:
    seen: list[bytes] = []
    async with world.queue() as queue, queue.stream(credit=4) as stream:
        await queue.enqueue_many([b"%d" % number for number in range(20)])

        async def work() -> None:
            async for message in stream:
                await message.ack()
                seen.append(message.payload)
                if len(seen) >= 20:
                    return

        tasks = [asyncio.ensure_future(work()) for _ in range(3)]
        async with asyncio.timeout(20):
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert sorted(seen, key=int) == [b"%d" % number for number in range(20)]
        assert (await queue.counts())[:3] == (0, 0, 0)


async def test_a_payload_that_is_stored_apart_comes_by_a_stream_too(world: World) -> None:
    async with world.queue() as queue, queue.stream() as stream:
        await queue.enqueue(bytes(300_000))
        message = await _next(world, stream)
        assert await message.read() == bytes(300_000)
        await message.ack()


async def test_what_cannot_be_right_is_refused(world: World) -> None:
    async with world.queue() as queue:
        for options in ({"credit": 0}, {"credit": 1001}, {"credit": 1.5}, {"visibility": 0}, {"owner": ""}):
            with pytest.raises(InvalidInput):
                queue.stream(**options)  # type: ignore[arg-type]
        stream = queue.stream()
        with pytest.raises(InvalidInput, match="async with"):
            await anext(stream)
        async with stream:
            with pytest.raises(InvalidInput, match="once"):
                await stream.__aenter__()
        with pytest.raises(InvalidInput, match="once"):
            await stream.__aenter__()
