"""A client of lockd's protocol for the tests: it makes and reads bodies on its own, without the package's framing."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

from tests.unit.server.raw import Answer, Connection, request

from millpond import testing
from millpond.server.config import ServerConfig
from millpond.server.context import Context
from millpond.server.run import running

BOUNDARY = "test-boundary"


class Delivery(NamedTuple):
    """A pair of parts."""

    message: dict[str, Any]
    payload: bytes
    headers: dict[str, str]
    """Of the payload's part."""

    def answer(self, **more: Any) -> dict[str, Any]:
        """The fields of an answer, as lockd's own client sends them."""
        names = ("namespace", "queue", "message_id", "lease_id", "txn_id", "fencing_token", "meta_etag")
        fields = {name: self.message[name] for name in names}
        for name in ("state_lease_id", "state_fencing_token"):
            if name in self.message:
                fields[name] = self.message[name]
        return fields | more


def form(meta: dict[str, Any] | bytes | None, payload: bytes | None, kind: str = "related") -> tuple[bytes, str]:
    """Body and Content-Type of an enqueue."""
    parts = []
    if meta is not None:
        data = meta if isinstance(meta, bytes) else json.dumps(meta).encode()
        parts.append(b'Content-Disposition: form-data; name="meta"\r\nContent-Type: application/json\r\n\r\n' + data)
    if payload is not None:
        parts.append(b'Content-Disposition: form-data; name="payload"\r\n\r\n' + payload)
    mark = b"--" + BOUNDARY.encode()
    body = b"".join(mark + b"\r\n" + part + b"\r\n" for part in parts) + mark + b"--\r\n"
    return body, f"multipart/{kind}; boundary={BOUNDARY}"


def parts_of(answer: Answer) -> list[Delivery]:
    """The deliveries in a whole answer, cut by the boundary and checked line by line."""
    kind, _, boundary = answer.headers["content-type"].partition("; boundary=")
    assert kind == "multipart/related"
    mark = b"--" + boundary.encode()
    assert answer.body.startswith(mark + b"\r\n")
    assert answer.body.endswith(b"\r\n" + mark + b"--\r\n")
    raw = (b"\r\n" + answer.body).split(b"\r\n" + mark)
    assert raw[0] == b""
    assert raw[-1] == b"--\r\n"
    pieces = [_part(piece) for piece in raw[1:-1]]
    assert len(pieces) % 2 == 0
    return [_pair(*pieces[at], *pieces[at + 1]) for at in range(0, len(pieces), 2)]


def _part(piece: bytes) -> tuple[dict[str, str], bytes]:
    head, _, body = piece.removeprefix(b"\r\n").partition(b"\r\n\r\n")
    return dict(line.split(": ", 1) for line in head.decode().split("\r\n")), body


def _pair(meta_head: dict[str, str], meta: bytes, payload_head: dict[str, str], payload: bytes) -> Delivery:
    assert meta_head["Content-Disposition"].startswith('form-data; name="meta"')
    assert meta_head["Content-Type"] == "application/json"
    assert meta.endswith(b"\n")
    assert payload_head["Content-Disposition"].startswith('form-data; name="payload"')
    assert int(payload_head["Content-Length"]) == len(payload)
    return Delivery(json.loads(meta)["message"], payload, payload_head)


class Client:
    """Calls on a server, each on a connection of its own."""

    def __init__(self, url: str, pond: testing.TestPond, context: Context) -> None:
        self.url = url
        self.pond = pond
        self.context = context

    async def post(self, path: str, body: Any = None, **headers: str) -> Answer:
        """A JSON body, or bytes as they are; headers with _ for -."""
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await request(self.url, "POST", path, data, named)

    async def enqueue(self, queue: str, payload: bytes | None, correlation: str = "", **meta: Any) -> dict[str, Any]:
        """A message; the answer's body."""
        body, kind = form({"queue": queue, **meta}, payload)
        headers = {"Content-Type": kind}
        if correlation:
            headers["X-Correlation-Id"] = correlation
        answer = await request(self.url, "POST", "/v1/queue/enqueue", body, headers)
        assert answer.status == 200, answer
        result: dict[str, Any] = json.loads(answer.body)
        return result

    async def dequeue(self, queue: str, route: str = "dequeue", **fields: Any) -> list[Delivery]:
        """Messages that are there."""
        body = {"queue": queue, "owner": "me", "wait_seconds": -1, **fields}
        answer = await self.post(f"/v1/queue/{route}", body)
        assert answer.status == 200, answer
        return parts_of(answer)

    async def ack(self, delivery: Delivery) -> None:
        """Done with it."""
        answer = await self.post("/v1/queue/ack", delivery.answer())
        assert answer.status == 200, answer


@contextlib.asynccontextmanager
async def serving(config: ServerConfig | None = None, pond: testing.TestPond | None = None) -> AsyncIterator[Client]:
    """A server on a pond in memory, under a clock that stands still."""
    async with pond or testing.pond() as opened:
        context = Context(opened, config or ServerConfig(port=0, drain_grace=0.0, shutdown_timeout=1.0))
        async with running(opened, context=context) as url:
            yield Client(url, opened, context)


def error_of(answer: Answer) -> tuple[int, str]:
    """Status and code of a refusal, whose form is checked."""
    body = json.loads(answer.body)
    assert set(body) <= {
        *("error", "detail", "leader_endpoint", "current_version", "current_etag", "retry_after_seconds")
    }
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-correlation-id"]
    assert answer.headers.get("retry-after") == (
        str(body["retry_after_seconds"]) if "retry_after_seconds" in body else None
    )
    return answer.status, body["error"]


async def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Let the loop run until it holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


__all__ = ["BOUNDARY", "Client", "Connection", "Delivery", "error_of", "form", "parts_of", "serving", "until"]
