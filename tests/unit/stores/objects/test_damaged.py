"""Damaged objects of a bucket: they are listed, each with what is wrong, and can be discarded, by id or by name."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest
from tests.unit.stores.objects.late import Scripted

from millpond.crypto.keyring import Keyring
from millpond.errors import (
    InvalidInput,
    InvalidMessageId,
    MessageNotFound,
    MillpondError,
    StoreBusy,
    StoreCorrupt,
    StoreMismatch,
    Tampered,
)
from millpond.model.clock import ManualClock
from millpond.stores.base import Store
from millpond.stores.encrypted import EncryptedStore
from millpond.stores.memory import MemoryStore
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.store import ObjectStore
from millpond.testing import TestPond, pond

FOLDER = "q/default/orders/"


class Bench:
    """A bucket, and ponds on it."""

    def __init__(self, around: Callable[[ObjectStore], Store] = lambda store: store) -> None:
        self.clock = ManualClock()
        self.bucket = MemoryBucket(clock=self.clock)
        self.around = around
        self.ponds = 0
        self.network: Scripted

    @asynccontextmanager
    async def pond(self) -> AsyncIterator[TestPond]:
        """One that knows nothing of what is there."""
        self.ponds += 1
        self.network = Scripted(self.bucket.share())
        chance = random.Random(self.ponds)
        store = ObjectStore(self.network, clock=self.clock, measure_skew=False, random_bytes=chance.randbytes)
        async with pond(store=self.around(store), clock=self.clock, seed=self.ponds) as opened:
            yield opened

    def names(self, folder: str) -> list[str]:
        """Objects of the queue, below one of its folders."""
        return sorted(name for name in self.bucket.objects if name.startswith(FOLDER + folder))

    async def damage(self, path: str, change: Callable[[bytes], bytes]) -> None:
        """Write something else over an object."""
        content = await self.bucket.read(path)
        assert content is not None
        await self.bucket.replace(path, change(content.data), content.tag)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def rubbish(data: bytes) -> bytes:
    return b"\xc1" * len(data)


def zeros(data: bytes) -> bytes:
    return bytes(len(data))


def newer(data: bytes) -> bytes:
    fields = msgspec.msgpack.decode(data[4 : 4 + int.from_bytes(data[:4])])
    body = msgspec.msgpack.encode([99, *fields[1:]])
    return len(body).to_bytes(4) + body + bytes(len(data) - 4 - len(body))


def of_another(data: bytes) -> bytes:
    """As if the object had been copied from another queue."""
    return data.replace(b"orders", b"others")


DAMAGES = [cut, rubbish, zeros, newer, of_another]


@pytest.mark.parametrize("change", DAMAGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
async def test_a_damaged_message_is_listed_and_discarded(
    change: Callable[[bytes], bytes], dead: bool, by_name: bool
) -> None:
    bench = Bench()
    async with bench.pond() as before:
        orders = before.queue("orders")
        id = (await orders.enqueue(b"bad")).message_id
        if dead:
            [message] = await orders.receive()
            await message.bury("reason")
        good = (await orders.enqueue(b"good")).message_id
    [path] = [name for name in bench.names("d/" if dead else "m/") if id.replace("-", "") in name]
    await bench.damage(path, change)
    async with bench.pond() as opened:
        [(told, error)] = await opened.unreadable("orders")
        assert told == id
        assert isinstance(error, StoreMismatch if change is newer else StoreCorrupt)
        assert f"object {path}" in str(error)
        await opened.discard_unreadable("orders", path if by_name else id)
        assert await opened.unreadable("orders") == []
        assert await opened.verify() == []
        for what in (path, id):
            with pytest.raises((MessageNotFound, InvalidInput)):
                await opened.discard_unreadable("orders", what)
        assert [message.id for message in await opened.queue("orders").receive(count=5)] == [good]
        # Its tombstone goes in a minute.
        bench.clock.advance(61)
        await opened.queue("orders").peek(5)
        await opened.queue("orders").dead_letters.list()
        await opened.settle()
        assert path not in bench.bucket.objects


async def test_what_can_be_read_is_not_discarded() -> None:
    bench = Bench()
    async with bench.pond() as opened:
        orders = opened.queue("orders")
        id = (
            await orders.enqueue(
                b"1", ordering_key="a", dedup_key="k", message_id="01977420-dc00-7000-8000-000000000009"
            )
        ).message_id
        [message] = await orders.receive()
        objects = dict(bench.bucket.objects)
        assert await opened.unreadable("orders") == []
        for what in (id, *bench.names("m/"), *bench.names("u/"), *bench.names("i/"), *bench.names("g/")):
            with pytest.raises(InvalidInput, match="can be read"):
                await opened.discard_unreadable("orders", what)
        assert bench.bucket.objects == objects
        await message.ack()


@pytest.mark.parametrize(
    "what",
    [
        "q/default/other/m/4/x",
        "q/default/orders/policy",
        "q/default/orders/b/x",
        "q/default/orders/m/4/picture.jpeg",
        "millpond.json",
        "/",
    ],
)
async def test_what_is_none_of_the_queues_objects_is_refused(what: str) -> None:
    bench = Bench()
    async with bench.pond() as opened:
        await opened.queue("orders").enqueue(b"1")
        await bench.bucket.create("q/default/orders/m/4/picture.jpeg", b"somebody else's")
        objects = dict(bench.bucket.objects)
        # It is in nobody's way, and not Millpond's to remove; `verify` names it.
        assert await opened.unreadable("orders") == []
        with pytest.raises(InvalidInput):
            await opened.discard_unreadable("orders", what)
        assert bench.bucket.objects == objects


@pytest.mark.parametrize("folder", ["m/4/" + "0" * 32 + "-" + "0" * 32 + "-1--", "u/x", "i/" + "0" * 32, "g/x"])
async def test_what_is_not_there_is_not_found(folder: str) -> None:
    bench = Bench()
    async with bench.pond() as opened:
        with pytest.raises(MessageNotFound, match="there is no object"):
            await opened.discard_unreadable("orders", FOLDER + folder)


async def test_an_object_that_changes_meanwhile_is_left() -> None:
    bench = Bench()
    async with bench.pond() as opened:
        orders = opened.queue("orders")
        id = (await orders.enqueue(b"1", dedup_key="k")).message_id
        [path, marker] = bench.names("m/") + bench.names("u/")
        for name in (path, marker):
            await bench.damage(name, rubbish)

        async def rule(kind: str, name: str) -> str | None:
            if kind == "replace":
                await bench.damage(name, zeros if bench.bucket.objects[name][:1] == b"\xc1" else rubbish)
            return None

        bench.network.rule = rule
        for what in (id, path, marker):
            with pytest.raises(StoreBusy, match="is being changed; try again"):
                await opened.discard_unreadable("orders", what)


async def test_a_damaged_message_of_an_ordering_key_lets_the_next_one_out() -> None:
    bench = Bench()
    async with bench.pond() as before:
        first = (await before.queue("orders").enqueue(b"1", ordering_key="a")).message_id
        [message] = await before.queue("orders").receive()
        await message.nack()
        bench.clock.advance(0.001)
        second = (await before.queue("orders").enqueue(b"2", ordering_key="a")).message_id
    await bench.damage(bench.names("m/")[0], cut)
    async with bench.pond() as opened:
        assert await opened.queue("orders").receive() == []
        await opened.discard_unreadable("orders", first)
        assert [message.id for message in await opened.queue("orders").receive()] == [second]


# Markers and pointers


async def test_a_dedup_key_whose_marker_is_damaged_becomes_free() -> None:
    bench = Bench()
    async with bench.pond() as opened:
        orders = opened.queue("orders")
        first = await orders.enqueue(b"1", dedup_key="k")
        [path] = bench.names("u/")
        await bench.damage(path, rubbish)
        with pytest.raises(StoreCorrupt):
            await orders.enqueue(b"2", dedup_key="k")
        [(told, error)] = await opened.unreadable("orders")
        assert (told, type(error)) == (path, StoreCorrupt)
        await opened.discard_unreadable("orders", path)
        assert await opened.unreadable("orders") == []
        second = await orders.enqueue(b"2", dedup_key="k")
        assert (second.duplicate, second.message_id == first.message_id) == (False, False)
        assert await orders.enqueue(b"3", dedup_key="k") == (second.message_id, True)
        await bench.damage(path, zeros)
        await opened.discard_unreadable("orders", path)
        await opened.collect()
        assert bench.names("u/") == []


@pytest.mark.parametrize("where", ["live", "dead", "redriven"])
async def test_the_marker_of_an_id_is_written_anew(where: str) -> None:
    bench = Bench()
    async with bench.pond() as before:
        orders = before.queue("orders")
        id = (await orders.enqueue(b"1", message_id="01977420-dc00-7000-8000-000000000009")).message_id
        if where != "live":
            [message] = await orders.receive()
            await message.bury("reason")
        if where == "redriven":
            await orders.dead_letters.redrive()
    [path] = bench.names("i/")
    await bench.damage(path, cut)
    async with bench.pond() as opened:
        orders = opened.queue("orders")
        with pytest.raises(StoreCorrupt):
            await orders.enqueue(b"2", message_id=id)
        assert [told for told, _ in await opened.unreadable("orders")] == [path]
        await opened.discard_unreadable("orders", path)
        assert await opened.unreadable("orders") == []
        assert (await opened.queue("orders").get(id)).id == id
        assert await orders.enqueue(b"2", message_id=id) == (id, True)
        if where == "dead":
            assert await orders.dead_letters.redrive() == 1
            assert (await opened.queue("orders").get(id)).id == id
    async with bench.pond() as after:
        assert (await after.queue("orders").get(id)).id == id
        assert [message.id for message in await after.queue("orders").receive()] == [id]


async def test_the_marker_of_an_id_without_its_message_goes() -> None:
    bench = Bench()
    async with bench.pond() as opened:
        orders = opened.queue("orders")
        id = (await orders.enqueue(b"1", message_id="01977420-dc00-7000-8000-000000000009")).message_id
        [message] = await orders.receive()
        await message.ack()
        [path] = bench.names("i/")
        await bench.damage(path, rubbish)
        await opened.discard_unreadable("orders", path)
        assert bench.names("i/") == []
        assert await orders.enqueue(b"2", message_id=id) == (id, False)


@pytest.mark.parametrize("held", [False, True])
async def test_the_pointer_of_an_ordering_key_is_written_anew(held: bool) -> None:
    bench = Bench()
    async with bench.pond() as before:
        orders = before.queue("orders")
        ids = []
        for number in range(3):
            ids.append((await orders.enqueue(b"%d" % number, ordering_key="a")).message_id)
            bench.clock.advance(0.001)
        [message] = await orders.receive()
        if not held:
            await message.nack()
        [path] = bench.names("g/")
        await bench.damage(path, rubbish)
        async with bench.pond() as opened:
            assert await opened.queue("orders").receive() == []
            [(told, error)] = await opened.unreadable("orders")
            assert (told, type(error)) == (path, StoreCorrupt)
            await opened.discard_unreadable("orders", path)
            assert await opened.unreadable("orders") == []
            if held:
                assert await opened.queue("orders").receive(count=5) == []
                await message.ack()
                ids.pop(0)
            for id in ids:
                [message] = await opened.queue("orders").receive(count=5)
                assert message.id == id
                await message.ack()
            await bench.damage(path, zeros)
            await opened.discard_unreadable("orders", path)
            assert bench.names("g/") == []


@pytest.mark.parametrize("what", ["pointer", "leader"])
async def test_a_damaged_ordering_key_holds_up_nobody_else(what: str) -> None:
    bench = Bench()
    async with bench.pond() as before:
        orders = before.queue("orders")
        for number in range(2):
            await orders.enqueue(b"%d" % number, ordering_key="a", priority=9)
            bench.clock.advance(0.001)
        [leader] = bench.names("m/o/")[1:]
        other = (await orders.enqueue(b"other")).message_id
        if what == "leader":
            # As if the first had come later, by another's clock, but before it in order.
            [first] = bench.names("m/o/")[:1]
            kept = bench.bucket.objects[first]
            await bench.bucket.delete(first)
            [message] = await orders.receive()
            await message.nack()
            await bench.bucket.create(first, kept)
    await bench.damage(leader if what == "leader" else (await _pointed(bench)), rubbish)
    async with bench.pond() as opened:
        orders = opened.queue("orders")
        assert [message.id for message in await orders.receive()] == [other]
        counts = await orders.counts()
        assert (counts.ready, counts.blocked, counts.leased) == (0, 2, 1)
        # And it is not tried again at each look.
        bench.network.reset()
        assert await orders.receive() == []
        assert bench.network.count("read", "replace") == 0
        # But after a while: somebody else may have mended it.
        if what == "leader":
            await opened.discard_unreadable("orders", leader)
        else:
            await bench.bucket.delete(bench.names("g/")[0])
        bench.clock.advance(61)
        # In which order is open: who lost a race keeps out of others' way.
        assert {message.payload for message in await orders.receive(count=5)} == {b"0", b"other"}


async def _pointed(bench: Bench) -> str:
    """The pointer; with one message of the key handed out and given back, so that there is one."""
    async with bench.pond() as opened:
        [message] = await opened.queue("orders").receive()
        assert message.payload == b"0"
        await message.defer()
    [path] = bench.names("g/")
    return path


async def test_the_pointer_names_who_is_held_before_who_is_first() -> None:
    bench = Bench()
    async with bench.pond() as opened:
        orders = opened.queue("orders")
        for number in range(2):
            await orders.enqueue(b"%d" % number, ordering_key="a")
            bench.clock.advance(0.001)
        # As if the first had come later, by another's clock, but before it in order.
        [first, leader] = bench.names("m/o/")
        kept = bench.bucket.objects[first]
        await bench.bucket.delete(first)
        [message] = await orders.receive()
        await bench.bucket.create(first, kept)
        [path] = bench.names("g/")
        await bench.damage(path, rubbish)
        async with bench.pond() as other:
            await other.discard_unreadable("orders", path)
            assert await other.queue("orders").receive(count=5) == []
        assert FOLDER + msgspec.msgpack.decode(bench.bucket.objects[path])[2] == leader
        await message.ack()
        assert [message.payload for message in await orders.receive(count=5)] == [b"0"]


async def test_a_pointer_that_somebody_is_about_to_delete_is_not_asked_for_again_and_again() -> None:
    bench = Bench()
    async with bench.pond() as opened:
        orders = opened.queue("orders")
        await orders.enqueue(b"1", ordering_key="a")
        [message] = await orders.receive()
        await message.ack()
        [path] = bench.names("g/")

        def going(data: bytes) -> bytes:
            return msgspec.msgpack.encode([*msgspec.msgpack.decode(data)[:3], True])

        await bench.damage(path, going)
        await orders.enqueue(b"2", ordering_key="a")
    async with bench.pond() as other:
        assert await other.queue("orders").receive() == []
        assert bench.network.count() < 30
        bench.clock.advance(31)
        assert len(await other.queue("orders").receive()) == 1


# Encrypted, and stores of other kinds


def _sealed(store: ObjectStore) -> Store:
    return EncryptedStore(store, Keyring({"key": bytes(32)}))


@pytest.mark.parametrize("by_name", [False, True])
async def test_both_kinds_of_damage_in_an_encrypted_bucket(by_name: bool) -> None:
    bench = Bench(_sealed)
    async with bench.pond() as before:
        ids = [(await before.queue("orders").enqueue(b"%d" % number)).message_id for number in range(3)]
    cut_short, changed, _ = sorted(bench.names("m/"))
    await bench.damage(cut_short, cut)

    def flip(data: bytes) -> bytes:
        fields = msgspec.msgpack.decode(data[4 : 4 + int.from_bytes(data[:4])])
        fields[16] = fields[16][:-1] + bytes([fields[16][-1] ^ 1])
        body = msgspec.msgpack.encode(fields)
        return len(body).to_bytes(4) + body + bytes(len(data) - 4 - len(body))

    await bench.damage(changed, flip)
    async with bench.pond() as opened:
        found: dict[str, MillpondError] = dict(await opened.unreadable("orders"))
        assert {id: type(error) for id, error in found.items()} == {ids[0]: StoreCorrupt, ids[1]: Tampered}
        await opened.discard_unreadable("orders", cut_short if by_name else ids[0])
        await opened.discard_unreadable("orders", ids[1])
        assert await opened.unreadable("orders") == []
        assert [message.id for message in await opened.queue("orders").receive(count=5)] == [ids[2]]
        with pytest.raises(InvalidInput, match="can be read"):
            await opened.discard_unreadable("orders", ids[2])


@pytest.mark.parametrize("sealed", [False, True])
async def test_other_stores_know_no_objects(sealed: bool) -> None:
    store: Store = MemoryStore(clock=ManualClock())
    async with pond(store=EncryptedStore(store, Keyring({"key": bytes(32)})) if sealed else store) as opened:
        with pytest.raises(InvalidMessageId):
            await opened.discard_unreadable("orders", "q/default/orders/u/x")
