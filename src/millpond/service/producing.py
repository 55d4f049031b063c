"""Enqueue: options checked and made into a record, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from zlib import crc32

import msgspec

from millpond import lifecycle
from millpond.errors import InvalidInput, OutcomeUnknown, StoreError
from millpond.model import names
from millpond.model.codec import encode
from millpond.model.message import DEFAULT_PRIORITY, HEAD_FORMAT, Head, Status
from millpond.service.config import DEFAULT_OPTIONS, EnqueueOptions, check_options, milliseconds, short_text
from millpond.service.core import Core, Defaults, QueueKey
from millpond.service.payloads import Payload, Streamed, Summed, prepare
from millpond.service.ready import Record
from millpond.stores.base import Cause, Conflict, Insert, Inserted, Item, Outcome, Serial, Unique

UNNAMED = "a request with a session has a number, and each of its messages an id of its producer's own (message_id)"
PASSED = (
    "this session has carried out a request with this number or a higher one: whether this one was, too, is not known. "
    "Send the requests of a session one after the other, each with a higher number"
)


class Receipt(NamedTuple):
    """What an enqueue is answered with."""

    message_id: str
    """The message's id: the new one's, or that of the first message with this dedup key or id."""
    duplicate: bool
    """The message was there already (same dedup key or id); nothing was added."""


class Numbered(NamedTuple):
    """Which request of its producer an enqueue is, so that a repetition is known (`Config.retry_window`). A session is
    a producer that sends one request after the other, each with a higher number; a repetition has the number of the
    first try. Its messages have ids of the producer's own."""

    session: str
    number: int
    fresh: bool = True
    """These ids were made for this request; otherwise the producer may give them to other messages later."""


class _Draft(msgspec.Struct, frozen=True, gc=False):
    op: Insert
    head: Head
    status: Status
    payload: bytes | None


class _Stamp(msgspec.Struct, frozen=True, gc=False):
    """A new message's status, and the time it was made."""

    now: int
    delay: int
    ttl: int | None
    status: Status
    encoded: bytes


