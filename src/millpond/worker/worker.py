"""`Worker`: runs a pond's consumers until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from millpond.errors import InvalidInput, StoreClosed
from millpond.pond import Pond
from millpond.worker.binding import Bound
from millpond.worker.hooks import Middleware, Service
from millpond.worker.jobs import pause
from millpond.worker.lag import Watchdog
from millpond.worker.leases import LoopRenewals, Renewals, ThreadRenewals
from millpond.worker.line import Line, overridden
from millpond.worker.outcomes import KINDS
from millpond.worker.processes import address
from millpond.worker.registry import Consumer

log = logging.getLogger("millpond.worker")

GRACE = 30.0
"""Seconds that running handlers have when a worker stops; as long as Kubernetes waits by default."""
UNWIND = 1.0
"""Seconds that handlers have to end once they have been cancelled because the worker leaves."""
LAST_ANSWERS = 5.0
"""Seconds for answers that the store does not take at the end; what is unanswered then comes back by itself."""
SERVICE_PAUSE = 1.0
"""Seconds before a service that failed is run again; it doubles up to `LONGEST_SERVICE_PAUSE`."""
LONGEST_SERVICE_PAUSE = 60.0


class Worker:
    """Runs consumers of a pond on the running event loop, one worker per process and pond.

    `millpond worker` runs one with signals, a probe and several processes; use this to run consumers beside other code.
    """

    def __init__(
        self,
        pond: Pond,
        consumers: Iterable[Consumer | str] | None = None,
        *,
        middleware: Sequence[Middleware] = (),
        services: Sequence[Service] | None = None,
        owner: str | None = None,
        grace: float = GRACE,
    ) -> None:
        """``consumers``: which of the pond's, by name, or others; default all of them. ``middleware``: outside of the
        pond's. ``services``: default the pond's. ``owner``: the holder of the leases, as operators see it; default host
        and process. ``grace``: seconds that handlers have to end when it stops. Raises InvalidInput."""
        given: Any = pond
        if not isinstance(given, Pond):
            raise InvalidInput(f"a worker runs on a pond from millpond.connect(url), not on a {type(given).__name__}")
        self.pond = pond
        chosen: list[Consumer] = []
        for each in pond.consumers.values() if consumers is None else consumers:
            if isinstance(each, Consumer):
                chosen.append(each)
            elif each in pond.consumers:
                chosen.append(pond.consumers[each])
            else:
                known = ", ".join(sorted(pond.consumers)) or "none"
                raise InvalidInput(f"there is no consumer {each!r}; the pond has: {known}")
        names = [consumer.name for consumer in chosen]
        if twice := {name for name in names if names.count(name) > 1}:
            raise InvalidInput(
                f"a worker runs a consumer once; give one of them another name: {', '.join(sorted(twice))}"
            )
        self._bound = [Bound(consumer) for consumer in chosen]
        for bound in self._bound:
            if bound.run_in == "process":
                address(bound.consumer)
        self._services = list(pond.services if services is None else services)
        if not self._bound and not self._services:
            raise InvalidInput("there is nothing to run: register a function with @pond.consumer(queue)")
        self._middleware = (*middleware, *pond.middleware)
        self._owner = owner or f"{socket.gethostname()}:{os.getpid()}"
        self._grace = grace
        self._stops = 0
        self._stop_grace = grace
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self._failure: BaseException | None = None
        self._lines: list[Line] = []

    def add_service(self, service: Service) -> None:
        """Also run this beside the consumers; before `run`."""
        self._services.append(service)

    @property
    def stopping(self) -> bool:
        """It takes nothing more."""
        return self._stopping.is_set()

    @property
    def lines(self) -> Sequence[Line]:
        """Its consumers at work; for probes and tests."""
        return self._lines

    def counts(self) -> dict[str, int]:
        """What became of the messages: ``ack``, ``retry``, ``dead``, ``defer``, ``lost``, ``answered`` (by the handler
        itself)."""
        total: dict[str, int] = dict.fromkeys(KINDS, 0)
        for line in self._lines:
            for kind, count in line.counts.items():
                total[kind] += count
        return total

    def stop(self, *, grace: float | None = None) -> None:
        """Take no more; running handlers have ``grace`` seconds (default the worker's) to end, then they are cancelled
        and their messages given back. Called once more: cancel them at once. From the worker's event loop."""
        if self._stopping.is_set():
            self._hurry.set()
            return
        if grace is not None:
            self._stop_grace = grace
        self._stopping.set()

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
        self._stopping.set()

    async def run(self) -> None:
        """Open the pond if it is not, run the consumers until `stop`, answer for every message, and put things back.

        Outages of the store are waited out. Raises what cannot be: InvalidInput for a handler that cannot be called,
        StoreError when the store cannot be opened, StoreClosed when the pond is closed under it. When the task is
        cancelled, handlers are cancelled and their messages given back first."""
        if self._lines:
            raise InvalidInput("a worker runs once; make another")
        opened = not self.pond.is_open
        await self.pond.open()
        try:
            await self._session()
        finally:
            if opened:
                await self.pond.close()
        if self._failure is not None:
            raise self._failure

    async def _session(self) -> None:
        renewals = self._renewals()
        watchdog = Watchdog()
        services: list[asyncio.Task[None]] = []
        self._lines = [
            Line(self.pond, bound, renewals, self._middleware, self._owner, self._fail) for bound in self._bound
        ]
        try:
            await renewals.start()
            watchdog.start()
            await self._tell("start")
            log.info(
                "millpond.worker.started",
                extra={"consumers": [line.consumer.name for line in self._lines], "owner": self._owner},
            )
            for line in self._lines:
                line.start()
            services += [asyncio.create_task(self._serve(service)) for service in self._services]
            try:
                await self._stopping.wait()
            except asyncio.CancelledError:
                self._stop_grace = 0.0
                self._stopping.set()
                await self._leave(services)
                raise
            await self._leave(services)
        finally:
            await self._cancel(services)
            for line in self._lines:
                await line.close()
            watchdog.stop()
            await renewals.stop()
            await self._tell("stop")
            log.info("millpond.worker.stopped", extra=self.counts())

    def _renewals(self) -> Renewals:
        if self.pond.twin() is not None:
            return ThreadRenewals(self.pond.twin, self.pond.clock, self._fail)
        return LoopRenewals(self.pond)

    async def _tell(self, hook: str) -> None:
        for line in self._lines:
            own = overridden(line.consumer.middleware, hook)
            for each in own:
                await each()
        for each in overridden(self._middleware, hook):
            await each()

    async def _serve(self, service: Service) -> None:
        times = 0
        while True:
            try:
                await service.run()
                return
            except StoreClosed:
                return
            except Exception:  # a user's or a scheduler's own; it is told, and tried again
                log.error("millpond.worker.service_failed", exc_info=True, extra={"service": service.name})
            await pause(self.pond.clock, min(LONGEST_SERVICE_PAUSE, SERVICE_PAUSE * 2.0 ** min(times, 10)))
            times += 1

    async def _cancel(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        left = [task for task in tasks if not task.done()]
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)

    # Leaving

    async def _leave(self, services: Sequence[asyncio.Task[None]]) -> None:
        log.info("millpond.worker.stopping", extra={"grace": self._stop_grace})
        for line in self._lines:
            line.stop()
        await self._cancel(services)
        if isinstance(self._failure, StoreClosed):
            for line in self._lines:  # nothing can be answered any more
                line.cancel_all()
            return
        if await self._until(self._finished, self._stop_grace, hurry=True):
            return
        for line in self._lines:
            line.cancel_all()
        if not await self._until(lambda: not any(line.running for line in self._lines), UNWIND):
            for line in self._lines:
                line.abandon_all()
        await self._until(lambda: not any(line.held or line.taking for line in self._lines), LAST_ANSWERS)

    def _finished(self) -> bool:
        return all(line.quiet and not line.taking for line in self._lines)

    async def _until(self, done: Callable[[], bool], seconds: float, *, hurry: bool = False) -> bool:
        """Wait for a condition on the lines; whether it came true within ``seconds``. ``hurry``: `stop` ends it."""
        over = asyncio.Event()
        timer = self.pond.clock.call_later(seconds, over.set)
        waits: set[asyncio.Task[Any]] = {asyncio.ensure_future(over.wait())}
        if hurry:
            waits.add(asyncio.ensure_future(self._hurry.wait()))
        try:
            while not done():
                for line in self._lines:
                    line.changed.clear()
                changes = {asyncio.ensure_future(line.changed.wait()) for line in self._lines}
                try:
                    await asyncio.wait(waits | changes, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for change in changes:
                        change.cancel()
                if any(wait.done() for wait in waits):
                    return done()
            return True
        finally:
            timer.cancel()
            for wait in waits:
                wait.cancel()
