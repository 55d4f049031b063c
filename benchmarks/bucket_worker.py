"""One process of Millpond in a benchmark of a bucket: reads a task from its arguments, prints one JSON object.

python benchmarks/bucket_worker.py lifecycles URL CALLERS SECONDS
python benchmarks/bucket_worker.py requests URL CALLERS MESSAGES    (prints "ready", goes on at the next line)
python benchmarks/bucket_worker.py produce URL CALLERS MESSAGES     (likewise)
python benchmarks/bucket_worker.py consume URL CALLERS MESSAGES     (likewise)
python benchmarks/bucket_worker.py wait URL CALLERS 0              (prints "ready", takes messages until the next line)
python benchmarks/bucket_worker.py pace URL PER_SECOND MESSAGES    (prints "ready", goes on at the next line)
python benchmarks/bucket_worker.py idle
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time

import millpond
import millpond.testing
from millpond.model.clock import ManualClock
from millpond.stores.objects.faulty_bucket import FaultyBucket
from millpond.stores.objects.memory_bucket import MemoryBucket

PAYLOAD = os.urandom(1024)
HOUR = 3600


async def lifecycle(queue: millpond.Queue) -> None:
    """One message in, one out."""
    await queue.enqueue(PAYLOAD)
    await take(queue)


async def take(queue: millpond.Queue) -> None:
    """One message out."""
    while not (messages := await queue.receive(1)) and not (messages := await queue.receive(1, wait=10.0)):
        pass
    await messages[0].ack()


def ready() -> None:
    """Wait until the parent has read its counters."""
    print("ready", flush=True)
    sys.stdin.readline()


async def lifecycles(url: str, callers: int, seconds: float) -> dict[str, float]:
    """As many life cycles as fit."""
    waits: list[float] = []
    async with millpond.connect(url) as pond:
        queue = pond.queue("bench")
        await lifecycle(queue)
        ready()
        pond.reset_requests()
        end = time.perf_counter() + seconds
        cpu = time.process_time()

        async def caller() -> None:
            while (begun := time.perf_counter()) < end:
                await lifecycle(queue)
                if (ended := time.perf_counter()) < end:
                    waits.append(ended - begun)

        await asyncio.gather(*(caller() for _ in range(callers)))
        requests = pond.requests()
        cpu = time.process_time() - cpu
    waits.sort()
    return {
        "lifecycles": len(waits),
        "finished": requests.acknowledged,
        "per_second": len(waits) / seconds,
        "p50_ms": waits[len(waits) // 2] * 1e3 if waits else 0.0,
        "p99_ms": waits[int(len(waits) * 0.99)] * 1e3 if waits else 0.0,
        "cpu_us_each": cpu / max(1, requests.acknowledged) * 1e6,
        "requests_each": requests.per_message or 0.0,
    }


async def requests(task: str, url: str, callers: int, messages: int) -> dict[str, object]:
    """A number of messages in, out, or both, with what that asked of the bucket."""
    async with millpond.connect(url) as pond:
        queue = pond.queue("bench")
        step = {"requests": lifecycle, "produce": lambda queue: queue.enqueue(PAYLOAD), "consume": take}[task]
        if task == "requests":
            await lifecycle(queue)
        opening = pond.requests().total.total
        ready()
        pond.reset_requests()
        left = iter(range(messages))

        async def caller() -> None:
            for _ in left:
                await step(queue)

        await asyncio.gather(*(caller() for _ in range(callers)))
        total = pond.requests().total
    kinds = {name: getattr(total, name) for name in ("creates", "replaces", "reads", "deletes", "lists", "parts")}
    return {"requests": total.total, "kinds": kinds, "opening": opening, "messages": messages}


async def wait(url: str, callers: int) -> dict[str, object]:
    """Take what comes until the parent says that it is enough; seconds from enqueue to delivery."""
    waits: list[float] = []
    async with millpond.connect(url) as pond:
        queue = pond.queue("bench")

        async def caller() -> None:
            while True:
                for message in await queue.receive(1, wait=60.0):
                    waits.append(time.time() - float(message.attributes["at"]))
                    await message.ack()

        tasks = [asyncio.ensure_future(caller()) for _ in range(callers)]
        await asyncio.get_running_loop().run_in_executor(None, ready)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return {"waits": waits}


async def pace(url: str, rate: float, messages: int) -> dict[str, object]:
    """Put messages in, so many a second at most."""
    async with millpond.connect(url) as pond:
        queue = pond.queue("bench")
        ready()
        begun = time.perf_counter()
        for number in range(messages):
            await asyncio.sleep(begun + number / rate - time.perf_counter())
            await queue.enqueue(PAYLOAD, attributes={"at": time.time()})
    return {"messages": messages}


async def idle() -> dict[str, object]:
    """Requests of a pond whose queue is empty, in an hour of a clock that is moved, on a bucket in memory."""
    from millpond.stores.objects.store import ObjectStore

    clock = ManualClock()
    bucket = FaultyBucket(MemoryBucket(clock=clock))
    result: dict[str, object] = {}
    async with millpond.testing.pond(store=ObjectStore(bucket, clock=clock), clock=clock) as live:
        queue = live.queue("bench")
        await lifecycle(queue)
        waiter: asyncio.Task[object] | None = None
        for name in ("without_waiter", "with_waiter"):
            if name == "with_waiter":
                waiter = asyncio.ensure_future(queue.receive(1, wait=2 * HOUR))
                # The first minute is that of a queue that has just become idle: polls are further and further apart.
                await pass_time(live, 60)
            before = len(bucket.requests)
            await pass_time(live, HOUR)
            result[name] = len(bucket.requests) - before
        assert waiter is not None
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
    return result


async def pass_time(live: millpond.testing.TestPond, seconds: int) -> None:
    """Second by second, so that a timer which is set by another one's work is met."""
    for _ in range(seconds):
        await live.advance(1.0)


def main() -> None:
    """Run the task named on the command line."""
    task, *rest = sys.argv[1:]
    if task == "lifecycles":
        result: object = asyncio.run(lifecycles(rest[0], int(rest[1]), float(rest[2])))
    elif task in ("requests", "produce", "consume"):
        result = asyncio.run(requests(task, rest[0], int(rest[1]), int(rest[2])))
    elif task == "wait":
        result = asyncio.run(wait(rest[0], int(rest[1])))
    elif task == "pace":
        result = asyncio.run(pace(rest[0], float(rest[1]), int(rest[2])))
    elif task == "idle":
        result = asyncio.run(idle())
    else:
        raise SystemExit(f"unknown task {task!r}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
