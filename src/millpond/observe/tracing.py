"""OpenTelemetry: a span around each handler, in the trace of whoever enqueued its message.

The trace's context travels in the message's attributes, as W3C's ``traceparent`` and ``tracestate``. Names follow
OpenTelemetry's conventions for messaging, which are not final; they stand here and nowhere else.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from millpond.errors import MillpondError
from millpond.worker.hooks import Context, Middleware
from millpond.worker.outcomes import Outcome

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider


def trace_attributes(attributes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Attributes for an enqueue, with the context of the span that is current here:
    ``enqueue(…, attributes=trace_attributes())``. Raises MillpondError without opentelemetry-api."""
    carrier = dict(attributes or {})
    _propagator().inject(carrier)
    return carrier


def _propagator() -> Any:
    try:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ImportError as error:
        raise MillpondError("traces need the package opentelemetry-api: pip install 'millpond[otel]'") from error
    return TraceContextTextMapPropagator()


class Tracing(Middleware):
    """A span of kind CONSUMER around each handler. Calls of tasks that are sent within one carry its context on."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        """``provider``: default OpenTelemetry's global one. Raises MillpondError when the package is missing."""
        self._propagator = _propagator()
        from opentelemetry import trace

        self._tracer = trace.get_tracer("millpond", tracer_provider=provider)

    def outgoing(self, attributes: dict[str, Any]) -> None:
        """Of a task's call that is sent: add the context of the span that is current here."""
        self._propagator.inject(attributes)

    async def before(self, context: Context) -> None:
        """A handler begins."""
        from opentelemetry import context as contexts
        from opentelemetry import trace

        message = context.message
        carrier = {name: text for name, text in message.attributes.items() if isinstance(text, str)}
        span = self._tracer.start_span(
            f"process {message.queue}",
            context=self._propagator.extract(carrier),
            kind=trace.SpanKind.CONSUMER,
            attributes={
                "messaging.system": "millpond",
                "messaging.operation.type": "process",
                "messaging.destination.name": message.queue,
                "messaging.destination.namespace": message.namespace,
                "messaging.message.id": message.id,
                "messaging.message.body.size": message.payload_size,
                "messaging.consumer.group.name": context.consumer,
                "millpond.attempts": message.attempts,
            },
        )
        context.values[self] = (span, contexts.attach(trace.set_span_in_context(span)), asyncio.current_task())

    def _end(self, context: Context, error: BaseException | None, outcome: Outcome | None) -> None:
        from opentelemetry import context as contexts
        from opentelemetry.trace import Status, StatusCode

        span, token, task = context.values.pop(self, (None, None, None))
        if span is None:
            return
        # A handler that does not end is answered for by another task, which this one's context is no part of.
        if task is asyncio.current_task():
            contexts.detach(token)
        if outcome is not None:
            span.set_attribute("millpond.outcome", outcome.kind)
            if outcome.kind != "defer":
                if error is not None:
                    span.record_exception(error)
                    span.set_attribute("error.type", type(error).__qualname__)
                span.set_status(Status(StatusCode.ERROR, outcome.reason))
        span.end()

    async def after(self, context: Context, result: Any) -> None:
        """It returned."""
        self._end(context, None, None)

    async def error(self, context: Context, error: BaseException | None, outcome: Outcome) -> None:
        """It did not."""
        self._end(context, error, outcome)
