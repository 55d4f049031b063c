"""Ways in which lockd's queue loses, repeats or hides messages, by their numbers, and that they are not ours.

Shown elsewhere or not applicable to these stores: L9 (no upload can fail half-way to a store on this machine; sources
that raise are in the conformance suite), L14 (test_sqlite.py reads the pragma), L15 (conditional delete is a rule of
the conformance suite), L21 (group commit: the random walk of the conformance suite).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

import millpond
import millpond.testing
from millpond.errors import InvalidInput, InvalidMessageId, InvalidQueue, LeaseLost, StoreError
from millpond.model.keys import message_lease_key
from millpond.service.config import Config
from millpond.testing import TestPond

Scenario = Callable[[TestPond], Awaitable[None]]


def run(scenario: Scenario, config: Config | None = None) -> None:
    async def main() -> None:
        async with millpond.testing.pond(config=config) as pond:
            await scenario(pond)

    asyncio.run(asyncio.wait_for(main(), 30))


def test_L01_a_move_to_the_dead_letters_is_one_write_and_poisons_nothing() -> None:
    async def scenario(pond: TestPond) -> None:
        queue = pond.queue("q")
        await queue.enqueue(b"poison", max_attempts=1)
        await queue.enqueue_many([b"good"] * 50)
        [poison] = await queue.receive()
        before = pond.statistics()["store"]["writes"]
        await poison.nack(error="no")
        assert pond.statistics()["store"]["writes"] == before + 1
        assert len(await queue.receive(100)) == 50

    run(scenario)


def test_L02_a_lost_race_does_not_duplicate_into_the_dead_letters() -> None:
    async def scenario(pond: TestPond) -> None:
        queue = pond.queue("q")
        receipt = await queue.enqueue(b"x")
        stale = await pond.service.get_message(None, "q", receipt.message_id)
        [held] = await queue.receive()
        with pytest.raises(LeaseLost):
            await pond.service.move_to_dlq(stale)
        assert await queue.dead_letters.list() == []
        await held.ack()

    run(scenario)


def test_L03_the_budget_is_checked_at_hand_out() -> None:
    async def scenario(pond: TestPond) -> None:
        queue = pond.queue("q")
        await queue.enqueue(b"x", max_attempts=1)
        [message] = await queue.receive()
        await message.nack()
        assert await queue.receive() == []
        assert (await queue.counts()).dead == 1

    run(scenario)


def test_L04_a_crash_of_the_consumer_counts_as_a_failure() -> None:
    async def scenario(pond: TestPond) -> None:
        queue = pond.queue("q")
        await queue.enqueue(b"x", max_attempts=3, visibility=10)
        for _ in range(3):
            assert len(await queue.receive()) == 1
            await pond.advance(11)
        assert await queue.receive() == []
        [dead] = await queue.dead_letters.list()
        assert (dead.attempts, dead.failures) == (3, 3)

    run(scenario)


def test_L05_expired_messages_are_not_delivered() -> None:
    async def scenario(pond: TestPond) -> None:
        queue = pond.queue("q")
        await queue.enqueue(b"x", ttl=1)
        await pond.advance(2.1)
        assert await queue.receive() == []

    run(scenario)


def test_L06_an_expired_message_is_left_to_its_holder() -> None:
    async def scenario(pond: TestPond) -> None:
        queue = pond.queue("q")
        await queue.enqueue(b"x", ttl=5, visibility=60)
        [message] = await queue.receive()
        await pond.advance(10)
        assert (await pond.collect()).expired == 0
        await message.ack()

    run(scenario)


def test_L07_L08_a_refused_enqueue_leaves_nothing_behind() -> None:
    async def scenario(pond: TestPond) -> None:
        queue = pond.queue("q")
        with pytest.raises(InvalidInput):
            await queue.enqueue(bytes(200_000), attributes={"a": object()})
        statistics = pond.statistics()["store"]
        assert (statistics["records"], statistics["blobs"]) == (0, 0)

    run(scenario)


def test_L10_a_refused_ack_leaves_the_state() -> None:
    async def scenario(pond: TestPond) -> None:
        queue = pond.queue("q")
        await queue.enqueue(b"x", visibility=10)
        [first] = await queue.receive()
        await first.state.save({"step": 1})
        await pond.advance(11)
        [second] = await queue.receive()
        with pytest.raises(LeaseLost):
            await first.ack()
        assert await second.state.load() == {"step": 1}

    run(scenario)


def test_L11_nothing_remains_of_an_acked_message() -> None:
    async def scenario(pond: TestPond) -> None:
        queue = pond.queue("q")
        await queue.enqueue(b"x")
        [message] = await queue.receive()
        await message.state.save(1)
        await message.ack()
        assert pond.statistics()["store"]["records"] == 0
        assert await pond.queues() == []

    run(scenario)


def test_L12_an_ack_after_an_extension_is_accepted() -> None:
    async def scenario(pond: TestPond) -> None:
        queue = pond.queue("q")
        await queue.enqueue(b"x", visibility=10)
        [message] = await queue.receive()
        await message.extend(60)
        await pond.advance(30)
        assert await queue.receive() == []
        await message.ack()

    run(scenario)


def test_L13_an_extension_by_nothing_is_refused() -> None:
    async def scenario(pond: TestPond) -> None:
        queue = pond.queue("q")
        await queue.enqueue(b"x")
        [message] = await queue.receive()
        for seconds in (0, -1):
            with pytest.raises(InvalidInput):
                await message.extend(seconds)
        assert await queue.receive() == []

    run(scenario)


def test_L16_L17_a_candidate_whose_waiter_left_is_at_hand_at_once() -> None:
    async def scenario(pond: TestPond) -> None:
        queue = pond.queue("q")
        waiting = asyncio.create_task(pond.dispatcher.wait(None, "q"))
        await pond.settle()
        await queue.enqueue(b"x")
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await pond.settle()
        assert len(await queue.receive()) == 1
        assert pond.dispatcher.queue_stats(None, "q").pending_candidates == 0

    run(scenario)


def test_L18_a_dead_letter_keeps_the_consumers_error_and_can_be_read() -> None:
    async def scenario(pond: TestPond) -> None:
        queue = pond.queue("q")
        await queue.enqueue(b"x", max_attempts=1)
        [message] = await queue.receive()
        await message.nack(error="disk on fire")
        [dead] = await queue.dead_letters.list()
        assert (dead.last_error, dead.dead_reason, dead.lease) == ("disk on fire", "max_attempts_exceeded", None)
        assert await dead.payload() == b"x"

    run(scenario)


def test_L19_no_lease_changes_the_messages_own_visibility() -> None:
    async def scenario(pond: TestPond) -> None:
        queue = pond.queue("q")
        receipt = await queue.enqueue(b"x", visibility=60)
        [message] = await queue.receive(visibility=5)
        await message.extend(7)
        await message.nack(delay=1.5)
        assert (await queue.get(receipt.message_id)).record.head.visibility == 60_000
        await pond.advance(1.499)
        assert await queue.receive() == []
        await pond.advance(0.001)
        assert len(await queue.receive()) == 1

    run(scenario)


def test_L20_nothing_brings_back_a_deleted_message() -> None:
    async def scenario(pond: TestPond) -> None:
        queue = pond.queue("q")
        await queue.enqueue(b"x")
        [message] = await queue.receive()
        delivery = message._delivery
        record = delivery.record
        await message.ack()
        delivery.record = record
        with pytest.raises(LeaseLost):
            await pond.service.save_message_document(delivery, last_error="late")
        assert (await queue.counts()).ready == 0

    run(scenario)


def test_N1_N2_names_and_ids_cannot_climb() -> None:
    for name in (".", ".."):
        with pytest.raises(InvalidQueue):
            message_lease_key("default", name, "0197a3c2-0000-7000-8000-000000000000")
        with pytest.raises(InvalidQueue):
            message_lease_key(name, "q", "0197a3c2-0000-7000-8000-000000000000")
    for id in ("", "../../other/msg/x"):
        with pytest.raises(InvalidMessageId):
            message_lease_key("default", "q", id)


def test_M1_the_ready_cache_is_bounded_and_loses_nothing() -> None:
    async def scenario(pond: TestPond) -> None:
        queue = pond.queue("q")
        await queue.receive()
        await queue.enqueue_many([b"x"] * 500)
        cache = pond.service.cache(("default", "q"))
        assert len(cache) <= 16
        taken = 0
        while messages := await queue.receive(7):
            taken += len(messages)
            assert len(cache) <= 16
            await queue.ack_many(messages)
        assert (taken, cache.inflight) == (500, 0)

    run(scenario, Config(ready_cache_size=16))


def test_P1_P2_P3_an_empty_answer_is_one_read_however_many_are_delayed() -> None:
    async def scenario(pond: TestPond) -> None:
        queue = pond.queue("q")
        await queue.enqueue_many([b"later"] * 3000, delay=3600)
        pond.service.reset_ready_cache_stats()
        assert await queue.receive() == []
        stats = pond.service.ready_cache_stats()
        assert (stats.list_scans, stats.list_objects) == (1, 0)
        await queue.enqueue(b"now")
        assert [message.payload for message in await queue.receive()] == [b"now"]

    run(scenario)


def test_P6_a_broken_queue_does_not_hold_up_another() -> None:
    async def scenario(pond: TestPond) -> None:
        ready = pond.store.ready

        async def broken(namespace: str, queue: str, now: int, *, limit: int) -> object:
            if queue == "broken":
                raise StoreError("broken on purpose")
            return await ready(namespace, queue, now, limit=limit)

        pond.store.ready = broken  # type: ignore[method-assign, assignment]
        failing = asyncio.create_task(pond.dispatcher.wait(None, "broken"))
        waiting = asyncio.create_task(pond.queue("good").receive(wait=60))
        await pond.settle()
        await pond.queue("good").enqueue(b"x")
        await pond.settle()
        assert len(await waiting) == 1
        with pytest.raises(StoreError, match="on purpose"):
            await failing

    run(scenario)


def test_P8_P9_a_watch_lingers_between_waits() -> None:
    async def scenario(pond: TestPond) -> None:
        queue = pond.queue("q")
        for _ in range(5):
            waiting = asyncio.create_task(queue.receive(wait=60))
            await pond.settle()
            assert pond.dispatcher.has_active_watcher(None, "q")
            await queue.enqueue(b"x")
            [message] = await waiting
            await message.ack()
            assert pond.dispatcher.has_active_watcher(None, "q")
        await pond.advance(6)
        assert not pond.dispatcher.has_active_watcher(None, "q")

    run(scenario)


def test_P11_order_is_priority_then_first_come() -> None:
    async def scenario(pond: TestPond) -> None:
        queue = pond.queue("q")
        for number in range(20):
            await queue.enqueue(b"%d" % number, priority=9 if number % 5 == 0 else 1)
        got = [int(message.payload) for message in await queue.receive(20)]
        assert got == [0, 5, 10, 15, *(number for number in range(20) if number % 5)]

    run(scenario)


def test_P13_a_batch_is_one_write() -> None:
    async def scenario(pond: TestPond) -> None:
        queue = pond.queue("q")
        before = pond.statistics()["store"]["writes"]
        await queue.enqueue_many([b"x"] * 100)
        await queue.ack_many(await queue.receive(100))
        assert pond.statistics()["store"]["writes"] == before + 3

    run(scenario)
