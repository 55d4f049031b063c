"""Conditional writes: what each op does, when it is refused, and that of several writers one wins."""

from __future__ import annotations

import asyncio

import msgspec

from millpond.model.names import MAX_NAME_BYTES
from millpond.stores.base import (
    Box,
    Cause,
    Conflict,
    Document,
    DocumentWritten,
    DropState,
    Insert,
    Inserted,
    Op,
    PutDocument,
    PutState,
    Remove,
    Removed,
    Reseal,
    StateWritten,
    Store,
    Unique,
    Update,
    Updated,
)
from millpond.stores.conformance.harness import (
    NOW,
    Harness,
    bury,
    change,
    changed,
    check,
    drop,
    due,
    facts,
    holds,
    ident,
    identity,
    insertion,
    item,
    kind,
    numbers,
    one,
    opened,
    put,
    put_one,
    read,
    refused,
    removal,
    same,
    take,
    there,
)


@check
async def inserted_record_comes_back(harness: Harness) -> None:
    """All that was inserted is read again, the payload when asked for."""
    async with opened(harness) as store:
        op = insertion(1, due=NOW + 5, expires=NOW + 9, payload=b"\x00\xffbytes", priority=7, group="g", queue="orders")
        outcome = await put_one(store, op)
        holds(outcome.item.key > 0, "an inserted item has a key")
        same(identity(outcome.item), identity(op.item), "the item that the insert returned")
        same(facts(outcome.mark), (NOW + 5, False, NOW + 9, Box.LIVE), "the mark that the insert returned")
        record = await read(store, op.item)
        same(record.item, outcome.item, "the item that is read")
        same(record.mark, outcome.mark, "the mark that is read")
        same((record.head, record.status), (op.head, op.status), "head and status")
        same(record.payload, None, "a payload that was not asked for")
        same((await read(store, op.item, payload=True)).payload, op.payload, "the payload")
        same(await store.payload(outcome.item), op.payload, "the payload, read alone")


@check
async def unknown_record_is_none(harness: Harness) -> None:
    """An id is known only in its own queue and namespace."""
    async with opened(harness) as store:
        same(await store.get("default", "q", ident(1)), None, "a record of an empty store")
        await put_one(store, insertion(1))
        for namespace, queue, number in (("default", "q", 2), ("default", "p", 1), ("other", "q", 1)):
            same(await store.get(namespace, queue, ident(number)), None, f"{namespace}/{queue}/{number}")
            same(await store.payload(item(number, queue=queue, namespace=namespace)), None, "its payload")


@check
async def existing_id_is_refused(harness: Harness) -> None:
    """A second insert of an id changes nothing and says whose id it is."""
    async with opened(harness) as store:
        first = await put_one(store, insertion(1, payload=b"first"))
        conflict = await refused(store, insertion(1, payload=b"second", priority=9), Cause.EXISTS, "the same id again")
        same(conflict.id, ident(1), "the id in the way")
        record = await read(store, first.item, payload=True)
        same((record.payload, record.item), (b"first", first.item), "the first record")
        dead = await bury(store, record)
        await refused(store, insertion(1), Cause.EXISTS, "the id of a dead letter")
        await drop(store, dead)
        await put_one(store, insertion(1))


@check
async def keys_rise_with_insertion(harness: Harness) -> None:
    """A later insert has a larger key, within a call and between calls."""
    async with opened(harness) as store:
        if not store.capabilities.insertion_order:
            return
        keys = [
            record.item.key
            for number in (9, 3, 5)
            for record in await put(
                store, insertion(number), insertion(number + 1, queue="p"), insertion(number + 100, due=NOW - 9)
            )
        ]
        same(keys, sorted(set(keys)), "keys in the order of insertion")


