"""Limits hold across processes, and a dead holder's permit comes back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.conformance.queue.conftest import World
from tests.unit.tasks.conftest import LOCAL

from millpond import Pond
from millpond.errors import InvalidInput, StoreBusy, StoreClosed
from millpond.worker.hooks import Context
from millpond.worker.limits import LEASE, LINGER, PATIENCE, Concurrency, Limit, Limiter, Permit, Permits, Rate
from millpond.worker.outcomes import Defer, Outcome


async def taken(pool: Permits) -> Permit:
    [permit] = await pool.acquire(1, 0)
    return permit


def gate(pond: Pond, limit: Limit) -> Permits:
    return Permits(pond, "orders", limit)


async def test_no_more_at_once_than_allowed_over_all_processes(world: World) -> None:
    async with world.pond() as one, world.pond() as two:
        first, second = gate(one, Concurrency(2)), gate(two, Concurrency(2))
        a, b = await taken(first), await taken(second)
        assert await a.use()
        assert await b.use()
        assert await first.acquire(1, 0) == []
        assert await second.acquire(1, 0) == []
        await a.release()
        await (await taken(second)).release()
        await b.release()


async def test_who_waits_for_a_permit_gets_it_when_it_is_given_back(world: World) -> None:
    async with world.pond() as pond:
        only = gate(pond, Concurrency(1))
        held = await taken(only)
        waiting = await world.waiting(only.acquire(1, 60))
        await held.release()
        [permit] = await world.soon(waiting)
        await permit.release()


async def test_a_permit_is_kept_as_long_as_the_work_takes(world: World) -> None:
    async with world.pond() as one, world.pond() as two:
        held = await taken(gate(one, Concurrency(1)))
        other = gate(two, Concurrency(1))
        for _ in range(12):
            await world.advance(LEASE / 3)
            assert await other.acquire(1, 0) == []
        await held.release()
        await (await taken(other)).release()


async def test_a_dead_holders_permit_comes_back_with_the_end_of_its_lease(world: World) -> None:
    async with world.pond() as dead, world.pond() as alive:
        held = await taken(gate(dead, Concurrency(1)))
        held._held.stop()  # nobody renews it any more
        other = gate(alive, Concurrency(1))
        await world.advance(LEASE - 1)
        assert await other.acquire(1, 0) == []
        await world.advance(1)
        permit = await taken(other)
        await held.release()  # too late, and of no effect
        assert await gate(dead, Concurrency(1)).acquire(1, 0) == []
        await permit.release()


async def test_a_rate_holds_within_any_period(world: World) -> None:
    async with world.pond() as one, world.pond() as two:
        gates = [gate(pond, Rate(3, per=10)) for pond in (one, two)]
        begun: list[float] = []
        for step in range(200):
            for each in gates:
                for permit in await each.acquire(1, 0):
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
                    for permit in await each.acquire(1, 0):
                        if await permit.use():
                            begun.append(world.clock.monotonic())
                        await permit.release()
            world.clock.advance(0.25)
        begun.sort()
        assert (
            max(sum(start <= t < start + 10 for t in begun[at : at + 1100]) for at, start in enumerate(begun)) <= 1000
        )
        assert len(begun) >= 2200


async def test_the_rest_of_a_permit_may_be_used_for_a_tenth_of_the_period_and_is_gone_for_a_period_after_that(
    world: World,
) -> None:
    async with world.pond() as one, world.pond() as two:
        limit = Rate(64, per=10)  # 32 permits, each worth two
        pool, other = gate(one, limit), gate(two, limit)
        everything = await pool.acquire(64, 0)
        assert len(everything) == 64
        for permit in everything[::2]:
            assert await permit.use()
        world.clock.advance(0.9)
        late = everything[1]
        assert await late.use()
        world.clock.advance(0.2)
        assert not await everything[3].use()
        for permit in everything:
            await permit.release()
        world.clock.advance(9.7)  # 10.8 seconds after the first use, 9.9 after the last
        assert await other.acquire(1, 0) == []
        world.clock.advance(0.3)
        assert len(await other.acquire(64, 0)) == 64


async def test_a_renewal_that_is_late_does_not_shorten_a_permit_that_was_used(world: World) -> None:
    async with world.pond() as one, world.pond() as two:
        pool = gate(one, Rate(1, per=600))
        permit = await taken(pool)
        held = permit._held
        slow, written = asyncio.Event(), []

        class Slow:
            """Its first extension is a long time under way."""

            async def extend(self, seconds: float) -> None:
                if seconds == LEASE:
                    await slow.wait()
                await message.extend(seconds)
                written.append(seconds)

        message, held.message = held.message, Slow()  # type: ignore[assignment]
        renewal = await world.waiting(held._extend())
        using = await world.waiting(permit.use())
        slow.set()
        assert await world.soon(using)
        await world.soon(renewal)
        assert written == [LEASE, 600]
        await world.advance(LEASE * 2)
        assert await gate(two, Rate(1, per=600)).acquire(1, 0) == []


async def test_what_is_left_of_a_permit_goes_to_the_next_message(world: World) -> None:
    async with world.pond() as pond:
        pool = gate(pond, Rate(64, per=10))
        first, second = await pool.acquire(2, 0)
        assert await first.use()
        await second.release()  # there was no second message
        [again] = await pool.acquire(1, 0)
        assert again._held is first._held
        assert (await pond.queue(pool.name).counts()).leased == 1
        assert await again.use()
        [other] = await pool.acquire(1, 0)
        assert other._held is not first._held


async def test_a_permit_that_was_not_used_is_given_back_at_once(world: World) -> None:
    async with world.pond() as one, world.pond() as two:
        permit = await taken(gate(one, Rate(1, per=60)))
        assert await gate(two, Rate(1, per=60)).acquire(1, 0) == []
        await permit.release()
        again = await taken(gate(two, Rate(1, per=60)))
        assert await again.use()
        await again.release()
        assert await gate(one, Rate(1, per=60)).acquire(1, 0) == []
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
        assert await low.acquire(1, 0) == []
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
        waiting = await world.waiting(only.acquire(1, PATIENCE))
        await world.advance(PATIENCE)
        assert await world.soon(waiting) == []
        await (await taken(only)).release()


async def test_processes_that_begin_together_make_each_permit_once(world: World) -> None:
    async with world.pond() as one, world.pond() as two:
        got = await asyncio.gather(*(gate(pond, Concurrency(3)).acquire(1, 0) for pond in (one, two)))
        counts = await one.queue(gate(one, Concurrency(3)).name).counts()
        assert counts.ready + counts.leased + counts.delayed == 3
        for [permit] in got:
            await permit.release()


class Here:
    """A consumer's way with its limiter, as a worker goes it."""

    def __init__(self, pond: Pond, *limits: Limit) -> None:
        self.limiter = Limiter(pond, "orders", limits)
        self._message = pond.queue("orders").handle("01977420-dc00-7562-9813-410373f1aaca", "lease", 1)

    def context(self) -> Context:
        """A message's handling."""
        return Context("order", self._message, 0.0, None)

    async def begin(self) -> Context:
        """A handler begins."""
        context = self.context()
        await self.limiter.before(context)
        return context

    async def leased(self, pond: Pond, kind: str) -> int:
        for pool in self.limiter._pools:
            await pool.close()
        return (await pond.queue(f"millpond.limit.{kind}.orders").counts()).leased


