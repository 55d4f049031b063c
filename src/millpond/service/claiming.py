"""Claim: how messages leave the queue for a consumer.

Invariant: a delivery is one conditional write that holds attempts, visibility, lease and fencing token together.

Where candidates come from depends on the store. One that can choose and write in one step (``capabilities.takes``) is
asked for as many messages as are wanted, and nobody competes for any. From any other they are taken out of the ready
cache, and the one of several takers whose write comes first has the message. A consumer that waits gets its candidate
from the dispatcher, by way of the ready cache, in either case.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import NamedTuple

from millpond import lifecycle
from millpond.errors import InvalidInput, LeaseLost, MillpondError, StoreError
from millpond.model.codec import encode
from millpond.model.message import Status
from millpond.service.config import QueuePolicy, milliseconds, short_text
from millpond.service.consuming import Consuming, Delivery
from millpond.service.core import QueueKey
from millpond.service.ready import ReadyCache, Record
from millpond.stores.base import Box, Conflict, Item, Mark, Remove, Stored, Update, Updated

log = logging.getLogger("millpond.service")

HAND_OUT_LIMIT = 30_000
"""Milliseconds for which a candidate counts as being handed out; a taker that vanished blocks it no longer."""

_LIVE = Box.LIVE  # Looking a member up in its class is slow (Python 3.11).

MAX_TAKE = 1000
"""Messages of one write to a store that chooses for itself; a larger claim is several, so that no writer waits long."""


class Grant(NamedTuple):
    """What a claim asks for, and what the queue's policy says of those that cannot be delivered."""

    visibility: int | None
    """Milliseconds; None for each message's own."""
    owner: str | None
    txn_id: str | None
    bury_exhausted: bool
    bury_expired: bool


Plan = tuple[Record, lifecycle.Deliver | lifecycle.Bury | lifecycle.Discard]
"""A record, and what is being written about it."""


