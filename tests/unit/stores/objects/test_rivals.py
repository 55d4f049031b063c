"""Processes that compete for a queue share its messages, for the sake of thrift; and nothing is lost by it."""

from __future__ import annotations

import asyncio
import random

import pytest
from tests.unit.stores.objects.rig import Network, Rig, apply, fresh, insert, lease

from millpond.model.clock import ManualClock
from millpond.stores.base import Box, Inserted, Updated
from millpond.stores.conformance.harness import NOW
from millpond.stores.objects import names
from millpond.stores.objects.ready import LEFT_LYING, WINDOW_AGE
from millpond.stores.objects.rivals import ALIVE, MOST_RIVALS, NAME_BYTES, SAID_AGAIN, STRANGERS, Rivals
from millpond.stores.objects.store import ObjectStore

QUEUE = ("default", "q")
FAR = NOW + 10**9


def processes(number: int) -> tuple[ManualClock, list[Rivals]]:
    """So many that know of each other."""
    clock, chance = ManualClock(), random.Random(3)
    several = [Rivals(chance.randbytes(NAME_BYTES), clock) for _ in range(number)]
    for one in several:
        for other in several:
            one.heard(QUEUE, other.me, 0.0)
    return clock, several


@pytest.mark.parametrize("number", [2, 3, 8, 20])
def test_each_message_is_exactly_one_process_s_and_each_has_about_as_many(number: int) -> None:
    _, several = processes(number)
    shares = [one.share(QUEUE) for one in several]
    chance = random.Random(5)
    messages = [chance.getrandbits(128) for _ in range(2000)]
    owners = [[share is not None and share.has(message) for share in shares] for message in messages]
    assert all(sum(owner) == 1 for owner in owners)
    for each in range(number):
        assert 0.7 < sum(owner[each] for owner in owners) * number / len(messages) < 1.3


def test_consecutive_keys_are_shared_as_evenly_as_any() -> None:
    _, several = processes(4)
    share = several[0].share(QUEUE)
    assert share is not None
    assert 200 < sum(share.has(key) for key in range(1000)) < 300


def test_who_goes_gives_its_messages_away_and_changes_nothing_else() -> None:
    clock, several = processes(4)
    before = [one.share(QUEUE) for one in several]
    clock.advance(ALIVE - 1)
    for one in several:
        for other in several[:3]:
            one.heard(QUEUE, other.me, 0.0)
    clock.advance(2)
    after = [one.share(QUEUE) for one in several]
    chance = random.Random(1)
    for message in [chance.getrandbits(64) for _ in range(300)]:
        was = [share is not None and share.has(message) for share in before]
        now = [share is not None and share.has(message) for share in after[:3]]
        assert sum(now) == 1
        if not was[3]:
            assert now == was[:3]


def test_who_is_alone_shares_with_nobody() -> None:
    clock = ManualClock()
    one = Rivals(b"abcdef", clock)
    assert not one.met(QUEUE)
    one.heard(QUEUE, one.me, 0.0)
    assert not one.met(QUEUE)
    one.lost(QUEUE, None)
    assert one.met(QUEUE)
    assert one.share(QUEUE) is None
    for _ in range(8):
        assert one.met(QUEUE)
        one.won(QUEUE)
    assert not one.met(QUEUE)
    one.heard(QUEUE, b"others", ALIVE)
    assert not one.met(QUEUE)
    one.heard(QUEUE, b"others", ALIVE - 1)
    assert one.met(QUEUE)
    clock.advance(1.5)
    assert not one.met(QUEUE)


def test_no_more_are_remembered_than_there_is_room_for() -> None:
    clock = ManualClock()
    one = Rivals(b"abcdef", clock)
    for number in range(MOST_RIVALS + 10):
        clock.advance(0.1)
        one.heard(QUEUE, b"%6d" % number, 0.0)
    share = one.share(QUEUE)
    assert share is not None
    assert len(share.others) == MOST_RIVALS


def test_who_takes_messages_says_so_once_a_minute_and_who_takes_none_does_not() -> None:
    clock = ManualClock()
    one = Rivals(b"abcdef", clock)
    one.lost(QUEUE, b"others")
    assert one.wants_to_say(QUEUE)
    one.won(QUEUE)
    assert not one.wants_to_say(QUEUE)
    clock.advance(SAID_AGAIN)
    assert one.wants_to_say(QUEUE)
    clock.advance(SAID_AGAIN)
    assert not one.wants_to_say(QUEUE)
    one.won(QUEUE)
    assert one.wants_to_say(QUEUE)


