"""What nobody should send: the right code, a server that lives on, and nothing lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import hypothesis
import msgspec
import pytest
from hypothesis import strategies as st
from tests.unit.server.native import JSON, MSGPACK, Reply, ask, decoded, done, handle, server, text, until
from tests.unit.server.raw import Connection, request

from millpond import connect, testing
from millpond.errors import Forbidden, StoreBusy, StoreError, StoreFull
from millpond.server.auth import ANONYMOUS, Identity, OpenAuthority, Scope
from millpond.server.config import ServerConfig
from millpond.server.context import Context
from millpond.server.native_routes import ROUTES
from millpond.server.run import running
from millpond.service.config import Config
from millpond.testing import TestPond
from millpond.wire import native

ID = "0197a3c2-0000-7000-8000-000000000001"
PATHS = [route.path.removeprefix("/v1/") for route in ROUTES]
LIMIT = 100_000


@asynccontextmanager
async def world(**config: Any) -> AsyncIterator[tuple[TestPond, str, dict[str, Any]]]:
    """The pond, the server's URL, and the handle of a message that is held; at the end nothing of it is lost."""
    settings = ServerConfig(port=0, shutdown_timeout=1.0, drain_grace=0.0, max_body_bytes=LIMIT)
    async with testing.pond(config=Config(**config)) as pond:
        context = Context(pond, settings)
        async with running(pond, context=context) as url:
            await pond.queue("q").enqueue_many([b"held", b"ready"])
            [message] = (await done(url, "queue/receive", {"queue": "q"}))["messages"]
            yield pond, url, handle(message)
            counts = await pond.queue("q").counts()
            assert (counts.ready, counts.leased, counts.dead) == (1, 1, 0), "something was lost"
            assert (await request(url, "GET", "/healthz")).status == 200
            assert (
                "error"
                not in (await done(url, "queue/ackBatch", {"queue": "q", "messages": [handle(message)]}))["results"][0]
            )
            assert await pond.verify() == []


async def raw(url: str, path: str, body: bytes, headers: dict[str, str] = JSON) -> Reply:
    return decoded(await request(url, "POST", f"/v1/{path}", body, headers))


# Bodies


NO_BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"queue"',
    b"\xff\xfe",
    b'{"queue":"q"} {}',
    b'{"queue":"q"',
    b'{"queue":NaN}',
    b'{"queue":"q","queue":7}',
    b'{"queue":"\xff"}',
    b'{"queue":"\\ud800"}',
    b'{"queue":"q","surely_unknown":1}',
    b'{"queue":7}',
    b"[" * 50_000,
    b'{"queue":' * 5_000,
    b'{"queue":"q","value":' + b"[" * 40_000,
]


@pytest.mark.parametrize("path", [path for path in PATHS if path not in {"queue/list", "requests"}])
async def test_what_is_no_body_is_told_so(path: str) -> None:
    async with world() as (_, url, _held):
        for body in NO_BODIES:
            reply = await raw(url, path, body)
            assert (reply.status, reply.code) == (400, "invalid_body"), body[:40]
            assert "Traceback" not in reply.body["detail"]


@pytest.mark.parametrize(
    "body",
    [
        b"\xc1",
        b"\x81",
        b"\x81\xa5queue",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 50_000,
        b"\xc7\x00",
    ],
)
async def test_what_is_no_messagepack_is_told_so(body: bytes) -> None:
    async with world() as (_, url, _held):
        for path in ("queue/receive", "queue/enqueueBatch", "queue/ackBatch", "state/save"):
            reply = await raw(url, path, body, MSGPACK)
            assert (reply.status, reply.code) == (400, "invalid_body")


