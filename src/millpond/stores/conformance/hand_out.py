"""What ``ready`` hands out, in which order, and when it says to look again."""

from __future__ import annotations

from millpond.stores.base import Box, ReadyPage
from millpond.stores.conformance.harness import (
    NOW,
    Harness,
    bury,
    change,
    changed,
    check,
    drop,
    due,
    holds,
    insertion,
    numbers,
    opened,
    put,
    put_one,
    read,
    same,
    take,
)

FAR = 253_402_300_799_000
"""The last second of the year 9999: as late as any date that people write."""


@check
async def ready_of_an_unknown_queue(harness: Harness) -> None:
    """Nothing, and nothing to wait for."""
    async with opened(harness) as store:
        same(await store.ready("default", "q", NOW, limit=10), ReadyPage([], False, None), "an unknown queue")
        await put_one(store, insertion(1))
        same(await store.ready("default", "p", NOW, limit=10), ReadyPage([], False, None), "another queue")
        same(await store.ready("other", "q", NOW, limit=10), ReadyPage([], False, None), "another namespace")


@check
async def order_is_priority_then_due_then_insertion(harness: Harness) -> None:
    """Higher priority first, then who was due earlier, then who came earlier, whatever the ids say."""
    async with opened(harness) as store:
        # Without that order, those that are due at the same moment come in any.
        late = 0 if store.capabilities.insertion_order else 1
        await put(
            store,
            insertion(90, due=NOW - 10),
            insertion(80, due=NOW - 20),
            insertion(70, due=NOW - 10 + late),
            insertion(60, due=NOW + late, priority=9),
            insertion(50, due=NOW - 1, priority=9),
            insertion(40, due=NOW - 1 + late, priority=9),
            insertion(30, due=0, priority=0),
            insertion(20, due=NOW - 20 + late),
        )
        same(await due(store, NOW + late), [50, 40, 60, 80, 20, 90, 70, 30], "the order of hand-out")


@check
async def ready_records_are_whole(harness: Harness) -> None:
    """What ``ready`` returns is what ``get`` returns: item, mark, head and status, without payload."""
    async with opened(harness) as store:
        await put(store, insertion(1, group="g", expires=NOW + 1), insertion(2, priority=7))
        for record in (await store.ready("default", "q", NOW, limit=10)).records:
            same(record, await read(store, record.item), "a record from ready and from get")


@check
async def due_is_exact(harness: Harness) -> None:
    """A record is ready from its due millisecond on, and not one before."""
    async with opened(harness) as store:
        await put(store, insertion(1, due=NOW + 1), insertion(2, due=NOW), insertion(3, due=FAR))
        same(await due(store, NOW - 1), [], "before")
        same(await due(store, NOW), [2], "at the due time of one")
        same(await due(store, NOW + 1), [2, 1], "at the due time of the other")
        same(await due(store, FAR - 1), [2, 1], "long after")
        same(await due(store, FAR), [2, 1, 3], "at the end of the year 9999")
        same(await due(store, NOW), [2], "after the clock went back")


@check
async def limit_and_more(harness: Harness) -> None:
    """At most ``limit`` records; ``more`` only if due ones lie beyond."""
    async with opened(harness) as store:
        await put(store, *(insertion(number, priority=5 + number % 2) for number in range(6)))
        await put_one(store, insertion(6, due=NOW + 1))
        for limit, expected, more in ((1, [1], True), (4, [1, 3, 5, 0], True), (5, [1, 3, 5, 0, 2], True)):
            page = await store.ready("default", "q", NOW, limit=limit)
            same((numbers(page.records), page.more), (expected, more), f"a page of {limit}")
        for limit in (6, 7):
            page = await store.ready("default", "q", NOW, limit=limit)
            same((numbers(page.records), page.more), ([1, 3, 5, 0, 2, 4], False), f"a page of {limit}")


