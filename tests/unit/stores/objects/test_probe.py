"""The probe finds out every lie that a bucket may tell, and believes an honest one."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from millpond.errors import MillpondError, OutcomeUnknown, StoreBusy, StoreError, StoreMismatch
from millpond.model.clock import ManualClock
from millpond.model.ids import IdSource
from millpond.stores.base import Finding
from millpond.stores.objects import names
from millpond.stores.objects.bucket import Content, Entry, ObjectChanged, ObjectExists, Tag
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.probe import GOOD_FOR, check_at_opening, probe

WHERE = "s3://bucket/p"


class Bucket(MemoryBucket):
    """Honest, and counts requests."""

    def __init__(self, **options: Any) -> None:
        self.clock = ManualClock()
        super().__init__(clock=options.pop("clock", self.clock), turns=2, **options)
        self.requests = 0
        self.truth = MemoryBucket.share(self)

    async def _request(self) -> None:
        self.requests += 1
        await super()._request()


class IgnoresNoneMatch(Bucket):
    async def create(self, name: str, data: bytes) -> Tag:
        await self._request()
        return self._put(name, data)


class IgnoresMatch(Bucket):
    async def replace(self, name: str, data: bytes, tag: Tag) -> Tag:
        await self._request()
        if name not in self.objects:
            raise ObjectChanged
        return self._put(name, data)


class ChecksThenWrites(Bucket):
    """Looks whether the condition holds, and writes a little later."""

    async def create(self, name: str, data: bytes) -> Tag:
        there = name in self.objects
        await self._request()
        if there:
            raise ObjectExists
        return self._put(name, data)


class TellsTheWrongWinner(Bucket):
    async def create(self, name: str, data: bytes) -> Tag:
        try:
            return await super().create(name, data)
        except ObjectExists:
            self._put(name, data)
            raise


class NobodyWins(Bucket):
    async def replace(self, name: str, data: bytes, tag: Tag) -> Tag:
        await super().replace(name, data, tag)
        raise ObjectChanged


class WrongTag(Bucket):
    async def create(self, name: str, data: bytes) -> Tag:
        await super().create(name, data)
        return Tag('"another"', None)


class RevivesTheDead(Bucket):
    async def replace(self, name: str, data: bytes, tag: Tag) -> Tag:
        if name not in self.objects:
            return self._put(name, data)
        return await super().replace(name, data, tag)


class RevivesSilently(Bucket):
    async def replace(self, name: str, data: bytes, tag: Tag) -> Tag:
        if name not in self.objects:
            self._put(name, data)
            raise ObjectChanged
        return await super().replace(name, data, tag)


class OldReads(Bucket):
    """A cache before it: what was read once is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Content] = {}

    async def read(self, name: str) -> Content | None:
        found = self.cache.get(name) or await super().read(name)
        if found is not None and "fresh" in name:
            self.cache[name] = found
        return found


class OldListings(Bucket):
    async def list(self, prefix: str, *, after: str | None = None) -> AsyncIterator[list[Entry]]:
        async for page in super().list(prefix, after=after):
            newest = max((entry.name for entry in page if "/l/" in entry.name), default="")
            yield [entry for entry in page if entry.name != newest]


class ListsTheDead(Bucket):
    def __init__(self) -> None:
        super().__init__()
        self.dead: dict[str, Entry] = {}

    async def delete(self, name: str) -> None:
        if "/l/" in name and name in self.objects:
            self.dead[name] = self._entry(name)
        await super().delete(name)

    async def list(self, prefix: str, *, after: str | None = None) -> AsyncIterator[list[Entry]]:
        async for page in super().list(prefix, after=after):
            yield page if prefix.endswith("/o/") else sorted([*page, *self.dead.values()])


class OutOfOrder(Bucket):
    async def list(self, prefix: str, *, after: str | None = None) -> AsyncIterator[list[Entry]]:
        async for page in super().list(prefix, after=after):
            yield page[::-1]


class IgnoresAfter(Bucket):
    async def list(self, prefix: str, *, after: str | None = None) -> AsyncIterator[list[Entry]]:
        async for page in super().list(prefix):
            yield page


