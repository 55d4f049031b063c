"""L1 to L21: loss, duplication, orphans, and what a crash leaves behind.

docs/reference/seed-defects.md says what each was.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

from millpond import Config, InvalidInput, LeaseLost, MessageNotFound, StoreError
from millpond.stores.base import Cause, Conflict, Remove, Removed, Updated
from millpond.stores.faulty import Gate, crash_after, crash_before, fail_after, fail_before, fail_middle, hold, nth
from millpond.stores.sqlite import SqliteStore

if TYPE_CHECKING:
    from tests.defects.conftest import Defects

LARGE = bytes(200_000)
"""Stored apart from its record."""


@pytest.mark.parametrize("fault", [fail_before, fail_after, crash_before, crash_after])
async def test_L1_a_move_to_the_dead_letters_is_one_write_and_poisons_nothing(world: Defects, fault: Any) -> None:
    async with world.pond() as pond:
        queue = pond.queue("q")
        await queue.enqueue(LARGE, max_attempts=1, priority=9, visibility=10)
        await queue.enqueue_many([b"good"] * 50)
        [poison] = await queue.receive()
        world.forget(pond)
        pond.store.plan = nth(1, "write", fault())  # type: ignore[attr-defined]
        with pytest.raises(StoreError):
            await poison.nack(error="no")
        assert world.asked(pond)["write"] == 1
    await world.advance(11)
    async with world.pond() as pond:
        queue = pond.queue("q")
        world.forget(pond)
        good = await queue.receive(100)
        assert len(good) == 50
        assert sum(world.asked(pond).values()) < 10, "nothing spins"
        [dead] = await queue.dead_letters.list()
        assert await dead.payload() == LARGE
        assert (await queue.counts()).dead == 1
        assert await pond.verify() == []


async def test_L2_a_lost_race_does_not_duplicate_into_the_dead_letters(world: Defects) -> None:
    async with world.pond() as pond, world.pond() as consumers:
        queue = pond.queue("q")
        receipt = await queue.enqueue(b"x")
        stale = await pond.service.get_message(None, "q", receipt.message_id)
        [held] = await consumers.queue("q").receive()
        for _ in range(2):
            with pytest.raises(LeaseLost):
                await pond.service.move_to_dlq(stale)
        assert await queue.dead_letters.list() == []
        await held.ack()
        assert (await queue.counts())[:5] == (0, 0, 0, 0, 0)


async def test_L3_the_budget_is_checked_at_hand_out(world: Defects) -> None:
    async with world.pond() as pond:
        queue = pond.queue("q")
        await queue.enqueue(b"x", max_attempts=1)
        [message] = await queue.receive()
        await message.nack()
        for _ in range(5):
            assert await queue.receive() == []
        assert (await queue.counts()).dead == 1


async def test_L4_a_crash_of_the_consumer_counts_as_a_failure(world: Defects) -> None:
    async with world.pond() as pond:
        queue = pond.queue("q")
        await queue.enqueue(b"x", max_attempts=3, visibility=10)
        for _ in range(3):
            assert len(await queue.receive()) == 1
            await world.advance(11)
        assert await queue.receive() == []
        [dead] = await queue.dead_letters.list()
        assert (dead.attempts, dead.failures) == (3, 3)


async def test_L5_expired_messages_are_not_delivered(world: Defects) -> None:
    async with world.pond() as pond:
        queue = pond.queue("q")
        await queue.enqueue(b"x", ttl=1)
        await pond.service.refresh_ready_cache(None, "q")
        await world.advance(2.1)
        assert await queue.receive() == []


async def test_L6_an_expired_message_is_left_to_its_holder(world: Defects) -> None:
    async with world.pond() as pond, world.pond() as other:
        queue = pond.queue("q")
        await queue.enqueue(b"x", ttl=5, visibility=60)
        [message] = await queue.receive()
        await message.state.save("half-way")
        await world.advance(10)
        assert (await other.collect()).expired == 0
        assert await other.queue("q").receive() == []
        await message.ack()


async def test_L6_what_expires_is_settled_without_a_consumer_as_the_policy_says(world: Defects) -> None:
    async with world.pond() as pond:
        await pond.queue("kept").set_policy(on_expired="dead_letter")
        for name in ("kept", "dropped"):
            await pond.queue(name).enqueue(b"x", ttl=5)
        await world.advance(10)
        await pond.collect()
        assert [dead.dead_reason for dead in await pond.queue("kept").dead_letters.list()] == ["expired"]
        assert (await pond.queue("kept").counts())[:5] == (0, 0, 0, 0, 1)
        assert (await pond.queue("dropped").counts())[:5] == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("payload", [b"small", LARGE], ids=["inline", "apart"])
async def test_L7_an_enqueue_whose_reply_is_lost_keeps_its_payload(world: Defects, payload: bytes) -> None:
    async with world.pond(plan=nth(1, "write", fail_after())) as pond:
        queue = pond.queue("q")
        with pytest.raises(StoreError, match="outcome is unknown"):
            await queue.enqueue(payload)
        [message] = await queue.receive()
        assert await message.read() == payload
        assert await pond.verify() == []


async def test_L8_what_is_refused_is_refused_before_a_byte_is_stored(world: Defects) -> None:
    async with world.pond() as pond:
        world.forget(pond)
        with pytest.raises(InvalidInput):
            await pond.queue("q").enqueue(LARGE, attributes={"a": object()})
        asked = world.asked(pond)
        assert (asked["write_blob"], asked["write"]) == (0, 0)


@pytest.mark.parametrize("call", ["write_blob", "write"])
@pytest.mark.parametrize("fault", [fail_before, fail_middle, fail_after, crash_before, crash_after])
async def test_L8_whatever_an_enqueue_leaves_behind_is_collected(world: Defects, call: str, fault: Any) -> None:
    config = Config(orphan_age=60)
    async with world.pond(config=config, plan=nth(1, call, fault())) as pond:
        with pytest.raises(StoreError):
            await pond.queue("q").enqueue(LARGE)
    async with world.pond(config=config) as pond:
        landed = await pond.queue("q").receive()
        assert len(landed) == (call == "write" and fault in (fail_after, crash_after))
        world.clock.advance(61)
        await pond.collect()
        assert (await pond.collect()).orphans == 0, "one pass takes all of them"
        assert await pond.verify() == []
        for message in landed:
            assert await message.read() == LARGE


async def test_L8_an_ack_takes_the_payload_along(world: Defects) -> None:
    async with world.pond(config=Config(orphan_age=60)) as pond:
        queue = pond.queue("q")
        await queue.enqueue(LARGE)
        [message] = await queue.receive()
        record = message._delivery.record
        assert record is not None
        world.forget(pond)
        await message.ack()
        assert world.asked(pond) == {"write": 1}
        with pytest.raises(MessageNotFound):
            async for _ in pond.service.payload_chunks(record):
                pass
        world.clock.advance(61)
        assert (await pond.collect()).orphans == 0


async def test_L9_an_upload_that_failed_can_be_repeated(world: Defects) -> None:
    """No store here has uploads that are worth retrying unasked; what matters is that the caller can, safely."""
    id = "0197a3c2-0000-7000-8000-000000000001"
    async with world.pond(plan=nth(1, "write_blob", fail_middle())) as pond:
        queue = pond.queue("q")
        with pytest.raises(StoreError):
            await queue.enqueue(LARGE, message_id=id)
        assert (await queue.enqueue(LARGE, message_id=id)) == (id, False)
        assert (await queue.enqueue(LARGE, message_id=id)) == (id, True)
        [message] = await queue.receive(5)
        assert await message.read() == LARGE


async def test_L9_a_source_of_unknown_length_is_never_held_in_memory(world: Defects) -> None:
    given = 0

    async def source() -> AsyncIterator[bytes]:
        nonlocal given
        for _ in range(64):
            given += 1
            yield bytes(65_536)

    async with world.pond() as pond:
        queue = pond.queue("q")
        await queue.enqueue(source())
        [message] = await queue.receive()
        assert (given, message.payload_size) == (64, 64 * 65_536)
        largest = 0
        async for chunk in message.stream():
            largest = max(largest, len(chunk))
        assert largest <= 1 << 20


async def test_L10_a_refused_ack_leaves_the_state(world: Defects) -> None:
    async with world.pond() as pond:
        queue = pond.queue("q")
        await queue.enqueue(b"x", visibility=10)
        [first] = await queue.receive()
        await first.state.save({"step": 1})
        await world.advance(11)
        [second] = await queue.receive()
        with pytest.raises(LeaseLost):
            await first.ack()
        assert await second.state.load() == {"step": 1}


@pytest.mark.parametrize("fault", [crash_before, crash_after])
async def test_L10_no_crash_in_an_ack_takes_the_state_alone(world: Defects, fault: Any) -> None:
    async with world.pond() as pond:
        queue = pond.queue("q")
        await queue.enqueue(b"x", visibility=10)
        [message] = await queue.receive()
        await message.state.save({"step": 1})
        pond.store.plan = nth(1, "write", fault())  # type: ignore[attr-defined]
        with pytest.raises(StoreError):
            await message.ack()
    world.clock.advance(11)
    async with world.pond() as pond:
        again = await pond.queue("q").receive()
        assert [await one.state.load() for one in again] == ([{"step": 1}] if fault is crash_before else [])


async def test_L11_nothing_remains_of_an_acked_message(world: Defects) -> None:
    async with world.pond() as pond:
        queue = pond.queue("q")
        receipt = await queue.enqueue(b"x")
        [message] = await queue.receive()
        record = message._delivery.record
        assert record is not None
        await message.state.save(1)
        await message.ack()
        assert await pond.queues() == []
        assert await pond.store.get("default", "q", receipt.message_id) is None
        assert await pond.store.state(record.item) is None
        assert await pond.store.payload(record.item) is None


async def test_L12_an_ack_after_an_extension_is_accepted(world: Defects) -> None:
    async with world.pond() as pond:
        queue = pond.queue("q")
        await queue.enqueue(b"x", visibility=10)
        [message] = await queue.receive()
        await message.extend(60)
        await world.advance(30)
        assert await queue.receive() == []
        await message.ack()
        assert (await queue.counts())[:5] == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("seconds", [0, -1, 0.0])
async def test_L13_an_extension_by_nothing_is_refused_and_drops_nothing(world: Defects, seconds: float) -> None:
    async with world.pond() as pond:
        queue = pond.queue("q")
        await queue.enqueue(b"x")
        [message] = await queue.receive()
        until = message.lease.until_ms
        with pytest.raises(InvalidInput):
            await message.extend(seconds)
        assert await queue.receive() == []
        view = await queue.get(message.id)
        assert view.lease is not None
        assert view.lease.until_ms == until


async def test_L14_what_is_acknowledged_is_on_the_disk(world: Defects) -> None:
    """On SQLite: every connection that writes waits for the fsync of its commit. Memory says that it is not durable."""
    async with world.pond() as pond:
        await pond.queue("q").enqueue(b"x")
        assert pond.store.capabilities.durable is (world.store == "sqlite")
    if world.store == "sqlite":
        store = SqliteStore(world.path, clock=world.clock)
        await store.open()
        try:
            execute = store._writer._applier.execute
            assert execute("PRAGMA synchronous").get == 2, "FULL"
            assert execute("PRAGMA journal_mode").get == "wal"
        finally:
            await store.close()


async def test_L15_an_ack_is_conditional_wherever_it_comes_from(world: Defects) -> None:
    async with world.pond() as pond, world.pond() as other:
        queue = pond.queue("q")
        await queue.enqueue(b"x", visibility=10)
        [first] = await queue.receive()
        await world.advance(11)
        [second] = await queue.receive()
        # The other process knows nothing of either delivery but what it is told.
        for answer in (
            other.queue("q").handle(first.id, first.lease.id, first.lease.token),
            other.queue("q").handle(first.id, first.lease.id, second.lease.token),
            other.queue("q").handle(first.id, second.lease.id, second.lease.token + 1),
        ):
            with pytest.raises(LeaseLost):
                await answer.ack()
        record = first._delivery.record
        assert record is not None
        assert await pond.store.write([Remove(record.item, record.mark)]) == [Conflict(Cause.STALE, first.id)]
        await other.queue("q").handle(second.id, second.lease.id, second.lease.token).ack()
        assert (await queue.counts())[:5] == (0, 0, 0, 0, 0)


async def test_L16_a_candidate_whose_waiter_left_is_at_hand_at_once(world: Defects) -> None:
    async with world.pond() as pond:
        queue = pond.queue("q")
        waiting = await world.waiting(pond.dispatcher.wait(None, "q"))
        await queue.enqueue(b"x")
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await world.settle()
        assert len(await queue.receive()) == 1


async def test_L16_a_claim_that_is_cancelled_on_its_way_gives_back(world: Defects) -> None:
    gate = Gate()
    async with world.pond() as pond:
        queue = pond.queue("q")
        await queue.enqueue(b"x")
        # Whichever call it is that leases.
        pond.store.plan = lambda call: hold(gate) if call.method in ("write", "take") else None  # type: ignore[attr-defined]
        claim = asyncio.ensure_future(queue.receive(wait=60))
        await gate.reached.wait()
        claim.cancel()
        gate.open()
        await asyncio.gather(claim, return_exceptions=True)
        await world.settle()
        [message] = await queue.receive()
        assert message.failures == 0


async def test_L17_no_candidate_is_parked_or_handed_out_twice(world: Defects) -> None:
    async with world.pond() as pond:
        queue = pond.queue("q")
        first = await world.waiting(pond.dispatcher.wait(None, "q"))
        second = await world.waiting(pond.dispatcher.wait(None, "q"))
        await queue.enqueue(b"x")
        await world.settle()
        assert first.done()
        assert not second.done(), "there is one candidate"
        assert pond.dispatcher.queue_stats(None, "q").pending_candidates == 0
        pond.service.give_back([candidate for candidate in [first.result()] if candidate is not None])
        pond.dispatcher.notify(None, "q")
        await world.settle()
        assert second.done()
        claimed = await pond.service.claim(None, "q", 5, candidates=[second.result()])  # type: ignore[list-item]
        assert len(claimed) == 1
        assert await queue.receive(5) == []


async def test_L18_a_dead_letter_keeps_everything_and_can_be_read(world: Defects) -> None:
    async with world.pond() as pond:
        queue = pond.queue("q")
        await queue.enqueue(LARGE, max_attempts=1, content_type="text/plain", attributes={"a": 1})
        [message] = await queue.receive()
        await message.state.save({"step": 3})
        await message.nack(error="disk on fire")
        [dead] = await queue.dead_letters.list()
        assert (dead.last_error, dead.dead_reason, dead.lease) == ("disk on fire", "max_attempts_exceeded", None)
        assert (dead.content_type, dead.attributes, dead.payload_size) == ("text/plain", {"a": 1}, len(LARGE))
        assert await queue.dead_letters.payload(dead.id) == LARGE
        await queue.dead_letters.redrive()
        [again] = await queue.receive()
        assert await again.state.load() == {"step": 3}


async def test_L19_no_lease_changes_the_messages_own_visibility(world: Defects) -> None:
    async with world.pond() as pond:
        queue = pond.queue("q")
        receipt = await queue.enqueue(b"x", visibility=60)
        [message] = await queue.receive(visibility=5)
        await message.extend(7)
        await message.nack(delay=1.5)
        assert (await queue.get(receipt.message_id)).record.head.visibility == 60_000
        await world.advance(1.499)
        assert await queue.receive() == []
        await world.advance(0.001)
        [again] = await queue.receive()
        assert again.lease.until_ms == world.clock.now_ms() + 60_000


async def test_L20_nothing_brings_back_a_deleted_message(world: Defects) -> None:
    async with world.pond() as pond:
        queue = pond.queue("q")
        await queue.enqueue(b"x")
        [message] = await queue.receive()
        delivery = message._delivery
        record = delivery.record
        await message.ack()
        delivery.record = record
        with pytest.raises(LeaseLost):
            await pond.service.save_message_document(delivery, last_error="late")
        assert (await queue.counts())[:5] == (0, 0, 0, 0, 0)


async def test_L20_a_claim_that_lost_counts_nothing_twice(world: Defects) -> None:
    async with world.pond() as pond, world.pond() as other:
        queue = pond.queue("q")
        await queue.enqueue(b"x", visibility=10)
        stale = await pond.service.next_candidate(None, "q")
        assert stale is not None
        [held] = await other.queue("q").receive()
        assert await pond.service.claim_records([stale]) == []
        assert (stale.status.attempts, stale.status.token) == (0, 0), "what the caller has is as it was"
        await held.defer()
        [message] = await queue.receive()
        assert (message.attempts, message.failures, message.lease.token) == (2, 0, 2)


async def test_L21_of_writes_in_one_commit_one_wins_and_no_etag_is_mended(world: Defects) -> None:
    async with world.pond() as pond:
        queue = pond.queue("q")
        receipt = await queue.enqueue(b"x")
        record = await pond.service.get_message(None, "q", receipt.message_id)
        update = pond.service.update(record, record.status)
        outcomes = await asyncio.gather(*(pond.store.write([update]) for _ in range(20)))
        assert sum(isinstance(one, Updated) for [one] in outcomes) == 1
        assert [one.cause for [one] in outcomes if isinstance(one, Conflict)] == [Cause.STALE] * 19
        # An unrelated delete between two writes of the same group: the later ones find nothing, and say so.
        now = await pond.service.get_message(None, "q", receipt.message_id)
        after = await asyncio.gather(
            pond.store.write([Remove(now.item, now.mark)]), *(pond.store.write([update]) for _ in range(5))
        )
        assert after == [[Removed()], *([[Conflict(Cause.MISSING, receipt.message_id)]] * 5)]
