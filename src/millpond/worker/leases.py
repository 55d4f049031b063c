"""Renewing the leases of what a worker holds.

Invariant: a lease is renewed from the claim to the answer, whatever the handler does. A handler that blocks the event
loop, or burns CPU, must not stop it, so it is done by a thread of its own, on an event loop of its own, through a pond
of its own on the same store (`ThreadRenewals`). Python lets that thread run every few milliseconds; only code that
never lets go of the interpreter (a long call into C that keeps its lock) holds it up, and belongs into a process.

Where there is no second pond (`Pond.twin`: memory, a store of one's own, a clock of one's own), renewals run on the
worker's own loop (`LoopRenewals`), so that a handler that blocks it also stops them. In memory that loop is the only
one on which anybody could take the message meanwhile, and `due_now` lets the worker renew before it takes again.

Each is renewed when a third of it is over. Nothing is done per message before that: the thread sleeps until
the earliest that it knows of, and then looks at what is still held.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from millpond.errors import LeaseLost, MillpondError
from millpond.model.clock import Clock
from millpond.model.text import clipped
from millpond.pond import Pond
from millpond.queue import Queue
from millpond.worker.failures import REASON_LIMIT
from millpond.worker.renewing import Renewable, Renewer

log = logging.getLogger("millpond.worker")

SHARE = 3
"""Renewals per lease length: two may fail and the third still comes in time."""
RETRIES = 12
"""Tries per lease length once a renewal has failed for a passing reason."""
FIRST_PAUSE = 1.0
"""Seconds until the renewing thread's pond is opened again, when that failed; often enough for a lease of 30."""
LAST_WAIT = 5.0
"""Seconds for which the thread is waited for; it may be amid a call to a store that does not answer."""

Lost = Callable[[Any, str], object]


class Renewals(Renewer, Protocol):
    """Who renews, as the worker has it."""

    apart: bool
    """In a thread of its own."""

    async def start(self) -> None:
        """Begin."""

    async def due_now(self) -> None:
        """Renew what is overdue, if this loop is the one that does it."""

    async def stop(self) -> None:
        """No renewal is under way when this returns."""


class _Round:
    """What both ways have in common: one look at what is held."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._sources: list[tuple[Callable[[], Iterable[Renewable]], Lost]] = []

    def watch(self, held: Callable[[], Iterable[Renewable]], lost: Lost) -> None:
        """Also renew what ``held`` says is held, and tell ``lost`` what could not be."""
        self._sources.append((held, lost))

    def _tell(self, callback: Callable[..., object], *args: object) -> None:
        """Call back, on the worker's loop."""
        callback(*args)

    def _held(self) -> list[tuple[Renewable, Lost]]:
        found: list[tuple[Renewable, Lost]] = []
        for source, lost in self._sources:
            while True:
                try:
                    found += [(one, lost) for one in list(source())]
                    break
                except RuntimeError:  # the loop's thread took or settled something amid the copy; look again
                    continue
        return found

    async def _renew(self, pond: Pond, *, by_handle: bool) -> float:
        """Renew what is due; when the next is. ``by_handle``: the messages came by another pond."""
        now = self._clock.monotonic()
        due: defaultdict[tuple[str, str, float], list[tuple[Renewable, Lost]]] = defaultdict(list)
        for one, lost in self._held():
            if one.renew_at <= now and one.wants_lease:
                due[one.message.namespace, one.message.queue, one.span].append((one, lost))
        for (namespace, queue, span), together in due.items():
            await self._extend(pond.queue(queue, namespace=namespace), span, together, by_handle)
        return min((one.renew_at for one, _ in self._held() if one.wants_lease), default=math.inf)

    async def _extend(self, queue: Queue, span: float, together: list[tuple[Renewable, Lost]], by_handle: bool) -> None:
        asked = self._clock.monotonic()
        messages = []
        for one, _ in together:
            if by_handle and one.handle is None:
                lease = one.message.lease
                one.handle = queue.handle(one.message.id, lease.id, lease.token)
            messages.append(one.message if one.handle is None else one.handle)
        errors: list[MillpondError | None]
        try:
            errors = [answer.error for answer in await queue.extend_many(messages, span)]
        except MillpondError as failure:
            errors = [failure] * len(together)
        now = self._clock.monotonic()
        for (one, lost), error in zip(together, errors, strict=True):
            if error is None:
                one.ends = asked + span
                one.renew_at = asked + span / SHARE
            elif one.ending:
                one.renew_at = now + span / RETRIES  # the answer and the renewal met
            elif isinstance(error, LeaseLost):
                one.renew_at = now + span
                self._tell(lost, one, str(error))
            else:
                self._failed(one, lost, now, error)

    def _failed(self, one: Renewable, lost: Lost, now: float, error: MillpondError) -> None:
        one.renew_at = now + one.span / RETRIES
        reason = clipped(str(error), REASON_LIMIT)
        one.not_renewed(reason)
        if now >= one.ends and not one.ending:
            self._tell(lost, one, f"the lease ran out while it could not be renewed: {reason}")


