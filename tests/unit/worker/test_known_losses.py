"""How other queues are known to lose work or run it twice, each by the report that tells of it, and that it is not so
here. Those that need a process to die are in tests/e2e/test_worker.py; bull#412, which needs real time, in
test_leases.py."""

from __future__ import annotations

import asyncio
import logging
import threading
import tracemalloc
from pathlib import Path

import pytest
from tests.unit.worker.conftest import Held, MakeSite, until

from millpond import RetryPolicy, testing
from millpond.model.clock import ManualClock
from millpond.stores.base import Remove
from millpond.stores.faulty import Call, Fault, fail_after, fail_before
from millpond.stores.sqlite import SqliteStore
from millpond.worker.worker import Worker


async def test_procrastinate_1518_the_work_of_a_dead_worker_comes_back_without_anybodys_doing(site: MakeSite) -> None:
    """procrastinate#1518, arq#343: a job whose worker died stays "doing" until somebody rescues it, in a job of one's
    own that can itself be stranded."""
    async with site() as s:
        seen: list[bytes] = []
        s.pond.consumer("q")(seen.append)
        # A worker that dies: it takes a message, and is never heard of again.
        [receipt] = await s.queue.enqueue_many([b"work"])
        await s.queue.receive(visibility=30, owner="dead:1")
        worker = s.start()
        await s.pass_(29)
        assert seen == []
        await s.pass_(2)
        await until(lambda: seen == [b"work"])
        await s.empty()
        await s.end(worker)
        assert receipt.message_id


async def test_a_message_that_kills_its_workers_ends_among_the_dead_letters(site: MakeSite) -> None:
    async with site() as s:
        seen: list[bytes] = []
        s.pond.consumer("q")(seen.append)
        await s.queue.enqueue(b"poison", max_attempts=2)
        for _ in range(2):
            await s.queue.receive(visibility=30, owner="dead:1")
            await s.pass_(31)
        worker = s.start()
        await s.empty(dead=1)
        await s.end(worker)
        assert seen == []


async def test_kombu_337_a_task_longer_than_any_visibility_is_run_once(site: MakeSite, held: Held) -> None:
    """kombu#337: what runs longer than the one visibility time-out of the transport is delivered again, and again."""
    async with site() as s:
        s.pond.consumer("q", concurrency=4)(held.wait)
        await s.queue.enqueue(b"", visibility=30)
        workers = [s.start(), s.start()]
        await until(lambda: held.started)
        await s.pass_(600, steps=60)
        assert len(held.started) == 1
        held.go.set()
        await s.empty()
        for worker in workers:
            await s.end(worker)
        assert [worker.counts()["lost"] for worker in workers] == [0, 0]


async def test_kombu_337_a_task_delayed_longer_than_any_visibility_is_run_once(site: MakeSite) -> None:
    """celery#2481: a task with an ETA beyond the visibility time-out is run once per time-out."""
    async with site() as s:
        seen: list[bytes] = []
        s.pond.consumer("q")(seen.append)
        workers = [s.start(), s.start()]
        await s.queue.enqueue(b"later", delay=86_400, visibility=30)
        await s.pass_(86_000, steps=20)
        assert seen == []
        await s.pass_(1000, steps=4)
        await until(lambda: seen)
        await s.pass_(10_000, steps=10)
        for worker in workers:
            await s.end(worker)
        assert seen == [b"later"]


