"""Millpond: one consumer, a hundred handlers at a time."""

from __future__ import annotations

import asyncio

import millpond
from worker_apps.ticks import URL, tick

pond = millpond.connect(URL)


@pond.consumer("bench", concurrency=100)
async def noop(payload: bytes) -> None:
    """Nothing."""
    tick()


def fill(count: int) -> None:
    """Enqueue."""

    async def run() -> None:
        async with pond:
            queue = pond.queue("bench")
            for begin in range(0, count, 500):
                await queue.enqueue_many([b"{}"] * min(500, count - begin))

    asyncio.run(run())
