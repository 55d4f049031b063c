"""Periodic jobs: each tick of a schedule becomes one message, however many workers there are.

How: a schedule has a queue of its own, and in it one message, the *pacemaker*, that is delayed until the next tick. Who
is given it when it comes due acks it, and in the same commit enqueues the tick's message and the next pacemaker. So a
tick is fired by whoever holds the lease, or, when he dies, by the next one after it has ended; and never by one who
lost it, for then his ack is refused and nothing of it happens. The last tick that was fired stands in the pacemaker.

The queue's name holds a digest of the schedule. A job whose schedule was edited therefore begins anew, and workers of
the old and the new version do not pull at one pacemaker. Where two pacemakers come to be (somebody redrove, restored or
purged) their successors have one dedup key, and so have the ticks: they become one again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from datetime import datetime
from typing import TYPE_CHECKING, Literal

import msgspec

from millpond.errors import InvalidInput, LeaseLost, MillpondError, StoreClosed
from millpond.message import Message, moment
from millpond.model.names import queue_name
from millpond.worker.schedule import Schedule
from millpond.worker.source import Source

if TYPE_CHECKING:
    from millpond.model.clock import Clock
    from millpond.queue import Queue

log = logging.getLogger("millpond.worker")

LEASE = 30.0
"""Seconds for which a tick waits when the worker that was about to fire it dies."""
LOOK = 60.0
"""Seconds after which a schedule is looked at again when its pacemaker is nowhere to be seen, and the longest that a
timer runs, so that a wall clock that was set is noticed."""
RETRY = 5000
"""Milliseconds until what the store could not do is tried again."""
WINDOW = 3600.0
"""Seconds for which a tick is remembered after its message is done; it must outlast a lease, and does by far."""
FORGET = 90 * 86_400.0
"""Seconds without any worker after which a schedule is forgotten, and begins anew without catching up."""
GRACE = 60.0
"""Seconds by which a tick may be late and not count as missed."""
MOST = 100
"""Ticks that one catch-up makes up for, at most: they are enqueued in one commit."""
PREFIX = "millpond.periodic."

CatchUp = Literal["skip", "latest"] | int


class Tick(msgspec.Struct, frozen=True):
    """What a periodic job's message holds, and its handler gets if it has a parameter for it."""

    job: str
    """The job's name."""
    at: datetime
    """The time for which it was fired, whenever that came to happen."""


class Pacemaker(msgspec.Struct, frozen=True):
    """What the pacemaker's message holds."""

    last: int
    """Ticks up to this time (ms UTC) are done with."""


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Pacemaker)


class Periodic:
    """A periodic job: its ticks, and where their messages go."""

    def __init__(
        self,
        name: str,
        schedule: Schedule,
        queue: str,
        *,
        namespace: str | None = None,
        catch_up: CatchUp = "latest",
        grace: float = GRACE,
    ) -> None:
        """``catch_up``: what becomes of ticks that came while no worker ran: ``"skip"`` fires none of them,
        ``"latest"`` the newest, a number up to so many of the newest. ``grace``: seconds by which a tick may be late
        and not count as missed, for ``"skip"``. Raises InvalidInput."""
        if catch_up not in ("skip", "latest") and (catch_up.__class__ is not int or not 1 <= catch_up <= MOST):
            raise InvalidInput(f"catch_up is 'skip', 'latest' or a number of ticks from 1 to {MOST}, not {catch_up!r}")
        if not 0 <= grace <= FORGET:
            raise InvalidInput(f"grace is a number of seconds from 0 to {FORGET:.0f}, not {grace!r}")
        self.name = queue_name(name)
        self.schedule = schedule
        self.queue = queue_name(queue)
        self.namespace = namespace
        self.catch_up = catch_up
        self.grace = grace
        digest = hashlib.sha256(schedule.text.encode()).hexdigest()[:8]
        try:
            self.pacemaker = queue_name(f"{PREFIX}{self.name}.{digest}")
        except MillpondError as error:
            raise InvalidInput(f"the name of a periodic job is too long: {name!r}") from error

    def due(self, last: int, now: int) -> list[int]:
        """The ticks to fire at ``now``, those up to ``last`` being done with; oldest first."""
        if self.catch_up == "skip":
            return [tick for tick in self.schedule.newest(now, last, 1) if now - tick <= self.grace * 1000]
        limit = 1 if self.catch_up == "latest" else self.catch_up
        assert isinstance(limit, int)
        return self.schedule.newest(now, last, limit)


