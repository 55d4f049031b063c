"""What the middleware for logs, metrics and traces tells of handlers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

import millpond
from millpond import testing
from millpond.observe.logs import Logs
from millpond.observe.prometheus import Metrics
from millpond.observe.tracing import Tracing, trace_attributes


def application(middleware: millpond.Middleware) -> millpond.Pond:
    app = millpond.connect("memory://")
    app.middleware.append(middleware)

    @app.consumer("orders")
    async def order(payload: dict[str, Any]) -> None:
        if payload["sku"] == "oops":
            raise ValueError("no such flour")
        if payload["sku"] == "later":
            raise millpond.Defer(60, "the shop is closed")

    return app


async def handle(app: millpond.Pond, clock: testing.ManualClock | None = None) -> None:
    """One message of each kind: done, failed, deferred, one that does not fit."""
    async with testing.in_memory(app, clock=clock) as pond:
        for sku in ("rye", "oops", "later"):
            await pond.queue("orders").enqueue(millpond.json({"sku": sku}))
        await pond.queue("orders").enqueue(millpond.json([1]))
        await pond.work()


async def test_logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "millpond.handler")
    clock = testing.ManualClock()
    await handle(application(Logs(clock=clock)), clock)
    said = [record for record in caplog.records if record.name == "millpond.handler"]
    events = sorted(record.message.removeprefix("millpond.handler.") for record in said)
    assert events == ["deferred", "done", "failed", "failed", "started", "started", "started"]
    for record in said:
        assert (record.consumer, record.queue, record.attempts) == ("order", "orders", 1)  # type: ignore[attr-defined]
    failed = next(record for record in said if record.message.endswith("failed"))
    assert failed.levelno == logging.WARNING
    assert {record.outcome for record in said if record.message.endswith("failed")} == {"retry", "dead"}  # type: ignore[attr-defined]


async def test_metrics() -> None:
    registry = CollectorRegistry()
    clock = testing.ManualClock()
    await handle(application(Metrics(registry, clock=clock)), clock)
    labels = {"consumer": "order", "queue": "orders"}
    found = {
        outcome: registry.get_sample_value("millpond_handled_total", {**labels, "outcome": outcome})
        for outcome in ("ack", "retry", "defer", "dead")
    }
    assert found == {"ack": 1, "retry": 1, "defer": 1, "dead": 1}
    assert registry.get_sample_value("millpond_handlers_running", labels) == 0
    assert registry.get_sample_value("millpond_handler_seconds_count", labels) == 3


async def test_running_handlers_are_counted_also_when_their_lease_is_lost() -> None:
    registry = CollectorRegistry()
    app = millpond.connect("memory://")
    app.middleware.append(Metrics(registry))
    labels = {"consumer": "slow", "queue": "slow"}

    @app.consumer("slow", visibility=30)
    async def slow(message: millpond.Message) -> None:
        await message.nack()  # it answered by itself, and works on
        assert registry.get_sample_value("millpond_handlers_running", labels) == 1

    async with testing.in_memory(app) as pond:
        await pond.queue("slow").enqueue(b"x", max_attempts=1)
        await pond.work()
    assert registry.get_sample_value("millpond_handlers_running", labels) == 0


async def test_a_trace_goes_on_over_queues_and_tasks() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    app = millpond.connect("memory://")
    app.middleware.append(Tracing(provider))

    @app.task
    async def mail(to: str) -> None:
        assert trace.get_current_span().get_span_context().is_valid

    @app.consumer("orders")
    async def order(payload: str) -> None:
        await mail.send(payload)
        if payload == "oops":
            raise ValueError("no such flour")

    async with testing.in_memory(app) as pond:
        with provider.get_tracer("shop").start_as_current_span("checkout") as root:
            await pond.queue("orders").enqueue(b"x", attributes=trace_attributes({"shop": "1"}))
        await pond.queue("orders").enqueue(b"oops")
        await pond.work()
    spans = exporter.get_finished_spans()
    trace_id = root.get_span_context().trace_id
    names = sorted(span.name for span in spans if span.context.trace_id == trace_id)
    assert names == ["checkout", "process orders", "process tasks.mail"]
    failed = [span for span in spans if not span.status.is_ok and span.name == "process orders"]
    errors = [span for span in failed if span.status.status_code is trace.StatusCode.ERROR]
    assert len(errors) == 1
    assert errors[0].attributes is not None
    assert errors[0].attributes["error.type"] == "ValueError"
    assert errors[0].attributes["millpond.outcome"] == "retry"
    assert all(span.kind is trace.SpanKind.CONSUMER for span in spans if span.name.startswith("process"))


def tracing() -> tuple[Tracing, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider), exporter


async def test_who_raises_after_answering_by_himself_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """The span of such a handler once never ended, and its logs had no end either."""
    caplog.set_level(logging.INFO, "millpond")
    traces, exporter = tracing()
    app = millpond.connect("memory://")
    app.middleware += [traces, Logs()]

    @app.consumer("orders")
    async def order(message: millpond.Message) -> None:
        await message.ack()
        raise ValueError("too late")

    async with testing.in_memory(app) as pond:
        await pond.queue("orders").enqueue(b"x")
        assert (await pond.work())["answered"] == 1
        assert (await pond.queue("orders").counts()).dead == 0
    [span] = exporter.get_finished_spans()
    assert span.attributes is not None
    assert (span.attributes["millpond.outcome"], span.attributes["error.type"]) == ("answered", "ValueError")
    told = {record.message: record for record in caplog.records}
    assert told["millpond.handler.failed"].outcome == "answered"  # type: ignore[attr-defined]
    assert told["millpond.worker.failed_after_answer"].reason == "ValueError: too late"  # type: ignore[attr-defined]


async def test_the_span_of_a_handler_that_does_not_end_is_ended_in_peace(caplog: pytest.LogCaptureFixture) -> None:
    traces, exporter = tracing()
    app = millpond.connect("memory://")
    app.middleware.append(traces)
    go = asyncio.Event()

    @app.consumer("orders", time_limit=5.0)
    async def order(payload: bytes) -> None:
        while not go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await go.wait()

    async with testing.in_memory(app) as pond:
        await pond.queue("orders").enqueue(b"x", max_attempts=1)
        async with pond.working():
            await pond.advance(5)
            await pond.advance(10)
            [span] = exporter.get_finished_spans()
            go.set()
    assert span.attributes is not None
    assert span.attributes["millpond.outcome"] == "retry"
    assert [record.name for record in caplog.records if record.name.startswith("opentelemetry")] == []


@pytest.mark.parametrize(
    ("missing", "make", "extra"),
    [
        ("prometheus_client", "from millpond.observe.prometheus import Metrics; Metrics()", "millpond[server]"),
        ("opentelemetry", "from millpond.observe.tracing import Tracing; Tracing()", "millpond[otel]"),
        ("opentelemetry", "from millpond.observe.tracing import trace_attributes as t; t()", "millpond[otel]"),
        ("cronsim", "from millpond.worker.schedule import parse; parse('0 3 * * *').after(0)", "millpond[worker]"),
    ],
    ids=["prometheus", "tracing", "attributes", "cron"],
)
def test_a_missing_package_is_named_with_its_extra(missing: str, make: str, extra: str) -> None:
    script = f"import sys; sys.modules[{missing!r}] = None\n{make}"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert extra in run.stderr.splitlines()[-1]
