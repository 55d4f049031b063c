"""Tasks, jobs and limits in a worker, on every kind of store, shared by two ponds."""

from __future__ import annotations

import asyncio

import pytest
from tests.conformance.queue.conftest import World

import millpond
from millpond.errors import TaskFailed
from millpond.worker.tasks import RESULTS


async def test_a_task_sent_by_one_pond_is_run_by_another_and_its_result_found(world: World) -> None:
    async with world.pond() as here, world.pond() as there:

        def register(pond: millpond.Pond) -> millpond.Task[[int], int]:
            @pond.task(keep_result=60, max_attempts=1, concurrency=2)
            async def square(number: int) -> int:
                await millpond.current_task().progress(number)
                if number < 0:
                    raise ValueError("less than nothing")
                return number * number

            return square

        sender = register(here)
        register(there)
        worker = millpond.Worker(there)
        running = asyncio.create_task(worker.run())
        handles = await sender.send_many([sender.call(number) for number in range(5)])
        wrong = await sender.send(-1)
        for _ in range(40):
            await world.advance(1)  # a bucket is looked at from time to time
            if sum(worker.counts().values()) == 6:
                break
        worker.stop()
        await world.settle()
        await world.soon(running)
        assert worker.counts()["ack"] == 5
        assert [await handle.result() for handle in handles] == [0, 1, 4, 9, 16]
        with pytest.raises(TaskFailed, match="less than nothing"):
            await wrong.result()
        assert (await here.queue(RESULTS).counts()).ready == 5
        await world.advance(61)
        await here.collect()
        assert (await here.queue(RESULTS).counts()).ready == 0


async def test_two_workers_with_a_limit_and_a_job(world: World) -> None:
    begun: list[float] = []
    ticks: list[float] = []
    async with world.pond() as one, world.pond() as two:
        workers = []
        for pond in (one, two):

            @pond.consumer("orders", gate=pond.limit("orders", rate=4, per=30), concurrency=4)
            async def order(payload: bytes) -> None:
                begun.append(world.clock.monotonic())

            @pond.periodic("every 60s")
            async def report(tick: millpond.Tick) -> None:
                ticks.append(tick.at.timestamp())

            workers.append(millpond.Worker(pond))
        running = [asyncio.create_task(worker.run()) for worker in workers]
        await one.queue("orders").enqueue_many([b"x"] * 14)
        for _ in range(260):
            await world.advance(1)
        for worker in workers:
            worker.stop()
        await world.settle()
        for task in running:
            await world.soon(task)
    assert len(begun) == 14
    assert all(sum(start <= at < start + 30 for at in begun) <= 4 for start in begun)
    assert len(ticks) == len(set(ticks))
    assert len(ticks) in {4, 5}
    assert ticks == sorted(ticks)
