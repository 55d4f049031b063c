"""One process of a benchmark: reads a task from its arguments, prints one JSON object.

python benchmarks/worker.py lifecycles URL MODE MESSAGES CALLERS    (prints "ready" first, begins at a line on stdin)
python benchmarks/worker.py receive URL QUEUE COUNT          (prints "ready" first)
python benchmarks/worker.py fill URL MESSAGES
python benchmarks/worker.py claims URL COUNT
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import time

import millpond

PAYLOAD = os.urandom(1024)
BATCH = 100


async def single(queue: millpond.Queue, count: int, waits: list[float]) -> None:
    """Full lifecycles, one message per call."""
    clock = time.perf_counter
    for _ in range(count):
        begun = clock()
        await queue.enqueue(PAYLOAD)
        enqueued = clock()
        messages = await queue.receive(1)
        while not messages:
            messages = await queue.receive(1, wait=1.0)
        received = clock()
        await messages[0].ack()
        acked = clock()
        waits += (enqueued - begun, received - enqueued, acked - received)


async def batches(queue: millpond.Queue, count: int, waits: list[float]) -> None:
    """Full lifecycles, a hundred messages per call."""
    clock = time.perf_counter
    for _ in range(count // BATCH):
        begun = clock()
        await queue.enqueue_many([PAYLOAD] * BATCH)
        waits.append(clock() - begun)
        missing = BATCH
        while missing:
            begun = clock()
            messages = await queue.receive(missing, wait=1.0)
            waits.append(clock() - begun)
            if messages:
                missing -= len(messages)
                begun = clock()
                await queue.ack_many(messages)
                waits.append(clock() - begun)


async def lifecycles(url: str, mode: str, count: int, callers: int) -> dict[str, float]:
    """Run ``count`` lifecycles through ``callers`` concurrent callers."""
    waits: list[float] = []
    async with millpond.connect(url) as pond:
        queue = pond.queue("bench")
        each = count // callers
        run = single if mode == "single" else batches
        await run(queue, BATCH, [])  # Warm: statements prepared, policy read.
        # Processes that are to be measured together start together, not when the interpreter happens to be up.
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        cpu, begun = time.process_time(), time.perf_counter()
        started_at = time.time()
        await asyncio.gather(*(run(queue, each, waits) for _ in range(callers)))
        seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    done = (each if mode == "single" else each // BATCH * BATCH) * callers
    waits.sort()
    return {
        "lifecycles": done,
        "seconds": seconds,
        "per_second": done / seconds,
        "cpu_us_each": cpu / done * 1e6,
        "call_p50_ms": waits[len(waits) // 2] * 1e3,
        "call_p99_ms": waits[int(len(waits) * 0.99)] * 1e3,
        "call_p999_ms": waits[int(len(waits) * 0.999)] * 1e3,
        "call_max_ms": waits[-1] * 1e3,
        "started_at": started_at,
        "ended_at": started_at + seconds,
    }


async def receive(url: str, name: str, count: int) -> dict[str, object]:
    """Wait for messages whose payload is the time of their enqueue; the latencies, and the CPU of an idle second."""
    latencies, received = [], []
    async with millpond.connect(url) as pond:
        queue = pond.queue(name)
        print("ready", flush=True)
        while len(latencies) < count:
            for message in await queue.receive(1, wait=10.0):
                received.append(time.time())
                latencies.append((received[-1] - float(message.payload)) * 1e3)
                await message.ack()
        idle_cpu, idle = time.process_time(), time.perf_counter()
        await queue.receive(1, wait=5.0)
        idle_cpu, idle = time.process_time() - idle_cpu, time.perf_counter() - idle
    latencies.sort()
    return {
        "p50_ms": latencies[len(latencies) // 2],
        "p95_ms": latencies[int(len(latencies) * 0.95)],
        "received_at": received,
        "idle_cpu_percent": idle_cpu / idle * 100,
        "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


async def fill(url: str, messages: int) -> None:
    """Put ``messages`` messages into a queue."""
    async with millpond.connect(url) as pond:
        queue = pond.queue("bench")
        block = 500
        for start in range(0, messages, block * 4):
            await asyncio.gather(
                *(
                    queue.enqueue_many([PAYLOAD] * min(block, messages - at))
                    for at in range(start, min(start + block * 4, messages), block)
                )
            )


async def claims(url: str, count: int) -> dict[str, object]:
    """Latency of claims one at a time from a backlog, and this process's memory."""
    begun_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    latencies = []
    async with millpond.connect(url) as pond:
        queue = pond.queue("bench")
        await queue.receive(1)
        for _ in range(count):
            begun = time.perf_counter()
            [message] = await queue.receive(1)
            latencies.append((time.perf_counter() - begun) * 1e3)
            await message.ack()
        begun = time.perf_counter()
        counts = await queue.counts()
        counts_ms = (time.perf_counter() - begun) * 1e3
    latencies.sort()
    return {
        "waiting": counts.ready,
        "claim_p50_ms": latencies[len(latencies) // 2],
        "claim_p99_ms": latencies[int(len(latencies) * 0.99)],
        "counts_ms": counts_ms,
        "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "rss_before_mb": begun_rss / 1024,
    }


def main() -> None:
    """Run the task named on the command line."""
    task, *rest = sys.argv[1:]
    if task == "lifecycles":
        result: dict[str, object] = dict(asyncio.run(lifecycles(rest[0], rest[1], int(rest[2]), int(rest[3]))))
    elif task == "receive":
        result = asyncio.run(receive(rest[0], rest[1], int(rest[2])))
    elif task == "fill":
        asyncio.run(fill(rest[0], int(rest[1])))
        result = {"filled": int(rest[1])}
    elif task == "claims":
        result = asyncio.run(claims(rest[0], int(rest[1])))
    else:
        raise SystemExit(f"unknown task {task!r}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
