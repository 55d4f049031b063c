"""Opening, closing, coming back, and news between handles."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from millpond.errors import StoreClosed, StoreError
from millpond.stores.base import (
    Box,
    Cause,
    Document,
    DocumentWritten,
    Insert,
    Inserted,
    PutDocument,
    PutState,
    QueueName,
    StateWritten,
    Store,
    Unique,
)
from millpond.stores.conformance.harness import (
    NOW,
    Harness,
    bury,
    change,
    changed,
    check,
    chunks,
    drop,
    due,
    ident,
    insertion,
    item,
    kind,
    one,
    opened,
    put,
    put_one,
    raises,
    read,
    refused,
    removal,
    same,
    soon,
    take,
    there,
)


@check
async def closed_store_refuses(harness: Harness) -> None:
    """After close every call raises StoreClosed, and closing again is harmless."""
    store = harness.handle()
    await store.open()
    record = await put_one(store, insertion(1))
    await store.close()
    await store.close()

    async def read_blob() -> None:
        async for _ in store.read_blob(record.item):
            pass

    async def subscribe() -> None:
        store.subscribe("default", "q", lambda: None)

    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "write": lambda: store.write([insertion(2)]),
        "commit": lambda: store.commit([insertion(2)]),
        "get": lambda: store.get("default", "q", ident(1)),
        "list": lambda: store.list("default", "q", Box.LIVE),
        "ready": lambda: store.ready("default", "q", NOW, limit=1),
        "expired": lambda: store.expired(NOW, limit=1),
        "payload": lambda: store.payload(record.item),
        "write_blob": lambda: store.write_blob("default", "q", ident(3), chunks(b"x"), NOW),
        "read_blob": read_blob,
        "state": lambda: store.state(record.item),
        "document": lambda: store.document("default", "q"),
        "queues": store.queues,
        "counts": lambda: store.counts("default", "q", NOW),
        "sweep": lambda: store.sweep(NOW, older_than=0, limit=1),
        "verify": store.verify,
        "subscribe": subscribe,
    }
    for name, call in calls.items():
        await raises(call(), StoreClosed, f"{name} on a closed store")


@check
async def close_lets_writes_finish(harness: Harness) -> None:
    """A write that was under way when the store was closed is done, or is refused as a whole."""
    store = harness.handle()
    await store.open()
    writes = [asyncio.ensure_future(store.write([insertion(number)])) for number in range(30)]
    await asyncio.sleep(0)
    await store.close()
    results = await asyncio.gather(*writes, return_exceptions=True)
    done = []
    for number, result in enumerate(results):
        if isinstance(result, StoreClosed):
            continue
        kind(kind(result, list, "the result of a write")[0], Inserted, "its outcome")
        done.append(number)
    if harness.persistent:
        async with opened(harness) as again:
            same(sorted(await due(again)), done, "what was inserted is what was said to be inserted")


@check
async def open_may_be_repeated(harness: Harness) -> None:
    """Opening an open store changes nothing."""
    async with opened(harness) as store:
        await put_one(store, insertion(1))
        await store.open()
        same(await due(store), [1], "what is in the queue")


@check
async def everything_is_there_again(harness: Harness) -> None:
    """Close, open: records with their marks and order, boxes, groups, keys, state, documents, blobs, counts."""
    if not harness.persistent:
        return
    async with opened(harness) as store:
        name = (await store.write_blob("default", "q", ident(1), chunks(b"x" * 70_000, b"y"), NOW)).name
        unique = Unique("k", NOW, NOW + 100)
        external = Insert(item(1, size=70_001, external=True), NOW, None, b"head", b"status", b"", unique, name)
        blob, first, _, dead, held, _ = await put(
            store,
            external,
            insertion(2, group="g", priority=7, payload=b"\x00inline"),
            insertion(3, group="g"),
            insertion(4),
            insertion(5, expires=NOW + 9),
            insertion(6, due=NOW + 70, queue="p"),
        )
        await bury(store, dead)
        await take(store, held, NOW + 50)
        state = kind(await one(store, PutState(first.item, first.mark, None, b"s")), StateWritten, "state").etag
        policy = kind(await one(store, PutDocument("default", "doc", None, b"d")), DocumentWritten, "document").etag
        before = await _picture(store)
    async with opened(harness) as store:
        same(await _picture(store), before, "the store after it was closed and opened")
        same(await store.state(first.item), Document(b"s", state), "the state")
        same(await store.document("default", "doc"), Document(b"d", policy), "the document")
        same(await store.payload(first.item), b"\x00inline", "the payload")
        same(await _bytes(store.read_blob(blob.item)), b"x" * 70_000 + b"y", "the blob")
        conflict = await refused(store, insertion(9, unique=Unique("k", NOW + 9, NOW + 99)), Cause.UNIQUE, "the key")
        same(conflict.id, ident(1), "the message that has the key")
        await put_one(store, insertion(10, group="g"))
        same(await due(store), [2, 1], "what is ready")
        await drop(store, first)
        same(await due(store), [1, 3], "what is ready after the first of the group was removed")
        last = (await store.list("default", "q", Box.LIVE)).records[-1]
        same(last.item.id, ident(10), "what was inserted last")


async def _picture(store: Store) -> list[object]:
    return [
        await store.list("default", "q", Box.LIVE),
        await store.list("default", "q", Box.DEAD),
        await store.list("default", "p", Box.LIVE),
        await store.ready("default", "q", NOW, limit=100),
        await store.ready("default", "p", NOW, limit=100),
        await store.counts("default", "q", NOW),
        await store.queues(),
        await store.expired(NOW + 100, limit=100),
    ]


async def _bytes(source: AsyncIterator[bytes]) -> bytes:
    return b"".join([part async for part in source])


@check
async def keys_rise_after_reopening(harness: Harness) -> None:
    """A record inserted after a reopen has a larger key than any before, removed ones included."""
    if not harness.persistent:
        return
    async with opened(harness) as store:
        if not store.capabilities.insertion_order:
            return
        records = await put(store, insertion(1), insertion(2))
        await drop(store, records[1])
    async with opened(harness) as store:
        later = await put_one(store, insertion(3))
        same(later.item.key > records[1].item.key, True, "the key of a later record is larger")


@check
async def handles_see_each_other(harness: Harness) -> None:
    """What one handle wrote, the other reads at once."""
    if not harness.shared:
        return
    async with opened(harness) as here, opened(harness) as there_:
        for number in range(1, 6):
            record = await put_one(here, insertion(number, queue=f"q{number}"))
            seen = await read(there_, record.item, payload=True)
            same((seen.item, seen.mark, seen.payload), (record.item, record.mark, b"payload"), "an inserted record")
            held = await take(there_, seen, NOW + 10)
            same(await read(here, record.item), held, "a leased record")
            kind(await one(here, PutState(held.item, held.mark, None, b"s")), StateWritten, "state")
            same(there(await there_.state(held.item), "the state").data, b"s", "the state")
            same((await there_.counts("default", f"q{number}", NOW)).leased, 1, "leased records")
            await drop(there_, held)
            same(await here.get("default", f"q{number}", ident(number)), None, "a removed record")
        name = (await here.write_blob("default", "q", ident(9), chunks(b"blob"), NOW)).name
        external = Insert(item(9, size=4, external=True), NOW, None, b"head", b"status", b"", None, name)
        record = await put_one(there_, external)
        same(await _bytes(here.read_blob(record.item)), b"blob", "a blob")
        await drop(here, record)
        same(await there_.queues(), [], "the queues")


@check
async def news_reach_other_handles(harness: Harness) -> None:
    """Inserts, give-backs, redriven records, removals that unblock a group, and documents wake whoever subscribed."""
    async with opened(harness) as here:
        if not here.capabilities.change_feed:
            try:
                here.subscribe("default", "q", lambda: None)
            except StoreError:
                return
            raise AssertionError("a store without a change feed refuses to subscribe")
        if not harness.shared:
            return
        async with opened(harness) as there_:
            event = asyncio.Event()
            subscription = there_.subscribe("default", "q", event.set)
            same(subscription.active, True, "a new subscription is active")

            async def wakes(what: str, action: Awaitable[object]) -> object:
                # News of the step before may still be on its way; spurious calls are allowed, lost ones are not.
                await asyncio.sleep(0)
                event.clear()
                result = await action
                await soon(event, what)
                return result

            first = kind(await wakes("an insert", put_one(here, insertion(1, group="g"))), Inserted, "an insert")
            await wakes("a delayed insert", put_one(here, insertion(2, group="g", due=NOW + 10)))
            held = await take(here, first, NOW + 50)
            await wakes("a give-back", changed(here, change(held, due=NOW + 5)))
            held = await take(here, await read(here, first.item), NOW + 50)
            await wakes("a shorter lease", changed(here, change(held, due=NOW + 20, leased=True)))
            held = await read(here, first.item)
            await wakes("a burial that unblocks", bury(here, held))
            dead = await read(here, first.item)
            await wakes("a redriven record", changed(here, change(dead)))
            back = await read(here, first.item)
            await wakes("a removal that unblocks", here.commit([removal(back)]))
            await wakes("a document", one(here, PutDocument("default", "q", None, b"policy")))
            subscription.close()
            subscription.close()
            same(subscription.active, False, "an ended subscription is not active")


@check
async def news_keep_to_their_queue_and_end(harness: Harness) -> None:
    """Each subscriber of a queue hears of it; an ended one hears nothing more, and the others go on."""
    if not harness.shared:
        return
    async with opened(harness) as here, opened(harness) as there_:
        if not here.capabilities.change_feed:
            return
        events = [asyncio.Event() for _ in range(3)]
        calls: list[str] = []
        first = there_.subscribe("default", "q", events[0].set)
        ended = there_.subscribe("default", "q", lambda: calls.append("ended"))
        there_.subscribe("default", "p", events[1].set)
        here.subscribe("default", "q", events[2].set)
        ended.close()
        await put_one(here, insertion(1))
        await soon(events[0], "an insert into q")
        await put_one(here, insertion(2, queue="p"))
        await soon(events[1], "an insert into p")
        await put_one(there_, insertion(3))
        await soon(events[2], "an insert into q by the other handle")
        same(calls, [], "calls of an ended subscription")
        same(first.active, True, "a subscription that goes on")
        events[0].clear()
        await put_one(here, insertion(4))
        await soon(events[0], "a later insert into q")


@check
async def closing_ends_subscriptions(harness: Harness) -> None:
    """A subscription of a closed handle is not active any more."""
    store = harness.handle()
    await store.open()
    if store.capabilities.change_feed:
        subscription = store.subscribe("default", "q", lambda: None)
        await store.close()
        same(subscription.active, False, "the subscription of a closed store is active")
        subscription.close()
    await store.close()


@check
async def other_queues_are_known_by_name(harness: Harness) -> None:
    """Queues that another handle made are listed here."""
    if not harness.shared:
        return
    async with opened(harness) as here, opened(harness) as there_:
        await put_one(here, insertion(1, queue="a"))
        kind(await one(there_, PutDocument("default", "b", None, b"d")), DocumentWritten, "a document")
        for store in (here, there_):
            same(await store.queues(), [QueueName("default", "a"), QueueName("default", "b")], "the queues")
