"""The object store's own promises: opening, clocks, leftovers, and what it makes of stale knowledge."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from tests.unit.stores.objects.rig import (
    AFTER,
    BEFORE,
    NOW,
    REFUSED,
    Rig,
    apply,
    fresh,
    insert,
    lease,
    picture,
    replace,
)

from millpond.errors import OutcomeUnknown, StoreCorrupt, StoreError, StoreMismatch
from millpond.model.clock import ManualClock
from millpond.stores.base import (
    Box,
    Cause,
    Conflict,
    Inserted,
    PutDocument,
    PutState,
    Remove,
    Removed,
    StateWritten,
    Unique,
    Update,
    Updated,
)
from millpond.stores.conformance.harness import chunks
from millpond.stores.objects import names
from millpond.stores.objects.bucket import Tag
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.records import Kind
from millpond.stores.objects.store import ObjectStore

FAR = NOW + 10**7


async def _strike(rig: Rig, work: Callable[[Any], Awaitable[object]], kind: str, number: int, fault: str) -> None:
    """Do it in a store of its own, where the ``number``-th request of this kind goes wrong."""
    store = await rig.store()
    network = rig.network(store)
    seen = 0

    class Plan(dict[int, str]):
        def get(self, at: int, default: Any = None) -> Any:
            nonlocal seen
            seen += network.calls[at - 1][0] == kind
            return fault if network.calls[at - 1][0] == kind and seen == number else default

    network.plan = Plan()
    with contextlib.suppress(StoreError):
        await work(store)
    assert seen >= number, f"there was no {kind} number {number}: {network.calls}"
    await store.close()


# Opening


async def test_the_first_to_open_marks_the_prefix() -> None:
    rig = Rig()
    store = await rig.store()
    root = msgspec.json.decode(rig.root.objects["millpond.json"])
    assert root["format"] == 1
    await rig.store()
    await store.open()
    assert msgspec.json.decode(rig.root.objects["millpond.json"]) == root


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b'{"format": 2, "store": "x"}', "use a newer one"),
        (b"something else", "prefix of its own"),
        (b'{"a": 1}', "prefix of its own"),
    ],
)
async def test_a_prefix_of_another_kind_is_refused(data: bytes, text: str) -> None:
    rig = Rig()
    await rig.root.create("millpond.json", data)
    with pytest.raises(StoreMismatch, match=text):
        await rig.store()


@pytest.mark.parametrize("offset", [-90_000, -1500, 0, 1500, 90_000])
@pytest.mark.parametrize("resolution", [1, 1000])
async def test_the_store_learns_how_far_the_clock_is_off(offset: int, resolution: int) -> None:
    mine, theirs = ManualClock(), ManualClock(ManualClock().now_ms() + 137 + offset)
    bucket = MemoryBucket(clock=theirs, resolution=resolution)
    store = ObjectStore(bucket, clock=mine)
    await store.open()
    assert not [name for name in bucket.objects if name.startswith("clock/")]
    expected = 137 + offset
    if resolution == 1000 and offset == 0:
        # Within what a time in seconds cannot tell: the clocks are said to agree.
        assert store.clock_offset == 0
    else:
        assert abs(store.clock_offset - expected) <= resolution // 2
    # It goes on learning, from what a listing says of its own writes.
    theirs.jump(0.02)
    mine.jump(0.01)
    for number in range(20):
        await insert(store, fresh(number))
        mine.advance(1.001)
        theirs.advance(1.001)
        await store.list("default", "q", Box.LIVE, limit=1000)
    assert abs(store.clock_offset - expected - 10) <= (1100 if resolution == 1000 else 1)
    await store.close()


@pytest.mark.parametrize("slow", [1, 4, 100])
async def test_clocks_are_compared_again_where_that_took_too_long(slow: int) -> None:
    """The process stands still for a minute between the write and its reply: that tells nothing of its clock."""
    mine, theirs = ManualClock(), ManualClock(ManualClock().now_ms() + 25_137)
    bucket = MemoryBucket(clock=theirs)
    create, comparisons = bucket.create, 0

    async def sleepy(name: str, data: bytes) -> Tag:
        nonlocal comparisons
        tag = await create(name, data)
        if name.startswith("clock/"):
            comparisons += 1
            if comparisons <= slow:
                for clock in (mine, theirs):
                    clock.jump(60)
        return tag

    bucket.create = sleepy  # type: ignore[method-assign]
    store = ObjectStore(bucket, clock=mine, measure_skew=True)
    await store.open()
    assert comparisons == min(slow, 4) + 1
    # Should it always be like that, the store is opened nevertheless.
    assert store.clock_offset == (25_137 if slow < 5 else 0)
    await store.close()


async def test_clocks_are_left_alone_where_that_is_asked_for() -> None:
    mine, theirs = ManualClock(), ManualClock(ManualClock().now_ms() + 10**6)
    store = ObjectStore(MemoryBucket(clock=theirs), clock=mine, measure_skew=False)
    await store.open()
    await insert(store, fresh(1))
    await store.list("default", "q", Box.LIVE)
    assert store.clock_offset == 0


# Commits and failures


async def test_what_a_bucket_cannot_do_in_one_step() -> None:
    rig = Rig()
    store = await rig.store()
    record = await insert(store, fresh(1))
    for ops in (
        [fresh(2), fresh(3)],
        [Remove(record.item, record.mark), Remove(record.item, record.mark)],
        [fresh(2), Remove(record.item, record.mark)],
        [Remove(record.item, record.mark), PutDocument("default", "q", None, b"")],
    ):
        with pytest.raises(StoreError, match="one by one"):
            await store.commit(ops)
    assert await store.commit([]) == []
    assert await store.commit([Remove(record.item, record.mark)]) == [Removed()]
    with pytest.raises(StoreError, match="claim what ready"):
        await store.take("default", "q", NOW, limit=1, decide=lambda _: None)


async def test_writes_of_one_call_that_fail_are_told_from_those_that_do_not() -> None:
    rig = Rig()
    store = await rig.store()
    records = [await insert(store, fresh(number)) for number in range(3)]
    network = rig.network(store)
    network.reset({2: REFUSED})
    outcomes = await store.write([lease(record, FAR) for record in records])
    assert [type(outcome) for outcome in outcomes] == [Updated, Conflict, Updated]
    assert outcomes[1] == Conflict(Cause.ABORTED)
    network.reset({1: REFUSED})
    with pytest.raises(OutcomeUnknown, match="some of these"):
        await store.write([fresh(10), fresh(11)])
    network.reset({1: REFUSED, 2: REFUSED})
    with pytest.raises(StoreError, match="refused") as error:
        await store.write([fresh(12), fresh(13)])
    assert not isinstance(error.value, OutcomeUnknown)


async def test_an_insert_that_may_be_there_is_not_written_again() -> None:
    """Somebody may have had it, and acked it."""
    rig = Rig()
    store = await rig.store()
    network = rig.network(store)
    network.reset(dict.fromkeys(range(1, 2), "dropped"))
    with pytest.raises(OutcomeUnknown, match="simply be repeated"):
        await apply(store, fresh(1))
    assert network.count("create") == 1
    assert network.count("read") > 3
    network.reset()
    await insert(store, fresh(1))


# Markers


async def test_a_marker_whose_message_is_there_holds() -> None:
    """Its insert died before it could confirm."""
    for chosen, key in ((False, Unique("k", NOW, FAR)), (True, None)):
        rig = Rig()
        first = fresh(1, unique=key, chosen=chosen)
        await _strike(rig, lambda store, op=first: apply(store, op), "replace", 1, BEFORE)
        other = await rig.store()
        outcome = await apply(other, fresh(1 if chosen else 2, unique=key, chosen=chosen))
        assert outcome == Conflict(Cause.EXISTS if chosen else Cause.UNIQUE, first.item.id)
        assert list(await picture(other)) == [first.item.id]


async def test_a_marker_whose_message_never_came_is_waited_for_and_then_taken_over() -> None:
    rig = Rig()
    key = Unique("k", NOW, FAR)
    await _strike(rig, lambda store: apply(store, fresh(1, unique=key)), "create", 1, AFTER)
    other = await rig.store()
    started = rig.clock.monotonic()
    outcome = await apply(other, fresh(2, unique=key))
    assert isinstance(outcome, Inserted)
    assert 1 < rig.clock.monotonic() - started < 10
    assert list(await picture(other)) == [outcome.item.id]


async def test_a_slow_insert_is_waited_for() -> None:
    rig = Rig()
    key = Unique("k", NOW, FAR)
    store, other = await rig.store(), await rig.store()
    network = rig.network(store)
    create, pending, go_on = network.inner.create, asyncio.Event(), asyncio.Event()

    async def slow(name: str, data: bytes) -> Any:
        if "/m/" in name:
            pending.set()
            await go_on.wait()
        return await create(name, data)

    network.inner.create = slow  # type: ignore[method-assign]
    first = asyncio.ensure_future(apply(store, fresh(1, unique=key)))
    await pending.wait()
    read, looks = rig.network(other).inner.read, 0

    async def looking(name: str) -> Any:
        nonlocal looks
        looks += 1
        if looks == 6:
            go_on.set()
            await first
        return await read(name)

    rig.network(other).inner.read = looking  # type: ignore[method-assign]
    second = await apply(other, fresh(2, unique=key))
    assert isinstance(await first, Inserted)
    assert second == Conflict(Cause.UNIQUE, fresh(1).item.id)


async def test_a_key_is_not_given_out_while_its_delete_may_be_on_the_way() -> None:
    rig = Rig()
    store = await rig.store()
    await insert(store, fresh(1, unique=Unique("k", NOW, NOW + 10)))
    await _strike(rig, lambda other: other.sweep(NOW + 20, older_than=10**9, limit=10), "delete", 1, BEFORE)
    started = rig.clock.monotonic()
    assert isinstance(await apply(store, fresh(2, unique=Unique("k", NOW + 20, FAR))), Inserted)
    assert rig.clock.monotonic() - started > 30


async def test_a_refused_id_does_not_hide_the_message_that_has_it() -> None:
    rig = Rig()
    store, other = await rig.store(), await rig.store()
    record = await insert(store, fresh(1))
    again = replace(fresh(1), chosen=True)
    assert await apply(other, again) == Conflict(Cause.EXISTS, record.item.id)
    dead = await apply(store, Update(record.item, record.mark, NOW, False, None, Box.DEAD, b"dead"))
    assert isinstance(dead, Updated)
    assert await apply(other, again) == Conflict(Cause.EXISTS, record.item.id)
    assert isinstance(await apply(store, Update(record.item, dead.mark, NOW, False, None, Box.LIVE, b"b")), Updated)
    third = await rig.store()
    found = await third.get("default", "q", record.item.id)
    assert found is not None
    assert found.status == b"b"
    assert await apply(third, again) == Conflict(Cause.EXISTS, record.item.id)


async def test_a_message_that_moves_during_a_search_is_found() -> None:
    rig = Rig()
    store, other = await rig.store(), await rig.store()
    record = await insert(store, fresh(1))
    dead = await apply(store, Update(record.item, record.mark, NOW, False, None, Box.DEAD, b"dead"))
    assert isinstance(dead, Updated)
    listing = rig.network(other).inner.list

    async def moving(prefix: str, *, after: str | None = None) -> Any:
        if "/d/" in prefix:
            op = Update(record.item, dead.mark, NOW, False, None, Box.LIVE, b"back")
            assert isinstance(await apply(store, op), Updated)
        async for page in listing(prefix, after=after):
            yield page

    rig.network(other).inner.list = moving  # type: ignore[method-assign]
    found = await other.get("default", "q", record.item.id)
    assert found is not None
    assert found.status == b"back"


# Stale knowledge


async def test_state_is_judged_as_it_is_and_not_as_it_was_known() -> None:
    rig = Rig()
    store, other = await rig.store(), await rig.store()
    record = await insert(store, fresh(1))
    held = await apply(store, lease(record, FAR))
    assert isinstance(held, Updated)
    assert await other.get("default", "q", record.item.id) is not None
    first = await apply(other, PutState(record.item, held.mark, None, b"theirs"))
    assert isinstance(first, StateWritten)
    second = await apply(store, PutState(record.item, held.mark, first.etag, b"mine"))
    assert isinstance(second, StateWritten)
    assert isinstance(await apply(other, PutState(record.item, held.mark, second.etag, b"theirs")), StateWritten)


async def test_a_reply_that_was_overtaken_is_not_believed() -> None:
    rig = Rig()
    store = await rig.store()
    record = await insert(store, fresh(1))
    network = rig.network(store)
    read, reached, go_on = network.inner.read, asyncio.Event(), asyncio.Event()

    async def slow(name: str) -> Any:
        content = await read(name)
        reached.set()
        await go_on.wait()
        return content

    network.inner.read = slow  # type: ignore[method-assign]
    getting = asyncio.ensure_future(store.get("default", "q", record.item.id))
    await reached.wait()
    held = await apply(store, lease(record, FAR))
    assert isinstance(held, Updated)
    go_on.set()
    found = await getting
    assert found is not None
    assert found.mark == held.mark
    network.reset()
    assert isinstance(await apply(store, Remove(record.item, held.mark)), Removed)
    assert [kind for kind, _ in network.calls] == ["delete"]


async def test_knowledge_is_bounded() -> None:
    rig = Rig(index_entries=10)
    store = await rig.store()
    records = [await insert(store, fresh(number)) for number in range(30)]
    assert store.statistics()["known"] == 10
    for record in records:
        held = await apply(store, lease(record, FAR))
        assert isinstance(held, Updated)
        assert isinstance(await apply(store, Remove(record.item, held.mark)), Removed)
    assert await picture(store) == {}
    small = await rig.store(index_entries=1000, index_bytes=50_000)
    for number in range(30):
        await insert(small, fresh(number, payload=bytes(10_000)))
    assert 1 <= small.statistics()["known"] < 6


# Upkeep


async def test_the_payload_of_a_message_that_is_still_to_come_is_kept() -> None:
    rig = Rig()
    store = await rig.store()
    record = await insert(store, fresh(1))
    op = fresh(2, queue="next")
    blob = await store.write_blob("default", "next", op.item.id, chunks(b"large"), NOW)
    op = replace(op, item=msgspec.structs.replace(op.item, size=5, external=True), payload=b"", blob=blob.name)
    rig.network(store).reset({2: BEFORE})
    assert isinstance((await store.commit([Remove(record.item, record.mark), op]))[0], Removed)
    other = await rig.store()
    # By the sweep's time the payload is old; by the bucket's the intent is young.
    assert await other.sweep(NOW + 10**9, older_than=1000, limit=10) == 0
    third = await rig.rescue()
    assert (await picture(third))[op.item.id][7] == b"large"


async def test_a_pointer_is_not_moved_on_while_its_delete_may_be_on_the_way() -> None:
    rig = Rig()
    store, other = await rig.store(), await rig.store()
    record = await insert(store, fresh(1, group="g"))
    held = await apply(store, lease(record, FAR))
    assert isinstance(held, Updated)
    assert isinstance(await apply(store, Remove(record.item, held.mark)), Removed)
    rig.clock.advance(3700)
    await _strike(rig, lambda sweeper: sweeper.sweep(NOW, older_than=1000, limit=10), "delete", 1, BEFORE)
    second = await insert(store, fresh(2, at=rig.clock.now_ms(), group="g"))
    assert await apply(other, lease(second, FAR)) == Conflict(Cause.BLOCKED, second.item.id)
    rig.clock.advance(31)
    assert isinstance(await apply(other, lease(second, FAR)), Updated)


async def test_a_sweep_leaves_nothing_of_what_is_long_gone() -> None:
    rig = Rig()
    store = await rig.store()
    # Somebody died while he compared clocks.
    await rig.root.create(names.clock(bytes(16)), b"")
    for op in (fresh(1, group="g"), fresh(2, chosen=True), fresh(3, unique=Unique("k", NOW, NOW + 10))):
        record = await insert(store, op)
        held = await apply(store, lease(record, FAR))
        assert isinstance(held, Updated)
        assert isinstance(await apply(store, Remove(record.item, held.mark)), Removed)
    kept = await insert(store, fresh(4, chosen=True, group="h"))
    assert isinstance(await apply(store, lease(kept, FAR)), Updated)
    assert len(rig.root.objects) == 1 + 1 + 1 + 1 + 1 + 3
    await store.sweep(NOW, older_than=10**9, limit=10)
    assert len(rig.root.objects) == 1 + 1 + 1 + 1 + 1 + 3
    rig.clock.advance(3700)
    other = await rig.store()
    # Markers and pointers are not counted, the unique key is.
    assert await other.sweep(NOW + 10, older_than=10**9, limit=10) == 1
    left = sorted(name.rsplit("/", 2)[-2] for name in rig.root.objects if name != "millpond.json")
    assert left == ["g", "i", "o"]
    assert await other.get("default", "q", kept.item.id) is not None


async def test_tombstones_that_were_left_go_when_they_are_old() -> None:
    rig = Rig()
    store = await rig.store()
    record = await insert(store, fresh(1))
    rig.network(store).reset({2: REFUSED})
    assert isinstance(await apply(store, Remove(record.item, record.mark)), Removed)
    stones = [name for name, data in rig.root.objects.items() if len(data) % 16 == Kind.GONE]
    assert len(stones) == 1
    other = await rig.store()
    assert (await other.ready("default", "q", NOW, limit=10)).records == []
    await rig.settle(other)
    assert stones[0] in rig.root.objects
    rig.clock.advance(61)
    assert (await other.ready("default", "q", NOW, limit=10)).records == []
    await rig.settle(other)
    assert stones[0] not in rig.root.objects


async def test_an_object_that_cannot_be_read_hides_no_other(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    store = await rig.store()
    bad, good = await insert(store, fresh(1)), await insert(store, fresh(2))
    [path] = [name for name in rig.root.objects if names.hex_id(bad.item.id) in name]
    content = await rig.root.read(path)
    assert content is not None
    await rig.root.replace(path, content.data[:40] + b"\xff" + content.data[41:], content.tag)
    await rig.root.create("q/default/q/m/4/what-is-this", b"")
    other = await rig.store()
    for _ in range(2):
        page = await other.ready("default", "q", NOW, limit=10)
        assert [record.item.id for record in page.records] == [good.item.id]
    assert len((await other.list("default", "q", Box.LIVE)).records) == 1
    assert len([one for one in caplog.records if one.message == "millpond.objects.unreadable"]) == 2
    with pytest.raises(StoreCorrupt):
        await other.get("default", "q", bad.item.id)
    assert len(await other.verify()) == 2


@pytest.mark.parametrize("page_size", [1, 3, 1000])
@pytest.mark.parametrize("generations", [False, True])
async def test_clouds_that_tell_versions_by_generation(page_size: int, generations: bool) -> None:
    clock = ManualClock()
    bucket = MemoryBucket(clock=clock, page_size=page_size, generations=generations, resolution=1000)
    store = ObjectStore(bucket, clock=clock, measure_skew=False)
    await store.open()
    for number in range(10):
        await insert(store, fresh(number, priority=number, group="g" if number % 3 == 0 else None))
    done = 0
    while records := (await store.ready("default", "q", NOW, limit=4)).records:
        assert [record.item.priority for record in records] == sorted(
            (record.item.priority for record in records), reverse=True
        )
        for record in records:
            held = await apply(store, lease(record, FAR))
            assert isinstance(held, Updated)
            assert isinstance(await apply(store, Remove(record.item, held.mark)), Removed)
            done += 1
    assert done == 10
    await store.close()


async def test_a_payload_is_not_swept_though_a_listing_missed_its_message() -> None:
    """The message got another name while the sweep listed: behind it what was before it."""
    rig = Rig(page_size=1)
    store, sweeper = await rig.store(), await rig.store()
    op = fresh(5, due=NOW + 9 * 10**6)
    blob = await store.write_blob("default", "q", op.item.id, chunks(b"large"), NOW)
    record = await insert(
        store, replace(op, item=msgspec.structs.replace(op.item, external=True), payload=b"", blob=blob.name)
    )
    await insert(store, fresh(1, due=NOW + 8 * 10**6))
    listing, moved = rig.network(sweeper).inner.list, False

    async def moving(prefix: str, *, after: str | None = None) -> Any:
        nonlocal moved
        async for page in listing(prefix, after=after):
            yield page
            if page and "/m/" in page[0].name and not moved:
                moved = True
                early = Update(record.item, record.mark, NOW, False, None, Box.LIVE, b"early")
                assert isinstance(await apply(store, early), Updated)

    rig.network(sweeper).inner.list = moving  # type: ignore[method-assign]
    assert await sweeper.sweep(NOW + 10**9, older_than=1000, limit=10) == 0
    assert moved
    assert b"".join([chunk async for chunk in store.read_blob(record.item)]) == b"large"


async def test_a_delete_that_had_to_wait_for_its_turn_is_not_sent_too_late() -> None:
    """Others' requests kept it waiting until the lease was nearly over: then it is fenced."""
    rig = Rig()
    store = await rig.store()
    records = [await insert(store, fresh(number)) for number in range(9)]
    helds = [await apply(store, lease(record, NOW + 60_000)) for record in records]
    network = rig.network(store)
    delete, go_on = network.inner.delete, asyncio.Event()

    async def slow(name: str) -> None:
        await go_on.wait()
        await delete(name)

    network.inner.delete = slow  # type: ignore[method-assign]
    network.reset()
    acks = []
    for record, held in zip(records, helds, strict=True):
        assert isinstance(held, Updated)
        acks.append(asyncio.ensure_future(apply(store, Remove(record.item, held.mark))))
        for _ in range(20):
            await asyncio.sleep(0)
    # Eight requests are under way; the ninth waits.
    assert [kind for kind, _ in network.calls] == ["delete"] * 8
    rig.clock.advance(50)
    go_on.set()
    assert await asyncio.gather(*acks) == [Removed()] * 9
    assert [kind for kind, _ in network.calls] == ["delete"] * 8 + ["replace", "delete"]
    assert await picture(store) == {}
