"""`millpond.stores.encrypted`, around the store in memory."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import msgspec
import pytest

from millpond.crypto.keyring import Keyring
from millpond.crypto.stream import CHUNK_BYTES, HEADER_BYTES, TAG_BYTES
from millpond.crypto.vault import PLACE
from millpond.errors import (
    CryptoError,
    MillpondError,
    StoreClosed,
    StoreMismatch,
    Tampered,
    UnknownKey,
)
from millpond.model import codec
from millpond.model.clock import ManualClock
from millpond.stores.base import (
    Blob,
    Box,
    Cause,
    Conflict,
    DocumentWritten,
    DropState,
    Insert,
    Inserted,
    Item,
    Mark,
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
from millpond.stores.sealed import refuse_sealed

RING = Keyring({"a": bytes(range(32))})
OTHER = Keyring({"b": b"\x07" * 32})
HEAD = msgspec.msgpack.encode(["head", "secret-attribute"])
STATUS = msgspec.msgpack.encode(["status", "secret-error"])
PAYLOAD = b"secret-payload"
STATE = b"secret-state"
POLICY = b"secret-policy"
SECRETS = (b"secret-", b"customer-7", b"invoice-9")


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


def memory() -> MemoryStore:
    return MemoryStore(clock=ManualClock())


async def opened(inner: MemoryStore, keyring: Keyring = RING, **options: Any) -> EncryptedStore:
    store = EncryptedStore(inner, keyring, **options)
    await store.open()
    return store


def item(number: int, *, group: str | None = None, external: bool = False, queue: str = "orders") -> Item:
    return Item("default", queue, f"0197a3c2-0000-7000-8000-{number:012x}", 5, group, len(PAYLOAD), external)


def insert(of: Item, *, payload: bytes = PAYLOAD, unique: Unique | None = None, due: int = 0) -> Insert:
    return Insert(of, due, None, HEAD, STATUS, b"" if of.external else payload, unique)


async def add(
    store: EncryptedStore | MemoryStore, of: Item, blob: Blob | None = None, **options: Any
) -> tuple[Item, Mark]:
    op = insert(of, **options)
    (outcome,) = await store.write([op if blob is None else msgspec.structs.replace(op, blob=blob.name)])
    assert isinstance(outcome, Inserted)
    return outcome.item, outcome.mark


def update(of: Item, mark: Mark, status: bytes = STATUS, box: Box = Box.LIVE, *, want: bool = False) -> Update:
    return Update(of, mark, 0, False, None, box, status, want)


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for one in data:
        yield one


async def collect(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


def raw(store: MemoryStore) -> bytes:
    """All that the store in memory holds, as bytes."""
    data = store._data
    found: list[object] = [data.blobs, list(data.ending)]
    for name, queue in data.queues.items():
        found += [name, list(queue.unique.items()), list(queue.groups), queue.document]
        for one in queue.by_key.values():
            found += [one.item, one.mark, one.head, one.status, one.payload, one.state]
    return repr(found).encode()


def change(inner: MemoryStore, of: Item, **parts: bytes) -> None:
    """Do to a record what only somebody with access to the storage could."""
    record = inner._data.queues[QueueName(of.namespace, of.queue)].by_id[of.id]
    for name, value in parts.items():
        setattr(record, name, value)


def flip(data: bytes, at: int = -1) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


# Round trips


def test_everything_comes_back_as_it_went_in() -> None:
    async def scenario() -> None:
        store = await opened(memory())
        of, mark = await add(store, item(1))
        record = await store.get("default", "orders", of.id, payload=True)
        assert record == Stored(of, mark, HEAD, STATUS, PAYLOAD)
        assert await store.payload(of) == PAYLOAD
        outcomes: list[Outcome] = await store.write([update(of, mark, b"\x91claimed", want=True)])
        assert isinstance(outcomes[0], Updated)
        assert outcomes[0].payload == PAYLOAD
        mark = outcomes[0].mark

        assert await store.state(of) is None
        (written,) = await store.write([PutState(of, mark, None, STATE)])
        assert isinstance(written, StateWritten)
        assert await store.state(of) == (STATE, written.etag)
        assert await store.write([DropState(of, mark, written.etag)]) == [StateWritten("")]

        (written,) = await store.write([PutDocument("default", "orders", None, POLICY)])
        assert isinstance(written, DocumentWritten)
        assert await store.document("default", "orders") == (POLICY, written.etag)

        expected = Stored(of, mark, HEAD, b"\x91claimed")
        assert (await store.ready("default", "orders", 0, limit=10)).records == [expected]
        assert (await store.list("default", "orders", Box.LIVE)).records == [expected]
        assert (await store.counts("default", "orders", 0)).bytes == len(PAYLOAD)
        assert await store.queues() == [("default", "orders")]
        assert await store.commit([Remove(of, mark)]) == [Removed()]
        assert await store.get("default", "orders", of.id) is None
        assert await store.payload(of) is None
        assert await store.verify() == []

    run(scenario())


def test_an_empty_payload_is_sealed_too() -> None:
    async def scenario() -> None:
        inner = memory()
        store = await opened(inner)
        of, _ = await add(store, item(1), payload=b"")
        assert await store.payload(of) == b""
        assert await inner.payload(of) != b""

    run(scenario())


def test_commit_passes_on_what_is_in_the_way() -> None:
    async def scenario() -> None:
        store = await opened(memory())
        of, mark = await add(store, item(1))
        outcomes = await store.commit([update(of, mark, want=True), insert(item(1))])
        assert outcomes == [Conflict(Cause.ABORTED), Conflict(Cause.EXISTS, of.id)]
        outcomes = await store.commit([update(of, mark, want=True), insert(item(2))])
        assert isinstance(outcomes[0], Updated)
        assert outcomes[0].payload == PAYLOAD
        assert isinstance(outcomes[1], Inserted)

    run(scenario())


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, 5 * CHUNK_BYTES + 11])
def test_a_payload_stored_apart(size: int) -> None:
    async def scenario() -> None:
        inner = memory()
        store = await opened(inner)
        data = os.urandom(size)
        blob = await store.write_blob("default", "orders", item(1).id, pieces(data[: size // 3], data[size // 3 :]), 0)
        assert blob.size == size
        of, mark = await add(store, item(1, external=True), blob)
        assert await collect(store.read_blob(of)) == data
        assert await store.payload(of) == b""
        (outcome,) = await store.write([update(of, mark, want=True)])
        assert isinstance(outcome, Updated)
        assert outcome.payload == b""
        assert await store.verify() == []
        async for chunk in store.read_blob(of):
            assert len(chunk) <= 1 << 20

    run(scenario())


def test_what_breaks_off_while_it_streams_in_is_passed_on() -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield bytes(CHUNK_BYTES + 1)
        raise ConnectionError("the other side went away")

    async def scenario() -> None:
        inner = memory()
        store = await opened(inner)
        with pytest.raises(ConnectionError, match="went away"):
            await store.write_blob("default", "orders", item(1).id, broken(), 0)
        assert inner.statistics()["blobs"] == 0

    run(scenario())


def test_a_reader_may_leave_early() -> None:
    closed = []

    class Watched(MemoryStore):
        async def read_blob(self, item: Item) -> AsyncIterator[bytes]:
            try:
                async for piece in super().read_blob(item):
                    yield piece
            finally:
                closed.append(item.id)

    async def scenario() -> None:
        store = await opened(Watched(clock=ManualClock()))
        blob = await store.write_blob("default", "orders", item(1).id, pieces(bytes(8 * CHUNK_BYTES)), 0)
        of, _ = await add(store, item(1, external=True), blob)
        chunks = store.read_blob(of)
        assert len(await anext(chunks)) == CHUNK_BYTES
        await chunks.aclose()  # type: ignore[attr-defined]
        assert closed == [of.id]

    run(scenario())


# What the storage shows


def test_the_storage_shows_no_secret() -> None:
    async def fill(store: EncryptedStore | MemoryStore) -> None:
        of, mark = await add(store, item(1, group="customer-7"), unique=Unique("invoice-9", 0, 1000))
        await store.write([PutState(of, mark, None, STATE), PutDocument("default", "orders", None, POLICY)])
        blob = await store.write_blob("default", "orders", item(2).id, pieces(PAYLOAD), 0)
        await add(store, item(2, external=True), blob)
        dead, mark = await add(store, item(3))
        await store.write([update(dead, mark, box=Box.DEAD)])

    async def scenario() -> None:
        plain, inner = memory(), memory()
        await fill(plain)
        await fill(await opened(inner))
        for secret in SECRETS:
            assert secret in raw(plain), "the test looks in the wrong place"
            assert secret not in raw(inner)

    run(scenario())


def test_equal_messages_do_not_look_equal() -> None:
    async def scenario() -> None:
        inner = memory()
        store = await opened(inner)
        records = []
        for number in (1, 2):
            of, _ = await add(store, item(number))
            records.append(await inner.get("default", "orders", of.id, payload=True))
        first, second = (record for record in records if record is not None)
        assert first.head[20:] != second.head[20:]
        assert first.payload != second.payload

    run(scenario())


# Ordering and dedup


def test_groups_and_unique_keys_do_their_work_across_processes_and_rotations() -> None:
    async def scenario() -> None:
        inner = memory()
        store = await opened(inner)
        first, mark = await add(store, item(1, group="customer-7"), unique=Unique("invoice-9", 0, 1000))
        assert first.group not in {None, "customer-7"}
        rotated = await opened(inner.share(), Keyring({"a": bytes(range(32)), "b": bytes(32)}))
        second, _ = await add(rotated, item(2, group="customer-7"))
        await add(rotated, item(3, group="customer-8"))
        page = await rotated.ready("default", "orders", 0, limit=10)
        assert [record.item.id for record in page.records] == [first.id, item(3).id]
        outcomes = await rotated.write([insert(item(4), unique=Unique("invoice-9", 500, 1500))])
        assert outcomes == [Conflict(Cause.UNIQUE, first.id)]
        assert isinstance((await rotated.write([insert(item(5), unique=Unique("invoice-8", 500, 1500))]))[0], Inserted)
        await rotated.write([Remove(first, mark)])
        page = await rotated.ready("default", "orders", 0, limit=10)
        assert second.id in [record.item.id for record in page.records]

    run(scenario())


# Tampering


@pytest.mark.parametrize("part", ["head", "status", "payload", "state"])
def test_a_part_of_another_message_does_not_open(part: str) -> None:
    async def scenario() -> None:
        inner = memory()
        store = await opened(inner)
        victim, victim_mark = await add(store, item(1))
        other, other_mark = await add(store, item(2))
        await store.write([PutState(victim, victim_mark, None, STATE), PutState(other, other_mark, None, STATE)])
        records = inner._data.queues[QueueName("default", "orders")].by_id
        change(inner, victim, **{part: getattr(records[other.id], part)})
        with pytest.raises(Tampered, match=rf"^{part} of message {victim.id} in default/orders"):
            await (store.state(victim) if part == "state" else store.get("default", "orders", victim.id, payload=True))
        assert await store.get("default", "orders", other.id, payload=True) is not None

    run(scenario())


@pytest.mark.parametrize("part", ["head", "status", "payload", "state"])
def test_a_changed_or_cut_part_does_not_open(part: str) -> None:
    async def scenario() -> None:
        inner = memory()
        store = await opened(inner)
        of, mark = await add(store, item(1))
        await store.write([PutState(of, mark, None, STATE)])
        sealed = getattr(inner._data.queues[QueueName("default", "orders")].by_id[of.id], part)
        changed = [flip(sealed, at) for at in range(len(sealed))]
        for bad in (*changed, sealed[:-1], sealed[:20], b"", sealed + b"\0"):
            change(inner, of, **{part: bad})
            with pytest.raises((CryptoError, StoreMismatch), match=rf"^{part} of message {of.id}"):
                await (store.state(of) if part == "state" else store.get("default", "orders", of.id, payload=True))
        change(inner, of, **{part: sealed})
        assert await store.get("default", "orders", of.id, payload=True) is not None

    run(scenario())


def test_documents_do_not_move_between_queues() -> None:
    async def scenario() -> None:
        inner = memory()
        store = await opened(inner)
        await store.write([PutDocument("default", queue, None, POLICY) for queue in ("one", "two")])
        sealed = await inner.document("default", "one")
        etag = await inner.document("default", "two")
        assert sealed is not None
        assert etag is not None
        await inner.write([PutDocument("default", "two", etag.etag, sealed.data)])
        with pytest.raises(Tampered, match="the document of queue default/two"):
            await store.document("default", "two")
        assert [problem.where for problem in await store.verify()] == ["queue default/two"]

    run(scenario())


SEALED_CHUNK = CHUNK_BYTES + TAG_BYTES
BLOB_CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "nothing left": lambda sealed: b"",
    "header cut": lambda sealed: sealed[: HEADER_BYTES - 1],
    "header only": lambda sealed: sealed[:HEADER_BYTES],
    "cut at a chunk's end": lambda sealed: sealed[: HEADER_BYTES + SEALED_CHUNK],
    "cut by a byte": lambda sealed: sealed[:-1],
    "a byte more": lambda sealed: sealed + b"x",
    "first byte": lambda sealed: flip(sealed, 0),
    "salt": lambda sealed: flip(sealed, 20),
    "in the middle": lambda sealed: flip(sealed, len(sealed) // 2),
    "last byte": flip,
    "swapped": lambda sealed: (
        sealed[:HEADER_BYTES]
        + sealed[HEADER_BYTES + SEALED_CHUNK : HEADER_BYTES + 2 * SEALED_CHUNK]
        + sealed[HEADER_BYTES : HEADER_BYTES + SEALED_CHUNK]
        + sealed[HEADER_BYTES + 2 * SEALED_CHUNK :]
    ),
    "plain": lambda sealed: b"in its place" * 100,
}


@pytest.mark.parametrize("name", BLOB_CHANGES)
def test_a_changed_payload_stored_apart_never_ends_well(name: str) -> None:
    async def scenario() -> None:
        inner = memory()
        store = await opened(inner)
        data = os.urandom(2 * CHUNK_BYTES + 100)
        blob = await store.write_blob("default", "orders", item(1).id, pieces(data), 0)
        of, _ = await add(store, item(1, external=True), blob)
        stored = inner._data.blobs[blob.name]
        sealed = stored.data
        inner._data.blobs[blob.name] = stored._replace(data=BLOB_CHANGES[name](sealed))
        read = bytearray()

        async def take() -> None:
            async for chunk in store.read_blob(of):
                read.extend(chunk)

        with pytest.raises(Tampered, match=rf"^payload of message {of.id}"):
            await take()
        assert data.startswith(bytes(read))
        assert [problem.where for problem in await store.verify()] == [f"message {of.id}"]

    run(scenario())


def test_a_stream_key_that_the_store_lacks() -> None:
    async def scenario() -> None:
        inner = memory()
        store = await opened(inner)
        blob = await store.write_blob("default", "orders", item(1).id, pieces(b"x"), 0)
        of, _ = await add(store, item(1, external=True), blob)
        stored = inner._data.blobs[blob.name]
        sealed = stored.data
        inner._data.blobs[blob.name] = stored._replace(data=sealed[:6] + b"\x05" + sealed[7:])
        with pytest.raises(UnknownKey, match="needs stream key 5, which the store lacks"):
            await collect(store.read_blob(of))

    run(scenario())


# One bad record among good ones


async def with_bad(inner: MemoryStore, numbers: set[int], of: int) -> EncryptedStore:
    store = await opened(inner)
    for number in range(1, of + 1):
        await store.write([Insert(item(number), number, 50, HEAD, STATUS, PAYLOAD)])
        if number in numbers:
            change(inner, item(number), head=b"\xc1M\x01\x01agarbage" + bytes(40))
    return store


def test_a_bad_record_does_not_hide_the_others(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        store = await with_bad(memory(), {1, 3}, of=5)
        told: list[tuple[str, str]] = []
        store.on_bad_record = lambda item, error: told.append((item.id, error.code))
        good = [item(number).id for number in (2, 4, 5)]
        for _ in range(2):
            page = await store.ready("default", "orders", 100, limit=10)
            assert [record.item.id for record in page.records] == good
            assert [record.item.id for record in await store.expired(100, limit=10)] == good
            assert [record.item.id for record in (await store.list("default", "orders", Box.LIVE)).records] == good
        assert told == [(item(1).id, "tampered"), (item(3).id, "tampered")]
        assert store.statistics()["crypto_unreadable"] == 2
        with pytest.raises(Tampered, match=f"^head of message {item(1).id} in default/orders does not open"):
            await store.get("default", "orders", item(1).id)

    with caplog.at_level(logging.ERROR, "millpond.crypto"):
        run(scenario())
    assert [record.getMessage() for record in caplog.records] == ["millpond.crypto.record_unreadable"] * 2
    assert caplog.records[0].__dict__["message_id"] == item(1).id
    assert caplog.records[0].__dict__["code"] == "tampered"


def test_bad_records_do_not_use_up_the_limit() -> None:
    async def scenario() -> None:
        store = await with_bad(memory(), {1, 2, 3, 5}, of=7)
        page = await store.ready("default", "orders", 100, limit=1)
        assert [record.item.id for record in page.records] == [item(4).id]
        assert page.more
        page = await store.ready("default", "orders", 100, limit=2)
        assert [record.item.id for record in page.records] == [item(4).id, item(6).id]
        assert page.more
        page = await store.ready("default", "orders", 100, limit=3)
        assert [record.item.id for record in page.records] == [item(4).id, item(6).id, item(7).id]
        assert not page.more
        assert [record.item.id for record in await store.expired(100, limit=2)] == [item(4).id, item(6).id]

    run(scenario())


def test_a_search_ends_where_nothing_opens() -> None:
    async def scenario() -> None:
        store = await with_bad(memory(), {1, 2, 3}, of=3)
        page = await store.ready("default", "orders", 100, limit=1)
        assert (page.records, page.more) == ([], False)
        assert await store.expired(100, limit=1) == []

    run(scenario())


def test_listing_page_by_page_passes_bad_records() -> None:
    async def scenario() -> None:
        store = await with_bad(memory(), {1, 2, 4}, of=5)
        ids, after = [], None
        while True:
            page = await store.list("default", "orders", Box.LIVE, after=after, limit=2)
            ids += [record.item.id for record in page.records]
            after = page.next_after
            if after is None:
                break
        assert ids == [item(3).id, item(5).id]

    run(scenario())


def test_long_listings_let_others_run() -> None:
    async def scenario() -> None:
        store = await opened(memory())
        await store.write([insert(item(number)) for number in range(1, 1001)])
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(count())
        page = await store.ready("default", "orders", 0, limit=1000)
        task.cancel()
        assert len(page.records) == 1000
        assert turns >= 3

    run(scenario())


def test_a_claim_that_went_through_is_no_error_when_its_payload_does_not_open() -> None:
    async def scenario() -> None:
        inner = memory()
        store = await opened(inner)
        bad, bad_mark = await add(store, item(1))
        good, good_mark = await add(store, item(2))
        change(inner, bad, payload=b"garbage")
        told: list[tuple[str, str]] = []
        store.on_bad_record = lambda item, error: told.append((item.id, str(error)))
        outcomes = await store.write([update(bad, bad_mark, want=True), update(good, good_mark, want=True)])
        assert [outcome.payload for outcome in outcomes if isinstance(outcome, Updated)] == [None, PAYLOAD]
        assert [id for id, _ in told] == [bad.id]
        with pytest.raises(Tampered, match=rf"^payload of message {bad.id} in default/orders is not a ciphertext"):
            await store.payload(bad)

    run(scenario())


def test_reports_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millpond.stores.encrypted.MAX_REMEMBERED", 2)

    async def scenario() -> None:
        store = await opened(memory())
        told: list[str] = []
        store.on_bad_record = lambda item, error: told.append(item.id)
        for number in (1, 2, 2, 3, 1):
            store.report(item(number), MillpondError("bad"))
        assert told == [item(number).id for number in (1, 2, 3, 1)]

    run(scenario())


def test_verify_finds_what_does_not_open() -> None:
    async def scenario() -> None:
        inner = memory()
        store = await with_bad(inner, {2}, of=3)
        change(inner, item(3), payload=b"\xc1M")
        problems = await store.verify()
        assert [problem.where for problem in problems] == [f"message {item(2).id}", f"message {item(3).id}"]
        assert "head of message" in problems[0].what
        assert "payload of message" in problems[1].what

    run(scenario())


def test_an_operator_can_discard_what_does_not_open_and_nothing_else() -> None:
    async def scenario() -> None:
        store = await with_bad(memory(), {1}, of=2)
        assert not await store.discard_unreadable("default", "orders", item(2).id)
        assert not await store.discard_unreadable("default", "orders", item(3).id)
        assert await store.discard_unreadable("default", "orders", item(1).id)
        assert not await store.discard_unreadable("default", "orders", item(1).id)
        assert (await store.counts("default", "orders", 100)).ready == 1

    run(scenario())


# The wrong keyring, and none


def test_a_keyring_that_is_not_this_stores_is_refused_when_it_opens() -> None:
    async def scenario() -> None:
        inner = memory()
        await opened(inner)
        with pytest.raises(UnknownKey, match=r"the store's key document needs root key 'a', .* \(it has b\)"):
            await opened(inner.share(), OTHER)
        with pytest.raises(Tampered, match="another root key of the same id"):
            await opened(inner.share(), Keyring({"a": bytes(32)}))

    run(scenario())


def test_a_failed_opening_closes_the_inner_store() -> None:
    async def scenario() -> None:
        inner = memory()
        await opened(inner)
        other = inner.share()
        with pytest.raises(UnknownKey):
            await opened(other, OTHER)
        with pytest.raises(StoreClosed):
            await other.queues()

    run(scenario())


def test_a_plain_store_is_refused_when_it_is_opened_with_a_keyring() -> None:
    async def scenario() -> None:
        inner = memory()
        await add(inner, item(1))
        with pytest.raises(StoreMismatch, match="this store is not encrypted, but was opened with a keyring"):
            await opened(inner.share())
        assert await inner.document(*PLACE) is None

    run(scenario())


def test_an_encrypted_store_is_refused_without_a_keyring() -> None:
    async def scenario() -> None:
        inner = memory()
        await refuse_sealed(inner)
        store = await opened(inner)
        with pytest.raises(UnknownKey, match="this store is encrypted; give a keyring"):
            await refuse_sealed(inner)
        of, _ = await add(store, item(1))
        record = await inner.get("default", "orders", of.id)
        assert record is not None
        with pytest.raises(UnknownKey, match=f"head of message {of.id} is encrypted; give a keyring"):
            codec.decode_head(record.head, of.id)
        with pytest.raises(UnknownKey, match=f"status of message {of.id} is encrypted; give a keyring"):
            codec.decode_status(record.status, of.id)

    run(scenario())


def test_a_plain_message_planted_in_an_encrypted_store_is_not_believed() -> None:
    async def scenario() -> None:
        inner = memory()
        store = await opened(inner)
        of, _ = await add(inner, item(1))
        with pytest.raises(StoreMismatch, match="is not encrypted"):
            await store.get("default", "orders", of.id)
        assert (await store.ready("default", "orders", 0, limit=1)).records == []

    run(scenario())


def test_two_that_make_the_vault_at_once_agree() -> None:
    async def scenario() -> None:
        inner = memory()
        first, second = EncryptedStore(inner, RING), EncryptedStore(inner.share(), RING)
        await asyncio.gather(first.open(), second.open())
        of, _ = await add(first, item(1, group="customer-7"))
        await add(second, item(2, group="customer-7"))
        page = await second.ready("default", "orders", 0, limit=2)
        assert [record.item.id for record in page.records] == [of.id]

    run(scenario())


def test_who_writes_the_vault_second_takes_the_first_ones() -> None:
    class Slow(MemoryStore):
        """Does not see the vault at the first look."""

        looks = 0

        async def document(self, namespace: str, queue: str) -> Any:
            self.looks += 1
            return None if self.looks == 1 else await super().document(namespace, queue)

        async def queues(self) -> Any:
            return []

    async def scenario() -> None:
        inner = memory()
        first = await opened(inner)
        late = Slow(clock=ManualClock())
        late._data = inner._data
        second = await opened(late)
        assert late.looks == 2
        groups = {(await add(store, item(n, group="g")))[0].group for n, store in enumerate((first, second))}
        assert len(groups) == 1

    run(scenario())


def test_a_closed_store_holds_no_keys() -> None:
    async def scenario() -> None:
        store = EncryptedStore(memory(), RING)
        with pytest.raises(StoreClosed, match="not open"):
            await store.write([insert(item(1, group="g"))])
        await store.open()
        await store.close()
        await store.close()
        with pytest.raises(StoreClosed):
            await store.write_blob("default", "orders", item(1).id, pieces(b"x"), 0)
        with pytest.raises(StoreClosed):
            await store.get("default", "orders", item(1).id)

    run(scenario())


def test_feeds_and_figures_pass_through() -> None:
    async def scenario() -> None:
        inner = memory()
        store, other = await opened(inner), await opened(inner.share())
        assert (store.capabilities.encrypted, inner.capabilities.encrypted) == (True, False)
        assert store.capabilities.name == inner.capabilities.name
        woken = asyncio.Event()
        subscription = store.subscribe("default", "orders", woken.set)
        await add(other, item(1))
        await asyncio.wait_for(woken.wait(), 5)
        subscription.close()
        assert {"ops", "ciphers_cached", "crypto_unreadable"} <= store.statistics().keys()
        await store.write_blob("default", "orders", item(9).id, pieces(b"x"), 0)
        assert await store.sweep(10_000, older_than=1, limit=10) == 1

    run(scenario())


def test_a_reseal_is_sealed() -> None:
    async def scenario() -> None:
        inner = memory()
        store = await opened(inner)
        of, mark = await add(store, item(1))
        (outcome,) = await store.write([Reseal(of, mark, HEAD, STATUS, PAYLOAD, None)])
        assert isinstance(outcome, Updated)
        assert b"secret-" not in raw(inner)
        assert await store.get("default", "orders", of.id, payload=True) == Stored(
            of, outcome.mark, HEAD, STATUS, PAYLOAD
        )

    run(scenario())
