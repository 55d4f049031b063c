"""The head of a queue, as the takes of one transaction share it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from millpond.stores.sqlite.rows import COLUMNS, FROM

PREFETCH = 512
"""Records read at once for the takes of one transaction, at most."""
TAKE_PAYLOAD = 16 * 1024
"""Payloads up to this size are read with the records that a take chooses from: at most 8 MiB for `PREFETCH` of them."""

_HEAD = (
    f"SELECT {COLUMNS},CASE WHEN length(b.payload)<={TAKE_PAYLOAD} THEN b.payload END {FROM} "
    "WHERE m.queue=? AND m.lane=? AND "
)
_FIRST = _HEAD + "m.due<=? ORDER BY m.due,m.seq LIMIT ?"
_MORE = _HEAD + "m.due<=? AND (m.due,m.seq)>(?,?) ORDER BY m.due,m.seq LIMIT ?"
_LANE = "SELECT max(lane) FROM message WHERE queue=? AND lane<?"
_ABOVE_ALL = 1 << 30
"""A lane higher than every priority."""


class Heads:
    """The ready records of one queue as read in one transaction, handed to its takes one after another.

    One read serves them all: reading one record costs 15 µs, reading ten costs 22.

    What other ops of the transaction do to a record that was read shows when its own op meets another version. What
    they make ready is for the next transaction."""

    __slots__ = ("_due", "_lane", "_queue", "_run", "_seq", "rows")

    def __init__(self, run: Callable[..., Any], queue: int) -> None:
        self._run = run
        self._queue = queue
        self.rows: deque[Any] = deque()
        """Read and not taken yet: `COLUMNS` and the payload (None when it is large)."""
        self._lane: int | None = _ABOVE_ALL
        """Where to read on; None at the end."""
        self._due = 0
        self._seq: int | None = None
        """None: the lane has nothing more."""

    def read(self, now: int, count: int) -> None:
        """Read on in hand-out order: at least one record into ``rows``, unless there is none."""
        count = min(count, PREFETCH)
        while (lane := self._lane) is not None:
            if self._seq is None:
                lane = self._lane = self._run(_LANE, (self._queue, lane)).get
                if lane is None:
                    return
                found = self._run(_FIRST, (self._queue, lane, now, count)).fetchall()
            else:
                found = self._run(_MORE, (self._queue, lane, now, self._due, self._seq, count)).fetchall()
            self._seq = None
            if found:
                self.rows.extend(found)
                if len(found) == count:
                    self._seq, _, self._due = found[-1][:3]
                return