async def test_the_last_of_two_keys_counts() -> None:
    async with world() as (_, url, _held):
        reply = await raw(url, "queue/counts", b'{"queue":"other","queue":"q"}')
        assert (reply.status, reply.body["ready"]) == (200, 1)


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
async def test_a_body_above_the_limit_is_413(chunked: bool) -> None:
    async with world() as (_, url, _held), Connection(url) as connection:
        body = b'{"queue":"q","messages":[{"payload":"' + b"A" * LIMIT + b'"}]}'
        if chunked:
            head = "POST /v1/queue/enqueueBatch HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
            connection.write(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
            connection.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
        else:
            await connection.send("POST", "/v1/queue/enqueueBatch", body, JSON)
        reply = decoded(await connection.answer())
        assert (reply.status, reply.code) == (413, "too_large")
        # And the connection, or another one, serves on.
        assert (await raw(url, "queue/counts", b'{"queue":"q"}')).status == 200


async def test_a_body_that_breaks_off_changes_nothing() -> None:
    async with world() as (_, url, _held):
        body = json.dumps({"queue": "q", "messages": [{"payload": text(b"x")}]}).encode()
        for cut in range(0, len(body), 7):
            async with Connection(url) as connection:
                head = "POST /v1/queue/enqueueBatch HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
                connection.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:cut])
                await connection.writer.drain()


# Values


HUGE = 10**30
BAD_VALUES: list[tuple[str, dict[str, Any]]] = [
    ("queue/receive", {"count": 0}),
    ("queue/receive", {"count": -1}),
    ("queue/receive", {"count": 1.5}),
    ("queue/receive", {"count": True}),
    ("queue/receive", {"count": "1"}),
    ("queue/receive", {"count": 1001}),
    ("queue/receive", {"count": HUGE}),
    ("queue/receive", {"wait_ms": -1}),
    ("queue/receive", {"wait_ms": HUGE}),
    ("queue/receive", {"visibility_ms": 0}),
    ("queue/receive", {"visibility_ms": 2**53 - 1}),
    ("queue/receive", {"owner": ""}),
    ("queue/peek", {"count": 0}),
    ("queue/peek", {"count": 10**6}),
    ("queue/get", {"message_id": "../../etc/passwd"}),
    ("queue/get", {"message_id": ID + "\0"}),
    ("queue/payload", {"message_id": "%2e%2e"}),
    ("queue/extendBatch", {"messages": [{"message_id": ID, "lease_id": "x", "fencing_token": 1}], "extend_by_ms": 0}),
    ("queue/extendBatch", {"messages": [{"message_id": ID, "lease_id": "x", "fencing_token": 1}]}),
    ("queue/ackBatch", {"messages": []}),
    ("queue/ackBatch", {"messages": [{"message_id": ID, "lease_id": "x", "fencing_token": 1}] * 1001}),
    ("queue/ackBatch", {"messages": [{"message_id": ID, "lease_id": "x", "fencing_token": 0}]}),
    ("queue/ackBatch", {"messages": [{"message_id": ID, "lease_id": "x", "fencing_token": 2**63}]}),
    ("queue/ackBatch", {"messages": [{"message_id": "x", "lease_id": "x", "fencing_token": 1}]}),
    ("queue/ackBatch", {"messages": [{"message_id": ID, "lease_id": None, "fencing_token": 1}]}),
    ("queue/nackBatch", {"messages": [{"message_id": ID, "lease_id": "x", "fencing_token": 1}], "intent": "Failure"}),
    ("queue/nackBatch", {"messages": [{"message_id": ID, "lease_id": "x", "fencing_token": 1}], "delay_ms": HUGE}),
    ("queue/policy", {"set": {"paused": "yes"}}),
    ("queue/policy", {"set": {"ttl_ms": -1}}),
    ("queue/policy", {"set": {"ttl_ms": 2**53 - 1}}),
    ("queue/policy", {"set": {"max_attempts": 2**53 - 1}}),
    ("queue/policy", {"set": {"unknown": 1}}),
    ("dlq/list", {"cursor": "-1"}),
    ("dlq/list", {"cursor": "1e3"}),
    ("dlq/list", {"cursor": "٣"}),
    ("dlq/list", {"cursor": "9" * 5000}),
    ("dlq/list", {"cursor": "1", "after": ID}),
    ("dlq/list", {"limit": 0}),
    ("dlq/redrive", {"ids": ["x"]}),
    ("dlq/purge", {"ids": [ID] * 1001}),
    ("queue/enqueueBatch", {"messages": []}),
    ("queue/enqueueBatch", {"messages": [{}]}),
    ("queue/enqueueBatch", {"messages": [{"payload": "not base64!"}]}),
    ("queue/enqueueBatch", {"messages": [{"payload": "AAA"}]}),
    ("queue/enqueueBatch", {"messages": [{"payload": "", "priority": 10}]}),
    ("queue/enqueueBatch", {"messages": [{"payload": "", "priority": -1}]}),
    ("queue/enqueueBatch", {"messages": [{"payload": "", "delay_ms": 2**53 - 1}]}),
    ("queue/enqueueBatch", {"messages": [{"payload": "", "ttl_ms": 0}]}),
    ("queue/enqueueBatch", {"messages": [{"payload": "", "attributes": [1]}]}),
    ("queue/enqueueBatch", {"messages": [{"payload": "", "attributes": {"a": HUGE}}]}),
    ("queue/enqueueBatch", {"messages": [{"payload": "", "dedup_key": ""}]}),
    ("queue/enqueueBatch", {"messages": [{"payload": "", "max_attempts": 10**7}]}),
    ("queue/enqueueBatch", {"messages": [{"payload": "", "message_id": "x"}]}),
]


