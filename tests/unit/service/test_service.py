"""`millpond.service.service`: looking, single steps, whole boxes and policies, where other suites do not reach."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from millpond import InvalidInput, LeaseLost, MessageNotFound, TooLarge
from millpond.service import service as module
from millpond.service.config import EnqueueOptions
from millpond.stores.base import Box, Op, Outcome, Update

if TYPE_CHECKING:
    from tests.unit.service.conftest import Bench

    from millpond.service.ready import Record

KEY = ("default", "q")
UNKNOWN = "0197a3c2-0000-7000-8000-000000000001"
NOTHING = (0, 0, 0, 0, 0)


async def enqueued(bench: Bench, count: int = 1, **options: Any) -> list[Record]:
    """So many messages, as written."""
    done = await bench.service.enqueue_many(None, "q", [b"x"] * count, EnqueueOptions(**options))
    return [await bench.service.get_message(None, "q", one.message_id) for one in done]


async def spoil(bench: Bench, record: Record) -> None:
    """Make the message unreadable."""
    mark = record.mark
    await bench.memory.write([Update(record.item, mark, mark.due, False, mark.expires, mark.box, b"\xc1")])


# Looking


async def test_a_list_has_pages(bench: Bench) -> None:
    async with bench.pond:
        ids = [record.id for record in await enqueued(bench, 102)]
        first = await bench.service.list_messages(None, "q")
        assert ([record.id for record in first.records], first.truncated) == (ids[:100], True)
        rest = await bench.service.list_messages(None, "q", after=first.next_after)
        assert ([record.id for record in rest.records], rest.truncated) == (ids[100:], False)
        [one] = (await bench.service.list_messages(None, "q", limit=1)).records
        assert one.id == ids[0]
        for limit in (0, -1):
            with pytest.raises(InvalidInput, match=r"limit must be .*at least"):
                await bench.service.list_messages(None, "q", limit=limit)


async def test_what_cannot_be_read_is_left_out(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    async with bench.pond:
        records = await enqueued(bench, 3)
        await spoil(bench, records[1])
        readable = [records[0].id, records[2].id]
        assert [record.id for record in (await bench.service.list_messages(None, "q")).records] == readable
        assert [record.id for record in await bench.service.peek(None, "q", 3)] == readable
        told = [record.message_id for record in caplog.records]  # type: ignore[attr-defined]
        assert told == [records[1].id] * 2


async def test_a_peek_is_the_first_and_stays(bench: Bench) -> None:
    async with bench.pond:
        assert await bench.service.peek_candidate(None, "q") is None
        [first, _] = await enqueued(bench, 2)
        for _ in range(2):
            record = await bench.service.peek_candidate(None, "q")
            assert record is not None
            assert record.id == first.id


async def test_readiness_is_record_and_payload(bench: Bench) -> None:
    async with bench.pond:
        receipt = await bench.queue.enqueue(bytes(200_000))
        await bench.service.ensure_message_ready(None, "q", receipt.message_id)
        bench.memory._data.blobs.clear()
        with pytest.raises(MessageNotFound, match="payload"):
            await bench.service.ensure_message_ready(None, "q", receipt.message_id)
        with pytest.raises(MessageNotFound, match=UNKNOWN):
            await bench.service.ensure_message_ready(None, "q", UNKNOWN)


async def test_readiness_of_a_long_payload_reads_its_beginning(bench: Bench) -> None:
    async with bench.pond:
        receipt = await bench.queue.enqueue(bytes(3 << 20))
        read = 0
        read_blob = bench.faulty.read_blob

        async def counted(item: Any) -> Any:
            nonlocal read
            async for chunk in read_blob(item):
                read += len(chunk)
                yield chunk

        bench.faulty.read_blob = counted  # type: ignore[method-assign]
        await bench.service.ensure_message_ready(None, "q", receipt.message_id)
        assert read == 1 << 20


# Candidates


async def test_a_candidate_is_one_and_out_of_the_cache(bench: Bench) -> None:
    async with bench.pond:
        bench.service.reset_ready_cache_stats()
        assert await bench.service.next_candidate(None, "q") is None
        [first, second] = await enqueued(bench, 2)
        candidate = await bench.service.next_candidate(None, "q")
        assert candidate is not None
        assert candidate.id == first.id
        assert [record.id for record in await bench.service.next_candidates(None, "q", 5)] == [second.id]
        assert await bench.service.next_candidate(None, "q") is None
        assert bench.service.ready_cache_stats().next_calls == 4


async def test_a_paused_queue_has_no_candidates(bench: Bench) -> None:
    async with bench.pond:
        await enqueued(bench)
        await bench.service.pause(None, "q")
        assert await bench.service.next_candidate(None, "q") is None
        await bench.service.resume(None, "q")
        assert (await bench.service.queue_policy(None, "q")).paused is False
        assert await bench.service.next_candidate(None, "q") is not None


async def test_counters_are_copied_and_reset(bench: Bench) -> None:
    async with bench.pond:
        await enqueued(bench)
        await bench.service.next_candidate(None, "q")
        before = bench.service.ready_cache_stats()
        assert (before.next_calls, before.list_scans) == (1, 1)
        await bench.service.refresh_ready_cache(None, "q")
        assert before.list_scans == 1, "a copy does not go on counting"
        assert bench.service.ready_cache_stats().list_scans == 2
        bench.service.reset_ready_cache_stats()
        assert bench.service.ready_cache_stats() == type(before)()


async def test_the_cache_can_be_told_of_the_newest_version(bench: Bench) -> None:
    async with bench.pond, bench.other as other:
        [record] = await enqueued(bench)
        await bench.service.refresh_ready_cache(None, "q")
        cache = bench.service.cache(KEY)
        [message] = await other.queue("q").receive()
        await message.defer()
        newer = await bench.service.get_message(None, "q", record.id)
        bench.service.update_ready_cache(newer)
        assert [one.mark.etag for one in cache.peek(5)] == [newer.mark.etag]
        dead = await bench.service.move_to_dlq(newer)
        await bench.service.refresh_ready_cache(None, "q")
        bench.service.update_ready_cache(dead)
        assert len(cache) == 0
        cache.offer(newer, bench.clock.now_ms())
        bench.service.update_ready_cache(dead)
        assert len(cache) == 0, "a dead letter is no candidate, nor is what it was before"


# Single steps


async def test_exactly_this_record_is_delivered(bench: Bench) -> None:
    async with bench.pond, bench.other as other:
        records = await enqueued(bench, 3, visibility=30)
        delivery = await bench.service.increment_attempts(records[1], visibility=5, owner="me", txn_id="t1")
        assert (delivery.id, delivery.token) == (records[1].id, 1)
        view = await bench.queue.get(delivery.id)
        lease = view.record.status.lease
        assert lease is not None
        assert (lease.owner, lease.txn_id, lease.until) == ("me", "t1", bench.clock.now_ms() + 5000)
        own = await bench.service.increment_attempts(records[0])
        assert own.record is not None
        assert own.record.status.visible_at == bench.clock.now_ms() + 30_000
        [taken] = await other.queue("q").receive()
        assert taken.id == records[2].id
        with pytest.raises(LeaseLost, match="cannot be delivered from the version that was read"):
            await bench.service.increment_attempts(records[2])
        assert records[2].status.attempts == 0


async def test_several_records_are_delivered_in_one_write(bench: Bench) -> None:
    async with bench.pond:
        assert await bench.service.claim_records([]) == []
        records = await enqueued(bench, 3)
        with pytest.raises(InvalidInput, match="visibility"):
            await bench.service.claim_records(records, visibility=0)
        bench.faulty.calls.clear()
        found = await bench.service.claim_records(records)
        assert [delivery.id for delivery in found] == [record.id for record in records]
        assert bench.calls("write") == 1


async def test_reschedule_is_defer(bench: Bench) -> None:
    async with bench.pond:
        await enqueued(bench)
        [delivery] = await bench.service.claim(None, "q")
        await bench.service.reschedule(delivery, delay=7)
        view = await bench.queue.get(delivery.id)
        assert (view.lease, view.failures, view.attempts) == (None, 0, 1)
        assert view.record.status.visible_at == bench.clock.now_ms() + 7000


async def test_an_error_is_noted_and_the_lease_goes_on(bench: Bench) -> None:
    async with bench.pond, bench.other as other:
        await enqueued(bench)
        [delivery] = await bench.service.claim(None, "q")
        for note in ("first", "second"):
            bench.faulty.calls.clear()
            await bench.service.save_message_document(delivery, last_error=note)
            assert bench.calls("get") == 0, "it knows the version that it wrote itself"
            assert (await bench.queue.get(delivery.id)).last_error == note
        # Another process notes something under the same lease: this one reads again, and has the last word.
        twin = other.queue("q").handle(delivery.id, delivery.lease_id, delivery.token)
        await other.service.save_message_document(twin._delivery, last_error="theirs")
        await bench.service.save_message_document(delivery, last_error="mine")
        assert (await bench.queue.get(delivery.id)).last_error == "mine"
        with pytest.raises(TooLarge):
            await bench.service.save_message_document(delivery, last_error="x" * 101)
        await bench.service.ack(delivery)
        assert (await bench.queue.counts())[:5] == NOTHING


async def test_an_operator_buries_what_was_read(bench: Bench) -> None:
    async with bench.pond:
        [record, other] = await enqueued(bench, 2)
        await bench.service.refresh_ready_cache(None, "q")
        dead = await bench.service.move_to_dlq(record, "by hand")
        assert dead.status.dead is not None
        assert dead.status.dead.reason == "by hand"
        assert [one.id for one in bench.service.cache(KEY).peek(5)] == [other.id]
        with pytest.raises(InvalidInput, match=record.id):
            await bench.service.move_to_dlq(dead)
        with pytest.raises(LeaseLost, match="was changed by somebody else"):
            await bench.service.move_to_dlq(record)
        assert (await bench.queue.counts())[:5] == (1, 0, 0, 0, 1)


async def test_what_nobody_holds_is_deleted(bench: Bench) -> None:
    async with bench.pond:
        [free, held] = await enqueued(bench, 2)
        [delivery] = await bench.service.claim_records([held])
        await bench.service.refresh_ready_cache(None, "q")
        await bench.service.delete_message(free)
        assert len(bench.service.cache(KEY)) == 0
        assert await bench.service.load(*KEY, free.id) is None
        with pytest.raises(LeaseLost, match="changed by somebody else; it was not deleted"):
            await bench.service.delete_message(held)
        assert delivery.record is not None
        with pytest.raises(LeaseLost, match="held by a consumer; it was not deleted"):
            await bench.service.delete_message(delivery.record)
        assert (await bench.queue.counts())[:5] == (0, 0, 1, 0, 0)
        with pytest.raises(LeaseLost, match="changed by somebody else"):
            await bench.service.delete_message(held, force=True)
        await bench.service.delete_message(delivery.record, force=True)
        assert (await bench.queue.counts())[:5] == NOTHING


# Whole boxes


async def test_a_purge_spares_what_is_held_and_the_dead(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE", 3)
    async with bench.pond:
        records = await enqueued(bench, 10)
        [held] = await bench.service.claim_records(records[4:5])
        await bench.service.move_to_dlq(records[9])
        await bench.service.refresh_ready_cache(None, "q")
        assert await bench.service.purge(None, "q") == 8
        assert len(bench.service.cache(KEY)) == 0
        assert (await bench.queue.counts())[:5] == (0, 0, 1, 0, 1)
        await bench.service.ack(held)
        assert await bench.service.purge(None, "q") == 0


def meddle(bench: Bench, number: int) -> None:
    """Before the pond's next write, somebody else changes the record of its op of this number."""
    write = bench.faulty.write

    async def meddled(ops: Sequence[Op]) -> list[Outcome]:
        bench.faulty.write = write  # type: ignore[method-assign]
        item = ops[number].item  # type: ignore[union-attr]
        record = await bench.other.service.load(item.namespace, item.queue, item.id)
        assert record is not None
        await bench.memory.write([bench.other.service.update(record, record.status)])
        return await write(ops)

    bench.faulty.write = meddled  # type: ignore[method-assign]


