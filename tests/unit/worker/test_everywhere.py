"""Workers on a queue in a bucket: what a store without takes, and with paid requests, could make different."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.unit.worker.conftest import Busy, Held, Site, until

from millpond import Context, MessageState, RetryPolicy, testing
from millpond.model.clock import ManualClock
from millpond.stores.faulty import Call, Fault, FaultyStore, fail_before
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.store import ObjectStore


@asynccontextmanager
async def bucket(plan: Any = None) -> AsyncIterator[Site]:
    """A pond on a bucket in memory."""
    clock = ManualClock()
    store: Any = Busy(ObjectStore(MemoryBucket(clock=clock), clock=clock, measure_skew=False))
    if plan is not None:
        store = FaultyStore(store, plan)
    async with testing.pond(store=store, clock=clock) as pond:
        site = Site(pond)
        try:
            yield site
        finally:
            await site.close()


async def test_handlers_run_fail_and_hand_off() -> None:
    async with bucket() as s:
        seen: list[Any] = []

        @s.pond.consumer("q", retry=RetryPolicy(base=0.0), concurrency=4)
        async def handler(number: int, state: MessageState, context: Context) -> None:
            tries = (await state.load() or 0) + 1
            await state.save(tries)
            if number == 3 and tries < 3:
                raise ValueError("not yet")
            seen.append((number, tries))
            context.hand_off("next", b"%d" % number)

        await s.queue.enqueue_many([b"%d" % number for number in range(6)])
        worker = s.start()
        await until(lambda: len(seen) == 6)
        await s.empty()
        await s.end(worker)
        assert sorted(seen) == [(0, 1), (1, 1), (2, 1), (3, 3), (4, 1), (5, 1)]
        assert (await s.pond.queue("next").counts()).ready == 6
        assert worker.counts()["retry"] == 2


async def test_leases_are_renewed_and_lost_ones_cancel(held: Held) -> None:
    async with bucket() as s:
        s.pond.consumer("q", visibility=30.0)(held.wait)
        receipt = await s.queue.enqueue(b"")
        worker = s.start()
        await until(lambda: held.started)
        await s.pass_(120, steps=12)
        view = await s.queue.get(receipt.message_id)
        assert (view.state, view.failures) == ("leased", 0)
        lease = view.lease
        assert lease is not None
        await s.queue.handle(view.id, lease.id, lease.token).defer(3600)
        await s.pass_(20, steps=2)
        await until(lambda: worker.counts()["lost"] == 1)
        await until(lambda: not worker.lines[0].running)
        assert held.ended == []
        await s.end(worker)


async def test_an_outage_is_waited_out() -> None:
    down = threading.Event()

    def plan(call: Call) -> Fault | None:
        return fail_before() if down.is_set() else None

    async with bucket(plan) as s:
        seen: list[bytes] = []
        s.pond.consumer("q")(seen.append)
        worker = s.start()
        await s.queue.enqueue(b"before")
        await until(lambda: worker.counts()["ack"] == 1)
        down.set()
        await s.pass_(300, steps=20)
        down.clear()
        await s.queue.enqueue(b"after")
        await s.pass_(90, steps=6)
        await until(lambda: seen == [b"before", b"after"])
        await s.empty()
        await s.end(worker)


async def test_two_workers_do_each_message_once() -> None:
    async with bucket() as s:
        seen: list[bytes] = []

        @s.pond.consumer("q", concurrency=5)
        async def handler(payload: bytes) -> None:
            seen.append(payload)
            await asyncio.sleep(0)

        payloads = [b"%d" % number for number in range(60)]
        await s.queue.enqueue_many(payloads)
        workers = [s.start(), s.start()]
        await s.empty()
        for worker in workers:
            await s.end(worker)
        assert sorted(seen) == sorted(payloads)
