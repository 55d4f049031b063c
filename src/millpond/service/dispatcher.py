"""The dispatcher: who waits, and when to look.

One task per queue that somebody waits on; queues know nothing of each other, so a slow or broken one holds up no other.
A queue's task asks for as many candidates as there are waiters, gives them out in the order of waiting, and sleeps
until something wakes it: a local enqueue or nack, a message coming due, the store's change feed, or a poll that backs
off while the queue stays empty. Nobody waiting means nothing running. A candidate whose waiter left goes back at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from millpond.errors import InvalidInput, InvalidQueue, StoreClosed, StoreError, TooManyConsumers
from millpond.model import names
from millpond.model.clock import Clock, TimerHandle
from millpond.model.ids import IdSource
from millpond.service.ready import Record
from millpond.service.watch import WatchFactory
from millpond.stores.base import Attentive, Subscription

Candidate = Record
"""A message that can be leased by a consumer: claim it, or give it back."""

LINGER = 5.0
"""Seconds for which a queue stays watched after its last waiter left: consumers wait in a loop, and a feed opened anew
for each of their calls would cost more than it saves."""
TICK = 5.0
"""Longest sleep, seconds: a jump of the wall clock towards a due time is noticed within it. It costs no store call."""
FIRST_RETRY = 0.1
"""Seconds until a queue that failed, or a feed that did not open, is tried again; doubles up to ``MAX_RETRY``."""
MAX_RETRY = 30.0
MAX_TIMERS = 10_000
"""Explicit `notify_at` entries kept; beyond, only the time is remembered, which can then not be cancelled."""


class Provider(Protocol):
    """Where candidates come from: the service."""

    async def next_candidates(self, namespace: str | None, queue: str, limit: int) -> list[Record]: ...

    def give_back(self, candidates: Sequence[Record]) -> None: ...

    def foreign_change(self, namespace: str, queue: str) -> None: ...

    def appeared_elsewhere(self, namespace: str, queue: str) -> None:
        """The store was told of messages by name: `next_candidates` finds them without a look at all of the queue."""

    def next_due(self, namespace: str, queue: str) -> int | None: ...

    def last_look(self, namespace: str, queue: str) -> float | None:
        """When it was last asked without anything left (monotonic time); None when there is a reason to ask."""


def _end(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_result(None)


class Stats(NamedTuple):
    """A queue as the dispatcher sees it."""

    namespace: str
    queue: str
    waiting_consumers: int
    pending_candidates: int
    """Always 0: a candidate without a waiter goes back to the ready cache instead of being parked."""
    total_consumers: int
    """Waiting on any queue of this dispatcher."""


class _QueueState:
    __slots__ = (
        "alarm",
        "interval",
        "key",
        "linger",
        "named",
        "rest",
        "sleeper",
        "subscription",
        "task",
        "waiters",
        "watch_retry",
        "watch_retry_at",
        "woken",
    )

    def __init__(self, key: tuple[str, str], interval: float) -> None:
        self.key = key
        self.interval = interval
        """Seconds until the poll after the next look that finds nothing."""
        self.rest = interval
        """Seconds from the last look to the next one."""
        self.waiters: OrderedDict[asyncio.Future[Record | None], None] = OrderedDict()
        self.task: asyncio.Task[None] | None = None
        self.woken = False
        self.named = False
        """Woken by nothing but news that name messages, which say nothing about others."""
        self.sleeper: asyncio.Future[None] | None = None
        self.alarm: int | None = None
        self.subscription: Subscription | None = None
        self.watch_retry = FIRST_RETRY
        self.watch_retry_at = 0.0
        self.linger: TimerHandle | None = None

    def wake(self) -> None:
        """Look now. Any number of calls before the look are one."""
        self.woken = True
        self.named = False
        self.stir()

    def wake_by_name(self) -> None:
        """Look now at what was told by name."""
        self.named = self.named or not self.woken
        self.woken = True
        self.stir()

    def stir(self) -> None:
        """Let the task see for itself whether there is anything to do."""
        if self.sleeper is not None and not self.sleeper.done():
            self.sleeper.set_result(None)

    @property
    def watched(self) -> bool:
        return self.subscription is not None and self.subscription.active

    def live_waiters(self) -> int:
        return sum(not waiter.done() for waiter in self.waiters)


class Dispatcher:
    """Wakes waiting consumers when there is something for them."""

    def __init__(
        self,
        provider: Provider,
        *,
        clock: Clock,
        ids: IdSource,
        poll_interval: float = 3.0,
        poll_jitter: float = 0.5,
        poll_max_interval: float = 60.0,
        resilient_poll_interval: float = 300.0,
        max_consumers: int = 1000,
        page_size: int = 32,
        watch_factory: WatchFactory | None = None,
        partial_watch: bool = False,
        thrifty: bool = False,
        logger: logging.Logger | None = None,
    ) -> None:
        """Durations in seconds. ``poll_interval`` applies while nobody watches, doubling up to ``poll_max_interval``
        while the queue stays empty; ``resilient_poll_interval`` while a watch is active, unless it is a
        ``partial_watch``, which does not tell of everybody's changes. ``page_size`` bounds the candidates fetched at
        once. ``thrifty``: looks cost money, so that who comes to wait does not cause one while the last is not older
        than the interval; the interval then outlives the waits. Starts nothing. Raises InvalidInput for values out of
        range."""
        if poll_interval <= 0 or poll_max_interval < poll_interval or resilient_poll_interval <= 0 or poll_jitter < 0:
            raise InvalidInput("poll intervals must be more than 0 seconds, the longest not below the first")
        if max_consumers < 1 or page_size < 1:
            raise InvalidInput("max_consumers and page_size must be at least 1")
        self._provider = provider
        self._clock = clock
        self._ids = ids
        self._poll_interval = poll_interval
        self._poll_jitter = poll_jitter
        self._poll_max_interval = poll_max_interval
        self._resilient_poll_interval = resilient_poll_interval
        self._max_consumers = max_consumers
        self._page_size = page_size
        self._watch_factory = watch_factory
        self._partial_watch = partial_watch
        self._thrifty = thrifty
        self._linger_for = max(LINGER, poll_max_interval) if thrifty else LINGER
        self._log = logger or logging.getLogger("millpond.dispatcher")
        self._states: dict[tuple[str, str], _QueueState] = {}
        self._timers: dict[tuple[str, str, str], TimerHandle] = {}
        self._consumers = 0
        self._closed = False
        self.polls = 0
        """Times that candidates were asked for."""

    # For consumers

    async def wait(self, namespace: str | None, queue: str, *, timeout: float | None = None) -> Candidate | None:
        """The next candidate, or None after ``timeout`` seconds. First come, first served.

        Raises InvalidQueue, TooManyConsumers, StoreClosed, and what the store raised when the queue was looked at."""
        key = (names.namespace_name(namespace), names.queue_name(queue))
        self._enter()
        waiter: asyncio.Future[Record | None] = asyncio.get_running_loop().create_future()
        timer: TimerHandle | None = None
        state = self._states.get(key)
        if state is None:
            state = self._states[key] = _QueueState(key, self._poll_interval)
        try:
            state.waiters[waiter] = None
            if timeout is not None:
                timer = self._clock.call_later(max(0.0, timeout), lambda: _end(waiter))
            if state.linger is not None:
                state.linger.cancel()
                state.linger = None
            if self._thrifty:
                state.stir()
            else:
                state.wake()
            if state.task is None:
                state.task = asyncio.create_task(self._run(state), name=f"millpond dispatcher {key[0]}/{key[1]}")
            try:
                return await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                    record = waiter.result()
                    if record is not None:
                        self._provider.give_back([record])
                        state.wake()
                raise
        finally:
            self._consumers -= 1
            if timer is not None:
                timer.cancel()
            state.waiters.pop(waiter, None)
            if not state.waiters:
                state.stir()

    async def try_(self, namespace: str | None, queue: str) -> Candidate | None:
        """The next candidate if there is one now. Raises as `wait` does."""
        key = (names.namespace_name(namespace), names.queue_name(queue))
        self._enter()
        try:
            found = await self._provider.next_candidates(*key, 1)
            return found[0] if found else None
        finally:
            self._consumers -= 1

    def looks_after(self, namespace: str, queue: str) -> bool:
        """Whether who comes to wait is to leave the first look to the dispatcher, too, for names that are known to be
        good: looks cost money, somebody waits or has just waited, and nothing is at hand."""
        return (
            self._thrifty
            and (namespace, queue) in self._states
            and self._provider.last_look(namespace, queue) is not None
        )

    def _resting(self, state: _QueueState) -> bool:
        """It is too early for another look: the last found nothing, and there have been no news."""
        return self._thrifty and not state.woken and self._until_look(state) > 0

    def _until_look(self, state: _QueueState) -> float:
        """Seconds until the next look is due, whoever made the last one."""
        last = self._provider.last_look(*state.key)
        return 0.0 if last is None else last + state.rest - self._clock.monotonic()

    def _enter(self) -> None:
        if self._closed:
            raise StoreClosed("the pond is closed")
        if self._consumers >= self._max_consumers:
            raise TooManyConsumers(f"{self._max_consumers} consumers are waiting already, which is the cap")
        self._consumers += 1

    # For those who change queues

    def notify(self, namespace: str | None, queue: str) -> None:
        """Look at the queue now if anybody waits on it (after an enqueue). A bad name is logged, not raised."""
        try:
            state = self._states.get((namespace, queue))  # type: ignore[arg-type]
            if state is None:
                state = self._states.get((names.namespace_name(namespace), names.queue_name(queue)))
        except (InvalidQueue, TypeError) as error:  # TypeError: not hashable, so no text.
            self._log.warning("millpond.dispatcher.bad_name", extra={"reason": str(error)})
            return
        if state is not None:
            self._news(state)

    def ready(self, namespace: str, queue: str) -> None:
        """As `notify`, for names that are known to be good."""
        state = self._states.get((namespace, queue))
        if state is not None:
            self._news(state)

    def _news(self, state: _QueueState) -> None:
        # Where waiters may rest without a look of their own, what comes while there is none is kept for the next.
        if state.waiters or self._thrifty:
            state.wake()

    def due(self, namespace: str, queue: str, at: int) -> None:
        """Look at the queue at ``at`` (ms UTC) if anybody waits on it then. Only the earliest time is kept."""
        state = self._states.get((namespace, queue))
        if state is not None and state.waiters and (state.alarm is None or at < state.alarm):
            state.alarm = at
            if state.sleeper is not None and not state.sleeper.done():
                state.sleeper.set_result(None)

    def notify_at(self, namespace: str | None, queue: str, message_id: str, due: int) -> None:
        """Look at the queue at ``due`` (ms UTC); the last call for a message counts. Empty id or past due: now."""
        key = (names.namespace_name(namespace), names.queue_name(queue))
        id = message_id.strip()
        self.cancel_notify(*key, id)
        if self._closed:
            return
        if not id or due <= self._clock.now_ms():
            self.ready(*key)
            return
        if len(self._timers) >= MAX_TIMERS:
            self.due(*key, due)
            return
        entry = (*key, id)

        def check() -> None:
            left = (due - self._clock.now_ms()) / 1000
            if left > 0:
                # Timers do not follow the wall clock, which may be set either way meanwhile.
                self._timers[entry] = self._clock.call_later(min(left, TICK), check)
            else:
                self._timers.pop(entry, None)
                self.ready(*key)

        check()

    def cancel_notify(self, namespace: str | None, queue: str, message_id: str) -> None:
        """Forget the message's `notify_at`; harmless when there is none."""
        entry = (names.namespace_name(namespace), names.queue_name(queue), message_id.strip())
        timer = self._timers.pop(entry, None)
        if timer is not None:
            timer.cancel()

    # For operators

    def queue_stats(self, namespace: str | None, queue: str) -> Stats:
        """A snapshot; zeros for a queue that nobody waits on."""
        key = (names.namespace_name(namespace), names.queue_name(queue))
        state = self._states.get(key)
        return Stats(*key, state.live_waiters() if state else 0, 0, self._consumers)

    @property
    def waiting(self) -> int:
        """Consumers that wait, on any queue."""
        return self._consumers

    def has_active_watcher(self, namespace: str | None, queue: str) -> bool:
        """Whether the queue's changes by others are being watched."""
        state = self._states.get((names.namespace_name(namespace), names.queue_name(queue)))
        return state is not None and state.watched

    async def close(self) -> None:
        """Stop; whoever waits gets StoreClosed. Safe to repeat."""
        self._closed = True
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        tasks = []
        for state in list(self._states.values()):
            for waiter in state.waiters:
                if not waiter.done():
                    waiter.set_exception(StoreClosed("the pond was closed while this consumer waited"))
            if state.task is not None:
                state.task.cancel()
                tasks.append(state.task)
            if state.linger is not None:
                state.linger.cancel()
            self._stop_watching(state)
        await asyncio.gather(*tasks, return_exceptions=True)
        self._states.clear()

    # A queue's task

    async def _run(self, state: _QueueState) -> None:
        retry = FIRST_RETRY
        if not self._thrifty:
            state.interval = self._poll_interval
        looked: int | None = None
        try:
            while state.waiters:
                self._watch(state)
                if self._resting(state):
                    await self._rest(state, self._until_look(state), looked)
                    if not state.waiters:
                        break
                named, state.named = state.named, False
                if state.woken and not named:
                    state.interval = self._poll_interval
                state.woken = False
                state.alarm = None
                wanted = min(state.live_waiters(), self._page_size)
                looked = self._clock.now_ms()
                found: list[Record] = []
                if wanted:
                    self.polls += 1
                    try:
                        found = await self._provider.next_candidates(*state.key, wanted)
                    except Exception as error:
                        # Whatever went wrong goes to the longest waiting caller; the others get the next try.
                        self._fail_one(state, error)
                        if named:
                            state.wake_by_name()
                        await self._pause(retry)
                        retry = min(retry * 2, MAX_RETRY)
                        continue
                    retry = FIRST_RETRY
                    self._hand_out(state, found)
                if found:
                    if not named:
                        state.interval = state.rest = self._poll_interval
                    if len(found) == wanted:
                        # Give the takers their turn before looking for the remaining waiters.
                        await asyncio.sleep(0)
                        continue
                # An answer in part may have come from what the provider had at hand: what is due there is news still.
                if named:
                    await self._rest(state, max(0.0, self._until_look(state)), looked)
                    continue
                state.rest = self._next_rest(state)
                await self._rest(state, state.rest, None if found else looked)
        finally:
            state.task = None
            if state.waiters and not self._closed:
                # A bug or a cancellation from outside must not leave anybody waiting for ever.
                for waiter in state.waiters:
                    if not waiter.done():
                        waiter.set_exception(StoreError("the dispatcher of this queue stopped"))
            self._linger(state)

    def _next_rest(self, state: _QueueState) -> float:
        """Seconds to the next look after this one, if nothing happens; the one after that comes later still."""
        if state.watched and not self._partial_watch:
            return self._resilient_poll_interval
        rest = state.interval
        state.interval = min(state.interval * 2, self._poll_max_interval)
        return rest + (self._poll_jitter * self._ids.below(1000) / 1000 if self._poll_jitter else 0.0)

    def _hand_out(self, state: _QueueState, found: list[Record]) -> None:
        for index, record in enumerate(found):
            while state.waiters:
                waiter, _ = state.waiters.popitem(last=False)
                if not waiter.done():
                    waiter.set_result(record)
                    break
            else:
                self._provider.give_back(found[index:])
                return

    def _fail_one(self, state: _QueueState, error: Exception) -> None:
        self._log.warning(
            "millpond.dispatcher.poll_failed",
            extra={"namespace": state.key[0], "queue": state.key[1], "reason": f"{type(error).__name__}: {error}"},
        )
        while state.waiters:
            waiter, _ = state.waiters.popitem(last=False)
            if not waiter.done():
                waiter.set_exception(error)
                return

    async def _rest(self, state: _QueueState, rest: float, looked: int | None) -> None:
        """Sleep until woken, until something is due, or for ``rest`` seconds.

        ``looked``: when the look began that found nothing. What the provider knew to be due by then is no reason for
        another one: it stays due while it cannot be handed out (a paused queue), and there would be no rest at all."""
        started = self._clock.monotonic()
        while not state.woken and state.waiters:
            now = self._clock.now_ms()
            due = self._provider.next_due(*state.key)
            if due is not None and looked is not None and due <= looked <= now:
                due = None
            alarms = [at for at in (state.alarm, due) if at is not None]
            remaining = started + rest - self._clock.monotonic()
            if alarms:
                until_due = (min(alarms) - now) / 1000
                if until_due <= 0:
                    return
                remaining = min(remaining, until_due)
            if remaining <= 0:
                return
            watched = state.watched
            await self._sleep(state, min(remaining, TICK))
            if watched and not state.watched:
                return  # The feed broke: look now, and open it again.
            if self._thrifty and not self._resting(state):
                return  # Another one's look brought more than that one took.

    async def _pause(self, seconds: float) -> None:
        """Let a failing queue rest; new waiters do not cut it short, or they would drive the store in a loop."""
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = self._clock.call_later(seconds, lambda: _end(over))
        try:
            await over
        finally:
            timer.cancel()

    async def _sleep(self, state: _QueueState, seconds: float) -> None:
        if state.woken:
            return
        sleeper: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        state.sleeper = sleeper
        timer = self._clock.call_later(seconds, lambda: _end(sleeper))
        try:
            await sleeper
        finally:
            timer.cancel()
            state.sleeper = None

    # Watching

    def _watch(self, state: _QueueState) -> None:
        if self._watch_factory is None or state.watched:
            return
        now = self._clock.monotonic()
        if now < state.watch_retry_at:
            return
        self._stop_watching(state)
        key = state.key

        def changed() -> None:
            self._provider.foreign_change(*key)
            state.wake()

        def appeared() -> None:
            self._provider.appeared_elsewhere(*key)
            state.wake_by_name()

        try:
            state.subscription = self._watch_factory.subscribe(*key, changed)
            state.watch_retry = FIRST_RETRY
            if self._thrifty and isinstance(state.subscription, Attentive):
                state.subscription.attend(state.live_waiters, appeared)
            # What happened before the subscription was not told: look afresh.
            self._provider.foreign_change(*key)
        except Exception as error:  # The factory may be anybody's, and polling does without it.
            state.watch_retry_at = now + state.watch_retry
            state.watch_retry = min(state.watch_retry * 2, MAX_RETRY)
            self._log.warning(
                "millpond.dispatcher.watch_failed",
                extra={"namespace": key[0], "queue": key[1], "reason": f"{type(error).__name__}: {error}"},
            )

    def _stop_watching(self, state: _QueueState) -> None:
        if state.subscription is not None:
            state.subscription.close()
            state.subscription = None

    def _linger(self, state: _QueueState) -> None:
        def forget() -> None:
            state.linger = None
            if not state.waiters and state.task is None:
                self._stop_watching(state)
                if self._states.get(state.key) is state:
                    del self._states[state.key]

        if self._closed:
            self._stop_watching(state)
        elif state.linger is None:
            state.linger = self._clock.call_later(self._linger_for, forget)
