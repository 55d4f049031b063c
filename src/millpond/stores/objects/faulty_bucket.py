"""A bucket that fails where it is told to: for tests of what survives.

`FaultyBucket` stands before another bucket, numbers the requests that go through, and asks its plan about each one. A
run without a plan tells how many requests a workload makes; runs with ``{number: crash_before()}`` and the like then
visit every point at which a process can die, a reply get lost, or a cloud tell yesterday's truth::

    counting = FaultyBucket(MemoryBucket(clock=clock))
    await workload(counting)
    for request in counting.requests:
        for fault in (crash_before(), crash_after(), lost_done(), lost_undone(), lost_later(3)):
            if fits(fault, request.method):
                ...                         # workload(FaultyBucket(fresh, {request.number: fault})), then look

Each page of a listing is a request. An upload is one, and so is a batch of deletes. After a crash the bucket refuses
every request, as a dead process makes none; reopen what was inside it.
"""

from __future__ import annotations

import builtins
import contextlib
import enum
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import NamedTuple, TypeVar

from millpond.errors import OutcomeUnknown, StoreBusy, StoreCorrupt, StoreError
from millpond.stores.faulty import Crash, Gate
from millpond.stores.objects.bucket import Bucket, Content, Entry, Folder, ObjectChanged, ObjectExists, Tag

T = TypeVar("T")

CHANGING = frozenset({"create", "replace", "delete", "delete_many", "upload"})
"""The requests that change what is stored."""
READING = frozenset({"read", "list", "folder", "download"})


class Failure(enum.Enum):
    """What goes wrong."""

    CRASH_BEFORE = "crash before"
    CRASH_AFTER = "crash after"
    LOST_DONE = "reply lost, done"
    LOST_UNDONE = "reply lost, not done"
    LOST_LATER = "reply lost, done later"
    LOST_PARTLY = "reply lost, half of it done"
    THROTTLED = "throttled"
    REPEATED = "repeated behind our back"
    STALE = "stale listing"
    TRUNCATED = "truncated download"
    SKEWED = "another clock"
    HELD = "held"


_FITTING = {
    Failure.CRASH_BEFORE: CHANGING | READING,
    Failure.CRASH_AFTER: CHANGING | READING,
    Failure.LOST_DONE: CHANGING,
    Failure.LOST_UNDONE: CHANGING | READING,
    Failure.LOST_LATER: CHANGING,
    Failure.LOST_PARTLY: frozenset({"delete_many"}),
    Failure.THROTTLED: CHANGING | READING,
    Failure.REPEATED: frozenset({"create", "replace"}),
    Failure.STALE: frozenset({"list", "folder"}),
    Failure.TRUNCATED: frozenset({"download"}),
    Failure.SKEWED: frozenset({"read", "list", "folder"}),
    Failure.HELD: CHANGING | READING,
}


class Fault(NamedTuple):
    """What goes wrong with a request. Build it with the functions below."""

    failure: Failure
    requests: int = 0
    """How many requests later it takes place, or ago the listing was true."""
    skew: int = 0
    """ms."""
    gate: Gate | None = None
    error: StoreError | None = None

    @property
    def crash(self) -> bool:
        """The process does not survive it."""
        return self.failure in (Failure.CRASH_BEFORE, Failure.CRASH_AFTER)


def crash_before() -> Fault:
    """The process dies before the request reaches the bucket."""
    return Fault(Failure.CRASH_BEFORE)


def crash_after() -> Fault:
    """The process dies after the request took place, before it learned of that."""
    return Fault(Failure.CRASH_AFTER)


def lost_done() -> Fault:
    """The request took place, and its outcome is unknown."""
    return Fault(Failure.LOST_DONE)


def lost_undone() -> Fault:
    """The request never takes place, and its outcome is unknown."""
    return Fault(Failure.LOST_UNDONE)


def lost_later(requests: int) -> Fault:
    """The outcome is unknown, and the request takes place after the next ``requests`` ones: a packet on its way."""
    return Fault(Failure.LOST_LATER, requests=requests)


def lost_partly() -> Fault:
    """The first half of a batch of deletes took place, and the outcome is unknown."""
    return Fault(Failure.LOST_PARTLY)


def throttled(error: StoreError | None = None) -> Fault:
    """The bucket has refused the request for longer than it is retried: StoreBusy unless told otherwise."""
    return Fault(Failure.THROTTLED, error=error)


