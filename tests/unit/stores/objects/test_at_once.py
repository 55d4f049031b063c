"""What is asked at once, and no more than that; and what a look at all queues costs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import pytest
from tests.unit.stores.objects.rig import REFUSED, Network, Rig, fresh, insert, lease

from millpond.errors import StoreError
from millpond.pond import VERIFIED_AT_ONCE, Pond
from millpond.stores.base import Box, PutDocument, QueueName, Removed, Update
from millpond.stores.conformance.harness import NOW, removal
from millpond.stores.objects.bucket import Folder
from millpond.stores.objects.engine import READS
from millpond.stores.objects.exchange import REQUESTS
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.store import ObjectStore

T = TypeVar("T")

MANY = 300


class Gauge(Network):
    """Tells how many requests of each kind were under way at once, and in all; each takes a few turns.

    Its folders outlive what was in them, as SeaweedFS's do for a while."""

    def __init__(self, inner: MemoryBucket) -> None:
        super().__init__(inner)
        self.under_way: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.folders: set[str] = set()

    async def _do(self, kind: str, name: str, request: Callable[[], Awaitable[T]]) -> T:
        if kind in ("create", "replace"):
            parts = name.split("/")
            self.folders |= {"/".join(parts[:depth]) for depth in range(1, len(parts))}
        for what in (kind, "all"):
            self.under_way[what] += 1
            self.most[what] = max(self.most[what], self.under_way[what])
        try:
            for _ in range(5):
                await asyncio.sleep(0)
            return await super()._do(kind, name, request)
        finally:
            for what in (kind, "all"):
                self.under_way[what] -= 1

    async def download(self, name: str) -> AsyncIterator[bytes]:
        self.under_way["download"] += 1
        self.most["download"] = max(self.most["download"], self.under_way["download"])
        try:
            async for chunk in super().download(name):
                await asyncio.sleep(0)
                yield chunk
        finally:
            self.under_way["download"] -= 1

    async def folder(self, prefix: str) -> Folder:
        found = await super().folder(prefix)
        left = {path for path in self.folders if path.startswith(prefix) and "/" not in path.removeprefix(prefix)}
        return Folder(sorted({*found.folders, *left}), found.entries)


async def gauged(rig: Rig, **options: int) -> tuple[ObjectStore, Gauge]:
    gauge = Gauge(rig.root.share())
    store = ObjectStore(gauge, clock=rig.clock, measure_skew=False, **options)  # type: ignore[arg-type]
    await store.open()
    gauge.reset()
    return store, gauge


async def test_the_ops_of_a_call_are_written_at_once_but_not_all() -> None:
    rig = Rig()
    store, gauge = await gauged(rig)
    await store.write([fresh(number) for number in range(MANY)])
    page = await store.ready("default", "q", NOW, limit=MANY)
    await store.write([lease(record, NOW + 60_000) for record in page.records])
    held = (await store.list("default", "q", Box.LIVE, limit=MANY)).records
    outcomes = await store.write([removal(record) for record in held])
    assert outcomes == [Removed()] * MANY
    assert (gauge.count("create"), gauge.count("replace")) == (MANY, MANY)
    assert {gauge.most[kind] for kind in ("create", "replace", "all")} == {REQUESTS}
    # How deletes share requests is another matter.
    assert 0 < gauge.count("delete", "delete_many") <= MANY
    assert rig.root.objects.keys() == {"millpond.json"}
    await store.close()


async def test_what_others_put_in_is_read_at_once() -> None:
    rig = Rig()
    other = await rig.store()
    await other.write([fresh(number) for number in range(MANY)])
    store, gauge = await gauged(rig)
    page = await store.ready("default", "q", NOW, limit=MANY)
    assert len(page.records) == MANY
    assert (gauge.count("read"), gauge.most["read"]) == (MANY, READS)
    await store.close()


async def test_everything_is_verified_some_at_once() -> None:
    rig = Rig()
    other = await rig.store()
    await other.write([fresh(number, chosen=True) for number in range(MANY)])
    store, gauge = await gauged(rig)
    assert await store.verify() == []
    assert (gauge.count("read"), gauge.most["read"]) == (2 * MANY, READS), "messages and markers"
    await store.close()


async def test_large_payloads_are_verified_some_at_once_and_how_many_is_told() -> None:
    rig = Rig()
    store, gauge = await gauged(rig, inline_limit=8)
    count = VERIFIED_AT_ONCE * 2 + 3
    told: list[int] = []
    async with Pond(store, clock=rig.clock) as pond:
        queue = pond.queue("q")
        ids = [(await queue.enqueue(b"large payload %d" % number)).message_id for number in range(count)]
        gauge.reset()
        gauge.most.clear()
        assert await pond.verify(progress=told.append) == []
        assert gauge.most["download"] == VERIFIED_AT_ONCE
        assert (told[-1], sorted(told)) == (count, told)
        broken = {ids[0], ids[17], ids[-1]}
        for name in list(rig.root.objects):
            if "/b/" in name and any(id.replace("-", "") in name for id in broken):
                await rig.root.upload(name, _chunks(b"something else!"))
        found = await pond.verify()
        assert [problem.where for problem in found] == [f"message {id} in default/q" for id in ids if id in broken]


async def _chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def test_what_cannot_be_read_is_not_called_sound() -> None:
    rig = Rig()
    other = await rig.store()
    await insert(other, fresh(1, chosen=True))
    store, gauge = await gauged(rig)
    await store.verify()
    reads = [number for number, (kind, _) in enumerate(gauge.calls, 1) if kind == "read"]
    assert [gauge.calls[number - 1][1].split("/")[3] for number in reads] == ["m", "i"]
    gauge.reset({reads[0]: REFUSED})
    [problem] = await store.verify()
    assert (problem.where.split("/")[3], problem.what) == ("m", "the bucket refused; try again later")
    gauge.reset({reads[1]: REFUSED})
    with pytest.raises(StoreError, match="the bucket refused"):
        await store.verify()
    await store.close()


async def test_a_folder_that_outlived_its_objects_is_no_queue() -> None:
    rig = Rig()
    store, gauge = await gauged(rig)
    for number, queue in enumerate(["empty", "full", "dead", "named", "tombs"]):
        await insert(store, fresh(number, queue=queue))
    for queue in ("empty", "dead", "tombs"):
        [record] = (await store.ready("default", queue, NOW, limit=1)).records
        if queue == "tombs":
            # Nobody holds it, so it is not simply deleted; and that the tombstone is fails.
            gauge.reset({2: REFUSED})
            assert await store.write([removal(record)]) == [Removed()]
            assert [kind for kind, _ in gauge.calls] == ["replace", "delete"]
            gauge.reset()
        elif queue == "dead":
            await store.write([Update(record.item, record.mark, record.mark.due, False, None, Box.DEAD, b"dead")])
        else:
            assert await store.write([removal(record)]) == [Removed()]
    await store.write([PutDocument("default", "named", None, b"policy")])
    gauge.reset()
    assert await store.queues() == [QueueName("default", name) for name in ("dead", "full", "named")]
    requests = Counter(name.split("/")[2] for _, name in gauge.calls if name.count("/") > 2)
    assert requests == {"dead": 3, "empty": 2, "full": 2, "named": 1, "tombs": 2}
    assert gauge.most["list"] <= READS
    await store.close()
