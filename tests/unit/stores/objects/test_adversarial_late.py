"""Requests that take effect after they were given up, and processes that stand still between two of them."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from tests.unit.stores.objects.late import LATE, script, scripted
from tests.unit.stores.objects.rig import (
    DROPPED,
    LOST,
    NOW,
    REFUSED,
    Rig,
    apply,
    fresh,
    give_back,
    insert,
    lease,
    picture,
)

from millpond.errors import OutcomeUnknown, StoreError
from millpond.stores.base import Box, Cause, Conflict, Inserted, Mark, Op, Remove, Removed, Unique, Update, Updated
from millpond.stores.objects import names
from millpond.stores.objects.bucket import ObjectChanged, Tag
from millpond.stores.objects.store import ObjectStore

UNTIL = NOW + 10**6


async def _held(store: ObjectStore, number: int = 1) -> Remove:
    """A message that the store holds, and its removal."""
    inserted = await insert(store, fresh(number))
    held = await apply(store, lease(inserted, UNTIL))
    assert isinstance(held, Updated)
    return Remove(inserted.item, held.mark)


async def _use_up(store: ObjectStore, queue: str) -> list[str]:
    """Claim and ack all that is ready; the ids."""
    used = []
    for record in (await store.ready("default", queue, NOW, limit=100)).records:
        held = await apply(store, lease(record, UNTIL))
        assert isinstance(held, Updated), held
        assert isinstance(await apply(store, Remove(record.item, held.mark)), Removed)
        used.append(record.item.id)
    return used


async def test_a_late_create_of_a_successor_does_not_bring_it_back_after_its_ack() -> None:
    rig = Rig()
    store, network = await scripted(rig)
    other, _ = await scripted(rig)
    removal = await _held(store)
    successor = fresh(2, queue="next")
    network.rule = script(("create", "/next/m/", LATE))
    outcomes = await store.commit([removal, successor])
    assert isinstance(outcomes[1], Inserted)
    assert await _use_up(other, "next") == [successor.item.id]
    await network.arrive()
    assert await picture(await rig.rescue()) == {}


@pytest.mark.parametrize("pause", [45, 90, 200])
async def test_who_stands_still_before_finishing_a_hand_off_brings_nothing_back(pause: int) -> None:
    """The intent is written; then the process sleeps, as machines do; others finish it, and use up what it brought."""
    rig = Rig()
    store, network = await scripted(rig)
    other, _ = await scripted(rig)
    removal = await _held(store)
    successor = fresh(2, queue="next")
    used: list[str] = []
    replace = network.replace

    async def and_then_sleep(name: str, data: bytes, tag: Tag) -> Tag:
        written = await replace(name, data, tag)
        rig.clock.jump(pause)
        if not used:
            for _ in range(2):
                await other.list("default", "q", Box.LIVE)
                await rig.settle(other)
            used.extend(await _use_up(other, "next"))
        return written

    network.replace = and_then_sleep  # type: ignore[method-assign]
    await store.commit([removal, successor])
    after = await rig.rescue()
    used.extend(await _use_up(after, "next"))
    await rig.rescue()
    assert used == [successor.item.id]
    assert await picture(after) == {}


async def test_a_claim_that_was_given_up_and_then_refused_is_not_said_to_have_failed() -> None:
    rig = Rig()
    store, network = await scripted(rig)
    inserted = await insert(store, fresh(1))
    network.rule = script(("replace", "/m/", LATE), ("replace", "/m/", REFUSED))
    with pytest.raises(OutcomeUnknown):
        await apply(store, lease(inserted, UNTIL))
    await network.arrive()
    found = await store.get("default", "q", inserted.item.id)
    assert found is not None
    assert found.mark.leased


async def test_a_hand_off_that_was_given_up_and_then_refused_keeps_its_keys() -> None:
    """Its intent arrives after all: the unique key of what it brings must not have been given back meanwhile."""
    rig = Rig()
    store, network = await scripted(rig)
    other, _ = await scripted(rig)
    removal = await _held(store)
    successor = fresh(2, queue="next", unique=Unique("key", NOW, UNTIL))
    network.rule = script(("replace", "/q/m/", LATE), ("replace", "/q/m/", REFUSED))
    with pytest.raises(OutcomeUnknown):
        await store.commit([removal, successor])
    await network.arrive()
    again = await apply(other, fresh(3, queue="next", unique=Unique("key", NOW, UNTIL)))
    assert again == Conflict(Cause.UNIQUE, successor.item.id)
    assert list(await picture(await rig.rescue())) == [successor.item.id]


@pytest.mark.parametrize("refused", ["read", "replace"])
async def test_an_ack_whose_delete_may_still_come_is_not_said_to_have_failed(refused: str) -> None:
    rig = Rig()
    store, network = await scripted(rig)
    removal = await _held(store)
    deletes = [("delete", "/m/", LATE)] * (3 if refused == "replace" else 1)
    network.rule = script(*deletes, (refused, "/m/", REFUSED))
    with pytest.raises(OutcomeUnknown):
        await apply(store, removal)
    await network.arrive()
    assert await picture(store) == {}


async def test_an_ack_whose_second_delete_is_refused_goes_through() -> None:
    rig = Rig()
    store, network = await scripted(rig)
    removal = await _held(store)
    network.rule = script(("delete", "/m/", LATE), ("delete", "/m/", REFUSED))
    assert isinstance(await apply(store, removal), Removed)
    await network.arrive()
    assert await picture(store) == {}


async def test_after_an_ack_whose_delete_may_still_come_nobody_is_given_the_message() -> None:
    """Else the delete would strike the next holder, whose hand-off it would undo."""
    rig = Rig()
    store, network = await scripted(rig)
    other, others = await scripted(rig)
    removal = await _held(store)
    network.rule = script(*[("delete", "/m/", LATE)] * 3, ("replace", "/m/", REFUSED))
    with pytest.raises(StoreError):
        await apply(store, removal)
    with suppress(StoreError):
        await apply(store, give_back(removal.item, removal.mark, NOW))
    brought: list[str] = []
    for record in (await other.ready("default", "q", NOW, limit=10)).records:
        held = await apply(other, lease(record, UNTIL))
        assert isinstance(held, Updated)
        successor = fresh(2, queue="next")
        # The intent is written, and then its writer dies.
        others.rule = script(*[("create", "/next/m/", REFUSED)] * 20)
        assert isinstance((await other.commit([Remove(record.item, held.mark), successor]))[0], Removed)
        brought.append(successor.item.id)
    await network.arrive()
    assert list(await picture(await rig.rescue())) == brought


@pytest.mark.parametrize("with_chosen", [False, True])
async def test_a_late_insert_does_not_give_a_key_twice(with_chosen: bool) -> None:
    """Its caller repeats it under the key, as the error says; then the first one arrives."""
    rig = Rig()
    store, network = await scripted(rig)
    other, _ = await scripted(rig)
    unique = None if with_chosen else Unique("key", NOW, UNTIL)
    network.rule = script(("create", "/m/", LATE))
    with pytest.raises(OutcomeUnknown):
        await apply(store, fresh(1, unique=unique, chosen=with_chosen))
    again = await apply(other, fresh(1 if with_chosen else 2, unique=unique, chosen=with_chosen))
    assert isinstance(again, Inserted)
    await network.arrive()
    third, _ = await scripted(rig)
    page = await third.list("default", "q", Box.LIVE)
    assert [record.item.id for record in page.records] == [again.item.id]


async def test_an_insert_that_takes_long_does_not_share_its_key() -> None:
    """Its request for the message is held up; another process loses patience and takes the key over."""
    rig = Rig()
    store, network = await scripted(rig)
    other, _ = await scripted(rig)
    outcomes: list[object] = []

    async def rule(kind: str, name: str) -> str | None:
        if kind == "create" and "/m/" in name and not outcomes:
            outcomes.append(await apply(other, fresh(2, unique=Unique("key", NOW, UNTIL))))
        if kind == "replace" and "/u/" in name:
            # It is slow from now on, and consumers are not.
            await _use_up(other, "q")
        return None

    network.rule = rule
    outcome = await apply(store, fresh(1, unique=Unique("key", NOW, UNTIL)))
    assert isinstance(outcomes[0], Inserted)
    assert outcome == Conflict(Cause.UNIQUE, outcomes[0].item.id)


async def test_a_marker_is_not_deleted_long_after_it_was_said_to_go() -> None:
    """The reply to that took long, and others take the key over just before the delete."""
    rig = Rig()
    store, network = await scripted(rig)
    other, _ = await scripted(rig)
    await insert(store, fresh(1, unique=Unique("key", NOW - 10, NOW)))
    taken: list[Inserted] = []

    async def rule(kind: str, name: str) -> str | None:
        if kind == "replace" and "/u/" in name:
            return LOST
        if kind == "read" and "/u/" in name and network.calls[-1][0] == "replace":
            # The time-out of the request before.
            rig.clock.advance(31)
        if kind == "delete" and "/u/" in name:
            taken.append(await insert(other, fresh(2, unique=Unique("key", NOW, UNTIL))))
        return None

    network.rule = rule
    await store.sweep(NOW, older_than=10**9, limit=100)
    taken = taken or [await insert(other, fresh(2, unique=Unique("key", NOW, UNTIL)))]
    again = await apply(other, fresh(3, unique=Unique("key", NOW, UNTIL)))
    assert again == Conflict(Cause.UNIQUE, taken[0].item.id)


async def test_two_sweeps_do_not_delete_a_marker_and_the_next_one() -> None:
    """The first one's delete is late; the second one must not make room for a marker that it would strike."""
    rig = Rig()
    store, network = await scripted(rig)
    other, _ = await scripted(rig)
    await insert(store, fresh(1, unique=Unique("key", NOW - 10, NOW)))
    network.rule = script(("delete", "/u/", LATE))
    with suppress(StoreError):
        await store.sweep(NOW, older_than=10**9, limit=100)
    await other.sweep(NOW, older_than=10**9, limit=100)
    work = asyncio.create_task(insert(other, fresh(2, unique=Unique("key", NOW, UNTIL))))
    for _ in range(20):
        await asyncio.sleep(0)
    await network.arrive()
    taken = await work
    again = await apply(other, fresh(3, unique=Unique("key", NOW, UNTIL)))
    assert again == Conflict(Cause.UNIQUE, taken.item.id)


