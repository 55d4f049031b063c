"""Which messages were handed out lately by this process: for enqueues that are sent again because no reply came.

The store recognises a repetition by its id while the message is there. One whose first try went through may have been
delivered and acked before it is sent again; of that only this remembers, also when the first try went to a process that
was killed. It is bounded, and other processes have their own.
"""

from __future__ import annotations

CAPACITY = 50_000
"""Ids of a generation, about 6 MiB of them; two are kept. At ten thousand deliveries a second they reach back five to
ten seconds: repetitions come within milliseconds, or as soon as a server is back."""


class Recent:
    """The ids of the latest deliveries, in two generations: the older is forgotten when the younger is full."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._young: set[str] = set()
        self._old: set[str] = set()

    def add(self, id: str) -> None:
        """It is being handed out."""
        self._young.add(id)
        if len(self._young) >= self._capacity:
            self._old, self._young = self._young, set()

    def __contains__(self, id: object) -> bool:
        return id in self._young or id in self._old

    def __len__(self) -> int:
        return len(self._young) + len(self._old)
