"""Turns: a limit that several queues share must not starve one of them.

Within a process `Limiter` lets its consumers ask one after the other. Between processes nobody can: whoever is first at
a permit that came back has it, and that is mostly who gave it back. So a queue that has waited for a while says so, in
a queue that belongs to the limit; and who is about to ask, and has not waited for as long, leaves a moment in which the
other can have the permit, gives back those that it keeps for a queue which is empty, and does not lie in wait for the
next one. That costs some throughput while somebody starves, and nothing is decided by it: who holds which permit is the
store's business, and a note that is late, lost or wrong costs some fairness and no more.

What lies in the queue, as attributes of empty messages: for each queue that has the limit a note that says so, for a
day; and while one starves, one that says since when, for a moment. While only one queue is known to have the limit, it
is looked at once a minute (every five where requests cost money).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import msgspec

from millpond.errors import MillpondError, StoreClosed
from millpond.model.names import queue_name
from millpond.worker.source import Source

if TYPE_CHECKING:
    from millpond.queue import Queue

ANNOUNCE = 1.0
"""Seconds without a permit after which a queue says so, and then again."""
HAND_OVER = 0.25
"""Seconds that are left to who has waited for longer: many times what it takes to wake another process."""
ALONE = 60.0
"""Seconds between looks while no other queue is known to have the limit."""
ALONE_PAID = 300.0
"""The same where requests cost money: some cents a month."""
THRIFT = 30.0
"""By so much `ANNOUNCE` and `HAND_OVER` are longer there."""
MEMBER = 86_400.0
"""Seconds for which a queue is known to have the limit; it says so again after half of it."""
MOST = 200
"""Notes that are looked at: queues with one limit, and processes that starve."""
PREFIX = "millpond.limit.turns."


class Note(msgspec.Struct, frozen=True):
    """A note of another queue, or of one's own."""

    queue: str
    since: int | None
    """ms UTC since when it has been waiting; None: it only has the limit."""
    ends: int
    """ms UTC until when it holds."""


log = logging.getLogger("millpond.worker")


class Turns:
    """Who else waits for a limit, as one process knows it."""

    def __init__(self, source: Source, name: str, namespace: str | None) -> None:
        """``name``: the limit's."""
        self.name = queue_name(f"{PREFIX}{name}")
        self._source = source
        self._namespace = namespace
        self.forget()

    def forget(self) -> None:
        """Know nothing any more: the worker has ended, and another store may be behind the pond."""
        self._members: dict[str, float] = {}
        self._announced: dict[str, float] = {}
        self._look_at = 0.0
        self._notes: list[Note] = []
        self._shared = False

    @property
    def _queue(self) -> Queue:
        return self._source.queue(self.name, namespace=self._namespace)

    @property
    def _pace(self) -> float:
        return THRIFT if self._source.capabilities.requests_cost_money else 1.0

    @property
    def hand_over(self) -> float:
        """Seconds to leave to who has waited for longer."""
        return HAND_OVER * self._pace

    @property
    def announce(self) -> float:
        """Seconds without a permit after which a queue says so."""
        return ANNOUNCE * self._pace

    @property
    def shared(self) -> bool:
        """Other queues have the limit, too."""
        return self._shared

    async def older(self, queue: str, since: int) -> bool:
        """Whether another queue has been waiting for longer than since then (ms UTC). Raises StoreClosed."""
        now = self._source.clock.monotonic()
        try:
            if self._members.get(queue, 0.0) <= now:
                await self._write(queue, None, ttl=MEMBER, dedup_key=f"member:{queue}", dedup_window=MEMBER / 2)
                self._members[queue] = now + MEMBER / 2
                self._look_at = now
            if now >= self._look_at:
                paid = self._source.capabilities.requests_cost_money
                self._look_at = now + (ALONE_PAID if paid else ALONE)  # also when it fails
                await self._look(queue)
        except MillpondError as error:
            self._failed(error)
        at = self._source.clock.now_ms()
        return any(
            note.queue != queue and note.since is not None and note.since < since and note.ends > at
            for note in self._notes
        )

    async def waiting(self, queue: str, since: int) -> None:
        """Tell the others, not too often, that this queue has been waiting since then. Raises StoreClosed."""
        now = self._source.clock.monotonic()
        if not self._shared or self._announced.get(queue, 0.0) > now:
            return
        self._announced[queue] = now + self.announce
        try:
            await self._write(queue, since, ttl=2 * self.announce)
        except MillpondError as error:
            self._failed(error)

    def _failed(self, error: MillpondError) -> None:
        """The limit must not depend on this. An outage is met, and waited out, by who asks for permits."""
        if isinstance(error, StoreClosed):
            raise error
        log.warning("millpond.limit.no_turns", extra={"limit": self.name, "reason": f"{error} [{error.code}]"})

    async def _look(self, queue: str) -> None:
        notes = []
        for view in await self._queue.browse(limit=MOST):
            name, since, ends = view.attributes.get("queue"), view.attributes.get("since"), view.expires_at
            if isinstance(name, str) and (since is None or since.__class__ is int) and ends is not None:
                notes.append(Note(name, since, round(ends.timestamp() * 1000)))
        self._notes = notes
        self._shared = any(note.queue != queue for note in notes)
        if self._shared:
            self._look_at = self._source.clock.monotonic() + self.announce / 2

    async def _write(self, queue: str, since: int | None, **options: Any) -> None:
        attributes: dict[str, Any] = {"queue": queue} if since is None else {"queue": queue, "since": since}
        await self._queue.enqueue(b"", attributes=attributes, max_attempts=0, **options)
