"""A stream of deliveries: as many as the consumer has credit for, and a sign of life while nothing comes.

What a consumer that vanished had not answered goes back to the queue at once, without a failure. A consumer that reads
slowly is waited for: nothing is taken for it while a frame is on its way, so that one frame is all that the server
keeps for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence

import msgspec

from millpond.errors import MillpondError
from millpond.server import receiving, views
from millpond.server.context import Call, Disconnected
from millpond.server.outstanding import Outstanding
from millpond.server.receiving import Presence, Wish
from millpond.service.consuming import Delivery
from millpond.wire import faults, headers, native
from millpond.wire.faults import Refusal

log = logging.getLogger("millpond.server")

FRAME_BYTES = 1024 * 1024
"""Payload bytes that a frame is meant to have at most; one message may be larger."""
CROWDED = 1.0
"""Seconds until a stream looks again for room when others have taken all that there is."""
FRAMES = b"application/vnd.millpond.frames"

_json = msgspec.json.Encoder(enc_hook=views.as_json)
_msgpack = msgspec.msgpack.Encoder()


class Stream:
    """One stream, for as long as its request lasts."""

    def __init__(self, call: Call, request: native.StreamRequest, outstanding: Outstanding) -> None:
        self._call = call
        self._context = call.context
        self._clock = call.context.pond.clock
        self._request = request
        self._outstanding = outstanding
        self._lines = headers.NDJSON.encode() in (call.header(b"accept") or b"")
        """JSON, a frame a line, in place of MessagePack with lengths."""
        self._heartbeat = request.heartbeat_ms / 1000
        self._sent_at = 0.0
        self._average = float(max(1, self._context.pond.service.inline_limit))
        """Bytes of a payload, lately; at first as large as they can be."""
        self._room = asyncio.Event()
        outstanding.on_room = self._room.set

    async def run(self) -> None:
        """Send frames until the client has gone, the server drains, or something fails."""
        ended = False
        try:
            async with Presence(self._call) as presence:
                await self._begin()
                try:
                    while True:
                        await self._step(presence)
                except (Refusal, MillpondError) as error:
                    if presence.lost is not None:
                        # It could not answer for what it holds: that goes back.
                        fault = presence.fault
                        await self._send(native.End(fault.error, fault.detail))
                    elif isinstance(error, Refusal):
                        # The server drains: this one hands out nothing more, and takes answers still.
                        ended = True
                        await self._send(native.End("draining", error.fault.detail, error.fault.retry_after_seconds))
                    else:
                        ended = True
                        await self._fail(error)
                await self._call.end()
        finally:
            left = self._outstanding.close()
            if not ended:
                receiving.give_back(self._context, left)

    async def _begin(self) -> None:
        kind = headers.NDJSON.encode() if self._lines else FRAMES
        await self._call.start(
            200,
            [
                (b"content-type", kind),
                (headers.CORRELATION, self._call.correlation_id.encode()),
                (b"cache-control", b"no-store"),
                # A proxy that gathers a body before it passes it on would hold every message back.
                (b"x-accel-buffering", b"no"),
            ],
        )
        await self._send(native.Hello(self._outstanding.id, self._outstanding.credit, self._request.heartbeat_ms))

    async def _step(self, presence: Presence) -> None:
        """Send what there is, or wait for something; a heartbeat when there was nothing for long."""
        presence.check()
        patience = self._sent_at + self._heartbeat - self._clock.monotonic()
        if patience <= 0:
            await self._send(native.Heartbeat(len(self._outstanding)))
            return
        self._room.clear()
        room = self._outstanding.room()
        if room == 0:
            await presence.run(self._wait_for_room(patience))
            return
        wish = Wish(
            self._outstanding.namespace,
            self._outstanding.queue,
            min(room, self._request.max_batch, max(1, int(FRAME_BYTES / self._average))),
            None if self._request.visibility_ms is None else self._request.visibility_ms / 1000,
            self._request.owner,
            True,
        )
        deliveries: list[Delivery] = []
        if not self._context.pond.dispatcher.looks_after(wish.namespace, wish.queue):
            deliveries = await receiving.claim(self._context, wish)
        if not deliveries:
            deliveries = await presence.run(receiving.wait(self._context, wish, patience))
        if deliveries:
            await self._deliver(deliveries)

    async def _wait_for_room(self, patience: float) -> None:
        end = self._outstanding.next_end()
        if end is not None:
            patience = min(patience, max(0.001, (end - self._clock.now_ms()) / 1000))
        if len(self._outstanding) < self._outstanding.credit:
            patience = min(patience, CROWDED)
        timer = self._clock.call_later(patience, self._room.set)
        try:
            await self._room.wait()
        finally:
            timer.cancel()

    async def _deliver(self, deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            self._outstanding.sent(delivery)
        size = sum(len(delivery.payload or b"") for delivery in deliveries)
        self._average = max(1.0, size / len(deliveries))
        for part in _parts(deliveries):
            frame = native.Messages([views.delivery(delivery) for delivery in part])
            for delivery in part:
                self._context.held.keep(delivery)
            await self._send(frame)

    async def _send(self, frame: native.Frame) -> None:
        # While the client reads slowly this waits, and with it everything that the stream does.
        await self._call.write(line(frame) if self._lines else packed(frame))
        self._sent_at = self._clock.monotonic()

    async def _fail(self, error: MillpondError) -> None:
        fault = faults.native(error)[1]
        log.warning(
            "millpond.server.stream_failed",
            extra={
                "namespace": self._outstanding.namespace,
                "queue": self._outstanding.queue,
                "correlation_id": self._call.correlation_id,
                "reason": f"{type(error).__name__}: {error}",
            },
        )
        await self._send(native.End(fault.error, fault.detail, fault.retry_after_seconds or None))


def _parts(deliveries: Sequence[Delivery]) -> Iterator[list[Delivery]]:
    part: list[Delivery] = []
    size = 0
    for delivery in deliveries:
        more = len(delivery.payload or b"")
        if part and size + more > FRAME_BYTES:
            yield part
            part, size = [], 0
        part.append(delivery)
        size += more
    yield part


def packed(frame: native.Frame) -> bytes:
    """A frame as MessagePack, behind its length."""
    body = _msgpack.encode(frame)
    return len(body).to_bytes(native.FRAME_HEADER) + body


def line(frame: native.Frame) -> bytes:
    """A frame as a line of JSON."""
    return views.json_bytes(_json, frame) + b"\n"


async def stream(call: Call, request: native.StreamRequest) -> None:
    """Deliver messages as they come, at most `credit` of them unanswered at a time."""
    context = call.context
    context.refuse_while_draining()
    await context.gate.admit("consumer")
    service = context.pond.service
    key = service.key(request.namespace, request.queue)
    # What cannot be right is told before the answer begins.
    visibility = None if request.visibility_ms is None else request.visibility_ms / 1000
    await service.claim(*key, 1, visibility=visibility, owner=request.owner, check_only=True)
    try:
        await Stream(call, request, context.streams.open(*key, request.credit)).run()
    except Disconnected:
        call.status = 200
