"""Millpond's own routes: what each does, in both forms, and what each is answered that cannot be right."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.unit.server.native import JSON, ask, decoded, done, handle, leased, server, text, until
from tests.unit.server.raw import Connection, request

from millpond import Keyring, connect, testing
from millpond.model.message import Head
from millpond.server import native_operations as operations
from millpond.server.config import ServerConfig
from millpond.server.context import Call, Context
from millpond.server.native_operations import SLICE
from millpond.server.run import running
from millpond.service.config import Config
from millpond.stores.base import QueueName
from millpond.stores.encrypted import EncryptedStore
from millpond.stores.memory import MemoryStore
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.store import ObjectStore
from millpond.testing import ManualClock
from millpond.wire import native

ID = "0197a3c2-0000-7000-8000-000000000001"
OTHER = "0197a3c2-0000-7000-8000-000000000002"

both = pytest.mark.parametrize("packed", [False, True], ids=["json", "msgpack"])


def payload(data: bytes, packed: bool) -> Any:
    return data if packed else text(data)


# Producers


@both
async def test_a_batch_is_stored_with_each_messages_own_options(packed: bool) -> None:
    async with testing.pond() as pond, running(pond) as url:
        messages = [
            {"payload": payload(b"plain", packed)},
            {
                "payload": payload(b"full", packed),
                "delay_ms": 1500,
                "ttl_ms": 60_000,
                "priority": 9,
                "max_attempts": 2,
                "visibility_ms": 5_000,
                "attributes": {"a": [1, None]},
                "ordering_key": "k",
                "content_type": "text/plain",
                "correlation_id": "c",
                "message_id": ID,
            },
        ]
        body = await done(url, "queue/enqueueBatch", {"queue": "q", "messages": messages}, packed=packed)
        assert [one["duplicate"] for one in body["receipts"]] == [False, False]
        assert body["receipts"][1]["message_id"] == ID
        view = (await pond.queue("q").get(ID)).record
        head: Head = view.head
        assert (head.priority, head.max_attempts, head.visibility, head.ttl) == (9, 2, 5_000, 60_000)
        assert (head.attributes, head.ordering_key, head.content_type, head.correlation_id) == (
            {"a": [1, None]},
            "k",
            "text/plain",
            "c",
        )
        assert view.status.visible_at == pond.clock.now_ms() + 1500
        [message] = await pond.queue("q").receive(10)
        assert message.payload == b"plain"
        again = await done(url, "queue/enqueueBatch", {"queue": "q", "messages": messages[1:]}, packed=packed)
        assert again["receipts"] == [{"message_id": ID, "duplicate": True}]


async def test_a_plain_message_with_an_id_of_its_own_is_enqueued_once() -> None:
    async with testing.pond() as pond, running(pond) as url:
        batch = {"queue": "q", "messages": [{"payload": text(b"1"), "message_id": ID.upper()}]}
        first, second = await done(url, "queue/enqueueBatch", batch), await done(url, "queue/enqueueBatch", batch)
        assert first["receipts"] == [{"message_id": ID, "duplicate": False}]
        assert second["receipts"] == [{"message_id": ID, "duplicate": True}]
        assert (await pond.queue("q").counts()).ready == 1


async def test_a_batch_with_one_bad_message_stores_none_and_says_which() -> None:
    async with testing.pond() as pond, running(pond) as url:
        messages = [{"payload": ""}, {"payload": "", "message_id": "not-a-uuid"}]
        reply = await ask(url, "queue/enqueueBatch", {"queue": "q", "messages": messages})
        assert (reply.status, reply.code) == (400, "invalid_message_id")
        assert reply.body["detail"].startswith("message 1 of the batch")
        assert (await pond.queue("q").counts()).ready == 0


async def test_a_payload_too_large_for_the_pond_is_413_and_stores_nothing() -> None:
    async with testing.pond(config=Config(max_payload_bytes=3)) as pond, running(pond) as url:
        reply = await ask(url, "queue/enqueueBatch", {"queue": "q", "messages": [{"payload": text(b"1234")}]})
        assert (reply.status, reply.code) == (413, "too_large")
        assert await pond.queues() == []


# Consumers


@both
async def test_a_delivery_says_everything(packed: bool) -> None:
    async with testing.pond() as pond, running(pond) as url:
        await pond.queue("q", namespace="n").enqueue(b"\x00\xff", attributes={"a": 1}, ttl=60, dedup_key="d")
        wish = {"namespace": "n", "queue": "q", "count": 5, "owner": "me", "visibility_ms": 7000}
        body = await done(url, "queue/receive", wish, packed=packed)
        sent = msgspec.convert(body, native.Deliveries, builtin_types=(bytes,) if packed else ())
        [delivery] = sent.messages
        record = (await pond.queue("q", namespace="n").get(delivery.message_id)).record
        assert native.head_of(delivery) == record.head
        assert native.status_of(delivery) == record.status
        assert (delivery.payload, delivery.owner, delivery.fencing_token) == (b"\x00\xff", "me", 1)
        assert delivery.lease_expires_at_ms == pond.clock.now_ms() + 7000
        assert (delivery.etag, delivery.cursor) == (record.mark.etag, str(record.item.key))


async def test_an_empty_queue_is_an_empty_list() -> None:
    async with testing.pond() as pond, running(pond) as url:
        assert await done(url, "queue/receive", {"queue": "q"}) == {"messages": []}


async def test_a_waiting_receive_gets_what_comes() -> None:
    async with testing.pond() as pond, running(pond) as url:
        waiting = asyncio.create_task(done(url, "queue/receive", {"queue": "q", "wait_ms": 600_000}))
        await until(lambda: pond.dispatcher.queue_stats(None, "q").waiting_consumers == 1)
        await pond.queue("q").enqueue(b"1")
        assert [one["payload"] for one in (await waiting)["messages"]] == [text(b"1")]


async def test_a_wait_ends_with_its_time() -> None:
    async with testing.pond() as pond, running(pond) as url:
        waiting = asyncio.create_task(done(url, "queue/receive", {"queue": "q", "wait_ms": 5_000}))
        await until(lambda: pond.dispatcher.queue_stats(None, "q").waiting_consumers == 1)
        pond.manual_clock.advance(5)
        assert await waiting == {"messages": []}


async def test_a_client_that_goes_away_while_it_waits_leaves_nobody_waiting() -> None:
    async with testing.pond() as pond, running(pond) as url:
        async with Connection(url) as connection:
            body = json.dumps({"queue": "q", "wait_ms": 600_000}).encode()
            await connection.send("POST", "/v1/queue/receive", body, JSON)
            await until(lambda: pond.dispatcher.queue_stats(None, "q").waiting_consumers == 1)
        await until(lambda: pond.dispatcher.queue_stats(None, "q").total_consumers == 0, "an end of the wait")
        await pond.queue("q").enqueue(b"1")
        await pond.settle()
        assert (await pond.queue("q").counts()).ready == 1


async def test_what_was_taken_for_a_client_that_goes_away_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It vanishes after its message was leased, before it is sent."""
    async with testing.pond() as pond:
        context = server(pond)
        claim = pond.service.claim
        claimed: list[int] = []
        connections: list[Connection] = []

        async def slow(*arguments: Any, **options: Any) -> Any:
            found = await claim(*arguments, **options)
            if found:
                claimed.append(len(found))
                connections[0].writer.transport.abort()
                with contextlib.suppress(asyncio.CancelledError):  # it comes to its end all the same
                    await asyncio.sleep(30)
            return found

        monkeypatch.setattr(pond.service, "claim", slow)
        async with running(pond, context=context) as url:
            async with Connection(url) as connection:
                connections.append(connection)
                body = json.dumps({"queue": "q", "wait_ms": 600_000}).encode()
                await connection.send("POST", "/v1/queue/receive", body, JSON)
                await until(lambda: pond.dispatcher.queue_stats(None, "q").waiting_consumers == 1)
                await pond.queue("q").enqueue(b"1")
                await until(lambda: claimed)
            await leased(pond, "q", 0)
            view = (await pond.queue("q").peek())[0]
            assert (view.attempts, view.failures) == (1, 0)


