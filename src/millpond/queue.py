"""`Queue`: one named queue of a pond, for producers, consumers and operators."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Sequence
from typing import Any, NamedTuple, Unpack

from millpond.errors import InvalidInput, LeaseLost, MillpondError
from millpond.message import Lease, Message, MessageView
from millpond.model import names
from millpond.model.message import DEFAULT_PRIORITY
from millpond.service.config import (
    DEFAULT_OPTIONS,
    EnqueueFields,
    EnqueueOptions,
    PolicyFields,
    QueuePolicy,
)
from millpond.service.consuming import Delivery
from millpond.service.operations import Operations
from millpond.service.producing import Receipt
from millpond.stream import MessageStream

CHUNK = 500
"""Messages of one `enqueue_many` written together: bounded memory for any iterable, and a shared commit."""


class Answer(NamedTuple):
    """What became of one message of a batch answer."""

    message_id: str
    error: MillpondError | None
    """None when it went through."""


class QueueCounts(NamedTuple):
    """How a queue stands."""

    ready: int
    delayed: int
    leased: int
    blocked: int
    """Waiting for an earlier message of their ordering key; not among the ready ones."""
    dead: int
    bytes: int
    """Payload bytes of all live messages."""
    oldest_age: float | None
    """Seconds for which the longest-waiting ready message has been ready; None when there is none."""
    enqueued: int | None = None
    """Messages that were enqueued, whatever became of them, counted from some moment on; None in a bucket. The
    difference of two of these tells how fast messages come; less what the queue has grown by, how fast they go."""


class DeadLetters:
    """The dead letters of a queue."""

    def __init__(self, service: Operations, namespace: str, queue: str) -> None:
        self._service = service
        self._namespace = namespace
        self._queue = queue

    async def list(self, *, after: str | None = None, limit: int = 100) -> list[MessageView]:
        """Dead letters in order of insertion, from after the one with id ``after``. Raises MessageNotFound."""
        records = await self._service.list_dead_letters(self._namespace, self._queue, after=after, limit=limit)
        return [MessageView(self._service, record) for record in records]

    async def get(self, message_id: str) -> MessageView:
        """One dead letter. Raises MessageNotFound."""
        return MessageView(self._service, await self._service.dead_letter(self._namespace, self._queue, message_id))

    async def payload(self, message_id: str) -> bytes:
        """A dead letter's payload. Raises MessageNotFound."""
        return await (await self.get(message_id)).payload()

    async def redrive(self, ids: Sequence[str] | None = None) -> int:
        """Back into the queue with a new budget: those with these ids, or all; how many. Raises MessageNotFound."""
        return await self._service.redrive(self._namespace, self._queue, ids)

    async def purge(self, ids: Sequence[str] | None = None) -> int:
        """Remove for good: those with these ids, or all; how many. Raises MessageNotFound."""
        return await self._service.purge_dead_letters(self._namespace, self._queue, ids)