async def test_the_deletes_of_what_is_used_again_are_sent_once() -> None:
    rig = Rig()
    store, network = await scripted(rig)
    await insert(store, fresh(1, unique=Unique("key", NOW - 10, NOW)))
    chosen = await insert(store, fresh(2, chosen=True, group="g"))
    for record in (await store.ready("default", "q", NOW, limit=9)).records:
        held = await apply(store, lease(record, UNTIL))
        assert isinstance(held, Updated)
        assert isinstance(await apply(store, Remove(record.item, held.mark)), Removed)
    assert network.once == []
    rig.clock.advance(3700)
    await store.sweep(NOW, older_than=10**9, limit=100)
    gone = [names.unique_marker("default", "q", "key"), names.id_marker("default", "q", chosen.item.id)]
    assert sorted(network.once) == sorted([*gone, names.pointer("default", "q", names.group_hash("g"))])


@pytest.mark.parametrize("fault", ["dropped", LATE, LOST])
async def test_a_sweep_leaves_a_delete_whose_reply_is_lost_to_the_next_one(fault: str) -> None:
    """It goes on with the others, and sends it no second time."""
    rig = Rig()
    store, network = await scripted(rig)
    for number in range(3):
        await insert(store, fresh(number, unique=Unique(f"key {number}", NOW - 10, NOW)))
    network.rule = script(("delete", "/u/", fault))
    assert await store.sweep(NOW, older_than=10**9, limit=100) == 2
    assert len(set(network.once)) == len(network.once) == 3
    rig.clock.advance(31)
    assert await store.sweep(NOW, older_than=10**9, limit=100) == (0 if fault == LOST else 1)
    await network.arrive()
    assert [name for name in rig.root.objects if "/u/" in name] == []


