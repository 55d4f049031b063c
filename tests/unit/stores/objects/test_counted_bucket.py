"""What a bucket is asked is counted: every request, refused or not, under its queue."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from millpond.errors import StoreError
from millpond.stores.base import QueueName, Requests
from millpond.stores.objects import requests as requests_module
from millpond.stores.objects.bucket import Bucket, Content, Entry, Folder, ObjectChanged, ObjectExists, Tag
from millpond.stores.objects.requests import CountedBucket, queue_of

TAG = Tag("e", None)
A, B = QueueName("default", "a"), QueueName("shop", "b.c-d_e")
IN_A, IN_B = "q/default/a/m/5/x", "q/shop/b.c-d_e/policy"


class Scripted:
    """A bucket that answers as it was told to, and notes what it was asked."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.pages: list[list[Entry]] = []
        self.found = Folder([], [])
        self.failing: Exception | None = None
        self.asked: list[tuple[object, ...]] = []
        self.closed = 0

    def _note(self, *call: object) -> None:
        self.asked.append(call)
        if self.failing is not None:
            raise self.failing

    async def create(self, name: str, data: bytes) -> Tag:
        self._note("create", name, data)
        return TAG

    async def replace(self, name: str, data: bytes, tag: Tag) -> Tag:
        self._note("replace", name, data, tag)
        return TAG

    async def read(self, name: str) -> Content | None:
        self._note("read", name)
        data = self.objects.get(name)
        return None if data is None else Content(data, TAG, 0)

    async def delete(self, name: str) -> None:
        self._note("delete", name)

    async def delete_many(self, names: list[str]) -> None:
        self._note("delete_many", names)

    async def list(self, prefix: str, *, after: str | None = None) -> AsyncIterator[list[Entry]]:
        self._note("list", prefix, after)
        try:
            for page in self.pages:
                yield page
        finally:
            self.closed += 1

    async def folder(self, prefix: str) -> Folder:
        self._note("folder", prefix)
        return self.found

    async def upload(self, name: str, chunks: AsyncIterator[bytes]) -> int:
        size = 0
        async for chunk in chunks:
            size += len(chunk)
        self._note("upload", name, size)
        return size

    async def download(self, name: str) -> AsyncIterator[bytes]:
        self._note("download", name)
        try:
            for _ in range(3):
                yield self.objects[name]
        finally:
            self.closed += 1

    async def close(self) -> None:
        self.closed += 1


def entries(count: int) -> list[Entry]:
    return [Entry(f"q/default/a/m/5/{number}", 1, TAG, 0) for number in range(count)]


async def chunks(*sizes: int) -> AsyncIterator[bytes]:
    for size in sizes:
        yield bytes(size)


@pytest.mark.parametrize(
    ("name", "queue"),
    [
        (IN_A, A),
        (IN_B, B),
        ("q/default/a/", A),
        ("q/default/a/m/o/x/y", A),
        ("q/default/a", None),
        ("q/default/", None),
        ("q/", None),
        ("millpond.json", None),
        ("x/default/a/m", None),
        ("", None),
    ],
)
def test_an_object_belongs_to_the_queue_in_its_name(name: str, queue: QueueName | None) -> None:
    assert queue_of(name) == queue


async def test_each_kind_is_counted_under_its_queue() -> None:
    inner = Scripted()
    inner.objects = {IN_A: b"12345", IN_B: b"1234567"}
    inside: Bucket = inner
    bucket: Bucket = CountedBucket(inside)
    assert await bucket.create(IN_A, b"123") == TAG
    assert await bucket.replace(IN_A, b"12", TAG) == TAG
    await bucket.create("millpond.json", b"1")
    content = await bucket.read(IN_B)
    assert content is not None
    assert content.data == b"1234567"
    assert await bucket.read("q/shop/b.c-d_e/gone") is None
    await bucket.delete(IN_A)
    assert [chunk async for chunk in bucket.download(IN_A)] == [b"12345"] * 3
    assert await bucket.upload(IN_B, chunks(4, 6)) == 10
    assert await bucket.folder("q/") == Folder([], [])
    assert bucket.requests() == {  # type: ignore[attr-defined]
        None: Requests(creates=1, lists=1, bytes_sent=1),
        A: Requests(creates=1, replaces=1, deletes=1, reads=1, bytes_sent=5, bytes_received=15),
        B: Requests(reads=2, parts=1, bytes_sent=10, bytes_received=7),
    }
    assert inner.asked == [
        ("create", IN_A, b"123"),
        ("replace", IN_A, b"12", TAG),
        ("create", "millpond.json", b"1"),
        ("read", IN_B),
        ("read", "q/shop/b.c-d_e/gone"),
        ("delete", IN_A),
        ("download", IN_A),
        ("upload", IN_B, 10),
        ("folder", "q/"),
    ]
    await bucket.close()
    assert inner.closed == 2


