"""What a pond asks of a store that charges for it: counted over hours of a clock that the test owns."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.unit.service.bench import Bench, ended, served
from tests.unit.service.far import Far

import millpond.testing
from millpond import Config, InvalidInput, InvalidQueue, Queue
from millpond.errors import StoreError
from millpond.model.clock import ManualClock
from millpond.stores.base import Reach
from millpond.stores.faulty import FaultyStore, Gate, fail_before, hold, nth
from millpond.stores.memory import MemoryStore
from millpond.testing import TestPond

HOUR = 3600
A_WAITERS_HOUR = 120
"""Requests that a process may cost which waits on an empty queue for an hour."""


class Paid:
    """A pond on a store that charges, and another one on the same data, which is free."""

    def __init__(self, *, feed: bool = True, config: Config | None = None, **capabilities: Any) -> None:
        self.clock = ManualClock()
        memory = MemoryStore(clock=self.clock, takes=False)
        options = {"reach": Reach.NETWORK, "requests_cost_money": True, "change_feed": feed} | capabilities
        self.store = FaultyStore(Far(self.clock, memory, **options))
        self.pond = millpond.testing.pond(store=self.store, clock=self.clock, config=config)
        self.elsewhere = millpond.testing.pond(store=memory.share(), clock=self.clock, seed=1)

    @property
    def calls(self) -> Counter[str]:
        """How often each method of the store was called, since the calls were cleared."""
        return Counter(call.method for call in self.store.calls)

    async def pass_time(self, seconds: int, step: int = 1) -> None:
        await self.pond.settle()
        for _ in range(seconds // step):
            self.clock.advance(step)
            for _ in range(8):
                await asyncio.sleep(0)
        await self.pond.settle()


@contextlib.asynccontextmanager
async def paid(**options: Any) -> AsyncIterator[tuple[Paid, TestPond]]:
    made = Paid(**options)
    async with made.pond as pond, made.elsewhere:
        made.store.calls.clear()
        yield made, pond


async def consume(queue: Queue, wait: float, got: list[bytes]) -> None:
    """What a worker does: wait, take, answer, and again."""
    while True:
        for message in await queue.receive(wait=wait):
            got.append(message.payload)
            await message.ack()


# An hour of waiting


@pytest.mark.parametrize("feed", [True, False], ids=["feed", "no-feed"])
@pytest.mark.parametrize("wait", [HOUR, 60, 20, 1])
async def test_an_hour_of_waiting_on_an_empty_queue(wait: float, feed: bool) -> None:
    async with paid(feed=feed) as (made, pond):
        task = asyncio.create_task(consume(pond.queue("q"), wait, []))
        await made.pass_time(HOUR)
        first = sum(made.calls.values())
        assert 60 <= made.calls["ready"] <= first <= A_WAITERS_HOUR
        made.store.calls.clear()
        await made.pass_time(HOUR)
        assert sum(made.calls.values()) <= 70
        assert made.calls["document"] <= 2, "the policy of a queue in which there is nothing is not read"
        await ended(task)


async def test_an_hour_of_waiting_now_and_then() -> None:
    async with paid(feed=False) as (made, pond):
        for _ in range(HOUR // 15):
            task = asyncio.create_task(pond.queue("q").receive(wait=5))
            await made.pass_time(5)
            assert await task == []
            await made.pass_time(10)
        assert sum(made.calls.values()) <= A_WAITERS_HOUR


async def test_many_who_wait_cost_no_more_than_one() -> None:
    async with paid() as (made, pond):
        tasks = [asyncio.create_task(consume(pond.queue("q"), wait, [])) for wait in range(5, 55)]
        await made.pass_time(HOUR)
        assert sum(made.calls.values()) <= A_WAITERS_HOUR
        for task in tasks:
            await ended(task)


async def test_an_hour_of_waiting_on_a_paused_queue() -> None:
    async with paid() as (made, pond):
        await made.elsewhere.queue("q").pause()
        await made.elsewhere.queue("q").enqueue(b"x")
        task = asyncio.create_task(consume(pond.queue("q"), 20, []))
        await made.pass_time(HOUR)
        assert 50 <= sum(made.calls.values()) <= A_WAITERS_HOUR
        await ended(task)


async def test_an_hour_beside_a_message_that_is_due_later() -> None:
    async with paid() as (made, pond):
        await made.elsewhere.queue("q").enqueue(b"x", delay=10 * HOUR)
        task = asyncio.create_task(consume(pond.queue("q"), 20, []))
        await made.pass_time(HOUR)
        assert sum(made.calls.values()) <= A_WAITERS_HOUR
        await ended(task)


async def test_nobody_waits_and_nothing_is_asked() -> None:
    async with paid() as (made, pond):
        await made.elsewhere.queue("q").enqueue_many([b"x"] * 10, ttl=60)
        await pond.queue("other").enqueue(b"y")
        made.store.calls.clear()
        await made.pass_time(10 * HOUR, step=60)
        assert made.calls == {}
        # It has waited, and does so no more.
        await ended(asyncio.create_task(consume(pond.queue("third"), 20, [])))
        await made.pass_time(3 * HOUR, step=60)
        made.store.calls.clear()
        await made.pass_time(10 * HOUR, step=60)
        assert made.calls == {}


async def test_who_consumes_collects_about_once_an_hour() -> None:
    async with paid() as (made, pond):
        task = asyncio.create_task(consume(pond.queue("q"), 60, []))
        await made.pass_time(10 * HOUR, step=5)
        assert 8 <= made.calls["sweep"] <= 13
        await ended(task)


# And no message the later


async def test_a_poll_finds_what_another_machine_enqueued() -> None:
    async with paid(feed=False) as (made, pond):
        got: list[bytes] = []
        task = asyncio.create_task(consume(pond.queue("q"), 20, got))
        await made.pass_time(600)
        await made.elsewhere.queue("q").enqueue_many([b"1", b"2"])
        await made.pass_time(61)
        assert got == [b"1", b"2"]
        # What came ends the back-off: the next is not waited for as long.
        await made.elsewhere.queue("q").enqueue(b"3")
        await made.pass_time(4)
        assert got == [b"1", b"2", b"3"]
        await ended(task)


async def test_a_feed_that_does_not_tell_of_everybody_does_not_end_the_polls() -> None:
    async with Bench(watched=True, partial_watch=True, poll_interval=3, poll_max_interval=60) as bench:
        task = await bench.waiting()
        assert bench.dispatcher.has_active_watcher(None, "q")
        await bench.advance(300, step=1)
        assert bench.source.times() == [0, 3, 9, 21, 45, 93, 153, 213, 273]
        bench.source.put(1)
        bench.feed.watches[0].changed()
        await bench.settle()
        assert served([task]) == [1]


@pytest.mark.parametrize("own", [True, False], ids=["own", "same-host"])
async def test_news_are_looked_at_at_once(own: bool) -> None:
    async with paid() as (made, pond):
        got: list[bytes] = []
        task = asyncio.create_task(consume(pond.queue("q"), 20, got))
        await made.pass_time(607)
        producer = pond if own else made.elsewhere
        for number in range(3):
            await producer.queue("q").enqueue(b"%d" % number)
            await pond.settle()
            assert len(got) == number + 1
        await ended(task)


async def test_news_between_two_waits_are_kept_for_the_second() -> None:
    async with paid() as (made, pond):
        queue = pond.queue("q")
        waiting = asyncio.create_task(queue.receive(wait=20))
        await made.pass_time(30)
        assert await waiting == []
        await made.elsewhere.queue("q").enqueue(b"x")
        await pond.settle()
        waiting = asyncio.create_task(queue.receive(wait=20))
        await pond.settle()
        assert [message.payload for message in await waiting] == [b"x"]


async def test_a_bare_notify_makes_who_waits_look_at_once() -> None:
    async with paid(feed=False) as (made, pond):
        queue = pond.queue("q")
        got: list[bytes] = []
        task = asyncio.create_task(consume(queue, 20, got))
        await made.pass_time(307)
        await made.elsewhere.queue("q").enqueue(b"x")
        await pond.settle()
        assert got == []
        pond.dispatcher.notify(None, "q")
        await pond.settle()
        assert got == [b"x"]
        await ended(task)


@pytest.mark.parametrize("by", ["queue", "pond"])
async def test_who_waits_looks_at_once_when_told_from_outside(by: str) -> None:
    async with paid(feed=False) as (made, pond):
        queue = pond.queue("q", namespace="shop")
        got: list[bytes] = []
        task = asyncio.create_task(consume(queue, 20, got))
        await made.pass_time(307)
        await made.elsewhere.queue("q", namespace="shop").enqueue(b"x")
        await pond.notify("other", namespace="shop")
        await pond.notify("q")
        await pond.settle()
        assert got == [], "that was another queue"
        await (queue.notify() if by == "queue" else pond.notify("Q", namespace="shop"))
        await pond.settle()
        assert got == [b"x"]
        await ended(task)


async def test_being_told_costs_nothing_while_nobody_waits() -> None:
    async with paid(feed=False) as (made, pond):
        for _ in range(100):
            await pond.queue("q").notify()
        await made.pass_time(100)
        assert made.calls == {}
        with pytest.raises(InvalidQueue):
            await pond.notify("no such name!")


async def test_candidates_at_hand_are_looked_for_anew_when_told() -> None:
    async with paid(feed=False) as (made, pond):
        queue = pond.queue("q")
        await queue.enqueue_many([b"1", b"2"])
        assert [message.payload for message in await queue.receive()] == [b"1"]
        await made.elsewhere.queue("q").enqueue(b"urgent", priority=9)
        await queue.notify()
        assert [message.payload for message in await queue.receive()] == [b"urgent"]


async def test_a_notify_between_two_waits_is_kept_for_the_second() -> None:
    async with paid(feed=False) as (made, pond):
        queue = pond.queue("q")
        task = asyncio.create_task(queue.receive(wait=100))
        await made.pass_time(100)
        assert await task == []
        await made.elsewhere.queue("q").enqueue(b"x")
        pond.dispatcher.notify(None, "q")
        task = asyncio.create_task(queue.receive(wait=20))
        await pond.settle()
        assert [message.payload for message in await task] == [b"x"]


async def test_what_comes_due_is_met_exactly() -> None:
    async with paid(feed=False) as (made, pond):
        got: list[bytes] = []
        task = asyncio.create_task(consume(pond.queue("q"), 20, got))
        await made.pass_time(200)
        await pond.queue("q").enqueue(b"x", delay=100)
        await made.pass_time(99)
        assert got == []
        await made.pass_time(1)
        assert got == [b"x"]
        await ended(task)


async def test_a_receive_that_does_not_wait_always_looks() -> None:
    async with paid(feed=False) as (made, pond):
        queue = pond.queue("q")
        task = asyncio.create_task(consume(queue, 20, []))
        await made.pass_time(200)
        await ended(task)
        await made.elsewhere.queue("q").enqueue(b"x")
        assert [message.payload for message in await queue.receive()] == [b"x"]


async def test_what_is_wrong_is_refused_while_nothing_can_be_had() -> None:
    async with paid() as (made, pond):
        queue = pond.queue("q")
        task = asyncio.create_task(consume(queue, 20, []))
        await made.pass_time(30)
        assert pond.dispatcher.looks_after("default", "q")
        for wrong in ({"count": 0}, {"visibility": -1}, {"owner": ""}):
            with pytest.raises(InvalidInput):
                await queue.receive(**{"wait": 1, **wrong})
        await ended(task)


async def test_a_look_by_another_one_counts_and_what_it_leaves_is_taken() -> None:
    async with paid(feed=False) as (made, pond):
        queue = pond.queue("q")
        got: list[bytes] = []
        task = asyncio.create_task(consume(queue, HOUR, got))
        await made.pass_time(300)
        await made.elsewhere.queue("q").enqueue_many([b"1", b"2", b"3"])
        assert len(await queue.receive()) == 1
        await made.pass_time(5)
        assert got == [b"2", b"3"], "it does not wait for its own next look"
        await ended(task)


async def test_a_pause_by_another_machine_holds_within_a_minute() -> None:
    async with paid(feed=False) as (made, pond):
        queue = pond.queue("q")
        await queue.enqueue_many([b"1", b"2", b"3"])
        assert len(await queue.receive()) == 1
        await made.elsewhere.queue("q").pause()
        made.clock.advance(59)
        assert len(await queue.receive()) == 1
        made.clock.advance(1)
        assert await queue.receive() == []
        await made.elsewhere.queue("q").resume()
        made.clock.advance(60)
        assert len(await queue.receive()) == 1


async def test_candidates_of_a_queue_that_turns_out_to_be_paused_go_back() -> None:
    async with paid(feed=False) as (made, pond):
        await made.elsewhere.queue("q").enqueue(b"x")
        await made.elsewhere.queue("q").pause()
        assert await pond.service.next_candidates(None, "q", 1) == []
        assert pond.service.cache(("default", "q")).inflight == 0
        made.store.calls.clear()
        assert await pond.service.next_candidates(None, "q", 1) == []
        assert made.calls == {}, "it is known to be paused"


async def test_candidates_go_back_when_the_policy_cannot_be_read() -> None:
    from millpond.stores.faulty import fail_before, nth

    async with paid(feed=False) as (made, pond):
        await made.elsewhere.queue("q").enqueue(b"x")
        made.store.plan = nth(1, "document", fail_before())
        with pytest.raises(millpond.StoreError):
            await pond.service.next_candidates(None, "q", 1)
        assert pond.service.cache(("default", "q")).inflight == 0
        assert len(await pond.service.next_candidates(None, "q", 1)) == 1


async def test_news_of_a_busy_queue_do_not_cost_its_policy_each_time() -> None:
    async with paid() as (made, pond):
        queue, other = pond.queue("q"), made.elsewhere.queue("q")
        got: list[bytes] = []
        task = asyncio.create_task(consume(queue, 20, got))
        await made.pass_time(10)
        made.store.calls.clear()
        for number in range(50):
            await other.enqueue(b"%d" % number)
            await pond.settle()
        assert len(got) == 50
        assert made.calls["document"] <= 2
        await ended(task)


async def test_a_pause_on_the_same_machine_and_its_end_are_heard_of_within_a_second() -> None:
    async with paid() as (made, pond):
        other = made.elsewhere.queue("q")
        got: list[bytes] = []
        task = asyncio.create_task(consume(pond.queue("q"), 20, got))
        await made.pass_time(10)
        await other.pause()
        await made.pass_time(1)
        await other.enqueue(b"x")
        await made.pass_time(30)
        assert got == []
        await other.resume()
        await pond.settle()
        await made.pass_time(1)
        assert got == [b"x"]
        await ended(task)


async def test_news_of_a_paused_queue_cost_its_policy_once_a_second() -> None:
    async with paid() as (made, pond):
        other = made.elsewhere.queue("q")
        await other.pause()
        task = asyncio.create_task(consume(pond.queue("q"), 20, []))
        await made.pass_time(10)
        made.store.calls.clear()
        for _ in range(10):
            for _ in range(20):
                await other.enqueue(b"x")
                await pond.settle()
            await made.pass_time(1)
        assert sum(made.calls.values()) <= 12
        assert made.calls["ready"] == 0
        await ended(task)


# How much is read at once


class Limits(Far):
    """Notes how many records each look asked for."""

    def __init__(self, clock: ManualClock, **capabilities: Any) -> None:
        super().__init__(clock, **capabilities)
        self.limits: list[int] = []

    async def ready(self, namespace: str, queue: str, now: int, *, limit: int) -> Any:
        self.limits.append(limit)
        await asyncio.sleep(0)
        return await self.inner.ready(namespace, queue, now, limit=limit)


@pytest.mark.parametrize(("costs", "count", "limit"), [(True, 1, 4), (True, 100, 100), (False, 1, 512)])
async def test_about_what_is_wanted_is_read(costs: bool, count: int, limit: int) -> None:
    clock = ManualClock()
    store = Limits(clock, requests_cost_money=costs)
    async with millpond.testing.pond(store=store, clock=clock) as pond:
        await pond.queue("q").enqueue_many([b"x"] * 200)
        assert len(await pond.queue("q").receive(count)) == count
        assert store.limits == [limit]


async def test_it_is_read_ahead_while_nobody_competes() -> None:
    clock = ManualClock()
    store = Limits(clock, requests_cost_money=True)
    async with millpond.testing.pond(store=store, clock=clock, config=Config(thrifty_page_size=32)) as pond:
        queue = pond.queue("q")
        other = millpond.testing.pond(store=store.inner.share(), clock=clock, seed=2)
        await other.queue("q").enqueue_many([b"x"] * 130)
        for _ in range(124):
            assert len(await queue.receive()) == 1
        assert store.limits == [4, 8, 16, 32, 32, 32]
        pond.service.cache(("default", "q")).lost_race()
        while await queue.receive():
            pass
        assert store.limits[6:][:2] == [4, 8]


@pytest.mark.parametrize("page", [1, 3, 32])
async def test_who_shares_a_look_and_goes_away_empty_looks_for_itself(page: int) -> None:
    clock = ManualClock()
    store = Limits(clock, requests_cost_money=True)
    async with millpond.testing.pond(store=store, clock=clock, config=Config(thrifty_page_size=page)) as pond:
        queue = pond.queue("q")
        await millpond.testing.pond(store=store.inner.share(), clock=clock, seed=2).queue("q").enqueue_many([b"x"] * 20)
        taken = await asyncio.gather(*(queue.receive() for _ in range(20)))
        assert [len(messages) for messages in taken] == [1] * 20
        assert await queue.receive() == []


async def test_candidates_for_many_are_found_by_those_who_share_a_look() -> None:
    clock = ManualClock()
    store = Limits(clock, requests_cost_money=True)
    async with millpond.testing.pond(store=store, clock=clock, config=Config(thrifty_page_size=1)) as pond:
        await millpond.testing.pond(store=store.inner.share(), clock=clock, seed=2).queue("q").enqueue_many([b"x"] * 9)
        found = await asyncio.gather(*(pond.service.next_candidates(None, "q", 1) for _ in range(9)))
        assert [len(candidates) for candidates in found] == [1] * 9
        assert await pond.service.next_candidates(None, "q", 1) == []


async def test_a_slow_worker_does_not_look_before_each_message() -> None:
    clock = ManualClock()
    store = Limits(clock, requests_cost_money=True)
    async with millpond.testing.pond(store=store, clock=clock) as pond:
        await millpond.testing.pond(store=store.inner.share(), clock=clock, seed=2).queue("q").enqueue_many([b"x"] * 20)
        for _ in range(20):
            [message] = await pond.queue("q").receive()
            clock.advance(2)
            await message.ack()
        assert len(store.limits) <= 20 / 2


async def test_callers_that_come_at_once_share_one_read_of_the_policy() -> None:
    async with paid() as (made, pond):
        queue = pond.queue("q")
        for count in (1, 2):
            gate = Gate()
            made.store.plan = lambda call, gate=gate: hold(gate) if call.method == "document" else None
            calls = [asyncio.ensure_future(queue.enqueue(b"x")) for _ in range(20)]
            await gate.reached.wait()
            await pond.settle()
            gate.open()
            await asyncio.gather(*calls)
            assert made.calls["document"] == count
            made.clock.advance(HOUR)


async def test_a_caller_who_leaves_takes_the_shared_read_from_nobody() -> None:
    async with paid() as (made, pond):
        queue = pond.queue("q")
        gate = Gate()
        made.store.plan = nth(1, "document", hold(gate))
        first, second = (asyncio.ensure_future(queue.enqueue(b"x")) for _ in range(2))
        await gate.reached.wait()
        first.cancel()
        gate.open()
        assert (await second).message_id
        await asyncio.gather(first, return_exceptions=True)
        assert first.cancelled()
        assert made.calls["document"] == 1


async def test_a_shared_read_that_fails_fails_for_all_and_is_tried_again() -> None:
    async with paid() as (made, pond):
        queue = pond.queue("q")
        made.store.plan = nth(1, "document", fail_before())
        errors = await asyncio.gather(*(queue.enqueue(b"x") for _ in range(3)), return_exceptions=True)
        assert [type(error) for error in errors] == [StoreError] * 3
        assert (await queue.enqueue(b"x")).message_id
        assert made.calls["document"] == 2
