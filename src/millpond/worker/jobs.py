"""`Job`: one message in a worker's hands, from the claim to the answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from millpond.message import Lease, Message
from millpond.model.clock import Clock
from millpond.worker.hooks import Context

if TYPE_CHECKING:
    from millpond.worker.threads import Call

log = logging.getLogger("millpond.worker")

Why = Literal["lost", "time", "stop"]
"""Why a handler was cancelled: the lease is gone, its time is up, or the worker leaves."""


class Job:
    """A message that was taken. The renewing thread reads ``message`` and writes ``ends`` and ``renew_at``; everything
    else belongs to the worker's event loop."""

    __slots__ = (
        "abandoned",
        "answered",
        "call",
        "context",
        "ends",
        "entered",
        "handle",
        "message",
        "renew_at",
        "settling",
        "span",
        "task",
        "why",
    )

    def __init__(self, message: Message, context: Context, span: float, ends: float, renew_at: float) -> None:
        self.message = message
        self.context = context
        self.span = span
        """Seconds for which the lease is taken, and renewed."""
        self.ends = ends
        """When the lease ends as far as is known, by the monotonic clock."""
        self.renew_at = renew_at
        self.handle: Message | None = None
        """The message as the renewing thread's own pond knows it."""
        self.task: asyncio.Task[None] | None = None
        self.entered = False
        """The task has begun: one that is cancelled before would end without ever having looked."""
        self.call: Call | None = None
        """The handler's call in a thread, while there is one."""
        self.why: Why | None = None
        self.settling = False
        """It is being answered for: a lease that is gone then is no news."""
        self.answered = ""
        """The handler answered by itself, and how."""
        self.abandoned = False
        """The handler did not end when it was cancelled, and was answered for without it."""

    @property
    def wants_lease(self) -> bool:
        """Its lease is to be renewed."""
        return self.why != "lost" and not self.answered

    @property
    def ending(self) -> bool:
        """It is being answered for, or was."""
        return self.settling or bool(self.answered)

    def not_renewed(self, reason: str) -> None:
        """Its lease could not be renewed just now."""
        log.warning(
            "millpond.worker.not_renewed",
            extra={"queue": self.message.queue, "message_id": self.message.id, "reason": reason},
        )

    def cancel(self, why: Why) -> None:
        """Have the handler end. The first reason counts."""
        if self.why is not None:
            return
        self.why = why
        self.context._cancelled = True
        if self.call is not None:
            self.call.interrupt()
        elif self.task is not None and self.entered:
            self.task.cancel()


class HandledMessage(Message):
    """The message as its handler gets it: as any other, and what the handler answers by itself is noticed."""

    __slots__ = ("_job",)

    def __init__(self, job: Job) -> None:
        super().__init__(job.message._service, job.message._delivery)
        self._job = job

    async def ack(self, then: Sequence[tuple[Any, ...]] = ()) -> None:
        """As `Message.ack`; the worker then leaves the message alone."""
        self._job.settling = True
        try:
            await super().ack(then)
        except BaseException:
            self._job.settling = False
            raise
        self._job.answered = "ack"

    async def nack(self, error: Any = None, delay: float = 0.0) -> None:
        """As `Message.nack`; the worker then leaves the message alone."""
        self._job.settling = True
        try:
            await super().nack(error, delay)
        except BaseException:
            self._job.settling = False
            raise
        self._job.answered = "retry"

    async def defer(self, delay: float = 0.0) -> None:
        """As `Message.defer`; the worker then leaves the message alone."""
        self._job.settling = True
        try:
            await super().defer(delay)
        except BaseException:
            self._job.settling = False
            raise
        self._job.answered = "defer"

    async def bury(self, reason: str, error: Any = None) -> None:
        """As `Message.bury`; the worker then leaves the message alone."""
        self._job.settling = True
        try:
            await super().bury(reason, error)
        except BaseException:
            self._job.settling = False
            raise
        self._job.answered = "dead"

    async def extend(self, seconds: float) -> Lease:
        """As `Message.extend`. The worker renews the lease anyway, for as long as it was taken for."""
        return await super().extend(seconds)


async def pause(clock: Clock, seconds: float) -> None:
    """Sleep by the pond's clock."""
    over = asyncio.Event()
    timer = clock.call_later(seconds, over.set)
    try:
        await over.wait()
    finally:
        timer.cancel()
