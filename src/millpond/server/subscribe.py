"""lockd's subscribe: one answer without an end, a message at a time, each on its way as soon as it is leased.

There is no flow control in this protocol but the connection's own: nothing more is leased while the client does not
read. What was leased and could not be sent goes back at once; what was sent belongs to the client, even when this
connection ends, because its answers come by others. Only from a client that may not answer any more it goes back, too.
"""

from __future__ import annotations

import asyncio

from millpond.errors import MillpondError, TooManyConsumers
from millpond.server import deliveries
from millpond.server.context import Call, Context, Disconnected
from millpond.server.lockd_requests import DEQUEUE, MAX_PAGE, read, waiting, wish
from millpond.server.receiving import Presence, Wish, claim, give_back, wait
from millpond.service.consuming import Delivery
from millpond.wire import lockd
from millpond.wire.faults import Refusal
from millpond.wire.multipart import Writer

REMEMBERED = 1024
"""Messages sent to a client before those that it has answered are sorted out; the rest is no more than `Held` keeps."""
BUSY_PAUSE = 1.0
"""Seconds until a stream looks again that may not wait, because too many do."""


async def subscribe(call: Call, *, stateful: bool) -> None:
    """Streams messages until the client leaves."""
    context = call.context
    await context.gate.admit("consumer")
    context.refuse_while_draining()
    request: lockd.Dequeue = await read(call, DEQUEUE)
    asked, patience = wish(call, request, min(max(request.page_size, 1), MAX_PAGE))
    call.authorise("consume", asked.namespace, asked.queue)
    sent = _Sent(context)
    async with Presence(call) as presence:
        try:
            await _stream(call, presence, sent, asked, patience, waiting(request.wait_seconds), stateful)
        except (MillpondError, Refusal):
            if presence.lost is not None:
                give_back(context, sent.unanswered())
            raise


async def _stream(
    call: Call, presence: Presence, sent: _Sent, asked: Wish, patience: float | None, none: Refusal, stateful: bool
) -> None:
    context = call.context
    made = deliveries.writer(context)
    found = await claim(context, asked)
    if not found and patience != 0:
        found = await presence.run(wait(context, asked, patience))
    if not found:
        raise none
    try:
        while found or patience != 0:
            await _send(call, presence, made, sent, found, stateful)
            found = await claim(context, asked)
            if not found and patience != 0:
                found = await presence.run(_next(context, asked))
    except Refusal:
        if presence.lost is not None or not context.draining:
            raise
    # What was held back belongs to the next message, or to the end.
    await call.end(made.close)


class _Sent:
    """What was sent on a subscription and not answered, as far as this process knows."""

    def __init__(self, context: Context) -> None:
        self._held = context.held
        self._deliveries: list[Delivery] = []
        self._most = REMEMBERED

    def add(self, delivery: Delivery) -> None:
        """It was sent."""
        self._deliveries.append(delivery)
        if len(self._deliveries) >= self._most:
            self._deliveries = self.unanswered()
            self._most = max(REMEMBERED, 2 * len(self._deliveries))

    def unanswered(self) -> list[Delivery]:
        """Those that nobody has answered."""
        return [delivery for delivery in self._deliveries if self._held.knows(delivery)]


async def _next(context: Context, asked: Wish) -> list[Delivery]:
    """The next messages; now and then none, when others have taken the places of all who may wait."""
    try:
        return await wait(context, asked, None)
    except TooManyConsumers:
        # Who has a stream is not to lose it to those who come later.
        over = asyncio.Event()
        timer = context.pond.clock.call_later(BUSY_PAUSE, over.set)
        try:
            await over.wait()
        finally:
            timer.cancel()
        return []


async def _send(
    call: Call, presence: Presence, made: Writer, all_sent: _Sent, found: list[Delivery], stateful: bool
) -> None:
    """Write them, one after the other. Raises as `Presence.check` does, and what reading a payload raises; what is not
    sent by then goes back."""
    context = call.context
    sent = 0
    try:
        for delivery in found:
            presence.check()
            start = deliveries.head(made, delivery, stateful)
            if not call.started:
                await call.start(200, deliveries.fields(call, made, delivery))
                start = made.open + start
            if delivery.payload is not None:
                await call.write(b"".join((start, delivery.payload, made.after)))
            else:
                await call.write(start)
                async for chunk in deliveries.payload(context, delivery):
                    await call.write(chunk)
                await call.write(made.after)
            if presence.gone or call.vanished:
                raise Disconnected
            context.held.keep(delivery)
            all_sent.add(delivery)
            sent += 1
    except BaseException:
        give_back(context, found[sent:])
        raise
