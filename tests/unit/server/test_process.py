"""A whole server as its config asks for it, over sockets: who is let in, what is reloaded, counted, written down."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.unit.server.certificates import Authority, write
from tests.unit.server.native import until
from tests.unit.server.raw import Answer, Connection, request

from millpond import testing
from millpond.errors import InvalidInput, StoreError
from millpond.server import native_routes, process, tokens
from millpond.server.config import ServerConfig
from millpond.server.context import Context
from millpond.server.families import FAMILIES
from millpond.server.gate import HIGH, PATIENCE, Load, LoadGate
from millpond.server.process import Service
from millpond.server.reload import EVERY
from millpond.server.run import Server
from millpond.stores.memory import MemoryStore
from millpond.stores.sqlite import SqliteStore
from millpond.wire.faults import Refusal


@contextlib.asynccontextmanager
async def serving(pond: testing.TestPond | None = None, **settings: Any) -> AsyncIterator[Service]:
    settings = {"port": 0, "drain_grace": 0.0, "shutdown_timeout": 1.0, "traces": "off", **settings}
    async with contextlib.AsyncExitStack() as stack:
        pond = pond or await stack.enter_async_context(testing.pond())
        yield await stack.enter_async_context(Service(pond, ServerConfig(**settings)).running())


def pond_of(service: Service) -> testing.TestPond:
    pond = service.context.pond
    assert isinstance(pond, testing.TestPond)
    return pond


def make_tokens(path: Path, **allow: str) -> dict[str, dict[str, str]]:
    """A file of tokens; name → the header that shows it."""
    made = [
        tokens.create(name, [tokens.parse_grant(one) for one in grants.split()], random_bytes=os.urandom, now=0)
        for name, grants in allow.items()
    ]
    tokens.save(str(path), [entry for entry, _ in made])
    return {entry.name: {"Authorization": f"Bearer {text}"} for entry, text in made}


def enqueue_body(queue: str, payload: bytes = b"x") -> tuple[bytes, dict[str, str]]:
    meta = json.dumps({"queue": queue}).encode()
    body = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % part
        for part in ((b"meta", meta), (b"payload", payload))
    )
    return body + b"--b--\r\n", {"Content-Type": "multipart/form-data; boundary=b"}


async def enqueue(url: str, queue: str, headers: Mapping[str, str] | None = None, payload: bytes = b"x") -> Answer:
    body, own = enqueue_body(queue, payload)
    return await request(url, "POST", "/v1/queue/enqueue", body, {**own, **(headers or {})})


async def ask(url: str, path: str, headers: Mapping[str, str] | None = None, **body: Any) -> Answer:
    return await request(
        url, "POST", path, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})}
    )


def code(answer: Answer) -> tuple[int, str]:
    return answer.status, json.loads(answer.body)["error"] if answer.status >= 400 else ""


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Who is let in


async def test_each_route_wants_its_scope(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    headers = make_tokens(path, **{scope: f"{scope}:default/orders" for scope in tokens.SCOPES})
    async with serving(auth_tokens=str(path)) as service:
        url = service.server.url
        for name, shown in headers.items():
            codes = {
                "write": code(await enqueue(url, "orders", shown)),
                "consume": code(
                    await ask(url, "/v1/queue/dequeue", shown, queue="orders", owner="me", wait_seconds=-1)
                ),
                "read": code(await ask(url, "/v1/queue/stats", shown, queue="orders")),
            }
            for scope, found in codes.items():
                if scope == name:
                    assert found[0] in {200, 409}, (name, scope, found)
                else:
                    assert found == (403, "forbidden"), (name, scope)
            # An other queue and an other namespace are nobody's.
            assert code(await enqueue(url, "other", shown)) == (403, "forbidden")
            assert code(await ask(url, "/v1/queue/stats", shown, queue="orders", namespace="x")) == (403, "forbidden")
        # Health is for everybody, figures are not.
        assert [(await request(url, "GET", path)).status for path in ("/healthz", "/readyz")] == [200, 200]
        answer = await request(url, "GET", "/metrics")
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert code(await request(url, "GET", "/metrics", headers=headers["read"])) == (403, "forbidden")
        assert code(await enqueue(url, "orders")) == (401, "unauthorized")
        assert code(await enqueue(url, "orders", {"Authorization": "Bearer mpt_0_0"})) == (401, "unauthorized")
        assert [name.queue for name in await pond_of(service).queues()] == ["orders"]


async def test_a_change_of_the_tokens_is_seen_and_written_down(tmp_path: Path) -> None:
    path, audit = tmp_path / "tokens.toml", tmp_path / "audit.log"
    before = make_tokens(path, old="*:*/*")["old"]
    async with serving(auth_tokens=str(path), log_audit=str(audit)) as service:
        url, pond = service.server.url, pond_of(service)
        async with Connection(url) as kept:
            body, own = enqueue_body("q")
            await kept.send("POST", "/v1/queue/enqueue", body, {**own, **before})
            assert (await kept.answer()).status == 200
            after = make_tokens(path, new="*:*/*")["new"]
            await pond.advance(EVERY)
            # Also on a connection that was let in before.
            await kept.send("POST", "/v1/queue/enqueue", body, {**own, **before})
            assert (await kept.answer()).status == 401
        assert (await enqueue(url, "q", after)).status == 200
        path.write_text("nonsense")
        await pond.advance(EVERY)
        assert (await enqueue(url, "q", after)).status == 200
        assert (service.reloader.reloads, service.reloader.failures) == (1, 1)
    [entry] = lines(audit)
    assert entry["action"] == "tokens.changed"
    assert [name.split()[1] for name in (*entry["added"], *entry["removed"])] == ["new", "old"]
    assert after["Authorization"].split("_", 2)[2] not in audit.read_text()


async def test_requests_that_name_no_namespace_are_of_the_servers_own_by_every_route(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    headers = make_tokens(path, team="*:team/*", default="*:default/*")
    async with serving(auth_tokens=str(path), namespace="team") as service:
        url = service.server.url
        batch = {"queue": "q", "messages": [{"payload": "eA=="}]}
        for name, status in (("team", 200), ("default", 403)):
            assert (await enqueue(url, "q", headers[name])).status == status
            assert (await ask(url, "/v1/queue/enqueueBatch", headers[name], **batch)).status == status
            assert (await ask(url, "/v1/queue/purge", headers[name], queue="other")).status == status
        assert [tuple(name) for name in await pond_of(service).queues()] == [("team", "q")]


async def test_a_browser_is_no_client_of_a_server_that_asks_for_nothing() -> None:
    async with serving() as service:
        url = service.server.url
        assert (await enqueue(url, "q")).status == 200
        for of_a_page in ({"Origin": "http://example.org"}, {"Sec-Fetch-Site": "cross-site"}):
            answer = await enqueue(url, "q", of_a_page)
            assert code(answer) == (403, "browser_refused")
        # Nor under a name of its own that it has resolve to this machine; who asks by hand is no page.
        for site, status in (("same-origin", 403), ("none", 200)):
            assert (await request(url, "GET", "/metrics", headers={"Sec-Fetch-Site": site})).status == status
        assert "access-control-allow-origin" not in answer.headers


class Secure:
    """A server with TLS, and clients of it."""

    def __init__(self, ca: Authority, folder: Path) -> None:
        self.ca = ca
        self.folder = folder

    def client(self, own: tuple[str, str] | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=self.ca.pem)
        if own is not None:
            context.load_cert_chain(write(self.folder, own=own[0] + own[1])["own"])
        return context

    async def request(
        self, url: str, context: ssl.SSLContext, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Answer:
        async with Connection(url, tls=context) as connection:
            await connection.send("POST", path, body, headers)
            return await connection.answer()


@pytest.fixture(scope="module")
def ca() -> Authority:
    return Authority()


@pytest.fixture
def secure(ca: Authority, tmp_path: Path) -> Secure:
    cert, key = ca.server()
    write(tmp_path, cert=cert, key=key, ca=ca.pem)
    return Secure(ca, tmp_path)


def tls_settings(folder: Path) -> dict[str, Any]:
    return {
        "tls_cert": str(folder / "cert.pem"),
        "tls_key": str(folder / "key.pem"),
        "tls_client_ca": str(folder / "ca.pem"),
    }


async def test_a_certificate_is_judged_by_its_claims(secure: Secure, tmp_path: Path) -> None:
    async with serving(**tls_settings(tmp_path)) as service:
        url = service.server.url
        assert url.startswith("https://")
        body, own = enqueue_body("orders")

        async def put(*uris: str) -> Answer:
            context = secure.client(secure.ca.client(*uris))
            return await secure.request(url, context, "/v1/queue/enqueue", body, own)

        assert (await put("spiffe://x", "lockd://ns/default?perm=w")).status == 200
        assert code(await put("spiffe://x", "lockd://ns/default?perm=r")) == (403, "namespace_forbidden")
        assert code(await put("spiffe://x", "lockd://ns/other")) == (403, "namespace_forbidden")
        assert code(await put("lockd://ns/default")) == (403, "invalid_namespace_claims")
        assert code(await put()) == (403, "invalid_namespace_claims")
        # Without a certificate, and with one of somebody else's, there is no connection at all.
        for context in (secure.client(), secure.client(Authority("x").client("spiffe://x", "lockd://ns/default"))):
            with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
                await secure.request(url, context, "/healthz")


async def test_a_revoked_certificate_is_not_let_in(secure: Secure, tmp_path: Path) -> None:
    good = secure.ca.client("spiffe://x", "lockd://ns/ALL", serial=0xA1)
    bad = secure.ca.client("spiffe://x", "lockd://ns/ALL", serial=0x0B2F)
    async with serving(**tls_settings(tmp_path), tls_revoked=("0B2F",)) as service:
        url = service.server.url
        assert (await secure.request(url, secure.client(good), "/healthz")).status == 200
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await secure.request(url, secure.client(bad), "/healthz")
        assert service.server.watch.refused == {"revoked_certificate": 1}


async def test_new_certificates_are_served_without_a_restart_and_old_cas_let_nobody_in(
    secure: Secure, tmp_path: Path
) -> None:
    old = secure.client(secure.ca.client("spiffe://x", "lockd://ns/ALL"))
    async with serving(**tls_settings(tmp_path)) as service:
        url, pond = service.server.url, pond_of(service)
        async with Connection(url, tls=old) as kept:
            await kept.send("GET", "/healthz")
            assert (await kept.answer()).status == 200
            other = Authority("another")
            cert, key = other.server()
            write(tmp_path, cert=cert, key=key, ca=other.pem)
            await pond.advance(EVERY)
            assert service.reloader.reloads == 1
            # Who was let in by the old CA is to show that the new one knows him, too.
            assert await kept.reader.read() == b""
        with pytest.raises(ssl.SSLCertVerificationError):
            await secure.request(url, old, "/healthz")
        new = Secure(other, tmp_path)
        context = new.client(other.client("spiffe://x", "lockd://ns/ALL"))
        assert (await new.request(url, context, "/healthz")).status == 200


async def test_a_handshake_that_does_not_end_is_cut_off(secure: Secure, tmp_path: Path) -> None:
    async with serving(**tls_settings(tmp_path), header_timeout=0.05) as service:
        async with Connection(service.server.url) as silent:
            async with asyncio.timeout(60):
                with contextlib.suppress(ConnectionError):
                    assert await silent.reader.read() == b""
        assert service.server.connections == 0


async def test_an_exposed_server_does_not_start(tmp_path: Path) -> None:
    async with testing.pond() as pond:
        with pytest.raises(InvalidInput, match="without TLS"):
            Service(pond, ServerConfig(host="0.0.0.0"))
        # Nor by way of those parts that a program may put together for itself.
        with pytest.raises(InvalidInput, match="without TLS"):
            Server(Context(pond, ServerConfig(host="0.0.0.0")))
        unmet: tuple[dict[str, Any], ...] = ({"auth_tokens": "t"}, {"tls_cert": "c"}, {"tls_bundle": "b"})
        for settings in unmet:
            with pytest.raises(InvalidInput, match=r"millpond\.server\.process\.Service"):
                Server(Context(pond, ServerConfig(**settings)))
        with pytest.raises(InvalidInput, match=r"tokens file .* cannot be read"):
            Service(pond, ServerConfig(auth_tokens=str(tmp_path / "none")))


# The process


async def test_systemd_is_told_where_it_asked_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process.notify("READY=1")  # nobody asked
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(path)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        process.notify("READY=1")
        assert systemd.recv(100) == b"READY=1"
    process.notify("STOPPING=1")  # it has gone


@pytest.mark.parametrize(
    ("soft", "hard", "set_to", "told"),
    [(10_000, 10_000, None, False), (1024, 10_000, 4224, False), (1024, 2048, 2048, True), (-1, -1, None, False)],
)
def test_the_process_may_open_as_many_files_as_it_takes_connections(
    soft: int,
    hard: int,
    set_to: int | None,
    told: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    changed: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: changed.append(limits))
    process.allow_connections(4096)
    assert changed == ([] if set_to is None else [(set_to, hard)])
    assert [record.message for record in caplog.records] == (["millpond.server.few_descriptors"] if told else [])


# Limits of the engine and the queue


async def test_more_queues_than_a_namespace_may_have_are_refused() -> None:
    async with serving(max_queues_per_namespace=2) as service:
        url, pond = service.server.url, pond_of(service)
        assert [(await enqueue(url, name)).status for name in ("one", "two", "one")] == [200, 200, 200]
        assert code(await enqueue(url, "three")) == (403, "too_many_queues")
        assert len(await pond.queues()) == 2
        # When one has gone, there is room for another.
        await pond.queue("one").purge()
        await pond.advance(2)
        assert (await enqueue(url, "three")).status == 200
        assert code(await enqueue(url, "one")) == (403, "too_many_queues")


async def test_those_that_come_at_once_are_not_more_than_a_namespace_may_have() -> None:
    async with serving(max_queues_per_namespace=3) as service:
        url, pond = service.server.url, pond_of(service)
        queues = pond.store.queues

        async def slowly() -> Any:
            found = await queues()
            for _ in range(10):
                await asyncio.sleep(0)
            return found

        pond.store.queues = slowly  # type: ignore[method-assign]
        names = [f"q{number}" for number in range(20)]
        found = await asyncio.gather(*(enqueue(url, name) for name in names))
        assert sorted({answer.status for answer in found}) == [200, 403]
        assert len(await pond.queues()) == 3
        # What was let in and has not arrived yet counts at the next look, too.
        quota = service.context.quota
        for queue in await pond.queues():
            await pond.queue(queue.queue).purge()
        await pond.advance(2)
        for fresh, later in (("a", 0.6), ("bc", 0.5), ("d", 0)):  # for d all are looked at again, and a is not there
            for name in fresh:
                await quota.admit("default", name)
            await pond.advance(later)
        with pytest.raises(Refusal):
            await quota.admit("default", "e")


async def test_who_is_refused_does_not_make_the_store_list_its_queues() -> None:
    async with serving(max_queues_per_namespace=1) as service:
        await enqueue(service.server.url, "one")
        looks = 0
        queues = service.context.pond.store.queues

        async def counted() -> Any:
            nonlocal looks
            looks += 1
            return await queues()

        service.context.pond.store.queues = counted  # type: ignore[method-assign]
        for number in range(20):
            assert code(await enqueue(service.server.url, f"more{number}")) == (403, "too_many_queues")
        assert looks <= 1


# The audit log


async def test_destructive_calls_are_written_down_with_who_and_what(tmp_path: Path) -> None:
    path, audit = tmp_path / "tokens.toml", tmp_path / "audit.log"
    admin = make_tokens(path, root="*:*/*")["root"]
    async with serving(auth_tokens=str(path), log_audit=str(audit)) as service:
        url = service.server.url
        for _ in range(3):
            await enqueue(url, "orders", admin)
        shown = {**admin, "X-Correlation-Id": "case-7"}
        assert (await ask(url, "/v1/queue/purge", shown, queue="orders")).status == 200
        assert (await ask(url, "/v1/queue/pause", shown, queue="Orders", namespace="shop")).status == 200
        [purge, pause] = lines(audit)
        assert purge | {"at": "", "id": ""} == {
            "at": "",
            "action": "queue.purge",
            "who": "root",
            "kind": "token",
            "id": "",
            "address": "127.0.0.1",
            "correlation_id": "case-7",
            "namespace": "default",
            "queue": "orders",
            "messages": 3,
        }
        assert (pause["action"], pause["namespace"], pause["queue"]) == ("queue.pause", "shop", "orders")
        assert purge["at"].endswith("Z")
        assert oct(audit.stat().st_mode & 0o777) == "0o600"
        # Rotated away, and opened anew when told so.
        audit.rename(tmp_path / "audit.1")
        service.reload()
        assert (await ask(url, "/v1/queue/resume", shown, queue="orders", namespace="shop")).status == 200
        assert [entry["action"] for entry in lines(audit)] == ["queue.resume"]


async def test_without_a_file_the_audit_goes_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "millpond.audit")
    async with serving() as service:
        assert (await ask(service.server.url, "/v1/queue/purge", queue="orders")).status == 200
    [record] = [record for record in caplog.records if record.name == "millpond.audit"]
    entry = vars(record)["entry"]
    assert (entry["action"], entry["who"], entry["messages"]) == ("queue.purge", "anonymous", 0)


# Metrics


def samples(text: str) -> dict[str, float]:
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    return found


async def scrape(url: str, headers: Mapping[str, str] | None = None) -> dict[str, float]:
    answer = await request(url, "GET", "/metrics", headers=headers)
    assert answer.status == 200, answer.body
    return samples(answer.body.decode())


async def test_metrics_tell_what_happened() -> None:
    async with serving() as service:
        url, pond = service.server.url, pond_of(service)
        for _ in range(5):
            await enqueue(url, "orders")
        queue = pond.queue("orders")
        first, second, third = await queue.receive(3)
        await first.ack()
        await second.nack(error="x")
        await pond.advance(31)  # the lease of the third runs out
        again = await queue.receive(4)
        assert len(again) == 4
        stale = await ask(
            url, "/v1/queue/ack", queue="orders", message_id=third.id, lease_id=third.lease.id, fencing_token=1
        )
        assert stale.status == 409
        await again[0].bury("enough")
        await again[1].defer(delay=100)
        await again[2].extend(60)
        await pond.advance(1)
        told = await scrape(url)
        place = '{namespace="default",queue="orders"}'
        assert {
            name: told[f"millpond_messages_{name}_total{place}"]
            for name in ("enqueued", "delivered", "redelivered", "acked", "nacked", "deferred", "buried", "dead")
        } == {
            "enqueued": 5,
            "delivered": 7,
            "redelivered": 2,
            "acked": 1,
            "nacked": 1,
            "deferred": 1,
            "buried": 1,
            "dead": 1,
        }
        assert told[f"millpond_leases_extended_total{place}"] == 1
        assert told[f"millpond_leases_lost_total{place}"] == 1
        states = {
            state: told[f'millpond_queue_messages{{namespace="default",queue="orders",state="{state}"}}']
            for state in ("ready", "delayed", "leased", "blocked", "dead")
        }
        assert states == {"ready": 0, "delayed": 1, "leased": 2, "blocked": 0, "dead": 1}
        assert told['millpond_http_requests_total{route="/v1/queue/enqueue",status="200"}'] == 5
        assert told['millpond_http_requests_total{route="/v1/queue/ack",status="409"}'] == 1
        assert told['millpond_http_request_duration_seconds_count{route="/v1/queue/enqueue"}'] == 5
        assert told['millpond_http_request_duration_seconds_bucket{le="+Inf",route="/v1/queue/enqueue"}'] == 5
        assert told["millpond_http_connections"] >= 1
        assert told["millpond_draining"] == 0
        assert told["millpond_queues"] == 1
        assert told["millpond_store_operations_total"] >= 5
        assert any(name.startswith("millpond_build_info{") and value == 1 for name, value in told.items())
        assert told['millpond_log_events_total{event="millpond.message.dead_lettered"}'] == 1


async def test_metrics_tell_who_was_slowed_and_a_429_how_the_server_does() -> None:
    async with serving() as service:
        url, gate, pond = service.server.url, service.context.gate, pond_of(service)
        assert isinstance(gate, LoadGate)
        told = await scrape(url)
        assert told['millpond_load_ratio{sign="backlog"}'] == told["millpond_producers_slowed_total"] == 0
        gate.closed = True
        slowed = asyncio.create_task(enqueue(url, "orders"))
        await until(lambda: gate.waiting)
        told = await scrape(url)
        assert (told["millpond_producers_waiting"], told["millpond_producers_held_back"]) == (1, 1)
        gate._load = lambda: Load(9 * HIGH, 1)
        await pond.advance(PATIENCE)
        answer = await slowed
        assert code(answer) == (429, "throttled")
        assert (answer.headers["x-lockd-qrf-state"], answer.headers["retry-after"]) == ("engaged", "1")
        told = await scrape(url)
        assert told['millpond_load_ratio{sign="backlog"}'] == 9
        assert told["millpond_producers_slowed_total"] == told["millpond_producers_slowed_seconds_total"] == 1
        assert told['millpond_producers_refused_total{reason="waited"}'] == 1
        assert told['millpond_producers_refused_total{reason="crowded"}'] == 0
        gate._load = lambda: Load(HIGH, 2)
        slowed = asyncio.create_task(enqueue(url, "orders"))
        await until(lambda: gate.waiting)
        await pond.advance(PATIENCE)
        assert (await slowed).headers["x-lockd-qrf-state"] == "recovery"
        gate._load = lambda: Load(0, 3)
        slowed = asyncio.create_task(enqueue(url, "orders"))
        await until(lambda: gate.waiting)
        await pond.advance(PATIENCE / 2)
        assert "x-lockd-qrf-state" not in (await slowed).headers


async def test_how_long_the_oldest_message_waits() -> None:
    async with serving() as service:
        pond = pond_of(service)
        await enqueue(service.server.url, "orders")
        await pond.advance(12.5)
        told = await scrape(service.server.url)
        assert told['millpond_queue_oldest_ready_age_seconds{namespace="default",queue="orders"}'] == 12.5


async def test_what_a_client_makes_up_becomes_no_label() -> None:
    async with serving(metrics_queues=3) as service:
        url = service.server.url
        for number in range(10):
            await request(url, "POST", f"/made-up/{number}")
            await enqueue(url, f"queue{number}")
        told = await scrape(url)
        assert told['millpond_http_requests_total{route="(other)",status="404"}'] == 10
        assert not any("made-up" in name for name in told)
        queues = [name for name in told if name.startswith("millpond_messages_enqueued_total")]
        assert len(queues) == 4
        assert told['millpond_messages_enqueued_total{namespace="",queue="(other)"}'] == 7
        assert sum('state="ready"' in name for name in told) == 3
        assert told["millpond_queues"] == 10


async def test_every_metric_is_in_the_table_and_named_as_prometheus_wants_it() -> None:
    async with serving() as service:
        await enqueue(service.server.url, "orders")
        text = (await request(service.server.url, "GET", "/metrics")).body.decode()
    declared = {line.split()[2]: line.split()[3] for line in text.splitlines() if line.startswith("# TYPE millpond_")}
    known = {family.name: family.kind for family in FAMILIES}
    assert set(declared) <= set(known)
    assert {name: known[name] for name in declared} == declared
    assert len(declared) > 15
    for family in FAMILIES:
        assert family.name.startswith("millpond_")
        assert (family.kind == "counter") == family.name.endswith("_total")
        assert not family.name.endswith(("_milliseconds", "_ms"))
    open_metrics = {"Accept": "application/openmetrics-text; version=1.0.0"}
    async with serving() as service:
        answer = await request(service.server.url, "GET", "/metrics", headers=open_metrics)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.body.endswith(b"# EOF\n")


async def test_metrics_can_be_public_or_off(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    make_tokens(path, a="write:a/b")
    async with serving(auth_tokens=str(path), metrics_public=True) as service:
        assert (await request(service.server.url, "GET", "/metrics")).status == 200
    async with serving(metrics_off=True) as service:
        assert (await request(service.server.url, "GET", "/metrics")).status == 404


async def test_asking_whether_it_is_ready_costs_the_store_a_read_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as service:
        url, pond, looks = service.server.url, pond_of(service), 0
        document = pond.store.document

        async def counted(*arguments: Any) -> Any:
            nonlocal looks
            looks += 1
            if looks == 2:
                raise StoreError("gone")
            return await document(*arguments)

        monkeypatch.setattr(pond.store, "document", counted)

        async def statuses() -> set[int]:
            return {
                answer.status for answer in await asyncio.gather(*(request(url, "GET", "/readyz") for _ in range(5)))
            }

        assert (await statuses(), looks) == ({200}, 1)
        await pond.advance(1)
        # A failure does not stand: the next one looks again.
        assert (await request(url, "GET", "/readyz")).status == 503
        assert (await statuses(), looks) == ({200}, 3)


async def test_metrics_are_told_while_the_store_is_gone() -> None:
    async with serving() as service:
        await enqueue(service.server.url, "orders")
        await pond_of(service).store.close()
        told = await scrape(service.server.url)
        assert "millpond_queues" not in told
        assert told['millpond_messages_enqueued_total{namespace="default",queue="orders"}'] == 1


async def test_a_server_leaves_no_handler_behind() -> None:
    before = list(logging.getLogger("millpond").handlers)
    async with serving():
        assert len(logging.getLogger("millpond").handlers) == len(before) + 1
    assert logging.getLogger("millpond").handlers == before


# Errors tell nothing of the server


async def test_no_answer_holds_a_path_or_a_traceback(tmp_path: Path) -> None:
    async with serving() as service:
        url = service.server.url

        async def broken(*_: Any, **__: Any) -> Any:
            raise RuntimeError(f"at {tmp_path}/secret.db")

        service.context.pond.service.enqueue = broken  # type: ignore[method-assign]
        answer = await enqueue(url, "q")
        assert code(answer) == (500, "internal_error")
        await pond_of(service).store.close()
        found = [answer, await ask(url, "/v1/queue/stats", queue="q"), await request(url, "GET", "/readyz")]
        found += [await request(url, "POST", path) for path in ("/..%2f..%2fetc/passwd", "/v1/queue/../../x", "//")]
        for one in found:
            assert one.status >= 400
            assert not any(word in one.body for word in (b"Traceback", b".py", b"secret", str(tmp_path).encode()))
            assert one.headers["x-content-type-options"] == "nosniff"
            assert "server" not in one.headers


# Trouble of the storage


async def test_a_full_disk_is_503_and_acks_still_work_and_it_recovers(tmp_path: Path) -> None:
    clock = testing.ManualClock()
    store = SqliteStore(tmp_path / "work.db", clock=clock, max_bytes=2_000_000)
    async with testing.pond(store=store, clock=clock) as pond, serving(pond) as service:
        url = service.server.url
        for _ in range(100):
            answer = await enqueue(url, "orders", payload=bytes(40_000))
            if answer.status != 200:
                break
        assert (code(answer), answer.headers["retry-after"]) == ((503, "store_full"), "1")
        assert str(tmp_path).encode() not in answer.body
        assert (await request(url, "GET", "/readyz")).status == 200  # consumers are welcome: they make room
        taken = json.loads((await ask(url, "/v1/queue/receive", queue="orders", count=100, wait_ms=0)).body)
        handles = [
            {name: one[name] for name in ("message_id", "lease_id", "fencing_token")} for one in taken["messages"]
        ]
        assert len(handles) > 10
        done = json.loads((await ask(url, "/v1/queue/ackBatch", queue="orders", messages=handles)).body)
        assert all(one.get("error") is None for one in done["results"])
        assert (await enqueue(url, "orders", payload=bytes(40_000))).status == 200


class Flaky:
    """A store that cannot be reached while ``down``."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.down = False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not self.down or name not in {"write", "take", "get", "ready", "document", "counts", "queues"}:
            return found

        async def fail(*_: Any, **__: Any) -> Any:
            raise StoreError("the disk of /var/lib/secret is gone")

        return fail


