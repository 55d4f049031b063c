"""Running the application: sockets, the protocol, the drain.

uvicorn's protocol, on sockets that asyncio opens by host and port. A socket that was bound beforehand can lack
TCP_NODELAY, which costs each answer on a connection that is kept 40 ms; uvicorn's own main loop wakes ten times a
second and leaves the process when it cannot bind.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from email.utils import formatdate
from typing import TYPE_CHECKING, Any

from millpond.errors import InvalidInput, StoreError
from millpond.pond import Pond
from millpond.server.auth import OpenAuthority
from millpond.server.config import ServerConfig
from millpond.server.context import Context, CutOff

if TYPE_CHECKING:
    from millpond.server.app import App

log = logging.getLogger("millpond.server")

EXTRA = "the server needs more packages: pip install 'millpond[server]'"
NOSNIFF = (b"x-content-type-options", b"nosniff")
"""No browser is to take an answer for a page."""
DRAIN_LOOK = 0.05
"""Seconds between looks whether the last connection has ended."""


class Server:
    """A server on a pond, which stays its caller's to open and to close."""

    def __init__(self, context: Context, *, tls: ssl.SSLContext | None = None, port: int | None = None) -> None:
        """``tls``: a server's context, made by the caller. ``port``: None for the config's. Raises StoreError where a
        package is missing, InvalidInput where it would be open to others without consent, or the config asks for more
        than it is given."""
        try:
            import httptools  # noqa: F401
            import starlette  # noqa: F401
            import uvicorn
            from uvicorn.server import ServerState
        except ModuleNotFoundError as error:
            raise StoreError(f"{EXTRA} ({error.name} is missing)") from error
        from millpond.server.app import App
        from millpond.server.connections import Watch

        self.context = context
        self.app: App = App(context)
        config = context.config
        config.check_exposure()
        if (config.tls and tls is None) or (config.auth_tokens and isinstance(context.authority, OpenAuthority)):
            # Whoever wrote these settings relies on them.
            raise InvalidInput(
                "the config asks for TLS or tokens: have millpond.server.process.Service start the server"
            )
        self._tls = tls
        self._port = config.port if port is None else port
        self._settings = uvicorn.Config(
            self.app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=int(config.keep_alive),
        )
        self._settings.load()
        logging.getLogger("uvicorn.error").addFilter(_foreseen)
        self._state = ServerState()
        self.watch = Watch(config, context.pond.clock)
        """Limits of the connections, and the sweep that holds them to it."""
        self._server: asyncio.Server | None = None
        self._date: asyncio.TimerHandle | None = None
        self.url = ""
        """Where it listens, once started."""

    async def start(self) -> None:
        """Listen. Raises OSError, in words, when the address cannot be had."""
        config = self.context.config
        loop = asyncio.get_running_loop()
        from millpond.server.connections import Connection

        def connect() -> asyncio.Protocol:
            return Connection(
                self.watch,
                application=self.app,
                config=self._settings,
                server_state=self._state,
                app_state={},
                _loop=loop,
            )

        more: dict[str, Any] = {}
        if self._tls is not None:
            # Until a handshake is over there is no connection that the sweep could see.
            more = {"ssl": self._tls, "ssl_handshake_timeout": config.header_timeout}
        self._tick()
        try:
            self._server = await loop.create_server(
                connect, host=config.host, port=self._port, backlog=config.backlog, **more
            )
        except OSError as error:
            self._stop_ticking()
            raise OSError(f"cannot listen on {config.host} port {self._port}: {error.strerror or error}") from error
        name = self._server.sockets[0].getsockname()
        host = f"[{name[0]}]" if ":" in name[0] else name[0]
        self.url = f"{'https' if self._tls else 'http'}://{host}:{name[1]}"
        self.watch.start()
        log.info("millpond.server.listening", extra={"url": self.url})

    def _tick(self) -> None:
        """The Date header, once a second."""
        date = formatdate(self.context.pond.clock.now_ms() / 1000, usegmt=True).encode()
        self._state.default_headers = [(b"date", date), NOSNIFF]
        self._date = asyncio.get_running_loop().call_later(1.0, self._tick)

    def _stop_ticking(self) -> None:
        if self._date is not None:
            self._date.cancel()
            self._date = None

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._state.connections)

    async def drain(self) -> None:
        """Hand out nothing more; return when nothing is under way and nobody holds a message of this server, or after
        `drain_grace` seconds."""
        self.context.begin_drain()
        log.info("millpond.server.draining", extra={"connections": self.connections})

        def idle() -> bool:
            return not self._state.connections or not (self._state.tasks or self.context.held)

        await self._until_idle(self.context.config.drain_grace, idle)

    async def stop(self) -> None:
        """Refuse new connections, let what is under way finish for `shutdown_timeout` seconds, cut off the rest. Safe
        to repeat."""
        server, self._server = self._server, None
        if server is None:
            return
        self.context.begin_drain()
        server.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        left = lambda: not self._state.tasks  # noqa: E731
        if not await self._until_idle(self.context.config.shutdown_timeout, left):
            log.warning("millpond.server.cut_short", extra={"requests": len(self._state.tasks)})
            for task in list(self._state.tasks):
                task.cancel()
        if self._state.tasks:
            await asyncio.gather(*self._state.tasks, return_exceptions=True)
        for connection in list(self._state.connections):
            connection.transport.abort()
        await self.context.settle()
        await server.wait_closed()
        self.watch.stop()
        self._stop_ticking()
        log.info("millpond.server.stopped", extra={"url": self.url})

    def end_gently(self) -> None:
        """Close the connections that are idle, and the others after their answer."""
        for connection in list(self._state.connections):
            connection.shutdown()

    def abort(self) -> None:
        """Cut off everything that is under way, at once."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in list(self._state.tasks):
            task.cancel()
        for connection in list(self._state.connections):
            connection.transport.abort()
        self.watch.stop()
        self._stop_ticking()

    @staticmethod
    async def _until_idle(seconds: float, idle: Callable[[], bool]) -> bool:
        """Whether it became idle within so many seconds."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while not idle():
            left = end - loop.time()
            if left <= 0:
                return False
            await asyncio.sleep(min(DRAIN_LOOK, left))
        return True


def _foreseen(record: logging.LogRecord) -> bool:
    """Let the protocol not report a traceback for what was reported already."""
    return record.exc_info is None or not isinstance(record.exc_info[1], CutOff)


async def serve(
    pond: Pond,
    config: ServerConfig | None = None,
    *,
    stop: asyncio.Event,
    context: Context | None = None,
    tls: ssl.SSLContext | None = None,
    ready: Callable[[str], object] = lambda url: None,
) -> None:
    """Serve an open pond until ``stop`` is set, then drain and return. ``ready`` is told the URL. Raises OSError when
    the address cannot be had, StoreError where a package is missing."""
    server = Server(context or Context(pond, config), tls=tls)
    await server.start()
    try:
        ready(server.url)
        await stop.wait()
        await server.drain()
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def running(
    pond: Pond,
    config: ServerConfig | None = None,
    *,
    context: Context | None = None,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[str]:
    """``async with running(pond) as url``: a server on a free port of 127.0.0.1 (unless ``config`` says otherwise) for
    as long as the block runs. For tests, and for programs that serve beside other work."""
    port = None if config is not None else 0
    if context is None:
        context = Context(pond, config or ServerConfig(drain_grace=0.0, shutdown_timeout=1.0))
    server = Server(context, tls=tls, port=port)
    await server.start()
    try:
        yield server.url
    finally:
        await server.stop()
