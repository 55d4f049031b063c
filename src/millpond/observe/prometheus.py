"""Counters and times of handlers for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from millpond.errors import MillpondError
from millpond.model.clock import Clock, SystemClock
from millpond.worker.hooks import Context, Middleware
from millpond.worker.outcomes import Outcome

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
"""Seconds: handlers take anything from a few milliseconds to half an hour."""


class Metrics(Middleware):
    """``millpond_handled_total`` (by consumer, queue, outcome), ``millpond_handler_seconds`` (by consumer, queue), and
    ``millpond_handlers_running`` (by consumer, queue). Of this process; each process has an endpoint of its own."""

    def __init__(self, registry: CollectorRegistry | None = None, *, clock: Clock | None = None) -> None:
        """``registry``: default prometheus_client's own. Raises MillpondError when that package is missing."""
        try:
            from prometheus_client import REGISTRY, Counter, Gauge, Histogram
        except ImportError as error:
            raise MillpondError("metrics need the package prometheus-client: pip install 'millpond[server]'") from error
        where: Any = REGISTRY if registry is None else registry
        names = ("consumer", "queue")
        self._clock = clock or SystemClock()
        self._handled = Counter(
            "millpond_handled", "Messages handled, by what became of them", (*names, "outcome"), registry=where
        )
        self._seconds = Histogram(
            "millpond_handler_seconds", "How long handlers ran", names, registry=where, buckets=BUCKETS
        )
        self._running = Gauge("millpond_handlers_running", "Handlers that run now", names, registry=where)

    async def before(self, context: Context) -> None:
        """A handler begins."""
        context.values[self] = self._clock.monotonic()
        self._running.labels(context.consumer, context.message.queue).inc()

    def _ended(self, context: Context) -> None:
        started = context.values.pop(self, None)
        if started is not None:
            labels = (context.consumer, context.message.queue)
            self._running.labels(*labels).dec()
            self._seconds.labels(*labels).observe(self._clock.monotonic() - started)

    async def after(self, context: Context, result: Any) -> None:
        """It returned."""
        self._ended(context)

    async def error(self, context: Context, error: BaseException | None, outcome: Outcome) -> None:
        """It did not."""
        self._ended(context)

    async def settled(self, context: Context, kind: str) -> None:
        """The message was answered for."""
        self._ended(context)
        self._handled.labels(context.consumer, context.message.queue, kind).inc()
