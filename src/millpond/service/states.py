"""Workflow state: one document per message, written under its lease, kept over retries, gone with the ack."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec

from millpond import lifecycle
from millpond.errors import (
    MessageNotFound,
    StateConflict,
    StoreCorrupt,
    StoreError,
    StoreMismatch,
    TooLarge,
)
from millpond.model import codec
from millpond.service.claiming import Claiming
from millpond.service.consuming import Delivery
from millpond.service.core import ATTEMPTS
from millpond.service.ready import Record
from millpond.stores.base import Cause, Conflict, DropState, Op, PutState, StateWritten

STATE_FORMAT = 1

WHATEVER: Final = "*"
"""In place of an ETag: the caller holds the lease and wants its value to stand whatever was there."""


class Write(NamedTuple):
    """Which write of a state this is, where one may be carried out late, and more than once: by way of a server."""

    writer: str
    """Who writes; chance."""
    number: int
    """Grows with each of his writes."""


class StateDocument(msgspec.Struct, frozen=True):
    """A message's workflow state as stored."""

    format: int
    value: Any
    created_at: int
    updated_at: int
    version: int = 1
    """One more with each write while the document lives; 1 also in one from before it was counted."""


class _Numbered(StateDocument, frozen=True):
    """The same, with the `Write` that it is from."""

    writer: str = ""
    """Nothing where it is from no such write."""
    number: int = 0
    gone: bool = False
    """The state was deleted by that write. This stands in its place, so that no earlier write which comes late brings
    the state back; the ack removes it, as it would remove the state."""


class StateResult(msgspec.Struct, frozen=True):
    """A state document and its ETag."""

    document: StateDocument
    etag: str
    write: Write | None = None
    """Which write it is from, if it is from one that has a number."""
    gone: bool = False
    """There is no state: a write with a number deleted it. The service tells nobody of such a one."""

    def later_than(self, write: Write | None) -> bool:
        """It is from a later write of the same writer, or from this one."""
        own = self.write
        return write is not None and own is not None and own.writer == write.writer and own.number >= write.number


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Numbered)


