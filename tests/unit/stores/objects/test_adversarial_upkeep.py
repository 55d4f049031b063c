"""Sweeps of what is too much for one pass: bounded each time, and nothing is out of their reach."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from tests.unit.stores.objects.late import script, scripted
from tests.unit.stores.objects.rig import NOW, QUEUE, REFUSED, Rig, apply, fresh, insert, lease, replace, uuid_at

from millpond.errors import StoreError
from millpond.stores.base import Box, Item, Remove, Removed, Unique, Updated
from millpond.stores.objects import names, rounds, upkeep
from millpond.stores.objects.engine import READS
from millpond.stores.objects.rounds import Rounds
from millpond.stores.objects.store import ObjectStore

UNTIL = NOW + 10**9
HOUR = 3_600_000
PASSES = 40


def _left(rig: Rig, kind: str) -> list[str]:
    prefix = names.markers_prefix(*QUEUE, kind)
    return sorted(name for name in rig.root.objects if name.startswith(prefix))


async def _bytes(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _external(store: ObjectStore, number: int, *, insert_it: bool = True) -> str:
    """A payload stored apart; the name of its object."""
    id = uuid_at(NOW, number)
    blob = await store.write_blob(*QUEUE, id, _bytes(b"large"), NOW)
    if insert_it:
        what = Item(*QUEUE, id, 5, None, blob.size, True)
        await insert(store, replace(fresh(number), item=what, payload=b"", blob=blob.name))
    return names.blobs_prefix(*QUEUE) + blob.name


async def _acked(store: ObjectStore, id: str) -> None:
    [record] = [one for one in (await store.ready(*QUEUE, NOW, limit=100)).records if one.item.id == id]
    held = await apply(store, lease(record, UNTIL))
    assert isinstance(held, Updated)
    assert isinstance(await apply(store, Remove(record.item, held.mark)), Removed)


async def test_unique_keys_behind_more_than_are_remembered_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "REMEMBERED", 5)
    rig = Rig()
    store, network = await scripted(rig)
    keys = sorted((f"key {number}" for number in range(60)), key=names.key_hash)
    for number, key in enumerate(keys):
        await insert(store, fresh(number, unique=Unique(key, NOW - 10, NOW if number > 57 else UNTIL)))
    gone = 0
    for _ in range(PASSES):
        network.reset()
        gone += await store.sweep(NOW, older_than=10**9, limit=1)
        assert network.count("read") <= 1 * upkeep.PER_LIMIT
    assert gone == 2
    assert len(_left(rig, "u")) == 58


async def test_pointers_behind_many_that_stay_go() -> None:
    rig = Rig()
    store, network = await scripted(rig)
    groups = sorted((f"group {number}" for number in range(30)), key=names.group_hash)
    for number, group in enumerate(groups):
        inserted = await insert(store, fresh(number, group=group))
        assert isinstance(await apply(store, lease(inserted, NOW + 1000)), Updated)
    rig.clock.advance(7200)
    last = uuid_at(NOW, 29)
    found = await store.get(*QUEUE, last)
    assert found is not None
    assert isinstance(await apply(store, Remove(found.item, found.mark)), Removed)
    rig.clock.advance(7200)
    for _ in range(PASSES):
        network.reset()
        await store.sweep(NOW, older_than=10**9, limit=1)
        assert network.count("replace", "delete") <= 4
    assert len(_left(rig, "g")) == 29


async def test_payloads_and_id_markers_behind_many_that_stay_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "CHUNK", 3, raising=False)
    rig = Rig(page_size=4)
    store, _ = await scripted(rig)
    for number in range(20):
        await _external(store, number)
    orphans = [await _external(store, number, insert_it=False) for number in (18, 19, 20)]
    for number in range(100, 112):
        await insert(store, fresh(number, chosen=True))
    gone = [fresh(number, chosen=True).item.id for number in (103, 111)]
    for id in gone:
        await _acked(store, id)
    rig.clock.advance(7200)
    swept = 0
    for _ in range(PASSES):
        count = await store.sweep(NOW + 2 * HOUR, older_than=HOUR, limit=2)
        assert count <= 2
        swept += count
    assert swept == len(orphans)
    assert len([name for name in rig.root.objects if name.startswith(names.blobs_prefix(*QUEUE))]) == 20
    assert len(_left(rig, "i")) == 10
    assert not {names.id_marker(*QUEUE, id) for id in gone} & set(_left(rig, "i"))


async def test_a_sweep_takes_the_memory_of_a_few_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "CHUNK", 100, raising=False)
    count = 4_000
    rig = Rig(page_size=100)
    bucket = rig.root.share()
    for number in range(count):
        id = uuid_at(NOW, number)
        name = names.message(
            *QUEUE, Box.LIVE, key=names.id_number(id), id=id, priority=5, size=1, expires=None, group=None
        )
        await bucket.create(name.path, b"x" * 17)
        if number % 2:
            await bucket.create(names.id_marker(*QUEUE, id), b"a marker")
    orphan = names.blobs_prefix(*QUEUE) + names.blob(*QUEUE, uuid_at(NOW, count), NOW, b"12345678")
    await bucket.create(orphan, b"payload")
    rig.clock.advance(7200)
    store, _ = await scripted(rig)
    tracemalloc.start()
    try:
        swept = await store.sweep(NOW + 2 * HOUR, older_than=HOUR, limit=1000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert swept == 1
    assert peak < count * 100


async def test_no_queue_uses_up_the_limit_of_the_others() -> None:
    rig = Rig()
    store, _ = await scripted(rig)
    for queue in ("a", "b"):
        for number in range(3):
            await insert(store, fresh(number, queue=queue, unique=Unique(f"key {number}", NOW - 10, NOW)))
    for _ in range(2):
        assert await store.sweep(NOW, older_than=10**9, limit=1) == 1
    left = [len([name for name in rig.root.objects if f"/{queue}/u/" in name]) for queue in ("a", "b")]
    assert left == [2, 2]


async def test_a_round_gives_each_object_once_and_goes_on_where_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "LOOKED_AT", 4)
    rig = Rig(page_size=2)
    store, _ = await scripted(rig)
    bucket = rig.root.share()
    for name in "abcdef":
        await bucket.create(f"x/{name}", b"")
    here = Rounds(store._engine)

    async def once() -> str:
        return "".join([entry.name[2:] async for group in here.pass_over("x/") for entry in group])

    assert await once() == "abcd"
    assert await once() == "efab"
    await bucket.create("x/aa", b"")
    assert await once() == "cdef"
    here.go_on("x/", "x/e")
    here.keep(("x/",))
    assert await once() == "faaab"
    here.keep(("y/",))
    assert await once() == "aaabc"
    monkeypatch.setattr(rounds, "LOOKED_AT", 100)
    assert await once() == "defaaabc"
    assert await once() == "aaabcdef"


async def test_an_upload_whose_signs_of_life_are_cut_by_a_pass_is_no_orphan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last sign is on another page, and is what the pass would begin with."""
    monkeypatch.setattr(upkeep, "CHUNK", 1, raising=False)
    monkeypatch.setattr(rounds, "LOOKED_AT", 1)
    rig = Rig(page_size=1)
    store, _ = await scripted(rig)
    bucket = rig.root.share()
    first = names.blobs_prefix(*QUEUE) + names.blob(*QUEUE, uuid_at(NOW, 1), NOW, b"12345678")
    going_on = names.blobs_prefix(*QUEUE) + names.blob(*QUEUE, uuid_at(NOW, 2), NOW, b"12345678")
    signs = [names.sign_of_life(going_on, NOW + minutes * 60_000) for minutes in (10, 60, 110)]
    for name in (first, going_on, *signs):
        await bucket.create(name, b"")
    for _ in range(6):
        await store.sweep(NOW + 2 * HOUR, older_than=HOUR, limit=10)
    assert first not in rig.root.objects
    assert {going_on, signs[-1]} <= set(rig.root.objects)