async def test_the_number_of_those_who_wait_is_bounded() -> None:
    async with testing.pond(config=Config(max_consumers=1)) as pond, running(pond) as url:
        waiting = asyncio.create_task(done(url, "queue/receive", {"queue": "q", "wait_ms": 60_000}))
        await until(lambda: pond.dispatcher.queue_stats(None, "q").waiting_consumers == 1)
        reply = await ask(url, "queue/receive", {"queue": "q", "wait_ms": 60_000})
        assert (reply.status, reply.code, reply.headers["retry-after"]) == (503, "too_many_consumers", "1")
        assert (await ask(url, "queue/receive", {"queue": "q"})).status == 200
        await pond.queue("q").enqueue(b"1")
        await waiting


async def test_nothing_is_handed_out_while_draining_but_answers_are_taken() -> None:
    async with testing.pond() as pond:
        context = Context(pond, ServerConfig(port=0, shutdown_timeout=1.0, drain_grace=7.0))
        async with running(pond, context=context) as url:
            await pond.queue("q").enqueue_many([b"1", b"2"])
            [message] = (await done(url, "queue/receive", {"queue": "q"}))["messages"]
            waiting = asyncio.create_task(ask(url, "queue/receive", {"queue": "empty", "wait_ms": 60_000}))
            await until(lambda: pond.dispatcher.queue_stats(None, "empty").waiting_consumers == 1)
            context.begin_drain()
            for reply in (await waiting, await ask(url, "queue/receive", {"queue": "q"})):
                assert (reply.status, reply.code) == (503, "shutdown_draining")
            body = await done(url, "queue/ackBatch", {"queue": "q", "messages": [handle(message)]})
            assert body["results"] == [{"message_id": message["message_id"]}]