class States(Claiming):
    """The workflow-state part of the service."""

    async def _state_of(self, record: Record) -> StateResult | None:
        found = await self._latest(record)
        return None if found is None or found.gone else found

    async def _latest(self, record: Record) -> StateResult | None:
        """The state, or what a deletion left in its place."""
        found = await self.store.state(record.item)
        if found is None:
            return None
        name = f"state of message {record.item.id} in {record.item.namespace}/{record.item.queue}"
        try:
            document = _decoder.decode(found.data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise StoreCorrupt(f"{name} cannot be decoded: {error}") from error
        if document.format > STATE_FORMAT:
            raise StoreMismatch(f"{name} has format {document.format}; this Millpond reads up to {STATE_FORMAT}")
        write = Write(document.writer, document.number) if document.writer else None
        created, updated = document.created_at, document.updated_at
        plain = StateDocument(document.format, document.value, created, updated, document.version)
        return StateResult(plain, found.etag, write, document.gone)

    async def load_state(self, namespace: str | None, queue: str, id: str) -> StateResult | None:
        """The message's state; None when it has none. Raises MessageNotFound."""
        record = await self.load(*self.key(namespace, queue), id)
        if record is None:
            raise MessageNotFound(f"there is no message {id} in queue {queue}")
        return await self._state_of(record)

    async def held_state(self, delivery: Delivery) -> StateResult | None:
        """The state of a message that is held; None when it has none. Raises LeaseLost."""
        return await self._state_of(await self._held(delivery))

    async def ensure_state_exists(self, delivery: Delivery) -> str:
        """The ETag of the delivery's state, which is created with the value None if there is none. Raises LeaseLost."""
        for _ in range(ATTEMPTS):
            record = await self._held(delivery)
            existing = await self._state_of(record)
            if existing is not None:
                return existing.etag
            try:
                return await self.save_state(delivery, None, etag=None)
            except StateConflict:
                continue  # Somebody with the same lease created it in between.
        raise StoreError(f"the state of message {delivery.id} keeps changing; try again")

    async def _held(self, delivery: Delivery) -> Record:
        record = delivery.record
        if record is None:
            record = await self.load(delivery.namespace, delivery.queue, delivery.id)
        lifecycle.check_lease(None if record is None else record.status, delivery.lease_id, delivery.token)
        assert record is not None
        # Only now: a record under somebody else's lease is none of this delivery's.
        delivery.record = record
        return record

    async def save_state(
        self, delivery: Delivery, value: Any, *, etag: str | None = WHATEVER, write: Write | None = None
    ) -> str:
        """Write the state under the delivery's lease; its new ETag.

        ``etag``: the version to replace, None for "there is none yet", `WHATEVER` for any. ``write``: if the state is
        from this very one, it stands; if it is from a later one of the same writer, or was deleted by one, an
        unconditional save leaves it so: of what came in another order than it was sent, the last one sent stands.
        Raises LeaseLost, StateConflict (nothing changed), InvalidInput, TooLarge."""
        limit = self.config.max_state_bytes
        raw = msgspec.Raw(codec.encode_value(value, "the state")[0])
        for _ in range(ATTEMPTS):
            record = await self._held(delivery)
            now = self.clock.now_ms()
            existing = latest = await self._latest(record)
            expect = etag
            if latest is not None and write is not None and latest.write == write and not latest.gone:
                return latest.etag  # it came twice
            if etag == WHATEVER:
                if latest is not None and latest.later_than(write):
                    return latest.etag
                expect = latest.etag if latest else None
            if latest is not None and latest.gone:
                existing = None
                if etag is None:
                    if latest.later_than(write):
                        raise StateConflict(f"the state of message {delivery.id} was deleted after this save was sent")
                    expect = latest.etag
            created = existing.document.created_at if existing else now
            version = existing.document.version + 1 if existing else 1
            document = StateDocument(STATE_FORMAT, raw, created, now, version)
            own = 0
            if write is not None:
                own = len(_encoder.encode(write._asdict())) - 1  # not the caller's, so not of what he may take
                document = _Numbered(STATE_FORMAT, raw, created, now, version, *write)
            data = _encoder.encode(document)
            if len(data) - own > limit:
                raise TooLarge(f"the state takes {len(data) - own} bytes, more than the limit of {limit}")
            written = await self._write_state(delivery, PutState(record.item, record.mark, expect, data), etag)
            if written is not None:
                return written
        raise StoreError(f"the state of message {delivery.id} keeps changing; try again")

    async def delete_state(self, delivery: Delivery, *, etag: str = WHATEVER, write: Write | None = None) -> None:
        """Delete the state under the delivery's lease; fine when there is none. ``write``: as for a save; a note of it
        stays until the ack, so that no earlier save brings the state back. Raises LeaseLost, StateConflict."""
        for _ in range(ATTEMPTS):
            record = await self._held(delivery)
            latest = await self._latest(record)
            if latest is not None and latest.later_than(write) and (latest.gone or etag == WHATEVER):
                return
            if etag != WHATEVER and (latest is None or latest.gone):
                raise StateConflict(f"message {delivery.id} has no state (any more)")
            op: Op
            if write is not None:
                # Even if there is none: an earlier write may be on its way.
                now = self.clock.now_ms()
                data = _encoder.encode(_Numbered(STATE_FORMAT, None, now, now, 1, *write, gone=True))
                before = None if latest is None else latest.etag
                op = PutState(record.item, record.mark, before if etag == WHATEVER else etag, data)
            elif latest is None or latest.gone:
                # No write will tell whether the lease still is the current one.
                delivery.record = None
                await self._held(delivery)
                return
            else:
                op = DropState(record.item, record.mark, latest.etag if etag == WHATEVER else etag)
            if await self._write_state(delivery, op, etag) is not None:
                return
        raise StoreError(f"the state of message {delivery.id} keeps changing; try again")

    async def _write_state(self, delivery: Delivery, op: Op, etag: str | None) -> str | None:
        """The new ETag; None when the write has to be decided anew."""
        [outcome] = await self.store.write((op,))
        if isinstance(outcome, StateWritten):
            return outcome.etag
        assert isinstance(outcome, Conflict)
        if outcome.cause is Cause.STATE:
            if etag != WHATEVER:
                raise StateConflict(f"the state of message {delivery.id} is not at version {etag or 'none'} any more")
        else:
            delivery.record = None
        return None