@pytest.mark.parametrize(("path", "fields"), BAD_VALUES, ids=lambda value: str(value)[:50])
async def test_a_value_that_cannot_be_right_is_400(path: str, fields: dict[str, Any]) -> None:
    async with world() as (_, url, _held):
        reply = await raw(url, path, json.dumps({"queue": "q"} | fields).encode())
        assert reply.status == 400, reply
        assert reply.code in {"invalid_body", "invalid_input", "invalid_message_id"}


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"attributes": {"a": "x" * 70_000}}, "too_large"),
        ({"dedup_key": "k" * 513}, "too_large"),
        ({"ordering_key": "k" * 513}, "too_large"),
        ({"content_type": "é" * 300}, "too_large"),
    ],
)
async def test_what_is_too_large_is_413(fields: dict[str, Any], code: str) -> None:
    async with world() as (_, url, _held):
        reply = await ask(url, "queue/enqueueBatch", {"queue": "q", "messages": [{"payload": ""} | fields]})
        assert (reply.status, reply.code) == (413, code)


async def test_values_nested_without_end_are_refused_or_kept_as_they_are() -> None:
    async with world() as (_, url, held):
        for levels, status in ((90, 200), (101, 400), (900, 400)):
            value = b"[" * levels + b"]" * levels
            body = b'{"queue":"q","message":%s,"value":%s}' % (json.dumps(held).encode(), value)
            reply = await raw(url, "state/save", body)
            assert reply.status == status, levels
        found = await done(url, "state/load", {"queue": "q", "message_id": held["message_id"]})
        assert found["value"] == json.loads("[" * 90 + "]" * 90)


async def test_numbers_that_are_none_come_back_as_none() -> None:
    """NaN is a number to MessagePack, and not to JSON."""
    async with world() as (_, url, held):
        await done(url, "state/save", {"queue": "q", "message": held, "value": float("nan")}, packed=True)
        found = await done(url, "state/load", {"queue": "q", "message_id": held["message_id"]})
        assert found["value"] is None


# Names


@pytest.mark.parametrize("name", ["", " ", "..", ".", "a/b", "../q", "a\\b", "q\0", "q\nq", "é", "x" * 129, "%2e%2e"])
async def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    async with world() as (_, url, _held):
        for path in ("queue/counts", "queue/purge", "dlq/purge"):
            reply = await ask(url, path, {"queue": name})
            assert (reply.status, reply.code) == (400, "invalid_queue")
            if name:
                reply = await ask(url, path, {"queue": "q", "namespace": name})
                assert (reply.status, reply.code) == (400, "invalid_queue")


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/queue/../queue/purge", "/v1/queue/purge/", "/v1//queue/purge", "/v1/./queue/purge", "/V1/queue/purge"),
        *("/v1/queue/%70urge/x", "/v1/queue/%70urge", "/v1/queue%2fpurge", "http://x/v1/queue/%70urge", "/%68ealthz"),
    ],
)
async def test_paths_that_are_not_quite_a_route_are_none(path: str) -> None:
    async with world() as (_, url, _held):
        answer = await request(url, "POST", path, b'{"queue":"q"}', JSON)
        assert (answer.status, decoded(answer).code) == (404, "unknown_route")


# Other people's


