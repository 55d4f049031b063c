"""What queues, messages and ponds ask of whoever does it: the service of this process, or a server's by HTTP.

Nothing above this seam knows which of the two it talks to, so that a queue behaves the same wherever its store is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any, Protocol

from millpond.errors import MillpondError
from millpond.model.clock import Clock
from millpond.model.message import Lease
from millpond.service.config import EnqueueOptions, QueuePolicy
from millpond.service.consuming import Delivery, HandOff
from millpond.service.producing import Receipt
from millpond.service.ready import Record
from millpond.service.states import WHATEVER, StateResult
from millpond.stores.base import Counts, QueueName

Results = list[MillpondError | None]
"""Of a batch of answers, one for each; None where it went through."""


class Payloads(Protocol):
    """Reads payloads, and knows what time it is where the messages are."""

    clock: Clock

    def payload_chunks(self, record: Record) -> AsyncIterator[bytes]:
        """The payload in chunks, wherever it is stored."""

    def state_of(self, record: Record) -> str:
        """How the message stands now, or stood when it was read, by the clock of where it is."""


class Answers(Payloads, Protocol):
    """What the holder of a message may do with it."""

    async def ack(self, delivery: Delivery, then: Sequence[HandOff] = ()) -> list[Receipt]: ...

    async def nack(self, delivery: Delivery, *, delay: float = 0.0, error: Any = None) -> None: ...

    async def defer(self, delivery: Delivery, *, delay: float = 0.0) -> None: ...

    async def extend(self, delivery: Delivery, seconds: float) -> Lease: ...

    async def bury(self, delivery: Delivery, reason: str, *, error: Any = None) -> None: ...

    async def load_state(self, namespace: str | None, queue: str, id: str) -> StateResult | None: ...

    async def save_state(self, delivery: Delivery, value: Any, *, etag: str | None = WHATEVER) -> str: ...

    async def delete_state(self, delivery: Delivery, *, etag: str = WHATEVER) -> None: ...


class Feed(Protocol):
    """Where the deliveries of a stream come from. One caller at a time."""

    @property
    def broken(self) -> bool:
        """What it gave and was not answered is this consumer's no more."""

    async def more(self, room: int) -> list[Delivery]:
        """Wait for deliveries; about ``room`` at most. [] is no end. What comes for one that is cancelled goes back."""

    async def close(self, unanswered: Sequence[Delivery]) -> None:
        """Take no more, and give back what was not answered."""


class Operations(Answers, Protocol):
    """Everything."""

    # Producers

    async def enqueue(self, namespace: str | None, queue: str, source: Any, options: EnqueueOptions) -> Receipt: ...

    async def enqueue_many(
        self, namespace: str | None, queue: str, sources: Sequence[Any], options: EnqueueOptions
    ) -> list[Receipt]: ...

    # Consumers

    async def receive(
        self,
        namespace: str,
        queue: str,
        count: int,
        *,
        wait: float | timedelta = 0.0,
        visibility: float | None = None,
        owner: str | None = None,
    ) -> list[Delivery]: ...

    def stream(
        self, namespace: str, queue: str, *, credit: int, visibility: float | None = None, owner: str | None = None
    ) -> Feed: ...

    async def ack_many(self, deliveries: Sequence[Delivery]) -> Results: ...

    async def nack_many(self, deliveries: Sequence[Delivery], *, delay: float = 0.0, error: Any = None) -> Results: ...

    async def defer_many(self, deliveries: Sequence[Delivery], *, delay: float = 0.0) -> Results: ...

    async def extend_many(self, deliveries: Sequence[Delivery], seconds: float) -> Results: ...

    async def notify(self, namespace: str, queue: str) -> None: ...

    # Operators

    async def counts(self, namespace: str | None, queue: str) -> Counts: ...

    async def get_message(self, namespace: str | None, queue: str, id: str) -> Record: ...

    async def peek(self, namespace: str | None, queue: str, limit: int) -> list[Record]: ...

    async def until_due(self, namespace: str | None, queue: str) -> float | None: ...

    async def purge(self, namespace: str | None, queue: str) -> int: ...

    async def pause(self, namespace: str | None, queue: str) -> None: ...

    async def resume(self, namespace: str | None, queue: str) -> None: ...

    async def queue_policy(self, namespace: str | None, queue: str) -> QueuePolicy: ...

    async def set_policy(self, namespace: str | None, queue: str, **fields: Any) -> QueuePolicy: ...

    async def reset_policy(self, namespace: str | None, queue: str) -> QueuePolicy: ...

    async def list_queues(self) -> list[QueueName]: ...

    # Dead letters

    async def browse(
        self, namespace: str | None, queue: str, *, after: str | None = None, limit: int = 100
    ) -> list[Record]: ...

    async def list_dead_letters(
        self, namespace: str | None, queue: str, *, after: str | None = None, limit: int = 100
    ) -> list[Record]: ...

    async def dead_letter(self, namespace: str | None, queue: str, id: str) -> Record: ...

    async def redrive(self, namespace: str | None, queue: str, ids: Sequence[str] | None = None) -> int: ...

    async def purge_dead_letters(self, namespace: str | None, queue: str, ids: Sequence[str] | None = None) -> int: ...


class Waiter(Protocol):
    """Waits for candidates: the dispatcher."""

    async def wait(self, namespace: str | None, queue: str, *, timeout: float | None = None) -> Record | None: ...

    def looks_after(self, namespace: str, queue: str) -> bool: ...

    def notify(self, namespace: str | None, queue: str) -> None: ...
