"""Requests that are sent again: those of a session that were carried out are known beyond their messages."""

from __future__ import annotations

import msgspec

from millpond.stores.base import Cause, Conflict, Insert, Inserted, Serial, Unique
from millpond.stores.conformance.harness import (
    NOW,
    Harness,
    check,
    drop,
    due,
    holds,
    ident,
    insertion,
    kind,
    one,
    opened,
    put_one,
    refused,
    same,
)

WINDOW = 1000


def _serial(number: int, first: int, *, session: str = "s", now: int = NOW, fresh: bool = True) -> Serial:
    return Serial(session, number, ident(first), now, now + WINDOW, fresh)


def _request(serial: Serial, *inserts: Insert) -> list[Insert]:
    return [msgspec.structs.replace(op, chosen=True, serial=serial) for op in inserts]


@check
async def request_sent_again_is_refused_though_its_messages_are_gone(harness: Harness) -> None:
    """It is known while they are there, when one of them is gone, and when all are; also after a sweep."""
    async with opened(harness) as store:
        ops = [insertion(number) for number in (1, 2, 3)]
        records = [kind(one, Inserted, "an insert") for one in await store.write(_request(_serial(1, 1), *ops))]
        taken = [Conflict(Cause.EXISTS, ident(number)) for number in (1, 2, 3)]
        for record in (None, *records):
            if record is not None:
                await drop(store, record)
            same(await store.write(_request(_serial(1, 1), *ops)), taken, "the same request again")
        await store.sweep(NOW + WINDOW - 1, older_than=0, limit=100)
        same(await store.write(_request(_serial(1, 1, now=NOW + WINDOW - 1), *ops)), taken, "after a sweep")
        same(await due(store), [], "what is there")


@check
async def request_sent_again_is_known_to_other_handles(harness: Harness) -> None:
    """Whoever has the store open knows it, and whoever opens it later."""
    if not harness.persistent:
        return
    async with opened(harness) as store:
        await drop(store, kind(await one(store, _request(_serial(7, 1), insertion(1))[0]), Inserted, "an insert"))
    async with opened(harness) as store:
        await refused(store, _request(_serial(7, 1), insertion(1))[0], Cause.EXISTS, "the same request again")


@check
async def requests_of_a_session_follow_each_other(harness: Harness) -> None:
    """Each higher number is carried out, and each session, queue and namespace counts for itself."""
    async with opened(harness) as store:
        for number in range(1, 20):
            await put_one(store, _request(_serial(number, number), insertion(number))[0])
        await put_one(store, _request(_serial(1, 31, session="t"), insertion(31))[0])
        await put_one(store, _request(_serial(1, 32), insertion(32, queue="p"))[0])
        await put_one(store, _request(_serial(1, 33), insertion(33, namespace="other"))[0])
        same(sorted(await due(store)), [*range(1, 20), 31], "what is there")


@check
async def request_that_was_passed_is_refused(harness: Harness) -> None:
    """A lower number that comes late is not carried out, nor another request with the same number. (A store that keeps
    ids knows nothing of numbers.)"""
    async with opened(harness) as store:
        if not store.capabilities.atomic_groups:
            return
        await put_one(store, _request(_serial(5, 1), insertion(1))[0])
        for number in (1, 4, 5):
            await refused(store, _request(_serial(number, 2), insertion(2))[0], Cause.PASSED, f"{number} after 5")
        await put_one(store, _request(_serial(2**53 - 1, 3), insertion(3))[0])
        await refused(store, _request(_serial(6, 2), insertion(2))[0], Cause.PASSED, "6 after the largest")


@check
async def window_of_a_request_ends(harness: Harness) -> None:
    """Afterwards an id is free, and a session may begin anew."""
    async with opened(harness) as store:
        first = _serial(9, 1, now=NOW - WINDOW)
        await drop(store, kind(await one(store, _request(first, insertion(1))[0]), Inserted, "an insert"))
        late = _serial(1, 1, now=NOW + 10 * WINDOW)
        await put_one(store, _request(late, insertion(1))[0])


@check
async def sweep_forgets_sessions(harness: Harness) -> None:
    """A session that is not used any more leaves nothing behind."""
    async with opened(harness) as store:
        if not store.capabilities.atomic_groups:
            return
        await drop(store, kind(await one(store, _request(_serial(1, 1), insertion(1))[0]), Inserted, "an insert"))
        same(await store.sweep(NOW + WINDOW - 1, older_than=0, limit=100), 0, "within the window")
        same(await store.sweep(NOW + 2 * WINDOW, older_than=0, limit=100), 1, "long after it")


@check
async def session_lasts_while_it_is_used(harness: Harness) -> None:
    """Each request is known for the whole window, however long ago the session began."""
    async with opened(harness) as store:
        if not store.capabilities.atomic_groups:
            return
        for number in range(1, 12):
            now = NOW + number * WINDOW // 3
            serial = _serial(number, number, now=now)
            await drop(store, kind(await one(store, _request(serial, insertion(number))[0]), Inserted, "an insert"))
            late = now + WINDOW - 1
            await store.sweep(late, older_than=0, limit=100)
            again = _request(_serial(number, number, now=late), insertion(number))[0]
            await refused(store, again, Cause.EXISTS, f"request {number} at the end of its window")


@check
async def unique_key_and_session_do_not_meet(harness: Harness) -> None:
    """A key that is called like a session is another thing; and of a request that was carried out, a key tells whose
    message stands for it."""
    async with opened(harness) as store:
        await put_one(store, insertion(9, unique=Unique("s", NOW, NOW + WINDOW)))
        other, own = Unique("s", NOW, NOW + WINDOW), Unique("own", NOW, NOW + WINDOW)
        ops = _request(_serial(1, 1), insertion(1, unique=other), insertion(2), insertion(3, unique=own))
        outcomes = await store.write(ops)
        same(outcomes[0], Conflict(Cause.UNIQUE, ident(9)), "the insert whose key is taken")
        for outcome in outcomes[1:]:
            await drop(store, kind(outcome, Inserted, "an insert"))
        again = await store.write(ops)
        same(again[0], Conflict(Cause.UNIQUE, ident(9)), "the taken key, again")
        same(again[1], Conflict(Cause.EXISTS, ident(2)), "the message without a key, again")
        holds(isinstance(again[2], Conflict) and again[2].id == ident(3), "the message with its own key, again")


@check
async def refused_step_leaves_the_session_alone(harness: Harness) -> None:
    """Of a step that was not applied nothing is kept: its request may be sent again."""
    async with opened(harness) as store:
        if not store.capabilities.atomic_groups:
            return
        await put_one(store, insertion(5))
        ops = _request(_serial(1, 1), insertion(1))
        outcomes = await store.commit([*ops, insertion(5)])
        same(outcomes[0], Conflict(Cause.ABORTED), "the insert of a step that was refused")
        await put_one(store, ops[0])


@check
async def ids_that_are_not_fresh_are_free_with_their_messages(harness: Harness) -> None:
    """An id of the producer's own may be given to another message, by another request, once its message is gone."""
    async with opened(harness) as store:
        for number in (1, 2):
            op = _request(_serial(number, 1, fresh=False), insertion(1))[0]
            await drop(store, kind(await one(store, op), Inserted, f"insert {number} of an id"))
