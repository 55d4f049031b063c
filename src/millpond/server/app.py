"""The ASGI application: which handler a request is for, and the one place where errors become answers.

The routes of messages are found in a dict and run straight on ASGI; everything else goes through Starlette, which knows
methods and patterns. A handler raises; nothing but `respond_error` makes a body of an error, so that no text of an
unforeseen one, no path and no traceback can reach a client.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from millpond.errors import MillpondError, StoreClosed, StoreError
from millpond.server import lockd_routes, logs, native_routes, openapi
from millpond.server.context import AsgiScope, Call, Context, CutOff, Disconnected, Handler, Receive, Send
from millpond.server.heads import Heads
from millpond.server.metrics import ServerMetrics
from millpond.server.together import Together
from millpond.wire import faults, headers
from millpond.wire.faults import Refusal

if TYPE_CHECKING:
    from starlette.routing import BaseRoute

    from millpond.server.tracing import Tracing

log = logging.getLogger("millpond.server")

READING = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that a page which somebody visits can have his browser send without saying that it did so (no Origin), as if
for a picture. lockd's routes take any other."""
READY_FOR = 1.0
"""Seconds for which an answer of `/readyz` stands: everybody may ask, and a look costs the store a read, or money."""
READY_CHECK = ("health", "ready")
"""The queue by whose policy `/readyz` finds out whether the store can be reached; a read of something that is not there
leaves nothing behind."""


class App:
    """The application that a server runs."""

    def __init__(self, context: Context) -> None:
        from starlette.routing import Route, Router

        self.context = context
        self._lockd = lockd_routes.hot()
        self.hot: dict[str, Handler] = {**self._lockd, **native_routes.hot()}
        self.quick = {path.encode(): (path, handler) for path, handler in self.hot.items()}
        """The same by the bytes of a request's first line."""
        self.heads = Heads()
        self.together = Together(self)
        self.routes: list[BaseRoute] = [
            Route("/healthz", _asgi(healthz), methods=["GET", "POST"]),
            Route("/readyz", _asgi(readyz), methods=["GET", "POST"]),
            Route("/metrics", _asgi(metrics), methods=["GET"]),
            Route(openapi.PATH, _asgi(openapi.openapi), methods=["GET"]),
            *(Route(path, _asgi(handler), methods=["POST"]) for path, handler in native_routes.routes().items()),
        ]
        self.paths = frozenset([*self.hot, *(route.path for route in self.routes if isinstance(route, Route))])
        """Those that there is something at."""
        self._rest = Router(self.routes, redirect_slashes=False, default=_unknown)

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"the server was asked for {scope['type']}, which it does not speak")
        if b"%" in scope["raw_path"]:
            # No route has anything to escape. Whoever writes one so has it past a proxy that judges by paths.
            scope["path"] = scope["raw_path"].decode("latin-1")
        call = Call(self.context, scope, receive, send)
        await self.run(call, self.hot.get(call.route))

    def run(self, call: Call, handler: Handler | None) -> Awaitable[None]:
        """Answer a request: by its handler, or where it is none of the hot ones through Starlette. Raises CutOff when
        it went wrong after the answer had begun. To be awaited by the request's own task."""
        logs.current.set(call)
        if self.context.tracing is None:
            return self._answer(call, handler)
        return self._traced(self.context.tracing, call, handler)

    async def _traced(self, tracing: Tracing, call: Call, handler: Handler | None) -> None:
        with tracing.request(call.scope["headers"]):
            await self._answer(call, handler)

    async def _answer(self, call: Call, handler: Handler | None) -> None:
        began = self.context.pond.clock.monotonic()
        try:
            if handler is not None:
                call.identity = self.context.authority.identify(call.scope)
                if call.method in READING and call.route in self._lockd and call.identity.kind != "token":
                    raise Refusal(405, "method_not_allowed", "this route takes POST")
                await handler(call)
            else:
                call.scope["millpond.call"] = call
                call.scope["app"] = self  # so that Starlette raises rather than answers
                await self._rest(call.scope, call.receive, call.send)
        except Exception as error:
            await self.tell(call, error)
        finally:
            self.note(call, began)

    async def tell(self, call: Call, error: Exception) -> None:
        """Answer with what went wrong. Raises CutOff when the answer had begun."""
        if isinstance(error, Disconnected):
            call.status = 499  # nobody is told; in metrics it is what nginx calls it
            return
        if call.route in self._lockd:
            call.style = "lockd"
        await respond_error(call, error)

    def note(self, call: Call, began: float, now: float | None = None) -> None:
        """Count a request that is over. ``now``: the time, if it was just looked at."""
        context = self.context
        metrics, access = context.metrics, context.config.log_access
        if metrics.timed or access:
            seconds = (context.pond.clock.monotonic() if now is None else now) - began
            metrics.request(call.route, call.status, seconds)
            if access:
                logs.access(call.address, call.identity.name, call.method, call.route, call.status, seconds)