async def test_a_store_that_is_down_is_503_everywhere_and_it_recovers(caplog: pytest.LogCaptureFixture) -> None:
    clock = testing.ManualClock()
    store = Flaky(MemoryStore(clock=clock))
    async with testing.pond(store=store, clock=clock) as pond, serving(pond) as service:  # type: ignore[arg-type]
        url = service.server.url
        assert (await enqueue(url, "orders")).status == 200
        for down in (True, False, True, False):
            store.down = down
            await pond.advance(120)  # whatever was remembered of policies is too old by now
            answers = [
                await request(url, "GET", "/readyz"),
                await enqueue(url, "orders"),
                await ask(url, "/v1/queue/receive", queue="orders", count=1, wait_ms=0),
                await ask(url, "/v1/queue/counts", queue="orders"),
                await ask(url, "/v1/queue/stats", queue="orders"),
            ]
            assert [one.status for one in answers] == [503 if down else 200] * len(answers)
            assert (await request(url, "GET", "/healthz")).status == 200
            assert not any(b"secret" in one.body for one in answers)
        assert any(record.message == "millpond.server.store_trouble" for record in caplog.records)
        assert (await scrape(url))['millpond_log_events_total{event="millpond.server.store_trouble"}'] >= 10


async def test_the_figures_of_a_file_are_told(tmp_path: Path) -> None:
    clock = testing.ManualClock()
    store = SqliteStore(tmp_path / "work.db", clock=clock)
    async with testing.pond(store=store, clock=clock) as pond, serving(pond) as service:
        assert (await enqueue(service.server.url, "orders")).status == 200
        told = await scrape(service.server.url)
    assert told["millpond_store_commits_total"] >= 1
    assert told["millpond_store_operations_total"] >= told["millpond_store_commits_total"]
    assert told["millpond_store_largest_commit_operations"] >= 1
    assert told["millpond_store_waiting_operations"] == 0
    assert told["millpond_store_wal_bytes"] > 0
    assert told["millpond_store_commit_seconds_total"] >= 0
    assert {f"millpond_store_{name}" for name in ("busy_errors_total", "lock_wait_seconds_total")} <= set(told)


