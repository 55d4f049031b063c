"""What a consumer holds (`Message`) and what an onlooker sees (`MessageView`)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar
from zlib import crc32

from millpond.errors import InvalidInput, LeaseLost, MessageNotFound, PayloadNotLoaded, TooLarge
from millpond.model.message import Lease as LeaseRecord
from millpond.service import payloads
from millpond.service.config import EnqueueOptions
from millpond.service.consuming import Delivery, HandOff
from millpond.service.states import WHATEVER

if TYPE_CHECKING:
    from millpond.service.operations import Answers, Payloads
    from millpond.service.ready import Record

T = TypeVar("T")

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def moment(milliseconds: int) -> datetime:
    """A record's time (ms UTC) as an aware datetime."""
    return _EPOCH + timedelta(milliseconds=milliseconds)


class Lease:
    """The right to answer for one delivery."""

    __slots__ = ("id", "owner", "token", "until_ms")

    def __init__(self, id: str, token: int, until_ms: int | None = None, owner: str | None = None) -> None:
        self.id = id
        self.token = token
        """The fencing token: grows with each delivery of the message; hand it to whatever must refuse stale writers."""
        self.until_ms = until_ms
        """When the lease ends, ms UTC; None for a handle made from its id and token alone."""
        self.owner = owner

    @property
    def until(self) -> datetime | None:
        """When the lease ends; None for a handle made from its id and token alone."""
        return None if self.until_ms is None else moment(self.until_ms)

    def __repr__(self) -> str:
        return f"Lease(id={self.id!r}, token={self.token}, until={self.until})"


def _lease(record: LeaseRecord) -> Lease:
    return Lease(record.id, record.token, record.until, record.owner)


class MessageState:
    """The workflow state of a held message: one JSON-like value, kept over retries, gone with the ack."""

    __slots__ = ("_delivery", "_service")

    def __init__(self, service: Answers, delivery: Delivery) -> None:
        self._service = service
        self._delivery = delivery

    async def load(self) -> Any:
        """The value as last saved, by this holder or an earlier one; None when there is none."""
        try:
            result = await self._service.load_state(self._delivery.namespace, self._delivery.queue, self._delivery.id)
        except MessageNotFound:
            return None
        return None if result is None else result.document.value

    async def save(self, value: Any) -> None:
        """Replace the value. Raises LeaseLost (nothing changed), InvalidInput, TooLarge."""
        await self._service.save_state(self._delivery, value, etag=WHATEVER)

    async def delete(self) -> None:
        """Forget the value; fine when there is none. Raises LeaseLost."""
        await self._service.delete_state(self._delivery)


