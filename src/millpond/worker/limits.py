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
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Coroutine, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from millpond.errors import InvalidInput, LeaseLost, MillpondError
from millpond.message import Message
from millpond.model.names import queue_name

if TYPE_CHECKING:
    from millpond.model.clock import TimerHandle
    from millpond.pond import Pond
    from millpond.queue import Queue

log = logging.getLogger("millpond.worker")

LEASE = 30.0
"""Seconds after which a dead worker's permit is another's. It is renewed three times within that."""
RATE_PERMITS = 32
"""Permits of a rate at most: each is a message, and taking it two writes."""
START = 0.05
"""Seconds within which a single message is begun after its permit was marked as used: the way from there to here."""
SPAN = 0.1
"""Of a period: for so long what a permit is worth may be used after its first use."""
MAKE_AGAIN = 60.0
"""Seconds between looks at whether all permits still are there, while none is to be had."""
MOST = 1000
"""Permits of a concurrency limit at most: each is a message."""
LONGEST = 86_400.0
"""Seconds of a rate's period at most."""
PREFIX = "millpond.limit."


class Concurrency:
    """At most ``limit`` at once."""

    def __init__(self, limit: int) -> None:
        if limit.__class__ is not int or not 1 <= limit <= MOST:
            raise InvalidInput(f"a concurrency limit is a whole number from 1 to {MOST}, not {limit!r}")
        self.limit = limit
        self.kind = "concurrency"
        self.permits = limit
        self.worth = 1

    def __repr__(self) -> str:
        return f"Concurrency({self.limit})"


class Rate:
    """At most ``limit`` begun within any ``per`` seconds."""

    def __init__(self, limit: int, per: float = 1.0) -> None:
        if limit.__class__ is not int or not 1 <= limit <= 1_000_000:
            raise InvalidInput(f"a rate is a whole number from 1 to 1,000,000 per period, not {limit!r}")
        if per.__class__ not in (int, float) or not 0.001 <= per <= LONGEST:
            raise InvalidInput(f"the period of a rate is 0.001 to {LONGEST:.0f} seconds, not {per!r}")
        self.limit = limit
        self.per = float(per)
        self.kind = "rate"
        # As many permits as can be with the same worth each, so that together they are worth no more than the limit.
        self.worth = math.ceil(limit / RATE_PERMITS)
        self.permits = limit // self.worth
        self.span = self.per * SPAN if self.worth > 1 else 0.0
        """Seconds after the first use within which the rest of a permit may be used."""

    def __repr__(self) -> str:
        return f"Rate({self.limit}, per={self.per})"


Limit = Concurrency | Rate


def permit_id(queue: str, number: int) -> str:
    """The id of a limit's permit: the same in every process, so that there is one of each."""
    digest = bytearray(sha256(f"{queue}#{number}".encode()).digest()[:16])
    digest[6] = digest[6] & 0x0F | 0x80  # version 8: made from a digest (RFC 9562)
    digest[8] = digest[8] & 0x3F | 0x80
    return str(uuid.UUID(bytes=bytes(digest)))


class Permit:
    """The right to begin one message. Begin with `use`, end with `release`."""

    def __init__(self, gate: Gate, held: Held) -> None:
        self._gate = gate
        self._held = held
        self.used = False

    async def use(self) -> bool:
        """The work begins now; whether it still may: False when the permit was lost meanwhile."""
        self.used = await self._held.use()
        return self.used

    async def release(self) -> None:
        """The work is done, or there was none. Never raises: what cannot be given back now frees itself."""
        await self._gate.give_back(self._held, self.used)


