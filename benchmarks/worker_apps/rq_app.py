"""RQ: results are thrown away at once."""

from __future__ import annotations

from redis import Redis
from rq import Queue

from worker_apps.ticks import URL, tick


def noop() -> None:
    """Nothing."""
    tick()


def fill(count: int) -> None:
    """Enqueue."""
    queue = Queue(connection=Redis.from_url(URL))
    for begin in range(0, count, 500):
        jobs = [Queue.prepare_data("worker_apps.rq_app.noop", result_ttl=0) for _ in range(min(500, count - begin))]
        queue.enqueue_many(jobs)
