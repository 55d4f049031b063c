"""Looking at a queue from outside: counts, lists, queues, expiry, upkeep, and a long random walk over all of it."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from millpond.stores.base import Box, Cause, Counts, QueueName, Reach, Store, Stored, Unique
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
    kind,
    numbers,
    numbers_of,
    opened,
    put,
    put_one,
    read,
    refused,
    removal,
    same,
    take,
)

_NOTHING = Counts(ready=0, delayed=0, leased=0, blocked=0, dead=0, bytes=0, oldest_due=None)


@check
async def capabilities_and_statistics(harness: Harness) -> None:
    """A store says what it can do, and counts what it did."""
    async with opened(harness) as store:
        capabilities = store.capabilities
        holds(capabilities.name, "a store has a name")
        kind(capabilities.reach, Reach, "the reach")
        holds(capabilities.inline_limit > 0, "the inline limit is positive")
        holds(not harness.shared or capabilities.reach is not None, "a shared store has a reach")
        await put_one(store, insertion(1))
        kind(store.statistics(), dict, "the statistics")
        kind(store.requests(), dict, "the requests")
        holds(bool(store.requests()) == capabilities.requests_cost_money, "requests are counted where they cost money")


@check
async def counts_follow_every_change(harness: Harness) -> None:
    """Ready, delayed, leased, dead, bytes and oldest due time after each kind of change, and as time passes."""
    async with opened(harness) as store:

        async def counts(now: int = NOW) -> tuple[int, int, int, int, int, int | None]:
            found = await store.counts("default", "q", now)
            same(found.blocked, 0, "blocked records without a group")
            return found.ready, found.delayed, found.leased, found.dead, found.bytes, found.oldest_due

        unknown = await store.counts("default", "q", NOW)
        holds(unknown.enqueued in {None, 0}, "nothing was inserted into an unknown queue")
        same(replace(unknown, enqueued=None), _NOTHING, "counts of an unknown queue")
        first, second, third = await put(
            store,
            insertion(1, payload=b"x" * 10, due=NOW - 5),
            insertion(2, payload=b"x" * 200, due=NOW - 7, priority=0),
            insertion(3, payload=b"x" * 3000, due=NOW + 20),
        )
        await put_one(store, insertion(4, queue="p"))
        same(await counts(), (2, 1, 0, 0, 3210, NOW - 7), "after three inserts")
        same(await counts(NOW + 20), (3, 0, 0, 0, 3210, NOW - 7), "when the delayed one is due")
        same(await counts(NOW - 6), (1, 2, 0, 0, 3210, NOW - 7), "at an earlier time")
        same(await counts(NOW - 99), (0, 3, 0, 0, 3210, None), "before all of them")
        held = await take(store, second, NOW + 10)
        same(await counts(), (1, 1, 1, 0, 3210, NOW - 5), "with one leased")
        same(await counts(NOW + 9), (1, 1, 1, 0, 3210, NOW - 5), "just before the lease ends")
        same(await counts(NOW + 10), (2, 1, 0, 0, 3210, NOW - 5), "when the lease has ended")
        held = await changed(store, change(held, due=NOW + 30, leased=True))
        same(await counts(NOW + 10), (1, 1, 1, 0, 3210, NOW - 5), "with the lease extended")
        dead = await bury(store, held)
        same(await counts(), (1, 1, 0, 1, 3010, NOW - 5), "with one dead")
        await drop(store, first)
        same(await counts(), (0, 1, 0, 1, 3000, None), "with one removed")
        back = await changed(store, change(dead, due=NOW - 1))
        same(await counts(), (1, 1, 0, 0, 3200, NOW - 1), "with the dead one back")
        back = await changed(store, change(back, due=NOW + 1))
        same(await counts(), (0, 2, 0, 0, 3200, None), "with it given back and delayed")
        await drop(store, await bury(store, back))
        await drop(store, third)
        emptied = await store.counts("default", "q", NOW)
        same(replace(emptied, enqueued=None), _NOTHING, "counts of an emptied queue")


@check
async def what_was_inserted_is_counted_whatever_becomes_of_it(harness: Harness) -> None:
    async with opened(harness) as store:
        first = await put_one(store, insertion(1))
        before = (await store.counts("default", "q", NOW)).enqueued
        if before is None:
            return  # It does not count, and says so.
        second, third = await put_one(store, insertion(2)), await put_one(store, insertion(3))
        await drop(store, first)
        await changed(store, change(second, due=NOW + 30, leased=True))
        await bury(store, third)
        after = (await store.counts("default", "q", NOW)).enqueued
        same(after, before + 2, "two more were inserted")


@check
async def blocked_records_are_counted_apart(harness: Harness) -> None:
    """A record that waits for an earlier one of its group is blocked, due or not; all add up."""
    async with opened(harness) as store:

        async def counts(now: int = NOW) -> tuple[int, int, int, int]:
            found = await store.counts("default", "q", now)
            return found.ready, found.delayed, found.leased, found.blocked

        records = await put(
            store,
            insertion(1, group="g", due=NOW - 1),
            insertion(2, group="g", due=NOW - 9),
            insertion(3, group="g", due=NOW + 9),
            insertion(4, group="h", due=NOW + 5),
            insertion(5, group="h"),
        )
        same(await counts(), (1, 1, 0, 3), "ready, delayed, leased, blocked")
        same((await store.counts("default", "q", NOW)).oldest_due, NOW - 1, "blocked records are not the oldest ready")
        same(await counts(NOW + 9), (2, 0, 0, 3), "later")
        held = await take(store, records[0], NOW + 50)
        same(await counts(), (0, 1, 1, 3), "with the first leased")
        await drop(store, held)
        same(await counts(), (1, 1, 0, 2), "with the first removed")
        await bury(store, records[3])
        same(await counts(), (2, 0, 0, 1), "with the first of the other group buried")


@check
async def list_is_in_order_of_insertion(harness: Harness) -> None:
    """Page after page, each record once, whatever priority, due time, lease or group; boxes apart. Where keys are not
    in order of insertion, the list is in theirs."""
    async with opened(harness) as store:
        records = await put(
            store,
            *(insertion(99 - n, priority=n % 10, due=NOW + n % 3, group="g" if n % 2 else None) for n in range(25)),
        )
        if not store.capabilities.insertion_order:
            records.sort(key=lambda record: record.item.key)
        expected = numbers_of(records)
        for size in (1, 7, 25, 100):
            seen: list[Stored] = []
            after = None
            while True:
                page = await store.list("default", "q", Box.LIVE, after=after, limit=size)
                holds(len(page.records) <= size, f"a page of at most {size}")
                seen += page.records
                if page.next_after is None:
                    break
                after = page.next_after
            same(numbers(seen), expected, f"the list in pages of {size}")
            same(seen[3], await read(store, records[3].item), "a record from list and from get")
        dead = [await bury(store, record) for record in (records[20], records[4], records[12])]
        first, second, third = expected[4], expected[12], expected[20]
        same(numbers((await store.list("default", "q", Box.DEAD)).records), [first, second, third], "the dead box")
        await changed(store, change(dead[2]))
        same(numbers((await store.list("default", "q", Box.DEAD)).records), [first, third], "after one came back")
        live = numbers((await store.list("default", "q", Box.LIVE, limit=100)).records)
        if not store.capabilities.insertion_order:
            holds(second in live, "the one that came back is in the live box, wherever")
            live.remove(second)
            expected.remove(second)
        same(live, [n for n in expected if n not in {first, third}], "the live box")
        for namespace, queue in (("default", "p"), ("other", "q")):
            page = await store.list(namespace, queue, Box.LIVE)
            same((page.records, page.next_after), ([], None), f"the list of {namespace}/{queue}")


@check
async def list_goes_on_after_a_removed_record(harness: Harness) -> None:
    """The key to continue after stays good when its record is gone."""
    async with opened(harness) as store:
        await put(store, *(insertion(number) for number in range(6)))
        page = await store.list("default", "q", Box.LIVE, limit=3)
        await store.write([removal(record) for record in page.records])
        rest = await store.list("default", "q", Box.LIVE, after=page.next_after, limit=3)
        same((numbers(rest.records), rest.next_after), ([3, 4, 5], None), "the next page")


@check
async def queues_are_those_that_hold_something(harness: Harness) -> None:
    """In name order, by namespace first; dead letters count, emptied queues do not."""
    async with opened(harness) as store:
        same(await store.queues(), [], "queues of an empty store")
        places = [("default", "b"), ("a", "z"), ("default", "a"), ("a", "b"), ("b", "a")]
        records = [await put_one(store, insertion(1, namespace=n, queue=q)) for n, q in places]
        same(await store.queues(), [QueueName(*place) for place in sorted(places)], "the queues")
        await bury(store, records[0])
        await drop(store, records[1])
        same(await store.queues(), [QueueName(*p) for p in sorted(places) if p != ("a", "z")], "the queues, then")


@check
async def expired_finds_what_nobody_holds(harness: Harness) -> None:
    """Of all queues, earliest first: expired, in the live box, and not under a running lease."""
    async with opened(harness) as store:

        async def expired(now: int, limit: int = 100) -> list[int]:
            return numbers(await store.expired(now, limit=limit))

        same(await expired(NOW), [], "expired records of an empty store")
        await put(
            store,
            insertion(1, expires=NOW + 30),
            insertion(2, expires=NOW + 10, queue="p", namespace="other"),
            insertion(3),
            insertion(4, expires=NOW + 20, due=NOW + 500),
            insertion(5, expires=NOW + 40, group="g"),
            insertion(6, expires=NOW + 35, group="g"),
        )
        same(await expired(NOW + 9), [], "before the first expires")
        same(await expired(NOW + 10), [2], "at the millisecond")
        same(await expired(NOW + 99), [2, 4, 1, 6, 5], "all, delayed and blocked ones too")
        same(await expired(NOW + 99, 2), [2, 4], "two of them")
        record = (await store.expired(NOW + 10, limit=1))[0]
        same(record, await read(store, record.item), "a record from expired and from get")
        held = await take(store, record, NOW + 50)
        same(await expired(NOW + 49), [4, 1, 6, 5], "without the one that is held")
        same(await expired(NOW + 49, 1), [4], "one, though a held one comes first")
        same(await expired(NOW + 50), [2, 4, 1, 6, 5], "when its lease has ended")
        await bury(store, held)
        same(await expired(NOW + 99), [4, 1, 6, 5], "without a dead letter")
        await drop(store, (await store.expired(NOW + 99, limit=1))[0])
        same(await expired(NOW + 99), [1, 6, 5], "without a removed one")


@check
async def sweep_forgets_ended_unique_keys(harness: Harness) -> None:
    """Keys whose window is over are removed and counted; those in force stay in force."""
    async with opened(harness) as store:
        await put(
            store,
            insertion(1, unique=Unique("a", NOW, NOW + 10)),
            insertion(2, unique=Unique("b", NOW, NOW + 10)),
            insertion(3, unique=Unique("c", NOW, NOW + 100)),
        )
        same(await store.sweep(NOW + 9, older_than=0, limit=100), 0, "before any has ended")
        same(await store.sweep(NOW + 50, older_than=0, limit=100), 2, "when two have ended")
        same(await store.sweep(NOW + 50, older_than=0, limit=100), 0, "again")
        outcomes = await store.write([insertion(9, unique=Unique("c", NOW + 50, NOW + 150))])
        holds(type(outcomes[0]).__name__ == "Conflict", "a key in force refuses after a sweep")
        same(await due(store), [1, 2, 3], "records do not go with their keys")


@check
async def unique_keys_outlive_their_messages(harness: Harness) -> None:
    """A key is in force until its window is over, also when nothing is left in its queue, and after a sweep."""
    async with opened(harness) as store:
        await drop(store, await put_one(store, insertion(1, unique=Unique("a", NOW, NOW + 10))))
        same(await store.sweep(NOW + 9, older_than=0, limit=100), 0, "while the key is in force")
        again = insertion(2, unique=Unique("a", NOW + 9, NOW + 20))
        conflict = await refused(store, again, Cause.UNIQUE, "the same key within its window")
        same(conflict.id, insertion(1).item.id, "who had it first")
        await put_one(store, insertion(3, unique=Unique("a", NOW + 10, NOW + 20)))


@check
async def the_oldest_is_due_to_the_millisecond(harness: Harness) -> None:
    """A record that becomes due now is ready, and the oldest if there is no other."""
    async with opened(harness) as store:
        await put_one(store, insertion(1))
        for now, expected in ((NOW - 1, (0, 1, None)), (NOW, (1, 0, NOW)), (NOW + 1, (1, 0, NOW))):
            found = await store.counts("default", "q", now)
            same((found.ready, found.delayed, found.oldest_due), expected, "ready, delayed, oldest")


@check
async def random_walk(harness: Harness) -> None:
    """Hundreds of arbitrary changes; after each few, counts, order, lists and expiry are those of the records."""
    async with opened(harness) as store:
        chance = _Chance(20_260_101)
        records: dict[int, Stored] = {}
        next_number = 0
        now = NOW
        for step in range(100 if harness.slow else 400):
            now += chance.below(4)
            kinds = chance.below(10)
            if kinds < 4 or not records:
                group = f"g{chance.below(3)}" if chance.below(2) else None
                expires = now + chance.below(100) if chance.below(3) == 0 else None
                op = insertion(
                    next_number,
                    due=now + chance.below(20) - 10,
                    expires=expires,
                    priority=chance.below(10),
                    group=group,
                    payload=bytes(chance.below(50)),
                )
                inserted = await put_one(store, op)
                records[next_number] = await read(store, inserted.item)
                next_number += 1
            else:
                number = sorted(records)[chance.below(len(records))]
                record = records[number]
                if kinds < 6:
                    await drop(store, records.pop(number))
                elif record.mark.box is Box.DEAD:
                    records[number] = await changed(store, change(record, due=now))
                elif kinds < 8:
                    until = now + chance.below(20)
                    if store.capabilities.guards_groups and _blocked(record, records.values()):
                        lease = change(record, due=until, leased=True, status=b"leased")
                        await refused(store, lease, Cause.BLOCKED, "a lease of a blocked record")
                    else:
                        records[number] = await take(store, record, until)
                elif kinds == 8:
                    records[number] = await changed(store, change(record, due=now + chance.below(20)))
                else:
                    records[number] = await bury(store, record)
            if step % 20 == 19:
                await _compare(store, list(records.values()), now)
        same(await store.verify(), [], "problems found by verify()")


def _blocked(record: Stored, records: Iterable[Stored]) -> bool:
    return record.item.group is not None and any(
        other.item.group == record.item.group and other.mark.box is Box.LIVE and other.item.key < record.item.key
        for other in records
    )


async def _compare(store: Store, records: list[Stored], now: int) -> None:
    by_key = sorted(records, key=lambda record: record.item.key)
    live = [record for record in by_key if record.mark.box is Box.LIVE]
    dead = [record for record in by_key if record.mark.box is Box.DEAD]
    first: dict[str | None, int] = {}
    for record in live:
        first.setdefault(record.item.group, record.item.key)
    free = [record for record in live if record.item.group is None or first[record.item.group] == record.item.key]
    ready = [record for record in free if record.mark.due <= now]
    leased = [record for record in live if record.mark.leased and record.mark.due > now]
    blocked = [record for record in live if record not in free and record not in leased]
    expected = Counts(
        ready=len(ready),
        delayed=len(live) - len(ready) - len(leased) - len(blocked),
        leased=len(leased),
        blocked=len(blocked),
        dead=len(dead),
        bytes=sum(record.item.size for record in live),
        oldest_due=min((record.mark.due for record in ready), default=None),
    )
    same(replace(await store.counts("default", "q", now), enqueued=None), expected, "the counts")
    same((await store.list("default", "q", Box.LIVE, limit=1000)).records, live, "the live box")
    same((await store.list("default", "q", Box.DEAD, limit=1000)).records, dead, "the dead box")
    order = sorted(ready, key=lambda record: (-record.item.priority, record.mark.due, record.item.key))
    page = await store.ready("default", "q", now, limit=1000)
    same(page.records, order, "the order of hand-out")
    cut = await store.ready("default", "q", now, limit=3)
    same((cut.records, cut.more), (order[:3], len(order) > 3), "a short page")
    coming = [record.mark.due for record in free if record.mark.due > now]
    if coming:
        holds(page.next_due is not None and now < page.next_due <= min(coming), f"{page.next_due} is not too late")
        if store.capabilities.sees_behind or not cut.more:
            same(cut.next_due, page.next_due, "next_due behind a short page")
    expired = {
        record.item.id
        for record in live
        if record.mark.expires is not None
        and record.mark.expires <= now
        and (not record.mark.leased or record.mark.due <= now)
    }
    same({record.item.id for record in await store.expired(now, limit=1000)}, expired, "expired records")


class _Chance:
    """A small generator of its own (the constants of Knuth's MMIX), so that every run of the suite is the same."""

    def __init__(self, seed: int) -> None:
        self._state = seed

    def below(self, bound: int) -> int:
        self._state = (self._state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        return (self._state >> 33) % bound
