"""Pausing, and what a queue's policy gives its messages; both reach every pond on the store."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import pytest

from millpond import Config, InvalidInput, QueuePolicy, StoreCorrupt, StoreMismatch, Tampered
from millpond.stores.base import DocumentWritten, PutDocument

if TYPE_CHECKING:
    from tests.conformance.queue.conftest import World


def age_of_policies(world: World) -> float:
    """Seconds within which a policy reaches every pond."""
    return Config().policy_age(world.paid)


async def test_nothing_is_handed_out_while_paused(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue(b"before")
        await queue.pause()
        await queue.enqueue(b"while")
        assert await queue.receive(5) == []
        assert (await queue.counts()).ready == 2
        assert [view.id for view in await queue.peek(5)] != []
        await queue.resume()
        assert [message.payload for message in await queue.receive(5)] == [b"before", b"while"]


async def test_pausing_and_resuming_may_be_repeated(world: World) -> None:
    async with world.queue() as queue:
        await queue.resume()
        await queue.pause()
        await queue.pause()
        assert (await queue.policy()).paused is True
        await queue.resume()
        await queue.resume()
        assert (await queue.policy()).paused is False


async def test_holders_go_on_while_paused(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue_many([b"1", b"2", b"3", b"4"])
        acked, nacked, deferred, extended = await queue.receive(4)
        await queue.pause()
        await acked.ack()
        await nacked.nack("no")
        await deferred.defer(delay=5)
        await extended.extend(100)
        assert (await queue.counts())[:3] == (1, 1, 1)


async def test_a_waiting_consumer_gets_nothing_until_the_resume(world: World) -> None:
    async with world.queue() as queue:
        await queue.pause()
        await queue.enqueue(b"x")
        waiting = await world.waiting(queue.receive(wait=1000))
        await world.advance(age_of_policies(world))
        assert not waiting.done()
        await queue.resume()
        await world.settle()
        [message] = await world.soon(waiting)
        assert message.payload == b"x"


async def test_a_pause_elsewhere_takes_effect_within_the_age_of_the_policy(world: World) -> None:
    async with world.queue() as here, world.queue() as there:
        await here.enqueue_many([b"1", b"2"])
        assert len(await there.receive()) == 1
        await here.pause()
        world.clock.advance(age_of_policies(world))
        assert await there.receive() == []
        await here.resume()
        world.clock.advance(age_of_policies(world))
        assert len(await there.receive()) == 1


async def test_a_resume_elsewhere_reaches_those_who_wait(world: World) -> None:
    async with world.queue() as here, world.queue() as there:
        await here.enqueue(b"x")
        await here.pause()
        waiting = await world.waiting(there.receive(wait=1000))
        await here.resume()
        # Within one poll, also where no change feed tells of it sooner.
        for _ in range(30):
            if waiting.done():
                break
            await world.advance(Config().poll_interval)
        [message] = await world.soon(waiting)
        assert message.payload == b"x"


async def test_what_comes_due_while_paused_does_not_keep_who_waits_busy(world: World) -> None:
    async with world.pond() as pond:
        queue = pond.queue("orders")
        await queue.enqueue(b"x", delay=5)
        waiting = await world.waiting(queue.receive(wait=1000))
        await queue.pause()
        await world.settle()
        looked = pond.dispatcher.polls
        await world.advance(5)
        await world.advance(60)
        assert pond.dispatcher.polls - looked < 60, "it looks all the time"
        await queue.resume()
        await world.settle()
        assert [message.payload for message in await world.soon(waiting)] == [b"x"]


async def test_a_pause_is_of_one_queue(world: World) -> None:
    async with world.pond() as pond:
        paused, other, namespace = pond.queue("a"), pond.queue("b"), pond.queue("a", namespace="n")
        await paused.pause()
        for queue in (paused, other, namespace):
            await queue.enqueue(b"x")
        assert [len(await queue.receive()) for queue in (paused, other, namespace)] == [0, 1, 1]


@pytest.mark.servers
async def test_policies_are_kept_in_the_store(world: World) -> None:
    async with world.queue() as here:
        given = await here.set_policy(
            default_visibility=7.5, max_attempts=2, ttl=60, on_expired="dead_letter", dedup_window=9
        )
        assert given == QueuePolicy(
            default_visibility=7.5, max_attempts=2, ttl=60, on_expired="dead_letter", dedup_window=9
        )
        # Fields that are not named stay.
        await here.set_policy(max_attempts=3)
        async with world.queue() as there:
            policy = await there.policy()
            assert (policy.default_visibility, policy.max_attempts, policy.ttl) == (7.5, 3, 60)
            await there.set_policy(ttl=None)
        assert (await here.policy()).ttl is None


async def test_the_policy_holds_for_messages_enqueued_in_another_pond(world: World) -> None:
    async with world.queue() as here, world.queue() as there:
        await there.enqueue(b"before")  # Now it has a copy of the policy as it was.
        await here.set_policy(default_visibility=7, max_attempts=2, ttl=60, dedup_window=5)
        world.clock.advance(age_of_policies(world))
        await there.enqueue(b"after", dedup_key="k")
        now = world.clock.now_ms()
        before, after = await there.receive(2)
        assert (before.max_attempts, before.expires_at) == (5, None)
        assert before.lease.until_ms == now + 30_000
        assert after.max_attempts == 2
        assert after.lease.until_ms == now + 7_000
        assert after.expires_at is not None
        assert after.expires_at.timestamp() * 1000 == now + 60_000
        world.clock.advance(4.999)
        assert (await there.enqueue(b"again", dedup_key="k")).duplicate is True
        world.clock.advance(0.001)
        assert (await there.enqueue(b"again", dedup_key="k")).duplicate is False


async def test_the_message_has_the_last_word_over_its_policy(world: World) -> None:
    async with world.queue() as queue:
        await queue.set_policy(default_visibility=7, max_attempts=2, ttl=60)
        await queue.enqueue(b"x", visibility=8, max_attempts=0, ttl=90)
        message = await world.one(queue)
        assert (message.max_attempts, message.lease.until_ms) == (0, world.clock.now_ms() + 8_000)
        assert message.expires_at is not None
        assert message.expires_at.timestamp() * 1000 == world.clock.now_ms() + 90_000


@pytest.mark.servers
@pytest.mark.parametrize("way", ["hand-out", "collector"])
async def test_expiry_by_policy(world: World, way: str) -> None:
    async with world.pond() as pond:
        kept, dropped = pond.queue("kept"), pond.queue("dropped")
        await kept.set_policy(ttl=10, on_expired="dead_letter")
        await dropped.set_policy(ttl=10)
        for queue in (kept, dropped):
            await queue.enqueue(b"x")
        world.clock.advance(10)
        if way == "hand-out":
            assert [await queue.receive() for queue in (kept, dropped)] == [[], []]
        else:
            assert (await pond.collect()).expired == 2
        [dead] = await kept.dead_letters.list()
        assert (dead.dead_reason, dead.attempts, dead.failures) == ("expired", 0, 0)
        assert await dropped.dead_letters.list() == []
        assert (await dropped.counts())[:6] == (0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("way", ["nack", "nack_many", "lapse"])
async def test_exhaustion_by_policy(world: World, way: str) -> None:
    async with world.pond() as pond:
        kept, dropped = pond.queue("kept"), pond.queue("dropped")
        await kept.set_policy(max_attempts=1, default_visibility=10)
        await dropped.set_policy(max_attempts=1, default_visibility=10, on_exhausted="discard")
        for queue in (kept, dropped):
            await queue.enqueue(b"x")
            message = await world.one(queue)
            if way == "nack":
                await message.nack("no")
            elif way == "nack_many":
                await queue.nack_many([message], error="no")
        if way == "lapse":
            world.clock.advance(10)
        assert [await queue.receive() for queue in (kept, dropped)] == [[], []]
        [dead] = await kept.dead_letters.list()
        assert (dead.dead_reason, dead.attempts, dead.failures) == ("max_attempts_exceeded", 1, 1)
        assert (await dropped.counts())[:6] == (0, 0, 0, 0, 0, 0)
        assert await pond.verify() == []


BAD: list[dict[str, Any]] = [
    {"visibility": 5},
    {"default_visibility": 0},
    {"default_visibility": -1},
    {"default_visibility": float("nan")},
    {"default_visibility": float("inf")},
    {"default_visibility": 1e12},
    {"default_visibility": 1 << 2000},
    {"default_visibility": 1e-9},
    {"default_visibility": "5"},
    {"default_visibility": True},
    {"max_attempts": -1},
    {"max_attempts": 1.5},
    {"max_attempts": "1"},
    {"max_attempts": True},
    {"max_attempts": 1_000_001},
    {"max_attempts": 1 << 70},
    {"ttl": 0},
    {"ttl": 1e-9},
    {"ttl": float("nan")},
    {"ttl": "1"},
    {"ttl": True},
    {"dedup_window": 0},
    {"dedup_window": float("inf")},
    {"dedup_window": [1]},
    {"on_expired": "keep"},
    {"on_expired": None},
    {"on_expired": []},
    {"on_exhausted": "keep"},
    {"on_exhausted": 1},
    {"paused": "yes"},
    {"paused": 1},
    {"paused": None},
]


async def test_a_bad_policy_is_refused_and_changes_nothing(world: World) -> None:
    async with world.queue() as here:
        before = await here.set_policy(max_attempts=3)
        for fields in BAD:
            with pytest.raises(InvalidInput):
                await here.set_policy(**fields)
            # Not in the store, and not in this process.
            assert await here.policy() == before, fields
        async with world.queue() as there:
            assert await there.policy() == before
            await there.enqueue(b"x")
            assert (await world.one(there)).max_attempts == 3


@pytest.mark.servers
async def test_changes_at_the_same_time_are_all_kept(world: World) -> None:
    import asyncio

    async with world.queue() as here, world.queue() as there:
        await asyncio.gather(
            here.set_policy(ttl=1), there.set_policy(max_attempts=2), here.set_policy(dedup_window=3), there.pause()
        )
        assert await here.policy() == QueuePolicy(ttl=1, max_attempts=2, dedup_window=3, paused=True)


async def test_a_pause_may_come_before_the_first_message(world: World) -> None:
    async with world.pond() as pond, world.queue("early") as elsewhere:
        await pond.queue("early").pause()
        assert await pond.queues() == [("default", "early")]
        await elsewhere.enqueue(b"x")
        assert await elsewhere.receive() == []


async def test_what_changes_nothing_makes_no_queue(world: World) -> None:
    async with world.pond() as pond:
        await pond.queue("never").resume()
        await pond.queue("never").set_policy(paused=False, on_expired="discard")
        await pond.queue("never").reset_policy()
        assert await pond.queues() == []


async def _garble(world: World, data: bytes) -> None:
    """Change the policy of the queue as only somebody with access to the storage could."""
    bare = world.handle()
    await bare.open()
    document = await bare.document("default", "orders")
    [outcome] = await bare.write([PutDocument("default", "orders", document and document.etag, data)])
    assert isinstance(outcome, DocumentWritten)
    await bare.close()


NEWER = b"\x82\xa6format\x02\xa6policy\x80"


@pytest.mark.parametrize("data", [b"", b"\xc1nonsense", NEWER], ids=["empty", "nonsense", "newer"])
async def test_a_policy_that_cannot_be_read_is_reset(world: World, data: bytes, caplog: Any) -> None:
    async with world.pond() as pond, world.queue() as elsewhere:
        queue = pond.queue("orders")
        await queue.enqueue(b"x")
        await queue.set_policy(max_attempts=2, paused=True)
        await _garble(world, data)
        world.clock.advance(age_of_policies(world))
        for call in (queue.policy(), queue.receive(), queue.enqueue(b"y"), queue.resume(), queue.set_policy(ttl=5)):
            with pytest.raises((StoreCorrupt, StoreMismatch, Tampered)):
                await call
        [problem] = await pond.verify()
        assert problem.where == "queue default/orders"
        with caplog.at_level(logging.INFO, "millpond"):
            assert await queue.reset_policy() == QueuePolicy()
            assert await queue.reset_policy() == QueuePolicy()
        events = [record for record in caplog.records if record.message == "millpond.policy.reset"]
        assert [(event.namespace, event.queue) for event in events] == [("default", "orders")] * 2
        assert await elsewhere.policy() == QueuePolicy()
        assert await pond.verify() == []
        assert (await world.one(elsewhere)).payload == b"x"


async def test_a_reset_while_others_change_the_policy(world: World) -> None:
    async with world.queue() as here, world.queue() as there:
        await here.set_policy(max_attempts=3, ttl=5)
        await asyncio.gather(here.reset_policy(), there.set_policy(dedup_window=3), here.reset_policy())
        assert (await there.policy()).max_attempts is None
        assert (await there.policy()).ttl is None
