"""Looking at queues from outside: lists, counts, expired records, which queues there are."""

from __future__ import annotations

import builtins
import heapq
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import TypeVar

from millpond.errors import StoreError
from millpond.stores.base import Box, Counts, Page, QueueName, Stored
from millpond.stores.objects import names, records
from millpond.stores.objects.engine import Engine
from millpond.stores.objects.groups import Groups
from millpond.stores.objects.listing import Listing, Seen, Standing
from millpond.stores.objects.ready import Heads
from millpond.stores.objects.records import Kind

A = TypeVar("A")
T = TypeVar("T")

PLENTY = 10_000
"""Expired messages held in memory beyond those that are wanted: there may be millions."""


class Reader:
    """Answers questions about whole queues."""

    def __init__(self, engine: Engine, listing: Listing, groups: Groups) -> None:
        self._engine = engine
        self._listing = listing
        self._groups = groups

    async def list(self, namespace: str, queue: str, box: Box, after: int | None, limit: int) -> Page:
        """Records of a box in order of their keys."""
        since = self._engine.index.seq
        prefix = names.box_prefix(namespace, queue, box)
        starts = [prefix]
        if box is Box.LIVE:
            lanes = (await self._engine.exchange.folder(prefix)).folders
            starts = [f"{prefix}{names.last_part(lane)}/" for lane in lanes]
        async with AsyncExitStack() as stack:
            streams = [await stack.enter_async_context(aclosing(self._from(start, box, after))) for start in starts]
            chosen = await _merge(streams, limit + 1)
        more = len(chosen) > limit
        found = await self._listing.read(chosen[:limit], since)
        result = [records.stored(known.record, known.name) for known in found if known.record.box == box]
        return Page(result, chosen[limit - 1].name.key if more else None)

    async def _from(self, prefix: str, box: Box, after: int | None) -> AsyncGenerator[Seen, None]:
        position = None if after is None else prefix + names.after_key(after)
        async with self._engine.listing(prefix, after=position) as pages:
            async for page in pages:
                for seen in self._listing.parse(page, box):
                    # Not every bucket keeps to the position.
                    if after is None or seen.name.key > after:
                        yield seen

    async def counts(self, namespace: str, queue: str, now: int) -> Counts:
        """How the queue stands at ``now``: lists all of it."""
        ready = delayed = leased = blocked = dead = total = 0
        oldest: int | None = None
        since = self._engine.index.seq
        heads = Heads(self._groups, self._listing, namespace, queue)
        # Of the many that wait behind the first of their group nothing is kept but their number; of those that are
        # held, of which a group has one, how they stand.
        grouped = 0
        held: dict[str, Standing] = {}
        async for page in self._listing.pages(namespace, queue, Box.LIVE):
            free, perhaps = [], []
            for seen in page:
                total += seen.name.size
                if not seen.name.group:
                    free.append(seen)
                    continue
                grouped += 1
                heads.see(seen, since)
                # Whether a blocked one is due makes no difference, so only those that somebody may hold are looked at.
                if seen.kind in (Kind.HELD, Kind.OTHER):
                    perhaps.append(seen)
            for standing in await self._listing.standings(perhaps, now, since):
                if standing.leased and standing.due > now:
                    held[standing.seen.name.path] = standing
            for standing in await self._listing.standings(free, now, since):
                if standing.due <= now:
                    ready += 1
                    oldest = standing.due if oldest is None else min(oldest, standing.due)
                elif standing.leased:
                    leased += 1
                else:
                    delayed += 1
        front = heads.all()
        behind = grouped - len(front)
        leased += len(held)
        blocked += behind - (len(held) - sum(seen.name.path in held for seen in front))
        for standing in await self._listing.standings(
            [seen for seen in front if seen.name.path not in held], now, since
        ):
            if standing.due <= now:
                ready += 1
                oldest = standing.due if oldest is None else min(oldest, standing.due)
            elif standing.leased:
                leased += 1
            else:
                delayed += 1
        async for page in self._listing.pages(namespace, queue, Box.DEAD):
            dead += len(page)
        return Counts(
            ready=ready,
            delayed=delayed,
            leased=leased,
            blocked=blocked,
            dead=dead,
            bytes=total,
            oldest_due=oldest,
        )

    async def expired(self, now: int, limit: int) -> builtins.list[Stored]:
        """Expired records that nobody holds, earliest first: lists the live boxes of all queues."""
        since = self._engine.index.seq
        found: builtins.list[tuple[int, int, Seen]] = []
        for namespace, queue in await self.everywhere():
            async for page in self._listing.pages(namespace, queue, Box.LIVE):
                maybe = [seen for seen in page if self._may_be_over(seen, now, since)]
                for standing in await self._listing.standings(maybe, now, since):
                    over = standing.expires is not None and standing.expires <= now
                    if over and not (standing.leased and standing.due > now):
                        found.append((standing.expires or 0, standing.seen.name.key, standing.seen))
                if len(found) > limit + PLENTY:
                    found = heapq.nsmallest(limit, found)
        result = []
        for known in await self._listing.read([seen for _, _, seen in heapq.nsmallest(limit, found)], since):
            record = known.record
            if not (record.leased and record.due > now):
                result.append(records.stored(record, known.name))
        return result

    def _may_be_over(self, seen: Seen, now: int, since: int) -> bool:
        known = self._listing.known(seen, since)
        if known is not None:
            return known.record.expires is not None and known.record.expires <= now
        return seen.kind == Kind.OTHER or (seen.name.expires is not None and seen.name.expires <= now)

    async def everywhere(self) -> builtins.list[QueueName]:
        """Every queue of which there is any object, and some, maybe, of which there was."""
        namespaces = [names.last_part(path) for path in (await self._engine.exchange.folder(names.QUEUES)).folders]
        found = await self._each(lambda short: self._engine.exchange.folder(f"{names.QUEUES}{short}/"), namespaces)
        return sorted(
            QueueName(short, names.last_part(queue))
            for short, below in zip(namespaces, found, strict=True)
            for queue in below.folders
        )

    async def queues(self) -> builtins.list[QueueName]:
        """Every queue that holds something or has a document, in name order: two requests for each, or one."""
        maybe = await self.everywhere()
        holds = await self._each(self._holds_something, maybe)
        return [name for name, does in zip(maybe, holds, strict=True) if does]

    async def _each(self, ask: Callable[[A], Awaitable[T]], about: Sequence[A]) -> builtins.list[T]:
        answers: builtins.list[T] = []
        for answer in await self._engine.each(ask, about):
            if isinstance(answer, StoreError):
                raise answer
            answers.append(answer)
        return answers

    async def _holds_something(self, name: QueueName) -> bool:
        inside = await self._engine.exchange.folder(names.folder(*name))
        if any(entry.name == names.policy(*name) for entry in inside.entries):
            return True
        there = {names.last_part(folder) for folder in inside.folders}
        for box, short in ((Box.LIVE, "m"), (Box.DEAD, "d")):
            # A folder is a hint: it may have outlived what was in it, or hold what has been removed in fact.
            if short in there and await self._is_held(names.box_prefix(*name, box)):
                return True
        return False

    async def _is_held(self, prefix: str) -> bool:
        async with self._engine.listing(prefix) as pages:
            async for page in pages:
                if any(records.form(entry.size).kind != Kind.GONE for entry in page):
                    return True
        return False


async def _merge(streams: list[AsyncGenerator[Seen, None]], limit: int) -> list[Seen]:
    """The first of several ordered streams, in order."""
    chosen: list[Seen] = []
    fronts: list[tuple[int, int, Seen]] = []
    for number, stream in enumerate(streams):
        front = await anext(stream, None)
        if front is not None:
            fronts.append((front.name.key, number, front))
    heapq.heapify(fronts)
    while fronts and len(chosen) < limit:
        _, number, front = fronts[0]
        chosen.append(front)
        after = await anext(streams[number], None)
        if after is None:
            heapq.heappop(fronts)
        else:
            heapq.heapreplace(fronts, (after.name.key, number, after))
    return chosen