@check
async def next_due_is_always_filled(harness: Harness) -> None:
    """The earliest due time that is still to come, of any priority, also of leased records; and behind a full page,
    where the store looks so far."""
    async with opened(harness) as store:

        async def next_due(now: int = NOW, limit: int = 10) -> int | None:
            return (await store.ready("default", "q", now, limit=limit)).next_due

        first, second = await put(store, insertion(1), insertion(2))
        same(await next_due(), None, "with nothing to come")
        await put(store, insertion(3, due=NOW + 30, priority=9), insertion(4, due=NOW + 20, priority=0))
        same(await next_due(), NOW + 20, "with two delayed records")
        if store.capabilities.sees_behind:
            same(await next_due(limit=1), NOW + 20, "behind a full page")
        same(await next_due(NOW + 20), NOW + 30, "when the first of them is due")
        same(await next_due(NOW + 30), None, "when both are due")
        held = await take(store, first, NOW + 10)
        same(await next_due(), NOW + 10, "the end of a lease")
        held = await changed(store, change(held, due=NOW + 15, leased=True))
        same(await next_due(), NOW + 15, "the end of an extended lease")
        await bury(store, held)
        same(await next_due(), NOW + 20, "after the leased record became a dead letter")
        second_held = await take(store, second, NOW + 12)
        same(await next_due(), NOW + 12, "the end of another lease")
        await drop(store, second_held)
        same(await next_due(), NOW + 20, "after it was removed")


@check
async def leased_records_return_at_their_due_time(harness: Harness) -> None:
    """A leased record is hidden until its lease ends, then ready without anybody's doing, ordered by that end."""
    async with opened(harness) as store:
        first, second, third = await put(store, insertion(1), insertion(2), insertion(3, due=NOW + 5))
        held = await take(store, first, NOW + 10)
        same(await due(store), [2], "beside a leased record")
        same(await due(store, NOW + 9), [2, 3], "a millisecond before the lease ends")
        same(await due(store, NOW + 10), [2, 3, 1], "when the lease has ended")
        records = (await store.ready("default", "q", NOW + 10, limit=10)).records
        same(records[2].mark, held.mark, "the mark of a lapsed record still says that it was leased")
        again = await take(store, records[2], NOW + 99)
        same(await due(store, NOW + 10), [2, 3], "when it is leased again")
        back = await changed(store, change(again, due=NOW + 6))
        same(await due(store, NOW + 10), [2, 3, 1], "given back")
        await drop(store, back)
        await drop(store, second)
        same(await due(store, NOW + 10), [3], "after two were removed")
        await drop(store, third)
        same(await store.ready("default", "q", FAR, limit=10), ReadyPage([], False, None), "an emptied queue")


@check
async def dead_records_are_never_ready(harness: Harness) -> None:
    """The dead box is not handed out and gives no due time, even with leases and delays on record."""
    async with opened(harness) as store:
        first, second = await put(store, insertion(1), insertion(2, due=NOW + 50))
        await changed(store, change(first, box=Box.DEAD, due=NOW + 10))
        await changed(store, change(second, box=Box.DEAD, due=NOW - 10, leased=True))
        same(await store.ready("default", "q", NOW, limit=10), ReadyPage([], False, None), "a queue of dead letters")
        same(await store.ready("default", "q", FAR, limit=10), ReadyPage([], False, None), "the same, much later")


@check
async def long_queue_is_worked_off_in_order(harness: Harness) -> None:
    """Thousands of records come in order, page by page, whether claimed or removed."""
    async with opened(harness) as store:
        count, page_size = (120, 20) if harness.slow else (2500, 400)
        # 7919 is a prime beside both: the due times are a permutation, so order of insertion and of due time differ.
        await put(store, *(insertion(number, due=NOW - 7919 * number % count) for number in range(count)))
        expected = sorted(range(count), key=lambda number: -(7919 * number % count))
        seen: list[int] = []
        while page := (await store.ready("default", "q", NOW, limit=page_size)).records:
            holds(len(page) <= page_size, "a page is within its limit")
            seen += numbers(page)
            ops = [change(record, due=NOW + 1000, leased=True) for record in page]
            await store.write(ops)
        same(seen, expected, "the order of hand-out")
        same((await store.counts("default", "q", NOW)).leased, count, "leased records")
        same(sorted(await due(store, NOW + 1000)), list(range(count)), "what is ready when all leases have ended")
