"""Finding a message by its id alone."""

from __future__ import annotations

from millpond.stores.base import Box, Item
from millpond.stores.objects import names, records
from millpond.stores.objects.bucket import Entry
from millpond.stores.objects.engine import Engine
from millpond.stores.objects.markers import Markers
from millpond.stores.objects.moves import NewRecord
from millpond.stores.objects.names import Name
from millpond.stores.objects.records import Intent, Marker, Record


class Finder:
    """Where messages are."""

    def __init__(self, engine: Engine, markers: Markers) -> None:
        self._engine = engine
        self._markers = markers

    async def find(self, namespace: str, queue: str, id: str) -> NewRecord | None:
        """The message as it is now, from whichever box it lies in: one read where this process knows its name."""
        known = self._engine.index.by_id(namespace, queue, id)
        if known is not None:
            placed = await self.look(known.name)
            if placed is not None:
                return placed
        # A message that comes back to the live box is written there first, then its marker, then it leaves the dead
        # box; one that becomes a dead letter is there before it leaves the live box. In this order none is missed.
        return (
            await self._marked(namespace, queue, id)
            or await self.direct(namespace, queue, id)
            or await self._marked(namespace, queue, id)
        )

    async def look(self, name: Name) -> NewRecord | None:
        """The message in this object, or the same on its way to another."""
        found = await self._engine.fetch(name)
        if found is None:
            return None
        if isinstance(found.held, Record):
            return NewRecord(name, found.held)
        if isinstance(found.held, Intent):
            for target in found.held.targets:
                if target.birth == found.held.birth:
                    there = names.parse(target.path)
                    arrived = await self._engine.fetch(there)
                    held = arrived.held if arrived is not None else records.decode_held(target.data, target.path)
                    if isinstance(held, Record):
                        return NewRecord(there, held)
        return None

    async def _marked(self, namespace: str, queue: str, id: str) -> NewRecord | None:
        path = names.id_marker(namespace, queue, id)
        content = await self._engine.exchange.read(path)
        if content is None:
            return None
        name = await self._markers.find(namespace, queue, records.decode(Marker, content.data, path))
        return None if name is None else await self.look(name)

    async def direct(self, namespace: str, queue: str, id: str) -> NewRecord | None:
        """A message whose id is its key: such names begin with the id."""
        prefix = names.box_prefix(namespace, queue, Box.LIVE)
        lanes = (await self._engine.exchange.folder(prefix)).folders
        start = names.key_prefix(names.id_number(id))
        for begins in [f"{prefix}{names.last_part(lane)}/" for lane in lanes] + [
            names.box_prefix(namespace, queue, Box.DEAD)
        ]:
            for entry in await self._first(begins + start):
                placed = await self.look(names.parse(entry.name))
                if placed is not None and placed.record.id == id:
                    return placed
        return None

    async def _first(self, prefix: str) -> list[Entry]:
        async with self._engine.listing(prefix) as pages:
            async for page in pages:
                return page
        return []

    async def of_item(self, item: Item) -> NewRecord | None:
        """The record of an item, as this process last saw it, without a request where it has."""
        known = self._engine.index.by_id(item.namespace, item.queue, item.id)
        if known is not None and records.is_of(item, known.record, known.name):
            return NewRecord(known.name, known.record)
        placed = await self.find(item.namespace, item.queue, item.id)
        return placed if placed is not None and records.is_of(item, placed.record, placed.name) else None
