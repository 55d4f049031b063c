"""What a pond's requests were: totals, per queue, and per message acknowledged."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from millpond.stores.base import QueueName, Requests


class QueueRequests(msgspec.Struct, frozen=True):
    """What this process has asked of the store for one queue, and what came of it."""

    requests: Requests
    acknowledged: int
    """Messages of the queue that were acked by way of this pond."""

    @property
    def per_message(self) -> float | None:
        """Requests for each message acked; None when there is none."""
        return self.requests.total / self.acknowledged if self.acknowledged else None


class PondRequests(msgspec.Struct, frozen=True):
    """A pond's requests at one moment, since it was opened or `Pond.reset_requests` was called.

    They are this process's own. A process that only consumes shows fewer than a whole life cycle takes, because another
    one enqueued."""

    queues: dict[QueueName, QueueRequests]
    other: Requests
    """Requests that were for no queue in particular."""

    @property
    def total(self) -> Requests:
        """All of them."""
        total = self.other
        for queue in self.queues.values():
            total = total.plus(queue.requests)
        return total

    @property
    def acknowledged(self) -> int:
        """Messages that were acked."""
        return sum(queue.acknowledged for queue in self.queues.values())

    @property
    def per_message(self) -> float | None:
        """Requests for each message acked, those for no queue in particular included; None when there is none."""
        acknowledged = self.acknowledged
        return self.total.total / acknowledged if acknowledged else None


def snapshot(requests: Mapping[QueueName | None, Requests], acknowledged: Mapping[QueueName, int]) -> PondRequests:
    """Put together what the store and what the service counted."""
    none = Requests()
    names = sorted({name for name in requests if name is not None} | set(acknowledged))
    return PondRequests(
        {name: QueueRequests(requests.get(name, none), acknowledged.get(name, 0)) for name in names},
        requests.get(None, none),
    )


def since(now: PondRequests, earlier: PondRequests) -> PondRequests:
    """What came after an earlier snapshot; queues of which nothing came are left out."""
    nothing = QueueRequests(Requests(), 0)
    queues = {}
    for name, queue in now.queues.items():
        before = earlier.queues.get(name, nothing)
        after = QueueRequests(queue.requests.minus(before.requests), queue.acknowledged - before.acknowledged)
        if after != nothing:
            queues[name] = after
    return PondRequests(queues, now.other.minus(earlier.other))
