"""``take``: choosing and writing in one step. Stores that cannot do it pass by refusing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from millpond.errors import StoreError
from millpond.stores.base import Box, Decide, Remove, Removed, Store, Stored, Update, Updated
from millpond.stores.conformance.harness import (
    NOW,
    Harness,
    change,
    check,
    drop,
    due,
    holds,
    insertion,
    numbers,
    opened,
    put,
    raises,
    read,
    removal,
    same,
)

LARGE = 40_000
"""Bytes of a payload that stays in the record, but need not come with it."""


def _lease(until: int = NOW + 1000) -> Decide:
    """Lease every record until then; the tag is its number."""
    return lambda stored: (change(stored, due=until, leased=True, want_payload=stored.payload is None), _number(stored))


def _number(stored: Stored) -> int:
    return numbers([stored])[0]


async def _taken(store: Store, decide: Decide, limit: int = 10, now: int = NOW) -> list[Any]:
    return [tag for tag, _ in await store.take("default", "q", now, limit=limit, decide=decide)]


def _for_takers(function: Callable[[Store], Any]) -> Any:
    async def run(harness: Harness) -> None:
        async with opened(harness) as store:
            if not store.capabilities.takes:
                await raises(_taken(store, _lease()), StoreError, "a take by a store that says that it cannot")
                return
            await function(store)

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    return check(run)


@_for_takers
async def take_of_an_unknown_queue(store: Store) -> None:
    """Nothing, and the queue does not come to be."""
    same(await _taken(store, _lease()), [], "an unknown queue")
    same(await store.queues(), [], "queues after that")


@_for_takers
async def takes_in_order_of_hand_out(store: Store) -> None:
    """As ``ready``: priority, due time, insertion; what is not due, dead, leased or blocked is not asked about."""
    first, second, *_ = await put(
        store,
        insertion(1, due=NOW - 5),
        insertion(2, due=NOW - 9),
        insertion(3, due=NOW - 9, priority=9),
        insertion(4, due=NOW + 1, priority=9),
        insertion(5, due=NOW - 9, priority=0),
        insertion(6, due=NOW - 20, group="g"),
        insertion(7, due=NOW - 30, group="g"),
    )
    same(await _taken(store, _lease(), limit=2), [3, 6], "the first two")
    same(await _taken(store, _lease()), [2, 1, 5], "the rest")
    same(await _taken(store, _lease()), [], "when all are leased")
    same(await due(store, NOW), [], "ready ones after that")
    same(await _taken(store, _lease(NOW + 9000), now=NOW + 1000), [4, 3, 1, 2, 6, 5], "when the leases have ended")
    await store.write([change(await read(store, one.item), box=Box.DEAD) for one in (first, second)])
    same(await _taken(store, _lease(), now=NOW + 9000), [3, 4, 6, 5], "without the dead")


@_for_takers
async def take_applies_what_is_decided(store: Store) -> None:
    """Updates and removals take effect, with their outcomes; what is left alone stays and does not count."""
    await put(store, *(insertion(number, payload=b"p%d" % number) for number in range(6)))

    def decide(stored: Stored) -> tuple[Update | Remove, Any] | None:
        number = _number(stored)
        holds(stored.payload == b"p%d" % number, "the payload comes with the record")
        if number % 3 == 0:
            return None
        return (removal(stored), number) if number % 3 == 1 else (change(stored, due=NOW + 50, leased=True), number)

    taken = await store.take("default", "q", NOW, limit=3, decide=decide)
    same([tag for tag, _ in taken], [1, 2, 4], "those of which something was decided")
    same([type(outcome) for _, outcome in taken], [Removed, Updated, Removed], "the outcomes")
    same(await due(store, NOW), [0, 3, 5], "ready ones after that")
    marks = [outcome.mark for _, outcome in taken if isinstance(outcome, Updated)]
    held = (await store.ready("default", "q", NOW + 50, limit=10)).records[-1]
    same(held.mark, marks[0], "the mark of the one that was updated")


@_for_takers
async def take_of_large_payloads(store: Store) -> None:
    """A payload that does not come with its record comes with the outcome."""
    payload = bytes(range(256)) * (LARGE // 256)
    await put(store, insertion(1, payload=payload))
    seen: list[bytes | None] = []

    def decide(stored: Stored) -> tuple[Update, Any]:
        seen.append(stored.payload)
        return change(stored, due=NOW + 50, leased=True, want_payload=True), None

    [(_, outcome)] = await store.take("default", "q", NOW, limit=1, decide=decide)
    holds(seen[-1] in (None, payload), "the payload is whole or not there")
    same(outcome.payload if isinstance(outcome, Updated) else None, payload, "the payload of the outcome")


@_for_takers
async def take_that_raises_changes_nothing(store: Store) -> None:
    """What ``decide`` raises reaches the caller, and no record was changed; other calls go on."""
    await put(store, *(insertion(number) for number in range(4)))

    def decide(stored: Stored) -> tuple[Update, Any]:
        if _number(stored) == 2:
            raise KeyError("on purpose")
        return change(stored, due=NOW + 50, leased=True), None

    broken, good = await asyncio.gather(
        store.take("default", "q", NOW, limit=4, decide=decide),
        _taken(store, _lease(), limit=1),
        return_exceptions=True,
    )
    holds(isinstance(broken, KeyError), "the take that raised says so")
    same(good, [0], "the take beside it")
    same(await due(store, NOW), [1, 2, 3], "ready ones after that")


@_for_takers
async def takes_at_once_share_nothing(store: Store) -> None:
    """Many takes and other writes at the same time: each record goes to one of them, in order, and none is left out."""
    count = 300
    records = await put(store, *(insertion(number, priority=number % 10) for number in range(count)))
    dropped = records[::50]
    results = await asyncio.gather(
        *(_taken(store, _lease(), limit=1 + number % 7) for number in range(100)),
        *(drop(store, record) for record in dropped),
        return_exceptions=True,
    )
    taken = [number for result in results[:100] if isinstance(result, list) for number in result]
    same(len(set(taken)), len(taken), "records that went to two takes")
    gone = sum(not isinstance(result, BaseException) for result in results[100:])
    same(len(taken) + gone, count, "records that were taken or dropped")


@_for_takers
async def take_meets_what_the_same_step_changed(store: Store) -> None:
    """A group's next record is not taken beside its first, and comes once that is gone."""
    await put(store, *(insertion(number, group="g") for number in range(3)))
    same(await _taken(store, _lease()), [0], "the first of the group alone")
    same(await _taken(store, _lease()), [], "while it is held")
    same(
        await _taken(store, lambda stored: (removal(stored), _number(stored)), now=NOW + 1000, limit=1), [0], "removed"
    )
    same(await _taken(store, _lease()), [1], "the next one")
