"""What a handler's parameters get that are filled by their annotation."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from millpond.message import Lease, Message, MessageState
from millpond.pond import Pond
from millpond.queue import Queue
from millpond.sync import PROXIES, Portal, SyncMessage, SyncMessageState, SyncPond, SyncQueue
from millpond.worker.binding import Bound
from millpond.worker.hooks import Context
from millpond.worker.jobs import HandledMessage, Job

Fill = Callable[[Job], Any]


class LoopPortal(Portal):
    """The way from handlers in threads to the worker's own loop."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.current_thread()


def fillers(bound: Bound, pond: Pond, queue: Queue) -> list[tuple[str, Fill]]:
    """For each of the handler's special parameters, what fills it. On the worker's loop."""
    portal = LoopPortal() if bound.run_in == "thread" else None
    return [(name, _filler(kind, pond, queue, portal)) for name, kind in bound.specials]


def _filler(kind: type, pond: Pond, queue: Queue, portal: Portal | None) -> Fill:
    if issubclass(kind, Lease):
        return lambda job: job.message.lease
    if issubclass(kind, Context):
        return lambda job: job.context
    if issubclass(kind, Message):
        return HandledMessage
    if issubclass(kind, MessageState):
        return lambda job: job.message.state
    if issubclass(kind, Queue):
        return lambda job: queue
    if issubclass(kind, Pond):
        return lambda job: pond
    assert portal is not None, "synchronous forms are for handlers in threads"
    if issubclass(kind, SyncMessage):
        return lambda job: PROXIES[Message](portal, HandledMessage(job))
    if issubclass(kind, SyncMessageState):
        return lambda job: PROXIES[MessageState](portal, job.message.state)
    if issubclass(kind, SyncQueue):
        return lambda job: PROXIES[Queue](portal, queue)
    assert issubclass(kind, SyncPond)
    synchronous = SyncPond(pond)
    synchronous._portal = portal
    return lambda job: synchronous
