"""Objects that nobody expects under the prefix, leftovers in number, and upkeep that meets them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
from tests.unit.stores.objects.late import script, scripted
from tests.unit.stores.objects.rig import NOW, REFUSED, Rig, apply, fresh, insert, lease, picture, uuid_at

from millpond.errors import StoreError
from millpond.model.clock import ManualClock
from millpond.stores.base import Box, Cause, Conflict, Insert, Item, PutState, Remove, Removed, Unique, Update, Updated
from millpond.stores.objects import names, records
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.records import Kind, Tombstone
from millpond.stores.objects.store import ObjectStore

UNTIL = NOW + 10**6
HOUR = 3_600_000


async def _spoil(rig: Rig, path: str, data: bytes = b"not of this store") -> None:
    """Overwrite an object, or write one of somebody else's."""
    bucket = rig.root.share()
    await bucket.delete(path)
    await bucket.create(path, data)


def _path(rig: Rig, id: str) -> str:
    """The object of a message."""
    [path] = [name for name in rig.root.objects if f"-{names.hex_id(id)}-" in name]
    return path


@pytest.mark.parametrize("foreign", ["q/default/q/m/o/", "q/default/q/m/o/.keep", "q/default/q/m/o/a-b-c-d-e"])
async def test_a_foreign_object_among_groups_blocks_none_of_them(foreign: str) -> None:
    rig = Rig()
    store, _ = await scripted(rig)
    await rig.root.share().create(foreign, b"")
    await insert(store, fresh(1, group="g"))
    other, _ = await scripted(rig)
    record = await other.get("default", "q", uuid_at(NOW, 1))
    assert record is not None
    assert isinstance(await apply(other, lease(record, UNTIL)), Updated)


@pytest.mark.parametrize("page_size", [1, 2, 1000])
@pytest.mark.parametrize("foreign", ["q/default/q/m/", "q/default/q/m/0/", "q/default/q/m/5/", "q/default/q/m/readme"])
async def test_a_folder_that_a_console_made_hides_nothing(foreign: str, page_size: int) -> None:
    rig = Rig(page_size=page_size)
    store, _ = await scripted(rig)
    await rig.root.share().create(foreign, b"")
    assert (await store.ready("default", "q", NOW, limit=10)).records == []
    for number in (1, 2, 3):
        await insert(store, fresh(number))
    other, _ = await scripted(rig)
    assert len((await other.ready("default", "q", NOW, limit=10)).records) == 3
    assert (await other.counts("default", "q", NOW)).ready == 3
    assert len((await other.list("default", "q", Box.LIVE)).records) == 3


@pytest.mark.parametrize("group", [False, True])
async def test_unreadable_messages_in_front_do_not_hide_the_good_ones(group: bool) -> None:
    rig = Rig()
    store, _ = await scripted(rig)
    for number in range(1, 8):
        await insert(store, fresh(number, group=f"g{number}" if group else None))
    for number in range(1, 6):
        path = _path(rig, uuid_at(NOW, number))
        size = len(rig.root.objects[path])
        await _spoil(rig, path, b"x" * size)
    other, _ = await scripted(rig)
    seen: set[str] = set()
    for _ in range(4):
        seen |= {record.item.id for record in (await other.ready("default", "q", NOW, limit=2)).records}
    assert seen == {uuid_at(NOW, 6), uuid_at(NOW, 7)}


async def test_a_first_look_past_unreadable_messages_finds_the_good_ones() -> None:
    """Else a page with nothing in it, and more behind it, has its reader look again and again."""
    rig = Rig()
    store, _ = await scripted(rig)
    for number in range(1, 8):
        await insert(store, fresh(number))
    for number in range(1, 6):
        path = _path(rig, uuid_at(NOW, number))
        await _spoil(rig, path, b"x" * len(rig.root.objects[path]))
    other, _ = await scripted(rig)
    page = await other.ready("default", "q", NOW, limit=2)
    assert page.records


