"""Where the messages of a stream come from, on a store of one's own: from receives, a page at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from millpond.errors import MillpondError
from millpond.service.consuming import Delivery
from millpond.service.operations import Operations

WAIT = 3600.0
"""Seconds of one wait; who waits for longer waits again."""


class Receives:
    """A feed (`millpond.service.operations.Feed`) by receives."""

    broken = False
    """Never: what was received stays leased, whatever becomes of the feed."""

    def __init__(
        self, service: Operations, namespace: str, queue: str, visibility: float | None, owner: str | None
    ) -> None:
        self._service = service
        self._namespace = namespace
        self._queue = queue
        self._visibility = visibility
        self._owner = owner

    async def more(self, room: int) -> list[Delivery]:
        """What there is, up to ``room``, as soon as there is one."""
        return await self._service.receive(
            self._namespace, self._queue, room, wait=WAIT, visibility=self._visibility, owner=self._owner
        )

    async def close(self, unanswered: Sequence[Delivery]) -> None:
        """Give back what was not answered."""
        # In vain, they come back when their leases end.
        with contextlib.suppress(MillpondError):
            if unanswered:
                await self._service.defer_many(unanswered)
