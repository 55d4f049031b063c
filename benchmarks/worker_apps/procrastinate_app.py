"""Procrastinate, its jobs deleted when done, as those of the others are."""

from __future__ import annotations

import asyncio

from procrastinate import App, PsycopgConnector

from worker_apps.ticks import URL, tick

app = App(
    connector=PsycopgConnector(conninfo=URL), import_paths=["worker_apps.procrastinate_app"],
    worker_defaults={"delete_jobs": "successful"},
)  # fmt: skip


@app.task(name="noop")
async def noop() -> None:
    """Nothing."""
    tick()


def fill(count: int) -> None:
    """Enqueue."""

    async def run() -> None:
        async with app.open_async():
            await app.schema_manager.apply_schema_async()
            for begin in range(0, count, 500):
                await noop.batch_defer_async(*({} for _ in range(min(500, count - begin))))

    asyncio.run(run())
