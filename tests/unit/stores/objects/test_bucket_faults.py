"""What each fault on the way to a bucket becomes: sent again, or told as it is. Requests are counted on the wire."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import groupby
from typing import Any
from urllib.parse import urlsplit

import pytest
from tests.servers.faults import (
    CONFLICT,
    INTERNAL,
    LATE,
    LOST_REPLY,
    RESET,
    RESET_EARLY,
    SILENCE,
    SLOW_DOWN,
    TOO_MANY,
    Fault,
    FaultProxy,
    Request,
    answer,
    refused_port,
    s3_error,
)
from tests.servers.process import Server

from millpond.errors import MillpondError, OutcomeUnknown, StoreBusy, StoreCorrupt, StoreError
from millpond.model.clock import ManualClock, TimerHandle
from millpond.stores.base import QueueName
from millpond.stores.objects.bucket import ObjectChanged, ObjectExists, Tag
from millpond.stores.objects.obstore_bucket import (
    DELETE_WINDOW,
    FIRST_PAUSE,
    LONGEST_PAUSE,
    MOST_TRIES,
    PART,
    PATIENCE,
    ObstoreBucket,
)
from millpond.stores.objects.opening import open_bucket, parse_location
from millpond.stores.objects.requests import CountedBucket

Open = Callable[..., ObstoreBucket]

GATEWAY = answer(503, "Service Unavailable", b"<html>from something on the way</html>")
BAD_GATEWAY = answer(502, "Bad Gateway")
ABORTED = answer(409, "Conflict", s3_error("OperationAborted"))
BUSY = answer(503, "Service Unavailable", s3_error("ServerBusy"))
UNAVAILABLE = answer(503, "Service Unavailable", s3_error("ServiceUnavailable"))
TIMED_OUT = answer(500, "Internal Server Error", s3_error("OperationTimedOut"))
CUT = Fault(forward=True, cut=3)

NOT_DONE = {"slow down": SLOW_DOWN, "429": TOO_MANY, "conflict": CONFLICT, "aborted": ABORTED, "busy": BUSY}
"""The request did not take place."""
UNCLEAR = {
    "500": INTERNAL,
    "502": BAD_GATEWAY,
    "503": GATEWAY,
    "timed out": TIMED_OUT,
    "reset": RESET,
    "early": RESET_EARLY,
    "lost": LOST_REPLY,
}
"""It may have."""


class HurriedClock(ManualClock):
    """Pauses pass at once, and are noted."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float] = []

    def call_later(self, delay: float, callback: Callable[[], object]) -> TimerHandle:
        self.pauses.append(delay)
        timer = super().call_later(delay, callback)
        asyncio.get_running_loop().call_soon(self.advance, delay)
        return timer


@pytest.fixture
def clock() -> HurriedClock:
    return HurriedClock()


