"""Millpond's own routes as a test calls them: in JSON or MessagePack, and streams frame by frame."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
from tests.unit.server.raw import Answer, Connection, request

from millpond.pond import Pond
from millpond.server.config import ServerConfig
from millpond.server.context import Context
from millpond.testing import TestPond
from millpond.wire import native

JSON = {"Content-Type": "application/json"}
MSGPACK = {"Content-Type": "application/msgpack"}


def server(pond: Pond, **more: Any) -> Context:
    """The context of a server on a free port."""
    return Context(pond, ServerConfig(port=0, shutdown_timeout=1.0, drain_grace=0.0), **more)


class Reply(NamedTuple):
    """Status and decoded body."""

    status: int
    body: Any
    headers: dict[str, str]

    @property
    def code(self) -> str:
        """Of an error."""
        code: str = self.body["error"]
        return code


def decoded(answer: Answer) -> Reply:
    """The answer with its body as what its content type says."""
    kind = answer.headers.get("content-type")
    body: Any = answer.body
    if kind == "application/json":
        body = json.loads(answer.body)
    elif kind == "application/msgpack":
        body = msgspec.msgpack.decode(answer.body)
    return Reply(answer.status, body, answer.headers)


async def ask(url: str, path: str, body: Any, *, packed: bool = False) -> Reply:
    """One request to ``/v1/<path>``."""
    data = msgspec.msgpack.encode(body) if packed else msgspec.json.encode(body)
    return decoded(await request(url, "POST", f"/v1/{path}", data, MSGPACK if packed else JSON))


async def done(url: str, path: str, body: Any, *, packed: bool = False) -> Any:
    """The body of an answer that must be a success."""
    reply = await ask(url, path, body, packed=packed)
    assert reply.status == 200, reply
    return reply.body


def text(data: bytes) -> str:
    """Bytes as JSON carries them."""
    return base64.b64encode(data).decode()


def handle(message: dict[str, Any]) -> dict[str, Any]:
    """What an answer names."""
    return {name: message[name] for name in ("message_id", "lease_id", "fencing_token")}


class Stream:
    """An open stream; ``async with`` it."""

    def __init__(self, url: str, lines: bool = False, **wishes: Any) -> None:
        self._connection = Connection(url)
        self._wishes = {"queue": "q", "credit": 10} | wishes
        self._lines = lines
        self._data = b""
        self.hello: dict[str, Any] = {}

    async def __aenter__(self) -> Stream:
        await self._connection.__aenter__()
        accept = {"Accept": "application/x-ndjson"} if self._lines else {}
        await self._connection.send("POST", "/v1/queue/stream", json.dumps(self._wishes).encode(), JSON | accept)
        status, self.headers = await self._connection.head()
        assert status == 200, await self._connection.rest()
        self.hello = await self.frame()
        assert self.hello["type"] == "hello"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._connection.writer.close()

    async def frame(self) -> dict[str, Any]:
        """The next frame; fails after a while without one."""
        return await asyncio.wait_for(self._frame(), 60)

    async def _frame(self) -> dict[str, Any]:
        while True:
            if self._lines:
                line, newline, rest = self._data.partition(b"\n")
                if newline:
                    self._data = rest
                    return dict(json.loads(line))
            elif len(self._data) >= native.FRAME_HEADER:
                end = native.FRAME_HEADER + int.from_bytes(self._data[: native.FRAME_HEADER])
                if len(self._data) >= end:
                    frame, self._data = self._data[native.FRAME_HEADER : end], self._data[end:]
                    return dict(msgspec.msgpack.decode(frame))
            chunk = await self._connection.chunk()
            assert chunk, "the stream ended without a last frame"
            self._data += chunk

    async def messages(self, count: int = 1) -> list[dict[str, Any]]:
        """So many messages, in however many frames."""
        found: list[dict[str, Any]] = []
        while len(found) < count:
            frame = await self.frame()
            assert frame["type"] == "messages", frame
            found += frame["messages"]
        assert len(found) == count
        return found

    async def over(self) -> bool:
        """Whether the body ends here."""
        return not self._data and not await asyncio.wait_for(self._connection.chunk(), 60)

    def close(self) -> None:
        """Go away without a word."""
        self._connection.writer.transport.abort()


async def until(condition: Callable[[], Any], what: str = "the condition") -> None:
    """Return when it holds; the server and the test share an event loop."""
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"{what} did not come about")


async def leased(pond: TestPond, queue: str, count: int) -> None:
    """Return when so many of the queue's messages are held."""
    for _ in range(2000):
        if (await pond.queue(queue).counts()).leased == count:
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"never were {count} messages held")