def repeated() -> Fault:
    """The request took place, its reply was lost, and the client sent it again by itself: a create meets its own
    object, a replace its own change."""
    return Fault(Failure.REPEATED)


def stale(requests: int) -> Fault:
    """The listing is that of ``requests`` requests ago: without new objects, with deleted ones. The bucket must
    ``remember`` as many."""
    return Fault(Failure.STALE, requests=requests)


def truncated() -> Fault:
    """The download ends after half of the object."""
    return Fault(Failure.TRUNCATED)


def skewed(ms: int) -> Fault:
    """What answers this request has a clock that is ``ms`` fast."""
    return Fault(Failure.SKEWED, skew=ms)


def hold(gate: Gate) -> Fault:
    """The request waits at the gate before it is made."""
    return Fault(Failure.HELD, gate=gate)


def fits(fault: Fault, method: str) -> bool:
    """Whether that can happen to a request of this kind. A plan with a fault that does not fit is a mistake."""
    return method in _FITTING[fault.failure]


class Request(NamedTuple):
    """A request that reached the bucket."""

    number: int
    """1 for the first."""
    method: str
    name: str
    """The object's, or the prefix; the first object's of a batch."""

    @property
    def changing(self) -> bool:
        """It may change what is stored."""
        return self.method in CHANGING


Plan = Mapping[int, Fault] | Callable[[Request], Fault | None]
"""Request number → fault, or a function that decides request by request."""


def nth(number: int, method: str, fault: Fault) -> Callable[[Request], Fault | None]:
    """A plan: ``fault`` at the ``number``-th request of ``method`` (1 for the first)."""
    left = number

    def plan(request: Request) -> Fault | None:
        nonlocal left
        if request.method == method:
            left -= 1
            if left == 0:
                return fault
        return None

    return plan


class _Late(NamedTuple):
    after: int
    """The number of the last request that comes before it."""
    run: Callable[[Bucket], Awaitable[object]]


