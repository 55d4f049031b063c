"""Ordering groups: only the first of a group in the live box is ready."""

from __future__ import annotations

import asyncio

from millpond.stores.base import Box, Cause, Conflict
from millpond.stores.conformance.harness import (
    NOW,
    Harness,
    bury,
    change,
    changed,
    check,
    drop,
    due,
    insertion,
    numbers,
    opened,
    put,
    put_one,
    read,
    refused,
    removal,
    same,
    take,
)


@check
async def only_the_first_of_a_group_is_ready(harness: Harness) -> None:
    """One of each group, whatever priority and due time the later ones have; records without a group are free."""
    async with opened(harness) as store:
        await put(
            store,
            insertion(1, group="g"),
            insertion(2, group="g", priority=9, due=NOW - 100),
            insertion(3, group="h", due=NOW - 1),
            insertion(4),
            insertion(5),
            insertion(6, group="h"),
            insertion(7, group="g", queue="p"),
            insertion(8, group="g", namespace="other"),
        )
        found = await due(store)
        if not store.capabilities.insertion_order:
            # Those that are due at the same moment come in any order.
            found = found[:1] + sorted(found[1:])
        same(found, [3, 1, 4, 5], "the queue")
        same(await due(store, queue="p"), [7], "the same group's name in another queue")
        same(await due(store, namespace="other"), [8], "the same group's name in another namespace")
        page = await store.ready("default", "q", NOW, limit=4)
        same(page.more, False, "blocked records are not more to come")
        two = numbers((await store.ready("default", "q", NOW, limit=2)).records)
        same((two[0], two[1] in {1, 4}), (3, True), "a page of two")


@check
async def leased_head_blocks(harness: Harness) -> None:
    """While the first is held, given back or lapsed, it stays the first."""
    async with opened(harness) as store:
        first, _ = await put(store, insertion(1, group="g"), insertion(2, group="g"))
        held = await take(store, first, NOW + 10)
        same(await due(store), [], "while the first is held")
        same(await due(store, NOW + 10), [1], "when its lease has ended")
        back = await changed(store, change(held, due=NOW + 50))
        same(await due(store, NOW + 49), [], "while the first is delayed after a failure")
        same(await due(store, NOW + 50), [1], "when the delay is over")
        await drop(store, back)
        same(await due(store), [2], "after it was removed")


@check
async def delayed_head_blocks(harness: Harness) -> None:
    """A later message of the group never overtakes one that is not due yet."""
    async with opened(harness) as store:
        await put(store, insertion(1, group="g", due=NOW + 10), insertion(2, group="g", due=NOW + 20))
        await put_one(store, insertion(3, group="g"))
        page = await store.ready("default", "q", NOW, limit=10)
        same((page.records, page.more, page.next_due), ([], False, NOW + 10), "before the first is due")
        same(await due(store, NOW + 10), [1], "when it is due")


@check
async def leaving_the_live_box_unblocks(harness: Harness) -> None:
    """A removed, or buried, first makes way for the second; so do several at once."""
    async with opened(harness) as store:
        records = await put(store, *(insertion(number, group="g") for number in range(1, 8)))
        await drop(store, records[0])
        same(await due(store), [2], "after the first was removed")
        await bury(store, records[1])
        same(await due(store), [3], "after the second was buried")
        await drop(store, records[3])
        same(await due(store), [3], "after one from the middle was removed")
        await store.write([removal(records[2]), removal(records[4])])
        same(await due(store), [6], "after two were removed in one call")
        counts = await store.counts("default", "q", NOW)
        same((counts.ready, counts.blocked, counts.dead), (1, 1, 1), "ready, blocked, dead")


@check
async def returned_one_joins_at_the_end(harness: Harness) -> None:
    """A dead letter that comes back stands behind those that are there, lest it be ready beside one that is held."""
    async with opened(harness) as store:
        first, second, third = await put(store, *(insertion(number, group="g") for number in range(1, 4)))
        dead = await bury(store, first)
        held = await take(store, second, NOW + 10)
        back = await changed(store, change(dead))
        await put_one(store, insertion(4, group="g"))
        same(await due(store), [], "while the second is held, after the first came back")
        counts = await store.counts("default", "q", NOW)
        same((counts.ready, counts.leased, counts.blocked), (0, 1, 3), "ready, leased, blocked")
        same(await due(store, NOW + 10), [2], "when the lease of the second has ended")
        counts = await store.counts("default", "q", NOW + 10)
        same((counts.ready, counts.leased, counts.blocked), (1, 0, 3), "ready, leased, blocked, then")
        await drop(store, held)
        same(await due(store), [3], "after the second was removed")
        await drop(store, third)
        same(await due(store), [1], "after the third was removed")
        await drop(store, back)
        same(await due(store), [4], "after the one that came back was removed")


