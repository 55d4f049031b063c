"""Messages that processes of one machine tell each other of by name, so that nobody has to list them.

Who writes a message that may be taken tells everybody who listens (`feed`), and one of them that it is his: the first
by rendezvous, so that each has about as many. If nobody waits there it passes the message on to the second, and so
forth. The last one tells all that the message is anybody's; whoever comes to wait first takes it. Who takes one says
so. A message of which that was not heard within a short time is anybody's as well: its process is slow, or gone.

It is a matter of thrift and of nothing else. What was told is read before it is offered, a claim is conditional as
ever, and what is not told, or told in vain, the next look at the queue finds.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

from millpond.errors import StoreCorrupt, StoreError, StoreMismatch
from millpond.model.clock import TimerHandle
from millpond.stores.base import Box, Stored
from millpond.stores.objects import names, records
from millpond.stores.objects.engine import Engine, Found
from millpond.stores.objects.feed import HostFeed
from millpond.stores.objects.index import Known
from millpond.stores.objects.names import Name
from millpond.stores.objects.rivals import Queue, mix
from millpond.stores.wake import MAX_NAMES, FeedSubscription, Kind, News

PATIENCE = 0.5
"""Seconds for which a message is left to the process that was told to take it; up to twice that, by chance, so that not
everybody comes at once."""
REMEMBERED = 1000
"""Names of one queue, of each sort."""
TICK = 5.0
"""Seconds of one timer at most: the wall clock may be set meanwhile."""


@lru_cache(maxsize=1024)
def _seed(listener: str) -> int:
    return int.from_bytes(hashlib.sha256(listener.encode("utf-8", "surrogateescape")).digest()[:8])


def order(listeners: Iterable[str], key: int) -> list[str]:
    """Whose a message is: the first one's, or else the second one's, and so on. Each who knows the same listeners finds
    the same."""
    low = key & (1 << 64) - 1
    return sorted(listeners, key=lambda one: (mix(_seed(one) ^ low), one), reverse=True)


class _Mine(NamedTuple):
    seq: int
    """What was known of objects when it was heard of."""
    contested: bool
    """It is others' as well."""
    first: bool
    """Of those it is this process's turn first."""


def _rank(entry: tuple[str, _Mine]) -> tuple[str, bool, str]:
    place, mine = entry
    return place[: len("m/0")], not mine.first, place


class _Told:
    """What this process was told of one queue on which somebody waits, or waited a moment ago."""

    __slots__ = ("appeared", "changed", "later", "mine", "others", "reading", "timer", "waiting")

    def __init__(
        self, waiting: Callable[[], int], appeared: Callable[[], object], changed: Callable[[], object]
    ) -> None:
        self.waiting = waiting
        self.appeared = appeared
        self.changed = changed
        self.mine: OrderedDict[str, _Mine] = OrderedDict()
        """To be offered here."""
        self.others: OrderedDict[str, float] = OrderedDict()
        """Another's → monotonic time from which they are not."""
        self.later: OrderedDict[str, tuple[int, bool]] = OrderedDict()
        """Not to be taken yet → from when on, and whether by this process."""
        self.reading = 0
        self.timer: TimerHandle | None = None

    def free(self) -> int:
        """For how many messages somebody waits here."""
        return self.waiting() - len(self.mine) - self.reading

    def forget(self, place: str) -> None:
        for known in (self.mine, self.others, self.later):
            known.pop(place, None)


class HostSubscription:
    """A subscription that can be told of messages by name."""

    def __init__(self, told: Told, inner: FeedSubscription, changed: Callable[[], object]) -> None:
        self._told = told
        self._inner = inner
        self._changed = changed

    @property
    def active(self) -> bool:
        """False once the feed broke or was closed: subscribe again."""
        return self._inner.active

    def attend(self, waiting: Callable[[], int], appeared: Callable[[], object]) -> None:
        """See `millpond.stores.base.Attentive`. One subscription of a queue may do so at a time; the others are told of
        everything."""
        self._inner.attended = self._told.attend(self._inner.name, self, waiting, appeared, self._changed)

    def close(self) -> None:
        """End it; harmless when repeated."""
        if self._inner.attended:
            self._inner.attended = False
            self._told.leave(self._inner.name, self)
        self._inner.close()


