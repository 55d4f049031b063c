"""Several stores on one bucket, with requests that overtake each other."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from tests.unit.stores.objects.rig import NOW, Rig, apply, fresh, give_back, insert, lease, picture

from millpond.stores.base import Box, Cause, Conflict, Inserted, PutDocument, Remove, Removed, Unique, Update, Updated
from millpond.stores.objects.store import ObjectStore

FAR = NOW + 10**7
SEEDS = range(8)


async def _stores(rig: Rig, count: int, seed: int, **options: Any) -> list[ObjectStore]:
    stores = [await rig.store(**options) for _ in range(count)]
    for number, store in enumerate(stores):
        rig.network(store).chance = random.Random(seed * 100 + number)
    return stores


@pytest.mark.parametrize("seed", SEEDS)
async def test_each_message_is_worked_on_once_and_groups_in_order(seed: int) -> None:
    rig = Rig(page_size=7)
    stores = await _stores(rig, 3, seed)
    chance = random.Random(seed)
    for number in range(60):
        group = chance.choice([None, "a", "b", "c"])
        # Each has a moment of its own, so that clocks agree on who came first.
        rig.clock.advance(0.001)
        await insert(stores[number % 3], fresh(number, at=rig.clock.now_ms(), group=group, priority=5))
    now = rig.clock.now_ms()
    holders: dict[str, str] = {}
    done: list[str] = []
    orders: dict[str, list[int]] = {}

    async def work(store: ObjectStore, mine: random.Random) -> None:
        idle = 0
        while idle < 20:
            page = await store.ready("default", "q", now, limit=4)
            idle += not page.records
            for record in page.records:
                held = await apply(store, lease(record, FAR))
                if not isinstance(held, Updated):
                    continue
                item = record.item
                if item.group is not None:
                    assert item.group not in holders, f"{item.id} and {holders[item.group]} at once"
                    holders[item.group] = item.id
                assert item.id not in done
                for _ in range(mine.randrange(6)):
                    await asyncio.sleep(0)
                if mine.random() < 0.3:
                    # The group is free from the moment that the write takes place.
                    holders.pop(item.group or "", None)
                    assert isinstance(await apply(store, give_back(item, held.mark, NOW)), Updated)
                    continue
                holders.pop(item.group or "", None)
                done.append(item.id)
                if item.group is not None:
                    orders.setdefault(item.group, []).append(item.key)
                assert isinstance(await apply(store, Remove(item, held.mark)), Removed)

    await asyncio.gather(*(work(store, random.Random(seed + n)) for n, store in enumerate(stores * 2)))
    assert len(done) == len(set(done)) == 60
    for keys in orders.values():
        assert keys == sorted(keys)
    assert await picture(await rig.rescue()) == {}


@pytest.mark.parametrize("seed", SEEDS)
async def test_of_racing_claims_one_goes_through(seed: int) -> None:
    rig = Rig()
    stores = await _stores(rig, 4, seed)
    record = await insert(stores[0], fresh(1))
    for _ in range(5):
        seen = [await store.get("default", "q", record.item.id) for store in stores]
        ops = [lease(one, FAR + n) for n, one in enumerate(seen) if one is not None]
        assert len(ops) == 4
        outcomes = await asyncio.gather(*(apply(store, op) for store, op in zip(stores, ops, strict=True)))
        winners = [outcome for outcome in outcomes if isinstance(outcome, Updated)]
        assert len(winners) == 1
        assert {outcome.cause for outcome in outcomes if isinstance(outcome, Conflict)} == {Cause.STALE}


@pytest.mark.parametrize("seed", SEEDS)
async def test_of_racing_answers_one_goes_through(seed: int) -> None:
    rig = Rig()
    stores = await _stores(rig, 4, seed, fenced_removals=True)
    for number in range(5):
        record = await insert(stores[0], fresh(number))
        held = await apply(stores[0], lease(record, FAR))
        assert isinstance(held, Updated)
        item, mark = record.item, held.mark
        outcomes = await asyncio.gather(
            apply(stores[0], Remove(item, mark)),
            apply(stores[1], give_back(item, mark, FAR)),
            apply(stores[2], Update(item, mark, NOW, False, None, Box.DEAD, b"dead")),
            stores[3].commit([Remove(item, mark), fresh(100 + number, queue="next")]),
        )
        flat = [outcome[0] if isinstance(outcome, list) else outcome for outcome in outcomes]
        assert sum(not isinstance(outcome, Conflict) for outcome in flat) == 1
        found = await picture(await rig.rescue())
        there = sum(key == item.id for key in found)
        assert there == (isinstance(flat[1], Updated) or isinstance(flat[2], Updated))


@pytest.mark.parametrize("seed", SEEDS)
async def test_a_key_and_an_id_are_given_once(seed: int) -> None:
    rig = Rig()
    stores = await _stores(rig, 4, seed)
    for turn in range(3):
        key = Unique(f"k{turn}", NOW, FAR)
        ops = [fresh(10 * turn + n, unique=key) for n in range(4)]
        outcomes = await asyncio.gather(*(apply(store, op) for store, op in zip(stores, ops, strict=True)))
        [winner] = [outcome for outcome in outcomes if isinstance(outcome, Inserted)]
        assert {one.id for one in outcomes if isinstance(one, Conflict)} == {winner.item.id}
        same = [fresh(1000 + turn, chosen=True) for _ in range(4)]
        outcomes = await asyncio.gather(*(apply(store, op) for store, op in zip(stores, same, strict=True)))
        assert sum(isinstance(outcome, Inserted) for outcome in outcomes) == 1
        assert {one.cause for one in outcomes if isinstance(one, Conflict)} == {Cause.EXISTS}
    assert len(await picture(await rig.rescue())) == 6


@pytest.mark.parametrize("seed", SEEDS)
async def test_a_key_that_ends_is_taken_by_one(seed: int) -> None:
    rig = Rig()
    stores = await _stores(rig, 4, seed)
    await insert(stores[0], fresh(1, unique=Unique("k", NOW, NOW + 10)))
    later = Unique("k", NOW + 10, FAR)
    sweeping = asyncio.ensure_future(stores[3].sweep(NOW + 10, older_than=10**9, limit=10))
    ops = [fresh(2 + n, unique=later) for n in range(3)]
    outcomes = await asyncio.gather(*(apply(store, op) for store, op in zip(stores[:3], ops, strict=True)))
    await sweeping
    assert sum(isinstance(outcome, Inserted) for outcome in outcomes) == 1
    assert isinstance(await apply(stores[3], fresh(9, unique=later)), Conflict)


@pytest.mark.parametrize("seed", SEEDS)
async def test_of_racing_leases_in_a_group_one_goes_through(seed: int) -> None:
    """Each store tries another message of the group, whatever it thinks who is the first."""
    rig = Rig()
    stores = await _stores(rig, 3, seed)
    left = [await insert(stores[0], fresh(n, at=NOW + n, group="g")) for n in range(9)]
    while left:
        tried = left[:3]
        outcomes = await asyncio.gather(
            *(apply(store, lease(one, FAR)) for store, one in zip(stores, tried, strict=True))
        )
        held = [(one, outcome) for one, outcome in zip(tried, outcomes, strict=True) if isinstance(outcome, Updated)]
        assert len(held) == 1
        assert {one.cause for one in outcomes if isinstance(one, Conflict)} == {Cause.BLOCKED}
        [(record, updated)] = held
        assert record is left[0]
        gone = random.Random(seed).choice(
            [Remove(record.item, updated.mark), Update(record.item, updated.mark, NOW, False, None, Box.DEAD, b"x")]
        )
        assert not isinstance(await apply(stores[0], gone), Conflict)
        left.remove(record)
        if len(left) < 3:
            break


async def test_one_that_entered_late_does_not_join_one_that_is_held() -> None:
    """The clock of its producer was behind: by its key it is the first, but the pointer is with another."""
    rig = Rig()
    store, other = await rig.store(), await rig.store()
    second = await insert(store, fresh(2, at=NOW + 5, group="g"))
    held = await apply(store, lease(second, FAR))
    assert isinstance(held, Updated)
    first = await insert(other, fresh(1, at=NOW, group="g"))
    assert (await store.ready("default", "q", NOW + 5, limit=10)).records == []
    assert (await other.ready("default", "q", NOW + 5, limit=10)).records == []
    refused = await apply(other, lease(first, FAR))
    assert refused == Conflict(Cause.BLOCKED, first.item.id)
    back = await apply(store, give_back(second.item, held.mark, NOW))
    assert isinstance(back, Updated)
    assert await apply(other, lease(first, FAR)) == refused
    assert isinstance(await apply(store, Remove(second.item, back.mark)), Removed)
    assert isinstance(await apply(other, lease(first, FAR)), Updated)


async def test_an_answer_after_the_lease_does_not_undo_the_next_delivery() -> None:
    rig = Rig()
    store, other = await rig.store(), await rig.store()
    record = await insert(store, fresh(1))
    held = await apply(store, lease(record, NOW + 30_000))
    assert isinstance(held, Updated)
    rig.clock.advance(31)
    [lapsed] = (await other.ready("default", "q", NOW + 31_000, limit=10)).records
    again = await apply(other, lease(lapsed, NOW + 90_000))
    assert isinstance(again, Updated)
    late = await apply(store, Remove(record.item, held.mark))
    assert late == Conflict(Cause.STALE, record.item.id)
    seen = await other.get("default", "q", record.item.id)
    assert seen is not None
    assert seen.mark == again.mark


async def test_who_loses_claims_keeps_out_of_the_way_for_a_while() -> None:
    rig = Rig()
    store, other = await rig.store(), await rig.store()
    records = [await insert(store, fresh(n, at=NOW + n, priority=9 if n < 50 else 0)) for n in range(60)]
    late = NOW + 100

    async def first(limit: int = 5) -> list[int]:
        page = await store.ready("default", "q", late, limit=limit)
        return [int(record.item.id[-12:], 16) for record in page.records]

    assert await first() == [0, 1, 2, 3, 4]
    await other.ready("default", "q", late, limit=5)
    assert isinstance(await apply(other, lease(records[0], FAR)), Updated)
    back = await apply(store, lease(records[0], FAR))
    assert back == Conflict(Cause.STALE, records[0].item.id)
    network = rig.network(store)
    network.reset()
    numbers: list[int] = []
    while len(numbers) < 59:
        page = await first()
        # In order within a page, and none of a lower priority before its turn; nothing twice.
        assert page == sorted(page)
        numbers += page
        for number in page:
            assert isinstance(await apply(store, lease(records[number], FAR)), Updated)
    assert set(numbers[:49]) == set(range(1, 50))
    assert set(numbers[49:]) == set(range(50, 60))
    assert numbers != sorted(numbers)
    # All from one listing; and one that tells who else is there.
    assert network.count("list") == 2


async def test_a_barrier_waits_for_what_was_asked_for_before() -> None:
    rig = Rig()
    store = await rig.store()
    record = await insert(store, fresh(1))
    inner = rig.network(store).inner
    replace = inner.replace

    async def slow(name: str, data: bytes, tag: Any) -> Any:
        for _ in range(50):
            await asyncio.sleep(0)
        return await replace(name, data, tag)

    inner.replace = slow  # type: ignore[method-assign]
    writes = [
        asyncio.ensure_future(apply(store, lease(record, FAR))),
        asyncio.ensure_future(store.commit([Remove(record.item, record.mark), fresh(2, queue="next")])),
    ]
    await asyncio.sleep(0)
    for write in writes:
        write.cancel()
    await apply(store, PutDocument("default", "q", "-", b""))
    before = dict(rig.root.objects)
    await rig.settle(store)
    assert dict(rig.root.objects) == before
    # The claim was first, so the hand-off was refused.
    seen = await store.get("default", "q", record.item.id)
    assert seen is not None
    assert seen.mark.leased
