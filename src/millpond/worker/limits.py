"""Limits that hold across processes: how many messages are worked on at once, and how many are begun within a time.

How: a limit is a queue of its own, with one message per *permit*. Holding a permit is holding its message's lease, so
the store's conditional writes are what keeps the limit, and the end of the lease is what frees the permit of a worker
that died. Nothing else is needed of a store, and `millpond stats` shows what is taken: leased permits are in use.

- `Concurrency`: a permit is held while a message is worked on, renewed meanwhile, and given back afterwards.
- `Rate`: a permit is gone for ``per`` seconds from when it was used, and then comes back by itself. So within *any*
  ``per`` seconds no more are begun than allowed. Of a high rate each permit stands for several messages, which its
  holder begins within a tenth of that time (`SPAN`) or lets go; it comes back that much later, so such a rate is
  reached to nine tenths. In return the store is asked for `RATE_PERMITS` permits per period at most.

A worker takes its permit first and its message then. Without a permit it takes no message, so a limit costs no attempt.

Permits of a concurrency are renewed by whoever renews the leases of messages (`Renewer`), so that a handler which
blocks the event loop keeps its permit as it keeps its message. An unused permit of a rate is renewed on the loop: lost,
it costs nothing but the way to another.

Consumers of one limit ask for permits one after the other, and processes make way for each other (`turns`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Coroutine, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from millpond.errors import InvalidInput, LeaseLost, MillpondError, StoreClosed, StoreMismatch
from millpond.message import Message
from millpond.model.names import queue_name
from millpond.worker.hooks import Context, Middleware
from millpond.worker.outcomes import Defer, Outcome
from millpond.worker.renewing import Renewer
from millpond.worker.source import Source
from millpond.worker.turns import Turns

if TYPE_CHECKING:
    from millpond.model.clock import Clock, TimerHandle
    from millpond.queue import Queue

log = logging.getLogger("millpond.worker")

LEASE = 30.0
"""Seconds after which a dead worker's permit is another's. It is renewed three times within that."""
PATIENCE = 60.0
"""Seconds of one wait for a permit; then it is looked whether all of them still are there."""
LINGER = 60.0
"""Seconds for which permits that found no message are kept for the next one: a worker whose queue is empty asks for
messages every second or so, and is not to give back and take anew each time. Who else has the limit has the same queue,
and finds no message either."""
RATE_PERMITS = 32
"""Permits of a rate at most: each is a message, and taking it two writes."""
START = 0.05
"""Seconds within which a message is begun after its permit was marked as used: the way from there to here."""
SPAN = 0.1
"""Of a period: for so long what a permit is worth may be used after its first use."""
FIRST_PAUSE = 0.2
LONGEST_PAUSE = 15.0
"""Seconds between tries while the store is away."""
FATAL = (StoreClosed, StoreMismatch, InvalidInput)
"""What no waiting cures."""
MOST = 1000
"""Permits of a concurrency limit at most: each is a message."""
LONGEST = 86_400.0
"""Seconds of a rate's period at most."""
PREFIX = "millpond.limit."


class Concurrency:
    """At most ``limit`` at once."""

    kind = "concurrency"
    worth = 1

    def __init__(self, limit: int) -> None:
        if limit.__class__ is not int or not 1 <= limit <= MOST:
            raise InvalidInput(f"a concurrency limit is a whole number from 1 to {MOST}, not {limit!r}")
        self.limit = limit
        self.permits = limit


class Rate:
    """At most ``limit`` begun within any ``per`` seconds."""

    kind = "rate"

    def __init__(self, limit: int, per: float = 1.0) -> None:
        if limit.__class__ is not int or not 1 <= limit <= 1_000_000:
            raise InvalidInput(f"a rate is a whole number from 1 to 1,000,000 per period, not {limit!r}")
        if per.__class__ not in (int, float) or not 0.001 <= per <= LONGEST:
            raise InvalidInput(f"the period of a rate is 0.001 to {LONGEST:.0f} seconds, not {per!r}")
        self.limit = limit
        self.per = float(per)
        # As many permits as can be with the same worth each, so that together they are worth no more than the limit.
        self.worth = math.ceil(limit / RATE_PERMITS)
        self.permits = limit // self.worth
        self.span = self.per * SPAN if self.worth > 1 else 0.0
        """Seconds after the first use within which the rest of a permit may be used."""


