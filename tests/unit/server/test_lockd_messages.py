"""lockd's enqueue, dequeue and answers: what its clients send, and what they must find in the answer."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.unit.server.lockd import BOUNDARY, Connection, error_of, form, parts_of, serving, until
from tests.unit.server.raw import request

import millpond
from millpond import testing
from millpond.errors import MessageNotFound
from millpond.server.run import running
from millpond.stores.base import Insert
from millpond.stores.memory import MemoryStore

START = 1_750_000_000


# Enqueue


async def test_an_enqueue_answers_with_what_lockd_answers() -> None:
    async with serving() as client:
        body = await client.enqueue("Orders", b"hello", correlation="mine", delay_seconds=5, max_attempts=3)
        id = body.pop("message_id")
        assert body == {
            "namespace": "default",
            "queue": "orders",
            "attempts": 0,
            "max_attempts": 3,
            "not_visible_until_unix": START + 5,
            "visibility_timeout_seconds": 30,
            "payload_bytes": 5,
            "correlation_id": "mine",
        }
        view = await client.pond.queue("orders").get(id)
        assert (await view.payload(), view.max_attempts, view.correlation_id) == (b"hello", 3, "mine")


async def test_everything_in_the_meta_reaches_the_message() -> None:
    async with serving() as client:
        body = await client.enqueue(
            "q",
            b"x",
            namespace="shop",
            delay_ms=1500,
            visibility_timeout_seconds=90,
            ttl_seconds=60,
            attributes={"big": 2**60, "deep": [{"a": None}]},
            payload_content_type="text/plain",
            priority=9,
            dedup_key="k",
            ordering_key="o",
            message_id="0197a3c2-0000-7000-8000-000000000001",
            something_of_a_newer_client=True,
        )
        view = await client.pond.queue("q", namespace="shop").get(body["message_id"])
        assert view.id == "0197a3c2-0000-7000-8000-000000000001"
        assert view.attributes == {"big": 2**60, "deep": [{"a": None}]}
        assert (view.priority, view.dedup_key, view.ordering_key) == (9, "k", "o")
        assert view.content_type == "text/plain"
        head = view.record.head
        assert (head.visibility, head.ttl, view.record.status.visible_at) == (90_000, 60_000, START * 1000 + 1500)


async def test_milliseconds_count_before_seconds_and_less_than_nothing_is_nothing() -> None:
    async with serving() as client:
        one = await client.enqueue("q", b"", delay_seconds=-5, ttl_seconds=-1, max_attempts=-1)
        assert one["not_visible_until_unix"] == START
        assert one["max_attempts"] == 5
        two = await client.enqueue("q", b"", delay_seconds=5, delay_ms=0, unlimited_attempts=True)
        assert two["not_visible_until_unix"] == START
        assert two["max_attempts"] == 0


async def test_a_second_enqueue_of_one_id_is_told_and_adds_nothing() -> None:
    async with serving() as client:
        id = "0197a3c2-0000-7000-8000-000000000001"
        first = await client.enqueue("q", b"first", correlation="c", message_id=id, max_attempts=2)
        second = await client.enqueue("q", b"second", correlation="d", message_id=id)
        assert "duplicate" not in first
        assert second == first | {"duplicate": True}
        assert (await client.pond.queue("q").counts()).ready == 1


@pytest.mark.parametrize("kind", ["related", "form-data", "mixed"])
async def test_any_multipart_will_do(kind: str) -> None:
    async with serving() as client:
        body, header = form({"queue": "q"}, b"x", kind)
        answer = await request(client.url, "POST", "/v1/queue/enqueue", body, {"Content-Type": header})
        assert answer.status == 200


async def test_the_queue_may_be_in_the_query_and_the_payload_first_or_missing() -> None:
    async with serving() as client:
        for meta, payload, expected in (({}, None, b""), (None, b"alone", b"alone"), (None, None, b"")):
            body, kind = form(meta, payload)
            answer = await request(client.url, "POST", "/v1/queue/enqueue?queue=q", body, {"Content-Type": kind})
            assert answer.status == 200, answer
            id = json.loads(answer.body)["message_id"]
            assert await (await client.pond.queue("q").get(id)).payload() == expected


async def test_a_meta_after_the_payload_is_ignored() -> None:
    async with serving() as client:
        mark = f"--{BOUNDARY}\r\n".encode()
        body = (
            mark + b'Content-Disposition: form-data; name="data"\r\n\r\nx\r\n'
            + mark + b'Content-Disposition: form-data; name="meta"\r\n\r\n{"queue": "other"}\r\n'
            + f"--{BOUNDARY}--\r\n".encode()
        )  # fmt: skip
        kind = {"Content-Type": f"multipart/related; boundary={BOUNDARY}"}
        answer = await request(client.url, "POST", "/v1/queue/enqueue?queue=q", body, kind)
        assert json.loads(answer.body)["queue"] == "q"


@pytest.mark.parametrize("payload", [b"\r", b"\r\n", b"\r\n--", b"\r\n--test-boundar", b"--test-boundary", b"\n\r\r"])
async def test_payloads_that_look_like_delimiters_come_through_whole(payload: bytes) -> None:
    async with serving() as client:
        body, kind = form({"queue": "q"}, payload)
        async with Connection(client.url) as connection:
            head = f"POST /v1/queue/enqueue HTTP/1.1\r\nHost: t\r\nContent-Type: {kind}\r\n"
            connection.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
            for at in range(len(body)):
                connection.write(body[at : at + 1])
                if at % 16 == 0:
                    await connection.writer.drain()
                    await asyncio.sleep(0)
            assert (await connection.answer()).status == 200
        [delivery] = await client.dequeue("q")
        assert delivery.payload == payload


async def test_a_large_payload_is_streamed_in_and_out_and_not_held(tmp_path: Path) -> None:
    block = bytes(range(256)) * 4096
    async with millpond.connect(f"sqlite:///{tmp_path}/q.db") as pond, running(pond) as url:
        digest = hashlib.sha256()
        async with Connection(url) as connection:
            head, tail = form({"queue": "q"}, b"|")[0].split(b"|")
            kind = f"multipart/related; boundary={BOUNDARY}"
            connection.write(
                f"POST /v1/queue/enqueue HTTP/1.1\r\nHost: t\r\nContent-Type: {kind}\r\n"
                f"Transfer-Encoding: chunked\r\n\r\n".encode()
            )
            for part in (head, *[block] * 8, tail):
                connection.write(b"%x\r\n%b\r\n" % (len(part), part))
                await connection.writer.drain()
                digest.update(part if part is block else b"")
            connection.write(b"0\r\n\r\n")
            answer = await connection.answer()
        assert json.loads(answer.body)["payload_bytes"] == 8 * len(block)
        answer = await request(url, "POST", "/v1/queue/dequeue", b'{"queue":"q","owner":"o","wait_seconds":-1}')
        [delivery] = parts_of(answer)
        assert hashlib.sha256(delivery.payload).digest() == digest.digest()
        assert delivery.message["payload_bytes"] == 8 * len(block)


async def test_a_client_that_dies_in_its_upload_leaves_no_message(tmp_path: Path) -> None:
    async with millpond.connect(f"sqlite:///{tmp_path}/q.db") as pond, running(pond) as url:
        body, kind = form({"queue": "q"}, bytes(300_000))
        async with Connection(url) as connection:
            connection.write(
                f"POST /v1/queue/enqueue HTTP/1.1\r\nHost: t\r\nContent-Type: {kind}\r\n"
                f"Content-Length: {len(body)}\r\n\r\n".encode()
            )
            connection.write(body[:200_000])
            await connection.writer.drain()
        assert (await request(url, "GET", "/readyz")).status == 200
        body, kind = form({"queue": "q"}, b"next")
        assert (await request(url, "POST", "/v1/queue/enqueue", body, {"Content-Type": kind})).status == 200
        counts = await pond.queue("q").counts()
        assert (counts.ready, counts.bytes) == (1, 4)


# Dequeue


async def test_a_delivery_has_every_field_that_clients_need() -> None:
    async with serving() as client:
        sent = await client.enqueue("q", b"hi", correlation="c", attributes={"a": 1}, payload_content_type="text/plain")
        [delivery] = await client.dequeue("Q")
        message = dict(delivery.message)
        assert delivery.headers["Content-Type"] == "text/plain"
        assert (len(message["txn_id"]), message["fencing_token"] > 0) == (20, True)
        for made in ("lease_id", "txn_id", "meta_etag"):
            assert message.pop(made)
        assert message == {
            "namespace": "default",
            "queue": "q",
            "message_id": sent["message_id"],
            "attempts": 1,
            "max_attempts": 5,
            "not_visible_until_unix": START + 30,
            "visibility_timeout_seconds": 30,
            "attributes": {"a": 1},
            "payload_content_type": "text/plain",
            "payload_bytes": 2,
            "correlation_id": "c",
            "lease_expires_at_unix": START + 30,
            "fencing_token": 1,
        }


async def test_an_empty_payload_has_a_part_of_its_own() -> None:
    async with serving() as client:
        await client.enqueue("q", b"")
        [delivery] = await client.dequeue("q")
        assert (delivery.payload, delivery.headers["Content-Length"]) == (b"", "0")


async def test_a_batch_is_bounded_and_its_parts_are_numbered() -> None:
    async with serving() as client:
        queue = client.pond.queue("q")
        await queue.enqueue_many([b"%d" % number for number in range(70)])
        body = {"queue": "q", "owner": "o", "wait_seconds": -1, "page_size": 1000, "start_after": "ignored"}
        answer = await client.post("/v1/queue/dequeue", body)
        found = parts_of(answer)
        assert [delivery.payload for delivery in found] == [b"%d" % number for number in range(64)]
        assert found[3].headers["Content-Disposition"] == 'form-data; name="payload"; filename="payload-3"'
        assert b'name="meta"; filename="meta-63.json"' in answer.body
        assert answer.headers["x-correlation-id"] == found[0].message["correlation_id"]
        assert len(await client.dequeue("q")) == 1  # the default
        assert len(await client.dequeue("q", "dequeueWithState", page_size=5)) == 1


async def test_visibility_is_the_consumers_wish_else_the_messages_own_and_has_a_limit() -> None:
    async with serving() as client:
        for seconds, wish in ((90, 0), (90, 7), (90, 10_000)):
            await client.enqueue("q", b"", visibility_timeout_seconds=seconds)
            [delivery] = await client.dequeue("q", visibility_timeout_seconds=wish)
            expected = {0: 90, 7: 7, 10_000: 1800}[wish]
            assert delivery.message["visibility_timeout_seconds"] == expected
            assert delivery.message["lease_expires_at_unix"] == START + expected


async def test_attempts_count_deliveries_and_failures_count_failures() -> None:
    async with serving() as client:
        await client.enqueue("q", b"", max_attempts=9)
        seen = []
        for intent in ("failure", "defer", "FAILURE", ""):
            [delivery] = await client.dequeue("q")
            seen.append((delivery.message["attempts"], delivery.message.get("failure_attempts", 0)))
            answer = await client.post("/v1/queue/nack", delivery.answer(intent=intent))
            assert answer.status == 200
        [delivery] = await client.dequeue("q")
        seen.append((delivery.message["attempts"], delivery.message["failure_attempts"]))
        assert seen == [(1, 0), (2, 1), (3, 1), (4, 2), (5, 3)]
        assert delivery.message["fencing_token"] == 5


async def test_a_message_without_a_correlation_id_has_its_own_id_for_one() -> None:
    async with serving() as client:
        sent = await client.enqueue("q", b"")
        assert sent["correlation_id"] == sent["message_id"]
        answer = await client.post(
            "/v1/queue/dequeue", {"queue": "q", "owner": "o", "wait_seconds": -1}, X_Correlation_Id="another"
        )
        [delivery] = parts_of(answer)
        assert delivery.message["correlation_id"] == answer.headers["x-correlation-id"] == sent["message_id"]


async def test_answers_carry_the_messages_correlation_id_and_not_the_requests() -> None:
    async with serving() as client:
        await client.enqueue("q", b"", correlation="fixed")
        for route in ("extend", "nack", "ack"):
            [delivery] = await client.dequeue("q")
            answer = await client.post(f"/v1/queue/{route}", delivery.answer(), X_Correlation_Id="another")
            assert answer.headers["x-correlation-id"] == "fixed"
            assert json.loads(answer.body)["correlation_id"] == "fixed"
            if route == "extend":
                await client.post("/v1/queue/nack", delivery.answer(meta_etag=json.loads(answer.body)["meta_etag"]))


async def test_a_content_type_that_cannot_stand_in_a_header_does_not() -> None:
    async with serving() as client:
        await client.pond.queue("q").enqueue(b"x", content_type="text/plain\r\nX-Evil: 1")
        [delivery] = await client.dequeue("q")
        assert delivery.headers["Content-Type"] == "application/octet-stream"
        assert "X-Evil" not in delivery.headers
        assert delivery.message["payload_content_type"] == "text/plain\r\nX-Evil: 1"


# Waiting


async def test_a_wait_ends_with_a_message() -> None:
    async with serving() as client:
        waiting = asyncio.create_task(client.dequeue("q", wait_seconds=0))
        await until(lambda: client.pond.dispatcher.queue_stats(None, "q").waiting_consumers == 1)
        await client.enqueue("q", b"here")
        assert (await waiting)[0].payload == b"here"


async def test_a_wait_ends_with_its_time() -> None:
    async with serving() as client:
        body = {"queue": "q", "owner": "o", "wait_seconds": 7}
        waiting = asyncio.create_task(client.post("/v1/queue/dequeue", body))
        await until(lambda: client.pond.dispatcher.queue_stats(None, "q").waiting_consumers == 1)
        await client.pond.advance(7)
        answer = await waiting
        assert error_of(answer) == (409, "waiting")
        assert answer.headers["retry-after"] == "7"


async def test_who_goes_away_waits_no_longer_and_takes_nothing() -> None:
    async with serving() as client:
        async with Connection(client.url) as connection:
            await connection.send("POST", "/v1/queue/dequeue", b'{"queue":"q","owner":"o"}')
            await until(lambda: client.pond.dispatcher.queue_stats(None, "q").waiting_consumers == 1)
        await until(lambda: client.pond.dispatcher.queue_stats(None, "q").total_consumers == 0)
        await client.enqueue("q", b"")
        assert [view.state for view in await client.pond.queue("q").peek()] == ["ready"]


async def test_who_waits_is_sent_away_when_the_server_drains() -> None:
    async with serving() as client:
        waiting = asyncio.create_task(client.post("/v1/queue/dequeue", {"queue": "q", "owner": "o"}))
        await until(lambda: client.pond.dispatcher.queue_stats(None, "q").waiting_consumers == 1)
        client.context.begin_drain()
        answer = await waiting
        assert error_of(answer) == (503, "shutdown_draining")
        assert (answer.headers["shutdown-imminent"], answer.headers["retry-after"]) == ("true", "1")


async def test_answers_and_enqueues_are_taken_while_the_server_drains() -> None:
    async with serving() as client:
        await client.enqueue("q", b"")
        [delivery] = await client.dequeue("q")
        client.context.begin_drain()
        for route in ("dequeue", "dequeueWithState", "subscribe", "subscribeWithState", "watch"):
            answer = await client.post(f"/v1/queue/{route}", {"queue": "q", "owner": "o", "wait_seconds": -1})
            assert error_of(answer) == (503, "shutdown_draining"), route
        await client.enqueue("q", b"")
        await client.ack(delivery)
        assert (await client.pond.queue("q").counts()).ready == 1


# Answers


async def test_an_ack_removes_and_the_second_finds_nothing() -> None:
    async with serving() as client:
        await client.enqueue("q", b"", correlation="c")
        [delivery] = await client.dequeue("q")
        answer = await client.post("/v1/queue/ack", delivery.answer())
        assert json.loads(answer.body) == {"acked": True, "correlation_id": "c"}
        assert error_of(await client.post("/v1/queue/ack", delivery.answer())) == (404, "not_found")
        with pytest.raises(MessageNotFound):
            await client.pond.queue("q").get(delivery.message["message_id"])


async def test_an_ack_needs_no_etag_and_takes_an_old_one() -> None:
    async with serving() as client:
        for etag in ("", "old"):
            await client.enqueue("q", b"")
            [delivery] = await client.dequeue("q")
            fields = delivery.answer(meta_etag=etag)
            del fields["txn_id"]
            assert (await client.post("/v1/queue/ack", fields)).status == 200


async def test_an_extension_renews_from_now_and_gives_another_etag() -> None:
    async with serving() as client:
        await client.enqueue("q", b"")
        [delivery] = await client.dequeue("q", "dequeueWithState")
        await client.pond.advance(20)
        answer = await client.post("/v1/queue/extend", delivery.answer(extend_by_seconds=60))
        body = json.loads(answer.body)
        assert body["lease_expires_at_unix"] == body["state_lease_expires_at_unix"] == START + 80
        assert body["visibility_timeout_seconds"] == 60
        assert body["meta_etag"] != delivery.message["meta_etag"]
        for route in ("extend", "nack"):
            old = await client.post(f"/v1/queue/{route}", delivery.answer())
            assert error_of(old) == (409, "cas_mismatch")
        await client.pond.advance(59)
        answer = await client.post("/v1/queue/nack", delivery.answer(meta_etag=body["meta_etag"]))
        assert json.loads(answer.body)["requeued"] is True
        assert json.loads(answer.body)["meta_etag"] not in {"", body["meta_etag"]}


@pytest.mark.parametrize("seconds", [{}, {"extend_by_seconds": 0}, {"extend_by_seconds": -3}])
async def test_an_extension_by_nothing_is_one_by_the_messages_own_visibility(seconds: dict[str, int]) -> None:
    async with serving() as client:
        await client.enqueue("q", b"", visibility_timeout_seconds=45)
        [delivery] = await client.dequeue("q", visibility_timeout_seconds=10)
        body = json.loads((await client.post("/v1/queue/extend", delivery.answer(**seconds))).body)
        assert (body["lease_expires_at_unix"], body["visibility_timeout_seconds"]) == (START + 45, 45)
        assert "state_lease_expires_at_unix" not in body


async def test_an_extension_by_another_process_is_known_here() -> None:
    """What this server remembers of a delivery is a hint: an etag that it does not know is looked up."""
    store = MemoryStore(clock=(clock := testing.ManualClock()))
    async with serving(pond=testing.pond(store=store, clock=clock)) as client:
        await client.enqueue("q", b"")
        [delivery] = await client.dequeue("q")
        message = delivery.message
        other = testing.pond(store=store.share(), clock=clock, seed=1)
        handle = other.queue("q").handle(message["message_id"], message["lease_id"], message["fencing_token"])
        lease = await handle.extend(100)
        assert lease.until_ms is not None
        etag = f"{lease.token:x}-{lease.until_ms:x}"
        assert (await client.post("/v1/queue/nack", delivery.answer(meta_etag=etag))).status == 200


@pytest.mark.parametrize("route", ["ack", "nack", "extend"])
async def test_a_message_that_another_process_acked_is_gone_here_too(route: str) -> None:
    store = MemoryStore(clock=(clock := testing.ManualClock()))
    async with serving(pond=testing.pond(store=store, clock=clock)) as client:
        await client.enqueue("q", b"")
        [delivery] = await client.dequeue("q")
        message = delivery.message
        other = testing.pond(store=store.share(), clock=clock, seed=1)
        await other.queue("q").handle(message["message_id"], message["lease_id"], message["fencing_token"]).ack()
        assert error_of(await client.post(f"/v1/queue/{route}", delivery.answer())) == (404, "not_found")


async def test_a_nack_keeps_the_error_and_waits_for_its_delay() -> None:
    async with serving() as client:
        await client.enqueue("q", b"")
        [delivery] = await client.dequeue("q")
        await client.post("/v1/queue/nack", delivery.answer(delay_seconds=9, last_error={"detail": "no"}))
        view = await client.pond.queue("q").get(delivery.message["message_id"])
        assert (view.state, view.last_error, view.failures) == ("delayed", {"detail": "no"}, 1)
        assert error_of(await client.post("/v1/queue/dequeue", {"queue": "q", "owner": "o", "wait_seconds": -1})) == (
            409,
            "waiting",
        )
        await client.pond.advance(9)
        assert len(await client.dequeue("q")) == 1


async def test_the_last_failure_makes_a_dead_letter_at_once() -> None:
    async with serving() as client:
        await client.enqueue("q", b"", max_attempts=1)
        [delivery] = await client.dequeue("q")
        assert (await client.post("/v1/queue/nack", delivery.answer(last_error="e"))).status == 200
        [dead] = await client.pond.queue("q").dead_letters.list()
        assert (dead.dead_reason, dead.last_error) == ("max_attempts_exceeded", "e")


async def test_a_late_ack_stands_until_somebody_else_has_the_message() -> None:
    async with serving() as client:
        await client.enqueue("q", b"")
        [late] = await client.dequeue("q")
        await client.pond.advance(31)
        assert (await client.post("/v1/queue/ack", late.answer())).status == 200
        await client.enqueue("q", b"")
        [late] = await client.dequeue("q")
        await client.pond.advance(31)
        [holder] = await client.dequeue("q")
        for route in ("ack", "nack", "extend"):
            answer = await client.post(f"/v1/queue/{route}", late.answer())
            assert error_of(answer) == (409, "queue_message_lease_mismatch"), route
        await client.ack(holder)
        assert error_of(await client.post("/v1/queue/ack", late.answer())) == (404, "not_found")


async def test_an_answer_that_this_process_has_forgotten_is_as_good() -> None:
    async with serving() as client:
        await client.enqueue("q", b"", correlation="c")
        [delivery] = await client.dequeue("q")
        client.context.held._held.pop(delivery.message["message_id"])
        body = json.loads((await client.post("/v1/queue/extend", delivery.answer(extend_by_seconds=5))).body)
        assert body["correlation_id"] == "c"
        await client.ack(delivery)


async def test_a_late_answer_makes_nobody_forget_the_holder() -> None:
    async with serving() as client:
        await client.enqueue("q", b"")
        [late] = await client.dequeue("q")
        await client.pond.advance(31)
        [holder] = await client.dequeue("q")
        assert (await client.post("/v1/queue/ack", late.answer())).status == 409
        assert len(client.context.held) == 1
        await client.ack(holder)
        assert len(client.context.held) == 0


async def test_what_is_remembered_of_deliveries_is_bounded_and_has_no_payloads() -> None:
    async with serving() as client:
        client.context.held._capacity = 3
        await client.pond.queue("q").enqueue_many([b"x" * 100] * 5)
        found = await client.dequeue("q", page_size=5)
        assert len(client.context.held) == 3
        assert all(delivery.payload is None for delivery in client.context.held._held.values())
        for delivery in found:
            await client.ack(delivery)
        assert len(client.context.held) == 0


# Looking


async def test_stats_show_the_head_and_take_nothing() -> None:
    async with serving() as client:
        empty = json.loads((await client.post("/v1/queue/stats", {"queue": "q"})).body)
        assert not empty["available"]
        assert "head_message_id" not in empty
        sent = await client.enqueue("q", b"")
        await client.pond.advance(8)
        for _ in range(3):
            body = json.loads((await client.post("/v1/queue/stats?queue=q")).body)
            assert body.pop("correlation_id")
            assert body == {
                "namespace": "default",
                "queue": "q",
                "waiting_consumers": 0,
                "pending_candidates": 0,
                "total_consumers": 0,
                "has_active_watcher": False,
                "available": True,
                "head_message_id": sent["message_id"],
                "head_enqueued_at_unix": START,
                "head_not_visible_until_unix": START,
                "head_age_seconds": 8,
            }
        [delivery] = await client.dequeue("q")
        assert (delivery.message["message_id"], delivery.message["attempts"]) == (sent["message_id"], 1)
        await client.enqueue("q", b"")
        await client.pond.queue("q").pause()
        assert not json.loads((await client.post("/v1/queue/stats", {"queue": "q"})).body)["available"]


# Payloads that cannot be sent


class Rotting:
    """A store that changes payloads which say so."""

    def __init__(self, inner: MemoryStore) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def write(self, ops: Any) -> Any:
        return await self.inner.write(
            [
                msgspec.structs.replace(op, payload=b"D" + op.payload[1:])
                if isinstance(op, Insert) and op.payload.startswith(b"damaged")
                else op
                for op in ops
            ]
        )

    async def write_blob(self, namespace: str, queue: str, id: str, chunks: AsyncIterator[bytes], now: int) -> Any:
        async def changed() -> AsyncIterator[bytes]:
            async for chunk in chunks:
                yield chunk.replace(b"damaged", b"Damaged")

        return await self.inner.write_blob(namespace, queue, id, changed(), now)


def rotting() -> testing.TestPond:
    clock = testing.ManualClock()
    return testing.pond(store=Rotting(MemoryStore(clock=clock)), clock=clock)  # type: ignore[arg-type]


async def test_a_damaged_payload_is_nacked_and_not_sent(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(pond=rotting()) as client:
        bad = await client.enqueue("q", b"damaged", max_attempts=1)
        await client.enqueue("q", b"sound")
        [delivery] = await client.dequeue("q", page_size=2)
        assert delivery.payload == b"sound"
        await client.context.settle()
        [dead] = await client.pond.queue("q").dead_letters.list()
        assert dead.id == bad["message_id"]
        assert "StoreCorrupt" in str(dead.last_error)
    assert "millpond.server.payload_unreadable" in [record.message for record in caplog.records]


async def test_a_payload_damaged_apart_breaks_the_answer_off_and_is_nacked() -> None:
    async with serving(pond=rotting()) as client:
        size = client.pond.service.inline_limit + 1
        bad = await client.enqueue("q", b"damaged" + bytes(size), max_attempts=1)
        async with Connection(client.url) as connection:
            await connection.send("POST", "/v1/queue/dequeue", b'{"queue":"q","owner":"o","wait_seconds":-1}')
            status, _ = await connection.head()
            assert status == 200
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await connection.rest()
        await client.context.settle()
        assert [view.id for view in await client.pond.queue("q").dead_letters.list()] == [bad["message_id"]]
