"""The ready cache on its own: what it holds, in which order, and what it knows that it does not hold."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.service.bench import record

from millpond.service import ready
from millpond.service.ready import DUE_REFRESH, MAX_AGE, ReadyCache, Record

NOW = 1_000
UNTIL = NOW + 30_000


def cache_of(*records: Record, capacity: int = 100, more: bool = False, next_due: int | None = None) -> ReadyCache:
    """A cache just refilled with these."""
    cache = ReadyCache(capacity)
    seen = max((one.item.key for one in records), default=0)
    cache.fill(list(records), more=more, next_due=next_due, monotonic=0.0, seen=seen)
    return cache


def drain(cache: ReadyCache) -> list[int]:
    """Take everything out; the insertion keys in the order in which they came."""
    found = []
    while (one := cache.pop(UNTIL)) is not None:
        found.append(one.item.key)
    return found


def rank(one: Record) -> tuple[int, int, int]:
    return -one.item.priority, one.mark.due, one.item.key


def mixed(count: int, seed: int = 0) -> list[Record]:
    chance = random.Random(seed)
    records = [record(n, priority=chance.randrange(10), due=chance.randrange(5)) for n in range(1, count + 1)]
    chance.shuffle(records)
    return records


# Order


@pytest.mark.parametrize("how", ["offered", "filled", "both"])
def test_priority_then_due_time_then_insertion(how: str) -> None:
    records = mixed(60)
    filled, offered = {"offered": ([], records), "filled": (records, []), "both": (records[:30], records[30:])}[how]
    cache = cache_of(*filled)
    for one in offered:
        cache.offer(one, NOW)
    assert len(cache) == 60
    expected = [one.item.key for one in sorted(records, key=rank)]
    assert [one.item.key for one in cache.peek(60)] == expected
    assert [one.item.key for one in cache.peek(5)] == expected[:5]
    assert len(cache) == 60
    assert drain(cache) == expected
    assert (len(cache), cache.peek(5), cache.inflight) == (0, [], 60)


def test_what_was_taken_and_given_back_is_in_its_place_again() -> None:
    records = mixed(20)
    cache = cache_of(*records)
    taken = [cache.pop(UNTIL) for _ in range(10)]
    assert cache.inflight == 10
    for one in reversed(taken):
        assert one is not None
        cache.give_back(one)
    assert (len(cache), cache.inflight) == (20, 0)
    assert drain(cache) == [one.item.key for one in sorted(records, key=rank)]


# In flight


def test_a_candidate_is_out_of_the_cache_and_known_to_be_out() -> None:
    one = record(1)
    cache = cache_of(one)
    assert cache.pop(UNTIL) is one
    assert cache.is_inflight(one.id)
    assert (len(cache), cache.peek(1), cache.pop(UNTIL)) == (0, [], None)


def test_a_refill_passes_over_what_is_being_handed_out_whatever_its_version() -> None:
    cache = cache_of(record(1), record(2))
    taken = cache.pop(UNTIL)
    assert taken is not None
    cache.fill([record(1, etag="newer"), record(2), record(3)], more=False, next_due=None, monotonic=1.0)
    assert drain(cache) == [2, 3]


def test_a_candidate_whose_fate_is_decided_can_come_again() -> None:
    cache = cache_of(record(1))
    cache.pop(UNTIL)
    cache.settle(record(1).id)
    assert (cache.inflight, cache.is_inflight(record(1).id)) == (0, False)
    cache.settle(record(1).id)
    cache.fill([record(1, etag="newer")], more=False, next_due=None, monotonic=1.0)
    assert drain(cache) == [1]


def test_a_candidate_is_given_back_once() -> None:
    one = record(1)
    cache = cache_of(one)
    cache.give_back(one)  # It is not out.
    cache.pop(UNTIL)
    cache.give_back(one)
    cache.give_back(one)
    assert len(cache) == 1
    assert drain(cache) == [1]
    cache.settle(one.id)
    cache.give_back(one)  # Its fate was decided meanwhile.
    assert len(cache) == 0


def test_marks_of_takers_that_vanished_run_out() -> None:
    cache = cache_of(record(1), record(2), record(3))
    for until in (100, 200, 300):
        cache.pop(until)
    assert cache.release_overdue(99) == 0
    assert cache.release_overdue(200) == 2
    assert [cache.is_inflight(record(n).id) for n in (1, 2, 3)] == [False, False, True]
    cache.fill([record(1), record(2), record(3)], more=False, next_due=None, monotonic=1.0)
    assert drain(cache) == [1, 2]


def test_a_message_that_comes_back_from_its_consumer_can_be_handed_out_at_once() -> None:
    cache = cache_of(record(1))
    cache.pop(UNTIL)
    cache.offer(record(1, etag="after the nack"), NOW)
    assert cache.inflight == 0
    back = cache.pop(UNTIL)
    assert back is not None
    assert back.etag == "after the nack"


def test_what_is_gone_is_forgotten_in_either_place() -> None:
    cache = cache_of(record(1), record(2), record(3))
    cache.pop(UNTIL)
    for number in (1, 2, 9):
        cache.forget(record(number).id)
    assert cache.inflight == 0
    assert drain(cache) == [3]


def test_only_the_newest_version_is_handed_out() -> None:
    cache = cache_of(record(1, etag="v1"))
    for version in ("v2", "v3"):
        cache.offer(record(1, etag=version, priority=9 if version == "v2" else 1), NOW)
    assert len(cache) == 1
    assert [one.etag for one in cache.peek(5)] == ["v3"]
    taken = cache.pop(UNTIL)
    assert taken is not None
    assert taken.etag == "v3"
    assert cache.pop(UNTIL) is None


# Bounds


def test_no_more_than_its_capacity() -> None:
    cache = cache_of(capacity=10)
    for number in range(1, 10_001):
        cache.offer(record(number), NOW, inserted=True)
        assert len(cache) == min(number, 10)
        assert cache.more is (number > 10)
    assert drain(cache) == list(range(1, 11))


def test_a_refill_is_cut_to_the_capacity() -> None:
    cache = cache_of(*[record(n) for n in range(1, 51)], capacity=10)
    assert len(cache) == 10
    assert cache.more
    assert drain(cache) == list(range(1, 11))


def test_what_is_given_back_to_a_full_cache_does_not_make_it_larger() -> None:
    cache = cache_of(*[record(n) for n in range(1, 11)], capacity=10)
    taken = [cache.pop(UNTIL) for _ in range(5)]
    for number in range(11, 16):
        cache.offer(record(number), NOW, inserted=True)
    for one in taken:
        assert one is not None
        cache.give_back(one)
    assert len(cache) == 10
    assert cache.inflight == 0
    # What it has no room for, and what may rank first, the store is asked for before anything else is handed out.
    assert cache.more
    assert cache.wants_refill(NOW, 0.0)


def test_beyond_the_last_one_known_it_claims_to_know_nothing() -> None:
    """With 5 left out, 6 must not be handed out before it; what ranks before 5 may come in."""
    cache = cache_of(record(1), record(2), capacity=2)
    cache.offer(record(5), NOW, inserted=True)
    cache.offer(record(9), NOW, inserted=True)
    assert drain(cache) == [1, 2]
    cache.offer(record(6), NOW, inserted=True)
    assert len(cache) == 0
    cache.offer(record(7, priority=9), NOW, inserted=True)
    assert drain(cache) == [7]
    assert cache.more


def test_after_a_page_of_many_only_what_ranks_within_it_is_kept() -> None:
    cache = cache_of(record(1), record(2, due=500), more=True)
    cache.offer(record(3, due=400), NOW)
    cache.offer(record(4, due=600), NOW)
    assert cache.more
    assert drain(cache) == [1, 3, 2]


def test_after_the_whole_queue_was_read_everything_is_kept() -> None:
    cache = cache_of(record(1), more=False)
    cache.offer(record(2, priority=0), NOW, inserted=True)
    assert not cache.more
    assert drain(cache) == [1, 2]


def test_a_refill_begins_with_a_clean_slate() -> None:
    cache = cache_of(record(1), record(2), capacity=2)
    cache.offer(record(3), NOW, inserted=True)
    cache.fill([record(3)], more=False, next_due=None, monotonic=1.0, seen=3)
    cache.offer(record(4), NOW, inserted=True)
    assert not cache.more
    assert drain(cache) == [3, 4]


def test_an_insert_that_a_refill_has_read_already_is_no_news() -> None:
    """It may be with a consumer by now, or done."""
    cache = ReadyCache(10)
    cache.fill([], more=False, next_due=None, monotonic=0.0, seen=7)
    cache.offer(record(7), NOW, inserted=True)
    assert len(cache) == 0
    cache.offer(record(8), NOW, inserted=True)
    cache.offer(record(6), NOW)  # Not new: it came back.
    assert drain(cache) == [6, 8]


def test_a_new_cache_knows_nothing() -> None:
    cache = ReadyCache(10)
    assert cache.more
    assert cache.next_due is None
    assert cache.wants_refill(NOW, 0.0)
    cache.offer(record(1), NOW, inserted=True)
    assert cache.wants_refill(NOW, 0.0)


# Due times


def test_what_is_not_due_is_remembered_by_its_time_alone() -> None:
    cache = cache_of()
    for due in (NOW + 50, NOW + 20, NOW + 90):
        cache.offer(record(due, due=due), NOW, inserted=True)
    assert (len(cache), cache.next_due) == (0, NOW + 20)
    cache.offer(record(1, due=NOW), NOW)
    assert (len(cache), cache.next_due) == (1, NOW + 20)
    cache.arm(NOW + 30)
    assert cache.next_due == NOW + 20
    cache.arm(NOW + 10)
    assert cache.next_due == NOW + 10


@pytest.mark.parametrize("next_due", [None, NOW + 70])
def test_a_refill_says_what_comes_next(next_due: int | None) -> None:
    cache = cache_of(next_due=NOW + 5)
    cache.arm(NOW + 1)
    cache.fill([], more=False, next_due=next_due, monotonic=1.0)
    assert cache.next_due == next_due


# When to ask


def test_a_fresh_cache_is_trusted_until_it_ages() -> None:
    cache = cache_of(record(1), record(2))
    assert not cache.wants_refill(NOW, MAX_AGE - 0.001)
    assert cache.wants_refill(NOW, MAX_AGE)


def test_an_empty_cache_is_never_trusted() -> None:
    cache = cache_of(record(1))
    assert not cache.wants_refill(NOW, 0.0)
    cache.pop(UNTIL)
    assert cache.wants_refill(NOW, 0.0)


def test_a_change_by_others_or_a_lost_race_asks_for_a_refill() -> None:
    cache = cache_of(record(1), record(2))
    cache.dirty = True
    assert cache.wants_refill(NOW, 0.0)
    cache.fill([record(1)], more=False, next_due=None, monotonic=0.0)
    assert not cache.wants_refill(NOW, 0.0)
    cache.lost_race()
    assert cache.wants_refill(NOW, 0.0)


def test_a_due_time_asks_for_a_refill_but_not_each_by_itself() -> None:
    cache = cache_of(record(1), record(2), next_due=NOW + 10)
    assert not cache.wants_refill(NOW + 9, DUE_REFRESH)
    assert not cache.wants_refill(NOW + 10, DUE_REFRESH - 0.001)
    assert cache.wants_refill(NOW + 10, DUE_REFRESH)


def test_an_ordered_message_asks_for_a_refill_because_only_the_store_knows_its_place() -> None:
    cache = cache_of(record(1))
    cache.offer(record(2, group="customer-1"), NOW, inserted=True)
    assert cache.dirty
    assert drain(cache) == [1]


# Payloads


def test_small_payloads_stay_with_their_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ready, "PAYLOAD_LIMIT", 10)
    cache = cache_of()
    cache.offer(record(1, payload=b""), NOW, inserted=True)
    cache.offer(record(2, payload=bytes(10)), NOW, inserted=True)
    cache.offer(record(3, payload=bytes(11)), NOW, inserted=True)
    assert [one.payload for one in cache.peek(3)] == [b"", bytes(10), None]


def test_the_payloads_of_a_cache_have_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ready, "PAYLOAD_BUDGET", 100)
    cache = cache_of()
    number = 0

    def offer(count: int) -> int:
        nonlocal number
        for _ in range(count):
            number += 1
            cache.offer(record(number, payload=bytes(10)), NOW, inserted=True)
        return sum(len(one.payload) for one in cache.peek(1000) if one.payload is not None)

    assert offer(30) == 100
    taken = [cache.pop(UNTIL) for _ in range(3)]
    assert offer(30) == 100  # The taken ones' place was used again.
    for one in taken:
        assert one is not None
        cache.give_back(one)  # With the payloads that they have: no more than what was out.
    assert offer(5) <= 130
    for one in cache.peek(5):
        cache.forget(one.id)
    assert offer(30) == 100


def test_the_budget_is_counted_afresh_by_a_refill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ready, "PAYLOAD_BUDGET", 100)
    cache = cache_of()
    for number in range(1, 11):
        cache.offer(record(number, payload=bytes(10)), NOW, inserted=True)
    cache.fill([record(n) for n in (1, 2, 30)], more=False, next_due=None, monotonic=1.0, seen=30)
    for number in range(31, 50):
        cache.offer(record(number, payload=bytes(10)), NOW, inserted=True)
    assert sum(len(one.payload) for one in cache.peek(100) if one.payload is not None) == 100


def test_a_refill_keeps_what_is_known_of_a_version_and_replaces_other_versions() -> None:
    cache = cache_of()
    for number in (1, 2, 3):
        cache.offer(record(number, payload=b"at hand"), NOW, inserted=True)
    cache.fill([record(1), record(2, etag="newer")], more=False, next_due=None, monotonic=1.0)
    assert [(one.item.key, one.payload, one.etag) for one in cache.peek(9)] == [
        (1, b"at hand", "etag-1"),
        (2, None, "newer"),
    ]


# Spreading


def test_lost_races_widen_the_choice_and_won_ones_narrow_it() -> None:
    cache = cache_of(record(1))
    assert cache.spread == 0
    cache.won_race()
    assert cache.spread == 0
    seen = []
    for _ in range(8):
        cache.lost_race()
        seen.append(cache.spread)
    assert seen == [8, 16, 32, 64, 128, 256, 256, 256]
    for left in range(255, -1, -1):
        cache.won_race()
        assert cache.spread == left


@pytest.mark.parametrize(("choose", "expected"), [(0, 1), (1, 2), (3, 4), (9, 10), (10, 10), (500, 10)])
def test_a_competitor_takes_another_than_the_first(choose: int, expected: int) -> None:
    cache = cache_of(*[record(n) for n in range(1, 11)])
    taken = cache.pop_spread(UNTIL, choose)
    assert taken is not None
    assert taken.item.key == expected
    assert cache.inflight == 1
    assert drain(cache) == [n for n in range(1, 11) if n != expected]


@pytest.mark.parametrize("choose", [0, 5])
def test_of_one_or_none_there_is_no_choice(choose: int) -> None:
    assert cache_of().pop_spread(UNTIL, choose) is None
    taken = cache_of(record(1)).pop_spread(UNTIL, choose)
    assert taken is not None
    assert taken.item.key == 1


# Anything, in any order

steps = st.lists(
    st.tuples(st.sampled_from(["insert", "delayed", "pop", "spread", "back", "settle", "return", "forget"]),
              st.integers(0, 9), st.integers(0, 3)),
    max_size=60,
)  # fmt: skip


@given(steps, st.integers(1, 6))
def test_whatever_happens(plan: list[tuple[str, int, int]], capacity: int) -> None:
    """It stays within its capacity, hands nothing out twice, and after a refill knows what is ready."""
    cache = cache_of(capacity=capacity)
    there: dict[str, Record] = {}  # What the store would call ready.
    out: list[Record] = []
    number = 0

    def refill(monotonic: float) -> None:
        waiting = sorted((one for one in there.values() if one not in out), key=rank)
        page = waiting[:capacity]
        cache.fill(page, more=len(waiting) > len(page), next_due=None, monotonic=monotonic, seen=number)

    for what, priority, which in plan:
        if what in {"insert", "delayed"}:
            number += 1
            one = record(number, priority=priority, due=NOW + 5 if what == "delayed" else 0)
            cache.offer(one, NOW, inserted=True)
            if what == "insert":
                there[one.id] = one
            else:
                assert cache.next_due == NOW + 5
        elif what in {"pop", "spread"}:
            taken = cache.pop(UNTIL) if what == "pop" else cache.pop_spread(UNTIL, which)
            if taken is not None:
                assert taken.id in there
                assert taken not in out
                out.append(taken)
        elif what == "forget" and there:
            gone = list(there)[which % len(there)]
            out = [one for one in out if one.id != gone]
            del there[gone]
            cache.forget(gone)
        elif out:
            one = out.pop(which % len(out))
            if what == "back":
                cache.give_back(one)
            elif what == "settle":
                cache.settle(one.id)
                del there[one.id]
            else:
                back = record(one.item.key, priority=priority, etag=one.etag + "'")
                there[one.id] = back
                cache.offer(back, NOW)
        assert len(cache) <= capacity
        assert cache.inflight == len(out)
        if len(cache) + len(out) < len(there):
            assert cache.more
    taken_ids = []
    while True:
        refill(1.0)
        batch = []
        while (one := cache.pop(UNTIL)) is not None:
            batch.append(one)
        if not batch:
            break
        assert [rank(one) for one in batch] == sorted(rank(one) for one in batch)
        out += batch
        taken_ids += [one.id for one in batch]
    assert sorted(there) == sorted(one.id for one in out)
    assert len(set(taken_ids)) == len(taken_ids)
