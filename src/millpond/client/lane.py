"""HTTP/1.1 to a server: calls whose request and answer are at hand as a whole, and payloads that are streamed.

It does what the client needs and nothing else, because the first kind is the way of every enqueue, receive and answer:
a general client takes 93 µs of this process for one (measured beside it), this half of that, most of it the kernel's.

Invariants: one request is under way on a connection at a time; a connection on which anything was not as expected, or
that was left in the middle, is never used again; what an answer or a stream takes in memory is bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from millpond.wire.headers import JSON, MSGPACK

MAX_HEAD = 64 * 1024
"""Bytes of an answer's head; nobody's is larger."""
CONNECT_TIMEOUT = 5.0
"""Seconds until a connection stands; a host that is not there says nothing."""
IDLE = 15.0
"""Seconds for which an idle connection is used again: less than any server keeps it."""
MOST_IDLE = 128
MAX_CHUNK_LINE = 1024
"""Bytes of the line before a chunk."""
CLOSED = "it closed the connection"
"""What is said of a server that ends a connection without a word."""
READ_AHEAD = 512 * 1024
"""Bytes of a streamed answer that wait for their reader; beyond, the server waits."""


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
        # Of a stream, either way:
        self._drained: asyncio.Future[None] | None = None
        """Set while the server reads more slowly than we write."""
        self._streaming = False
        self._left = 0
        """Bytes of a streamed answer that are still to come; 1 while a chunked one goes on."""
        self._chunked = False
        self._piece = 0
        """Bytes of the chunk that are still to come, with the end of its line."""
        self._chunks: deque[bytes] = deque()
        self._ahead = 0
        self._wanted: asyncio.Future[None] | None = None
        self._lost: OSError | None = None

    # Of the protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.keep = False
        self._lost = exc if isinstance(exc, OSError) else ConnectionResetError(CLOSED)
        self._fail(self._lost)
        self.resume_writing()
        _wake(self._wanted)

    def pause_writing(self) -> None:
        self._drained = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        drained, self._drained = self._drained, None
        _wake(drained)

    def data_received(self, data: bytes) -> None:
        if self._waiting is None:
            if self._streaming:
                self._feed(data)
            else:
                self.abort()  # nobody asked
            return
        self._buffer += data
        try:
            if not self._body_at and not self._head():
                return
            if self._streaming and self._status == 200:
                self._begin_stream()
                return
            self._streaming = False
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

    def _begin_stream(self) -> None:
        self._chunked = self._length is None
        if self._length is None:
            # Whatever is to come; its chunks' sizes are told as they come.
            self._left, self._piece, self.keep = 1, 0, False
        else:
            self._left = self._length
        rest = bytes(self._buffer[self._body_at :])
        self._buffer.clear()
        self._body_at = 0
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.done():
            waiting.set_result(Answer(200, None, b""))
        if rest:
            self._feed(rest)

    def _feed(self, data: bytes) -> None:
        if self._chunked:
            try:
                data = self._unchunk(data)
            except ValueError as error:
                self._lost = BadAnswer(f"it answers with something else than HTTP: {error}")
                self.abort()
                _wake(self._wanted)
                return
            if data:
                self._chunks.append(data)
                self._ahead += len(data)
                if self._ahead > READ_AHEAD and self._lost is None:
                    self._transport.pause_reading()
            if not self._left:
                self._streaming = False
            _wake(self._wanted)
            return
        if len(data) > self._left:
            self.keep = False  # more than was asked for
            data = data[: self._left]
        self._left -= len(data)
        if data:
            self._chunks.append(data)
            self._ahead += len(data)
            if self._ahead > READ_AHEAD and self._lost is None:
                self._transport.pause_reading()
        if not self._left:
            self._streaming = False
        _wake(self._wanted)

    def _unchunk(self, data: bytes) -> bytes:
        """What is in the chunks so far. Raises ValueError."""
        buffer, parts = self._buffer, []
        buffer += data
        while buffer and self._left:
            if self._piece:
                # What is left of a chunk, and the end of its line.
                part = bytes(buffer[: self._piece])
                del buffer[: self._piece]
                self._piece -= len(part)
                parts.append(part[: len(part) - max(0, 2 - self._piece)] if self._piece < 2 else part)
                continue
            line = buffer.find(b"\r\n")
            if line < 0:
                if len(buffer) > MAX_CHUNK_LINE:
                    raise ValueError("a chunk without a size")
                break
            size = _size(buffer[:line])
            del buffer[: line + 2]
            self._piece = size + 2 if size else 0
            if not size:
                self._left = 0
        return b"".join(parts)

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
            size = _size(buffer[at:line])
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

    def ask(self, request: bytes, *, stream: bool = False) -> asyncio.Future[Answer]:
        """Send a request; its answer, or an OSError. ``stream``: the body of a success is left to `chunk`."""
        self._streaming = stream
        waiting: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        if self._lost is not None:  # between its opening and now; uvloop's transport raises something else
            waiting.set_exception(self._lost)
            return waiting
        self._waiting = waiting
        self._transport.write(request)
        return waiting

    async def send(self, data: bytes) -> None:
        """More of the request, once there is room for it."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)
        if self._drained is not None:
            await self._drained

    async def chunk(self) -> bytes:
        """More of a streamed answer; nothing: that was its end. Raises OSError when it breaks off."""
        while not self._chunks:
            if not self._left:
                return b""
            if self._lost is not None:
                raise self._lost
            self._wanted = asyncio.get_running_loop().create_future()
            await self._wanted
        data = self._chunks.popleft()
        self._ahead -= len(data)
        if self._ahead <= READ_AHEAD and self._lost is None:
            self._transport.resume_reading()
        return data

    @property
    def whole(self) -> bool:
        """The streamed answer was read to its end."""
        return not self._left and not self._chunks

    def abort(self) -> None:
        """End it at once."""
        self.keep = False
        if self._transport is not None:
            self._transport.abort()

    def hang_up(self) -> None:
        """Say that nothing more comes, and still read what is on its way; where it cannot do that (TLS), end it."""
        self.keep = False
        if self._transport is None or self._transport.is_closing():
            return  # nothing comes or goes any more; uvloop's raises when it is told again
        if self._transport.can_write_eof():
            self._transport.write_eof()
        else:
            self.abort()


