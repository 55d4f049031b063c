"""What is unanswered on the streams of this process, and how much more each may be sent.

Invariants: no more than its credit is unanswered on a stream, and no more than `MAX_OUTSTANDING` on all of them
together; a message stops counting when this process sees its answer, or when its lease ends, whatever comes first.
"""

from __future__ import annotations

from collections.abc import Callable

from millpond.errors import TooManyConsumers
from millpond.pond import Pond
from millpond.service.consuming import Delivery
from millpond.wire import native

MAX_OUTSTANDING = 100_000
"""Unanswered messages of all streams together, a few hundred bytes each."""


class Outstanding:
    """One stream: its credit, and what is unanswered on it."""

    def __init__(self, streams: Streams, namespace: str, queue: str, credit: int) -> None:
        self._streams = streams
        self.id = streams.pond.ids.random(16).hex()
        self.namespace = namespace
        self.queue = queue
        self.credit = credit
        self._unanswered: dict[str, Delivery] = {}
        self._ends: dict[str, int] = {}
        self._first_end = 0
        """No lease ends before this (ms UTC)."""
        self.on_room: Callable[[], object] = lambda: None
        """Called when there is more room."""

    def __len__(self) -> int:
        return len(self._unanswered)

    def room(self) -> int:
        """How many messages may be sent now."""
        if self._unanswered and self._first_end <= self._streams.pond.clock.now_ms():
            self._drop_ended()
        return max(0, min(self.credit - len(self._unanswered), self._streams.room()))

    def next_end(self) -> int | None:
        """When the first of the leases ends (ms UTC); None when nothing is unanswered."""
        return min(self._ends.values(), default=None)

    def _drop_ended(self) -> None:
        now = self._streams.pond.clock.now_ms()
        for lease_id in [lease_id for lease_id, end in self._ends.items() if end <= now]:
            # Who extended it may have been told by another route, which knows the delivery but not the stream.
            end = _until(self._unanswered[lease_id])
            if end > now:
                self._ends[lease_id] = end
            else:
                self._streams.answered(lease_id)
        self._first_end = min(self._ends.values(), default=0)

    def sent(self, delivery: Delivery) -> None:
        """A message is on its way."""
        end = _until(delivery)
        if not self._ends or end < self._first_end:
            self._first_end = end
        self._unanswered[delivery.lease_id] = delivery
        self._ends[delivery.lease_id] = end
        self._streams.by_lease[delivery.lease_id] = self

    def returned(self, lease_id: str) -> None:
        """A message is unanswered no longer."""
        if self._unanswered.pop(lease_id, None) is not None:
            del self._ends[lease_id]
            self.on_room()

    def extended(self, lease_id: str, until: int) -> None:
        """A lease has another end."""
        if lease_id in self._ends:
            self._ends[lease_id] = until
            self._first_end = min(self._first_end, until)
            self.on_room()  # who waits for the end of a lease waits for another one now

    def more(self, credit: int) -> int:
        """Give more credit; how much it is then."""
        self.credit = min(self.credit + credit, native.MAX_CREDIT)
        self.on_room()
        return self.credit

    def close(self) -> list[Delivery]:
        """Forget the stream; what was unanswered on it."""
        left = list(self._unanswered.values())
        for lease_id in list(self._unanswered):
            self._streams.answered(lease_id)
        self._streams.forget(self)
        return left


def _until(delivery: Delivery) -> int:
    record = delivery.record or delivery.given
    return 0 if record is None or record.status.lease is None else record.status.lease.until


class Streams:
    """The streams of this process."""

    def __init__(self, pond: Pond, capacity: int = MAX_OUTSTANDING) -> None:
        self.pond = pond
        self._capacity = capacity
        self._open: dict[str, Outstanding] = {}
        self.by_lease: dict[str, Outstanding] = {}

    def __len__(self) -> int:
        return len(self._open)

    def room(self) -> int:
        """How many messages may be sent now on all of them together."""
        return self._capacity - len(self.by_lease)

    def open(self, namespace: str, queue: str, credit: int) -> Outstanding:
        """A new stream. Raises TooManyConsumers."""
        most = self.pond.config.max_consumers
        # One that waits is a consumer of the dispatcher's; one that is out of credit is not, and counts here.
        waiting = self.pond.dispatcher.queue_stats(namespace, queue).total_consumers
        if max(waiting, len(self._open)) >= most:
            raise TooManyConsumers(f"{most} consumers wait or stream already, which is the cap of this server")
        made = Outstanding(self, namespace, queue, credit)
        self._open[made.id] = made
        return made

    def find(self, id: str) -> Outstanding | None:
        """An open stream by its id."""
        return self._open.get(id)

    def forget(self, stream: Outstanding) -> None:
        """It is over."""
        self._open.pop(stream.id, None)

    def answered(self, lease_id: str) -> None:
        """A delivery was answered, or its lease has ended; harmless for one that was on no stream."""
        stream = self.by_lease.pop(lease_id, None)
        if stream is not None:
            stream.returned(lease_id)

    def extended(self, lease_id: str, until: int) -> None:
        """A delivery's lease ends at ``until`` (ms UTC); harmless for one that was on no stream."""
        stream = self.by_lease.get(lease_id)
        if stream is not None:
            stream.extended(lease_id, until)