@both
async def test_answers_are_judged_one_by_one(packed: bool) -> None:
    async with testing.pond() as pond, running(pond) as url:
        await pond.queue("q").enqueue_many([b"1", b"2"])
        messages = (await done(url, "queue/receive", {"queue": "q", "count": 2}, packed=packed))["messages"]
        wrong = handle(messages[1]) | {"fencing_token": 7}
        handles = [handle(messages[0]), wrong, handle(messages[0]) | {"message_id": OTHER}]
        body = await done(url, "queue/ackBatch", {"queue": "q", "messages": handles}, packed=packed)
        errors = [(one.get("error") or {}).get("error") for one in body["results"]]
        assert errors == [None, "lease_lost", "lease_lost"]
        assert [one["message_id"] for one in body["results"]] == [one["message_id"] for one in handles]
        assert (await pond.queue("q").counts()).leased == 1


@pytest.mark.parametrize("remembered", [True, False], ids=["remembered", "forgotten"])
async def test_answers_need_nothing_that_this_process_remembers(remembered: bool) -> None:
    async with testing.pond() as pond:
        context = server(pond)
        async with running(pond, context=context) as url:
            await pond.queue("q").enqueue_many([b"1", b"2", b"3", b"4"])
            held = [handle(one) for one in (await done(url, "queue/receive", {"queue": "q", "count": 4}))["messages"]]
            if not remembered:
                context.held._held.clear()
            extended = await done(url, "queue/extendBatch", {"queue": "q", "messages": held, "extend_by_ms": 90_000})
            until_ms = pond.clock.now_ms() + 90_000
            assert [one["lease_expires_at_ms"] for one in extended["results"]] == [until_ms] * 4
            nack = {"queue": "q", "messages": held[:1], "error": {"why": "x"}, "delay_ms": 1000}
            defer = {"queue": "q", "messages": held[1:2], "intent": "defer"}
            await done(url, "queue/nackBatch", nack)
            await done(url, "queue/nackBatch", defer)
            await done(url, "queue/bury", {"queue": "q", "message": held[2], "reason": "bad", "error": "why"})
            await done(url, "queue/ackBatch", {"queue": "q", "messages": held[3:]})
            assert len(context.held) == 0
            failed, deferred, dead = [await pond.queue("q").get(one["message_id"]) for one in held[:3]]
            assert (failed.state, failed.failures, failed.last_error) == ("delayed", 1, {"why": "x"})
            assert (deferred.state, deferred.failures) == ("ready", 0)
            assert (dead.state, dead.dead_reason, dead.last_error) == ("dead", "bad", "why")
            assert (await pond.queue("q").counts()).bytes == 2


async def test_an_error_goes_with_a_failure_only() -> None:
    async with testing.pond() as pond, running(pond) as url:
        lease = {"message_id": ID, "lease_id": "x", "fencing_token": 1}
        body = {"queue": "q", "messages": [lease], "intent": "defer", "error": "x"}
        reply = await ask(url, "queue/nackBatch", body)
        assert (reply.status, reply.code) == (400, "invalid_input")