@check
async def update_replaces_what_changes(harness: Harness) -> None:
    """Status and mark are new, the ETag too; head, payload and identity stay."""
    async with opened(harness) as store:
        first = await put_one(store, insertion(1, payload=b"kept", expires=NOW + 50))
        op = Update(first.item, first.mark, NOW + 7, True, NOW + 60, Box.LIVE, b"new status", want_payload=True)
        outcome = kind(await one(store, op), Updated, "the update")
        same(outcome.payload, b"kept", "the payload that was wanted")
        same(facts(outcome.mark), (NOW + 7, True, NOW + 60, Box.LIVE), "the new mark")
        holds(outcome.mark.etag != first.mark.etag, "an update gives a new ETag")
        record = await read(store, first.item, payload=True)
        same((record.head, record.status, record.payload), (b"head 1", b"new status", b"kept"), "the bytes")
        same((record.item, record.mark), (first.item, outcome.mark), "identity and mark")
        again = kind(await one(store, change(record)), Updated, "an update that wants no payload")
        same(again.payload, None, "a payload that was not wanted")


@check
async def stale_writer_changes_nothing(harness: Harness) -> None:
    """Every op with an ETag of the past is refused as STALE."""
    async with opened(harness) as store:
        first = await put_one(store, insertion(1))
        now = await changed(store, change(first, due=NOW + 3, status=b"second"))
        reseal = Reseal(first.item, first.mark, b"h", b"s", b"p", None)
        for op in (
            change(first, due=NOW),
            change(first, box=Box.DEAD),
            removal(first),
            PutState(first.item, first.mark, None, b"state"),
            DropState(first.item, first.mark, "1"),
            reseal,
        ):
            conflict = await refused(store, op, Cause.STALE, f"{type(op).__name__} with a stale ETag")
            same(conflict.id, ident(1), "the id of the conflict")
        record = await read(store, first.item, payload=True)
        same((record.mark, record.status, record.head), (now.mark, b"second", b"head 1"), "the record")
        same(record.payload, b"payload", "the payload")
        same(await store.state(first.item), None, "the state")


@check
async def missing_record_is_refused(harness: Harness) -> None:
    """Every op on a record that was removed is refused as MISSING."""
    async with opened(harness) as store:
        first, second = await put(store, insertion(1), insertion(2))
        await drop(store, first)
        for op in (
            change(first),
            removal(first),
            PutState(first.item, first.mark, None, b"state"),
            DropState(first.item, first.mark, "1"),
            Reseal(first.item, first.mark, b"h", b"s", b"p", None),
        ):
            await refused(store, op, Cause.MISSING, f"{type(op).__name__} of a removed record")
        same(await store.get("default", "q", ident(1)), None, "the removed record")
        same((await read(store, second.item)).mark, second.mark, "its neighbour")


@check
async def etags_do_not_come_back(harness: Harness) -> None:
    """No version of a record has the ETag of an earlier one, though the contents be the same."""
    async with opened(harness) as store:
        record = await put_one(store, insertion(1))
        seen = {record.mark.etag}
        current = await read(store, record.item)
        for step in range(12):
            current = await changed(store, change(current, box=Box.DEAD if step % 3 == 1 else Box.LIVE, status=b"same"))
            holds(current.mark.etag not in seen, f"ETag {current.mark.etag} was used before")
            seen.add(current.mark.etag)


@check
async def removed_record_takes_everything_with_it(harness: Harness) -> None:
    """Payload and state go in the same step, also from the dead box; an id inserted anew finds nothing of the old."""
    async with opened(harness) as store:
        for dead in (False, True):
            record = await put_one(store, insertion(1))
            await one(store, PutState(record.item, record.mark, None, b"progress"))
            await drop(store, await bury(store, record) if dead else record)
            same(await store.get("default", "q", ident(1), payload=True), None, "the record")
            same(await store.payload(record.item), None, "the payload")
            same(await store.state(record.item), None, "the state")
            same((await store.list("default", "q", Box.LIVE)).records, [], "the live box")
            same((await store.list("default", "q", Box.DEAD)).records, [], "the dead box")
            anew = await put_one(store, insertion(1, payload=b"anew"))
            same(await store.state(anew.item), None, "the state of an id inserted anew")
            await refused(store, change(record, due=NOW + 1, leased=True), Cause.MISSING, "the old record's update")
            await drop(store, anew)


