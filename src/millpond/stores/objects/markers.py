"""Unique keys and chosen ids: objects that say they are taken.

An insert that needs one writes it as pending, then the message, then confirms it. Whoever meets a pending marker looks
for its message: if that is there the insert has succeeded, and he may confirm the marker himself; if not he waits a
little, sees to it that the message will not come any more, and takes the marker over.

What a hand-off brings comes with its intent, which is written over the message that is handed off as it was before the
markers were. So who takes such a marker over writes that message anew first, as it is: the intent then meets another
version, and its writer, before he tries again, must renew his markers (`Markers.renew`) or finds that he has lost one.

The names of markers are used again, so a marker is never simply deleted: it is first replaced, under a condition, by
one that says it is going, which nobody takes over while the delete may be on its way.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from millpond.errors import StoreError
from millpond.stores.base import Box, Cause, Conflict, Unique
from millpond.stores.objects import names, records
from millpond.stores.objects.bucket import Content, Tag
from millpond.stores.objects.engine import Engine
from millpond.stores.objects.index import Known
from millpond.stores.objects.names import Name
from millpond.stores.objects.records import Goal, Intent, Marker, Record, Standing, Tombstone

PATIENCE = 5
"""Looks at a pending marker without its message, some two seconds in all: an insert takes a tenth of that."""
GOING = 30_000
"""Milliseconds for which a delete may be on its way."""
TRIES = 64
"""Markers that keep changing under an insert."""


class Claim(NamedTuple):
    """A marker that belongs to this process's insert until it is confirmed."""

    path: str
    marker: Marker
    tag: Tag


