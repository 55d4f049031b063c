"""P1 to P14: scans, polling and fairness. Times at which a store is asked are counted, not measured.

docs/reference/seed-defects.md says what each was.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import apsw
import pytest

from millpond import Config, StoreError
from millpond.service.dispatcher import TICK
from millpond.stores import memory, ordered
from millpond.stores.base import Box, Conflict
from millpond.stores.faulty import Call, Fault, FaultyStore, Gate, fail_before, hold

if TYPE_CHECKING:
    from tests.defects.conftest import Defects

    from millpond import Pond

KEY = ("default", "q")


async def test_P1_an_empty_answer_is_one_read(world: Defects) -> None:
    async with world.pond() as pond:
        queue = pond.queue("q")
        await queue.receive()
        for _ in range(12):
            await world.advance(1.0)
            world.forget(pond)
            assert await queue.receive() == []
            assert world.looks(pond) == 1
            assert set(world.asked(pond)) <= {"ready", "take", "document"}, "and once a second the queue's policy"


async def test_P2_the_invisible_are_not_read_however_many(world: Defects) -> None:
    async with world.pond(config=Config(ready_page_size=16)) as pond:
        queue = pond.queue("q")
        await queue.enqueue_many([b"later"] * 2000, delay=3600)
        pond.service.reset_ready_cache_stats()
        world.forget(pond)
        assert await queue.receive() == []
        assert pond.service.ready_cache_stats().list_objects == 0
        assert world.looks(pond) == 1


@pytest.mark.parametrize("hidden", ["delayed", "held", "blocked"])
async def test_P3_what_is_not_ready_hides_nothing_that_is(world: Defects, hidden: str) -> None:
    async with world.pond(config=Config(ready_page_size=4, ready_cache_size=4)) as pond, world.pond() as other:
        queue = pond.queue("q")
        if hidden == "delayed":
            await queue.enqueue_many([b"later"] * 300, delay=3600, priority=9)
        elif hidden == "held":
            await queue.enqueue_many([b"held"] * 300, priority=9)
            assert len(await other.queue("q").receive(300, visibility=600)) == 300
        else:
            await queue.enqueue_many([b"behind"] * 300, ordering_key="g", priority=9)
            assert len(await other.queue("q").receive(300, visibility=600)) == 1
        await other.queue("q").enqueue(b"now")
        await world.advance(1.0)
        world.forget(pond)
        assert [message.payload for message in await queue.receive()] == [b"now"]
        assert world.looks(pond) <= 2


async def test_P4_a_candidate_that_is_being_handed_out_is_not_read_again(world: Defects) -> None:
    async with world.pond() as pond:
        queue = pond.queue("q")
        await queue.enqueue(b"x")
        candidate = await pond.service.next_candidate(None, "q")
        assert candidate is not None
        world.forget(pond)
        pond.service.reset_ready_cache_stats()
        for _ in range(3):
            await pond.service.refresh_ready_cache(None, "q")
        stats = pond.service.ready_cache_stats()
        assert (stats.load_count, stats.inflight_skips) == (0, 3)
        assert world.asked(pond) == {"ready": 3}
        assert await pond.service.next_candidate(None, "q") is None, "it is handed out once"


async def test_P5_looking_costs_one_read_and_moves_nothing(world: Defects) -> None:
    async with world.pond() as pond:
        queue = pond.queue("q")
        await queue.enqueue_many([b"later"] * 100, delay=3600)
        await queue.enqueue_many([b"1", b"2", b"3"])
        await pond.service.refresh_ready_cache(None, "q")
        for look, asked in (
            (queue.peek, {"ready": 1}),
            (queue.counts, {"counts": 1}),
            (queue.next_due, {"ready": 1}),
        ):
            looked: Callable[[], Any] = look
            world.forget(pond)
            pond.service.reset_ready_cache_stats()
            await looked()
            assert world.asked(pond) == asked, looked
            assert pond.service.ready_cache_stats().list_scans == 0, "the consumers' cache is left alone"
        world.forget(pond)
        assert pond.dispatcher.queue_stats(None, "q").waiting_consumers == 0
        assert [message.payload for message in await queue.receive(3)] == [b"1", b"2", b"3"]
        assert world.looks(pond) <= 1


def _of_queue(pond: Pond, name: str, fault: Fault) -> None:
    """Let every look at one of the pond's queues meet the fault."""
    store = pond.store
    assert isinstance(store, FaultyStore)
    ready = store.ready

    async def look(namespace: str, queue: str, now: int, *, limit: int) -> Any:
        def plan(call: Call) -> Fault | None:
            return fault if call.method == "ready" and queue == name else None

        store.plan = plan  # Read before the call first waits, so that no other's look can come in between.
        return await ready(namespace, queue, now, limit=limit)

    store.ready = look  # type: ignore[method-assign]


