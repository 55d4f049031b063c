"""Queues that share a limit take turns: none starves, of one process or of several."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from tests.conformance.queue.conftest import World

import millpond
from millpond.errors import StoreBusy
from millpond.worker.limits import Limiter
from millpond.worker.turns import ALONE, ALONE_PAID
from millpond.worker.worker import Worker


def consume(pond: millpond.Pond, limiter: Limiter, done: Counter[str], *queues: str) -> None:
    """Consumers of these queues, with one limit. A handler takes a second."""
    for queue in queues:

        async def handler(payload: bytes, *, queue: str = queue) -> None:
            over = asyncio.Event()
            pond.clock.call_later(1.0, over.set)
            await over.wait()
            done[queue] += 1

        pond.consumer(queue, name=queue, gate=limiter, concurrency=4)(handler)


async def pass_(world: World, seconds: float, until: Any = lambda: False) -> None:
    """Let time pass, in steps, until something is true."""
    for _ in range(round(seconds * 2)):
        if until():
            return
        await world.advance(0.5)


async def end(world: World, *running: tuple[Worker, asyncio.Task[None]]) -> None:
    for worker, _ in running:
        worker.stop(grace=0)
        worker.stop()
    for _, task in running:
        while not task.done():
            await world.advance(0.5)
        await world.soon(task)


async def start(world: World, pond: millpond.Pond) -> tuple[Worker, asyncio.Task[None]]:
    worker = Worker(pond)
    task = asyncio.create_task(worker.run())
    await world.settle()
    return worker, task


async def test_an_empty_queue_does_not_keep_the_permits_that_another_needs(world: World) -> None:
    """It once did, for as long as its worker lived: what it gave back it had at once again."""
    done: Counter[str] = Counter()
    async with world.pond() as pond:
        consume(pond, pond.limit("api", concurrency=1), done, "empty", "busy")
        running = await start(world, pond)
        await pass_(world, 5)
        await pond.queue("busy").enqueue_many([b"x"] * 4)
        await pass_(world, 60, lambda: done["busy"] == 4)
        assert done == {"busy": 4}
        await end(world, running)


async def test_queues_of_one_worker_take_turns(world: World) -> None:
    done: Counter[str] = Counter()
    async with world.pond() as pond:
        consume(pond, pond.limit("api", concurrency=2), done, "one", "two", "three")
        for queue in ("one", "two", "three"):
            await pond.queue(queue).enqueue_many([b"x"] * 30)
        running = await start(world, pond)
        await pass_(world, 120, lambda: done.total() >= 36)
        assert min(done[queue] for queue in ("one", "two", "three")) >= 10, done
        await end(world, running)


async def test_queues_of_two_processes_take_turns(world: World) -> None:
    done: Counter[str] = Counter()
    async with world.pond() as here, world.pond() as there:
        for pond, queue in ((here, "one"), (there, "two")):
            consume(pond, pond.limit("api", concurrency=1), done, queue)
        await here.queue("one").enqueue_many([b"x"] * 700)
        first = await start(world, here)
        await pass_(world, 5)
        assert done["one"] > 2
        await there.queue("two").enqueue_many([b"x"] * 20)
        second = await start(world, there)
        # For so long they may not know of each other; then for so long the one may wait for the other.
        await pass_(world, 2 * (ALONE_PAID if world.paid else ALONE), lambda: done["two"] >= 3)
        assert done["two"] >= 3, done
        await end(world, first, second)


async def test_an_empty_queue_gives_up_its_permit_for_one_of_another_process(world: World) -> None:
    done: Counter[str] = Counter()
    async with world.pond() as here, world.pond() as there:
        consume(here, here.limit("api", concurrency=1), done, "empty")
        consume(there, there.limit("api", concurrency=1), done, "busy")
        first = await start(world, here)
        await pass_(world, 3)
        await there.queue("busy").enqueue_many([b"x"] * 3)
        second = await start(world, there)
        await pass_(world, 2 * (ALONE_PAID if world.paid else ALONE), lambda: done["busy"] == 3)
        assert done == {"busy": 3}
        await end(world, first, second)


async def test_a_limit_of_one_queue_writes_no_notes_but_one(world: World) -> None:
    done: Counter[str] = Counter()
    async with world.pond() as here, world.pond() as there:
        for pond in (here, there):
            consume(pond, pond.limit("api", concurrency=1), done, "one")
        await here.queue("one").enqueue_many([b"x"] * 8)
        running = [await start(world, pond) for pond in (here, there)]
        await pass_(world, 60, lambda: done["one"] == 8)
        assert (await here.queue("millpond.limit.turns.api").counts()).ready == 1
        await end(world, *running)


async def test_a_limit_works_without_its_notes(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """They may be forbidden, or fail: that costs fairness and nothing else."""
    done: Counter[str] = Counter()
    async with world.pond() as pond:
        limiter = pond.limit("api", concurrency=1)

        async def refuse(*arguments: Any, **options: Any) -> None:
            raise StoreBusy("not now")

        limiter._turns._write = refuse  # type: ignore[method-assign]
        consume(pond, limiter, done, "one")
        await pond.queue("one").enqueue_many([b"x"] * 3)
        running = await start(world, pond)
        await pass_(world, 60, lambda: done["one"] == 3)
        assert done == {"one": 3}
        assert "millpond.limit.no_turns" in {record.message for record in caplog.records}
        await end(world, running)
