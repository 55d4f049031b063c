from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from millpond.errors import OutcomeUnknown, StoreBusy, StoreCorrupt, StoreError
from millpond.model.clock import ManualClock
from millpond.stores.faulty import Crash, Gate
from millpond.stores.objects.bucket import Content, Entry, ObjectChanged, ObjectExists
from millpond.stores.objects.faulty_bucket import (
    CHANGING,
    READING,
    Failure,
    Fault,
    FaultyBucket,
    Request,
    crash_after,
    crash_before,
    fits,
    hold,
    lost_done,
    lost_later,
    lost_partly,
    lost_undone,
    nth,
    repeated,
    skewed,
    stale,
    throttled,
    truncated,
)
from millpond.stores.objects.memory_bucket import MemoryBucket

OLD, NEW = b"old", b"new"


async def _source() -> AsyncIterator[bytes]:
    yield NEW[:1]
    yield NEW[1:]


class Stage:
    """Objects ``a``, ``b`` and ``c`` in a bucket, and a faulty bucket before it whose first request fails."""

    def __init__(self, fault: Fault | None = None, **options: int) -> None:
        self.clock = ManualClock()
        self.inner = MemoryBucket(clock=self.clock, page_size=2)
        self.bucket = FaultyBucket(self.inner.share(), {} if fault is None else {1: fault}, **options)

    async def fill(self) -> None:
        self.tags = {name: await self.inner.create(name, OLD) for name in "abc"}

    def call(self, method: str) -> Awaitable[object]:
        bucket = self.bucket
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "create": lambda: bucket.create("z", NEW),
            "replace": lambda: bucket.replace("a", NEW, self.tags["a"]),
            "delete": lambda: bucket.delete("a"),
            "delete_many": lambda: bucket.delete_many(["a", "b"]),
            "upload": lambda: bucket.upload("z", _source()),
            "read": lambda: bucket.read("a"),
            "list": self._first_page,
            "folder": lambda: bucket.folder(""),
            "download": self._download,
        }
        return calls[method]()

    async def _first_page(self) -> list[Entry]:
        pages = [page async for page in self.bucket.list("")]
        return pages[0]

    async def _download(self) -> bytes:
        return b"".join([chunk async for chunk in self.bucket.download("a")])


BEFORE = {"a": OLD, "b": OLD, "c": OLD}
AFTER = {
    "create": {**BEFORE, "z": NEW},
    "replace": {**BEFORE, "a": NEW},
    "delete": {"b": OLD, "c": OLD},
    "delete_many": {"c": OLD},
    "upload": {**BEFORE, "z": NEW},
}


@pytest.mark.parametrize("method", sorted(CHANGING))
@pytest.mark.parametrize(
    ("fault", "error", "done"),
    [
        (crash_before(), Crash, False),
        (crash_after(), Crash, True),
        (lost_done(), OutcomeUnknown, True),
        (lost_undone(), OutcomeUnknown, False),
        (throttled(), StoreBusy, False),
        (throttled(StoreError("go away")), StoreError, False),
    ],
    ids=["crash-before", "crash-after", "lost-done", "lost-undone", "throttled", "refused"],
)
async def test_what_is_left_of_a_change(method: str, fault: Fault, error: type[Exception], done: bool) -> None:
    stage = Stage(fault)
    await stage.fill()
    with pytest.raises(error) as raised:
        await stage.call(method)
    assert type(raised.value) is error
    assert stage.inner.objects == (AFTER[method] if done else BEFORE)
    assert stage.bucket.crashed is fault.crash
    if fault.crash:
        with pytest.raises(Crash):
            await stage.bucket.read("b")
    else:
        assert await stage.bucket.read("c") is not None


@pytest.mark.parametrize("method", sorted(READING))
@pytest.mark.parametrize(
    ("fault", "error"),
    [(crash_before(), Crash), (crash_after(), Crash), (lost_undone(), OutcomeUnknown), (throttled(), StoreBusy)],
    ids=["crash-before", "crash-after", "lost-undone", "throttled"],
)
async def test_a_request_that_reads_fails_once(method: str, fault: Fault, error: type[Exception]) -> None:
    stage = Stage(fault)
    await stage.fill()
    with pytest.raises(error):
        await stage.call(method)
    assert len(stage.bucket.requests) == 1
    if fault.crash:
        with pytest.raises(Crash):
            await stage.call(method)
        assert len(stage.bucket.requests) == 1
    else:
        await stage.call(method)
        assert len(stage.bucket.requests) > 1


@pytest.mark.parametrize("method", sorted(CHANGING))
@pytest.mark.parametrize("later", [0, 2])
async def test_a_late_request_takes_place_after_the_next_ones(method: str, later: int) -> None:
    stage = Stage(lost_later(later))
    await stage.fill()
    with pytest.raises(OutcomeUnknown):
        await stage.call(method)
    for _ in range(later):
        await stage.bucket.read("c")
        assert stage.inner.objects == BEFORE
    await stage.bucket.read("c")
    assert stage.inner.objects == AFTER[method]


