"""Every sentence of the bucket protocol, on every kind of bucket: in memory, and on servers that play the clouds."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import pytest

from millpond.errors import MessageNotFound, MillpondError, StoreClosed
from millpond.model.clock import SystemClock
from millpond.model.ids import IdSource
from millpond.stores.objects.bucket import Bucket, Entry, ObjectChanged, ObjectExists, Tag
from millpond.stores.objects.clouds import Cloud
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.obstore_bucket import PART, Clients, ObstoreBucket
from millpond.stores.objects.opening import open_bucket, parse_location

Make = Callable[[], Bucket]
"""Another handle on the same bucket, below a prefix that is the test's own."""

CLOCK = SystemClock()
SERVERS = ("seaweed", "azurite", "google")
KINDS = ("memory", "memory-generations", "obstore-memory", *SERVERS)
_prefixes = itertools.count(1)


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Make:
    kind = request.param
    if kind.startswith("memory"):
        first = MemoryBucket(clock=CLOCK, generations=kind == "memory-generations", turns=2, reply_turns=1)
        return first.share
    if kind == "obstore-memory":
        from obstore.store import MemoryStore

        store = MemoryStore()
        return lambda: ObstoreBucket(
            Clients(store, store, store, store), Cloud.MEMORY, where="memory", clock=CLOCK, ids=IdSource(CLOCK)
        )
    server = request.getfixturevalue(kind)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    location = parse_location(server.url(f"test-{os.getpid()}/{next(_prefixes)}"))
    return lambda: open_bucket(location, clock=CLOCK)


async def chunks_of(*pieces: bytes, error: BaseException | None = None) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
    if error is not None:
        raise error


async def everything(bucket: Bucket, prefix: str, after: str | None = None) -> list[Entry]:
    return [entry async for page in bucket.list(prefix, after=after) for entry in page]


async def names(bucket: Bucket, prefix: str, after: str | None = None) -> list[str]:
    return [entry.name for entry in await everything(bucket, prefix, after)]


async def collected(bucket: Bucket, name: str) -> list[bytes]:
    return [chunk async for chunk in bucket.download(name)]


async def test_a_created_object_is_read_as_written(make: Make) -> None:
    bucket, other = make(), make()
    data = bytes(range(256)) * 5
    before = CLOCK.now_ms()
    tag = await bucket.create("a/b/c", data)
    content = await other.read("a/b/c")
    assert content is not None
    assert (content.data, content.tag) == (data, tag)
    # Some tell whole seconds; the servers are on this machine, so that the clock is the same.
    assert before - 1000 <= content.modified <= CLOCK.now_ms() + 1000


async def test_an_empty_object_is_one(make: Make) -> None:
    bucket = make()
    await bucket.create("empty", b"")
    content = await bucket.read("empty")
    assert content is not None
    assert content.data == b""
    [entry] = await everything(bucket, "")
    assert (entry.name, entry.size) == ("empty", 0)


async def test_a_create_loses_to_what_is_there(make: Make) -> None:
    bucket = make()
    await bucket.create("a", b"1")
    with pytest.raises(ObjectExists, match="a is there already; read it"):
        await bucket.create("a", b"2")
    with pytest.raises(ObjectExists):
        await bucket.create("a", b"1")  # the same bytes are no excuse
    content = await bucket.read("a")
    assert content is not None
    assert content.data == b"1"


async def test_a_removed_object_can_be_created_again(make: Make) -> None:
    bucket = make()
    await bucket.create("a", b"1")
    await bucket.delete("a")
    await bucket.create("a", b"2")
    content = await bucket.read("a")
    assert content is not None
    assert content.data == b"2"


async def test_a_replace_needs_the_version(make: Make) -> None:
    bucket = make()
    first = await bucket.create("a", b"1")
    second = await bucket.replace("a", b"2", first)
    assert not first.same(second)
    with pytest.raises(ObjectChanged, match="a was changed or removed; read it again"):
        await bucket.replace("a", b"3", first)
    content = await bucket.read("a")
    assert content is not None
    assert (content.data, content.tag) == (b"2", second)
    third = await bucket.replace("a", b"much longer than before" * 100, content.tag)
    content = await bucket.read("a")
    assert content is not None
    assert content.tag == third


async def test_a_replace_of_nothing_fails(make: Make) -> None:
    bucket = make()
    tag = await bucket.create("a", b"1")
    with pytest.raises(ObjectChanged):
        await bucket.replace("never", b"2", tag)
    await bucket.delete("a")
    with pytest.raises(ObjectChanged):
        await bucket.replace("a", b"2", tag)
    assert await names(bucket, "") == []


