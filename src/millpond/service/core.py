"""The ground that the service's parts stand on: records in and out of the store, policies, ready caches.

No decision about a message is made here; those are the life cycle's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence

import msgspec

from millpond.errors import MillpondError, StateConflict
from millpond.model import names
from millpond.model.clock import Clock
from millpond.model.codec import decode_head, decode_status, encode
from millpond.model.ids import IdSource
from millpond.model.message import Status
from millpond.service.config import Config, QueuePolicy, decode_policy, encode_policy, milliseconds
from millpond.service.ready import ReadyCache, ReadyCacheStats, Record
from millpond.stores.base import (
    Box,
    Conflict,
    DocumentWritten,
    Item,
    Op,
    Outcome,
    PutDocument,
    QueueName,
    Sealing,
    Store,
    Stored,
    Telling,
    Update,
)

log = logging.getLogger("millpond.service")

MAX_QUEUES = 10_000
"""Ready caches and policies kept at once; the least recently used go first, and cost one read to come back."""
FRESH = 1.0
"""Seconds after news of a queue in which its policy is read again, where reading it costs money."""
ATTEMPTS = 64
"""How often a write that keeps losing to other writers is decided anew before the caller is told."""

_LIVE, _DEAD = Box.LIVE, Box.DEAD  # Looking a member up in its class is slow (Python 3.11).

QueueKey = tuple[str, str]


class Defaults(msgspec.Struct, frozen=True):
    """What a message of a queue gets when its producer asks for nothing, in milliseconds; made once per policy read."""

    policy: QueuePolicy
    visibility: int
    ttl: int | None
    max_attempts: int
    dedup_window: int


class _Policy(msgspec.Struct):
    defaults: Defaults
    etag: str | None
    read_at: float
    recheck: int | None = None
    """When it is to be read again because of news (ms UTC)."""


class Core:
    """Shared by the service's parts; see `QueueService`."""

    def __init__(self, store: Store, clock: Clock, ids: IdSource, config: Config) -> None:
        self.store = store
        self.clock = clock
        self.ids = ids
        self.config = config
        self.stats = ReadyCacheStats()
        self.teller = store if isinstance(store, Telling) else None
        self.takes = store.capabilities.takes
        """The store chooses and writes in one step; the ready cache then serves those who wait, and nobody else."""
        self.inline_limit = min(store.capabilities.inline_limit, config.max_payload_bytes)
        """Payloads up to this many bytes are part of the record."""
        self.on_ready: Callable[[str, str], object] = lambda namespace, queue: None
        """Told when something may have become ready in a queue (the dispatcher's notify)."""
        self.on_due: Callable[[str, str, int], object] = lambda namespace, queue, due: None
        """Told when something will become ready at a time (ms UTC)."""
        self.costs = store.capabilities.requests_cost_money
        """The store charges for what it is asked: then less is asked."""
        self.looked = False
        """The store was asked for what is ready. Set back by the pond."""
        self._policy_age = config.policy_age(self.costs)
        self.acks: Counter[QueueName] = Counter()
        """Messages acked, per queue; counted where requests are to be set against them."""
        self._caches: OrderedDict[QueueKey, ReadyCache] = OrderedDict()
        self._policies: OrderedDict[QueueKey, _Policy] = OrderedDict()
        self._reading: dict[QueueKey, asyncio.Future[_Policy]] = {}
        """Policies that are being read."""
        self._refills: dict[QueueKey, asyncio.Future[bool]] = {}
        """Reads under way; True when done, False when given up."""
        self._status_data = b""
        self._status: Status | None = None
        """The status decoded last, and its bytes."""
        self.tasks: set[asyncio.Task[None]] = set()

    # Records

    def record(self, stored: Stored) -> Record:
        """Decode a stored record. Raises StoreCorrupt, StoreMismatch."""
        item = stored.item
        head = decode_head(stored.head, item.id, item.namespace, item.queue)
        data = stored.status
        # Messages that were enqueued together differ in nothing here.
        status = self._status if data == self._status_data else None
        if status is None:
            status = decode_status(data, item.id, item.namespace, item.queue)
            if status.last_error is None:  # a value that a consumer could change is nobody else's
                self._status_data, self._status = data, status
        return Record(item, stored.mark, head, status, stored.payload)

    async def load(self, namespace: str, queue: str, id: str) -> Record | None:
        """The record as it is in the store now."""
        stored = await self.store.get(namespace, queue, id)
        return None if stored is None else self.record(stored)

    @staticmethod
    def update(record: Record, status: Status, want_payload: bool = False) -> Update:
        """The write that takes the record to ``status``."""
        return Update(
            record.item,
            record.mark,
            status.visible_at,
            status.lease is not None,
            status.expires_at,
            _LIVE if status.dead is None else _DEAD,
            encode(status),
            want_payload,
        )

    # Writing

    async def write(self, ops: Sequence[Op]) -> list[Outcome]:
        """The store's ``write``. One that is cancelled may go through all the same, and its caller, who would have told
        those who wait, is gone: then they are told to look."""
        try:
            return await self.store.write(ops)
        except asyncio.CancelledError:
            self.spawn(asyncio.create_task(self._look_again(ops)))
            raise

    async def commit(self, ops: Sequence[Op]) -> list[Outcome]:
        """The store's ``commit``, as `write`."""
        try:
            return await self.store.commit(ops)
        except asyncio.CancelledError:
            self.spawn(asyncio.create_task(self._look_again(ops)))
            raise

    async def decided(self, namespace: str, queue: str) -> None:
        """Return when every earlier write of this process has been applied, or never will be: writes are applied in the
        order in which they were asked for, and this one, of which none is the right condition, comes last."""
        await self.store.write((PutDocument(namespace, queue, "-", b""),))

    async def _look_again(self, ops: Sequence[Op]) -> None:
        keys = {
            (op.namespace, op.queue) if isinstance(op, PutDocument) else (op.item.namespace, op.item.queue)
            for op in ops
        }
        for key in keys:
            # Whoever looks meets the store's trouble himself.
            with contextlib.suppress(MillpondError):
                await self.decided(*key)
            self._policies.pop(key, None)
            self.foreign_change(*key)
            self.on_ready(*key)

    # Ready caches

    def cache(self, key: QueueKey) -> ReadyCache:
        """The queue's ready cache, made on first need."""
        cache = self._caches.get(key)
        if cache is None:
            while len(self._caches) >= MAX_QUEUES:
                self._caches.popitem(last=False)
            cache = self._caches[key] = ReadyCache(self.config.ready_cache_size, asleep=self.takes, paid=self.costs)
        else:
            self._caches.move_to_end(key)
        return cache

    def cached(self, item: Item) -> ReadyCache | None:
        """The ready cache of the message's queue, if there is one."""
        return self._caches.get((item.namespace, item.queue))

    def changed(self, record: Record, *, inserted: bool = False) -> None:
        """This process has just written ``record`` as not held: it can be handed out now or later."""
        item = record.item
        self.changed_many((item.namespace, item.queue), (record,), inserted=inserted)

    def changed_many(self, key: QueueKey, records: Sequence[Record], *, inserted: bool = False) -> None:
        """As `changed`, for records of one queue that were written together."""
        if not records:
            return
        cache = self._caches.get(key)
        if cache is not None and not cache.asleep:
            now = self.clock.now_ms()
            for record in records:
                cache.offer(record, now, inserted=inserted)
        self.appeared(key, min([record.mark.due for record in records]))

    def appeared(self, key: QueueKey, due: int) -> None:
        """There is something to hand out in the queue now or, at the earliest, at ``due``."""
        cache = self._caches.get(key)
        if cache is not None:
            cache.dry = False
        if due > self.clock.now_ms():
            self.on_due(*key, due)
        else:
            self.on_ready(*key)

    def gone(self, item: Item) -> None:
        """The message left the queue; the next of its group may go now."""
        self.gone_many((item,))

    def gone_many(self, items: Iterable[Item]) -> None:
        """As `gone`, for each."""
        cache: ReadyCache | None = None
        namespace = queue = None
        for item in items:
            if item.queue is not queue or item.namespace is not namespace:
                namespace, queue = item.namespace, item.queue
                cache = self._caches.get((namespace, queue))
            if cache is not None and cache.occupied:
                cache.forget(item.id)
            if item.group is not None:
                if cache is not None:
                    cache.dirty = True
                    cache.dry = False
                self.on_ready(item.namespace, item.queue)

    def acked(self, item: Item) -> None:
        """As `gone`, for a message that was acked."""
        self.acked_many((item,))

    def acked_many(self, items: Sequence[Item]) -> None:
        """As `acked`, for each."""
        if self.costs:
            self.acks.update(QueueName(item.namespace, item.queue) for item in items)
        self.gone_many(items)

    def foreign_change(self, namespace: str, queue: str) -> None:
        """Somebody else changed the queue."""
        cache = self._caches.get((namespace, queue))
        if cache is not None:
            cache.dirty = True
            cache.dry = False
        known = self._policies.get((namespace, queue)) if self.costs else None
        if known is None:
            self._policies.pop((namespace, queue), None)
            return
        # Of a busy queue every write is told; its policy is not to be paid for with each.
        known.read_at = min(known.read_at, self.clock.monotonic() + FRESH - self._policy_age)
        if known.recheck is None:
            known.recheck = self.clock.now_ms() + round(FRESH * 1000)

    def appeared_elsewhere(self, namespace: str, queue: str) -> None:
        """The store was told of messages by name."""
        if self.teller is None:
            self.foreign_change(namespace, queue)
            return
        cache = self.cache((namespace, queue))
        cache.told = True
        cache.dry = False

    async def refill(self, key: QueueKey, wanted: int = 1, *, hinted: bool = False) -> bool:
        """Ask the store what is ready. Callers at the same time share one read, and its error; whether it was the
        caller's own, made for the number that it wanted. ``hinted``: what the store was told of is enough."""
        while (under_way := self._refills.get(key)) is not None:
            started = self.clock.monotonic()
            self.stats.refresh_waits += 1
            try:
                if await asyncio.shield(under_way):
                    return False
            finally:
                self.stats.refresh_wait_nanos += int((self.clock.monotonic() - started) * 1e9)
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._refills[key] = future
        try:
            whole = not await self._add_told(key, wanted, hinted)
            while whole and not await self._refill(key, wanted):
                pass
        except BaseException as error:
            if isinstance(error, Exception):
                future.set_exception(error)
                future.exception()  # Followers get it; without followers it is the leader's alone.
            else:
                future.set_result(False)  # The leader was cancelled, not the read: one of the followers does it.
            raise
        else:
            # Others want to know of all that is ready, unless this will do for them.
            future.set_result(whole or len(self.cache(key)) > 0)
            return True
        finally:
            del self._refills[key]

    async def _add_told(self, key: QueueKey, wanted: int, hinted: bool) -> bool:
        """Have the ready cache know what the store was told of; whether no look at all that is ready is needed now."""
        cache = self.cache(key)
        now = self.clock.now_ms()
        if self.teller is None or not cache.told or not cache.is_complete(now):
            return False
        cache.told = False
        try:
            found = await self.teller.told(*key, now, limit=min(max(wanted, 1), cache.capacity))
        except BaseException:
            cache.told = True
            raise
        records: list[Record] = []
        for stored in found:
            try:
                records.append(self.record(stored))
            except MillpondError as error:
                self.report_unreadable(cache, stored, error)
        cache.add(records)
        return bool(records) or hinted or (len(cache) > 0 and not cache.dirty)

    async def _refill(self, key: QueueKey, wanted: int) -> bool:
        """One read. False when it met nothing but records that cannot be read, and there are more behind them."""
        cache = self.cache(key)
        now = self.clock.now_ms()
        started = self.clock.monotonic()
        stats = self.stats
        stats.inflight_clears += cache.release_overdue(now)
        if len(cache):
            stats.cursor_resets += 1
        page_size = self.config.ready_page_size
        if self.costs:
            page_size = min(page_size, max(wanted, cache.page))
            cache.page = min(cache.page * 2, self.config.thrifty_page_size)
        limit = min(page_size, cache.capacity) + cache.inflight + len(cache.bad)
        self.looked = True
        # Cleared before the read: a change that arrives while it runs asks for another one.
        cache.dirty = False
        try:
            page = await self.store.ready(*key, now, limit=limit)
        except BaseException:
            cache.dirty = True
            raise
        listed = self.clock.monotonic()
        changed_meanwhile = cache.dirty
        records: list[Record] = []
        bad: set[str] = set()
        news = False
        for stored in page.records:
            id = stored.item.id
            if cache.is_inflight(id):
                stats.inflight_skips += 1
                continue
            try:
                records.append(self.record(stored))
            except MillpondError as error:
                # One record that cannot be read must not keep the others from being delivered.
                bad.add(id)
                news |= self.report_unreadable(cache, stored, error)
        if cache.bad:
            last = page.records[-1] if page.more and page.records else None
            rank = None if last is None else (-last.item.priority, last.mark.due, last.item.key)
            cache.forget_bad(bad, rank)
        finished = self.clock.monotonic()
        stats.list_scans += 1
        stats.list_objects += len(page.records)
        stats.list_nanos += int((listed - started) * 1e9)
        stats.load_count += len(records)
        stats.load_nanos += int((finished - listed) * 1e9)
        seen = max((stored.item.key for stored in page.records), default=0)
        cache.fill(records, more=page.more, next_due=page.next_due, monotonic=finished, seen=seen)
        cache.dirty = changed_meanwhile
        return bool(records) or not page.more or not news

    @staticmethod
    def report_unreadable(cache: ReadyCache, stored: Stored, error: MillpondError) -> bool:
        """Log, once, that a record cannot be decoded; whether it was the first time."""
        item = stored.item
        news = cache.meet_bad(item, stored.mark)
        if news:
            log.error(
                "millpond.record.unreadable",
                extra={
                    "namespace": item.namespace,
                    "queue": item.queue,
                    "message_id": item.id,
                    "reason": str(error),
                },
            )
        return news

    # Policies

    def defaults_at_hand(self, key: QueueKey) -> Defaults | None:
        """The queue's policy and defaults if this process has a fresh copy."""
        entry = self._policies.get(key)
        if entry is None or self.clock.monotonic() - entry.read_at >= self._policy_age:
            return None
        return entry.defaults

    async def defaults(self, key: QueueKey) -> Defaults:
        """The queue's policy and defaults, at most ``policy_max_age`` old. Raises StoreCorrupt."""
        at_hand = self.defaults_at_hand(key)
        if at_hand is not None:
            return at_hand
        if not self.costs:
            return (await self._read_policy(key)).defaults
        # Hundreds of callers may come upon an old copy at once; one read that is paid for serves them all.
        reading = self._reading.get(key)
        if reading is None:
            reading = self._reading[key] = asyncio.ensure_future(self._read_policy(key))
            reading.add_done_callback(lambda done: self._policy_read(key, done))
        return (await asyncio.shield(reading)).defaults

    def _policy_read(self, key: QueueKey, done: asyncio.Future[_Policy]) -> None:
        if self._reading.get(key) is done:
            del self._reading[key]
        if not done.cancelled():
            done.exception()  # whoever still waits is told; nobody may be

    async def policy(self, key: QueueKey, *, fresh: bool = False) -> QueuePolicy:
        """The queue's policy, at most ``policy_max_age`` old unless ``fresh``. Raises StoreCorrupt."""
        if not fresh:
            return (await self.defaults(key)).policy
        return (await self._read_policy(key)).defaults.policy

    async def _read_policy(self, key: QueueKey) -> _Policy:
        document = await self.store.document(*key)
        if document is None:
            return self._remember_policy(key, QueuePolicy(), None)
        return self._remember_policy(key, decode_policy(document.data, "/".join(key)), document.etag)

    def _remember_policy(self, key: QueueKey, policy: QueuePolicy, etag: str | None) -> _Policy:
        config = self.config
        ttl = policy.ttl if policy.ttl is not None else config.default_ttl
        defaults = Defaults(
            policy,
            milliseconds(policy.default_visibility or config.default_visibility, "default_visibility", positive=True),
            None if ttl is None else milliseconds(ttl, "ttl", positive=True),
            policy.max_attempts if policy.max_attempts is not None else config.default_max_attempts,
            milliseconds(policy.dedup_window or config.default_dedup_window, "dedup_window", positive=True),
        )
        while len(self._policies) >= MAX_QUEUES:
            self._policies.popitem(last=False)
        entry = self._policies[key] = _Policy(defaults, etag, self.clock.monotonic())
        return entry

    async def change_policy(self, key: QueueKey, change: Callable[[QueuePolicy], QueuePolicy]) -> QueuePolicy:
        """Read, change and write the queue's policy; decided anew when somebody else writes in between."""
        for _ in range(ATTEMPTS):
            entry = await self._read_policy(key)
            policy = change(entry.defaults.policy)
            # What changes nothing makes nothing known: resuming a queue that never was leaves no trace of it.
            if policy == entry.defaults.policy or await self._put_policy(key, policy, entry.etag):
                return policy
        raise StateConflict(f"the policy of queue {'/'.join(key)} keeps being changed by others; try again")

    async def _put_policy(self, key: QueueKey, policy: QueuePolicy, expect: str | None) -> bool:
        [outcome] = await self.write([PutDocument(*key, expect, encode_policy(policy))])
        if isinstance(outcome, DocumentWritten):
            self._remember_policy(key, policy, outcome.etag)
            self._reading.pop(key, None)
            self.on_ready(*key)
            return True
        assert isinstance(outcome, Conflict)
        return False

    async def replace_policy(self, key: QueueKey, policy: QueuePolicy) -> QueuePolicy:
        """Write the queue's policy over whatever is there, read or not; nothing where there is none."""
        read = self.store.sealed_document if isinstance(self.store, Sealing) else self.store.document
        for _ in range(ATTEMPTS):
            document = await read(*key)
            if document is None:
                return self._remember_policy(key, policy, None).defaults.policy
            if await self._put_policy(key, policy, document.etag):
                return policy
        raise StateConflict(f"the policy of queue {'/'.join(key)} keeps being changed by others; try again")

    # Background work

    def spawn(self, task: asyncio.Task[None]) -> None:
        """Keep a background task alive until it ends."""
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    @staticmethod
    def key(namespace: str | None, queue: str) -> QueueKey:
        """Normalised names. Raises InvalidQueue."""
        try:
            return names.queue_key(namespace, queue)
        except TypeError:  # Not hashable, so no text: say so as for any other wrong type.
            return names.namespace_name(namespace), names.queue_name(queue)
