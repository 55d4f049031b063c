"""`millpond.service.collector`: what a pass settles, what it leaves, and that it ends."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest

from millpond import StoreError
from millpond.service import collector
from millpond.service.collector import Collected, collect
from millpond.stores.base import Cause, Conflict, Op, Outcome, Update
from millpond.stores.faulty import fail_before, nth
from millpond.stores.memory import MemoryStore

if TYPE_CHECKING:
    from tests.unit.service.conftest import Bench


async def test_nothing_to_do_is_one_look_and_one_sweep(bench: Bench) -> None:
    async with bench.pond:
        await bench.queue.enqueue(b"x")
        bench.faulty.calls.clear()
        assert await collect(bench.service) == Collected(expired=0, orphans=0)
        assert [call.method for call in bench.faulty.calls] == ["expired", "sweep"]


async def test_each_queue_is_settled_by_its_policy(bench: Bench) -> None:
    async with bench.pond:
        await bench.pond.queue("kept").set_policy(on_expired="dead_letter")
        for name in ("kept", "dropped"):
            await bench.pond.queue(name).enqueue_many([b"x"] * 3, ttl=5)
            await bench.pond.queue(name).enqueue(b"lives on", ttl=50)
        bench.clock.advance(5)
        assert await collect(bench.service) == Collected(expired=6, orphans=0)
        kept = await bench.pond.queue("kept").counts()
        assert (kept.ready, kept.dead) == (1, 3)
        assert {dead.dead_reason for dead in await bench.pond.queue("kept").dead_letters.list()} == {"expired"}
        dropped = await bench.pond.queue("dropped").counts()
        assert (dropped.ready, dropped.dead) == (1, 0)
        assert await bench.pond.verify() == []


async def test_the_end_is_exact(bench: Bench) -> None:
    async with bench.pond:
        await bench.queue.enqueue(b"x", ttl=5)
        bench.clock.advance(4.999)
        assert (await collect(bench.service)).expired == 0
        bench.clock.advance(0.001)
        assert (await collect(bench.service)).expired == 1


async def test_more_than_a_batch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "BATCH", 10)
    async with bench.pond:
        await bench.queue.enqueue_many([b"x"] * 35, ttl=5)
        bench.clock.advance(5)
        bench.faulty.calls.clear()
        assert (await collect(bench.service)).expired == 35
        sizes = [len(call.ops) for call in bench.faulty.calls if call.method == "write"]
        assert sizes == [10, 10, 10, 5]
        assert (await bench.queue.counts())[:5] == (0, 0, 0, 0, 0)


async def test_the_ready_cache_forgets_what_is_settled(bench: Bench) -> None:
    async with bench.pond:
        await bench.queue.enqueue_many([b"x"] * 3, ttl=5)
        await bench.service.refresh_ready_cache(None, "q")
        cache = bench.service.cache(("default", "q"))
        assert len(cache) == 3
        bench.clock.advance(5)
        await collect(bench.service)
        assert len(cache) == 0


async def test_the_next_of_an_ordering_key_is_let_go(bench: Bench) -> None:
    async with bench.pond:
        waiting = bench.pond.queue("q")
        await waiting.enqueue(b"first", ordering_key="g", ttl=5, delay=60)
        await waiting.enqueue(b"second", ordering_key="g")
        assert await waiting.receive() == []
        bench.clock.advance(5)
        await collect(bench.service)
        assert [message.payload for message in await waiting.receive()] == [b"second"]


async def test_what_cannot_be_read_is_passed_over_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(collector, "BATCH", 2)
    async with bench.pond:
        receipts = await bench.queue.enqueue_many([b"x"] * 6, ttl=5)
        broken = {receipts[0].message_id, receipts[1].message_id, receipts[4].message_id}
        for id in broken:
            record = await bench.service.get_message(None, "q", id)
            await bench.memory.write(
                [
                    Update(
                        record.item, record.mark, record.mark.due, False, record.mark.expires, record.mark.box, b"\xc1"
                    )
                ]
            )
        bench.clock.advance(5)
        with caplog.at_level(logging.ERROR, "millpond.collector"):
            assert (await collect(bench.service)).expired == 3
        assert sorted(record.message_id for record in caplog.records) == sorted(broken)  # type: ignore[attr-defined]
        assert (await bench.queue.counts()).ready == 3


async def test_a_queue_whose_policy_cannot_be_read_holds_up_no_other(bench: Bench) -> None:
    from millpond.stores.base import PutDocument

    async with bench.pond:
        await bench.pond.queue("broken").enqueue(b"x", ttl=5)
        await bench.queue.enqueue(b"x", ttl=5)
        await bench.memory.write([PutDocument("default", "broken", None, b"\xc1")])
        bench.clock.advance(5)
        assert (await collect(bench.service)).expired == 1
        assert (await bench.pond.store.counts("default", "broken", bench.clock.now_ms())).ready == 1


async def test_a_store_that_fails_is_reported(bench: Bench) -> None:
    async with bench.pond:
        await bench.queue.enqueue(b"x", ttl=5)
        bench.clock.advance(5)
        for method in ("expired", "document", "write", "sweep"):
            bench.faulty.plan = nth(1, method, fail_before())
            with pytest.raises(StoreError, match=method):
                await collect(bench.service)
        bench.faulty.plan = {}
        assert (await bench.queue.counts())[:5] == (0, 0, 0, 0, 0), "the last of them failed after the message went"


async def test_what_somebody_holds_by_now_is_left_to_them(bench: Bench) -> None:
    """A store may answer with what it saw before: the life cycle has the last word."""
    async with bench.pond:
        await bench.queue.enqueue_many([b"x"] * 2, ttl=5, visibility=60)
        [held] = await bench.queue.receive()
        bench.clock.advance(5)
        stored = await bench.memory.get("default", "q", held.id)
        assert stored is not None
        expired = bench.faulty.expired

        async def all_of_them(now: int, *, limit: int) -> list[object]:
            return [stored, *await expired(now, limit=limit)]

        bench.faulty.expired = all_of_them  # type: ignore[method-assign, assignment]
        assert (await collect(bench.service)).expired == 1
        await held.ack()
        assert (await bench.queue.counts())[:5] == (0, 0, 0, 0, 0)


async def test_lost_races_are_not_counted_and_end_the_pass(bench: Bench) -> None:
    async with bench.pond:
        await bench.queue.enqueue_many([b"x"] * 4, ttl=5)
        bench.clock.advance(5)
        writes: list[int] = []

        async def lose(ops: Sequence[Op]) -> list[Outcome]:
            writes.append(len(ops))
            assert len(writes) < 3, "a pass that settles nothing must end"
            if len(writes) == 1:
                won = await MemoryStore.write(bench.memory, ops[:1])
                return [*won, *[Conflict(Cause.STALE, "x")] * (len(ops) - 1)]
            return [Conflict(Cause.STALE, "x")] * len(ops)

        bench.faulty.write = lose  # type: ignore[method-assign]
        assert (await collect(bench.service)).expired == 1
        assert writes == [4, 3], "what was lost is looked at once more, and then left to others"


async def test_orphans_are_counted_by_their_age(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    async def chunks():  # type: ignore[no-untyped-def]
        yield b"orphan"

    async with bench.pond:
        await bench.memory.write_blob("default", "q", "0197a3c2-0000-7000-8000-000000000001", chunks(), 0)
        at = bench.clock.now_ms()
        await bench.memory.write_blob("default", "q", "0197a3c2-0000-7000-8000-000000000002", chunks(), at)
        with caplog.at_level(logging.INFO, "millpond.collector"):
            assert await collect(bench.service) == Collected(expired=0, orphans=1)
            assert [record.message for record in caplog.records] == ["millpond.collected"]
            caplog.clear()
            bench.clock.advance(60)
            assert await collect(bench.service) == Collected(expired=0, orphans=0)
            assert caplog.records == [], "nothing was done, so nothing is told"
            bench.clock.advance(0.001)
            assert await collect(bench.service) == Collected(expired=0, orphans=1)
            await bench.queue.enqueue(b"x", ttl=1)
            bench.clock.advance(1)
            caplog.clear()
            await collect(bench.service)
            assert [record.message for record in caplog.records] == ["millpond.collected"]
