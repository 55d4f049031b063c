"""Middleware, gates and services: what they are told, and what their failures cost."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from tests.unit.worker.conftest import Held, MakeSite, until

from millpond import Context, Defer, Middleware, Outcome, RetryPolicy


class Telling(Middleware):
    """Writes down what it is told."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name = name
        self.told = told

    async def before(self, context: Context) -> None:
        context.values[self.name] = context.payload
        self.told.append(f"{self.name} before {context.payload!r}")

    async def after(self, context: Context, result: Any) -> None:
        self.told.append(f"{self.name} after {result} of {context.values[self.name]!r}")

    async def error(self, context: Context, error: BaseException | None, outcome: Outcome) -> None:
        self.told.append(f"{self.name} error {error!r} {outcome.kind} {outcome.delay:g}")

    async def settled(self, context: Context, kind: str) -> None:
        self.told.append(f"{self.name} settled {kind}")

    async def start(self) -> None:
        self.told.append(f"{self.name} start")

    async def stop(self) -> None:
        self.told.append(f"{self.name} stop")


async def test_hooks_stand_around_the_handler_like_brackets(site: MakeSite) -> None:
    told: list[str] = []
    async with site() as s:
        s.pond.middleware.append(Telling("pond", told))

        @s.pond.consumer("q", middleware=[Telling("own", told)], retry=RetryPolicy(base=9.0, jitter=0.0))
        async def handler(text: str) -> int:
            told.append("handler")
            if text == "bad":
                raise ValueError(text)
            return 7

        worker = s.start(middleware=[Telling("worker", told)])
        await s.queue.enqueue(b"good")
        await until(lambda: worker.counts()["ack"] == 1)
        await until(lambda: told[-1] == "worker settled ack")
        assert told == [
            "own start", "worker start", "pond start",
            "worker before 'good'", "pond before 'good'", "own before 'good'",
            "handler",
            "own after 7 of 'good'", "pond after 7 of 'good'", "worker after 7 of 'good'",
            "own settled ack", "pond settled ack", "worker settled ack",
        ]  # fmt: skip
        told.clear()
        await s.queue.enqueue(b"bad")
        await until(lambda: told and told[-1] == "worker settled retry")
        assert told[4:] == [
            "own error ValueError('bad') retry 9", "pond error ValueError('bad') retry 9",
            "worker error ValueError('bad') retry 9",
            "own settled retry", "pond settled retry", "worker settled retry",
        ]  # fmt: skip
        told.clear()
        await s.end(worker)
        assert told == ["own stop", "worker stop", "pond stop"]


async def test_a_payload_that_does_not_fit_is_told_as_an_error(site: MakeSite) -> None:
    told: list[str] = []
    async with site() as s:

        @s.pond.consumer("q", middleware=[Telling("m", told)])
        async def handler(number: int) -> None: ...

        await s.queue.enqueue(b'"x"')
        worker = s.start()
        await s.empty(dead=1)
        await s.end(worker)
        assert [text.partition("(")[0] for text in told] == ["m start", "m error Unfit", "m settled dead", "m stop"]


async def test_hooks_stand_around_threads_too_and_share_their_context(site: MakeSite) -> None:
    import contextvars

    span: contextvars.ContextVar[str] = contextvars.ContextVar("span", default="none")
    seen: list[str] = []

    class Tracing(Middleware):
        async def before(self, context: Context) -> None:
            span.set("mine")

        async def after(self, context: Context, result: Any) -> None:
            seen.append(f"after {result} {span.get()}")

    async with site() as s:

        @s.pond.consumer("q", middleware=[Tracing()])
        def handler(payload: bytes) -> str:
            return span.get()

        await s.queue.enqueue(b"")
        worker = s.start()
        await s.empty()
        await s.end(worker)
    assert seen == ["after mine mine"]


async def test_a_failure_before_or_after_is_the_handlers(site: MakeSite) -> None:
    class Picky(Middleware):
        async def before(self, context: Context) -> None:
            if context.payload == "not now":
                raise Defer(50)

        async def after(self, context: Context, result: Any) -> None:
            if context.payload == "unlucky":
                raise LookupError("nowhere to put the result")

    async with site() as s:
        called: list[str] = []
        s.pond.consumer("q", middleware=[Picky()], type=str)(called.append)
        later = await s.queue.enqueue(b"not now")
        unlucky = await s.queue.enqueue(b"unlucky")
        worker = s.start()
        await until(lambda: worker.counts()["defer"] == worker.counts()["retry"] == 1)
        await s.end(worker)
        assert called == ["unlucky"]
        assert (await s.queue.get(later.message_id)).failures == 0
        assert (await s.queue.get(unlucky.message_id)).last_error["type"] == "LookupError"


