"""`MessageStream`: messages as they come, with a bound on how many are unanswered."""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType
from typing import Self

from millpond.errors import InvalidInput
from millpond.message import Message
from millpond.model.message import Lease
from millpond.service.config import check_count, milliseconds, short_text
from millpond.service.consuming import Delivery
from millpond.service.operations import Feed, Operations

MAX_CREDIT = 1000
"""Messages that may be unanswered on one stream: a server allows no more."""


class _Out:
    """A delivery that was not answered, and until when at most it is this consumer's, by its monotonic clock."""

    __slots__ = ("delivery", "end", "until")

    def __init__(self, delivery: Delivery, now: float) -> None:
        self.delivery = delivery
        record = delivery.given or delivery.record
        assert record is not None
        lease = record.status.lease
        assert lease is not None
        self.until = lease.until
        self.end = now + max(0, lease.until - record.status.updated_at) / 1000

    def over(self, now: float) -> bool:
        """Its lease has ended, extensions included."""
        if now >= self.end:
            lease = self._lease()
            if lease is not None and lease.until > self.until:
                self.end += (lease.until - self.until) / 1000
                self.until = lease.until
        return now >= self.end

    def _lease(self) -> Lease | None:
        record = self.delivery.record
        return None if record is None else record.status.lease


class MessageStream:
    """Messages of a queue as they come: ``async with queue.stream() as messages: async for message in messages: …``.

    At most ``credit`` of them are unanswered at a time, what lies ready to be handed out included; an answer (also by
    `Queue.ack_many`) or the end of a lease makes room for the next. It does not end by itself. When it is left, what
    was not answered goes back to the queue at once, without a failure. Behind a server, a connection that is lost is
    made anew, also to another server, and what was not answered on it goes back, too: whoever still works on such a
    message is told LeaseLost.

    Iterating raises StoreUnreachable when no server can be reached for as long as a call is tried, and what a receive
    raises; it may be iterated again then. Any number of tasks may do it.
    """

    def __init__(
        self,
        service: Operations,
        namespace: str,
        queue: str,
        *,
        credit: int = 100,
        visibility: float | None = None,
        owner: str | None = None,
    ) -> None:
        """See `Queue.stream`. Raises InvalidInput."""
        if check_count(credit, "credit") > MAX_CREDIT:
            raise InvalidInput(f"credit must be at most {MAX_CREDIT:,}: more are taken from others, and lie idle here")
        if visibility is not None:
            milliseconds(visibility, "visibility", positive=True)
        self._service = service
        self._credit = credit
        self._name = f"{namespace}/{queue}"
        self._feed: Feed = service.stream(
            namespace, queue, credit=credit, visibility=visibility, owner=short_text(owner, "owner")
        )
        self._ready: deque[_Out] = deque()
        self._out: dict[str, _Out] = {}
        """By lease: handed out or ready."""
        self._turn = asyncio.Lock()
        self._room = asyncio.Event()
        self._open = False
        self._left = False

    async def __aenter__(self) -> Self:
        if self._open or self._left:
            raise InvalidInput("a stream is entered once; ask the queue for another one")
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open, self._left = False, True
        self._room.set()  # who iterates still is told
        left = [one.delivery for one in self._out.values()]
        self._forget()
        await self._feed.close(left)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        async with self._turn:
            while True:
                if not self._open:
                    raise InvalidInput("iterate over a stream within its `async with`")
                if self._feed.broken:
                    # The server has given them back.
                    self._forget()
                now = self._service.clock.monotonic()
                while self._ready:
                    one = self._ready.popleft()
                    if not one.over(now):
                        return Message(self._service, one.delivery)
                    self._answered(one.delivery)
                room = self._credit - len(self._out)
                if room <= 0:
                    await self._wait_for_room(now)
                    continue
                deliveries = await self._feed.more(room)
                now = self._service.clock.monotonic()
                for delivery in deliveries:
                    delivery.holder = self._answered
                    one = self._out[delivery.lease_id] = _Out(delivery, now)
                    self._ready.append(one)

    def _answered(self, delivery: Delivery) -> None:
        """It is unanswered no longer."""
        delivery.holder = None
        if self._out.pop(delivery.lease_id, None) is not None:
            self._room.set()

    def _forget(self) -> None:
        self._ready.clear()
        for one in list(self._out.values()):
            self._answered(one.delivery)

    async def _wait_for_room(self, now: float) -> None:
        over = [one for one in self._out.values() if one.over(now)]
        if over:
            for one in over:
                self._answered(one.delivery)
            return
        self._room.clear()
        first = min(one.end for one in self._out.values())
        timer = self._service.clock.call_later(max(0.001, first - now), self._room.set)
        try:
            await self._room.wait()
        finally:
            timer.cancel()

    def __repr__(self) -> str:
        return f"<MessageStream of {self._name}, {len(self._out)} of {self._credit} unanswered>"
