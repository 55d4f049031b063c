"""A log line for each message that was handled."""

from __future__ import annotations

import logging
from typing import Any

from millpond.model.clock import Clock, SystemClock
from millpond.worker.hooks import Context, Middleware
from millpond.worker.outcomes import Outcome

log = logging.getLogger("millpond.handler")


class Logs(Middleware):
    """Logs to ``millpond.handler``: a start (debug), an end (info), a failure (warning), with what the message is and
    how long it took. Payloads, attributes and keys are not logged."""

    def __init__(self, *, clock: Clock | None = None) -> None:
        """``clock``: what times are measured by; default the machine's."""
        self._clock = clock or SystemClock()

    def _fields(self, context: Context) -> dict[str, Any]:
        message = context.message
        return {
            "consumer": context.consumer,
            "queue": message.queue,
            "message_id": message.id,
            "attempts": message.attempts,
        }

    def _seconds(self, context: Context) -> float | None:
        started = context.values.get(self)
        return None if started is None else round(self._clock.monotonic() - started, 6)

    async def before(self, context: Context) -> None:
        """A handler begins."""
        context.values[self] = self._clock.monotonic()
        log.debug("millpond.handler.started", extra=self._fields(context))

    async def after(self, context: Context, result: Any) -> None:
        """It returned."""
        log.info("millpond.handler.done", extra={**self._fields(context), "seconds": self._seconds(context)})

    async def error(self, context: Context, error: BaseException | None, outcome: Outcome) -> None:
        """It did not."""
        fields = {**self._fields(context), "seconds": self._seconds(context)}
        if outcome.kind == "defer":
            log.info("millpond.handler.deferred", extra={**fields, "delay": outcome.delay, "reason": outcome.reason})
            return
        log.warning(
            "millpond.handler.failed",
            extra={**fields, "outcome": outcome.kind, "delay": outcome.delay, "reason": outcome.reason},
        )