class Held:
    """A permit's message, held by this process, and what is left of its worth."""

    def __init__(self, gate: Gate, message: Message, worth: int) -> None:
        self.gate = gate
        self.message = message
        self.out = 1
        """Permits of it that are out."""
        self.left = worth - 1
        self.begun_until: float | None = None
        """Of a rate: until when (monotonic) its worth may be used, from the first use on."""
        self._using: asyncio.Task[bool] | None = None
        self.timer: TimerHandle | None = None
        self.lost = False

    async def use(self) -> bool:
        """Begin one message on it."""
        limit = self.gate.limit
        if isinstance(limit, Concurrency):
            return not self.lost
        if self._using is None:
            # Once for all that it is worth: from now on it is gone for a period.
            self._using = asyncio.ensure_future(self._start(limit))
        # Counted from when the store has it, so that a slow write does not eat up what it was made for.
        return await asyncio.shield(self._using) and (
            self.begun_until is not None and self.gate.clock.monotonic() <= self.begun_until
        )

    async def _start(self, limit: Rate) -> bool:
        self.stop()
        try:
            await self.message.extend(limit.per + limit.span)
        except LeaseLost:
            self.lost = True
            return False
        self.begun_until = self.gate.clock.monotonic() + max(limit.span, START)
        return True

    def renew(self) -> None:
        """Keep it until `stop`."""
        self.timer = self.gate.clock.call_later(LEASE / 3, lambda: self.gate.spawn(self._extend()))

    async def _extend(self) -> None:
        if self.timer is None:
            return
        try:
            await self.message.extend(LEASE)
        except LeaseLost:
            self.lost = True
            log.warning("millpond.limit.lost", extra={"limit": self.gate.name})
            return
        except MillpondError as error:
            # The lease lasts for two more tries.
            log.warning("millpond.limit.not_renewed", extra={"limit": self.gate.name, "reason": str(error)})
        if self.timer is not None:
            self.renew()

    def stop(self) -> None:
        """Renew it no longer."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class Gate:
    """One limit, seen from one process: takes permits from the store and gives them back."""

    def __init__(self, pond: Pond, name: str, limit: Limit, *, namespace: str | None = None, owner: str | None = None):
        """``name``: what is limited, the same in every process: ``queue.orders``, ``consumer.invoices``."""
        self.limit = limit
        self.clock = pond.clock
        self.name = f"{PREFIX}{limit.kind}.{name}"
        self._owner = owner
        self._pond = pond
        self._queue: Queue = pond.queue(queue_name(self.name), namespace=namespace)
        self._made = -1.0
        """When the permits were last seen to be there (monotonic)."""
        self._open: list[Held] = []
        """Of a rate: those of which something is left."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def acquire(self, wait: float) -> Permit | None:
        """A permit, or None when there was none within ``wait`` seconds. Raises MillpondError."""
        held = self._from_open()
        if held is not None:
            return Permit(self, held)
        if self._made < 0:
            await self._make()
        end = self.clock.monotonic() + wait
        while True:
            got = await self._queue.receive(
                1, wait=max(0.0, end - self.clock.monotonic()), visibility=LEASE, owner=self._owner
            )
            if not got:
                if self.clock.monotonic() >= self._made + MAKE_AGAIN:
                    await self._make()
                return None
            number = int(got[0].payload)
            if number >= self.limit.permits:
                await got[0].ack()  # The limit was lowered.
                continue
            held = Held(self, got[0], self.limit.worth)
            held.renew()
            if held.left:
                self._open.append(held)
            return Permit(self, held)

    def _from_open(self) -> Held | None:
        """One of which something is left, if there is any."""
        now = self.clock.monotonic()
        self._open = [
            held
            for held in self._open
            if held.left and not held.lost and (held.begun_until is None or now <= held.begun_until)
        ]
        for held in self._open:
            held.left -= 1
            held.out += 1
            return held
        return None

    async def _make(self) -> None:
        """Make the permits that are not there: at the beginning, and when somebody purged them."""
        counts = await self._queue.counts()
        if counts.ready + counts.delayed + counts.leased < self.limit.permits:
            async with asyncio.TaskGroup() as group:
                for number in range(self.limit.permits):
                    group.create_task(self._make_one(number))
        self._made = self.clock.monotonic()

    async def _make_one(self, number: int) -> None:
        await self._queue.enqueue(
            str(number).encode(), message_id=permit_id(self._queue.name, number), max_attempts=0, ttl=None
        )

    async def give_back(self, held: Held, used: bool) -> None:
        """A permit of it is done with."""
        held.out -= 1
        if not used:
            held.left += 1
        if held.out:
            return
        if isinstance(self.limit, Rate) and held.begun_until is not None:
            return  # It comes back by itself.
        held.stop()
        if held in self._open:
            self._open.remove(held)
        if held.lost:
            return
        try:
            await held.message.defer()
        except MillpondError as error:
            log.warning("millpond.limit.not_given_back", extra={"limit": self.name, "reason": str(error)})

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a renewal beside everything else."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Wait for renewals under way."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)


class Gates:
    """All limits of a consumer: a message may begin when each of them has a permit."""

    def __init__(self, gates: Sequence[Gate]) -> None:
        # In one order everywhere, so that two workers never wait for what the other holds.
        self._gates = sorted(gates, key=lambda gate: gate.name)

    async def acquire(self, wait: float) -> list[Permit] | None:
        """A permit of each, or None, with nothing held, when there were none within ``wait`` seconds."""
        permits: list[Permit] = []
        try:
            for gate in self._gates:
                permit = await gate.acquire(wait)
                if permit is None:
                    break
                permits.append(permit)
            else:
                return permits
        except BaseException:
            await asyncio.shield(self.release(permits))
            raise
        await self.release(permits)
        return None

    @staticmethod
    async def use(permits: Sequence[Permit]) -> bool:
        """The work begins; whether it may."""
        return all([await permit.use() for permit in permits])

    @staticmethod
    async def release(permits: Sequence[Permit]) -> None:
        """The work is done, or there was none."""
        for permit in permits:
            await permit.release()

    async def close(self) -> None:
        """Wait for what is under way."""
        for gate in self._gates:
            await gate.close()
