"""Each row of lockd's table of errors that can come about here, by raw requests; and the order of the checks."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tests.unit.server.lockd import BOUNDARY, Client, Connection, error_of, form, serving, until
from tests.unit.server.raw import request

from millpond import testing
from millpond.errors import StoreBusy, StoreError, StoreFull, Throttled
from millpond.server.config import ServerConfig
from millpond.server.context import Context
from millpond.server.run import running
from millpond.service.config import Config

UNKNOWN = "0197a3c2-0000-7000-8000-000000000001"
ANSWER = {"queue": "q", "message_id": UNKNOWN, "lease_id": "00" * 16, "fencing_token": 1, "meta_etag": "1-1"}
OPEN = ("dequeue", "dequeueWithState", "subscribe", "subscribeWithState", "stats", "watch")
CLOSED = ("ack", "nack", "extend")
XID = "0" * 20


@pytest.mark.parametrize("route", [*OPEN, *CLOSED])
@pytest.mark.parametrize(
    "body",
    [b"{", b"[]", b'"x"', b'{"queue": 1}', b'{"queue":"q"} {}', b'{"queue":"q","more":1}', b"\xff", b"[" * 100_000],
)
async def test_bodies_are_read_strictly(route: str, body: bytes) -> None:
    async with serving() as client:
        assert error_of(await client.post(f"/v1/queue/{route}", body)) == (400, "invalid_body")


@pytest.mark.parametrize("route", CLOSED)
async def test_answers_need_a_body(route: str) -> None:
    async with serving() as client:
        assert error_of(await client.post(f"/v1/queue/{route}", b"")) == (400, "invalid_body")


@pytest.mark.parametrize("route", OPEN)
@pytest.mark.parametrize("body", [b"", b" \n", b"{}"])
async def test_others_may_come_without_and_name_the_queue_elsewhere(route: str, body: bytes) -> None:
    async with serving() as client:
        assert error_of(await client.post(f"/v1/queue/{route}", body)) == (400, "missing_queue")


@pytest.mark.parametrize("route", [*OPEN, *CLOSED])
async def test_a_body_above_the_limit_is_refused(route: str) -> None:
    async with serving(ServerConfig(port=0, max_body_bytes=1024, shutdown_timeout=1.0)) as client:
        body = json.dumps({"queue": "q" * 2000}).encode()
        assert error_of(await client.post(f"/v1/queue/{route}", body)) == (400, "invalid_body")


async def test_a_body_above_the_limit_is_not_read_to_its_end() -> None:
    config = ServerConfig(port=0, max_body_bytes=1024, shutdown_timeout=1.0)
    async with serving(config) as client, Connection(client.url) as connection:
        connection.write(b"POST /v1/queue/ack HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n")
        connection.write(b"fa0\r\n" + bytes(4000) + b"\r\n")
        assert error_of(await connection.answer()) == (400, "invalid_body")


@pytest.mark.parametrize("route", ["dequeue", "dequeueWithState", "subscribe", "subscribeWithState"])
async def test_consumers_say_who_they_are(route: str) -> None:
    async with serving() as client:
        for body in ({"queue": "q"}, {"queue": "q", "owner": "  "}):
            assert error_of(await client.post(f"/v1/queue/{route}", body)) == (400, "missing_owner")
        answer = await client.post(f"/v1/queue/{route}?queue=q&owner=o", {"wait_seconds": -1})
        assert error_of(answer) == (409, "waiting")
        assert "retry-after" not in answer.headers


@pytest.mark.parametrize("route", ["dequeue", "dequeueWithState", "subscribe", "subscribeWithState"])
async def test_transactions_are_refused_in_words(route: str) -> None:
    async with serving() as client:
        body = {"queue": "q", "owner": "o", "wait_seconds": -1}
        assert error_of(await client.post(f"/v1/queue/{route}", body | {"txn_id": "no"})) == (400, "invalid_txn")
        answer = await client.post(f"/v1/queue/{route}", body | {"txn_id": XID})
        assert error_of(answer) == (501, "transactions_unsupported")


BAD_NAMESPACES = [".hidden", "a/b", "x" * 129, "..", "é"]
BAD_QUEUES = ["a/b", "..", "x" * 129, "a b", "\0"]


@pytest.mark.parametrize("route", [*OPEN, *CLOSED])
async def test_bad_names_are_told_apart(route: str) -> None:
    async with serving() as client:
        good: dict[str, Any] = {"owner": "o", "wait_seconds": -1} if "queue" in route or "sub" in route else {}
        if route in CLOSED:
            good = ANSWER
        for namespace in BAD_NAMESPACES:
            answer = await client.post(f"/v1/queue/{route}", good | {"queue": "q", "namespace": namespace})
            assert error_of(answer) == (400, "invalid_namespace"), namespace
        for queue in BAD_QUEUES:
            answer = await client.post(f"/v1/queue/{route}", good | {"queue": queue})
            assert error_of(answer) == (400, "invalid_queue_key" if route in CLOSED else "invalid_queue"), queue


# Enqueue


async def enqueue(client: Client, body: bytes, kind: str, path: str = "/v1/queue/enqueue") -> tuple[int, str]:
    return error_of(await request(client.url, "POST", path, body, {"Content-Type": kind} if kind else {}))


@pytest.mark.parametrize(
    "kind", ["", "application/json", "multipart/related", "multipart/related; boundary=", "multipart"]
)
async def test_an_enqueue_is_multipart(kind: str) -> None:
    async with serving() as client:
        assert await enqueue(client, b"{}", kind) == (400, "invalid_content_type")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no part",
        f"--{BOUNDARY}\r\n".encode(),
        f"--{BOUNDARY}\r\nno colon\r\n\r\nx\r\n--{BOUNDARY}--\r\n".encode(),
        f"--{BOUNDARY}\r\n\r\nends early".encode(),
        f"--{BOUNDARY}\r\n{'A: 1' * 5000}".encode(),
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="meta"\r\n\r\n{{"queue":"q"}}'.encode(),
    ],
)
async def test_parts_that_cannot_be_told_apart(body: bytes) -> None:
    async with serving() as client:
        kind = f"multipart/related; boundary={BOUNDARY}"
        assert await enqueue(client, body, kind, "/v1/queue/enqueue?queue=q") == (400, "multipart_error")
        assert (await client.pond.queue("q").counts()).ready == 0


@pytest.mark.parametrize(
    "meta", [b"", b"{", b"[]", b'{"queue": 1}', b'{"delay_seconds": "1"}', b'{"delay_seconds": 1e99}']
)
async def test_a_meta_that_is_none(meta: bytes) -> None:
    async with serving() as client:
        assert await enqueue(client, *form(meta, b"x"), "/v1/queue/enqueue?queue=q") == (400, "invalid_body")


async def test_a_meta_above_its_limit() -> None:
    async with serving(ServerConfig(port=0, max_meta_bytes=1024, shutdown_timeout=1.0)) as client:
        meta = {"queue": "q", "attributes": {"a": "x" * 2000}}
        assert await enqueue(client, *form(meta, b"x")) == (400, "invalid_body")


@pytest.mark.parametrize(
    ("meta", "error"),
    [
        ({}, (400, "missing_queue")),
        ({"queue": " "}, (400, "missing_queue")),
        ({"queue": "a/b"}, (400, "invalid_queue")),
        ({"queue": "q", "namespace": ".x"}, (400, "invalid_namespace")),
        ({"queue": "q", "priority": 10}, (400, "invalid_input")),
        ({"queue": "q", "delay_ms": -1}, (400, "invalid_input")),
        ({"queue": "q", "delay_seconds": 2**62}, (400, "invalid_input")),
        ({"queue": "q", "message_id": "x"}, (400, "invalid_message_id")),
        ({"queue": "q", "attributes": {"a": "x" * 70_000}}, (413, "too_large")),
        ({"queue": "q", "attributes": {"a": 2**70}}, (400, "invalid_input")),
        ({"queue": "q", "dedup_key": "x" * 600}, (413, "too_large")),
    ],
)
async def test_what_an_enqueue_cannot_mean(meta: dict[str, Any], error: tuple[int, str]) -> None:
    async with serving() as client:
        assert await enqueue(client, *form(meta, b"x")) == error
        assert (await client.pond.queue("q").counts()).ready == 0


@pytest.mark.parametrize("size", [101, 3_000_000])
async def test_a_payload_above_the_ponds_limit(size: int) -> None:
    async with serving(pond=testing.pond(config=Config(max_payload_bytes=100))) as client:
        assert await enqueue(client, *form({"queue": "q"}, bytes(size))) == (413, "too_large")


# Answers


@pytest.mark.parametrize("route", CLOSED)
async def test_answers_name_queue_message_and_lease(route: str) -> None:
    async with serving() as client:
        for name in ("queue", "message_id", "lease_id"):
            for missing in ({name: ""}, {name: "  "}):
                answer = await client.post(f"/v1/queue/{route}", ANSWER | missing)
                assert error_of(answer) == (400, "missing_fields"), name


@pytest.mark.parametrize("route", ["nack", "extend"])
async def test_nack_and_extend_need_the_etag(route: str) -> None:
    async with serving() as client:
        answer = await client.post(f"/v1/queue/{route}", ANSWER | {"meta_etag": ""})
        assert error_of(answer) == (400, "missing_fields")


@pytest.mark.parametrize("route", CLOSED)
async def test_a_message_that_never_was_is_not_found(route: str) -> None:
    async with serving() as client:
        for id in (UNKNOWN, "no-uuid", "../x"):
            answer = await client.post(f"/v1/queue/{route}", ANSWER | {"message_id": id})
            assert error_of(answer) == (404, "not_found")


async def test_a_nack_has_one_of_two_intents_and_an_error_with_one_of_them() -> None:
    async with serving() as client:
        answer = await client.post("/v1/queue/nack", ANSWER | {"intent": "other"})
        assert error_of(answer) == (400, "invalid_nack_intent")
        answer = await client.post("/v1/queue/nack", ANSWER | {"intent": "defer", "last_error": {"a": 1}})
        assert error_of(answer) == (400, "invalid_nack_last_error")


@pytest.mark.parametrize("route", CLOSED)
@pytest.mark.parametrize(
    "wrong",
    [{"lease_id": "11" * 16}, {"fencing_token": 2}, {"fencing_token": 0}, {"txn_id": XID}, {"state_lease_id": "x"}],
)
async def test_a_wrong_lease_changes_nothing_and_is_told_before_the_etag(route: str, wrong: dict[str, Any]) -> None:
    async with serving() as client:
        await client.enqueue("q", b"")
        [delivery] = await client.dequeue("q", "dequeueWithState")
        etags = ({}, {"meta_etag": "old"}) if "lease_id" in wrong or "fencing_token" in wrong else ({},)
        for etag in etags:
            answer = await client.post(f"/v1/queue/{route}", delivery.answer(**wrong, **etag))
            assert error_of(answer) == (409, "queue_message_lease_mismatch")
        # The answer of the right lease is as good as before.
        await client.ack(delivery)


@pytest.mark.parametrize("route", ["nack", "extend"])
async def test_an_old_etag_is_told_after_the_lease(route: str) -> None:
    async with serving() as client:
        await client.enqueue("q", b"")
        [delivery] = await client.dequeue("q")
        answer = await client.post(f"/v1/queue/{route}", delivery.answer(meta_etag="old"))
        assert error_of(answer) == (409, "cas_mismatch")


async def test_an_ack_with_a_strange_state_etag() -> None:
    async with serving() as client:
        await client.enqueue("q", b"")
        [delivery] = await client.dequeue("q", "dequeueWithState")
        answer = await client.post("/v1/queue/ack", delivery.answer(state_etag="x"))
        assert error_of(answer) == (409, "cas_mismatch")
        answer = await client.post("/v1/queue/ack", delivery.answer(state_etag=delivery.message["state_etag"]))
        assert answer.status == 200


async def test_a_message_in_another_queue_or_namespace_is_not_this_one() -> None:
    async with serving() as client:
        await client.enqueue("q", b"")
        [delivery] = await client.dequeue("q")
        for other in ({"queue": "r"}, {"namespace": "n"}):
            assert error_of(await client.post("/v1/queue/ack", delivery.answer(**other))) == (404, "not_found")
        await client.ack(delivery)


async def test_an_error_too_large_to_keep() -> None:
    async with serving() as client:
        await client.enqueue("q", b"")
        [delivery] = await client.dequeue("q")
        answer = await client.post("/v1/queue/nack", delivery.answer(last_error="x" * 20_000))
        assert error_of(answer) == (413, "too_large")
        await client.ack(delivery)


# Load and storage


async def test_too_many_waiting_consumers() -> None:
    pond = testing.pond(config=Config(max_consumers=1))
    async with serving(pond=pond) as client, Connection(client.url) as connection:
        await connection.send("POST", "/v1/queue/dequeue", b'{"queue":"q","owner":"o"}')
        await until(lambda: pond.dispatcher.queue_stats(None, "q").waiting_consumers)
        for route in ("dequeue", "subscribe"):
            answer = await client.post(f"/v1/queue/{route}", {"queue": "r", "owner": "o"})
            assert error_of(answer) == (503, "queue_busy")


class Shut:
    """A gate that lets nobody in."""

    state = "soft_arm"

    async def admit(self, kind: str) -> None:
        raise Throttled("too much to do")


async def test_a_gate_that_is_shut_is_met_first() -> None:
    async with testing.pond() as pond:
        context = Context(pond, ServerConfig(port=0, shutdown_timeout=1.0), gate=Shut())
        async with running(pond, context=context) as url:
            context.begin_drain()
            for route in ("enqueue", *OPEN, *CLOSED):
                answer = await request(url, "POST", f"/v1/queue/{route}", b"no body")
                assert error_of(answer) == (429, "throttled"), route
                assert answer.headers["retry-after"] == "1"
                assert answer.headers["x-lockd-qrf-state"] == "soft_arm"
            answer = await request(url, "POST", "/v1/update", b"no body")
            assert error_of(answer) == (429, "throttled")


class Failing:
    """A store that says no."""

    def __init__(self, inner: Any, error: Exception) -> None:
        self.inner = inner
        self.error: Exception | None = error
        self.on = False

    def __getattr__(self, name: str) -> Any:
        if self.on and name in {"write", "take", "get", "ready"}:
            return self._fail
        return getattr(self.inner, name)

    async def _fail(self, *args: Any, **more: Any) -> Any:
        assert self.error is not None
        raise self.error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (StoreBusy("/secret busy"), (503, "store_busy")),
        (StoreFull("/secret full"), (503, "store_full")),
        (StoreError("/secret down"), (503, "store_error")),
        (RuntimeError("/secret"), (500, "internal_error")),
    ],
)
async def test_trouble_of_the_storage_is_told_without_its_words(error: Exception, told: tuple[int, str]) -> None:
    clock = testing.ManualClock()
    store = Failing(testing.MemoryStore(clock=clock), error)
    async with serving(pond=testing.pond(store=store, clock=clock)) as client:  # type: ignore[arg-type]
        await client.enqueue("q", b"")
        [delivery] = await client.dequeue("q")
        store.on = True
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: request(client.url, "POST", "/v1/queue/enqueue", *_form()),
            lambda: client.post("/v1/queue/dequeue", {"queue": "q", "owner": "o", "wait_seconds": -1}),
            lambda: client.post("/v1/queue/ack", delivery.answer()),
            lambda: client.post("/v1/queue/stats", {"queue": "q"}),
        ]
        for call in calls:
            answer = await call()
            assert error_of(answer) == told
            assert b"secret" not in answer.body
        store.on = False
        # It recovers, and nothing was lost.
        await client.ack(delivery)


def _form() -> tuple[bytes, dict[str, str]]:
    body, kind = form({"queue": "q"}, b"x")
    return body, {"Content-Type": kind}


# What there is not


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/v1/acquire", "locks_unsupported"),
        ("/v1/keepalive", "locks_unsupported"),
        ("/v1/release", "locks_unsupported"),
        ("/v1/describe", "locks_unsupported"),
        ("/v1/get?key=orders/1", "locks_unsupported"),
        ("/v1/mutate", "queries_unsupported"),
        ("/v1/query", "queries_unsupported"),
        ("/v1/txn/decide", "transactions_unsupported"),
        ("/v1/txn/commit", "transactions_unsupported"),
        ("/v1/txn/rollback", "transactions_unsupported"),
        ("/v1/txn/replay", "transactions_unsupported"),
    ],
)
async def test_what_millpond_has_not_is_501(path: str, code: str) -> None:
    async with serving() as client:
        assert error_of(await client.post(path, {})) == (501, code)


@pytest.mark.parametrize(
    "path",
    ["/v1/queue/Dequeue", "/v1/queue/dequeuewithstate", "/v1/queue/", "/v1/queue/ack/", "/v1/queue/../queue/ack", "//"],
)
async def test_paths_are_exact(path: str) -> None:
    async with serving() as client:
        assert error_of(await client.post(path, ANSWER)) == (404, "unknown_route")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH"])
async def test_any_method_will_do_on_lockds_routes(method: str) -> None:
    async with serving() as client:
        body = b'{"queue":"q","owner":"o","wait_seconds":-1}'
        answer = await request(client.url, method, "/v1/queue/dequeue", body)
        assert error_of(answer) == (409, "waiting")


@pytest.mark.parametrize("method", ["GET", "OPTIONS"])
async def test_a_picture_in_a_page_takes_no_message(method: str) -> None:
    """What a browser asks for without an Origin: everything that is needed could stand in the query."""
    async with serving() as client:
        await client.enqueue("q", b"x")
        path = "/v1/queue/dequeue?queue=q&owner=page"
        answer = await request(client.url, method, path)
        assert error_of(answer) == (405, "method_not_allowed")
        assert answer.headers["allow"] == "POST"
        assert (await client.pond.queue("q").counts()).ready == 1


@pytest.mark.parametrize("bad", ["", "x" * 200, "é", "a\tb"])
async def test_a_bad_correlation_id_is_ignored(bad: str) -> None:
    async with serving() as client:
        answer = await client.post("/v1/queue/stats", {"queue": "q"}, X_Correlation_Id=bad)
        assert answer.status == 200
        assert answer.headers["x-correlation-id"] not in {bad, ""}
        assert len(answer.headers["x-correlation-id"]) == 36
