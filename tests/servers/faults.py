"""A proxy before a server that does to chosen requests what networks and busy clouds do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple


class Request(NamedTuple):
    """A request as the proxy saw it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Fault(NamedTuple):
    """What becomes of a request."""

    forward: bool
    """The server gets it."""
    reply: bytes | None = None
    """Sent instead of the server's reply; None for that one."""
    cut: int | None = None
    """Only so many bytes of the reply's body arrive, then the connection ends."""
    silence: bool = False
    """No reply, and the connection stays open until the client gives up."""
    reset: bool = False
    """No reply, and the connection is reset."""
    early: bool = False
    """The connection is reset after the request's head, in the midst of its body."""


def answer(status: int, reason: str, body: bytes = b"", headers: str = "", *, forward: bool = False) -> Fault:
    """A reply of our own, with (``forward``) or without the request having reached the server."""
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Length: {len(body)}\r\n{headers}Connection: close\r\n\r\n"
    return Fault(forward=forward, reply=head.encode() + body)


def s3_error(code: str) -> bytes:
    """The body of an S3 error."""
    return f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>m</Message></Error>'.encode()


SLOW_DOWN = answer(503, "Slow Down", s3_error("SlowDown"))
TOO_MANY = answer(429, "Too Many Requests", headers="Retry-After: 1\r\n")
INTERNAL = answer(500, "Internal Server Error", s3_error("InternalError"))
CONFLICT = answer(409, "Conflict", s3_error("ConditionalRequestConflict"))
RESET = Fault(forward=False, reset=True)
RESET_EARLY = Fault(forward=False, early=True)
LOST_REPLY = Fault(forward=True, reset=True)
SILENCE = Fault(forward=False, silence=True)
LATE = Fault(forward=True, silence=True)


class FaultProxy:
    """Listens on a free port of 127.0.0.1 and forwards to ``port`` there. Use as ``async with`` inside one test.

    ``drop``: which headers (name and value, in lower case) are not forwarded: without conditions a server becomes one
    that ignores them.
    """

    def __init__(self, port: int, *, drop: Callable[[str, str], bool] = lambda name, value: False) -> None:
        self._upstream = port
        self._drop = drop
        self._plans: list[tuple[Callable[[Request], bool], list[Fault | None]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self.requests: list[Request] = []
        self.port = 0

    def plan(self, *faults: Fault | None, where: Callable[[Request], bool] = lambda request: True) -> None:
        """The next requests that fit get these, one each (None: nothing happens to that one)."""
        self._plans.append((where, list(faults)))

    @property
    def all_happened(self) -> bool:
        """No fault is left that was planned."""
        return not any(faults for _, faults in self._plans)

    async def __aenter__(self) -> FaultProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=2**20)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()  # what is still to be sent has nobody to go to
        await asyncio.gather(*(writer.wait_closed() for writer in self._writers), return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError), contextlib.closing(writer):
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode("latin-1").split("\r\n")
            method, path, _ = lines[0].split(" ")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:-2])}
            request = Request(method, path, headers, b"")
            fault = next((faults.pop(0) for where, faults in self._plans if faults and where(request)), None)
            if fault is not None and fault.early:
                self.requests.append(request)
                _reset(writer)
                return
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            self.requests.append(request._replace(body=body))
            if fault is None or fault.forward:
                reply = await self._forward(lines, body)
            else:
                reply = b""
            if fault is not None and fault.silence:
                await reader.read()  # until the client goes
                return
            if fault is not None and fault.reset:
                _reset(writer)
                return
            if fault is not None and fault.reply is not None:
                reply = fault.reply
            if fault is not None and fault.cut is not None:
                start = reply.index(b"\r\n\r\n") + 4
                reply = reply[: start + fault.cut]
            writer.write(reply)
            await writer.drain()

    async def _forward(self, lines: list[str], body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        self._writers.append(writer)
        headers = ((line, *(part.strip() for part in line.lower().split(":", 1))) for line in lines[1:-2])
        kept = [line for line, name, value in headers if name != "connection" and not self._drop(name, value)]
        head = "\r\n".join([lines[0], *kept, "Connection: close", "", ""])
        with contextlib.closing(writer):
            writer.write(head.encode("latin-1") + body)
            reply = await reader.read()
        start, end, rest = reply.partition(b"\r\n\r\n")
        if b"\r\nconnection:" not in start.lower():
            start += b"\r\nConnection: close"  # as it will be
        return start + end + rest


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close so that the other side sees a reset rather than an orderly end."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def refused_port() -> int:
    """A port of 127.0.0.1 at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
