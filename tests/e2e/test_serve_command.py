"""`millpond serve` as a process: it starts, refuses, drains, reloads, and several of them share a store."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tests.unit.server.certificates import Authority, write

import millpond

LIMIT = 60.0
"""Seconds for anything to happen on the busiest machine; nothing waits for it."""


class Served:
    """A server process."""

    def __init__(self, folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.log = folder / f"server-{len(list(folder.glob('server-*')))}.log"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("MILLPOND_")}
        clean["PYTHONPATH"] = str(Path(millpond.__file__).parents[1])
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "millpond", "serve", "--port", "0", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=output,
                cwd=folder,
                env={**clean, **(environment or {})},
                start_new_session=True,
            )
        self.until(lambda: self._url() or self.process.poll() is not None)
        self.url = self._url()

    def _url(self) -> str:
        found = re.search(r"\bmillpond\.server\.listening\b.*\burl\W+(http\S+?)[\"\s]", self.text())
        return found[1] if found else ""

    def text(self) -> str:
        """What it wrote to stderr."""
        return self.log.read_text("utf-8", "replace")

    def events(self) -> list[dict[str, Any]]:
        """What it logged."""
        return [json.loads(line) for line in self.text().splitlines() if line.startswith("{")]

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait for a condition of this process."""
        end = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < end, f"nothing happened:\n{self.text()}"
            time.sleep(0.01)

    def logged(self, event: str, number: int = 1) -> None:
        """Wait for an event."""
        self.until(lambda: sum(entry["event"] == event for entry in self.events()) >= number)

    def connection(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        return http.client.HTTPConnection(parts.hostname, parts.port, timeout=LIMIT)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, Any]]:
        """Status and body of an answer."""
        with contextlib.closing(self.connection()) as connection:
            return ask(connection, method, path, body, **headers)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Its exit code."""
        return self.process.wait(LIMIT)


def ask(
    connection: http.client.HTTPConnection, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, Any]]:
    connection.request(
        method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json", **headers}
    )
    answer = connection.getresponse()
    data = answer.read()
    return answer.status, json.loads(data) if data else {}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def start(*arguments: str, **more: Any) -> Served:
        started.append(Served(tmp_path, *arguments, **more))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


def batch(count: int, queue: str = "q") -> dict[str, Any]:
    return {"queue": queue, "messages": [{"payload": "eA=="} for _ in range(count)]}


def test_it_serves_drains_on_sigterm_and_ends_with_0(serve: Callable[..., Served]) -> None:
    server = serve("--store", "sqlite:///work.db", "--timeout-drain", "30s", "--no-log-access")
    assert server.ask("GET", "/readyz")[0] == 200
    assert server.ask("POST", "/v1/queue/enqueueBatch", batch(2))[0] == 200
    with contextlib.closing(server.connection()) as consumer, contextlib.closing(server.connection()) as waiting:
        status, taken = ask(consumer, "POST", "/v1/queue/receive", {"queue": "q", "count": 1, "wait_ms": 0})
        assert (status, len(taken["messages"])) == (200, 1)
        found: list[tuple[int, dict[str, Any]]] = []
        wait = {"queue": "empty", "count": 1, "wait_ms": 50_000}
        thread = threading.Thread(target=lambda: found.append(ask(waiting, "POST", "/v1/queue/receive", wait)))
        thread.start()
        server.until(lambda: b"millpond_consumers_waiting 1.0" in scrape(server))
        server.signal(signal.SIGTERM)
        thread.join(LIMIT)
        # Who waits is sent away at once; who holds a message may answer; nobody is given more, and readyz says so.
        assert (found[0][0], found[0][1].get("error")) in {(503, "shutdown_draining"), (200, None)}
        status, body = server.ask("GET", "/readyz")
        assert (status, body["error"]) == (503, "shutdown_draining")
        more = ask(consumer, "POST", "/v1/queue/receive", {"queue": "q", "count": 1, "wait_ms": 0})
        assert (more[0], more[1]["error"]) == (503, "shutdown_draining")
        [message] = taken["messages"]
        handle = {name: message[name] for name in ("message_id", "lease_id", "fencing_token")}
        status, acked = ask(consumer, "POST", "/v1/queue/ackBatch", {"queue": "q", "messages": [handle]})
        assert (status, acked["results"][0].get("error")) == (200, None)
    assert server.wait() == 0
    events = [entry["event"] for entry in server.events()]
    assert events[:2] == ["millpond.server.starting", "millpond.server.listening"]
    assert events[-2:] == ["millpond.server.draining", "millpond.server.stopped"]
    assert len(events) == len(server.text().splitlines()), "not every line is JSON"
    with millpond.connect_sync(f"sqlite:///{server.folder}/work.db") as pond:
        assert pond.queue("q").counts().ready == 1


def scrape(server: Served) -> bytes:
    with contextlib.closing(server.connection()) as connection:
        connection.request("GET", "/metrics")
        return connection.getresponse().read()


@pytest.mark.parametrize(("second", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_it_at_once(serve: Callable[..., Served], second: int, code: int) -> None:
    server = serve("--store", "memory://", "--timeout-drain", "1h", "--timeout-shutdown", "1h")
    server.ask("POST", "/v1/queue/enqueueBatch", batch(1))
    with contextlib.closing(server.connection()) as consumer:
        ask(consumer, "POST", "/v1/queue/receive", {"queue": "q", "count": 1, "wait_ms": 0})
        server.signal(signal.SIGTERM)
        server.logged("millpond.server.draining")
        server.signal(second)
        assert server.wait() == code
    server.logged("millpond.server.killed")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--host", "0.0.0.0", "--store", "memory://"], 2, "refusing to listen on 0.0.0.0 without TLS"),
        (["--auth-tokens", "none.toml", "--store", "memory://"], 2, "tokens file none.toml cannot be read"),
        (["--tls-cert", "none.pem", "--store", "memory://"], 2, "none.pem cannot be read"),
        (["--store", "sqlite:///no/such/folder/work.db"], 1, "there is no directory"),
    ],
)
def test_what_cannot_be_ends_it_with_one_line_that_says_why(
    serve: Callable[..., Served], arguments: list[str], code: int, said: str
) -> None:
    server = serve(*arguments)
    assert server.wait() == code
    [line] = [line for line in server.text().splitlines() if line.startswith("millpond: error: ")]
    assert said in line
    assert "Traceback" not in server.text()


def test_an_address_that_is_taken_is_told(serve: Callable[..., Served]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = serve("--store", "memory://", "--port", str(port))
        assert server.wait() == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in server.text()


def test_two_servers_on_one_file_share_its_messages_and_lose_nothing(serve: Callable[..., Served]) -> None:
    one, two = serve("--store", "sqlite:///work.db"), serve("--store", "sqlite:///work.db")
    found: list[tuple[int, dict[str, Any]]] = []

    def receive() -> None:
        found.append(two.ask("POST", "/v1/queue/receive", {"queue": "q", "count": 100, "wait_ms": 50_000}))

    thread = threading.Thread(target=receive)
    thread.start()
    two.until(lambda: b"millpond_consumers_waiting 1.0" in scrape(two))
    assert one.ask("POST", "/v1/queue/enqueueBatch", batch(20))[0] == 200
    thread.join(LIMIT)
    seen = [message["message_id"] for message in found[0][1]["messages"]]
    for server in (one, two) * 3:
        _, answer = server.ask("POST", "/v1/queue/receive", {"queue": "q", "count": 100, "wait_ms": 0})
        seen += [message["message_id"] for message in answer["messages"]]
    assert len(seen) == len(set(seen)) == 20
    # What one delivered the other may answer for.
    message = found[0][1]["messages"][0]
    handle = {name: message[name] for name in ("message_id", "lease_id", "fencing_token")}
    _, answer = one.ask("POST", "/v1/queue/ackBatch", {"queue": "q", "messages": [handle]})
    assert answer["results"][0].get("error") is None
    one.signal(signal.SIGKILL)
    one.wait()
    assert two.ask("POST", "/v1/queue/counts", {"queue": "q"})[1]["leased"] == 19


def token(folder: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "millpond", "token", *arguments, "--json"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(millpond.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    made: dict[str, Any] = json.loads(done.stdout) if done.stdout else {}
    return made


def test_tls_tokens_and_sighup_and_no_secret_in_any_log(serve: Callable[..., Served], tmp_path: Path) -> None:
    ca = Authority()
    cert, key = ca.server()
    write(tmp_path, server=cert + key)
    made = token(tmp_path, "create", "ci", "write,read:default/*", "--expires-in", "1d")
    server = serve(
        *("--host", "127.0.0.1", "--tls-cert", "server.pem", "--auth-tokens", "tokens.toml", "--log-access"),
        *("--log-level", "debug", "--log-audit", "audit.log", "--store", "sqlite:///work.db?busy_timeout=5"),
    )
    parts = urlsplit(server.url)
    assert (parts.scheme, oct((tmp_path / "tokens.toml").stat().st_mode & 0o777)) == ("https", "0o600")
    assert parts.hostname is not None
    context = ssl.create_default_context(cadata=ca.pem)
    wrong = made["token"][:-4] + "AAAA"

    def put(shown: str) -> int:
        connection = http.client.HTTPSConnection(parts.hostname or "", parts.port, context=context, timeout=LIMIT)
        with contextlib.closing(connection):
            return ask(connection, "POST", "/v1/queue/enqueueBatch", batch(1), Authorization=f"Bearer {shown}")[0]

    assert (put(made["token"]), put(wrong)) == (200, 401)
    token(tmp_path, "revoke", made["id"])
    server.signal(signal.SIGHUP)
    server.logged("millpond.server.reloaded", 2)  # tokens and certificates
    assert put(made["token"]) == 401
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    written = server.text() + (tmp_path / "audit.log").read_text() + (tmp_path / "tokens.toml").read_text()
    for secret in (made["token"], wrong):
        assert secret.split("_", 2)[2] not in written
    assert "PRIVATE KEY" not in written
    reasons = [entry["reason"] for entry in server.events() if entry["event"] == "millpond.auth.refused"]
    assert reasons == ["wrong secret", "unknown"]
    requests = [entry for entry in server.events() if entry["event"] == "millpond.server.request"]
    assert [(entry["identity"], entry["status"]) for entry in requests] == [("ci", 200), ("", 401), ("", 401)]
    assert all(entry["correlation_id"] and entry["client"] == "127.0.0.1" for entry in requests)


def test_what_a_url_holds_is_not_told(serve: Callable[..., Served]) -> None:
    server = serve("--store", "s3://bucket/jobs?region=eu-central-1&secret_access_key=hunter2", "--log-level", "debug")
    assert server.wait() in {1, 2}
    assert "hunter2" not in server.text()
    assert "millpond: error:" in server.text()


def test_text_is_for_people_and_the_root_logger_is_left_alone(serve: Callable[..., Served]) -> None:
    server = serve("--store", "memory://", "--log-format", "text", "--log-access")
    server.ask("GET", "/nothing%0anew", None, **{"X-Correlation-Id": "mine"})
    server.signal(signal.SIGINT)
    assert server.wait() == 0
    assert server.events() == []
    [line] = [line for line in server.text().splitlines() if "millpond.server.request" in line]
    assert re.fullmatch(r"\S+Z INFO +millpond\.server\.request .*status=404 .*correlation_id=mine", line)
    assert "route=/nothing%0anew" in line
