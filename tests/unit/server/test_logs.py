"""The server's log, its audit log, and its traces."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from tests.unit.server.raw import request
from tests.unit.server.test_process import ask, enqueue, lines, serving

from millpond import testing
from millpond.errors import InvalidInput, StoreError
from millpond.server import logs
from millpond.server import tracing as tracing_module
from millpond.server.audit import MOST_IDS, Audit, Who
from millpond.server.auth import ANONYMOUS
from millpond.server.config import ServerConfig
from millpond.server.context import Context
from millpond.server.observing import observe
from millpond.server.run import running
from millpond.server.tracing import Tracing, tracing
from millpond.testing import ManualClock

log = logging.getLogger("millpond.test")


class Request:
    """A request, as far as the log is concerned."""

    correlation_id = "case-1"


def logged(form: Any = "auto", level: str = "info") -> list[str]:
    stream = io.StringIO()
    with logs.logging_to(stream, form=form, level=level):
        token = logs.current.set(Request())
        log.info("millpond.test.event", extra={"queue": "q", "n": 3, "event": "not this"})
        logs.current.reset(token)
        log.debug("millpond.test.detail")
        logging.getLogger("uvicorn.error").info("noise")
        try:
            raise ValueError("broken")
        except ValueError:
            log.exception("millpond.test.failed", extra={"value": "a\nb"})
    log.warning("millpond.test.afterwards")
    return stream.getvalue().splitlines()


def test_json_lines_hold_the_fields_and_the_correlation_id() -> None:
    first, second = (json.loads(line) for line in logged())
    assert first | {"at": ""} == {
        "at": "",
        "level": "info",
        "logger": "millpond.test",
        "event": "millpond.test.event",
        "event_": "not this",
        "queue": "q",
        "n": 3,
        "correlation_id": "case-1",
    }
    assert (second["event"], second["level"], second["value"]) == ("millpond.test.failed", "error", "a\nb")
    assert "ValueError: broken" in second["traceback"]
    assert "correlation_id" not in second


def test_text_is_one_line_whatever_a_value_holds() -> None:
    first, second, *traceback = logged("text", "debug")
    assert "INFO    millpond.test.event queue=q n=3 event=not this correlation_id=case-1" in first
    assert "millpond.test.detail" in second
    assert r"value='a\nb'" in traceback[0]
    assert traceback[-1] == "ValueError: broken"


def test_nothing_stays_configured_and_the_root_logger_is_not_touched() -> None:
    names = ("", "millpond", "uvicorn.error")
    before = [(one.level, one.propagate, list(one.handlers)) for one in map(logging.getLogger, names)]
    with logs.logging_to(io.StringIO()):
        root = logging.getLogger()
        assert (root.level, root.propagate, list(root.handlers)) == before[0]
        assert not logging.getLogger("millpond").propagate
    assert [(one.level, one.propagate, list(one.handlers)) for one in map(logging.getLogger, names)] == before


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_text() -> None:
    stream = Terminal()
    with logs.logging_to(stream):
        log.warning("millpond.test.event")
    assert "WARNING millpond.test.event" in stream.getvalue()


async def test_a_request_is_logged_without_its_query_or_its_headers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "millpond")
    async with serving(log_access=True) as service:
        url = service.server.url
        await request(url, "GET", "/healthz?token=hunter2", headers={"Authorization": "Bearer hunter2"})
        await enqueue(url, "q", {"X-Correlation-Id": "case-2"})
    found = [vars(record) for record in caplog.records if record.message == "millpond.server.request"]
    assert [(one["route"], one["status"], one["method"]) for one in found] == [
        ("/healthz", 200, "GET"),
        ("/v1/queue/enqueue", 200, "POST"),
    ]
    assert "hunter2" not in str(found)


# The audit log


def test_of_long_lists_of_ids_the_audit_keeps_the_first(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    audit = Audit(ManualClock(0), str(path))
    audit.note("dlq.purge", Who(ANONYMOUS, "192.0.2.1", "c"), ids=[str(number) for number in range(MOST_IDS + 5)])
    audit.close()
    [entry] = lines(path)
    assert (len(entry["ids"]), entry["more_ids"], entry["at"]) == (MOST_IDS, 5, "1970-01-01T00:00:00.000Z")


def test_an_audit_that_cannot_be_written_is_told_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    audit = Audit(ManualClock(), "/dev/full")
    audit.note("queue.purge", None, queue="q")
    audit.close()
    [record] = caplog.records
    assert record.message == "millpond.audit.not_written"
    assert vars(record)["entry"]["queue"] == "q"


def test_an_audit_file_that_cannot_be_opened_is_told_and_the_old_one_stays(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"cannot be written: .*set log\.audit"):
        Audit(ManualClock(), str(tmp_path / "no" / "audit.log"))
    folder = tmp_path / "logs"
    folder.mkdir()
    audit = Audit(ManualClock(), str(folder / "audit.log"))
    folder.rename(tmp_path / "moved")
    with pytest.raises(InvalidInput):
        audit.reopen()
    audit.note("queue.purge", None)
    audit.close()
    assert len(lines(tmp_path / "moved" / "audit.log")) == 1


# Traces


class Traced:
    """A server whose spans are kept."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    def context(self, pond: testing.TestPond) -> Context:
        made = Tracing(pond.clock, self.provider)
        observe(pond.service, made)
        return Context(pond, ServerConfig(port=0, shutdown_timeout=1.0, drain_grace=0.0), tracing=made)

    def spans(self) -> list[ReadableSpan]:
        found = list(self.exporter.get_finished_spans())
        self.exporter.clear()
        return found


PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_operations_are_spans_of_the_trace_that_the_request_names() -> None:
    traced = Traced()
    async with testing.pond() as pond, running(pond, context=traced.context(pond)) as url:
        sent = json.loads((await enqueue(url, "orders", {"traceparent": PARENT})).body)
        [send] = traced.spans()
        assert (send.name, send.kind) == ("send orders", SpanKind.PRODUCER)
        assert dict(send.attributes or {}) == {
            "messaging.system": "millpond",
            "messaging.operation.name": "send",
            "messaging.operation.type": "send",
            "messaging.destination.name": "orders",
            "messaging.message.id": sent["message_id"],
            "millpond.namespace": "default",
        }
        assert send.parent is not None
        assert f"{send.parent.trace_id:032x}-{send.parent.span_id:016x}" in PARENT

        await ask(url, "/v1/queue/enqueueBatch", queue="orders", messages=[{"payload": "eA=="}] * 2)
        [send] = traced.spans()
        assert send.parent is None
        assert (send.attributes or {})["messaging.batch.message_count"] == 2

        # Nothing there: no span, or consumers that wait would make thousands.
        await ask(url, "/v1/queue/receive", queue="empty", count=1, wait_ms=0)
        assert traced.spans() == []
        answer = await ask(url, "/v1/queue/receive", {"traceparent": PARENT}, queue="orders", count=3, wait_ms=0)
        [receive] = traced.spans()
        assert (receive.name, receive.kind) == ("receive orders", SpanKind.CONSUMER)
        handles = [
            {name: one[name] for name in ("message_id", "lease_id", "fencing_token")}
            for one in json.loads(answer.body)["messages"]
        ]
        await ask(url, "/v1/queue/ackBatch", queue="orders", messages=handles[:1])
        await ask(url, "/v1/queue/ackBatch", queue="orders", messages=handles[:1])
        done, failed = traced.spans()
        assert (done.name, done.kind, done.status.status_code) == ("ack orders", SpanKind.CLIENT, StatusCode.UNSET)
        assert (done.attributes or {})["messaging.operation.type"] == "settle"
        assert failed.status.status_code is StatusCode.ERROR
        assert (failed.attributes or {})["error.type"] == "lease_lost"


async def test_a_trace_ends_with_its_request() -> None:
    traced = Traced()
    async with testing.pond() as pond, running(pond, context=traced.context(pond)) as url:
        await enqueue(url, "orders", {"traceparent": PARENT})
        await pond.queue("orders").enqueue(b"x")
        first, second = traced.spans()
        assert first.parent is not None
        assert second.parent is None


def test_what_is_done_after_a_request_is_of_no_trace() -> None:
    made = Tracing(ManualClock(), Traced().provider)
    with made.request([(b"traceparent", PARENT.encode())]):
        assert trace.get_current_span().get_span_context().is_valid
    assert not trace.get_current_span().get_span_context().is_valid


def test_traces_are_made_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ManualClock()
    assert tracing("off", clock) is None
    assert tracing("auto", clock) is None  # nobody has said what becomes of spans
    assert tracing("on", clock) is not None
    with monkeypatch.context() as patch:
        patch.setattr(trace, "get_tracer_provider", TracerProvider)
        assert tracing("auto", clock) is not None

    def missing(*_: Any) -> None:
        raise StoreError(tracing_module.MISSING)

    monkeypatch.setattr(tracing_module, "Tracing", missing)
    with pytest.raises(StoreError, match=r"pip install 'millpond\[otel\]'"):
        tracing("on", clock)