async def test_a_pointer_is_not_deleted_long_after_it_was_said_to_go() -> None:
    """Two messages of a group would be held at once: the pointer to the first of them is gone, and one with an earlier
    key has come since."""
    rig = Rig()
    store, network = await scripted(rig)
    other, _ = await scripted(rig)
    first = await insert(store, fresh(1, group="g"))
    held = await apply(store, lease(first, UNTIL))
    assert isinstance(held, Updated)
    assert isinstance(await apply(store, Remove(first.item, held.mark)), Removed)
    rig.clock.advance(3700)
    leased: list[Mark] = []

    async def claim() -> None:
        second = await insert(other, fresh(3, group="g"))
        outcome = await apply(other, lease(second, UNTIL + 10**8))
        assert isinstance(outcome, Updated)
        leased.append(outcome.mark)

    async def rule(kind: str, name: str) -> str | None:
        if kind == "replace" and "/g/" in name:
            return LOST
        if kind == "read" and "/g/" in name and network.calls[-1][0] == "replace":
            rig.clock.advance(31)
        if kind == "delete" and "/g/" in name:
            await claim()
        return None

    network.rule = rule
    await store.sweep(NOW, older_than=10**9, limit=100)
    if not leased:
        await claim()
    third, _ = await scripted(rig)
    early = await insert(third, fresh(2, group="g"))
    assert isinstance(await apply(third, lease(early, UNTIL + 10**8)), Conflict)


