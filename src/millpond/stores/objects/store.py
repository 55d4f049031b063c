"""The store in a bucket: any number of processes on any number of machines, no server.

A message is one object. Each change of it is one conditional request: an enqueue creates the object, a claim replaces
it, an ack deletes it. What was acknowledged is in the bucket; nothing else is kept between two requests that another
process would have to know of. The modules beside this one say how the rest is made of such requests.
"""

from __future__ import annotations

import asyncio
import builtins
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec

from millpond.errors import MillpondError, OutcomeUnknown, StoreClosed, StoreError, StoreMismatch
from millpond.model.clock import Clock
from millpond.stores.base import (
    Blob,
    Box,
    Capabilities,
    Cause,
    Conflict,
    Counts,
    Decide,
    Document,
    Insert,
    Inserted,
    Item,
    Op,
    Outcome,
    Page,
    Problem,
    PutDocument,
    QueueName,
    Reach,
    ReadyPage,
    Remove,
    Removed,
    Requests,
    Stored,
    Subscription,
    Update,
    Updated,
)
from millpond.stores.objects import names, records
from millpond.stores.objects.blobs import Blobs
from millpond.stores.objects.bucket import Bucket, Content
from millpond.stores.objects.damaged import Damaged
from millpond.stores.objects.engine import MARGIN, Engine, Options, log
from millpond.stores.objects.feed import HostFeed
from millpond.stores.objects.find import Finder
from millpond.stores.objects.groups import Groups
from millpond.stores.objects.index import BYTES, ENTRIES, Index
from millpond.stores.objects.listing import Listing
from millpond.stores.objects.markers import Markers
from millpond.stores.objects.moves import Moves
from millpond.stores.objects.names import Name
from millpond.stores.objects.presence import Presence
from millpond.stores.objects.reads import Reader
from millpond.stores.objects.ready import Ready
from millpond.stores.objects.requests import CountedBucket
from millpond.stores.objects.told import HostSubscription, Told
from millpond.stores.objects.upkeep import Upkeep
from millpond.stores.objects.writes import Writer

T = TypeVar("T")

COMPARISONS = 5
"""Times that clocks are compared at opening, where doing so takes too long to tell much."""
INLINE_LIMIT = 64 * 1024
"""Bytes; a payload up to this size costs no request of its own."""
_root = msgspec.json.Decoder(records.Root)