@check
async def an_undone_return_keeps_its_place(harness: Harness) -> None:
    """A commit that fails moves nobody in a group."""
    async with opened(harness) as store:
        if not store.capabilities.atomic_groups:
            return
        first, second, third = await put(store, *(insertion(number, group="g") for number in range(1, 4)))
        dead = await bury(store, third)
        outcomes = await store.commit([removal(first), change(dead), insertion(2)])
        same([type(outcome) for outcome in outcomes], [Conflict] * 3, "outcomes of a commit that cannot be")
        same(await due(store), [1], "after it")
        await drop(store, first)
        same(await due(store), [2], "after the first was removed")
        await changed(store, change(dead))
        await drop(store, second)
        same(await due(store), [3], "after the third came back and the second was removed")


@check
async def blocked_records_are_not_leased(harness: Harness) -> None:
    """A store that guards its groups leases nothing but the first, whoever asks, until that is gone."""
    if not harness.shared:
        return
    async with opened(harness) as store, opened(harness) as other:
        if not store.capabilities.guards_groups:
            return
        first, second = await put(store, insertion(1, group="g"), insertion(2, group="g"))
        blocked = change(second, due=NOW + 10, leased=True)
        await refused(store, blocked, Cause.BLOCKED, "a lease of the second")
        held = await take(other, first, NOW + 10)
        await refused(store, blocked, Cause.BLOCKED, "a lease of the second while the first is held")
        back = await changed(other, change(held))
        await refused(store, blocked, Cause.BLOCKED, "a lease of the second after the first was given back")
        await bury(other, await take(store, back, NOW + 10))
        await take(store, second, NOW + 10)


@check
async def dead_letters_do_not_block(harness: Harness) -> None:
    """A group whose earlier messages are all dead goes on; they join again in the order in which they return."""
    async with opened(harness) as store:
        first, second = await put(store, insertion(1, group="g"), insertion(2, group="g"))
        dead = [await bury(store, first), await bury(store, second)]
        await put_one(store, insertion(3, group="g"))
        same(await due(store), [3], "with two dead letters before it")
        await changed(store, change(dead[1]))
        await changed(store, change(dead[0]))
        same(await due(store), [3], "after both came back")
        for expected in (3, 2, 1):
            ready = (await store.ready("default", "q", NOW, limit=10)).records
            same(numbers(ready), [expected], "what is ready")
            await drop(store, ready[0])


@check
async def order_holds_across_handles(harness: Harness) -> None:
    """Messages of a group that several handles insert and remove are ready one at a time, in the order of insertion."""
    if not harness.shared:
        return
    async with opened(harness) as here, opened(harness) as there:
        for number in range(1, 13):
            await put_one(here if number % 2 else there, insertion(number, group="g"))
        seen = []
        for turn in range(12):
            taker, other = (here, there) if turn % 3 else (there, here)
            ready = (await taker.ready("default", "q", NOW, limit=10)).records
            same(len(ready), 1, "ready records of one group")
            held = await take(taker, ready[0], NOW + 10)
            same(await due(other), [], "while it is held, seen by the other handle")
            seen += numbers([held])
            await drop(other, await read(other, held.item))
        same(seen, list(range(1, 13)), "the order of hand-out")


@check
async def racing_inserts_make_one_line(harness: Harness) -> None:
    """However inserts race, exactly one message of the group is ready, and listing order is hand-out order."""
    async with opened(harness) as store:
        await asyncio.gather(*(put_one(store, insertion(number, group="g")) for number in range(20)))
        order = numbers((await store.list("default", "q", Box.LIVE)).records)
        for expected in order:
            ready = (await store.ready("default", "q", NOW, limit=10)).records
            same(numbers(ready), [expected], "what is ready")
            await drop(store, ready[0])


@check
async def many_groups_at_once(harness: Harness) -> None:
    """A page holds the first of each group and is not shortened by the blocked ones between them."""
    count = 120 if harness.slow else 500
    async with opened(harness) as store:
        await put(store, *(insertion(number, group=f"g{number % 50}") for number in range(count)))
        same(await due(store), list(range(50)), "the firsts of 50 groups")
        page = await store.ready("default", "q", NOW, limit=40)
        same((numbers(page.records), page.more), (list(range(40)), True), "a page of 40")
        await store.write([removal(record) for record in page.records])
        same(await due(store), list(range(40, 90)), "after 40 of them were removed")
        counts = await store.counts("default", "q", NOW)
        same((counts.ready, counts.blocked), (50, count - 90), "ready and blocked")
