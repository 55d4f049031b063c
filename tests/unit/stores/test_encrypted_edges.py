"""`millpond.stores.encrypted` where it meets its inner store at its worst: tiny pieces, races, not open."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import msgspec
import pytest

from millpond.crypto.keyring import Keyring
from millpond.errors import StoreBusy, StoreClosed, Tampered
from millpond.model.clock import ManualClock
from millpond.stores.base import Box, Cause, Conflict, Insert, Inserted, Item, Op, Outcome, PutState, Remove
from millpond.stores.encrypted import EncryptedStore
from millpond.stores.memory import MemoryStore

RING = Keyring({"a": bytes(range(32))})
ID = "0197a3c2-0000-7000-8000-000000000001"
EXTERNAL = Item("default", "q", ID, 5, None, 7, True)
BYTES = msgspec.msgpack.encode(["bytes"])


class Crumbs(MemoryStore):
    """Gives payloads out a byte at a time, and can lose every race."""

    losing = False

    async def read_blob(self, item: Item) -> AsyncIterator[bytes]:
        async for chunk in super().read_blob(item):
            for at in range(len(chunk)):
                yield chunk[at : at + 1]

    async def write(self, ops: Sequence[Op]) -> list[Outcome]:
        if self.losing:
            return [Conflict(Cause.STALE, ID) for _ in ops]
        return await super().write(ops)


async def opened(inner: MemoryStore, **options: bool) -> EncryptedStore:
    store = EncryptedStore(inner, RING, **options)
    await store.open()
    return store


async def source(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def add(store: EncryptedStore | MemoryStore, data: bytes = b"payload") -> Item:
    blob = await store.write_blob("default", "q", ID, source(data), 0)
    [outcome] = await store.write([Insert(EXTERNAL, 0, None, BYTES, BYTES, b"", None, blob.name)])
    assert isinstance(outcome, Inserted)
    return outcome.item


@pytest.mark.parametrize("accept_plain", [False, True])
@pytest.mark.parametrize("data", [b"", b"x", b"payload" * 300], ids=["empty", "byte", "more"])
async def test_a_payload_in_crumbs_is_read(data: bytes, accept_plain: bool) -> None:
    store = await opened(Crumbs(clock=ManualClock()), accept_plain=accept_plain)
    item = await add(store, data)
    assert b"".join([chunk async for chunk in store.read_blob(item)]) == data


@pytest.mark.parametrize("data", [b"", b"x", b"payload" * 300], ids=["empty", "byte", "more"])
async def test_a_plain_payload_in_crumbs_is_read_where_that_is_accepted(data: bytes) -> None:
    inner = Crumbs(clock=ManualClock())
    item = await add(inner, data)
    store = await opened(inner.share(), accept_plain=True)
    assert b"".join([chunk async for chunk in store.read_blob(item)]) == data
    strict = await opened(inner.share())
    with pytest.raises(Tampered):
        async for _ in strict.read_blob(item):
            pass


async def test_a_store_that_is_not_open_opens_nothing() -> None:
    inner = MemoryStore(clock=ManualClock())
    store = await opened(inner)
    item = await add(store)
    never = EncryptedStore(inner.share(), RING)
    with pytest.raises(StoreClosed, match="not open"):
        async for _ in never.read_blob(item):
            pass
    await store.close()
    for call in (store.get("default", "q", ID), store.list("default", "q", Box.LIVE)):
        with pytest.raises(StoreClosed):
            await call


async def test_discarding_what_is_being_changed_is_told() -> None:
    inner = Crumbs(clock=ManualClock())
    store = await opened(inner)
    item = await add(store)
    assert await store.discard_unreadable("default", "q", ID) is False, "it opens"
    inner._data.queues[next(iter(await inner.queues()))].by_key[item.key].head = b"\xc1M\x01\x01a broken"
    inner.losing = True
    with pytest.raises(StoreBusy, match="is being changed; try again"):
        await store.discard_unreadable("default", "q", ID)
    inner.losing = False
    assert await store.discard_unreadable("default", "q", ID) is True
    assert await store.discard_unreadable("default", "q", ID) is False


async def test_verify_reads_the_state_too() -> None:
    inner = MemoryStore(clock=ManualClock())
    store = await opened(inner)
    item = await add(store)
    stored = await store.get("default", "q", ID)
    assert stored is not None
    await store.write([PutState(item, stored.mark, None, b"state")])
    assert await store.verify() == []
    for queue in inner._data.queues.values():
        for record in queue.by_key.values():
            record.state = b"\x00" + (record.state or b"")[1:]
    [problem] = await store.verify()
    assert (problem.where, "state" in problem.what) == (f"message {ID}", True)
    await store.write([Remove(item, stored.mark)])