class LoopRenewals(_Round):
    """On the worker's own loop, by the pond that took the messages."""

    apart = False

    def __init__(self, pond: Pond) -> None:
        super().__init__(pond.clock)
        self._pond = pond
        self.due = math.inf
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()

    def expect(self, at: float) -> None:
        """There is something to renew at ``at``, earlier than ``due``."""
        self.due = at
        self._wake.set()

    async def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run(), name="millpond renewals")

    async def due_now(self) -> None:
        """Renew what is overdue."""
        async with self._turn:
            if self.due <= self._clock.monotonic():
                self.due = await self._renew(self._pond, by_handle=False)

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            if self.due == math.inf:
                await self._wake.wait()
                continue
            left = self.due - self._clock.monotonic()
            if left > 0:
                timer = self._clock.call_later(left, self._wake.set)
                try:
                    await self._wake.wait()
                finally:
                    timer.cancel()
            await self.due_now()

    async def stop(self) -> None:
        """No renewal is under way when this returns."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))


class ThreadRenewals(_Round):
    """In a thread of its own, by a pond of its own."""

    apart = True

    def __init__(self, twin: Callable[[], Pond | None], clock: Clock, failed: Callable[[BaseException], None]) -> None:
        """``failed`` is called on the loop that starts this: renewing cannot go on."""
        super().__init__(clock)
        self._loop = asyncio.get_running_loop()
        self._twin = twin
        self._fail = failed
        self.due = math.inf
        self._own: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None
        self._ready = asyncio.Event()
        self._ended = asyncio.Event()
        self._ending = False
        self._thread = threading.Thread(target=self._serve, name="millpond renewals", daemon=True)

    def _tell(self, callback: Callable[..., object], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the worker's loop has ended; there is nobody left to tell
            self._loop.call_soon_threadsafe(callback, *args)

    def expect(self, at: float) -> None:
        """There is something to renew at ``at``, earlier than ``due``."""
        self.due = at
        self._stir()

    def _stir(self) -> None:
        if self._own is not None and self._wake is not None:
            with contextlib.suppress(RuntimeError):  # it has ended, and the worker has been told
                self._own.call_soon_threadsafe(self._wake.set)

    async def start(self) -> None:
        """Begin; returns when the thread can renew, or has found that it cannot yet."""
        self._thread.start()
        with contextlib.suppress(TimeoutError):  # it goes on trying; so do claims
            async with asyncio.timeout(LAST_WAIT):
                await self._ready.wait()

    async def due_now(self) -> None:
        """Nothing: the thread does it."""

    async def stop(self) -> None:
        """No renewal is under way when this returns, unless the store did not answer for `LAST_WAIT` seconds."""
        self._ending = True
        self._stir()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WAIT):
                await self._ended.wait()

    # In the thread

    def _serve(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            log.error("millpond.worker.renewals_failed", exc_info=True)
            self._tell(self._fail, error)
        finally:
            self._tell(self._ready.set)
            self._tell(self._ended.set)

    async def _main(self) -> None:
        self._wake = asyncio.Event()
        self._own = asyncio.get_running_loop()
        pond: Pond | None = None
        try:
            while not self._ending:
                self._wake.clear()
                # What is claimed from here on, and may be missing below, is told by `expect`, which sees this.
                self.due = math.inf
                try:
                    if pond is None:
                        pond = await self._open()
                    due = await self._renew(pond, by_handle=True)
                except MillpondError as error:
                    due = self._cannot_open(error)
                self._tell(self._ready.set)
                self.due = min(self.due, due)
                await self._sleep()
        finally:
            if pond is not None:
                await pond.close()

    async def _open(self) -> Pond:
        pond = self._twin()
        assert pond is not None, "only ponds with a twin are renewed from a thread"
        return await pond.open()

    def _cannot_open(self, error: MillpondError) -> float:
        now = self._clock.monotonic()
        for one, lost in self._held():
            if one.renew_at <= now and one.wants_lease:
                self._failed(one, lost, now, error)
        return now + FIRST_PAUSE

    async def _sleep(self) -> None:
        assert self._wake is not None
        left = self.due - self._clock.monotonic()
        timer = None if left == math.inf else self._clock.call_later(max(0.0, left), self._wake.set)
        try:
            await self._wake.wait()
        finally:
            if timer is not None:
                timer.cancel()
