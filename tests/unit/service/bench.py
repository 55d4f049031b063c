"""A dispatcher on a bench: its candidates, its change feed and its time are all in the test's hands."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

from millpond.model.clock import ManualClock
from millpond.model.ids import IdSource
from millpond.model.message import HEAD_FORMAT, STATUS_FORMAT, Head, Status
from millpond.service.dispatcher import Candidate, Dispatcher
from millpond.service.ready import Record
from millpond.stores.base import Box, Item, Mark

ROUNDS = 20
"""Turns of the event loop after which whatever could run has run: the longest chain here takes about six."""


def record(
    number: int,
    *,
    queue: str = "q",
    priority: int = 5,
    due: int = 0,
    payload: bytes | None = None,
    etag: str = "",
    group: str | None = None,
) -> Record:
    """A ready message; ``number`` is its place in the order of insertion."""
    id = f"00000000-0000-7000-8000-{number:012x}"
    head = Head(
        HEAD_FORMAT, id, "default", queue, 0, priority, 5, 30_000, None, None, group, None, None, None, 1, False
    )
    status = Status(STATUS_FORMAT, 0, due, 0, 0, 0, None, None, None, None)
    item = Item("default", queue, id, priority, group, 1, False, number)
    return Record(item, Mark(etag or f"etag-{number}", due, False, None, Box.LIVE), head, status, payload)


class Source:
    """Where the dispatcher's candidates come from, and notes of all that it asked."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock
        self.stock: dict[str, list[Record]] = {}
        self.failing: dict[str, Exception] = {}
        self.gates: dict[str, asyncio.Event] = {}
        """Looks at these queues wait until their event is set."""
        self.on_look: Callable[[], object] = lambda: None
        """Called just before a look is answered."""
        self.due: dict[str, int] = {}
        self.asked = 0
        """How often it was asked when something comes due."""
        self.looks: list[tuple[str, int, float]] = []
        """Queue, limit and time of each look."""
        self.returned: list[Record] = []
        self.foreign: list[str] = []

    def put(self, *numbers: int, queue: str = "q") -> list[Record]:
        """Make candidates ready, and tell nobody."""
        records = [record(number, queue=queue) for number in numbers]
        self.stock.setdefault(queue, []).extend(records)
        return records

    def times(self, queue: str = "q") -> list[float]:
        """When the queue was looked at, seconds from the start."""
        return [time for name, _, time in self.looks if name == queue]

    def limits(self, queue: str = "q") -> list[int]:
        """How many candidates each look asked for."""
        return [limit for name, limit, _ in self.looks if name == queue]

    async def next_candidates(self, namespace: str | None, queue: str, limit: int) -> list[Record]:
        self.looks.append((queue, limit, self._clock.monotonic()))
        # A dispatcher that looks without resting would hang the test: end it, with a failure that says so.
        assert len(self.looks) < 1000, "it looks again and again without a rest"
        gate = self.gates.get(queue)
        if gate is not None:
            await gate.wait()
        if queue in self.failing:
            raise self.failing[queue]
        self.on_look()
        stock = self.stock.get(queue, [])
        found = stock[:limit]
        del stock[:limit]
        return found

    def give_back(self, candidates: Sequence[Record]) -> None:
        for one in candidates:
            self.returned.append(one)
            self.stock.setdefault(one.queue, []).insert(0, one)

    def foreign_change(self, namespace: str, queue: str) -> None:
        self.foreign.append(queue)

    def next_due(self, namespace: str, queue: str) -> int | None:
        self.asked += 1
        assert self.asked < 10_000, "it asks again and again without a rest"
        return self.due.get(queue)


class Watch:
    """A subscription that the test can break."""

    def __init__(self, queue: str, changed: Callable[[], object]) -> None:
        self.queue = queue
        self.changed = changed
        self.active = True
        self.closed = False

    def breaks(self) -> None:
        """The feed ends, of its own accord."""
        self.active = False

    def close(self) -> None:
        self.active = False
        self.closed = True


class Feed:
    """A change feed, open unless told otherwise, and notes of who asked for it when."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock
        self.failing: Exception | None = None
        self.attempts: list[float] = []
        self.watches: list[Watch] = []

    def subscribe(self, namespace: str, queue: str, callback: Callable[[], object]) -> Watch:
        self.attempts.append(self._clock.monotonic())
        if self.failing is not None:
            raise self.failing
        watch = Watch(queue, callback)
        self.watches.append(watch)
        return watch


class Bench:
    """A dispatcher, what it works on, and the time. Polls have no jitter unless the test asks for it."""

    def __init__(self, *, watched: bool = False, seed: int = 0, **options: Any) -> None:
        self.clock = ManualClock()
        self.source = Source(self.clock)
        self.feed = Feed(self.clock)
        self.dispatcher = Dispatcher(
            self.source,
            clock=self.clock,
            ids=IdSource(self.clock, random.Random(seed).randbytes),
            watch_factory=self.feed if watched else None,
            **{"poll_jitter": 0.0, **options},
        )

    async def __aenter__(self) -> Bench:
        return self

    async def __aexit__(self, *ending: object) -> None:
        await self.dispatcher.close()
        await self.settle()

    async def settle(self) -> None:
        """Let everything run that can."""
        for _ in range(ROUNDS):
            await asyncio.sleep(0)

    async def advance(self, seconds: float, *, step: float | None = None) -> None:
        """Let time pass; in steps where what happens on the way sets timers of its own."""
        await self.settle()
        step = step or seconds
        for _ in range(round(seconds / step)):
            self.clock.advance(step)
            await self.settle()

    async def waiting(self, queue: str = "q", *, timeout: float | None = None) -> asyncio.Task[Candidate | None]:
        """A consumer that waits by now."""
        task = asyncio.create_task(self.dispatcher.wait(None, queue, timeout=timeout))
        await self.settle()
        assert not task.done(), f"it did not wait: {task}"
        return task

    async def line(self, count: int, queue: str = "q") -> list[asyncio.Task[Candidate | None]]:
        """Consumers who come at the same moment, in this order."""
        tasks = [asyncio.create_task(self.dispatcher.wait(None, queue)) for _ in range(count)]
        await self.settle()
        return tasks

    def in_ms(self, seconds: float) -> int:
        """The wall clock's time in ``seconds`` from now, as due times are written."""
        return self.clock.now_ms() + round(seconds * 1000)


def served(tasks: Sequence[asyncio.Task[Candidate | None]]) -> list[int]:
    """The numbers of the candidates that these consumers got, in the consumers' order; the others still wait."""
    got = [task.result() for task in tasks if task.done()]
    return [one.item.key for one in got if one is not None]


async def ended(task: asyncio.Task[Any]) -> BaseException | None:
    """Cancel the task and wait for its end; what it ended with."""
    task.cancel()
    [result] = await asyncio.gather(task, return_exceptions=True)
    return result if isinstance(result, BaseException) else None
