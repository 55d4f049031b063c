"""Each tick of a periodic job becomes one message, whoever fires it and whoever dies."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.conformance.queue.conftest import World
from tests.unit.tasks.conftest import LOCAL

from millpond import Pond, Queue
from millpond.errors import InvalidInput, LeaseLost
from millpond.model.clock import ManualClock
from millpond.worker.periodic import LEASE, LOOK, WINDOW, CatchUp, Periodic, Tick, Ticker
from millpond.worker.schedule import parse

START = 1_749_999_980_000
"""20 s after a full minute."""


@pytest.fixture(autouse=True)
def begin(world: World) -> None:
    world.clock.jump(START / 1000 - world.clock.now_ms() / 1000)


def job(when: str = "every 60s", **options: Any) -> Periodic:
    return Periodic("report", parse(when), "reports", **options)


class Standing:
    """A pond's worker whose view of the time is an old one."""

    def __init__(self, pond: Pond, clock: ManualClock) -> None:
        self.clock = clock
        self.middleware: list[Any] = []
        self._pond = pond

    def queue(self, name: str, *, namespace: str | None = None) -> Queue:
        return self._pond.queue(name, namespace=namespace)


async def fired(pond: Pond) -> list[int]:
    """The ticks that lie in the job's queue, in seconds since the start; they are acked."""
    messages = await pond.queue("reports").receive(100)
    for message in messages:
        await message.ack()
    ticks = [message.decode(Tick) for message in messages]
    assert {tick.job for tick in ticks} <= {"report"}
    return sorted(round(tick.at.timestamp() - START / 1000) for tick in ticks)


async def test_a_tick_becomes_one_message(world: World) -> None:
    async with world.pond() as pond:
        ticker = Ticker(pond, job())
        look = await ticker.run_once()
        assert look == START + 40_000
        assert await fired(pond) == []
        await world.advance(40)
        assert await ticker.run_once() == START + 100_000
        assert await fired(pond) == [40]
        await world.advance(60)
        await ticker.run_once()
        assert await fired(pond) == [100]


async def test_many_workers_fire_each_tick_once(world: World) -> None:
    async with world.pond() as one, world.pond() as two, world.pond() as three:
        tickers = [Ticker(pond, job()) for pond in (one, two, three)]
        found = []
        for _ in range(4):
            await asyncio.gather(*(ticker.run_once() for ticker in tickers))
            found += await fired(one)
            await world.advance(60)
        assert found == [40 + 60 * number for number in range(len(found))]
        assert len(found) == 3


async def test_a_worker_that_dies_with_the_pacemaker_costs_its_lease_and_no_tick(world: World) -> None:
    async with world.pond() as one, world.pond() as two:
        await Ticker(one, job()).run_once()
        await world.advance(40)
        [held] = await one.queue(job().pacemaker).receive(visibility=LEASE)  # and it dies
        look = await Ticker(two, job()).run_once()
        assert await fired(two) == []
        # In a bucket it first takes a look or two to see how long somebody else's lease lasts.
        for _ in range(3):
            if look >= START + 100_000:
                break
            assert world.clock.now_ms() < look
            await world.advance((look - world.clock.now_ms()) / 1000)
            look = await Ticker(two, job()).run_once()
        assert look == START + 100_000
        assert world.clock.now_ms() <= START + 71_000
        assert await fired(two) == [40]
        assert held.lease.token == 1


async def test_a_worker_that_was_away_fires_nothing_late(world: World) -> None:
    """It had the lease, stood still, and others fired meanwhile: its hand-off is refused as a whole."""
    async with world.pond() as slow, world.pond() as quick:
        await Ticker(slow, job()).run_once()
        await world.advance(40)
        [held] = await slow.queue(job().pacemaker).receive(visibility=LEASE)
        await world.advance(WINDOW + 20)  # far longer than anything is remembered
        await Ticker(quick, job()).run_once()
        before = await fired(quick)
        assert before == [3640]
        # What is due it had found out before it stood still.
        stale = ManualClock(START + 40_000)
        with pytest.raises(LeaseLost):
            await Ticker(Standing(slow, stale), job())._fire(held)
        ticker = Ticker(slow, job())
        assert await fired(quick) == []
        await world.advance(60)
        await ticker.run_once()
        assert await fired(quick) == [3700]


@pytest.mark.parametrize(
    ("catch_up", "expected"),
    [("skip", []), ("latest", [220]), (2, [160, 220]), (100, [40, 100, 160, 220])],
)
async def test_catching_up(world: World, catch_up: CatchUp, expected: list[int]) -> None:
    async with world.pond() as pond:
        ticker = Ticker(pond, job(catch_up=catch_up, grace=10))
        await ticker.run_once()
        await world.advance(255)
        assert await ticker.run_once() == START + 280_000
        assert await fired(pond) == expected
        await world.advance(26)  # one second late is not missed
        await ticker.run_once()
        assert await fired(pond) == [280]