async def test_a_version_from_a_listing_or_a_read_will_do(make: Make) -> None:
    bucket = make()
    written = await bucket.create("a", b"1")
    [entry] = await everything(bucket, "")
    assert entry.tag.same(written)
    await bucket.replace("a", b"2", entry.tag)
    with pytest.raises(ObjectChanged):
        await bucket.replace("a", b"3", entry.tag)
    [entry] = await everything(bucket, "")
    await bucket.delete("a")
    with pytest.raises(ObjectChanged):
        await bucket.replace("a", b"3", entry.tag)


async def test_what_is_not_there_reads_as_none(make: Make) -> None:
    bucket = make()
    assert await bucket.read("none") is None
    await bucket.create("some/thing", b"")
    assert await bucket.read("some") is None


async def test_a_delete_is_repeatable(make: Make) -> None:
    bucket = make()
    await bucket.create("a", b"1")
    await bucket.delete("a")
    assert await bucket.read("a") is None
    await bucket.delete("a")
    await bucket.delete("never")
    assert await names(bucket, "") == []


@pytest.mark.parametrize("count", [0, 1, 300])
async def test_many_are_deleted_there_or_not(make: Make, count: int) -> None:
    bucket = make()
    there = [f"d/{number:04}" for number in range(count)]
    await asyncio.gather(*(bucket.create(name, b"x") for name in there), bucket.create("d/keep", b"x"))
    await bucket.delete_many([*there[: count // 2], *[f"never/{n}" for n in range(min(count, 3))]])
    assert await names(bucket, "") == [*there[count // 2 :], "d/keep"]
    await bucket.delete_many(there)
    assert await names(bucket, "") == ["d/keep"]


async def test_of_racing_creates_one_wins(make: Make) -> None:
    # All races at once: SeaweedFS lets losers wait for a second.
    handles = [make() for _ in range(8)]
    bodies = [b"%d" % number for number in range(8)]
    await asyncio.gather(*(_race(handles, f"race/{turn}", bodies, None) for turn in range(20)))


async def test_of_racing_creates_of_equal_bodies_one_wins(make: Make) -> None:
    handles = [make() for _ in range(8)]
    await asyncio.gather(*(_race(handles, f"race/{turn}", [b"the same"] * 8, None) for turn in range(20)))


async def test_of_racing_replaces_one_wins(make: Make) -> None:
    handles = [make() for _ in range(8)]
    bodies = [b"%d" % number for number in range(8)]

    async def races(name: str) -> None:
        tag = await handles[0].create(name, b"first")
        await _race(handles, name, bodies, tag)

    await asyncio.gather(*(races(f"race/{turn}") for turn in range(20)))


async def _race(handles: list[Bucket], name: str, bodies: list[bytes], tag: Tag | None) -> Tag:
    """All write at once: one succeeds, the others are told why not, and what it wrote is there under its tag."""
    outcomes = await asyncio.gather(
        *(
            bucket.create(name, body) if tag is None else bucket.replace(name, body, tag)
            for bucket, body in zip(handles, bodies, strict=True)
        ),
        return_exceptions=True,
    )
    lost = ObjectExists if tag is None else ObjectChanged
    winners = [(body, outcome) for body, outcome in zip(bodies, outcomes, strict=True) if isinstance(outcome, Tag)]
    assert [type(outcome) for outcome in outcomes if not isinstance(outcome, Tag)] == [lost] * (len(handles) - 1)
    [(body, won)] = winners
    content = await handles[-1].read(name)
    assert content is not None
    assert (content.data, content.tag) == (body, won)
    return won


async def test_a_counter_by_conditional_writes_misses_nothing(make: Make) -> None:
    bucket = make()
    await bucket.create("counter", b"0")

    async def add(times: int) -> None:
        mine = make()
        for _ in range(times):
            while True:
                content = await mine.read("counter")
                assert content is not None
                try:
                    await mine.replace("counter", b"%d" % (int(content.data) + 1), content.tag)
                except ObjectChanged:
                    continue
                break

    await asyncio.gather(*(add(8) for _ in range(5)))
    content = await bucket.read("counter")
    assert content is not None
    assert content.data == b"40"


async def test_a_listing_shows_what_was_just_written(make: Make) -> None:
    bucket, other = make(), make()
    for number in range(20):
        tag = await bucket.create(f"l/{number:02}", b"x" * number)
        entries = await everything(other, "l/")
        assert [entry.name for entry in entries] == [f"l/{n:02}" for n in range(number + 1)]
        assert entries[-1].size == number
        assert entries[-1].tag.same(tag)
        assert abs(entries[-1].modified - CLOCK.now_ms()) < 60_000
    await bucket.delete("l/07")
    assert "l/07" not in await names(other, "l/")


async def test_a_listing_is_in_order_below_its_prefix_and_after_its_start(make: Make) -> None:
    bucket = make()
    wanted = ["p/a-1", "p/a-2", "p/a-3", "p/ab", "p/b", "p/c-", "p/d/e"]
    await asyncio.gather(*(bucket.create(name, b"") for name in [*reversed(wanted), "o/z", "q", "p2/a"]))
    assert await names(bucket, "p/") == wanted
    assert await names(bucket, "p/a-") == wanted[:3]
    assert await names(bucket, "p/a") == wanted[:4]
    assert await names(bucket, "p/a-2") == ["p/a-2"]
    assert await names(bucket, "p/", after="p/a-3") == wanted[3:]
    assert await names(bucket, "p/", after="p/a-21") == wanted[2:]
    assert await names(bucket, "p/a-", after="p/a-1") == wanted[1:3]
    assert await names(bucket, "p/", after="a") == wanted
    assert await names(bucket, "p/", after="p/d/e") == []
    assert await names(bucket, "p/", after="zzz") == []
    assert await names(bucket, "p/b/") == []
    assert await names(bucket, "p") == [*wanted, "p2/a"]


async def test_a_listing_of_nothing_is_one_empty_page(make: Make) -> None:
    bucket = make()
    assert [page async for page in bucket.list("never/")] == [[]]
    assert [page async for page in bucket.list("never/a-", after="never/a-1")] == [[]]


async def test_long_listings_come_in_pages(make: Make) -> None:
    bucket = make()
    there = [f"many/{number:05}" for number in range(1100)]
    for start in range(0, len(there), 100):
        await asyncio.gather(*(bucket.create(name, b"x") for name in there[start : start + 100]))
    await bucket.create("many-", b"")
    before = _lists(bucket)
    pages = [[entry.name for entry in page] async for page in bucket.list("many/")]
    assert [name for page in pages for name in page] == there
    assert all(pages)
    if isinstance(bucket, ObstoreBucket):
        assert bucket.sent["list"] - before == len(pages) == (1 if bucket.cloud is Cloud.AZURE else 2)
    assert await names(bucket, "many/", after=there[1050]) == there[1051:]
    assert await names(bucket, "many/005") == there[500:600]
    before = _lists(bucket)
    async with aclosing(bucket.list("many/")) as listing:
        async for page in listing:
            assert page[0].name == there[0]
            break
    if isinstance(bucket, ObstoreBucket):
        assert bucket.sent["list"] - before == 1, "a reader that stops early saves the rest"
    assert len((await bucket.folder("many/")).entries) == len(there)
    for start in range(0, len(there), 100):  # each in its own time: a slow server deletes them one by one
        await bucket.delete_many(there[start : start + 100])
    assert await names(bucket, "many") == ["many-"]


def _lists(bucket: Bucket) -> int:
    return bucket.sent["list"] if isinstance(bucket, ObstoreBucket) else 0


async def test_a_folder_is_one_level(make: Make) -> None:
    bucket = make()
    await asyncio.gather(
        *(bucket.create(name, b"12") for name in ("f/0/a", "f/0/b", "f/9/x", "f/o/y", "f/one", "f/two", "f-/x", "g"))
    )
    found = await bucket.folder("f/")
    assert found.folders == ["f/0", "f/9", "f/o"]
    assert [(entry.name, entry.size) for entry in found.entries] == [("f/one", 2), ("f/two", 2)]
    assert await bucket.folder("none/") == ([], [])
    top = await bucket.folder("")
    assert (sorted(top.folders), [entry.name for entry in top.entries]) == (["f", "f-"], ["g"])


async def test_a_folder_goes_with_its_last_object(make: Make) -> None:
    bucket = make()
    await asyncio.gather(*(bucket.create(name, b"") for name in ("f/gone/a", "f/gone/b", "f/kept/a")))
    await bucket.delete_many(["f/gone/a", "f/gone/b"])
    found = (await bucket.folder("f/")).folders
    if isinstance(bucket, ObstoreBucket) and bucket.cloud is Cloud.S3:
        # SeaweedFS, which has real folders and removes empty ones some time later: a folder is a hint, not more.
        assert found in (["f/kept"], ["f/gone", "f/kept"])
        assert (await bucket.folder("f/gone/")).entries == []
        assert await names(bucket, "f/") == ["f/kept/a"]
    else:
        assert found == ["f/kept"]


@pytest.mark.parametrize("size", [0, 1, PART, PART + 1, 2 * PART + 5])
async def test_a_stream_comes_out_as_it_went_in(make: Make, size: int) -> None:
    bucket, other = make(), make()
    data = os.urandom(1_000_003) * (size // 1_000_003 + 1)
    data = data[:size]
    pieces = [data[start : start + 700_001] for start in range(0, size, 700_001)]
    assert await bucket.upload("blob", chunks_of(*pieces)) == size
    out = await collected(other, "blob")
    assert b"".join(out) == data
    assert all(0 < len(chunk) <= 2**20 for chunk in out)
    [entry] = await everything(bucket, "")
    assert (entry.name, entry.size) == ("blob", size)


async def test_an_upload_is_unconditional(make: Make) -> None:
    bucket = make()
    await bucket.upload("blob", chunks_of(b"1"))
    await bucket.upload("blob", chunks_of(b"2", b"2"))
    assert b"".join(await collected(bucket, "blob")) == b"22"


@pytest.mark.parametrize("pieces", [0, 1, 20])
async def test_an_upload_whose_source_fails_leaves_nothing(make: Make, pieces: int) -> None:
    bucket = make()
    source = chunks_of(*[b"x" * 1_000_000] * pieces, error=ZeroDivisionError("the source"))
    with pytest.raises(ZeroDivisionError, match="the source"):
        await bucket.upload("blob", source)
    assert await names(bucket, "") == []
    assert await bucket.upload("blob", chunks_of(b"another")) == 7


@pytest.mark.parametrize("pieces", [1, 20])
async def test_a_cancelled_upload_leaves_nothing(make: Make, pieces: int) -> None:
    bucket = make()
    waiting = asyncio.Event()

    async def source() -> AsyncIterator[bytes]:
        for _ in range(pieces):
            yield b"x" * 1_000_000
        waiting.set()
        await asyncio.Event().wait()

    upload = asyncio.create_task(bucket.upload("blob", source()))
    await waiting.wait()
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert await names(bucket, "") == []


async def test_a_download_of_nothing_says_so(make: Make) -> None:
    bucket = make()
    with pytest.raises(MessageNotFound, match="never is not"):
        await collected(bucket, "never")


async def test_a_download_may_be_left(make: Make) -> None:
    bucket = make()
    await bucket.upload("blob", chunks_of(*[b"y" * 1_000_000] * 3))
    async with aclosing(bucket.download("blob")) as download:
        assert len(await anext(download)) > 0
    assert len(b"".join(await collected(bucket, "blob"))) == 3_000_000


async def test_a_closed_bucket_says_so(make: Make) -> None:
    bucket, other = make(), make()
    tag = await bucket.create("a", b"1")
    await bucket.close()
    await bucket.close()
    calls: list[Callable[[], object]] = [
        lambda: bucket.create("b", b""),
        lambda: bucket.replace("a", b"", tag),
        lambda: bucket.read("a"),
        lambda: bucket.delete("a"),
        lambda: bucket.delete_many(["a"]),
        lambda: names(bucket, ""),
        lambda: bucket.folder(""),
        lambda: bucket.upload("c", chunks_of(b"1")),
        lambda: collected(bucket, "a"),
    ]
    for call in calls:
        with pytest.raises(StoreClosed):
            await call()  # type: ignore[misc]
    assert await names(other, "") == ["a"], "the other handle is not concerned"


async def test_a_bucket_that_is_not_there_says_so(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in SERVERS:
        server = request.getfixturevalue(kind)
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        bucket = open_bucket(parse_location(server.url("x").replace("millpond-test", "no-such-bucket")), clock=CLOCK)
        calls: dict[str, Callable[[], object]] = {
            "read": lambda bucket=bucket: bucket.read("a"),
            "list": lambda bucket=bucket: names(bucket, ""),
            "folder": lambda bucket=bucket: bucket.folder(""),
        }
        if kind != "seaweed":  # it makes the bucket
            calls["create"] = lambda bucket=bucket: bucket.create("a", b"")
            calls["upload"] = lambda bucket=bucket: bucket.upload("a", chunks_of(b"1"))
        for what, call in calls.items():
            with pytest.raises(MillpondError, match=r"there is no such bucket .* create it") as caught:
                await call()  # type: ignore[misc]
            assert caught.value.code == "store_error", (kind, what)
