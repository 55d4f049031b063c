"""The process of ``millpond serve``: everything that a config asks for, put together, and signals.

    SIGTERM, SIGINT   drain and end; once more: end at once
    SIGHUP            read tokens and certificates again, open the audit log anew

Exit codes: 0 drained; 1 it could not start, or broke; 2 wrong usage or settings; 143 and 130 (128 + the signal) when a
second signal cut the drain short.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from millpond.errors import InvalidInput
from millpond.pond import Pond
from millpond.server import tls, tokens
from millpond.server.audit import Audit
from millpond.server.auth import Authority, Guard
from millpond.server.config import ServerConfig, redact_url
from millpond.server.context import Context
from millpond.server.gate import LoadGate
from millpond.server.metrics import ServerMetrics
from millpond.server.observing import observe
from millpond.server.reload import Reloader
from millpond.server.run import Server
from millpond.server.tokens import Token
from millpond.server.tracing import tracing
from millpond.service.config import Config

log = logging.getLogger("millpond.server")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
YOUNG_OBJECTS = 20_000
"""Objects that Python makes before it looks for garbage among them; some megabytes."""
SPARE_DESCRIPTORS = 128
"""For what is no connection: the store's files, logs, libraries."""


def pond_config(config: ServerConfig) -> Config:
    """The limits of the pond that the server opens."""
    return Config(
        max_payload_bytes=config.max_payload_bytes,
        max_attributes_bytes=config.max_attributes_bytes,
        max_consumers=config.max_consumers,
    )


class Service:
    """A server with all that its config asks for, on an open pond."""

    def __init__(self, pond: Pond, config: ServerConfig) -> None:
        """Reads the files that the config names. Raises InvalidInput, StoreError where a package is missing."""
        config.check_exposure()
        self.config = config
        self.audit = Audit(pond.clock, config.log_audit)
        self.reloader = Reloader(pond.clock)
        self._tls: tls.Exchangeable | None = None
        self._tokens: dict[str, Token] = {}
        self.guard = self._make_guard(pond)
        if config.tls:
            self._tls = tls.Exchangeable(tls.context(config))
            self.reloader.watch("certificates", tls.files(config), self._load_certificates)
        self.metrics: ServerMetrics | None = None
        traces = tracing(config.traces, pond.clock)
        if not config.metrics_off:
            self.metrics = ServerMetrics(pond, queues=config.metrics_queues, version=own_version())
            observe(pond.service, self.metrics)
        if traces is not None:
            observe(pond.service, traces)
        authority: Authority = self.guard
        self.context = Context(
            pond, config, authority=authority, metrics=self.metrics, audit=self.audit, tracing=traces
        )
        self.server = Server(self.context, tls=self._tls)
        if self.metrics is not None:
            self._connect_metrics(self.metrics)

    def _make_guard(self, pond: Pond) -> Guard:
        path = self.config.auth_tokens
        found: list[Token] | None = None
        if path is not None:
            found = tokens.load(path)
            self._tokens = {token.id: token for token in found}
            self.reloader.watch("tokens", [path], self._load_tokens)
        return Guard(pond.clock, found, anonymous=self.config.anonymous, namespace=self.config.namespace)

    def _connect_metrics(self, metrics: ServerMetrics) -> None:
        server, guard, reloader = self.server, self.guard, self.reloader
        metrics.routes = server.app.paths
        metrics.gauges |= {
            "millpond_http_connections": lambda: server.connections,
            "millpond_consumers_waiting": lambda: self.context.pond.dispatcher.waiting,
            "millpond_auth_refused_total": lambda: guard.refused,
            "millpond_auth_forbidden_total": lambda: guard.forbidden,
            "millpond_draining": lambda: float(self.context.draining),
        }
        metrics.more |= {
            "millpond_http_connections_ended_total": lambda: {
                (reason,): number for reason, number in server.watch.refused.items()
            },
            "millpond_reloads_total": lambda: {("done",): reloader.reloads, ("failed",): reloader.failures},
        }
        gate = self.context.gate
        if isinstance(gate, LoadGate):
            metrics.gauges |= {
                "millpond_producers_held_back": lambda: float(gate.closed),
                "millpond_producers_waiting": lambda: gate.waiting,
                "millpond_producers_slowed_total": lambda: gate.slowed,
                "millpond_producers_slowed_seconds_total": lambda: gate.slowed_seconds,
            }
            metrics.more |= {
                "millpond_load_ratio": lambda: {(sign,): load for sign, load in gate.load().items()},
                "millpond_producers_refused_total": lambda: {
                    (reason,): number for reason, number in gate.refusals.items()
                },
            }

    # Reloading

    def _load_certificates(self) -> None:
        assert self._tls is not None
        before, now = self._tls.current, tls.context(self.config)
        self._tls.current = now
        if self.config.client_auth != "none":
            # Whoever was let in by a CA that may be gone now is to show his certificate again.
            gone = tls.no_longer_trusted(before, now)
            if gone is not None:
                self.server.watch.withdraw(gone)
            self.server.end_gently()
            self.context.rights_changed()

    def _load_tokens(self) -> None:
        assert self.config.auth_tokens is not None
        found = {token.id: token for token in tokens.load(self.config.auth_tokens)}
        before, self._tokens = self._tokens, found
        self.guard.replace(found.values())
        self.context.rights_changed()
        changes = {
            "added": [f"{id} {token.name}" for id, token in found.items() if id not in before],
            "removed": [f"{id} {token.name}" for id, token in before.items() if id not in found],
            "changed": [f"{id} {token.name}" for id, token in found.items() if before.get(id, token) != token],
        }
        if any(changes.values()):
            self.audit.note("tokens.changed", None, **{name: ids for name, ids in changes.items() if ids})

    def reload(self) -> None:
        """Read everything again, whether it has changed or not: what SIGHUP asks for."""
        self.reloader.check(force=True)
        try:
            self.audit.reopen()
        except InvalidInput as error:
            log.error("millpond.server.reload_failed", extra={"what": "audit log", "reason": str(error)})

    # Running

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Service]:
        """Listen for as long as the block runs. Raises OSError when the address cannot be had."""
        if self.metrics is not None:
            self.metrics.start()
        try:
            await self.server.start()
            self.reloader.start()
            try:
                yield self
            finally:
                self.reloader.stop()
                await self.server.stop()
        finally:
            if self.metrics is not None:
                self.metrics.stop()
            self.audit.close()