class ObjectStore:
    """A store in ``bucket``.

    ``clock`` is this machine's; with ``measure_skew`` the store finds out how far it is from the bucket's (see
    `clock_offset`). ``inline_limit``: largest payload, bytes, in the record. ``index_bytes`` and ``index_entries``
    bound what it remembers of objects. ``margin``: milliseconds of its lease that a message must have left to be
    deleted without a condition. ``fenced_removals``: never do that, for those who let several processes answer under
    one lease. ``spread``: while claims are lost to others, do not offer the very first messages to everybody.
    ``check`` is run at opening before anything is written, and raises if the bucket will not do.

    It belongs to the event loop that opened it, and does not survive a fork: a child opens its own.
    """

    def __init__(
        self,
        bucket: Bucket,
        *,
        clock: Clock,
        inline_limit: int = INLINE_LIMIT,
        random_bytes: Callable[[int], bytes] = os.urandom,
        measure_skew: bool = True,
        index_bytes: int = BYTES,
        index_entries: int = ENTRIES,
        margin: int = MARGIN,
        fenced_removals: bool = False,
        spread: bool = True,
        name: str = "objects",
        check: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._check = check
        self._clock = clock
        self._counted = bucket if isinstance(bucket, CountedBucket) else CountedBucket(bucket)
        self._feed: HostFeed | None = None
        options = Options(margin=margin, fenced_removals=fenced_removals, spread=spread)
        index = Index(entries=index_entries, size=index_bytes)
        engine = self._engine = Engine(
            self._counted, clock, random_bytes=random_bytes, index=index, options=options, measure_skew=measure_skew
        )
        self._measure_skew = measure_skew
        self._markers = Markers(engine)
        self._groups = Groups(engine)
        self._moves = Moves(engine, self._markers)
        self._finder = Finder(engine, self._markers)
        self._blobs = Blobs(engine, self._finder)
        self._writer = Writer(engine, self._markers, self._groups, self._moves, self._finder, self._blobs)
        self._listing = Listing(engine, self._moves)
        self._presence = Presence(engine)
        self._told = Told(engine)
        self._ready = Ready(engine, self._listing, self._groups, self._presence)
        self._reader = Reader(engine, self._listing, self._groups)
        self._damaged = Damaged(engine, self._groups)
        self._upkeep = Upkeep(
            engine, self._markers, self._groups, self._moves, self._finder, self._blobs, self._reader, self._listing
        )
        self._open = self._closed = False
        self._writes = self._ops = self._conflicts = 0
        self._writing: dict[asyncio.Task[Any], set[tuple[str, str]]] = {}
        """Writes under way, and the queues that they are about."""
        self._capabilities = Capabilities(
            name=name,
            reach=Reach.NETWORK,
            atomic_groups=False,
            hand_offs=True,
            conditional_delete=False,
            change_feed=True,
            durable=True,
            inline_limit=inline_limit,
            takes=False,
            requests_cost_money=True,
            insertion_order=False,
            sees_behind=False,
            guards_groups=True,
        )

    @property
    def capabilities(self) -> Capabilities:
        """What a store in a bucket can do."""
        return self._capabilities

    @property
    def clock_offset(self) -> int:
        """Milliseconds from this machine's clock to the bucket's, as far as this store has found out."""
        return self._engine.skew.offset

    # Opening and closing

    async def open(self) -> None:
        """Read or write the store's own object, and compare clocks. Raises StoreMismatch, StoreError."""
        self._check_open()
        if self._open:
            return
        if self._check is not None:
            await self._check()
        engine = self._engine
        content: Content | None = await engine.exchange.read(names.ROOT)
        root = records.Root(records.FORMAT, engine.ids.random(16).hex())
        if content is None:
            made = await engine.exchange.create(names.ROOT, msgspec.json.encode(root), insist=True)
            content = made if isinstance(made, Content) else None
        if content is not None:
            root = self._read_root(content.data)
        if self._measure_skew:
            await self._compare_clocks()
        self._feed = self._told.feed = HostFeed(root.store, clock=self._clock, heard=self._told.heard)
        self._open = True

    @staticmethod
    def _read_root(data: bytes) -> records.Root:
        try:
            root = _root.decode(data)
        except msgspec.DecodeError as error:
            raise StoreMismatch(
                f"object {names.ROOT} is not Millpond's ({error}); give a prefix of its own in the bucket"
            ) from error
        if root.format > records.FORMAT:
            raise StoreMismatch(
                f"the store has format {root.format}; this Millpond reads up to {records.FORMAT}: use a newer one"
            )
        return root

    async def _compare_clocks(self) -> None:
        for _ in range(COMPARISONS):
            await self._compare_once()
            if not self._engine.skew.is_vague():
                return

    async def _compare_once(self) -> None:
        engine = self._engine
        path = names.clock(engine.ids.random(16))
        started = engine.skew.started()
        made = await engine.exchange.create(path, path.encode(), insist=True)
        if not isinstance(made, Content):
            engine.skew.wrote(path, made, started)
            content = await engine.exchange.read(path)
            if content is not None:
                engine.skew.observe(path, content.tag, content.modified)
        await engine.exchange.delete(path)

    async def close(self) -> None:
        """Let writes under way finish, then release the bucket. Repeatable."""
        self._closed = True
        while self._engine.tasks:
            await asyncio.gather(*self._engine.tasks, return_exceptions=True)
        await self._presence.end()
        self._told.close()
        if self._feed is not None:
            self._feed.close()
        await self._engine.bucket.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosed("the store is closed")

    # Writing

    async def write(self, ops: Sequence[Op]) -> builtins.list[Outcome]:
        """Apply each op on its own, several at once; those on one message in their order.

        Should some fail while others are applied, then those that certainly were not are ``Conflict(ABORTED)``; an
        outcome that is not known is raised as OutcomeUnknown."""
        self._check_open()
        self._writes += 1
        self._ops += len(ops)
        refused = await self._without_payload(ops)
        self._check_open()
        tasks = [
            self._start(op, Conflict(*refused[index]) if index in refused else None) for index, op in enumerate(ops)
        ]
        if not tasks:
            return []
        # A caller who is cancelled does not cut a request short: its outcome would be nobody's.
        results = await asyncio.shield(asyncio.gather(*tasks, return_exceptions=True))
        return self._outcomes(ops, results)

    async def _without_payload(self, ops: Sequence[Op]) -> dict[int, tuple[Cause, str]]:
        """Inserts whose payload is not there: refused by what is in the way, or with all of the call."""
        refused: dict[int, tuple[Cause, str]] = {}
        for index, op in enumerate(ops):
            if not isinstance(op, Insert) or not op.item.external or await self._blobs.is_there(op):
                continue
            conflict = await self._writer.in_the_way(op)
            if conflict is None:
                raise StoreError(
                    f"the payload of message {op.item.id} was not stored, or is gone, or is another's: write it again"
                )
            refused[index] = (conflict.cause, conflict.id)
        return refused

    def _start(self, op: Op, known: Conflict | None) -> asyncio.Task[Outcome]:
        earlier: list[asyncio.Task[Any]] = []
        if isinstance(op, PutDocument):
            # Whoever writes a queue's document may rely on all that this process asked for before.
            where = place(op)
            earlier = [task for task, places in self._writing.items() if where in places]
        return self._track(self._run(op, known, earlier), [op])

    def _track(self, work: Coroutine[Any, Any, T], ops: Sequence[Op]) -> asyncio.Task[T]:
        task: asyncio.Task[T] = self._engine.spawn(work)
        self._writing[task] = {place(op) for op in ops}
        task.add_done_callback(lambda done: self._writing.pop(done, None))
        return task

    async def _run(self, op: Op, known: Conflict | None, earlier: builtins.list[asyncio.Task[Any]]) -> Outcome:
        if earlier:
            await asyncio.wait(earlier)
        return known or await self._writer.apply(op)

    def _outcomes(self, ops: Sequence[Op], results: Sequence[Outcome | BaseException]) -> builtins.list[Outcome]:
        errors = [result for result in results if isinstance(result, BaseException)]
        for error in errors:
            if not isinstance(error, StoreError) or isinstance(error, OutcomeUnknown) or len(errors) == len(results):
                raise error
        if any(
            isinstance(result, BaseException) and isinstance(op, Insert)
            for op, result in zip(ops, results, strict=True)
        ):
            raise OutcomeUnknown(f"some of these messages are in the queue, others are not: {errors[0]}") from errors[0]
        outcomes: list[Outcome] = []
        for op, result in zip(ops, results, strict=True):
            if isinstance(result, BaseException):
                log.warning("millpond.objects.write_failed", extra={"op": type(op).__name__, "reason": str(result)})
                result = Conflict(Cause.ABORTED)
            self._conflicts += isinstance(result, Conflict)
            outcomes.append(result)
        self._announce(ops, outcomes)
        return outcomes

    def _announce(self, ops: Sequence[Op], outcomes: Sequence[Outcome]) -> None:
        """Tell the other processes of this machine which messages they may take, or in which queues they may want to
        look, and which messages are taken."""
        if self._feed is None:
            return
        now = self._engine.now()
        changed: set[tuple[str, str]] = set()
        appeared: dict[tuple[str, str], builtins.list[tuple[Name, int]]] = {}
        taken: dict[tuple[str, str], builtins.list[str]] = {}
        for op, outcome in zip(ops, outcomes, strict=True):
            if isinstance(outcome, Conflict):
                continue
            if not _is_news(op):
                if isinstance(op, Update) and isinstance(outcome, Updated) and op.leased:
                    etag = None if op.mark.leased and op.mark.due > now else records.parse_etag(outcome.mark.etag)
                    if etag is not None:
                        taken.setdefault(place(op), []).append(etag.place)
                continue
            named = None
            if isinstance(op, Insert | Update) and op.item.group is None and isinstance(outcome, Inserted | Updated):
                named = records.parse_etag(outcome.mark.etag)
            if named is None:
                changed.add(place(op))
            elif isinstance(op, Insert | Update):
                name = names.of_place(*place(op), named.place)
                appeared.setdefault(place(op), []).append((name, op.due))
        if changed:
            self._feed.announce(changed)
        for queue, written in appeared.items():
            if queue not in changed:
                self._told.appeared(queue, written)
        for queue, places in taken.items():
            self._told.taken(queue, places)

    async def commit(self, ops: Sequence[Op]) -> builtins.list[Outcome]:
        """One op, or a ``Remove`` followed by ``Insert`` ops. Raises StoreError for anything else."""
        self._check_open()
        if len(ops) <= 1:
            return await self.write(ops)
        removal, inserts = ops[0], ops[1:]
        if not isinstance(removal, Remove) or not all(isinstance(op, Insert) for op in inserts):
            raise StoreError(
                "a bucket cannot do several writes in one step, except to remove a message and insert others: "
                "write them one by one"
            )
        refused = await self._without_payload(inserts)
        if refused:
            outcomes: list[Outcome] = [Conflict(Cause.ABORTED)] * len(ops)
            for index, reason in refused.items():
                outcomes[index + 1] = Conflict(*reason)
            return outcomes
        self._check_open()
        self._writes += 1
        self._ops += len(ops)
        work = self._writer.hand_off(removal, [op for op in inserts if isinstance(op, Insert)])
        result = await asyncio.shield(self._track(work, ops))
        self._announce(ops, result)
        return result

    async def take(
        self, namespace: str, queue: str, now: int, *, limit: int, decide: Decide
    ) -> builtins.list[tuple[Any, Updated | Removed]]:
        """Not for a bucket. Raises StoreError."""
        self._check_open()
        raise StoreError("a bucket cannot choose and write in one step: claim what ready() returns")

    # Reading

    async def get(self, namespace: str, queue: str, id: str, *, payload: bool = False) -> Stored | None:
        """The record, from whichever box it lies in: one read where this process has met it, a search otherwise."""
        self._check_open()
        placed = await self._finder.find(namespace, queue, id)
        return None if placed is None else records.stored(placed.record, placed.name, payload)

    async def ready(self, namespace: str, queue: str, now: int, *, limit: int) -> ReadyPage:
        """Due and unblocked records in hand-out order."""
        self._check_open()
        return await self._ready.ready(namespace, queue, now, limit)

    async def expired(self, now: int, *, limit: int) -> builtins.list[Stored]:
        """Expired records that nobody holds, earliest first. Lists all live messages."""
        self._check_open()
        return await self._reader.expired(now, limit)

    async def payload(self, item: Item) -> bytes | None:
        """The inline payload of a record; None when the record is gone."""
        self._check_open()
        placed = await self._finder.of_item(item)
        return None if placed is None else placed.record.payload

    async def state(self, item: Item) -> Document | None:
        """The state document of a record."""
        self._check_open()
        placed = await self._finder.find(item.namespace, item.queue, item.id)
        if placed is None or placed.record.state is None or not records.is_of(item, placed.record, placed.name):
            return None
        return Document(placed.record.state, str(placed.record.state_version))

    async def document(self, namespace: str, queue: str) -> Document | None:
        """The queue's own document."""
        self._check_open()
        return await self._writer.documents.read(namespace, queue)

    async def queues(self) -> builtins.list[QueueName]:
        """Every queue that holds something or has a document, in name order."""
        self._check_open()
        return await self._reader.queues()

    async def counts(self, namespace: str, queue: str, now: int) -> Counts:
        """How the queue stands. Lists all of it: a request for each thousand messages."""
        self._check_open()
        return await self._reader.counts(namespace, queue, now)

    # Payloads stored apart

    async def write_blob(self, namespace: str, queue: str, id: str, chunks: AsyncIterator[bytes], now: int) -> Blob:
        """Stream a payload in."""
        self._check_open()
        return await self._blobs.write(namespace, queue, id, chunks, now)

    async def read_blob(self, item: Item) -> AsyncIterator[bytes]:
        """Stream a payload out. Raises MessageNotFound, StoreCorrupt."""
        self._check_open()
        async with aclosing(self._blobs.read(item)) as chunks:
            async for chunk in chunks:
                yield chunk

    # Upkeep

    async def sweep(self, now: int, *, older_than: int, limit: int) -> int:
        """Remove payloads without a record and unique keys that have ended. Lists everything."""
        self._check_open()
        return await self._upkeep.sweep(now, older_than, limit)

    async def verify(self) -> builtins.list[Problem]:
        """Read everything, and say what is wrong with it."""
        self._check_open()
        return await self._upkeep.verify()

    async def unreadable(self, namespace: str, queue: str) -> builtins.list[tuple[str, MillpondError]]:
        """What of a queue cannot be read: message ids, and names of other objects, each with the reason. Reads all that
        this process does not know."""
        self._check_open()
        return await self._damaged.all_of(namespace, queue)

    async def discard_unreadable(self, namespace: str, queue: str, what: str) -> bool:
        """Remove what cannot be read of a message id, or the object of this name; False: there is nothing of that id
        that cannot be read. A marker or a pointer is written anew where the queue tells what it said.

        Raises InvalidInput for an object that can be read, MessageNotFound when it is not there, StoreBusy when it is
        being changed."""
        self._check_open()
        return await self._damaged.discard(namespace, queue, what)

    def subscribe(self, namespace: str, queue: str, callback: Callable[[], object]) -> Subscription:
        """Call back soon after another process of this machine changed the queue: other machines are not heard of.
        Raises StoreError where that cannot be had."""
        self._check_open()
        if self._feed is None:
            raise StoreClosed("the store is not open")
        return HostSubscription(self._told, self._feed.subscribe(namespace, queue, callback), callback)

    async def told(self, namespace: str, queue: str, now: int, *, limit: int) -> builtins.list[Stored]:
        """Ready records of which other processes of this machine have told this one by name: a read of each."""
        self._check_open()
        return await self._told.told((namespace, queue), now, limit)

    def requests(self) -> dict[QueueName | None, Requests]:
        """What was asked of the bucket so far, per queue; None stands for what is no queue's."""
        return self._counted.requests()

    def statistics(self) -> dict[str, Any]:
        """writes, ops and conflicts of this store; replies that got lost; moves of others that it finished; records
        that it remembers."""
        return {
            "writes": self._writes,
            "ops": self._ops,
            "conflicts": self._conflicts,
            "lost_replies": self._engine.exchange.unknown,
            "moves_finished": self._moves.finished,
            "known": len(self._engine.index),
            "clock_offset": self.clock_offset,
            **({} if self._feed is None else self._feed.numbers),
        }

    # Last in the class: below it, ``list`` would name the method in annotations.
    async def list(self, namespace: str, queue: str, box: Box, *, after: int | None = None, limit: int = 100) -> Page:
        """Records of a box in order of their keys: of due time, or of entry for those with a group."""
        self._check_open()
        return await self._reader.list(namespace, queue, box, after, limit)


def place(op: Op) -> tuple[str, str]:
    """The queue, with its namespace, that an op is about."""
    return (op.namespace, op.queue) if isinstance(op, PutDocument) else (op.item.namespace, op.item.queue)


def _is_news(op: Op) -> bool:
    """Whether others may find something to hand out, or another document, once the op went through."""
    if isinstance(op, Update):
        if op.box is not Box.LIVE:
            return op.item.group is not None
        return not op.leased or op.due < op.mark.due
    if isinstance(op, Remove):
        return op.item.group is not None
    return isinstance(op, (Insert, PutDocument))
