"""Rows of ``message`` joined with ``body``, as the store protocol's records."""

from __future__ import annotations

from typing import Any

from millpond.stores.base import Box, Item, Mark, Stored

COLUMNS = "m.seq,m.version,m.due,m.leased,m.expires,m.box,m.id,m.priority,m.grp,m.size,m.external,m.status,b.head"
FROM = "FROM message m JOIN body b ON b.seq=m.seq"

_BOXES = {int(box): box for box in Box}
_LIVE = Box.LIVE
ETAGS = [str(version) for version in range(256)]
"""ETags of the versions that nearly all records have."""


def stored(namespace: str, queue: str, row: Any, payload: bytes | None = None) -> Stored:
    """The record in a row that begins with `COLUMNS`."""
    seq, version, due, leased, expires, box, id, priority, group, size, external, status, head = row[:13]
    return Stored(
        Item(namespace, queue, id, priority, group, size, external == 1, seq),
        Mark(str(version), due, leased == 1, expires, _BOXES[box]),
        head,
        status,
        payload,
    )
