"""Hand-offs and inserts whose keys are taken over because they are slow, by others who then succeed, fail or die."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from tests.unit.stores.objects.late import Scripted, script, scripted
from tests.unit.stores.objects.rig import BEFORE, NOW, QUEUE, REFUSED, Rig, apply, fresh, insert, lease, picture

from millpond.errors import OutcomeUnknown, StoreError
from millpond.stores.base import Box, Cause, Conflict, Insert, Inserted, Remove, Removed, Unique, Updated
from millpond.stores.objects import names
from millpond.stores.objects.store import ObjectStore

UNTIL = NOW + 10**6
KEY = Unique("key", NOW, UNTIL)


async def _held(store: ObjectStore) -> Remove:
    inserted = await insert(store, fresh(1))
    held = await apply(store, lease(inserted, UNTIL))
    assert isinstance(held, Updated)
    return Remove(inserted.item, held.mark)


def _successor(number: int, kind: str) -> Insert:
    if kind == "key":
        return fresh(number, queue="next", unique=KEY)
    return fresh(9, queue="next", chosen=True)


def before(network: Scripted, wanted: str, part: str, others: Callable[[], Awaitable[object]]) -> None:
    """Such a request is held up until the others have done their work."""
    waiting = ["once"]

    async def rule(kind: str, name: str) -> str | None:
        if waiting and kind == wanted and part in name:
            waiting.clear()
            await others()
        return None

    network.rule = rule


@pytest.mark.parametrize("kind", ["key", "id"])
@pytest.mark.parametrize("fate", ["fails", "dies before its message", "dies before it takes over", "succeeds"])
async def test_the_successor_of_a_slow_hand_off_is_never_lost(kind: str, fate: str) -> None:
    rig = Rig()
    store, network = await scripted(rig)
    other, others = await scripted(rig)
    removal = await _held(store)
    taker = _successor(3, kind)
    successor = _successor(2, kind)
    marker = "/u/" if kind == "key" else "/i/"
    own = f"{names.hex_id(taker.item.id)}-7-"

    async def take() -> None:
        steps = {
            "fails": [("create", own, REFUSED)],
            "dies before its message": [("create", own, BEFORE)],
            "dies before it takes over": [("replace", marker, BEFORE)],
            "succeeds": [],
        }[fate]

        async def rule(request: str, name: str) -> str | None:
            if others.crashed:
                raise StoreError("it is dead")
            for wanted, part, fault in steps:
                if request == wanted and part in name:
                    others.crashed = fault == BEFORE
                    return REFUSED
            return None

        others.rule = rule
        if fate == "succeeds":
            assert isinstance(await apply(other, taker), Inserted)
        else:
            with pytest.raises(StoreError):
                await apply(other, taker)

    before(network, "replace", "/q/m/", take)
    outcomes = await store.commit([removal, successor])
    left = await picture(await rig.rescue())
    if fate == "succeeds":
        cause = Cause.UNIQUE if kind == "key" else Cause.EXISTS
        assert outcomes == [Conflict(Cause.ABORTED), Conflict(cause, taker.item.id)]
        assert sorted(left) == sorted([removal.item.id, taker.item.id])
    else:
        assert [type(outcome) for outcome in outcomes] == [Removed, Inserted]
        assert list(left) == [successor.item.id]


async def test_a_late_intent_does_not_bring_what_others_took_over() -> None:
    """Its reply was given up; the key is another's by the time it arrives, so it is refused."""
    rig = Rig()
    store, network = await scripted(rig)
    other, _ = await scripted(rig)
    removal = await _held(store)
    network.rule = script(*[("replace", "/q/m/", "late")] * 20)
    with pytest.raises(OutcomeUnknown):
        await store.commit([removal, _successor(2, "key")])
    winner = await insert(other, _successor(3, "key"))
    await network.arrive()
    left = await picture(await rig.rescue())
    assert sorted(left) == sorted([removal.item.id, winner.item.id])


async def test_a_successor_stays_though_its_key_has_ended_before_it_was_brought() -> None:
    """Its writer died once the intent was there; the key is another's when that is finished."""
    rig = Rig()
    store, network = await scripted(rig)
    removal = await _held(store)
    successor = fresh(2, queue="next", unique=Unique("key", NOW, NOW + 1000))

    async def rule(kind: str, name: str) -> str | None:
        return REFUSED if kind == "create" and "/next/m/" in name else None

    network.rule = rule
    outcomes = await store.commit([removal, successor])
    assert isinstance(outcomes[1], Inserted)
    other, _ = await scripted(rig)
    later = await insert(other, fresh(3, queue="next", unique=Unique("key", NOW + 2000, UNTIL)))
    left = await picture(await rig.rescue())
    assert sorted(left) == sorted([successor.item.id, later.item.id])


async def test_an_insert_is_not_a_duplicate_of_one_that_never_came() -> None:
    """Whoever took its key over, and fenced its message off, dies before his own is there."""
    rig = Rig()
    store, network = await scripted(rig)
    other, others = await scripted(rig)

    async def take() -> None:
        async def rule(kind: str, name: str) -> str | None:
            if others.crashed:
                raise StoreError("it is dead")
            if kind == "create" and "/m/" in name and names.parse(name).id == fresh(3).item.id:
                others.crashed = True
                return REFUSED
            return None

        others.rule = rule
        with pytest.raises(StoreError):
            await apply(other, fresh(3, unique=KEY))

    before(network, "create", "/m/", take)
    with pytest.raises(StoreError, match="try again"):
        await apply(store, fresh(2, unique=KEY))
    await insert(store, fresh(4, unique=KEY))
    assert [record.item.id for record in (await store.list(*QUEUE, Box.LIVE)).records] == [fresh(4).item.id]


@pytest.mark.parametrize("hand_off", [True, False])
async def test_an_id_is_not_given_twice_by_who_stood_still_for_hours(hand_off: bool) -> None:
    """A sweep has removed his marker, and others have used the id since."""
    rig = Rig()
    store, network = await scripted(rig)
    other, _ = await scripted(rig)
    first, second = fresh(9, queue="next", chosen=True), fresh(9, at=NOW + 1, queue="next", chosen=True)

    async def hours_pass() -> None:
        rig.clock.jump(7200)
        await other.sweep(NOW, older_than=10**9, limit=10)
        assert [name for name in rig.root.objects if "/next/i/" in name] == []
        assert isinstance(await apply(other, second), Inserted)

    removal = await _held(store) if hand_off else None
    before(network, "replace" if hand_off else "create", "/q/m/" if hand_off else "/next/m/", hours_pass)
    if removal is not None:
        assert await store.commit([removal, first]) == [
            Conflict(Cause.ABORTED),
            Conflict(Cause.EXISTS, second.item.id),
        ]
    else:
        assert await apply(store, first) == Conflict(Cause.EXISTS, second.item.id)
    after = await rig.rescue()
    assert [record.mark.due for record in (await after.list("default", "next", Box.LIVE)).records] == [NOW + 1]