class Producing(Core):
    """The producers' half of the service."""

    _last_stamp = _Stamp(-1, 0, None, lifecycle.new_status(0, 0, None), b"")
    """The stamp made last: many messages are enqueued within a millisecond."""

    async def enqueue(
        self,
        namespace: str | None,
        queue: str,
        source: Any,
        options: EnqueueOptions = DEFAULT_OPTIONS,
        *,
        numbered: Numbered | None = None,
    ) -> Receipt:
        """Put a message into the queue; when this returns it is in the store for good.

        ``source``: see `millpond.service.payloads`. Raises InvalidQueue, InvalidInput, TooLarge (nothing written),
        StoreError. Not idempotent unless ``dedup_key``, or ``message_id`` with or without ``numbered``, is given.
        """
        key = self.key(namespace, queue)
        defaults = self.defaults_at_hand(key) or await self.defaults(key)
        if options is DEFAULT_OPTIONS and source.__class__ is bytes and len(source) <= self.inline_limit:
            draft = self._plain(key, defaults, self._stamp(0, defaults.ttl), source, self.ids.message_id())
        else:
            serial = None if numbered is None else self._serial(numbered, options.message_id)
            draft = await self._draft(key, defaults, source, options, serial)
        outcomes = await self.write((draft.op,))
        self._tell(key, (draft,), outcomes)
        return self._receipt(draft, outcomes[0])

    async def enqueue_many(
        self, namespace: str | None, queue: str, sources: Sequence[Any], options: EnqueueOptions = DEFAULT_OPTIONS
    ) -> list[Receipt]:
        """Put messages into the queue in one write, in order; all with the same options."""
        key = self.key(namespace, queue)
        defaults = self.defaults_at_hand(key) or await self.defaults(key)
        limit = self.inline_limit
        stamp = self._stamp(0, defaults.ttl)
        plain = options is DEFAULT_OPTIONS
        ids: list[str] = []
        drafts: list[_Draft] = []
        for index, source in enumerate(sources):
            if plain and source.__class__ is bytes and len(source) <= limit:
                if not ids:
                    ids = self.ids.message_ids(len(sources) - index)
                    ids.reverse()
                drafts.append(self._plain(key, defaults, stamp, source, ids.pop()))
            else:
                drafts.append(await self._draft(key, defaults, source, options))
                # What comes after it has a later id, and is due after it.
                ids, stamp = [], self._stamp(0, defaults.ttl)
        outcomes = await self.write([draft.op for draft in drafts])
        self._tell(key, drafts, outcomes)
        # A Receipt as Receipt() makes it by way of a Python function; this is paid per message.
        return [
            tuple.__new__(Receipt, (draft.op.item.id, False))
            if outcome.__class__ is Inserted
            else self._receipt(draft, outcome)
            for draft, outcome in zip(drafts, outcomes, strict=True)
        ]

    async def enqueue_each(
        self,
        namespace: str | None,
        queue: str,
        messages: Sequence[tuple[Any, EnqueueOptions, str | None]],
        *,
        numbered: Numbered | Sequence[Numbered] | None = None,
    ) -> list[Receipt]:
        """As `enqueue_many`, each message with options of its own, and with the id that its producer chose for it, if
        any (in place of ``options.message_id``). When one of them cannot be right, none is written. Of a request
        that was ``numbered`` (all of it, or each message is one) and carried out before, nothing is, and its receipts
        say duplicate."""
        key = self.key(namespace, queue)
        defaults = self.defaults_at_hand(key) or await self.defaults(key)
        drafts: list[_Draft] = []
        serial = None
        if numbered is not None and messages:
            if any(id is None for _, _, id in messages):
                raise InvalidInput(UNNAMED)
            if isinstance(numbered, Numbered):
                serial = self._serial(numbered, messages[0][2])
        for index, (source, options, id) in enumerate(messages):
            try:
                if numbered is not None and not isinstance(numbered, Numbered):
                    serial = self._serial(numbered[index], id)
                if options is DEFAULT_OPTIONS and source.__class__ is bytes and len(source) <= self.inline_limit:
                    made = self.ids.message_id() if id is None else names.message_id(id)
                    stamp = self._stamp(0, defaults.ttl)
                    drafts.append(self._plain(key, defaults, stamp, source, made, id is not None, serial))
                else:
                    if id is not None:
                        options = msgspec.structs.replace(options, message_id=id)
                    drafts.append(await self._draft(key, defaults, source, options, serial))
            except InvalidInput as error:
                raise type(error)(f"message {index} of the batch: {error}") from error
        outcomes = await self.write([draft.op for draft in drafts])
        self._tell(key, drafts, outcomes)
        return [self._receipt(draft, outcome) for draft, outcome in zip(drafts, outcomes, strict=True)]

    def _serial(self, numbered: Numbered, first: str | None) -> Serial | None:
        """What the store is to know a repetition by. Raises InvalidInput, TooLarge."""
        session = short_text(numbered.session, "session")
        if first is None or session is None:
            raise InvalidInput(UNNAMED)
        window = round(self.config.retry_window * 1000)
        if not window:
            return None
        now = self.clock.now_ms()
        return Serial(session, numbered.number, names.message_id(first), now, now + window, numbered.fresh)

    async def _draft(
        self, key: QueueKey, defaults: Defaults, source: Any, options: EnqueueOptions, serial: Serial | None = None
    ) -> _Draft:
        if source.__class__ is Payload:
            if options.content_type is None:
                options = msgspec.structs.replace(options, content_type=source.content_type)
            source = source.data
        if source.__class__ is bytes and len(source) <= self.inline_limit:
            return self._build(key, defaults, source, len(source), False, options, None, serial=serial)
        # Everything about the options that can be wrong is found before a byte of the payload is stored.
        self._build(key, defaults, b"", 0, False, options, None)
        prepared = await prepare(source, inline_limit=self.inline_limit, limit=self.config.max_payload_bytes)
        if not isinstance(prepared, Streamed):
            return self._build(key, defaults, prepared.data, len(prepared.data), False, options, None, serial=serial)
        id = self._id(options) if options.message_id is None else names.message_id(options.message_id)
        if options.message_id is not None and await self.store.get(*key, id) is not None:
            # The first enqueue with this id is in: no need to write its payload again. Should that message go before
            # this insert, then the insert, whose payload was never written, is refused by the store.
            return self._build(key, defaults, b"", 0, True, options, id, serial=serial)
        source = Summed(prepared.chunks)
        blob = await self.store.write_blob(*key, id, source, self.clock.now_ms())
        return self._build(key, defaults, b"", blob.size, True, options, id, blob.name, source.checksum, serial)

    def _build(
        self,
        key: QueueKey,
        defaults: Defaults,
        data: bytes,
        size: int,
        external: bool,
        options: EnqueueOptions,
        id: str | None,
        blob: str = "",
        checksum: int | None = None,
        serial: Serial | None = None,
    ) -> _Draft:
        delay = 0
        ttl, visibility, max_attempts = defaults.ttl, defaults.visibility, defaults.max_attempts
        priority = DEFAULT_PRIORITY
        dedup_key = ordering_key = content_type = correlation_id = attributes = window = None
        if options is not DEFAULT_OPTIONS:
            wishes = check_options(options, self.config.max_attributes_bytes)
            delay, priority, attributes, dedup_key = wishes.delay, wishes.priority, wishes.attributes, wishes.dedup_key
            ordering_key, content_type = wishes.ordering_key, wishes.content_type
            correlation_id, window = wishes.correlation_id, wishes.dedup_window
            if wishes.ttl is not None:
                ttl = wishes.ttl
            if wishes.max_attempts is not None:
                max_attempts = wishes.max_attempts
            if wishes.visibility is not None:
                visibility = wishes.visibility
            if wishes.message_id is not None:
                id = wishes.message_id
        stamp = self._stamp(delay, ttl)
        if id is None:
            id = self.ids.message_id() if not delay or ordering_key else self.ids.later_id(stamp.status.visible_at)
        head = Head(
            HEAD_FORMAT,
            id,
            key[0],
            key[1],
            stamp.now,
            priority,
            max_attempts,
            visibility,
            ttl,
            dedup_key,
            ordering_key,
            attributes,
            correlation_id,
            content_type,
            size,
            external,
            checksum if external else crc32(data),
        )
        unique = None
        if dedup_key is not None:
            unique = Unique(dedup_key, stamp.now, stamp.now + (window or defaults.dedup_window))
        return _finish(stamp, head, data, unique, blob, options.message_id is not None, serial)

    def _id(self, options: EnqueueOptions) -> str:
        """The id of a message whose payload is stored before its record is made."""
        delay = milliseconds(options.delay, "delay")
        # A group is in order of entry, whatever its messages' delays: so are its ids.
        if not delay or options.ordering_key:
            return self.ids.message_id()
        return self.ids.later_id(self.clock.now_ms() + delay)

    def _stamp(self, delay: int, ttl: int | None) -> _Stamp:
        """What messages that are enqueued now, with this delay and time to live, begin with."""
        now = self.clock.now_ms()
        stamp = self._last_stamp
        if stamp.now != now or stamp.delay != delay or stamp.ttl != ttl:
            status = lifecycle.new_status(now, delay, ttl)
            stamp = self._last_stamp = _Stamp(now, delay, ttl, status, encode(status))
        return stamp

    @staticmethod
    def _plain(
        key: QueueKey,
        defaults: Defaults,
        stamp: _Stamp,
        data: bytes,
        id: str,
        chosen: bool = False,
        serial: Serial | None = None,
    ) -> _Draft:
        """As `_build`, for a small payload without options: the common case without the detours."""
        head = Head(
            HEAD_FORMAT,
            id,
            key[0],
            key[1],
            stamp.now,
            DEFAULT_PRIORITY,
            defaults.max_attempts,
            defaults.visibility,
            defaults.ttl,
            None,
            None,
            None,
            None,
            None,
            len(data),
            False,
            crc32(data),
        )
        # _finish(), written out: this is paid per message.
        status = stamp.status
        op = Insert(
            Item(key[0], key[1], id, DEFAULT_PRIORITY, None, len(data), False),
            status.visible_at,
            status.expires_at,
            encode(head),
            stamp.encoded,
            data,
            None,
            "",
            chosen,
            serial,
        )
        return _Draft(op, head, status, data)

    def _tell(self, key: QueueKey, drafts: Sequence[_Draft], outcomes: Sequence[Outcome]) -> None:
        """Tell those who wait for messages of the queue, and its ready cache, what was inserted."""
        cache = self._caches.get(key)
        if cache is None or cache.asleep:
            first = None
            for draft, outcome in zip(drafts, outcomes, strict=True):
                if outcome.__class__ is Inserted and (first is None or draft.op.due < first):
                    first = draft.op.due
            if first is not None:
                self.appeared(key, first)
            return
        self.changed_many(
            key,
            [
                Record(outcome.item, outcome.mark, draft.head, draft.status, draft.payload)
                for draft, outcome in zip(drafts, outcomes, strict=True)
                if isinstance(outcome, Inserted)
            ],
            inserted=True,
        )

    @staticmethod
    def _receipt(draft: _Draft, outcome: Outcome) -> Receipt:
        if outcome.__class__ is Inserted:
            return Receipt(draft.op.item.id, False)
        if isinstance(outcome, Conflict) and outcome.cause in (Cause.UNIQUE, Cause.EXISTS):
            return Receipt(outcome.id or draft.op.item.id, True)
        if isinstance(outcome, Conflict) and outcome.cause is Cause.PASSED:
            raise OutcomeUnknown(PASSED)
        raise StoreError(f"the store answered an insert with {outcome!r}")


def _finish(
    stamp: _Stamp,
    head: Head,
    data: bytes,
    unique: Unique | None,
    blob: str = "",
    chosen: bool = False,
    serial: Serial | None = None,
) -> _Draft:
    status, external = stamp.status, head.external
    op = Insert(
        Item(head.namespace, head.queue, head.id, head.priority, head.ordering_key, head.payload_size, external),
        status.visible_at,
        status.expires_at,
        encode(head),
        stamp.encoded,
        data,
        unique,
        blob,
        chosen,
        serial,
    )
    return _Draft(op, head, status, None if external else data)
