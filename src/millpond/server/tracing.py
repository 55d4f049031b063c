"""OpenTelemetry traces, by its conventions for messaging (the extra ``otel``).

A request's ``traceparent`` is the parent of what it asks of the queue: ``send``, ``receive``, and ``settle`` for
answers. Only the API is used; what becomes of spans is for whoever configures an SDK. An empty receive makes no span: a
consumer that waits would make thousands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from millpond.errors import StoreError
from millpond.model.clock import Clock
from millpond.server.observing import Done

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

SYSTEM = "messaging.system"
OPERATION_NAME = "messaging.operation.name"
OPERATION_TYPE = "messaging.operation.type"
DESTINATION = "messaging.destination.name"
MESSAGE_ID = "messaging.message.id"
BATCH = "messaging.batch.message_count"
ERROR_TYPE = "error.type"
NAMESPACE = "millpond.namespace"
"""The conventions have no name for it."""

_NAMES = {"enqueue": ("send", "send"), "receive": ("receive", "receive")}
"""Operation → name and type by the conventions; every other one settles a message."""

MISSING = "traces need a package that is not installed: pip install 'millpond[otel]', or set metrics.traces = \"off\""
CARRIED = (b"traceparent", b"tracestate")


class Tracing:
    """Makes spans of operations. Raises StoreError where the API is not installed."""

    def __init__(self, clock: Clock, provider: TracerProvider | None = None) -> None:
        """``provider`` None: the one that is configured for the process."""
        try:
            from opentelemetry import context, trace
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ModuleNotFoundError as error:
            raise StoreError(MISSING) from error
        self._clock = clock
        self._trace = trace
        self._context = context
        self._propagator = TraceContextTextMapPropagator()
        self._tracer = trace.get_tracer("millpond", tracer_provider=provider)
        self._kinds = {"send": trace.SpanKind.PRODUCER, "receive": trace.SpanKind.CONSUMER}

    @contextlib.contextmanager
    def request(self, headers: Iterable[tuple[bytes, bytes]]) -> Iterator[None]:
        """What is done inside belongs to the trace that a request's headers name."""
        carrier = {name.decode(): value.decode("latin-1") for name, value in headers if name in CARRIED}
        if not carrier:
            yield
            return
        token = self._context.attach(self._propagator.extract(carrier))
        try:
            yield
        finally:
            self._context.detach(token)

    def began(self) -> int:
        """As `Observer`."""
        return self._clock.now_ms()

    def ended(self, began: int, done: Done) -> None:
        """As `Observer`."""
        name, kind = _NAMES.get(done.name, (done.name, "settle"))
        attributes: dict[str, Any] = {
            SYSTEM: "millpond",
            OPERATION_NAME: name,
            OPERATION_TYPE: kind,
            DESTINATION: done.queue,
            NAMESPACE: done.namespace,
        }
        if len(done.ids) == 1:
            attributes[MESSAGE_ID] = done.ids[0]
        elif done.ids:
            attributes[BATCH] = len(done.ids)
        if done.errors:
            attributes[ERROR_TYPE] = done.errors[0].code
        span = self._tracer.start_span(
            f"{name} {done.queue}",
            kind=self._kinds.get(kind, self._trace.SpanKind.CLIENT),
            attributes=attributes,
            start_time=began * 1_000_000,
        )
        if done.errors:
            span.set_status(self._trace.StatusCode.ERROR, done.errors[0].code)
        span.end(end_time=self._clock.now_ms() * 1_000_000)


def tracing(setting: str, clock: Clock) -> Tracing | None:
    """By the setting ``metrics.traces``: None for ``off``, and for ``auto`` where nobody has configured what becomes of
    spans: each would be made for nothing, at a few percent of all that the server does. Raises StoreError for ``on``
    where the API is not installed."""
    if setting == "off" or (setting == "auto" and not _configured()):
        return None
    return Tracing(clock)


def _configured() -> bool:
    """Somebody has set a tracer provider, or named one in the environment."""
    try:
        from opentelemetry import trace
    except ModuleNotFoundError:
        return False
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
