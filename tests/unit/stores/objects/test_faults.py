"""Each request of each operation goes wrong once, in each way that a request can. Whatever happens, the operation has
been done or has not, its caller is not told otherwise, and the queue goes on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import pytest
from tests.unit.stores.objects.rig import (
    AFTER,
    BEFORE,
    DROPPED,
    LOST,
    NOW,
    REFUSED,
    Crash,
    Rig,
    apply,
    fresh,
    give_back,
    insert,
    lease,
    picture,
    replace,
)

from millpond.errors import OutcomeUnknown, StoreError
from millpond.stores.base import (
    Box,
    Conflict,
    Document,
    DropState,
    Insert,
    Inserted,
    PutDocument,
    PutState,
    Remove,
    Removed,
    Reseal,
    StateWritten,
    Unique,
    Update,
    Updated,
)
from millpond.stores.conformance.harness import chunks
from millpond.stores.objects.store import ObjectStore

FAULTS = (LOST, DROPPED, REFUSED, BEFORE, AFTER)
LARGE = bytes(range(256)) * 1000


class Scene(NamedTuple):
    """An operation in its surroundings."""

    prepare: Callable[[ObjectStore], Awaitable[Any]]
    act: Callable[[ObjectStore, Any], Awaitable[Any]]
    partial: bool = False
    """It is several writes, each for itself."""


SCENES: dict[str, Scene] = {}


async def _nothing(store: ObjectStore) -> None:
    return None


def _done(outcome: object) -> None:
    assert not isinstance(outcome, Conflict), outcome


def _insert(op: Insert) -> Callable[[ObjectStore, Any], Awaitable[None]]:
    async def act(store: ObjectStore, _: Any) -> None:
        _done(await apply(store, op))

    return act


SCENES["insert"] = Scene(_nothing, _insert(fresh(1)))
SCENES["insert a delayed one"] = Scene(_nothing, _insert(fresh(1, due=NOW + 500_000)))
SCENES["insert with a unique key"] = Scene(_nothing, _insert(fresh(1, unique=Unique("k", NOW, NOW + 10**9))))
SCENES["insert with a chosen id"] = Scene(_nothing, _insert(fresh(1, chosen=True)))
SCENES["insert with both"] = Scene(_nothing, _insert(fresh(1, chosen=True, unique=Unique("k", NOW, NOW + 10**9))))
SCENES["insert into a group"] = Scene(_nothing, _insert(fresh(1, group="g")))


async def _insert_large(store: ObjectStore, _: Any) -> None:
    op = fresh(1)
    blob = await store.write_blob("default", "q", op.item.id, chunks(LARGE), NOW)
    item = op.item.__class__("default", "q", op.item.id, 5, None, blob.size, True)
    _done(await apply(store, replace(op, item=item, payload=b"", blob=blob.name)))


SCENES["insert a large one"] = Scene(_nothing, _insert_large)


async def _plain(store: ObjectStore) -> Inserted:
    return await insert(store, fresh(1))


async def _claim(store: ObjectStore, record: Inserted) -> None:
    _done(await apply(store, lease(record, NOW + 500_000)))


SCENES["claim"] = Scene(_plain, _claim)


async def _grouped(store: ObjectStore) -> Inserted:
    first, second = await insert(store, fresh(1, group="g")), await insert(store, fresh(2, group="g"))
    assert second.item.key > first.item.key
    return first


SCENES["claim the first of a group"] = Scene(_grouped, _claim)


async def _led(store: ObjectStore) -> Inserted:
    first, second = await insert(store, fresh(1, group="g")), await insert(store, fresh(2, group="g"))
    held = await apply(store, lease(first, NOW + 500_000))
    assert isinstance(held, Updated)
    assert isinstance(await apply(store, Remove(first.item, held.mark)), Removed)
    return second


SCENES["claim the next of a group"] = Scene(_led, _claim)


async def _held(store: ObjectStore, op: Insert | None = None, until: int = NOW + 500_000) -> Any:
    record = await insert(store, op or fresh(1))
    held = await apply(store, lease(record, until))
    assert isinstance(held, Updated)
    return record.item, held.mark


async def _remove(store: ObjectStore, held: Any) -> None:
    _done(await apply(store, Remove(*held)))


SCENES["ack"] = Scene(_held, _remove)
SCENES["ack near the end of the lease"] = Scene(lambda store: _held(store, until=NOW + 5_000), _remove)


async def _held_large(store: ObjectStore) -> Any:
    await _insert_large(store, None)
    [record] = (await store.ready("default", "q", NOW, limit=1)).records
    held = await apply(store, lease(record, NOW + 500_000))
    assert isinstance(held, Updated)
    return record.item, held.mark


SCENES["ack a large one"] = Scene(_held_large, _remove)


async def _nack(store: ObjectStore, held: Any) -> None:
    _done(await apply(store, give_back(*held, NOW + 400_000)))


SCENES["nack"] = Scene(_held, _nack)


async def _rename(store: ObjectStore, record: Inserted) -> None:
    _done(await apply(store, give_back(record.item, record.mark, NOW)))


SCENES["make a delayed one due"] = Scene(lambda store: insert(store, fresh(1, due=NOW + 500_000)), _rename)


async def _bury(store: ObjectStore, held: Any) -> None:
    item, mark = held
    _done(await apply(store, Update(item, mark, NOW, False, mark.expires, Box.DEAD, b"dead")))


SCENES["bury"] = Scene(_held, _bury)
SCENES["bury a large one"] = Scene(_held_large, _bury)
SCENES["bury one of a group"] = Scene(lambda store: _held(store, fresh(1, group="g")), _bury)


async def _dead(store: ObjectStore) -> Any:
    await _bury(store, await _held(store))
    [record] = (await store.list("default", "q", Box.DEAD)).records
    return record.item, record.mark


async def _redrive(store: ObjectStore, dead: Any) -> None:
    item, mark = dead
    _done(await apply(store, Update(item, mark, NOW, False, NOW + 10**9, Box.LIVE, b"again")))


SCENES["redrive"] = Scene(_dead, _redrive)
SCENES["purge a dead letter"] = Scene(_dead, _remove)


async def _dead_of_a_group(store: ObjectStore) -> Any:
    await _bury(store, await _held(store, fresh(1, group="g")))
    await insert(store, fresh(2, group="g"))
    [record] = (await store.list("default", "q", Box.DEAD)).records
    return record.item, record.mark


SCENES["redrive one of a group"] = Scene(_dead_of_a_group, _redrive)


async def _put_state(store: ObjectStore, held: Any) -> None:
    _done(await apply(store, PutState(*held, None, b"progress")))


SCENES["save state"] = Scene(_held, _put_state)


async def _with_state(store: ObjectStore) -> Any:
    item, mark = await _held(store)
    written = await apply(store, PutState(item, mark, None, b"progress"))
    assert isinstance(written, StateWritten)
    return item, mark, written.etag


async def _drop_state(store: ObjectStore, held: Any) -> None:
    _done(await apply(store, DropState(*held)))


SCENES["delete state"] = Scene(_with_state, _drop_state)


async def _reseal(store: ObjectStore, held: Any) -> None:
    item, mark, etag = held
    _done(await apply(store, Reseal(item, mark, b"H", b"S", b"P", Document(b"state", etag))))


SCENES["reseal"] = Scene(_with_state, _reseal)


async def _hand_off(store: ObjectStore, held: Any) -> None:
    ops = [
        fresh(11, queue="next"),
        fresh(12, queue="next", unique=Unique("k", NOW, NOW + 10**9)),
        fresh(13, queue="next", chosen=True),
        fresh(14, queue="next", group="g"),
        fresh(15),
    ]
    outcomes = await store.commit([Remove(*held), *ops])
    assert [type(outcome) for outcome in outcomes] == [Removed, *[Inserted] * 5], outcomes


SCENES["hand off"] = Scene(_held, _hand_off)
SCENES["hand off from a large one"] = Scene(_held_large, _hand_off)


async def _put_document(store: ObjectStore, expect: str | None) -> None:
    _done(await apply(store, PutDocument("default", "q", expect, b"new")))


async def _document(store: ObjectStore) -> str:
    await apply(store, PutDocument("default", "q", None, b"old"))
    return "1"


SCENES["first document"] = Scene(_nothing, _put_document)
SCENES["next document"] = Scene(_document, _put_document)


async def _enqueue_many(store: ObjectStore, _: Any) -> None:
    for outcome in await store.write([fresh(number) for number in range(1, 5)]):
        _done(outcome)


SCENES["insert several"] = Scene(_nothing, _enqueue_many, partial=True)


async def _reference(scene: Scene) -> tuple[dict[str, Any], dict[str, Any], int]:
    rig = Rig()
    store = await rig.store()
    prepared = await scene.prepare(store)
    other = await rig.store()
    before = await picture(other)
    network = rig.network(store)
    network.reset()
    await scene.act(store, prepared)
    requests = len(network.calls)
    after = await picture(await rig.rescue())
    return before, after, requests


async def _try(name: str, at: int, fault: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    scene = SCENES[name]
    rig = Rig()
    store = await rig.store()
    prepared = await scene.prepare(store)
    rig.network(store).reset({at: fault})
    error: StoreError | None = None
    try:
        await scene.act(store, prepared)
    except StoreError as raised:
        error = raised
    await store.close()
    other = await rig.rescue()
    found = await picture(other)
    if error is None:
        assert found == after, "it was said to be done"
    elif fault == REFUSED and not isinstance(error, OutcomeUnknown) and not scene.partial:
        assert found == before, "it was said not to be done"
    elif scene.partial:
        assert all(found.get(key) in (before.get(key), after.get(key)) for key in {*before, *after, *found})
    else:
        assert found in (before, after), "it is half done"
    if fault == LOST:
        assert error is None, f"a lost reply was not made good: {error!r}"
    if fault == DROPPED and not name.startswith("insert"):  # Whether it arrived an insert cannot always tell.
        assert error is None, f"a lost request was not repeated: {error!r}"
    assert await other.verify() == []
    await _live_on(rig, other, found)


async def _live_on(rig: Rig, store: ObjectStore, found: dict[str, Any]) -> None:
    """Everything that is there is delivered, once, and goes; nothing else comes."""
    later = NOW + 10**9
    rig.clock.advance((later - rig.clock.now_ms()) / 1000)
    for queue in ("q", "next"):
        for record in (await store.list("default", queue, Box.DEAD)).records:
            await _redrive(store, (record.item, record.mark))
    seen: list[str] = []
    for queue in ("q", "next"):
        while records := (await store.ready("default", queue, later, limit=10)).records:
            for record in records:
                held = await apply(store, lease(record, later + 600_000))
                assert isinstance(held, Updated), held
                assert isinstance(await apply(store, Remove(record.item, held.mark)), Removed)
                seen.append(record.item.id)
    assert sorted(seen) == sorted(key for key in found if key not in ("q", "next"))
    await store.sweep(later + 10**9, older_than=1000, limit=1000)
    other = await rig.rescue()
    assert [key for key in await picture(other) if key not in ("q", "next")] == [], "something came back"
    left = [name for name in rig.root.objects if "/b/" in name or "/m/" in name or "/d/" in name]
    assert left == [], "something was left behind"


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", SCENES)
async def test_each_request_of_each_operation_may_go_wrong(name: str, fault: str) -> None:
    before, after, requests = await _reference(SCENES[name])
    assert requests >= 1
    assert before != after
    for at in range(1, requests + 1):
        try:
            await _try(name, at, fault, before, after)
        except (AssertionError, Crash) as error:
            raise AssertionError(f"request {at} of {requests} {fault}: {error}") from error
