"""What this process knows of the messages that it handed out: a hint that saves a read per answer, never a truth.

An answer names message, lease and token. Where this process delivered the message and nothing came in between, the
record is still as it was then, so that the answer can be written on that condition at once; if the condition fails the
service reads and judges anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import msgspec

from millpond.model import names
from millpond.server.recent import Recent
from millpond.service.consuming import Delivery

CAPACITY = 16_384
"""Records kept. Enough for what a busy server has in flight."""
MAX_BYTES = 64 * 1024 * 1024
"""What these may take, as far as it is not the same for all: attributes and last errors, which can have 80 KiB. Without
them a record is about a kilobyte; payloads are not kept."""

_size = msgspec.msgpack.Encoder().encode


class Held:
    """The latest deliveries of this process, the least recent ones forgotten first."""

    def __init__(self, capacity: int = CAPACITY, max_bytes: int = MAX_BYTES) -> None:
        self._capacity = capacity
        self._room = max_bytes
        self._held: OrderedDict[str, Delivery] = OrderedDict()
        self._sizes: dict[str, int] = {}
        """Of those that have anything of their own."""
        self.recent = Recent()
        self.answered: Callable[[str], object] = lambda lease_id: None
        """Told the lease of each delivery that is over."""

    def __len__(self) -> int:
        return len(self._held)

    def keep(self, delivery: Delivery) -> None:
        """Remember a delivery whose payload is on its way: the payload is let go."""
        delivery.payload = None
        held, id = self._held, delivery.id
        self.recent.add(id)
        before = held.get(id)
        if before is not None:
            self._forget(id, before if before is not delivery else None)
        held[id] = delivery
        record = delivery.record
        if record is not None and (record.head.attributes is not None or record.status.last_error is not None):
            size = self._sizes[id] = len(_size((record.head.attributes, record.status.last_error)))
            self._room -= size
        while held and (self._room < 0 or len(held) > self._capacity):
            self._forget(*held.popitem(last=False))

    def _forget(self, id: str, delivery: Delivery | None) -> None:
        """One that is not kept any more."""
        self._room += self._sizes.pop(id, 0)
        if delivery is not None:
            # Streams remember who has what; of the message itself they need nothing.
            delivery.record = delivery.given = None

    def knows(self, delivery: Delivery) -> bool:
        """It is remembered: nobody has answered it by way of this process."""
        return self._held.get(delivery.id) is delivery

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

    def meant(self, namespace: str, queue: str, id: str, lease_id: str, token: int) -> Delivery:
        """As `get`, with the id as a client wrote it. Raises InvalidMessageId."""
        delivery = self._held.get(id)  # ids by which one is remembered are as they are to be
        if (
            delivery is not None
            and delivery.lease_id == lease_id
            and delivery.token == token
            and delivery.queue == queue
            and delivery.namespace == namespace
        ):
            return delivery
        return self.get(namespace, queue, names.message_id(id), lease_id, token)

    def drop(self, delivery: Delivery) -> None:
        """Forget a message that was answered, or is somebody else's by now; whoever streamed it is told. What is known
        of another lease on it stays: a late answer says nothing about who holds the message now."""
        self.recent.add(delivery.id)
        kept = self._held.get(delivery.id)
        if kept is not None and kept.lease_id == delivery.lease_id:
            del self._held[delivery.id]
            self._forget(delivery.id, None)
        self.answered(delivery.lease_id)
