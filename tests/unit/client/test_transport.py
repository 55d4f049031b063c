"""Failover, repetition, time-outs, and what is made of strange answers, against a server that says what it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.unit.client.fake import Asked, Drop, Fake, Say, Script, fake, fault, packed

from millpond import (
    InvalidQueue,
    MillpondError,
    OutcomeUnknown,
    Queue,
    StoreBusy,
    StoreClosed,
    StoreCorrupt,
    StoreError,
    StoreUnreachable,
    Throttled,
)
from millpond.client.pond import RemotePond
from millpond.model.clock import ManualClock

NOTHING = packed({"messages": []})
COUNTS = packed({"ready": 1, "delayed": 0, "leased": 0, "blocked": 0, "dead": 0, "bytes": 3})


async def counts(asked: Asked) -> Say:
    return COUNTS


def receipts(asked: Asked, duplicate: bool = False) -> Say:
    found = [{"message_id": one["message_id"], "duplicate": duplicate} for one in asked.data["messages"]]
    return packed({"receipts": found})


def first_then(first: Say | Drop, then: Callable[[Asked], Say]) -> Script:
    """The first request is answered with ``first``, all others by ``then``."""
    left = [first]

    async def script(asked: Asked) -> Say | Drop:
        return left.pop() if left else then(asked)

    return script


class Bench:
    """A client of one or more fake servers, and its time."""

    def __init__(self, *servers: Fake, timeout: float = 30.0, path: str = "") -> None:
        self.clock = ManualClock()
        hosts = ",".join(f"127.0.0.1:{server.port}" for server in servers)
        self.pond = RemotePond(f"http://{hosts}{path}", clock=self.clock, timeout=timeout)
        self.transport = self.pond.transport

    @property
    def queue(self) -> Queue:
        return self.pond.queue("orders")

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let what happens over sockets happen."""
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.001)

    async def paused(self, call: Awaitable[Any], failures: int) -> asyncio.Future[Any]:
        """The call, which by now waits to try again."""
        task = asyncio.ensure_future(call)
        await self.until(lambda: self.transport.failures >= failures and not self.transport.under_way)
        for _ in range(5):
            await asyncio.sleep(0)
        assert not task.done()
        return task


@asynccontextmanager
async def bench(*scripts: Script, **options: Any) -> AsyncIterator[tuple[Bench, list[Fake]]]:
    servers = [Fake(script) for script in scripts]
    for server in servers:
        await server.start()
    made = Bench(*servers, **options)
    try:
        async with made.pond:
            yield made, servers
    finally:
        for server in servers:
            await server.stop()


async def test_calls_share_connections() -> None:
    async with bench(counts) as (client, [server]):
        for _ in range(5):
            assert (await client.queue.counts()).ready == 1
        await asyncio.gather(*[client.queue.counts() for _ in range(4)])
        await asyncio.gather(*[client.queue.counts() for _ in range(4)])
        assert server.connections == 4
        assert len(server.asked) == 13


async def test_answers_never_stand_behind_waits() -> None:
    held = asyncio.Event()

    async def script(asked: Asked) -> Say:
        if asked.path.endswith("receive"):
            await held.wait()
            return NOTHING
        return COUNTS

    async with bench(script) as (client, [server]):
        waits = [asyncio.ensure_future(client.queue.receive(wait=5)) for _ in range(150)]
        await client.until(lambda: len(server.asked) == 150)
        assert (await client.queue.counts()).ready == 1
        client.clock.advance(5)
        held.set()
        assert await asyncio.gather(*waits) == [[]] * 150