async def test_a_late_request_keeps_its_condition() -> None:
    stage = Stage(lost_later(5))
    await stage.fill()
    with pytest.raises(OutcomeUnknown):
        await stage.call("replace")
    await stage.bucket.replace("a", b"other", stage.tags["a"])
    await stage.bucket.settle()
    assert stage.inner.objects["a"] == b"other"


async def test_a_late_request_outlives_who_sent_it() -> None:
    stage = Stage(lost_later(1))
    await stage.fill()
    with pytest.raises(OutcomeUnknown):
        await stage.call("delete")
    await stage.bucket.close()
    other = stage.bucket.share(stage.inner.share())
    await other.read("c")
    await other.read("c")
    assert stage.inner.objects == AFTER["delete"]


async def test_settle_brings_what_is_still_on_its_way_and_only_once() -> None:
    stage = Stage(lost_later(5))
    await stage.fill()
    with pytest.raises(OutcomeUnknown):
        await stage.call("delete")
    await stage.bucket.settle()
    assert stage.inner.objects == AFTER["delete"]
    await stage.bucket.create("a", NEW)
    for _ in range(7):
        await stage.bucket.read("a")
    await stage.bucket.settle()
    assert stage.inner.objects["a"] == NEW


@pytest.mark.parametrize(("method", "error"), [("create", ObjectExists), ("replace", ObjectChanged)])
async def test_a_repeated_write_meets_itself(method: str, error: type[Exception]) -> None:
    stage = Stage(repeated())
    await stage.fill()
    with pytest.raises(error):
        await stage.call(method)
    assert stage.inner.objects == AFTER[method]


@pytest.mark.parametrize(("fault", "error"), [(crash_after(), Crash), (lost_done(), OutcomeUnknown)])
async def test_the_reply_that_is_lost_may_be_a_refusal(fault: Fault, error: type[Exception]) -> None:
    stage = Stage()
    await stage.fill()
    for number, call in enumerate(
        (
            lambda bucket: bucket.create("a", NEW),
            lambda bucket: bucket.replace("a", NEW, stage.tags["b"]._replace(etag="x")),
        )
    ):
        bucket = stage.bucket.share(stage.inner.share())
        bucket.plan = {number + 1: fault}
        with pytest.raises(error):
            await call(bucket)
    assert stage.inner.objects == BEFORE


async def test_half_of_a_batch_of_deletes_takes_place() -> None:
    stage = Stage(lost_partly())
    await stage.fill()
    with pytest.raises(OutcomeUnknown):
        await stage.call("delete_many")
    assert stage.inner.objects == AFTER["delete"]


async def _names(bucket: FaultyBucket, prefix: str = "", after: str | None = None) -> list[list[str]]:
    return [[entry.name for entry in page] async for page in bucket.list(prefix, after=after)]


@pytest.mark.parametrize(
    ("ago", "names"),
    [(0, ["b", "c", "d", "f/x"]), (1, ["b", "c", "d"]), (2, ["a", "b", "c", "d"]), (3, ["a", "b", "c"])],
)
@pytest.mark.parametrize("others", [False, True], ids=["own", "another's"])
async def test_a_stale_listing_shows_what_was_there_some_requests_ago(ago: int, names: list[str], others: bool) -> None:
    stage = Stage(remember=3)
    await stage.fill()
    bucket = stage.bucket
    await bucket.create("d", NEW)
    await bucket.delete("a")
    await (bucket.share(stage.inner.share()) if others else bucket).create("f/x", NEW)
    bucket.plan = {4: stale(ago)}
    folder = await bucket.folder("")
    assert [entry.name for entry in folder.entries] == [name for name in names if "/" not in name]
    assert folder.folders == (["f"] if "f/x" in names else [])
    # One request later the same is one request further back. The first page ends with c.
    bucket.plan = {5: stale(ago + 1)} if ago < 3 else {}
    pages = await _names(bucket)
    assert pages[0] == ([name for name in names if name <= "c"] if ago < 3 else ["b", "c"])
    bucket.plan = {}
    assert await _names(bucket) == [["b", "c"], ["d", "f/x"], []]


async def test_stale_pages_split_the_names_as_true_ones_do() -> None:
    stage = Stage(remember=4)
    await stage.fill()
    await stage.bucket.delete("b")
    await stage.bucket.create("d", NEW)
    # Pages are (a, c), (d): the first is of the beginning, the second true.
    stage.bucket.plan = {3: stale(2)}
    assert await _names(stage.bucket) == [["a", "b", "c"], ["d"]]
    stage.bucket.plan = {6: stale(4)}
    assert await _names(stage.bucket) == [["a", "c"], []]
    await stage.bucket.delete("d")
    stage.bucket.plan = {8: stale(1)}
    assert await _names(stage.bucket, after="a") == [["c", "d"]]
    stage.bucket.plan = {9: stale(2)}
    assert await _names(stage.bucket, "d") == [["d"]]


