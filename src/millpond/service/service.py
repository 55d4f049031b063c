"""`QueueService`: every operation of the queue, over any store. All policy is here and in the life cycle.

Methods may be called concurrently. Safety between processes comes from conditional writes alone; nothing is locked
while the store works.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from millpond import lifecycle
from millpond.errors import InvalidInput, LeaseLost, MessageNotFound, MillpondError, StoreError
from millpond.model import names
from millpond.model.message import Lease, Status
from millpond.service.config import QueuePolicy, changed_policy, check_count, milliseconds, short_text
from millpond.service.consuming import Delivery
from millpond.service.core import ATTEMPTS, QueueKey, log
from millpond.service.feeding import Receives
from millpond.service.ready import ReadyCacheStats, Record
from millpond.service.states import States
from millpond.stores.base import Box, Cause, Conflict, Counts, Op, QueueName, Remove, Removed, Updated

if TYPE_CHECKING:
    from millpond.service.operations import Waiter

PAGE = 500
"""Records per page when a whole box is worked through: bounded memory, shared commits."""


class MessageListResult(NamedTuple):
    """A page of messages in order of insertion."""

    records: list[Record]
    next_after: int | None
    """Pass it as ``after`` for the next page; None when this was the last."""

    @property
    def truncated(self) -> bool:
        """There are more."""
        return self.next_after is not None


class QueueService(States):
    """The queue's operations under the names of lockd's queue package, in snake_case, and what consumers call."""

    waiter: Waiter | None = None
    """Waits for those who come to receive (the dispatcher); without one nobody waits."""

    # Receiving

    def stream(
        self, namespace: str, queue: str, *, credit: int, visibility: float | None = None, owner: str | None = None
    ) -> Receives:
        """Where a stream gets its deliveries from; that no more than ``credit`` are unanswered is the stream's to see
        to. Names are known to be good."""
        return Receives(self, namespace, queue, visibility, owner)

    async def receive(
        self,
        namespace: str,
        queue: str,
        count: int,
        *,
        wait: float | timedelta = 0.0,
        visibility: float | None = None,
        owner: str | None = None,
    ) -> list[Delivery]:
        """As `claim`, but wait up to ``wait`` seconds for the first message. Names are known to be good. Raises
        TooManyConsumers besides."""
        patience = milliseconds(wait, "wait") / 1000
        waiter = self.waiter
        if waiter is None or not patience:
            return await self.claim(namespace, queue, count, visibility=visibility, owner=owner)
        deliveries = await self.claim(
            namespace,
            queue,
            count,
            visibility=visibility,
            owner=owner,
            check_only=waiter.looks_after(namespace, queue),
        )
        if deliveries:
            return deliveries
        end = self.clock.monotonic() + patience
        while (remaining := end - self.clock.monotonic()) > 0:
            candidate = await waiter.wait(namespace, queue, timeout=remaining)
            if candidate is None:
                break
            deliveries = await self.claim(
                namespace, queue, count, visibility=visibility, owner=owner, candidates=(candidate,)
            )
            if deliveries:
                return deliveries
        return []

    async def notify(self, namespace: str, queue: str) -> None:
        """The queue may have changed: who waits looks at once."""
        self.foreign_change(namespace, queue)
        if self.waiter is not None:
            self.waiter.notify(namespace, queue)

    async def until_due(self, namespace: str | None, queue: str) -> float | None:
        """Seconds until the earliest message that is not ready now comes due; None when there is none."""
        now = self.clock.now_ms()
        page = await self.store.ready(*self.key(namespace, queue), now, limit=1)
        return None if page.next_due is None else max(0.0, (page.next_due - now) / 1000)

    # Looking

    async def get_message(self, namespace: str | None, queue: str, id: str) -> Record:
        """The message, live or dead, held or not. Raises MessageNotFound, InvalidMessageId."""
        key = self.key(namespace, queue)
        record = await self.load(*key, names.message_id(id))
        if record is None:
            raise MessageNotFound(f"there is no message {id} in queue {key[1]} of namespace {key[0]}")
        return record

    def state_of(self, record: Record) -> str:
        """How the message stands now: ``ready``, ``delayed``, ``leased``, ``lapsed`` or ``dead``."""
        return lifecycle.state_of(record.status, self.clock.now_ms()).value

    async def list_messages(
        self, namespace: str | None, queue: str, *, after: int | None = None, limit: int = 100, box: Box = Box.LIVE
    ) -> MessageListResult:
        """Messages in order of insertion, whatever their visibility. A record that cannot be read is left out and
        logged. Raises InvalidQueue, InvalidInput."""
        limit = check_count(limit, "limit")
        page = await self.store.list(*self.key(namespace, queue), box, after=after, limit=limit)
        records = []
        for stored in page.records:
            try:
                records.append(self.record(stored))
            except MillpondError as error:
                log.error(
                    "millpond.record.unreadable",
                    extra={"queue": queue, "message_id": stored.item.id, "reason": str(error)},
                )
        return MessageListResult(records, page.next_after)

    async def get_payload(self, namespace: str | None, queue: str, id: str) -> AsyncIterator[bytes]:
        """The payload in chunks. Raises MessageNotFound."""
        return self.payload_chunks(await self.get_message(namespace, queue, id))

    async def ensure_message_ready(self, namespace: str | None, queue: str, id: str) -> None:
        """Check that record and payload are both there. Raises MessageNotFound, StoreCorrupt."""
        record = await self.get_message(namespace, queue, id)
        async for _ in self.payload_chunks(record):
            break

    async def counts(self, namespace: str | None, queue: str) -> Counts:
        """How the queue stands now."""
        return await self.store.counts(*self.key(namespace, queue), self.clock.now_ms())

    async def list_queues(self) -> list[QueueName]:
        """Every queue in the store."""
        return await self.store.queues()

    # Candidates

    async def next_candidate(self, namespace: str | None, queue: str) -> Record | None:
        """The next ready message, taken out of this process's ready cache: claim it, or give it back. None when nothing
        is ready or the queue is paused."""
        found = await self.next_candidates(namespace, queue, 1)
        return found[0] if found else None

    async def next_candidates(self, namespace: str | None, queue: str, limit: int) -> list[Record]:
        """Up to ``limit`` ready messages, taken out of the ready cache for the caller to claim or give back."""
        key = self.key(namespace, queue)
        self.stats.next_calls += 1
        # Where a read costs money, the policy of a queue in which there is nothing is not read, unless it was paused.
        late = self.costs and not self._known_paused(key)
        if not late and (await self.policy(key)).paused:
            return []
        cache = self.cache(key)
        while True:
            now = self.clock.now_ms()
            shared = cache.wants_refill(now, self.clock.monotonic()) and not await self.refill(key, limit, hinted=True)
            found = self.pop_candidates(cache, [], limit, now)
            if found or not shared or not cache.more:
                break
        if found and late:
            try:
                paused = (await self.policy(key)).paused
            except BaseException:
                self.give_back(found)
                raise
            if paused:
                self.give_back(found)
                return []
        return found

    def _known_paused(self, key: QueueKey) -> bool:
        known = self._policies.get(key)
        return known is not None and known.defaults.policy.paused

    def last_look(self, namespace: str, queue: str) -> float | None:
        """When the store was last asked what is ready in the queue (monotonic time), if nothing was left then and
        nothing has been heard since; None when there is a reason to ask, or something at hand."""
        cache = self.cache((namespace, queue))
        return None if len(cache) or cache.more or cache.dirty else cache.loaded_at

    async def peek_candidate(self, namespace: str | None, queue: str) -> Record | None:
        """The message that would be handed out next, left where it is."""
        found = await self.peek(namespace, queue, 1)
        return found[0] if found else None

    async def peek(self, namespace: str | None, queue: str, limit: int) -> list[Record]:
        """The first ready messages, left where they are; read from the store, so that it disturbs no consumer."""
        limit = check_count(limit, "count")
        page = await self.store.ready(*self.key(namespace, queue), self.clock.now_ms(), limit=limit)
        records = []
        for stored in page.records:
            try:
                records.append(self.record(stored))
            except MillpondError as error:
                log.error(
                    "millpond.record.unreadable",
                    extra={"queue": queue, "message_id": stored.item.id, "reason": str(error)},
                )
        return records

    async def refresh_ready_cache(self, namespace: str | None, queue: str) -> None:
        """Bring the queue's ready cache up to date now. Raises StoreError, also to callers who shared the read."""
        await self.refill(self.key(namespace, queue))

    def update_ready_cache(self, record: Record) -> None:
        """Tell the ready cache of a record's newest version (as read or written by the caller)."""
        self.cache((record.item.namespace, record.item.queue)).forget(record.item.id)
        if record.mark.box is Box.LIVE:
            self.cache((record.item.namespace, record.item.queue)).offer(record, self.clock.now_ms())

    def next_due(self, namespace: str, queue: str) -> int | None:
        """When the next message of the queue becomes due (ms UTC), as far as its ready cache knows. While it is paused,
        when that is to be seen to again, if at all: nothing comes due for anybody then, and who waits for it would look
        again and again."""
        known = self._policies.get((namespace, queue))
        if known is not None and known.defaults.policy.paused:
            return known.recheck
        return self.cache((namespace, queue)).next_due

    def enable_ready_cache_stats(self) -> None:
        """Does nothing: the counters are always on. Kept for those who know the call."""

    def ready_cache_stats(self) -> ReadyCacheStats:
        """A copy of the ready caches' counters, all of one moment."""
        return msgspec.structs.replace(self.stats)

    def reset_ready_cache_stats(self) -> None:
        """Set the counters to zero."""
        self.stats = ReadyCacheStats()

    # Single steps on a record, for those who drive the life cycle themselves

    async def _write_update(self, record: Record, status: Status) -> Record:
        [outcome] = await self.write((self.update(record, status),))
        if not isinstance(outcome, Updated):
            raise LeaseLost(f"message {record.item.id} was changed by somebody else; nothing was changed")
        return Record(record.item, outcome.mark, record.head, status, record.payload)

    async def increment_attempts(
        self, record: Record, *, visibility: float | None = None, owner: str | None = None, txn_id: str | None = None
    ) -> Delivery:
        """Deliver exactly this record: lease, fencing token, attempt and visibility in one write.

        Raises LeaseLost when it was changed since it was read, `millpond.lifecycle.NotPossible` never: a message that
        may not be delivered now is answered with LeaseLost, too. The caller's record is not changed.
        """
        found = await self.claim_records([record], visibility=visibility, owner=owner, txn_id=txn_id)
        if not found:
            raise LeaseLost(f"message {record.item.id} cannot be delivered from the version that was read")
        return found[0]

    async def claim_records(
        self,
        records: Sequence[Record],
        *,
        visibility: float | None = None,
        owner: str | None = None,
        txn_id: str | None = None,
    ) -> list[Delivery]:
        """Deliver these records, those of them that still are as they were read and may be delivered."""
        if not records:
            return []
        wish = None if visibility is None else milliseconds(visibility, "visibility", positive=True)
        owner, txn_id = short_text(owner, "owner"), short_text(txn_id, "txn_id")
        key = (records[0].item.namespace, records[0].item.queue)
        deliveries: list[Delivery] = []
        policy = await self.policy(key)
        try:
            await self._lease(self.cache(key), records, self.grant(policy, wish, owner, txn_id), deliveries)
            await self.load_payloads(deliveries)
        except asyncio.CancelledError:
            self.spawn(asyncio.create_task(self._put_back(deliveries)))
            raise
        return deliveries

    async def reschedule(self, delivery: Delivery, *, delay: float) -> None:
        """Visible again after ``delay`` seconds, no failure counted: `defer` under lockd's name."""
        await self.defer(delivery, delay=delay)

    async def extend_visibility(self, delivery: Delivery, extension: float) -> Lease:
        """The lease ends ``extension`` seconds from now: `extend` under lockd's name."""
        return await self.extend(delivery, extension)

    async def save_message_document(self, delivery: Delivery, *, last_error: Any) -> None:
        """Note an error on a held message without settling it. Raises LeaseLost, TooLarge.

        Counters, times and lease belong to the life cycle and cannot be written from outside."""
        kept = self.error_value(last_error)
        for _ in range(ATTEMPTS):
            record = await self._held(delivery)
            status = lifecycle.annotate(record.status, self.clock.now_ms(), kept)
            [outcome] = await self.write((self.update(record, status),))
            if isinstance(outcome, Updated):
                delivery.record = Record(record.item, outcome.mark, record.head, status)
                return
            delivery.record = None
        raise StoreError(f"message {delivery.id} keeps changing; try again")

    async def move_to_dlq(self, record: Record, reason: str = "moved") -> Record:
        """Make a message a dead letter whatever its state, by decision of an operator; its last error stays.

        Raises LeaseLost when it was changed since it was read, InvalidInput when it is one already."""
        try:
            status = lifecycle.bury(record.status, self.clock.now_ms(), str(self.error_value(reason)))
        except lifecycle.NotPossible as error:
            raise InvalidInput(f"message {record.item.id}: {error}") from error
        after = await self._write_update(record, status)
        self.gone(record.item)
        return after

    async def delete_message(self, record: Record, *, force: bool = False) -> None:
        """Remove a message that nobody holds (``force``: even then), with payload and state.

        Raises LeaseLost when it was changed since it was read or is held."""
        if not force and not lifecycle.deletable(record.status, self.clock.now_ms()):
            raise LeaseLost(f"message {record.item.id} is held by a consumer; it was not deleted")
        [outcome] = await self.write((Remove(record.item, record.mark),))
        if not isinstance(outcome, Removed):
            raise LeaseLost(f"message {record.item.id} was changed by somebody else; it was not deleted")
        self.gone(record.item)

    # Whole boxes

    async def _work_through(
        self, key: QueueKey, box: Box, decide: Callable[[Record], Op | None], done: Callable[[Record, Any], None]
    ) -> int:
        """Apply ``decide`` to each record of a box, page by page; how many writes went through. Records that change
        meanwhile are left as they are: whoever changed them decided."""
        after: int | None = None
        total = 0
        while True:
            page = await self.list_messages(*key, after=after, limit=PAGE, box=box)
            planned = [(record, op) for record in page.records if (op := decide(record)) is not None]
            total += await self._write_planned(planned, done)
            if page.next_after is None:
                return total
            after = page.next_after

    async def _write_planned(self, planned: Sequence[tuple[Record, Op]], done: Callable[[Record, Any], None]) -> int:
        """Write them; how many went through. A store that is asked for many may leave some out for no fault of theirs:
        these are tried again, and when none of them goes through the store says what is wrong."""
        total = 0
        while planned:
            outcomes = await self.write([op for _, op in planned])
            left_out = []
            for one, outcome in zip(planned, outcomes, strict=True):
                if not isinstance(outcome, Conflict):
                    total += 1
                    done(one[0], outcome)
                elif outcome.cause is Cause.ABORTED:
                    left_out.append(one)
            planned = left_out
        return total

    async def purge(self, namespace: str | None, queue: str) -> int:
        """Remove every live message that no consumer holds; how many. Dead letters stay."""
        key = self.key(namespace, queue)

        def decide(record: Record) -> Op | None:
            if not lifecycle.deletable(record.status, self.clock.now_ms()):
                return None
            return Remove(record.item, record.mark)

        count = await self._work_through(key, Box.LIVE, decide, lambda record, outcome: self.gone(record.item))
        log.info("millpond.queue.purged", extra={"namespace": key[0], "queue": key[1], "messages": count})
        return count

    async def purge_dead_letters(self, namespace: str | None, queue: str, ids: Sequence[str] | None = None) -> int:
        """Remove dead letters (all, or those with these ids); how many. Unknown ids raise MessageNotFound."""
        key = self.key(namespace, queue)

        def decide(record: Record) -> Op | None:
            return Remove(record.item, record.mark)

        count = await self._dead_letters(key, ids, decide, lambda record, outcome: None)
        log.info("millpond.dlq.purged", extra={"namespace": key[0], "queue": key[1], "messages": count})
        return count

    async def redrive(self, namespace: str | None, queue: str, ids: Sequence[str] | None = None) -> int:
        """Put dead letters (all, or those with these ids) back into their queue with a new budget; how many.

        Unknown ids raise MessageNotFound before anything is changed."""
        key = self.key(namespace, queue)
        fresh: dict[str, Status] = {}

        def decide(record: Record) -> Op | None:
            status = fresh[record.item.id] = lifecycle.redrive(record.head, record.status, self.clock.now_ms())
            return self.update(record, status)

        def done(record: Record, outcome: Any) -> None:
            status = fresh.pop(record.item.id)
            self.changed(Record(record.item, outcome.mark, record.head, status))

        count = await self._dead_letters(key, ids, decide, done)
        log.info("millpond.dlq.redriven", extra={"namespace": key[0], "queue": key[1], "messages": count})
        return count

    async def _dead_letters(
        self,
        key: QueueKey,
        ids: Sequence[str] | None,
        decide: Callable[[Record], Op | None],
        done: Callable[[Record, Any], None],
    ) -> int:
        if ids is None:
            return await self._work_through(key, Box.DEAD, decide, done)
        wanted = names.message_ids(ids)
        records = [await self.dead_letter(*key, id) for id in wanted]
        planned = [(record, op) for record in records if (op := decide(record)) is not None]
        return await self._write_planned(planned, done)

    async def dead_letter(self, namespace: str | None, queue: str, id: str) -> Record:
        """A dead letter by its id. Raises MessageNotFound, also for a message that is still alive."""
        record = await self.get_message(namespace, queue, id)
        if record.status.dead is None:
            raise MessageNotFound(f"message {id} is not a dead letter: it is still in queue {queue}")
        return record

    async def list_dead_letters(
        self, namespace: str | None, queue: str, *, after: str | None = None, limit: int = 100
    ) -> list[Record]:
        """Dead letters in order of insertion, from after the one with id ``after``. Raises MessageNotFound."""
        start = None if after is None else (await self.dead_letter(namespace, queue, after)).item.key
        return await self._listed(namespace, queue, start, limit, Box.DEAD)

    async def browse(
        self, namespace: str | None, queue: str, *, after: str | None = None, limit: int = 100
    ) -> list[Record]:
        """Live messages in order of insertion, from after the one with id ``after``. Raises MessageNotFound."""
        start = None if after is None else (await self.get_message(namespace, queue, after)).item.key
        return await self._listed(namespace, queue, start, limit, Box.LIVE)

    async def _listed(self, namespace: str | None, queue: str, start: int | None, limit: int, box: Box) -> list[Record]:
        while True:
            page = await self.list_messages(namespace, queue, after=start, limit=limit, box=box)
            if page.records or page.next_after is None:
                return page.records
            start = page.next_after  # A page of records that cannot be read; the next may have some that can.

    # Policy

    async def set_policy(self, namespace: str | None, queue: str, **fields: Any) -> QueuePolicy:
        """Change fields of the queue's policy, for messages enqueued from now on; the policy as it is then.

        Raises InvalidInput for unknown fields and values out of range."""
        key = self.key(namespace, queue)
        changed_policy(QueuePolicy(), fields)  # what is wrong for any policy is so before anything is read
        return await self.change_policy(key, lambda policy: changed_policy(policy, fields))

    async def reset_policy(self, namespace: str | None, queue: str) -> QueuePolicy:
        """Put the default policy in place of whatever the queue has, also of one that cannot be read. Safe to repeat.

        Raises StateConflict while others keep changing it."""
        key = self.key(namespace, queue)
        policy = await self.replace_policy(key, QueuePolicy())
        log.info("millpond.policy.reset", extra={"namespace": key[0], "queue": key[1]})
        return policy

    async def queue_policy(self, namespace: str | None, queue: str) -> QueuePolicy:
        """The queue's policy, read afresh."""
        return await self.policy(self.key(namespace, queue), fresh=True)

    async def pause(self, namespace: str | None, queue: str) -> None:
        """Hand nothing out until `resume`; what is held goes on. Safe to repeat."""
        await self.set_policy(namespace, queue, paused=True)

    async def resume(self, namespace: str | None, queue: str) -> None:
        """Hand out again. Safe to repeat."""
        await self.set_policy(namespace, queue, paused=False)

    # Ending

    async def close(self) -> None:
        """Wait for background work of this service to end."""
        while self.tasks:
            await asyncio.gather(*self.tasks, return_exceptions=True)