def own_version() -> str:
    """Of the package that is installed."""
    try:
        return version("millpond")
    except PackageNotFoundError:
        return "(not installed)"


class Signals:
    """What the process was told, on its event loop."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.stop = asyncio.Event()
        self.now = asyncio.Event()
        """Told a second time."""
        self.reload: Callable[[], object] = lambda: None

    def _hangup(self) -> None:
        self.reload()

    def told(self, number: int) -> None:
        """SIGTERM or SIGINT."""
        self.received.append(number)
        if not self.stop.is_set():
            self.stop.set()
            return
        self.now.set()
        for one in STOP_SIGNALS:  # should even that be too slow for somebody, a third one kills
            asyncio.get_running_loop().remove_signal_handler(one)

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handle signals while the block runs."""
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self.told, number)
        loop.add_signal_handler(signal.SIGHUP, self._hangup)
        try:
            yield
        finally:
            for number in (*STOP_SIGNALS, signal.SIGHUP):
                loop.remove_signal_handler(number)


async def run(pond: Pond, config: ServerConfig, *, ready: Callable[[str], object] = lambda url: None) -> int:
    """Serve an unopened pond until a signal says otherwise; the exit code. Raises InvalidInput, StoreError, OSError."""
    signals = Signals()
    allow_connections(config.max_connections)
    with signals.handled():
        async with pond:
            service = Service(pond, config)
            signals.reload = service.reload
            log.info(
                "millpond.server.starting",
                extra={"version": own_version(), "store": redact_url(config.store), "anonymous": config.anonymous},
            )
            async with service.running():
                ready(service.server.url)
                notify("READY=1")
                await signals.stop.wait()
                notify("STOPPING=1")
                await _unless(signals.now, service.server.drain())
                await _unless(signals.now, service.server.stop())
                if signals.now.is_set():
                    log.warning("millpond.server.killed", extra={"connections": service.server.connections})
                    service.server.abort()
    return 128 + signals.received[-1] if signals.now.is_set() else 0


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Do the work, but give it up when the event comes."""
    task = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
        if not task.done():
            task.cancel()
        await asyncio.gather(task, waiting, return_exceptions=True)
    if not task.cancelled():
        task.result()


def allow_connections(number: int) -> None:
    """Let the process have that many connections, as far as it may; where it may not, say so now rather than at the
    first connection too many."""
    import resource

    wanted = number + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    possible = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
    if possible < wanted:
        log.warning(
            "millpond.server.few_descriptors",
            extra={"allowed": possible, "wanted": wanted, "cure": "raise LimitNOFILE, or lower limit.connections"},
        )


def notify(state: str) -> None:
    """Tell systemd, where it asked to be told (``Type=notify``)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
        # Nobody is the worse for it if systemd has stopped listening; it kills by its own time-outs then.
        to.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def main(pond: Callable[[], Pond], config: ServerConfig, *, ready: Callable[[str], object]) -> int:
    """Run the server in this process, on the fastest loop that is installed; the exit code."""
    factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    try:
        import uvloop
    except ModuleNotFoundError:
        pass  # not every platform has it
    else:
        factory = uvloop.new_event_loop

    async def whole() -> int:
        return await run(pond(), config, ready=ready)

    # Requests leave nothing behind that goes in circles, so looking for such garbage after each 700 objects is a tenth
    # of the time for nothing. What was imported stays, and need not be looked through at all.
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(whole())
