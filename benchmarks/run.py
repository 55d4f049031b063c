"""Figures of Millpond on SQLite with fsync on, and of two peers, in one run on this machine. Prints JSON.

    python benchmarks/run.py [--quick] [--backlog N] [--only NAME …]

1 KiB messages. Each figure is the median of several runs (all runs are in ``runs``). ``--backlog`` sets the size of the
large backlog (10 million by default: about 14 GB of disk and some minutes); ``--quick`` makes everything small.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import millpond

HERE = Path(__file__).parent
PAYLOAD = os.urandom(1024)


def worker(*arguments: object) -> subprocess.Popen[str]:
    """A process of `worker.py`."""
    command = [sys.executable, str(HERE / "worker.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The JSON object that a worker ends with."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a worker failed with exit code {process.returncode}")
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def lifecycles(folder: Path, mode: str, messages: int, callers: int, processes: int) -> dict[str, Any]:
    """Lifecycles a second of ``processes`` processes together, on a file of their own."""
    url = f"sqlite:///{folder / f'{mode}-{processes}-{time.time_ns()}.db'}"
    workers = [worker("lifecycles", url, mode, messages, callers) for _ in range(processes)]
    for each in workers:
        assert each.stdout is not None
        each.stdout.readline()
    for each in workers:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    results = [answer(each) for each in workers]
    seconds = max(one["ended_at"] for one in results) - min(one["started_at"] for one in results)
    return {
        "per_second": sum(one["lifecycles"] for one in results) / seconds,
        "call_p50_ms": statistics.median(one["call_p50_ms"] for one in results),
        "call_p99_ms": max(one["call_p99_ms"] for one in results),
        "call_p999_ms": max(one["call_p999_ms"] for one in results),
        "call_max_ms": max(one["call_max_ms"] for one in results),
        "cpu_us_each": statistics.median(one["cpu_us_each"] for one in results),
    }


def median_of(runs: int, measure: Callable[[], dict[str, Any]], key: str = "per_second") -> dict[str, Any]:
    """The run in the middle by ``key``, with that figure of all runs."""
    results = sorted((measure() for _ in range(runs)), key=lambda one: one[key])
    return {**results[len(results) // 2], "runs": [one[key] for one in results]}


def litequeue_lifecycles(folder: Path, messages: int) -> dict[str, Any]:
    """put, pop, done on litequeue, one message per call."""
    from litequeue import LiteQueue

    queue = LiteQueue(str(folder / f"litequeue-{time.time_ns()}.db"))
    text = PAYLOAD.hex()[:1024]
    begun = time.perf_counter()
    for _ in range(messages):
        queue.put(text)
        task = queue.pop()
        queue.done(task.message_id)
    return {"per_second": messages / (time.perf_counter() - begun)}


def persist_queue_lifecycles(folder: Path, messages: int) -> dict[str, Any]:
    """put, get, ack on persist-queue's SQLiteAckQueue, one message per call."""
    import persistqueue

    queue = persistqueue.SQLiteAckQueue(str(folder / f"persist-{time.time_ns()}"), auto_commit=True)
    begun = time.perf_counter()
    for _ in range(messages):
        queue.put(PAYLOAD)
        queue.ack(queue.get())
    return {"per_second": messages / (time.perf_counter() - begun)}


def backlog(folder: Path, messages: int, count: int) -> dict[str, Any]:
    """Claims from a queue of ``messages``: filled by one process, measured in another."""
    url = f"sqlite:///{folder / f'backlog-{messages}.db'}"
    answer(worker("fill", url, messages))
    return answer(worker("claims", url, count))


