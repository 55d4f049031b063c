"""What has begun does not outlive the right to it: streams and waits whose token or certificate is good no more."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop
from tests.unit.server.certificates import Authority, write
from tests.unit.server.lockd import until
from tests.unit.server.native import JSON, leased
from tests.unit.server.raw import Connection
from tests.unit.server.test_process import Secure, pond_of, secure, serving, tls_settings

from millpond.model.durations import format_duration
from millpond.server import receiving, tokens
from millpond.server.auth import certificate_identity
from millpond.server.process import Service
from millpond.server.reload import EVERY
from millpond.server.tokens import Token

__all__ = ["secure"]


@pytest.fixture(scope="module")
def ca() -> Authority:
    return Authority()


class Rights:
    """A file of tokens, one of which is the client's."""

    def __init__(self, path: Path, grant: str = "*:*/*", expires_at: int | None = None) -> None:
        self.path = path
        self.entry, text = self._made(grant, expires_at)
        self.header = {"Authorization": f"Bearer {text}"}
        self.write(self.entry)

    @staticmethod
    def _made(grant: str, expires_at: int | None = None) -> tuple[Token, str]:
        grants = [tokens.parse_grant(grant)]
        return tokens.create("worker", grants, random_bytes=os.urandom, now=0, expires_at=expires_at)

    def write(self, *entries: Token) -> None:
        tokens.save(str(self.path), entries)

    def revoke(self) -> None:
        self.write()

    def reduce(self) -> None:
        self.write(self.entry._replace(grants=(tokens.parse_grant("read,write,consume,admin:*/other"),)))

    def replace(self) -> None:
        """Another token with the same id, as somebody might write it by hand."""
        self.write(self._made("*:*/*")[0]._replace(id=self.entry.id))

    def touch(self) -> None:
        """One more token; the client's stays what it was."""
        self.write(self.entry, self._made("read:*/*")[0])


WAYS = {
    "revoked": (Rights.revoke, "unauthorized"),
    "reduced": (Rights.reduce, "forbidden"),
    "replaced": (Rights.replace, "unauthorized"),
}
ways = pytest.mark.parametrize(("change", "code"), WAYS.values(), ids=WAYS.keys())
Change = Callable[[Rights], None]


async def reload(service: Service) -> None:
    """The file is read again."""
    await pond_of(service).advance(EVERY)


async def present(service: Service) -> None:
    """Return when somebody waits or streams."""
    await until(lambda: service.context._rights_change)


async def open_stream(connection: Connection, path: str, headers: dict[str, str], **body: Any) -> None:
    await connection.send("POST", path, json.dumps({"queue": "q", **body}).encode(), JSON | headers)


async def lines(connection: Connection, count: int) -> list[dict[str, Any]]:
    """The next frames of a stream in JSON lines, one a chunk."""
    async with asyncio.timeout(60):
        return [json.loads(await connection.chunk()) for _ in range(count)]


# Millpond's own streams


@ways
@pytest.mark.parametrize("credit", [10, 1], ids=["waiting", "out of credit"])
async def test_a_stream_ends_with_its_token_and_gives_back_what_was_not_answered(
    tmp_path: Path, change: Change, code: str, credit: int
) -> None:
    rights = Rights(tmp_path / "tokens.toml")
    async with serving(auth_tokens=str(rights.path)) as service, Connection(service.server.url) as connection:
        pond = pond_of(service)
        await pond.queue("q").enqueue(b"1", visibility=3600)
        wish = {"Accept": "application/x-ndjson"} | rights.header
        await open_stream(connection, "/v1/queue/stream", wish, credit=credit, heartbeat_ms=600_000)
        await connection.head()
        frames = await lines(connection, 2)
        assert [frame["type"] for frame in frames] == ["hello", "messages"]
        rights.touch()
        await reload(service)
        await pond.queue("q").enqueue(b"2", priority=0)
        assert service.guard.refused == 0
        if credit > 1:
            [more] = await lines(connection, 1)
            assert more["type"] == "messages"
        change(rights)
        await reload(service)
        [end] = await lines(connection, 1)
        assert (end["type"], end["reason"]) == ("end", code)
        assert end["detail"]
        assert not await connection.chunk()
        await leased(pond, "q", 0)
        [message] = await pond.queue("q").receive()
        assert (message.payload, message.attempts, message.failures) == (b"1", 2, 0)
        await until(lambda: not service.context._rights_change)