class Told:
    """What this process tells others of, and what it was told, of all queues."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.feed: HostFeed | None = None
        self._queues: dict[Queue, tuple[HostSubscription, _Told]] = {}

    # Subscriptions

    def attend(
        self,
        queue: Queue,
        subscription: HostSubscription,
        waiting: Callable[[], int],
        appeared: Callable[[], object],
        changed: Callable[[], object],
    ) -> bool:
        """Whether the subscription is the one of the queue that is told by name."""
        there = self._queues.get(queue)
        if there is not None and there[0].active and there[0] is not subscription:
            return False
        if there is not None:
            self._stop(there[1])
        self._queues[queue] = (subscription, _Told(waiting, appeared, changed))
        return True

    def leave(self, queue: Queue, subscription: HostSubscription) -> None:
        """Nobody waits there any more. What was this process's is anybody's."""
        there = self._queues.get(queue)
        if there is not None and there[0] is subscription:
            del self._queues[queue]
            self._stop(there[1])
            left = [*there[1].mine, *(place for place, (_, mine) in there[1].later.items() if mine)]
            if left:
                self._tell_all(queue, Kind.ANYBODY, left)

    @staticmethod
    def _stop(told: _Told) -> None:
        if told.timer is not None:
            told.timer.cancel()
            told.timer = None

    def close(self) -> None:
        """No timer runs any more."""
        for _, told in self._queues.values():
            self._stop(told)
        self._queues.clear()

    def _of(self, queue: Queue) -> _Told | None:
        there = self._queues.get(queue)
        return None if there is None else there[1]

    # Telling

    def appeared(self, queue: Queue, written: list[tuple[Name, int]]) -> None:
        """This process wrote messages, without a group, that may be taken, each from its due time on."""
        feed = self.feed
        listeners = [] if feed is None else feed.others()
        if feed is None or not listeners:
            return
        if len(written) > MAX_NAMES:
            feed.announce([queue])
            return
        here = self._of(queue)
        free = 0 if here is None else here.free()
        now = self._engine.now()
        for_all: dict[str, dict[tuple[int, int], list[str]]] = {one: {} for one in listeners}
        for name, due in written:
            due = due if due > now else 0
            owner = None
            if free > 0:
                free -= 1  # Who waits here has it at hand.
            else:
                owner = order(listeners, name.key)[0]
            for one, news in for_all.items():
                news.setdefault((Kind.YOURS if one == owner else Kind.OTHERS, due), []).append(name.place)
        for one, news in for_all.items():
            told = [News(*queue, kind, tuple(places), due) for (kind, due), places in news.items()]
            if not feed.tell(one, told):
                # Dead or too busy: what was to be its is the next one's.
                for (kind, due), places in news.items():
                    if kind == Kind.YOURS:
                        self._pass_on(queue, places, due, one)

    def taken(self, queue: Queue, places: list[str]) -> None:
        """This process has claimed these."""
        told = self._of(queue)
        if told is not None:
            for place in places:
                told.forget(place)
        self._tell_all(queue, Kind.TAKEN, places)

    def _tell_all(self, queue: Queue, kind: Kind, places: list[str]) -> None:
        feed = self.feed
        if feed is not None:
            for start in range(0, len(places), MAX_NAMES):
                news = [News(*queue, kind, tuple(places[start : start + MAX_NAMES]))]
                for one in feed.others():
                    feed.tell(one, news, insist=kind == Kind.ANYBODY)

    def _pass_on(self, queue: Queue, places: list[str], due: int, own: str) -> None:
        """Offer these to those who come after ``own`` in their order."""
        feed = self.feed
        if feed is None:
            return
        left: list[str] = []
        for place in places:
            try:
                key = names.of_place(*queue, place).key
            except StoreCorrupt:
                continue  # Not from one of us.
            line = order({*feed.others(), own}, key)
            for one in line[line.index(own) + 1 :]:
                if one != feed.own and feed.tell(one, [News(*queue, Kind.YOURS, (place,), due)]):
                    break
            else:
                left.append(place)
        if left:
            self._tell_all(queue, Kind.ANYBODY, left)
            told = self._of(queue)
            if told is not None:
                self._offer(queue, told, left, contested=True)

    # Hearing

    def heard(self, news: News) -> None:
        """Another process of this machine has told of messages."""
        queue = (news.namespace, news.queue)
        told = self._of(queue)
        places = list(news.names)
        if news.kind == Kind.TAKEN:
            if told is not None:
                for place in places:
                    told.forget(place)
        elif news.kind == Kind.YOURS:
            self._given(queue, told, places, news.due)
        elif told is not None and news.kind == Kind.ANYBODY:
            self._offer(queue, told, places, contested=True)
        elif told is not None and news.kind == Kind.OTHERS:
            self._leave_to_others(told, places, news.due)
        if told is not None:
            self._arm(queue, told)

    def _given(self, queue: Queue, told: _Told | None, places: list[str], due: int) -> None:
        """These are this process's, if somebody waits here when they are due."""
        if told is not None and due > self._engine.now():
            for place in places:
                told.later[place] = (due, True)
            self._bound(told)
            return
        free = 0 if told is None else max(0, told.free())
        if told is not None and free:
            self._offer(queue, told, places[:free], contested=False)
        rest = places[free:]
        if rest:
            if told is not None:
                self._leave_to_others(told, rest, 0)
            assert self.feed is not None
            self._pass_on(queue, rest, due, self.feed.own)

    def _leave_to_others(self, told: _Told, places: list[str], due: int) -> None:
        if due > self._engine.now():
            for place in places:
                told.later[place] = (due, False)
        else:
            patience = PATIENCE * (1 + self._engine.ids.below(1000) / 1000)
            until = self._engine.clock.monotonic() + patience
            for place in places:
                told.mine.pop(place, None)
                told.others[place] = until
                told.others.move_to_end(place)
        self._bound(told)

    def _offer(self, queue: Queue, told: _Told, places: list[str], *, contested: bool) -> None:
        feed = self.feed
        own = "" if feed is None else feed.own
        line = {own} if feed is None or not contested else {own, *feed.others()}
        for place in places:
            try:
                key = names.of_place(*queue, place).key
            except StoreCorrupt:
                continue  # Not from one of us.
            told.forget(place)
            told.mine[place] = _Mine(self._engine.index.seq, contested, order(line, key)[0] == own)
        self._bound(told)
        told.appeared()

    @staticmethod
    def _bound(told: _Told) -> None:
        for known in (told.mine, told.others, told.later):
            forgotten = len(known) > REMEMBERED
            while len(known) > REMEMBERED:
                known.popitem(last=False)
            if forgotten:
                told.changed()

    # In time

    def _arm(self, queue: Queue, told: _Told) -> None:
        """Come back when the first of what others were to take is not theirs any more, or something is due."""
        if told.timer is not None or not (told.others or told.later):
            return
        clock = self._engine.clock
        left = [min(told.others.values()) - clock.monotonic()] if told.others else []
        if told.later:
            left.append((min(due for due, _ in told.later.values()) - self._engine.now()) / 1000)
        # A millisecond at least: less may be no time at all to the clock, and it would be looked for ever.
        told.timer = clock.call_later(
            min(max(0.001, min(left)), PATIENCE if told.others else TICK), lambda: self._tick(queue, told)
        )

    def _tick(self, queue: Queue, told: _Told) -> None:
        told.timer = None
        now, monotonic = self._engine.now(), self._engine.clock.monotonic()
        given: list[str] = []
        others: list[str] = []
        for place, (due, mine) in list(told.later.items()):
            if due <= now:
                del told.later[place]
                (given if mine else others).append(place)
        if given:
            self._given(queue, told, given, 0)
        if others:
            self._leave_to_others(told, others, 0)
        late = [place for place, until in told.others.items() if until <= monotonic]
        if late:
            self._offer(queue, told, late, contested=True)
        self._arm(queue, told)

    # Reading

    async def told(self, queue: Queue, now: int, limit: int) -> list[Stored]:
        """Records of what is this process's to take, in no order; each is told of once."""
        told = self._of(queue)
        if told is None or not told.mine:
            return []
        # Lanes come in the order of priority, and keys in that of due times. Among what is anybody's each begins with
        # its own, so that not all come for the same.
        taken = heapq.nsmallest(limit, told.mine.items(), key=_rank)
        for place, _ in taken:
            del told.mine[place]
        if told.mine:
            told.appeared()
        contested = [place for place, mine in taken if mine.contested]
        if contested:
            # Who comes now need not read them, too.
            self._tell_all(queue, Kind.OTHERS, contested)
        told.reading += len(taken)
        try:
            found = await self._engine.each(lambda one: self._read(queue, *one), taken)
        except BaseException:
            told.mine.update(taken)
            raise
        finally:
            told.reading -= len(taken)
        result: list[Stored] = []
        failed: StoreError | None = None
        for one, there in zip(taken, found, strict=True):
            if isinstance(there, StoreCorrupt | StoreMismatch):
                told.changed()  # The look at the queue reports it.
            elif isinstance(there, StoreError):
                told.mine[one[0]] = one[1]
                failed = there
            elif there is not None and there.record.due <= now:
                result.append(records.stored(there.record, there.name))
        if failed is not None:
            if not result:
                raise failed
            told.appeared()
        return result

    async def _read(self, queue: Queue, place: str, mine: _Mine) -> Known | None:
        engine = self._engine
        name = names.of_place(*queue, place)
        if name.box is not Box.LIVE or engine.has_left(name.path) or engine.is_being_written(name):
            return None
        known = engine.index.get(name.path)
        if known is None or known.seq <= mine.seq:
            found: Found | None = await engine.fetch(name)
            known = None if found is None else found.known
        return known
