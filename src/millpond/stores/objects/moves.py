"""Moves: a message goes into another object, or makes way for several.

The message's object is replaced, under a condition, by an intent that holds the whole outcome. That one write decides.
Then the objects that the intent names are written, and the intent is deleted. Its writer does that; should he die,
whoever meets the intent when it is old takes it over, again under a condition, and finishes it.

What an intent has brought may be found, used up and removed while the intent is still there. Its name must then not
become free, or who finishes the intent would write it again: what was acked would come back. So each record says which
object it came out of, and until that is known to be gone a removal leaves a tombstone under the name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from millpond.errors import StoreError
from millpond.stores.objects import names, records
from millpond.stores.objects.bucket import Content, Tag
from millpond.stores.objects.engine import HALF, OLD, Engine, Found, log
from millpond.stores.objects.index import Known
from millpond.stores.objects.markers import Markers
from millpond.stores.objects.names import Name
from millpond.stores.objects.records import Goal, Intent, Marker, Record, Target, Tombstone


class NewRecord(NamedTuple):
    """A record that a move brings."""

    name: Name
    record: Record


class Moved:
    """The move took place: nothing of it is taken back."""


def _deadline(engine: Engine) -> Callable[[], None]:
    """Raises StoreError when its time is over for a writer to touch its own intent."""
    in_time = engine.limit(HALF)

    def check() -> None:
        if not in_time():
            raise StoreError("it takes too long; whoever meets the object will finish it")

    return check


class Moves:
    """Moves of all queues."""

    def __init__(self, engine: Engine, markers: Markers) -> None:
        self._engine = engine
        self._markers = markers
        self.finished = 0
        """Intents of others that this process finished."""

    async def move(
        self, known: Known, brings: list[NewRecord], goals: list[Goal], *, blob: str
    ) -> Moved | Found | None:
        """Replace a record by others; or what is there instead of it. Raises OutcomeUnknown, StoreError.

        Once the intent is written the move is made, whether it can be finished now or not."""
        engine = self._engine
        source, record = known.name, known.record
        write_id = engine.write_id()
        now = engine.now()
        targets = [
            Target(one.name.path, records.encode_record(one.record, one.name, now), one.record.birth) for one in brings
        ]
        intent = Intent(
            records.FORMAT,
            write_id,
            write_id,
            record.birth,
            record.version + 1,
            record.id,
            targets,
            goals,
            blob,
            record.via,
        )
        check = _deadline(engine)
        try:
            result = await engine.exchange.swap(
                source.path,
                records.encode_intent(intent),
                known.tag,
                # Of an intent that was worked off a tombstone may be left; it is not followed by anything else.
                lost=lambda content: records.form(len(content.data)).kind != records.Kind.GONE,
            )
        except BaseException:
            engine.index.forget(source.path)
            raise
        if not isinstance(result, Tag):
            engine.index.forget(source.path)
            return None if result is None else await self._instead(source, result, write_id)
        engine.leave(source.path)
        try:
            await self._finish(source, intent, result, check, brings)
        except StoreError as error:
            log.warning(
                "millpond.objects.move_unfinished",
                extra={"object": source.path, "message_id": record.id, "reason": str(error)},
            )
        return Moved()

    async def _instead(self, source: Name, content: Content, origin: bytes) -> Moved | Found:
        found = self._engine.take_in(source, content)
        if isinstance(found.held, Intent) and found.held.origin == origin:
            # Ours after all, and so long ago that somebody else is finishing it.
            return Moved()
        return found

    async def rescue(self, source: Name) -> bool:
        """Finish an intent whose writer must have died; whether that was done.

        One at a time: who takes it over makes it young again."""
        engine = self._engine
        check = _deadline(engine)
        found = await engine.fetch(source)
        if found is None or not isinstance(found.held, Intent) or engine.now() - found.modified <= OLD:
            return False
        intent = msgspec.structs.replace(found.held, write_id=engine.write_id())
        result = await engine.exchange.swap(source.path, records.encode_intent(intent), found.tag)
        if not isinstance(result, Tag):
            return False
        await self._finish(source, intent, result, check, [])
        self.finished += 1
        log.info("millpond.objects.move_finished", extra={"object": source.path, "message_id": intent.id})
        return True

    async def _finish(
        self, source: Name, intent: Intent, tag: Tag, check: Callable[[], None], brings: list[NewRecord]
    ) -> None:
        engine = self._engine
        # Its object is there as long as the intent is: nothing comes back by being written again (see above).
        created = await asyncio.gather(
            *(
                engine.exchange.create_until(target.path, target.data, insist=True, check=check)
                for target in intent.targets
            )
        )
        for one, (result, _) in zip(brings, created, strict=False):
            if isinstance(result, Tag):
                engine.index.put(one.name, result, one.record)
        for goal in intent.goals:
            check()
            marker = records.decode(Marker, goal.data, goal.path)
            if goal.target < 0:
                await self._markers.point(source.namespace, source.queue, goal.path, marker)
                continue
            # Once the intent is written nobody takes the marker over but when its unique key has ended: whoever has it
            # then, this message came first, and stays.
            await self._markers.settle(goal.path, marker, None)
        if any(unsure for _, unsure in created):
            # A create that was given up may arrive yet. As long as the intent is there it finds its name taken, if only
            # by a tombstone; later it would bring back what has been used up.
            log.warning(
                "millpond.objects.move_unfinished",
                extra={"object": source.path, "message_id": intent.id, "reason": "the reply to a write got lost"},
            )
            return
        check()
        await self._end(source, tag, intent.birth, intent.version, intent.via)
        for one in brings:
            known = engine.index.get(one.name.path)
            if known is not None and known.record.via == source.path:
                # From now on it may simply be deleted.
                record = msgspec.structs.replace(known.record, via="")
                engine.index.put(known.name, known.tag, record, claimed=known.claimed)
        if intent.blob:
            await engine.exchange.delete(names.blobs_prefix(source.namespace, source.queue) + intent.blob)

    # Ends of objects

    async def settled(self, known: Known) -> bool:
        """Whether the record's name may become free: the object that it came out of is gone."""
        if not known.record.via:
            return True
        if not await self._engine.is_gone(known.record.via):
            return False
        known.record = msgspec.structs.replace(known.record, via="")
        return True

    async def bury(self, known: Known) -> Found | bool | None:
        """Replace a record by a tombstone: True, or what is there instead. Raises OutcomeUnknown, StoreError.

        From then on it is removed, and its object may be deleted by anybody."""
        engine, record = self._engine, known.record
        stone = Tombstone(records.FORMAT, engine.write_id(), record.birth, record.version + 1, record.via)
        path = known.name.path
        try:
            result = await engine.exchange.swap(path, records.encode_tombstone(stone), known.tag)
        except BaseException:
            engine.index.forget(path)
            raise
        if isinstance(result, Tag):
            engine.leave(path)
            return True
        engine.index.forget(path)
        return None if result is None else engine.take_in(known.name, result)

    async def _end(self, name: Name, tag: Tag, birth: bytes, version: int, via: str) -> None:
        """An intent has been worked off: its object goes, or becomes a tombstone as long as its name is needed."""
        engine = self._engine
        if via and not await engine.is_gone(via):
            stone = Tombstone(records.FORMAT, engine.write_id(), birth, version, via)
            await engine.exchange.swap(name.path, records.encode_tombstone(stone), tag)
        else:
            await engine.exchange.delete(name.path)

    async def withdraw(self, name: Name, birth: bytes) -> bool:
        """Remove a message that must not have been inserted, if it is there and nobody has been given it yet."""
        for _ in range(8):
            found = await self._engine.fetch(name)
            if found is None or found.known is None or found.known.record.birth != birth or found.known.record.leased:
                return False
            record = found.known.record
            result = await self.bury(found.known)
            if result is True:
                if not record.via or await self._engine.is_gone(record.via):
                    await self._engine.exchange.delete(name.path)
                if record.blob:
                    await self._engine.exchange.delete(names.blobs_prefix(name.namespace, name.queue) + record.blob)
                return True
        return False

    async def clear(self, name: Name) -> None:
        """Delete an old tombstone, once its name is not needed any more."""
        found = await self._engine.fetch(name)
        if found is None or not isinstance(found.held, Tombstone):
            return
        via = found.held.via
        if via and not await self._engine.is_gone(via):
            await self.rescue(names.parse(via))
            if not await self._engine.is_gone(via):
                return
        await self._engine.exchange.delete(name.path)
