"""Answers: how consumers settle what they were given.

Invariants: every answer carries lease id and token and is judged by the life cycle against the record as it is, so that
a stale one changes nothing; and an answer that only lost to the holder's own other write (an extension under way) is
judged again.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple
from zlib import crc32

import msgspec

from millpond import lifecycle
from millpond.errors import (
    LeaseLost,
    MessageNotFound,
    MillpondError,
    StoreError,
)
from millpond.model.message import Lease, Status
from millpond.service.config import (
    DEFAULT_OPTIONS,
    EnqueueOptions,
    QueuePolicy,
    error_value,
    milliseconds,
    reason_text,
)
from millpond.service.core import ATTEMPTS, QueueKey
from millpond.service.payloads import check
from millpond.service.producing import Producing, Receipt
from millpond.service.ready import Record
from millpond.stores.base import Conflict, Item, Op, Outcome, Remove, Removed, Updated

log = logging.getLogger("millpond.service")


class Delivery(msgspec.Struct, eq=False, gc=False):
    """One delivery of a message, and the right to answer for it.

    The garbage collector does not look at these (it had 3 % of a batch's time), so nothing in one may lead back to
    it: an exception is kept without its traceback, whose frames do."""

    namespace: str
    queue: str
    id: str
    lease_id: str
    token: int
    record: Record | None = None
    """As last seen or written by this holder; None when it has to be read first."""
    payload: bytes | None = None
    """The inline payload; None when it is stored apart or was not loaded."""
    given: Record | None = None
    """As it was delivered; None when this was made from ids alone."""
    intact: bool = False
    """The payload has met its checksum."""
    trouble: MillpondError | None = None
    """Why the payload cannot be read, if it cannot; without a traceback. Raise a copy."""
    holder: Callable[[Delivery], object] | None = None
    """Told when its consumer has answered, or may not any more."""


class HandOff(NamedTuple):
    """A message to enqueue in the same step as an ack."""

    namespace: str | None
    queue: str
    source: Any
    options: EnqueueOptions = DEFAULT_OPTIONS


class Plan(NamedTuple):
    """A write that an answer asks for, and what to do once it went through."""

    op: Op
    done: Callable[[Outcome], None]


class Consuming(Producing):
    """The consumers' half of the service."""

    # Answers

    async def _answer(self, delivery: Delivery, decide: Callable[[Record | None], Plan]) -> None:
        """Judge and write until the write meets the record that it was judged by."""
        for _ in range(ATTEMPTS):
            record = delivery.record
            if record is None:
                record = await self.load(delivery.namespace, delivery.queue, delivery.id)
            plan = decide(record)
            outcomes = await self.write((plan.op,))
            if outcomes[0].__class__ is not Conflict:
                plan.done(outcomes[0])
                return
            delivery.record = None
        raise StoreError(f"message {delivery.id} keeps changing under this answer; try again")

    async def _answer_many(
        self, deliveries: Sequence[Delivery], decide: Callable[[Delivery, Record | None], Plan]
    ) -> list[MillpondError | None]:
        """As `_answer` for each, in shared writes; what failed is returned in its place."""
        results: list[MillpondError | None] = [None] * len(deliveries)
        open_ = list(range(len(deliveries)))
        for _ in range(ATTEMPTS):
            plans: list[tuple[int, Plan]] = []
            for index in open_:
                delivery = deliveries[index]
                try:
                    record = delivery.record
                    if record is None:
                        record = await self.load(delivery.namespace, delivery.queue, delivery.id)
                    plans.append((index, decide(delivery, record)))
                except MillpondError as error:
                    results[index] = error
            if not plans:
                return results
            outcomes = await self.write([plan.op for _, plan in plans])
            open_ = []
            for (index, plan), outcome in zip(plans, outcomes, strict=True):
                if outcome.__class__ is Conflict:
                    deliveries[index].record = None
                    open_.append(index)
                else:
                    plan.done(outcome)
            if not open_:
                return results
        for index in open_:
            results[index] = StoreError(f"message {deliveries[index].id} keeps changing under this answer; try again")
        return results

    def _ack_plan(self, delivery: Delivery, record: Record | None) -> Plan:
        lifecycle.ack(None if record is None else record.status, delivery.lease_id, delivery.token)
        assert record is not None

        def done(outcome: Outcome) -> None:
            delivery.record = None
            self.acked(record.item)

        return Plan(Remove(record.item, record.mark), done)

    async def ack(self, delivery: Delivery, then: Sequence[HandOff] = ()) -> list[Receipt]:
        """The message is done: record, payload and state go in one step; with ``then``, those messages are enqueued in
        the same step. Raises LeaseLost (nothing changed), and what enqueue raises."""
        if then:
            return await self._hand_off(delivery, then)
        record = delivery.record
        if record is not None:
            # The common case without the detours: the record is as this holder last saw it.
            lifecycle.ack(record.status, delivery.lease_id, delivery.token)
            outcomes = await self.write((Remove(record.item, record.mark),))
            delivery.record = None
            if outcomes[0].__class__ is not Conflict:
                self.acked(record.item)
                return []
        await self._answer(delivery, lambda record: self._ack_plan(delivery, record))
        return []

    async def ack_many(self, deliveries: Sequence[Delivery]) -> list[MillpondError | None]:
        """Ack each on its own, in shared writes; what was refused is in the delivery's place."""
        ops: list[Remove] = []
        try:
            for delivery in deliveries:
                record = delivery.record
                if record is None:
                    return await self._answer_many(deliveries, self._ack_plan)
                lifecycle.ack(record.status, delivery.lease_id, delivery.token)
                ops.append(Remove(record.item, record.mark))
        except LeaseLost:
            return await self._answer_many(deliveries, self._ack_plan)
        # The common case without the detours: all records are as this holder last saw them.
        outcomes = await self.write(ops) if ops else []
        refused: list[int] = []
        gone: list[Item] = []
        for index, outcome in enumerate(outcomes):
            deliveries[index].record = None
            if outcome.__class__ is Conflict:
                refused.append(index)
            else:
                gone.append(ops[index].item)
        self.acked_many(gone)
        results: list[MillpondError | None] = [None] * len(deliveries)
        if refused:
            again = await self._answer_many([deliveries[index] for index in refused], self._ack_plan)
            for index, error in zip(refused, again, strict=True):
                results[index] = error
        return results

    async def _hand_off(self, delivery: Delivery, then: Sequence[HandOff]) -> list[Receipt]:
        capabilities = self.store.capabilities
        if not (capabilities.atomic_groups or capabilities.hand_offs):
            raise StoreError("this store cannot ack and enqueue in one step; enqueue first, with a dedup_key, then ack")
        drafts = []
        for hand_off in then:
            key = self.key(hand_off.namespace, hand_off.queue)
            drafts.append(await self._draft(key, await self.defaults(key), hand_off.source, hand_off.options))
        duplicates: dict[int, Outcome] = {}
        for _ in range(ATTEMPTS):
            record = delivery.record
            if record is None:
                record = await self.load(delivery.namespace, delivery.queue, delivery.id)
            plan = self._ack_plan(delivery, record)
            indexes = [index for index in range(len(drafts)) if index not in duplicates]
            outcomes = await self.commit([plan.op, *(drafts[index].op for index in indexes)])
            if isinstance(outcomes[0], Removed):
                plan.done(outcomes[0])
                results = dict(zip(indexes, outcomes[1:], strict=True)) | duplicates
                for index, draft in enumerate(drafts):
                    self._tell((draft.head.namespace, draft.head.queue), (draft,), (results[index],))
                return [self._receipt(draft, results[index]) for index, draft in enumerate(drafts)]
            for index, outcome in zip(indexes, outcomes[1:], strict=True):
                # A message that is there already needs no second enqueue; the others and the ack are tried again.
                if isinstance(outcome, Conflict) and outcome.cause.value in ("unique", "exists"):
                    duplicates[index] = outcome
            delivery.record = None
        raise StoreError(f"message {delivery.id} keeps changing under this hand-off; try again")

    def _changed_plan(self, delivery: Delivery, record: Record, status: Status) -> Plan:
        def done(outcome: Outcome) -> None:
            assert isinstance(outcome, Updated)
            after = Record(record.item, outcome.mark, record.head, status, delivery.payload)
            if status.lease is not None:
                delivery.record = after
                self.on_due(record.item.namespace, record.item.queue, status.visible_at)
            else:
                delivery.record = None
                if status.dead is None:
                    self.changed(after)
                else:
                    self.gone(record.item)
                    self.log_end(record, lifecycle.Bury(status))

        return Plan(self.update(record, status), done)

    def error_value(self, error: Any) -> Any:
        """A consumer's error as it is kept: an exception by type and text. Raises InvalidInput, TooLarge."""
        return error_value(error, self.config.max_error_bytes)

    def _nack_plan(
        self, delivery: Delivery, record: Record | None, delay: int, error: Any, policy: QueuePolicy
    ) -> Plan:
        if record is None:
            lifecycle.check_lease(None, delivery.lease_id, delivery.token)
            raise AssertionError("unreachable: a message that is gone has no lease")
        result = lifecycle.nack(
            record.head,
            record.status,
            self.clock.now_ms(),
            delivery.lease_id,
            delivery.token,
            delay=delay,
            error=error,
            bury_exhausted=policy.on_exhausted == "dead_letter",
        )
        if isinstance(result, lifecycle.Discard):
            discard = result

            def done(outcome: Outcome) -> None:
                delivery.record = None
                self.gone(record.item)
                self.log_end(record, discard)

            return Plan(Remove(record.item, record.mark), done)
        return self._changed_plan(delivery, record, result.status if isinstance(result, lifecycle.Bury) else result)

    async def nack(self, delivery: Delivery, *, delay: float = 0.0, error: Any = None) -> None:
        """The consumer failed: a failure is counted, and the message returns after ``delay`` seconds, or becomes a dead
        letter at once if its budget is spent. Raises LeaseLost, InvalidInput, TooLarge."""
        wait, kept = milliseconds(delay, "delay"), self.error_value(error)
        policy = await self.policy((delivery.namespace, delivery.queue))
        await self._answer(delivery, lambda record: self._nack_plan(delivery, record, wait, kept, policy))

    async def nack_many(
        self, deliveries: Sequence[Delivery], *, delay: float = 0.0, error: Any = None
    ) -> list[MillpondError | None]:
        """Nack each on its own, in shared writes."""
        wait, kept = milliseconds(delay, "delay"), self.error_value(error)
        policies: dict[QueueKey, QueuePolicy] = {}
        for delivery in deliveries:
            key = (delivery.namespace, delivery.queue)
            if key not in policies:
                policies[key] = await self.policy(key)
        return await self._answer_many(
            deliveries,
            lambda delivery, record: self._nack_plan(
                delivery, record, wait, kept, policies[delivery.namespace, delivery.queue]
            ),
        )

    def _defer_plan(self, delivery: Delivery, record: Record | None, delay: int) -> Plan:
        status = lifecycle.defer(
            None if record is None else record.status,
            self.clock.now_ms(),
            delivery.lease_id,
            delivery.token,
            delay=delay,
        )
        assert record is not None
        return self._changed_plan(delivery, record, status)

    async def defer(self, delivery: Delivery, *, delay: float = 0.0) -> None:
        """Give the message back without a failure, visible after ``delay`` seconds. Raises LeaseLost, InvalidInput."""
        wait = milliseconds(delay, "delay")
        await self._answer(delivery, lambda record: self._defer_plan(delivery, record, wait))

    async def defer_many(self, deliveries: Sequence[Delivery], *, delay: float = 0.0) -> list[MillpondError | None]:
        """Defer each on its own, in shared writes."""
        wait = milliseconds(delay, "delay")
        return await self._answer_many(deliveries, lambda delivery, record: self._defer_plan(delivery, record, wait))

    def _extend_plan(self, delivery: Delivery, record: Record | None, extension: int) -> Plan:
        status = lifecycle.extend(
            None if record is None else record.status,
            self.clock.now_ms(),
            delivery.lease_id,
            delivery.token,
            extension=extension,
        )
        assert record is not None
        return self._changed_plan(delivery, record, status)

    async def extend(self, delivery: Delivery, seconds: float) -> Lease:
        """The lease now ends ``seconds`` (> 0) from now; its new form. Raises LeaseLost, InvalidInput."""
        extension = milliseconds(seconds, "an extension", positive=True)
        await self._answer(delivery, lambda record: self._extend_plan(delivery, record, extension))
        record = delivery.record
        if record is None or record.status.lease is None:
            raise LeaseLost("the message was settled while its lease was being extended")
        return record.status.lease

    async def extend_many(self, deliveries: Sequence[Delivery], seconds: float) -> list[MillpondError | None]:
        """Extend each on its own, in shared writes."""
        extension = milliseconds(seconds, "an extension", positive=True)
        return await self._answer_many(
            deliveries, lambda delivery, record: self._extend_plan(delivery, record, extension)
        )

    async def bury(self, delivery: Delivery, reason: str, *, error: Any = None) -> None:
        """The holder gives the message up for good: a dead letter with this reason. Raises LeaseLost, TooLarge."""
        reason = reason_text(reason, self.config.max_error_bytes)
        kept = self.error_value(error)

        def decide(record: Record | None) -> Plan:
            lifecycle.check_lease(None if record is None else record.status, delivery.lease_id, delivery.token)
            assert record is not None
            status = lifecycle.bury(record.status, self.clock.now_ms(), reason, error=kept)
            return self._changed_plan(delivery, record, status)

        await self._answer(delivery, decide)

    def log_end(self, record: Record, verdict: lifecycle.Verdict) -> None:
        """Log that a message was given up."""
        item = record.item
        extra = {"namespace": item.namespace, "queue": item.queue, "message_id": item.id}
        if isinstance(verdict, lifecycle.Bury):
            dead = verdict.status.dead
            extra |= {"reason": dead.reason if dead else ""}
            log.warning("millpond.message.dead_lettered", extra=extra)
        elif isinstance(verdict, lifecycle.Discard):
            log.info("millpond.message.discarded", extra=extra | {"reason": verdict.reason})

    # Payloads

    def payload_chunks(self, record: Record) -> AsyncIterator[bytes]:
        """The payload in chunks, wherever it is stored. Raises MessageNotFound, StoreCorrupt while reading: damage of a
        payload stored apart shows after its last chunk."""
        return self._payload_chunks(record)

    async def _payload_chunks(self, record: Record) -> AsyncIterator[bytes]:
        if record.item.external:
            checksum = 0
            async for chunk in self.store.read_blob(record.item):
                checksum = crc32(chunk, checksum)
                yield chunk
            check(record.head, checksum)
            return
        data = record.payload
        if data is None:
            data = await self.store.payload(record.item)
        if data is None:
            raise MessageNotFound(f"message {record.item.id} is gone")
        check(record.head, crc32(data))
        yield data
