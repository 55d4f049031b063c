"""Millpond: one task, a hundred calls at a time."""

from __future__ import annotations

import asyncio

import millpond
from worker_apps.ticks import URL, tick

pond = millpond.connect(URL)


@pond.task(concurrency=100)
async def noop() -> None:
    """Nothing."""
    tick()


def fill(count: int) -> None:
    """Enqueue."""

    async def run() -> None:
        async with pond:
            for begin in range(0, count, 500):
                await noop.send_many(noop.call() for _ in range(min(500, count - begin)))

    asyncio.run(run())
