"""What hangs on a record or a queue: state, documents, payload blobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from millpond.errors import MessageNotFound, StoreError
from millpond.stores.base import (
    Blob,
    Box,
    Cause,
    Conflict,
    Document,
    DocumentWritten,
    DropState,
    Insert,
    Inserted,
    Item,
    PutDocument,
    PutState,
    QueueName,
    StateWritten,
    Store,
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
    holds,
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

MIB = 1 << 20


@check
async def state_is_guarded_by_its_own_etag(harness: Harness) -> None:
    """Written when the expected ETag is the present one, or None and there is none."""
    async with opened(harness) as store:
        record = await put_one(store, insertion(1))
        same(await store.state(record.item), None, "the state of a new record")
        for expect in ("", "0", "1"):
            await refused(store, PutState(record.item, record.mark, expect, b"x"), Cause.STATE, "a put over no state")
            await refused(store, DropState(record.item, record.mark, expect), Cause.STATE, "a drop of no state")
        first = kind(await one(store, PutState(record.item, record.mark, None, b"one")), StateWritten, "the first put")
        same(await store.state(record.item), Document(b"one", first.etag), "the state")
        await refused(store, PutState(record.item, record.mark, None, b"x"), Cause.STATE, "a second first put")
        op = PutState(record.item, record.mark, first.etag, b"")
        second = kind(await one(store, op), StateWritten, "the second put")
        holds(second.etag != first.etag, "a put gives a new ETag")
        same(await store.state(record.item), Document(b"", second.etag), "an empty state is a state")
        late_put = PutState(record.item, record.mark, first.etag, b"x")
        for late in (late_put, DropState(record.item, record.mark, first.etag)):
            await refused(store, late, Cause.STATE, "an op with an old ETag")
        same(await store.state(record.item), Document(b"", second.etag), "the state after refused ops")
        same(await one(store, DropState(record.item, record.mark, second.etag)), StateWritten(""), "the drop")
        same(await store.state(record.item), None, "the state after the drop")
        await refused(store, DropState(record.item, record.mark, second.etag), Cause.STATE, "a second drop")
        third = kind(await one(store, PutState(record.item, record.mark, None, b"new")), StateWritten, "a put anew")
        holds(third.etag not in {first.etag, second.etag}, "an ETag does not come back after a drop")


@check
async def state_lives_with_its_record(harness: Harness) -> None:
    """State writes leave the record's ETag alone, and changes of the record leave the state and its ETag alone."""
    async with opened(harness) as store:
        record = await put_one(store, insertion(1))
        other = await put_one(store, insertion(2))
        held = await take(store, record, NOW + 50)
        etag = kind(await one(store, PutState(held.item, held.mark, None, b"s")), StateWritten, "the put").etag
        same((await read(store, held.item)).mark, held.mark, "the mark after a state write")
        same(await store.state(other.item), None, "the state of another record")
        current = await changed(store, change(held, due=NOW + 90, leased=True))
        await refused(store, PutState(held.item, held.mark, etag, b"x"), Cause.STALE, "a put under the old mark")
        dead = await bury(store, current)
        same(await store.state(dead.item), Document(b"s", etag), "the state of a dead letter")
        back = await changed(store, change(dead))
        same(await store.state(back.item), Document(b"s", etag), "the state of a record that came back")
        await drop(store, back)
        same(await store.state(back.item), None, "the state of a removed record")


@check
async def one_winner_among_state_writers(harness: Harness) -> None:
    """Of racing state writes with one ETag exactly one is applied."""
    async with opened(harness) as store:
        record = await put_one(store, insertion(1))
        expect: str | None = None
        for _ in range(3):
            puts = [PutState(record.item, record.mark, expect, b"%d" % rival) for rival in range(10)]
            outcomes = await asyncio.gather(*(one(store, op) for op in puts))
            winners = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, StateWritten)]
            same(len(winners), 1, "winners of a race")
            state = there(await store.state(record.item), "the state")
            same(state.data, b"%d" % winners[0], "the winner's state")
            expect = state.etag