Limit = Concurrency | Rate


def permit_id(queue: str, number: int) -> str:
    """The id of a limit's permit: the same in every process, so that there is one of each."""
    digest = bytearray(sha256(f"{queue}#{number}".encode()).digest()[:16])
    digest[6] = digest[6] & 0x0F | 0x80  # version 8: made from a digest (RFC 9562)
    digest[8] = digest[8] & 0x3F | 0x80
    return str(uuid.UUID(bytes=bytes(digest)))


class Permit:
    """The right to begin one message. Begin with `use`, end with `release`."""

    def __init__(self, pool: Permits, held: Held) -> None:
        self._pool = pool
        self._held = held
        self.used = False

    async def use(self) -> bool:
        """The work begins now; whether it still may: False when the permit was lost meanwhile."""
        self.used = await self._held.use()
        return self.used

    async def release(self) -> None:
        """The work is done, or there was none. Never raises: what cannot be given back now frees itself."""
        await self._pool.give_back(self._held, self.used)


class Held:
    """A permit's message, held by this process, and what is left of its worth."""

    def __init__(self, pool: Permits, message: Message, worth: int) -> None:
        self.pool = pool
        self.message = message
        self.out = 0
        """How much of it is out."""
        self.left = worth
        self.begun_until: float | None = None
        """Of a rate: until when (monotonic) its worth may be used, from the first use on."""
        self.timer: TimerHandle | None = None
        """Of a renewal on the loop."""
        self.kept = False
        """It is to be kept: nobody has given it back yet."""
        self.lost = False
        self.span = LEASE
        self.ends = self.renew_at = pool.clock.monotonic() + LEASE / 3
        self.handle: Message | None = None
        self.answering = asyncio.Lock()
        """Renewing, using and giving back come one after the other: the last of them to be written stands."""
        self._using: asyncio.Task[bool] | None = None

    @property
    def begun(self) -> bool:
        """Of a rate: it was marked as used, or is being marked."""
        return self._using is not None

    @property
    def usable(self) -> bool:
        """Something of it is left."""
        begun = self.begun_until
        return self.left > 0 and not self.lost and (begun is None or self.pool.clock.monotonic() <= begun)

    async def use(self) -> bool:
        """Begin one message on it."""
        limit = self.pool.limit
        if isinstance(limit, Concurrency):
            return not self.lost
        if self._using is None:
            # Once for all that it is worth: from now on it is gone for a period.
            self._using = asyncio.get_running_loop().create_task(self._start(limit))
        # Counted from when the store has it, so that a slow write does not eat up what it was made for.
        return await asyncio.shield(self._using) and (
            self.begun_until is not None and self.pool.clock.monotonic() <= self.begun_until
        )

    async def _start(self, limit: Rate) -> bool:
        self.stop()
        try:
            async with self.answering:
                await self.message.extend(limit.per + limit.span)
        except MillpondError as error:
            # Whether it was written is not known, or it is somebody else's: no message begins on it either way.
            self.lost = True
            log.warning("millpond.limit.lost", extra={"limit": self.pool.name, "reason": str(error)})
            return False
        self.begun_until = self.pool.clock.monotonic() + (limit.span or START)
        return True

    @property
    def wants_lease(self) -> bool:
        """As `Renewable`."""
        return self.kept and not self.lost

    @property
    def ending(self) -> bool:
        """As `Renewable`."""
        return not self.kept

    def not_renewed(self, reason: str) -> None:
        """As `Renewable`."""
        log.warning("millpond.limit.not_renewed", extra={"limit": self.pool.name, "reason": reason})

    def gone(self, reason: str) -> None:
        """It was lost."""
        if self.kept and not self.lost:
            self.lost = True
            log.warning("millpond.limit.lost", extra={"limit": self.pool.name, "reason": reason})

    def renew(self) -> None:
        """Keep it until `stop`."""
        self.kept = True
        if not self.pool.keep(self):
            self.timer = self.pool.clock.call_later(LEASE / 3, lambda: self.pool.spawn(self._extend()))

    async def _extend(self) -> None:
        try:
            async with self.answering:
                if not self.kept:
                    return
                await self.message.extend(LEASE)
        except LeaseLost as error:
            self.gone(str(error))
            return
        except MillpondError as error:
            self.not_renewed(str(error))  # The lease lasts for two more tries.
        if self.kept:
            self.renew()

    def stop(self) -> None:
        """Renew it no longer."""
        self.kept = False
        self.pool.drop(self)
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class Permits:
    """One limit, seen from one process: takes permits from the store and gives them back."""

    def __init__(self, source: Source, name: str, limit: Limit, *, namespace: str | None = None) -> None:
        """``name``: what is limited, the same in every process."""
        self.limit = limit
        self.name = queue_name(f"{PREFIX}{limit.kind}.{name}")
        self._source = source
        self._namespace = namespace
        self._made = False
        self._open: list[Held] = []
        """Of a rate: those of which something is left."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._renewer: Renewer | None = None
        self._kept: dict[Held, None] = {}
        """Renewed by ``_renewer``, from another thread."""

    def renewed_by(self, renewer: Renewer) -> None:
        """Have permits renewed by it, from the next one on, until `close`."""
        if isinstance(self.limit, Concurrency):
            self._renewer = renewer
            renewer.watch(lambda: self._kept, Held.gone)

    def keep(self, held: Held) -> bool:
        """Have it renewed; False where nobody does that."""
        renewer = self._renewer
        if renewer is None:
            return False
        now = self.clock.monotonic()
        until = held.message.lease.until_ms
        left = LEASE if until is None else max(0.0, (until - self.clock.now_ms()) / 1000)
        held.ends, held.renew_at = now + left, now + left - LEASE + LEASE / 3
        self._kept[held] = None
        if held.renew_at < renewer.due:
            renewer.expect(held.renew_at)
        return True

    def drop(self, held: Held) -> None:
        """Have it renewed no longer."""
        self._kept.pop(held, None)

    @property
    def clock(self) -> Clock:
        """The pond's."""
        return self._source.clock

    @property
    def _queue(self) -> Queue:
        return self._source.queue(self.name, namespace=self._namespace)

    async def acquire(self, wanted: int, wait: float) -> list[Permit]:
        """Up to ``wanted`` permits; [] when there was none within ``wait`` seconds. Raises MillpondError."""
        permits = self._from_open(wanted)
        if permits:
            return permits
        if not self._made:
            await self._make()
        end = self.clock.monotonic() + wait
        while not permits:
            messages = await self._queue.receive(
                math.ceil(wanted / self.limit.worth),
                wait=max(0.0, end - self.clock.monotonic()),
                visibility=LEASE,
            )
            if not messages:
                if wait:
                    await self._make()
                return []
            for message in messages:
                if int(message.payload) >= self.limit.permits:
                    await message.ack()  # The limit was lowered.
                    continue
                held = Held(self, message, self.limit.worth)
                held.renew()
                self._open.append(held)
            permits = self._from_open(wanted)
        return permits

    def _from_open(self, wanted: int) -> list[Permit]:
        """Of those at hand of which something is left."""
        self._open = [held for held in self._open if held.usable]
        permits: list[Permit] = []
        for held in self._open:
            while held.left and len(permits) < wanted:
                held.left -= 1
                held.out += 1
                permits.append(Permit(self, held))
        self._open = [held for held in self._open if held.left]
        return permits

    async def _make(self) -> None:
        """Make the permits that are not there: at the beginning, and when somebody purged them."""
        counts = await self._queue.counts()
        if counts.ready + counts.delayed + counts.leased < self.limit.permits:
            async with asyncio.TaskGroup() as group:
                for number in range(self.limit.permits):
                    group.create_task(self._make_one(number))
        self._made = True

    async def _make_one(self, number: int) -> None:
        await self._queue.enqueue(str(number).encode(), message_id=permit_id(self.name, number), max_attempts=0)

    async def give_back(self, held: Held, used: bool) -> None:
        """A permit of it is done with."""
        held.out -= 1
        if not used:
            held.left += 1
            if all(one is not held for one in self._open):
                self._open.append(held)
        if held.out or held.begun:
            return  # It is in use, or comes back by itself.
        held.stop()
        self._open = [one for one in self._open if one is not held]
        if held.lost:
            return
        try:
            async with held.answering:
                await held.message.defer()
        except MillpondError as error:
            log.warning("millpond.limit.not_given_back", extra={"limit": self.name, "reason": str(error)})

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside everything else; `close` waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Wait for what is under way. It may be used again, also with another store behind the pond."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        self._open.clear()
        self._kept.clear()
        self._renewer = None
        self._made = False