# Every route


HANDLE: dict[str, Any] = {
    "message_id": "01977420-dc00-7562-9813-410373f1aaca",
    "lease_id": "ab" * 16,
    "fencing_token": 1,
}
FIELDS: dict[str, Any] = {
    **HANDLE,
    "queue": "orders",
    "count": 1,
    "wait_ms": 0,
    "credit": 1,
    "stream_id": "none",
    "message": HANDLE,
    "reason": "x",
    "value": 1,
    "extend_by_ms": 1000,
    "delay_ms": 0,
    "intent": "defer",
    "then": [{"queue": "orders", "message": {"payload": "eA=="}}],
    "limit": 1,
}
ELSEWHERE = {"/healthz", "/readyz", "/v1/openapi.json", "/metrics"}
"""What is asked for otherwise, and tested above."""
STATES = {"/v1/get", "/v1/update", "/v1/remove", "/v1/metadata"}
"""lockd's workflow state, by key."""
WITHOUT_QUEUE = {"/v1/queue/list", "/v1/queue/credit", "/v1/requests"}
"""Routes that name no queue: what they show is judged piece by piece, or wants everything."""


def bodies() -> dict[str, tuple[bytes, str]]:
    """A body for each route that it takes, and its content type."""
    found: dict[str, tuple[bytes, str]] = {}
    for route in native_routes.ROUTES:
        body = {
            field.name: FIELDS.get(field.name)
            for field in msgspec.structs.fields(route.request)
            if field.required or field.name == "queue"
        }
        if "messages" in body:
            body["messages"] = [{"payload": "eA=="} if route.path.endswith("enqueueBatch") else HANDLE]
        if route.path == "/v1/queue/policy":
            body["reset"] = True
        found[route.path] = (json.dumps(body).encode(), "application/json")
    answer = {"queue": "orders", **HANDLE, "meta_etag": "x"}
    dequeue = {"queue": "orders", "owner": "me", "wait_seconds": -1}
    lockd: dict[str, dict[str, Any]] = {
        **{f"/v1/queue/{name}": answer for name in ("ack", "nack")},
        "/v1/queue/extend": {**answer, "extend_by_seconds": 1},
        **{f"/v1/queue/{name}": dequeue for name in ("dequeue", "dequeueWithState", "subscribe", "subscribeWithState")},
        **{f"/v1/queue/{name}": {"queue": "orders"} for name in ("stats", "watch")},
    }
    found |= {path: (json.dumps(body).encode(), "application/json") for path, body in lockd.items()}
    form, headers = enqueue_body("orders")
    found["/v1/queue/enqueue"] = (form, headers["Content-Type"])
    return found