async def test_a_key_stays_taken_though_its_message_is_used_up_before_it_is_confirmed() -> None:
    rig = Rig()
    store, network = await scripted(rig)
    other, _ = await scripted(rig)
    outcomes: list[object] = []

    async def rule(kind: str, name: str) -> str | None:
        if kind == "replace" and "/u/" in name and not outcomes:
            await _use_up(other, "q")
            outcomes.append(await apply(other, fresh(2, unique=Unique("key", NOW, UNTIL))))
        return None

    network.rule = rule
    outcomes.append(await apply(store, fresh(1, unique=Unique("key", NOW, UNTIL))))
    assert sum(isinstance(outcome, Inserted) for outcome in outcomes) == 1


async def test_a_key_stays_taken_though_its_marker_could_not_be_confirmed_at_first() -> None:
    rig = Rig()
    store, network = await scripted(rig)
    other, _ = await scripted(rig)
    network.rule = script(("replace", "/u/", REFUSED))
    first = await insert(store, fresh(1, unique=Unique("key", NOW, UNTIL)))
    await rig.settle(store)
    assert await _use_up(other, "q") == [first.item.id]
    again = await apply(other, fresh(2, unique=Unique("key", NOW, UNTIL)))
    assert again == Conflict(Cause.UNIQUE, first.item.id)


async def _unconfirmed(rig: Rig, key: Unique) -> str:
    """A message whose producer died before he could confirm its key."""
    store, network = await scripted(rig)
    network.rule = script(("replace", "/u/", REFUSED))
    return (await insert(store, fresh(1, unique=key))).item.id


async def test_a_key_stays_taken_though_its_message_was_redriven_before_it_was_confirmed() -> None:
    """The pending marker tells the name that the message had at first."""
    rig = Rig()
    key = Unique("key", NOW, UNTIL)
    first = await _unconfirmed(rig, key)
    other, _ = await scripted(rig)
    for box in (Box.DEAD, Box.LIVE):
        [record] = (await other.list("default", "q", Box.LIVE if box is Box.DEAD else Box.DEAD)).records
        moved = await apply(other, Update(record.item, record.mark, NOW, False, None, box, b"moved"))
        assert isinstance(moved, Updated)
    assert await apply(other, fresh(2, unique=key)) == Conflict(Cause.UNIQUE, first)
    assert list(await picture(other)) == [first]


