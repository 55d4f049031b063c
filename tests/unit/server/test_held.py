"""What a server remembers of its deliveries: bounded in number and in bytes, and never more than a hint."""

from __future__ import annotations

from typing import Any

from millpond import testing
from millpond.server.held import Held
from millpond.service.consuming import Delivery
from millpond.testing import TestPond


async def deliveries(pond: TestPond, count: int, **options: Any) -> list[Delivery]:
    """So many messages, handed out."""
    await pond.queue("q").enqueue_many([b"payload"] * count, **options)
    return await pond.service.claim("default", "q", count)


def find(held: Held, one: Delivery) -> Delivery:
    return held.get("default", "q", one.id, one.lease_id, one.token)


async def test_what_is_kept_is_found_by_all_of_its_names_or_not_at_all() -> None:
    async with testing.pond() as pond:
        held = Held()
        [one] = await deliveries(pond, 1)
        held.keep(one)
        assert one.payload is None
        assert find(held, one) is one
        for wrong in (
            ("other", "q", one.id, one.lease_id, 1),
            ("default", "z", one.id, one.lease_id, 1),
            ("default", "q", one.id, "another", 1),
            ("default", "q", one.id, one.lease_id, 2),
        ):
            assert held.get(*wrong).record is None


async def test_the_oldest_are_forgotten_with_their_records() -> None:
    async with testing.pond() as pond:
        held = Held(capacity=2)
        some = await deliveries(pond, 3)
        for one in some:
            held.keep(one)
        assert len(held) == 2
        assert (some[0].record, some[0].given) == (None, None)
        assert find(held, some[0]) is not some[0]
        assert find(held, some[2]) is some[2]


async def test_large_attributes_are_counted() -> None:
    async with testing.pond() as pond:
        held = Held(max_bytes=100_000)
        some = await deliveries(pond, 20, attributes={"a": "x" * 30_000})
        for one in some:
            held.keep(one)
        assert len(held) == 3
        assert some[0].record is None
        for one in some:
            held.drop(one)
        assert held._room == 100_000
        assert held._sizes == {}
        # Kept twice, as an extension does, it counts once.
        held.keep(some[-1])
        held.keep(some[-1])
        assert 30_000 < 100_000 - held._room == held._sizes[some[-1].id] < 30_100
        assert find(held, some[-1]).record is not None


async def test_an_answer_is_told_to_who_streamed() -> None:
    async with testing.pond() as pond:
        held = Held()
        told: list[str] = []
        held.answered = told.append
        [one] = await deliveries(pond, 1)
        held.drop(one)
        held.keep(one)
        held.drop(one)
        assert told == [one.lease_id] * 2
