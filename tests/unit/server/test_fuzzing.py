"""Any bytes and any text before every parser of ours that has no such test beside its own: what it makes of them, or
the one error that it may raise."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from tests.unit.server.raw import Connection

from millpond import InvalidInput, testing
from millpond.client import address, lane
from millpond.errors import Unauthorized
from millpond.server import config, tokens
from millpond.server.auth import Guard, certificate_identity
from millpond.server.config import ServerConfig
from millpond.server.context import Context
from millpond.server.run import Server
from millpond.wire import faults, headers
from millpond.wire.faults import Refusal

fuzzed = hypothesis.settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


def near(*words: str) -> st.SearchStrategy[str]:
    """Text in which such words come up."""
    return st.lists(st.sampled_from(words) | st.text(max_size=4), max_size=12).map("".join)


def outcome(read: Callable[[], Any]) -> Any:
    """What it is read as, or the one error that reading may raise."""
    try:
        return read()
    except InvalidInput as error:
        return error


@fuzzed
@hypothesis.given(text=near("read", "write", "*", ":", "/", ",", "a", "-", "admin", "..", "default"))
def test_grants(text: str) -> None:
    try:
        grant = tokens.parse_grant(text)
    except InvalidInput:
        return
    assert tokens.parse_grant(str(grant)) == grant


TOKENS = near("[[token]]\n", "id = ", '"a1"', "hash = ", "\n", "name = ", "grants = ", "[", "]", '"read:*/*"', "2", "'")


@fuzzed
@hypothesis.given(data=st.binary(max_size=100) | TOKENS.map(str.encode))
def test_files_of_tokens(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "tokens.toml"
    path.write_bytes(data)
    path.chmod(0o600)
    found = outcome(lambda: tokens.load(str(path)))
    assert isinstance(found, list) or str(path) in str(found)


SETTINGS = near(
    "[limit]\n", "[tls]\n", "body", "unsent", "port", "host", "cert", " = ", "\n", '"', "1", "-", "MiB", "x"
)


@fuzzed
@hypothesis.given(data=st.binary(max_size=100) | SETTINGS.map(str.encode))
def test_files_of_settings(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "millpond.toml"
    path.write_bytes(data)
    found = outcome(lambda: config.load({}, {}, str(path)).config)
    assert isinstance(found, ServerConfig) or "\n" not in str(found)


@fuzzed
@hypothesis.given(value=near("1", "0", "MiB", "k", "-", ".", " ", "s", "h", "e9"))
def test_settings_as_text(value: str) -> None:
    for name in ("MILLPOND_SERVE_LIMIT_BODY", "MILLPOND_SERVE_TIMEOUT_IDLE", "MILLPOND_SERVE_PORT"):
        found = outcome(lambda name=name: config.load({}, {name: value}).config)  # type: ignore[misc]
        assert isinstance(found, ServerConfig) or name in str(found)


URI = near(
    "lockd://ns/", "millpond://ns/", "spiffe://", "ALL", "?perm=", "rw", "?scope=", "admin", "[", "%", "a", "&", "/"
)


@fuzzed
@hypothesis.given(uris=st.lists(URI, max_size=3), subject=near("a", ",", "#", "=", "\\"))
def test_claims_of_certificates(uris: list[str], subject: str) -> None:
    found = certificate_identity(
        {
            "subject": ((("commonName", subject),),),
            "serialNumber": "0A",
            "subjectAltName": [("URI", uri) for uri in ("spiffe://x", *uris)],
        }
    )
    guard = Guard(testing.ManualClock(), None, anonymous=False)
    try:
        guard.authorise(found, "admin", "other", "q")
    except Refusal:
        return
    # Nobody becomes an administrator by a slip.
    assert any(uri.startswith("millpond://ns/") and "admin" in uri for uri in uris)


@fuzzed
@hypothesis.given(value=st.binary(max_size=40) | near("Bearer ", "mpt_", "a1", "_", " ", "\x00").map(str.encode))
def test_authorization(value: bytes) -> None:
    guard = Guard(testing.ManualClock(), [], anonymous=False)
    with pytest.raises(Unauthorized):
        guard.authorise(guard.identify({"headers": [(b"authorization", value)]}), "read", "default", "q")


@fuzzed
@hypothesis.given(
    url=near("http://", "https://", "[", "]", "::1", ":", "9341", ",", "?", "token=", "&", "timeout=", "#", "a")
)
def test_addresses_of_servers(url: str) -> None:
    try:
        found = address.parse(url, {})
    except InvalidInput:
        return
    assert all(one.startswith(("http://", "https://")) for one in found.endpoints)


@fuzzed
@hypothesis.given(data=st.binary(max_size=60), status=st.integers(0, 999))
def test_faults(data: bytes, status: int) -> None:
    fault = faults.decode(data)
    if fault is not None:
        assert str(faults.exception(status, fault.error, fault.detail)) is not None


@fuzzed
@hypothesis.given(value=st.none() | st.binary(max_size=200) | st.text(max_size=200))
def test_correlation_ids(value: Any) -> None:
    found = headers.correlation_id(value)
    assert found is None or (0 < len(found) <= 128 and found.isascii() and found.isprintable())


ANSWER = st.lists(
    st.sampled_from(
        [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 C\r\n", b"Content-Length: ", b"2", b"Transfer-Encoding: chunked",
         b"Retry-After: 1", b"\r\n", b"\r\n\r\n", b"ab", b"0", b"Connection: close\r\n", b"-1", b"f" * 20]
    )
    | st.binary(max_size=4),
    max_size=12,
)  # fmt: skip


@fuzzed
@hypothesis.given(pieces=ANSWER, stream=st.booleans())
def test_answers_of_servers(pieces: list[bytes], stream: bool) -> None:
    """An answer, an error, or not enough yet; and never the same of a connection that is to be used again when
    something is left over."""

    class Pipe:
        closed = False

        def write(self, data: bytes) -> None:
            pass

        def abort(self) -> None:
            self.closed = True

        def is_closing(self) -> bool:
            return self.closed

        def pause_reading(self) -> None:
            pass

        resume_reading = pause_reading

    async def run() -> None:
        connection, pipe = lane.Connection(1000), Pipe()
        connection.connection_made(pipe)  # type: ignore[arg-type]
        asked = connection.ask(b"", stream=stream)
        for piece in pieces:
            if pipe.closed:
                break
            connection.data_received(piece)
        if not asked.done():
            connection.connection_lost(None)
        try:
            answer = await asked
        except OSError:
            assert not connection.keep or pipe.closed
            return
        assert 200 <= answer.status <= 999
        assert len(answer.data) <= 1000

    asyncio.run(run())


BODY = b'{"queue":"q","messages":[{"payload":"eA=="}]}'
REQUEST = (
    b"POST /v1/queue/enqueueBatch HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
    % (len(BODY), BODY)
)


def test_a_request_with_a_slip_in_it_is_refused_or_read_and_the_server_goes_on() -> None:
    """Whether its head is known to the server or not: heads that differ in a byte are other heads."""
    cases: list[bytes] = []

    @hypothesis.settings(parent=fuzzed, max_examples=120)
    @hypothesis.given(
        at=st.integers(0, len(REQUEST)), gone=st.integers(0, 3), put=st.binary(max_size=3), again=st.booleans()
    )
    def gather(at: int, gone: int, put: bytes, again: bool) -> None:
        cases.append(REQUEST[:at] + put + REQUEST[at + gone :] + (REQUEST if again else b""))

    gather()

    async def run() -> None:
        async with testing.pond() as pond:
            server = Server(Context(pond, ServerConfig(port=0, shutdown_timeout=0.0, drain_grace=0.0)))
            await server.start()
            try:
                async with Connection(server.url) as connection:
                    for _ in range(2):
                        connection.write(REQUEST)
                        assert (await connection.answer()).status == 200
                assert server.app.heads.known
                for case in cases:
                    async with Connection(server.url) as connection:
                        connection.write(case)
                        connection.writer.write_eof()
                        async with asyncio.timeout(120):
                            said = await connection.reader.read()
                        assert b"HTTP/1.1 5" not in said, (case, said)
                async with Connection(server.url) as connection:
                    connection.write(REQUEST)
                    answer = await connection.answer()
                    assert "receipts" in json.loads(answer.body)
            finally:
                await server.stop()

    asyncio.run(run())