async def test_leftovers_are_seen_to_a_few_at_a_time_and_once() -> None:
    """A crash of many consumers leaves many tombstones; each look at the queue meets them all."""
    rig = Rig()
    store, network = await scripted(rig)
    template = await insert(store, fresh(0))
    name = names.parse(_path(rig, template.item.id))
    bucket = rig.root.share()
    for number in range(1, 400):
        path = name.path.replace(names.hex_id(template.item.id), names.hex_id(uuid_at(NOW, number)))
        stone = Tombstone(records.FORMAT, b"w" * 16, number.to_bytes(8), 2, "")
        await bucket.create(path, records.encode_tombstone(stone))
    rig.clock.advance(61)
    network.reset()
    for _ in range(5):
        await store.ready("default", "q", NOW, limit=10)
        assert len(store._engine.tasks) <= 64
    await rig.settle(store)
    assert network.count("delete") <= 400
    for _ in range(20):
        await store.ready("default", "q", NOW, limit=10)
        await rig.settle(store)
    assert [path for path in rig.root.objects if "/m/" in path] == [name.path]


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("q/default/a/u/" + "0" * 64, b"nobody's"),
        ("q/default/a/i/" + "0" * 32, b"nobody's"),
        ("q/default/a/g/" + "0" * 16, b"nobody's"),
        ("q/default/a/m/5/readme", b"x" * (32 + Kind.MOVING)),
        ("q/default/a/d/readme", b"x" * (32 + Kind.MOVING)),
        ("q/default/a/b/readme", b"nobody's"),
    ],
    ids=["unique key", "id", "pointer", "intent", "dead intent", "payload"],
)
async def test_one_bad_object_does_not_end_a_sweep(path: str, data: bytes) -> None:
    rig = Rig()
    store, _ = await scripted(rig)
    await insert(store, fresh(1, unique=Unique("key", NOW - 10, NOW)))
    await _blob(store, "z", NOW)
    await rig.root.share().create(path, data)
    rig.clock.advance(2 * HOUR / 1000)
    await store.sweep(NOW + 2 * HOUR, older_than=HOUR, limit=100)
    assert path in rig.root.objects
    assert not [name for name in rig.root.objects if "/b/" in name and name != path]
    assert not [name for name in rig.root.objects if "/u/" in name and name != path]


async def test_payloads_are_kept_while_an_intent_cannot_be_read() -> None:
    """It may bring messages that have them."""
    rig = Rig()
    store, _ = await scripted(rig)
    await insert(store, fresh(1))
    await _blob(store, "z", NOW)
    path = _path(rig, uuid_at(NOW, 1))
    await _spoil(rig, path, b"x" * (32 + Kind.MOVING))
    rig.clock.advance(2 * HOUR / 1000)
    await store.sweep(NOW + 2 * HOUR, older_than=HOUR, limit=100)
    assert [name for name in rig.root.objects if "/b/" in name]


async def _chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _blob(store: ObjectStore, queue: str, at: int, number: int = 9) -> str:
    return (await store.write_blob("default", queue, uuid_at(NOW, number), _chunks(b"large" * 100), at)).name


@pytest.mark.parametrize("after", ["the payloads were listed", "the messages were listed"])
async def test_a_payload_whose_upload_took_hours_is_not_swept_from_under_its_insert(after: str) -> None:
    rig = Rig()
    store, _ = await scripted(rig)
    sweeper, network = await scripted(rig)

    async def slow() -> AsyncIterator[bytes]:
        yield b"large" * 100
        rig.clock.advance(2 * HOUR / 1000)
        yield b"large" * 100

    id = uuid_at(NOW, 9)
    blob = await store.write_blob("default", "q", id, slow(), NOW)
    inserts: list[object] = []

    async def rule(kind: str, name: str) -> str | None:
        ready = name.endswith("/m/") if after.startswith("the payloads") else kind == "delete_many"
        if ready and not inserts:
            op = Insert(Item("default", "q", id, 5, None, blob.size, True), NOW, None, b"h", b"s", b"", None, blob.name)
            inserts.append(None)
            inserts[0] = await apply(store, op)
        return None

    network.rule = rule
    await sweeper.sweep(NOW + 2 * HOUR, older_than=HOUR, limit=100)
    if not inserts:
        network.rule = None
        op = Insert(Item("default", "q", id, 5, None, blob.size, True), NOW, None, b"h", b"s", b"", None, blob.name)
        await apply(store, op)
    problems = await sweeper.verify()
    assert problems == []


