"""Streams: the credit window, signs of life, and what becomes of what a consumer had when it is gone."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tests.unit.server.native import JSON, Stream, ask, done, handle, leased, server, until
from tests.unit.server.raw import Connection

from millpond import testing
from millpond.errors import StoreFull
from millpond.server import outstanding, streams
from millpond.server.config import ServerConfig
from millpond.server.context import Context
from millpond.server.run import running
from millpond.service.config import Config
from millpond.wire import native


async def answer(url: str, messages: list[dict[str, Any]], route: str = "queue/ackBatch", **more: Any) -> Any:
    return await done(url, route, {"queue": "q", "messages": [handle(one) for one in messages]} | more)


@pytest.mark.parametrize("lines", [False, True], ids=["frames", "lines"])
async def test_messages_come_as_they_are_enqueued(lines: bool) -> None:
    async with testing.pond() as pond, running(pond) as url:
        await pond.queue("q").enqueue(b"before", attributes={"a": 1})
        async with Stream(url, lines, owner="me", visibility_ms=9000) as stream:
            kind = "application/x-ndjson" if lines else "application/vnd.millpond.frames"
            assert stream.headers["content-type"] == kind
            assert (stream.hello["credit"], stream.hello["heartbeat_ms"]) == (10, 15_000)
            [first] = await stream.messages()
            assert (first["attributes"], first["owner"], first["fencing_token"]) == ({"a": 1}, "me", 1)
            assert first["lease_expires_at_ms"] == pond.clock.now_ms() + 9000
            assert first["payload"] == ("YmVmb3Jl" if lines else b"before")
            await pond.queue("q").enqueue_many([b"1", b"2"])
            messages = await stream.messages(2)
            await answer(url, [first, *messages])
            assert (await pond.queue("q").counts()).leased == 0


async def test_no_more_than_the_credit_is_unanswered() -> None:
    async with testing.pond() as pond, running(pond) as url:
        await pond.queue("q").enqueue_many([b"%d" % i for i in range(10)])
        async with Stream(url, credit=3) as stream:
            held = await stream.messages(3)
            await pond.settle()
            assert (await pond.queue("q").counts()).leased == 3
            # An extension is no answer.
            await answer(url, held[:1], "queue/extendBatch", extend_by_ms=60_000)
            await pond.settle()
            assert (await pond.queue("q").counts()).leased == 3
            await answer(url, held[:1])
            await answer(url, held[1:2], "queue/nackBatch", delay_ms=60_000)
            await done(url, "queue/bury", {"queue": "q", "message": handle(held[2]), "reason": "no"})
            assert len(await stream.messages(3)) == 3
            await pond.settle()
            assert (await pond.queue("q").counts()).leased == 3


async def test_answers_by_lockds_routes_give_credit_back() -> None:
    async with testing.pond() as pond, running(pond) as url:
        await pond.queue("q").enqueue_many([b"1", b"2"])
        async with Stream(url, credit=1) as stream:
            [first] = await stream.messages()
            await done(url, "queue/ack", {"queue": "q"} | handle(first))
            await stream.messages()


async def test_a_refused_answer_gives_no_credit() -> None:
    async with testing.pond() as pond, running(pond) as url:
        await pond.queue("q").enqueue_many([b"1", b"2"])
        async with Stream(url, credit=1) as stream:
            [first] = await stream.messages()
            wrong = first | {"lease_id": "another"}
            assert "error" in (await answer(url, [wrong]))["results"][0]
            await pond.settle()
            assert (await pond.queue("q").counts()).leased == 1


async def test_the_end_of_a_lease_gives_its_credit_back_but_not_while_it_is_extended() -> None:
    async with testing.pond() as pond, running(pond) as url:
        await pond.queue("q").enqueue_many([b"1", b"2", b"3"], visibility=10)
        async with Stream(url, credit=2, heartbeat_ms=600_000) as stream:
            held = await stream.messages(2)
            await answer(url, held[:1], "queue/extendBatch", extend_by_ms=60_000)
            await pond.advance(10)
            [third] = await stream.messages()
            # The lapsed one comes again, or the one that waited: not the one that was extended.
            assert third["message_id"] != held[0]["message_id"]
            await pond.settle()
            assert (await pond.queue("q").counts()).leased == 2


async def test_an_extension_counts_for_a_delivery_that_this_process_has_forgotten() -> None:
    async with testing.pond() as pond:
        context = server(pond)
        async with running(pond, context=context) as url:
            await pond.queue("q").enqueue_many([b"1", b"2"], visibility=10)
            async with Stream(url, credit=1, heartbeat_ms=600_000) as stream:
                held = await stream.messages()
                context.held._held.clear()
                await answer(url, held, "queue/extendBatch", extend_by_ms=60_000)
                assert context.streams.find(stream.hello["stream_id"]).next_end() == pond.clock.now_ms() + 60_000  # type: ignore[union-attr]
                await pond.advance(11)
                assert (await pond.queue("q").counts()).leased == 1
                # One that is shortened gives its credit back the sooner.
                await answer(url, held, "queue/extendBatch", extend_by_ms=5_000)
                await pond.queue("q").purge()
                await pond.advance(5)
                [again] = await stream.messages()
                assert again["message_id"] == held[0]["message_id"]


async def test_more_credit_can_be_given() -> None:
    async with testing.pond() as pond, running(pond) as url:
        await pond.queue("q").enqueue_many([b"%d" % i for i in range(5)])
        async with Stream(url, credit=1) as stream:
            await stream.messages(1)
            wish = {"stream_id": stream.hello["stream_id"], "credit": 2}
            assert await done(url, "queue/credit", wish) == {"credit": 3}
            await stream.messages(2)
            most = {"stream_id": stream.hello["stream_id"], "credit": native.MAX_CREDIT}
            assert await done(url, "queue/credit", most) == {"credit": native.MAX_CREDIT}
        reply = await ask(url, "queue/credit", {"stream_id": "x", "credit": 1})
        assert (reply.status, reply.code) == (404, "stream_not_found")


@pytest.mark.parametrize("credit", [10, 1], ids=["idle", "out of credit"])
async def test_an_idle_stream_says_that_it_is_alive(credit: int) -> None:
    async with testing.pond() as pond, running(pond) as url:
        await pond.queue("q").enqueue(b"1", visibility=600)
        async with Stream(url, credit=credit, heartbeat_ms=5000) as stream:
            await stream.messages()
            for _ in range(2):
                await until(lambda: pond.manual_clock.pending_timers >= 1)
                await pond.advance(5)
                assert await stream.frame() == {"type": "heartbeat", "outstanding": 1}


async def test_what_a_vanished_client_had_is_given_back_at_once() -> None:
    async with testing.pond() as pond:
        context = server(pond)
        async with running(pond, context=context) as url:
            await pond.queue("q").enqueue_many([b"1", b"2", b"3"])
            async with Stream(url) as stream:
                held = await stream.messages(3)
                await answer(url, held[:1])
                stream.close()
                await leased(pond, "q", 0)
            assert len(context.streams) == len(context.streams.by_lease) == 0
            messages = await pond.queue("q").receive(3)
            assert [message.payload for message in messages] == [b"2", b"3"]
            assert [(message.attempts, message.failures) for message in messages] == [(2, 0), (2, 0)]


async def test_several_streams_share_a_queue() -> None:
    async with (
        testing.pond() as pond,
        running(pond) as url,
        Stream(url, credit=2) as one,
        Stream(url, credit=2) as two,
    ):
        await until(lambda: pond.dispatcher.queue_stats(None, "q").waiting_consumers == 2)
        await pond.queue("q").enqueue_many([b"1", b"2", b"3", b"4"])
        found = [*await one.messages(2), *await two.messages(2)]
        assert sorted(message["payload"] for message in found) == [b"1", b"2", b"3", b"4"]
        two.close()
        await answer(url, found[:2])
        again = await one.messages(2)
        assert {message["payload"] for message in again} == {message["payload"] for message in found[2:]}


@pytest.mark.parametrize("credit", [10, 1], ids=["waiting", "out of credit"])
async def test_a_drain_ends_streams_and_leaves_what_they_hold_to_their_consumers(credit: int) -> None:
    async with testing.pond() as pond:
        context = Context(pond, ServerConfig(port=0, shutdown_timeout=1.0, drain_grace=7.0))
        async with running(pond, context=context) as url:
            await pond.queue("q").enqueue(b"1")
            async with Stream(url, credit=credit) as stream:
                held = await stream.messages()
                await pond.settle()
                context.begin_drain()
                end = await stream.frame()
                assert (end["type"], end["reason"], end["retry_after_seconds"]) == ("end", "draining", 7)
                assert await stream.over()
            await pond.settle()
            await context.settle()
            assert (await pond.queue("q").counts()).leased == 1
            assert "error" not in (await answer(url, held))["results"][0]
            reply = await ask(url, "queue/stream", {"queue": "q", "credit": 1})
            assert (reply.status, reply.code) == (503, "shutdown_draining")


async def test_trouble_of_the_store_ends_a_stream_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    async with testing.pond() as pond, running(pond) as url:
        async with Stream(url) as stream:
            await until(lambda: pond.dispatcher.queue_stats(None, "q").waiting_consumers == 1)

            async def full(*_: Any, **__: Any) -> Any:
                raise StoreFull("no room on /dev/secret")

            monkeypatch.setattr(pond.service, "claim", full)
            await pond.queue("q").enqueue(b"1")
            end = await stream.frame()
            assert (end["type"], end["reason"], end["retry_after_seconds"]) == ("end", "store_full", 1)
            assert "secret" not in end["detail"]
            assert await stream.over()
        monkeypatch.undo()
        async with Stream(url) as stream:
            await stream.messages()


async def test_the_number_of_streams_is_bounded() -> None:
    async with testing.pond(config=Config(max_consumers=1)) as pond, running(pond) as url, Stream(url):
        reply = await ask(url, "queue/stream", {"queue": "q", "credit": 1})
        assert (reply.status, reply.code) == (503, "too_many_consumers")
        assert reply.headers["retry-after"] == "1"


async def test_all_streams_together_hold_no_more_than_the_cap() -> None:
    async with testing.pond() as pond:
        context = server(pond)
        context.streams._capacity = 3
        async with running(pond, context=context) as url:
            await pond.queue("q").enqueue_many([b"%d" % i for i in range(6)])
            async with Stream(url, credit=2) as one, Stream(url, credit=10) as two:
                first = await one.messages(2)
                await two.messages(1)
                await pond.settle()
                assert (await pond.queue("q").counts()).leased == 3
                await answer(url, first[:1])
                await until(lambda: len(context.streams.by_lease) == 3)


async def test_a_client_that_reads_slowly_costs_one_frame() -> None:
    """Nothing is taken for it while a frame is on its way."""
    async with testing.pond() as pond:
        context = server(pond)
        async with running(pond, context=context) as url:
            count, size = 600, 60_000
            await pond.queue("q").enqueue_many([bytes(size)] * count)
            async with Connection(url, receive_buffer=4096) as connection:
                connection.writer.transport.pause_reading()  # type: ignore[attr-defined]
                wish = json.dumps({"queue": "q", "credit": 1000, "max_batch": 1000}).encode()
                await connection.send("POST", "/v1/queue/stream", wish, JSON)
                held, quiet = 0, 0
                while quiet < 40:  # it has come to rest
                    await asyncio.sleep(0.005)
                    now = (await pond.queue("q").counts()).leased
                    held, quiet = now, quiet + 1 if now == held and now else 0
                # The system's own buffers take some megabytes; the server keeps a frame.
                assert held * size < 12 * 1024 * 1024
                connection.writer.transport.abort()
            await leased(pond, "q", 0)


async def test_payloads_that_are_larger_than_thought_come_in_several_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "FRAME_BYTES", 1000)
    async with testing.pond() as pond, running(pond) as url, Stream(url, credit=100) as stream:
        await pond.queue("q").enqueue(b"")
        await stream.messages()
        await pond.queue("q").enqueue_many([bytes(400)] * 5)
        sizes: list[int] = []
        while sum(sizes) < 5:
            sizes.append(len((await stream.frame())["messages"]))
        assert max(sizes) <= 2


async def test_what_cannot_be_right_is_told_before_the_stream_begins() -> None:
    async with testing.pond() as pond:
        context = server(pond)
        async with running(pond, context=context) as url:
            for wrong in ({"credit": 0}, {"credit": 1001}, {"credit": 1, "owner": ""}, {"credit": 1, "queue": "a/b"}):
                reply = await ask(url, "queue/stream", {"queue": "q"} | wrong)
                assert reply.status == 400, wrong
            assert len(context.streams) == 0


async def test_extended_elsewhere_is_noticed_before_credit_is_given_back() -> None:
    """By a route that knows the delivery, not the stream."""
    async with testing.pond() as pond:
        context = server(pond)
        await pond.queue("q").enqueue(b"1")
        [delivery] = await pond.service.claim("default", "q", 1, visibility=5)
        stream = context.streams.open("default", "q", 1)
        stream.sent(delivery)
        await pond.service.extend(delivery, 60)
        await pond.advance(10)
        assert stream.room() == 0
        await pond.advance(51)
        assert stream.room() == 1
        assert stream.close() == []


def test_the_cap_is_what_memory_bears() -> None:
    assert native.MAX_CREDIT <= outstanding.MAX_OUTSTANDING <= 1_000_000