def _size(line: bytearray) -> int:
    """Of a chunk, from the line before it. Raises ValueError."""
    digits = bytes(line).partition(b";")[0].strip()
    if not digits or digits.strip(b"0123456789abcdefABCDEF") or len(digits) > 16:
        raise ValueError("a chunk without a size")
    return int(digits, 16)


def _wake(future: asyncio.Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)


class Lane:
    """The connections to one server."""

    def __init__(self, url: str, tls: ssl.SSLContext | None, headers: dict[str, str], most: int) -> None:
        """``most``: bytes of an answer. Connects to nothing."""
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 0
        self._tls = tls
        self._most = most
        self._prefix = parts.path
        common = [" HTTP/1.1", f"Host: {parts.netloc}", *(f"{name}: {value}" for name, value in headers.items()), ""]
        self._common = "\r\n".join(common)
        self._headers = f"{self._common}Content-Type: {MSGPACK}\r\nAccept: {MSGPACK}\r\nContent-Length: "
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

    async def upload(
        self, connection: Connection, path: str, content_type: str, chunks: AsyncGenerator[bytes, None]
    ) -> Answer:
        """Send a request whose body comes in chunks; its answer, which may come before the body is sent to its end.
        Raises OSError, and what the source raises."""
        head = (
            f"POST {self._prefix}{path}{self._common}Content-Type: {content_type}\r\nAccept: {JSON}\r\n"
            "Transfer-Encoding: chunked\r\n\r\n"
        )
        answer = connection.ask(head.encode("latin-1"))
        try:
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    if answer.done():
                        break
                    if chunk:
                        await connection.send(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            if not answer.done():
                await connection.send(b"0\r\n\r\n")
            found = await answer
            # A server that answered before it had read all may let the rest, and what follows it, go by unheard.
            connection.keep = False
            return found
        except BaseException:
            if not answer.cancel() and not answer.cancelled():
                answer.exception()  # it is told by what is raised
            raise

    async def connection(self, *, fresh: bool = False, within: float = CONNECT_TIMEOUT) -> Connection:
        """A connection that stands: one that was kept, or (``fresh``: in any case) a new one, made ``within`` so many
        seconds. Raises OSError."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._idle and not fresh:
            kept = self._idle.pop()
            if kept.keep and now - kept.idle_since < IDLE:
                self._used.add(kept)
                return kept
            kept.abort()
        try:
            async with asyncio.timeout(min(within, CONNECT_TIMEOUT)):
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