async def test_a_hook_that_fails_when_told_of_an_error_does_not_hinder_the_answer(
    site: MakeSite, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Middleware):
        async def error(self, context: Context, error: BaseException | None, outcome: Outcome) -> None:
            raise RuntimeError("broken hook")

        async def settled(self, context: Context, kind: str) -> None:
            raise RuntimeError("broken hook")

    async with site() as s:

        @s.pond.consumer("q", middleware=[Broken()])
        async def handler(payload: bytes) -> None:
            raise ValueError

        await s.queue.enqueue(b"", max_attempts=1)
        worker = s.start()
        with caplog.at_level(logging.ERROR, "millpond.worker"):
            await s.empty(dead=1)
            await s.end(worker)
        assert [record.getMessage() for record in caplog.records] == ["millpond.worker.hook_failed"] * 2


async def test_a_lost_lease_is_told(site: MakeSite, held: Held) -> None:
    told: list[str] = []
    async with site() as s:
        s.pond.consumer("q", visibility=30.0, middleware=[Telling("m", told)])(held.wait)
        await s.queue.enqueue(b"")
        worker = s.start()
        await until(lambda: held.started)
        await s.pond.jump(1000)
        await s.queue.receive(visibility=5000)
        await s.pass_(10)
        await until(lambda: told[-1] == "m settled lost")
        assert told[-2] == "m error CancelledError() lost 0"
        await s.end(worker)


class Turnstile:
    """A gate that the test opens; counts what goes through."""

    def __init__(self) -> None:
        self.open = 0
        self.inside = 0
        self.most = 0
        self.wanted: list[int] = []
        self.changed = asyncio.Event()

    def allow(self, count: int) -> None:
        self.open += count
        self.changed.set()

    async def admit(self, wanted: int) -> int:
        self.wanted.append(wanted)
        while not self.open:
            self.changed.clear()
            await self.changed.wait()
        count = min(wanted, self.open)
        self.open -= count
        self.inside += count
        self.most = max(self.most, self.inside)
        return count

    def unused(self, count: int) -> None:
        self.inside -= count
        self.allow(count)

    def ended(self, count: int) -> None:
        self.inside -= count


async def test_a_gate_says_how_many_start(site: MakeSite, held: Held) -> None:
    gate = Turnstile()
    async with site() as s:
        s.pond.consumer("q", concurrency=10, gate=gate)(held.wait)
        await s.queue.enqueue_many([b""] * 6)
        worker = s.start()
        await until(lambda: worker.lines and worker.lines[0].at_gate)
        await s.settle()
        assert (held.started, (await s.queue.counts()).leased) == ([], 0)
        gate.allow(2)
        await until(lambda: len(held.started) == 2)
        await s.settle()
        assert (len(held.started), gate.inside, gate.wanted) == (2, 2, [10, 8])
        gate.allow(3)
        await until(lambda: len(held.started) == 5)
        held.go.set()
        await until(lambda: worker.counts()["ack"] == 5)
        await s.settle()
        assert (gate.inside, gate.open, gate.most) == (0, 0, 5)
        gate.allow(100)
        await s.empty()
        await s.end(worker)
        assert (gate.inside, gate.open) == (0, 99)  # what was admitted and found nothing was given back


async def test_a_worker_that_stops_does_not_wait_at_a_gate(site: MakeSite) -> None:
    gate = Turnstile()
    async with site() as s:
        s.pond.consumer("q", gate=gate)(lambda payload: None)
        worker = s.start()
        await until(lambda: gate.wanted)
        await s.end(worker)


async def test_a_service_runs_beside_the_consumers_and_again_after_it_failed(
    site: MakeSite, caplog: pytest.LogCaptureFixture
) -> None:
    class Ticking:
        name = "ticking"
        runs = 0
        ended = False

        async def run(self) -> None:
            self.runs += 1
            if self.runs < 3:
                raise RuntimeError("not yet")
            try:
                await asyncio.Event().wait()
            finally:
                self.ended = True

    service = Ticking()
    async with site() as s:
        s.pond.services.append(service)
        s.pond.consumer("q")(lambda payload: None)
        worker = s.start()
        with caplog.at_level(logging.ERROR, "millpond.worker"):
            await until(lambda: service.runs == 1)
            await s.pass_(1)
            await until(lambda: service.runs == 2)
            await s.pass_(1)
            assert service.runs == 2  # the pause doubles
            await s.pass_(1)
            await until(lambda: service.runs == 3)
        assert [record.getMessage() for record in caplog.records] == ["millpond.worker.service_failed"] * 2
        await s.end(worker)
        assert service.ended