@pytest.mark.parametrize("some", [False, True], ids=["all", "by id"])
@pytest.mark.parametrize("action", ["redrive", "purge"])
async def test_dead_letters_that_others_change_meanwhile_are_theirs(bench: Bench, action: str, some: bool) -> None:
    async with bench.pond, bench.other:
        records = await enqueued(bench, 3)
        for record in records:
            await bench.service.move_to_dlq(record)
        ids = [record.id for record in records] if some else None
        meddle(bench, 1)
        act: Callable[..., Awaitable[int]] = (
            bench.service.redrive if action == "redrive" else bench.service.purge_dead_letters
        )
        assert await act(None, "q", ids) == 2
        left = (await bench.service.list_messages(None, "q", box=Box.DEAD)).records
        assert [record.id for record in left] == [records[1].id]
        assert (await bench.queue.counts()).ready == (2 if action == "redrive" else 0)


async def test_a_purge_leaves_what_others_change_meanwhile(bench: Bench) -> None:
    async with bench.pond, bench.other:
        records = await enqueued(bench, 3)
        meddle(bench, 2)
        assert await bench.service.purge(None, "q") == 2
        [left] = (await bench.service.list_messages(None, "q")).records
        assert left.id == records[2].id


@pytest.mark.parametrize("some", [False, True], ids=["all", "by id"])
async def test_a_redrive_wakes_who_waits_and_is_in_the_cache(bench: Bench, some: bool) -> None:
    async with bench.pond as pond:
        [record] = await enqueued(bench)
        await bench.service.move_to_dlq(record)
        await bench.service.refresh_ready_cache(None, "q")
        waiting = asyncio.ensure_future(bench.queue.receive(wait=60))
        await pond.settle()  # type: ignore[attr-defined]
        # Twice the same id is once.
        assert await bench.service.redrive(None, "q", [record.id, record.id] if some else None) == 1
        await pond.settle()  # type: ignore[attr-defined]
        assert waiting.done()
        [message] = await waiting
        assert (message.id, message.attempts) == (record.id, 1)


