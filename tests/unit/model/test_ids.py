from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.model import names
from millpond.model.clock import ManualClock
from millpond.model.ids import IdSource

START = 1_750_000_000_000


def constant(byte: int) -> Callable[[int], bytes]:
    return lambda count: bytes([byte]) * count


@pytest.mark.parametrize("start", [START, 1, 0, 2**48 - 2])
@pytest.mark.parametrize("byte", [0, 0x5A, 0xFF])
def test_layout_is_that_of_a_uuid_7(start: int, byte: int) -> None:
    source = IdSource(ManualClock(start), constant(byte))
    for _ in range(3):
        text = source.message_id()
        parsed = uuid.UUID(text)
        assert str(parsed) == text
        assert parsed.version == 7
        assert parsed.variant == uuid.RFC_4122
        assert parsed.int >> 80 == start
        assert names.message_id(text) == text


def test_the_random_part_is_random() -> None:
    clock = ManualClock()
    tails = {IdSource(clock).message_id()[15:] for _ in range(100)}
    assert len(tails) == 100


def test_rises_while_the_clock_stands_still() -> None:
    source = IdSource(ManualClock())
    made = [source.message_id() for _ in range(20_000)]
    assert made == sorted(set(made))


@given(st.lists(st.integers(-3_600_000, 3_600_000), max_size=60), st.sampled_from([0, 0x7F, 0xFF, None]))
def test_rises_whatever_the_clock_does(jumps: list[int], byte: int | None) -> None:
    clock = ManualClock()
    source = IdSource(clock) if byte is None else IdSource(clock, constant(byte))
    made = []
    for jump in jumps:
        clock.jump(jump / 1000)
        made += [source.message_id(), source.message_id()]
    assert made == sorted(set(made))
    assert all(names.message_id(one) == one for one in made)


def test_a_counter_that_runs_over_takes_the_next_millisecond() -> None:
    clock = ManualClock()
    source = IdSource(clock, constant(0xFF))
    first = source.message_id()
    source._high, source._low = (1 << 26) - 1, (1 << 48) - 1
    later = source.message_id()
    assert later > first
    assert uuid.UUID(later).int >> 80 == clock.now_ms() + 1
    assert uuid.UUID(later).version == 7


def test_a_newer_clock_shows_in_the_id() -> None:
    clock = ManualClock()
    source = IdSource(clock)
    source.message_id()
    clock.advance(5)
    assert uuid.UUID(source.message_id()).int >> 80 == START + 5000


def test_the_same_chance_gives_the_same_ids() -> None:
    def made() -> list[str]:
        source = IdSource(ManualClock(), constant(7))
        return [source.message_id(), source.lease_id(), source.message_id()]

    assert made() == made()


def test_lease_ids_are_128_bits_of_chance() -> None:
    source = IdSource(ManualClock())
    leases = [source.lease_id() for _ in range(1000)]
    assert len(set(leases)) == 1000
    assert all(len(bytes.fromhex(lease)) == 16 for lease in leases)


def test_chance_is_fetched_in_bulk_and_never_given_twice() -> None:
    fetched: list[int] = []

    def counting(count: int) -> bytes:
        fetched.append(count)
        return bytes([len(fetched)]) * count

    source = IdSource(ManualClock(), counting)
    given_out = [source.random(1000) for _ in range(9)]
    assert fetched == [4096, 4096, 4096]
    assert given_out == [bytes([number]) * 1000 for number in (1, 1, 1, 1, 2, 2, 2, 2, 3)]
    assert len(source.random(4096)) == 4096


def test_below_stays_below() -> None:
    source = IdSource(ManualClock())
    seen = {source.below(7) for _ in range(1000)}
    assert seen == set(range(7))
    assert {source.below(1) for _ in range(10)} == {0}


@given(st.integers(-5, 2**48 + 5), st.sampled_from([0, 0x5A, 0xFF, None]))
def test_an_id_for_later_tells_its_time(at: int, byte: int | None) -> None:
    source = IdSource(ManualClock()) if byte is None else IdSource(ManualClock(), constant(byte))
    ids = [source.later_id(at) for _ in range(3)]
    assert ids == sorted(set(ids))
    for id in ids:
        parsed = uuid.UUID(id)
        assert (str(parsed), parsed.version, parsed.variant) == (id, 7, uuid.RFC_4122)
        assert parsed.int >> 80 == min(max(at, 0), 2**48 - 1)
        assert names.message_id(id) == id


def test_ids_for_later_are_told_apart_by_chance() -> None:
    clock = ManualClock()
    of_others = {IdSource(clock).later_id(START)[15:] for _ in range(100)}
    assert len(of_others) == 100
    source = IdSource(clock)
    ids = [source.later_id(START + number % 2) for number in range(10_000)]
    assert len({id[15:] for id in ids}) == len(ids), "seeded anew whenever the time is another one"
    row = [int(source.later_id(START)[-12:], 16) for _ in range(100)]
    assert len({later - earlier for earlier, later in itertools.pairwise(row)}) > 90, "nobody can tell the next"


def test_ids_for_later_leave_the_others_rising() -> None:
    source = IdSource(ManualClock())
    made = []
    for delay in (60_000, 0, -60_000, 1):
        made.append(source.message_id())
        source.later_id(START + delay)
    assert made == sorted(set(made))
    assert {uuid.UUID(id).int >> 80 for id in made} == {START}


def test_the_counter_of_ids_for_later_does_not_run_over() -> None:
    source = IdSource(ManualClock(), constant(0xFF))
    first = source.later_id(START)
    source._later = (1 << 74) - 1
    assert source.later_id(START) == first


def counter(id: str) -> int:
    """The 74 bits of a UUIDv7 that are neither time nor version nor variant."""
    number = uuid.UUID(id).int
    return (number >> 64 & 0xFFF) << 62 | number & (1 << 62) - 1


def test_the_counter_starts_in_its_lower_half_and_rises_by_chance() -> None:
    """RFC 9562, 6.2: the first bit is 0 at the start, so that there is room to count."""
    zeros = IdSource(ManualClock(), constant(0))
    assert [counter(zeros.message_id()) for _ in range(4)] == [0, 1, 2, 3]
    ones = IdSource(ManualClock(), constant(0xFF))
    start = (2**25 - 1) << 48 | 2**47 - 1
    step = 2**32
    assert [counter(ones.message_id()) for _ in range(3)] == [start, start + step, start + 2 * step]


def test_the_counters_lower_part_runs_over_into_the_upper() -> None:
    source = IdSource(ManualClock(), constant(0xFF))
    ids = [source.message_id() for _ in range(2**15 + 2)]
    assert ids == sorted(set(ids))
    over = [counter(id) >> 48 for id in ids]
    assert (over[0], over[2**15 - 1], over[2**15], over[-1]) == (2**25 - 1, 2**25 - 1, 2**25 - 1, 2**25)
    assert counter(ids[-1]) & 2**48 - 1 == 2**47 - 1, "seeded anew, with the first bit 0"
