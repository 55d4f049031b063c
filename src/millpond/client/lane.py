"""HTTP/1.1 for calls: a request whose body is at hand, an answer that is read as a whole, on connections that are kept.

This is the way of every enqueue, receive and answer, so it does what these need and nothing else; payloads that are
streamed go another way. Measured per call on the same machine: 93 µs of this process through a general client, half of
that here, most of it the kernel's.

Invariants: one request is under way on a connection at a time; a connection on which anything was not as expected is
never used again; what an answer may take in memory is bounded.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from typing import Any, NamedTuple
from urllib.parse import urlsplit

MAX_HEAD = 64 * 1024
"""Bytes of an answer's head; nobody's is larger."""
CONNECT_TIMEOUT = 5.0
"""Seconds until a connection stands; a host that is not there says nothing."""
IDLE = 15.0
"""Seconds for which an idle connection is used again: less than any server keeps it."""
MOST_IDLE = 128


class Answer(NamedTuple):
    """An answer, read to its end."""

    status: int
    retry_after: str | None
    data: bytes


class BadAnswer(OSError):
    """What came is no answer of an HTTP server, or too large."""


class Connection(asyncio.Protocol):
    """A connection to a server."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._transport: Any = None
        self._waiting: asyncio.Future[Answer] | None = None
        self._buffer = bytearray()
        self._body_at = 0
        """Where the body begins; 0 while the head is not whole."""
        self._length: int | None = None
        """Of the body; None: chunked."""
        self._status = 0
        self._retry_after: str | None = None
        self.keep = True
        self.idle_since = 0.0

    # Of the protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.keep = False
        self._fail(exc if isinstance(exc, OSError) else ConnectionResetError("it closed the connection"))

    def data_received(self, data: bytes) -> None:
        if self._waiting is None:
            self.abort()  # nobody asked
            return
        self._buffer += data
        try:
            if not self._body_at and not self._head():
                return
            body = self._body()
        except (ValueError, IndexError) as error:
            self._fail(BadAnswer(f"it answers with something else than HTTP: {error}"))
            return
        if body is not None:
            answer = Answer(self._status, self._retry_after, body)
            self.keep &= not self._buffer  # more than was asked for
            waiting, self._waiting = self._waiting, None
            if not waiting.done():
                waiting.set_result(answer)

    def _fail(self, error: OSError) -> None:
        waiting, self._waiting = self._waiting, None
        self.abort()
        if waiting is not None and not waiting.done():
            waiting.set_exception(error)

    # Reading

    def _head(self) -> bool:
        """Whether the head is here, and understood."""
        while True:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > MAX_HEAD:
                    raise ValueError("a head without an end")
                return False
            head = bytes(self._buffer[:end])
            if not head.startswith(b"HTTP/1."):
                raise ValueError("no status line")
            self._status = int(head[9:12])
            if self._status >= 200:
                break
            del self._buffer[: end + 4]  # an interim one
        self._body_at = end + 4
        self._length = 0
        self._retry_after = None
        chunked, lengthless = False, True
        for line in head.split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            name = name.lower()
            if name == b"content-length":
                self._length, lengthless = int(value), False
                if not 0 <= self._length <= self._most:
                    raise ValueError(f"a body of {self._length} bytes; ask for less at once")
            elif name == b"transfer-encoding":
                chunked = b"chunked" in value.lower()
            elif name == b"connection" and b"close" in value.lower():
                self.keep = False
            elif name == b"retry-after":
                self._retry_after = value.decode("latin-1").strip()
        if chunked:
            self._length = None
        elif lengthless and self._status not in (204, 304):
            raise ValueError("a body without a length")
        return True

    def _body(self) -> bytes | None:
        """The body, once it is here; the buffer is then what follows it."""
        buffer, at = self._buffer, self._body_at
        if self._length is not None:
            if len(buffer) < at + self._length:
                return None
            body = bytes(buffer[at : at + self._length])
            del buffer[: at + self._length]
            self._body_at = 0
            return body
        if len(buffer) > self._most:
            raise ValueError(f"a body of more than {self._most} bytes; ask for less at once")
        if not buffer.endswith(b"\r\n\r\n"):
            return None
        parts = []
        while True:
            line = buffer.find(b"\r\n", at)
            if line < 0:
                return None
            size = int(bytes(buffer[at:line]).partition(b";")[0], 16)
            if size == 0:
                break
            part = bytes(buffer[line + 2 : line + 2 + size])
            if len(part) < size:
                return None
            parts.append(part)
            at = line + 2 + size + 2
        buffer.clear()
        self._body_at = 0
        return b"".join(parts)

    # For whoever asks

    def ask(self, request: bytes) -> asyncio.Future[Answer]:
        """Send a request; its answer, or an OSError."""
        self._waiting = waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return waiting

    def abort(self) -> None:
        """End it at once."""
        self.keep = False
        if self._transport is not None:
            self._transport.abort()

    def hang_up(self) -> None:
        """Say that nothing more comes, and still read what is on its way; where it cannot do that (TLS), end it."""
        self.keep = False
        if self._transport is not None and self._transport.can_write_eof():
            self._transport.write_eof()
        else:
            self.abort()


class Lane:
    """The connections to one server."""

    def __init__(self, url: str, tls: ssl.SSLContext | None, headers: dict[str, str], most: int) -> None:
        """``most``: bytes of an answer. Connects to nothing."""
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 0
        self._tls = tls
        self._most = most
        self._prefix = parts.path
        lines = [f"Host: {parts.netloc}", *(f"{name}: {value}" for name, value in headers.items()), "Content-Length: "]
        self._headers = " HTTP/1.1\r\n" + "\r\n".join(lines)
        self._heads: dict[str, bytes] = {}
        self._idle: deque[Connection] = deque()
        self._used: set[Connection] = set()
        self._closed = False

    def request(self, path: str, body: bytes) -> bytes:
        """A request as it goes out."""
        head = self._heads.get(path)
        if head is None:
            head = self._heads[path] = f"POST {self._prefix}{path}{self._headers}".encode("latin-1")
        return b"%b%d\r\n\r\n%b" % (head, len(body), body)

    async def connection(self) -> Connection:
        """A connection that stands: one that was kept, or a new one. Raises OSError."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._idle:
            kept = self._idle.pop()
            if kept.keep and now - kept.idle_since < IDLE:
                self._used.add(kept)
                return kept
            kept.abort()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                _, made = await loop.create_connection(
                    lambda: Connection(self._most),
                    self._host,
                    self._port,
                    ssl=self._tls,
                    server_hostname=self._host if self._tls else None,
                )
        except TimeoutError as error:
            raise TimeoutError("no connection in time") from error
        if self._closed:
            made.abort()
            raise ConnectionAbortedError("the pond was closed")
        self._used.add(made)
        return made

    def put_back(self, connection: Connection) -> None:
        """Keep it for the next call, if it is good."""
        self._used.discard(connection)
        if connection.keep and not self._closed and len(self._idle) < MOST_IDLE:
            connection.idle_since = asyncio.get_running_loop().time()
            self._idle.append(connection)
        else:
            connection.abort()

    def close(self) -> None:
        """End all connections, and the calls on them."""
        self._closed = True
        for connection in list(self._used):
            connection.abort()
        while self._idle:
            self._idle.pop().abort()