class Claiming(Consuming):
    """Hand-out."""

    async def claim(
        self,
        namespace: str | None,
        queue: str,
        limit: int = 1,
        *,
        visibility: float | None = None,
        owner: str | None = None,
        txn_id: str | None = None,
        candidates: Sequence[Record] = (),
        check_only: bool = False,
    ) -> list[Delivery]:
        """Lease up to ``limit`` ready messages, in order of priority and due time; [] when none is ready.

        ``candidates`` (from `next_candidate` or the dispatcher) are tried first. ``check_only``: nothing is leased, but
        the arguments are checked. ``visibility`` in seconds overrides the messages' own for these deliveries. Messages
        whose time or budget is over are settled on the way. Raises InvalidQueue, InvalidInput, StoreError; a claim that
        is cancelled gives back what it had leased.
        """
        key = self.key(namespace, queue)
        wish = None if visibility is None else milliseconds(visibility, "visibility", positive=True)
        owner, txn_id = short_text(owner, "owner"), short_text(txn_id, "txn_id")
        if limit.__class__ is not int or limit < 1:
            raise InvalidInput(f"count must be a whole number, at least one, not {limit!r}")
        if check_only:
            return []
        cache = self.cache(key)
        defaults = self.defaults_at_hand(key)
        try:
            if defaults is None:
                defaults = await self.defaults(key)
            policy = defaults.policy
            if policy.paused:
                self.give_back(candidates)
                return []
        except BaseException:
            self.give_back(candidates)
            raise
        grant = self.grant(policy, wish, owner, txn_id)
        deliveries: list[Delivery] = []
        try:
            if not self.takes:
                await self._claim_cached(key, cache, list(reversed(candidates)), limit, grant, deliveries)
            elif not candidates:
                await self._take(key, cache, limit, grant, deliveries)
            else:
                await self._claim_candidates(key, cache, candidates, limit, grant, deliveries)
            await self.load_payloads(deliveries)
        except StoreError:
            # What was leased is the caller's; the store's trouble will meet the next call.
            if not deliveries:
                raise
        except asyncio.CancelledError:
            if deliveries:
                self.spawn(asyncio.create_task(self._put_back(deliveries)))
            raise
        return deliveries

    @staticmethod
    def grant(policy: QueuePolicy, visibility: int | None, owner: str | None, txn_id: str | None) -> Grant:
        """A consumer's wish, and the policy's."""
        return Grant(
            visibility, owner, txn_id, policy.on_exhausted == "dead_letter", policy.on_expired == "dead_letter"
        )

    # From a store that chooses and writes in one step

    async def _take(
        self, key: QueueKey, cache: ReadyCache, limit: int, grant: Grant, deliveries: list[Delivery]
    ) -> None:
        if cache.dry and not await self._look(key, cache):
            return
        plans: list[Plan] = []
        now = self.clock.now_ms()
        judge = self._judge

        def decide(stored: Stored) -> tuple[Update | Remove, Plan] | None:
            try:
                record = self.record(stored)
            except MillpondError as error:
                # One record that cannot be read must not keep the others from being delivered.
                self.report_unreadable(cache, stored, error)
                return None
            judged = judge(record, now, grant)
            if judged is None:
                return None
            plan = (record, judged[1])
            plans.append(plan)
            return judged[0], plan

        while True:
            wanted = min(limit - len(deliveries), MAX_TAKE)
            try:
                taken = await self.store.take(*key, now, limit=wanted, decide=decide)
            except asyncio.CancelledError:
                if plans:
                    self.spawn(asyncio.create_task(self._undo_claims(plans)))
                raise
            if taken and not cache.asleep:
                cache.sleep()
            settled = False
            for (record, verdict), outcome in taken:
                if outcome.__class__ is Updated and verdict.__class__ is lifecycle.Deliver:
                    self._delivered(record, verdict.status, outcome.mark, outcome.payload, deliveries)
                else:
                    settled = True
                    self._given_up(record, verdict)
            if deliveries:
                self._arm(key, cache, deliveries)
            if len(deliveries) >= limit:
                return
            if len(taken) < wanted and not settled:
                cache.dry = True
                return
            # Some were settled undelivered: others of their ordering groups may be ready now.
            plans.clear()
            now = self.clock.now_ms()

    async def _look(self, key: QueueKey, cache: ReadyCache) -> bool:
        """Whether anything is ready: a read, so that consumers of an empty queue keep no writer waiting."""
        page = await self.store.ready(*key, self.clock.now_ms(), limit=1)
        self.stats.list_scans += 1
        self.stats.list_objects += len(page.records)
        if page.records:
            return True
        if cache.asleep:
            cache.next_due = page.next_due
        return False

    async def _claim_candidates(
        self,
        key: QueueKey,
        cache: ReadyCache,
        candidates: Sequence[Record],
        limit: int,
        grant: Grant,
        deliveries: list[Delivery],
    ) -> None:
        """First what the dispatcher found for this consumer."""
        self.give_back(candidates[limit:])
        try:
            await self._lease(cache, candidates[:limit], grant, deliveries)
        except StoreError:
            self.give_back(candidates)
            raise
        if cache.asleep or len(cache) or cache.more:
            if len(deliveries) < limit:
                await self._take(key, cache, limit, grant, deliveries)
        else:
            cache.dry = True

    # From the ready cache

    async def _claim_cached(
        self,
        key: QueueKey,
        cache: ReadyCache,
        waiting: list[Record],
        limit: int,
        grant: Grant,
        deliveries: list[Delivery],
    ) -> None:
        """``waiting``: candidates to try first, the first of them last."""
        offered = bool(waiting)
        while len(deliveries) < limit:
            taken: list[Record] = []
            try:
                now = self.clock.now_ms()
                shared = False
                if offered and cache.paid and not waiting and not len(cache) and cache.is_complete(now):
                    break  # Somebody else has what was offered: no reason to pay for a look at all of the queue.
                if not waiting and cache.wants_refill(now, self.clock.monotonic()):
                    shared = not await self.refill(key, limit - len(deliveries))
                taken = self.pop_candidates(cache, waiting, limit - len(deliveries), now)
                if not taken:
                    if shared and cache.more:
                        continue  # Others were faster at what was read for them.
                    break
                lost = await self._lease(cache, taken, grant, deliveries)
            except StoreError:
                self.give_back(taken)
                self.give_back(waiting)
                raise
            if lost:
                cache.lost_race()
            else:
                cache.won_race()
                if not cache.more and not len(cache) and not waiting and len(taken) == len(deliveries):
                    break
        self.give_back(waiting)

    def pop_candidates(self, cache: ReadyCache, waiting: list[Record], count: int, now: int) -> list[Record]:
        """Up to ``count`` records, of ``waiting`` and then of the cache, marked as being handed out."""
        taken: list[Record] = []
        until = now + HAND_OUT_LIMIT
        while len(taken) < count:
            if waiting:
                taken.append(waiting.pop())
                continue
            record = cache.pop_spread(until, self.ids.below(cache.spread)) if cache.spread else cache.pop(until)
            if record is None:
                break
            taken.append(record)
        return taken

    async def _lease(self, cache: ReadyCache, taken: Sequence[Record], grant: Grant, deliveries: list[Delivery]) -> int:
        """Write what the life cycle says of each; append the deliveries; how many races were lost."""
        now = self.clock.now_ms()
        ops: list[Update | Remove] = []
        plans: list[Plan] = []
        for record in taken:
            judged = self._judge(record, now, grant)
            if judged is None:
                cache.settle(record.item.id)
                cache.arm(record.status.visible_at)
                continue
            ops.append(judged[0])
            plans.append((record, judged[1]))
        if not ops:
            return 0
        try:
            outcomes = await self.store.write(ops)
        except asyncio.CancelledError:
            self.spawn(asyncio.create_task(self._undo_claims(plans)))
            raise
        lost = 0
        for (record, verdict), outcome in zip(plans, outcomes, strict=True):
            cache.settle(record.item.id)
            if outcome.__class__ is Conflict:
                lost += 1
            elif isinstance(verdict, lifecycle.Deliver):
                assert isinstance(outcome, Updated)
                self._delivered(record, verdict.status, outcome.mark, outcome.payload, deliveries)
            else:
                self._given_up(record, verdict)
        if deliveries:
            self._arm((taken[0].item.namespace, taken[0].item.queue), cache, deliveries)
        return lost

    # Either way

    def _judge(
        self, record: Record, now: int, grant: Grant
    ) -> tuple[Update | Remove, lifecycle.Deliver | lifecycle.Bury | lifecycle.Discard] | None:
        """The write that the life cycle wants for a record whose turn it is; None: not now."""
        visibility, owner, txn_id, bury_exhausted, bury_expired = grant
        verdict = lifecycle.deliver(
            record.head,
            record.status,
            now,
            visibility=visibility,
            lease_id=self.ids.lease_id(),
            owner=owner,
            txn_id=txn_id,
            bury_exhausted=bury_exhausted,
            bury_expired=bury_expired,
        )
        if verdict.__class__ is lifecycle.Deliver:
            assert isinstance(verdict, lifecycle.Deliver)
            status = verdict.status
            # update(), written out: this is paid per delivery.
            op = Update(
                record.item,
                record.mark,
                status.visible_at,
                True,
                status.expires_at,
                _LIVE,
                encode(status),
                record.payload is None,
            )
            return op, verdict
        if isinstance(verdict, lifecycle.Wait):
            return None
        if isinstance(verdict, lifecycle.Bury):
            return self.update(record, verdict.status), verdict
        return Remove(record.item, record.mark), verdict

    @staticmethod
    def _delivered(
        record: Record, status: Status, mark: Mark, payload: bytes | None, deliveries: list[Delivery]
    ) -> None:
        item, lease = record.item, status.lease
        assert lease is not None
        leased = Record(item, mark, record.head, status)
        if item.external:
            payload = None
        elif record.payload is not None:
            payload = record.payload
        deliveries.append(Delivery(item.namespace, item.queue, item.id, lease.id, lease.token, leased, payload, leased))

    def _arm(self, key: QueueKey, cache: ReadyCache, deliveries: Sequence[Delivery]) -> None:
        """The first of these leases to end is the next time to look."""
        due = min([delivery.record.mark.due for delivery in deliveries if delivery.record is not None])
        cache.arm(due)
        self.on_due(*key, due)

    def _given_up(self, record: Record, verdict: lifecycle.Bury | lifecycle.Discard | lifecycle.Deliver) -> None:
        self.gone(record.item)
        self.log_end(record, verdict)

    async def load_payloads(self, deliveries: Sequence[Delivery]) -> None:
        """Read the inline payloads that did not come with their messages: after all of a claim's writes, so that who
        is cancelled meanwhile has everything that was leased among the deliveries."""
        for delivery in deliveries:
            if delivery.payload is None and delivery.record is not None and not delivery.record.item.external:
                await self._load_payload(delivery, delivery.record.item)

    async def _load_payload(self, delivery: Delivery, item: Item) -> None:
        """The store handed out the message without its payload: ask for it, and keep the reason if it cannot be read.
        The message is the consumer's all the same, who meets the error when it looks at the payload, and nacks."""
        try:
            delivery.payload = await self.store.payload(item)
        except MillpondError as error:
            delivery.trouble = type(error)(str(error))

    async def _undo_claims(self, plans: Sequence[Plan]) -> None:
        """A claim was cancelled while its write was under way: what it leased goes back at once, without a failure."""
        for record, verdict in plans:
            cache = self.cached(record.item)
            if cache is not None:
                cache.settle(record.item.id)
                cache.dirty = True
            if not isinstance(verdict, lifecycle.Deliver):
                continue
            lease = verdict.status.lease
            assert lease is not None
            item = record.item
            try:
                await self.decided(item.namespace, item.queue)
                await self.defer(Delivery(item.namespace, item.queue, item.id, lease.id, lease.token))
            except LeaseLost:
                # The claim had not gone through, or somebody has taken the message since. If it is free, those who wait
                # do not know that they may have it.
                self.on_ready(item.namespace, item.queue)
            except MillpondError as error:
                log.warning(
                    "millpond.claim.not_given_back",
                    extra={"queue": item.queue, "message_id": item.id, "reason": str(error)},
                )

    async def _put_back(self, deliveries: list[Delivery]) -> None:
        """A claim was cancelled after some of its writes: what they leased goes back at once, without a failure."""
        try:
            await self.defer_many(deliveries)
        except MillpondError as error:
            log.warning("millpond.claim.not_given_back", extra={"reason": str(error)})

    def give_back(self, candidates: Sequence[Record]) -> None:
        """Candidates that will not be claimed are at hand again for the next taker."""
        for record in candidates:
            cache = self.cached(record.item)
            if cache is not None and cache.is_inflight(record.item.id):
                cache.give_back(record)
                self.stats.inflight_clears += 1
