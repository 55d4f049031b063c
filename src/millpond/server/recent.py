"""Which messages were handed out or answered lately by way of this process: for enqueues that are sent again.

The store recognises a repetition by its id while the message is there. One whose first try went through may have been
delivered and acked before it is sent again; of that only this remembers, where this process took the ack, whoever took
the first try. It is bounded, and other processes have their own.
"""

from __future__ import annotations

CAPACITY = 50_000
"""Ids of a generation, about 6 MiB of them; two are kept. At ten thousand deliveries a second they reach back five to
ten seconds: repetitions come within milliseconds, or as soon as a server is back."""


class Recent:
    """The ids of the latest deliveries and answers, in two generations: a full one takes the place of the older."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._young: set[str] = set()
        self._old: set[str] = set()

    def add(self, id: str) -> None:
        """It is being handed out, or was answered."""
        self._young.add(id)
        if len(self._young) >= self._capacity:
            self._old, self._young = self._young, set()

    def __contains__(self, id: object) -> bool:
        return id in self._young or id in self._old

    def __len__(self) -> int:
        return len(self._young) + len(self._old)
