"""What is ready, in hand-out order, for as few requests as can be.

A queue that fits into one page of a listing costs that page. Of a longer one the first pages of its lanes are listed,
each up to the first message whose time has not come.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing
from typing import NamedTuple

from millpond.stores.base import Box, ReadyPage, Stored
from millpond.stores.objects import names, records
from millpond.stores.objects.bucket import Entry
from millpond.stores.objects.engine import Engine
from millpond.stores.objects.groups import Groups
from millpond.stores.objects.listing import Listing, Seen, Standing
from millpond.stores.objects.records import Kind
from millpond.stores.objects.writes import SLACK

LONG = 1000
"""A page of so many objects is hardly the only one."""
WINDOW = 1000
"""Messages that a listing is searched for while others are met: about what its first page holds."""
WINDOW_AGE = 2.0
"""Seconds for which messages are chosen from that listing, at most: it knows nothing of what came since."""
WINDOWS = 64
"""Queues of which a window is kept."""
LOOKS = 4
"""Looks in vain at messages of which there are more."""
GROUP_PAGES = 8
"""Pages of messages with a group after which those that were found are enough. Without the limit each look would list
all of a long line behind few groups."""
SLICE = 128
"""Messages whose standing is asked for at a time: some may have to be read for it."""

_Ranked = tuple[int, int, Seen]
"""Due time, key, message."""


class Lanes:
    """The live messages of a queue by lane, listed no further than they are asked for."""

    def __init__(self, engine: Engine, listing: Listing, namespace: str, queue: str) -> None:
        self._engine = engine
        self._listing = listing
        self._prefix = names.box_prefix(namespace, queue, Box.LIVE)
        self._there: dict[str, list[Seen]] = {}
        self._pages: AsyncIterator[list[Entry]] | None = None
        self._last = ""
        """The lane in which the pages go on."""
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Lanes:
        await self._start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        """Look at the beginning."""
        pages = await self._stack.enter_async_context(self._engine.listing(self._prefix))
        first: list[Entry] = await anext(pages, [])
        self._add(first)
        if not first:
            return
        if len(first) < LONG:
            # Most likely that was all, and then to ask for more is no request.
            second = await anext(pages, None)
            if second is None:
                return
            self._add(second)
            first = second or first
        self._pages = pages
        self._last = self._lane(first[-1])
        for lane in (await self._engine.exchange.folder(self._prefix)).folders:
            self._there.setdefault(names.last_part(lane), [])

    def _lane(self, entry: Entry) -> str:
        # Empty for an object that is called as the folder is: consoles make such.
        return entry.name[len(self._prefix) :][:1]

    def _add(self, page: list[Entry]) -> None:
        for seen in self._listing.parse(page, Box.LIVE):
            self._there.setdefault(seen.name.lane, []).append(seen)

    async def pages(self, lane: str) -> AsyncGenerator[list[Seen], None]:
        """A lane in order, page by page."""
        if lane not in self._there:
            return
        if self._there[lane]:
            yield self._there[lane]
        if self._pages is None or lane < self._last:
            return
        if lane > self._last:
            async with self._engine.listing(f"{self._prefix}{lane}/") as own:
                async for page in own:
                    yield self._listing.parse(page, Box.LIVE)
            return
        async for page in self._pages:
            seen = [one for one in self._listing.parse(page, Box.LIVE) if one.name.lane == lane]
            if seen:
                yield seen
            if page and self._lane(page[-1]) != lane:
                return


class Heads:
    """Which message of each group is to be handed out next."""

    def __init__(self, groups: Groups, listing: Listing, namespace: str, queue: str) -> None:
        self._groups = groups
        self._listing = listing
        self._place = (namespace, queue)
        self._first: dict[str, Seen] = {}
        self._better: dict[str, Seen] = {}
        """Those that are held already, or that this process knows to be pointed at."""

    def see(self, seen: Seen, since: int = -1) -> None:
        """The next message of the group lane, in order."""
        group = seen.name.group
        self._first.setdefault(group, seen)
        if self._groups.leader((*self._place, group)) == seen.name.place:
            self._better[group] = seen
        elif group not in self._better:
            known = self._listing.known(seen, since)
            if seen.kind == Kind.HELD if known is None else known.record.leased:
                self._better[group] = seen

    def all(self) -> list[Seen]:
        """One of each group."""
        for seen in self._first.values():
            self._groups.first(seen.name)
        return [
            self._better.get(group, first)
            for group, first in self._first.items()
            if not self._groups.is_stuck((*self._place, group))
        ]


class _Window(NamedTuple):
    """What a listing has shown to be ready, less what was chosen from it."""

    found: list[Seen]
    since: int
    until: float
    """Monotonic seconds."""
    next_due: int | None
    more: bool


class Ready:
    """Answers what is ready."""

    def __init__(self, engine: Engine, listing: Listing, groups: Groups) -> None:
        self._engine = engine
        self._listing = listing
        self._groups = groups
        self._windows: OrderedDict[tuple[str, str], _Window] = OrderedDict()

    async def ready(self, namespace: str, queue: str, now: int, limit: int) -> ReadyPage:
        """The first ``limit`` records that are due at ``now`` and not blocked by their group.

        While others are met, any of the first thousand, by chance: several who see the same head of a queue would race
        for the same messages, and read them all for nothing."""
        page = await self._look(namespace, queue, now, limit)
        for _ in range(LOOKS):
            if page.records or not page.more:
                break
            # All of them were unreadable, or gone by now; what cannot be read is left out next time.
            page = await self._look(namespace, queue, now, limit)
        return page

    async def _look(self, namespace: str, queue: str, now: int, limit: int) -> ReadyPage:
        if not self._engine.rivals.get((namespace, queue), 0):
            self._windows.pop((namespace, queue), None)
            search, cut = await self._search(namespace, queue, now, limit + 1)
            more = len(search.found) > limit or (cut and bool(search.found))
            first = await self._read(search.found[:limit], now, search)
            return ReadyPage(first, more, search.next_due)
        page = await self._choose(namespace, queue, now, limit)
        if page is None:
            search, cut = await self._search(namespace, queue, now, max(WINDOW, limit + 1))
            until = self._engine.clock.monotonic() + WINDOW_AGE
            some, more = bool(search.found), search.full or cut
            self._windows[namespace, queue] = _Window(search.found, search.since, until, search.next_due, more)
            if len(self._windows) > WINDOWS:
                self._windows.popitem(last=False)
            page = await self._choose(namespace, queue, now, limit)
            if page is None:
                return ReadyPage([], some, search.next_due)
        return page

    async def _choose(self, namespace: str, queue: str, now: int, limit: int) -> ReadyPage | None:
        """Some of the window, which then are not in it any more; None when it is over, or nothing of it is left."""
        window = self._windows.get((namespace, queue))
        if window is None or self._engine.clock.monotonic() > window.until:
            return None
        found = window.found
        chosen: list[Seen] = []
        alike = 0
        while found and len(chosen) < limit:
            if not alike:
                # Higher priorities first, whoever else is about.
                alike = sum(seen.name.priority == found[0].name.priority for seen in found)
            chosen.append(found.pop(self._engine.ids.below(alike)))
            alike -= 1
        chosen.sort(key=lambda seen: (-(seen.name.priority or 0), seen.name.key))
        result = await self._read(chosen, now, window)
        if len(result) * 2 < len(chosen):
            # Others have taken most of it.
            self._windows.pop((namespace, queue), None)
        return ReadyPage(result, bool(found) or window.more, window.next_due) if result else None

    async def _read(self, chosen: list[Seen], now: int, seen_by: _Window | _Search) -> list[Stored]:
        result = []
        for known in await self._listing.read(chosen, seen_by.since):
            record = known.record
            if record.due > now:
                # Somebody was given it since it was listed.
                if isinstance(seen_by, _Search):
                    seen_by.coming(record.due)
                continue
            result.append(records.stored(record, known.name))
        return result

    async def _search(self, namespace: str, queue: str, now: int, wanted: int) -> tuple[_Search, bool]:
        """The first messages that are due, so many; and whether there may be more groups than were looked at."""
        since = self._engine.index.seq
        search = _Search(self._listing, now, wanted, since)
        async with Lanes(self._engine, self._listing, namespace, queue) as lanes:
            heads, cut = await self._heads(lanes, namespace, queue, now, since)
            for priority in range(9, -1, -1):
                mine = [one for one in heads if one.seen.name.priority == priority]
                async with aclosing(lanes.pages(str(9 - priority))) as pages:
                    await search.lane(pages, mine)
                if search.full:
                    break
        return search, cut

    async def _heads(
        self, lanes: Lanes, namespace: str, queue: str, now: int, since: int
    ) -> tuple[list[Standing], bool]:
        """How the first of each group stand, and whether there may be more groups."""
        heads = Heads(self._groups, self._listing, namespace, queue)
        number = 0
        cut = False
        found: list[Standing] = []
        async with aclosing(lanes.pages(names.GROUP_LANE)) as pages:
            async for page in pages:
                for seen in page:
                    heads.see(seen, since)
                number += 1
                if number % GROUP_PAGES == 0:
                    found = await self._listing.standings(heads.all(), now, since)
                    cut = any(one.due <= now for one in found)
                    if cut:
                        break
        if not cut:
            found = await self._listing.standings(heads.all(), now, since)
        return found, cut


class _Search:
    """Ready messages, lane after lane."""

    def __init__(self, listing: Listing, now: int, wanted: int, since: int) -> None:
        self._listing = listing
        self._now = now
        self._wanted = wanted
        self.since = since
        self.found: list[Seen] = []
        self.next_due: int | None = None

    @property
    def full(self) -> bool:
        """As many were found as are wanted."""
        return len(self.found) >= self._wanted

    def coming(self, due: int) -> None:
        """One becomes due later."""
        if self.next_due is None or due < self.next_due:
            self.next_due = due

    async def lane(self, pages: AsyncIterator[list[Seen]], heads: list[Standing]) -> None:
        """Go through a lane, and through the heads of groups that have its priority."""
        waiting: list[_Ranked] = []
        for head in heads:
            self._rank(head, waiting)
        async for page in pages:
            if not page:
                continue
            due = [seen for seen in page if seen.name.time <= self._now + SLACK]
            for start in range(0, len(due), SLICE):
                part = due[start : start + SLICE]
                for standing in await self._listing.standings(part, self._now, self.since):
                    self._rank(standing, waiting)
                # What comes later in the lane is not due before this.
                self._take(waiting, part[-1].name.time - SLACK)
                if self.full:
                    return
            if len(due) < len(page):
                self._look_ahead(page[len(due) :])
                break
            self._take(waiting, page[-1].name.time)
            if self.full:
                return
        self._take(waiting, None)

    def _rank(self, standing: Standing, waiting: list[_Ranked]) -> None:
        if self._listing.is_unreadable(standing.seen):
            return
        if standing.due <= self._now:
            heapq.heappush(waiting, (standing.due, standing.seen.name.key, standing.seen))
        else:
            self.coming(standing.due)

    def _take(self, waiting: list[_Ranked], until: int | None) -> None:
        while waiting and not self.full and (until is None or waiting[0][0] <= until):
            self.found.append(heapq.heappop(waiting)[2])

    def _look_ahead(self, later: list[Seen]) -> None:
        """When the first of those that are not due yet will be."""
        for seen in later:
            standing = self._listing.standing(seen, self._now, self.since)
            self.coming(seen.name.time if standing is None else max(standing.due, self._now + 1))
            if seen.kind == Kind.PLAIN:
                return
