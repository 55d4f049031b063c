"""Records to bytes and back: MessagePack through msgspec, format version first.

A record of a newer format than this code knows is refused by name, never half understood.
"""

from __future__ import annotations

import msgspec

from millpond.errors import MillpondError, StoreCorrupt, StoreMismatch, UnknownKey
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


def decode_head(data: bytes, name: str) -> Head:
    """The Head in ``data``; ``name`` is how an error names the record. Raises StoreCorrupt, StoreMismatch, and
    UnknownKey when it is encrypted."""
    try:
        head = _head.decode(data)
    except _UNREADABLE as error:
        raise _undecodable(f"head of message {name}", data, HEAD_FORMAT, error) from error
    if head.format > HEAD_FORMAT:
        raise _newer(f"head of message {name}", head.format, HEAD_FORMAT)
    return head


def decode_status(data: bytes, name: str) -> Status:
    """The Status in ``data``; ``name`` is how an error names the record. Raises StoreCorrupt, StoreMismatch, and
    UnknownKey when it is encrypted."""
    try:
        status = _status.decode(data)
    except _UNREADABLE as error:
        raise _undecodable(f"status of message {name}", data, STATUS_FORMAT, error) from error
    if status.format > STATUS_FORMAT:
        raise _newer(f"status of message {name}", status.format, STATUS_FORMAT)
    return status


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