async def test_other_peoples_leases_open_nothing() -> None:
    async with world() as (_, url, held):
        for wrong in ({"lease_id": "0" * 32}, {"fencing_token": 2}, {"message_id": ID}, {"lease_id": ""}):
            lease = held | wrong
            for path, more in (
                ("queue/ackBatch", {}),
                ("queue/nackBatch", {}),
                ("queue/nackBatch", {"intent": "defer"}),
                ("queue/extendBatch", {"extend_by_ms": 1000}),
            ):
                [result] = (await done(url, path, {"queue": "q", "messages": [lease]} | more))["results"]
                assert result["error"]["error"] == "lease_lost"
            for path, more in (
                ("queue/bury", {"reason": "x"}),
                ("queue/handOff", {"then": [{"queue": "q", "message": {"payload": ""}}]}),
                ("state/save", {"value": 1}),
                ("state/delete", {}),
            ):
                reply = await ask(url, path, {"queue": "q", "message": lease} | more)
                assert (reply.status, reply.code) == (409, "lease_lost"), path


async def test_a_lease_of_another_queue_or_namespace_opens_nothing() -> None:
    async with world() as (pond, url, held):
        await pond.queue("other").enqueue(b"", message_id=held["message_id"])
        await pond.queue("q", namespace="n").enqueue(b"", message_id=held["message_id"])
        for place in ({"queue": "other"}, {"queue": "q", "namespace": "n"}):
            [result] = (await done(url, "queue/ackBatch", place | {"messages": [held]}))["results"]
            assert result["error"]["error"] == "lease_lost"


class OneTenant(OpenAuthority):
    """Lets everybody do what ``scopes`` say, in namespace ``mine`` and nowhere else."""

    def __init__(self, *scopes: Scope) -> None:
        self._scopes = scopes

    def authorise(self, identity: Identity, scope: Scope, namespace: str | None, queue: str | None) -> None:
        assert identity is ANONYMOUS
        if namespace != "mine" or scope not in self._scopes:
            raise Forbidden("not yours")


def _body(path: str, namespace: str | None) -> dict[str, Any]:
    lease = {"message_id": ID, "lease_id": "x", "fencing_token": 1}
    more: dict[str, dict[str, Any]] = {
        "queue/enqueueBatch": {"messages": [{"payload": ""}]},
        "queue/ackBatch": {"messages": [lease]},
        "queue/nackBatch": {"messages": [lease]},
        "queue/extendBatch": {"messages": [lease], "extend_by_ms": 1},
        "queue/bury": {"message": lease, "reason": "x"},
        "queue/handOff": {"message": lease, "then": []},
        "queue/stream": {"credit": 1},
        "queue/payload": {"message_id": ID},
        "queue/get": {"message_id": ID},
        "dlq/get": {"message_id": ID},
        "state/load": {"message_id": ID},
        "state/save": {"message": lease, "value": 1},
        "state/delete": {"message": lease},
    }
    place = {"queue": "q"} if namespace is None else {"queue": "q", "namespace": namespace}
    return place | more.get(path, {})


NAMED = [route for route in ROUTES if issubclass(route.request, native.Request)]


@pytest.mark.parametrize("route", NAMED, ids=lambda route: route.path)
async def test_other_peoples_namespaces_are_forbidden(route: Any) -> None:
    path = route.path.removeprefix("/v1/")
    async with testing.pond() as pond:
        scopes: tuple[Scope, ...] = ("read", "write", "consume", "admin")
        context = server(pond, authority=OneTenant(*scopes))
        async with running(pond, context=context) as url:
            await pond.queue("q").enqueue(b"theirs")
            for namespace in (None, "default", "DEFAULT", "other"):
                reply = await ask(url, path, _body(path, namespace))
                assert (reply.status, reply.code) == (403, "forbidden"), namespace
            assert (await pond.queue("q").counts()).ready == 1
        # And without its scope it is forbidden in one's own, too.
        context = server(pond, authority=OneTenant(*(scope for scope in scopes if scope != route.scope)))
        if route.kind != "payload":
            async with running(pond, context=context) as url:
                reply = await ask(url, path, _body(path, "mine"))
                assert (reply.status, reply.code) == (403, "forbidden")