async def test_who_is_alive_is_no_dead_letter(bench: Bench) -> None:
    async with bench.pond:
        [alive, dead] = await enqueued(bench, 2)
        await bench.service.move_to_dlq(dead)
        assert (await bench.service.dead_letter(None, "q", dead.id)).id == dead.id
        for act in (bench.service.redrive, bench.service.purge_dead_letters):
            step: Callable[..., Awaitable[int]] = act
            with pytest.raises(MessageNotFound, match="not a dead letter"):
                await step(None, "q", [dead.id, alive.id])
            with pytest.raises(MessageNotFound, match=UNKNOWN):
                await step(None, "q", [dead.id, UNKNOWN])
        assert (await bench.queue.counts())[:5] == (1, 0, 0, 0, 1), "nothing was changed"


# Policy


async def test_a_policy_has_its_fields_and_their_types(bench: Bench) -> None:
    async with bench.pond:
        await bench.service.set_policy(None, "q", ttl=5.0)
        with pytest.raises(InvalidInput, match="a queue policy has no colour, size"):
            await bench.service.set_policy(None, "q", size=1, colour="red", ttl=6.0)
        with pytest.raises(InvalidInput, match=r"wrong type|ttl must be"):
            await bench.service.set_policy(None, "q", ttl="long")
        assert (await bench.service.queue_policy(None, "q")).ttl == 5.0


async def test_a_policy_is_read_afresh_where_it_is_asked_for(bench: Bench) -> None:
    async with bench.pond, bench.other as other:
        await enqueued(bench)
        await other.service.set_policy(None, "q", max_attempts=9)
        assert (await bench.service.queue_policy(None, "q")).max_attempts == 9


# Ending


async def test_closing_waits_for_work_in_the_background(bench: Bench) -> None:
    gate, done = asyncio.Event(), []

    async def work(name: str) -> None:
        await gate.wait()
        done.append(name)

    async def fail() -> None:
        await gate.wait()
        raise RuntimeError("on purpose")

    async with bench.pond:
        for task in (work("a"), fail(), work("b")):
            bench.service.spawn(asyncio.ensure_future(task))
        closing = asyncio.ensure_future(bench.service.close())
        await asyncio.sleep(0)
        assert not closing.done()
        gate.set()
        await closing
        assert (sorted(done), bench.service.tasks) == (["a", "b"], set())