async def test_P6_a_failing_queue_holds_up_no_other_and_is_left_to_rest(world: Defects) -> None:
    async with world.pond() as pond:
        _of_queue(pond, "broken", fail_before(StoreError("broken on purpose")))
        failing = [asyncio.ensure_future(pond.dispatcher.wait(None, "broken")) for _ in range(3)]
        waiting = await world.waiting(pond.queue("good").receive(wait=60))
        await pond.queue("good").enqueue(b"x")
        await world.settle()
        assert len(await waiting) == 1
        # The clock stands still: the first waiter has its answer, and nobody tries again until some time has passed.
        assert [one.done() for one in failing] == [True, False, False]
        polls = pond.dispatcher.polls
        await world.settle()
        assert pond.dispatcher.polls == polls
        for _ in range(3):
            await world.advance(1.0)
        for one in failing:
            with pytest.raises(StoreError, match="on purpose"):
                await one
        assert pond.dispatcher.polls <= polls + 3


async def test_P6_a_slow_queue_holds_up_no_other(world: Defects) -> None:
    gate = Gate()
    async with world.pond() as pond:
        _of_queue(pond, "slow", hold(gate))
        slow = asyncio.ensure_future(pond.queue("slow").receive(wait=600))
        await gate.reached.wait()
        names = [f"q{number}" for number in range(8)]
        waiting = [await world.waiting(pond.queue(name).receive(wait=60)) for name in names]
        for name in names:
            await pond.queue(name).enqueue(name.encode())
        got = await asyncio.gather(*waiting)
        assert [[message.payload for message in one] for one in got] == [[name.encode()] for name in names]
        assert not slow.done()
        gate.open()
        await pond.queue("slow").enqueue(b"late")
        assert len(await slow) == 1


async def test_P6_many_waiters_are_served_by_few_looks(world: Defects) -> None:
    async with world.pond() as pond, world.pond() as producer:
        waiting = [await world.waiting(pond.queue("q").receive(wait=600)) for _ in range(64)]
        world.forget(pond)
        await producer.queue("q").enqueue_many([b"x"] * 64)
        await world.eventually(lambda: all(one.done() for one in waiting))
        assert {len(one.result()) for one in waiting} == {1}
        assert world.asked(pond)["ready"] <= 6, "one look for many, not one each"


async def test_P7_a_delivery_leaves_no_poll_behind(world: Defects) -> None:
    async with world.pond() as pond:
        queue = pond.queue("q")
        first = await world.waiting(queue.receive(wait=600))
        second = await world.waiting(queue.receive(wait=600))
        world.forget(pond)
        await queue.enqueue(b"x")
        assert len(await first) == 1
        await world.settle()
        looks = world.looks(pond)
        polls = pond.dispatcher.polls
        assert looks <= 2, "at most one look for each of the two"
        await world.settle()
        assert (world.looks(pond), pond.dispatcher.polls) == (looks, polls)
        await queue.enqueue(b"y")
        assert len(await second) == 1
        await world.settle()
        assert pond.dispatcher.polls <= polls + 1
        before = (world.looks(pond), pond.dispatcher.polls)
        await world.advance(60)
        assert (world.looks(pond), pond.dispatcher.polls) == before, "nobody waits, nothing runs"


