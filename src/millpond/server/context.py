"""What all handlers share, and what they know of one request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Literal
from urllib.parse import parse_qsl

from millpond.pond import Pond
from millpond.server.audit import Audit, Who
from millpond.server.auth import ANONYMOUS, PEER, Authority, Identity, OpenAuthority, Scope
from millpond.server.config import ServerConfig
from millpond.server.gate import LoadGate, store_load
from millpond.server.held import Held
from millpond.server.limits import Gate
from millpond.server.metrics import Metrics, NoMetrics
from millpond.server.outstanding import Streams
from millpond.server.quota import Quota
from millpond.server.tracing import Tracing
from millpond.server.watches import Watches
from millpond.wire import headers
from millpond.wire.faults import Refusal

AsgiScope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Header = tuple[bytes, bytes]

HANGING_UP = "millpond.hung_up"
"""Where in an ASGI scope the connection says whether its client has gone."""
JSON_HEADER: Header = (b"content-type", b"application/json")
MSGPACK_HEADER: Header = (b"content-type", headers.MSGPACK.encode())
SHUTDOWN_HEADER: Header = (headers.SHUTDOWN, b"true")


class Disconnected(Exception):
    """The client went away before it had its answer; there is nobody to tell."""


class CutOff(Exception):
    """Not an error of its own: it makes the protocol below close a connection whose answer broke off."""


class Context:
    """What all handlers of a server share."""

    def __init__(
        self,
        pond: Pond,
        config: ServerConfig | None = None,
        *,
        authority: Authority | None = None,
        gate: Gate | None = None,
        metrics: Metrics | None = None,
        audit: Audit | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.pond = pond
        self.config = config or ServerConfig()
        self.authority: Authority = authority or OpenAuthority()
        self.gate: Gate = gate or LoadGate(pond.clock, lambda: store_load(pond.store))
        self.metrics: Metrics = metrics or NoMetrics()
        self.audit = audit or Audit(pond.clock)
        self.tracing = tracing
        self.quota = Quota(pond, self.config.max_queues_per_namespace)
        self.held = Held()
        self.streams = Streams(pond)
        self.held.answered = self.streams.answered
        self.watches = Watches(pond)
        self.ready_until = float("-inf")
        """Up to when the store counts as within reach (monotonic), and the lock under which one request finds out."""
        self.ready_look = asyncio.Lock()
        self.draining = False
        self._drain_ends = 0.0
        self._drain_begins: set[Callable[[], object]] = set()
        self._rights_change: set[Callable[[], object]] = set()
        self.tasks: set[asyncio.Task[Any]] = set()
        """Work that outlives its request: giving back what a vanished client was sent."""

    def begin_drain(self) -> None:
        """From now on nothing is handed out, and who waits or streams is sent away. Safe to repeat."""
        if self.draining:
            return
        self.draining = True
        self._drain_ends = self.pond.clock.monotonic() + self.config.drain_grace
        for call in list(self._drain_begins):
            call()

    def on_drain(self, call: Callable[[], object]) -> Callable[[], None]:
        """Call this once when draining begins; what is returned forgets about it."""
        self._drain_begins.add(call)
        return lambda: self._drain_begins.discard(call)

    def rights_changed(self) -> None:
        """Tokens or certificates were read anew: who waits or streams is judged again."""
        for call in list(self._rights_change):
            call()

    def on_rights(self, call: Callable[[], object]) -> Callable[[], None]:
        """Call this whenever rights have changed; what is returned forgets about it."""
        self._rights_change.add(call)
        return lambda: self._rights_change.discard(call)

    def refuse_while_draining(self) -> None:
        """For whatever hands out messages. Raises Refusal ``shutdown_draining``."""
        if self.draining:
            raise Refusal(
                503,
                "shutdown_draining",
                "this server is shutting down and hands out nothing more; ask another one, or this one when it is back",
                retry_after=max(1, round(self._drain_ends - self.pond.clock.monotonic())),
            )

    def spawn(self, work: Any) -> None:
        """Run a coroutine that must end even though its request is over; the server waits for it before it ends."""
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def settle(self) -> None:
        """Wait for what `spawn` began."""
        while self.tasks:
            await asyncio.gather(*self.tasks, return_exceptions=True)


class Call:
    """One request, and the way to its answer."""

    __slots__ = (
        "_allowed",
        "_body_over",
        "_correlation",
        "_query",
        "at_hand",
        "context",
        "identity",
        "packed",
        "receive",
        "route",
        "scope",
        "send",
        "started",
        "status",
        "style",
    )

    def __init__(self, context: Context, scope: AsgiScope, receive: Receive, send: Send) -> None:
        self.context = context
        self.scope = scope
        self.receive = receive
        self.send = send
        self.route: str = scope["path"]
        self.identity: Identity = ANONYMOUS
        self._allowed: tuple[Scope, str | None, str | None] | None = None
        """What it was allowed last."""
        self.style: Literal["native", "lockd"] = "native"
        """Whose codes an error gets."""
        self.started = False
        """The status line is out: an error can no longer be told, only the connection closed."""
        self.status = 0
        self._correlation: str | None = None
        self._query: dict[str, str] | None = None
        self._body_over = False
        self.at_hand: bytes | None = None
        """The whole body of a POST, no larger than it may be, where it came at once with a head that is known."""
        self.packed: bool | None = None
        """Then: whether that is MessagePack (true) or JSON; None where it takes a look to know."""

    # What was asked

    @property
    def method(self) -> str:
        """GET, POST …"""
        method: str = self.scope["method"]
        return method

    def header(self, name: bytes) -> bytes | None:
        """The value of a request's header by its lower-case name."""
        for key, value in self.scope["headers"]:
            if key == name:
                found: bytes = value
                return found
        return None

    @property
    def query(self) -> dict[str, str]:
        """The query's parameters; of one given twice the last counts."""
        if self._query is None:
            text = self.scope["query_string"]
            self._query = dict(parse_qsl(text.decode("latin-1"), keep_blank_values=True)) if text else {}
        return self._query

    @property
    def has_correlation(self) -> bool:
        """Somebody has wanted to know its correlation id."""
        return self._correlation is not None

    @property
    def correlation_id(self) -> str:
        """The request's own correlation id, or one made for it."""
        if self._correlation is None:
            given = headers.correlation_id(self.header(headers.CORRELATION))
            self._correlation = given or self.context.pond.ids.message_id()
        return self._correlation

    @correlation_id.setter
    def correlation_id(self, value: str) -> None:
        """What the answer carries: a message's own id takes the place of the request's."""
        self._correlation = value

    def authorise(self, scope: Scope, namespace: str | None = None, queue: str | None = None) -> None:
        """Return if the caller may do this. Raises Forbidden, Unauthorized."""
        self.context.authority.authorise(self.identity, scope, namespace, queue)
        self._allowed = (scope, namespace, queue)

    def check_rights(self) -> None:
        """Return if the caller is still somebody who may do what he was allowed. Raises Forbidden, Unauthorized."""
        authority = self.context.authority
        self.identity = authority.again(self.identity, self.scope)
        if self._allowed is not None:
            authority.authorise(self.identity, *self._allowed)

    @property
    def rights_end(self) -> int | None:
        """When the caller's token or certificate expires (ms UTC); None: never."""
        peer: Identity | None = self.scope.get(PEER)
        ends = [one.expires_at for one in (self.identity, peer) if one is not None and one.expires_at is not None]
        return min(ends, default=None)

    @property
    def address(self) -> str:
        """The client's."""
        client = self.scope.get("client")
        return client[0] if client else ""

    def audit(self, action: str, namespace: str | None, queue: str | None, **fields: Any) -> None:
        """Write down that the caller did something that cannot be undone."""
        who = Who(self.identity, self.address, self.correlation_id)
        self.context.audit.note(action, who, namespace=namespace, queue=queue, **fields)

    async def body(self, limit: int | None = None) -> bytes:
        """The whole body. Raises Refusal ``invalid_body`` when it is larger than ``limit`` bytes (None: the server's
        `max_body_bytes`), Disconnected."""
        most = self.context.config.max_body_bytes if limit is None else limit
        message = await self.receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            self._body_over = True
            whole: bytes = message.get("body", b"")
            if len(whole) > most:
                raise too_large(most)
            return whole
        parts: list[bytes] = []
        size = 0
        while True:
            if message["type"] == "http.disconnect":
                raise Disconnected
            part = message.get("body", b"")
            size += len(part)
            if size > most:
                raise too_large(most)
            parts.append(part)
            if not message.get("more_body", False):
                self._body_over = True
                return b"".join(parts)
            message = await self.receive()

    async def first(self) -> bytes:
        """What has come of the body by now, or the first of it; `complete` then says whether that is all. Raises
        Disconnected."""
        message = await self.receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        self._body_over = not message.get("more_body", False)
        data: bytes = message.get("body", b"")
        return data

    @property
    def complete(self) -> bool:
        """The whole body was read."""
        return self._body_over

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes, after what `first` gave. Raises Disconnected when the client goes before its end."""
        while not self._body_over:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            self._body_over = not message.get("more_body", False)
            part = message.get("body", b"")
            if part:
                yield part

    async def gone(self) -> None:
        """Return when the client has gone away. Only once the body was read to its end."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    @property
    def vanished(self) -> bool:
        """It is known by now that the client has gone away, so that what is written does not reach it. False may be out
        of date, but not for whoever writes at once."""
        hung_up: Callable[[], bool] | None = self.scope.get(HANGING_UP)
        return hung_up is not None and hung_up()

    # What is answered

    async def answer(
        self,
        body: bytes,
        status: int = 200,
        content_type: Header | None = JSON_HEADER,
        more: Iterable[Header] = (),
    ) -> None:
        """The whole answer at once, with its length and the correlation id."""
        fields = [(headers.CORRELATION, self.correlation_id.encode()), *more]
        if status != 204:  # which has none, by RFC 9110
            fields.append((b"content-length", b"%d" % len(body)))
        if content_type is not None:
            fields.append(content_type)
        await self.whole(body, status, fields)

    async def whole(self, body: bytes, status: int, fields: list[Header]) -> None:
        """The whole answer at once, with exactly these headers, the length among them."""
        await self.start(status, fields)
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    async def start(self, status: int, fields: list[Header]) -> None:
        """The status line and exactly these headers; `write` and `end` follow."""
        if self.context.draining:
            fields.append(SHUTDOWN_HEADER)
        self.started = True
        self.status = status
        await self.send({"type": "http.response.start", "status": status, "headers": fields})

    async def write(self, data: bytes) -> None:
        """A part of the body, on its way at once. Waits while the client is slow."""
        await self.send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        """The last part of the body."""
        await self.send({"type": "http.response.body", "body": data, "more_body": False})


Handler = Callable[[Call], Awaitable[None]]
"""What answers a request. Errors are raised, not answered: `millpond.server.app` makes bodies of them."""


def too_large(limit: int) -> Refusal:
    """A body has more bytes than that."""
    return Refusal(
        400, "invalid_body", f"the body is larger than {limit} bytes; send less at once, or stream a payload"
    )