async def test_what_a_route_needs_besides_its_scope() -> None:
    async with testing.pond() as pond:
        await pond.queue("q", namespace="mine").enqueue(b"1")
        await pond.queue("q").enqueue(b"theirs")
        context = server(pond, authority=OneTenant("read", "consume"))
        async with running(pond, context=context) as url:
            assert (await ask(url, "queue/policy", {"namespace": "mine", "queue": "q"})).status == 200
            for change in ({"set": {"paused": True}}, {"reset": True}):
                reply = await ask(url, "queue/policy", {"namespace": "mine", "queue": "q"} | change)
                assert (reply.status, reply.code) == (403, "forbidden")
            [message] = (await done(url, "queue/receive", {"namespace": "mine", "queue": "q"}))["messages"]
            body = {"namespace": "mine", "queue": "q", "message": handle(message)}
            for target in ({"queue": "z"}, {"queue": "z", "namespace": "default"}):
                reply = await ask(url, "queue/handOff", body | {"then": [target | {"message": {"payload": ""}}]})
                assert (reply.status, reply.code) == (403, "forbidden")
            # Lists show what may be seen.
            assert await done(url, "queue/list", {}) == {"queues": [{"namespace": "mine", "queue": "q"}]}
            assert await done(url, "queue/list", {"namespace": "default"}) == {"queues": []}
            assert (await ask(url, "requests", {})).status == 403
        context = server(pond, authority=OneTenant("read", "consume", "write"))
        async with running(pond, context=context) as url:
            theirs = [{"queue": "q", "namespace": "default", "message": {"payload": ""}}]
            reply = await ask(url, "queue/handOff", body | {"then": theirs})
            assert (reply.status, reply.code) == (403, "forbidden")
            own = [{"queue": "z", "message": {"payload": ""}}]
            assert (await ask(url, "queue/handOff", body | {"then": own})).status == 200


@pytest.mark.parametrize("scope", ["read", "consume"])
async def test_a_payload_is_its_consumers_and_its_onlookers(scope: Scope) -> None:
    async with testing.pond() as pond:
        receipt = await pond.queue("q", namespace="mine").enqueue(b"1")
        async with running(pond, context=server(pond, authority=OneTenant(scope))) as url:
            body = {"namespace": "mine", "queue": "q", "message_id": receipt.message_id}
            assert (await ask(url, "queue/payload", body)).body == b"1"