async def test_a_stream_ends_when_its_token_expires_however_late_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "LONGEST_TIMER", 40.0)
    now = 1_750_000_000_000  # where the clock of tests begins
    lasts = 3 * 40.0 + 5
    rights = Rights(tmp_path / "tokens.toml", expires_at=now + round(lasts * 1000))
    async with serving(auth_tokens=str(rights.path)) as service, Connection(service.server.url) as connection:
        pond = pond_of(service)
        assert pond.clock.now_ms() == now
        wish = {"Accept": "application/x-ndjson"} | rights.header
        await open_stream(connection, "/v1/queue/stream", wish, credit=1, heartbeat_ms=20_000)
        await connection.head()
        await lines(connection, 1)
        kinds: list[str] = []
        while pond.clock.now_ms() < now + lasts * 1000 - 2000:
            left = (now + lasts * 1000 - pond.clock.now_ms()) / 1000
            await pond.advance(min(20, left - 1))
            kinds += [frame["type"] for frame in await lines(connection, 1)] if left > 21 else []
        assert set(kinds) == {"heartbeat"}, format_duration(lasts)
        await present(service)
        await pond.advance(2)
        [end] = await lines(connection, 1)
        assert (end["type"], end["reason"]) == ("end", "unauthorized")


# Waits


@ways
@pytest.mark.parametrize("route", ["receive", "dequeue", "dequeueWithState", "subscribe"])
async def test_a_wait_ends_with_its_token_and_takes_nothing(
    tmp_path: Path, change: Change, code: str, route: str
) -> None:
    rights = Rights(tmp_path / "tokens.toml")
    body: dict[str, Any] = {"wait_ms": 3_600_000} if route == "receive" else {"owner": "me"}
    async with serving(auth_tokens=str(rights.path)) as service, Connection(service.server.url) as connection:
        pond = pond_of(service)
        await open_stream(connection, f"/v1/queue/{route}", rights.header, **body)
        await present(service)
        rights.touch()
        await reload(service)
        await until(lambda: pond.dispatcher.waiting == 1)
        change(rights)
        await reload(service)
        answer = await asyncio.wait_for(connection.answer(), 60)
        assert (answer.status, json.loads(answer.body)["error"]) == ({"forbidden": 403}.get(code, 401), code)
        await pond.queue("q").enqueue(b"1")
        await pond.settle()
        counts = await pond.queue("q").counts()
        assert (counts.ready, counts.leased) == (1, 0)


async def test_a_message_that_comes_together_with_the_revocation_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rights = Rights(tmp_path / "tokens.toml")
    async with serving(auth_tokens=str(rights.path)) as service, Connection(service.server.url) as connection:
        pond = pond_of(service)
        claim = pond.service.claim

        async def late(*arguments: Any, **options: Any) -> Any:
            found = await claim(*arguments, **options)
            if found:
                rights.revoke()
                service.reload()
            return found

        await open_stream(connection, "/v1/queue/receive", rights.header, wait_ms=3_600_000)
        await present(service)
        monkeypatch.setattr(pond.service, "claim", late)
        await pond.queue("q").enqueue(b"1")
        assert (await asyncio.wait_for(connection.answer(), 60)).status == 401
        monkeypatch.undo()
        await leased(pond, "q", 0)
        [message] = await pond.queue("q").receive()
        assert message.failures == 0


# lockd's streams


