"""What the parts of the object store share: requests, time, chance, and what is known of objects."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, NamedTuple, TypeVar

import msgspec

from millpond.errors import StoreCorrupt, StoreError
from millpond.model.clock import Clock, CorrectedClock
from millpond.model.ids import IdSource
from millpond.stores.objects import names, records
from millpond.stores.objects.bucket import Content, Entry, Tag
from millpond.stores.objects.exchange import Exchange
from millpond.stores.objects.index import Index, Known, same
from millpond.stores.objects.names import Name
from millpond.stores.objects.records import Intent, Record, Tombstone
from millpond.stores.objects.requests import CountedBucket
from millpond.stores.objects.rivals import NAME_BYTES, Rivals
from millpond.stores.objects.skew import Skew

log = logging.getLogger("millpond.stores.objects")

A = TypeVar("A")
T = TypeVar("T")

OLD = 60_000
"""Milliseconds after which what another process left half done is anybody's to finish: its writer has stopped by then
(see `HALF`)."""
HALF = 30_000
"""Milliseconds after which a writer touches its own intent no more. The other half of `OLD` is for requests that are
still on their way, and for clocks."""
MARGIN = 15_000
"""Milliseconds of its lease that a message must have left, for its holder to delete it without a condition: longer
than a bucket sends such a request again and waits for its reply (2 s and 10 s), and than clocks are apart."""
LEFT = 10_000
"""Names that messages have left, remembered."""
STEP = 1 << 16
"""Between two keys of one time: far less than between the ids that one source makes, so that order is kept."""
READS = 32
"""Objects read at once by one call."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What may be chosen about a store."""

    margin: int = MARGIN
    fenced_removals: bool = False
    """Never delete a message without a condition: one request more for each ack."""
    spread: bool = True
    """Keep out of the way of other consumers of a queue, at the price of its order, while they are met."""


class Found(NamedTuple):
    """The object of a message, as read."""

    tag: Tag
    modified: int
    held: Record | Intent | Tombstone
    known: Known | None
    """If it is a record."""


class _Turn:
    __slots__ = ("lock", "wanted")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.wanted = 0


