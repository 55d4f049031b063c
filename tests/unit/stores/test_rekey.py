"""`millpond.stores.rekey`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import msgspec
import pytest

from millpond.crypto.envelope import Envelope
from millpond.crypto.keyring import Keyring
from millpond.errors import InvalidInput, StoreBusy, StoreError, StoreMismatch, UnknownKey
from millpond.model.clock import ManualClock
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
    PutDocument,
    PutState,
    QueueName,
    Remove,
    Removed,
    Reseal,
    StateWritten,
    Stored,
    Unique,
    Update,
    Updated,
)
from millpond.stores.encrypted import EncryptedStore
from millpond.stores.memory import MemoryStore
from millpond.stores.rekey import rekey

A, B = bytes(range(32)), b"\x07" * 32
OLD, BOTH, NEW = Keyring({"a": A}), Keyring({"a": A, "b": B}), Keyring({"b": B})
HEAD = msgspec.msgpack.encode(["head"])
STATUS = msgspec.msgpack.encode(["status"])
LARGE = b"large" * 100_000


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


class Racing(MemoryStore):
    """Lets a test act just before a Reseal is applied."""

    before_reseal: Callable[[], Coroutine[Any, Any, object]] | None = None
    reseals = 0

    async def write(self, ops: Sequence[Op]) -> list[Outcome]:
        if any(isinstance(op, Reseal) for op in ops):
            self.reseals += 1
            if self.before_reseal is not None:
                await self.before_reseal()
        return await super().write(ops)


def memory() -> Racing:
    return Racing(clock=ManualClock())


def beside(inner: MemoryStore) -> MemoryStore:
    """Another process's handle."""
    return inner.share()


async def opened(inner: MemoryStore, keyring: Keyring, **options: Any) -> EncryptedStore:
    store = EncryptedStore(inner, keyring, **options)
    await store.open()
    return store


def item(number: int, *, group: str | None = None, external: bool = False, queue: str = "orders") -> Item:
    return Item("default", queue, f"0197a3c2-0000-7000-8000-{number:012x}", 5, group, 7, external)


async def add(store: EncryptedStore | MemoryStore, of: Item, unique: Unique | None = None) -> tuple[Item, Mark]:
    payload = b"" if of.external else f"payload {of.id}".encode()
    blob = (await store.write_blob("default", "orders", of.id, large(), 0)).name if of.external else ""
    (outcome,) = await store.write([Insert(of, 0, None, HEAD, STATUS, payload, unique, blob)])
    assert isinstance(outcome, Inserted)
    return outcome.item, outcome.mark


async def large() -> AsyncIterator[bytes]:
    yield LARGE


