"""What the parts of the remote service share: how a request is made and its answer read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import msgspec

from millpond.client.transport import Transport
from millpond.errors import MillpondError
from millpond.model.clock import Clock
from millpond.model.ids import IdSource
from millpond.service.core import Core

T = TypeVar("T")

key = Core.key
"""Namespace and queue, normalised. Raises InvalidQueue."""
encode = msgspec.msgpack.Encoder().encode


def decoder(kind: type[T]) -> Callable[[bytes], T]:
    """What reads an answer."""
    return msgspec.msgpack.Decoder(kind).decode


def read(decode: Callable[[bytes], T], data: bytes) -> T:
    """The answer. Raises MillpondError when it is none."""
    try:
        return decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise MillpondError(f"the server's answer cannot be read; is it of another version? ({error})") from error


class Asking:
    """Asks a server."""

    def __init__(self, transport: Transport, clock: Clock, ids: IdSource) -> None:
        self.transport = transport
        self.clock = clock
        self.ids = ids
        self._tasks: set[asyncio.Task[None]] = set()
        self._writer = ""
        """What this client calls itself in writes of states; from the first on."""
        self._writes = 0

    async def close(self) -> None:
        """Wait until what came for calls that were cancelled has been given back."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do it beside what goes on; `close` waits for it."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, path: str, request: Any, decode: Callable[[bytes], T], **options: Any) -> T:
        return read(decode, await self.transport.call(path, encode(request), **options))
