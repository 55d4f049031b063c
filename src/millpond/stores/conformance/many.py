"""Many ops in one call. A store may write them together; each is still judged on its own."""

from __future__ import annotations

import asyncio

import msgspec

from millpond.stores.base import Box, Cause, Conflict, Inserted, Op, Outcome, PutState, Removed, StateWritten, Updated
from millpond.stores.conformance.harness import (
    NOW,
    Harness,
    bury,
    change,
    check,
    due,
    ident,
    insertion,
    kind,
    numbers,
    one,
    opened,
    put,
    put_one,
    read,
    removal,
    same,
)
from millpond.stores.conformance.harness import take as lease

MANY = 47
"""More than any store writes together in one step of its own, and no round number."""


def _told(outcomes: list[Outcome]) -> list[object]:
    return [outcome.cause if isinstance(outcome, Conflict) else type(outcome) for outcome in outcomes]


@check
async def many_inserts(harness: Harness) -> None:
    """Each is in, with its own key, mark, head, status and payload, in order; and counted."""
    async with opened(harness) as store:
        ops = [insertion(n, due=NOW + n % 3, payload=b"p" * n) for n in range(1, MANY + 1)]
        inserted = await put(store, *ops)
        for op, outcome in zip(ops, inserted, strict=True):
            record = await read(store, op.item, payload=True)
            same(record.item, outcome.item, "the item as told and as read")
            same(record.mark, outcome.mark, "the mark as told and as read")
            same((record.head, record.status, record.payload), (op.head, op.status, op.payload), "what was written")
        counts = await store.counts("default", "q", NOW)
        same((counts.ready, counts.delayed), (MANY // 3, MANY - MANY // 3), "ready and delayed")
        same(counts.bytes, sum(range(1, MANY + 1)), "payload bytes")
        if store.capabilities.insertion_order:
            page = await store.list("default", "q", Box.LIVE, limit=1000)
            same(numbers(page.records), list(range(1, MANY + 1)), "the order of insertion")


@check
async def many_inserts_of_which_some_are_there(harness: Harness) -> None:
    """Those whose id is taken, before or in the same call, are refused; the others go in, and only they are counted."""
    async with opened(harness) as store:
        await put_one(store, insertion(7, payload=b"first"))
        ops: list[Op] = [msgspec.structs.replace(insertion(n, payload=b"x"), chosen=True) for n in range(1, MANY + 1)]
        ops.append(msgspec.structs.replace(insertion(20, payload=b"again"), chosen=True))
        outcomes = await store.write(ops)
        same(outcomes[6], Conflict(Cause.EXISTS, ident(7)), "the insert of an id that was there")
        same(outcomes[-1], Conflict(Cause.EXISTS, ident(20)), "the second insert of an id in one call")
        same(sum(isinstance(outcome, Inserted) for outcome in outcomes), MANY - 1, "inserts that went through")
        same((await read(store, insertion(7).item, payload=True)).payload, b"first", "the payload that was there")
        same((await read(store, insertion(20).item, payload=True)).payload, b"x", "the payload of the first of two")
        counts = await store.counts("default", "q", NOW)
        same((counts.ready, counts.bytes), (MANY, MANY - 1 + len(b"first")), "messages and bytes")


@check
async def many_removals(harness: Harness) -> None:
    """All go, free, held or dead, whatever version each has; and the counts with them."""
    async with opened(harness) as store:
        records = list(await put(store, *(insertion(n) for n in range(1, MANY + 1))))
        held = await lease(store, records[0], NOW + 1000)
        twice = await lease(store, await lease(store, records[1], NOW + 10), NOW + 2000)
        dead = await bury(store, records[2])
        ops: list[Op] = [removal(held), removal(twice), removal(dead), *(removal(record) for record in records[3:])]
        same(_told(await store.write(ops)), [Removed] * MANY, "the outcomes")
        counts = await store.counts("default", "q", NOW)
        left = (counts.ready, counts.delayed, counts.leased, counts.dead, counts.bytes)
        same(left, (0, 0, 0, 0, 0), "what is left")
        same(await store.verify(), [], "problems")


@check
async def many_removals_of_which_some_cannot_be(harness: Harness) -> None:
    """Those of another version, gone already, or named twice are refused; one with a state takes it along."""
    async with opened(harness) as store:
        records = list(await put(store, *(insertion(n) for n in range(1, MANY + 1))))
        changed = await lease(store, records[4], NOW + 1000)
        same(_told([await one(store, removal(records[5]))]), [Removed], "a removal")
        kind(await one(store, PutState(records[6].item, records[6].mark, None, b"s")), StateWritten, "a state")
        ops: list[Op] = [removal(record) for record in records]
        expected: list[object] = [Removed] * MANY
        expected[4], expected[5] = Cause.STALE, Cause.MISSING
        same(_told(await store.write([*ops, ops[8]])), [*expected, Cause.MISSING], "the outcomes")
        same(await store.state(records[6].item), None, "the state of a removed record")
        same((await read(store, records[4].item)).mark, changed.mark, "the mark of the one that stays")
        counts = await store.counts("default", "q", NOW)
        same((counts.ready, counts.leased, counts.bytes), (0, 1, len(b"payload")), "what is left")
        same(await store.verify(), [], "problems")


@check
async def many_removals_with_states(harness: Harness) -> None:
    """Records with a state among others: all go, their states too."""
    async with opened(harness) as store:
        records = list(await put(store, *(insertion(n) for n in range(1, MANY + 1))))
        for record in records[::5]:
            kind(await one(store, PutState(record.item, record.mark, None, b"s")), StateWritten, "a state")
        same(_told(await store.write([removal(record) for record in records])), [Removed] * MANY, "the outcomes")
        for record in records[::5]:
            same(await store.state(record.item), None, "the state of a removed record")
        counts = await store.counts("default", "q", NOW)
        same((counts.ready, counts.bytes), (0, 0), "what is left")
        same(await store.verify(), [], "problems")


@check
async def many_taken_while_others_write(harness: Harness) -> None:
    """Large takes, removals and changes of the same records at once: each has one winner, and counts stay true."""
    async with opened(harness) as store:
        if not store.capabilities.takes:
            return
        records = list(await put(store, *(insertion(n) for n in range(1, MANY + 1))))

        async def taken(until: int, limit: int) -> list[int]:
            results = await store.take(
                "default",
                "q",
                NOW,
                limit=limit,
                decide=lambda stored: (change(stored, due=until, leased=True), numbers([stored])[0]),
            )
            return [tag for tag, outcome in results if isinstance(outcome, Updated)]

        first, removed, updated, second = await asyncio.gather(
            taken(NOW + 1000, 10),
            store.write([removal(record) for record in records[::2]]),
            store.write([change(record, status=b"new", due=NOW + 5000) for record in records[1::2]]),
            taken(NOW + 2000, MANY),
        )
        same(len(set(first) & set(second)), 0, "records taken twice")
        gone = {n for n, outcome in zip(range(1, MANY + 1, 2), removed, strict=True) if isinstance(outcome, Removed)}
        moved = {n for n, outcome in zip(range(2, MANY + 1, 2), updated, strict=True) if isinstance(outcome, Updated)}
        same(sorted([*first, *second, *gone, *moved]), list(range(1, MANY + 1)), "each record's one winner")
        same(await due(store), [], "what is ready after that")
        counts = await store.counts("default", "q", NOW)
        same((counts.leased, counts.delayed), (len(first) + len(second), len(moved)), "leased and delayed")
        same(await store.verify(), [], "problems")