async def test_a_hand_off_is_one_step() -> None:
    async with testing.pond() as pond, running(pond) as url:
        await pond.queue("a", namespace="n").enqueue(b"1")
        [message] = (await done(url, "queue/receive", {"namespace": "n", "queue": "a"}))["messages"]
        then = [
            {"queue": "b", "message": {"payload": text(b"2"), "message_id": ID}},
            {"namespace": "other", "queue": "c", "message": {"payload": text(b"3"), "delay_ms": 5}},
        ]
        body = {"namespace": "n", "queue": "a", "message": handle(message), "then": then}
        receipts = (await done(url, "queue/handOff", body))["receipts"]
        assert receipts[0] == {"message_id": ID, "duplicate": False}
        assert (await pond.queue("a", namespace="n").counts()).leased == 0
        assert (await pond.queue("b", namespace="n").counts()).ready == 1
        assert (await pond.queue("c", namespace="other").counts()).delayed == 1
        reply = await ask(url, "queue/handOff", body)
        assert (reply.status, reply.code) == (409, "lease_lost")
        assert (await pond.queue("c", namespace="other").counts()).delayed == 1


# Payloads


async def test_a_payload_stored_apart_is_streamed_with_its_type_and_length() -> None:
    clock = ManualClock()
    async with testing.pond(clock=clock, store=MemoryStore(clock=clock, inline_limit=10)) as pond, running(pond) as url:
        data = bytes(range(256)) * 20_000
        await pond.queue("q").enqueue(data, content_type="image/png")
        [message] = (await done(url, "queue/receive", {"queue": "q"}))["messages"]
        assert "payload" not in message
        assert (message["stored_apart"], message["payload_size"]) == (True, len(data))
        body = json.dumps({"queue": "q", "message_id": message["message_id"]}).encode()
        answer = await request(url, "POST", "/v1/queue/payload", body, JSON)
        assert answer.body == data
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["content-length"] == str(len(data))
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("kind", ["te\r\nxt: evil", "ümlaut", " "])
async def test_a_content_type_that_cannot_stand_in_a_header_does_not(kind: str) -> None:
    async with testing.pond() as pond, running(pond) as url:
        receipt = await pond.queue("q").enqueue(b"", content_type=kind)
        body = json.dumps({"queue": "q", "message_id": receipt.message_id}).encode()
        answer = await request(url, "POST", "/v1/queue/payload", body, JSON)
        assert (answer.status, answer.body) == (200, b"")
        assert answer.headers["content-type"] == "application/octet-stream"
        assert "xt" not in answer.headers


async def test_a_damaged_payload_never_arrives_whole() -> None:
    clock = ManualClock()
    store = MemoryStore(clock=clock, inline_limit=10)
    async with testing.pond(clock=clock, store=store) as pond, running(pond) as url:
        receipt = await pond.queue("q").enqueue(bytes(5_000_000))
        [name] = store._data.blobs
        damaged = bytearray(store._data.blobs[name].data)
        damaged[-1] ^= 1
        store._data.blobs[name] = store._data.blobs[name]._replace(data=bytes(damaged))
        body = json.dumps({"queue": "q", "message_id": receipt.message_id}).encode()
        with pytest.raises(asyncio.IncompleteReadError) as raised:
            await request(url, "POST", "/v1/queue/payload", body, JSON)
        assert len(raised.value.partial) < 5_000_000


async def test_a_message_whose_payload_cannot_be_read_comes_with_the_reason() -> None:
    """Its consumer decides what becomes of it, as a consumer in this process does."""
    clock = ManualClock()
    inner = MemoryStore(clock=clock)
    store = EncryptedStore(inner, Keyring.load(Keyring.generate_key()))
    async with testing.pond(clock=clock, store=store) as pond, running(pond) as url:
        await pond.queue("q").enqueue(b"secret")
        for record in [one for queue in inner._data.queues.values() for one in queue.by_key.values()]:
            record.payload = record.payload[:-1] + bytes([record.payload[-1] ^ 1])
        [message] = (await done(url, "queue/receive", {"queue": "q"}))["messages"]
        assert "payload" not in message
        assert message["trouble"]["error"] == "tampered"
        assert (await pond.queue("q").counts()).leased == 1
        reply = await ask(url, "queue/payload", {"queue": "q", "message_id": message["message_id"]})
        assert (reply.status, reply.code) == (500, "tampered")
        await done(url, "queue/nackBatch", {"queue": "q", "messages": [handle(message)]})