class Queue:
    """A named queue. It needs no creating: it is there with its first message."""

    def __init__(self, service: Operations, name: str, namespace: str | None) -> None:
        self._service = service
        self.name = names.queue_name(name)
        self.namespace = names.namespace_name(namespace)
        self.dead_letters = DeadLetters(service, self.namespace, self.name)

    # Producers

    async def enqueue(
        self,
        payload: Any,
        *,
        delay: float = 0.0,
        ttl: float | None = None,
        priority: int = DEFAULT_PRIORITY,
        max_attempts: int | None = None,
        visibility: float | None = None,
        attributes: dict[str, Any] | None = None,
        dedup_key: str | None = None,
        dedup_window: float | None = None,
        ordering_key: str | None = None,
        content_type: str | None = None,
        correlation_id: str | None = None,
        message_id: str | None = None,
    ) -> Receipt:
        """Put a message into the queue; when this returns, it is stored for good.

        ``payload``: bytes, `millpond.text`/`json`/`msgpack` of a value, a binary file, or an iterator of bytes, async
        or not (streamed in bounded memory). ``delay``, ``ttl``, ``visibility``, ``dedup_window``: seconds.
        ``priority``: 0-9, higher first. ``max_attempts``: failures until it is a dead letter, 0 = never. ``dedup_key``:
        a second enqueue within the window returns the first message. ``ordering_key``: messages of one key are
        delivered one at a time, in order. None means the queue's policy, then the pond's default.

        Raises InvalidInput and TooLarge before anything is written, StoreError."""
        options = DEFAULT_OPTIONS
        if (
            delay != 0.0
            or ttl is not None
            or priority != DEFAULT_PRIORITY
            or max_attempts is not None
            or visibility is not None
            or attributes is not None
            or dedup_key is not None
            or dedup_window is not None
            or ordering_key is not None
            or content_type is not None
            or correlation_id is not None
            or message_id is not None
        ):
            options = EnqueueOptions(
                delay=delay,
                ttl=ttl,
                priority=priority,
                max_attempts=max_attempts,
                visibility=visibility,
                attributes=attributes,
                dedup_key=dedup_key,
                dedup_window=dedup_window,
                ordering_key=ordering_key,
                content_type=content_type,
                correlation_id=correlation_id,
                message_id=message_id,
            )
        return await self._service.enqueue(self.namespace, self.name, payload, options)

    async def enqueue_many(
        self, payloads: Iterable[Any] | AsyncIterable[Any], **options: Unpack[EnqueueFields]
    ) -> list[Receipt]:
        """Put messages into the queue, in order, in shared commits of up to 500; each stands on its own.

        ``payloads``: any iterable, also an async one, of what `enqueue` takes. ``options``: as for `enqueue`, the same
        for all. If it raises part-way, the chunks before are stored."""
        try:
            parsed = EnqueueOptions(**options) if options else DEFAULT_OPTIONS
        except TypeError as error:
            raise InvalidInput(f"enqueue_many: {error}") from error
        if isinstance(payloads, (bytes, bytearray, memoryview, str)) or not isinstance(
            payloads, (Iterable, AsyncIterable)
        ):
            raise InvalidInput("enqueue_many takes an iterable of payloads, not one payload")
        receipts: list[Receipt] = []
        chunk: list[Any] = []

        async def flush() -> None:
            receipts.extend(await self._service.enqueue_many(self.namespace, self.name, chunk, parsed))
            chunk.clear()

        if isinstance(payloads, AsyncIterable):
            async for payload in payloads:
                chunk.append(payload)
                if len(chunk) >= CHUNK:
                    await flush()
        else:
            for payload in payloads:
                chunk.append(payload)
                if len(chunk) >= CHUNK:
                    await flush()
        if chunk:
            await flush()
        return receipts

    # Consumers

    async def receive(
        self,
        count: int = 1,
        *,
        wait: float = 0.0,
        visibility: float | None = None,
        owner: str | None = None,
    ) -> list[Message]:
        """Lease up to ``count`` messages, in order of priority and due time; [] when none came within ``wait`` seconds.

        Returns as soon as there is one. ``visibility``: seconds until the leases end, None for the messages' own.
        ``owner``: a name for operators to see. Raises TooManyConsumers, InvalidInput, StoreError."""
        service = self._service
        deliveries = await service.receive(
            self.namespace, self.name, count, wait=wait, visibility=visibility, owner=owner
        )
        return [Message(service, delivery) for delivery in deliveries]

    def stream(self, *, credit: int = 100, visibility: float | None = None, owner: str | None = None) -> MessageStream:
        """Messages as they come: ``async with queue.stream() as messages: async for message in messages: …``.

        At most ``credit`` (1 to 1,000) are unanswered at a time, those that lie ready to be handed out included: so
        many are taken ahead, and their leases run. ``visibility``, ``owner``: as for `receive`. When the block is left,
        what was not answered goes back at once, without a failure. See `MessageStream`. Raises InvalidInput."""
        return MessageStream(
            self._service, self.namespace, self.name, credit=credit, visibility=visibility, owner=owner
        )

    async def ack_many(self, messages: Iterable[Message]) -> list[Answer]:
        """Ack each in shared commits; one that fails (LeaseLost) does not hinder the others and is in its answer."""
        deliveries = _deliveries(messages)
        return _settled(deliveries, await self._service.ack_many(deliveries))

    async def nack_many(self, messages: Iterable[Message], *, error: Any = None, delay: float = 0.0) -> list[Answer]:
        """Nack each in shared commits."""
        deliveries = _deliveries(messages)
        return _settled(deliveries, await self._service.nack_many(deliveries, error=error, delay=delay))

    async def defer_many(self, messages: Iterable[Message], *, delay: float = 0.0) -> list[Answer]:
        """Give each back in shared commits, without a failure."""
        deliveries = _deliveries(messages)
        return _settled(deliveries, await self._service.defer_many(deliveries, delay=delay))

    async def extend_many(self, messages: Iterable[Message], seconds: float) -> list[Answer]:
        """Extend each lease to ``seconds`` from now, in shared commits."""
        deliveries = _deliveries(messages)
        return _answers(deliveries, await self._service.extend_many(deliveries, seconds))

    def handle(self, message_id: str, lease_id: str, token: Any) -> Message:
        """A message held by this lease, to be answered from here: for answers that arrive by another way than the
        delivery (a command line, a web request). Nothing is read; a wrong lease shows in the answer."""
        if token.__class__ is not int or token < 1:
            raise InvalidInput("a fencing token is a whole number greater than 0")
        if lease_id.__class__ is not str or not lease_id:
            raise InvalidInput("a lease id is text that is not empty")
        id = names.message_id(message_id)
        return Message(self._service, Delivery(self.namespace, self.name, id, lease_id, token))

    async def notify(self) -> None:
        """Tell this process that the queue may have changed: who waits looks at once instead of at the next poll. For
        what is told from outside Millpond, as by a bucket's notifications. Costs nothing while nobody waits; spurious
        and repeated calls cost a look at most."""
        await self._service.notify(self.namespace, self.name)

    # Operators

    async def counts(self) -> QueueCounts:
        """How the queue stands now; costs the same however long it is."""
        service = self._service
        counts = await service.counts(self.namespace, self.name)
        age = None if counts.oldest_due is None else max(0.0, (service.clock.now_ms() - counts.oldest_due) / 1000)
        return QueueCounts(
            counts.ready, counts.delayed, counts.leased, counts.blocked, counts.dead, counts.bytes, age, counts.enqueued
        )

    async def get(self, message_id: str) -> MessageView:
        """Any message of the queue, live or dead. Raises MessageNotFound."""
        return MessageView(self._service, await self._service.get_message(self.namespace, self.name, message_id))

    async def peek(self, count: int = 1) -> list[MessageView]:
        """The messages that would be handed out next, without taking them."""
        records = await self._service.peek(self.namespace, self.name, count)
        return [MessageView(self._service, record) for record in records]

    async def browse(self, *, after: str | None = None, limit: int = 100) -> list[MessageView]:
        """Live messages in order of insertion, held, delayed or ready, from after the one with id ``after``; changes
        nothing. One that cannot be read is left out and logged. Raises MessageNotFound when ``after`` is gone."""
        records = await self._service.browse(self.namespace, self.name, after=after, limit=limit)
        return [MessageView(self._service, record) for record in records]

    async def next_due(self) -> float | None:
        """Seconds until the earliest message that is not ready now comes due (a delay or a lease ends); None when there
        is none."""
        return await self._service.until_due(self.namespace, self.name)

    async def purge(self) -> int:
        """Remove every live message that no consumer holds; how many. Dead letters stay."""
        return await self._service.purge(self.namespace, self.name)

    async def pause(self) -> None:
        """Hand nothing out until `resume`, in every process within a second (a minute where requests cost money, see
        `Config.policy_max_age`). Safe to repeat. It may come before the first message: the queue is then there by its
        policy."""
        await self._service.pause(self.namespace, self.name)

    async def resume(self) -> None:
        """Hand out again. Safe to repeat."""
        await self._service.resume(self.namespace, self.name)

    async def policy(self) -> QueuePolicy:
        """The queue's policy."""
        return await self._service.queue_policy(self.namespace, self.name)

    async def set_policy(self, **fields: Unpack[PolicyFields]) -> QueuePolicy:
        """Change fields of the queue's policy (see `QueuePolicy`); it holds for messages enqueued from now on.

        Raises InvalidInput for unknown fields and values out of range."""
        return await self._service.set_policy(self.namespace, self.name, **fields)

    async def reset_policy(self) -> QueuePolicy:
        """Put the default policy in place of the queue's, which also resumes it; the way out when the stored one is
        damaged, or under a key that is lost (StoreCorrupt, Tampered, UnknownKey at every enqueue and receive). Safe to
        repeat. Look for the key first, and for a newer Millpond if it is StoreMismatch: what the policy was is gone."""
        return await self._service.reset_policy(self.namespace, self.name)

    def __repr__(self) -> str:
        return f"<Queue {self.namespace}/{self.name}>"


