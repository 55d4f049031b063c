"""How many requests an operation costs."""

from __future__ import annotations

import pytest
from tests.unit.stores.objects.rig import NOW, Rig, apply, fresh, give_back, insert, lease

from millpond.stores.base import Box, Insert, Inserted, PutState, Remove, Removed, Unique, Update, Updated
from millpond.stores.objects.store import ObjectStore

FAR = NOW + 500_000


async def _life(producer: ObjectStore, consumer: ObjectStore, op: Insert) -> None:
    await insert(producer, op)
    [record] = (await consumer.ready("default", "q", NOW, limit=10)).records
    held = await apply(consumer, lease(record, FAR, want_payload=True))
    assert isinstance(held, Updated)
    assert held.payload == b"payload"
    assert isinstance(await apply(consumer, Remove(record.item, held.mark)), Removed)


async def test_a_life_in_one_process_is_three_requests_and_a_listing() -> None:
    rig = Rig()
    store = await rig.store()
    network = rig.network(store)
    await _life(store, store, fresh(1))
    assert [kind for kind, _ in network.calls] == ["create", "list", "replace", "delete"]


async def test_a_life_across_two_processes_is_four_requests_and_a_listing() -> None:
    rig = Rig()
    producer, consumer = await rig.store(), await rig.store()
    await _life(producer, consumer, fresh(1))
    assert [kind for kind, _ in rig.network(producer).calls] == ["create"]
    assert [kind for kind, _ in rig.network(consumer).calls] == ["list", "read", "replace", "delete"]


async def test_a_removal_that_must_be_fenced_is_one_request_more() -> None:
    for options, until in (({"fenced_removals": True}, FAR), ({}, NOW + 15_000)):
        rig = Rig(**options)
        store = await rig.store()
        record = await insert(store, fresh(1))
        held = await apply(store, lease(record, until))
        assert isinstance(held, Updated)
        rig.network(store).reset()
        assert isinstance(await apply(store, Remove(record.item, held.mark)), Removed)
        assert [kind for kind, _ in rig.network(store).calls] == ["replace", "delete"]
        assert [name for name in rig.root.objects if "/m/" in name] == []


async def test_only_who_was_given_the_message_deletes_it_without_a_condition() -> None:
    """Another process that answers under the same lease knows less: it asks."""
    rig = Rig()
    store, other = await rig.store(), await rig.store()
    record = await insert(store, fresh(1))
    held = await apply(store, lease(record, FAR))
    assert isinstance(held, Updated)
    seen = await other.get("default", "q", record.item.id)
    assert seen is not None
    rig.network(other).reset()
    assert isinstance(await apply(other, Remove(seen.item, seen.mark)), Removed)
    assert [kind for kind, _ in rig.network(other).calls] == ["replace", "delete"]


async def test_many_lives_share_their_listings() -> None:
    rig = Rig()
    producer, consumer = await rig.store(), await rig.store()
    for number in range(100):
        await insert(producer, fresh(number))
    page = await consumer.ready("default", "q", NOW, limit=1000)
    assert len(page.records) == 100
    for record in page.records:
        held = await apply(consumer, lease(record, FAR))
        assert isinstance(held, Updated)
        await apply(consumer, Remove(record.item, held.mark))
    network = rig.network(consumer)
    assert (network.count("list"), network.count("read")) == (1, 100)
    assert (network.count("replace"), network.count("delete"), len(network.calls)) == (100, 100, 301)


async def test_an_idle_queue_costs_one_request_a_look() -> None:
    rig = Rig()
    store = await rig.store()
    assert (await store.ready("default", "q", NOW, limit=10)).next_due is None
    assert len(rig.network(store).calls) == 1
    for number in range(10):
        await insert(store, fresh(number, due=FAR + number, priority=number))
    other = await rig.store()
    page = await other.ready("default", "q", NOW, limit=10)
    assert (page.records, page.more, page.next_due) == ([], False, FAR)
    assert len(rig.network(other).calls) == 1


async def test_what_others_hold_is_not_read_before_half_of_its_lease_is_over() -> None:
    rig = Rig()
    holder, other = await rig.store(), await rig.store()
    for number in range(5):
        await apply(holder, lease(await insert(holder, fresh(number)), NOW + 30_000))
    network = rig.network(other)
    page = await other.ready("default", "q", NOW, limit=10)
    # The size of an object tells that it stays held for 16 seconds at least.
    assert (page.records, page.next_due, network.count("read")) == ([], NOW + 16_000, 0)
    counts = await other.counts("default", "q", NOW + 15_999)
    assert (counts.leased, network.count("read")) == (5, 0)
    rig.clock.advance(16)
    page = await other.ready("default", "q", NOW + 16_000, limit=10)
    assert (page.records, page.next_due, network.count("read")) == ([], NOW + 30_000, 5)
    await other.ready("default", "q", NOW + 29_999, limit=10)
    assert network.count("read") == 5
    assert len((await other.ready("default", "q", NOW + 30_000, limit=10)).records) == 5
    assert network.count("read") == 5