async def latency_within(url: str, count: int) -> dict[str, Any]:
    """Enqueue to receive inside one process, for a consumer that waits."""
    latencies = []
    async with millpond.connect(url) as pond:
        queue = pond.queue("latency")

        async def consume() -> None:
            while len(latencies) < count:
                for message in await queue.receive(1, wait=10.0):
                    latencies.append((time.time() - float(message.payload)) * 1e3)
                    await message.ack()

        consumer = asyncio.create_task(consume())
        while len(latencies) < count:
            await asyncio.sleep(0.005)
            if len(latencies) < count:
                await queue.enqueue(repr(time.time()).encode())
        await consumer
    latencies.sort()
    return {"p50_ms": latencies[len(latencies) // 2], "p95_ms": latencies[int(len(latencies) * 0.95)]}


async def send_spaced(url: str, count: int) -> list[float]:
    """Enqueue the time, ``count`` times, with jittered pauses so that no poll runs in step. When each was stored."""
    stored = []
    async with millpond.connect(url) as pond:
        queue = pond.queue("latency")
        for index in range(count):
            await asyncio.sleep(0.02 + (index * 7919 % 17) / 1000)
            await queue.enqueue(repr(time.time()).encode())
            stored.append(time.time())
    return stored


def latency_across(folder: Path, count: int) -> dict[str, Any]:
    """Enqueue in this process to receive in another one that waits; and what that one costs while idle.

    ``p50_ms`` is from before the enqueue to after the receive, both commits included; ``woken_p50_ms`` from the moment
    that the message was stored."""
    url = f"sqlite:///{folder / 'across.db'}"
    receiver = worker("receive", url, "latency", count)
    assert receiver.stdout is not None
    receiver.stdout.readline()
    stored = asyncio.run(send_spaced(url, count))
    result = answer(receiver)
    woken = sorted((got - at) * 1e3 for got, at in zip(result.pop("received_at"), stored, strict=True))
    return {**result, "woken_p50_ms": woken[count // 2], "woken_p95_ms": woken[int(count * 0.95)]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small and short: to see that it works")
    parser.add_argument("--backlog", type=int, default=10_000_000, help="messages in the large backlog")
    parser.add_argument("--runs", type=int, default=3, help="runs of each throughput figure")
    parser.add_argument("--only", nargs="*", help="names of figures to take")
    options = parser.parse_args()
    scale = 0.1 if options.quick else 1.0
    folder = Path(tempfile.mkdtemp(prefix="millpond-bench-"))
    size = lambda count: int(count * scale)  # noqa: E731
    figures: dict[str, Callable[[], dict[str, Any]]] = {
        "single_256_callers": lambda: median_of(
            options.runs, lambda: lifecycles(folder, "single", size(60_000), 256, 1)
        ),
        "batches_of_100": lambda: median_of(options.runs, lambda: lifecycles(folder, "batch", size(160_000), 8, 1)),
        "single_4_processes": lambda: median_of(
            options.runs, lambda: lifecycles(folder, "single", size(25_000), 64, 4)
        ),
        "single_1_caller": lambda: median_of(options.runs, lambda: lifecycles(folder, "single", size(3_000), 1, 1)),
        "peer_litequeue": lambda: median_of(options.runs, lambda: litequeue_lifecycles(folder, size(5_000))),
        "peer_persist_queue": lambda: median_of(options.runs, lambda: persist_queue_lifecycles(folder, size(2_000))),
        "latency_within_process": lambda: asyncio.run(latency_within(f"sqlite:///{folder / 'within.db'}", size(500))),
        "latency_across_processes": lambda: latency_across(folder, size(500)),
        "backlog_small": lambda: backlog(folder, 10_000, 2_000),
        "backlog_large": lambda: backlog(folder, int(options.backlog * scale), 2_000),
    }
    result: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()},
        "millpond": millpond.__version__,
    }
    try:
        for name, measure in figures.items():
            if options.only and name not in options.only:
                continue
            print(f"{name} …", file=sys.stderr, flush=True)
            result[name] = measure()
            for file in folder.iterdir():
                if file.is_file():
                    file.unlink()
                else:
                    shutil.rmtree(file)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
