"""Upkeep: what belongs to nothing goes, and everything is looked at."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import aclosing

from millpond.errors import MillpondError, StoreCorrupt, StoreError, StoreMismatch
from millpond.stores.base import Box, Problem, QueueName
from millpond.stores.objects import names, records
from millpond.stores.objects.blobs import Blobs
from millpond.stores.objects.bucket import Content, Entry, Tag
from millpond.stores.objects.engine import OLD, Engine
from millpond.stores.objects.find import Finder
from millpond.stores.objects.groups import Groups
from millpond.stores.objects.index import same
from millpond.stores.objects.listing import Listing
from millpond.stores.objects.markers import Markers
from millpond.stores.objects.moves import Moves
from millpond.stores.objects.names import BlobName, Name
from millpond.stores.objects.reads import Reader
from millpond.stores.objects.records import Intent, Kind, Marker, Pointer, Record, Standing

QUIET = 3_600_000
"""Milliseconds after which an id marker or a pointer without its message goes: whoever wrote it is long done."""
REMEMBERED = 200_000
"""Unique keys whose end is known, so that each is read once."""
_BATCH = 1000
_SLICE = 1000
"""Objects read for one part of a check, some at once: all of a long queue would fill the memory."""
_UNREADABLE = (StoreCorrupt, StoreMismatch)


class Upkeep:
    """Sweeping and verifying."""

    def __init__(
        self,
        engine: Engine,
        markers: Markers,
        groups: Groups,
        moves: Moves,
        finder: Finder,
        blobs: Blobs,
        reader: Reader,
        listing: Listing,
    ) -> None:
        self._engine = engine
        self._markers = markers
        self._groups = groups
        self._moves = moves
        self._finder = finder
        self._blobs = blobs
        self._reader = reader
        self._listing = listing
        self._until: OrderedDict[str, tuple[Tag, int]] = OrderedDict()

    async def _list(self, prefix: str) -> list[Entry]:
        return [entry async for page in self._engine.exchange.pages(prefix) for entry in page]

    async def sweep(self, now: int, older_than: int, limit: int) -> int:
        """Remove payloads without a record, unique keys that have ended, and (not counted) markers and pointers whose
        messages are gone."""
        queues = await self._reader.everywhere()
        await self._clocks()
        ended = 0
        orphans: list[tuple[QueueName, str, str]] = []
        for name in queues:
            # Moves out of the dead box whose writers died: nobody else need ever look there.
            async with aclosing(self._listing.pages(*name, Box.DEAD)) as pages:
                async for _ in pages:
                    pass
            if ended < limit:
                ended += await self._unique_keys(name, now, limit - ended)
            # First the payloads, then who may have one: a record that comes later than this has a payload that does.
            old = await self._old_blobs(name, now - older_than)
            markers = await self._list(names.markers_prefix(*name, "i"))
            if old or markers:
                present = await self._present(name)
                orphans += [
                    (name, blob.path, blob.id) for blob in old if not await self._owned(name, blob.path, present)
                ]
                await self._id_markers(name, markers, present, limit)
            await self._pointers(name, limit)
        coming = await self._coming(queues) if orphans else None
        if coming is not None:
            gone = [
                path
                for name, path, id in orphans[: limit + len(coming)]
                if path not in coming and not await self._found(name, path, id)
            ][:limit]
            for start in range(0, len(gone), _BATCH):
                await self._engine.exchange.delete_many(gone[start : start + _BATCH])
            for path in gone:
                self._blobs.swept(path)
            ended += len(gone)
        return ended

    async def _old_blobs(self, name: QueueName, before: int) -> list[BlobName]:
        """Payloads whose upload began before this, and gave no sign of life since; old signs of life, too."""
        blobs = [names.parse_blob(entry.name) for entry in await self._list(names.blobs_prefix(*name))]
        told: dict[str, int] = {}
        for blob in blobs:
            if blob is not None:
                told[blob.payload] = max(told.get(blob.payload, 0), blob.written)
        return [blob for blob in blobs if blob is not None and told[blob.payload] < before]

    async def _clocks(self) -> None:
        """What those left who died while they opened the store."""
        now = self._engine.now()
        left = [entry.name for entry in await self._list(names.CLOCKS) if now - entry.modified > QUIET]
        for start in range(0, len(left), _BATCH):
            await self._engine.exchange.delete_many(left[start : start + _BATCH])

    async def _present(self, name: QueueName) -> dict[str, list[str]]:
        """Message id in hex → the names of its objects."""
        present: dict[str, list[str]] = {}
        # A message may go from one box to the other meanwhile: in this order it is met in one of them.
        for box in (Box.DEAD, Box.LIVE, Box.DEAD):
            async for page in self._engine.exchange.pages(names.box_prefix(*name, box)):
                for entry in page:
                    if records.form(entry.size).kind != Kind.GONE:
                        parts = names.last_part(entry.name).split("-")
                        if len(parts) > 1:
                            present.setdefault(parts[1], []).append(entry.name)
        return present

    async def _owned(self, name: QueueName, path: str, present: dict[str, list[str]]) -> bool:
        try:
            return await self._is_owned(name, path, present)
        except _UNREADABLE as error:
            # It is that of a message which cannot be read, for all one can tell.
            self._listing.report(path, error)
            return True

    async def _is_owned(self, name: QueueName, path: str, present: dict[str, list[str]]) -> bool:
        blob = names.parse_blob(path)
        if blob is None or blob.id not in present:
            return False
        for object in dict.fromkeys(present[blob.id]):
            message = names.parse(object)
            known = self._engine.index.get(object)
            if known is None:
                found = await self._engine.fetch(message)
                known = None if found is None else found.known
                if found is not None and isinstance(found.held, Intent):
                    # What it brings counts; see `_coming`.
                    continue
            if known is not None and known.record.blob == names.last_part(path):
                return True
        return False

    async def _found(self, name: QueueName, path: str, id: str) -> bool:
        """Whether a search for the message finds it, with this payload: a listing may have missed one that was given
        another name just then."""
        try:
            placed = await self._finder.find(*name, names.dashed(id))
        except _UNREADABLE as error:
            self._listing.report(path, error)
            return True
        return placed is not None and placed.record.blob == names.last_part(path)

    async def _coming(self, queues: list[QueueName]) -> set[str] | None:
        """The payloads of messages that unfinished intents will bring; None if there is one that cannot be read."""
        coming: set[str] = set()
        for name in queues:
            for box in Box:
                for entry in await self._list(names.box_prefix(*name, box)):
                    if records.form(entry.size).kind != Kind.MOVING:
                        continue
                    try:
                        message = names.parse(entry.name)
                    except StoreCorrupt:
                        continue
                    try:
                        found = await self._engine.fetch(message)
                        if found is None or not isinstance(found.held, Intent):
                            continue
                        for target in found.held.targets:
                            record = records.decode_held(target.data, target.path)
                            if isinstance(record, Record) and record.blob:
                                coming.add(names.blobs_prefix(record.namespace, record.queue) + record.blob)
                    except _UNREADABLE as error:
                        self._listing.report(entry.name, error)
                        return None
        return coming

    async def _unique_keys(self, name: QueueName, now: int, limit: int) -> int:
        gone = reads = 0
        for entry in await self._list(names.markers_prefix(*name, "u")):
            if gone >= limit or reads >= limit:
                break
            known = self._until.get(entry.name)
            if known is not None and same(known[0], entry.tag):
                if known[1] > now:
                    continue
            else:
                reads += 1
            content = await self._engine.exchange.read(entry.name)
            if content is None:
                continue
            try:
                marker = records.decode(Marker, content.data, entry.name)
            except _UNREADABLE as error:
                self._listing.report(entry.name, error)
                continue
            if marker.until <= now:
                if await self._markers.remove(entry.name, content):
                    self._until.pop(entry.name, None)
                    gone += marker.until > 0
            else:
                self._until[entry.name] = (content.tag, marker.until)
                if len(self._until) > REMEMBERED:
                    self._until.popitem(last=False)
        return gone

    async def _id_markers(
        self, name: QueueName, markers: list[Entry], present: dict[str, list[str]], limit: int
    ) -> None:
        now = self._engine.now()
        quiet = [
            entry for entry in markers if now - entry.modified > QUIET and names.last_part(entry.name) not in present
        ]
        for entry in quiet[:limit]:
            content = await self._engine.exchange.read(entry.name)
            if content is None or not same(content.tag, entry.tag):
                continue
            try:
                marker = records.decode(Marker, content.data, entry.name)
                if await self._markers.find(*name, marker) is None:
                    await self._markers.remove(entry.name, content)
            except _UNREADABLE as error:
                self._listing.report(entry.name, error)

    async def _pointers(self, name: QueueName, limit: int) -> None:
        now = self._engine.now()
        for entry in (await self._list(names.markers_prefix(*name, "g")))[: limit * 10]:
            if now - entry.modified > QUIET:
                content = await self._engine.exchange.read(entry.name)
                if content is None or not same(content.tag, entry.tag):
                    continue
                try:
                    await self._groups.remove(*name, entry.name, content)
                except _UNREADABLE as error:
                    self._listing.report(entry.name, error)

    # Verifying

    async def verify(self) -> list[Problem]:
        """Read everything, and say what is wrong."""
        problems: list[Problem] = []
        for name in await self._reader.everywhere():
            await self._verify_queue(name, problems)
        return problems

    async def _verify_queue(self, name: QueueName, problems: list[Problem]) -> None:
        engine = self._engine
        where = f"queue {name.namespace}/{name.queue}"
        blobs = {entry.name: entry.size for entry in await self._list(names.blobs_prefix(*name))}
        seen: dict[str, str] = {}
        for box in Box:
            there: list[tuple[Entry, Name]] = []
            for entry in await self._list(names.box_prefix(*name, box)):
                try:
                    there.append((entry, names.parse(entry.name)))
                except StoreCorrupt as error:
                    problems.append(Problem(f"object {entry.name}", str(error)))
            for start in range(0, len(there), _SLICE):
                part = there[start : start + _SLICE]
                results = await engine.fetch_all([message for _, message in part])
                for (entry, message), found in zip(part, results, strict=True):
                    kind = records.form(entry.size).kind
                    if isinstance(found, StoreError):
                        problems.append(Problem(f"object {entry.name}", str(found)))
                        continue
                    if found is None or found.known is None:
                        if kind == Kind.MOVING and engine.now() - entry.modified > OLD:
                            problems.append(
                                Problem(f"message {message.id}", "it is on its way, and nobody finishes that")
                            )
                        continue
                    record = found.known.record
                    label = f"message {record.id}"
                    if record.box != box:
                        problems.append(Problem(label, "it lies in the wrong box"))
                    if record.via and not await engine.is_gone(record.via):
                        continue
                    if record.id in seen:
                        problems.append(Problem(label, f"it is there twice: {seen[record.id]} and {entry.name}"))
                    seen[record.id] = entry.name
                    if record.external:
                        path = names.blobs_prefix(*name) + record.blob
                        if path not in blobs and await engine.exchange.read(entry.name) is not None:
                            problems.append(Problem(label, "its payload is missing"))
        for kind_, expected in (("u", Marker), ("i", Marker), ("g", Pointer)):
            paths = [entry.name for entry in await self._list(names.markers_prefix(*name, kind_))]
            for start in range(0, len(paths), _SLICE):
                some = paths[start : start + _SLICE]
                for path, content in zip(some, await engine.each(engine.exchange.read, some), strict=True):
                    if isinstance(content, StoreError):
                        raise content
                    if content is not None:
                        self._verify_marker(where, path, content, expected, problems)

    def _verify_marker(
        self, where: str, path: str, content: Content, expected: type[Marker | Pointer], problems: list[Problem]
    ) -> None:
        try:
            held = records.decode(expected, content.data, path)
        except MillpondError as error:
            problems.append(Problem(where, str(error)))
            return
        stale = isinstance(held, Marker) and held.standing == Standing.PENDING
        if stale and self._engine.now() - content.modified > QUIET * 24:
            problems.append(Problem(where, f"marker {path} has been pending for a day"))
