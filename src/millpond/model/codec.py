"""Records to bytes and back: MessagePack through msgspec, format version first.

A record of a newer format than this code knows is refused by name, never half understood.
"""

from __future__ import annotations

from typing import Any

import msgspec

from millpond.errors import InvalidInput, MillpondError, StoreCorrupt, StoreMismatch, UnknownKey
from millpond.model.message import HEAD_FORMAT, STATUS_FORMAT, Head, Status


class _Versioned(msgspec.Struct, array_like=True):
    """What every record of whatever format begins with."""

    format: int


_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are no record; the last for nesting deeper than the interpreter's stack."""

_encoder = msgspec.msgpack.Encoder()
_head = msgspec.msgpack.Decoder(Head)
_status = msgspec.msgpack.Decoder(Status)
_versioned = msgspec.msgpack.Decoder(_Versioned)

encode = _encoder.encode
"""Encode a Head or a Status."""

MAX_DEPTH = 100
"""Levels of lists and dicts in a user's value. What may be encoded but not decoded is a matter of how deep the caller's
stack is, so without a limit of our own one consumer could not read what another producer could write."""


def encode_value(value: Any, what: str) -> tuple[bytes, Any]:
    """A user's value (attributes, error, state) as bytes, and as it will be read back: independent of the caller's own.

    Raises InvalidInput for what MessagePack has no form for."""
    try:
        data = _encoder.encode(value)
        plain = msgspec.msgpack.decode(data)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        raise InvalidInput(f"{what} cannot be encoded: {error}") from error
    # A level takes a byte at least.
    if len(data) > MAX_DEPTH and _deeper(plain, MAX_DEPTH):
        raise InvalidInput(f"{what} cannot be encoded: more than {MAX_DEPTH} levels of lists and dicts")
    return data, plain


def _deeper(value: Any, levels: int) -> bool:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return False
    return levels == 0 or any(_deeper(each, levels - 1) for each in value)


def decode_head(data: bytes, id: str, namespace: str = "", queue: str = "") -> Head:
    """The Head in ``data``; id, namespace and queue are how an error names the record. Raises StoreCorrupt,
    StoreMismatch, and UnknownKey when it is encrypted."""
    try:
        head = _head.decode(data)
    except _UNREADABLE as error:
        raise _undecodable(_named("head", id, namespace, queue), data, HEAD_FORMAT, error) from error
    if head.format > HEAD_FORMAT:
        raise _newer(_named("head", id, namespace, queue), head.format, HEAD_FORMAT)
    return head


def decode_status(data: bytes, id: str, namespace: str = "", queue: str = "") -> Status:
    """The Status in ``data``; id, namespace and queue are how an error names the record. Raises StoreCorrupt,
    StoreMismatch, and UnknownKey when it is encrypted."""
    try:
        status = _status.decode(data)
    except _UNREADABLE as error:
        raise _undecodable(_named("status", id, namespace, queue), data, STATUS_FORMAT, error) from error
    if status.format > STATUS_FORMAT:
        raise _newer(_named("status", id, namespace, queue), status.format, STATUS_FORMAT)
    return status


def _named(part: str, id: str, namespace: str, queue: str) -> str:
    return f"{part} of message {id}" + (f" in {namespace}/{queue}" if queue else "")


def _newer(what: str, format: int, known: int) -> StoreMismatch:
    return StoreMismatch(f"{what} has format {format}; this Millpond reads up to {known}")


def _undecodable(what: str, data: bytes, known: int, error: Exception) -> MillpondError:
    # 0xC1 begins no MessagePack value; it is how a sealed record begins.
    if data[:1] == b"\xc1":
        return UnknownKey(f"{what} is encrypted; give a keyring")
    # A newer format may have types where this one has others; that is no corruption.
    try:
        format = _versioned.decode(data).format
    except _UNREADABLE:
        format = 0
    return _newer(what, format, known) if format > known else StoreCorrupt(f"{what} cannot be decoded: {error}")
