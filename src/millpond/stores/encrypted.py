"""A store that encrypts what it hands to another one, and decrypts what comes back.

Encrypted: head, status, payload, state, queue documents, payloads stored apart. Replaced by keyed hashes: ordering
groups and unique keys, so ``Item.group`` of what comes out of here is opaque (who wants the ordering key finds it in
the head). In the clear, because the store must order and count by them: names, ids, due and expiry times, priority,
box, whether leased, sizes.

Invariants:

1. No plaintext reaches the inner store, and none that did not open leaves this one.
2. A record that does not open never hides another. ``get`` and ``payload`` of it raise; listings leave it out, and tell
   of it once through `EncryptedStore.on_bad_record` and the log event ``millpond.crypto.record_unreadable``.
3. A write that went through is reported as such, even when the payload that came back with it does not open: then
   ``Updated.payload`` is None, and ``payload(item)`` raises.
"""

from __future__ import annotations

import asyncio
import builtins
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from millpond.crypto import stream
from millpond.crypto.envelope import (
    DOCUMENT,
    HEAD,
    NONCE_BYTES,
    PAYLOAD,
    STATE,
    STATUS,
    Envelope,
    Kind,
    describe,
    is_sealed,
)
from millpond.crypto.keyring import Keyring
from millpond.crypto.place import PLACE
from millpond.crypto.vault import Index, Vault
from millpond.errors import MessageNotFound, MillpondError, StoreBusy, StoreClosed, StoreMismatch, UnknownKey
from millpond.model import names
from millpond.stores.base import (
    Blob,
    Box,
    Capabilities,
    Conflict,
    Counts,
    Decide,
    Discarding,
    Document,
    DocumentWritten,
    Insert,
    Item,
    Op,
    Outcome,
    Page,
    Problem,
    PutDocument,
    PutState,
    QueueName,
    ReadyPage,
    Remove,
    Removed,
    Requests,
    Reseal,
    Store,
    Stored,
    Subscription,
    Telling,
    Unique,
    Update,
    Updated,
)

log = logging.getLogger("millpond.crypto")

BREATH = 256
"""Records opened at a stretch; then the event loop gets a turn. At most about 10 µs each."""
MAX_SKIPPED = 4096
"""Unreadable records that a search for ready or expired ones passes over: as many as a ready cache holds. With more of
them at the head of one queue, what lies behind them waits for `EncryptedStore.discard_unreadable`."""
MAX_REMEMBERED = 10_000
"""Unreadable records remembered as reported; the oldest are forgotten, and reported anew when met again."""


