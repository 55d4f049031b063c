"""Producers wait at a closed gate and are sent away; consumers and answers are not; and it does not flutter."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from millpond.errors import Throttled
from millpond.model.clock import ManualClock, SystemClock
from millpond.server import gate
from millpond.server.gate import HIGH, LATE, LOW, PATIENCE, STALLED, TICK, Load, LoadGate, store_load
from millpond.stores.base import PutDocument
from millpond.stores.sqlite import SqliteStore


class World:
    """A gate, the load that it sees, and its time."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.waiting = 0
        self.done = 0
        self.moves = True
        self.gate = LoadGate(self.clock, self._load)

    def _load(self) -> Load:
        self.done += self.moves
        return Load(self.waiting, self.done)

    async def tick(self, late: float = 0.0) -> None:
        """One look, so many seconds late."""
        if late:
            # What a busy loop does: the timer is run after its time.
            [(due, order, timer)] = self.clock._timers
            self.clock._timers[0] = (due + round(late * 1e9), order, timer)
        self.clock.advance(TICK + late)
        await asyncio.sleep(0)

    async def closed(self) -> World:
        """With more to do than it can take."""
        await self.gate.admit("producer")
        self.waiting = HIGH + 1
        await self.tick()
        assert self.gate.closed
        return self


async def test_producers_pass_while_there_is_room() -> None:
    world = World()
    world.waiting = HIGH
    for _ in range(3):
        await world.gate.admit("producer")
        await world.tick()
    assert not world.gate.closed


async def test_at_a_closed_gate_only_producers_wait() -> None:
    world = await World().closed()
    for kind in ("consumer", "answer", "other"):
        await asyncio.wait_for(world.gate.admit(kind), 60)  # type: ignore[arg-type]
    producer = asyncio.create_task(world.gate.admit("producer"))
    await asyncio.sleep(0)
    assert not producer.done()
    world.waiting = 0
    await world.tick()
    await asyncio.wait_for(producer, 60)
    assert world.gate.refused == 0


async def test_it_opens_below_the_low_mark_only() -> None:
    world = await World().closed()
    world.waiting = LOW
    await world.tick()
    assert world.gate.closed
    world.waiting = LOW - 1
    await world.tick()
    assert not world.gate.closed
    # And what is between the marks does not close it again.
    await world.gate.admit("producer")
    world.waiting = HIGH - 1
    await world.tick()
    assert not world.gate.closed


async def test_a_producer_is_sent_away_after_a_while() -> None:
    world = await World().closed()
    producer = asyncio.create_task(world.gate.admit("producer"))
    await asyncio.sleep(0)
    world.clock.advance(PATIENCE)
    with pytest.raises(Throttled):
        await producer
    assert world.gate.refused == 1
    assert not world.gate._waiting


async def test_who_stops_waiting_leaves_nothing_behind() -> None:
    world = await World().closed()
    producer = asyncio.create_task(world.gate.admit("producer"))
    await asyncio.sleep(0)
    producer.cancel()
    await asyncio.gather(producer, return_exceptions=True)
    assert not world.gate._waiting


async def test_the_number_that_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MAX_WAITING", 2)
    world = await World().closed()
    waiting = [asyncio.create_task(world.gate.admit("producer")) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Throttled):
        await asyncio.wait_for(world.gate.admit("producer"), 60)
    world.waiting = 0
    await world.tick()
    await asyncio.gather(*waiting)


async def test_an_event_loop_that_is_late_again_closes_it() -> None:
    world = World()
    for late in (LATE * 2, 0.0, LATE * 2):
        await world.gate.admit("producer")
        await world.tick(late=late)
        assert not world.gate.closed  # a hiccup
    await world.gate.admit("producer")
    await world.tick(late=LATE * 2)
    assert world.gate.closed
    await world.tick(late=LATE)
    assert world.gate.closed
    await world.tick()
    assert not world.gate.closed


async def test_a_store_that_commits_nothing_closes_it() -> None:
    world = World()
    world.waiting, world.moves = 1, False
    for _ in range(int(STALLED / TICK) + 2):
        if not world.gate.closed:
            await world.gate.admit("producer")
        await world.tick()
    assert world.gate.closed
    world.moves = True
    await world.tick()
    assert not world.gate.closed


async def test_it_rests_while_no_producer_comes() -> None:
    world = World()
    await world.gate.admit("producer")
    await world.tick()
    await world.tick()
    assert world.clock.pending_timers == 0


async def test_sqlite_tells_what_waits_for_a_commit(tmp_path: Path) -> None:
    store = SqliteStore(str(tmp_path / "a.db"), clock=SystemClock())
    assert store_load(store) == Load(0, 0)
    await store.open()
    before = store_load(store)
    writes = [asyncio.ensure_future(store.write((PutDocument("n", f"q{i}", None, b"x"),))) for i in range(3)]
    await asyncio.sleep(0)
    assert store_load(store).waiting == 3
    await asyncio.gather(*writes)
    after = store_load(store)
    assert after.waiting == 0
    assert after.done > before.done
    await store.close()


async def test_it_tells_what_it_sees_and_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MAX_WAITING", 1)
    world = World()
    assert (world.gate.state, world.gate.load()) == ("disengaged", {"backlog": 0, "lateness": 0, "stall": 0})
    await world.closed()
    assert world.gate.state == "engaged"
    assert world.gate.load()["backlog"] == (HIGH + 1) / HIGH
    producer = asyncio.create_task(world.gate.admit("producer"))
    await asyncio.sleep(0)
    assert world.gate.waiting == 1
    with pytest.raises(Throttled):
        await world.gate.admit("producer")
    assert world.gate.refusals == {"waited": 0, "crowded": 1}
    world.clock.advance(PATIENCE)
    with pytest.raises(Throttled):
        await producer
    assert world.gate.refusals == {"waited": 1, "crowded": 1}
    assert (world.gate.slowed, world.gate.slowed_seconds, world.gate.waiting) == (1, PATIENCE, 0)
    world.waiting = LOW + 1
    await world.tick()
    assert (world.gate.closed, world.gate.state) == (True, "recovery")
    world.waiting = 1
    await world.tick()
    assert world.gate.state == "disengaged"
    await world.gate.admit("producer")
    await world.tick(late=LATE)
    assert world.gate.load()["lateness"] == pytest.approx(1)
    world.moves = False
    await world.gate.admit("producer")
    await world.tick()
    for _ in range(5):
        await world.gate.admit("producer")
        await world.tick()
    assert world.gate.load()["stall"] == pytest.approx(5 * TICK / STALLED)
