"""Objects of a queue that cannot be read: which there are, and how they go."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from millpond.errors import (
    InvalidInput,
    MessageNotFound,
    MillpondError,
    StoreBusy,
    StoreCorrupt,
    StoreError,
    StoreMismatch,
)
from millpond.stores.base import Box
from millpond.stores.objects import names, records
from millpond.stores.objects.bucket import Content, Entry, Tag
from millpond.stores.objects.engine import Engine
from millpond.stores.objects.groups import GOING, Groups
from millpond.stores.objects.index import same
from millpond.stores.objects.names import Name
from millpond.stores.objects.records import Intent, Kind, Marker, Pointer, Record, Standing, Tombstone

_SLICE = 1000
"""Objects read for one part, some at once: all of a long queue would fill the memory."""
_UNREADABLE = (StoreCorrupt, StoreMismatch)
_HOLDS: dict[str, type[Marker | Pointer]] = {"u": Marker, "i": Marker, "g": Pointer}
"""Folder → what its objects hold, beside messages."""


class Damaged:
    """The damaged objects of all queues."""

    def __init__(self, engine: Engine, groups: Groups) -> None:
        self._engine = engine
        self._groups = groups

    # Finding

    async def all_of(self, namespace: str, queue: str) -> list[tuple[str, MillpondError]]:
        """Message ids, and names of other objects, each with what is wrong. Reads what this process does not know."""
        found: list[tuple[str, MillpondError]] = []
        for box in Box:
            async with aclosing(self._slices(names.box_prefix(namespace, queue, box))) as parts:
                async for part in parts:
                    found += await self._messages(part)
        for kind, holds in _HOLDS.items():
            async with aclosing(self._slices(names.markers_prefix(namespace, queue, kind))) as parts:
                async for part in parts:
                    found += await self._others([entry.name for entry in part], holds)
        return found

    async def _slices(self, prefix: str) -> AsyncGenerator[list[Entry], None]:
        part: list[Entry] = []
        async with self._engine.listing(prefix) as pages:
            async for page in pages:
                part += page
                if len(part) >= _SLICE:
                    yield part
                    part = []
        if part:
            yield part

    async def _messages(self, part: list[Entry]) -> list[tuple[str, MillpondError]]:
        wanted: list[Name] = []
        for entry in part:
            known = self._engine.index.get(entry.name)
            if known is None or not same(known.tag, entry.tag):
                try:
                    wanted.append(names.parse(entry.name))
                except StoreCorrupt:
                    # Somebody else's file, which is in nobody's way; `verify` names it.
                    continue
        found: list[tuple[str, MillpondError]] = []
        for name, result in zip(wanted, await self._engine.fetch_all(wanted), strict=True):
            if isinstance(result, _UNREADABLE):
                found.append((name.id, result))
            elif isinstance(result, StoreError):
                raise result
        return found

    async def _others(self, paths: list[str], expected: type[Marker | Pointer]) -> list[tuple[str, MillpondError]]:
        found: list[tuple[str, MillpondError]] = []
        contents = await self._engine.each(self._engine.exchange.read, paths)
        for path, content in zip(paths, contents, strict=True):
            if isinstance(content, StoreError):
                raise content
            error = None if content is None else _wrong(expected, content, path)
            if error is not None:
                found.append((path, error))
        return found

    # Discarding

    async def discard(self, namespace: str, queue: str, what: str) -> bool:
        """Remove what cannot be read of a message id, or the object of this name; False: there is no such object of
        this message. Raises InvalidInput, MessageNotFound, StoreBusy."""
        if "/" not in what:
            gone = [await self._bury(name) for name in await self._of_id(namespace, queue, what)]
            return any(gone)
        folder = names.folder(namespace, queue)
        kind = what.removeprefix(folder).partition("/")[0] if what.startswith(folder) else ""
        if kind in ("m", "d"):
            try:
                name = names.parse(what)
            except StoreCorrupt as error:
                raise InvalidInput(str(error)) from error
            if not await self._bury(name):
                await self._refuse(what)
            return True
        if kind not in _HOLDS:
            raise InvalidInput(
                f"object {what} is no message, marker or pointer of queue {namespace}/{queue}: their names begin with "
                f"{folder}, and `millpond verify` tells them"
            )
        content = await self._engine.exchange.read(what)
        if content is None or _wrong(_HOLDS[kind], content, what) is None:
            await self._refuse(what)
        else:
            await self._renew(namespace, queue, kind, what, content)
        return True

    async def _refuse(self, path: str) -> None:
        if await self._engine.exchange.read(path) is None:
            raise MessageNotFound(f"there is no object {path}")
        raise InvalidInput(f"object {path} can be read: leave it to Millpond")

    async def _of_id(self, namespace: str, queue: str, id: str) -> list[Name]:
        """The objects that have this id in their names: lists the queue, as an id marker may be what is damaged."""
        found: list[Name] = []
        told = f"-{names.hex_id(id)}-"
        for box in Box:
            async with self._engine.listing(names.box_prefix(namespace, queue, box)) as pages:
                async for page in pages:
                    for entry in page:
                        if told in entry.name:
                            try:
                                found.append(names.parse(entry.name))
                            except StoreCorrupt:
                                continue
        return [name for name in found if name.id == id]

    async def _bury(self, name: Name) -> bool:
        """Put a tombstone in the place of what cannot be read; whether it could not. Who comes by after a minute
        deletes that: until then it keeps out an insert, or a move, that is on its way to this name."""
        engine = self._engine
        content = await engine.exchange.read(name.path)
        if content is None:
            return False
        try:
            engine.take_in(name, content)
        except _UNREADABLE:
            stone = Tombstone(records.FORMAT, engine.write_id(), engine.ids.random(records.BIRTH_BYTES), 1, "")
            if not isinstance(await engine.exchange.swap(name.path, records.encode_tombstone(stone), content.tag), Tag):
                raise StoreBusy(f"object {name.path} is being changed; try again") from None
            engine.leave(name.path)
            return True
        return False

    async def _renew(self, namespace: str, queue: str, kind: str, path: str, content: Content) -> None:
        """Have a marker or a pointer say again what the queue shows; if that is nothing, it goes."""
        # Nobody takes over what cannot be read, so nothing has changed since; but for others who do the same as this.
        now: Marker | Pointer | None
        if kind == "u":
            # Whose the key is nothing else tells. As one that has ended it is free, and the next sweep removes it.
            now = self._marker(Standing.CONFIRMED, "", self._nowhere(namespace, queue))
        elif kind == "i":
            now = await self._marker_of(namespace, queue, names.dashed(names.last_part(path)))
        else:
            now = await self._pointer_of(namespace, queue, names.last_part(path))
        if now is not None:
            await self._replace(path, records.encode(now), content)
            if kind == "g":
                self._groups.unstick((namespace, queue, names.last_part(path)))
            return
        going: Marker | Pointer = (
            self._marker(Standing.GOING, "", self._nowhere(namespace, queue))
            if kind == "i"
            else Pointer(records.FORMAT, self._engine.write_id(), self._nowhere(namespace, queue), True)
        )
        in_time = self._engine.limit(GOING // 2)
        await self._replace(path, records.encode(going), content)
        await self._engine.exchange.delete_reusable(path, in_time)

    async def _replace(self, path: str, data: bytes, content: Content) -> None:
        if not isinstance(await self._engine.exchange.swap(path, data, content.tag), Tag):
            raise StoreBusy(f"object {path} is being changed; try again")

    def _marker(self, standing: Standing, id: str, place: str, birth: bytes | None = None, version: int = 0) -> Marker:
        engine = self._engine
        birth = birth or engine.ids.random(records.BIRTH_BYTES)
        return Marker(records.FORMAT, engine.write_id(), standing, birth, version, id, place, 0, "")

    @staticmethod
    def _nowhere(namespace: str, queue: str) -> str:
        """A place where no message is."""
        id = names.dashed("0" * 32)
        return names.message(
            namespace, queue, Box.LIVE, key=0, id=id, priority=5, size=0, expires=None, group=None
        ).place

    async def _marker_of(self, namespace: str, queue: str, id: str) -> Marker | None:
        """The marker that leads to the message with this id; None when it is not there."""
        for name in await self._of_id(namespace, queue, id):
            try:
                found = await self._engine.fetch(name)
            except _UNREADABLE:
                continue
            if found is None:
                continue
            held = found.held
            if isinstance(held, Record):
                return self._marker(Standing.CONFIRMED, id, name.place, held.birth, held.version)
            if isinstance(held, Intent):
                for target in held.targets:
                    if target.birth == held.birth:
                        place = names.parse(target.path).place
                        return self._marker(Standing.CONFIRMED, id, place, held.birth, held.version)
        return None

    async def _pointer_of(self, namespace: str, queue: str, group: str) -> Pointer | None:
        """The pointer to the message of a group that is held, or else to its first; None when it has none."""
        first: str | None = None
        prefix = f"{names.box_prefix(namespace, queue, Box.LIVE)}{names.GROUP_LANE}/"
        async with self._engine.listing(prefix) as pages:
            async for page in pages:
                for entry in page:
                    kind = records.form(entry.size).kind
                    try:
                        name = names.parse(entry.name)
                    except StoreCorrupt:
                        continue
                    if name.group == group and kind not in (Kind.GONE, Kind.MOVING):
                        if kind == Kind.HELD:
                            return Pointer(records.FORMAT, self._engine.write_id(), name.place, False)
                        first = first or name.place
        return None if first is None else Pointer(records.FORMAT, self._engine.write_id(), first, False)


def _wrong(expected: type[Marker | Pointer], content: Content, path: str) -> MillpondError | None:
    """Why an object cannot be read; None if it can."""
    try:
        records.decode(expected, content.data, path)
    except _UNREADABLE as error:
        return error
    return None