async def test_what_comes_while_everything_is_verified_lacks_nothing() -> None:
    """Its payload was not there when that began."""
    rig = Rig()
    store, network = await scripted(rig)
    other, _ = await scripted(rig)
    await insert(other, fresh(1))
    came: list[str] = []

    async def rule(kind: str, name: str) -> str | None:
        if kind == "list" and "/m/" in name and not came:
            came.append("")
            await _external(other, 2)
        return None

    network.rule = rule
    assert await store.verify() == []
    assert came


class _Flights:
    """How many requests of a kind were under way at once at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    async def __call__(self, kind: str, name: str) -> str | None:
        if kind == "read":
            self.now += 1
            self.most = max(self.most, self.now)
            for _ in range(10):
                await asyncio.sleep(0)
            self.now -= 1
        return None


MANY = 100


async def _keys(store: ObjectStore, rig: Rig) -> None:
    for number in range(MANY):
        await insert(store, fresh(number, unique=Unique(f"key {number}", NOW - 10, NOW if number % 2 else UNTIL)))


async def _without_messages(rig: Rig) -> None:
    for name in [name for name in rig.root.objects if name.startswith(names.box_prefix(*QUEUE, Box.LIVE))]:
        await rig.root.delete(name)


async def _ids(store: ObjectStore, rig: Rig) -> None:
    for number in range(MANY):
        await insert(store, fresh(number, chosen=True))
    await _without_messages(rig)
    rig.clock.advance(7200)


async def _groups(store: ObjectStore, rig: Rig) -> None:
    for number in range(MANY):
        inserted = await insert(store, fresh(number, group=f"group {number}"))
        assert isinstance(await apply(store, lease(inserted, NOW + 1000)), Updated)
    await _without_messages(rig)
    rig.clock.advance(7200)


async def _payloads(store: ObjectStore, rig: Rig) -> None:
    for number in range(MANY):
        await _external(store, number)
    rig.clock.advance(7200)


@pytest.mark.parametrize(
    ("prepare", "reads", "left"),
    [
        # Of each key its marker; of those that have ended nothing else, as who removes one goes by its tag.
        (_keys, MANY, ("u", MANY // 2)),
        # The marker, and both places of its message.
        (_ids, 3 * MANY, ("i", 0)),
        # The pointer, and the message that it names.
        (_groups, 2 * MANY, ("g", 0)),
        # The message of each payload.
        (_payloads, MANY, ("b", MANY)),
    ],
    ids=["unique keys", "ids", "groups", "payloads"],
)
async def test_a_sweep_reads_several_objects_at_once_and_no_more_than_it_needs(
    prepare: Callable[[ObjectStore, Rig], Awaitable[None]], reads: int, left: tuple[str, int]
) -> None:
    rig = Rig()
    before, _ = await scripted(rig)
    await prepare(before, rig)
    store, network = await scripted(rig)
    flights = _Flights()
    network.rule = flights
    await store.sweep(NOW + 2 * HOUR if left[0] == "b" else NOW, older_than=HOUR, limit=1000)
    assert 16 <= flights.most <= READS
    assert network.count("read") == reads
    assert len(_left(rig, left[0])) == left[1]


@pytest.mark.parametrize("limit", [1, 5, 31, 33, 49])
async def test_a_sweep_of_several_at_once_keeps_to_its_limit(limit: int) -> None:
    rig = Rig()
    store, network = await scripted(rig)
    await _keys(store, rig)
    swept = 0
    while swept < MANY // 2:
        network.reset()
        count = await store.sweep(NOW, older_than=10**9, limit=limit)
        assert count <= limit
        assert network.count("read") <= limit * upkeep.PER_LIMIT
        assert network.count("delete") == count
        swept += count
    assert len(_left(rig, "u")) == MANY // 2


async def test_one_marker_that_is_refused_does_not_keep_a_sweep_from_the_others() -> None:
    rig = Rig()
    store, network = await scripted(rig)
    await _keys(store, rig)
    network.rule = script(("read", "/u/", REFUSED))
    with pytest.raises(StoreError, match="refused"):
        await store.sweep(NOW, older_than=10**9, limit=1000)
    # All that were read at the same time are done.
    assert READS // 4 <= MANY - len(_left(rig, "u")) < READS
    assert await store.sweep(NOW, older_than=10**9, limit=1000) > 0
    await store.sweep(NOW, older_than=10**9, limit=1000)
    assert len(_left(rig, "u")) == MANY // 2