class EncryptedStore:
    """``inner``, encrypted under ``keyring``.

    ``accept_plain`` lets records through that are not encrypted, for the time in which a store is being encrypted (see
    `millpond.stores.rekey`). Whoever can write to the storage can then plant messages: not for daily use.
    """

    def __init__(self, inner: Store, keyring: Keyring, *, accept_plain: bool = False) -> None:
        self.inner = inner
        self.envelope = Envelope(keyring)
        self.accept_plain = accept_plain
        self.on_bad_record: Callable[[Item, MillpondError], object] | None = None
        """Told of each record that does not open, once. Must not raise."""
        self._vault: Vault | None = None
        self._index: Index | None = None
        self._reported: dict[tuple[str, str, str], None] = {}
        self._unreadable = 0

    @property
    def capabilities(self) -> Capabilities:
        """The inner store's. ``inline_limit`` is about plaintext; what is stored is some 50 bytes more."""
        return msgspec.structs.replace(self.inner.capabilities, encrypted=True)

    @property
    def clock_offset(self) -> int:
        """The inner store's."""
        return self.inner.clock_offset

    async def open(self) -> None:
        """Open the inner store and its vault; make one in an empty store.

        Raises UnknownKey and Tampered for a keyring that is not this store's, StoreMismatch when the store holds plain
        messages.
        """
        await self.inner.open()
        try:
            await self._open_vault()
        except BaseException:
            await self.inner.close()
            raise

    async def close(self) -> None:
        """Close the inner store, and forget the keys of the vault. Repeatable."""
        await self.inner.close()
        self._vault = self._index = None

    # The vault

    async def _open_vault(self) -> None:
        while True:
            document = await self.inner.document(*PLACE)
            if document is not None:
                self._use(Vault.open(self.envelope, document.data))
                return
            if not self.accept_plain and await self.inner.queues():
                raise StoreMismatch(
                    "this store is not encrypted, but was opened with a keyring: open it without one, or encrypt it: "
                    "connect(…, keyring=…, accept_plain=True), then rekey(encrypt_plain=True)"
                )
            # Whoever comes second reads what the first one wrote.
            await self._put_vault(Vault.new(self.envelope.random_bytes), None)

    def _use(self, vault: Vault) -> None:
        self._vault = vault
        self._index = Index(vault.index_key)

    async def _put_vault(self, vault: Vault, expect: str | None) -> bool:
        put = PutDocument(*PLACE, expect, vault.seal(self.envelope))
        (outcome,) = await self.inner.write([put])
        return isinstance(outcome, DocumentWritten)

    async def rewrap_vault(self) -> bool:
        """Seal the vault with the newest root key, with a stream key that no older root key ever covered.

        False when that was done already. Part of a rekey.
        """
        while True:
            document = await self.inner.document(*PLACE)
            if document is None:
                raise StoreMismatch("the store's key document is gone")
            vault = Vault.open(self.envelope, document.data)
            self._use(vault)
            if self.envelope.is_current(document.data):
                return False
            vault = vault.next_generation(self.envelope.random_bytes)
            if await self._put_vault(vault, document.etag):
                self._use(vault)
                return True

    def _hash(self, use: str, item: Item, key: str) -> str:
        if self._index is None:
            raise StoreClosed("the encrypted store is not open")
        return self._index.hash(use, item.namespace, item.queue, key)

    # Writing

    async def write(self, ops: Sequence[Op]) -> builtins.list[Outcome]:
        """Apply each op on its own."""
        return self._open_outcomes(ops, await self.inner.write([self._seal_op(op) for op in ops]))

    async def commit(self, ops: Sequence[Op]) -> builtins.list[Outcome]:
        """Apply all ops or none."""
        return self._open_outcomes(ops, await self.inner.commit([self._seal_op(op) for op in ops]))

    def _seal_op(self, op: Op) -> Op:
        # Positional, and the commonest first: this runs for each write.
        if isinstance(op, Update):
            return self._seal_update(op)
        if isinstance(op, Remove):
            return op
        if isinstance(op, Insert):
            return self._seal_insert(op)
        if isinstance(op, PutState):
            return PutState(op.item, op.mark, op.expect, self._seal(STATE, op.item, op.data))
        if isinstance(op, PutDocument):
            data = self.envelope.seal(DOCUMENT, op.namespace, op.queue, "", op.data)
            return PutDocument(op.namespace, op.queue, op.expect, data)
        if isinstance(op, Reseal):
            return self._seal_reseal(op)
        return op

    def _seal_update(self, op: Update) -> Update:
        item = op.item
        nonce = self.envelope.random_bytes(NONCE_BYTES)
        status = self.envelope.cipher(item.namespace, item.queue, item.id).seal(STATUS, op.status, nonce)
        return Update(item, op.mark, op.due, op.leased, op.expires, op.box, status, op.want_payload)

    def _seal_insert(self, op: Insert) -> Insert:
        item = op.item
        cipher = self.envelope.cipher(item.namespace, item.queue, item.id)
        # One call of the operating system for all three.
        nonces = self.envelope.random_bytes(3 * NONCE_BYTES)
        head = cipher.seal(HEAD, op.head, nonces[:NONCE_BYTES])
        status = cipher.seal(STATUS, op.status, nonces[NONCE_BYTES : 2 * NONCE_BYTES])
        payload = op.payload if item.external else cipher.seal(PAYLOAD, op.payload, nonces[2 * NONCE_BYTES :])
        unique = op.unique
        if unique is not None:
            unique = Unique(self._hash("unique", item, unique.key), unique.now, unique.until)
        if item.group is not None:
            item = msgspec.structs.replace(item, group=self._hash("group", item, item.group))
        return Insert(item, op.due, op.expires, head, status, payload, unique, op.blob, op.chosen, op.serial)

    def _seal_reseal(self, op: Reseal) -> Reseal:
        return Reseal(
            op.item,
            op.mark,
            self._seal(HEAD, op.item, op.head),
            self._seal(STATUS, op.item, op.status),
            None if op.payload is None else self._seal(PAYLOAD, op.item, op.payload),
            None if op.state is None else Document(self._seal(STATE, op.item, op.state.data), op.state.etag),
        )

    def _seal(self, kind: Kind, item: Item, data: bytes) -> bytes:
        return self.envelope.seal(kind, item.namespace, item.queue, item.id, data)

    def _open_outcomes(self, ops: Sequence[Op], outcomes: builtins.list[Outcome]) -> builtins.list[Outcome]:
        for index, outcome in enumerate(outcomes):
            if isinstance(outcome, Updated) and outcome.payload is not None:
                op = ops[index]
                assert isinstance(op, Update)
                outcomes[index] = self._open_updated(op.item, outcome)
        return outcomes

    def _open_updated(self, item: Item, outcome: Updated) -> Updated:
        if outcome.payload is None:
            return outcome
        return Updated(outcome.mark, self._open_or_none(item, outcome.payload))

    def _open_or_none(self, item: Item, sealed: bytes) -> bytes | None:
        try:
            return self._open_payload(item, sealed)
        except MillpondError as error:
            self.report(item, error)
            return None

    # Reading

    def open_part(self, kind: Kind, item: Item, sealed: bytes) -> bytes:
        """Open a part of a message. Raises UnknownKey, Tampered, StoreMismatch."""
        if self.accept_plain and not is_sealed(sealed):
            return sealed
        return self.envelope.open(kind, item.namespace, item.queue, item.id, sealed)

    def _open_payload(self, item: Item, sealed: bytes) -> bytes:
        # The record of an external payload has an empty one, which was never sealed.
        return sealed if item.external and not sealed else self.open_part(PAYLOAD, item, sealed)

    def _open_record(self, record: Stored) -> Stored:
        item = record.item
        head = self.open_part(HEAD, item, record.head)
        status = self.open_part(STATUS, item, record.status)
        payload = None if record.payload is None else self._open_payload(item, record.payload)
        return Stored(item, record.mark, head, status, payload)

    async def _readable(self, records: Sequence[Stored]) -> builtins.list[Stored]:
        opened = []
        for number, record in enumerate(records, 1):
            try:
                opened.append(self._open_record(record))
            except MillpondError as error:
                self.report(record.item, error)
            if number % BREATH == 0:
                await asyncio.sleep(0)
        return opened

    def report(self, item: Item, error: MillpondError) -> None:
        """Tell of a record that does not open, once: log, `on_bad_record`, statistics."""
        place = (item.namespace, item.queue, item.id)
        if place in self._reported:
            return
        if len(self._reported) >= MAX_REMEMBERED:
            del self._reported[next(iter(self._reported))]
        self._reported[place] = None
        self._unreadable += 1
        log.error(
            "millpond.crypto.record_unreadable",
            extra={
                "namespace": item.namespace,
                "queue": item.queue,
                "message_id": item.id,
                "code": error.code,
                "error": str(error),
            },
        )
        if self.on_bad_record is not None:
            self.on_bad_record(item, error)

    async def get(self, namespace: str, queue: str, id: str, *, payload: bool = False) -> Stored | None:
        """The record, from whichever box it lies in. Raises UnknownKey, Tampered, StoreMismatch."""
        record = await self.inner.get(namespace, queue, id, payload=payload)
        return None if record is None else self._open_record(record)

    async def ready(self, namespace: str, queue: str, now: int, *, limit: int) -> ReadyPage:
        """The first ``limit`` due records that open."""
        skip = 0
        while True:
            page = await self.inner.ready(namespace, queue, now, limit=limit + skip)
            records = await self._readable(page.records)
            bad = len(page.records) - len(records)
            if len(records) >= limit or not page.more or bad >= MAX_SKIPPED or bad == skip:
                more = page.more or len(records) > limit
                return ReadyPage(records[:limit], more, page.next_due)
            # The bad ones take the place of good ones behind them: look further by as many.
            skip = bad

    async def told(self, namespace: str, queue: str, now: int, *, limit: int) -> builtins.list[Stored]:
        """What the inner store was told of, as far as it opens."""
        if not isinstance(self.inner, Telling):
            return []
        return await self._readable(await self.inner.told(namespace, queue, now, limit=limit))

    async def take(
        self, namespace: str, queue: str, now: int, *, limit: int, decide: Decide
    ) -> builtins.list[tuple[Any, Updated | Removed]]:
        """Settle the first ready records that open as ``decide`` says."""

        def decide_sealed(record: Stored) -> tuple[Update | Remove, Any] | None:
            try:
                opened = self._open_record(Stored(record.item, record.mark, record.head, record.status))
            except MillpondError as error:
                self.report(record.item, error)
                return None
            if record.payload is not None:
                # One that does not open hides no record: it is the consumer's, who meets the error at the payload.
                payload = self._open_or_none(record.item, record.payload)
                opened = Stored(opened.item, opened.mark, opened.head, opened.status, payload)
            decided = decide(opened)
            if decided is None:
                return None
            op, tag = decided
            return (op if op.__class__ is Remove else self._seal_update(op)), (op, tag)  # type: ignore[arg-type]

        taken = await self.inner.take(namespace, queue, now, limit=limit, decide=decide_sealed)
        return [
            (tag, outcome if isinstance(outcome, Removed) else self._open_updated(op.item, outcome))
            for (op, tag), outcome in taken
        ]

    async def expired(self, now: int, *, limit: int) -> builtins.list[Stored]:
        """The first ``limit`` expired records that open."""
        skip = 0
        while True:
            found = await self.inner.expired(now, limit=limit + skip)
            records = await self._readable(found)
            bad = len(found) - len(records)
            if len(records) >= limit or len(found) < limit + skip or bad >= MAX_SKIPPED:
                return records[:limit]
            skip = bad

    async def payload(self, item: Item) -> bytes | None:
        """The inline payload. Raises UnknownKey, Tampered."""
        sealed = await self.inner.payload(item)
        return None if sealed is None else self._open_payload(item, sealed)

    async def state(self, item: Item) -> Document | None:
        """The state document. Raises UnknownKey, Tampered."""
        document = await self.inner.state(item)
        return document and Document(self.open_part(STATE, item, document.data), document.etag)

    async def document(self, namespace: str, queue: str) -> Document | None:
        """The queue's document. Raises UnknownKey, Tampered."""
        document = await self.inner.document(namespace, queue)
        if document is None or (self.accept_plain and not is_sealed(document.data)):
            return document
        data = self.envelope.open(DOCUMENT, namespace, queue, "", document.data)
        return Document(data, document.etag)

    async def sealed_document(self, namespace: str, queue: str) -> Document | None:
        """The queue's document as it lies in the inner store, whether it opens or not."""
        return await self.inner.document(namespace, queue)

    async def queues(self) -> builtins.list[QueueName]:
        """Every queue; the vault is none."""
        return [name for name in await self.inner.queues() if name != PLACE]

    async def counts(self, namespace: str, queue: str, now: int) -> Counts:
        """As the inner store counts; records that do not open are among them."""
        return await self.inner.counts(namespace, queue, now)

    # Payloads stored apart

    async def write_blob(self, namespace: str, queue: str, id: str, chunks: AsyncIterator[bytes], now: int) -> Blob:
        """Seal a payload as it streams by. The size returned is that of the plaintext."""
        if self._vault is None:
            raise StoreClosed("the encrypted store is not open")
        keys = self._vault.stream_keys
        sealer = stream.StreamSealer(
            keys[-1], len(keys) - 1, namespace, queue, id, random_bytes=self.envelope.random_bytes
        )

        async def sealed() -> AsyncGenerator[bytes, None]:
            async for chunk in chunks:
                for piece in sealer.feed(chunk):
                    yield piece
            yield sealer.finish()

        async with aclosing(sealed()) as pieces:
            blob = await self.inner.write_blob(namespace, queue, id, pieces, now)
        return Blob(sealer.size, blob.name)

    async def read_blob(self, item: Item) -> AsyncIterator[bytes]:
        """The payload in chunks of at most 256 KiB, each proven before it is yielded, the end proven at the end.

        Raises Tampered, UnknownKey, and what the inner store raises.
        """
        pieces = self.inner.read_blob(item)
        try:
            start = bytearray()
            async for piece in pieces:
                start += piece
                if len(start) >= stream.HEADER_BYTES:
                    break
            if self.accept_plain and not stream.is_sealed(start):
                if start:
                    yield bytes(start)
                async for piece in pieces:
                    yield piece
                return
            opener = await self._opener(item, bytes(start[: stream.HEADER_BYTES]))
            for chunk in opener.feed(start[stream.HEADER_BYTES :]):
                yield chunk
            async for piece in pieces:
                for chunk in opener.feed(piece):
                    yield chunk
            last = opener.finish()
            if last:
                yield last
        finally:
            close = getattr(pieces, "aclose", None)
            if close is not None:
                await close()

    async def _opener(self, item: Item, header: bytes) -> stream.StreamOpener:
        generation = stream.generation(header, item.namespace, item.queue, item.id)
        if self._vault is None:
            raise StoreClosed("the encrypted store is not open")
        if generation >= len(self._vault.stream_keys):
            # Another process has rekeyed since this one read the vault.
            await self._open_vault()
            if generation >= len(self._vault.stream_keys):
                part = describe(PAYLOAD, item.namespace, item.queue, item.id)
                raise UnknownKey(f"{part} needs stream key {generation}, which the store lacks")
        secret = self._vault.stream_keys[generation]
        return stream.StreamOpener(secret, header, item.namespace, item.queue, item.id)

    # Upkeep

    async def sweep(self, now: int, *, older_than: int, limit: int) -> int:
        """As the inner store does."""
        return await self.inner.sweep(now, older_than=older_than, limit=limit)

    async def verify(self) -> builtins.list[Problem]:
        """What the inner store finds, and whatever does not open: documents, records, payloads (all of them, also
        those stored apart) and states."""
        problems = await self.inner.verify()
        for name in await self.queues():
            try:
                await self.document(*name)
            except MillpondError as error:
                problems.append(Problem(f"queue {name.namespace}/{name.queue}", str(error)))
            for box in Box:
                after: int | None = 0
                while after is not None:
                    page = await self.inner.list(*name, box, after=after or None, limit=BREATH)
                    for record in page.records:
                        problems += await self._problems(record)
                    after = page.next_after
        return problems

    async def _problems(self, record: Stored) -> builtins.list[Problem]:
        item = record.item
        try:
            self._open_record(record)
            await self.state(item)
            await self.payload(item)
            if item.external:
                async for _ in self.read_blob(item):
                    pass
        except MessageNotFound:
            # Acked meanwhile, or its payload is missing; the latter is the inner store's to find.
            return []
        except MillpondError as error:
            return [Problem(f"message {item.id}", str(error))]
        return []

    async def unreadable(self, namespace: str, queue: str) -> builtins.list[tuple[str, MillpondError]]:
        """The ids of the queue's records whose head or status does not open, live and dead, each with the reason; and
        what the inner store cannot read."""
        found = await self.inner.unreadable(namespace, queue) if isinstance(self.inner, Discarding) else []
        for box in Box:
            after: int | None = 0
            while after is not None:
                page = await self.inner.list(namespace, queue, box, after=after or None, limit=BREATH)
                for record in page.records:
                    try:
                        self._open_record(record)
                    except MillpondError as error:
                        found.append((record.item.id, error))
                await asyncio.sleep(0)
                after = page.next_after
        return found

    async def discard_unreadable(self, namespace: str, queue: str, what: str) -> bool:
        """Remove a record whose head or status does not open, with all that belongs to it.

        False when there is none, or when it does open (then it is to be removed as any other). Raises StoreBusy when it
        is being changed. For operators: nothing calls it by itself, since a missing key may yet be found.

        What the inner store cannot read it removes itself, and raises what that raises.
        """
        id = what
        if not isinstance(self.inner, Discarding):
            id = names.message_id(what)
        elif await self.inner.discard_unreadable(namespace, queue, what):
            return True
        record = await self.inner.get(namespace, queue, id)
        if record is None:
            return False
        try:
            self._open_record(record)
        except MillpondError:
            (outcome,) = await self.inner.write([Remove(record.item, record.mark)])
            if isinstance(outcome, Conflict):
                raise StoreBusy(f"message {id} in {namespace}/{queue} is being changed; try again") from None
            return isinstance(outcome, Removed)
        return False

    def subscribe(self, namespace: str, queue: str, callback: Callable[[], object]) -> Subscription:
        """As the inner store does."""
        return self.inner.subscribe(namespace, queue, callback)

    def statistics(self) -> dict[str, Any]:
        """The inner store's, with ``crypto_unreadable``, ``ciphers_cached``, ``ciphers_derived``,
        ``ciphers_reused``."""
        return {
            **self.inner.statistics(),
            **self.envelope.statistics(),
            "crypto_unreadable": self._unreadable,
        }

    def requests(self) -> dict[QueueName | None, Requests]:
        """The inner store's."""
        return self.inner.requests()

    async def list(self, namespace: str, queue: str, box: Box, *, after: int | None = None, limit: int = 100) -> Page:
        """Records of a box in order of insertion. A page may be short, or empty, and not be the last."""
        page = await self.inner.list(namespace, queue, box, after=after, limit=limit)
        return Page(await self._readable(page.records), page.next_after)
