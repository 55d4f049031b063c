"""uvicorn's protocol, with less to do for each request: one write for a whole answer, no search of our own headers for
what they cannot hold, no parsing of what has but one form. Importing this module loads uvicorn.

An answer's head waits for the first part of its body, as ASGI has it: who wants it on its way before sends an empty
part.
"""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import unquote

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

_latest: list[Any] = [None, b""]
"""Default headers as a list, and as bytes."""


def lines_of(defaults: list[tuple[bytes, bytes]]) -> bytes:
    """The headers that all answers have, as bytes; they change once a second, and are another list then."""
    if _latest[0] is not defaults:
        _latest[:] = defaults, b"".join([b"%b: %b\r\n" % field for field in defaults])
    joined: bytes = _latest[1]
    return joined


class Cycle(RequestResponseCycle):
    """One request and its answer."""

    _head: bytes | None = None
    """Of the answer, until there is something to send it with."""

    async def send(self, message: Any) -> None:
        """Take a part of the answer, as ASGI has it."""
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        if not self.response_started:
            self._head = self._begin(message)
            return
        if self.response_complete:
            raise RuntimeError("a part of an answer that is complete")
        body: bytes = message.get("body", b"")
        head = self._head
        more: bool = message.get("more_body", False)
        data: bytes
        if self.scope["method"] == "HEAD":
            self.expected_content_length = 0
            data = b""
        elif self.chunked_encoding:
            data = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            if not more:
                data += b"0\r\n\r\n"
        else:
            self.expected_content_length -= len(body)
            if self.expected_content_length < 0:
                raise RuntimeError("an answer is longer than its Content-Length")
            data = body
        if head is not None:
            self._head = None
            data = head + data
        if data:
            self.transport.write(data)
        if more:
            return
        if self.expected_content_length:
            raise RuntimeError("an answer is shorter than its Content-Length")
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()

    def _begin(self, message: Any) -> bytes:
        if message["type"] != "http.response.start":
            raise RuntimeError(f"an answer begins with {message['type']}")
        self.response_started = True
        self.waiting_for_100_continue = False
        status: int = message["status"]
        parts = [STATUS_LINE[status], lines_of(self.default_headers)]
        closes = False
        for field in message["headers"]:
            name, value = field
            if name == b"content-length":
                self.expected_content_length = int(value)
                self.chunked_encoding = False
            elif name == b"connection" and value == b"close":
                self.keep_alive = False
                closes = True
            parts.append(b"%b: %b\r\n" % field)
        lines = len(parts) + len(self.default_headers) - 1
        if not self.keep_alive and not closes:
            parts.append(b"connection: close\r\n")
            lines += 1
        if self.chunked_encoding is None and self.scope["method"] != "HEAD" and status not in {204, 304}:
            self.chunked_encoding = True
            parts.append(b"transfer-encoding: chunked\r\n")
            lines += 1
        parts.append(b"\r\n")
        head = b"".join(parts)
        # Nothing that an answer is made of may end its line: no name of a type, no id, no etag.
        if head.count(b"\n") != lines + 1 or head.count(b"\r") != lines + 1:
            self.response_started = False
            raise RuntimeError("a header of the answer has a line break in it")
        return head


class Protocol(HttpToolsProtocol):
    """A connection whose requests are `Cycle`s."""

    def on_headers_complete(self) -> None:
        """The head of a request is here: begin with it, or let it wait for its turn."""
        url: bytes = self.url
        if url[:1] != b"/" or self.parser.get_http_version() != "1.1":
            # An absolute URL, *, an authority, HTTP/1.0: nobody's everyday.
            super().on_headers_complete()
            return
        raw_path, _, query = url.partition(b"?")
        scope: Any = self.scope
        path = raw_path.decode("ascii", "replace")
        scope["method"] = self.parser.get_method().decode("ascii")
        scope["path"] = unquote(path) if "%" in path else path
        scope["raw_path"] = raw_path
        scope["query_string"] = query.partition(b"#")[0]
        before: RequestResponseCycle | None = self.cycle
        self.cycle = Cycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=self.parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        if before is None or before.response_complete:
            self._start_asgi_task(self.cycle, self.app)
        else:
            # Reading goes on for a while: else the end of the connection would lie unseen behind what comes.
            self.pipeline.appendleft((self.cycle, self.app))