async def test_a_listing_staler_than_what_is_remembered_is_a_mistake() -> None:
    stage = Stage(stale(3), remember=2)
    await stage.fill()
    with pytest.raises(ValueError, match="remembers 2"):
        await stage.call("list")


async def test_a_truncated_download_brings_half_and_says_so() -> None:
    stage = Stage(truncated())
    await stage.fill()
    seen: list[bytes] = []

    async def collect() -> None:
        async for chunk in stage.bucket.download("a"):
            seen.append(chunk)

    with pytest.raises(StoreCorrupt):
        await collect()
    assert b"".join(seen) == OLD[:1]
    await collect()
    assert seen[1:] == [OLD]


def _modified(found: object) -> int:
    if isinstance(found, Content):
        return found.modified
    entries = found if isinstance(found, list) else getattr(found, "entries", [])
    assert isinstance(entries[0], Entry)
    return entries[0].modified


@pytest.mark.parametrize("method", ["read", "list", "folder"])
async def test_the_clock_of_the_bucket_or_of_one_reply_is_another(method: str) -> None:
    stage = Stage(skewed(-60_000), skew=1000)
    await stage.fill()
    now = stage.clock.now_ms()
    assert _modified(await stage.call(method)) == now - 59_000
    assert _modified(await stage.call(method)) == now + 1000


async def test_each_page_is_a_request_and_so_is_an_empty_listing() -> None:
    stage = Stage()
    await stage.fill()
    assert await _names(stage.bucket) == [["a", "b"], ["c"]]
    assert await _names(stage.bucket, "nothing/") == [[]]
    await stage.call("folder")
    assert stage.bucket.requests == [
        Request(1, "list", ""),
        Request(2, "list", ""),
        Request(3, "list", "nothing/"),
        Request(4, "folder", ""),
    ]
    stage.bucket.plan = nth(2, "list", throttled())
    pages: list[list[Entry]] = []

    async def collect() -> None:
        async for page in stage.bucket.list(""):
            pages.append(page)

    with pytest.raises(StoreBusy):
        await collect()
    assert [entry.name for page in pages for entry in page] == ["a", "b"]


async def test_handles_count_together_and_die_alone() -> None:
    stage = Stage()
    await stage.fill()
    other = stage.bucket.share(stage.inner.share())
    stage.bucket.plan = {2: crash_after()}
    await stage.bucket.delete("a")
    with pytest.raises(Crash):
        await other.delete("b")
    with pytest.raises(Crash):
        await other.read("c")
    await stage.bucket.delete("c")
    assert stage.inner.objects == {}
    assert [request.number for request in stage.bucket.requests] == [1, 2, 3]


async def test_a_crash_takes_the_replies_of_others_with_it() -> None:
    gate = Gate()
    stage = Stage(hold(gate))
    await stage.fill()
    waiting = asyncio.ensure_future(stage.bucket.delete("a"))
    await gate.reached.wait()
    stage.bucket.plan = {2: crash_before()}
    with pytest.raises(Crash):
        await stage.bucket.delete("b")
    gate.open()
    with pytest.raises(Crash):
        await waiting
    assert stage.inner.objects == BEFORE


async def test_what_was_under_way_takes_place_but_nobody_is_told() -> None:
    stage = Stage()
    await stage.fill()
    stage.bucket.plan = {2: crash_before()}
    outcomes = await asyncio.gather(stage.bucket.delete("a"), stage.bucket.delete("b"), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Crash, Crash]
    assert list(stage.inner.objects) == ["b", "c"]


async def test_a_gate_holds_a_request_until_it_opens() -> None:
    gate = Gate()
    stage = Stage(hold(gate))
    await stage.fill()
    waiting = asyncio.ensure_future(stage.bucket.delete("a"))
    await gate.reached.wait()
    await stage.bucket.delete("b")
    assert list(stage.inner.objects) == ["a", "c"]
    gate.open()
    await waiting
    assert list(stage.inner.objects) == ["c"]


@pytest.mark.parametrize("failure", Failure)
async def test_a_fault_that_does_not_fit_is_a_mistake(failure: Failure) -> None:
    gate = Gate()
    gate.open()
    for method in sorted(CHANGING | READING):
        fault = Fault(failure, gate=gate if failure is Failure.HELD else None)
        stage = Stage(fault, remember=1)
        await stage.fill()
        raised = await asyncio.gather(stage.call(method), return_exceptions=True)
        fitting = fits(fault, method)
        assert isinstance(raised[0], ValueError) is not fitting, f"{failure} at {method}: {raised}"
        quiet = failure in (Failure.HELD, Failure.STALE, Failure.SKEWED)
        assert not fitting or isinstance(raised[0], StoreError) is not quiet, f"{failure} at {method}: {raised}"
