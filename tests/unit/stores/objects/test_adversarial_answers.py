"""Answers to writes whose reply is lost, and that others write over before it can be told what became of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from tests.unit.stores.objects.late import Scripted, scripted
from tests.unit.stores.objects.rig import DROPPED, LOST, NOW, QUEUE, Rig, apply, fresh, give_back, insert, lease

from millpond.errors import OutcomeUnknown
from millpond.stores.base import (
    Box,
    Cause,
    Conflict,
    DocumentWritten,
    Inserted,
    Op,
    PutDocument,
    PutState,
    Remove,
    Reseal,
    StateWritten,
    Update,
    Updated,
)
from millpond.stores.objects.store import ObjectStore

UNTIL = NOW + 10**6


def overtake(
    network: Scripted, fault: str, part: str, others: Callable[[], Awaitable[object]], write: str = "replace"
) -> None:
    """The next write of such an object meets ``fault``; before it can be read back the others are at work."""
    steps = [write, "read"]

    async def rule(kind: str, name: str) -> str | None:
        if part in name and steps and kind == steps[0]:
            steps.pop(0)
            if steps:
                return fault
            await others()
        return None

    network.rule = rule


async def _held(rig: Rig) -> tuple[ObjectStore, Scripted, ObjectStore, Inserted, Updated]:
    """A store that holds a message, its network, and another store."""
    store, network = await scripted(rig)
    other, _ = await scripted(rig)
    inserted = await insert(store, fresh(1))
    held = await apply(store, lease(inserted, UNTIL))
    assert isinstance(held, Updated)
    return store, network, other, inserted, held


async def _claim(store: ObjectStore) -> None:
    """Somebody is given what is ready."""
    [record] = (await store.ready(*QUEUE, NOW, limit=1)).records
    assert isinstance(await apply(store, lease(record, UNTIL)), Updated)


def _ops(inserted: Inserted, held: Updated) -> dict[str, Op]:
    return {
        "nack": give_back(inserted.item, held.mark, NOW),
        "extend": Update(inserted.item, held.mark, UNTIL + 1, True, None, Box.LIVE, b"longer"),
        "state": PutState(inserted.item, held.mark, None, b"state"),
    }


async def test_a_nack_that_took_place_is_not_said_to_be_refused() -> None:
    """Another consumer was given the message, since it was free."""
    store, network, other, inserted, held = await _held(Rig())
    overtake(network, LOST, "/m/", lambda: _claim(other))
    with pytest.raises(OutcomeUnknown, match="Read the message"):
        await apply(store, _ops(inserted, held)["nack"])


@pytest.mark.parametrize("what", ["extend", "state"])
async def test_a_holder_s_write_that_took_place_is_not_said_to_be_refused(what: str) -> None:
    store, network, other, inserted, held = await _held(Rig())

    async def operator() -> None:
        """Takes the message away from its holder."""
        found = await other.get(*QUEUE, inserted.item.id)
        assert found is not None
        assert isinstance(await apply(other, give_back(found.item, found.mark, NOW)), Updated)

    overtake(network, LOST, "/m/", operator)
    with pytest.raises(OutcomeUnknown):
        await apply(store, _ops(inserted, held)[what])


@pytest.mark.parametrize("what", ["nack", "extend", "state"])
async def test_a_write_that_did_not_take_place_is_made_though_others_changed_the_object(what: str) -> None:
    """What stands there says that it did not: the numbers are those of before."""
    store, network, other, inserted, held = await _held(Rig())

    async def reseal() -> None:
        found = await other.get(*QUEUE, inserted.item.id)
        assert found is not None
        outcome = await apply(other, Reseal(found.item, found.mark, b"new head", b"held", None, None))
        assert isinstance(outcome, Updated)

    overtake(network, DROPPED, "/m/", reseal)
    assert isinstance(await apply(store, _ops(inserted, held)[what]), Updated | StateWritten)
    found = await other.get(*QUEUE, inserted.item.id)
    assert found is not None
    assert found.head == b"new head"


async def test_a_claim_that_others_have_written_over_is_lost_either_way() -> None:
    """Else one lost reply would keep a consumer from all that it asked for at once."""
    rig = Rig()
    store, network = await scripted(rig)
    other, _ = await scripted(rig)
    inserted = await insert(store, fresh(1))
    overtake(network, DROPPED, "/m/", lambda: _claim(other))
    assert await apply(store, lease(inserted, UNTIL)) == Conflict(Cause.STALE, inserted.item.id)


async def test_a_hand_off_that_was_worked_off_is_not_said_to_be_refused() -> None:
    """Its successor came out of a hand-off as well, of which nobody knows yet that it has ended: so a tombstone is left
    under its name."""
    rig = Rig()
    store, network = await scripted(rig)
    other, _ = await scripted(rig)
    inserted = await insert(store, fresh(1))
    held = await apply(store, lease(inserted, UNTIL))
    assert isinstance(held, Updated)
    # The first hand-off's own object stays for a while.
    network.rule = lambda kind, name: _dropped(kind, name, "delete", "/q/m/")
    second = fresh(2, queue="next")
    outcomes = await store.commit([Remove(inserted.item, held.mark), second])
    assert isinstance(outcomes[1], Inserted)
    network.rule = None
    held = await apply(store, lease(outcomes[1], UNTIL))
    assert isinstance(held, Updated)

    async def pass_time() -> None:
        rig.clock.advance(61)
        await other.list("default", "next", Box.LIVE)
        await rig.settle(other)

    overtake(network, LOST, "/next/m/", pass_time)
    with pytest.raises(OutcomeUnknown):
        await store.commit([Remove(outcomes[1].item, held.mark), fresh(3, queue="last")])


async def _dropped(kind: str, name: str, wanted: str, part: str) -> str | None:
    return DROPPED if kind == wanted and part in name else None


@pytest.mark.parametrize("expect", [None, "1"])
async def test_a_document_that_was_written_is_not_said_to_be_refused(expect: str | None) -> None:
    rig = Rig()
    store, network = await scripted(rig)
    other, _ = await scripted(rig)
    if expect is not None:
        assert isinstance(await apply(store, PutDocument(*QUEUE, None, b"first")), DocumentWritten)

    async def others() -> None:
        over = await apply(other, PutDocument(*QUEUE, "1" if expect is None else "2", b"over it"))
        assert isinstance(over, DocumentWritten)

    overtake(network, LOST, "policy", others, "create" if expect is None else "replace")
    with pytest.raises(OutcomeUnknown):
        await apply(store, PutDocument(*QUEUE, expect, b"mine"))


@pytest.mark.parametrize("expect", [None, "1"])
async def test_a_document_that_others_wrote_first_is_said_to_be_refused(expect: str | None) -> None:
    rig = Rig()
    store, network = await scripted(rig)
    other, _ = await scripted(rig)
    if expect is not None:
        assert isinstance(await apply(store, PutDocument(*QUEUE, None, b"first")), DocumentWritten)

    async def others() -> None:
        assert isinstance(await apply(other, PutDocument(*QUEUE, expect, b"theirs")), DocumentWritten)

    overtake(network, DROPPED, "policy", others, "create" if expect is None else "replace")
    assert await apply(store, PutDocument(*QUEUE, expect, b"mine")) == Conflict(Cause.STATE)
