"""Upkeep: what belongs to nothing goes, and everything is looked at."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import NamedTuple, TypeVar

from millpond.errors import MillpondError, StoreCorrupt, StoreError, StoreMismatch
from millpond.stores.base import Box, Problem, QueueName
from millpond.stores.objects import names, records
from millpond.stores.objects.blobs import Blobs
from millpond.stores.objects.bucket import Content, Entry, Tag
from millpond.stores.objects.engine import OLD, READS, Engine
from millpond.stores.objects.find import Finder
from millpond.stores.objects.groups import Groups
from millpond.stores.objects.index import same
from millpond.stores.objects.listing import Listing
from millpond.stores.objects.markers import Markers
from millpond.stores.objects.moves import Moves
from millpond.stores.objects.names import BlobName, Name
from millpond.stores.objects.reads import Reader
from millpond.stores.objects.records import Intent, Kind, Marker, Pointer, Record, Standing
from millpond.stores.objects.rounds import Rounds

A = TypeVar("A")
T = TypeVar("T")

QUIET = 3_600_000
"""Milliseconds after which an id marker or a pointer without its message goes: whoever wrote it is long done."""
REMEMBERED = 200_000
"""Unique keys whose end is known, so that each is read once."""
CHUNK = 10_000
"""Old payloads, and id markers, that one sweep looks for the messages of, in each queue."""
PER_LIMIT = 10
"""Unique keys or pointers read for each that may go: what is younger is read once, too."""
_BATCH = 1000
_SLICE = 1000
"""Objects read for one part of a check, some at once: all of a long queue would fill the memory."""
_UNREADABLE = (StoreCorrupt, StoreMismatch)


class _Orphan(NamedTuple):
    """A payload that no message seems to have."""

    name: QueueName
    path: str
    id: str


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
        self._rounds = Rounds(engine)
        self._passes = -1

    async def _entries(self, prefix: str) -> AsyncGenerator[Entry, None]:
        async with self._engine.listing(prefix) as pages:
            async for page in pages:
                for entry in page:
                    yield entry

    async def sweep(self, now: int, older_than: int, limit: int) -> int:
        """Remove payloads without a record, unique keys that have ended, and (not counted) markers and pointers whose
        messages are gone.

        What it holds in memory and how many objects it reads is bounded, whatever there is in the bucket: of what is
        more the next one sees to the rest."""
        queues = await self._reader.everywhere()
        self._rounds.keep(tuple(names.folder(*name) for name in queues))
        await self._left_behind(names.CLOCKS)
        # In turn, should one of them use up the limit each time.
        self._passes += 1
        first = self._passes % max(len(queues), 1)
        ended = 0
        orphans: list[_Orphan] = []
        for name in queues[first:] + queues[:first]:
            # Moves out of the dead box whose writers died: nobody else need ever look there.
            async with aclosing(self._listing.pages(*name, Box.DEAD)) as pages:
                async for _ in pages:
                    pass
            if ended < limit:
                ended += await self._unique_keys(name, now, limit - ended)
            # First the payloads, then who may have one: a record that comes later than this has a payload that does.
            old = await self._old_blobs(name, now - older_than) if len(orphans) < limit else []
            markers = await self._quiet_markers(name)
            wanted = {blob.id for blob in old} | {names.last_part(entry.name) for entry in markers}
            if wanted:
                present = await self._present(name, wanted)
                await self._orphans(name, old, present, orphans, limit)
                await self._id_markers(name, markers, present, now, limit)
            await self._pointers(name, limit)
            await self._left_behind(names.consumers(*name))
        coming = await self._coming(queues, {orphan.path for orphan in orphans}) if orphans else None
        if coming is not None:
            alone = [orphan for orphan in dict.fromkeys(orphans) if orphan.path not in coming]
            found = await self._at_once(self._found, alone)
            gone = [orphan.path for orphan, there in zip(alone, found, strict=True) if not there]
            for start in range(0, len(gone), _BATCH):
                await self._engine.exchange.delete_many(gone[start : start + _BATCH])
            for path in gone:
                self._blobs.swept(path)
            ended += len(gone)
        return ended

    async def _each(
        self,
        prefix: str,
        wanted: Callable[[Entry], bool],
        work: Callable[[Entry], Awaitable[bool]],
        *,
        reads: int,
        limit: int,
    ) -> int:
        """Do this work on the objects that are wanted, some at once, until ``limit`` of them have gone by it or so many
        were read; how many have gone."""
        gone = done = 0
        some: list[Entry] = []
        async with aclosing(self._rounds.pass_over(prefix)) as groups:
            async for group in groups:
                some += filter(wanted, group)
                # Never more than may still go, or be read: it costs no more than one after the other would.
                if len(some) >= min(READS, limit - gone, reads - done):
                    done += len(some)
                    gone += sum(await self._at_once(work, some))
                    some = []
                    if gone >= limit or done >= reads:
                        return gone
        return gone + sum(await self._at_once(work, some))

    async def _at_once(self, ask: Callable[[A], Awaitable[T]], about: Sequence[A]) -> list[T]:
        """Ask the same about each, some at once; an error is raised once all the others are done."""
        answers: list[T] = []
        for answer in await self._engine.each(ask, about):
            if isinstance(answer, StoreError):
                raise answer
            answers.append(answer)
        return answers

    async def _old_blobs(self, name: QueueName, before: int) -> list[BlobName]:
        """Payloads whose upload began before this, and gave no sign of life since; old signs of life, too. So many, and
        the others next time."""
        old: list[BlobName] = []
        async with aclosing(self._rounds.pass_over(names.blobs_prefix(*name), _payload)) as groups:
            async for group in groups:
                blobs = [blob for entry in group if (blob := names.parse_blob(entry.name)) is not None]
                if blobs and max(blob.written for blob in blobs) < before:
                    old += blobs
                    if len(old) >= CHUNK:
                        break
        return old

    async def _quiet_markers(self, name: QueueName) -> list[Entry]:
        """Id markers that were not written for long: so many, and the others next time."""
        now = self._engine.now()
        quiet: list[Entry] = []
        async with aclosing(self._rounds.pass_over(names.markers_prefix(*name, "i"))) as groups:
            async for [entry] in groups:
                if now - entry.modified > QUIET:
                    quiet.append(entry)
                    if len(quiet) >= CHUNK:
                        break
        return quiet

    async def _orphans(
        self,
        name: QueueName,
        old: list[BlobName],
        present: dict[str, list[str]],
        orphans: list[_Orphan],
        limit: int,
    ) -> None:
        """Add those of the payloads that no message has, up to the limit."""

        async def owned(blob: BlobName) -> bool:
            return await self._owned(name, blob.path, present)

        start = 0
        while start < len(old):
            some = old[start : start + min(READS, limit - len(orphans))]
            start += len(some)
            for blob, is_owned in zip(some, await self._at_once(owned, some), strict=True):
                if not is_owned:
                    orphans.append(_Orphan(name, blob.path, blob.id))
            if len(orphans) >= limit:
                if start < len(old):
                    self._rounds.go_on(names.blobs_prefix(*name), some[-1].path)
                return

    async def _left_behind(self, prefix: str) -> None:
        """What those left who died while they opened the store, or took messages. None of these names is used twice."""
        now = self._engine.now()
        left = [entry.name async for entry in self._entries(prefix) if now - entry.modified > QUIET]
        for start in range(0, len(left), _BATCH):
            await self._engine.exchange.delete_many(left[start : start + _BATCH])

    async def _present(self, name: QueueName, wanted: set[str]) -> dict[str, list[str]]:
        """Message id in hex → the names of its objects; of those that are wanted."""
        present: dict[str, list[str]] = {}
        # A message may go from one box to the other meanwhile: in this order it is met in one of them.
        for box in (Box.DEAD, Box.LIVE, Box.DEAD):
            async with self._engine.listing(names.box_prefix(*name, box)) as pages:
                async for page in pages:
                    for entry in page:
                        parts = names.last_part(entry.name).split("-")
                        if len(parts) > 1 and parts[1] in wanted and records.form(entry.size).kind != Kind.GONE:
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

    async def _found(self, orphan: _Orphan) -> bool:
        """Whether a search for the message finds it, with this payload: a listing may have missed one that was given
        another name just then."""
        try:
            placed = await self._finder.find(*orphan.name, names.dashed(orphan.id))
        except _UNREADABLE as error:
            self._listing.report(orphan.path, error)
            return True
        return placed is not None and placed.record.blob == names.last_part(orphan.path)

    async def _coming(self, queues: list[QueueName], wanted: set[str]) -> set[str] | None:
        """Which of these payloads are those of messages that unfinished intents will bring; None if there is an intent
        that cannot be read."""
        coming: set[str] = set()
        for name in queues:
            for box in Box:
                async with self._engine.listing(names.box_prefix(*name, box)) as pages:
                    async for page in pages:
                        moving = [entry for entry in page if records.form(entry.size).kind == Kind.MOVING]
                        for brought in await self._at_once(self._brought, moving):
                            if brought is None:
                                return None
                            coming |= brought & wanted
        return coming

    async def _brought(self, entry: Entry) -> set[str] | None:
        """The payloads of what an intent will bring; None if it cannot be read."""
        try:
            message = names.parse(entry.name)
        except StoreCorrupt:
            return set()
        brought: set[str] = set()
        try:
            found = await self._engine.fetch(message)
            if found is not None and isinstance(found.held, Intent):
                for target in found.held.targets:
                    record = records.decode_held(target.data, target.path)
                    if isinstance(record, Record) and record.blob:
                        brought.add(names.blobs_prefix(record.namespace, record.queue) + record.blob)
        except _UNREADABLE as error:
            self._listing.report(entry.name, error)
            return None
        return brought

    async def _unique_keys(self, name: QueueName, now: int, limit: int) -> int:
        def may_have_ended(entry: Entry) -> bool:
            known = self._until.get(entry.name)
            return known is None or not same(known[0], entry.tag) or known[1] <= now

        async def end(entry: Entry) -> bool:
            content = await self._engine.exchange.read(entry.name)
            if content is None:
                return False
            try:
                marker = records.decode(Marker, content.data, entry.name)
            except _UNREADABLE as error:
                self._listing.report(entry.name, error)
                return False
            if marker.until <= now:
                if not await self._markers.remove(entry.name, content):
                    return False
                self._until.pop(entry.name, None)
                return marker.until > 0
            self._until[entry.name] = (content.tag, marker.until)
            if len(self._until) > REMEMBERED:
                self._until.popitem(last=False)
            return False

        prefix = names.markers_prefix(*name, "u")
        return await self._each(prefix, may_have_ended, end, reads=limit * PER_LIMIT, limit=limit)

    async def _id_markers(
        self, name: QueueName, quiet: list[Entry], present: dict[str, list[str]], now: int, limit: int
    ) -> None:
        alone = [entry for entry in quiet if names.last_part(entry.name) not in present]
        if len(alone) > limit:
            self._rounds.go_on(names.markers_prefix(*name, "i"), alone[limit - 1].name)

        async def end(entry: Entry) -> None:
            content = await self._engine.exchange.read(entry.name)
            if content is None or not same(content.tag, entry.tag):
                return
            try:
                marker = records.decode(Marker, content.data, entry.name)
                if marker.until > now or await self._markers.find(*name, marker) is not None:
                    return
                # Whoever is about to write the message may only have stood still.
                if marker.standing != Standing.PENDING or await self._markers.fence(*name, marker):
                    await self._markers.remove(entry.name, content)
            except _UNREADABLE as error:
                self._listing.report(entry.name, error)

        await self._at_once(end, alone[:limit])

    async def _pointers(self, name: QueueName, limit: int) -> None:
        now = self._engine.now()

        async def end(entry: Entry) -> bool:
            content = await self._engine.exchange.read(entry.name)
            if content is None or not same(content.tag, entry.tag):
                return False
            try:
                return await self._groups.remove(*name, entry.name, content)
            except _UNREADABLE as error:
                self._listing.report(entry.name, error)
                return False

        prefix = names.markers_prefix(*name, "g")
        most = limit * PER_LIMIT
        await self._each(prefix, lambda entry: now - entry.modified > QUIET, end, reads=most, limit=most)

    # Verifying

    async def verify(self) -> list[Problem]:
        """Read everything, and say what is wrong."""
        problems: list[Problem] = []
        for name in await self._reader.everywhere():
            await self._verify_queue(name, problems)
        return problems

    async def _verify_queue(self, name: QueueName, problems: list[Problem]) -> None:
        where = f"queue {name.namespace}/{name.queue}"
        seen: set[bytes] = set()
        for box in Box:
            async for part in self._slices(names.box_prefix(*name, box)):
                await self._verify_messages(name, box, part, seen, problems)
        for kind, expected in (("u", Marker), ("i", Marker), ("g", Pointer)):
            async for part in self._slices(names.markers_prefix(*name, kind)):
                paths = [entry.name for entry in part]
                for path, content in zip(
                    paths, await self._engine.each(self._engine.exchange.read, paths), strict=True
                ):
                    if isinstance(content, StoreError):
                        raise content
                    if content is not None:
                        self._verify_marker(where, path, content, expected, problems)

    async def _slices(self, prefix: str) -> AsyncGenerator[list[Entry], None]:
        """What is listed, in pieces that are read together."""
        part: list[Entry] = []
        async for entry in self._entries(prefix):
            part.append(entry)
            if len(part) == _SLICE:
                yield part
                part = []
        if part:
            yield part

    async def _verify_messages(
        self, name: QueueName, box: Box, part: list[Entry], seen: set[bytes], problems: list[Problem]
    ) -> None:
        engine = self._engine
        there: list[tuple[Entry, Name]] = []
        for entry in part:
            try:
                there.append((entry, names.parse(entry.name)))
            except StoreCorrupt as error:
                problems.append(Problem(f"object {entry.name}", str(error)))
        results = await engine.fetch_all([message for _, message in there])
        apart: list[tuple[str, str, str]] = []
        """Message, its object, that of its payload."""
        for (entry, message), found in zip(there, results, strict=True):
            kind = records.form(entry.size).kind
            if isinstance(found, StoreError):
                problems.append(Problem(f"object {entry.name}", str(found)))
                continue
            if found is None or found.known is None:
                if kind == Kind.MOVING and engine.now() - entry.modified > OLD:
                    problems.append(Problem(f"message {message.id}", "it is on its way, and nobody finishes that"))
                continue
            record = found.known.record
            label = f"message {record.id}"
            if record.box != box:
                problems.append(Problem(label, "it lies in the wrong box"))
            if record.via and not await engine.is_gone(record.via):
                continue
            id = bytes.fromhex(names.hex_id(record.id))
            if id in seen:
                problems.append(Problem(label, f"it is there twice: here, as {entry.name}, and before"))
            seen.add(id)
            if record.external:
                apart.append((label, entry.name, names.blobs_prefix(*name) + record.blob))
        for (label, _, _), lacks in zip(apart, await self._at_once(self._lacks_payload, apart), strict=True):
            if lacks:
                problems.append(Problem(label, "its payload is missing"))

    async def _lacks_payload(self, message: tuple[str, str, str]) -> bool:
        _, object, payload = message
        return not await self._is_there(payload) and await self._engine.exchange.read(object) is not None

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

    async def _is_there(self, path: str) -> bool:
        async with aclosing(self._entries(path)) as entries:
            async for entry in entries:
                return entry.name == path
        return False


def _payload(name: str) -> str:
    """What a payload has in common with the signs of life of its upload."""
    blob = names.parse_blob(name)
    return name if blob is None else blob.payload