async def test_P8_a_watch_lingers_between_waits(world: Defects) -> None:
    async with world.pond() as pond:
        opened = _count_subscriptions(world)
        queue = pond.queue("q")
        for _ in range(20):
            waiting = await world.waiting(queue.receive(wait=60))
            assert pond.dispatcher.has_active_watcher(None, "q")
            await queue.enqueue(b"x")
            [message] = await waiting
            await message.ack()
            await world.advance(1.0)
        assert len(opened) == 1
        await world.advance(60)
        assert not pond.dispatcher.has_active_watcher(None, "q")


def _count_subscriptions(world: Defects, *, failing: int = 0) -> list[Any]:
    """The subscriptions that the newest pond opens from now on; the first ``failing`` of them do not open."""
    store: Any = world.stores[-1]
    subscribe, opened, left = store.inner.subscribe, [], failing

    def counted(namespace: str, queue: str, callback: Callable[[], object]) -> Any:
        nonlocal left
        if left:
            left -= 1
            raise StoreError("no feed for now")
        opened.append(subscribe(namespace, queue, callback))
        return opened[-1]

    store.subscribe = counted
    return opened


async def test_P9_a_watch_that_did_not_open_is_tried_again(world: Defects) -> None:
    async with world.pond() as producer, world.pond() as pond:
        opened = _count_subscriptions(world, failing=3)
        waiting = await world.waiting(pond.queue("q").receive(wait=600))
        assert not pond.dispatcher.has_active_watcher(None, "q")
        for _ in range(40):
            await world.advance(1.0)
        assert pond.dispatcher.has_active_watcher(None, "q")
        assert len(opened) == 1
        await producer.queue("q").enqueue(b"x")
        await world.eventually(waiting.done)
        assert len(waiting.result()) == 1


async def test_P9_a_watch_that_closes_is_noticed_long_before_the_next_poll(world: Defects) -> None:
    config = Config(resilient_poll_interval=300)
    async with world.pond() as producer, world.pond(config=config) as pond:
        opened = _count_subscriptions(world)
        waiting = await world.waiting(pond.queue("q").receive(wait=600))
        opened[0].close()
        await producer.queue("q").enqueue(b"x")
        await world.advance(TICK)
        await world.eventually(waiting.done)
        assert len(waiting.result()) == 1
        assert len(opened) == 2


@pytest.mark.parametrize("gone", ["acked", "held", "purged"])
async def test_P10_ghosts_at_the_head_do_not_make_a_queue_empty(world: Defects, gone: str) -> None:
    async with world.pond() as pond, world.pond() as other:
        queue, elsewhere = pond.queue("q"), other.queue("q")
        await queue.enqueue_many([b"ghost"] * 5, priority=9)
        await pond.service.refresh_ready_cache(None, "q")
        assert len(pond.service.cache(KEY)) == 5
        taken = [] if gone == "purged" else await elsewhere.receive(5)
        if gone == "purged":
            await elsewhere.purge()
        elif gone == "acked":
            await elsewhere.ack_many(taken)
        await elsewhere.enqueue(b"real")
        assert [message.payload for message in await queue.receive()] == [b"real"]


async def test_P11_order_is_priority_then_first_come_the_same_for_every_process(world: Defects) -> None:
    async with world.pond() as pond, world.pond() as other:
        for number in range(20):
            await pond.queue("q").enqueue(b"%d" % number, priority=9 if number % 5 == 0 else 1)
        expected = [0, 5, 10, 15, *(number for number in range(20) if number % 5)]
        for one in (pond, other):
            assert [int(await view.payload()) for view in await one.queue("q").peek(20)] == expected
        assert [int(message.payload) for message in await other.queue("q").receive(20)] == expected