class Message:
    """A message that this consumer holds until its lease ends. Answer with ack, nack, defer or bury."""

    __slots__ = ("_delivery", "_service")

    def __init__(self, service: Answers, delivery: Delivery) -> None:
        self._service = service
        self._delivery = delivery

    # What it is

    @property
    def id(self) -> str:
        """The message's id, a UUIDv7."""
        return self._delivery.id

    @property
    def namespace(self) -> str:
        """The namespace of its queue."""
        return self._delivery.namespace

    @property
    def queue(self) -> str:
        """The name of its queue."""
        return self._delivery.queue

    @property
    def lease(self) -> Lease:
        """The lease, with the end that the last extension gave it."""
        delivery = self._delivery
        record = delivery.record or delivery.given
        if record is not None and record.status.lease is not None:
            return _lease(record.status.lease)
        return Lease(delivery.lease_id, delivery.token)

    def _known(self) -> Record:
        record = self._delivery.given
        if record is None:
            raise PayloadNotLoaded("this handle was made from ids alone; read the message with queue.get(id)")
        return record

    @property
    def payload(self) -> bytes:
        """The payload. Raises PayloadNotLoaded when it is stored apart (use `read` or `stream`), and what reading it
        raised when it cannot be read (Tampered, UnknownKey), StoreCorrupt when it is not what was enqueued."""
        payload = self._delivery.payload
        if payload is None:
            trouble = self._delivery.trouble
            if trouble is not None:
                raise type(trouble)(str(trouble))
            record = self._known()
            raise PayloadNotLoaded(
                f"the payload of {record.head.payload_size} bytes is stored apart; use message.stream() or read()"
            )
        if not self._delivery.intact:
            # Once, and not before somebody asks; written out, because each delivery comes here.
            record = self._known()
            if record.head.checksum is not None and crc32(payload) != record.head.checksum:
                payloads.check(record.head, crc32(payload))
            self._delivery.intact = True
        return payload

    @property
    def payload_size(self) -> int:
        """The payload's size in bytes."""
        return self._known().head.payload_size

    @property
    def attempts(self) -> int:
        """Deliveries so far, this one included."""
        return self._known().status.attempts

    @property
    def failures(self) -> int:
        """Failures so far: nacks, and leases that ran out unanswered."""
        return self._known().status.failures

    @property
    def max_attempts(self) -> int:
        """Failures after which it is a dead letter; 0 = without limit."""
        return self._known().head.max_attempts

    @property
    def priority(self) -> int:
        """0-9, higher first."""
        return self._known().head.priority

    @property
    def attributes(self) -> dict[str, Any]:
        """The producer's attributes."""
        return self._known().head.attributes or {}

    @property
    def content_type(self) -> str | None:
        """What the producer said the payload is."""
        return self._known().head.content_type

    @property
    def correlation_id(self) -> str | None:
        """The producer's correlation id."""
        return self._known().head.correlation_id

    @property
    def ordering_key(self) -> str | None:
        """Messages of one key come one at a time, in order."""
        return self._known().head.ordering_key

    @property
    def dedup_key(self) -> str | None:
        """The key by which a second enqueue was recognised."""
        return self._known().head.dedup_key

    @property
    def enqueued_at(self) -> datetime:
        """When it was enqueued."""
        return moment(self._known().head.enqueued_at)

    @property
    def expires_at(self) -> datetime | None:
        """From when on it is not delivered again."""
        at = self._known().status.expires_at
        return None if at is None else moment(at)

    @property
    def last_error(self) -> Any:
        """What an earlier consumer gave as its error."""
        return self._known().status.last_error

    @property
    def state(self) -> MessageState:
        """The workflow state."""
        return MessageState(self._service, self._delivery)

    # The payload

    def stream(self) -> AsyncIterator[bytes]:
        """The payload in chunks, in bounded memory, wherever it is stored. Raises StoreCorrupt while reading, at the
        end if it is stored apart: act on nothing before the end."""
        if self._delivery.payload is not None:
            return _once(self)
        return self._service.payload_chunks(self._known())

    async def read(self, limit: int | None = None) -> bytes:
        """The whole payload in memory. Raises TooLarge when it is larger than ``limit`` bytes."""
        if limit is not None and (limit.__class__ is not int or limit < 0):
            raise InvalidInput(f"limit must be a whole number of bytes, or None, not {limit!r:.100}")
        if limit is not None and self.payload_size > limit:
            raise TooLarge(f"the payload has {self.payload_size} bytes, more than {limit}; use message.stream()")
        return b"".join([chunk async for chunk in self.stream()])

    def text(self) -> str:
        """The payload as UTF-8 text. Raises InvalidInput when it is not that."""
        try:
            return self.payload.decode()
        except UnicodeDecodeError as error:
            raise InvalidInput(f"the payload is not UTF-8 text: {error}") from error

    def json(self) -> Any:
        """The payload as JSON (or MessagePack, if its content type says so). Raises InvalidInput."""
        return payloads.decode(self.payload, self.content_type, object)

    def decode(self, type: type[T]) -> T:
        """The payload as ``type``: a msgspec Struct, a dataclass, whatever msgspec decodes. Raises InvalidInput."""
        return payloads.decode(self.payload, self.content_type, type)

    # Answers

    async def ack(self, then: Sequence[tuple[Any, ...]] = ()) -> None:
        """Done: the message, its payload and its state are gone for good.

        ``then``: messages to enqueue in the same commit, as (queue, payload) or (queue, payload, options dict); a
        namespace may be given among the options. Raises LeaseLost (nothing changed)."""
        if not isinstance(then, Iterable):
            raise InvalidInput("then is a list of (queue, payload) or (queue, payload, {options})")
        successors = [hand_off(entry, self.namespace) for entry in then] if then else ()
        with _Settling(self._delivery):
            await self._service.ack(self._delivery, successors)

    async def nack(self, error: Any = None, delay: float = 0.0) -> None:
        """Failed: counts a failure; returns after ``delay`` seconds, or becomes a dead letter if its budget is spent.

        ``error``: an exception (of its text the first 8 KiB are kept), text or JSON-like value (at most
        `Config.max_error_bytes`), kept with the message. Raises LeaseLost, InvalidInput, TooLarge."""
        with _Settling(self._delivery):
            await self._service.nack(self._delivery, delay=delay, error=error)

    async def defer(self, delay: float = 0.0) -> None:
        """Give it back without a failure, visible after ``delay`` seconds. Raises LeaseLost."""
        with _Settling(self._delivery):
            await self._service.defer(self._delivery, delay=delay)

    async def extend(self, seconds: float) -> Lease:
        """The lease ends ``seconds`` (> 0) from now. Raises LeaseLost."""
        return _lease(await self._service.extend(self._delivery, seconds))

    async def bury(self, reason: str, error: Any = None) -> None:
        """Give it up: a dead letter with this reason. Raises LeaseLost."""
        with _Settling(self._delivery):
            await self._service.bury(self._delivery, reason, error=error)

    def __repr__(self) -> str:
        return f"<Message {self.id} of {self.namespace}/{self.queue}, token {self._delivery.token}>"