def test_who_loses_to_strangers_looks_for_them_less_and_less_often() -> None:
    clock = ManualClock()
    one = Rivals(b"abcdef", clock)
    one.lost(QUEUE, b"others")
    assert one.wants_to_look(QUEUE)
    looks = 0
    for _ in range(64):
        clock.advance(STRANGERS)
        one.lost(QUEUE, None)
        looks += one.wants_to_look(QUEUE)
    assert looks == 6, "after 1, 2, 4, 8, 16 and 32 times that"
    one.wants_to_look(QUEUE)
    clock.advance(SAID_AGAIN - 1)
    one.lost(QUEUE, b"others")
    assert one.wants_to_look(QUEUE), "what was lost to nobody knows whom is not forgotten by that"
    clock.advance(SAID_AGAIN - 1)
    one.lost(QUEUE, b"others")
    assert not one.wants_to_look(QUEUE)
    clock.advance(1)
    assert one.wants_to_look(QUEUE)


# On a bucket


async def meet(rig: Rig, stores: list[ObjectStore]) -> None:
    """Each loses a message to another one, and looks."""
    for store, other in zip(stores, [*stores[1:], stores[0]], strict=True):
        store._engine.rivals.lost(QUEUE, other._engine.rivals.me)
        await store._presence.tell(QUEUE)
    rig.clock.advance(STRANGERS)
    for store in stores:
        store._engine.rivals.lost(QUEUE, None)
        await store._presence.tell(QUEUE)
        rig.network(store).reset()


async def ready(store: ObjectStore, limit: int = 8, now: int = NOW + 1000) -> list[int]:
    page = await store.ready(*QUEUE, now, limit=limit)
    return [int(record.item.id[-12:], 16) for record in page.records]


async def filled(rig: Rig, count: int, **options: int) -> dict[int, Inserted]:
    producer = await rig.store()
    return {n: await insert(producer, fresh(n, at=NOW + n, **options)) for n in range(count)}


async def test_those_who_have_met_take_different_messages_and_read_no_others() -> None:
    rig = Rig()
    await filled(rig, 400)
    stores = [await rig.store() for _ in range(4)]
    await meet(rig, stores)
    taken: list[int] = []

    async def consume(store: ObjectStore) -> None:
        while len(taken) < 320:
            for record in (await store.ready(*QUEUE, NOW + 1000, limit=8)).records:
                taken.append(int(record.item.id[-12:], 16))
                outcome = await apply(store, lease(record, FAR))
                assert isinstance(outcome, Updated), "a race was lost"

    await asyncio.gather(*map(consume, stores))
    assert len(taken) == len(set(taken))
    networks = [rig.network(store) for store in stores]
    assert sum(network.count("list") for network in networks) == 4
    # Of what was read all but what is at hand was taken.
    assert sum(network.count("read") for network in networks) == len(taken)


async def test_what_is_one_s_own_comes_in_order_and_what_is_others_after_it() -> None:
    rig = Rig()
    await filled(rig, 60)
    stores = [await rig.store() for _ in range(2)]
    await meet(rig, stores)
    share = stores[0]._engine.rivals.share(QUEUE)
    assert share is not None
    own = [n for n in range(60) if share.has(names.id_number(fresh(n, at=NOW + n).item.id))]
    assert 20 < len(own) < 40
    seen: list[int] = []
    while len(seen) < 60:
        page = await stores[0].ready(*QUEUE, NOW + 1000, limit=8)
        assert page.records
        for record in page.records:
            seen.append(int(record.item.id[-12:], 16))
            assert isinstance(await apply(stores[0], lease(record, FAR)), Updated)
    assert seen[: len(own)] == own
    assert sorted(seen) == list(range(60))
    assert await ready(stores[0]) == []


async def test_a_higher_priority_comes_first_whosever_it_is() -> None:
    rig = Rig()
    producer = await rig.store()
    for n in range(40):
        await insert(producer, fresh(n, at=NOW + n, priority=9 if n >= 30 else 5))
    stores = [await rig.store() for _ in range(2)]
    await meet(rig, stores)
    seen: list[int] = []
    while len(seen) < 10:
        for record in (await stores[0].ready(*QUEUE, NOW + 1000, limit=2)).records:
            seen.append(int(record.item.id[-12:], 16))
            assert isinstance(await apply(stores[0], lease(record, FAR)), Updated)
    assert sorted(seen[:10]) == list(range(30, 40))


