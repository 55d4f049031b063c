"""What producers may hand over as a payload, and how it gets from there to the store."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from typing import Any, BinaryIO, NamedTuple, TypeVar
from zlib import crc32

import msgspec

from millpond.errors import InvalidInput, StoreCorrupt, TooLarge
from millpond.model.message import Head

T = TypeVar("T")

READ_SIZE = 256 * 1024
"""Bytes asked of a file at once."""


class Payload(NamedTuple):
    """Bytes with the content type that says what they are."""

    data: bytes
    content_type: str


TEXT = "text/plain; charset=utf-8"
JSON = "application/json"
MSGPACK = "application/msgpack"

Source = bytes | bytearray | memoryview | Payload | BinaryIO | Iterator[bytes] | AsyncIterable[bytes]
"""Anything that can be enqueued."""


def text(value: str) -> Payload:
    """Text as a payload, in UTF-8. Raises InvalidInput for what is no text, or has half of a surrogate pair in it."""
    if not isinstance(value, str):
        raise InvalidInput(f"millpond.text takes text, not {type(value).__name__}")
    try:
        return Payload(value.encode(), TEXT)
    except UnicodeEncodeError as error:
        raise InvalidInput(f"this text has no UTF-8: {error}") from error


def json(value: Any) -> Payload:
    """A value as JSON: what msgspec can encode (dicts, lists, dataclasses, Structs, datetimes, UUIDs …).

    Raises InvalidInput when it cannot be encoded."""
    return Payload(_encode(msgspec.json.encode, value), JSON)


def msgpack(value: Any) -> Payload:
    """A value as MessagePack; smaller and faster than JSON. Raises InvalidInput when it cannot be encoded."""
    return Payload(_encode(msgspec.msgpack.encode, value), MSGPACK)


def _encode(encode: Callable[[Any], bytes], value: Any) -> bytes:
    try:
        return encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidInput(f"this payload cannot be encoded: {error}") from error


def decode(data: bytes, content_type: str | None, type: type[T]) -> T:
    """The payload as ``type``, from MessagePack if the content type says so, otherwise from JSON.

    Raises InvalidInput when the bytes are not that."""
    try:
        if content_type == MSGPACK:
            return msgspec.msgpack.decode(data, type=type)
        return msgspec.json.decode(data, type=type)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # the last for what is nested too deeply
        raise InvalidInput(f"the payload is not a valid {getattr(type, '__name__', type)}: {error}") from error


def check(head: Head, checksum: int) -> None:
    """Raises StoreCorrupt when a payload with this checksum is not the one that was enqueued."""
    if head.checksum is not None and checksum != head.checksum:
        raise StoreCorrupt(
            f"the payload of message {head.id} in {head.namespace}/{head.queue} is damaged: its checksum is "
            f"{checksum:08x}, and was {head.checksum:08x} at the enqueue. Restore it from a backup, or bury the message"
        )


class Summed:
    """Chunks passed on, and their checksum so far."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self.checksum = 0

    def __aiter__(self) -> Summed:
        return self

    async def __anext__(self) -> bytes:
        chunk = await anext(self._chunks)
        self.checksum = crc32(chunk, self.checksum)
        return chunk


class Inline(NamedTuple):
    """The payload is this."""

    data: bytes


class Streamed(NamedTuple):
    """The payload is larger than fits inline: read the rest from here (the beginning is included)."""

    chunks: AsyncIterator[bytes]


async def _file_chunks(file: Any) -> AsyncIterator[bytes]:
    while True:
        chunk = file.read(READ_SIZE)
        if not isinstance(chunk, bytes):
            raise InvalidInput("open the payload's file in binary, blocking mode")
        if not chunk:
            return
        yield chunk


async def _iterator_chunks(source: Iterator[bytes]) -> AsyncIterator[bytes]:
    for chunk in source:
        yield chunk


async def _byte_chunks(data: bytes) -> AsyncIterator[bytes]:
    view = memoryview(data)
    for start in range(0, len(data), READ_SIZE):
        yield bytes(view[start : start + READ_SIZE])


async def _limited(first: list[bytes], rest: AsyncIterator[bytes], limit: int) -> AsyncIterator[bytes]:
    total = 0
    for chunk in first:
        total += len(chunk)
        yield chunk
    async for chunk in rest:
        total += len(chunk)
        if total > limit:
            raise TooLarge(f"the payload is larger than the limit of {limit} bytes; nothing was enqueued")
        yield chunk


async def prepare(source: Any, *, inline_limit: int, limit: int) -> Inline | Streamed:
    """Look at the beginning of ``source`` and say how it is to be stored.

    Raises InvalidInput for what is no payload, TooLarge when it is known to exceed ``limit`` bytes."""
    if isinstance(source, (bytearray, memoryview)):
        source = bytes(source)
    if isinstance(source, bytes):
        if len(source) > limit:
            raise TooLarge(f"the payload has {len(source)} bytes, more than the limit of {limit}; nothing was enqueued")
        return Inline(source) if len(source) <= inline_limit else Streamed(_byte_chunks(source))
    if isinstance(source, str):
        raise InvalidInput("a payload is bytes; for text use millpond.text(…), for objects millpond.json(…)")
    if hasattr(source, "__aiter__"):
        chunks = aiter(source)
    elif hasattr(source, "read"):
        chunks = _file_chunks(source)
    elif hasattr(source, "__next__"):
        chunks = _iterator_chunks(source)
    else:
        raise InvalidInput(
            f"a payload is bytes, a binary file or an iterator of bytes, async or not, not {type(source).__name__}"
        )
    first: list[bytes] = []
    size = 0
    async for chunk in chunks:
        if not isinstance(chunk, (bytes, bytearray, memoryview)):
            raise InvalidInput(f"a payload's chunks are bytes, not {type(chunk).__name__}")
        first.append(bytes(chunk))
        size += len(chunk)
        if size > limit:
            raise TooLarge(f"the payload is larger than the limit of {limit} bytes; nothing was enqueued")
        if size > inline_limit:
            return Streamed(_limited(first, chunks, limit))
    return Inline(b"".join(first))
