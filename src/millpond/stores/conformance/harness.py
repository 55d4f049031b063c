"""What the checks share: the harness, short forms for the usual ops, and assertions that work under ``python -O``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar

import msgspec

from millpond.stores.base import (
    Box,
    Cause,
    Conflict,
    Insert,
    Inserted,
    Item,
    Mark,
    Op,
    Outcome,
    Remove,
    Removed,
    Store,
    Stored,
    Unique,
    Update,
    Updated,
)

NOW = 1_750_000_000_000
"""The present of the checks; all times are given to a store, none is read from a clock."""
PATIENCE = 10.0
"""Seconds that a check waits for another handle's news before it calls the feed broken; a working one takes
milliseconds, and a loaded machine may take a second."""

T = TypeVar("T")


class Harness(Protocol):
    """How the suite gets at the store under test. One harness per check; its store is empty at first.

    A store that reads a clock is to be given one that stands at `NOW`, as `ManualClock` does: the checks' ids and due
    times are of that time, and what such a store dates itself must not be of another."""

    @property
    def shared(self) -> bool:
        """Several handles may be open at the same time."""

    @property
    def persistent(self) -> bool:
        """What was written is there again when all handles have been closed and a new one is opened."""

    @property
    def slow(self) -> bool:
        """A server answers each request by itself: checks of many records make do with a hundred."""

    def handle(self) -> Store:
        """A new handle, not opened yet, on this harness's data."""


Check = Callable[[Harness], Awaitable[None]]

CHECKS: list[Check] = []
"""All checks, in the order of their modules."""


def check(function: Check) -> Check:
    """Add a check to the suite."""
    CHECKS.append(function)
    return function


@asynccontextmanager
async def opened(harness: Harness) -> AsyncIterator[Store]:
    """A handle, open for the length of the block; afterwards the store must find nothing wrong with itself."""
    store = harness.handle()
    await store.open()
    try:
        yield store
        same(await store.verify(), [], "problems found by verify() after the check")
    finally:
        await store.close()


def same(actual: object, expected: object, what: str) -> None:
    """Assert equality."""
    if actual != expected:
        raise AssertionError(f"{what}: expected {_short(expected)}, got {_short(actual)}")


def holds(condition: object, what: str) -> None:
    """Assert truth."""
    if not condition:
        raise AssertionError(what)


def kind(value: object, expected: type[T], what: str) -> T:
    """Assert the type; the value."""
    if not isinstance(value, expected):
        raise AssertionError(f"{what}: expected {expected.__name__}, got {_short(value)}")
    return value


def there(value: T | None, what: str) -> T:
    """Assert that it is not None; the value."""
    if value is None:
        raise AssertionError(f"{what} is missing")
    return value