@check
async def documents_are_guarded(harness: Harness) -> None:
    """A queue's document is written under its ETag, and makes the queue known without putting anything in it."""
    async with opened(harness) as store:
        same(await store.document("default", "q"), None, "a document that was never written")
        await refused(store, PutDocument("default", "q", "1", b"x"), Cause.STATE, "a put over no document")
        same(await store.queues(), [], "queues after a refused put")
        first = kind(await one(store, PutDocument("default", "q", None, b"\x00one")), DocumentWritten, "the first put")
        same(await store.document("default", "q"), Document(b"\x00one", first.etag), "the document")
        await refused(store, PutDocument("default", "q", None, b"x"), Cause.STATE, "a second first put")
        second = kind(await one(store, PutDocument("default", "q", first.etag, b"")), DocumentWritten, "a second put")
        holds(second.etag != first.etag, "a put gives a new ETag")
        await refused(store, PutDocument("default", "q", first.etag, b"x"), Cause.STATE, "a put with an old ETag")
        same(await store.document("default", "q"), Document(b"", second.etag), "an empty document is one")
        for namespace, queue in (("default", "p"), ("other", "q")):
            same(await store.document(namespace, queue), None, f"the document of {namespace}/{queue}")
        same(await store.queues(), [QueueName("default", "q")], "the queues")
        counts = await store.counts("default", "q", NOW)
        same((counts.ready, counts.delayed, counts.leased, counts.dead, counts.bytes), (0, 0, 0, 0, 0), "the counts")
        await drop(store, await put_one(store, insertion(1)))
        same(await store.document("default", "q"), Document(b"", second.etag), "the document of an emptied queue")


async def _bytes(store: Store, what: Item) -> bytes:
    parts = []
    async for part in store.read_blob(what):
        holds(len(part) <= MIB, f"a chunk of at most 1 MiB, not {len(part)} bytes")
        parts.append(part)
    return b"".join(parts)


def _external(number: int, blob: Blob) -> Insert:
    return Insert(item(number, size=blob.size, external=True), NOW, None, b"head", b"status", b"", None, blob.name)


async def _blob(store: Store, number: int, *parts: bytes, now: int = NOW) -> Blob:
    return await store.write_blob("default", "q", ident(number), chunks(*parts), now)


@check
async def blobs_come_back(harness: Harness) -> None:
    """However the source cuts it, a blob is read as it was written, in chunks of at most 1 MiB."""
    async with opened(harness) as store:
        every = bytes(range(256))
        sources: list[list[bytes]] = [
            [],
            [b""],
            [b"one"],
            [b"", b"a", b"", b"bc", b""],
            [every * 4096],
            [every * 4096, b"!"],
            [every * 9000, b"-", every * 300, b"\x00"],
            [b"%d," % number for number in range(5000)],
        ]
        items = []
        for number, parts in enumerate(sources):
            whole = b"".join(parts)
            blob = await _blob(store, number, *parts)
            same(blob.size, len(whole), "the size of the blob")
            record = await put_one(store, _external(number, blob))
            items.append(record.item)
            same(await _bytes(store, record.item) == whole, True, f"blob {number} of {len(whole)} bytes")
            holds(not await store.payload(record.item), "an external payload is not inline")
        for number, parts in enumerate(sources):
            whole = b"".join(parts)
            same(await _bytes(store, items[number]) == whole, True, f"blob {number}, read again")
        counts = await store.counts("default", "q", NOW)
        same(counts.bytes, sum(len(part) for parts in sources for part in parts), "bytes in the queue")


@check
async def missing_blob_is_not_found(harness: Harness) -> None:
    """Reading a payload that was never written, is another's, or went with its record, says so."""
    async with opened(harness) as store:
        await raises(_bytes(store, item(1, external=True)), MessageNotFound, "a blob that was never written")
        blob = await _blob(store, 1, b"data")
        await raises(_bytes(store, item(1, external=True)), MessageNotFound, "a blob without a record")
        record = await put_one(store, _external(1, blob))
        for other in (item(1, queue="p", external=True), item(2, external=True)):
            await raises(_bytes(store, other), MessageNotFound, "another message's blob")
        dead = await bury(store, record)
        same(await _bytes(store, dead.item), b"data", "the blob of a dead letter")
        back = await changed(store, change(dead))
        same(await _bytes(store, back.item), b"data", "the blob of a record that came back")
        await drop(store, back)
        await raises(_bytes(store, back.item), MessageNotFound, "the blob of a removed record")


@check
async def failing_source_leaves_nothing(harness: Harness) -> None:
    """What the source of a blob raises goes to the caller, and what was written is gone."""
    async with opened(harness) as store:

        async def breaking(size: int) -> AsyncIterator[bytes]:
            if size:
                yield bytes(size)
            raise _SourceBroke

        for number, size in enumerate((0, 10, 3 * MIB)):
            writing = store.write_blob("default", "q", ident(number), breaking(size), NOW)
            await raises(writing, _SourceBroke, f"a source that breaks after {size} bytes")
            await raises(_bytes(store, item(number, external=True)), MessageNotFound, "the blob that was cut short")
        record = await put_one(store, _external(1, await _blob(store, 1, b"whole")))
        same(await _bytes(store, record.item), b"whole", "the blob of the second try")


