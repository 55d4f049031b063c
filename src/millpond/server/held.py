"""What this process knows of the messages that it handed out: a hint that saves a read per answer, never a truth.

An answer names message, lease and token. Where this process delivered the message and nothing came in between, the
record is still as it was then, so that the answer can be written on that condition at once; if the condition fails the
service reads and judges anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from millpond.service.consuming import Delivery

CAPACITY = 16_384
"""Records kept, about a kilobyte each; payloads are not. Enough for what a busy server has in flight."""


class Held:
    """The latest deliveries of this process, the least recent ones forgotten first."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._held: OrderedDict[str, Delivery] = OrderedDict()
        self.answered: Callable[[str], object] = lambda lease_id: None
        """Told the lease of each delivery that is over."""

    def __len__(self) -> int:
        return len(self._held)

    def keep(self, delivery: Delivery) -> None:
        """Remember a delivery whose payload is on its way: the payload is let go."""
        delivery.payload = None
        held = self._held
        held[delivery.id] = delivery
        if len(held) > self._capacity:
            held.popitem(last=False)

    def get(self, namespace: str, queue: str, id: str, lease_id: str, token: int) -> Delivery:
        """The delivery that an answer is for, as remembered, or made from its names (all normalised)."""
        delivery = self._held.get(id)
        if (
            delivery is not None
            and delivery.lease_id == lease_id
            and delivery.token == token
            and delivery.queue == queue
            and delivery.namespace == namespace
        ):
            return delivery
        return Delivery(namespace, queue, id, lease_id, token)

    def drop(self, delivery: Delivery) -> None:
        """Forget a message that was answered, or is somebody else's by now; whoever streamed it is told. What is known
        of another lease on it stays: a late answer says nothing about who holds the message now."""
        kept = self._held.get(delivery.id)
        if kept is not None and kept.lease_id == delivery.lease_id:
            del self._held[delivery.id]
        self.answered(delivery.lease_id)