class _Settling:
    """Around an answer: whoever counts the message is told when it is answered, or no longer its consumer's."""

    __slots__ = ("_delivery",)

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        holder = self._delivery.holder
        if holder is not None and (error is None or isinstance(error, LeaseLost)):
            holder(self._delivery)


async def _once(message: Message) -> AsyncIterator[bytes]:
    yield message.payload


def hand_off(entry: Any, namespace: str) -> HandOff:
    """A ``then`` entry as the service takes it. Raises InvalidInput."""
    if isinstance(entry, HandOff):
        return entry
    if not isinstance(entry, tuple) or len(entry) not in (2, 3):
        raise InvalidInput("an entry of then is (queue, payload) or (queue, payload, {options})")
    queue, source = entry[0], entry[1]
    given = entry[2] if len(entry) == 3 else {}
    if not isinstance(given, Mapping):
        raise InvalidInput(f"the options of an entry of then are a dict, not {type(given).__name__}")
    options = dict(given)
    namespace = options.pop("namespace", namespace)
    try:
        return HandOff(namespace, queue, source, EnqueueOptions(**options))
    except TypeError as error:
        raise InvalidInput(f"options of then: {error}") from error


class MessageView:
    """A message as it stood when it was read; looking changes nothing."""

    __slots__ = ("_record", "_service", "state")

    def __init__(self, service: Payloads, record: Record) -> None:
        self._service = service
        self._record = record
        self.state = service.state_of(record)
        """``ready``, ``delayed``, ``leased``, ``lapsed`` (lease ran out) or ``dead``."""

    @property
    def record(self) -> Record:
        """The record behind the view."""
        return self._record

    @property
    def id(self) -> str:
        """The message's id."""
        return self._record.item.id

    @property
    def namespace(self) -> str:
        """The namespace of its queue."""
        return self._record.item.namespace

    @property
    def queue(self) -> str:
        """Its queue."""
        return self._record.item.queue

    @property
    def priority(self) -> int:
        """0-9, higher first."""
        return self._record.head.priority

    @property
    def attempts(self) -> int:
        """Deliveries so far."""
        return self._record.status.attempts

    @property
    def failures(self) -> int:
        """Failures so far."""
        return self._record.status.failures

    @property
    def max_attempts(self) -> int:
        """Failures after which it is a dead letter; 0 = without limit."""
        return self._record.head.max_attempts

    @property
    def enqueued_at(self) -> datetime:
        """When it was enqueued."""
        return moment(self._record.head.enqueued_at)

    @property
    def updated_at(self) -> datetime:
        """When it last changed."""
        return moment(self._record.status.updated_at)

    @property
    def visible_at(self) -> datetime:
        """From when it can be delivered (again)."""
        return moment(self._record.status.visible_at)

    @property
    def expires_at(self) -> datetime | None:
        """From when on it is not delivered again."""
        at = self._record.status.expires_at
        return None if at is None else moment(at)

    @property
    def attributes(self) -> dict[str, Any]:
        """The producer's attributes."""
        return self._record.head.attributes or {}

    @property
    def content_type(self) -> str | None:
        """What the producer said the payload is."""
        return self._record.head.content_type

    @property
    def correlation_id(self) -> str | None:
        """The producer's correlation id."""
        return self._record.head.correlation_id

    @property
    def dedup_key(self) -> str | None:
        """The key by which a second enqueue is recognised."""
        return self._record.head.dedup_key

    @property
    def ordering_key(self) -> str | None:
        """Messages of one key come one at a time, in order."""
        return self._record.head.ordering_key

    @property
    def payload_size(self) -> int:
        """The payload's size in bytes."""
        return self._record.head.payload_size

    @property
    def last_error(self) -> Any:
        """What the last failing consumer gave as its error."""
        return self._record.status.last_error

    @property
    def dead_reason(self) -> str | None:
        """Why it was given up; None while it is alive."""
        dead = self._record.status.dead
        return None if dead is None else dead.reason

    @property
    def dead_at(self) -> datetime | None:
        """When it was given up."""
        dead = self._record.status.dead
        return None if dead is None else moment(dead.at)

    @property
    def lease(self) -> Lease | None:
        """The lease, if somebody holds it (or held it and never answered)."""
        lease = self._record.status.lease
        return None if lease is None else _lease(lease)

    def stream(self) -> AsyncIterator[bytes]:
        """The payload in chunks. Raises MessageNotFound when the message is gone by now."""
        return self._service.payload_chunks(self._record)

    async def payload(self) -> bytes:
        """The whole payload. Raises MessageNotFound when the message is gone by now."""
        return b"".join([chunk async for chunk in self.stream()])

    def __repr__(self) -> str:
        return f"<MessageView {self.id} of {self.namespace}/{self.queue}, {self.state}>"