async def test_a_payload_of_a_message_that_is_gone_is_404() -> None:
    async with testing.pond() as pond, running(pond) as url:
        await pond.queue("q").enqueue(b"")
        reply = await ask(url, "queue/payload", {"queue": "q", "message_id": OTHER})
        assert (reply.status, reply.code) == (404, "message_not_found")


# State


@both
async def test_the_state_is_kept_under_the_lease(packed: bool) -> None:
    async with testing.pond() as pond, running(pond) as url:
        receipt = await pond.queue("q").enqueue(b"1")
        [message] = (await done(url, "queue/receive", {"queue": "q"}, packed=packed))["messages"]
        held = {"queue": "q", "message": handle(message)}
        load = {"queue": "q", "message_id": receipt.message_id}
        assert await done(url, "state/load", load, packed=packed) == {"exists": False}
        first = (await done(url, "state/save", held | {"value": {"n": 1}}, packed=packed))["etag"]
        found = await done(url, "state/load", load, packed=packed)
        assert (found["exists"], found["value"], found["etag"]) == (True, {"n": 1}, first)
        assert found["created_at_ms"] == found["updated_at_ms"] == pond.clock.now_ms()
        reply = await ask(url, "state/save", held | {"value": 2, "etag": None}, packed=packed)
        assert (reply.status, reply.code) == (409, "state_conflict")
        await done(url, "state/save", held | {"value": 2, "etag": first}, packed=packed)
        reply = await ask(url, "state/delete", held | {"etag": first}, packed=packed)
        assert (reply.status, reply.code) == (409, "state_conflict")
        await done(url, "state/delete", held, packed=packed)
        assert await done(url, "state/load", load, packed=packed) == {"exists": False}
        stale = {"queue": "q", "message": handle(message) | {"lease_id": "another"}, "value": 3}
        reply = await ask(url, "state/save", stale, packed=packed)
        assert (reply.status, reply.code) == (409, "lease_lost")


# Looking and administering


async def test_operators_see_and_change_queues() -> None:
    async with testing.pond() as pond, running(pond) as url:
        await pond.queue("q").enqueue_many([b"1", b"22"])
        await pond.queue("q").enqueue(b"3", delay=2.5)
        await pond.queue("z", namespace="n").enqueue(b"1")
        listed = await done(url, "queue/list", {})
        assert listed["queues"] == [{"namespace": "default", "queue": "q"}, {"namespace": "n", "queue": "z"}]
        assert (await done(url, "queue/list", {"namespace": "n"}))["queues"] == [{"namespace": "n", "queue": "z"}]
        pond.manual_clock.advance(1.5)
        counts = await done(url, "queue/counts", {"queue": "q"})
        assert (counts["ready"], counts["delayed"], counts["bytes"], counts["oldest_age_ms"]) == (2, 1, 4, 1500)
        assert await done(url, "queue/nextDue", {"queue": "q"}) == {"in_ms": 1000}
        peeked = (await done(url, "queue/peek", {"queue": "q", "count": 5}))["messages"]
        assert [one["state"] for one in peeked] == ["ready", "ready"]
        one = (await done(url, "queue/get", {"queue": "q", "message_id": peeked[0]["message_id"]}))["message"]
        assert one == peeked[0]
        await done(url, "queue/pause", {"queue": "q"})
        assert (await pond.queue("q").policy()).paused
        assert (await done(url, "queue/receive", {"queue": "q"}))["messages"] == []
        await done(url, "queue/resume", {"queue": "q"})
        assert await done(url, "queue/purge", {"queue": "q"}) == {"purged": 3}
        assert await done(url, "queue/nextDue", {"queue": "q"}) == {"in_ms": None}