async def test_token_and_path_go_with_each_call() -> None:
    async with fake(counts) as server:
        pond = RemotePond(f"{server.url}/deep/down?token=s3cret", clock=ManualClock())
        server_health: list[str] = []
        original = server.script

        async def script(asked: Asked) -> Say | Drop:
            server_health.append(asked.path)
            return Say() if asked.path.endswith("/healthz") else await original(asked)

        server.script = script
        async with pond:
            await pond.queue("orders").counts()
        assert server_health == ["/deep/down/healthz", "/deep/down/v1/queue/counts"]
        assert server.asked[-1].headers["authorization"] == "Bearer s3cret"
        assert "s3cret" not in f"{pond!r} {pond.statistics()}"


async def test_an_enqueue_without_a_reply_is_repeated_with_its_id() -> None:
    script = first_then(Drop(), lambda asked: receipts(asked, duplicate=True))
    async with bench(script) as (client, [server]):
        receipt = await client.queue.enqueue(b"x")
        ids = [asked.data["messages"][0]["message_id"] for asked in server.asked]
        assert ids == [receipt.message_id] * 2
        assert not receipt.duplicate, "what is there under our own id is what we sent"


async def test_a_duplicate_is_told_when_it_may_be_another_ones() -> None:
    given = "0197a3c2-0000-7000-8000-000000000001"
    script = first_then(Drop(), lambda asked: receipts(asked, duplicate=True))
    async with bench(script) as (client, _):
        assert await client.queue.enqueue(b"x", message_id=given) == (given, True)

    async def other(asked: Asked) -> Say:
        return packed({"receipts": [{"message_id": given, "duplicate": True}]})

    async with bench(other) as (client, _):
        assert await client.queue.enqueue(b"x", dedup_key="k") == (given, True)


async def test_a_reply_that_breaks_off_is_no_reply() -> None:
    half = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"
    async with bench(first_then(Drop(half), receipts)) as (client, [server]):
        await client.queue.enqueue(b"x")
        assert len(server.asked) == 2


async def test_who_refuses_connections_is_passed_over_and_remembered() -> None:
    async with bench(counts, counts) as (client, [first, second]):
        await client.queue.counts()
        await first.stop()
        for _ in range(3):
            await client.queue.counts()
        assert (len(first.asked), len(second.asked)) == (1, 3)
        assert client.transport.failures <= 2, "it was asked again at once"
        assert client.transport.current == second.url


async def test_a_server_that_is_back_is_asked_when_the_other_fails() -> None:
    async with bench(counts, counts) as (client, [first, second]):
        port = first.port
        await first.stop()
        await client.queue.counts()
        again = Fake(counts)
        await again.start(port)
        await second.stop()
        assert (await client.queue.counts()).ready == 1
        assert len(again.asked) == 1
        await again.stop()


@pytest.mark.parametrize("code", ["node_passive", "shutdown_draining"])
async def test_a_server_that_sends_everybody_away(code: str) -> None:
    async def away(asked: Asked) -> Say:
        return fault(503, code, "go", Retry_After="7")

    async with bench(away, counts) as (client, [first, second]):
        for _ in range(3):
            await client.queue.counts()
        assert (len(first.asked), len(second.asked)) == (1, 3)
    async with bench(first_then(fault(503, code, "go", Retry_After="7"), lambda _: COUNTS)) as (client, [only]):
        task = asyncio.ensure_future(client.queue.counts())
        await client.until(lambda: len(only.asked) == 1 and not client.transport.under_way)
        client.clock.advance(6.9)
        await asyncio.sleep(0.01)
        assert (task.done(), len(only.asked)) == (False, 1)
        client.clock.advance(3)
        assert (await task).ready == 1


async def test_who_is_put_off_waits_as_long_as_he_is_told() -> None:
    throttled = fault(429, "throttled", "later", Retry_After="3")
    async with bench(first_then(throttled, receipts), counts) as (client, [first, second]):
        task = asyncio.ensure_future(client.queue.enqueue(b"x"))
        await client.until(lambda: len(first.asked) == 1 and not client.transport.under_way)
        client.clock.advance(2.9)
        await asyncio.sleep(0.01)
        assert (task.done(), len(first.asked)) == (False, 1)
        client.clock.advance(1)
        await task
        assert (len(first.asked), len(second.asked)) == (2, 0), "the store is one: the other would be no less loaded"