def _deliveries(messages: Iterable[Message]) -> list[Delivery]:
    """What the messages are to the service; a generator is read once. Raises InvalidInput before any is answered."""
    if not isinstance(messages, Iterable):
        raise InvalidInput("batch answers take a list of messages")
    deliveries = []
    for message in messages:
        if not isinstance(message, Message):
            raise InvalidInput(f"batch answers take messages, not {type(message).__name__}")
        deliveries.append(message._delivery)
    return deliveries


def _settled(deliveries: Sequence[Delivery], errors: Sequence[MillpondError | None]) -> list[Answer]:
    """As `_answers`; whoever counts the messages is told of those that are answered, or no longer their consumer's."""
    for delivery, error in zip(deliveries, errors, strict=True):
        holder = delivery.holder
        if holder is not None and (error is None or isinstance(error, LeaseLost)):
            holder(delivery)
    return _answers(deliveries, errors)


def _answers(deliveries: Sequence[Delivery], errors: Sequence[MillpondError | None]) -> list[Answer]:
    # What Answer() does by way of a Python function; this is paid per message.
    return [tuple.__new__(Answer, (delivery.id, error)) for delivery, error in zip(deliveries, errors, strict=True)]


__all__ = ["Answer", "DeadLetters", "Lease", "Queue", "QueueCounts", "Receipt"]
