"""What queues have to hand out, for all who want to be told of it.

All who watch a queue share its looks. A look is made when this process has put something in, when the store's feed
tells of others' changes, and otherwise once a second (more seldom where looks cost money); what is told is the latest,
so that a client that reads slowly misses what is over, and costs no memory.
"""

from __future__ import annotations

import asyncio
import contextlib

from millpond.errors import MillpondError, StoreError
from millpond.pond import Pond
from millpond.service.ready import Record
from millpond.stores.base import Subscription

LOOK = 1.0
"""Seconds between looks at a queue that somebody watches, if nothing tells of a change; lockd's."""
PAID_LOOK = 30.0
"""The same where looks cost money."""
PAUSE = 0.05
"""Shortest time between looks, however much happens."""

Key = tuple[str, str]


async def head_of(pond: Pond, key: Key) -> Record | None:
    """The message that would be handed out next; None when there is none, or while the queue is paused."""
    if (await pond.service.policy(key)).paused:
        return None
    return await pond.service.peek_candidate(*key)


class Watched:
    """A queue that somebody watches."""

    def __init__(self, pond: Pond, key: Key) -> None:
        self._pond = pond
        self._key = key
        self.watchers: set[asyncio.Event] = set()
        self.head = ""
        self.at = 0
        self.known = asyncio.Event()
        """There was a first look."""
        self._stirred = asyncio.Event()
        self._feed: Subscription | None = None
        self._task = asyncio.create_task(self._run(), name=f"millpond watch {key[0]}/{key[1]}")

    def stir(self) -> None:
        """Look soon."""
        self._stirred.set()

    async def stop(self) -> None:
        """Nobody watches it any more."""
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _run(self) -> None:
        pond = self._pond
        # Without a feed looks alone must do.
        with contextlib.suppress(StoreError):
            if pond.store.capabilities.change_feed:
                self._feed = pond.store.subscribe(*self._key, self.stir)
        try:
            while True:
                self._stirred.clear()
                await self._look()
                await self._rest(PAUSE, stirred=False)
                await self._rest(PAID_LOOK if pond.store.capabilities.requests_cost_money else LOOK, stirred=True)
        finally:
            if self._feed is not None:
                self._feed.close()

    async def _look(self) -> None:
        pond = self._pond
        try:
            record = await head_of(pond, self._key)
        except MillpondError:
            return  # the next look may do; whoever wants to know why asks for the stats
        head = "" if record is None else record.item.id
        if self.known.is_set() and head == self.head:
            return
        self.head, self.at = head, pond.clock.now_ms()
        self.known.set()
        for event in self.watchers:
            event.set()

    async def _rest(self, seconds: float, *, stirred: bool) -> None:
        over = asyncio.Event()
        timer = self._pond.clock.call_later(seconds, self._stirred.set if stirred else over.set)
        try:
            await (self._stirred if stirred else over).wait()
        finally:
            timer.cancel()


class Watches:
    """The queues that are watched through this server."""

    def __init__(self, pond: Pond) -> None:
        self._pond = pond
        self._queues: dict[Key, Watched] = {}

    async def enter(self, key: Key, event: asyncio.Event) -> Watched:
        """Watch a queue: ``event`` is set at each change."""
        watched = self._queues.get(key)
        if watched is None:
            if not self._queues:
                self._listen()
            watched = self._queues[key] = Watched(self._pond, key)
        watched.watchers.add(event)
        return watched

    async def leave(self, key: Key, event: asyncio.Event) -> None:
        """Watch it no longer."""
        watched = self._queues[key]
        watched.watchers.discard(event)
        if not watched.watchers:
            del self._queues[key]
            if not self._queues:
                self._unlisten()
            await watched.stop()

    def _listen(self) -> None:
        """Be told of what this process puts in, beside the dispatcher; for as long as somebody watches."""
        service, queues = self._pond.service, self._queues
        self._told = told = service.on_ready

        def ready(namespace: str, queue: str) -> None:
            told(namespace, queue)
            watched = queues.get((namespace, queue))
            if watched is not None:
                watched.stir()

        service.on_ready = ready

    def _unlisten(self) -> None:
        self._pond.service.on_ready = self._told