async def test_what_was_chosen_and_not_taken_is_offered_again_without_a_request() -> None:
    rig = Rig()
    await filled(rig, 60)
    stores = [await rig.store() for _ in range(2)]
    await meet(rig, stores)
    first = await ready(stores[0], 4)
    network = rig.network(stores[0])
    network.reset()
    assert await ready(stores[0], 4) == first
    assert network.calls == []
    again = await ready(stores[0], 8)
    assert again[:4] == first
    assert network.count() == network.count("read") == 4


async def test_what_another_process_leaves_lying_is_anybody_s_after_a_while() -> None:
    rig = Rig()
    await filled(rig, 200)
    stores = [await rig.store() for _ in range(2)]
    await meet(rig, stores)
    own = set(await ready(stores[0], 200))
    assert 60 < len(own) < 140
    late = NOW + 100_000
    rig.clock.advance(LEFT_LYING - 1)
    assert set(await ready(stores[0], 200, late)) == own
    rig.clock.advance(max(WINDOW_AGE, 1) + 1)
    left = [n for n in range(200) if n not in own]
    found = await ready(stores[0], 200, late)
    assert own | set(left[:50]) <= set(found), "the first ones of the other's, which has taken nothing for so long"
    assert found == sorted(found)


async def test_who_meets_somebody_deals_out_anew_what_he_has_listed() -> None:
    rig = Rig()
    await filled(rig, 300)
    stores = [await rig.store() for _ in range(3)]
    await meet(rig, stores[:2])
    await ready(stores[0], 4)
    stores[0]._engine.rivals.heard(QUEUE, stores[2]._engine.rivals.me, 0.0)
    share = stores[0]._engine.rivals.share(QUEUE)
    assert share is not None
    network = rig.network(stores[0])
    network.reset()
    found = await ready(stores[0], 60)
    assert all(share.has(names.id_number(fresh(n, at=NOW + n).item.id)) for n in found[4:])
    assert network.count("list") == 0


async def test_presence_is_said_by_those_who_lose_and_ends_with_them() -> None:
    rig = Rig()
    records = await filled(rig, 20)
    store, other = await rig.store(), await rig.store()

    def there() -> list[str]:
        return [name for name in rig.root.objects if "/c/" in name]

    await ready(store)
    assert isinstance(await apply(other, lease(records[0], FAR)), Updated)
    assert await ready(other) != []
    assert there() == []
    await apply(store, lease(records[0], FAR))
    await ready(store)
    assert there() == [names.consumer(*QUEUE, store._engine.rivals.me)]
    first = rig.root.objects[there()[0]]
    for n in range(1, 10):
        rig.clock.advance(SAID_AGAIN / 5)
        assert isinstance(await apply(store, lease(records[n], FAR)), Updated)
        await ready(store)
    assert rig.root.objects[there()[0]] != first
    assert await store.queues() == [QUEUE]
    assert await store.verify() == []
    await store.close()
    assert there() == []


async def test_a_presence_that_cannot_be_written_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    records = await filled(rig, 5)
    store, other = await rig.store(), await rig.store()
    await ready(store)
    assert isinstance(await apply(other, lease(records[0], FAR)), Updated)
    await apply(store, lease(records[0], FAR))
    network: Network = rig.network(store)
    network.reset({1: "refused"})
    assert {*await ready(store)} < {1, 2, 3, 4}
    assert [record.message for record in caplog.records] == ["millpond.objects.presence_failed"]


async def test_what_a_killed_process_said_goes_with_the_sweep_an_hour_later() -> None:
    rig = Rig()
    store = await rig.store()
    await insert(store, fresh(1))
    await rig.root.create(names.consumer(*QUEUE, b"killed"), b"x")
    await rig.root.create(names.consumers(*QUEUE) + "whatever", b"x")
    store._engine.rivals.lost(QUEUE, None)
    await ready(store)
    share = store._engine.rivals.share(QUEUE)
    assert share is not None
    assert len(share.others) == 1
    await store.sweep(NOW, older_than=3_600_000, limit=100)
    assert len([name for name in rig.root.objects if "/c/" in name]) == 3
    rig.clock.advance(3700)
    await store.sweep(NOW + 3_700_000, older_than=3_600_000, limit=100)
    assert [name for name in rig.root.objects if "/c/" in name] == []


async def test_who_must_not_spread_says_nothing() -> None:
    rig = Rig(spread=False)
    records = await filled(rig, 5)
    store, other = await rig.store(), await rig.store()
    await ready(store)
    assert isinstance(await apply(other, lease(records[0], FAR)), Updated)
    await apply(store, lease(records[0], FAR))
    assert await ready(store) == [1, 2, 3, 4]
    assert not [name for name in rig.root.objects if "/c/" in name]
    listed = await store.list(*QUEUE, Box.LIVE)
    assert len(listed.records) == 5