class _SourceBroke(Exception):
    pass


@check
async def waiting_source_holds_up_nobody(harness: Harness) -> None:
    """While a blob's source waits for its next piece, other writes and blobs go through."""
    async with opened(harness) as store:
        started, go_on = asyncio.Event(), asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield bytes(2 * MIB)
            started.set()
            await go_on.wait()
            yield b"end"

        writing = asyncio.ensure_future(store.write_blob("default", "q", ident(1), slow(), NOW))
        await soon(started, "the first piece of the blob")
        try:
            await asyncio.wait_for(put_one(store, insertion(2)), 10)
            quick = await asyncio.wait_for(_blob(store, 3, b"quick"), 10)
        finally:
            go_on.set()
        blob = await writing
        same(blob.size, 2 * MIB + 3, "the size of the slow blob")
        record = await put_one(store, _external(1, blob))
        same(await _bytes(store, record.item) == bytes(2 * MIB) + b"end", True, "the slow blob")
        record = await put_one(store, _external(3, quick))
        same(await _bytes(store, record.item), b"quick", "the quick blob")


@check
async def reader_may_stop_early(harness: Harness) -> None:
    """A blob that is read in part holds nothing afterwards; several readers are independent of each other."""
    async with opened(harness) as store:
        record = await put_one(store, _external(1, await _blob(store, 1, bytes(5 * MIB))))
        reader = store.read_blob(record.item)
        holds(len(await anext(reader)) > 0, "the first chunk")
        closing = getattr(reader, "aclose", None)
        if closing is not None:
            await closing()
        first, second = await asyncio.gather(_bytes(store, record.item), _bytes(store, record.item))
        same((len(first), len(second)), (5 * MIB, 5 * MIB), "two readers at once")
        await drop(store, record)


@check
async def sweep_collects_orphans_by_age(harness: Harness) -> None:
    """A blob without a record goes when it is old; one with a record, or young, stays."""
    async with opened(harness) as store:
        blobs = {
            number: await _blob(store, number, b"data", now=written)
            for number, written in ((1, NOW - 5000), (2, NOW - 5000), (3, NOW - 10), (4, NOW - 5000))
        }
        owned = await put_one(store, _external(2, blobs[2]))
        dead = await bury(store, await put_one(store, _external(4, blobs[4])))
        same(await store.sweep(NOW, older_than=10_000, limit=100), 0, "what a sweep of the very old removes")
        same(await store.sweep(NOW, older_than=1000, limit=100), 1, "what the sweep removes")
        await raises(store.write([_external(1, blobs[1])]), StoreError, "an insert whose payload was swept")
        same(await store.get("default", "q", ident(1)), None, "its record")
        same(await _bytes(store, owned.item), b"data", "the blob with a record")
        same(await _bytes(store, dead.item), b"data", "the blob of a dead letter")
        young = await put_one(store, _external(3, blobs[3]))
        same(await _bytes(store, young.item), b"data", "the young blob, whose record came late")
        same(await store.sweep(NOW, older_than=1000, limit=100), 0, "what a second sweep removes")


@check
async def sweep_takes_what_is_older_than_its_age(harness: Harness) -> None:
    """Older, not as old: an upload may take the whole of its time."""
    async with opened(harness) as store:
        await _blob(store, 1, b"data", now=NOW - 1000)
        same(await store.sweep(NOW, older_than=1000, limit=100), 0, "at that very age")
        same(await store.sweep(NOW + 1, older_than=1000, limit=100), 1, "a millisecond later")


@check
async def sweep_respects_its_limit(harness: Harness) -> None:
    """A sweep does a bounded piece of work; repeated ones get it all."""
    async with opened(harness) as store:
        for number in range(12):
            await _blob(store, number, b"data", now=NOW - 5000)
        removed = []
        while count := await store.sweep(NOW, older_than=1000, limit=5):
            removed.append(count)
        same(sum(removed), 12, "blobs removed")
        holds(max(removed) <= 10, f"about 5 at a time, not {removed}")


