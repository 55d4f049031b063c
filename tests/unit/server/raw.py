"""HTTP by hand: what a test sends is what goes over the socket, and what comes back is seen as it comes."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Mapping
from types import TracebackType
from typing import NamedTuple
from urllib.parse import urlsplit


class Answer(NamedTuple):
    """A whole answer."""

    status: int
    headers: dict[str, str]
    body: bytes


class Connection:
    """One connection; ``async with`` it."""

    def __init__(self, url: str, *, receive_buffer: int | None = None, tls: ssl.SSLContext | None = None) -> None:
        """``receive_buffer``: bytes that the system takes for a client that does not read."""
        self._buffer = receive_buffer
        self._tls = tls
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._host, self._port = parts.hostname, parts.port
        self.chunked = False
        self.left = 0

    async def __aenter__(self) -> Connection:
        sock = socket.socket()
        sock.setblocking(False)
        if self._buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer)
        try:
            await asyncio.get_running_loop().sock_connect(sock, (self._host, self._port))
            self.reader, self.writer = await asyncio.open_connection(
                sock=sock, ssl=self._tls, server_hostname=self._host if self._tls else None
            )
        except BaseException:  # cancelled, too
            sock.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.writer.close()

    def write(self, data: bytes) -> None:
        """Bytes as they are."""
        self.writer.write(data)

    async def send(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        """A request with its length."""
        lines = [f"{method} {path} HTTP/1.1", "Host: test", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self.writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers; `chunk` or `rest` follow."""
        text = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = text.strip().split("\r\n")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        self.chunked = headers.get("transfer-encoding") == "chunked"
        self.left = int(headers.get("content-length", "0"))
        return int(first.split()[1]), headers

    async def chunk(self) -> bytes:
        """The next piece of a body without a length; b"" at its end."""
        assert self.chunked
        size = int((await self.reader.readline()).strip() or b"0", 16)
        data = await self.reader.readexactly(size)
        await self.reader.readexactly(2)
        return data

    async def rest(self) -> bytes:
        """The whole of what is left of the body."""
        if not self.chunked:
            return await self.reader.readexactly(self.left)
        parts = []
        while part := await self.chunk():
            parts.append(part)
        return b"".join(parts)

    async def answer(self) -> Answer:
        """A whole answer."""
        status, headers = await self.head()
        return Answer(status, headers, await self.rest())


async def request(
    url: str, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> Answer:
    """One request on a connection of its own."""
    async with Connection(url) as connection:
        await connection.send(method, path, body, headers)
        return await connection.answer()
