"""Taking messages for a client that may go away: while it waits, when it has its answer, and in between.

Whoever waits over HTTP is watched. When its connection closes or the server is about to stop, the wait ends at once,
and what had been leased for it and not sent goes back to its queue, without a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, TypeVar
from zlib import crc32

import msgspec

from millpond.errors import MillpondError, StoreCorrupt
from millpond.model.clock import TimerHandle
from millpond.server.context import Call, Context, Disconnected
from millpond.service.consuming import Delivery
from millpond.service.payloads import check
from millpond.wire import faults
from millpond.wire.faults import Fault, Refusal

T = TypeVar("T")

UNREADABLE_DELAY = 1.0
"""Seconds until a message whose payload could not be read is tried again: what is passing may have passed."""

LONGEST_TIMER = 86_400.0
"""Seconds until a right without a near end is looked at again: a clock may be set meanwhile."""

log = logging.getLogger("millpond.server")


class Wish(msgspec.Struct, frozen=True, gc=False):
    """What a consumer asks for; names are normalised, durations are seconds."""

    namespace: str
    queue: str
    count: int
    visibility: float | None = None
    owner: str | None = None
    unread: bool = False
    """Payloads that cannot be read are handed out all the same: the consumer is told what is wrong, and decides."""


class Presence:
    """Whether there still is somebody to answer, who may have it, and a server to do it; ``async with``, once the body
    was read."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._watch: asyncio.Task[None] | None = None
        self._timer: TimerHandle | None = None
        self.lost: MillpondError | Refusal | None = None
        """Why the client may not go on: its token or certificate is not good any more, or allows less."""

    async def __aenter__(self) -> Presence:
        loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = loop.create_future()
        self._watch = loop.create_task(self._call.gone())
        self._watch.add_done_callback(self._ended)
        self._forget = self._call.context.on_drain(lambda: self._ended(None))
        self._forget_rights = self._call.context.on_rights(self._judge)
        if self._call.context.draining:
            self._ended(None)
        # Whoever was let in a moment ago is judged again: his token may have ended while the body came.
        self._judge()
        return self

    def _judge(self) -> None:
        """See whether the client may go on, now and when its token or certificate expires."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        try:
            self._call.check_rights()
        except (MillpondError, Refusal) as error:
            self.lost = error
            log.info(
                "millpond.auth.ended",
                extra={
                    "client": self._call.address,
                    "identity": self._call.identity.name,
                    "route": self._call.route,
                    "correlation_id": self._call.correlation_id,
                    "reason": str(error),
                },
            )
            self._ended(None)
            return
        ends = self._call.rights_end
        if ends is not None:
            clock = self._call.context.pond.clock
            left = max(0.001, (ends - clock.now_ms()) / 1000)
            self._timer = clock.call_later(min(left, LONGEST_TIMER), self._judge)

    def _ended(self, _: object) -> None:
        if not self._over.done():
            self._over.set_result(None)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._forget()
        self._forget_rights()
        if self._timer is not None:
            self._timer.cancel()
        assert self._watch is not None
        if self._watch.done():
            if not self._watch.cancelled():
                self._watch.exception()
        else:
            self._watch.cancel()
            await asyncio.wait({self._watch})

    @property
    def gone(self) -> bool:
        """The client has gone away."""
        return self._watch is not None and self._watch.done()

    @property
    def over(self) -> bool:
        """The client has gone away, or may not go on, or the server drains."""
        return self._over.done()

    @property
    def fault(self) -> Fault:
        """Why the client may not go on, as it is told."""
        if isinstance(self.lost, Refusal):
            return self.lost.fault
        assert self.lost is not None
        return faults.native(self.lost)[1]

    def check(self) -> None:
        """Raises Disconnected when the client is gone, Unauthorized and the like when it may not go on, Refusal
        ``shutdown_draining`` when the server drains."""
        if self.gone:
            raise Disconnected
        if self.lost is not None:
            raise self.lost
        self._call.context.refuse_while_draining()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do the work; it is cancelled when this is over. If it came to its end all the same, what it gave is
        returned. Raises as `check` does, and what the work raised."""
        task = asyncio.ensure_future(work)
        try:
            both: set[asyncio.Future[Any]] = {task, self._over}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                task.exception()
            raise
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
            if task.cancelled():
                self.check()
        return task.result()


