"""The ready cache: what is worth looking at in one queue. A hint, never the truth.

Invariants: it holds at most ``capacity`` records however long the queue is; a record in it may be stale, which costs
its taker one failed conditional write and nothing else; and a ready message can be missing from it only while the
cache knows that it may be (``more``, ``next_due``, its age), so that an empty cache never hides work.
"""

from __future__ import annotations

import heapq
import itertools

import msgspec

from millpond.model.message import Head, Status
from millpond.stores.base import Item, Mark

MAX_AGE = 1.0
"""Seconds until a cache that still has records looks for better ones (another process's higher priorities)."""
THRIFTY_AGE = 5.0
"""The same where a look costs money: about as much as the write that a stale record costs its taker."""
DUE_REFRESH = 0.05
"""Seconds between refills that only follow messages coming due while there still are others to hand out."""
FIRST_PAGE = 4
"""Messages for which the first refill asks where looking costs money."""
PAYLOAD_LIMIT = 16 * 1024
"""Payloads up to this size stay with the record of a local enqueue, and save the claim a read."""
PAYLOAD_BUDGET = 8 * 1024 * 1024
"""All payloads in one cache together."""
MAX_BAD = 4096
"""Unreadable messages of one queue that are remembered: as many as an encrypted store passes over, and as records are
cached. With more of them at the head, what lies behind waits for `discard_unreadable`."""


class Record(msgspec.Struct, frozen=True, gc=False):
    """A message as last seen: its store identity and version, and what it says."""

    item: Item
    mark: Mark
    head: Head
    status: Status
    payload: bytes | None = None
    """The inline payload where it is at hand."""

    @property
    def namespace(self) -> str:
        """The namespace of its queue."""
        return self.item.namespace

    @property
    def queue(self) -> str:
        """Its queue."""
        return self.item.queue

    @property
    def id(self) -> str:
        """Its id."""
        return self.item.id

    @property
    def etag(self) -> str:
        """The version that was seen."""
        return self.mark.etag


class ReadyCacheStats(msgspec.Struct, kw_only=True):
    """What the ready caches of a pond have done since the last reset. Always counted; durations in nanoseconds."""

    inflight_skips: int = 0
    """Records passed over in a refill because this process was just handing them out."""
    cursor_resets: int = 0
    """Refills from the front that were asked for although the cache was not empty."""
    inflight_clears: int = 0
    """Candidates given back or whose hand-out mark ran out."""
    list_scans: int = 0
    """Refills from the store, and looks whether there is anything."""
    list_objects: int = 0
    """Records that they returned."""
    list_nanos: int = 0
    load_count: int = 0
    """Records decoded."""
    load_nanos: int = 0
    next_calls: int = 0
    """Times that candidates were asked for."""
    refresh_waits: int = 0
    """Callers that shared a refill under way."""
    refresh_wait_nanos: int = 0


_Ranked = tuple[int, int, int, int, Record]
"""Rank (negative priority), due time, insertion key, a number that settles ties between versions, the record."""


