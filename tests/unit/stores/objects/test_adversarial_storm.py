"""Many actors on one bucket whose requests get lost, refused or take effect late; then it is counted what became of
each message."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

import pytest
from tests.unit.stores.objects.rig import Crash, Hasty, Network, fresh, uuid_at

from millpond.errors import OutcomeUnknown, StoreError
from millpond.model.clock import CorrectedClock
from millpond.stores.base import (
    Box,
    Cause,
    Conflict,
    Insert,
    Inserted,
    Mark,
    Remove,
    Removed,
    Stored,
    Unique,
    Update,
    Updated,
)
from millpond.stores.conformance.harness import NOW
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.store import ObjectStore

T = TypeVar("T")
TOLERANCE = 2_000
"""Milliseconds by which corrected clocks may differ."""
QUEUES = ("q", "next", "keyed")
"""Into the last one go messages with a unique key."""
LEASE = 90_000
LATEST = 11_000
"""Milliseconds after which a request that was given up takes effect no more."""


class Storm(Network):
    """A network in bad weather; ``late`` is shared by all."""

    def __init__(self, inner: MemoryBucket, world: World) -> None:
        super().__init__(inner)
        self.world = world
        self.dies_in: int | None = None
        self.calm = True
        self.now = world.clock.now_ms
        """The time as its user has it."""

    async def _do(self, kind: str, name: str, request: Callable[[], Awaitable[T]]) -> T:
        world, chance = self.world, self.world.chance
        if self.crashed:
            raise Crash
        await self._turns()
        if self.dies_in is not None:
            self.dies_in -= 1
            if self.dies_in <= 0:
                self.crashed = True
                if chance.random() < 0.5:
                    await request()
                raise Crash
        await world.arrivals()
        bad = not self.calm and chance.random() < world.weather
        if not bad:
            result = await request()
            await self._turns()
            return result
        fate = chance.choice(("lost", "dropped", "late", "refused"))
        if fate == "refused":
            raise StoreError("refused; try again")
        if fate == "lost":
            await request()
        if fate == "late" and kind in ("create", "replace", "delete"):
            world.late.append((world.clock.now_ms() + chance.randrange(LATEST), request))
        await self._turns()
        raise OutcomeUnknown("no reply")

    async def _turns(self) -> None:
        for _ in range(self.world.chance.randrange(3)):
            await asyncio.sleep(0)


class World:
    """What happened, as far as the actors were told."""

    def __init__(self, seed: int, skew: int) -> None:
        self.chance = random.Random(seed)
        self.skew = skew
        """Milliseconds by which clocks are off at most; the bucket then tells whole seconds only."""
        self.clock = Hasty()
        self.root = MemoryBucket(
            clock=self.clock, page_size=self.chance.choice((3, 1000)), resolution=1000 if skew else 1
        )
        self.weather = 0.0
        self.late: list[tuple[int, Callable[[], Awaitable[Any]]]] = []
        self.number = 0
        self.certain: set[bytes] = set()
        """Said to be inserted."""
        self.possible: set[bytes] = set()
        self.gone: set[bytes] = set()
        """Said to be removed."""
        self.perhaps_gone: set[bytes] = set()
        self.given: set[bytes] = set()
        self.holders: dict[bytes, tuple[int, str | None]] = {}
        self.keys: dict[str, list[bytes]] = {}
        """Unique key → those said to be inserted under it."""
        self.tried: dict[str, set[bytes]] = {}
        self.handed: list[tuple[bytes, list[bytes]]] = []
        """Hand-offs of unknown outcome."""
        self.made = 0

    async def arrivals(self, everything: bool = False) -> None:
        now = self.clock.now_ms()
        due = [one for one in self.late if everything or one[0] <= now]
        for one in due:
            self.late.remove(one)
        for _, request in due:
            try:
                await request()
            except StoreError:
                continue

    async def store(self) -> tuple[ObjectStore, Storm]:
        self.made += 1
        chance = random.Random(self.made * 7919 + self.chance.randrange(10**6))
        storm = Storm(self.root.share(), self)
        off = self.chance.randrange(-self.skew, self.skew + 1)
        store = ObjectStore(
            storm,
            clock=CorrectedClock(self.clock, lambda: off),
            measure_skew=bool(self.skew),
            random_bytes=chance.randbytes,
            index_entries=self.chance.choice((1, 3, 1000)),
        )
        await store.open()
        storm.calm = False
        storm.now = lambda: self.clock.now_ms() + off + store.clock_offset
        return store, storm

    def insert(self, queue: str, at: int) -> Insert:
        self.number += 1
        chance = self.chance
        kind = chance.choice(("plain", "plain", "group", "delayed"))
        op = fresh(
            self.number,
            at=at,
            due=at + 3000 if kind == "delayed" else None,
            queue=queue,
            group=chance.choice(("a", "b")) if kind == "group" else None,
        )
        self.possible.add(op.head)
        return op


class Actor:
    def __init__(self, world: World, store: ObjectStore, storm: Storm) -> None:
        self.world = world
        self.store = store
        self.storm = storm
        self.held: list[tuple[Stored, Mark]] = []

    async def step(self) -> None:
        chance = self.world.chance
        await chance.choice(
            (
                self.put,
                self.put,
                self.key,
                self.claim,
                self.claim,
                self.claim,
                self.answer,
                self.answer,
                self.redrive,
                self.look,
            )
        )()

    async def one(self, op: Any) -> Any:
        [outcome] = await self.store.write([op])
        return outcome

    async def put(self) -> None:
        op = self.world.insert(self.world.chance.choice(QUEUES[:2]), self.storm.now())
        try:
            outcome = await self.one(op)
        except OutcomeUnknown:
            return
        except StoreError:
            if not self.dead:
                self.world.possible.discard(op.head)
            return
        assert isinstance(outcome, Inserted), outcome
        self.world.certain.add(op.head)

    @property
    def dead(self) -> bool:
        return self.storm.crashed

    async def key(self) -> None:
        world = self.world
        world.number += 1
        key = world.chance.choice("xyz")
        now = self.storm.now()
        op = fresh(world.number, at=now, queue="keyed", unique=Unique(key, now, now + 10**9))
        world.possible.add(op.head)
        world.tried.setdefault(key, set()).add(op.head)
        try:
            outcome = await self.one(op)
        except StoreError:
            return
        if isinstance(outcome, Inserted):
            world.keys.setdefault(key, []).append(op.head)
            world.certain.add(op.head)
        else:
            assert outcome.cause is Cause.UNIQUE, outcome

    async def claim(self) -> None:
        world = self.world
        queue = world.chance.choice(QUEUES)
        now = self.storm.now()
        page = await self.store.ready("default", queue, now, limit=world.chance.choice((1, 5)))
        if not page.records:
            return
        record = world.chance.choice(page.records)
        before = record.head in world.gone
        now = self.storm.now()
        until = now + LEASE
        outcome = await self.one(Update(record.item, record.mark, until, True, None, Box.LIVE, b"held"))
        if not isinstance(outcome, Updated):
            return
        assert not before, f"{record.head!r} was given out after it was removed"
        assert record.head in world.possible | world.certain, f"{record.head!r} was never put in"
        there = world.holders.get(record.head)
        if there is not None:
            assert there[0] <= world.clock.now_ms() + TOLERANCE, f"{record.head!r} was given out while it was held"
        group = record.item.group
        if group is not None:
            place = f"{queue}/{group}"
            for head, (ends, other) in world.holders.items():
                assert head == record.head or other != place or ends <= world.clock.now_ms() + TOLERANCE, (
                    f"two of group {group}"
                )
        world.holders[record.head] = (until, None if group is None else f"{queue}/{group}")
        world.given.add(record.head)
        self.held.append((record, outcome.mark))

    async def answer(self) -> None:
        world = self.world
        if not self.held:
            return
        record, mark = self.held.pop(world.chance.randrange(len(self.held)))
        if world.chance.random() < 0.2:
            # It takes longer than the lease.
            world.clock.advance(world.chance.choice((20, 60, 100)))
        ends, _ = world.holders.get(record.head, (0, None))
        mine = ends == mark.due
        how = world.chance.choice(("ack", "ack", "hand off", "nack", "bury"))
        if mine:
            del world.holders[record.head]
        now = self.storm.now()
        if how == "hand off":
            successors = [
                world.insert(world.chance.choice(QUEUES[:2]), self.storm.now())
                for _ in range(world.chance.choice((1, 2)))
            ]
            heads = [op.head for op in successors]
            try:
                outcomes = await self.store.commit([Remove(record.item, mark), *successors])
            except OutcomeUnknown:
                world.perhaps_gone.add(record.head)
                world.handed.append((record.head, heads))
                return
            except StoreError:
                if self.dead:
                    world.perhaps_gone.add(record.head)
                    world.handed.append((record.head, heads))
                else:
                    world.possible.difference_update(heads)
                return
            if isinstance(outcomes[0], Removed):
                assert mine, "a stale lease handed off"
                world.gone.add(record.head)
                world.certain.update(heads)
                assert all(isinstance(outcome, Inserted) for outcome in outcomes[1:]), outcomes
            else:
                world.possible.difference_update(heads)
            return
        op: Remove | Update
        if how == "ack":
            op = Remove(record.item, mark)
        else:
            box = Box.DEAD if how == "bury" else Box.LIVE
            op = Update(record.item, mark, now, False, None, box, b"back")
        try:
            outcome = await self.one(op)
        except StoreError as error:
            if how == "ack" and (self.dead or isinstance(error, OutcomeUnknown)):
                world.perhaps_gone.add(record.head)
            return
        if not isinstance(outcome, Conflict):
            assert mine, f"a stale lease did {how}"
            if how == "ack":
                world.gone.add(record.head)

    async def redrive(self) -> None:
        world = self.world
        queue = world.chance.choice(QUEUES)
        page = await self.store.list("default", queue, Box.DEAD)
        for record in page.records[:2]:
            before = record.head in world.gone
            now = self.storm.now()
            outcome = await self.one(Update(record.item, record.mark, now, False, None, Box.LIVE, b"again"))
            assert not (before and isinstance(outcome, Updated)), "a removed one was redriven"

    async def look(self) -> None:
        world, store = self.world, self.store
        now = self.storm.now()
        await world.chance.choice(
            (
                lambda: store.sweep(now, older_than=3_600_000, limit=100),
                lambda: store.counts("default", "q", now),
                lambda: store.expired(now, limit=10),
                lambda: store.list("default", "q", Box.LIVE),
                lambda: store.get("default", "q", uuid_at(NOW, world.chance.randrange(1, 10))),
            )
        )()
        if world.chance.random() < 0.3:
            world.clock.advance(world.chance.choice((1, 10, 61)))


async def _act(world: World, steps: int, deaths: float) -> None:
    actor = Actor(world, *await world.store())
    for _ in range(steps):
        with suppress(StoreError):
            await actor.step()
        if world.chance.random() < deaths:
            actor.storm.dies_in = world.chance.randrange(1, 12)
        if actor.dead:
            actor = Actor(world, *await world.store())


async def _drain(world: World) -> list[bytes]:
    """All that is there, once the weather is good and all who died are made good for."""
    world.skew = 0
    store, _ = await world.store()
    found: list[bytes] = []
    idle = 0
    while idle < 3:
        world.clock.advance(100)
        before = len(found)
        await store.expired(world.clock.now_ms(), limit=100)
        await store.sweep(world.clock.now_ms(), older_than=3_600_000, limit=100)
        while store._engine.tasks:
            await asyncio.gather(*store._engine.tasks, return_exceptions=True)
        for queue in QUEUES:
            for dead in (await store.list("default", queue, Box.DEAD, limit=1000)).records:
                now = world.clock.now_ms()
                await store.write([Update(dead.item, dead.mark, now, False, None, Box.LIVE, b"again")])
            for record in (await store.ready("default", queue, world.clock.now_ms(), limit=1000)).records:
                until = world.clock.now_ms() + LEASE
                [held] = await store.write([Update(record.item, record.mark, until, True, None, Box.LIVE, b"held")])
                if not isinstance(held, Updated):
                    continue
                found.append(record.head)
                [outcome] = await store.write([Remove(record.item, held.mark)])
                assert isinstance(outcome, Removed), outcome
        idle = idle + 1 if len(found) == before else 0
    for queue in QUEUES:
        for box in Box:
            assert (await store.list("default", queue, box)).records == []
    return found


async def storm(seed: int, *, actors: int, steps: int = 40, weather: float, deaths: float, skew: int = 0) -> None:
    world = World(seed, skew)
    world.weather = weather
    results = await asyncio.gather(*(_act(world, steps, deaths) for _ in range(actors)), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    world.weather = 0.0
    await world.arrivals(everything=True)
    found = await _drain(world)
    assert len(found) == len(set(found)), "there twice"
    back = set(found) & world.gone
    assert not back, f"came back: {back}"
    invented = set(found) - world.possible - world.certain
    assert not invented, f"never put in: {invented}"
    lost = world.certain - world.gone - world.perhaps_gone - set(found)
    assert not lost, f"lost: {lost}"
    for source, heads in world.handed:
        brought = [head in found or head in world.given for head in heads]
        if source in found:
            assert not any(brought), f"{source!r} was handed off and is there"
        elif source not in world.gone and sum(one[0] == source for one in world.handed) == 1:
            assert all(brought) or source in world.perhaps_gone, (
                f"{source!r} was handed off, and nothing has come of it"
            )
    for key, heads in world.keys.items():
        assert len(heads) <= 1, f"key {key} was given to {heads}"
    for key, tries in world.tried.items():
        assert len(tries & (world.given | set(found))) <= 1, f"more than one message of key {key}"


WEATHERS = [(4, 0.06, 0.03, 0), (5, 0.2, 0.03, 0), (3, 0.35, 0.05, 0), (6, 0.1, 0.2, 0), (4, 0.1, 0.05, 60_000)]
FOUND = [(1034, 5, 0.2, 0.03, 0), (1043, 4, 0.1, 0.05, 60_000), (1223, 4, 0.1, 0.05, 60_000)]
"""Those that found something: a message was redriven, or removed, before its unique key was confirmed; and clocks were
compared by a process that stood still meanwhile."""


@pytest.mark.parametrize(
    ("seed", "actors", "weather", "deaths", "skew"),
    [(seed, *weather) for seed in range(8) for weather in WEATHERS] + FOUND,
)
async def test_what_becomes_of_each_message(seed: int, actors: int, weather: float, deaths: float, skew: int) -> None:
    await storm(seed, actors=actors, weather=weather, deaths=deaths, skew=skew)