@pytest.mark.parametrize("how", ["removed", "redriven", "handed off"])
@pytest.mark.parametrize("step", ["read", "replace"])
@pytest.mark.parametrize("fault", [REFUSED, DROPPED])
async def test_a_message_stays_while_its_key_cannot_be_confirmed(how: str, step: str, fault: str) -> None:
    rig = Rig()
    key = Unique("key", NOW, UNTIL)
    first = await _unconfirmed(rig, key)
    other, network = await scripted(rig)
    if how == "redriven":
        [live] = (await other.list("default", "q", Box.LIVE)).records
        await apply(other, Update(live.item, live.mark, NOW, False, None, Box.DEAD, b"dead"))
    [record] = (await other.list("default", "q", Box.DEAD if how == "redriven" else Box.LIVE)).records
    before = await picture(other)

    async def rule(kind: str, name: str) -> str | None:
        return fault if kind == step and "/u/" in name else None

    network.rule = rule
    removal = Remove(record.item, record.mark)
    ways: dict[str, list[Op]] = {
        "removed": [removal],
        "redriven": [Update(record.item, record.mark, NOW, False, None, Box.LIVE, b"again")],
        "handed off": [removal, fresh(3, queue="next")],
    }
    with pytest.raises(StoreError) as raised:
        await other.commit(ways[how])
    assert not isinstance(raised.value, OutcomeUnknown)
    assert await picture(other) == before
    # The process dies here, and the next one is luckier.
    after, _ = await scripted(rig)
    assert await apply(after, fresh(2, unique=key)) == Conflict(Cause.UNIQUE, first)
    assert isinstance(await apply(after, removal), Removed)
    assert await apply(after, fresh(2, unique=key)) == Conflict(Cause.UNIQUE, first)


async def test_a_damaged_marker_does_not_hold_up_its_message() -> None:
    rig = Rig()
    key = Unique("key", NOW, UNTIL)
    await _unconfirmed(rig, key)
    other, _ = await scripted(rig)
    path = names.unique_marker("default", "q", "key")
    content = await rig.root.read(path)
    assert content is not None
    await rig.root.replace(path, b"damaged", content.tag)
    [record] = (await other.list("default", "q", Box.LIVE)).records
    assert isinstance(await apply(other, Remove(record.item, record.mark)), Removed)
    assert await picture(other) == {}


@pytest.mark.parametrize("what", ["/m/", "/u/"])
async def test_a_removal_that_may_take_place_yet_is_not_said_to_have_failed(what: str) -> None:
    """Its delete was given up, and what it would do next is refused."""
    rig = Rig()
    key = Unique("key", NOW, UNTIL)
    await _unconfirmed(rig, key)
    store, network = await scripted(rig, index_entries=1)
    [record] = (await store.ready("default", "q", NOW, limit=1)).records
    held = await apply(store, lease(record, UNTIL))
    assert isinstance(held, Updated)
    deleted = 0

    async def rule(kind: str, name: str) -> str | None:
        nonlocal deleted
        if kind == "delete":
            deleted += 1
            return LATE
        if kind == "replace" and "/m/" in name:
            # Somebody else has rewritten it meanwhile: so it has to be read again.
            raise ObjectChanged("it was replaced")
        refused = deleted == 3 and what in name and kind == "read" and network.count("replace") > 1
        return REFUSED if refused else None

    network.rule = rule
    with pytest.raises(OutcomeUnknown):
        await apply(store, Remove(record.item, held.mark))
    assert deleted
    await network.arrive()
    assert await picture(await rig.store()) == {}


async def test_a_removal_that_took_place_long_ago_is_not_said_to_have_failed() -> None:
    """The tombstone was written, its reply lost, and others have cleared it away since."""
    rig = Rig()
    store, network = await scripted(rig)
    other, _ = await scripted(rig)
    inserted = await insert(store, fresh(1))
    network.rule = script(("replace", "/m/", LOST))
    real_pause = store._engine.exchange.pause

    async def long_pause(attempt: int) -> None:
        rig.clock.advance(61)
        await other.list("default", "q", Box.LIVE)
        await rig.settle(other)
        await real_pause(attempt)

    store._engine.exchange.pause = long_pause  # type: ignore[method-assign]
    try:
        outcome = await apply(store, Remove(inserted.item, inserted.mark))
    except OutcomeUnknown:
        return
    assert isinstance(outcome, Removed)