@pytest.fixture
def opened(
    seaweed: Server, clock: HurriedClock, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Open:
    return _opener(seaweed, clock, monkeypatch, tmp_path_factory)


def _opener(
    server: Server, clock: HurriedClock, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Open:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    prefix = tmp_path_factory.mktemp("prefix").name + tmp_path_factory.getbasetemp().name

    def make(port: int | None = None, options: str = "", **more: Any) -> ObstoreBucket:
        url = server.url(prefix) + options
        if port is not None:
            url = url.replace(f"127.0.0.1:{server.port}", f"127.0.0.1:{port}")
        return open_bucket(parse_location(url), clock=clock, **more)

    return make


async def chunks_of(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def on(method: str, part: str = "") -> Callable[[Request], bool]:
    return lambda request: request.method == method and part in request.path


async def listed(bucket: ObstoreBucket) -> list[str]:
    return [entry.name async for page in bucket.list("") for entry in page]


@pytest.mark.parametrize("fault", NOT_DONE)
async def test_what_did_not_take_place_is_sent_again(
    fault: str, seaweed: Server, opened: Open, clock: HurriedClock
) -> None:
    async with FaultProxy(seaweed.port) as proxy:
        bucket = opened(proxy.port)
        proxy.plan(NOT_DONE[fault], NOT_DONE[fault])
        tag = await bucket.create("a", b"1")
        assert len(proxy.requests) == bucket.sent["create"] == 3
        proxy.plan(NOT_DONE[fault])
        await bucket.replace("a", b"2", tag)
        assert bucket.sent["replace"] == 2
        if fault not in {"conflict", "aborted"}:
            proxy.plan(NOT_DONE[fault])
            content = await bucket.read("a")
            assert content is not None
            assert content.data == b"2"
            proxy.plan(NOT_DONE[fault])
            assert await listed(bucket) == ["a"]
            proxy.plan(NOT_DONE[fault])
            assert [entry.name for entry in (await bucket.folder("")).entries] == ["a"]
            proxy.plan(NOT_DONE[fault])
            await bucket.delete("a")
            proxy.plan(NOT_DONE[fault])
            await bucket.delete_many(["a", "b"])
            proxy.plan(NOT_DONE[fault])
            assert await bucket.upload("blob", chunks_of(b"x")) == 1
            proxy.plan(NOT_DONE[fault])
            assert [chunk async for chunk in bucket.download("blob")] == [b"x"]
        assert proxy.all_happened
        assert len(proxy.requests) == bucket.sent.total(), "every request is counted"
        assert all(FIRST_PAUSE / 2 <= pause <= LONGEST_PAUSE for pause in clock.pauses if pause)


@pytest.mark.parametrize("fault", UNCLEAR)
async def test_a_write_whose_outcome_is_unclear_is_not_sent_again(fault: str, seaweed: Server, opened: Open) -> None:
    async with FaultProxy(seaweed.port) as proxy:
        bucket, direct = opened(proxy.port), opened()
        proxy.plan(UNCLEAR[fault])
        with pytest.raises(OutcomeUnknown, match=r"creating a in s3://.*: it is not known .*read it back") as caught:
            await bucket.create("a", b"1")
        assert caught.value.code == "outcome_unknown"
        found = await direct.read("a")
        assert (found is not None) == (fault == "lost")
        tag = await direct.create("b", b"1")
        proxy.plan(UNCLEAR[fault])
        with pytest.raises(OutcomeUnknown):
            await bucket.replace("b", b"2", tag)
        found = await direct.read("b")
        assert found is not None
        assert found.data == (b"2" if fault == "lost" else b"1")
        for delete in (bucket.delete("b"), bucket.delete_many(["b", "c"])):
            proxy.plan(UNCLEAR[fault])
            with pytest.raises(OutcomeUnknown, match="deleting b in"):
                await delete
            assert (await direct.read("b") is None) == (fault == "lost")
        assert len(proxy.requests) == bucket.sent.total() == 4


@pytest.mark.parametrize(
    ("fault", "sent"), [("slow down", 2), ("429", 2), ("busy", 1), ("unavailable", 1), ("lost", 1), ("503", 1)]
)
async def test_the_delete_of_a_name_that_is_used_again_has_no_second_copy(
    fault: str, sent: int, seaweed: Server, opened: Open
) -> None:
    """That a server is busy is also said by one that had begun with it."""
    async with FaultProxy(seaweed.port) as proxy:
        bucket = opened(proxy.port)
        proxy.plan((NOT_DONE | UNCLEAR | {"unavailable": UNAVAILABLE})[fault])
        if sent == 1:
            with pytest.raises(OutcomeUnknown, match="deleting a in"):
                await bucket.delete("a", once=True)
        else:
            await bucket.delete("a", once=True)
        assert len(proxy.requests) == bucket.sent["delete"] == sent


async def test_the_delete_of_a_name_that_is_used_again_is_repeated_where_it_did_not_leave(opened: Open) -> None:
    bucket = opened(refused_port())
    with pytest.raises(StoreError, match="no connection"):
        await bucket.delete("a", once=True)
    assert bucket.sent["delete"] > 1


@pytest.mark.parametrize("fault", UNCLEAR)
async def test_reads_are_sent_again_whatever_happened(fault: str, seaweed: Server, opened: Open) -> None:
    async with FaultProxy(seaweed.port) as proxy:
        bucket = opened(proxy.port)
        await opened().create("a", b"12345")
        proxy.plan(UNCLEAR[fault])
        content = await bucket.read("a")
        assert content is not None
        assert content.data == b"12345"
        proxy.plan(UNCLEAR[fault], UNCLEAR[fault])
        assert await listed(bucket) == ["a"]
        proxy.plan(UNCLEAR[fault])
        assert len((await bucket.folder("")).entries) == 1
        assert bucket.sent == {"read": 2, "list": 5}
        assert len(proxy.requests) == 7


async def test_a_reply_that_is_cut_off_is_read_again(seaweed: Server, opened: Open) -> None:
    async with FaultProxy(seaweed.port) as proxy:
        bucket = opened(proxy.port)
        await opened().create("a", b"12345")
        proxy.plan(CUT)
        content = await bucket.read("a")
        assert content is not None
        assert content.data == b"12345"
        proxy.plan(CUT)
        assert await listed(bucket) == ["a"]
        assert len(proxy.requests) == 4


async def test_one_s_own_first_copy_is_met_as_another_s(seaweed: Server, opened: Open) -> None:
    """A cloud that says "slow down" and writes all the same: the store tells by the write id in the object."""
    async with FaultProxy(seaweed.port) as proxy:
        bucket = opened(proxy.port)
        proxy.plan(SLOW_DOWN._replace(forward=True))
        with pytest.raises(ObjectExists):
            await bucket.create("a", b"1")
        content = await bucket.read("a")
        assert content is not None
        proxy.plan(SLOW_DOWN._replace(forward=True))
        with pytest.raises(ObjectChanged):
            await bucket.replace("a", b"2", content.tag)


async def test_throttling_ends_in_words_after_a_bounded_time(
    seaweed: Server, opened: Open, clock: HurriedClock
) -> None:
    async with FaultProxy(seaweed.port) as proxy:
        bucket = opened(proxy.port)
        proxy.plan(*[SLOW_DOWN] * 100)
        with pytest.raises(StoreBusy, match=r"creating a in s3://.* takes no more requests .*503 SlowDown.*try again"):
            await bucket.create("a", b"1")
        assert sum(clock.pauses) <= PATIENCE
        assert 5 < len(proxy.requests) == len(clock.pauses) + 1 <= MOST_TRIES
        longest = [min(LONGEST_PAUSE, FIRST_PAUSE * 2**number) for number in range(len(clock.pauses))]
        assert all(most / 2 <= pause <= most for pause, most in zip(clock.pauses, longest, strict=True))
        assert len({pause / most for pause, most in zip(clock.pauses, longest, strict=True)}) > 3, "no jitter"
        clock.pauses.clear()
        assert await opened().read("a") is None
        with pytest.raises(StoreBusy):
            await bucket.delete("a")
        assert 0 < sum(clock.pauses) <= DELETE_WINDOW, "a late DELETE may meet another lease"
        impatient = opened(proxy.port, "&retry_for=0")
        with pytest.raises(StoreBusy):
            await impatient.read("a")
        assert impatient.sent == {"read": 1}


async def test_a_conflict_that_stays_is_busy(seaweed: Server, opened: Open) -> None:
    async with FaultProxy(seaweed.port) as proxy:
        bucket = opened(proxy.port)
        proxy.plan(*[CONFLICT] * 50)
        with pytest.raises(StoreBusy, match="others write the same object"):
            await bucket.replace("a", b"1", Tag('"x"', None))


async def test_an_outage_ends_in_words(seaweed: Server, opened: Open) -> None:
    async with FaultProxy(seaweed.port) as proxy:
        bucket = opened(proxy.port)
        proxy.plan(*[INTERNAL] * 50)
        with pytest.raises(StoreError, match=r"reading a in .*no usable answer \(500 InternalError\)") as caught:
            await bucket.read("a")
        assert type(caught.value) is StoreError
        assert len(proxy.requests) <= MOST_TRIES


async def test_a_refused_connection_did_not_take_place(opened: Open, clock: HurriedClock) -> None:
    bucket = opened(refused_port())
    calls: list[Awaitable[object]] = [
        bucket.create("a", b"1"),
        bucket.replace("a", b"1", Tag('"x"', None)),
        bucket.read("a"),
        bucket.delete("a"),
        listed(bucket),
    ]
    for call in calls:
        clock.pauses.clear()
        with pytest.raises(StoreError, match="no connection; check the endpoint") as caught:
            await call
        assert type(caught.value) is StoreError
        assert clock.pauses


async def test_a_time_out_while_connecting_did_not_take_place(opened: Open) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        port = deaf.getsockname()[1]
        # Its queue of connections is full: the kernel answers no more.
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        bucket = opened(port, "&timeout=0.2&retry_for=0")
        with pytest.raises(StoreError, match="no connection in time") as caught:
            await bucket.create("a", b"1")
        assert type(caught.value) is StoreError
        for one in waiting:
            one.close()


@pytest.mark.parametrize("fault", [SILENCE, LATE], ids=["before", "after"])
async def test_a_time_out_after_sending_is_unclear(fault: Fault, seaweed: Server, opened: Open) -> None:
    async with FaultProxy(seaweed.port) as proxy:
        bucket = opened(proxy.port, "&timeout=0.3")
        proxy.plan(fault)
        with pytest.raises(OutcomeUnknown, match="no reply in time"):
            await bucket.create("a", b"1")
        assert (await opened().read("a") is not None) == (fault is LATE)
        assert len(proxy.requests) == 1


async def test_refusals_say_what_to_do(seaweed: Server, opened: Open) -> None:
    refusals = {
        answer(403, "Forbidden", s3_error("AccessDenied")): r"no permission \(403 AccessDenied\); allow s3:PutObject",
        answer(403, "Forbidden", s3_error("InvalidAccessKeyId")): "no valid credentials .*AWS_ACCESS_KEY_ID",
        answer(403, "Forbidden", s3_error("SignatureDoesNotMatch")): "no valid credentials",
        answer(400, "Bad Request", s3_error("ExpiredToken")): "no valid credentials .*400 ExpiredToken",
        answer(401, "Unauthorized"): "no valid credentials",
        answer(403, "Forbidden", s3_error("RequestTimeTooSkewed")): "clock is too far off .*NTP",
        answer(404, "Not Found", s3_error("NoSuchBucket")): "there is no such bucket .*create it",
        answer(301, "Moved", s3_error("PermanentRedirect")): r"another region .*\?region=",
        answer(501, "Not Implemented", s3_error("NotImplemented")): "refused .*`millpond verify`",
        answer(400, "Bad Request", s3_error("EntityTooLarge")): r"refused \(400 EntityTooLarge\)",
    }
    async with FaultProxy(seaweed.port) as proxy:
        bucket = opened(proxy.port)
        for fault, words in refusals.items():
            for call in (lambda: bucket.create("a", b"1"), lambda: bucket.replace("a", b"1", Tag('"x"', None))):
                proxy.plan(fault)
                with pytest.raises(StoreError, match=words) as caught:
                    await call()
                assert type(caught.value) is StoreError
                assert "secret" not in str(caught.value)
        assert len(proxy.requests) == 2 * len(refusals), "none is sent again"


async def test_each_kind_of_request_names_its_permission(seaweed: Server, opened: Open) -> None:
    async with FaultProxy(seaweed.port) as proxy:
        bucket = opened(proxy.port)
        proxy.plan(*[answer(403, "Forbidden", s3_error("AccessDenied"))] * 7)
        calls: dict[str, Awaitable[object]] = {
            "s3:PutObject": bucket.create("a", b""),
            "s3:GetObject": bucket.read("a"),
            "s3:DeleteObject": bucket.delete("a"),
            "s3:ListBucket": listed(bucket),
        }
        for permission, call in calls.items():
            with pytest.raises(StoreError, match=permission):
                await call


async def test_one_object_is_deleted_by_name_and_several_at_once(seaweed: Server, opened: Open) -> None:
    async with FaultProxy(seaweed.port) as proxy:
        bucket = opened(proxy.port)
        await bucket.delete("a")
        assert proxy.requests[-1].method == "DELETE"
        assert proxy.requests[-1].path.endswith("/a")
        await bucket.delete_many([f"n{number}" for number in range(1001)])
        assert [request.method for request in proxy.requests[1:]] == ["POST", "POST"]
        assert bucket.sent == {"delete": 1, "delete_many": 2}


async def test_deletes_that_failed_one_by_one_are_told(seaweed: Server, opened: Open) -> None:
    result = b"<DeleteResult><Error><Key>%s/a</Key><Code>%s</Code><Message>m</Message></Error></DeleteResult>"
    async with FaultProxy(seaweed.port) as proxy:
        bucket = opened(proxy.port)
        at = bucket.where.partition("millpond-test/")[2].encode()
        proxy.plan(answer(200, "OK", result % (at, b"AccessDenied")))
        with pytest.raises(StoreError, match="allow s3:DeleteObject"):
            await bucket.delete_many(["a", "b"])
        proxy.plan(answer(200, "OK", result % (at, b"SlowDown")))
        await bucket.delete_many(["a", "b"])
        proxy.plan(answer(200, "OK", result % (at, b"InternalError")))
        with pytest.raises(OutcomeUnknown):
            await bucket.delete_many(["a", "b"])
        # Of a name that nobody asked about: obstore panics.
        proxy.plan(answer(200, "OK", result % (b"not", b"InternalError")))
        with pytest.raises(OutcomeUnknown):
            await bucket.delete_many(["a", "b"])


async def test_a_listing_that_breaks_goes_on_where_it_broke(seaweed: Server, opened: Open) -> None:
    direct = opened()
    names = [f"n{number:04}" for number in range(1010)]
    for start in range(0, len(names), 101):
        await asyncio.gather(*(direct.create(name, b"") for name in names[start : start + 101]))
    async with FaultProxy(seaweed.port) as proxy:
        bucket = opened(proxy.port)
        proxy.plan(None, RESET, where=on("GET"))
        assert await listed(bucket) == names
        assert bucket.sent["list"] == len(proxy.requests) == 3


async def test_a_download_that_breaks_goes_on_where_it_broke(seaweed: Server, opened: Open) -> None:
    data = bytes(range(256)) * 12_000
    await opened().upload("blob", chunks_of(data))
    async with FaultProxy(seaweed.port) as proxy:
        bucket = opened(proxy.port)
        proxy.plan(Fault(True, cut=1_000_000), Fault(True, cut=1_500_000))
        assert b"".join([chunk async for chunk in bucket.download("blob")]) == data
        assert [request.headers.get("range") for request in proxy.requests] == [
            None,
            "bytes=1000000-",
            "bytes=2500000-",
        ]
        assert {request.headers.get("if-match") for request in proxy.requests[1:]} == {
            (await opened().read("blob")).tag.etag  # type: ignore[union-attr]
        }


async def test_a_download_that_always_ends_early_is_corrupt(seaweed: Server, opened: Open) -> None:
    await opened().upload("blob", chunks_of(b"x" * 1000))
    async with FaultProxy(seaweed.port) as proxy:
        bucket = opened(proxy.port)
        proxy.plan(Fault(True, cut=600), *[Fault(True, cut=0)] * 50)
        with pytest.raises(StoreCorrupt, match="blob ends after 600 of 1,000 bytes"):
            async for _ in bucket.download("blob"):
                pass
        assert len(proxy.requests) <= MOST_TRIES + 1


async def test_a_download_does_not_mix_two_objects(seaweed: Server, opened: Open) -> None:
    direct = opened()
    await direct.upload("blob", chunks_of(b"x" * 3_000_000))
    async with FaultProxy(seaweed.port) as proxy:
        bucket = opened(proxy.port)
        proxy.plan(Fault(True, cut=1_000_000))
        download = bucket.download("blob")
        assert await anext(download)
        await direct.upload("blob", chunks_of(b"y" * 3_000_000))
        with pytest.raises(StoreCorrupt, match="replaced while it was read"):
            [chunk async for chunk in download]


async def test_parts_of_an_upload_are_sent_again(seaweed: Server, opened: Open) -> None:
    async with FaultProxy(seaweed.port) as proxy:
        bucket = opened(proxy.port)
        proxy.plan(RESET, where=on("PUT", "partNumber=2"))
        proxy.plan(SLOW_DOWN, where=on("PUT", "partNumber=1"))
        size = PART * 2 + 1
        assert await bucket.upload("blob", chunks_of(*[b"x" * (PART // 2)] * 4, b"x")) == size
        assert proxy.all_happened
        [entry] = [entry async for page in bucket.list("") for entry in page]
        assert entry.size == size
        assert (bucket.sent["upload"], bucket.sent["part"]) == (2, 3)


async def test_an_upload_that_fails_is_taken_back(seaweed: Server, opened: Open) -> None:
    async with FaultProxy(seaweed.port) as proxy:
        bucket = opened(proxy.port)
        denied = answer(403, "Forbidden", s3_error("AccessDenied"))
        proxy.plan(*[denied] * 10, where=on("PUT", "partNumber=2"))
        with pytest.raises(StoreError, match="allow s3:PutObject"):
            await bucket.upload("blob", chunks_of(*[b"x" * PART] * 5))
        assert "DELETE" in [request.method for request in proxy.requests], "the parts that were stored"
        assert await listed(bucket) == []


@pytest.mark.parametrize("cancelled", [False, True])
async def test_the_parts_of_an_upload_that_ends_early_are_taken_back(
    cancelled: bool, seaweed: Server, opened: Open
) -> None:
    async with FaultProxy(seaweed.port) as proxy:
        bucket = opened(proxy.port)
        waiting = asyncio.Event()

        async def source() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield b"x" * PART
            waiting.set()
            if not cancelled:
                raise ZeroDivisionError
            await asyncio.Event().wait()

        upload = asyncio.create_task(bucket.upload("blob", source()))
        await waiting.wait()
        if cancelled:
            upload.cancel()
        with pytest.raises(asyncio.CancelledError if cancelled else ZeroDivisionError):
            await upload
        assert proxy.requests[0].method == "POST"
        # A part that was on its way may come in after it; the rule for incomplete uploads is for that.
        assert [seen.method for seen in proxy.requests if "uploadId=" in seen.path].count("DELETE") == 1


async def test_what_is_sent_again_is_charged_again(seaweed: Server, opened: Open) -> None:
    async with FaultProxy(seaweed.port) as proxy:
        inner = opened(proxy.port)
        bucket = CountedBucket(inner)
        inner.on_repeat = bucket.repeated
        proxy.plan(SLOW_DOWN, SLOW_DOWN)
        tag = await bucket.create("q/n/orders/a", b"1")
        proxy.plan(TOO_MANY)
        await bucket.replace("q/n/orders/a", b"2", tag)
        proxy.plan(RESET)
        await bucket.read("q/n/orders/a")
        proxy.plan(SLOW_DOWN)
        await bucket.delete("q/n/orders/a")
        counted = bucket.requests()[QueueName("n", "orders")]
        assert (counted.creates, counted.replaces, counted.reads, counted.deletes) == (3, 2, 2, 2)
        assert counted.total == len(proxy.requests)


async def test_every_request_is_told_with_its_kind_and_name(seaweed: Server, opened: Open) -> None:
    told: list[tuple[str, str]] = []
    async with FaultProxy(seaweed.port) as proxy:
        bucket = opened(proxy.port, on_request=lambda kind, name: told.append((kind, name)))
        proxy.plan(SLOW_DOWN)
        tag = await bucket.create("q/a", b"1")
        await bucket.replace("q/a", b"2", tag)
        await bucket.read("q/a")
        await listed(bucket)
        await bucket.delete("q/a")
        assert told[:2] == [("create", "q/a")] * 2
        # A connection that the server has closed meanwhile makes a read be sent again, which is told as well.
        assert [request for request, _ in groupby(told)] == [
            ("create", "q/a"),
            ("replace", "q/a"),
            ("read", "q/a"),
            ("list", ""),
            ("delete", "q/a"),
        ]


@pytest.mark.parametrize("kind", ["azurite", "google"])
async def test_the_other_clouds_are_read_as_well(
    kind: str,
    request: pytest.FixtureRequest,
    clock: HurriedClock,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    server = request.getfixturevalue(kind)
    opened = _opener(server, clock, monkeypatch, tmp_path_factory)
    async with FaultProxy(server.port) as proxy:
        bucket = opened(proxy.port)
        for fault in (SLOW_DOWN, BUSY, TOO_MANY):
            proxy.plan(fault)
            tag = await bucket.create("a", b"1")
            proxy.plan(fault)
            await bucket.replace("a", b"2", tag)
            proxy.plan(fault)
            await bucket.delete("a")
        for fault in (INTERNAL, GATEWAY, BAD_GATEWAY, RESET, LOST_REPLY):
            proxy.plan(fault)
            with pytest.raises(OutcomeUnknown):
                await bucket.create("b", b"1")
            proxy.plan(fault)
            with pytest.raises(OutcomeUnknown):
                await bucket.replace("a", b"2", tag)
            proxy.plan(fault)
            await bucket.read("a")
            await opened().delete("b")
        # Of several deletes Azure tells the first that failed, and one that is gone already is one.
        await bucket.create("c", b"")
        if kind == "azurite":
            proxy.plan(answer(404, "Not Found", s3_error("BlobNotFound")), where=on("POST", "comp=batch"))
        await bucket.delete_many(["never", "c"])
        assert await bucket.read("c") is None
        proxy.plan(CONFLICT)
        proxy.plan(answer(404, "Not Found", s3_error("ContainerNotFound")))
        with pytest.raises(MillpondError) as caught:
            await bucket.replace("a", b"3", tag)
        assert "there is no such bucket" in str(caught.value)
        proxy.plan(answer(403, "Forbidden", s3_error("AuthorizationPermissionMismatch")))
        with pytest.raises(StoreError, match=r"storage\.objects\.get|Storage Blob Data Contributor"):
            await bucket.read("a")
        assert proxy.all_happened
        assert len(proxy.requests) == bucket.sent.total()
        assert not any(urlsplit(seen.path).query.count("sig=") for seen in proxy.requests)
