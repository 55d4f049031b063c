"""SAQ: ten jobs at a time, as it comes; results are thrown away at once."""

from __future__ import annotations

import asyncio
from typing import Any

from saq import Queue

from worker_apps.ticks import URL, tick

queue = Queue.from_url(URL)


async def noop(context: dict[str, Any]) -> None:
    """Nothing."""
    tick()


settings = {"queue": queue, "functions": [noop], "concurrency": 10}


def fill(count: int) -> None:
    """Enqueue."""

    async def run() -> None:
        await queue.connect()
        for begin in range(0, count, 50):
            await asyncio.gather(*(queue.enqueue("noop", ttl=-1) for _ in range(min(50, count - begin))))
        await queue.disconnect()

    asyncio.run(run())
