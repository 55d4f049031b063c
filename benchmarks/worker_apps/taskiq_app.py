"""taskiq on a Redis stream, the broker of its that acknowledges jobs."""

from __future__ import annotations

import asyncio

from taskiq_redis import RedisStreamBroker

from worker_apps.ticks import URL, tick

broker = RedisStreamBroker(url=URL)


@broker.task
async def noop() -> None:
    """Nothing."""
    tick()


def fill(count: int) -> None:
    """Enqueue."""

    async def run() -> None:
        await broker.startup()
        for begin in range(0, count, 50):
            await asyncio.gather(*(noop.kiq() for _ in range(min(50, count - begin))))
        await broker.shutdown()

    asyncio.run(run())