async def test_a_policy_is_read_changed_and_reset() -> None:
    async with testing.pond() as pond, running(pond) as url:
        await pond.queue("q").set_policy(max_attempts=3, ttl=0.5)
        policy = (await done(url, "queue/policy", {"queue": "q"}))["policy"]
        assert (policy["max_attempts"], policy["ttl_ms"], policy["dedup_window_ms"]) == (3, 500, None)
        change = {"ttl_ms": None, "default_visibility_ms": 1500, "on_expired": "dead_letter"}
        policy = (await done(url, "queue/policy", {"queue": "q", "set": change}))["policy"]
        assert (policy["max_attempts"], policy["ttl_ms"], policy["default_visibility_ms"]) == (3, None, 1500)
        assert (await pond.queue("q").policy()).default_visibility == 1.5
        reply = await ask(url, "queue/policy", {"queue": "q", "set": {}, "reset": True})
        assert (reply.status, reply.code) == (400, "invalid_input")
        policy = (await done(url, "queue/policy", {"queue": "q", "reset": True}))["policy"]
        assert (policy["max_attempts"], policy["on_expired"]) == (None, "discard")


async def test_live_messages_are_browsed_page_by_page_whatever_they_wait_for() -> None:
    async with testing.pond() as pond, running(pond) as url:
        ids = [(await pond.queue("q").enqueue(b"x", delay=60 * number)).message_id for number in range(3)]
        await pond.queue("q").receive()
        first = await done(url, "queue/browse", {"queue": "q", "limit": 2})
        rest = await done(url, "queue/browse", {"queue": "q", "limit": 2, "cursor": first["next_cursor"]})
        assert [one["message_id"] for one in first["messages"] + rest["messages"]] == ids
        assert [one["state"] for one in first["messages"]] == ["leased", "delayed"]
        behind = await done(url, "queue/browse", {"queue": "q", "after": ids[0]})
        assert [one["message_id"] for one in behind["messages"]] == ids[1:]


async def test_dead_letters_are_listed_page_by_page_redriven_and_purged() -> None:
    async with testing.pond() as pond, running(pond) as url:
        await pond.queue("q").enqueue_many([b"1", b"2", b"3"])
        for message in await pond.queue("q").receive(3):
            await message.bury("no")
        first = await done(url, "dlq/list", {"queue": "q", "limit": 2})
        rest = await done(url, "dlq/list", {"queue": "q", "limit": 2, "cursor": first["next_cursor"]})
        ids = [one["message_id"] for one in first["messages"] + rest["messages"]]
        assert ids == [view.id for view in await pond.queue("q").dead_letters.list()]
        assert "next_cursor" not in rest
        behind = await done(url, "dlq/list", {"queue": "q", "after": ids[1]})
        assert [one["message_id"] for one in behind["messages"]] == ids[2:]
        assert behind["messages"][0]["cursor"] == str((await pond.queue("q").get(ids[2])).record.item.key)
        one = (await done(url, "dlq/get", {"queue": "q", "message_id": ids[0]}))["message"]
        assert (one["state"], one["dead_reason"]) == ("dead", "no")
        assert await done(url, "dlq/redrive", {"queue": "q", "ids": ids[:1]}) == {"count": 1}
        reply = await ask(url, "dlq/get", {"queue": "q", "message_id": ids[0]})
        assert (reply.status, reply.code) == (404, "message_not_found")
        assert await done(url, "dlq/purge", {"queue": "q"}) == {"count": 2}


async def test_a_cursor_larger_than_the_store_knows_is_none_of_its(tmp_path: Path) -> None:
    async with connect(f"sqlite:///{tmp_path}/a.db") as pond, running(pond) as url:
        await pond.queue("q").enqueue(b"1")
        reply = await ask(url, "dlq/list", {"queue": "q", "cursor": "9" * 39})
        assert (reply.status, reply.code) == (400, "invalid_input")
        assert await done(url, "dlq/list", {"queue": "q", "cursor": str(2**63 - 1)}) == {"messages": []}


async def test_a_batch_tells_a_store_which_ids_its_producer_chose() -> None:
    """A bucket looks for a message with the same id only where one may be."""
    clock = ManualClock()
    store = ObjectStore(MemoryBucket(clock=clock), clock=clock)
    async with testing.pond(clock=clock, store=store) as pond, running(pond) as url:
        earlier = "01970000-0000-7000-8000-000000000001"
        batch = {"queue": "q", "messages": [{"payload": "", "message_id": earlier}, {"payload": ""}]}
        await pond.queue("q").enqueue(b"", message_id=earlier, priority=9)
        receipts = (await done(url, "queue/enqueueBatch", batch))["receipts"]
        assert [one["duplicate"] for one in receipts] == [True, False]
        assert (await pond.queue("q").counts()).ready == 2