# A store in trouble


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StoreFull("no room on /var/lib/secret"), "store_full"),
        (StoreBusy("/var/lib/secret is locked"), "store_busy"),
        (StoreError("disk I/O error at /var/lib/secret"), "store_error"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_trouble_of_the_store_is_503_and_passes(
    error: StoreError, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world() as (pond, url, held):

        async def fail(*_: Any, **__: Any) -> Any:
            raise error

        for name in ("write", "take", "get", "counts", "queues"):
            monkeypatch.setattr(pond.store, name, fail)
        for path, body in (
            ("queue/enqueueBatch", {"queue": "q", "messages": [{"payload": ""}]}),
            ("queue/receive", {"queue": "q"}),
            ("queue/ackBatch", {"queue": "q", "messages": [held]}),
            ("queue/counts", {"queue": "q"}),
            ("queue/list", {}),
        ):
            reply = await ask(url, path, body)
            assert (reply.status, reply.code) == (503, code), path
            assert "secret" not in json.dumps(reply.body)
            if error.retryable:
                assert int(reply.headers["retry-after"]) >= 1
        monkeypatch.undo()
        assert (await done(url, "queue/counts", {"queue": "q"}))["leased"] == 1


async def test_a_full_disk_is_503_for_producers_alone_and_passes(tmp_path: Path) -> None:
    async with connect(f"sqlite:///{tmp_path}/a.db") as pond, running(pond) as url:
        await pond.queue("q").enqueue_many([bytes(1000)] * 50)
        execute = pond.store._writer._applier.execute  # type: ignore[attr-defined]
        execute(f"PRAGMA max_page_count={execute('PRAGMA page_count').get + 5}")
        large = {"queue": "q", "messages": [{"payload": text(bytes(50_000))}] * 20}
        reply = await ask(url, "queue/enqueueBatch", large)
        assert (reply.status, reply.code, reply.headers["retry-after"]) == (503, "store_full", "1")
        assert str(tmp_path) not in json.dumps(reply.body)
        messages = (await done(url, "queue/receive", {"queue": "q", "count": 50}))["messages"]
        acked = await done(url, "queue/ackBatch", {"queue": "q", "messages": [handle(one) for one in messages]})
        assert [one.get("error") for one in acked["results"]] == [None] * 50
        execute("PRAGMA max_page_count=1000000")
        assert len((await done(url, "queue/enqueueBatch", large))["receipts"]) == 20
        assert (await pond.queue("q").counts()).ready == 20


async def test_an_error_that_nobody_foresaw_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world() as (pond, url, _held):

        async def fail(*_: Any, **__: Any) -> Any:
            raise RuntimeError("a secret in /home")

        monkeypatch.setattr(pond.store, "counts", fail)
        reply = await ask(url, "queue/counts", {"queue": "q"})
        assert (reply.status, reply.code) == (500, "internal_error")
        assert "secret" not in json.dumps(reply.body)
        monkeypatch.undo()


# Anything at all


@hypothesis.settings(max_examples=200, deadline=None, database=None, derandomize=True)
@hypothesis.given(data=st.binary(max_size=300), route=st.sampled_from(ROUTES))
def test_decoders_answer_any_bytes_with_a_request_or_one_of_their_errors(data: bytes, route: Any) -> None:
    for decode in (msgspec.json.decode, msgspec.msgpack.decode):
        try:
            made = decode(data, type=route.request)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue
        assert isinstance(made, route.request)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("q") | st.just(ID),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def _near(route: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies with the right names and any values."""
    fields = {field.encode_name: ANY for field in msgspec.structs.fields(route.request)}
    return st.fixed_dictionaries({}, optional=fields).map(lambda made: {"queue": "fuzz"} | made)


@pytest.mark.parametrize("packed", [False, True], ids=["json", "msgpack"])
def test_bodies_of_the_right_names_and_any_values_break_nothing(packed: bool) -> None:
    """One server, many bodies: each answer is one that the document knows, and never a failure of the server."""
    kind = MSGPACK if packed else JSON
    cases: list[tuple[str, bytes]] = []

    @hypothesis.settings(max_examples=250, deadline=None, database=None, derandomize=True)
    @hypothesis.given(data=st.data())
    def gather(data: st.DataObject) -> None:
        route = data.draw(st.sampled_from([one for one in ROUTES if one.kind != "stream"]))
        body = data.draw(_near(route))
        if "wait_ms" in body:
            body["wait_ms"] = 0
        try:
            cases.append((route.path, msgspec.msgpack.encode(body) if packed else json.dumps(body).encode()))
        except OverflowError:
            hypothesis.reject()

    gather()

    async def run() -> None:
        async with world() as (_, url, _held), Connection(url) as connection:
            for path, body in cases:
                await connection.send("POST", path, body, kind)
                answer = await asyncio.wait_for(connection.answer(), 60)
                assert answer.status < 500, (path, body, answer)

    asyncio.run(run())


@hypothesis.settings(max_examples=200, deadline=None, database=None, derandomize=True)
@hypothesis.given(data=st.binary(max_size=200))
def test_frames_of_any_bytes_are_frames_or_errors(data: bytes) -> None:
    try:
        frame = msgspec.msgpack.decode(data, type=native.Frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return
    assert isinstance(frame, (native.Hello, native.Messages, native.Heartbeat, native.End))


async def test_many_at_once_with_every_second_one_gone_before_its_answer() -> None:
    async with world() as (pond, url, _held):
        body = json.dumps({"queue": "empty", "wait_ms": 600_000}).encode()
        connections = [Connection(url) for _ in range(40)]
        for connection in connections:
            await connection.__aenter__()
            await connection.send("POST", "/v1/queue/receive", body, JSON)
        await until(lambda: pond.dispatcher.queue_stats(None, "empty").waiting_consumers == 40)
        for connection in connections[::2]:
            connection.writer.transport.abort()
        await until(lambda: pond.dispatcher.queue_stats(None, "empty").waiting_consumers == 20)
        await pond.queue("empty").enqueue_many([b"x"] * 20)
        answers = await asyncio.gather(*(connection.answer() for connection in connections[1::2]))
        assert sum(len(json.loads(answer.body)["messages"]) for answer in answers) >= 1
        for connection in connections:
            connection.writer.close()
