"""Huey on SQLite, with ``fsync`` on: like Millpond it needs no server. It takes a job out before it runs it."""

from __future__ import annotations

from huey import SqliteHuey

from worker_apps.ticks import URL, tick

huey = SqliteHuey(filename=URL, fsync=True, results=False)


@huey.task()
def noop() -> None:
    """Nothing."""
    tick()


def fill(count: int) -> None:
    """Enqueue."""
    for _ in range(count):
        noop()