class ReadyCache:
    """Due records of one queue in hand-out order: priority, due time, insertion."""

    __slots__ = (
        "_bound",
        "_entries",
        "_heap",
        "_inflight",
        "_loaded_key",
        "_payload_bytes",
        "_ties",
        "asleep",
        "bad",
        "capacity",
        "dirty",
        "dry",
        "last_used",
        "loaded_at",
        "max_age",
        "more",
        "next_due",
        "page",
        "paid",
        "spread",
        "told",
    )

    def __init__(self, capacity: int, *, asleep: bool = False, paid: bool = False) -> None:
        self.capacity = capacity
        self.paid = paid
        """Looking costs money."""
        self.max_age = THRIFTY_AGE if paid else MAX_AGE
        self.page = FIRST_PAGE
        """How far a refill looks ahead where that costs money: twice as far each time while nobody competes."""
        self.asleep = asleep
        """Nobody takes candidates: it keeps none and is told of none, until the next refill."""
        self.dry = True
        """The last look found nothing more, or there was none; and this process has heard of nothing since."""
        self._entries: dict[str, Record] = {}
        self._heap: list[_Ranked] = []
        self._ties = itertools.count()
        self._loaded_key = 0
        self._inflight: dict[str, int] = {}
        self._payload_bytes = 0
        self._bound: tuple[int, int, int] | None = None
        self.more = True
        """The store may hold due records beyond the cached ones."""
        self.next_due: int | None = None
        """When the next record comes due that is not cached, as far as known (ms UTC)."""
        self.loaded_at: float | None = None
        """Monotonic time of the last refill."""
        self.last_used = 0.0
        self.dirty = True
        """Somebody else changed the queue: refill before the next hand-out."""
        self.told = False
        """The store was told of messages by name: they belong to what is cached."""
        self.spread = 0
        """Among how many first records to choose by chance; grows with lost races, 0 while nobody competes."""
        self.bad: dict[str, tuple[int, int, int]] = {}
        """Ids that could not be decoded, with their rank when last met: reported once, passed over, and forgotten when
        they are not where they were."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def occupied(self) -> bool:
        """It knows of a record."""
        return bool(self._entries or self._inflight)

    @property
    def inflight(self) -> int:
        """How many candidates are out of the cache, their fate not yet known."""
        return len(self._inflight)

    def wants_refill(self, now: int, monotonic: float) -> bool:
        """Whether to ask the store before handing out."""
        if not self._entries or self.dirty or self.told or self.loaded_at is None:
            return True
        age = monotonic - self.loaded_at
        return age >= self.max_age or (self.next_due is not None and self.next_due <= now and age >= DUE_REFRESH)

    def offer(self, record: Record, now: int, *, inserted: bool = False) -> None:
        """A record just written by this process: keep it if it belongs among the cached ones.

        ``inserted``: it is new. Then a refill that read records inserted later has seen it already, and it may even be
        with a consumer by now."""
        item, mark = record.item, record.mark
        if inserted:
            if item.key <= self._loaded_key:
                return
        else:
            self._inflight.pop(item.id, None)
        if mark.due > now:
            self.arm(mark.due)
            return
        key = (-item.priority, mark.due, item.key)
        if len(self._entries) >= self.capacity or (self._bound is not None and key > self._bound):
            self.more = True
            if self._bound is None or len(self._entries) >= self.capacity:
                self._tighten(key)
            return
        if item.group is not None:
            # Whether it is the first of its group only the store knows.
            self.dirty = True
            return
        payload = record.payload
        if payload is not None:
            if len(payload) > PAYLOAD_LIMIT or self._payload_bytes + len(payload) > PAYLOAD_BUDGET:
                record = Record(item, mark, record.head, record.status)
            else:
                self._payload_bytes += len(payload)
        self._entries[item.id] = record
        heapq.heappush(self._heap, (*key, next(self._ties), record))

    def add(self, records: list[Record]) -> None:
        """Messages that are ready besides those that are cached."""
        for record in records:
            item = record.item
            if item.id in self._inflight:
                continue
            self.forget(item.id)
            if len(self._entries) >= self.capacity:
                self.more = True
                return
            self._entries[item.id] = record
            heapq.heappush(self._heap, (-item.priority, record.mark.due, item.key, next(self._ties), record))

    def is_complete(self, now: int) -> bool:
        """Nothing but what the store was told of is a reason to ask what is ready."""
        due = self.next_due is not None and self.next_due <= now
        return not self.dirty and not self.more and not due and self.loaded_at is not None

    def _tighten(self, key: tuple[int, int, int]) -> None:
        """From ``key`` on the cache no longer knows everything."""
        if self._bound is None or key < self._bound:
            self._bound = key

    def arm(self, due: int) -> None:
        """Something becomes due at ``due``."""
        if self.next_due is None or due < self.next_due:
            self.next_due = due

    def fill(self, records: list[Record], *, more: bool, next_due: int | None, monotonic: float, seen: int = 0) -> None:
        """Take over what a refill found: it replaces what was cached (except what is being handed out).

        ``seen``: the latest insertion key among all that it read."""
        inflight = self._inflight
        old = self._entries
        entries: dict[str, Record] = {}
        heap: list[_Ranked] = []
        ties = self._ties
        payload_bytes = 0
        for record in records:
            item = record.item
            if item.id in inflight:
                continue
            if len(entries) >= self.capacity:
                more = True
                break
            known = old.get(item.id)
            if known is not None and known.mark.etag == record.mark.etag:
                record = known
                if known.payload is not None:
                    payload_bytes += len(known.payload)
            entries[item.id] = record
            heap.append((-item.priority, record.mark.due, item.key, next(ties), record))
        self._entries = entries
        self._heap = heap
        # The store's order is this order; heapify is then linear and a safeguard for stores with another idea of rank.
        heapq.heapify(heap)
        self._payload_bytes = payload_bytes
        self._loaded_key = max(self._loaded_key, seen)
        self.more = more
        self._bound = max(heap)[:3] if more and heap else None
        self.next_due = next_due
        self.loaded_at = monotonic
        self.dirty = False
        self.asleep = False
        if heap:
            self.dry = False

    def sleep(self) -> None:
        """Keep nothing until the next refill. What is being handed out stays marked."""
        self._entries = {}
        self._heap = []
        self._payload_bytes = 0
        self._bound = None
        self.dirty = self.asleep = True

    def pop(self, until: int) -> Record | None:
        """Take the first record; it counts as in flight until ``settle``, ``give_back`` or ``until`` (ms UTC)."""
        heap, entries = self._heap, self._entries
        while heap:
            record = heapq.heappop(heap)[4]
            id = record.item.id
            if entries.get(id) is not record:
                continue
            del entries[id]
            if record.payload is not None:
                self._payload_bytes -= len(record.payload)
            self._inflight[id] = until
            return record
        return None

    def pop_spread(self, until: int, choose: int) -> Record | None:
        """As ``pop``, but the ``choose``-th record (0 = first): competing processes must not all take the head."""
        if choose == 0 or len(self._entries) <= 1:
            return self.pop(until)
        choose = min(choose, len(self._entries) - 1)
        passed: list[Record] = []
        taken = None
        for _ in range(choose + 1):
            record = self.pop(until)
            if record is None:
                break
            if taken is not None:
                passed.append(taken)
            taken = record
        for record in passed:
            self.give_back(record)
        return taken

    def peek(self, limit: int) -> list[Record]:
        """The first records, left in place."""
        live = [entry for entry in self._heap if self._entries.get(entry[4].item.id) is entry[4]]
        return [entry[4] for entry in heapq.nsmallest(limit, live)]

    def settle(self, id: str) -> None:
        """The candidate's fate is decided."""
        self._inflight.pop(id, None)

    def give_back(self, record: Record) -> None:
        """The candidate was not used: it is at hand again."""
        item = record.item
        if self._inflight.pop(item.id, None) is None or self.asleep:
            return
        if len(self._entries) >= self.capacity:
            # Others have taken its place, and it may rank before them: the store knows.
            self.more = self.dirty = True
            return
        self._entries[item.id] = record
        if record.payload is not None:
            self._payload_bytes += len(record.payload)
        heapq.heappush(self._heap, (-item.priority, record.mark.due, item.key, next(self._ties), record))

    def forget(self, id: str) -> None:
        """The message is gone or was changed elsewhere."""
        record = self._entries.pop(id, None)
        if record is not None and record.payload is not None:
            self._payload_bytes -= len(record.payload)
        self._inflight.pop(id, None)

    def meet_bad(self, item: Item, mark: Mark) -> bool:
        """A record cannot be decoded; whether that is news. Beyond `MAX_BAD` nothing is news any more."""
        known = item.id in self.bad
        if known or len(self.bad) < MAX_BAD:
            self.bad[item.id] = (-item.priority, mark.due, item.key)
        return not known and item.id in self.bad

    def forget_bad(self, met: set[str], last: tuple[int, int, int] | None) -> None:
        """A look from the front to the rank ``last`` (None: to the end) met these unreadable ones: others up to there
        are gone."""
        gone = [id for id, rank in self.bad.items() if id not in met and (last is None or rank <= last)]
        for id in gone:
            del self.bad[id]

    def release_overdue(self, now: int) -> int:
        """Forget hand-out marks whose time is over (their takers vanished); how many."""
        overdue = [id for id, until in self._inflight.items() if until <= now]
        for id in overdue:
            del self._inflight[id]
        return len(overdue)

    def is_inflight(self, id: str) -> bool:
        """Whether this process is just handing the message out."""
        return id in self._inflight

    def lost_race(self) -> None:
        """Somebody else was faster: look elsewhere next time, and look afresh; where looking costs money, only once
        what is at hand has been tried, and then not far ahead, since others take most of it."""
        self.spread = min(max(8, self.spread * 2), 256)
        self.page = FIRST_PAGE
        if not self.paid:
            self.dirty = True

    def won_race(self) -> None:
        """A claim went through; competition fades."""
        if self.spread:
            self.spread -= 1
