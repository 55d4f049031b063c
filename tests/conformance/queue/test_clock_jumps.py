"""The wall clock is set forwards or back, as NTP or an administrator would: nothing is lost or stuck."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from millpond import LeaseLost
from millpond.service.dispatcher import TICK

if TYPE_CHECKING:
    from tests.conformance.queue.conftest import World

HOUR = 3600.0


async def test_a_jump_forwards_ends_delays_and_leases(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"held", visibility=30)
        held = await world.one(queue)
        await queue.enqueue(b"delayed", delay=60)
        world.clock.jump(HOUR)
        messages = await queue.receive(5)
        assert sorted(message.payload for message in messages) == [b"delayed", b"held"]
        with pytest.raises(LeaseLost):
            await held.ack()
        assert all(answer.error is None for answer in await queue.ack_many(messages))


async def test_a_holder_may_still_answer_after_a_jump_forwards(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x", visibility=30)
        held = await world.one(queue)
        world.clock.jump(HOUR)
        await held.extend(30)
        assert await queue.receive() == []
        await held.ack()


async def test_a_jump_back_keeps_messages_and_their_order(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"before")
        world.clock.jump(-HOUR)
        # Not due yet by this clock, but for how long it cannot matter to what comes now.
        await queue.enqueue(b"after")
        assert [message.payload for message in await queue.receive(5)] == [b"after"]
        assert (await queue.counts())[:3] == (0, 1, 1)
        world.clock.advance(HOUR)
        assert b"before" in [message.payload for message in await queue.receive(5)]


async def test_a_jump_back_does_not_shorten_a_lease(world: World) -> None:
    async with world.queue() as here, world.queue() as there:
        await here.enqueue(b"x", visibility=30)
        held = await world.one(here)
        world.clock.jump(-HOUR)
        world.clock.advance(31)
        for queue in (here, there):
            assert await queue.receive() == []
        await held.extend(30)
        assert held.lease.until_ms == world.clock.now_ms() + 30_000
        world.clock.advance(30)
        assert (await world.one(there)).lease.token == 2


async def test_who_waits_is_woken_by_a_jump_to_the_due_time(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x", delay=HOUR)
        waiting = await world.waiting(queue.receive(wait=HOUR * 10))
        world.clock.jump(HOUR)
        await world.advance(TICK)
        assert [message.payload for message in await world.soon(waiting)] == [b"x"]


async def test_a_wait_ends_in_its_own_time_whatever_the_wall_clock_does(world: World) -> None:
    async with world.queue() as queue:
        for jump in (HOUR, -2 * HOUR):
            waiting = await world.waiting(queue.receive(wait=20))
            world.clock.jump(jump)
            await world.advance(19)
            assert not waiting.done()
            await world.advance(1)
            assert await world.soon(waiting) == []


async def test_what_is_enqueued_after_a_jump_back_wakes_who_waits(world: World) -> None:
    async with world.queue() as queue:
        waiting = await world.waiting(queue.receive(wait=HOUR))
        world.clock.jump(-HOUR)
        await queue.enqueue(b"x")
        await world.settle()
        assert [message.payload for message in await world.soon(waiting)] == [b"x"]


async def test_a_delay_is_kept_over_a_jump_there_and_back(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x", delay=60)
        waiting = await world.waiting(queue.receive(wait=HOUR))
        world.clock.jump(-HOUR)
        await world.advance(30)
        assert not waiting.done()
        world.clock.jump(HOUR)
        await world.advance(29)
        assert not waiting.done()
        await world.advance(1)
        await world.settle()
        assert [message.payload for message in await world.soon(waiting)] == [b"x"]


async def test_time_to_live_and_dedup_go_by_the_wall_clock(world: World) -> None:
    async with world.pond() as pond:
        queue = pond.queue("orders")
        await queue.enqueue(b"1", ttl=60, dedup_key="k", dedup_window=60)
        world.clock.jump(-HOUR)
        assert (await queue.enqueue(b"2", dedup_key="k")).duplicate is True
        world.clock.jump(HOUR + 60)
        assert await queue.receive() == []
        assert (await queue.enqueue(b"3", dedup_key="k")).duplicate is False
        assert await pond.verify() == []


async def test_tokens_grow_whatever_the_clock_does(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"x", max_attempts=0, visibility=1)
        for token, jump in enumerate((0.0, HOUR, HOUR, 2 * HOUR), 1):
            world.clock.jump(jump)
            assert (await world.one(queue)).lease.token == token
        world.clock.jump(-6 * HOUR)
        assert await queue.receive() == []
        assert (await queue.counts()).leased == 1


async def test_ids_stay_unique_over_a_jump_back(world: World) -> None:
    async with world.queue() as queue:
        ids = []
        for _ in range(50):
            ids.append((await queue.enqueue(b"x")).message_id)
            world.clock.jump(-1)
        assert len(set(ids)) == 50