async def test_what_did_not_start_and_what_has_ended_is_given_back(world: World) -> None:
    async with world.pond() as pond:
        here = Here(pond, Concurrency(5))
        limiter = here.limiter
        assert await limiter.admit(16) == 5
        limiter.unused(3)
        assert await limiter.admit(1) == 1  # one of the three
        limiter.unused(1)
        await world.advance(LINGER)
        assert await here.leased(pond, "concurrency") == 2
        first, second = await here.begin(), await here.begin()
        waiting = await world.waiting(Here(pond, Concurrency(2)).limiter.admit(1))
        await limiter.after(first, None)
        assert await world.soon(waiting) == 1
        await limiter.error(second, None, Outcome("retry"))
        await limiter.settled(second, "retry")
        assert await here.leased(pond, "concurrency") == 1
        await limiter.stop()


async def test_of_several_limits_all_or_nothing_is_held(world: World) -> None:
    async with world.pond() as pond:
        here = Here(pond, Rate(1, per=60), Concurrency(3))
        assert await here.limiter.admit(3) == 1
        assert await here.leased(pond, "concurrency") == 1
        waiting = await world.waiting(here.limiter.admit(3))
        assert await here.leased(pond, "concurrency") == 3
        waiting.cancel()
        await asyncio.wait([waiting])
        assert await here.leased(pond, "concurrency") == 1
        await here.limiter.after(await here.begin(), None)
        assert await here.leased(pond, "concurrency") == 0
        assert await here.leased(pond, "rate") == 1
        await world.advance(60)
        assert await here.limiter.admit(3) == 1
        await here.limiter.stop()