class Limiter(Middleware):
    """Limits on a consumer's handlers, over all processes: its gate, and around its handlers to see when they begin.

    Made by `Pond.limit`. One may be given to several consumers, of one queue or of several: they share what it allows,
    and take turns."""

    def __init__(self, source: Source, name: str, limits: Sequence[Limit], *, namespace: str | None = None) -> None:
        if not limits:
            raise InvalidInput("a limit needs concurrency=… or rate=…, or both")
        self._name = name
        # In one order everywhere, so that two workers never wait for what the other holds.
        self._pools = [
            Permits(source, name, limit, namespace=namespace) for limit in sorted(limits, key=lambda one: one.kind)
        ]
        self._waiting: list[list[Permit]] = []
        """Admitted and not begun; each a permit of every pool."""
        self._working: list[list[Permit]] = []
        self._spare: list[list[Permit]] = []
        """Not needed just now."""
        self._spare_timer: TimerHandle | None = None
        self._source = source
        self._renewer: Renewer | None = None
        self._turns = Turns(source, name, namespace)
        self.asked: float | None = None
        """When the store was last asked for permits successfully, by the monotonic clock."""
        self._turn = asyncio.Lock()
        """Who has it asks for permits. In order of coming: asyncio's locks are fair."""

    def seat(self, queue: str, renewer: Renewer) -> Seat:
        """As the consumer of one queue goes through it; ``renewer`` renews its permits."""
        if self._renewer is None:
            self._renewer = renewer
            for pool in self._pools:
                pool.renewed_by(renewer)
        return Seat(self, queue)

    async def acquire(self, wanted: int, wait: float) -> list[list[Permit]]:
        """As many sets of one permit of each pool as there are, up to ``wanted``; [] when there is none in time."""
        columns: list[list[Permit]] = []
        try:
            for pool in self._pools:
                column = await pool.acquire(wanted, wait)
                self.asked = self._source.clock.monotonic()
                columns.append(column)
                if not column:
                    break
                wanted = min(wanted, len(column))
            else:
                rows = [[column[at] for column in columns] for at in range(wanted)]
                columns = [column[wanted:] for column in columns]
                return rows
        finally:
            for column in columns:
                self._release(column)
        return []

    def _release(self, permits: Sequence[Permit]) -> None:
        for permit in permits:
            self._pools[0].spawn(permit.release())

    # As a gate

    async def admit(self, wanted: int, queue: str = "") -> int:
        """Wait until at least one handler may start; how many may. ``queue``: for whose messages."""
        since = self._source.clock.now_ms()
        rows: list[list[Permit]] = []
        if self._turn.locked():
            self._let_go()  # What another consumer waits for is not to lie here.
        async with self._turn:
            troubles = 0
            while not rows:
                try:
                    # After an outage without waiting, so that the probe sees soon that it is over.
                    rows = await self._ask(wanted, queue, since, wait=not troubles)
                    troubles = 0
                except FATAL:
                    raise
                except MillpondError as error:
                    # An outage of the store is waited out, here as by the worker that waits for this.
                    seconds = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(troubles, 20))
                    troubles += 1
                    self._told(error, seconds)
                    await self._pause(seconds)
        self._waiting += rows
        return len(rows)

    async def _ask(self, wanted: int, queue: str, since: int, *, wait: bool) -> list[list[Permit]]:
        """Once: for what is spare, or the store has. Makes way for other queues that have waited for longer."""
        turns = self._turns
        older = await turns.older(queue, since)
        if older:
            self._let_go()
            await self._pause(turns.hand_over)
        elif self._spare:
            rows = self._spare[:wanted]
            del self._spare[:wanted]
            return rows
        # With others about, not for long: they are to be told, and may have been waiting for longer.
        patience = turns.announce if turns.shared else PATIENCE
        rows = await self.acquire(wanted, patience if wait and not older else 0.0)
        if not rows:
            await turns.waiting(queue, since)
        return rows

    def _told(self, error: MillpondError, pause: float) -> None:
        reason = f"{error} [{error.code}]"
        log.warning("millpond.limit.failed", extra={"limit": self._name, "reason": reason, "pause": pause})

    async def _pause(self, seconds: float) -> None:
        over = asyncio.Event()
        timer = self._source.clock.call_later(seconds, over.set)
        try:
            await over.wait()
        finally:
            timer.cancel()

    def unused(self, count: int) -> None:
        """So many did not start."""
        for _ in range(min(count, len(self._waiting))):
            self._spare.append(self._waiting.pop())
        if self._turn.locked():
            self._let_go()
        elif self._spare and self._spare_timer is None:
            self._spare_timer = self._source.clock.call_later(LINGER, self._let_go)

    def _let_go(self) -> None:
        if self._spare_timer is not None:
            self._spare_timer.cancel()
            self._spare_timer = None
        while self._spare:
            self._release(self._spare.pop())

    def ended(self, count: int) -> None:
        """So many have ended: which, the hooks below know."""

    # Around handlers

    async def before(self, context: Context) -> None:
        """A handler begins, as soon as it may. Its permit may have been lost while it waited for a message, or be the
        rest of one whose time is over; then it waits for another, and the lease of its message is renewed meanwhile."""
        context.values[self] = None
        rows = [self._waiting.pop()] if self._waiting else await self._another()
        while rows:
            [row] = rows
            may = False
            try:
                may = all([await permit.use() for permit in row])
            finally:
                if may:
                    context.values[self] = row
                    self._working.append(row)
                else:
                    self._release(row)
            if may:
                return
            rows = await self._another()
        raise Defer(reason="the permit to work on it was lost")

    async def _another(self) -> list[list[Permit]]:
        """A permit in place of a lost one, if there is one soon."""
        try:
            return await self.acquire(1, PATIENCE)
        except FATAL:
            raise
        except MillpondError as error:
            self._told(error, LONGEST_PAUSE)
            raise Defer(LONGEST_PAUSE, "its permit was lost, and the store gives no other now") from error

    async def after(self, context: Context, result: Any) -> None:
        """It has returned."""
        self._end(context)

    async def error(self, context: Context, error: BaseException | None, outcome: Outcome) -> None:
        """It has not. What never began, for its payload did not fit, say, leaves a permit over."""
        if self not in context.values and self._waiting:
            context.values[self] = None
            self._release(self._waiting.pop())
        self._end(context)

    async def settled(self, context: Context, kind: str) -> None:
        """It answered by itself, and failed then."""
        self._end(context)

    def _end(self, context: Context) -> None:
        row = context.values.get(self)
        if row is not None:
            context.values[self] = None
            self._working = [one for one in self._working if one is not row]
            self._release(row)

    async def stop(self) -> None:
        """The worker ends: nothing is held any more."""
        if self._spare_timer is not None:
            self._spare_timer.cancel()
            self._spare_timer = None
        for rows in (self._waiting, self._working, self._spare):
            while rows:
                self._release(rows.pop())
        for pool in self._pools:
            await pool.close()
        self._renewer = None
        self.asked = None
        self._turns.forget()
        self._turn = asyncio.Lock()  # The next worker may have another event loop.


class Seat:
    """A limit as the consumer of one queue goes through it."""

    def __init__(self, limiter: Limiter, queue: str) -> None:
        self._limiter = limiter
        self._queue = queue

    @property
    def asked(self) -> float | None:
        """As `SharedGate`."""
        return self._limiter.asked

    async def admit(self, wanted: int) -> int:
        """As `Gate`."""
        return await self._limiter.admit(wanted, self._queue)

    def unused(self, count: int) -> None:
        """As `Gate`."""
        self._limiter.unused(count)

    def ended(self, count: int) -> None:
        """As `Gate`."""
        self._limiter.ended(count)