async def test_no_route_does_anything_for_a_stranger_or_for_the_owner_of_another_queue(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    other = make_tokens(path, other="*:default/other *:shop/*")["other"]
    known = bodies()
    async with serving(auth_tokens=str(path)) as service:
        url, pond = service.server.url, pond_of(service)
        await pond.queue("orders").enqueue(b"x")
        left = service.server.app.paths - set(known) - ELSEWHERE - STATES
        assert len(known) > 35
        for route in known.keys() | left | STATES:
            body, kind = known.get(route, (b"{}", "application/json"))
            assert code(await request(url, "POST", route, body, {"Content-Type": kind})) == (401, "unauthorized"), route
        for route in left:  # of lockd's locks, queries and transactions there is nothing to be had
            assert code(await request(url, "POST", route, b"{}", other))[0] == 501, route
        for route in known.keys() | STATES:
            body, kind = known.get(route, (b"{}", "application/json"))
            shown = {**other, "Content-Type": kind, "X-Lease-ID": HANDLE["lease_id"], "X-Fencing-Token": "1"}
            query = f"?key=q/orders/state/{HANDLE['message_id']}" if route in STATES else ""
            answer = await request(url, "POST", route + query, body, shown)
            if route in WITHOUT_QUEUE:
                assert answer.status == 200 or code(answer)[0] in {403, 404}, route
                assert b"orders" not in answer.body
            else:
                assert code(answer) == (403, "forbidden"), (route, answer)
        counts = await pond.queue("orders").counts()
        assert (counts.ready, counts.leased, counts.dead) == (1, 0, 0)
        assert not (await pond.queue("orders").policy()).paused
        assert len(await pond.queues()) == 1