@ways
async def test_a_subscription_breaks_off_and_gives_back_what_was_not_answered(
    tmp_path: Path, change: Change, code: str
) -> None:
    rights = Rights(tmp_path / "tokens.toml")
    async with serving(auth_tokens=str(rights.path)) as service, Connection(service.server.url) as connection:
        pond, url = pond_of(service), service.server.url
        await pond.queue("q").enqueue_many([b"1", b"2"], visibility=3600)
        await open_stream(connection, "/v1/queue/subscribe", rights.header, owner="me")
        await connection.head()
        found = b""
        while found.count(b'"message_id"') < 2:
            found += await asyncio.wait_for(connection.chunk(), 60)
        meta = [json.loads(line) for line in found.splitlines() if line.startswith(b'{"message"')]
        done = {name: meta[0]["message"][name] for name in ("queue", "message_id", "lease_id", "fencing_token")}
        async with Connection(url) as other:
            await other.send("POST", "/v1/queue/ack", json.dumps(done).encode(), rights.header)
            assert (await other.answer()).status == 200
        await present(service)
        change(rights)
        await reload(service)
        with pytest.raises((asyncio.IncompleteReadError, ValueError, ConnectionError)):
            await asyncio.wait_for(connection.rest(), 60)  # no last chunk: this is not the end that was meant
        await leased(pond, "q", 0)
        [message] = await pond.queue("q").receive(5)
        assert (message.payload, message.failures) == (b"2", 0)


async def test_what_is_remembered_of_a_subscription_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from millpond.server import subscribe

    monkeypatch.setattr(subscribe, "REMEMBERED", 8)
    async with serving() as service:
        pond, context = pond_of(service), service.context
        sent = subscribe._Sent(context)
        await pond.queue("q").enqueue_many([b"x"] * 100)
        for number in range(100):
            [delivery] = await pond.service.claim("default", "q", 1)
            context.held.keep(delivery)
            sent.add(delivery)
            if number:
                await pond.service.ack(delivery)
                context.held.drop(delivery)
            assert len(sent._deliveries) <= 8
        assert len(sent.unanswered()) == 1


@ways
async def test_a_watch_ends_with_an_event_that_says_why(tmp_path: Path, change: Change, code: str) -> None:
    rights = Rights(tmp_path / "tokens.toml")
    async with serving(auth_tokens=str(rights.path)) as service, Connection(service.server.url) as connection:
        await open_stream(connection, "/v1/queue/watch", rights.header)
        await connection.head()
        assert b"queue_watch" in await connection.chunk()
        rights.touch()
        await reload(service)
        change(rights)
        await reload(service)
        event = await asyncio.wait_for(connection.chunk(), 60)
        first, data, *_ = event.split(b"\n")
        assert first == b"event: error"
        assert json.loads(data.removeprefix(b"data: "))["error"] == code
        assert not await connection.chunk()


# Producers


async def test_a_payload_whose_producer_was_shut_out_meanwhile_is_not_kept(tmp_path: Path) -> None:
    rights = Rights(tmp_path / "tokens.toml")
    async with serving(auth_tokens=str(rights.path)) as service, Connection(service.server.url) as connection:
        head = (
            b'--b\r\nContent-Disposition: form-data; name="meta"\r\n\r\n{"queue":"q"}\r\n'
            b'--b\r\nContent-Disposition: form-data; name="payload"\r\n\r\n'
        )
        fields = "\r\n".join(f"{name}: {value}" for name, value in rights.header.items())
        connection.write(
            b"POST /v1/queue/enqueue HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/related; boundary=b\r\n"
            b"Transfer-Encoding: chunked\r\n%b\r\n\r\n" % fields.encode()
        )
        connection.write(b"%x\r\n%b\r\n" % (len(head), head))
        await until(lambda: service.server._state.tasks)
        await until(lambda: service.context.quota._known)  # it was let in, and is being read
        rights.revoke()
        await reload(service)
        rest = b"payload\r\n--b--\r\n"
        connection.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(rest), rest))
        assert (await asyncio.wait_for(connection.answer(), 60)).status == 401
        assert await pond_of(service).queues() == []