async def test_a_handler_whose_permit_was_lost_waits_for_another(world: World) -> None:
    async with world.pond() as one, world.pond() as two:
        here, there = Here(one, Rate(1, per=60)), Here(two, Rate(1, per=60))
        assert await here.limiter.admit(1) == 1
        here.limiter._waiting[0][0]._held.stop()  # it stood still
        await world.advance(LEASE)
        assert await there.limiter.admit(1) == 1
        waiting = await world.waiting(here.begin())
        there.limiter.unused(1)
        await there.limiter.stop()
        await here.limiter.after(await world.soon(waiting), None)
        await here.limiter.stop()
        await there.limiter.stop()


async def test_a_handler_that_gets_no_permit_gives_its_message_back_without_a_failure(world: World) -> None:
    async with world.pond() as one, world.pond() as two:
        here, there = Here(one, Rate(1, per=3600)), Here(two, Rate(1, per=3600))
        assert await here.limiter.admit(1) == 1
        here.limiter._waiting[0][0]._held.stop()
        await world.advance(LEASE)
        assert await there.limiter.admit(1) == 1
        await there.begin()
        waiting = await world.waiting(here.begin())
        await world.advance(PATIENCE)
        with pytest.raises(Defer):
            await world.soon(waiting)
        await here.limiter.stop()
        await there.limiter.stop()


@pytest.mark.parametrize("world", LOCAL, indirect=True)
async def test_an_outage_of_the_store_is_waited_out(world: World, caplog: pytest.LogCaptureFixture) -> None:
    async with world.pond() as pond:
        here = Here(pond, Concurrency(1))
        claim, outage = pond.service.claim, True

        async def failing(*arguments: Any, **options: Any) -> Any:
            if outage:
                raise StoreBusy("somebody writes")
            return await claim(*arguments, **options)

        pond.service.claim = failing  # type: ignore[method-assign]
        waiting = await world.waiting(here.limiter.admit(1))
        for _ in range(5):
            await world.advance(15)
        assert not waiting.done()
        outage = False
        await world.advance(15)
        assert await world.soon(waiting) == 1
        assert {record.message for record in caplog.records} == {"millpond.limit.failed"}
        # A handler whose permit was lost meanwhile gives its message back.
        outage = True
        here.limiter._waiting.clear()
        with pytest.raises(Defer) as caught:
            await here.begin()
        assert caught.value.delay > 0
        outage = False
        await here.limiter.stop()


async def test_a_store_that_was_closed_is_not_waited_for(world: World) -> None:
    async with world.pond() as pond:
        here = Here(pond, Concurrency(1))
    with pytest.raises(StoreClosed):
        await here.limiter.admit(1)


async def test_a_handler_whose_payload_did_not_fit_gives_its_permit_back(world: World) -> None:
    async with world.pond() as pond:
        here = Here(pond, Rate(2, per=60))
        assert await here.limiter.admit(2) == 2
        await here.begin()
        await here.limiter.error(here.context(), ValueError(), Outcome("dead"))  # one of them never began
        assert await here.leased(pond, "rate") == 1
        await here.limiter.stop()


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
