"""Consumers and producers that die at any request, over a network that loses replies: what was acknowledged is there
until it is acked, what was acked does not come back, and of a group one message is held at a time."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from tests.unit.stores.objects.rig import NOW, Rig, apply, fresh, give_back, lease, picture

from millpond.errors import StoreError
from millpond.stores.base import Box, Conflict, Inserted, Remove, Removed, Unique, Update, Updated
from millpond.stores.objects.store import ObjectStore

LEASE = 60_000


class _World:
    def __init__(self, seed: int) -> None:
        self.rig = Rig(page_size=20)
        self.chance = random.Random(seed)
        self.numbers = iter(range(1, 10**6))
        self.promised: set[str] = set()
        """Acknowledged inserts."""
        self.acked: set[str] = set()
        self.perhaps: set[str] = set()
        """Whose answer ended in a crash or an unknown outcome."""
        self.holders: dict[str, str] = {}
        self.deaths = 0

    async def store(self) -> ObjectStore:
        store = await self.rig.store()
        network = self.rig.network(store)
        network.chance = random.Random(self.chance.random())
        network.loses, network.kills = 0.03, 0.02
        return store

    @property
    def now(self) -> int:
        return self.rig.clock.now_ms()

    def new(self, queue: str) -> Any:
        self.rig.clock.advance(0.001)
        kind = self.chance.randrange(5)
        return fresh(
            next(self.numbers),
            at=self.now,
            queue=queue,
            group=self.chance.choice("ab") if kind in (0, 1) else None,
            unique=Unique(f"k{self.now}", self.now, self.now + 10**9) if kind == 2 else None,
            chosen=kind == 3,
        )

    async def work(self) -> None:
        """One process after the other, each until it dies, until there is nothing left to do."""
        idle = 0
        store = await self.store()
        while idle < 6:
            try:
                idle = 0 if await self.step(store) else idle + 1
            except StoreError:
                if self.rig.network(store).crashed:
                    self.deaths += 1
                    await store.close()
                    store = await self.store()
        await store.close()

    async def step(self, store: ObjectStore) -> bool:
        if len(self.promised) < 40:
            op = self.new("q")
            if isinstance(await apply(store, op), Inserted):
                self.promised.add(op.item.id)
        for queue in ("q", "next"):
            for record in (await store.list("default", queue, Box.DEAD)).records:
                await apply(store, Update(record.item, record.mark, self.now, False, None, Box.LIVE, b"again"))
            for record in (await store.ready("default", queue, self.now, limit=3)).records:
                await self.deliver(store, record)
                return True
        self.rig.clock.advance(25)
        return False

    async def deliver(self, store: ObjectStore, record: Any) -> None:
        item = record.item
        # Should the process die now, then it may be held by nobody until its lease is over.
        held = await apply(store, lease(record, self.now + LEASE))
        if not isinstance(held, Updated):
            return
        assert item.id not in self.acked, f"{item.id} came back after it was acked"
        group = None if item.group is None else f"{item.queue}/{item.group}"
        if group is not None:
            assert self.holders.get(group, item.id) == item.id, f"{item.id} beside {self.holders[group]}"
            self.holders[group] = item.id
        for _ in range(self.chance.randrange(5)):
            await asyncio.sleep(0)
        kind = self.chance.randrange(6)
        successors: list[Any] = []
        if group is not None:
            # From here on it may be settled at any moment.
            self.holders.pop(group, None)
        try:
            if kind == 0:
                await apply(store, give_back(item, held.mark, self.now + 1000))
            elif kind == 1:
                await apply(store, Update(item, held.mark, self.now, False, None, Box.DEAD, b"dead"))
            elif kind == 2 and item.queue == "q":
                successors = [self.new("next") for _ in range(2)]
                outcomes = await store.commit([Remove(item, held.mark), *successors])
                if isinstance(outcomes[0], Removed):
                    self.acked.add(item.id)
                    self.promised |= {one.item.id for one in successors}
            elif not isinstance(await apply(store, Remove(item, held.mark)), Conflict):
                self.acked.add(item.id)
        except StoreError:
            self.perhaps.add(item.id)
            raise


@pytest.mark.parametrize("seed", range(6))
async def test_nothing_is_lost_and_nothing_comes_back(seed: int) -> None:
    world = _World(seed)
    await asyncio.gather(*(world.work() for _ in range(3)))
    assert world.deaths > 3
    last = await world.rig.rescue()
    left = await picture(last)
    missing = world.promised - world.acked - world.perhaps - set(left)
    assert not missing, f"{missing} were acknowledged, and are nowhere"
    assert not world.acked & set(left), "what was acked is there again"
    # What is left waits for somebody, and can be had.
    world.rig.clock.advance(1000)
    idle = 0
    while idle < 2:
        # What was just given back is due a little later.
        idle = 0 if await world.step(last) else idle + 1
    assert await picture(last) == {}
    assert await last.verify() == []
    assert world.now > NOW
