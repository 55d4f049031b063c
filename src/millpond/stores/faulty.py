"""A store that fails where it is told to: for tests of what survives.

`FaultyStore` stands before another store, numbers the calls that go through, and asks its plan about each one. A run
without a plan tells how many calls a workload makes; runs with ``{number: crash_before()}`` and the like then visit
every point at which a process can die, or a reply get lost::

    counting = FaultyStore(MemoryStore(clock=clock))
    await workload(counting)
    for number, call in enumerate(counting.calls, 1):
        for fault in (crash_before(), crash_middle(), crash_after()):
            ...                                  # workload(FaultyStore(fresh, {number: fault})), then look what is left

After a crash the store refuses every call but ``close``, as a dead process makes none; reopen what was inside it.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from millpond.errors import StoreError
from millpond.stores.base import (
    Blob,
    Box,
    Capabilities,
    Counts,
    Decide,
    Document,
    Item,
    Op,
    Outcome,
    Page,
    Problem,
    QueueName,
    ReadyPage,
    Removed,
    Requests,
    Store,
    Stored,
    Subscription,
    Updated,
)

T = TypeVar("T")

CHANGING = frozenset({"write", "commit", "take", "write_blob", "sweep"})
"""The calls that change what is stored; a crash around any other one is a crash between two of these."""


class Crash(StoreError):
    """The process died here (in a test); the store takes no more calls."""

    code = "crash"


class Point(enum.Enum):
    """Where in a call the fault strikes."""

    BEFORE = "before"
    """Nothing of the call was applied."""
    MIDDLE = "middle"
    """The first ops of a ``write`` were applied; of a ``commit`` none; of a blob some chunks were read."""
    AFTER = "after"
    """All of it was applied, and nobody was told."""
    HELD = "held"
    """Nothing fails, but the call waits at a gate first."""


class Gate:
    """Where a held call waits. ``reached`` is set when it has come; `open` lets it go on."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self._open = asyncio.Event()

    def open(self) -> None:
        """Let the call go on, and all that come later."""
        self._open.set()

    async def _pass(self) -> None:
        self.reached.set()
        await self._open.wait()


class Fault(NamedTuple):
    """What goes wrong with a call. Build it with the functions below."""

    point: Point
    crash: bool = False
    error: Exception | None = None
    applied: int | None = None
    """How many ops of a ``write`` precede a fault in the middle; None for half of them."""
    gate: Gate | None = None


def fail_before(error: Exception | None = None) -> Fault:
    """The call raises (a StoreError, unless told otherwise), and nothing was applied."""
    return Fault(Point.BEFORE, error=error)


def fail_middle(applied: int | None = None, error: Exception | None = None) -> Fault:
    """The call raises after its first ``applied`` ops (half of them by default): a connection that broke."""
    return Fault(Point.MIDDLE, error=error, applied=applied)


def fail_after(error: Exception | None = None) -> Fault:
    """The call was applied, but raises: its reply was lost."""
    return Fault(Point.AFTER, error=error)


def crash_before() -> Fault:
    """The process dies before the call reaches the storage."""
    return Fault(Point.BEFORE, crash=True)


def crash_middle(applied: int | None = None) -> Fault:
    """The process dies after the first ``applied`` ops of a ``write`` (half of them by default)."""
    return Fault(Point.MIDDLE, crash=True, applied=applied)


def crash_after() -> Fault:
    """The process dies after the call was applied, before it learned of that."""
    return Fault(Point.AFTER, crash=True)


def hold(gate: Gate) -> Fault:
    """The call waits at the gate before it is made."""
    return Fault(Point.HELD, gate=gate)


class Call(NamedTuple):
    """A call that reached the store."""

    number: int
    """1 for the first."""
    method: str
    ops: tuple[Op, ...] = ()
    """Of ``write`` and ``commit``."""

    @property
    def changing(self) -> bool:
        """It may change what is stored."""
        return self.method in CHANGING


Plan = Mapping[int, Fault] | Callable[[Call], Fault | None]
"""Call number → fault, or a function that decides call by call."""