@check
async def each_op_of_a_write_stands_alone(harness: Harness) -> None:
    """Outcomes come in the order of the ops; a conflict stops no other op."""
    async with opened(harness) as store:
        same(await store.write([]), [], "outcomes of no ops")
        old, older = await put(store, insertion(1), insertion(2))
        await drop(store, older)
        outcomes = await store.write(
            [
                insertion(3),
                insertion(1),
                change(older),
                change(old, due=NOW + 1),
                removal(old),
                insertion(4),
                PutDocument("default", "q", "no such etag", b"policy"),
                PutDocument("default", "q", None, b"policy"),
            ]
        )
        same(
            [outcome.cause if isinstance(outcome, Conflict) else type(outcome) for outcome in outcomes],
            [Inserted, Cause.EXISTS, Cause.MISSING, Updated, Cause.STALE, Inserted, Cause.STATE, DocumentWritten],
            "the outcomes",
        )
        page = await store.list("default", "q", Box.LIVE)
        same(numbers(page.records), [1, 3, 4], "what is in the queue")


@check
async def rivals_in_one_write(harness: Harness) -> None:
    """Ops of one call compete like those of different callers: the first wins."""
    async with opened(harness) as store:
        record = await put_one(store, insertion(1))
        outcomes = await store.write([change(record, status=b"a"), change(record, status=b"b"), removal(record)])
        same([type(outcome) for outcome in outcomes], [Updated, Conflict, Conflict], "updates with one ETag")
        same((await read(store, record.item)).status, b"a", "the status")
        outcomes = await store.write([insertion(2, payload=b"a"), insertion(2, payload=b"b")])
        same([type(outcome) for outcome in outcomes], [Inserted, Conflict], "inserts of one id")
        key = Unique("k", NOW, NOW + 10)
        outcomes = await store.write([insertion(3, unique=key), insertion(4, unique=key)])
        same(outcomes[1], Conflict(Cause.UNIQUE, ident(3)), "the second insert of a unique key")


@check
async def one_winner_among_racing_callers(harness: Harness) -> None:
    """Of many concurrent updates and removals with one ETag exactly one is applied."""
    async with opened(harness) as store:
        for number in range(1, 6):
            record = await put_one(store, insertion(number))
            ops: list[Op] = [change(record, due=NOW + rival, leased=True) for rival in range(1, 20)]
            ops.insert(number * 3, removal(record))
            outcomes = await asyncio.gather(*(one(store, op) for op in ops))
            winners = [op for op, outcome in zip(ops, outcomes, strict=True) if not isinstance(outcome, Conflict)]
            same(len(winners), 1, "winners of a race")
            left = await store.get("default", "q", record.item.id)
            if isinstance(winners[0], Update):
                same(there(left, "the updated record").mark.due, winners[0].due, "the winner's due time")
            else:
                same(left, None, "the removed record")


@check
async def one_winner_among_handles(harness: Harness) -> None:
    """The same between two handles, each with many callers."""
    if not harness.shared:
        return
    async with opened(harness) as here, opened(harness) as there_:
        for number in range(1, 6):
            record = await put_one(here, insertion(number))
            seen = await read(there_, record.item)
            same(seen.mark, record.mark, "the mark as the other handle reads it")
            ops = [change(seen, due=NOW + rival, leased=True) for rival in range(8)]
            outcomes = await asyncio.gather(*(one(store, op) for op in ops for store in (here, there_)))
            same(sum(isinstance(outcome, Updated) for outcome in outcomes), 1, "winners of a race")
        key = Unique("k", NOW, NOW + 10)
        for queue, unique, cause in (("ids", None, Cause.EXISTS), ("keys", key, Cause.UNIQUE)):
            inserts = [insertion(20 + (rival if unique else 0), queue=queue, unique=unique) for rival in range(8)]
            outcomes = await asyncio.gather(
                *(one(store, op) for op, store in zip(inserts, [here, there_] * 4, strict=True))
            )
            same(sum(isinstance(outcome, Inserted) for outcome in outcomes), 1, f"winners in {queue}")
            lost = [outcome for outcome in outcomes if isinstance(outcome, Conflict)]
            same({conflict.cause for conflict in lost}, {cause}, f"why the losers in {queue} lost")
            winner = next(outcome for outcome in outcomes if isinstance(outcome, Inserted))
            same({conflict.id for conflict in lost}, {winner.item.id}, f"who was in the way in {queue}")


