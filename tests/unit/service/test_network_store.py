"""What the service does for a store that several machines share: ids, times, hand-offs."""

from __future__ import annotations

import asyncio
import io
import uuid
from typing import Any

import pytest
from tests.unit.service.far import Far

import millpond.testing
from millpond import Keyring, StoreError
from millpond.model.clock import ManualClock
from millpond.stores.base import Insert, Reach, Store
from millpond.stores.encrypted import EncryptedStore
from millpond.stores.faulty import FaultyStore
from millpond.stores.memory import MemoryStore
from millpond.stores.sqlite import SqliteStore

START = ManualClock().now_ms()
CHOSEN = "0197a3c2-0000-7000-8000-000000000001"


def inserts(store: FaultyStore) -> list[Insert]:
    """Every insert that the store was asked for."""
    return [op for call in store.calls for op in call.ops if isinstance(op, Insert)]


def told(id: str) -> int:
    """The time that a UUIDv7 tells, ms UTC."""
    return uuid.UUID(id).int >> 80


async def test_the_id_of_a_delayed_message_tells_when_it_is_due() -> None:
    clock = ManualClock()
    store = FaultyStore(MemoryStore(clock=clock))
    async with millpond.testing.pond(store=store, clock=clock) as pond:
        queue = pond.queue("q")
        now = await queue.enqueue(b"now")
        later = await queue.enqueue(b"later", delay=60)
        streamed = await queue.enqueue(io.BytesIO(bytes(100_000)), delay=60)
        many = await queue.enqueue_many([b"a", b"b", b"c"], delay=60)
        grouped = await queue.enqueue(b"g", delay=60, ordering_key="k")
        streamed_group = await queue.enqueue(io.BytesIO(bytes(100_000)), delay=60, ordering_key="k")
        assert [told(one.message_id) for one in (now, grouped, streamed_group)] == [START] * 3
        assert [told(one.message_id) for one in (later, streamed, *many)] == [START + 60_000] * 5
        ids = [one.message_id for one in (later, streamed, *many)]
        assert ids == sorted(ids)
        assert all(told(op.item.id) == op.due for op in inserts(store) if op.item.group is None)
        assert not any(op.chosen for op in inserts(store))


async def test_a_chosen_id_is_said_to_be_one() -> None:
    clock = ManualClock()
    bare = FaultyStore(MemoryStore(clock=clock))
    store = EncryptedStore(bare, Keyring({"k": bytes(32)}))
    async with millpond.testing.pond(store=store, clock=clock) as pond:
        queue = pond.queue("q")
        await queue.enqueue(b"x")
        await queue.enqueue(b"x", message_id=CHOSEN, delay=60)
        streamed = await queue.enqueue(io.BytesIO(bytes(100_000)), message_id=CHOSEN.replace("1", "2"))
        [message] = await queue.receive()
        await message.ack(then=[("next", b"y"), ("next", b"z", {"message_id": CHOSEN.replace("1", "3")})])
        assert streamed.message_id == CHOSEN.replace("1", "2")
        assert [op.chosen for op in inserts(bare)] == [False, True, True, False, True]


async def test_the_times_of_a_network_store_are_corrected() -> None:
    clock = ManualClock()
    store = Far(clock, reach=Reach.NETWORK)
    async with millpond.testing.pond(store=store, clock=clock) as pond:
        queue = pond.queue("q")
        store.clock_offset = 90_000
        receipt = await queue.enqueue(b"x", visibility=30)
        assert told(receipt.message_id) == START + 90_000
        [message] = await queue.receive()
        assert message.lease.until_ms == START + 120_000
        store.clock_offset = 120_000
        [again] = await queue.receive()
        assert (again.id, again.failures) == (message.id, 1), "the lease is over by the time all go by"


async def test_who_waits_on_a_network_store_goes_by_its_time() -> None:
    clock = ManualClock()
    store = Far(clock, reach=Reach.NETWORK, change_feed=False)
    async with millpond.testing.pond(store=store, clock=clock) as pond:
        store.clock_offset = -5_000
        await pond.queue("q").enqueue(b"x", delay=2)
        task = asyncio.create_task(pond.queue("q").receive(wait=100))
        await pond.advance(1.9)
        assert not task.done()
        await pond.advance(0.1)
        [message] = await task
        assert message.payload == b"x"


async def test_the_clock_of_other_stores_is_not_touched(tmp_path: Any) -> None:
    clock = ManualClock()
    async with millpond.testing.pond(store=Far(clock, reach=Reach.HOST), clock=clock) as pond:
        assert pond.clock is clock
    stores: list[Store] = [MemoryStore(clock=clock), SqliteStore(tmp_path / "q.db", clock=clock)]
    stores += [EncryptedStore(stores[0], Keyring({"k": bytes(32)})), FaultyStore(stores[0])]
    assert [store.clock_offset for store in stores] == [0, 0, 0, 0]
    far = Far(clock)
    far.clock_offset = 7
    around: list[Store] = [EncryptedStore(far, Keyring({"k": bytes(32)})), FaultyStore(far)]
    assert [store.clock_offset for store in around] == [7, 7]


@pytest.mark.parametrize("able", ["hand_offs", "atomic_groups", ""])
async def test_a_hand_off_needs_a_store_that_can(able: str) -> None:
    clock = ManualClock()
    store = Far(clock, **{"atomic_groups": False} | ({able: True} if able else {}))
    async with millpond.testing.pond(store=store, clock=clock) as pond:
        await pond.queue("q").enqueue(b"x")
        [message] = await pond.queue("q").receive()
        if able:
            await message.ack(then=[("next", b"y")])
        else:
            with pytest.raises(StoreError, match="enqueue first"):
                await message.ack(then=[("next", b"y")])
        assert len(await pond.queue("next").receive()) == (1 if able else 0)
