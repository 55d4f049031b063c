"""The bucket in memory is as strict as a cloud."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from millpond.errors import MessageNotFound, StoreClosed
from millpond.model.clock import ManualClock
from millpond.stores.objects.bucket import Entry, ObjectChanged, ObjectExists, Tag
from millpond.stores.objects.memory_bucket import MemoryBucket


async def _names(bucket: MemoryBucket, prefix: str, after: str | None = None) -> list[list[str]]:
    return [[entry.name for entry in page] async for page in bucket.list(prefix, after=after)]


async def _chunks(*parts: bytes | Exception) -> AsyncIterator[bytes]:
    for part in parts:
        if isinstance(part, Exception):
            raise part
        yield part


@pytest.mark.parametrize("generations", [False, True])
async def test_conditions(generations: bool) -> None:
    clock = ManualClock()
    bucket = MemoryBucket(clock=clock, generations=generations)
    first = await bucket.create("a", b"1")
    with pytest.raises(ObjectExists):
        await bucket.create("a", b"2")
    second = await bucket.replace("a", b"2", first)
    for stale in (first, Tag("x", "x"), Tag(None, None)):
        with pytest.raises(ObjectChanged):
            await bucket.replace("a", b"3", stale)
    with pytest.raises(ObjectChanged):
        await bucket.replace("b", b"3", second)
    clock.advance(5)
    back = await bucket.replace("a", b"1", second)
    # Equal bodies: an ETag cannot tell them apart, a generation can.
    assert (back == first) is not generations
    content = await bucket.read("a")
    assert content is not None
    assert (content.data, content.tag, content.modified) == (b"1", back, clock.now_ms())
    await bucket.delete("a")
    await bucket.delete("a")
    assert await bucket.read("a") is None


async def test_one_winner() -> None:
    bucket = MemoryBucket(clock=ManualClock())
    results = await asyncio.gather(*(bucket.create("a", b"%d" % n) for n in range(9)), return_exceptions=True)
    assert sum(isinstance(result, Tag) for result in results) == 1
    tag = next(result for result in results if isinstance(result, Tag))
    results = await asyncio.gather(*(bucket.replace("a", b"n%d" % n, tag) for n in range(9)), return_exceptions=True)
    assert sum(isinstance(result, Tag) for result in results) == 1


async def test_listings_are_in_byte_order_page_by_page() -> None:
    bucket = MemoryBucket(clock=ManualClock(1500), page_size=3, resolution=1000)
    several = ["l", "l-", "l.x", "l/a", "l/b", "l0", "m", "l/ü", "l/\U0001f600", "k"]
    for name in several:
        await bucket.create(name, b"x")
    ordered = sorted((name for name in several if name.startswith("l")), key=lambda name: name.encode())
    assert [name for page in await _names(bucket, "l") for name in page] == ordered
    assert [len(page) for page in await _names(bucket, "l")] == [3, 3, 2]
    assert await _names(bucket, "l", after="l/a") == [ordered[4:7], ordered[7:]]
    assert await _names(bucket, "l/", after="a") == [ordered[3:6], ordered[6:7]]
    assert await _names(bucket, "nothing") == [[]]
    page = await anext(bucket.list("k"))
    assert page == [Entry("k", 1, page[0].tag, 1000)]
    folder = await bucket.folder("l/")
    assert (folder.folders, [entry.name for entry in folder.entries]) == ([], ordered[3:5] + ordered[5:7])
    await bucket.create("q/a/b", b"")
    await bucket.create("q/a/c", b"")
    await bucket.create("q/b/c", b"")
    await bucket.create("q/d", b"")
    folder = await bucket.folder("q/")
    assert (folder.folders, [entry.name for entry in folder.entries]) == (["q/a", "q/b"], ["q/d"])


async def test_a_listing_sees_the_bucket_anew_with_each_page() -> None:
    bucket = MemoryBucket(clock=ManualClock(), page_size=2)
    for name in "abcd":
        await bucket.create(name, b"")
    pages = bucket.list("")
    assert [entry.name for entry in await anext(pages)] == ["a", "b"]
    await bucket.delete("c")
    await bucket.create("aa", b"")
    await bucket.create("e", b"")
    assert [entry.name for entry in await anext(pages)] == ["d", "e"]


async def test_streams() -> None:
    bucket = MemoryBucket(clock=ManualClock())
    big = bytes(range(256)) * 10_000
    assert await bucket.upload("a", _chunks(big, b"", b"end")) == len(big) + 3
    parts = [chunk async for chunk in bucket.download("a")]
    assert b"".join(parts) == big + b"end"
    assert max(map(len, parts)) == 1 << 20
    with pytest.raises(KeyError):
        await bucket.upload("b", _chunks(b"x", KeyError()))
    assert list(bucket.objects) == ["a"]
    with pytest.raises(MessageNotFound):
        await anext(bucket.download("b"))
    await bucket.delete_many(["a", "b"])
    assert bucket.objects == {}


async def test_handles_share_the_objects_and_close_apart() -> None:
    bucket = MemoryBucket(clock=ManualClock())
    other = bucket.share(clock=ManualClock(5))
    await other.create("a", b"x")
    await bucket.close()
    await bucket.close()
    with pytest.raises(StoreClosed):
        await bucket.read("a")
    content = await bucket.share().read("a")
    assert content is not None
    assert content.modified == 5
