"""A process stands still, as a whole, between its look at the clock and the request that it is about to send; its lease
ends, others are given its messages; then it goes on, and sends the request. No clock can keep it from that: conditions
must. Tried at each request of each answer, and of a claim."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import pytest
from tests.model.hasty import HastyClock
from tests.unit.stores.objects.late import Scripted

from millpond.errors import LeaseLost, MessageNotFound, StoreError
from millpond.message import Message
from millpond.model.clock import ManualClock
from millpond.pond import Pond
from millpond.queue import Queue
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.store import ObjectStore

HOUR = 3600.0
DAY = 24 * HOUR
MOST = 12
"""Requests of one answer, at most."""


class Frozen(NamedTuple):
    """What came of an answer during which its process stood still."""

    reached: bool
    """There was such a request."""
    error: StoreError | LeaseLost | None
    theirs: list[Message]
    """What others were given meanwhile."""
    queue: Queue
    """As those others see it."""


Answer = Callable[[Queue, Message], Awaitable[object]]

ANSWERS: dict[str, Answer] = {
    "ack": lambda queue, message: message.ack(),
    "nack": lambda queue, message: message.nack("failed", delay=1.0),
    "defer": lambda queue, message: message.defer(delay=1.0),
    "extend": lambda queue, message: message.extend(60.0),
    "state": lambda queue, message: message.state.save("mine"),
    "dead letter": lambda queue, message: message.bury("no use"),
    "hand off": lambda queue, message: message.ack(then=[("next", b"successor")]),
    "many": lambda queue, message: queue.extend_many([message], 60.0),
    "claim": lambda queue, message: queue.receive(5, visibility=60.0),
}


async def stand_still(kind: str, at: int, *, left: float = 60.0, fenced: bool = False) -> Frozen:
    """Answer, and stand still for an hour before request ``at``. ``left``: seconds of the lease."""
    clock = ManualClock()
    bucket = MemoryBucket(clock=clock)
    network = Scripted(bucket.share())
    # Their pauses between tries take no time: only the hour of the sleeper does.
    hasty = HastyClock(clock)
    store = ObjectStore(network, clock=hasty, measure_skew=False, fenced_removals=fenced)
    other = ObjectStore(bucket.share(), clock=hasty, measure_skew=False)
    async with Pond(store, clock=clock) as mine, Pond(other, clock=clock) as others:
        queue, theirs = mine.queue("q"), others.queue("q")
        await queue.enqueue(b"one", dedup_key="k", max_attempts=9)
        [message] = await queue.receive(visibility=left)
        if kind == "claim":
            await message.nack()
        frozen, thaw = freeze(network, at)
        answer = asyncio.ensure_future(ANSWERS[kind](queue, message))
        waiting = asyncio.ensure_future(frozen.wait())
        await asyncio.wait({answer, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        reached = frozen.is_set()
        got: list[Message] = []
        try:
            if reached:
                clock.advance(HOUR)
                # Twice, as what was left half done is finished by the first look.
                for _ in range(2):
                    got += await theirs.receive(5, visibility=DAY)
                    got += await others.queue("next").receive(5, visibility=DAY)
                    await settle(other)
                    clock.advance(5.0)
                for message in got:
                    await message.state.save("theirs")
        finally:
            thaw.set()
        error: StoreError | LeaseLost | None = None
        try:
            await answer
        except (StoreError, LeaseLost) as failure:
            error = failure
        await settle(store)
        for message in got:
            # Whatever the sleeper did: who was given the message still has it, as it was.
            try:
                await message.extend(DAY)
                assert await message.state.load() == "theirs"
            except (LeaseLost, MessageNotFound):
                raise StolenError(kind, at) from None
        return Frozen(reached, error, got, theirs)


async def settle(store: ObjectStore) -> None:
    """Background work of the store ends."""
    while store._engine.tasks:
        await asyncio.gather(*store._engine.tasks, return_exceptions=True)


def freeze(network: Scripted, at: int) -> tuple[asyncio.Event, asyncio.Event]:
    """Before this request the process stands still: the first event says so, the second one lets it go on."""
    frozen, thaw = asyncio.Event(), asyncio.Event()
    count = 0

    async def rule(kind: str, name: str) -> None:
        nonlocal count
        count += 1
        if count == at:
            frozen.set()
            await thaw.wait()

    network.rule = rule
    return frozen, thaw


class StolenError(AssertionError):
    """Somebody who slept took a message from who had been given it."""


async def each_request(kind: str, *, fenced: bool = False) -> list[Frozen]:
    """Stand still before each request of an answer."""
    found = []
    for at in range(1, MOST):
        one = await stand_still(kind, at, fenced=fenced)
        if not one.reached:
            break
        found.append(one)
    else:
        raise AssertionError(f"{kind} has more requests than {MOST}")
    assert found, "nothing was asked of the bucket"
    return found


@pytest.mark.parametrize("kind", [kind for kind in ANSWERS if kind != "ack"])
async def test_who_stood_still_takes_nothing_from_who_was_given_it(kind: str) -> None:
    found = await each_request(kind)
    assert any(one.theirs for one in found)
    if kind in ("nack", "defer", "extend", "state"):
        assert all(isinstance(one.error, LeaseLost) for one in found if one.theirs)


async def test_an_ack_takes_nothing_either_where_removals_are_fenced() -> None:
    found = await each_request("ack", fenced=True)
    assert isinstance(found[0].error, LeaseLost)


async def test_nor_does_an_ack_near_the_end_of_its_lease() -> None:
    assert isinstance((await stand_still("ack", 1, left=10.0)).error, LeaseLost)


async def test_an_ack_by_a_plain_delete_is_the_one_exception() -> None:
    """What the page on guarantees says of the margin, and no more: the message is done, and the answer of who was
    given it meanwhile is refused."""
    taken = 0
    for at in range(1, MOST):
        try:
            reached = (await stand_still("ack", at)).reached
        except StolenError:
            taken, reached = taken + 1, True
        if not reached:
            break
    assert taken == 1