class Ticker:
    """Fires one periodic job's ticks, together with those of other workers."""

    def __init__(self, source: Source, job: Periodic) -> None:
        self._source = source
        self._job = job

    @property
    def _clock(self) -> Clock:
        return self._source.clock

    @property
    def _queue(self) -> Queue:
        return self._source.queue(self._job.pacemaker, namespace=self._job.namespace)

    @property
    def name(self) -> str:
        """For the logs."""
        return f"periodic {self._job.name}"

    async def run(self) -> None:
        """Run until cancelled; what the store cannot do now is tried again."""
        while True:
            try:
                look = await self.run_once()
            except StoreClosed:
                raise
            except MillpondError as error:
                reason = f"{error} [{error.code}]"
                log.warning("millpond.periodic.failed", extra={"job": self._job.name, "reason": reason})
                look = self._clock.now_ms() + RETRY
            while (left := (look - self._clock.now_ms()) / 1000) > 0:
                await self._pause(min(left, LOOK))

    async def _pause(self, seconds: float) -> None:
        done = asyncio.Event()
        timer = self._clock.call_later(seconds, done.set)
        try:
            await done.wait()
        finally:
            timer.cancel()

    async def run_once(self) -> int:
        """Fire what is due, by whoever it is to be fired; when to look again (ms UTC). Raises MillpondError."""
        for message in await self._queue.receive(1, visibility=LEASE):
            try:
                return await self._fire(message)
            except LeaseLost:
                log.warning("millpond.periodic.lease_lost", extra={"job": self._job.name})
        pause = await self._queue.next_due()
        if pause is None:
            return await self._begin()
        return self._clock.now_ms() + round(pause * 1000)

    async def _fire(self, message: Message) -> int:
        job = self._job
        now = self._clock.now_ms()
        try:
            last = _decoder.decode(await message.read()).last
        except msgspec.DecodeError:
            log.error("millpond.periodic.unreadable", extra={"job": job.name, "message_id": message.id})
            last = now
        ticks = job.due(last, now)
        later = job.schedule.after(max(now, last))
        then = [self._tick(tick) for tick in ticks]
        if later is not None:
            then.append((job.pacemaker, *self._next(max(now, last), later, now)))
        await message.ack(then=then)
        if ticks:
            log.info("millpond.periodic.fired", extra={"job": job.name, "queue": job.queue, "ticks": len(ticks)})
        return now + round(LOOK * 1000) if later is None else later

    async def _begin(self) -> int:
        """There is no pacemaker, it seems: make one."""
        now = self._clock.now_ms()
        counts = await self._queue.counts()
        later = self._job.schedule.after(now)
        # One that is there and not to be had: somebody paused the queue, or was faster just now.
        if later is None or counts.ready or counts.delayed or counts.leased:
            return now + round(LOOK * 1000)
        payload, options = self._next(now, later, now)
        receipt = await self._queue.enqueue(payload, **options)  # type: ignore[arg-type]
        # Somebody's who has gone, if it is a duplicate: it was removed by hand. The next tick has another key.
        return min(later, now + round(LOOK * 1000)) if receipt.duplicate else later

    def _next(self, last: int, later: int, now: int) -> tuple[bytes, dict[str, object]]:
        return _encoder.encode(Pacemaker(last)), {
            "delay": (later - now) / 1000,
            "ttl": (later - now) / 1000 + FORGET,
            "max_attempts": 0,
            "dedup_key": f"next:{later}",
            "dedup_window": WINDOW,
            "content_type": "application/json",
        }

    def _tick(self, tick: int) -> tuple[str, bytes, dict[str, object]]:
        job = self._job
        return (
            job.queue,
            _encoder.encode(Tick(job.name, moment(tick))),
            {
                "dedup_key": f"cron:{job.name}:{tick}",
                "dedup_window": WINDOW,
                "content_type": "application/json",
            },
        )