async def test_what_waits_after_a_nack_is_not_read_before_half_of_its_delay_is_over() -> None:
    rig = Rig()
    store, other = await rig.store(), await rig.store()
    record = await insert(store, fresh(1))
    held = await apply(store, lease(record, FAR))
    assert isinstance(held, Updated)
    await apply(store, give_back(record.item, held.mark, NOW + 100_000))
    page = await other.ready("default", "q", NOW, limit=10)
    assert (page.records, page.next_due) == ([], NOW + 64_000)
    assert rig.network(other).count("read") == 0
    rig.clock.advance(100)
    assert len((await other.ready("default", "q", NOW + 100_000, limit=10)).records) == 1


async def test_a_long_queue_is_listed_no_further_than_needed() -> None:
    rig = Rig(page_size=1000)
    store = await rig.store()
    await store.write([fresh(number, at=NOW - 5000 + number) for number in range(3000)])
    await store.write([fresh(5000 + number, due=FAR + number) for number in range(2000)])
    other = await rig.store()
    network = rig.network(other)
    page = await other.ready("default", "q", NOW, limit=20)
    assert (len(page.records), page.more) == (20, True)
    assert (network.count("list"), network.count("folder"), network.count("read")) == (1, 1, 20)
    network.reset()
    page = await other.ready("default", "q", NOW, limit=4000)
    assert (len(page.records), page.more, page.next_due) == (3000, False, FAR)
    # The last page of those that are due is followed by one that begins with those that are not.
    assert network.count("list") == 4


async def test_the_first_of_a_group_costs_a_pointer() -> None:
    rig = Rig()
    store = await rig.store()
    network = rig.network(store)
    for number in range(3):
        await insert(store, fresh(number, group="g"))
    network.reset()
    kinds = []
    for _ in range(3):
        [record] = (await store.ready("default", "q", NOW, limit=10)).records
        held = await apply(store, lease(record, FAR))
        assert isinstance(held, Updated)
        await apply(store, Remove(record.item, held.mark))
        kinds.append([kind for kind, _ in network.calls])
        network.reset()
    assert kinds == [
        ["list", "read", "create", "replace", "delete"],
        ["list", "replace", "replace", "delete"],
        ["list", "replace", "replace", "delete"],
    ]


async def test_a_leader_that_is_given_back_costs_nothing_more() -> None:
    rig = Rig()
    store = await rig.store()
    record = await insert(store, fresh(1, group="g"))
    held = await apply(store, lease(record, FAR))
    assert isinstance(held, Updated)
    back = await apply(store, give_back(record.item, held.mark, NOW))
    assert isinstance(back, Updated)
    rig.network(store).reset()
    again = Update(record.item, back.mark, FAR, True, None, Box.LIVE, b"held")
    assert isinstance(await apply(store, again), Updated)
    assert len(rig.network(store).calls) == 1


@pytest.mark.parametrize(
    ("op", "kinds"),
    [
        (fresh(1, unique=Unique("k", NOW, FAR)), ["create", "create", "replace"]),
        # The marker; a search for a message that the queue itself made the id for; the message; the marker again.
        (fresh(1, chosen=True), ["create", "folder", "list", "create", "replace"]),
    ],
    ids=["unique", "chosen"],
)
async def test_markers_cost_two_requests(op: Insert, kinds: list[str]) -> None:
    rig = Rig()
    store = await rig.store()
    await insert(store, op)
    assert [kind for kind, _ in rig.network(store).calls] == kinds


async def test_state_is_part_of_the_message() -> None:
    rig = Rig()
    store = await rig.store()
    record = await insert(store, fresh(1))
    held = await apply(store, lease(record, FAR))
    assert isinstance(held, Updated)
    rig.network(store).reset()
    await apply(store, PutState(record.item, held.mark, None, b"state"))
    assert [kind for kind, _ in rig.network(store).calls] == ["replace"]
    assert isinstance(await apply(store, Remove(record.item, held.mark)), Removed)
    assert rig.network(store).count() == 2


async def test_finding_a_message_by_id() -> None:
    rig = Rig()
    store, other = await rig.store(), await rig.store()
    direct, chosen = await insert(store, fresh(1)), await insert(store, fresh(2, chosen=True))
    network = rig.network(other)
    for record, kinds in ((direct, ["read", "folder", "list", "read"]), (chosen, ["read"] * 3)):
        for expected in (kinds, ["read"]):
            network.reset()
            found = await other.get("default", "q", record.item.id)
            assert isinstance(record, Inserted)
            assert found is not None
            assert found.mark == record.mark
            assert [kind for kind, _ in network.calls] == expected
