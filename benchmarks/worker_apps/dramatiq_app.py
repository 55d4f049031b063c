"""Dramatiq, with its own middleware as it comes, less Prometheus, which is an extra."""

from __future__ import annotations

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from worker_apps.ticks import URL, tick

broker = RedisBroker(url=URL)
dramatiq.set_broker(broker)


@dramatiq.actor
def noop() -> None:
    """Nothing."""
    tick()


def fill(count: int) -> None:
    """Enqueue."""
    for _ in range(count):
        noop.send()
