"""Celery: ``acks_late``, as its documentation advises for jobs that must not be lost with their worker."""

from __future__ import annotations

from celery import Celery

from worker_apps.ticks import URL, tick

app = Celery("bench", broker=URL)
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_ignore_result=True,
    worker_hijack_root_logger=False,
    worker_send_task_events=False,
    broker_connection_retry_on_startup=True,
)


@app.task(name="noop")
def noop() -> None:
    """Nothing."""
    tick()


def fill(count: int) -> None:
    """Enqueue."""
    with app.producer_pool.acquire(block=True) as producer:
        for _ in range(count):
            noop.apply_async(producer=producer)
