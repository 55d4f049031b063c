"""A server that says what the test tells it to: real sockets, no Millpond."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec


class Asked(NamedTuple):
    """A request as it came."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def data(self) -> Any:
        return msgspec.msgpack.decode(self.body)


class Say(NamedTuple):
    """An answer."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = MappingProxyType({})


class Drop(NamedTuple):
    """No answer: the connection ends, after so many bytes of one. Or does not."""

    after: bytes = b""
    close: bool = True


Script = Callable[[Asked], Awaitable[Say | Drop]]


def packed(value: Any) -> Say:
    return Say(msgspec.msgpack.encode(value))


def fault(status: int, code: str, detail: str = "", **headers: str) -> Say:
    return Say(msgspec.json.encode({"error": code, "detail": detail}), status, headers)


class Fake:
    """The server; `script` answers each request but ``/healthz``."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.asked: list[Asked] = []
        self.connections = 0
        self.open = 0
        self.port = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._writers.add(writer)
        self.connections += 1
        self.open += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                path = head[0].split(" ")[1]
                headers = {
                    name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)
                }
                asked = Asked(path, headers, await self._body(reader, headers))
                if path == "/healthz":
                    said: Say | Drop = Say()
                else:
                    self.asked.append(asked)
                    said = await self.script(asked)
                if isinstance(said, Drop):
                    writer.write(said.after)
                    if said.close:
                        return
                    continue
                lines = [f"HTTP/1.1 {said.status} .", f"Content-Length: {len(said.body)}"]
                lines += [f"{name.replace('_', '-')}: {value}" for name, value in said.headers.items()]
                writer.write("\r\n".join([*lines, "", ""]).encode() + said.body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, ValueError, asyncio.CancelledError):
            pass  # the client went away, or the test is over
        finally:
            self.open -= 1
            self._writers.discard(writer)
            writer.close()

    @staticmethod
    async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") != "chunked":
            return await reader.readexactly(int(headers.get("content-length", "0")))
        parts = []
        while True:
            size = int(await reader.readline(), 16)
            parts.append(await reader.readexactly(size))
            await reader.readexactly(2)
            if not size:
                return b"".join(parts)


@asynccontextmanager
async def fake(script: Script) -> AsyncIterator[Fake]:
    server = Fake(script)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