async def test_celery_2218_delayed_tasks_take_no_memory_in_a_worker(tmp_path: Path) -> None:
    """celery#2218: workers fetch tasks with an ETA and hold them in memory; 80,000 of them took 800 MB. Here they stay
    in the store until they are due."""
    clock = ManualClock()
    store = SqliteStore(str(tmp_path / "pond.db"), clock=clock, cache_bytes=2**20)
    async with testing.pond(store=store, clock=clock) as pond:
        seen: list[bytes] = []
        pond.consumer("q")(seen.append)
        worker = Worker(pond)
        task = asyncio.create_task(worker.run())
        queue = pond.queue("q")
        payloads = [b"x" * 1000] * 500
        await queue.enqueue_many(payloads, delay=3600)
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(8):
                await queue.enqueue_many(payloads, delay=3600)
            await pond.settle()
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        counts = await queue.counts()
        assert (counts.delayed, counts.leased, seen, len(worker.lines[0].held)) == (4500, 0, [], 0)
        assert grown < 1_000_000, f"4,000 delayed messages of 1,000 bytes took {grown} bytes"
        worker.stop()
        await task


@pytest.mark.parametrize("run_in", ["loop", "thread"])
async def test_celery_14_the_ack_comes_after_the_work(site: MakeSite, held: Held, run_in: str) -> None:
    """celery#14, celery#1628: by default a task is acknowledged before it is run, and lost with its worker."""
    async with site() as s:
        s.pond.consumer("q", visibility=30.0)(held.wait if run_in == "loop" else held.block)
        receipt = await s.queue.enqueue(b"work")
        worker = s.start()
        await until(lambda: held.started)
        assert (await s.queue.get(receipt.message_id)).state == "leased"
        held.go.set()
        await s.empty()
        await s.end(worker)
        assert held.ended


async def test_celery_8030_a_worker_goes_on_after_an_outage(site: MakeSite, caplog: pytest.LogCaptureFixture) -> None:
    """celery#8030, #8091: after the broker was away the worker is alive, connected, and never consumes again."""
    down = threading.Event()
    outage: list[str] = []

    def plan(call: Call) -> Fault | None:
        if not down.is_set():
            return None
        outage.append(call.method)
        return fail_before()

    async with site(plan=plan) as s:
        seen: list[bytes] = []
        s.pond.consumer("q")(seen.append)
        worker = s.start()
        await s.queue.enqueue(b"before")
        await until(lambda: worker.counts()["ack"] == 1)
        down.set()
        with caplog.at_level(logging.INFO, "millpond.worker"):
            await s.pass_(900, steps=60)
            assert len(outage) > 40  # it went on trying
            down.clear()
            await s.queue.enqueue(b"after")
            await s.pass_(60, steps=4)
            await until(lambda: seen == [b"before", b"after"])
        told = {record.getMessage() for record in caplog.records if record.name == "millpond.worker"}
        assert told == {"millpond.worker.store_failed", "millpond.worker.recovered"}
        await s.empty()
        await s.end(worker)


async def test_celery_8030_work_that_ended_in_an_outage_is_acked_after_it(site: MakeSite, held: Held) -> None:
    down = threading.Event()

    def plan(call: Call) -> Fault | None:
        return fail_before() if down.is_set() else None

    async with site(plan=plan) as s:
        s.pond.consumer("q", visibility=100.0, concurrency=2)(held.wait)
        await s.queue.enqueue_many([b"1", b"2"])
        worker = s.start()
        await until(lambda: len(held.started) == 2)
        down.set()
        held.go.set()
        await s.pass_(80, steps=16)
        assert worker.counts()["ack"] == 0
        down.clear()
        await s.pass_(30, steps=6)
        await s.empty()
        await s.end(worker)
        assert (worker.counts()["ack"], len(held.started)) == (2, 2)


async def test_an_ack_whose_reply_is_lost_is_no_second_run(site: MakeSite) -> None:
    def plan(call: Call) -> Fault | None:
        if faults or not any(isinstance(op, Remove) for op in call.ops):
            return None
        faults.append(call.method)
        return fail_after()

    faults: list[str] = []
    async with site(plan=plan) as s:
        seen: list[bytes] = []
        s.pond.consumer("q", retry=RetryPolicy(base=0.0))(seen.append)
        worker = s.start()
        await s.queue.enqueue(b"once")
        await s.empty()
        await s.pass_(120, steps=4)
        await s.end(worker)
        assert (seen, faults) == ([b"once"], ["write"])
