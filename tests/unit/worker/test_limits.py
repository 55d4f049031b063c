"""Limits hold across processes, and a dead holder's permit comes back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.conformance.queue.conftest import World

from millpond import Pond
from millpond.errors import InvalidInput
from millpond.worker.limits import LEASE, MAKE_AGAIN, Concurrency, Gate, Gates, Limit, Permit, Rate


async def taken(gate: Gate) -> Permit:
    permit = await gate.acquire(0)
    assert permit is not None
    return permit


def gate(pond: Pond, limit: Limit) -> Gate:
    return Gate(pond, "queue.orders", limit)


async def test_no_more_at_once_than_allowed_over_all_processes(world: World) -> None:
    async with world.pond() as one, world.pond() as two:
        first, second = gate(one, Concurrency(2)), gate(two, Concurrency(2))
        a, b = await taken(first), await taken(second)
        assert await a.use()
        assert await b.use()
        assert await first.acquire(0) is None
        assert await second.acquire(0) is None
        await a.release()
        await (await taken(second)).release()
        await b.release()


async def test_who_waits_for_a_permit_gets_it_when_it_is_given_back(world: World) -> None:
    async with world.pond() as pond:
        only = gate(pond, Concurrency(1))
        held = await taken(only)
        waiting = await world.waiting(only.acquire(60))
        await held.release()
        permit = await world.soon(waiting)
        assert permit is not None
        await permit.release()


async def test_a_permit_is_kept_as_long_as_the_work_takes(world: World) -> None:
    async with world.pond() as one, world.pond() as two:
        held = await taken(gate(one, Concurrency(1)))
        other = gate(two, Concurrency(1))
        for _ in range(12):
            await world.advance(LEASE / 3)
            assert await other.acquire(0) is None
        await held.release()
        await (await taken(other)).release()


async def test_a_dead_holders_permit_comes_back_with_the_end_of_its_lease(world: World) -> None:
    async with world.pond() as dead, world.pond() as alive:
        held = await taken(gate(dead, Concurrency(1)))
        held._held.stop()  # nobody renews it any more
        other = gate(alive, Concurrency(1))
        await world.advance(LEASE - 1)
        assert await other.acquire(0) is None
        await world.advance(1)
        permit = await taken(other)
        await held.release()  # too late, and of no effect
        assert await gate(dead, Concurrency(1)).acquire(0) is None
        await permit.release()


async def test_a_rate_holds_within_any_period(world: World) -> None:
    async with world.pond() as one, world.pond() as two:
        gates = [gate(pond, Rate(3, per=10)) for pond in (one, two)]
        begun: list[float] = []
        for step in range(200):
            for each in gates:
                permit = await each.acquire(0)
                if permit is not None:
                    assert await permit.use()
                    begun.append(world.clock.monotonic())
                    await permit.release()
            world.clock.advance(0.7 if step % 3 else 0.1)
        assert max(len([t for t in begun if start <= t < start + 10]) for start in begun) == 3
        # And it is used to the full: 3 in 10 seconds, over 100.
        assert len(begun) >= 3 * (world.clock.monotonic() // 10.7)


async def test_a_high_rate_asks_the_store_for_few_permits_and_still_holds(world: World) -> None:
    async with world.pond() as one, world.pond() as two:
        limit = Rate(1000, per=10)
        assert limit.permits * limit.worth <= 1000
        assert limit.permits <= 32
        gates = [gate(pond, limit) for pond in (one, two)]
        begun: list[float] = []
        for _ in range(120):
            for each in gates:
                for _ in range(30):
                    permit = await each.acquire(0)
                    if permit is None:
                        break
                    if await permit.use():
                        begun.append(world.clock.monotonic())
                    await permit.release()
            world.clock.advance(0.25)
        begun.sort()
        assert (
            max(sum(start <= t < start + 10 for t in begun[at : at + 1100]) for at, start in enumerate(begun)) <= 1000
        )
        assert len(begun) >= 2200


async def test_a_permit_that_was_not_used_is_given_back_at_once(world: World) -> None:
    async with world.pond() as one, world.pond() as two:
        permit = await taken(gate(one, Rate(1, per=60)))
        assert await gate(two, Rate(1, per=60)).acquire(0) is None
        await permit.release()
        again = await taken(gate(two, Rate(1, per=60)))
        assert await again.use()
        await again.release()
        assert await gate(one, Rate(1, per=60)).acquire(0) is None
        await world.advance(60)
        await (await taken(gate(one, Rate(1, per=60)))).release()


async def test_a_permit_that_was_lost_while_it_waited_may_not_be_used(world: World) -> None:
    async with world.pond() as one, world.pond() as two:
        permit = await taken(gate(one, Rate(1, per=60)))
        permit._held.stop()
        await world.advance(LEASE)
        other = await taken(gate(two, Rate(1, per=60)))
        assert not await permit.use()
        assert await other.use()


async def test_a_lowered_limit_removes_what_is_too_much(world: World) -> None:
    async with world.pond() as pond:
        for permit in [await taken(gate(pond, Concurrency(4))) for _ in range(1)]:
            await permit.release()
        low = gate(pond, Concurrency(1))
        held = await taken(low)
        assert await low.acquire(0) is None
        await held.release()
        high = gate(pond, Concurrency(3))
        permits = [await taken(high) for _ in range(3)]
        for permit in permits:
            await permit.release()


async def test_purged_permits_are_made_again(world: World) -> None:
    async with world.pond() as pond:
        only = gate(pond, Concurrency(2))
        await (await taken(only)).release()
        assert await pond.queue(only.name).purge() == 2
        await world.advance(MAKE_AGAIN)
        assert await only.acquire(0) is None
        await (await taken(only)).release()


async def test_processes_that_begin_together_make_each_permit_once(world: World) -> None:
    async with world.pond() as one, world.pond() as two:
        got = await asyncio.gather(*(gate(pond, Concurrency(3)).acquire(0) for pond in (one, two)))
        counts = await one.queue(gate(one, Concurrency(3)).name).counts()
        assert counts.ready + counts.leased + counts.delayed == 3
        for permit in got:
            if permit is not None:
                await permit.release()


async def test_of_several_limits_all_or_nothing_is_held(world: World) -> None:
    async with world.pond() as pond:
        wide, narrow = Gate(pond, "a", Concurrency(2)), Gate(pond, "b", Concurrency(1))
        both = Gates([wide, narrow])
        permits = await both.acquire(0)
        assert permits is not None
        assert await Gates.use(permits)
        assert await both.acquire(0) is None
        assert (await pond.queue(wide.name).counts()).leased == 1
        await Gates.release(permits)
        assert (await pond.queue(wide.name).counts()).leased == 0
        waiting = None
        held = await taken(narrow)
        waiting = await world.waiting(both.acquire(600))
        waiting.cancel()
        await asyncio.wait([waiting])
        assert (await pond.queue(wide.name).counts()).leased == 0
        await held.release()
        await both.close()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Concurrency(0),
        lambda: Concurrency(1001),
        lambda: Rate(0),
        lambda: Rate(1.5),  # type: ignore[arg-type]
        lambda: Rate(1, per=0),
        lambda: Rate(1, per=1e9),
        lambda: Rate(1, per="1s"),  # type: ignore[arg-type]
    ],
)
def test_limits_that_cannot_be(make: Any) -> None:
    with pytest.raises(InvalidInput):
        make()
