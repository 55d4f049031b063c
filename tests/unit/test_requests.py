"""What a pond's requests were: those of its store, set against what came of them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

import millpond.testing
from millpond import Keyring, PondRequests, QueueRequests, Requests
from millpond.model.clock import ManualClock
from millpond.requests import since, snapshot
from millpond.stores.base import Capabilities, QueueName
from millpond.stores.encrypted import EncryptedStore
from millpond.stores.faulty import FaultyStore
from millpond.stores.memory import MemoryStore

A, B = QueueName("default", "a"), QueueName("shop", "b")


class Charging:
    """A memory store that says what it takes, and has the counts that a test gives it."""

    def __init__(self, clock: ManualClock) -> None:
        self.inner = MemoryStore(clock=clock, takes=False)
        self.counts: dict[QueueName | None, Requests] = {}

    @property
    def capabilities(self) -> Capabilities:
        return msgspec.structs.replace(self.inner.capabilities, requests_cost_money=True)

    def requests(self) -> dict[QueueName | None, Requests]:
        return dict(self.counts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_counts_add_up() -> None:
    one = Requests(creates=1, replaces=2, reads=3, deletes=4, lists=5, parts=6, bytes_sent=7, bytes_received=8)
    assert one.total == 21
    assert one.plus(Requests(reads=1, bytes_sent=1)).minus(one) == Requests(reads=1, bytes_sent=1)


def test_a_snapshot_sets_requests_against_messages() -> None:
    found = snapshot({None: Requests(lists=2), A: Requests(creates=4, deletes=4)}, {A: 2, B: 1})
    assert found.queues == {
        A: QueueRequests(Requests(creates=4, deletes=4), 2),
        B: QueueRequests(Requests(), 1),
    }
    assert (found.total, found.acknowledged) == (Requests(creates=4, deletes=4, lists=2), 3)
    assert found.per_message == pytest.approx(10 / 3)
    assert found.queues[A].per_message == 4
    assert QueueRequests(Requests(lists=1), 0).per_message is None
    assert snapshot({None: Requests(lists=1)}, {}).per_message is None


def test_the_difference_of_two_snapshots_has_what_came_between() -> None:
    earlier = snapshot({None: Requests(lists=2), A: Requests(creates=4)}, {A: 2})
    now = snapshot({None: Requests(lists=3), A: Requests(creates=4), B: Requests(reads=1)}, {A: 2, B: 1})
    assert since(now, earlier) == PondRequests({B: QueueRequests(Requests(reads=1), 1)}, Requests(lists=1))
    assert since(now, now) == PondRequests({}, Requests())


@pytest.mark.parametrize("around", ["", "encrypted", "faulty"])
async def test_a_pond_tells_what_its_messages_took(around: str) -> None:
    clock = ManualClock()
    charging = Charging(clock)
    store: Any = charging
    if around == "encrypted":
        store = EncryptedStore(charging, Keyring({"k": bytes(32)}))
    elif around == "faulty":
        store = FaultyStore(charging)
    async with millpond.testing.pond(store=store, clock=clock) as pond:
        a, b = pond.queue("a"), pond.queue("b", namespace="shop")
        assert pond.requests() == PondRequests({}, Requests())
        await a.enqueue_many([b"1", b"2", b"3", b"4"])
        await b.enqueue_many([b"5", b"6"])
        messages = await a.receive(3)
        await messages[0].ack()
        await a.ack_many(messages[1:])
        [message] = await b.receive()
        await message.ack(then=[("a", b"7")])
        # What is not acked is not counted: given up, given back, purged.
        [message] = await a.receive()
        await message.bury("no")
        [message] = await b.receive()
        await message.nack()
        await a.purge()
        charging.counts = {None: Requests(lists=1), A: Requests(creates=10, bytes_sent=5)}
        found = pond.requests()
        assert found.queues == {
            A: QueueRequests(Requests(creates=10, bytes_sent=5), 3),
            B: QueueRequests(Requests(), 1),
        }
        assert (found.per_message, found.queues[A].per_message) == (11 / 4, 10 / 3)
        assert pond.statistics()["requests"] == {
            **msgspec.structs.asdict(Requests(creates=10, lists=1, bytes_sent=5)),
            "acknowledged": 4,
            "queues": {
                "default/a": {**msgspec.structs.asdict(Requests(creates=10, bytes_sent=5)), "acknowledged": 3},
                "shop/b": {**msgspec.structs.asdict(Requests()), "acknowledged": 1},
            },
        }
        pond.reset_requests()
        assert pond.requests() == PondRequests({}, Requests())
        charging.counts[A] = Requests(creates=12, bytes_sent=5)
        assert pond.requests() == PondRequests({A: QueueRequests(Requests(creates=2), 0)}, Requests())


async def test_a_store_that_charges_nothing_counts_nothing() -> None:
    async with millpond.testing.pond() as pond:
        await pond.queue("a").enqueue(b"1")
        [message] = await pond.queue("a").receive()
        await message.ack()
        assert pond.requests() == PondRequests({}, Requests())
        assert pond.statistics()["requests"] == {}
        assert not pond.service.acks