async def test_who_is_put_off_for_longer_than_his_time_is_told() -> None:
    async def script(asked: Asked) -> Say:
        return fault(429, "throttled", "later", Retry_After="3")

    async with bench(script, timeout=2.0) as (client, [server]):
        with pytest.raises(Throttled, match="later"):
            await client.queue.enqueue(b"x")
        assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "invalid_queue", InvalidQueue),
        (503, "store_busy", StoreBusy),
        (503, "store_error", StoreError),
        (500, "internal_error", MillpondError),
        (500, "store_corrupt", StoreCorrupt),
    ],
)
async def test_what_the_engine_raised_is_raised_here_at_once(status: int, code: str, kind: type[Exception]) -> None:
    async def script(asked: Asked) -> Say:
        return fault(status, code, "its words", Retry_After="1")

    async with bench(script) as (client, [server]):
        with pytest.raises(kind, match="its words") as raised:
            await client.queue.enqueue(b"x")
        assert type(raised.value) is kind
        assert len(server.asked) == 1


async def test_when_nothing_answers_until_the_time_is_over() -> None:
    async def script(asked: Asked) -> Drop:
        return Drop()

    async with bench(script, timeout=1.0) as (client, [server]):

        async def over(call: Awaitable[Any]) -> None:
            before = client.transport.failures
            task = await client.paused(call, before + 2)
            while not task.done():
                if not client.transport.under_way:  # it pauses
                    client.clock.advance(0.2)
                await asyncio.sleep(0.001)
            await task

        with pytest.raises(OutcomeUnknown, match="may have been done"):
            await over(client.queue.enqueue(b"x"))
        with pytest.raises(StoreUnreachable, match="closed the connection") as raised:
            await over(client.queue.counts())
        assert raised.value.retryable
        assert "begins with https://" in str(raised.value)
        await server.stop()
        with pytest.raises(StoreUnreachable, match="connection refused"):
            await over(client.queue.enqueue(b"x"))


async def test_what_counts_is_not_sent_twice() -> None:
    async def script(asked: Asked) -> Drop:
        return Drop()

    async with bench(script) as (client, [server]):
        for call in (client.queue.purge, client.queue.dead_letters.redrive, client.queue.dead_letters.purge):
            with pytest.raises(OutcomeUnknown, match="look, and ask again"):
                await call()
        assert [asked.path for asked in server.asked] == ["/v1/queue/purge", "/v1/dlq/redrive", "/v1/dlq/purge"]


async def test_a_server_that_hangs_leaves_time_for_the_next() -> None:
    never = asyncio.Event()

    async def hangs(asked: Asked) -> Say:
        await never.wait()
        return COUNTS

    async with bench(hangs, counts, timeout=30.0) as (client, [first, second]):
        task = asyncio.ensure_future(client.queue.counts())
        await client.until(lambda: len(first.asked) == 1)
        client.clock.advance(9.9)
        await asyncio.sleep(0.01)
        assert not task.done()
        client.clock.advance(0.2)
        assert (await task).ready == 1
        assert len(second.asked) == 1
        trouble = client.pond.statistics()["transport"]["endpoints"][first.url]["trouble"]
        assert trouble == "no answer in time"


