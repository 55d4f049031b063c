"""How many queues a namespace may have. A queue comes to be by its first message, so that a client that makes names up
would fill the store with queues of one message each, and every list of them.

The store is asked only when somebody names a queue that this process has not met.
"""

from __future__ import annotations

import asyncio

from millpond.pond import Pond
from millpond.wire.faults import Refusal

FORGET = 65_536
"""Queues remembered; more than that, and all are looked up again."""

PATIENCE = 1.0
"""Seconds between looks at a namespace that was full: who is refused must not make the store work."""


class Quota:
    """Counts queues."""

    def __init__(self, pond: Pond, most: int) -> None:
        """``most`` queues in a namespace; 0: as many as there are."""
        self._pond = pond
        self._most = most
        self._known: dict[str, set[str]] = {}
        self._looked: dict[str, float] = {}
        self._size = 0
        self._looking = asyncio.Lock()
        self._admitted: dict[str, dict[str, float]] = {}
        """When queues were let in lately, which their messages may not have reached yet."""
        self.refused = 0

    def knows(self, namespace: str, queue: str) -> bool:
        """`admit` would return at once."""
        if not self._most:
            return True
        known = self._known.get(namespace)
        return known is not None and queue in known

    async def admit(self, namespace: str, queue: str) -> None:
        """Return when something may be put into the queue; names are normalised. Raises Refusal ``too_many_queues``.

        Two processes that add the last queue at once may both do so: the limit is there against thousands."""
        if self.knows(namespace, queue):
            return
        async with self._looking:
            # One after the other: of those that come at once, each is to count the ones before.
            known = await self._look(namespace)
        if queue in known:
            return
        if len(known) >= self._most:
            self.refused += 1
            raise Refusal(
                403,
                "too_many_queues",
                f"namespace {namespace} has {len(known)} queues, as many as this server lets it have: use one of them, "
                "or have limit.queues raised",
            )
        known.add(queue)
        self._admitted.setdefault(namespace, {})[queue] = self._pond.clock.monotonic()
        self._size += 1

    async def _look(self, namespace: str) -> set[str]:
        """The queues of a namespace: as known, unless it has been full for a while."""
        known = self._known.get(namespace)
        now = self._pond.clock.monotonic()
        if known is not None and (len(known) < self._most or now - self._looked[namespace] < PATIENCE):
            return known
        # Queues go, too: when their last message does.
        known = {name.queue for name in await self._pond.queues() if name.namespace == namespace}
        known |= {queue for queue, at in self._admitted.pop(namespace, {}).items() if now - at < PATIENCE}
        if self._size > FORGET:
            self._known.clear()
            self._looked.clear()
            self._admitted.clear()
            self._size = 0
        self._known[namespace], self._looked[namespace] = known, now
        self._size += len(known)
        return known