@pytest.mark.parametrize("error", [ObjectExists(), ObjectChanged(), StoreError("throttled")], ids=repr)
async def test_what_is_refused_is_paid_for(error: Exception) -> None:
    inner = Scripted()
    inner.failing = error
    bucket = CountedBucket(inner)
    for call in (
        bucket.create(IN_A, b"1"),
        bucket.replace(IN_A, b"12", TAG),
        bucket.read(IN_A),
        bucket.delete(IN_A),
        bucket.delete_many([IN_A]),
        bucket.folder("q/default/a/m/"),
        bucket.upload(IN_A, chunks(5)),
        anext(bucket.list("q/default/a/m/")),
        anext(bucket.download(IN_A)),
    ):
        with pytest.raises(type(error)):
            await call
    expected = Requests(creates=1, replaces=1, reads=2, deletes=2, lists=2, parts=1, bytes_sent=8)
    assert bucket.requests()[A] == expected


@pytest.mark.parametrize(("pages", "lists"), [(0, 1), (1, 1), (3, 3)])
async def test_each_page_of_a_listing_is_a_request(pages: int, lists: int) -> None:
    inner = Scripted()
    inner.pages = [entries(2)] * pages
    bucket = CountedBucket(inner)
    found = [page async for page in bucket.list("q/default/a/m/5/", after="q/default/a/m/5/0")]
    assert found == inner.pages
    assert inner.asked == [("list", "q/default/a/m/5/", "q/default/a/m/5/0")]
    assert bucket.requests()[A] == Requests(lists=lists)


async def test_a_reader_that_stops_early_pays_for_what_it_read_and_ends_the_listing() -> None:
    inner = Scripted()
    inner.pages = [entries(1)] * 5
    inner.objects = {IN_A: b"123"}
    bucket = CountedBucket(inner)
    pages, data = bucket.list("q/default/a/"), bucket.download(IN_A)
    await anext(pages)
    await anext(pages)
    await anext(data)
    await pages.aclose()  # type: ignore[attr-defined]
    await data.aclose()  # type: ignore[attr-defined]
    assert inner.closed == 2
    assert bucket.requests()[A] == Requests(lists=2, reads=1, bytes_received=3)


@pytest.mark.parametrize(("found", "lists"), [(0, 1), (1, 1), (1000, 1), (1001, 2), (2500, 3)])
async def test_a_full_folder_takes_several_requests(found: int, lists: int) -> None:
    inner = Scripted()
    inner.found = Folder([f"q/default/{number}" for number in range(found // 2)], entries(found - found // 2))
    bucket = CountedBucket(inner)
    assert await bucket.folder("q/default/") == inner.found
    assert bucket.requests() == {None: Requests(lists=lists)}


@pytest.mark.parametrize(("count", "deletes"), [(0, 0), (1, 1), (100, 1), (101, 2)])
async def test_deletes_are_counted_by_what_one_request_takes(count: int, deletes: int) -> None:
    inner = Scripted()
    bucket = CountedBucket(inner, batch=100)
    names = [f"{IN_A}{number}" for number in range(count)]
    await bucket.delete_many(names)
    assert inner.asked == [("delete_many", names)]
    assert bucket.requests().get(A, Requests()) == Requests(deletes=deletes)


@pytest.mark.parametrize(("sizes", "parts"), [((), 1), ((9, 1), 1), ((9, 2), 4), ((10, 10, 10), 5), ((10, 21), 6)])
async def test_an_upload_in_parts_takes_two_requests_more_than_it_has_parts(sizes: tuple[int, ...], parts: int) -> None:
    bucket = CountedBucket(Scripted(), part_bytes=10)
    assert await bucket.upload(IN_A, chunks(*sizes)) == sum(sizes)
    assert bucket.requests()[A] == Requests(parts=parts, bytes_sent=sum(sizes))


async def test_a_million_queues_are_no_million_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests_module, "MAX_QUEUES", 3)
    bucket = CountedBucket(Scripted())
    for number in range(10):
        await bucket.delete(f"q/default/{number}/m/5/x")
    assert bucket.requests() == {
        None: Requests(deletes=7),
        **{QueueName("default", str(number)): Requests(deletes=1) for number in range(3)},
    }


async def test_a_snapshot_stays_what_it_was() -> None:
    bucket = CountedBucket(Scripted())
    await bucket.delete(IN_A)
    before = bucket.requests()
    await bucket.delete(IN_A)
    assert before[A] == Requests(deletes=1)
    assert bucket.requests()[A] == Requests(deletes=2)
