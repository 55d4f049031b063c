"""Rewrites a store under the newest root key, while consumers work.

Safe to stop and to start anew at any point: each record is replaced as a whole and only if nobody has changed it
meanwhile, and what is under the newest key already is left alone. The order matters in one place: the vault goes first,
so that from then on no new stream is under a key that the old root key covered.

Passes are repeated until one finds nothing to do, because a message that moves between the boxes can slip through one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from millpond.crypto.envelope import HEAD, PAYLOAD, STATE, STATUS, is_sealed
from millpond.errors import InvalidInput, MillpondError, StoreBusy
from millpond.stores.base import (
    Box,
    Conflict,
    Document,
    DocumentWritten,
    PutDocument,
    QueueName,
    Reseal,
    Stored,
)
from millpond.stores.encrypted import EncryptedStore

log = logging.getLogger("millpond.crypto")

MAX_PASSES = 8
"""Two are usual. After this many, somebody keeps writing under an older key."""
MAX_RACES = 64
"""How often one record may be changed by others just when it is to be written. Each time takes a claim or an answer
within less than a millisecond."""
MAX_PENDING_BYTES = 8 << 20
"""Payload and state held at once, on top of one record."""


async def rekey(
    store: EncryptedStore,
    *,
    batch: int = 200,
    progress: Callable[[int], object] | None = None,
    encrypt_plain: bool = False,
) -> int:
    """Bring everything in ``store`` under the newest key of its keyring; how many messages and documents were
    rewritten.

    ``batch`` is the number of messages per write; ``progress`` is told the number rewritten so far, after each write.
    Payloads stored apart are not rewritten: their keys are (see `millpond.crypto.vault`). Afterwards the older keys are
    needed no more, provided that every process that writes has the newest.

    ``encrypt_plain`` also encrypts messages that are not encrypted yet; the store must have been made with
    ``accept_plain``, and nobody may have it open without a keyring. Their ordering keys and dedup keys stay readable
    in the store's index until they are done, and so do payloads of theirs that are stored apart, whose messages are
    left plain altogether and told of in the log event ``millpond.crypto.plain_left``.

    A record that does not open is left alone, and reported as in a listing. Raises InvalidInput, StoreBusy (run it
    again), and what the store raises.
    """
    if batch < 1:
        raise InvalidInput("batch must be at least 1")
    if encrypt_plain and not store.accept_plain:
        raise InvalidInput("to encrypt a plain store, open it with accept_plain=True")
    await store.rewrap_vault()
    work = _Rekey(store, batch, progress, encrypt_plain)
    for _ in range(MAX_PASSES):
        before = work.rewritten
        await work.run_pass()
        if work.rewritten == before:
            break
    else:
        raise StoreBusy(
            f"{work.rewritten} records were rewritten, but records under an older root key keep appearing: give every "
            f"process the new keyring, then run rekey again"
        )
    if work.plain_left:
        log.warning("millpond.crypto.plain_left", extra={"messages": len(work.plain_left)})
    return work.rewritten


class _Rekey:
    def __init__(
        self, store: EncryptedStore, batch: int, progress: Callable[[int], object] | None, encrypt_plain: bool
    ) -> None:
        self.store = store
        self.batch = batch
        self.progress = progress
        self.encrypt_plain = encrypt_plain
        self.rewritten = 0
        self.plain_left: set[str] = set()
        """Ids of plain messages whose payload is stored apart."""

    async def run_pass(self) -> None:
        self.plain_left.clear()
        for name in await self.store.queues():
            await self._document(name)
            for box in Box:
                after: int | None = None
                while True:
                    page = await self.store.inner.list(*name, box, after=after, limit=self.batch)
                    await self._records(page.records)
                    after = page.next_after
                    if after is None:
                        break

    def _due(self, sealed: bytes) -> bool:
        """Whether these bytes are to be rewritten."""
        if is_sealed(sealed):
            return not self.store.envelope.is_current(sealed)
        # In a store that does not accept plain records, the attempt to open it tells what is wrong.
        return self.encrypt_plain or not self.store.accept_plain

    async def _document(self, name: QueueName) -> None:
        while (sealed := await self.store.inner.document(*name)) is not None and self._due(sealed.data):
            document = await self.store.document(*name)
            if document is None:
                return
            # The ETag of this read, not of the one before.
            (outcome,) = await self.store.write([PutDocument(*name, document.etag, document.data)])
            if isinstance(outcome, DocumentWritten):
                self._count(1)
                return

    async def _records(self, records: list[Stored]) -> None:
        pending: list[Reseal] = []
        held = 0
        for record in records:
            op = await self._reseal(record)
            if op is not None:
                pending.append(op)
                held += len(op.payload or b"") + (len(op.state.data) if op.state is not None else 0)
                if held >= MAX_PENDING_BYTES:
                    await self._write(pending)
                    pending, held = [], 0
        if pending:
            await self._write(pending)

    async def _reseal(self, record: Stored) -> Reseal | None:
        """The write that renews a record; None when it needs none, or does not open."""
        store, item = self.store, record.item
        state = await store.inner.state(item)
        head_due, state_due = self._due(record.head), state is not None and self._due(state.data)
        if not (head_due or state_due or self._due(record.status)):
            return None
        if item.external and not is_sealed(record.head) and store.accept_plain:
            self.plain_left.add(item.id)
            return None
        try:
            head = store.open_part(HEAD, item, record.head)
            status = store.open_part(STATUS, item, record.status)
            payload = None
            # The payload is written when the head is, and never apart from it.
            if head_due and not item.external:
                payload = await store.inner.payload(item)
                if payload is None:
                    return None
                if is_sealed(record.head):
                    payload = store.open_part(PAYLOAD, item, payload)
            new_state = None
            if state is not None and state_due:
                new_state = Document(store.open_part(STATE, item, state.data), state.etag)
        except MillpondError as error:
            store.report(item, error)
            return None
        return Reseal(item, record.mark, head, status, payload, new_state)

    async def _write(self, ops: list[Reseal]) -> None:
        outcomes = await self.store.write(ops)
        lost = [op for op, outcome in zip(ops, outcomes, strict=True) if isinstance(outcome, Conflict)]
        self._count(len(ops) - len(lost))
        for op in lost:
            await self._again(op)

    async def _again(self, op: Reseal) -> None:
        """Somebody changed the record meanwhile: renew what is there now."""
        item = op.item
        for _ in range(MAX_RACES):
            record = await self.store.inner.get(item.namespace, item.queue, item.id)
            again = None if record is None else await self._reseal(record)
            if again is None:
                return
            (outcome,) = await self.store.write([again])
            if not isinstance(outcome, Conflict):
                self._count(1)
                return
        raise StoreBusy(f"message {item.id} in {item.namespace}/{item.queue} changes too fast; run rekey again")

    def _count(self, rewritten: int) -> None:
        self.rewritten += rewritten
        if self.progress is not None and rewritten:
            self.progress(self.rewritten)
