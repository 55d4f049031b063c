"""Header names, correlation ids and transaction ids, as lockd's protocol has them."""

from __future__ import annotations

import re

CORRELATION = b"x-correlation-id"
SHUTDOWN = b"shutdown-imminent"
RETRY_AFTER = b"retry-after"
LOAD_STATE = b"x-lockd-qrf-state"
"""Of a 429: how the server does, as lockd calls it."""

JSON = "application/json"
MSGPACK = "application/msgpack"
NDJSON = "application/x-ndjson"
OCTETS = "application/octet-stream"

MAX_CORRELATION = 128
"""Bytes of a correlation id; lockd's limit."""

_PRINTABLE = re.compile(r"[\x20-\x7e]{1,128}")
_PRINTABLE_BYTES = re.compile(rb"[\x20-\x7e]{1,128}")
_XID = re.compile(r"[0-9a-v]{20}")


def correlation_id(value: str | bytes | None) -> str | None:
    """The correlation id in a header or field, trimmed; None when there is none, or one that cannot stand in a header.

    A bad one is no error: a caller must not fail for what only helps to find it in the logs."""
    if value is None:
        return None
    if isinstance(value, bytes):
        value = value.strip()
        return value.decode("ascii") if _PRINTABLE_BYTES.fullmatch(value) else None
    value = value.strip()
    return value if _PRINTABLE.fullmatch(value) else None


def is_xid(value: str) -> bool:
    """Whether it has the form of a transaction id (xid: 20 characters of base32hex in lower case)."""
    return _XID.fullmatch(value) is not None