class Markers:
    """The markers of all queues."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def of_unique(self, name: Name, birth: bytes, unique: Unique, via: str) -> tuple[str, Marker]:
        """The marker of a unique key, pending."""
        marker = self._pending(name, birth, unique.until, via)
        return names.unique_marker(name.namespace, name.queue, unique.key), marker

    def of_id(self, name: Name, birth: bytes, via: str, until: int = 0) -> tuple[str, Marker]:
        """The marker of an id, pending. ``until``: the id stays taken as long at least, whatever becomes of its
        message."""
        return names.id_marker(name.namespace, name.queue, name.id), self._pending(name, birth, until, via)

    def _pending(self, name: Name, birth: bytes, until: int, via: str) -> Marker:
        return Marker(
            records.FORMAT,
            self._engine.write_id(),
            Standing.PENDING,
            birth,
            1,
            name.id,
            name.place,
            until,
            via,
        )

    def confirmed(self, marker: Marker) -> Marker:
        """The same, once its message is there."""
        return msgspec.structs.replace(marker, write_id=self._engine.write_id(), standing=Standing.CONFIRMED, via="")

    # Taking

    async def acquire(self, owner: Name, path: str, marker: Marker, unique: Unique | None) -> Claim | Conflict:
        """Write a pending marker, unless the key or id is taken. ``unique``: it is that of this key."""
        exchange = self._engine.exchange
        data = records.encode(marker)
        patience = PATIENCE
        for _ in range(TRIES):
            result: Tag | Content | None = await exchange.create(path, data, insist=True)
            while isinstance(result, Content):
                present = records.decode(Marker, result.data, path)
                verdict = await self._judge(owner, path, present, result, unique, patience)
                if isinstance(verdict, Conflict):
                    return verdict
                if verdict:
                    result = await exchange.swap(path, data, result.tag)
                    continue
                await exchange.pause(PATIENCE - patience)
                patience -= 1
                result = await exchange.read(path)
            if result is not None:
                return Claim(path, marker, result)
        raise StoreError(f"marker {path} keeps changing; try again")

    async def _judge(
        self, owner: Name, path: str, present: Marker, content: Content, unique: Unique | None, patience: int
    ) -> Conflict | bool:
        """Why the marker is in the way, or whether it may be taken over now."""
        if present.standing == Standing.GOING:
            return self._engine.now() - content.modified > GOING or patience <= -TRIES
        if unique is not None and present.until <= unique.now:
            return True
        taken = Conflict(Cause.UNIQUE if unique is not None else Cause.EXISTS, present.id)
        if present.standing == Standing.CONFIRMED:
            lasts = unique is not None or present.until > self._engine.now()
            return taken if lasts or await self._is_there(owner, present) else True
        if await self._is_there(owner, present) or (
            patience <= 0 and not await self.fence(owner.namespace, owner.queue, present)
        ):
            await self._engine.exchange.swap(path, records.encode(self.confirmed(present)), content.tag)
            return taken
        return patience <= 0

    async def fence(self, namespace: str, queue: str, marker: Marker) -> bool:
        """Take the name that a pending marker's message has not taken yet, so that it will not come at all, however
        slow its writer or his request are; False: it was there after all."""
        engine = self._engine
        if marker.via:
            return await self._fence_source(marker)
        name = names.of_place(namespace, queue, marker.place)
        stone = Tombstone(records.FORMAT, engine.write_id(), engine.ids.random(records.BIRTH_BYTES), 1, "")
        result = await engine.exchange.create(name.path, records.encode_tombstone(stone), insist=True)
        if isinstance(result, Tag):
            return True
        held = records.decode_held(result.data, name.path)
        return isinstance(held, Tombstone) or held.birth != marker.birth

    async def _fence_source(self, marker: Marker) -> bool:
        """As `fence`, of a message that a hand-off is to bring: change the version of what is handed off."""
        engine = self._engine
        source = names.parse(marker.via)
        for _ in range(TRIES):
            found = await engine.fetch(source)
            if found is None:
                return True
            if isinstance(found.held, Intent):
                return not any(target.birth == marker.birth for target in found.held.targets)
            if found.known is None:
                return True
            same = msgspec.structs.replace(found.known.record, write_id=engine.write_id())
            if isinstance(await engine.swap_record(found.known, same, claimed=found.known.claimed), Known):
                return True
        raise StoreError(f"object {marker.via} keeps changing; try again")

    async def renew(self, claim: Claim) -> Claim | None:
        """Write a pending marker anew, so that who is about to take it over has to look again; None if it is another's
        by now."""
        fresh = msgspec.structs.replace(claim.marker, write_id=self._engine.write_id())
        result = await self._engine.exchange.swap(claim.path, records.encode(fresh), claim.tag)
        return Claim(claim.path, fresh, result) if isinstance(result, Tag) else None

    async def other(self, owner: Name, claim: Claim) -> str | None:
        """The id of the message that has taken a marker over from this claim; None if none has yet, or if that message
        is not there either."""
        content = await self._engine.exchange.read(claim.path)
        if content is None:
            return None
        present = records.decode(Marker, content.data, claim.path)
        if present.birth == claim.marker.birth:
            return None
        there = present.standing == Standing.CONFIRMED and present.until > 0
        return present.id if there or await self._is_there(owner, present) else None

    async def _is_there(self, owner: Name, marker: Marker) -> bool:
        """Whether the message that a marker speaks of is in one of the boxes, or about to be."""
        if await self.find(owner.namespace, owner.queue, marker) is not None:
            return True
        if not marker.via:
            return False
        content = await self._engine.exchange.read(marker.via)
        if content is None or records.form(len(content.data)).kind != records.Kind.MOVING:
            return False
        intent = records.decode_held(content.data, marker.via)
        return isinstance(intent, Intent) and any(target.birth == marker.birth for target in intent.targets)

    async def find(self, namespace: str, queue: str, marker: Marker) -> Name | None:
        """Where the message of a marker is. A message on its way from one box to the other is found where it goes."""
        live = names.of_place(namespace, queue, marker.place)
        # To the dead box first: from the live box to the dead one is how messages go without a new name.
        for name in (live, names.in_box(live, Box.DEAD, live.priority or 0)):
            found = await self._engine.fetch(name)
            if found is None:
                continue
            if isinstance(found.held, Record):
                return name
            if isinstance(found.held, Intent):
                for target in found.held.targets:
                    if target.birth == found.held.birth:
                        return names.parse(target.path)
        return None

    # What becomes of it

    async def confirm(self, claim: Claim) -> str | None:
        """The message is there. The id of another message, if that has taken the marker over: then the caller's own
        has to be withdrawn."""
        return await self.settle(claim.path, self.confirmed(claim.marker), claim.tag)

    async def settle(
        self, path: str, marker: Marker, tag: Tag | None, *, unless_there: tuple[str, str] | None = None
    ) -> str | None:
        """See to it that a marker is confirmed as this one; ``tag``: of the pending one, if it is known.

        ``unless_there``: in this queue another's marker gives way, too, unless its message is there."""
        exchange = self._engine.exchange
        data = records.encode(marker)
        for _ in range(TRIES):
            result: Tag | Content | None
            if tag is None:
                content = await exchange.read(path)
                result = content if content is not None else await exchange.create(path, data, insist=True)
            else:
                result = await exchange.swap(path, data, tag)
            if isinstance(result, Tag):
                return None
            tag = None
            if result is None:
                continue
            present = records.decode(Marker, result.data, path)
            if present.birth != marker.birth:
                if unless_there is None or await self.find(*unless_there, present) is not None:
                    return present.id
            elif present.standing == Standing.CONFIRMED and present.version >= marker.version:
                return None
            tag = result.tag
        raise StoreError(f"marker {path} keeps changing; try again")

    async def point(self, namespace: str, queue: str, path: str, marker: Marker) -> None:
        """A message has a new place: its marker says so, unless that says something newer.

        A marker of its id that is another's is left from an insert that was refused, or from a message that is gone;
        or a new message has the id by now, and this one is gone."""
        await self.settle(path, marker, None, unless_there=(namespace, queue))

    async def release(self, claims: list[Claim]) -> None:
        """The insert did not take place: others need not wait for it."""
        for claim in claims:
            free = msgspec.structs.replace(
                claim.marker, write_id=self._engine.write_id(), standing=Standing.CONFIRMED, until=0, via=""
            )
            await self._engine.exchange.swap(claim.path, records.encode(free), claim.tag)

    async def remove(self, path: str, content: Content) -> bool:
        """Delete a marker that has lost its meaning, if nobody has given it a new one meanwhile."""
        marker = records.decode(Marker, content.data, path)
        if marker.standing == Standing.GOING and self._engine.now() - content.modified <= GOING:
            # The delete of who said so may be on its way: it must not find what comes after this one's.
            return False
        going = msgspec.structs.replace(marker, write_id=self._engine.write_id(), standing=Standing.GOING)
        in_time = self._engine.limit(GOING // 2)
        result = await self._engine.exchange.swap(path, records.encode(going), content.tag)
        if not isinstance(result, Tag):
            return False
        # Where the reply took long, others may be about to take it over: it is left to the next sweep.
        return await self._engine.exchange.delete_reusable(path, in_time)

    async def redeem(self, path: str, birth: bytes) -> None:
        """The message with this birth is there, and about to go: see to it that its marker is confirmed. Raises
        StoreError."""
        for _ in range(TRIES):
            content = await self._engine.exchange.read(path)
            if content is None:
                return
            marker = records.decode(Marker, content.data, path)
            if marker.birth != birth or marker.standing != Standing.PENDING:
                return
            data = records.encode(self.confirmed(marker))
            if isinstance(await self._engine.exchange.swap(path, data, content.tag), Tag):
                return
        raise StoreError(f"marker {path} keeps changing; try again")

    def goal(self, claim: Claim, target: int) -> Goal:
        """What an intent says of a marker that belongs to one of its targets."""
        return Goal(claim.path, records.encode(self.confirmed(claim.marker)), target)
