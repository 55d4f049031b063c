"""Acks at the same time share a request, and none is given up for another's trouble."""

from __future__ import annotations

import asyncio

import pytest
from tests.unit.stores.objects.rig import DROPPED, LOST, NOW, REFUSED, Network, Rig, apply, fresh, insert, lease

from millpond.errors import OutcomeUnknown, StoreError
from millpond.stores.base import Conflict, Remove, Removed, Updated
from millpond.stores.objects import deletes
from millpond.stores.objects.deletes import Deletes
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.store import ObjectStore

FAR = NOW + 500_000


async def _held(store: ObjectStore, count: int) -> list[Remove]:
    """The acks of so many messages."""
    acks = []
    for number in range(count):
        record = await insert(store, fresh(number))
        held = await apply(store, lease(record, FAR))
        assert isinstance(held, Updated)
        acks.append(Remove(record.item, held.mark))
    return acks


async def test_acks_at_the_same_time_are_one_request() -> None:
    rig = Rig()
    store = await rig.store()
    acks = await _held(store, 10)
    rig.network(store).reset()
    together = await store.write(acks[:5])
    one_by_one = await asyncio.gather(*(store.write([ack]) for ack in acks[5:]))
    assert together == [Removed()] * 5
    assert one_by_one == [[Removed()]] * 5
    assert [kind for kind, _ in rig.network(store).calls] == ["delete_many", "delete_many"]
    assert [name for name in rig.root.objects if "/m/" in name] == []


async def test_a_stale_ack_among_them_changes_nothing() -> None:
    rig = Rig()
    store, other = await rig.store(), await rig.store()
    acks = await _held(store, 3)
    rig.clock.advance(501)
    [record] = [
        one for one in (await other.ready("default", "q", FAR + 1, limit=9)).records if one.item.id == acks[1].item.id
    ]
    assert isinstance(await apply(other, lease(record, FAR * 2)), Updated)
    outcomes = await store.write(acks)
    assert [type(outcome) for outcome in outcomes] == [Removed, Conflict, Removed]
    assert await other.get("default", "q", acks[1].item.id) is not None


@pytest.mark.parametrize("fault", [LOST, DROPPED, REFUSED])
async def test_a_shared_request_that_fails_is_made_good_one_by_one(fault: str) -> None:
    rig = Rig()
    store = await rig.store()
    acks = await _held(store, 4)
    network = rig.network(store)
    network.reset({1: fault})
    assert await store.write(acks) == [Removed()] * 4
    assert network.calls[0][0] == "delete_many"
    assert network.count("delete_many") == 1
    assert [name for name in rig.root.objects if "/m/" in name] == []


async def test_while_many_are_under_way_the_others_gather() -> None:
    rig = Rig()
    gate = asyncio.Event()
    sizes: list[int] = []

    class Slow(Network):
        async def delete(self, name: str) -> None:
            sizes.append(1)
            await gate.wait()
            await super().delete(name)

        async def delete_many(self, names: list[str]) -> None:
            sizes.append(len(names))
            await super().delete_many(names)

    shared = Deletes(Slow(MemoryBucket(clock=rig.clock)), 1000)
    tasks = []
    for number in range(deletes.FLIGHTS + 150):
        tasks.append(asyncio.create_task(shared.delete(f"object {number}")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert sizes == [1] * deletes.FLIGHTS
    gate.set()
    await asyncio.gather(*tasks)
    assert sizes == [1] * deletes.FLIGHTS + [deletes.MOST, 50]


async def test_where_the_cloud_deletes_one_at_a_time_nothing_waits() -> None:
    rig = Rig()
    network = Network(MemoryBucket(clock=rig.clock))
    alone = Deletes(network, 1)
    await asyncio.gather(*(alone.delete(f"object {number}") for number in range(3)))
    assert [kind for kind, _ in network.calls] == ["delete"] * 3


async def test_who_is_cancelled_leaves_the_others_alone() -> None:
    rig = Rig()
    network = Network(MemoryBucket(clock=rig.clock), {1: REFUSED})
    shared = Deletes(network, 1000)
    first, second = (asyncio.create_task(shared.delete(name)) for name in ("a", "b"))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(OutcomeUnknown, match="some of 2 objects"):
        await second
    network.plan = {2: REFUSED}
    with pytest.raises(StoreError, match="refused"):
        await shared.delete("alone")
    assert first.cancelled()