async def collect(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


async def fill(store: EncryptedStore | MemoryStore, *, external: bool = True) -> None:
    """Something of everything: seven records in two queues, one dead, two with state, and one document."""
    for number in (1, 2, 3):
        of, mark = await add(store, item(number))
        if number > 1:
            await store.write([PutState(of, mark, None, f"state {number}".encode())])
    await add(store, item(4, group="g"), Unique("u", 0, 1000))
    await add(store, item(5, group="g"))
    dead, mark = await add(store, item(6, queue="other"))
    await store.write([Update(dead, mark, 0, False, None, Box.DEAD, STATUS)])
    if external:
        await add(store, item(7, external=True))
    await store.write([PutDocument("default", "orders", None, b"policy")])


async def check(store: EncryptedStore, *, external: bool = True) -> None:
    """That all of it is there."""
    assert await store.verify() == []
    for number in (1, 2, 3, 4, 5, 6):
        queue = "other" if number == 6 else "orders"
        record = await store.get("default", queue, item(number).id, payload=True)
        assert record is not None
        assert (record.head, record.status) == (HEAD, STATUS)
        assert record.payload == f"payload {record.item.id}".encode()
        assert record.mark.box is (Box.DEAD if number == 6 else Box.LIVE)
        state = await store.state(record.item)
        assert (state and state.data) == (f"state {number}".encode() if number in {2, 3} else None)
    if external:
        record = await store.get("default", "orders", item(7).id)
        assert record is not None
        assert await collect(store.read_blob(record.item)) == LARGE
    document = await store.document("default", "orders")
    assert document is not None
    assert document.data == b"policy"


def keys_in_use(inner: MemoryStore) -> set[str]:
    found = set()
    for queue in inner._data.queues.values():
        parts = [queue.document] if queue.document else []
        for record in queue.by_key.values():
            parts += [record.head, record.status, record.state or b"", b"" if record.item.external else record.payload]
        found |= {Envelope.key_id(part) for part in parts if part}
    return found


def test_afterwards_the_old_key_is_not_needed() -> None:
    async def scenario() -> None:
        inner = memory()
        await fill(await opened(inner, OLD))
        with pytest.raises(UnknownKey):
            await opened(beside(inner), NEW)
        seen: list[int] = []
        store = await opened(beside(inner), BOTH)
        assert await rekey(store, batch=2, progress=seen.append) == 8
        assert seen == sorted(set(seen))
        assert seen[-1] == 8
        assert keys_in_use(inner) == {"b"}
        await check(await opened(beside(inner), NEW))
        with pytest.raises(UnknownKey, match="needs root key 'b'"):
            await opened(beside(inner), OLD)

    run(scenario())


def test_a_second_time_there_is_nothing_to_do() -> None:
    async def scenario() -> None:
        inner = memory()
        await fill(await opened(inner, OLD))
        store = await opened(beside(inner), BOTH)
        await rekey(store)
        before = await inner.document("~millpond", "~vault")
        assert await rekey(store) == 0
        assert await inner.document("~millpond", "~vault") == before

    run(scenario())


def test_an_empty_store() -> None:
    async def scenario() -> None:
        assert await rekey(await opened(memory(), OLD)) == 0

    run(scenario())


def test_etags_order_and_dedup_outlive_it() -> None:
    async def scenario() -> None:
        inner = memory()
        old = await opened(inner, OLD)
        await fill(old)
        before = await old.get("default", "orders", item(2).id)
        assert before is not None
        state = await old.state(before.item)
        await rekey(await opened(beside(inner), BOTH))
        new = await opened(beside(inner), NEW)
        after = await new.get("default", "orders", item(2).id)
        assert after == before
        assert await new.state(before.item) == state
        ready = [record.item.id for record in (await new.ready("default", "orders", 0, limit=10)).records]
        assert item(4).id in ready
        assert item(5).id not in ready
        refused = await new.write([Insert(item(8), 0, None, HEAD, STATUS, b"", Unique("u", 500, 1500))])
        assert refused == [Conflict(Cause.UNIQUE, item(4).id)]
        later = (await add(new, item(9, group="g")))[0]
        first = await new.get("default", "orders", item(4).id)
        assert first is not None
        assert later.group == first.item.group

    run(scenario())


def test_streams_to_come_have_a_key_that_the_old_root_key_never_covered() -> None:
    async def scenario() -> None:
        inner = memory()
        old = await opened(inner, OLD)
        await fill(old)
        new = await opened(beside(inner), BOTH)
        await rekey(new)
        of, _ = await add(new, item(20, external=True))
        generations = {blob.place[2]: blob.data[3:7] for blob in inner._data.blobs.values()}
        assert generations == {item(7).id: bytes(4), item(20).id: b"\0\0\0\1"}
        # A process that opened the store before, with the newest key in its ring, finds the new stream key.
        early = await opened(beside(inner), BOTH)
        early._vault = old._vault
        assert await collect(early.read_blob(of)) == LARGE

    run(scenario())


def test_it_goes_on_where_it_was_stopped() -> None:
    async def scenario() -> None:
        inner = memory()
        await fill(await opened(inner, OLD))
        handle = Racing(clock=ManualClock())
        handle._data = inner._data

        async def stop() -> None:
            if handle.reseals == 3:
                raise StoreError("the power went off")

        handle.before_reseal = stop
        with pytest.raises(StoreError, match="power"):
            await rekey(await opened(handle, BOTH), batch=1)
        assert keys_in_use(inner) == {"a", "b"}
        await check(await opened(beside(inner), BOTH))
        assert await rekey(await opened(beside(inner), BOTH), batch=1) == 5
        await check(await opened(beside(inner), NEW))

    run(scenario())


def test_a_claim_in_between_is_kept_and_the_record_renewed_all_the_same() -> None:
    async def scenario() -> None:
        inner = memory()
        worker = await opened(beside(inner), OLD)
        store = await opened(inner, BOTH)
        of, mark = await add(worker, item(1))
        claims = 0

        async def claim() -> None:
            nonlocal claims, mark
            if claims < 3:
                claims += 1
                (outcome,) = await worker.write([Update(of, mark, claims, True, None, Box.LIVE, b"\x91%d" % claims)])
                assert isinstance(outcome, Updated)
                mark = outcome.mark

        inner.before_reseal = claim
        assert await rekey(store) == 1
        assert claims == 3
        inner.before_reseal = None
        record = await (await opened(beside(inner), NEW)).get("default", "orders", of.id)
        assert record is not None
        assert record.status == b"\x913"
        assert record.mark.due == 3

    run(scenario())


def test_state_saved_in_between_is_kept() -> None:
    async def scenario() -> None:
        inner = memory()
        worker = await opened(beside(inner), OLD)
        of, mark = await add(worker, item(1))
        (saved,) = await worker.write([PutState(of, mark, None, b"first")])
        assert isinstance(saved, StateWritten)
        store = await opened(inner, BOTH)

        async def save() -> None:
            inner.before_reseal = None
            (outcome,) = await worker.write([PutState(of, mark, saved.etag, b"second")])
            assert isinstance(outcome, StateWritten)

        inner.before_reseal = save
        assert await rekey(store) == 1
        state = await (await opened(beside(inner), NEW)).state(of)
        assert state is not None
        assert state.data == b"second"

    run(scenario())


def test_an_ack_in_between_is_no_error() -> None:
    async def scenario() -> None:
        inner = memory()
        worker = await opened(beside(inner), OLD)
        of, mark = await add(worker, item(1))
        await add(worker, item(2))
        store = await opened(inner, BOTH)

        async def ack() -> None:
            await worker.write([Remove(of, mark)])

        inner.before_reseal = ack
        assert await rekey(store) == 1
        assert await store.get("default", "orders", of.id) is None

    run(scenario())


def test_a_message_that_comes_back_from_the_dead_in_between_is_found() -> None:
    async def scenario() -> None:
        inner = memory()
        worker = await opened(beside(inner), OLD)
        dead, mark = await add(worker, item(1))
        (outcome,) = await worker.write([Update(dead, mark, 0, False, None, Box.DEAD, STATUS)])
        assert isinstance(outcome, Updated)
        await add(worker, item(2))
        store = await opened(inner, BOTH)

        async def redrive() -> None:
            inner.before_reseal = None
            await worker.write([Update(dead, outcome.mark, 0, False, None, Box.LIVE, STATUS)])

        inner.before_reseal = redrive
        assert await rekey(store) == 2
        assert keys_in_use(inner) == {"b"}

    run(scenario())


def test_a_writer_that_keeps_to_the_old_key_is_told_of() -> None:
    async def scenario() -> None:
        inner = memory()
        worker = await opened(beside(inner), OLD)
        await add(worker, item(1))
        store = await opened(inner, BOTH)
        numbers = iter(range(2, 1000))

        async def enqueue() -> None:
            await add(worker, item(next(numbers)))

        inner.before_reseal = enqueue
        with pytest.raises(StoreBusy, match="give every process the new keyring, then run rekey again"):
            await rekey(store)

    run(scenario())


def test_a_record_that_changes_without_end_does_not_hold_it_for_ever() -> None:
    async def scenario() -> None:
        inner = memory()
        worker = await opened(beside(inner), OLD)
        of, mark = await add(worker, item(1))
        store = await opened(inner, BOTH)

        async def claim() -> None:
            nonlocal mark
            (outcome,) = await worker.write([Update(of, mark, 0, True, None, Box.LIVE, STATUS)])
            assert isinstance(outcome, Updated)
            mark = outcome.mark

        inner.before_reseal = claim
        with pytest.raises(StoreBusy, match=rf"message {of.id} in default/orders changes too fast"):
            await rekey(store)

    run(scenario())


def test_a_record_that_does_not_open_is_left_and_told_of() -> None:
    async def scenario() -> None:
        inner = memory()
        worker = await opened(beside(inner), OLD)
        await add(worker, item(1))
        of, _ = await add(worker, item(2))
        record = inner._data.queues[QueueName("default", "orders")].by_id[of.id]
        record.payload = record.payload[:-1]
        before = record.stored(payload=True)
        store = await opened(inner, BOTH)
        told: list[str] = []
        store.on_bad_record = lambda item, error: told.append(item.id)
        assert await rekey(store) == 1
        assert told == [of.id]
        assert record.stored(payload=True) == before

    run(scenario())


def test_batches_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millpond.stores.rekey.MAX_PENDING_BYTES", 100)

    async def scenario() -> None:
        inner = memory()
        worker = await opened(beside(inner), OLD)
        for number in range(10):
            await add(worker, item(number))
        assert await rekey(await opened(inner, BOTH)) == 10
        assert inner.reseals == 4

    run(scenario())


def test_bad_options() -> None:
    async def scenario() -> None:
        store = await opened(memory(), OLD)
        with pytest.raises(InvalidInput, match="batch"):
            await rekey(store, batch=0)
        with pytest.raises(InvalidInput, match="accept_plain=True"):
            await rekey(store, encrypt_plain=True)

    run(scenario())


# From plain to encrypted


def test_a_plain_store_is_encrypted_when_that_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        inner = memory()
        await fill(inner, external=False)
        with pytest.raises(StoreMismatch):
            await opened(beside(inner), NEW)
        store = await opened(beside(inner), NEW, accept_plain=True)
        await check(store, external=False)
        assert await rekey(store) == 0
        assert await rekey(store, encrypt_plain=True) == 7
        await check(await opened(beside(inner), NEW), external=False)
        assert keys_in_use(inner) == {"b"}

    run(scenario())
    assert caplog.records == []


def test_half_way_both_kinds_are_read_and_written() -> None:
    async def scenario() -> None:
        inner = memory()
        of, mark = await add(inner, item(1))
        store = await opened(beside(inner), NEW, accept_plain=True)
        (outcome,) = await store.write([Update(of, mark, 0, True, None, Box.LIVE, b"\x91new", True)])
        assert isinstance(outcome, Updated)
        assert outcome.payload == f"payload {of.id}".encode()
        assert await store.get("default", "orders", of.id) == Stored(of, outcome.mark, HEAD, b"\x91new")
        assert await rekey(store, encrypt_plain=True) == 1
        strict = await opened(beside(inner), NEW)
        assert await strict.get("default", "orders", of.id) == Stored(of, outcome.mark, HEAD, b"\x91new")
        assert await strict.payload(of) == f"payload {of.id}".encode()

    run(scenario())


def test_plain_payloads_stored_apart_are_left_and_told_of(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        inner = memory()
        await fill(inner)
        store = await opened(beside(inner), NEW, accept_plain=True)
        with caplog.at_level(logging.WARNING, "millpond.crypto"):
            assert await rekey(store, encrypt_plain=True) == 7
        await check(store)
        strict = await opened(beside(inner), NEW)
        with pytest.raises(StoreMismatch, match="is not encrypted"):
            await strict.get("default", "orders", item(7).id)

    run(scenario())
    (record,) = caplog.records
    assert record.getMessage() == "millpond.crypto.plain_left"
    assert record.__dict__["messages"] == 1


def test_a_consumer_at_work_notices_nothing() -> None:
    async def scenario() -> None:
        inner = memory()
        worker = await opened(beside(inner), OLD)
        of, mark = await add(worker, item(1))
        await rekey(await opened(inner, BOTH))
        assert await worker.write([Remove(of, mark)]) == [Removed()]

    run(scenario())


def test_a_part_alone_that_is_under_the_old_key_is_found() -> None:
    """As a process with the keyring of before writes it: the head is renewed already, status or state are not."""

    async def scenario() -> None:
        inner = memory()
        store, behind = await opened(inner, BOTH), await opened(beside(inner), Keyring({"b": B, "a": A}))
        first, mark = await add(store, item(1))
        await behind.write([Update(first, mark, 5, True, None, Box.LIVE, STATUS)])
        second, mark = await add(store, item(2))
        await behind.write([PutState(second, mark, None, b"state")])
        await add(store, item(3))
        assert keys_in_use(inner) == {"a", "b"}
        assert await rekey(store) == 2
        assert keys_in_use(inner) == {"b"}
        reader = await opened(beside(inner), NEW)
        assert await reader.verify() == []
        state = await reader.state(second)
        assert state is not None
        assert state.data == b"state"

    run(scenario())


@pytest.mark.parametrize("accept_plain", [False, True])
def test_sealed_messages_with_payloads_apart_are_renewed_whatever_else_is_accepted(accept_plain: bool) -> None:
    async def scenario() -> None:
        inner = memory()
        old = await opened(inner, OLD)
        await add(old, item(7, external=True))
        store = await opened(beside(inner), BOTH, accept_plain=accept_plain)
        assert await rekey(store) == 1
        assert keys_in_use(inner) == {"b"}
        reader = await opened(beside(inner), NEW)
        record = await reader.get("default", "orders", item(7).id)
        assert record is not None
        assert await collect(reader.read_blob(record.item)) == LARGE

    run(scenario())


def test_what_was_left_plain_is_told_of_once_and_not_when_it_has_gone(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        inner = memory()
        plain, _ = await add(inner, item(7, external=True))
        await add(inner, item(1))
        store = await opened(beside(inner), NEW, accept_plain=True)

        written: list[int] = []

        def progress(count: int) -> None:
            # The first pass has seen the plain message; it is gone when the second one looks.
            written.append(count)
            orders = inner._data.queues[QueueName("default", "orders")]
            orders.discard(orders.by_key[plain.key])

        assert await rekey(store, progress=progress, encrypt_plain=True) == 1
        assert written == [1]
        assert "millpond.crypto.plain_left" not in caplog.text

    run(scenario())
