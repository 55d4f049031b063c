"""Does a bucket keep what the store relies on? Asked at opening in short, and by ``millpond verify`` at length.

Everything rests on conditional writes: where two writers can both succeed, a message is handed out twice under two
leases that are both thought good. There are servers that answer such requests kindly and ignore the condition, so a
bucket is believed only after a race.

At opening that costs some ten small requests, which a fleet of a thousand processes need not pay a thousand times.
So the first one leaves a note below the prefix, and the others read it: one request. The note counts for this URL only
(a bucket may be copied to another service, notes and all) and for a month (a service may change under its users).
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

import msgspec

from millpond.errors import MillpondError, OutcomeUnknown, StoreBusy, StoreError, StoreMismatch
from millpond.model.clock import Clock
from millpond.model.ids import IdSource
from millpond.stores.base import Finding
from millpond.stores.objects import names
from millpond.stores.objects.bucket import Bucket, Content, Entry, ObjectChanged, ObjectExists, Tag

VERSION = 1
"""Of what is asked at opening. Raised when more is, so that buckets are asked again."""
GOOD_FOR = 30 * 86_400_000
"""Milliseconds for which a note counts."""
_LEFT_BEHIND = 3_600_000
"""Milliseconds after which an object of another probe is taken for forgotten."""
_TRIES = 3
"""Of a race in which a reply was lost or a request refused: that says nothing about the bucket."""
RACES, WRITERS = 10, 4
"""Of the whole probe, all at once."""
SAMPLES = 7
"""Requests of a kind, one after the other, of which the median is given."""
TOLERATED_SKEW = 5_000
"""Milliseconds by which clocks may differ without a word; the store corrects for more."""


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """What the note says, as JSON."""

    probe: int
    where: str


async def check_at_opening(bucket: Bucket, *, where: str, clock: Clock, ids: IdSource) -> None:
    """Make sure that writes to the bucket are conditional, once per URL and month. ``where`` is the URL, without
    secrets. Raises StoreMismatch when they are not, StoreError when it cannot be found out."""
    note = await bucket.read(names.PROBE_NOTE)
    if note is not None and _counts(note, where, clock.now_ms()):
        return
    folder = f"{names.PROBES}{ids.random(12).hex()}/"
    try:
        await _race_creates(bucket, folder + "c", ids, 2)
        await _race_replaces(bucket, folder + "r", ids, 2)
    except _Broken as broken:
        raise StoreMismatch(
            f"{where} cannot hold a queue: {broken}. Use a storage with conditional writes; `millpond verify` says more"
        ) from None
    finally:
        await bucket.delete_many([entry.name async for page in bucket.list(folder) for entry in page])
    data = msgspec.json.encode(Note(probe=VERSION, where=where))
    try:
        if note is None:
            await bucket.create(names.PROBE_NOTE, data)
        else:
            await bucket.replace(names.PROBE_NOTE, data, note.tag)
    except (ObjectExists, ObjectChanged, OutcomeUnknown):
        pass  # another process has found the same, or the next one will


def _counts(note: Content, where: str, now: int) -> bool:
    try:
        said = msgspec.json.decode(note.data, type=Note)
    except msgspec.DecodeError:
        return False
    return said.probe >= VERSION and said.where == where and note.modified > now - GOOD_FOR


class _Broken(Exception):
    """The bucket did what no bucket may do; never leaves this module."""


async def _race_creates(bucket: Bucket, name: str, ids: IdSource, writers: int) -> None:
    await _again(lambda tries: _race(bucket, f"{name}-{tries}", None, [ids.random(16) for _ in range(writers)]))


async def _race_replaces(bucket: Bucket, name: str, ids: IdSource, writers: int) -> None:
    async def race(tries: int) -> None:
        tag = await bucket.create(f"{name}-{tries}", b"first")
        await _race(bucket, f"{name}-{tries}", tag, [ids.random(16) for _ in range(writers)])
        try:
            await bucket.replace(f"{name}-{tries}", b"late", tag)
        except ObjectChanged:
            return
        raise _Broken("a replace of a version that had been replaced before succeeded")

    await _again(race)


async def _again(attempt: Callable[[int], Awaitable[object]]) -> None:
    """Once more, under another name, where a reply was lost or the bucket was busy."""
    for tries in range(_TRIES):
        try:
            await attempt(tries)
            return
        except (OutcomeUnknown, StoreBusy):
            if tries == _TRIES - 1:
                raise


async def _race(bucket: Bucket, name: str, tag: Tag | None, bodies: list[bytes]) -> None:
    """Let all bodies be written at once, as creates or on the condition of ``tag``."""
    what = "creates" if tag is None else "replaces"
    outcomes = await asyncio.gather(
        *(bucket.create(name, body) if tag is None else bucket.replace(name, body, tag) for body in bodies),
        return_exceptions=True,
    )
    lost = ObjectExists if tag is None else ObjectChanged
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, lost):
            raise outcome
    winners = [(body, won) for body, won in zip(bodies, outcomes, strict=True) if isinstance(won, Tag)]
    if len(winners) > 1:
        raise _Broken(f"of {len(bodies)} racing {what} {len(winners)} succeeded where one may")
    if not winners:
        raise _Broken(f"of {len(bodies)} racing {what} none succeeded")
    [(body, won)] = winners
    found = await bucket.read(name)
    if found is None or found.data != body:
        raise _Broken(f"after racing {what} another body is stored than that of the one that succeeded")
    if not found.tag.same(won):
        raise _Broken(f"after racing {what} the object has another version than its writer was told")


class _Probe:
    """The whole probe, below a folder of its own."""

    def __init__(self, bucket: Bucket, clock: Clock, ids: IdSource) -> None:
        self.bucket = bucket
        self.clock = clock
        self.ids = ids
        self.folder = f"{names.PROBES}{ids.random(12).hex()}/"

    async def checks(self) -> AsyncGenerator[Finding, None]:
        for check in (self.may_write, self.may_read, self.may_list, self.may_delete):
            finding = await self._run(check.__name__.replace("_", " "), check)
            yield finding
            if not finding.ok:
                return  # everything else would fail for the same reason
        for name, check in (
            ("conditional create", self.creates),
            ("conditional replace", self.replaces),
            ("replace of a missing object", self.replace_of_nothing),
            ("read after write", self.read_after_write),
            ("list after write", self.list_after_write),
            ("order of listings", self.order),
            ("delete", self.deletes),
            ("streams", self.streams),
        ):
            yield await self._run(name, check)
        yield await self._run("clock", self.skew, serious=False)
        async for finding in self.latencies():
            yield finding

    async def _run(self, check: str, call: Callable[[], Awaitable[str]], *, serious: bool = True) -> Finding:
        try:
            detail = await call()
        except _Broken as broken:
            return Finding(check=check, ok=False, detail=str(broken), serious=serious)
        except MillpondError as error:
            return Finding(check=check, ok=False, detail=f"{error} [{error.code}]", serious=serious)
        return Finding(check=check, ok=True, detail=detail, serious=serious)

    async def may_write(self) -> str:
        await self.bucket.create(self.folder + "permission", b"1")
        return "created an object"

    async def may_read(self) -> str:
        found = await self.bucket.read(self.folder + "permission")
        if found is None or found.data != b"1":
            raise _Broken("an object that was just created is not there")
        return "read it"

    async def may_list(self) -> str:
        await self._list("permission")
        return "listed it"

    async def may_delete(self) -> str:
        await self.bucket.delete(self.folder + "permission")
        return "deleted it"

    async def creates(self) -> str:
        races = (_race_creates(self.bucket, f"{self.folder}c/{n}", self.ids, WRITERS) for n in range(RACES))
        await asyncio.gather(*races)
        return f"one winner in each of {RACES} races of {WRITERS}"

    async def replaces(self) -> str:
        races = (_race_replaces(self.bucket, f"{self.folder}r/{n}", self.ids, WRITERS) for n in range(RACES))
        await asyncio.gather(*races)
        return f"one winner in each of {RACES} races of {WRITERS}"

    async def replace_of_nothing(self) -> str:
        name = self.folder + "gone"
        tag = await self.bucket.create(name, b"1")
        await self.bucket.delete(name)
        try:
            await self.bucket.replace(name, b"2", tag)
        except ObjectChanged:
            if await self.bucket.read(name) is None:
                return "fails, and writes nothing"
            raise _Broken("a replace of a missing object fails, and writes it") from None
        raise _Broken("a replace of a missing object succeeds: an acked message could come back")

    async def read_after_write(self) -> str:
        name = self.folder + "fresh"
        tag = await self.bucket.create(name, b"0")
        for number in range(1, SAMPLES):
            data = b"%d" % number
            tag = await self.bucket.replace(name, data, tag)
            found = await self.bucket.read(name)
            if found is None or found.data != data:
                raise _Broken("a read gives an older version than the one just written")
        return f"{SAMPLES - 1} of {SAMPLES - 1} are the latest"

    async def list_after_write(self) -> str:
        for number in range(SAMPLES):
            name = f"l/{number}"
            tag = await self.bucket.create(self.folder + name, b"x")
            entry = await self._list(name)
            if not entry.tag.same(tag) or entry.size != 1:
                raise _Broken("a listing shows another version than the one just written")
        await self.bucket.delete(self.folder + "l/0")
        if await self._find("l/0") is not None:
            raise _Broken("a listing shows an object that was just deleted")
        return f"{SAMPLES} of {SAMPLES} are there at once"

    async def _find(self, name: str) -> Entry | None:
        async for page in self.bucket.list(self.folder):
            for entry in page:
                if entry.name == self.folder + name:
                    return entry
        return None

    async def _list(self, name: str) -> Entry:
        entry = await self._find(name)
        if entry is None:
            raise _Broken("a listing lacks an object that was just written")
        return entry

    async def order(self) -> str:
        there = [f"{self.folder}o/{number:032x}-{self.ids.random(4).hex()}" for number in range(12)]
        await asyncio.gather(*(self.bucket.create(name, b"") for name in reversed(there)))
        prefix = self.folder + "o/"
        if [entry.name async for page in self.bucket.list(prefix) for entry in page] != there:
            raise _Broken("listings are not in the order of names")
        if [entry.name async for page in self.bucket.list(prefix, after=there[5]) for entry in page] != there[6:]:
            raise _Broken("a listing that starts after a name lacks some, or has others")
        found = await self.bucket.folder(self.folder)
        if f"{self.folder}o" not in found.folders:
            raise _Broken("a listing of folders lacks one")
        return "by name"

    async def deletes(self) -> str:
        there = [f"{self.folder}d/{number}" for number in range(5)]
        await asyncio.gather(*(self.bucket.create(name, b"") for name in there))
        await self.bucket.delete(there[0])
        await self.bucket.delete(there[0])
        await self.bucket.delete_many(there[:4])
        if await self.bucket.read(there[0]) is not None or await self.bucket.read(there[1]) is not None:
            raise _Broken("an object that was deleted is still there")
        if await self.bucket.read(there[4]) is None:
            raise _Broken("an object is gone that nobody deleted")
        return "single and several; repeatable"

    async def streams(self) -> str:
        data = self.ids.random(1000) * 300

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(data), 70_000):
                yield data[start : start + 70_000]

        await self.bucket.upload(self.folder + "blob", pieces())
        if b"".join([chunk async for chunk in self.bucket.download(self.folder + "blob")]) != data:
            raise _Broken("a stream comes out otherwise than it went in")
        return f"{len(data):,} bytes in and out"

    async def skew(self) -> str:
        name = self.folder + "clock"
        before = self.clock.now_ms()
        await self.bucket.create(name, b"")
        after = self.clock.now_ms()
        found = await self.bucket.read(name)
        if found is None:
            raise _Broken("an object that was just created is not there")
        # Many tell whole seconds, rounded down: the moment lies somewhere in the second that begins there.
        earliest, latest = found.modified - after, found.modified + 999 - before
        offset = 0 if earliest <= 0 <= latest else min(earliest, latest, key=abs)
        text = f"the bucket's is {abs(offset) / 1000:.1f} s {'ahead of' if offset > 0 else 'behind'} this machine's"
        if abs(offset) > TOLERATED_SKEW:
            raise _Broken(f"{text}; the store corrects for it, but set this machine's clock (NTP)")
        return text if offset else "the same as this machine's, to a second"

    async def latencies(self) -> AsyncGenerator[Finding, None]:
        base = self.folder + "t/"
        tags: list[Tag] = []

        async def create(number: int) -> None:
            tags.append(await self.bucket.create(f"{base}{number}", b"x" * 1024))

        async def replace(number: int) -> None:
            await self.bucket.replace(f"{base}{number}", b"y" * 1024, tags[number])

        async def read(number: int) -> None:
            await self.bucket.read(f"{base}{number}")

        async def listing(number: int) -> None:
            async for _ in self.bucket.list(base):
                break

        async def delete(number: int) -> None:
            await self.bucket.delete(f"{base}{number}")

        for name, call in (
            ("create", create),
            ("replace", replace),
            ("read", read),
            ("list", listing),
            ("delete", delete),
        ):
            times = []
            try:
                for number in range(SAMPLES):
                    before = self.clock.monotonic()
                    await call(number)
                    times.append((self.clock.monotonic() - before) * 1000)
            except MillpondError as error:
                yield Finding(check=f"time of a {name}", ok=False, detail=f"{error} [{error.code}]", serious=False)
                return
            median = statistics.median(times)
            detail = f"{median:.1f} ms (median of {SAMPLES}; the longest {max(times):.1f} ms)"
            yield Finding(
                check=f"time of a {name}", ok=True, detail=detail, serious=False, milliseconds=round(median, 3)
            )

    async def clean(self) -> None:
        """Remove what this probe wrote, and what others left behind long ago."""
        long_ago = self.clock.now_ms() - _LEFT_BEHIND
        async for page in self.bucket.list(names.PROBES):
            rest = [e.name for e in page if e.name.startswith(self.folder) or e.modified < long_ago]
            if rest:
                await self.bucket.delete_many(rest)


async def probe(bucket: Bucket, *, clock: Clock, ids: IdSource) -> list[Finding]:
    """Everything that can be found out about a bucket in some hundred small requests; nothing of it stays. Whatever the
    bucket does is in the findings."""
    whole = _Probe(bucket, clock, ids)
    findings = []
    try:
        async for finding in whole.checks():
            findings.append(finding)
    finally:
        try:
            await whole.clean()
        except StoreError as error:
            findings.append(
                Finding(
                    check="tidying up",
                    ok=False,
                    detail=f"objects may be left below {names.PROBES}: {error}",
                    serious=False,
                )
            )
    return findings
