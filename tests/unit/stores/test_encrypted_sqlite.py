"""The encrypted SQLite store: what its files show, and a rekey of one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from millpond.crypto.keyring import Keyring
from millpond.model import codec
from millpond.model.clock import SystemClock
from millpond.model.message import Head, Lease, Status
from millpond.stores.base import Box, Insert, Inserted, Item, PutDocument, PutState, Store, Unique, Update, Updated
from millpond.stores.encrypted import EncryptedStore
from millpond.stores.rekey import rekey
from millpond.stores.sqlite import SqliteStore

OLD, NEW = bytes(range(32)), b"\x07" * 32
ID, APART = "0197a3c2-0000-7000-8000-000000000001", "0197a3c2-0000-7000-8000-000000000002"
WORDS = ("payload", "attribute", "content", "correlation", "ordering", "dedup", "error", "owner", "state", "policy")
LARGE = b"the-large-payload " * 20_000

HEAD = codec.encode(
    Head(
        1,
        ID,
        "default",
        "orders",
        0,
        5,
        3,
        1000,
        None,
        "the-dedup-key",
        "the-ordering-key",
        {"name": "the-attribute-text"},
        "the-correlation-id",
        "the-content-type",
        0,
        False,
    )
)
STATUS = codec.encode(Status(1, 0, 0, 1, 1, 1, None, Lease("id", 1, 9, "the-owner-name"), "the-error-text", None))


def files(directory: Path) -> bytes:
    """Everything on disk: the database, its log, and whatever lies beside them."""
    return b"".join(path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file())


async def large() -> AsyncIterator[bytes]:
    yield LARGE


async def fill(store: Store) -> None:
    unique = Unique("the-dedup-key", 0, 1000)
    of = Item("default", "orders", ID, 5, "the-ordering-key", 11, False)
    (outcome,) = await store.write([Insert(of, 0, None, HEAD, STATUS, b"the-payload-text", unique)])
    assert isinstance(outcome, Inserted)
    (changed,) = await store.write([Update(outcome.item, outcome.mark, 1, True, None, Box.LIVE, STATUS)])
    assert isinstance(changed, Updated)
    await store.write([PutState(outcome.item, changed.mark, None, b"the-state-text")])
    await store.write([PutDocument("default", "orders", None, b"the-policy-text")])
    blob = await store.write_blob("default", "orders", APART, large(), 0)
    apart = Item("default", "orders", APART, 5, None, len(LARGE), True)
    (outcome,) = await store.write([Insert(apart, 0, None, HEAD, STATUS, b"", None, blob.name)])
    assert isinstance(outcome, Inserted)


async def check(store: Store) -> None:
    record = await store.get("default", "orders", ID, payload=True)
    assert record is not None
    assert (record.head, record.status, record.payload) == (HEAD, STATUS, b"the-payload-text")
    state = await store.state(record.item)
    assert state is not None
    assert state.data == b"the-state-text"
    document = await store.document("default", "orders")
    assert document is not None
    assert document.data == b"the-policy-text"
    record = await store.get("default", "orders", APART)
    assert record is not None
    assert b"".join([chunk async for chunk in store.read_blob(record.item)]) == LARGE
    assert await store.verify() == []


def sqlite(directory: Path) -> SqliteStore:
    directory.mkdir(exist_ok=True)
    return SqliteStore(directory / "pond.db", clock=SystemClock())


def test_the_files_show_no_secret_while_open_and_when_closed(tmp_path: Path) -> None:
    async def scenario() -> None:
        shown = []
        stores: tuple[Store, Store] = (
            sqlite(tmp_path / "plain"),
            EncryptedStore(sqlite(tmp_path / "sealed"), Keyring({"a": OLD})),
        )
        for store, directory in zip(stores, (tmp_path / "plain", tmp_path / "sealed"), strict=True):
            await store.open()
            await fill(store)
            await check(store)
            shown.append(files(directory))
            await store.close()
            shown[-1] += files(directory)
        for word in WORDS:
            assert f"the-{word}".encode() in shown[0], "the test looks for the wrong thing"
            assert f"the-{word}".encode() not in shown[1]
        assert OLD not in shown[1]

    asyncio.run(scenario())


def test_after_a_rekey_the_new_key_alone_opens_the_file(tmp_path: Path) -> None:
    async def scenario() -> None:
        for ring, work in (
            (Keyring({"a": OLD}), fill),
            (Keyring({"a": OLD, "b": NEW}), rekey),
            (Keyring({"b": NEW}), check),
        ):
            store = EncryptedStore(sqlite(tmp_path), ring)
            await store.open()
            await work(store)
            await store.close()

    asyncio.run(scenario())