async def test_who_waits_behind_calls_that_hang_has_his_own_time_out_all_the_same() -> None:
    hanging = True

    async def script(asked: Asked) -> Say | Drop:
        return Drop(close=False) if hanging else COUNTS

    async with bench(script, timeout=30.0) as (client, [server]):
        client.transport._places = asyncio.Semaphore(4)
        calls = [asyncio.ensure_future(client.queue.counts()) for _ in range(20)]
        for seconds in (10.0, 10.0, 10.1):
            asked = len(server.asked) + 4
            await client.until(lambda asked=asked: len(server.asked) >= asked)  # type: ignore[misc]
            assert not any(call.done() for call in calls)
            client.clock.advance(seconds)
        outcomes = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)
        assert {type(outcome) for outcome in outcomes} == {StoreUnreachable}
        assert len(server.asked) == 12, "nothing is sent that nobody waits for"
        waited = [str(outcome) for outcome in outcomes if "other calls were under way" in str(outcome)]
        assert len(waited) >= 8
        hanging = False
        client.clock.advance(60)
        assert [one.ready for one in await asyncio.gather(*[client.queue.counts() for _ in range(8)])] == [1] * 8


async def test_who_finds_no_place_says_nothing_about_the_server() -> None:
    async with bench(counts, timeout=30.0) as (client, [server]):
        places = client.transport._places = asyncio.Semaphore(1)
        await places.acquire()
        call = asyncio.ensure_future(client.queue.counts())
        await client.until(lambda: client.transport.under_way == 1)
        client.clock.advance(30.1)
        with pytest.raises(StoreUnreachable, match="other calls were under way all the time"):
            await call
        assert not server.asked
        assert client.transport.endpoints[0].failures == 0
        given_up = asyncio.ensure_future(client.queue.counts())
        await client.until(lambda: client.transport.under_way == 1)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        places.release()
        assert (await client.queue.counts()).ready == 1


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000,
    ],
)
async def test_what_is_no_answer_of_http(raw: bytes) -> None:
    async with bench(first_then(Drop(raw), receipts)) as (client, [server]):
        await client.queue.enqueue(b"x")
        assert (len(server.asked), server.connections) == (2, 2), "a connection that was not understood was used again"


async def test_other_forms_of_an_answer() -> None:
    body = COUNTS.body
    chunked = b"".join(b"%x;ext=1\r\n%b\r\n" % (len(part), part) for part in (body[:5], body[5:])) + b"0\r\n\r\n"
    for raw in (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body),
        b"HTTP/1.0 200 OK\r\nconnection: Close\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked,
    ):
        async with bench(first_then(Drop(raw), receipts)) as (client, [server]):
            assert (await client.queue.counts()).bytes == 3
            assert len(server.asked) == 1


async def test_what_comes_unasked_ends_the_connection() -> None:
    body = COUNTS.body
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    async with bench(first_then(Drop(raw + raw.replace(b"\x03", b"\x04"), close=False), lambda _: COUNTS)) as (
        client,
        [server],
    ):
        assert (await client.queue.counts()).bytes == 3
        assert (await client.queue.counts()).bytes == 3
        assert server.connections == 2


async def test_another_kind_of_server() -> None:
    async def page(asked: Asked) -> Say:
        return Say(b"<h1>Not here</h1>", 404)

    async def gateway(asked: Asked) -> Say:
        return Say(b"<h1>Bad gateway</h1>", 502)

    async with bench(page) as (client, [server]):
        with pytest.raises(StoreError, match="is it one"):
            await client.queue.counts()
        assert len(server.asked) == 1
    async with bench(gateway, counts) as (client, _):
        assert (await client.queue.counts()).ready == 1

    async def nonsense(asked: Asked) -> Say:
        return Say(b"\xc1")

    async with bench(nonsense) as (client, _):
        with pytest.raises(MillpondError, match="another version"):
            await client.queue.counts()


async def test_nothing_is_sent_before_open_or_after_close() -> None:
    async with fake(counts) as server:
        client = Bench(server)
        with pytest.raises(StoreClosed):
            await client.queue.counts()
        async with client.pond:
            await client.queue.counts()
        with pytest.raises(StoreClosed):
            await client.queue.counts()
        with pytest.raises(StoreClosed):
            await client.pond.open()
        await client.until(lambda: server.open == 0)