class Engine:
    """Shared by the parts of one store."""

    def __init__(
        self,
        bucket: CountedBucket,
        clock: Clock,
        *,
        random_bytes: Callable[[int], bytes],
        index: Index,
        options: Options,
        measure_skew: bool,
    ) -> None:
        self.skew = Skew(clock, active=measure_skew)
        self.clock = CorrectedClock(clock, lambda: self.skew.offset)
        self.ids = IdSource(self.clock, random_bytes)
        self.bucket = bucket
        self.exchange = Exchange(bucket, clock, self.ids, bucket.batch)
        self.index = index
        self.options = options
        self.tasks: set[asyncio.Task[Any]] = set()
        self.high = 0
        """The greatest key of a message with a group that this process has met: what returns to a group goes behind."""
        self.last_key = 0
        """Of the last message that this process has put in."""
        self._turns: dict[tuple[str, ...], _Turn] = {}
        self._left: OrderedDict[str, None] = OrderedDict()
        self._doomed: OrderedDict[str, int] = OrderedDict()
        self.rivals = Rivals(self.ids.random(NAME_BYTES), clock)

    # Time and chance

    def now(self) -> int:
        """The time that all users of the bucket go by, ms UTC."""
        return self.clock.now_ms()

    def write_id(self) -> bytes:
        """For one write: chance, behind this process's name."""
        return self.rivals.me + self.ids.random(records.WRITE_ID_BYTES - NAME_BYTES)

    def fresh_key(self, time: int | None) -> int:
        """A key that was never used, with this time, behind those that this process made last for the same time; None:
        behind everything in its group."""
        number = names.id_number(self.ids.message_id())
        if time is None:
            self.high = max(number, self.high + 1)
            return self.high
        key = names.key_of(time, number)
        if key >> names.KEY_BITS == self.last_key >> names.KEY_BITS:
            behind = self.last_key + 1 + self.ids.below(STEP)
            key = behind if behind >> names.KEY_BITS == key >> names.KEY_BITS else key
        self.last_key = key
        return key

    def met(self, name: Name) -> None:
        """A message with a group was seen."""
        # Not at the end of time: behind that there may be no room for keys.
        if name.time < names.LATEST:
            self.high = max(self.high, name.key)

    def limit(self, milliseconds: int) -> Callable[[], bool]:
        """Whether less than this has passed since. By both clocks: the monotonic one of some systems stands still while
        the machine sleeps, and the other one may be set."""
        monotonic, wall = self.clock.monotonic() + milliseconds / 1000, self.now() + milliseconds
        return lambda: self.clock.monotonic() < monotonic and self.now() < wall

    # Work that must not be cut short, and work in turn

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run it to its end, whatever becomes of the caller."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled():
            # Whoever waits for it gets its error; nobody may be waiting any more.
            task.exception()

    @asynccontextmanager
    async def turn(self, keys: Iterable[tuple[str, ...]]) -> AsyncIterator[None]:
        """Nobody else in this process works on any of these meanwhile; first come, first served."""
        taken: list[tuple[tuple[str, ...], _Turn]] = []
        try:
            # In one order, lest two wait for each other.
            for key in sorted(set(keys)):
                turn = self._turns.get(key)
                if turn is None:
                    turn = self._turns[key] = _Turn()
                turn.wanted += 1
                try:
                    await turn.lock.acquire()
                except BaseException:
                    self._leave(key, turn)
                    raise
                taken.append((key, turn))
            yield
        finally:
            for key, turn in reversed(taken):
                turn.lock.release()
                self._leave(key, turn)

    def is_being_written(self, name: Name) -> bool:
        """Whether this process is about to change the message."""
        return ("i", name.namespace, name.queue, name.id) in self._turns

    def _leave(self, key: tuple[str, ...], turn: _Turn) -> None:
        turn.wanted -= 1
        if not turn.wanted:
            del self._turns[key]

    @asynccontextmanager
    async def listing(self, prefix: str, after: str | None = None) -> AsyncIterator[AsyncIterator[list[Entry]]]:
        """The pages of a listing, which may be left before their end."""
        async with aclosing(self.exchange.pages(prefix, after)) as pages:
            yield pages

    # Rivals

    def lost_claim(self, name: Name, found: Found | None = None) -> None:
        """Somebody else was given the message; ``found``: what is there now."""
        if self.options.spread:
            held = None if found is None else found.held
            taker = held.write_id[:NAME_BYTES] if isinstance(held, Record) and held.leased else None
            self.rivals.lost((name.namespace, name.queue), taker)

    def ago(self, modified: int) -> float:
        """Seconds since something was written."""
        return max(0, self.now() - modified) / 1000

    def won_claim(self, name: Name) -> None:
        """A claim went through."""
        self.rivals.won((name.namespace, name.queue))

    # Objects of messages

    def leave(self, path: str) -> None:
        """The message is not under this name any more, and never will be again."""
        self.index.forget(path)
        self._left[path] = None
        if len(self._left) > LEFT:
            self._left.popitem(last=False)

    def has_left(self, path: str) -> bool:
        """Whether this process knows that the message is not under this name any more."""
        return path in self._left

    def doom(self, path: str, until: int) -> None:
        """A DELETE of the message was given up and may take place yet, though not after ``until``."""
        self._doomed[path] = until
        if len(self._doomed) > LEFT:
            self._doomed.popitem(last=False)

    def is_doomed(self, path: str) -> bool:
        """Whether the object may vanish at any moment, whatever is written there."""
        return path in self._doomed and self.now() <= self._doomed[path]

    async def fetch(self, name: Name) -> Found | None:
        """Read the object of a message; None when there is none. Raises StoreCorrupt, StoreError."""
        seq = self.index.seq
        content = await self.exchange.read(name.path)
        known = self.index.get(name.path)
        if known is not None and known.seq > seq:
            # Written by this process while the reply was on its way.
            return Found(known.tag, self.now(), known.record, known)
        if content is None:
            self.index.forget(name.path)
            return None
        return self.take_in(name, content)

    def take_in(self, name: Name, content: Content) -> Found:
        """Decode what was read, and know it from now on. Raises StoreCorrupt."""
        self.skew.observe(name.path, content.tag, content.modified)
        known = self.index.get(name.path)
        if known is not None and same(known.tag, content.tag):
            return Found(known.tag, content.modified, known.record, known)
        self.index.forget(name.path)
        held = records.decode_held(content.data, name.path)
        if not isinstance(held, Record):
            return Found(content.tag, content.modified, held, None)
        if (held.namespace, held.queue, held.id) != (name.namespace, name.queue, name.id):
            raise StoreCorrupt(
                f"object {name.path} holds message {held.id} of queue {held.namespace}/{held.queue}: it was copied or "
                "renamed; delete it"
            )
        return Found(content.tag, content.modified, held, self.index.put(name, content.tag, held))

    async def fetch_all(self, wanted: list[Name]) -> list[Found | StoreError | None]:
        """`fetch` of each, some at once; what cannot be read is an error in its place."""
        return await self.each(self.fetch, wanted)

    async def each(self, ask: Callable[[A], Awaitable[T]], about: Sequence[A]) -> list[T | StoreError]:
        """Ask the same about each, some at once; an error stands in the place of its answer."""
        slots = asyncio.Semaphore(READS)

        async def one(subject: A) -> T | StoreError:
            async with slots:
                try:
                    return await ask(subject)
                except StoreError as error:
                    return error

        if len(about) == 1:
            return [await one(about[0])]
        return list(await asyncio.gather(*map(one, about)))

    async def swap_record(
        self, known: Known, record: Record, *, claimed: bool, void: bool = False
    ) -> Known | Found | None:
        """Replace a record: as it is now known, or what is there instead. ``void``: should it take place and be written
        over by others at once, then it is as if it had not. Raises OutcomeUnknown, StoreError."""
        name = known.name
        now = self.now()
        started = self.skew.started()
        try:
            result = await self.exchange.swap(
                name.path,
                records.encode_record(record, name, now),
                known.tag,
                lost=None if void else lambda content: _is_before(content, name, known.record, record),
            )
        except BaseException:
            self.index.forget(name.path)
            raise
        if isinstance(result, Tag):
            self.skew.wrote(name.path, result, started)
            return self.index.put(name, result, record, claimed=claimed)
        if result is None:
            self.index.forget(name.path)
            return None
        return self.take_in(name, result)

    async def create_record(self, name: Name, record: Record) -> Known | Content:
        """Write a record under a name that was never used: as it is now known, or what is there instead."""
        started = self.skew.started()
        self._left.pop(name.path, None)
        data = records.encode_record(record, name, self.now())
        result = await self.exchange.create(name.path, data, insist=False)
        if isinstance(result, Tag):
            self.skew.wrote(name.path, result, started)
            return self.index.put(name, result, record)
        return result

    def is_old(self, entry: Entry | Content | Found) -> bool:
        """Whether who wrote it has certainly left it alone by now."""
        return self.now() - entry.modified > OLD

    async def is_gone(self, path: str) -> bool:
        """Whether an intent has been worked off: its object is not there any more."""
        content = await self.exchange.read(path)
        return content is None or records.form(len(content.data)).kind != records.Kind.MOVING


def _is_before(content: Content, name: Name, old: Record, new: Record) -> bool:
    """Whether a write of ``new`` over ``old`` has not taken place, by what is there now: the numbers of all that
    follows it are not below its own. Where it leaves them alone it may as well be repeated."""
    held = records.decode_held(content.data, name.path)
    if not isinstance(held, Record) or held.birth != old.birth:
        return False
    if held.version < new.version or held.state_version < new.state_version:
        return True
    before, after = ((one.version, one.state_version) for one in (old, held))
    return before == after