@check
async def concurrent_callers_lose_nothing(harness: Harness) -> None:
    """Many concurrent single writes are all applied, each with its own outcome."""
    count, kept = (60, 10) if harness.slow else (300, 50)
    async with opened(harness) as store:
        outcomes = await asyncio.gather(*(put_one(store, insertion(number)) for number in range(count)))
        same(
            [outcome.item.id for outcome in outcomes], [ident(number) for number in range(count)], "whose outcome it is"
        )
        same(len({outcome.item.key for outcome in outcomes}), count, "distinct keys")
        same(sorted(await due(store)), list(range(count)), "what is in the queue")
        await asyncio.gather(*(drop(store, outcome) for outcome in outcomes[:-kept]))
        same(sorted(await due(store)), list(range(count - kept, count)), "what is left")


@check
async def cancelled_caller_leaves_a_sound_store(harness: Harness) -> None:
    """A caller that is cancelled may find its write done or not done, never half done; others are not disturbed."""
    count = 16 if harness.slow else 40
    async with opened(harness) as store:
        capabilities = store.capabilities
        if not (capabilities.atomic_groups or capabilities.hand_offs):
            return
        before = await put(store, *(insertion(n + 300) for n in range(count)))
        groups: list[list[Op]] = [
            [insertion(n), insertion(n + 100)]
            if capabilities.atomic_groups
            else [removal(before[n]), insertion(n), insertion(n + 100)]
            for n in range(count)
        ]
        tasks = [asyncio.ensure_future(store.commit(group)) for group in groups]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results[1::2]:
            same([type(outcome) for outcome in kind(result, list, "a commit")][-2:], [Inserted] * 2, "not cancelled")
        await put_one(store, insertion(200))
        present = set(await due(store))
        for number in range(count):
            same(number in present, number + 100 in present, f"both or none of commit {number}")
            if not capabilities.atomic_groups:
                same(number in present, number + 300 not in present, f"all or none of commit {number}")


@check
async def commit_applies_all(harness: Harness) -> None:
    """All ops of a commit are applied when none is refused; among them an ack with a hand-off."""
    async with opened(harness) as store:
        if not store.capabilities.atomic_groups:
            return
        same(await store.commit([]), [], "outcomes of no ops")
        done, busy = await put(store, insertion(1), insertion(2))
        outcomes = await store.commit(
            [
                removal(done),
                insertion(3, queue="next"),
                change(busy, due=NOW + 5, leased=True),
                PutDocument("default", "next", None, b"policy"),
            ]
        )
        same([type(outcome) for outcome in outcomes], [Removed, Inserted, Updated, DocumentWritten], "outcomes")
        same(await store.get("default", "q", ident(1)), None, "the removed record")
        same(await due(store, queue="next"), [3], "the inserted record")
        same((await read(store, busy.item)).mark.due, NOW + 5, "the updated record")
        state = PutState(busy.item, (await read(store, busy.item)).mark, None, b"state")
        same([type(outcome) for outcome in await store.commit([state])], [StateWritten], "a commit of one op")