class _Shared:
    """What the handles on one bucket share: its requests are numbered together."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.requests: list[Request] = []
        self.late: list[_Late] = []
        self.past: deque[tuple[int, list[Entry]]] = deque()
        """How many requests there had been, and what a listing showed then."""


@contextlib.asynccontextmanager
async def _closing(source: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """End it here, and not when the garbage collector comes by."""
    try:
        yield source
    finally:
        if isinstance(source, AsyncGenerator):
            await source.aclose()


class FaultyBucket:
    """``inner``, failing as planned.

    ``skew``: how far the bucket's clock is fast, ms. ``remember``: how many requests back a stale listing may lie; each
    change then costs a listing of all, so not for large buckets. ``plan``, ``skew`` may be replaced at any time.
    """

    def __init__(self, inner: Bucket, plan: Plan | None = None, *, skew: int = 0, remember: int = 0) -> None:
        self.inner = inner
        self.skew = skew
        self.crashed = False
        self._remember = remember
        self._shared = _Shared({} if plan is None else plan)

    def share(self, inner: Bucket) -> FaultyBucket:
        """Another process's handle on the same bucket: requests are numbered on, and the plan is the same."""
        other = FaultyBucket(inner, skew=self.skew, remember=self._remember)
        other._shared = self._shared
        return other

    @property
    def plan(self) -> Plan:
        """What fails; common to all handles."""
        return self._shared.plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self._shared.plan = plan

    @property
    def requests(self) -> list[Request]:
        """Every request so far, of all handles, in order."""
        return self._shared.requests

    async def settle(self) -> None:
        """Have everything take place that is still on its way."""
        await self._arrive(None)

    async def _arrive(self, number: int | None) -> None:
        shared = self._shared
        due = [late for late in shared.late if number is None or late.after < number]
        # Taken off before the first wait: requests that run at the same time must not bring one of them twice.
        shared.late = [late for late in shared.late if late not in due]
        for late in due:
            # Its condition may not hold any more, and nobody waits for its reply. Whoever sent it may be gone, so it
            # takes place by way of the handle that is in use.
            with contextlib.suppress(ObjectExists, ObjectChanged):
                await late.run(self.inner)
            await self._note()

    async def _note(self) -> None:
        """Remember what a listing shows now."""
        if not self._remember:
            return
        entries = [entry async for page in self.inner.list("") for entry in page]
        past, count = self._shared.past, len(self._shared.requests)
        past.append((count, sorted(entries)))
        while len(past) > 1 and past[1][0] <= count - self._remember:
            past.popleft()

    def _as_of(self, request: Request, fault: Fault) -> list[Entry]:
        if fault.requests > self._remember:
            raise ValueError(f"a listing of {fault.requests} requests ago: the bucket remembers {self._remember}")
        then = request.number - 1 - fault.requests
        found: list[Entry] = self._shared.past[0][1]
        for count, entries in self._shared.past:
            if count <= then:
                found = entries
        return found

    def _check_alive(self) -> None:
        if self.crashed:
            raise Crash

    async def _meet(self, method: str, name: str) -> tuple[Request, Fault | None]:
        """Number the request, and let everything happen to it that comes before it is made."""
        self._check_alive()
        shared = self._shared
        if self._remember and not shared.past:
            await self._note()
        request = Request(len(shared.requests) + 1, method, name)
        shared.requests.append(request)
        await self._arrive(request.number)
        fault = shared.plan(request) if callable(shared.plan) else shared.plan.get(request.number)
        if fault is None:
            return request, None
        if not fits(fault, method):
            raise ValueError(f"request {request.number} is a {method}: {fault.failure.value} cannot happen to it")
        if fault.gate is not None:
            await fault.gate._pass()
            self._check_alive()
        if fault.failure is Failure.CRASH_BEFORE:
            self.crashed = True
            raise Crash
        if fault.failure is Failure.THROTTLED:
            raise fault.error or StoreBusy(f"{method} {name} was throttled; try again later")
        return request, fault

    def _lost(self, request: Request) -> OutcomeUnknown:
        return OutcomeUnknown(f"no reply came to {request.method} {request.name}; read it to see what happened")

    def _reply(self, request: Request, fault: Fault | None) -> None:
        """What comes between a request that took place and its caller."""
        # Somebody else's crash took this reply with it.
        self._check_alive()
        if fault is None:
            return
        match fault.failure:
            case Failure.CRASH_AFTER:
                self.crashed = True
                raise Crash
            case Failure.LOST_DONE | Failure.LOST_PARTLY:
                raise self._lost(request)
            case Failure.REPEATED if request.method == "create":
                raise ObjectExists(f"object {request.name} is there already; read it to see whose it is")
            case Failure.REPEATED:
                raise ObjectChanged(f"object {request.name} was changed or removed; read it again")

    async def _change(self, method: str, name: str, run: Callable[[Bucket], Awaitable[T]]) -> T:
        request, fault = await self._meet(method, name)
        return await self._make(request, fault, run)

    async def _make(self, request: Request, fault: Fault | None, run: Callable[[Bucket], Awaitable[T]]) -> T:
        if fault is not None and fault.failure is Failure.LOST_UNDONE:
            raise self._lost(request)
        if fault is not None and fault.failure is Failure.LOST_LATER:
            self._shared.late.append(_Late(request.number + fault.requests, run))
            raise self._lost(request)
        try:
            result = await run(self.inner)
        except (ObjectExists, ObjectChanged):
            # A refusal is a reply too.
            self._reply(request, fault)
            raise
        await self._note()
        self._reply(request, fault)
        return result

    async def create(self, name: str, data: bytes) -> Tag:
        """The inner bucket's ``create``."""
        return await self._change("create", name, lambda inner: inner.create(name, data))

    async def replace(self, name: str, data: bytes, tag: Tag) -> Tag:
        """The inner bucket's ``replace``."""
        return await self._change("replace", name, lambda inner: inner.replace(name, data, tag))

    async def delete(self, name: str, *, once: bool = False) -> None:
        """The inner bucket's ``delete``."""
        await self._change("delete", name, lambda inner: inner.delete(name, once=once))

    async def delete_many(self, names: list[str]) -> None:
        """The inner bucket's ``delete_many``, of half of the names when it gets lost partly."""
        request, fault = await self._meet("delete_many", names[0] if names else "")
        part = names[: len(names) // 2] if fault is not None and fault.failure is Failure.LOST_PARTLY else names
        await self._make(request, fault, lambda inner: inner.delete_many(part))

    async def upload(self, name: str, chunks: AsyncIterator[bytes]) -> int:
        """The inner bucket's ``upload``; one that gets lost has read its source."""
        request, fault = await self._meet("upload", name)
        if fault is None or fault.failure not in (Failure.LOST_UNDONE, Failure.LOST_LATER):
            return await self._make(request, fault, lambda inner: inner.upload(name, chunks))
        data = b"".join([chunk async for chunk in chunks])

        async def again() -> AsyncIterator[bytes]:
            yield data

        return await self._make(request, fault, lambda inner: inner.upload(name, again()))

    async def read(self, name: str) -> Content | None:
        """The inner bucket's ``read``."""
        request, fault = await self._meet("read", name)
        if fault is not None and fault.failure is Failure.LOST_UNDONE:
            raise self._lost(request)
        content = await self.inner.read(name)
        self._reply(request, fault)
        return None if content is None else content._replace(modified=content.modified + self._skew(fault))

    def _skew(self, fault: Fault | None) -> int:
        return self.skew + (0 if fault is None else fault.skew)

    def _shown(self, entries: list[Entry], fault: Fault | None) -> list[Entry]:
        skew = self._skew(fault)
        return [entry._replace(modified=entry.modified + skew) for entry in entries] if skew else entries

    async def list(self, prefix: str, *, after: str | None = None) -> AsyncIterator[builtins.list[Entry]]:
        """The inner bucket's ``list``. A stale page shows what was there then, between the name where it begins and the
        one where it ends now."""
        async with _closing(self.inner.list(prefix, after=after)) as pages:
            async for page in self._pages(pages, prefix, after):
                yield page

    async def _pages(
        self, pages: AsyncIterator[builtins.list[Entry]], prefix: str, after: str | None
    ) -> AsyncIterator[builtins.list[Entry]]:
        begin = after
        ahead: builtins.list[Entry] | None = None
        first = True
        while True:
            # Only the bucket knows whether another page follows, so pages after the first are fetched before they are
            # numbered. The first is a request even when it brings nothing.
            if not first and ahead is None and (ahead := await anext(pages, None)) is None:
                return
            request, fault = await self._meet("list", prefix)
            if fault is not None and fault.failure is Failure.LOST_UNDONE:
                raise self._lost(request)
            page = await anext(pages, []) if first else ahead or []
            first, ahead, shown = False, None, page
            if fault is not None and fault.failure is Failure.STALE:
                ahead = await anext(pages, None)
                shown = [
                    entry
                    for entry in self._as_of(request, fault)
                    if entry.name.startswith(prefix)
                    and (begin is None or entry.name > begin)
                    and (ahead is None or entry.name <= page[-1].name)
                ]
            self._reply(request, fault)
            yield self._shown(shown, fault)
            begin = page[-1].name if page else begin

    async def folder(self, prefix: str) -> Folder:
        """The inner bucket's ``folder``."""
        request, fault = await self._meet("folder", prefix)
        if fault is not None and fault.failure is Failure.LOST_UNDONE:
            raise self._lost(request)
        if fault is not None and fault.failure is Failure.STALE:
            below = [entry for entry in self._as_of(request, fault) if entry.name.startswith(prefix)]
            heads = {entry.name: entry.name[len(prefix) :].partition("/") for entry in below}
            found = Folder(
                sorted({prefix + head for head, slash, _ in heads.values() if slash}),
                [entry for entry in below if not heads[entry.name][1]],
            )
        else:
            found = await self.inner.folder(prefix)
        self._reply(request, fault)
        return found._replace(entries=self._shown(found.entries, fault))

    async def download(self, name: str) -> AsyncIterator[bytes]:
        """The inner bucket's ``download``; a crash after it comes with the first chunk."""
        request, fault = await self._meet("download", name)
        if fault is not None and fault.failure is Failure.LOST_UNDONE:
            raise self._lost(request)
        async with _closing(self.inner.download(name)) as chunks:
            if fault is None or fault.failure is not Failure.TRUNCATED:
                async for chunk in chunks:
                    self._check_alive()
                    yield chunk
                    self._reply(request, fault)
                return
            data = b"".join([chunk async for chunk in chunks])
        yield data[: len(data) // 2]
        raise StoreCorrupt(f"object {name} ended after {len(data) // 2} bytes; read it again")

    async def close(self) -> None:
        """Close the inner bucket, also after a crash."""
        await self.inner.close()