def nth(number: int, method: str, fault: Fault) -> Callable[[Call], Fault | None]:
    """A plan: ``fault`` at the ``number``-th call of ``method`` (1 for the first)."""
    left = number

    def plan(call: Call) -> Fault | None:
        nonlocal left
        if call.method == method:
            left -= 1
            if left == 0:
                return fault
        return None

    return plan


class FaultyStore:
    """``inner``, failing as planned. ``open``, ``close``, ``statistics`` and ``subscribe`` are not numbered.

    ``plan`` may be replaced at any time.
    """

    def __init__(self, inner: Store, plan: Plan | None = None) -> None:
        self.inner = inner
        self.plan: Plan = {} if plan is None else plan
        self.calls: list[Call] = []
        """Every call so far, in order."""
        self.crashed = False

    @property
    def capabilities(self) -> Capabilities:
        """The inner store's."""
        return self.inner.capabilities

    @property
    def clock_offset(self) -> int:
        """The inner store's."""
        return self.inner.clock_offset

    async def open(self) -> None:
        """Open the inner store."""
        self._check_alive()
        await self.inner.open()

    async def close(self) -> None:
        """Close the inner store, also after a crash."""
        await self.inner.close()

    def _check_alive(self) -> None:
        if self.crashed:
            raise Crash

    def _crash(self) -> None:
        self.crashed = True
        raise Crash

    def _strike(self, fault: Fault, call: Call) -> None:
        if fault.crash:
            self._crash()
        if fault.error is not None:
            raise fault.error
        known = "nothing was applied" if fault.point is Point.BEFORE else "its outcome is unknown"
        raise StoreError(f"call {call.number} ({call.method}) was made to fail: {known}")

    def _meet(self, method: str, ops: Sequence[Op] = ()) -> tuple[Call, Fault | None]:
        self._check_alive()
        call = Call(len(self.calls) + 1, method, tuple(ops))
        self.calls.append(call)
        return call, self.plan(call) if callable(self.plan) else self.plan.get(call.number)

    async def _before(self, call: Call, fault: Fault | None) -> None:
        if fault is None:
            return
        if fault.gate is not None:
            await fault.gate._pass()
            self._check_alive()
        if fault.point is Point.BEFORE:
            self._strike(fault, call)

    def _after(self, call: Call, fault: Fault | None) -> None:
        # Somebody else's crash took this call's reply with it.
        self._check_alive()
        if fault is not None and fault.point is not Point.HELD:
            self._strike(fault, call)

    async def _call(self, method: str, run: Callable[[], Awaitable[T]]) -> T:
        call, fault = self._meet(method)
        await self._before(call, fault)
        # These change nothing, or are one step: there is no middle, and a fault there is one before it.
        if fault is not None and fault.point is Point.MIDDLE:
            self._strike(fault, call)
        result = await run()
        self._after(call, fault)
        return result

    async def write(self, ops: Sequence[Op]) -> list[Outcome]:
        """The inner store's ``write``, of the first ops only when the fault is in the middle."""
        call, fault = self._meet("write", ops)
        await self._before(call, fault)
        if fault is not None and fault.point is Point.MIDDLE:
            ops = ops[: len(ops) // 2 if fault.applied is None else fault.applied]
        outcomes = await self.inner.write(ops)
        self._after(call, fault)
        return outcomes

    async def commit(self, ops: Sequence[Op]) -> list[Outcome]:
        """The inner store's ``commit``; it has no middle."""
        call, fault = self._meet("commit", ops)
        await self._before(call, fault)
        if fault is not None and fault.point is Point.MIDDLE:
            self._strike(fault, call)
        outcomes = await self.inner.commit(ops)
        self._after(call, fault)
        return outcomes

    async def write_blob(self, namespace: str, queue: str, id: str, chunks: AsyncIterator[bytes], now: int) -> Blob:
        """The inner store's ``write_blob``; with a fault in the middle its source breaks after the first chunk."""
        call, fault = self._meet("write_blob")
        await self._before(call, fault)
        source = self._cut(chunks, fault, call) if fault is not None and fault.point is Point.MIDDLE else chunks
        blob = await self.inner.write_blob(namespace, queue, id, source, now)
        self._after(call, fault)
        return blob

    async def _cut(self, chunks: AsyncIterator[bytes], fault: Fault, call: Call) -> AsyncIterator[bytes]:
        async for chunk in chunks:
            yield chunk
            break
        self._strike(fault, call)

    async def read_blob(self, item: Item) -> AsyncIterator[bytes]:
        """The inner store's ``read_blob``; a fault in the middle or after strikes after the first chunk."""
        call, fault = self._meet("read_blob")
        await self._before(call, fault)
        async for chunk in self.inner.read_blob(item):
            self._check_alive()
            yield chunk
            if fault is not None and fault.point is not Point.HELD:
                self._strike(fault, call)
        self._after(call, fault)

    async def get(self, namespace: str, queue: str, id: str, *, payload: bool = False) -> Stored | None:
        """The inner store's ``get``."""
        return await self._call("get", lambda: self.inner.get(namespace, queue, id, payload=payload))

    async def ready(self, namespace: str, queue: str, now: int, *, limit: int) -> ReadyPage:
        """The inner store's ``ready``."""
        return await self._call("ready", lambda: self.inner.ready(namespace, queue, now, limit=limit))

    async def take(
        self, namespace: str, queue: str, now: int, *, limit: int, decide: Decide
    ) -> list[tuple[Any, Updated | Removed]]:
        """The inner store's ``take``, of fewer records when the fault is in the middle."""
        call, fault = self._meet("take")
        await self._before(call, fault)
        if fault is not None and fault.point is Point.MIDDLE:
            limit = limit // 2 if fault.applied is None else fault.applied
        taken = await self.inner.take(namespace, queue, now, limit=limit, decide=decide) if limit else []
        self._after(call, fault)
        return taken

    async def expired(self, now: int, *, limit: int) -> list[Stored]:
        """The inner store's ``expired``."""
        return await self._call("expired", lambda: self.inner.expired(now, limit=limit))

    async def payload(self, item: Item) -> bytes | None:
        """The inner store's ``payload``."""
        return await self._call("payload", lambda: self.inner.payload(item))

    async def state(self, item: Item) -> Document | None:
        """The inner store's ``state``."""
        return await self._call("state", lambda: self.inner.state(item))

    async def document(self, namespace: str, queue: str) -> Document | None:
        """The inner store's ``document``."""
        return await self._call("document", lambda: self.inner.document(namespace, queue))

    async def queues(self) -> list[QueueName]:
        """The inner store's ``queues``."""
        return await self._call("queues", self.inner.queues)

    async def counts(self, namespace: str, queue: str, now: int) -> Counts:
        """The inner store's ``counts``."""
        return await self._call("counts", lambda: self.inner.counts(namespace, queue, now))

    async def sweep(self, now: int, *, older_than: int, limit: int) -> int:
        """The inner store's ``sweep``."""
        return await self._call("sweep", lambda: self.inner.sweep(now, older_than=older_than, limit=limit))

    async def verify(self) -> list[Problem]:
        """The inner store's ``verify``."""
        return await self._call("verify", self.inner.verify)

    # Last of the coroutines: below it, ``list`` would name the method in annotations.
    async def list(self, namespace: str, queue: str, box: Box, *, after: int | None = None, limit: int = 100) -> Page:
        """The inner store's ``list``."""
        return await self._call("list", lambda: self.inner.list(namespace, queue, box, after=after, limit=limit))

    def subscribe(self, namespace: str, queue: str, callback: Callable[[], object]) -> Subscription:
        """The inner store's ``subscribe``; silent after a crash."""
        self._check_alive()
        return self.inner.subscribe(namespace, queue, lambda: None if self.crashed else callback())

    def statistics(self) -> dict[str, Any]:
        """The inner store's, and ``calls``: how many came this way."""
        return {**self.inner.statistics(), "calls": len(self.calls)}

    def requests(self) -> dict[QueueName | None, Requests]:
        """The inner store's."""
        return self.inner.requests()