@check
async def commit_applies_nothing_after_a_conflict(harness: Harness) -> None:
    """Wherever in the group the refused op stands, nothing of the group is seen afterwards."""
    async with opened(harness) as store:
        if not store.capabilities.atomic_groups:
            return
        gone, kept, grouped, behind, stateful = await put(
            store,
            insertion(1),
            insertion(2, payload=b"kept", expires=NOW + 9),
            insertion(3, group="g"),
            insertion(4, group="g"),
            insertion(5),
        )
        await drop(store, gone)
        etag = kind(await one(store, PutState(stateful.item, stateful.mark, None, b"old")), StateWritten, "state").etag
        document = kind(await one(store, PutDocument("default", "q", None, b"old")), DocumentWritten, "document").etag
        good: list[Op] = [
            insertion(6, unique=Unique("k", NOW, NOW + 10)),
            insertion(7, group="h", queue="fresh"),
            change(kept, due=NOW + 50, leased=True),
            removal(grouped),
            change(behind, box=Box.DEAD),
            PutState(stateful.item, stateful.mark, etag, b"new"),
            Reseal(stateful.item, stateful.mark, b"h", b"s", b"p", None),
            PutDocument("default", "q", document, b"new"),
            PutDocument("default", "fresh", None, b"new"),
        ]
        before = await _picture(store)
        for bad, cause in (
            (change(gone), Cause.MISSING),
            (insertion(5), Cause.EXISTS),
            (DropState(stateful.item, stateful.mark, "no such etag"), Cause.STATE),
            (PutDocument("default", "q", "no such etag", b""), Cause.STATE),
        ):
            for place in (0, len(good) // 2, len(good)):
                outcomes = await store.commit([*good[:place], bad, *good[place:]])
                expected = [Cause.ABORTED] * len(good)
                expected.insert(place, cause)
                same(
                    [kind(outcome, Conflict, "outcome in a refused commit").cause for outcome in outcomes],
                    expected,
                    f"causes with the refused op at {place}",
                )
                same(await _picture(store), before, f"the store after a refused commit, bad op at {place}")
                same(await store.verify(), [], "problems after a refused commit")
        outcomes = await store.commit(good)
        same([outcome for outcome in outcomes if isinstance(outcome, Conflict)], [], "the same group without it")


async def _picture(store: Store) -> list[object]:
    page = await store.list("default", "q", Box.LIVE)
    return [
        page,
        await store.list("default", "q", Box.DEAD),
        await store.list("default", "fresh", Box.LIVE),
        await store.ready("default", "q", NOW, limit=100),
        await store.counts("default", "q", NOW),
        await store.counts("default", "fresh", NOW),
        [await store.state(record.item) for record in page.records],
        [await store.payload(record.item) for record in page.records],
        await store.document("default", "q"),
        await store.document("default", "fresh"),
        await store.queues(),
        await store.expired(NOW + 100, limit=100),
    ]


@check
async def commit_sees_its_own_ops(harness: Harness) -> None:
    """Ops of a commit are applied in order: two of them with one ETag contradict each other, and none is applied."""
    async with opened(harness) as store:
        if not store.capabilities.atomic_groups:
            return
        record = await put_one(store, insertion(1))
        outcomes = await store.commit([change(record, status=b"a"), removal(record)])
        same([type(outcome) for outcome in outcomes], [Conflict, Conflict], "contradicting ops")
        same((await read(store, record.item)).mark, record.mark, "the record")
        outcomes = await store.commit([insertion(2), insertion(2)])
        same([type(outcome) for outcome in outcomes], [Conflict, Conflict], "inserts of one id")
        same(await store.get("default", "q", ident(2)), None, "the id that was inserted twice")


@check
async def boxes_keep_payload_and_state(harness: Harness) -> None:
    """A record goes to the dead box and comes back as what it was."""
    async with opened(harness) as store:
        first = await put_one(store, insertion(1, payload=b"kept", expires=NOW + 99, priority=8))
        etag = kind(await one(store, PutState(first.item, first.mark, None, b"progress")), StateWritten, "state").etag
        dead = await bury(store, first)
        same(facts(dead.mark), (NOW, False, NOW + 99, Box.DEAD), "the mark of the dead letter")
        same(numbers((await store.list("default", "q", Box.DEAD)).records), [1], "the dead box")
        same((await store.list("default", "q", Box.LIVE)).records, [], "the live box")
        same(await due(store), [], "what is ready")
        for record in (dead, await changed(store, change(dead))):
            whole = await read(store, record.item, payload=True)
            # One that came back may have a new key.
            expected = msgspec.structs.replace(first.item, key=whole.item.key)
            same((whole.item, whole.head, whole.payload), (expected, b"head 1", b"kept"), "the record")
            same(await store.state(whole.item), Document(b"progress", etag), "the state")
        same(numbers((await store.list("default", "q", Box.LIVE)).records), [1], "the live box, after it came back")
        same((await store.list("default", "q", Box.DEAD)).records, [], "the dead box, after it left")
        same(await due(store), [1], "what is ready, after it came back")


@check
async def bytes_are_bytes(harness: Harness) -> None:
    """Empty, binary and large values come back as they were."""
    async with opened(harness) as store:
        every = bytes(range(256))
        limit = store.capabilities.inline_limit
        holds(limit > 0, "a store takes some payload inline")
        for number, payload in enumerate((b"", b"\x00", every, every * (limit // 256) + bytes(limit % 256))):
            op = insertion(number, payload=payload)
            stored = await put_one(store, op)
            same((await read(store, stored.item, payload=True)).payload, payload, f"{len(payload)} bytes of payload")
            same(await store.payload(stored.item), payload, f"{len(payload)} bytes of payload, read alone")
            outcome = kind(await one(store, change(stored, want_payload=True)), Updated, "update")
            same(outcome.payload, payload, f"{len(payload)} bytes of payload, from an update")
        for number, size in ((10, 0), (11, 100_000), (12, 1_000_000)):
            big = (every * (size // 256 + 1))[:size]
            stored = await put_one(store, Insert(item(number), NOW, None, big, big, b""))
            record = await read(store, stored.item)
            same((record.head == big, record.status == big), (True, True), f"head and status of {size} bytes")
            record = await changed(store, change(record, status=big[::-1]))
            same(record.status == big[::-1], True, f"new status of {size} bytes")
            kind(await one(store, PutState(record.item, record.mark, None, big)), StateWritten, "a large state")
            same(there(await store.state(record.item), "state").data == big, True, f"state of {size} bytes")


@check
async def names_at_their_limit(harness: Harness) -> None:
    """The longest names work, and names that share a beginning are different queues."""
    async with opened(harness) as store:
        names = ["n" * MAX_NAME_BYTES, "n" * (MAX_NAME_BYTES - 1), "n", "n.n", "n-n", "n_n", "...", "-", "0"]
        places = [(namespace, queue) for namespace in names[:: 4 if harness.slow else 1] for queue in names]
        for number, (namespace, queue) in enumerate(places):
            await put_one(store, insertion(number, namespace=namespace, queue=queue, group=queue))
        for number, (namespace, queue) in enumerate(places):
            same(await due(store, namespace=namespace, queue=queue), [number], f"queue {namespace}/{queue}")
        same([tuple(name) for name in await store.queues()], sorted(places), "the queues")


@check
async def long_keys(harness: Harness) -> None:
    """Ordering and unique keys may be any text."""
    async with opened(harness) as store:
        for number, key in enumerate(("k" * 1024, "k" * 1023, "Ключ", "a/b\\c'\"%_", "\n", " ", "..")):
            await put(
                store,
                insertion(number, group=key, unique=Unique(key, NOW, NOW + 5)),
                insertion(number + 100, group=key),
            )
            conflict = await refused(store, insertion(99, unique=Unique(key, NOW, NOW + 5)), Cause.UNIQUE, key[:20])
            same(conflict.id, ident(number), "the first with this key")
        same(sorted(await due(store)), list(range(7)), "the first of each group")


@check
async def unique_key_admits_one_insert(harness: Harness) -> None:
    """Within its window a key is taken, per queue; the refused insert leaves nothing behind."""
    async with opened(harness) as store:
        key = Unique("k", NOW, NOW + 1000)
        await put_one(store, insertion(1, unique=key))
        conflict = await refused(store, insertion(2, unique=key), Cause.UNIQUE, "the same key")
        same(conflict.id, ident(1), "the message that has the key")
        same(await store.get("default", "q", ident(2)), None, "the refused message")
        await put(
            store,
            insertion(3, unique=Unique("other", NOW, NOW + 1000)),
            insertion(4, unique=key, queue="p"),
            insertion(5, unique=key, namespace="other"),
            insertion(6),
            insertion(7),
        )
        conflict = kind(await one(store, insertion(1, unique=Unique("new", NOW, NOW + 9))), Conflict, "the same id")
        same(conflict.id, ident(1), "the id in the way")
        await put_one(store, insertion(8, unique=Unique("new", NOW, NOW + 9)))


@check
async def unique_key_ends_with_its_window(harness: Harness) -> None:
    """A key is taken while now < until, whatever has become of the message; then the next insert has it."""
    async with opened(harness) as store:
        first, second = await put(
            store, insertion(1, unique=Unique("a", NOW, NOW + 10)), insertion(2, unique=Unique("b", NOW, NOW + 10))
        )
        await drop(store, first)
        await bury(store, second)
        for key, number in (("a", 1), ("b", 2)):
            late = Unique(key, NOW + 9, NOW + 500)
            conflict = await refused(store, insertion(number + 10, unique=late), Cause.UNIQUE, "a millisecond before")
            same(conflict.id, ident(number), "the message that has the key")
            await put_one(store, insertion(number + 20, unique=Unique(key, NOW + 10, NOW + 30)))
            conflict = await refused(
                store, insertion(number + 30, unique=Unique(key, NOW + 29, NOW + 99)), Cause.UNIQUE, "the new window"
            )
            same(conflict.id, ident(number + 20), "the message that has the key now")


@check
async def reseal_changes_bytes_alone(harness: Harness) -> None:
    """Head, status, payload and state are replaced; where the record stands, and its state's ETag, stay."""
    async with opened(harness) as store:
        first = await put_one(store, insertion(1, payload=b"old", expires=NOW + 99, group="g"))
        held = await take(store, first, NOW + 50)
        etag = kind(await one(store, PutState(held.item, held.mark, None, b"old state")), StateWritten, "state").etag
        counts = await store.counts("default", "q", NOW)
        state = Document(b"new state", etag)
        op = Reseal(held.item, held.mark, b"new head", b"new status", b"new payload", state)
        outcome = kind(await one(store, op), Updated, "the reseal")
        same(outcome.payload, None, "the payload in the outcome")
        record = await read(store, held.item, payload=True)
        same((record.head, record.status, record.payload), (b"new head", b"new status", b"new payload"), "the bytes")
        same((record.item, record.mark), (held.item, outcome.mark), "item and mark")
        same(facts(record.mark), facts(held.mark), "where the record stands")
        resealed = there(await store.state(held.item), "state")
        same(resealed.data, b"new state", "the state")
        same(await store.counts("default", "q", NOW), counts, "the counts")
        kind(await one(store, Reseal(held.item, record.mark, b"h", b"s", None, None)), Updated, "a partial reseal")
        record = await read(store, held.item, payload=True)
        same(record.payload, b"new payload", "a payload that was left alone")
        same(there(await store.state(held.item), "state").data, b"new state", "a state that was left alone")
        wrong = Reseal(held.item, record.mark, b"x", b"x", b"x", Document(b"x", "no such etag"))
        await refused(store, wrong, Cause.STATE, "a reseal with another state ETag")
        same((await read(store, held.item, payload=True)), record, "the record after a refused reseal")
        kind(await one(store, Remove(record.item, record.mark)), Removed, "the holder's ack")


@check
async def reseal_brings_no_state_back(harness: Harness) -> None:
    """A state that was deleted stays so, whatever ETag the reseal believes it to have."""
    async with opened(harness) as store:
        held = await take(store, await put_one(store, insertion(1)), NOW + 50)
        etag = kind(await one(store, PutState(held.item, held.mark, None, b"state")), StateWritten, "state").etag
        kind(await one(store, DropState(held.item, held.mark, etag)), StateWritten, "the delete")
        for guess in (etag, "0", "1", "2", "3", ""):
            op = Reseal(held.item, held.mark, b"h", b"s", None, Document(b"back", guess))
            await refused(store, op, Cause.STATE, f"a reseal of a state that is gone, by ETag {guess!r}")
        same(await store.state(held.item), None, "the state")
