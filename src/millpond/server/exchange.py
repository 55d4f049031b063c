"""Hot requests straight from the connection: no ASGI in between, one write for an answer.

Most of what a server of small messages does is HTTP. uvicorn makes a dictionary, an event and two writes of each
request, and the second write alone, a system call of its own, costs as much as finding a message. So a request for one
of the hot routes whose body is small and said to be so is run by `App.run` on an `Exchange`, which is what its handler
knows as a `Call`. Everything else, and everything unusual (other methods, a query, chunks, ``Expect``, a request sent
before the last answer), goes uvicorn's way, which ends in the same handlers; so nothing may be decided here.

A head that was read before is not read again (`millpond.server.heads`), if its request comes in one piece on a
connection that is free; the plainest of these requests are done together (`millpond.server.together`).

Importing this module loads uvicorn.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from millpond.server.auth import ANONYMOUS
from millpond.server.context import (
    HANGING_UP,
    JSON_HEADER,
    SHUTDOWN_HEADER,
    AsgiScope,
    Call,
    CutOff,
    Handler,
    Header,
    too_large,
)
from millpond.server.heads import Head
from millpond.server.protocol import Protocol, lines_of
from millpond.wire import headers

if TYPE_CHECKING:
    from millpond.server.app import App

HUNG_UP = getattr(select, "POLLRDHUP", 0)
"""That the client sends nothing more; systems without it tell only of connections that broke off."""
MAX_BODY = 65_536
"""Larger bodies are not collected here but read by their handlers, piece by piece."""
MAX_SCOPES = 16
"""Kinds of heads of which a connection remembers what handlers look at: a client has one for each route."""


_OK = STATUS_LINE[200]


class Signal:
    """What uvicorn sets when something happens to a request; here there is only one thing to wait for."""

    __slots__ = ("_waiter",)

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None

    def set(self) -> None:
        """It happened."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Return when it happens."""
        if self._waiter is None or self._waiter.done():
            self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter


class Exchange(Call):
    """A request whose body is here, and its answer. To the connection it is what uvicorn calls a cycle."""

    __slots__ = (
        "_body",
        "_chunked",
        "_connection",
        "_left",
        "_signal",
        "disconnected",
        "keep_alive",
        "response_complete",
        "response_started",
        "task",
        "waiting_for_100_continue",
    )

    def __init__(
        self, connection: FastProtocol, app: App, scope: AsgiScope, *, keep_alive: bool, body: bytes = b""
    ) -> None:
        # As the base class does it, written out: this is paid for each request.
        self.context = app.context
        self.scope = scope
        self.receive = _no_receive
        self.send = _no_send
        self.route = scope["path"]
        self.identity = ANONYMOUS
        self.style = "native"
        self.started = False
        self.status = 0
        self._correlation = None
        self._query = None
        self._allowed = None
        self._body_over = False
        self.at_hand = self.packed = None
        self._connection = connection
        self._body = body
        self._chunked = False
        self._left = 0
        """Bytes that the answer still owes."""
        self.keep_alive = keep_alive
        self.disconnected = False
        self.response_started = False
        self.response_complete = False
        self.waiting_for_100_continue = False
        self._signal: Signal | None = None
        self.task: Any = None
        """Runs its handler."""

    @property
    def message_event(self) -> Signal:
        """Set when the client goes away. Made when somebody asks: few do."""
        if self._signal is None:
            self._signal = Signal()
        return self._signal

    def feed(self, data: bytes) -> None:
        """More of the body."""
        self._body = self._body + data if self._body else data

    # What was asked

    async def body(self, limit: int | None = None) -> bytes:
        body = self._body
        most = self.context.config.max_body_bytes if limit is None else limit
        if len(body) > most:
            raise too_large(most)
        self._body_over = True
        return body

    async def first(self) -> bytes:
        self._body_over = True
        return self._body

    async def chunks(self) -> AsyncIterator[bytes]:
        if not self._body_over:
            self._body_over = True
            if self._body:
                yield self._body

    async def gone(self) -> None:
        while not self.disconnected:
            await self.message_event.wait()

    @property
    def vanished(self) -> bool:
        return self.disconnected or self._connection.hung_up()

    # What is answered

    async def answer(
        self,
        body: bytes,
        status: int = 200,
        content_type: Header | None = JSON_HEADER,
        more: Iterable[Header] = (),
    ) -> None:
        if status == 200 and content_type is not None and not more and self.answer_now(body, content_type):
            return
        fields = [(headers.CORRELATION, self.correlation_id.encode()), *more]
        if status != 204:
            fields.append((b"content-length", b"%d" % len(body)))
        if content_type is not None:
            fields.append(content_type)
        await self.whole(body, status, fields)

    def answer_now(self, body: bytes, content_type: Header) -> bool:
        """As `answer`, where there is nothing to wait for and nothing unusual to say; whether that is so. Nearly all
        answers go out here."""
        connection = self._connection
        if self._correlation is None and self.at_hand is not None:
            # No head that is known names one.
            self._correlation = self.context.pond.ids.message_id()
        correlation_id = self._correlation or self.correlation_id
        if (
            not self.keep_alive
            or self.context.draining
            or connection.flow.write_paused
            or not correlation_id.isprintable()
        ):
            return False
        self.started = self.response_started = True
        self.status = 200
        if not self.disconnected:
            defaults = lines_of(connection.server_state.default_headers)
            connection.transport.write(
                b"%b%bx-correlation-id: %b\r\ncontent-length: %d\r\n%b: %b\r\n\r\n%b"
                % (_OK, defaults, correlation_id.encode(), len(body), *content_type, body)
            )
        self._finish()
        return True

    async def whole(self, body: bytes, status: int, fields: list[Header]) -> None:
        data = self._head(status, fields) + body
        connection = self._connection
        if connection.flow.write_paused:
            await self._write(data)
        elif not self.disconnected:
            connection.transport.write(data)
        self._finish()

    async def start(self, status: int, fields: list[Header]) -> None:
        self._left = -1
        for name, value in fields:
            if name == b"content-length":
                self._left = int(value)
        if self._left < 0:
            self._chunked = True
            fields.append((b"transfer-encoding", b"chunked"))
        await self._write(self._head(status, fields))

    async def write(self, data: bytes) -> None:
        if not data:
            return
        if self._chunked:
            await self._write(b"%x\r\n%b\r\n" % (len(data), data))
            return
        self._left -= len(data)
        await self._write(data)

    async def end(self, data: bytes = b"") -> None:
        if self._chunked:
            await self._write((b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)) if data else b"0\r\n\r\n")
        else:
            await self.write(data)
            if self._left and not self.disconnected:
                raise RuntimeError(f"an answer's length is off by {self._left} bytes")
        self._finish()

    def _head(self, status: int, fields: list[Header]) -> bytes:
        if self.context.draining:
            fields.append(SHUTDOWN_HEADER)
        self.started = self.response_started = True
        self.status = status
        defaults = self._connection.server_state.default_headers
        parts = [STATUS_LINE[status], lines_of(defaults)]
        parts += [b"%b: %b\r\n" % field for field in fields]
        parts.append(b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n")
        head = b"".join(parts)
        # Nothing that an answer is made of may end its line: no name of a type, no id, no etag.
        lines = len(fields) + len(defaults) + (2 if self.keep_alive else 3)
        if head.count(b"\n") != lines or head.count(b"\r") != lines:
            self.started = self.response_started = False
            raise RuntimeError("a header of the answer has a line break in it")
        return head

    async def _write(self, data: bytes) -> None:
        flow = self._connection.flow
        if flow.write_paused and not self.disconnected:
            await flow.drain()
        if not self.disconnected:
            self._connection.transport.write(data)

    def _finish(self) -> None:
        self.response_complete = True
        if self.disconnected:
            return
        if not self.keep_alive:
            self._connection.transport.close()
        self._connection.on_response_complete()

    # For who answers it without its handler

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Have a task of the server do something for it."""
        self._connection.begin(work)

    def begin_usual(self, handler: Handler) -> None:
        """Have its handler answer it after all."""
        self._connection.begin_usual(self, handler)

    def over(self) -> None:
        """Nobody does anything more for it: if it has no answer it gets none."""
        if not self.response_complete:
            self.response_complete = True
            self._connection.transport.close()


# Not methods: a request that holds methods of its own goes in a circle, and is left to the collector of garbage.


async def _no_receive() -> Any:
    raise RuntimeError("a hot route reads its body by its call")


async def _no_send(message: Any) -> None:
    raise RuntimeError("a hot route answers by its call")


class FastProtocol(Protocol):
    """uvicorn's protocol, which lets the application have hot requests directly."""

    def __init__(self, *, application: App, **rest: Any) -> None:
        super().__init__(**rest)
        self._application = application
        self._quick = application.quick
        self._exchange: Exchange | None = None
        """The request that is coming in, where it is one for here."""
        self._handler: Handler | None = None
        self._running: RequestResponseCycle | Exchange | None = None
        """The request that is being answered; `cycle` is the last that came, which may wait for its turn."""
        self._heads = application.heads
        self._known = application.heads.known
        self._raw = b""
        """Up to the first empty line of what came at the beginning of a request."""
        self._scopes: dict[Head, AsgiScope] = {}
        """What handlers look at, by heads that came on this connection."""

    def run_known(self, head: Head, body: bytes) -> None:
        """A request whose head was read before, with its body; the connection is free."""
        scope = self._scopes.get(head)
        if scope is None:
            scope = self.scope_of_request()
            scope.update(path=head.path, method="POST", query_string=b"", headers=head.fields)
            if len(self._scopes) >= MAX_SCOPES:
                self._scopes.clear()
            self._scopes[head] = scope
        exchange = Exchange(self, self._application, scope, keep_alive=head.keep_alive, body=body)
        exchange.at_hand, exchange.packed = body, head.packed
        self._running = exchange
        self.cycle = exchange  # type: ignore[assignment]
        if not self._application.together.take(exchange, head, body):
            self.begin_usual(exchange, head.handler)

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """A task that the server knows of, so that it ends when that does."""
        task = self.loop.create_task(_quietly(work))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def begin_usual(self, exchange: Exchange, handler: Handler) -> None:
        """Have a request answered by its handler."""
        task = exchange.task = self.loop.create_task(self._run(exchange, handler))
        self.tasks.add(task)

    def eof_received(self) -> None:
        """The client hung up. What was written it still reads; from here on nothing is, though uvicorn learns of it
        only with the next turn of the loop."""
        self.tell_gone()

    def connection_lost(self, exc: Exception | None) -> None:
        self.tell_gone()
        super().connection_lost(exc)

    def tell_gone(self) -> bool:
        """Let what is being answered, and what waits behind it, know that there is nobody to answer. Whether one of
        them had begun its answer."""
        begun = False
        cycle: RequestResponseCycle | Exchange | None
        for cycle in (self._running, self.cycle):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
                begun |= cycle.response_started
        return begun

    def hung_up(self) -> bool:
        """The client is known to have gone. While nothing is read, because a further request waits for its turn, the
        end of what it sends lies behind that in the socket; there the system is asked."""
        if self.transport.is_closing():
            return True
        if not self.flow.read_paused:
            return False
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), HUNG_UP)
        return bool(poll.poll(0))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_message_begin(self) -> None:
        self.url = b""
        self.expect_100_continue = False
        self.headers = []
        self._exchange = None

    def on_headers_complete(self) -> None:
        raw, self._raw = self._raw, b""  # of this head, if at all: whatever is read next begins elsewhere
        found = self._quick.get(self.url)
        if found is None or not self._plain():
            self._begin_scope()
            super().on_headers_complete()
            return
        path, self._handler = found
        scope = self.scope_of_request()
        scope.update(path=path, method="POST", query_string=b"")
        keep_alive = self.parser.should_keep_alive()
        exchange = Exchange(self, self._application, scope, keep_alive=keep_alive)
        self._exchange = exchange
        if raw:
            [length, *_] = [int(value) for name, value in self.headers if name == b"content-length"]
            if length <= exchange.context.config.max_body_bytes:
                self._heads.keep(raw, Head(path, found[1], self.headers, keep_alive, length))
        self.cycle = exchange  # type: ignore[assignment]

    def _plain(self) -> bool:
        """Nothing about this request is unusual, and the connection is free."""
        cycle: RequestResponseCycle | Exchange | None = self.cycle
        parser = self.parser
        if (
            (cycle is not None and not cycle.response_complete)
            or self.expect_100_continue
            or parser.get_method() != b"POST"
            or parser.get_http_version() != "1.1"
            or parser.should_upgrade()
        ):
            return False
        for name, size in self.headers:
            if name == b"content-length":
                # The parser has seen to it that this is a number, and that the body does not come in chunks as well.
                return len(size) <= 5 and int(size) <= MAX_BODY
        return False

    def scope_of_request(self) -> AsgiScope:
        """What handlers look at; `FastProtocol` adds the rest."""
        return {"type": "http", "client": self.client, "scheme": self.scheme, "headers": self.headers}

    def _begin_scope(self) -> None:
        scope: Any = {
            **self.scope_of_request(),
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": "1.1",
            "server": self.server,
            "root_path": self.root_path,
            "state": self.app_state.copy(),
            HANGING_UP: self.hung_up,
        }
        self.scope = scope

    def on_body(self, body: bytes) -> None:
        if self._exchange is not None:
            self._exchange.feed(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        exchange, handler = self._exchange, self._handler
        if exchange is None or handler is None:
            super().on_message_complete()
            return
        self._exchange = None
        self._running = exchange
        self.begin_usual(exchange, handler)

    async def _run(self, exchange: Exchange, handler: Handler) -> None:
        try:
            await self._application.run(exchange, handler)
        except CutOff:
            pass  # the client sees by the connection that its answer is not whole
        finally:
            task, exchange.task = exchange.task, None
            self.tasks.discard(task)
            exchange.over()


async def _quietly(work: Coroutine[Any, Any, None]) -> None:
    with contextlib.suppress(CutOff):  # the client sees by the connection that its answer is not whole
        await work
