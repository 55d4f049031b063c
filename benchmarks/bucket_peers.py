"""The queues in a bucket that others have written, each driven as its own documentation does it.

One run is ``callers`` callers, each of which puts a message in, takes one out and confirms it, over and over until the
time is up. What they are, from their sources (each in its newest version of November 2026):

- *jqueue*: one JSON object that holds the whole queue. Each step reads it and replaces it on condition; its
  ``BrokerQueue`` joins what concurrent callers want in one such step. It opens a client for each request.
- *pailq*: an object per message, synchronous (a caller is a thread). Claim: list the whole queue, read the first,
  create ``run/…`` on condition, delete ``queue/…``; a claimed message has a heartbeat thread. Complete: a result, a
  delete.
- *pawn-queue*: an object per message and one per lease. Each poll lists and reads all leases, lists all messages, then
  takes one after the other. An ack is two deletes. All callers here share a consumer that polls for 16 at once, which
  was the fastest of 4, 16 and 64: consumers of their own would each read what the others do.
- *buquet*: a Rust core with a worker of its own, which polls shards; an object with history per task, an index object
  beside it. Its callers submit and are called back by the worker's handler; there are as many workers as callers, at
  most one for each of the 16 shards.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

TEXT = os.urandom(512).hex()
"""1 KiB, for queues that take JSON only."""
NAMES = {"jqueue": "jqueue", "pailq": "pail", "pawn-queue": "pawn_queue", "buquet": "buquet"}
"""Distribution → module."""
REGION = "us-east-1"
SHARDS = 16


class Tally:
    """Lifecycles that were completed, and whether the time is up. It begins when it is first asked for that: imports
    and connecting are over by then."""

    def __init__(self, seconds: float) -> None:
        self.done = 0
        self.seconds = seconds
        self._end: float | None = None
        self._lock = threading.Lock()

    @property
    def left(self) -> float:
        """Seconds until the time is up; below 0 afterwards."""
        with self._lock:
            if self._end is None:
                self._end = time.perf_counter() + self.seconds
            return self._end - time.perf_counter()

    @property
    def over(self) -> bool:
        """The time is up."""
        return self.left <= 0

    @property
    def overdue(self) -> bool:
        """It has been up for a second."""
        return self._end is not None and self.left < -1

    def add(self) -> None:
        """One more."""
        if not self.over:
            with self._lock:
                self.done += 1


def missing(name: str) -> str | None:
    """Why this peer cannot run here; None when it can."""
    if importlib.util.find_spec(NAMES[name]) is None:
        needs = " (it needs Python 3.12)" if name in ("jqueue", "pailq") and sys.version_info < (3, 12) else ""
        return f"not installed{needs}"
    return None


async def jqueue(endpoint: str, bucket: str, callers: int, tally: Tally) -> None:
    """BrokerQueue on its S3Storage."""
    from aioboto3 import Session
    from jqueue import BrokerQueue
    from jqueue.adapters.storage.s3 import S3Storage

    # With a session of its own per request, as without this argument, it would read botocore's data anew each time.
    storage = S3Storage(bucket, "jqueue/state.json", Session(), region_name=REGION, endpoint_url=endpoint)
    async with BrokerQueue(storage) as queue:

        async def caller() -> None:
            payload = os.urandom(1024)
            while not tally.over:
                await queue.enqueue("bench", payload)
                while not tally.over:
                    jobs = await queue.dequeue("bench")
                    for job in jobs:
                        await queue.ack(job.id)
                        tally.add()
                    if jobs:
                        break

        await asyncio.gather(*(caller() for _ in range(callers)))


async def pailq(endpoint: str, bucket: str, callers: int, tally: Tally) -> None:
    """A thread for each caller, on one client, which may be shared."""
    import boto3
    from botocore.config import Config
    from pail import Pail

    client = boto3.client(
        "s3", endpoint_url=endpoint, region_name=REGION, config=Config(max_pool_connections=max(10, callers))
    )

    def caller() -> None:
        pail = Pail(bucket, client)
        while not tally.over:
            pail.enqueue({"text": TEXT})
            while not tally.over:
                message = pail.claim()
                if message is not None:
                    message.complete()
                    tally.add()
                    break

    # Not the loop's own pool, which has too few threads for 512 callers.
    pool = ThreadPoolExecutor(callers)
    await asyncio.gather(*(asyncio.wrap_future(pool.submit(caller)) for _ in range(callers)))


async def pawn_queue(endpoint: str, bucket: str, callers: int, tally: Tally) -> None:
    """One consumer that polls for as many messages as there are callers."""
    from pawn_queue import PawnQueue

    settings = {
        "s3": {
            "endpoint_url": endpoint,
            "bucket_name": bucket,
            "aws_access_key_id": os.environ["AWS_ACCESS_KEY_ID"],
            "aws_secret_access_key": os.environ["AWS_SECRET_ACCESS_KEY"],
            "region_name": REGION,
            "use_ssl": False,
        },
        "polling": {"max_messages_per_poll": min(callers, 16), "jitter_max_ms": 0},
    }
    async with await PawnQueue.from_config(settings) as pond:
        await pond.create_topic("bench")
        producer = await pond.register_producer("bench")
        consumer = await pond.register_consumer("bench", topics=["bench"])
        acked = asyncio.Semaphore(0)

        async def put() -> None:
            while not tally.over:
                await producer.publish("bench", {"text": TEXT})
                await acked.acquire()

        async def take(message: Any) -> None:
            await message.ack()
            tally.add()
            acked.release()

        async def consume() -> None:
            while not tally.over:
                await asyncio.gather(*(take(message) for message in await consumer.poll()))
            for _ in range(callers):
                acked.release()

        await asyncio.gather(consume(), *(put() for _ in range(callers)))


async def buquet(endpoint: str, bucket: str, callers: int, tally: Tally) -> None:
    """Workers that poll every 10 ms at most when idle, without monitor."""
    import buquet

    queue = await buquet.connect(endpoint=endpoint, bucket=bucket, region=REGION, shard_prefix_len=1)
    shards = queue.all_shards()
    count = min(callers, SHARDS)
    waiting: dict[str, asyncio.Event] = {}
    names = map(str, itertools.count())

    async def work(number: int) -> None:
        worker = buquet.Worker(queue, f"bench-{number}", shards[number::count])

        @worker.task("bench")
        async def handle(input: dict[str, str]) -> dict[str, str]:
            tally.add()
            waiting[input["name"]].set()
            return {}

        polling = buquet.PollingStrategy.fixed(interval_ms=10)
        await worker.run(buquet.WorkerRunOptions(polling=polling, with_monitor=False))

    async def caller() -> None:
        while not tally.over:
            name = next(names)
            waiting[name] = asyncio.Event()
            await queue.submit("bench", {"text": TEXT, "name": name})
            await waiting[name].wait()
            del waiting[name]

    workers = [asyncio.ensure_future(work(number)) for number in range(count)]
    callers_ = [asyncio.ensure_future(caller()) for _ in range(callers)]
    await asyncio.sleep(max(0.0, tally.left))
    for task in (*workers, *callers_):
        task.cancel()
    await asyncio.gather(*workers, *callers_, return_exceptions=True)


PEERS: dict[str, Callable[[str, str, int, Tally], Awaitable[None]]] = {
    "jqueue": jqueue,
    "pailq": pailq,
    "pawn-queue": pawn_queue,
    "buquet": buquet,
}


async def main() -> None:
    """bucket_peers.py NAME ENDPOINT BUCKET CALLERS SECONDS"""
    name, endpoint, bucket, callers, seconds = sys.argv[1:]
    tally = Tally(float(seconds))
    running = asyncio.ensure_future(PEERS[name](endpoint, bucket, int(callers), tally))
    # Steps that are under way when the time is up take long in some of them, and nobody waits for them.
    while not running.done() and not tally.overdue:
        await asyncio.wait({running}, timeout=0.2)
    if running.done():
        running.result()
    print(json.dumps({"lifecycles": tally.done, "per_second": tally.done / float(seconds)}), flush=True)
    # Nor do all their threads end by themselves.
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main())
