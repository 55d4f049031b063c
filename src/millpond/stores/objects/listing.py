"""Listings of a queue's messages, and what they tell without a read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncGenerator
from typing import NamedTuple

from millpond.errors import StoreCorrupt, StoreError, StoreMismatch
from millpond.stores.base import Box
from millpond.stores.objects import names, records
from millpond.stores.objects.bucket import Entry, Tag
from millpond.stores.objects.engine import OLD, Engine, log
from millpond.stores.objects.index import Known, same
from millpond.stores.objects.moves import Moves
from millpond.stores.objects.names import Name
from millpond.stores.objects.records import Kind

AHEAD = 60_000
"""Milliseconds by which an object may seem to be written in the future before its time of writing is not believed."""
LEFTOVERS = 32
"""Intents and tombstones of others seen to at once: after a crash of many there may be thousands."""
UNREADABLE = 10_000
"""Objects remembered that cannot be read."""


class Seen(NamedTuple):
    """A message in a listing."""

    name: Name
    entry: Entry
    kind: int
    code: int


class Standing(NamedTuple):
    """How a message stands, as far as that can be told."""

    seen: Seen
    due: int
    leased: bool
    expires: int | None


class Listing:
    """Reads listings, and puts to rights what others left half done in them."""

    def __init__(self, engine: Engine, moves: Moves) -> None:
        self._engine = engine
        self._moves = moves
        self._unreadable: OrderedDict[str, Tag | None] = OrderedDict()
        self._seen_to: set[str] = set()

    def parse(self, page: list[Entry], box: Box) -> list[Seen]:
        """The messages in a page of a box, in order; leftovers are seen to on the way."""
        seen: list[Seen] = []
        for entry in page:
            kind, code = records.form(entry.size)
            try:
                name = names.parse(entry.name)
            except StoreCorrupt as error:
                self.report(entry.name, error)
                continue
            if name.box is not box:
                continue
            if kind in (Kind.MOVING, Kind.GONE):
                # Each once, and few at a time: every look at the queue meets all of them again.
                if (
                    self._engine.now() - entry.modified > OLD
                    and len(self._seen_to) < LEFTOVERS
                    and entry.name not in self._seen_to
                ):
                    self._seen_to.add(entry.name)
                    self._engine.spawn(self._see_to(name, kind))
                continue
            if name.group:
                self._engine.met(name)
            if not self._engine.has_left(entry.name):
                seen.append(Seen(name, entry, kind, code))
        seen.sort(key=lambda one: (one.name.lane, one.name.path))
        return seen

    async def _see_to(self, name: Name, kind: int) -> None:
        try:
            await (self._moves.rescue(name) if kind == Kind.MOVING else self._moves.clear(name))
        except StoreError as error:
            log.warning("millpond.objects.move_unfinished", extra={"object": name.path, "reason": str(error)})
        finally:
            self._seen_to.discard(name.path)

    def report(self, path: str, error: Exception, tag: Tag | None = None) -> None:
        """Log, once, that an object cannot be read; ``tag``: in the version that was listed."""
        if path not in self._unreadable:
            log.error("millpond.objects.unreadable", extra={"object": path, "reason": str(error)})
        self._unreadable[path] = tag
        if len(self._unreadable) > UNREADABLE:
            self._unreadable.popitem(last=False)

    def is_unreadable(self, seen: Seen) -> bool:
        """Whether it could not be read, and has not changed since."""
        tag = self._unreadable.get(seen.name.path)
        return tag is not None and same(tag, seen.entry.tag)

    async def pages(self, namespace: str, queue: str, box: Box) -> AsyncGenerator[list[Seen], None]:
        """A whole box, page by page."""
        async with self._engine.listing(names.box_prefix(namespace, queue, box)) as pages:
            async for page in pages:
                yield self.parse(page, box)

    # How messages stand

    def known(self, seen: Seen, since: int = -1) -> Known | None:
        """What this process knows of the object as listed; or as written by itself after the listing was asked for, at
        ``since``."""
        known = self._engine.index.get(seen.name.path)
        if known is not None and (known.seq > since >= 0 or same(known.tag, seen.entry.tag)):
            self._engine.skew.observe(seen.name.path, seen.entry.tag, seen.entry.modified)
            return known
        return None

    def standing(self, seen: Seen, now: int, since: int = -1) -> Standing | None:
        """How it stands at ``now``, without a read: then ``due`` of one that is not due yet may be too early. None: it
        has to be read."""
        name = seen.name
        known = self.known(seen, since)
        if known is not None:
            record = known.record
            return Standing(seen, record.due, record.leased, record.expires)
        if seen.kind == Kind.PLAIN:
            return Standing(seen, name.time, False, name.expires)
        if seen.kind in (Kind.HELD, Kind.WAITING):
            lasts = seen.entry.modified + records.stays(seen.code)
            if now < lasts and seen.entry.modified <= now + AHEAD:
                return Standing(seen, lasts, seen.kind == Kind.HELD, name.expires)
        return None

    async def standings(self, page: list[Seen], now: int, since: int = -1) -> list[Standing]:
        """How these stand at ``now``; those that have gone meanwhile, or cannot be read, are left out."""
        result: list[Standing | None] = []
        unknown: list[int] = []
        asked: list[Seen] = []
        for seen in page:
            standing = self.standing(seen, now, since)
            if standing is None:
                if self.is_unreadable(seen):
                    continue
                unknown.append(len(result))
                asked.append(seen)
            result.append(standing)
        if unknown:
            found = await self._engine.fetch_all([seen.name for seen in asked])
            for index, seen, one in zip(unknown, asked, found, strict=True):
                if isinstance(one, StoreError):
                    if not isinstance(one, StoreCorrupt | StoreMismatch):
                        raise one
                    self.report(seen.name.path, one, seen.entry.tag)
                elif one is not None and one.known is not None:
                    record = one.known.record
                    result[index] = Standing(seen, record.due, record.leased, record.expires)
        return [standing for standing in result if standing is not None]

    async def read(self, chosen: list[Seen], since: int = -1) -> list[Known]:
        """The records of these, in order, without those that have gone or cannot be read."""
        result: list[Known | None] = [self.known(seen, since) for seen in chosen]
        missing = [
            index for index, known in enumerate(result) if known is None and not self.is_unreadable(chosen[index])
        ]
        if missing:
            found = await self._engine.fetch_all([chosen[index].name for index in missing])
            for index, one in zip(missing, found, strict=True):
                if isinstance(one, StoreError):
                    if not isinstance(one, StoreCorrupt | StoreMismatch):
                        raise one
                    self.report(chosen[index].name.path, one, chosen[index].entry.tag)
                elif one is not None:
                    result[index] = one.known
        return [known for known in result if known is not None]