async def claim(context: Context, wish: Wish) -> list[Delivery]:
    """What is there now."""
    deliveries = await context.pond.service.claim(
        wish.namespace, wish.queue, wish.count, visibility=wish.visibility, owner=wish.owner
    )
    return deliveries if wish.unread or not deliveries else sound(context, deliveries)


async def wait(context: Context, wish: Wish, patience: float | None) -> list[Delivery]:
    """What comes within ``patience`` seconds (None: for ever); returns as soon as there is something."""
    pond = context.pond
    clock, service = pond.clock, pond.service
    end = None if patience is None else clock.monotonic() + patience
    while True:
        left = None if end is None else end - clock.monotonic()
        if left is not None and left <= 0:
            return []
        candidate = await pond.dispatcher.wait(wish.namespace, wish.queue, timeout=left)
        if candidate is None:
            return []
        deliveries = await service.claim(
            wish.namespace,
            wish.queue,
            wish.count,
            visibility=wish.visibility,
            owner=wish.owner,
            candidates=(candidate,),
        )
        if deliveries and (wish.unread or (deliveries := sound(context, deliveries))):
            return deliveries


def sound(context: Context, deliveries: list[Delivery]) -> list[Delivery]:
    """Those whose payloads can be sent. One that cannot be read, or is not what was enqueued, has failed: it is nacked,
    as a consumer in this process would have to do, and ends among the dead letters if it stays so."""
    bad: list[tuple[Delivery, MillpondError]] = []
    for delivery in deliveries:
        payload, record = delivery.payload, delivery.given
        if payload is None:
            if delivery.trouble is not None:
                bad.append((delivery, delivery.trouble))
        elif record is not None and record.head.checksum is not None and crc32(payload) != record.head.checksum:
            try:
                check(record.head, crc32(payload))
            except StoreCorrupt as error:
                bad.append((delivery, error))
    if not bad:
        return deliveries
    for delivery, reason in bad:
        fail(context, delivery, reason)
    return [delivery for delivery in deliveries if all(delivery is not one for one, _ in bad)]


def fail(context: Context, delivery: Delivery, error: MillpondError) -> None:
    """Nack a message whose payload cannot be sent. Returns at once."""
    log.error(
        "millpond.server.payload_unreadable",
        extra={
            "namespace": delivery.namespace,
            "queue": delivery.queue,
            "message_id": delivery.id,
            "reason": f"{type(error).__name__}: {error}",
        },
    )
    context.spawn(_fail(context, delivery, error))


async def _fail(context: Context, delivery: Delivery, error: MillpondError) -> None:
    # Whoever else has it by now decides; and with trouble of the store its lease ends by itself.
    with contextlib.suppress(MillpondError):
        await context.pond.service.nack(delivery, error=f"{type(error).__name__}: {error}", delay=UNREADABLE_DELAY)


async def receive(call: Call, wish: Wish, patience: float | None) -> list[Delivery]:
    """Messages for this request: what is there, or else what comes within ``patience`` seconds (None: for ever, 0: no
    waiting). Raises as `Presence.check` does while waiting."""
    context = call.context
    left = patience != 0 and context.pond.dispatcher.looks_after(wish.namespace, wish.queue)
    if not left:
        deliveries = await claim(context, wish)
        if deliveries or patience == 0:
            return deliveries
    async with Presence(call) as presence:
        deliveries = await presence.run(wait(context, wish, patience))
        if presence.gone or presence.lost is not None or call.vanished:
            give_back(context, deliveries)
            presence.check()
            raise Disconnected
        return deliveries


def give_back(context: Context, deliveries: Sequence[Delivery]) -> None:
    """Put back, without a failure, what was leased for somebody who has not got it. Returns at once."""
    if deliveries:
        context.spawn(_give_back(context, deliveries))


async def _give_back(context: Context, deliveries: Sequence[Delivery]) -> None:
    try:
        reasons = [str(error) for error in await context.pond.service.defer_many(deliveries) if error is not None]
    except MillpondError as error:
        reasons = [str(error)]
    for reason in reasons:
        # They come back by themselves when their leases end.
        log.warning("millpond.server.not_given_back", extra={"queue": deliveries[0].queue, "reason": reason})
