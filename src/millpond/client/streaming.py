"""A stream of messages from a server: one request whose answer has no end, made anew wherever it breaks off.

What the server may send is decided there, by its count of what is unanswered. A connection that is lost takes its
messages with it: the server gives them back.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

import msgspec

from millpond.client import records
from millpond.client.asking import encode, read
from millpond.client.records import NEVER, Held, Moment
from millpond.client.transport import Transport
from millpond.errors import StoreClosed, StoreError, StoreUnreachable
from millpond.model.clock import Clock
from millpond.service.consuming import Delivery
from millpond.wire import faults, native

FRAME_MESSAGES = 100
"""Messages of one frame at most."""
SILENCE = 2 * native.HEARTBEAT_MS / 1000 + 5.0
"""Seconds without a word after which a connection is given up: two heartbeats, and time for a server that is busy."""

_decode = msgspec.msgpack.Decoder(native.Hello | native.Messages | native.Heartbeat | native.End).decode


class Frames:
    """A feed (`millpond.service.operations.Feed`) from a server."""

    def __init__(
        self,
        transport: Transport,
        clock: Clock,
        request: native.StreamRequest,
        give_back: Callable[[Sequence[Delivery]], Awaitable[None]],
    ) -> None:
        self._transport = transport
        self._clock = clock
        self._request = encode(request)
        self._give_back = give_back
        self._chunks: AsyncGenerator[bytes, None] | None = None
        self._buffer = bytearray()
        self._line = 0
        """Number of the connection."""
        self._opened = NEVER
        self._begun = False
        """A frame has come over it."""
        self._brought = False
        """Messages have come over it."""
        self._empty = 0
        """Connections in a row that brought nothing: who is hung up on at once does not knock without a pause."""
        self.broken = False
        """The connection over which the last messages came is lost, and they with it."""

    async def more(self, room: int) -> list[Delivery]:
        """The messages of the next frame, from the connection there is or a new one."""
        while True:
            if self._chunks is None:
                await self._open()
            try:
                frame = await self._next()
            except StoreUnreachable:
                # What is tried at the opening is the transport's; what has begun and breaks off is begun anew.
                begun = self._begun
                await self._drop(broken=True)
                if not begun:
                    raise
                self._check_closed()
                return []
            except BaseException:
                await self._drop(broken=True)
                raise
            self._begun = True
            if isinstance(frame, native.Messages):
                self._brought = True
                return [self._held(delivery) for delivery in frame.messages]
            if isinstance(frame, native.End):
                await self._drop(broken=False)
                if frame.reason != "draining":
                    raise faults.exception(0, frame.reason, frame.detail)
                return []

    def _check_closed(self) -> None:
        if self._transport.closed:
            raise StoreClosed("the pond was closed while this stream was open")

    async def _open(self) -> None:
        if self._empty > 1:
            await self._transport.rest(self._empty)
            self._check_closed()
        self._brought = False
        self._chunks = self._transport.listen("/v1/queue/stream", self._request, SILENCE)
        self._opened = Moment.now(self._clock)
        self._line += 1
        self._begun = self.broken = False
        self._buffer.clear()

    async def _next(self) -> native.Frame:
        buffer, header = self._buffer, native.FRAME_HEADER
        assert self._chunks is not None
        while True:
            if len(buffer) >= header:
                size = int.from_bytes(buffer[:header])
                if size > native.MAX_FRAME_BYTES:
                    raise StoreError("the server's stream cannot be read; is it of another version?")
                if len(buffer) >= header + size:
                    data = bytes(buffer[header : header + size])
                    del buffer[: header + size]
                    frame: native.Frame = read(_decode, data)
                    return frame
            try:
                buffer += await anext(self._chunks)
            except StopAsyncIteration:
                raise StoreUnreachable("the stream ended without a word") from None

    def _held(self, delivery: native.Delivery) -> Held:
        # When it was leased is not known here, only that it was after the stream was asked for.
        held = records.held(delivery, self._opened)
        held.line = self._line
        return held

    async def _drop(self, *, broken: bool) -> None:
        self.broken = broken
        self._empty = 0 if self._brought else self._empty + 1
        chunks, self._chunks = self._chunks, None
        self._buffer.clear()
        if chunks is not None:
            await chunks.aclose()

    async def close(self, unanswered: Sequence[Delivery]) -> None:
        """Hang up: the server gives back what it sent and nobody answered. What came before that is told to it."""
        line = self._line if self._chunks is not None else 0
        await self._drop(broken=True)
        await self._give_back([one for one in unanswered if isinstance(one, Held) and one.line != line])


def request(namespace: str, queue: str, credit: int, visibility: int | None, owner: str | None) -> native.StreamRequest:
    """What opens a stream."""
    return native.StreamRequest(
        namespace=namespace,
        queue=queue,
        credit=credit,
        visibility_ms=visibility,
        owner=owner,
        max_batch=min(credit, FRAME_MESSAGES),
    )