class KeepsAll(Bucket):
    async def delete_many(self, names: list[str]) -> None:
        if any("/d/" in name for name in names):
            return
        await super().delete_many(names)


class CutsStreams(Bucket):
    async def upload(self, name: str, chunks: AsyncIterator[bytes]) -> int:
        size = await super().upload(name, chunks)
        self._put(name, self.objects[name][:-1])
        return size


class MayNot(Bucket):
    """No permission for one kind of request."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def __getattribute__(self, name: str) -> Any:
        if name == super().__getattribute__("__dict__").get("_kind"):

            async def refuse(*arguments: object, **more: object) -> None:
                raise StoreError(f"no permission to {name}")

            async def refuse_pages(*arguments: object, **more: object) -> AsyncIterator[list[Entry]]:
                raise StoreError(f"no permission to {name}")
                yield []

            return refuse_pages if name == "list" else refuse
        return super().__getattribute__(name)


def ids(bucket: Bucket) -> IdSource:
    return IdSource(bucket.clock)


async def opening(bucket: Bucket, where: str = WHERE) -> None:
    await check_at_opening(bucket, where=where, clock=bucket.clock, ids=ids(bucket))


async def whole(bucket: Bucket) -> list[Finding]:
    return await probe(bucket, clock=bucket.clock, ids=ids(bucket))


LIARS: dict[Callable[[], Bucket], tuple[str, str]] = {
    IgnoresNoneMatch: ("conditional create", "racing creates .* succeeded where one may"),
    IgnoresMatch: ("conditional replace", "racing replaces .* succeeded where one may"),
    ChecksThenWrites: ("conditional create", "succeeded where one may"),
    TellsTheWrongWinner: ("conditional create", "another body is stored"),
    NobodyWins: ("conditional replace", "none succeeded"),
    WrongTag: ("conditional create", "another version than its writer was told"),
}
SUBTLE: dict[Callable[[], Bucket], tuple[str, str]] = {
    RevivesTheDead: ("replace of a missing object", "could come back"),
    RevivesSilently: ("replace of a missing object", "fails, and writes it"),
    OldReads: ("read after write", "an older version"),
    OldListings: ("list after write", "lacks an object"),
    ListsTheDead: ("list after write", "that was just deleted"),
    OutOfOrder: ("order of listings", "not in the order of names"),
    IgnoresAfter: ("order of listings", "starts after a name"),
    KeepsAll: ("delete", "still there"),
    CutsStreams: ("streams", "otherwise than it went in"),
}


async def test_an_honest_bucket_passes_and_keeps_nothing() -> None:
    for options in ({}, {"generations": True}, {"resolution": 1000}, {"page_size": 3}):
        bucket = Bucket(**options)
        findings = await whole(bucket)
        assert [finding for finding in findings if not finding.ok] == []
        assert len(findings) == 18
        assert [f.check for f in findings if f.milliseconds is not None] == [
            f"time of a {kind}" for kind in ("create", "replace", "read", "list", "delete")
        ]
        assert bucket.truth.objects == {}
        assert bucket.requests < 400


@pytest.mark.parametrize("liar", LIARS, ids=lambda liar: liar.__name__)
async def test_a_bucket_without_conditional_writes_is_refused(liar: Callable[[], Bucket]) -> None:
    bucket = liar()
    check, words = LIARS[liar]
    with pytest.raises(StoreMismatch, match=f"{WHERE} cannot hold a queue: .*{words}.*millpond verify"):
        await opening(bucket)
    assert bucket.truth.objects == {}, "neither a note nor a rest"
    found = {finding.check: finding for finding in await whole(liar())}
    assert not found[check].ok
    assert found[check].serious


@pytest.mark.parametrize("liar", SUBTLE, ids=lambda liar: liar.__name__)
async def test_the_whole_probe_finds_what_the_short_one_does_not(liar: Callable[[], Bucket]) -> None:
    check, words = SUBTLE[liar]
    bucket = liar()
    failed = [finding for finding in await whole(bucket) if not finding.ok]
    assert [finding.check for finding in failed] == [check]
    assert re.search(words, failed[0].detail), failed[0].detail
    assert failed[0].serious


@pytest.mark.parametrize(
    ("kind", "check"), [("create", "may write"), ("read", "may read"), ("list", "may list"), ("delete", "may delete")]
)
async def test_a_missing_permission_is_the_last_finding(kind: str, check: str) -> None:
    findings = [finding for finding in await whole(MayNot(kind)) if finding.check != "tidying up"]
    assert findings[-1].check == check
    assert not findings[-1].ok
    assert findings[-1].serious
    assert findings[-1].detail == f"no permission to {kind} [store_error]"
    assert all(finding.ok for finding in findings[:-1])


@pytest.mark.parametrize(("offset", "words"), [(60, "60.0 s ahead of"), (-60, "behind"), (-4, None), (0, None)])
async def test_a_clock_that_differs_is_a_warning(offset: float, words: str | None) -> None:
    theirs = ManualClock()
    theirs.jump(offset)
    [clock] = [finding for finding in await whole(Bucket(clock=theirs)) if finding.check == "clock"]
    assert clock.ok == (words is None)
    assert not clock.serious
    assert words is None or words in clock.detail


async def test_a_whole_probe_removes_what_others_left_long_ago() -> None:
    bucket = Bucket()
    await bucket.create("probe/dead/x", b"")
    await bucket.create("q/mine", b"")
    bucket.clock.advance(3000)
    await bucket.create("probe/at-work/x", b"")
    await whole(bucket)
    assert set(bucket.truth.objects) == {"probe/dead/x", "probe/at-work/x", "q/mine"}
    bucket.clock.advance(1000)
    await whole(bucket)
    assert set(bucket.truth.objects) == {"probe/at-work/x", "q/mine"}


async def test_a_fleet_pays_once() -> None:
    bucket = Bucket()
    await opening(bucket)
    assert bucket.requests <= 16
    assert set(bucket.truth.objects) == {names.PROBE_NOTE}
    bucket.requests = 0
    for _ in range(10):
        await opening(bucket)
    assert bucket.requests == 10


async def test_processes_that_open_together_do_not_mind_one_another() -> None:
    bucket = Bucket()
    await asyncio.gather(*(opening(bucket) for _ in range(8)))
    assert set(bucket.truth.objects) == {names.PROBE_NOTE}


async def test_a_note_counts_for_its_url_its_time_and_its_questions() -> None:
    bucket = Bucket()

    async def asked(where: str = WHERE) -> bool:
        bucket.requests = 0
        await opening(bucket, where)
        return bucket.requests > 1

    assert await asked()
    assert not await asked()
    assert await asked("s3://copy/p")
    assert await asked()
    bucket.clock.advance(GOOD_FOR / 1000 - 1)
    assert not await asked()
    bucket.clock.advance(2)
    assert await asked()
    for text in (b"{}", b"not JSON", msgspec.json.encode({"probe": 0, "where": WHERE})):
        await bucket.delete(names.PROBE_NOTE)
        await bucket.create(names.PROBE_NOTE, text)
        assert await asked()
        assert not await asked()


@pytest.mark.parametrize("error", [OutcomeUnknown, StoreBusy])
async def test_a_lost_reply_is_no_lie(error: type[MillpondError]) -> None:
    class Unlucky(Bucket):
        left = 2

        async def replace(self, name: str, data: bytes, tag: Tag) -> Tag:
            done = await super().replace(name, data, tag)
            if self.left:
                self.left -= 1
                raise error("lost")
            return done

    bucket = Unlucky()
    await opening(bucket)
    assert set(bucket.truth.objects) == {names.PROBE_NOTE}
    bucket = Unlucky()
    bucket.left = 1000
    with pytest.raises(error):
        await opening(bucket)


async def test_what_cannot_be_found_out_is_no_mismatch() -> None:
    for kind in ("create", "read", "replace"):
        with pytest.raises(StoreError, match=f"no permission to {kind}") as caught:
            await opening(MayNot(kind))
        assert not isinstance(caught.value, StoreMismatch)
