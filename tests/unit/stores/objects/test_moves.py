"""Moves and hand-offs whose writer dies on the way: others go on, finish it, and bring nothing back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.unit.stores.objects.rig import (
    AFTER,
    BEFORE,
    LOST,
    NOW,
    REFUSED,
    Crash,
    Rig,
    apply,
    fresh,
    insert,
    lease,
    picture,
)
from tests.unit.stores.objects.test_faults import SCENES

from millpond.errors import StoreError
from millpond.stores.base import Box, Cause, Conflict, Remove, Removed, Update, Updated
from millpond.stores.objects import names, records
from millpond.stores.objects.records import Kind
from millpond.stores.objects.store import ObjectStore

MOVES = ("hand off", "hand off from a large one", "bury", "bury one of a group", "redrive", "make a delayed one due")


async def _interrupted(name: str, at: int, fault: str = AFTER) -> tuple[Rig, bool]:
    """A rig in which somebody died in the middle of it; whether he had finished."""
    rig = Rig()
    store = await rig.store()
    prepared = await SCENES[name].prepare(store)
    rig.network(store).reset({at: fault})
    done = False
    try:
        await SCENES[name].act(store, prepared)
        done = not rig.network(store).crashed
    except StoreError:
        pass
    await store.close()
    return rig, done


async def _points(name: str) -> int:
    rig = Rig()
    store = await rig.store()
    prepared = await SCENES[name].prepare(store)
    rig.network(store).reset()
    await SCENES[name].act(store, prepared)
    return len(rig.network(store).calls)


async def _use_up(store: ObjectStore, now: int, acked: list[str]) -> None:
    """Deliver and ack what is there, dead letters too."""
    for queue in ("q", "next"):
        while records_ := (await store.ready("default", queue, now, limit=10)).records:
            for record in records_:
                held = await apply(store, lease(record, now + 10**6))
                assert isinstance(held, Updated), held
                assert isinstance(await apply(store, Remove(record.item, held.mark)), Removed)
                acked.append(record.item.id)
        for record in (await store.list("default", queue, Box.DEAD)).records:
            assert isinstance(await apply(store, Remove(record.item, record.mark)), Removed)
            acked.append(record.item.id)


@pytest.mark.parametrize("name", MOVES)
async def test_what_was_used_up_does_not_come_back(name: str) -> None:
    """While the intent is there, others ack all that it has brought so far; then it is finished."""
    for at in range(1, await _points(name) + 1):
        rig, _ = await _interrupted(name, at)
        acked: list[str] = []
        other = await rig.store()
        # Leases of the dead are over; nothing is old enough to be finished by others.
        later = NOW + 600_000
        await _use_up(other, later, acked)
        await rig.settle(other)
        assert len(acked) == len(set(acked)), f"delivered twice, after request {at}"
        third = await rig.rescue()
        await _use_up(third, later, acked)
        assert len(acked) == len(set(acked)), f"what was acked came back, after request {at}"
        last = await rig.rescue()
        assert await picture(last) == {}, f"something was left, after request {at}"
        assert await last.verify() == []


@pytest.mark.parametrize(
    ("name", "fault"),
    [(name, fault) for name in MOVES for fault in (BEFORE, AFTER)] + [("redrive", LOST), ("hand off", REFUSED)],
)
async def test_who_finishes_it_may_die_as_well(name: str, fault: str) -> None:
    whole = await picture(await (await _interrupted(name, 0))[0].rescue())
    points = await _points(name)
    none = await picture(await (await _interrupted(name, 1, BEFORE))[0].rescue())
    assert whole != none
    for at in range(1, points + 1):
        number = 0
        while True:
            number += 1
            rig, _ = await _interrupted(name, at)
            rig.clock.advance(61)
            second = await rig.store()
            network = rig.network(second)
            network.reset({number: fault})
            try:
                for queue in await second.queues():
                    for box in Box:
                        await second.list(*queue, box, limit=1000)
                await rig.settle(second)
            except StoreError:
                pass
            struck = len(network.calls) >= number
            await second.close()
            third = await rig.rescue()
            assert await picture(third) in (whole, none), f"after request {at}, then {number}"
            assert await third.verify() == []
            if not struck:
                break
        assert number > 1


async def test_of_several_who_finish_it_one_does() -> None:
    for at in range(4, await _points("hand off") + 1):
        rig, _ = await _interrupted("hand off", at)
        rig.clock.advance(61)
        stores = [await rig.store() for _ in range(3)]
        await asyncio.gather(*(store.list("default", "q", Box.LIVE) for store in stores))
        for store in stores:
            await rig.settle(store)
        assert sum(store.statistics()["moves_finished"] for store in stores) <= 1
        found = await picture(await rig.rescue())
        assert len(found) in (1, 5)


async def test_an_intent_is_left_to_its_writer_while_it_is_young() -> None:
    points = await _points("bury")
    left = 0
    for at in range(1, points + 1):
        rig, _ = await _interrupted("bury", at)
        moving = [name for name, data in rig.root.objects.items() if len(data) % 16 == Kind.MOVING and "/m/" in name]
        left += len(moving)
        rig.clock.advance(59)
        other = await rig.store()
        await other.list("default", "q", Box.LIVE)
        await rig.settle(other)
        assert [name for name in rig.root.objects if name in moving] == moving
        for name in moving:
            # Nor by who listed it when it was old, and before somebody else took it over.
            assert not await other._moves.rescue(names.parse(name))
            assert name in rig.root.objects
        if moving:
            # It is found all the same, where it is going.
            id = records.decode_held(rig.root.objects[moving[0]], moving[0]).id  # type: ignore[union-attr]
            found = await other.get("default", "q", id)
            assert found is not None
            assert found.mark.box is Box.DEAD
    assert left > 0


async def test_a_move_goes_through_though_it_cannot_be_finished() -> None:
    rig = Rig()
    store = await rig.store()
    record = await insert(store, fresh(1))
    network = rig.network(store)
    # The intent is written; then the bucket refuses everything.
    network.reset(dict.fromkeys(range(2, 50), REFUSED))
    outcome = await apply(store, Update(record.item, record.mark, NOW, False, None, Box.DEAD, b"dead"))
    assert isinstance(outcome, Updated)
    network.reset()
    assert (await store.list("default", "q", Box.LIVE)).records == []
    other = await rig.rescue()
    assert [one.status for one in (await other.list("default", "q", Box.DEAD)).records] == [b"dead"]


async def test_a_refused_hand_off_leaves_its_keys_free() -> None:
    from millpond.stores.base import Unique

    rig = Rig()
    store, other = await rig.store(), await rig.store()
    first = await insert(other, fresh(1, queue="next", unique=Unique("a", NOW, NOW + 10**9)))
    record = await insert(store, fresh(2))
    ops: list[Any] = [
        Remove(record.item, record.mark),
        fresh(3, queue="next", unique=Unique("b", NOW, NOW + 10**9)),
        fresh(4, queue="next", chosen=True),
        fresh(5, queue="next", unique=Unique("a", NOW, NOW + 10**9)),
    ]
    outcomes = await store.commit(ops)
    assert [type(outcome) for outcome in outcomes] == [Conflict] * 4
    assert outcomes[3].id == first.item.id  # type: ignore[union-attr]
    assert await store.get("default", "q", record.item.id) is not None
    await insert(other, fresh(6, queue="next", unique=Unique("b", NOW, NOW + 10**9)))
    await insert(other, fresh(4, queue="next", chosen=True))


async def test_a_hand_off_that_was_overtaken_is_refused() -> None:
    """Its marker looked abandoned and was taken over; in the end one message has the key."""
    from millpond.stores.base import Unique

    rig = Rig()
    store = await rig.store()
    record = await insert(store, fresh(2))
    key = Unique("a", NOW, NOW + 10**9)
    network = rig.network(store)
    network.reset()
    gate, reached = asyncio.Event(), asyncio.Event()
    replace = network.inner.replace

    async def slow(name: str, data: bytes, tag: Any) -> Any:
        if "/m/" in name:
            reached.set()
            await gate.wait()
        return await replace(name, data, tag)

    network.inner.replace = slow  # type: ignore[method-assign]
    handing = asyncio.ensure_future(
        store.commit([Remove(record.item, record.mark), fresh(3, queue="next", unique=key)])
    )
    await reached.wait()
    other = await rig.store()
    winner = await insert(other, fresh(4, queue="next", unique=key))
    gate.set()
    outcomes = await handing
    assert outcomes == [Conflict(Cause.ABORTED), Conflict(Cause.UNIQUE, winner.item.id)]
    assert sorted(await picture(await rig.rescue())) == sorted([record.item.id, winner.item.id])


def test_crashes_are_store_errors() -> None:
    assert issubclass(Crash, StoreError)


async def test_a_dead_letter_that_was_redriven_at_once_does_not_come_back_as_one() -> None:
    """Who buried it died before the intent was gone; by then it has been redriven and acked."""
    redriven = 0
    for at in range(1, await _points("bury") + 1):
        rig, _ = await _interrupted("bury", at)
        other = await rig.store()
        later = NOW + 600_000
        for record in (await other.list("default", "q", Box.DEAD)).records:
            back = Update(record.item, record.mark, later, False, None, Box.LIVE, b"again")
            assert isinstance(await apply(other, back), Updated)
            redriven += 1
        acked: list[str] = []
        await _use_up(other, later, acked)
        third = await rig.rescue()
        await _use_up(third, later, acked)
        assert len(acked) == 1, f"after request {at}"
        assert await picture(await rig.rescue()) == {}
    assert redriven > 1
