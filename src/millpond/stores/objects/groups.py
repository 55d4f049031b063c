"""Ordering groups: of each group one message at a time may be leased.

A pointer names the message of a group that may be leased. It moves on only when that message has left the live box,
which it does for good, since no name is used twice; and it is moved under a condition. So however listings, clocks and
processes race, a second message of the group can be leased only after the first one is gone. In which order they come
is up to their keys: the time of entry, by the clocks of those who put them in.
"""

from __future__ import annotations

from collections import OrderedDict

from millpond.errors import StoreCorrupt, StoreMismatch
from millpond.stores.base import Box
from millpond.stores.objects import names, records
from millpond.stores.objects.bucket import Content, Tag
from millpond.stores.objects.engine import Engine, log
from millpond.stores.objects.names import Name
from millpond.stores.objects.records import Pointer, Record

REMEMBERED = 100_000
"""Pointers known at once, and firsts of groups from listings."""
TRIES = 16
"""Races lost to others who move the same pointer."""
STUCK = 60.0
"""Seconds for which a group is left alone whose pointer cannot be read: else each look would try, and pay for it."""
GOING_PAUSE = 5.0
"""The same for one whose pointer somebody is about to delete."""
GOING = 30_000
"""Milliseconds for which a delete may be on its way."""

Group = tuple[str, str, str]
"""Namespace, queue, hash."""


class Groups:
    """The pointers of all queues, as far as this process knows them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: OrderedDict[Group, tuple[str, Tag]] = OrderedDict()
        self._firsts: OrderedDict[Group, str] = OrderedDict()
        self._stuck: OrderedDict[Group, float] = OrderedDict()
        """Group → the moment, monotonic, at which it is tried again."""

    @staticmethod
    def of(name: Name) -> Group:
        """The group of a message."""
        return name.namespace, name.queue, name.group

    def leader(self, group: Group) -> str | None:
        """The place that the pointer names, as far as this process knows."""
        known = self._known.get(group)
        return None if known is None else known[0]

    def first(self, name: Name) -> None:
        """A listing has shown that this one is the first of its group."""
        group = self.of(name)
        self._firsts[group] = name.place
        self._firsts.move_to_end(group)
        if len(self._firsts) > REMEMBERED:
            self._firsts.popitem(last=False)

    def _know(self, group: Group, place: str, tag: Tag) -> None:
        self._known[group] = (place, tag)
        self._known.move_to_end(group)
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    def is_stuck(self, group: Group) -> bool:
        """Whether a moment ago its pointer, or what that names, could not be read, or the pointer was about to be
        deleted: nothing of it is handed out."""
        until = self._stuck.get(group)
        if until is not None and self._engine.clock.monotonic() >= until:
            del self._stuck[group]
            until = None
        return until is not None

    def unstick(self, group: Group) -> None:
        """Its pointer has been written anew."""
        self._stuck.pop(group, None)
        self._known.pop(group, None)

    async def may_lead(self, name: Name) -> bool:
        """Whether the message may be leased, as the first of its group; makes it that if its turn has come."""
        try:
            return await self._lead(name)
        except (StoreCorrupt, StoreMismatch) as error:
            # What is damaged holds up its own group, and not who asks for a message of any other.
            group = self.of(name)
            log.error("millpond.objects.unreadable", extra={"object": names.pointer(*group), "reason": str(error)})
            self._stick(group, STUCK)
            return False

    def _stick(self, group: Group, seconds: float) -> None:
        self._stuck[group] = self._engine.clock.monotonic() + seconds
        if len(self._stuck) > REMEMBERED:
            self._stuck.popitem(last=False)

    async def _lead(self, name: Name) -> bool:
        group = self.of(name)
        known = self._known.get(group)
        if known is not None and known[0] == name.place:
            return True
        path = names.pointer(*group)
        exchange = self._engine.exchange
        # What was known may be old; but if what it names is gone, then moving it on is safe under its tag.
        fresh = known is None
        content: Content | None = None
        for _ in range(TRIES):
            if fresh:
                content = await exchange.read(path)
                if content is None:
                    if not await self._is_first(name):
                        return False
                    data = self._encode(name.place)
                    result: Tag | Content | None = await exchange.create(path, data, insist=True)
                    if isinstance(result, Tag):
                        self._know(group, name.place, result)
                        return True
                    continue
                pointer = records.decode(Pointer, content.data, path)
                if pointer.going and self._engine.now() - content.modified <= GOING:
                    # Whoever moved it on now might have it deleted under him.
                    self._stick(group, GOING_PAUSE)
                    return False
                place, tag = pointer.place, content.tag
                self._know(group, place, tag)
            else:
                assert known is not None
                place, tag = known
            if place == name.place:
                return True
            if not await self._has_left(names.of_place(name.namespace, name.queue, place)):
                if fresh:
                    return False
                fresh = True
                continue
            if not await self._is_first(name):
                return False
            result = await exchange.swap(path, self._encode(name.place), tag)
            if isinstance(result, Tag):
                self._know(group, name.place, result)
                return True
            self._known.pop(group, None)
            fresh = True
        return False

    def _encode(self, place: str, *, going: bool = False) -> bytes:
        return records.encode(Pointer(records.FORMAT, self._engine.write_id(), place, going))

    async def _has_left(self, name: Name) -> bool:
        """Whether a message is not under this name in the live box any more."""
        if self._engine.has_left(name.path):
            return True
        found = await self._engine.fetch(name)
        if found is not None and isinstance(found.held, Record):
            return False
        self._engine.leave(name.path)
        return True

    async def _is_first(self, name: Name) -> bool:
        """Whether no message of the group that is there entered before this one."""
        if self._firsts.get(self.of(name)) == name.place:
            return True
        prefix = f"{names.box_prefix(name.namespace, name.queue, Box.LIVE)}{names.GROUP_LANE}/"
        async with self._engine.listing(prefix) as pages:
            async for page in pages:
                for entry in page:
                    try:
                        other = names.parse(entry.name)
                    except StoreCorrupt:
                        # Somebody else's object; listings of the queue report it.
                        continue
                    kind = records.form(entry.size).kind
                    if other.group == name.group and kind not in (records.Kind.GONE, records.Kind.MOVING):
                        self.first(other)
                        return other.place == name.place
        return False

    async def remove(self, namespace: str, queue: str, path: str, content: Content) -> bool:
        """Delete a pointer to a message that has left, if nobody has moved it on meanwhile."""
        pointer = records.decode(Pointer, content.data, path)
        if not pointer.going and not await self._has_left(names.of_place(namespace, queue, pointer.place)):
            return False
        in_time = self._engine.limit(GOING // 2)
        result = await self._engine.exchange.swap(path, self._encode(pointer.place, going=True), content.tag)
        if not isinstance(result, Tag):
            return False
        self._known.pop((namespace, queue, names.last_part(path)), None)
        # Where the reply took long, others may be about to move it on: it is left to the next sweep.
        return await self._engine.exchange.delete_reusable(path, in_time)