async def test_news_from_outside_wakes_those_who_wait() -> None:
    async with testing.pond() as pond, running(pond) as url:
        waiting = asyncio.create_task(done(url, "queue/receive", {"queue": "q", "wait_ms": 600_000}))
        await until(lambda: pond.dispatcher.queue_stats(None, "q").waiting_consumers == 1)
        await pond.settle()
        polls = pond.dispatcher.polls
        await done(url, "queue/notify", {"queue": "q"})
        await until(lambda: pond.dispatcher.polls > polls)
        await pond.queue("q").enqueue(b"1")
        await waiting


async def test_costs_of_a_store_that_does_not_charge_are_nothing() -> None:
    async with testing.pond() as pond, running(pond) as url:
        assert await done(url, "requests", {}) == json.loads(
            msgspec.json.encode(native.Costs([], native.RequestCosts(), native.RequestCosts(), 0))
        )


# Forms


async def test_an_answer_has_the_form_of_its_request() -> None:
    async with testing.pond() as pond, running(pond) as url:
        for kind in ("application/json", "APPLICATION/JSON; charset=utf-8", "application/msgpack"):
            data = b'{"queue":"q"}' if "json" in kind.lower() else msgspec.msgpack.encode({"queue": "q"})
            answer = await request(url, "POST", "/v1/queue/counts", data, {"Content-Type": kind})
            assert answer.status == 200
            assert answer.headers["content-type"] == kind.lower().partition(";")[0]
            assert decoded(answer).body["ready"] == 0
        empty = await request(url, "POST", "/v1/queue/list", b"", {"Accept": "application/msgpack"})
        assert decoded(empty).body == {"queues": []}
        assert empty.headers["content-type"] == "application/msgpack"


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
async def test_what_a_browser_sends_unasked_is_refused(kind: str | None) -> None:
    async with testing.pond() as pond, running(pond) as url:
        await pond.queue("q").enqueue(b"1")
        headers = {} if kind is None else {"Content-Type": kind}
        answer = await request(url, "POST", "/v1/queue/purge", b'{"queue":"q"}', headers)
        assert (answer.status, decoded(answer).code) == (415, "unsupported_media_type")
        assert (await pond.queue("q").counts()).ready == 1


async def test_values_that_json_has_no_form_for_are_told_all_the_same() -> None:
    async with testing.pond() as pond, running(pond) as url:
        odd = {"keys": {1: "a", None: "b", b"c": "d"}, "bytes": b"\xff", "ext": msgspec.msgpack.Ext(5, b"x")}
        await pond.queue("q").enqueue(b"1", attributes=odd)
        packed = (await done(url, "queue/peek", {"queue": "q"}, packed=True))["messages"][0]["attributes"]
        assert packed == odd
        [message] = (await done(url, "queue/receive", {"queue": "q"}))["messages"]
        assert message["attributes"]["keys"]["1"] == "a"
        assert message["attributes"]["bytes"] == text(b"\xff")
        assert message["attributes"]["ext"] == {"code": 5, "data": text(b"x")}


async def test_the_servers_namespace_is_meant_where_none_is_named() -> None:
    async with testing.pond() as pond:
        context = Context(pond, ServerConfig(port=0, shutdown_timeout=1.0, drain_grace=0.0, namespace="home"))
        async with running(pond, context=context) as url:
            await done(url, "queue/enqueueBatch", {"queue": "q", "messages": [{"payload": ""}]})
            assert (await done(url, "queue/counts", {"namespace": "home", "queue": "q"}))["ready"] == 1


async def test_a_long_list_of_queues_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred thousand take most of a second to look at."""
    async with testing.pond() as pond:
        names = [QueueName("default", f"q{number}") for number in range(4 * SLICE + 10)]

        async def queues() -> list[QueueName]:
            return names

        monkeypatch.setattr(pond, "queues", queues)
        scope = {"path": "/v1/queue/list", "method": "POST", "headers": [], "query_string": b""}
        call = Call(Context(pond), scope, None, None)  # type: ignore[arg-type]
        turns = 0
        task = asyncio.ensure_future(operations.queues(call, native.NamespaceRequest()))
        while not task.done():
            turns += 1
            await asyncio.sleep(0)
        assert len(task.result().queues) == len(names)
        assert turns >= 4
