"""A worker that is told to stop: nothing more is taken, what runs may end, the rest is given back."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import pytest
from tests.unit.worker.conftest import Held, MakeSite, until

import millpond
from millpond import Context
from millpond.errors import StoreClosed
from millpond.stores.base import Update
from millpond.stores.faulty import Call, Fault, Gate, fail_before, hold
from millpond.worker.worker import UNWIND


async def test_an_idle_worker_stops_at_once(site: MakeSite) -> None:
    async with site() as s:
        s.pond.consumer("q")(lambda payload: None)
        worker = s.start()
        await until(lambda: worker.lines and worker.lines[0].polled is not None)
        await s.settle()
        await s.end(worker)  # no time passes by the manual clock


async def test_a_stopping_worker_lets_handlers_end_and_takes_nothing_more(site: MakeSite, held: Held) -> None:
    async with site() as s:
        s.pond.consumer("q", concurrency=2)(held.wait)
        await s.queue.enqueue(b"")
        worker = s.start(grace=30.0)
        await until(lambda: held.started)
        worker.stop()
        await s.queue.enqueue(b"too late")
        await s.pass_(25, steps=5)
        assert len(held.started) == 1
        held.go.set()
        await s.ended(worker)
        counts = await s.queue.counts()
        assert (counts.ready, counts.leased, worker.counts()["ack"]) == (1, 0, 1)


@pytest.mark.parametrize("run_in", ["loop", "thread"])
@pytest.mark.parametrize("how", ["grace", "second stop", "no grace", "cancelled"])
async def test_what_does_not_end_in_time_is_given_back_without_a_failure(
    site: MakeSite, held: Held, run_in: str, how: str
) -> None:
    async with site() as s:
        s.pond.consumer("q", concurrency=2)(held.wait if run_in == "loop" else held.block)
        ids = [receipt.message_id for receipt in await s.queue.enqueue_many([b"1", b"2"])]
        worker = s.start(grace=30.0)
        await until(lambda: len(held.started) == 2)
        if how == "grace":
            worker.stop()
            await s.pass_(29)
            assert (await s.queue.counts()).leased == 2
            await s.pass_(2)
            await s.ended(worker)
        elif how == "second stop":
            worker.stop()
            worker.stop()
            await s.ended(worker)
        elif how == "no grace":
            worker.stop(grace=0)
            await s.pass_(0)
            await s.ended(worker)
        else:
            [(_, task)] = s._running
            task.cancel()
            await s.pass_(0)
            with pytest.raises(asyncio.CancelledError):
                await s.ended(worker)
        assert held.ended == []
        assert worker.counts()["defer"] == 2
        views = [await s.queue.get(id) for id in ids]
        assert [(view.state, view.failures) for view in views] == [("ready", 0), ("ready", 0)]


async def test_a_handler_that_will_not_end_is_left_and_its_message_given_back(site: MakeSite, held: Held) -> None:
    async with site() as s:

        @s.pond.consumer("q")
        def handler(payload: bytes) -> None:
            while not held.go.is_set():
                try:
                    held.block()
                except asyncio.CancelledError:
                    continue

        await s.queue.enqueue(b"")
        worker = s.start()
        await until(lambda: held.started)
        worker.stop(grace=0)
        await s.pass_(0)
        assert (await s.queue.counts()).leased == 1
        await s.pass_(UNWIND)
        await s.ended(worker)
        assert (await s.queue.counts()).ready == 1
        assert worker.counts()["defer"] == 1


async def test_what_was_being_taken_when_it_stopped_is_given_back(site: MakeSite) -> None:
    gate, claims = Gate(), []

    def plan(call: Call) -> Fault | None:
        # A bucket cannot take: it replaces the record on a condition.
        if call.method == "take" or any(isinstance(op, Update) for op in call.ops):
            claims.append(call)
            return hold(gate) if len(claims) == 1 else None
        return None

    async with site(plan=plan) as s:
        seen: list[bytes] = []
        s.pond.consumer("q")(seen.append)
        receipt = await s.queue.enqueue(b"")
        worker = s.start()
        await until(lambda: claims)
        worker.stop()
        await s.settle()
        gate.open()
        await s.ended(worker)
        view = await s.queue.get(receipt.message_id)
        assert (seen, view.state, view.failures, view.attempts) == ([], "ready", 0, 1)


async def test_answers_that_the_store_does_not_take_do_not_keep_it_for_ever(
    site: MakeSite, caplog: pytest.LogCaptureFixture
) -> None:
    down = threading.Event()

    def plan(call: Call) -> Fault | None:
        return fail_before() if down.is_set() else None

    async with site(plan=plan) as s:

        @s.pond.consumer("q", visibility=1000.0)
        async def handler(payload: bytes) -> None:
            down.set()

        await s.queue.enqueue(b"")
        worker = s.start(grace=10.0)
        await until(down.is_set)
        worker.stop()
        with caplog.at_level(logging.ERROR, "millpond.worker"):
            await s.pass_(20, steps=20)
            await s.ended(worker)
        told = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert told == ["millpond.worker.unanswered"]
        down.clear()
        await s.pass_(1000)
        [again] = await s.queue.receive()
        assert again.failures == 1  # nobody answered for the first delivery


async def test_a_worker_opens_and_closes_the_pond_that_is_not_open(tmp_path: Any) -> None:
    url = f"sqlite:///{tmp_path}/pond.db"
    async with millpond.connect(url) as producer:
        await producer.queue("q").enqueue(b"x")
    pond = millpond.connect(url)
    seen: list[bytes] = []
    pond.consumer("q")(seen.append)
    worker = millpond.Worker(pond)
    task = asyncio.create_task(worker.run())
    await until(lambda: seen)
    worker.stop()
    await task
    assert not pond.is_open
    with pytest.raises(StoreClosed):
        await pond.open()


async def test_a_pond_that_is_closed_under_it_ends_the_worker(site: MakeSite) -> None:
    async with site() as s:
        s.pond.consumer("q")(lambda payload: None)
        worker = s.start()
        await until(lambda: worker.lines and worker.lines[0].polled is not None)
        await s.pond.close()
        with pytest.raises(StoreClosed):
            await s.ended(worker)


async def test_a_message_whose_handler_has_not_begun_is_given_back(site: MakeSite) -> None:
    """A task that is cancelled before its first step never runs; the message must not be forgotten with it."""
    async with site() as s:
        seen: list[bytes] = []

        @s.pond.consumer("q")
        async def handler(payload: bytes) -> None:
            seen.append(payload)

        worker = s.start()
        await until(lambda: worker.lines and worker.lines[0].polled is not None)
        [line] = worker.lines
        begin = line._begin

        def begin_and_cancel(messages: Any) -> None:
            begin(messages)
            line.cancel_all()

        line._begin = begin_and_cancel  # type: ignore[method-assign]
        receipt = await s.queue.enqueue(b"")
        await until(lambda: worker.counts()["defer"])
        line._begin = begin  # type: ignore[method-assign]
        await s.end(worker)
        assert receipt.message_id
        assert not line.held
        assert not line.running


async def test_a_thread_is_told_that_the_worker_leaves(site: MakeSite, held: Held) -> None:
    async with site() as s:
        seen: list[bool] = []

        @s.pond.consumer("q")
        def handler(payload: bytes, context: Context) -> None:
            held.started.append(1)
            try:
                held.block()
            finally:
                seen.append(context.cancelled)

        await s.queue.enqueue(b"")
        worker = s.start()
        await until(lambda: held.started)
        worker.stop(grace=0)
        await s.pass_(0)
        await s.ended(worker)
        assert seen == [True]
