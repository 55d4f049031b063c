"""What the conformance suite does not say about the memory store: handles, and that verify() would see a fault."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from millpond.errors import StoreClosed
from millpond.model.clock import ManualClock
from millpond.stores.base import Box, Insert, Inserted, Item, PutDocument, Reach, Remove, Unique
from millpond.stores.memory import INLINE_LIMIT, MemoryStore

NOW = 1_750_000_000_000


def insertion(number: int, *, group: str | None = None, expires: int | None = None) -> Insert:
    item = Item("default", "q", f"0197a3c2-0000-7000-8000-{number:012x}", 5, group, 3, False)
    return Insert(item, NOW, expires, b"head", b"status", b"abc", Unique(f"k{number}", NOW, NOW + 10))


def store() -> MemoryStore:
    return MemoryStore(clock=ManualClock())


def test_says_what_it_is() -> None:
    capabilities = store().capabilities
    assert capabilities.name == "memory"
    assert capabilities.reach is Reach.PROCESS
    assert not capabilities.durable
    assert capabilities.atomic_groups
    assert capabilities.change_feed
    assert capabilities.inline_limit == INLINE_LIMIT
    assert MemoryStore(clock=ManualClock(), inline_limit=10).share().capabilities.inline_limit == 10


def test_two_stores_share_nothing_and_two_handles_everything() -> None:
    async def main() -> None:
        one, other = store(), store()
        handle = one.share()
        await one.write([insertion(1)])
        assert (await other.ready("default", "q", NOW, limit=9)).records == []
        assert len((await handle.ready("default", "q", NOW, limit=9)).records) == 1

    asyncio.run(main())


def test_closing_one_handle_leaves_the_other_open() -> None:
    async def main() -> None:
        one = store()
        other = one.share()
        await one.write([insertion(1)])
        await one.close()
        with pytest.raises(StoreClosed):
            await one.open()
        assert len((await other.ready("default", "q", NOW, limit=9)).records) == 1
        assert len((await one.share().ready("default", "q", NOW, limit=9)).records) == 1

    asyncio.run(main())


def test_own_changes_are_no_news_and_others_coalesce() -> None:
    async def main() -> None:
        one = store()
        other = one.share()
        calls: list[str] = []
        one.subscribe("default", "q", lambda: calls.append("one"))
        other.subscribe("default", "q", lambda: calls.append("other"))
        await one.write([insertion(1), insertion(2)])
        await one.write([insertion(3)])
        assert calls == []  # never from within the write
        await asyncio.sleep(0)
        assert calls == ["other"]
        await other.write([PutDocument("default", "q", None, b"policy")])
        await asyncio.sleep(0)
        assert calls == ["other", "one"]

    asyncio.run(main())


def test_a_subscription_closed_before_its_call_stays_silent() -> None:
    async def main() -> None:
        one = store()
        calls: list[str] = []
        subscription = one.share().subscribe("default", "q", lambda: calls.append("late"))
        await one.write([insertion(1)])
        subscription.close()
        await asyncio.sleep(0)
        assert calls == []

    asyncio.run(main())


def test_statistics_count() -> None:
    async def main() -> None:
        one = store()
        await one.write([insertion(1), insertion(1)])
        await one.commit([insertion(2)])
        assert one.statistics() == {"writes": 1, "commits": 1, "ops": 3, "conflicts": 1, "records": 2, "blobs": 0}

    asyncio.run(main())


def test_empty_queues_are_forgotten() -> None:
    async def main() -> None:
        one = store()
        (outcome,) = await one.write([insertion(1)])
        assert isinstance(outcome, Inserted)
        await one.write([Remove(outcome.item, outcome.mark)])
        await one.sweep(NOW + 10, older_than=0, limit=10)
        assert one._data.queues == {}

    asyncio.run(main())


def _break_order(one: MemoryStore) -> None:
    queue = next(iter(one._data.queues.values()))
    queue.lines[5].remove(queue.lines[5].first)  # type: ignore[arg-type]


def _break_counter(one: MemoryStore) -> None:
    next(iter(one._data.queues.values())).bytes += 1


def _break_block(one: MemoryStore) -> None:
    queue = next(iter(one._data.queues.values()))
    queue.block(queue.by_key[2], False)


def _break_expiry(one: MemoryStore) -> None:
    one._data.expiring.remove((NOW + 5, 1))


def _break_unique(one: MemoryStore) -> None:
    next(iter(one._data.queues.values())).unique.clear()


def _break_ids(one: MemoryStore) -> None:
    next(iter(one._data.queues.values())).by_id.popitem()


def _break_boxes(one: MemoryStore) -> None:
    next(iter(one._data.queues.values())).boxes[Box.DEAD].add(77)


@pytest.mark.parametrize(
    "damage", [_break_order, _break_counter, _break_block, _break_expiry, _break_unique, _break_ids, _break_boxes]
)
def test_verify_sees_damage(damage: Callable[[MemoryStore], None]) -> None:
    async def main() -> None:
        one = store()
        await one.write([insertion(1, group="g", expires=NOW + 5), insertion(2, group="g"), insertion(3)])
        assert await one.verify() == []
        damage(one)
        assert len(await one.verify()) >= 1

    asyncio.run(main())


async def _empty() -> AsyncIterator[bytes]:
    return
    yield b""


def test_verify_misses_a_payload() -> None:
    async def main() -> None:
        one = store()
        item = Item("default", "q", "0197a3c2-0000-7000-8000-000000000001", 5, None, 3, True)
        blob = await one.write_blob("default", "q", item.id, _empty(), NOW)
        await one.write([Insert(item, NOW, None, b"head", b"status", b"", None, blob.name)])
        one._data.blobs.clear()
        (problem,) = await one.verify()
        assert "payload is missing" in problem.what

    asyncio.run(main())