@check
async def refused_insert_leaves_its_blob_to_the_sweep(harness: Harness) -> None:
    """A blob whose record was refused is an orphan; the one of the record in the way is not touched."""
    async with opened(harness) as store:
        first = await put_one(store, _external(1, await _blob(store, 1, b"first")))
        await refused(store, _external(1, Blob(5)), Cause.EXISTS, "the same id again, its payload not even written")
        second = await _blob(store, 2, b"second")
        ops = [_external(2, second), _external(1, await _blob(store, 1, b"other"))]
        outcomes = await store.commit(ops) if store.capabilities.atomic_groups else []
        holds(all(isinstance(outcome, Conflict) for outcome in outcomes), "a commit with a refused insert")
        same(await store.sweep(NOW + 10_000, older_than=1000, limit=100), 2, "what the sweep removes")
        same(await _bytes(store, first.item), b"first", "the first message's blob")


@check
async def blobs_of_one_id_never_mix(harness: Harness) -> None:
    """Of two payloads written at once for one id, the record gets the one that its insert names, whichever was begun or
    ended first; the other is nobody's, and goes with the sweep, not with the record."""
    parts = ((b"one", b"-first"), (b"two", b"-second"))

    async def source(number: int, both: asyncio.Event) -> AsyncIterator[bytes]:
        yield parts[number][0]
        if number == 1:
            both.set()
        await both.wait()
        yield parts[number][1]

    for winner in (0, 1):
        async with opened(harness) as store:
            both = asyncio.Event()

            writing = [store.write_blob("default", "q", ident(1), source(number, both), NOW) for number in (0, 1)]
            blobs = await asyncio.gather(*writing)
            holds(blobs[0].name != blobs[1].name and all(blob.name for blob in blobs), "each blob has its own name")
            record = await put_one(store, _external(1, blobs[winner]))
            await refused(store, _external(1, blobs[1 - winner]), Cause.EXISTS, "the other's insert")
            same(await _bytes(store, record.item), b"".join(parts[winner]), "the payload")
            same(await store.sweep(NOW + 10, older_than=1000, limit=100), 0, "what a sweep of the old removes")
            await drop(store, record)
            # The loser may be the only one now: it is whole, and its own.
            record = await put_one(store, _external(1, blobs[1 - winner]))
            same(await _bytes(store, record.item), b"".join(parts[1 - winner]), "the payload of the next message")
            spare = await _blob(store, 1, b"spare")
            same(await store.sweep(NOW + 10_000, older_than=1000, limit=100), 1, "what the sweep removes")
            same(await _bytes(store, record.item), b"".join(parts[1 - winner]), "the payload after the sweep")
            await drop(store, record)
            await raises(store.write([_external(1, spare)]), StoreError, "an insert whose payload was swept")
            same(await store.verify(), [], "problems")


@check
async def blob_belongs_to_one_record(harness: Harness) -> None:
    """An insert whose payload is not there, is another's or was written for another id is refused, and leaves nothing;
    with it the whole call."""
    async with opened(harness) as store:
        mine, other = await _blob(store, 1, b"mine"), await _blob(store, 2, b"other")
        record = await put_one(store, _external(1, mine))
        for what, blob in (("no name", Blob(4)), ("another's", mine), ("another id's", other)):
            await raises(store.write([insertion(4), _external(3, blob)]), StoreError, f"an insert with {what}")
            same(await store.get("default", "q", ident(3)), None, f"the record of the insert with {what}")
            same(await store.get("default", "q", ident(4)), None, f"the insert beside the one with {what}")
        same(await _bytes(store, record.item), b"mine", "the payload")
        same(await store.verify(), [], "problems")


@check
async def blob_of_a_refused_commit_stays(harness: Harness) -> None:
    """A removal that is undone leaves record and blob as they were."""
    async with opened(harness) as store:
        if not store.capabilities.atomic_groups:
            return
        record = await put_one(store, _external(1, await _blob(store, 1, b"data")))
        other = await put_one(store, insertion(2))
        await drop(store, other)
        outcomes = await store.commit([removal(record), removal(other)])
        same([type(outcome) for outcome in outcomes], [Conflict, Conflict], "the refused commit")
        same(await _bytes(store, record.item), b"data", "the blob")


@check
async def large_state_and_document(harness: Harness) -> None:
    """State and documents of a mebibyte come back whole."""
    async with opened(harness) as store:
        record: Inserted = (await put(store, insertion(1)))[0]
        big = bytes(range(256)) * 4096
        kind(await one(store, PutState(record.item, record.mark, None, big)), StateWritten, "the put")
        same(there(await store.state(record.item), "the state").data == big, True, "the state")
        kind(await one(store, PutDocument("default", "q", None, big)), DocumentWritten, "the put")
        same(there(await store.document("default", "q"), "the document").data == big, True, "the document")
        same(len((await store.list("default", "q", Box.LIVE)).records), 1, "records")
