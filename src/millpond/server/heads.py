"""Heads of hot requests that were read before. A client's heads are the same, byte for byte, but for the length of the
body; so what was read in one need not be read again, which is a quarter of what a small request costs.

Nothing is decided here: a head is kept as the parser read it, and is found by all of its bytes.
"""

from __future__ import annotations

from typing import Any

from millpond.server.context import Handler, Header
from millpond.wire import headers

MAX_HEAD = 1024
"""Bytes of a head that is kept; a usual one has 200."""
MAX_HEADS = 1024
"""Heads kept, of all clients; more than that, and they are gathered anew."""
UNIQUE = frozenset({headers.CORRELATION, b"traceparent", b"tracestate"})
"""Headers by which each head is another: it is not kept."""

_JSON, _MSGPACK = headers.JSON.encode(), headers.MSGPACK.encode()


class Head:
    """What a head says."""

    __slots__ = ("fields", "handler", "keep_alive", "length", "packed", "path")

    def __init__(self, path: str, handler: Handler, fields: list[Header], keep_alive: bool, length: int) -> None:
        self.path = path
        self.handler = handler
        self.fields = fields
        self.keep_alive = keep_alive
        self.length = length
        """Bytes of the body."""
        kinds = [value for name, value in fields if name == b"content-type"]
        self.packed = {_MSGPACK: True, _JSON: False}.get(kinds[0]) if kinds else None
        """The body is MessagePack (true) or JSON; None when it takes a look to know."""


class Heads:
    """Heads by their bytes, the empty line at their end included."""

    def __init__(self) -> None:
        self.known: dict[bytes, Head] = {}

    def keep(self, raw: bytes, head: Head) -> None:
        """Remember a head. ``raw``: the bytes up to the first empty line of what the parser was given, which are the
        head unless there is something strange about its lines."""
        lines = raw.count(b"\r\n")
        if (
            len(raw) > MAX_HEAD
            or lines != len(head.fields) + 2
            or raw.count(b"\n") != lines
            or any(name in UNIQUE for name, _ in head.fields)
        ):
            return
        if len(self.known) >= MAX_HEADS:
            self.known.clear()
        self.known[raw] = head


def beginning(data: Any) -> bytes:
    """Of what came first, the bytes up to the first empty line; nothing when there is none."""
    end = data.find(b"\r\n\r\n", 0, MAX_HEAD)
    return b"" if end < 0 else data[: end + 4]