class _Steps:
    """Counts what a store does inside: SQLite's instructions, or lines of the memory store."""

    def __init__(self) -> None:
        self.number = 0

    def sqlite(self, connection: apsw.Connection) -> None:
        def step() -> bool:
            self.number += 1
            return False

        connection.set_progress_handler(step, 1)

    def trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in (memory.__file__, ordered.__file__):
            return None
        self.number += 1
        return self.trace

    async def of(self, work: Any) -> int:
        before, tracer = self.number, sys.gettrace()
        sys.settrace(self.trace)
        try:
            await work
        finally:
            sys.settrace(tracer)
        return self.number - before


async def test_P12_a_page_costs_the_same_however_much_the_store_holds(
    world: Defects, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = _Steps()
    monkeypatch.setattr(apsw, "connection_hooks", [*apsw.connection_hooks, steps.sqlite])
    async with world.pond() as pond:
        queue, store = pond.queue("q"), pond.store

        async def measure() -> dict[str, int]:
            # Exact counts cost the entries of the bucket of time that is under way, and only those.
            world.clock.advance(3600)
            first = (await store.list(*KEY, Box.LIVE, limit=1)).records[0].item.key
            now = world.clock.now_ms()
            return {
                "list": await steps.of(store.list(*KEY, Box.LIVE, limit=10)),
                "next page": await steps.of(store.list(*KEY, Box.LIVE, after=first + 50, limit=10)),
                "ready": await steps.of(store.ready(*KEY, now, limit=10)),
                "counts": await steps.of(store.counts(*KEY, now)),
                "get": await steps.of(store.get(*KEY, "0197a3c2-0000-7000-8000-000000000001")),
            }

        await queue.enqueue_many([b"x"] * 100)
        small = await measure()
        await queue.enqueue_many([b"x"] * 2400)
        await pond.queue("another").enqueue_many([b"x"] * 1000)
        await queue.enqueue_many([b"later"] * 500, delay=36_000)
        large = await measure()
        assert all(small.values())
        for what, cost in large.items():
            assert cost <= 2 * small[what] + 50, f"{what}: {small[what]} steps of 100 messages, {cost} of 4,000"


async def test_P13_a_batch_is_one_write(world: Defects) -> None:
    async with world.pond() as pond:
        queue = pond.queue("q")
        world.forget(pond)
        await queue.enqueue_many([b"x"] * 100)
        assert world.changes(pond) == 1
        messages = await queue.receive(100)
        assert (len(messages), world.changes(pond)) == (100, 2)
        await queue.extend_many(messages, 60)
        await queue.nack_many(messages[:50])
        await queue.ack_many(messages[50:])
        assert world.changes(pond) == 5


async def test_P14_processes_that_meet_at_the_head_spread_out(world: Defects) -> None:
    """Losing a race costs one failed condition; and who lost one looks elsewhere, so that fewer are lost."""
    ponds = [world.pond() for _ in range(4)]
    async with ponds[0], ponds[1], ponds[2], ponds[3]:
        await ponds[0].queue("q").enqueue_many([b"x"] * 400)
        lost = 0

        def watch(pond: Pond) -> None:
            write = pond.store.write

            async def counted(ops: Any) -> Any:
                nonlocal lost
                outcomes = await write(ops)
                lost += sum(isinstance(outcome, Conflict) for outcome in outcomes)
                return outcomes

            pond.store.write = counted  # type: ignore[method-assign]

        for pond in ponds:
            watch(pond)
            world.forget(pond)
        seen: list[str] = []
        for _ in range(100):
            batches = await asyncio.gather(*(pond.queue("q").receive() for pond in ponds))
            seen += [message.id for batch in batches for message in batch]
        assert len(seen) == len(set(seen)) == 400
        assert lost < 300, f"{lost} races lost for 400 messages; together at the head it would be 600"
        assert sum(world.asked(pond)["get"] for pond in ponds) == 0, "nothing is read to find out who won"
