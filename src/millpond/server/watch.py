"""lockd's watch: server-sent events about whether a queue has something to hand out, and what is first."""

from __future__ import annotations

import asyncio

from millpond.errors import MillpondError
from millpond.server.context import Call
from millpond.server.lockd_requests import place, read
from millpond.server.receiving import Presence
from millpond.server.watches import Key, Watched
from millpond.wire import faults, headers, lockd
from millpond.wire.faults import Refusal

KEEPALIVE = 20.0
"""Seconds after which a comment shows that the stream is alive; lockd's."""
_named = lockd.Reader(lockd.Named, empty=True)


async def watch(call: Call) -> None:
    """Streams events until the client leaves."""
    context = call.context
    await context.gate.admit("other")
    context.refuse_while_draining()
    request: lockd.Named = await read(call, _named)
    queue = request.queue.strip() or call.query.get("queue", "").strip()
    if not queue:
        raise Refusal(400, "missing_queue", "name the queue")
    key = place(call, request.namespace.strip() or call.query.get("namespace", "").strip(), queue)
    call.authorise("consume", *key)
    news = asyncio.Event()
    async with Presence(call) as presence:
        watched = await context.watches.enter(key, news)
        try:
            await call.start(
                200,
                [
                    (b"content-type", b"text/event-stream"),
                    (b"cache-control", b"no-cache"),
                    (b"connection", b"keep-alive"),
                    (b"x-accel-buffering", b"no"),
                    (headers.CORRELATION, call.correlation_id.encode()),
                ],
            )
            await call.write(b"")  # the head goes with it
            try:
                await presence.run(watched.known.wait())
                number = 0
                told: tuple[str, int] | None = None
                while True:
                    news.clear()
                    if (watched.head, watched.at) != told:
                        told = (watched.head, watched.at)
                        number += 1
                        await call.write(_event(call, key, watched, number))
                    if not await _news(call, presence, news):
                        await call.write(b": keepalive\n\n")
            except (Refusal, MillpondError):
                if presence.lost is not None:
                    # Clients pass over events that they do not know, come again, and are told by the status.
                    await call.write(b"event: error\ndata: %b\n\n" % faults.encode(presence.fault))
                elif not context.draining:
                    raise
            await call.end()
        finally:
            await context.watches.leave(key, news)


async def _news(call: Call, presence: Presence, news: asyncio.Event) -> bool:
    """Whether there are news before it is time to show that the stream is alive."""
    quiet = False

    def wake() -> None:
        nonlocal quiet
        quiet = True
        news.set()

    timer = call.context.pond.clock.call_later(KEEPALIVE, wake)
    try:
        await presence.run(news.wait())
    finally:
        timer.cancel()
    return not quiet


def _event(call: Call, key: Key, watched: Watched, number: int) -> bytes:
    data = lockd.encode(
        lockd.Watched(
            namespace=key[0],
            queue=key[1],
            available=bool(watched.head),
            head_message_id=watched.head,
            changed_at_unix=watched.at // 1000,
            correlation_id=call.correlation_id,
        )
    )
    return b"id: %d\nevent: queue_watch\ndata: %b\n\n" % (number, data)
