"""How far this machine's clock is from the bucket's, learnt in passing.

Leases compare times of different machines, so all of them go by the bucket's. A listing, or a read, says when an
object was written; if it was this process that wrote it, then between two moments that it knows. Each such pair bounds
the offset from both sides. While no bound excludes 0 the clocks are said to agree: machines that keep their time
should not be moved by a network's delays.
"""

from __future__ import annotations

from collections import OrderedDict, deque

from millpond.model.clock import Clock
from millpond.stores.objects.bucket import Tag
from millpond.stores.objects.index import same

WRITES = 64
"""Writes remembered until something tells when they took place."""
BOUNDS = 16
"""Observations that count; clocks drift, so old ones do not."""
COARSE = 1000
"""Milliseconds by which a time without a fraction of a second may have been cut."""
VAGUE = 3000
"""Milliseconds of doubt about the offset with which a store is better not opened: others may be as wrong the other way,
and leases last tens of seconds."""


class Skew:
    """The offset of the bucket's clock from this machine's."""

    def __init__(self, clock: Clock, *, active: bool) -> None:
        self._clock = clock
        self._active = active
        self._writes: OrderedDict[str, tuple[Tag, int, int]] = OrderedDict()
        self._bounds: deque[tuple[int, int]] = deque(maxlen=BOUNDS)
        self.offset = 0
        """Milliseconds to add to this machine's clock."""

    def started(self) -> int:
        """When a write is sent, by this machine's clock."""
        return self._clock.now_ms()

    def wrote(self, path: str, tag: Tag, started: int) -> None:
        """A write that was sent at ``started`` has been answered."""
        if self._active:
            self._writes[path] = (tag, started, self._clock.now_ms())
            self._writes.move_to_end(path)
            if len(self._writes) > WRITES:
                self._writes.popitem(last=False)

    def observe(self, path: str, tag: Tag, modified: int) -> None:
        """The bucket says when it wrote an object."""
        if path not in self._writes:
            return
        written, started, answered = self._writes.pop(path)
        if not same(written, tag) or answered < started:
            return
        latest = modified + (COARSE - 1 if modified % COARSE == 0 else 0)
        self._bounds.append((modified - answered, latest - started))
        self._decide()

    def _decide(self) -> None:
        low, high = self._within()
        self.offset = 0 if low <= 0 <= high else (low + high) // 2

    def _within(self) -> tuple[int, int]:
        low, high = self._bounds[-1]
        # The newest counts in any case; older ones as long as they do not contradict it.
        for lower, upper in reversed(self._bounds):
            if max(low, lower) > min(high, upper):
                break
            low, high = max(low, lower), min(high, upper)
        return low, high

    def is_vague(self) -> bool:
        """Whether what is known leaves room for more than `VAGUE`: the process stood still while it compared clocks,
        say."""
        if not self._bounds:
            return False
        low, high = self._within()
        return high - low > VAGUE
