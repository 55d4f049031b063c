"""What a handler, and whoever stands around handlers, gets to see of a message's handling.

A `Middleware` is told before and after each handler and when one fails. A `Gate` says how many may start now: rate and
concurrency limits. A `Service` runs beside the consumers for as long as the worker does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from millpond.message import Message
    from millpond.worker.outcomes import Outcome


class Context:
    """The handling of one message, from before its handler to the answer. Handlers get it by annotating a parameter
    with it; middleware is given it with each call, and may keep things of its own in `values`."""

    __slots__ = ("_cancelled", "_then", "_values", "consumer", "deadline", "message", "payload", "started")

    def __init__(self, consumer: str, message: Message, started: float, deadline: float | None) -> None:
        self.consumer = consumer
        """The consumer's name."""
        self.message = message
        """The message; asynchronous, also where the handler is not."""
        self.payload: Any = None
        """The payload as the handler gets it, decoded."""
        self.started = started
        """When handling began, by the pond's monotonic clock."""
        self.deadline = deadline
        """When the time limit ends it, by the same clock; None without a limit."""
        self._cancelled = False
        self._then: list[tuple[Any, ...]] | None = None
        self._values: dict[Any, Any] | None = None

    @property
    def values(self) -> dict[Any, Any]:
        """For middleware: whatever it wants to find again in the message's next hook."""
        if self._values is None:
            self._values = {}
        return self._values

    def hand_off(self, queue: str, payload: Any, **options: Any) -> None:
        """Enqueue this in the same commit as the ack: both happen or neither. ``options``: as for `Queue.enqueue`, and
        ``namespace``. Nothing is enqueued unless the handler returns normally."""
        if self._then is None:
            self._then = []
        self._then.append((queue, payload, options))

    @property
    def cancelled(self) -> bool:
        """The lease was lost, the time is up, or the worker is leaving: the message will not be acked. For handlers in
        threads that want to end early; those on the event loop are cancelled anyway."""
        return self._cancelled


class Middleware:
    """Stands around handlers. Override what is needed; what is not overridden costs nothing.

    An exception out of `before` or `after` counts as the handler's own. One out of `error` is logged
    (``millpond.worker.hook_failed``) and changes nothing."""

    async def before(self, context: Context) -> None:
        """The payload is decoded and fits, the handler comes next. In the order in which middleware was added."""

    async def after(self, context: Context, result: Any) -> None:
        """The handler returned ``result``; the message is not acked yet. In the opposite order."""

    async def error(self, context: Context, error: BaseException | None, outcome: Outcome) -> None:
        """The handler did not return normally, or the payload does not fit; this will be the answer (``answered``: the
        handler has given one by itself, and raised then). ``error`` is None where nothing was raised (a handler that
        returned although its lease was lost). In the opposite order. Also called for those whose `before` was not,
        because the payload did not fit or another's `before` failed."""

    async def settled(self, context: Context, kind: str) -> None:
        """The message has been answered for (``kind`` as in `Outcome`), or was lost; it is not to be had any more."""

    async def start(self) -> None:
        """The worker starts taking messages."""

    async def stop(self) -> None:
        """The worker has answered for all messages and is about to end."""


class Gate(Protocol):
    """How many handlers of a consumer may start. Calls come from the worker's event loop, one `admit` at a time."""

    async def admit(self, wanted: int) -> int:
        """Wait until at least one may start; how many may, at most ``wanted``. May be cancelled."""

    def unused(self, count: int) -> None:
        """Of those admitted, so many did not start: there were not as many messages."""

    def ended(self, count: int) -> None:
        """So many that started have ended, however."""


class Service(Protocol):
    """Something that runs beside the consumers, such as a scheduler."""

    @property
    def name(self) -> str:
        """For the logs."""

    async def run(self) -> None:
        """Work until cancelled. An exception is logged, and it is run again after a pause."""