async def test_a_redrive_that_could_not_be_finished_is_finished_by_the_collector() -> None:
    """Nobody need look at the dead letters for that."""
    rig = Rig()
    store, network = await scripted(rig)
    inserted = await insert(store, fresh(1))
    held = await apply(store, lease(inserted, UNTIL))
    assert isinstance(held, Updated)
    dead = await apply(store, Update(inserted.item, held.mark, NOW, False, None, Box.DEAD, b"dead"))
    assert isinstance(dead, Updated)
    network.rule = script(*[("create", "/m/", REFUSED)] * 3)
    back = await apply(store, Update(inserted.item, dead.mark, NOW, False, None, Box.LIVE, b"back"))
    assert isinstance(back, Updated)
    network.rule = None
    rig.clock.advance(61)
    collector, _ = await scripted(rig)
    await collector.expired(NOW, limit=100)
    await collector.sweep(NOW, older_than=HOUR, limit=100)
    await rig.settle(collector)
    assert [one.item.id for one in (await collector.ready("default", "q", NOW + 10**6, limit=10)).records] == [
        inserted.item.id
    ]


async def test_a_name_from_the_far_future_spoils_no_key() -> None:
    """A message that comes back to its group goes behind all that were seen; there must be room behind them."""
    rig = Rig()
    store, _ = await scripted(rig)
    inserted = await insert(store, fresh(1, group="g"))
    held = await apply(store, lease(inserted, UNTIL))
    assert isinstance(held, Updated)
    dead = await apply(store, Update(inserted.item, held.mark, NOW, False, None, Box.DEAD, b"dead"))
    assert isinstance(dead, Updated)
    far = f"q/default/q/m/o/{'f' * 32}-{'0' * 32}-0--{'0' * 16}5"
    await rig.root.share().create(far, b"x" * 17)
    await store.list("default", "q", Box.LIVE)
    back = await apply(store, Update(inserted.item, dead.mark, NOW, False, None, Box.LIVE, b"back"))
    assert isinstance(back, Updated)
    await rig.root.share().delete(far)
    assert list(await picture(await rig.rescue())) == [inserted.item.id]


async def test_with_hardly_any_memory_answers_stay_right() -> None:
    rig = Rig()
    store, _ = await scripted(rig, index_entries=1)
    held = []
    for number in range(1, 17):
        inserted = await insert(store, fresh(number))
        outcome = await apply(store, lease(inserted, UNTIL))
        assert isinstance(outcome, Updated)
        held.append(Remove(inserted.item, outcome.mark))

    async def wrong_state(op: Remove) -> None:
        for _ in range(5):
            outcome = await apply(store, PutState(op.item, op.mark, "7", b"state"))
            assert outcome == Conflict(Cause.STATE, op.item.id)

    await asyncio.gather(*map(wrong_state, held))
    assert all(isinstance(outcome, Removed) for outcome in await store.write(held))
    assert await picture(store) == {}


async def test_a_cancelled_look_leaves_no_listing_open() -> None:
    opened = closed = 0

    class Counting(MemoryBucket):
        async def list(self, prefix: str, *, after: str | None = None) -> AsyncIterator[list]:  # type: ignore[override,type-arg]
            nonlocal opened, closed
            opened += 1
            try:
                async for page in super().list(prefix, after=after):
                    yield page
            finally:
                closed += 1

    clock = ManualClock()
    store = ObjectStore(Counting(clock=clock, turns=3), clock=clock, measure_skew=False)
    await store.open()
    await store.write([fresh(1)])
    for turns in range(12):
        look = asyncio.create_task(store.ready("default", "q", NOW, limit=1))
        for _ in range(turns):
            await asyncio.sleep(0)
        look.cancel()
        with suppress(asyncio.CancelledError):
            await look
        assert opened == closed
    assert opened


@pytest.mark.parametrize("queue", ["m", "d", "u", "i", "g", "b", "policy", "q", "clock", "m.o"])
async def test_a_queue_may_be_called_as_a_folder_is(queue: str) -> None:
    rig = Rig()
    store, _ = await scripted(rig)
    for namespace in (queue, "default"):
        op = fresh(1, group="g")
        what = Item(namespace, queue, op.item.id, 5, "g", 7, False)
        inserted = await insert(store, Insert(what, NOW, None, b"h", b"s", b"payload"))
        other, _ = await scripted(rig)
        [record] = (await other.ready(namespace, queue, NOW, limit=10)).records
        held = await apply(other, lease(record, UNTIL))
        assert isinstance(held, Updated)
        assert inserted.item in [one.item for one in (await other.list(namespace, queue, Box.LIVE)).records]
    assert len(await store.queues()) == 2
    assert await store.verify() == []
    with pytest.raises(StoreError):
        names.parse(f"q/default/{queue}")