def _asgi(handler: Handler) -> Any:
    """A handler as an endpoint of a Starlette route."""

    class Endpoint:
        async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
            call: Call = scope["millpond.call"]
            if handler not in OPEN:
                call.identity = call.context.authority.identify(scope)
            await handler(call)

    return Endpoint()


async def _unknown(scope: AsgiScope, receive: Receive, send: Send) -> None:
    raise Refusal(404, "unknown_route", "there is nothing at this path")


async def healthz(call: Call) -> None:
    """The process answers."""
    await call.answer(b"", content_type=None)


async def readyz(call: Call) -> None:
    """The store can be reached, and this server is not about to stop."""
    context = call.context
    context.refuse_while_draining()
    async with context.ready_look:
        now = context.pond.clock.monotonic()
        if now >= context.ready_until:
            await context.pond.store.document(*READY_CHECK)
            context.ready_until = now + READY_FOR
    await call.answer(b"", content_type=None)


async def metrics(call: Call) -> None:
    """The server's figures, for Prometheus."""
    context = call.context
    if not isinstance(context.metrics, ServerMetrics):
        raise Refusal(404, "unknown_route", "this server serves no metrics")
    if not context.config.metrics_public:
        call.identity = context.authority.identify(call.scope)
        call.authorise("read")
    accept = call.header(b"accept")
    body, kind = await context.metrics.expose(None if accept is None else accept.decode("latin-1"))
    await call.answer(body, content_type=(b"content-type", kind.encode()))


OPEN: frozenset[Handler] = frozenset({healthz, readyz, metrics, openapi.openapi})
"""Handlers that everybody may call, token or not; `metrics` sees to that by itself."""


async def respond_error(call: Call, error: Exception) -> None:
    """Tell the client what went wrong, as its protocol has it; close the connection if the answer had begun."""
    status, fault = _fault(call, error)
    if call.started:
        call.status = status
        # Whoever reads must see that this is not the end that was meant: the connection breaks off.
        log.warning(
            "millpond.server.cut_off",
            extra={"route": call.route, "correlation_id": call.correlation_id, "reason": fault.error},
        )
        raise CutOff(fault.error) from None
    more = []
    if fault.retry_after_seconds > 0:
        more.append((headers.RETRY_AFTER, b"%d" % fault.retry_after_seconds))
    if status == 429:
        more.append((headers.LOAD_STATE, call.context.gate.state.encode()))
    if status == 405:
        more.append((b"allow", _allowed(error)))
    if status == 401:
        more.append((b"www-authenticate", b"Bearer"))
    await call.answer(faults.as_json(fault), status, more=more)


def _allowed(error: Exception) -> bytes:
    """The methods of a route that was asked by another."""
    given: Mapping[str, str] = getattr(error, "headers", None) or {}  # Starlette's error knows them
    return given.get("Allow", "POST").encode()


def _fault(call: Call, error: Exception) -> tuple[int, faults.Fault]:
    if isinstance(error, Refusal):
        return error.status, error.fault
    from starlette.exceptions import HTTPException

    if isinstance(error, HTTPException):  # Starlette's own: another method than the route has
        return error.status_code, faults.Fault("method_not_allowed", "this route takes another method")
    if isinstance(error, MillpondError):
        if isinstance(error, StoreError) and not isinstance(error, StoreClosed):
            _log_trouble(call, error)
        made: Callable[[MillpondError], tuple[int, faults.Fault]]
        made = faults.lockd if call.style == "lockd" else faults.native
        return made(error)
    log.error(
        "millpond.server.request_failed",
        extra={"route": call.route, "correlation_id": call.correlation_id},
        exc_info=error,
    )
    return faults.INTERNAL.status, faults.INTERNAL.fault


def _log_trouble(call: Call, error: StoreError) -> None:
    # The client is told little of it: what the storage says may name files and hosts.
    log.warning(
        "millpond.server.store_trouble",
        extra={
            "route": call.route,
            "correlation_id": call.correlation_id,
            "reason": f"{type(error).__name__}: {error}",
        },
    )
