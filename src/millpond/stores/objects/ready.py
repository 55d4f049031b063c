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
from millpond.stores.objects.presence import Presence
from millpond.stores.objects.records import Kind
from millpond.stores.objects.rivals import Share
from millpond.stores.objects.writes import SLACK

LONG = 1000
"""A page of so many objects is hardly the only one."""
WINDOW = 1000
"""Messages that a listing is searched for while others are met: about what its first page holds."""
WINDOW_AGE = 5.0
"""Seconds for which messages are chosen from that listing, at most: it knows nothing of what came since."""
WINDOWS = 64
"""Queues of which a window is kept."""
FRESH = 0.5
"""Seconds for which a listing is good enough to choose from what is another process's: that one takes it, too."""
BORROWED = 8
"""Messages of others taken at a time, by whoever has none left of its own."""
FRONT = 64
"""The first messages of a listing that are others' to take; if they stay there they are anybody's."""
LEFT_LYING = 20.0
"""Seconds after which they are: their process is busy, or slower than all others, or gone."""
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

    left: list[tuple[Seen, bool]]
    """What is to be chosen first comes last; and whether it is this process's."""
    since: int
    at: float
    """Monotonic time of the listing."""
    next_due: int | None
    more: bool
    share: Share | None
    """By which it was dealt out."""
    chosen: list[Seen]
    """What was chosen from it, and may not have been taken yet."""


def _in_order(seen: Seen) -> tuple[int, int]:
    return -(seen.name.priority or 0), seen.name.key


class Ready:
    """Answers what is ready."""

    def __init__(self, engine: Engine, listing: Listing, groups: Groups, presence: Presence) -> None:
        self._engine = engine
        self._listing = listing
        self._groups = groups
        self._presence = presence
        self._windows: OrderedDict[tuple[str, str], _Window] = OrderedDict()
        self._fronts: OrderedDict[tuple[str, str], dict[int, float]] = OrderedDict()
        """Queue → key of a message of others that is at the front → monotonic time at which it was first seen there."""

    async def ready(self, namespace: str, queue: str, now: int, limit: int) -> ReadyPage:
        """The first ``limit`` records that are due at ``now`` and not blocked by their group.

        While others are met, first those that are this process's by their agreement (`rivals`): several who see the
        same head of a queue would race for the same messages, and read them all for nothing."""
        page = await self._look(namespace, queue, now, limit)
        for _ in range(LOOKS):
            if page.records or not page.more:
                break
            # All of them were unreadable, or gone by now; what cannot be read is left out next time.
            page = await self._look(namespace, queue, now, limit)
        return page

    async def _look(self, namespace: str, queue: str, now: int, limit: int) -> ReadyPage:
        place = (namespace, queue)
        if not self._engine.rivals.met(place):
            self._windows.pop(place, None)
            self._fronts.pop(place, None)
            search, cut = await self._search(namespace, queue, now, limit + 1)
            more = len(search.found) > limit or (cut and bool(search.found))
            first = await self._read(search.found[:limit], now, search)
            return ReadyPage(first, more, search.next_due)
        await self._presence.tell(place)
        page = await self._choose(place, now, limit)
        if page is None:
            search, cut = await self._search(namespace, queue, now, max(WINDOW, limit + 1))
            at = self._engine.clock.monotonic()
            some, more = bool(search.found), search.full or cut
            share = self._engine.rivals.share(place)
            left = self._deal(place, search.found, at, share)
            self._windows[place] = _Window(left, search.since, at, search.next_due, more, share, [])
            if len(self._windows) > WINDOWS:
                self._windows.popitem(last=False)
            page = await self._choose(place, now, limit)
            if page is None:
                return ReadyPage([], some, search.next_due)
        return page

    def _deal(
        self, place: tuple[str, str], found: list[Seen], at: float, share: Share | None
    ) -> list[tuple[Seen, bool]]:
        """Of each priority, first what is this process's, in order, then what is others', by chance. The last first."""
        fronts = self._fronts.pop(place, {})
        front: dict[int, float] = {}
        mine: dict[int, list[Seen]] = {}
        theirs: dict[int, list[Seen]] = {}
        for seen in found:
            priority = seen.name.priority or 0
            # A group as a whole: who has handed out one of its messages knows most of what is needed for the next.
            number = int(seen.name.group[:16], 16) if seen.name.group else seen.name.key
            own = share is not None and share.has(number)
            if not own and share is not None and len(front) < FRONT:
                since = front[seen.name.key] = fronts.get(seen.name.key, at)
                # Not of everybody else's at once.
                own = at - since >= LEFT_LYING and not self._engine.ids.below(len(share.others))
            (mine if own else theirs).setdefault(priority, []).append(seen)
        self._fronts[place] = front
        if len(self._fronts) > WINDOWS:
            self._fronts.popitem(last=False)
        below = self._engine.ids.below
        left: list[tuple[Seen, bool]] = []
        for priority in sorted({*mine, *theirs}):
            others = theirs.get(priority, [])
            while others:
                left.append((others.pop(below(len(others))), False))
            left += [(seen, True) for seen in reversed(mine.get(priority, []))]
        return left

    async def _choose(self, place: tuple[str, str], now: int, limit: int) -> ReadyPage | None:
        """Some of the window, which then are not in it any more; None when it is over, or nothing of it is left."""
        window = self._windows.get(place)
        age = 0.0 if window is None else self._engine.clock.monotonic() - window.at
        if window is None or age > WINDOW_AGE:
            return None
        share = self._engine.rivals.share(place)
        if share != window.share:
            # Somebody else was met since.
            found = sorted((seen for seen, _ in window.left), key=_in_order)
            window = window._replace(left=self._deal(place, found, window.at, share), share=share)
            self._windows[place] = window
        left = window.left
        chosen: list[Seen] = []
        again = self._not_taken(window.chosen, now)
        own = bool(again)
        # At the end of a queue all have nothing of their own left.
        borrowed = min(BORROWED, 1 + len(left) // (1 + len(share.others))) if share is not None else BORROWED
        while left and len(again) + len(chosen) < limit:
            seen, mine = left[-1]
            if not mine and (own or age > FRESH or len(chosen) >= borrowed):
                break
            own = own or mine
            chosen.append(seen)
            left.pop()
        window.chosen.extend(chosen)
        result = await self._read(sorted([*again, *chosen], key=_in_order), now, window)
        if (len(result) - len(again)) * 2 < len(chosen):
            # Others have taken most of it.
            self._windows.pop(place, None)
        return ReadyPage(result, bool(left) or window.more, window.next_due) if result else None

    def _not_taken(self, chosen: list[Seen], now: int) -> list[Seen]:
        """What was chosen before, and is known to be there still; what is being written at this moment is left out. The
        list is cut down to these."""
        engine = self._engine
        there: list[Seen] = []
        free: list[Seen] = []
        for seen in chosen:
            known = engine.index.get(seen.name.path)
            if known is not None and known.record.due <= now:
                there.append(seen)
                if not engine.is_being_written(seen.name):
                    free.append(seen)
        chosen[:] = there
        return free

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