# Certificates


async def test_streams_by_certificate_end_when_their_ca_is_gone_and_not_before(secure: Secure, tmp_path: Path) -> None:
    own = secure.client(secure.ca.client("spiffe://x", "lockd://ns/ALL"))
    async with serving(**tls_settings(tmp_path)) as service, Connection(service.server.url, tls=own) as connection:
        pond = pond_of(service)
        await pond.queue("q").enqueue(b"1", visibility=3600)
        wish = {"Accept": "application/x-ndjson"}
        await open_stream(connection, "/v1/queue/stream", wish, credit=10, heartbeat_ms=600_000)
        await connection.head()
        assert [frame["type"] for frame in await lines(connection, 2)] == ["hello", "messages"]
        # A new certificate of the server's own, a further CA, the end of that one: nothing to do with this client.
        other = Authority("another")
        cert, key = secure.ca.server()
        for authorities in (secure.ca.pem, secure.ca.pem + other.pem, secure.ca.pem):
            write(tmp_path, cert=cert, key=key, ca=authorities)
            service.reload()
            await pond.settle()
            assert len(service.context.streams) == 1
        write(tmp_path, ca=other.pem)
        service.reload()
        [end] = await lines(connection, 1)
        assert (end["type"], end["reason"]) == ("end", "unauthorized")
        assert "CA" in end["detail"]
        await leased(pond, "q", 0)


async def test_streams_by_certificate_end_when_it_expires(secure: Secure, tmp_path: Path) -> None:
    own = secure.client(secure.ca.client("spiffe://x", "lockd://ns/ALL"))
    async with serving(**tls_settings(tmp_path)) as service, Connection(service.server.url, tls=own) as connection:
        pond = pond_of(service)
        await open_stream(connection, "/v1/queue/receive", {}, wait_ms=3_600_000)
        await present(service)
        [kept] = service.server.watch.connections
        assert kept._peer is not None
        assert kept._peer.expires_at is not None
        pond.manual_clock.jump((kept._peer.expires_at - pond.clock.now_ms()) / 1000)
        service.context.rights_changed()
        answer = await asyncio.wait_for(connection.answer(), 60)
        assert (answer.status, json.loads(answer.body)["error"]) == (401, "unauthorized")
        # Nor does the connection open anything more.
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await open_stream(connection, "/v1/queue/list", {})
            assert (await connection.answer()).status == 401


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("behind", [False, True], ids=["alone", "with a request behind it"])
def test_a_client_that_leaves_is_noticed_by_tls_on_each_event_loop(
    secure: Secure, tmp_path: Path, loop: Callable[[], asyncio.AbstractEventLoop], behind: bool
) -> None:
    own = secure.client(secure.ca.client("spiffe://x", "lockd://ns/ALL"))

    async def leave() -> None:
        async with serving(**tls_settings(tmp_path)) as service, Connection(service.server.url, tls=own) as connection:
            pond = pond_of(service)
            await open_stream(connection, "/v1/queue/receive", {}, wait_ms=3_600_000)
            await until(lambda: pond.dispatcher.waiting)
            [one] = service.server.watch.connections
            if behind:
                await open_stream(connection, "/v1/queue/receive", {}, wait_ms=3_600_000)
                await until(lambda: one.pipeline)
            connection.writer.close()
            await until(lambda: not pond.dispatcher.waiting and not one.tasks)
            await pond.queue("q").enqueue(b"1")
            await pond.settle()
            assert (await pond.queue("q").counts()).leased == 0

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(leave())


def test_when_a_certificate_ends() -> None:
    identity = certificate_identity({"serialNumber": "1", "notAfter": "Jan  1 00:00:00 2030 GMT"})
    assert identity.expires_at == 1_893_456_000_000
    assert certificate_identity({"serialNumber": "1"}).expires_at is None
