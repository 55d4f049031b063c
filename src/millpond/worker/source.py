"""What limits, periodic jobs and tasks need of a pond. They are made by a pond's own methods, so they stand below it
and know it by this alone."""

from __future__ import annotations

from typing import Protocol

from millpond.model.clock import Clock
from millpond.queue import Queue
from millpond.stores.base import Capabilities
from millpond.worker.hooks import Middleware


class Source(Protocol):
    """Where queues come from."""

    clock: Clock
    middleware: list[Middleware]

    @property
    def capabilities(self) -> Capabilities:
        """What the store can do."""

    def queue(self, name: str, *, namespace: str | None = None) -> Queue:
        """A queue by its name; no I/O."""