async def test_two_pacemakers_become_one_again(world: World) -> None:
    async with world.pond() as pond:
        ticker = Ticker(pond, job())
        await ticker.run_once()
        queue = pond.queue(job().pacemaker)
        await queue.enqueue(b'{"last": 1749999980000}', delay=35)  # somebody restored one, say
        found = []
        for _ in range(5):
            await world.advance(60)
            await ticker.run_once()
            await ticker.run_once()
            found += await fired(pond)
        assert found == [40, 100, 160, 220, 280]
        counts = await queue.counts()
        assert counts.ready + counts.delayed + counts.leased == 1


async def test_a_purged_pacemaker_is_made_again(world: World) -> None:
    async with world.pond() as pond:
        ticker = Ticker(pond, job())
        await ticker.run_once()
        queue = pond.queue(job().pacemaker)
        assert await queue.purge() == 1
        look = await ticker.run_once()
        assert look <= START + round(LOOK * 1000)
        await world.advance(60)
        await ticker.run_once()
        await world.advance(60)
        await ticker.run_once()
        assert await fired(pond) == [100]


async def test_a_paused_schedule_gets_no_second_pacemaker(world: World) -> None:
    async with world.pond() as pond:
        ticker = Ticker(pond, job())
        await ticker.run_once()
        queue = pond.queue(job().pacemaker)
        await queue.pause()
        for _ in range(3):
            await world.advance(60)
            await ticker.run_once()
        counts = await queue.counts()
        assert counts.ready + counts.delayed + counts.leased == 1
        await queue.resume()
        await world.advance(61)
        await ticker.run_once()
        assert await fired(pond) == [220]


async def test_an_edited_schedule_begins_anew_and_the_old_one_is_forgotten(world: World) -> None:
    async with world.pond() as pond:
        await Ticker(pond, job("every 60s")).run_once()
        edited = Ticker(pond, job("every 10s"))
        assert await edited.run_once() == START + 10_000
        assert job("every 60s").pacemaker != job("every 10s").pacemaker
        await world.advance(100 * 86_400)
        await pond.collect()
        counts = await pond.queue(job("every 60s").pacemaker).counts()
        assert counts.ready + counts.delayed + counts.leased == 0


async def test_a_pacemaker_that_cannot_be_read_is_told_of_and_replaced(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async with world.pond() as pond:
        await pond.queue(job().pacemaker).enqueue(b"what?")
        assert await Ticker(pond, job()).run_once() == START + 40_000
        assert [record.message for record in caplog.records] == ["millpond.periodic.unreadable"]


async def test_it_runs_by_the_clock_until_it_is_cancelled(world: World) -> None:
    async with world.pond() as pond:
        running = [asyncio.create_task(Ticker(pond, job(when)).run()) for when in ("every 60s", "every 30s")]
        for _ in range(5):
            await world.advance(30)
        for task in running:
            task.cancel()
        await asyncio.wait(running)
        # Both jobs have one name and queue here, so their common ticks are one.
        assert await fired(pond) == [10, 40, 70, 100, 130]


@pytest.mark.parametrize("world", LOCAL, indirect=True)
async def test_what_the_store_cannot_do_now_is_tried_again(world: World, caplog: pytest.LogCaptureFixture) -> None:
    from millpond.errors import StoreBusy

    async with world.pond() as pond:
        ticker = Ticker(pond, job())
        calls = 0
        receive = pond.service.claim

        async def claim(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise StoreBusy("somebody writes")
            return await receive(*args, **options)

        pond.service.claim = claim  # type: ignore[method-assign]
        running = asyncio.create_task(ticker.run())
        await world.advance(5)
        await world.advance(35)
        running.cancel()
        await asyncio.wait([running])
        assert await fired(pond) == [40]
        assert "millpond.periodic.failed" in [record.message for record in caplog.records]


@pytest.mark.parametrize("world", ["memory"], indirect=True)
@pytest.mark.parametrize("catch_up", ["all", 0, 101, 1.5, True])
def test_a_wrong_catch_up_is_refused(world: World, catch_up: Any) -> None:
    with pytest.raises(InvalidInput, match="catch_up"):
        job(catch_up=catch_up)


@pytest.mark.parametrize("world", ["memory"], indirect=True)
def test_a_name_that_is_too_long_is_refused(world: World) -> None:
    with pytest.raises(InvalidInput, match="too long"):
        Periodic("n" * 120, parse("every 60s"), "reports")