async def raises(awaitable: Awaitable[object], expected: type[Exception], what: str) -> None:
    """Assert that awaiting raises ``expected``."""
    try:
        result = await awaitable
    except expected:
        return
    raise AssertionError(f"{what}: expected {expected.__name__}, got {_short(result)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 400 else f"{text[:400]}… ({len(text)} characters)"


def ident(number: int) -> str:
    """A message id; larger numbers sort later."""
    return f"0197a3c2-0000-7000-8000-{number:012x}"


def item(
    number: int,
    *,
    queue: str = "q",
    namespace: str = "default",
    priority: int = 5,
    group: str | None = None,
    size: int = 0,
    external: bool = False,
) -> Item:
    """The identity of a record that is not stored yet."""
    return Item(namespace, queue, ident(number), priority, group, size, external)


def insertion(
    number: int,
    *,
    due: int = NOW,
    expires: int | None = None,
    payload: bytes = b"payload",
    unique: Unique | None = None,
    queue: str = "q",
    namespace: str = "default",
    priority: int = 5,
    group: str | None = None,
) -> Insert:
    """The op that inserts message ``number``."""
    what = item(number, queue=queue, namespace=namespace, priority=priority, group=group, size=len(payload))
    return Insert(what, due, expires, b"head %d" % number, b"status %d" % number, payload, unique)


def change(
    record: Inserted | Stored,
    *,
    due: int = NOW,
    leased: bool = False,
    box: Box = Box.LIVE,
    status: bytes = b"changed",
    want_payload: bool = False,
) -> Update:
    """The op that changes a record as it was last seen; its expiry stays."""
    return Update(record.item, record.mark, due, leased, record.mark.expires, box, status, want_payload)


def removal(record: Inserted | Stored) -> Remove:
    """The op that removes a record as it was last seen."""
    return Remove(record.item, record.mark)


async def one(store: Store, op: Op) -> Outcome:
    """Write one op."""
    outcomes = await store.write([op])
    same(len(outcomes), 1, "outcomes of one op")
    return outcomes[0]


async def put(store: Store, *ops: Insert) -> list[Inserted]:
    """Insert; all must succeed."""
    return [kind(outcome, Inserted, "outcome of an insert") for outcome in await store.write(ops)]


async def put_one(store: Store, op: Insert) -> Inserted:
    """Insert one; it must succeed."""
    return (await put(store, op))[0]


async def changed(store: Store, op: Update) -> Stored:
    """Update; it must succeed. The record as it is now."""
    outcome = kind(await one(store, op), Updated, "outcome of an update")
    record = await read(store, op.item)
    same(record.mark, outcome.mark, "the mark that the update returned and the one that is read")
    return record


async def take(store: Store, record: Inserted | Stored, until: int) -> Stored:
    """Lease a record until then."""
    return await changed(store, change(record, due=until, leased=True, status=b"leased"))


async def bury(store: Store, record: Inserted | Stored) -> Stored:
    """Move a record to the dead box."""
    return await changed(store, change(record, box=Box.DEAD, status=b"dead"))


async def drop(store: Store, record: Inserted | Stored) -> None:
    """Remove a record; it must succeed."""
    kind(await one(store, removal(record)), Removed, "outcome of a removal")


async def read(store: Store, what: Item, *, payload: bool = False) -> Stored:
    """The record; it must be there."""
    return there(await store.get(what.namespace, what.queue, what.id, payload=payload), f"message {what.id}")


async def refused(store: Store, op: Op, cause: Cause, what: str) -> Conflict:
    """Write one op that must be refused for this cause."""
    conflict = kind(await one(store, op), Conflict, what)
    same(conflict.cause, cause, f"{what}: the cause")
    return conflict


def numbers(records: Iterable[Stored]) -> list[int]:
    """Which messages these are, by the number they were made from."""
    return [int(record.item.id[-12:], 16) for record in records]


def numbers_of(records: Iterable[Inserted]) -> list[int]:
    """The same, of records as inserted."""
    return [int(record.item.id[-12:], 16) for record in records]


async def due(store: Store, now: int = NOW, *, queue: str = "q", namespace: str = "default") -> list[int]:
    """The numbers of all that is ready, in hand-out order."""
    page = await store.ready(namespace, queue, now, limit=10_000)
    return numbers(page.records)


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    """A source for a blob."""
    for part in parts:
        yield part


async def soon(event: asyncio.Event, what: str) -> None:
    """Wait for news."""
    try:
        await asyncio.wait_for(event.wait(), PATIENCE)
    except TimeoutError:
        raise AssertionError(f"{what}: nothing came within {PATIENCE} seconds") from None


def identity(what: Item) -> Item:
    """What an item has in common with the one that was inserted.

    Not the key; and of its group only whether there is one, since an encrypted store does not give its name away.
    """
    return msgspec.structs.replace(what, key=0, group=None if what.group is None else "some")


def facts(mark: Mark) -> tuple[int, bool, int | None, Box]:
    """A mark without its ETag."""
    return mark.due, mark.leased, mark.expires, mark.box
