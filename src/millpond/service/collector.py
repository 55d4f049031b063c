"""The collector: settles expired messages that nobody asks for, and removes what belongs to nothing.

Hand-out judges time to live on its own; the collector is for queues that nobody reads, and for the disk.
"""

from __future__ import annotations

import logging

import msgspec

from millpond import lifecycle
from millpond.errors import CryptoError, StoreCorrupt, StoreMismatch
from millpond.service.service import QueueService
from millpond.stores.base import Conflict, Op, Remove

log = logging.getLogger("millpond.collector")

BATCH = 500
"""Messages settled by one write."""


class Collected(msgspec.Struct, kw_only=True):
    """What a pass of the collector did."""

    expired: int = 0
    """Messages whose time to live was over: removed, or made dead letters, by their queue's policy."""
    orphans: int = 0
    """Blobs without a record and ended dedup keys that were removed."""


async def collect(service: QueueService) -> Collected:
    """One pass. Raises StoreError; safe to run in any number of processes at once."""
    result = Collected()
    passed: set[str] = set()
    while True:
        now = service.clock.now_ms()
        limit = BATCH + len(passed)
        found = await service.store.expired(now, limit=limit)
        ops: list[Op] = []
        records = []
        for stored in found:
            if stored.item.id in passed:
                continue
            passed.add(stored.item.id)
            try:
                record = service.record(stored)
                policy = await service.policy((record.item.namespace, record.item.queue))
            except (StoreCorrupt, StoreMismatch, CryptoError) as error:
                # What cannot be read must not hold up the others; a store that fails is another matter.
                log.error("millpond.record.unreadable", extra={"message_id": stored.item.id, "reason": str(error)})
                continue
            verdict = lifecycle.expire(record.status, now, bury=policy.on_expired == "dead_letter")
            if isinstance(verdict, lifecycle.Wait):
                continue
            passed.discard(stored.item.id)
            ops.append(
                service.update(record, verdict.status)
                if isinstance(verdict, lifecycle.Bury)
                else Remove(record.item, record.mark)
            )
            records.append(record)
        if not ops:
            if len(found) < limit:
                break
            continue  # Nothing on this page could be settled, but there may be others behind it.
        outcomes = await service.store.write(ops)
        settled = 0
        for record, outcome in zip(records, outcomes, strict=True):
            if not isinstance(outcome, Conflict):
                settled += 1
                service.gone(record.item)
        result.expired += settled
        if not settled:
            break  # Others are at it; what is left falls to them or to the next pass.
    result.orphans = await service.store.sweep(
        service.clock.now_ms(), older_than=round(service.config.orphan_age * 1000), limit=10_000
    )
    if result.expired or result.orphans:
        log.info("millpond.collected", extra={"expired": result.expired, "orphans": result.orphans})
    return result