async def test_close_ends_who_waits() -> None:
    never = asyncio.Event()

    async def hangs(asked: Asked) -> Say:
        await never.wait()
        return NOTHING

    async with bench(hangs) as (client, [server]):
        waiting = asyncio.ensure_future(client.queue.receive(wait=60))
        await client.until(lambda: len(server.asked) == 1)
        await client.pond.close()
        with pytest.raises(StoreClosed):
            await waiting


async def test_opening_says_soon_that_nobody_is_there() -> None:
    async with fake(counts) as server:
        client = Bench(server)
    task = asyncio.ensure_future(client.pond.open())
    while not task.done():
        if not client.transport.under_way:
            client.clock.advance(0.2)
        await asyncio.sleep(0.001)
    assert client.clock.monotonic() < 8
    with pytest.raises(StoreUnreachable, match="connection refused"):
        await task


# Payloads in streams


async def _pieces(count: int, size: int = 100_000) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield bytes(size)


def uploaded(asked: Asked) -> Say:
    return Say(b'{"message_id":"0197a3c2-0000-7000-8000-000000000001","duplicate":false}')


async def test_bytes_are_sent_again() -> None:
    async with bench(first_then(Drop(), uploaded)) as (client, [server]):
        await client.queue.enqueue(bytes(300_000))
        first, second = (asked.body for asked in server.asked)
        assert len(first) == len(second) > 300_000
        # All that differs is how the parts are told apart.
        assert first.count(bytes(300_000)) == second.count(bytes(300_000)) == 1


async def test_a_source_is_not_sent_again() -> None:
    async with bench(first_then(Drop(), uploaded)) as (client, [server]):
        with pytest.raises(OutcomeUnknown, match="cannot be sent again"):
            await client.queue.enqueue(_pieces(3))
        assert len(server.asked) == 1


async def test_a_source_goes_to_the_next_server_while_nothing_of_it_is_sent() -> None:
    async with bench(uploaded_script, uploaded_script) as (client, [first, second]):
        await first.stop()
        await client.queue.enqueue(_pieces(3))
        assert len(second.asked) == 1


async def uploaded_script(asked: Asked) -> Say:
    return uploaded(asked)


async def test_what_a_source_raises_is_raised() -> None:
    async def bad() -> AsyncIterator[bytes]:
        yield bytes(100_000)
        raise ZeroDivisionError("of the source")

    async with bench(uploaded_script) as (client, _):
        with pytest.raises(ZeroDivisionError, match="of the source"):
            await client.queue.enqueue(bad())
        await client.queue.enqueue(_pieces(1))


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (fault(403, "forbidden", "not any more"), OutcomeUnknown),
        (fault(500, "internal_error", "it failed"), OutcomeUnknown),
        (fault(400, "invalid_queue", "no name"), InvalidQueue),
    ],
)
async def test_a_refusal_says_nothing_of_an_earlier_try_without_an_answer(refusal: Say, kind: type[Exception]) -> None:
    """What Forbidden says of the second try is not true of the first, which may have been carried out."""
    tries = iter((Drop(), refusal))

    async def script(asked: Asked) -> Say | Drop:
        return next(tries)

    async with bench(script) as (client, [server]):
        with pytest.raises(kind) as raised:
            await client.queue.enqueue(b"x")
        assert type(raised.value) is kind
        assert len(server.asked) == 2


async def test_who_does_not_know_of_an_earlier_try_goes_on_while_the_store_is_busy() -> None:
    tries = iter((Drop(), fault(503, "store_busy", "another writes"), None))

    async def script(asked: Asked) -> Say | Drop:
        return next(tries) or receipts(asked)

    async with bench(script) as (client, [server]):
        task = await client.paused(client.queue.enqueue(b"x"), 1)
        assert len(server.asked) == 2
        client.clock.advance(5)
        assert not (await task).duplicate
        assert len({asked.data["messages"][0]["message_id"] for asked in server.asked}) == 1
