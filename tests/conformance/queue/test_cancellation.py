"""A call that is cancelled, wherever it stands: the queue stays whole, and nothing that is ready is forgotten.

Each call is cancelled at every store call that it makes, once before that is made and once after it was applied but
before its reply came; and after every number of turns of the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest

from millpond import Config, LeaseLost, Message, MessageNotFound, Pond, Queue
from millpond.service import claiming
from millpond.stores.base import Store

if TYPE_CHECKING:
    from tests.conformance.queue.conftest import World

LARGE = 300_000
TURNS = 12
"""More turns of the event loop than any call on memory takes between two of its awaits."""


class Interrupted:
    """A store around a store in which call number ``at`` of ``task`` is never answered: it waits, before or after it
    was made."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.plan(0)

    def plan(self, at: int, *, applied: bool = False) -> None:
        self.at = at
        self.applied = applied
        self.task: asyncio.Task[Any] | None = None
        self.count = 0
        self.reached = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        target = getattr(self.inner, name)
        if not asyncio.iscoroutinefunction(target):
            return target

        async def call(*args: Any, **kwargs: Any) -> Any:
            if asyncio.current_task() is not self.task:
                return await target(*args, **kwargs)
            self.count += 1
            if self.count != self.at:
                return await target(*args, **kwargs)
            result = await target(*args, **kwargs) if self.applied else None
            self.reached.set()
            await asyncio.Event().wait()
            return result

        return call


Act = Callable[[Queue, list[Message]], Awaitable[Any]]
Check = Callable[["World", Pond, list[Message]], Awaitable[None]]


async def _free(queue: Queue) -> list[bytes]:
    """The payloads of what can be received now, in order, all of it without a failure; acked."""
    payloads = []
    while messages := await queue.receive(1000):
        for message in messages:
            assert message.failures == 0
            payloads.append(await message.read())
        assert all(answer.error is None for answer in await queue.ack_many(messages))
    return payloads


async def _run(act: Act, queue: Queue, messages: list[Message]) -> Any:
    return await act(queue, messages)


async def _interrupted(
    world: World, act: Act, check: Check, *, prepare: Act | None = None, config: Config | None = None
) -> int:
    """Cancel ``act`` at every point that it has; how many there were."""
    points = 0
    async with world.pond(config=config, around=Interrupted) as pond:
        for applied in (False, True):
            at = 1
            while await _once(world, pond, act, check, prepare, at=at, applied=applied):
                points += 1
                at += 1
        # Turns of the loop are counted where they mean the same each time, and sampled where a thread runs beside.
        for turns in range(0, TURNS, 1 if world.store.startswith("memory") else 3):
            await _once(world, pond, act, check, prepare, turns=turns)
    return points


async def _once(
    world: World,
    pond: Pond,
    act: Act,
    check: Check,
    prepare: Act | None,
    *,
    at: int = 0,
    applied: bool = False,
    turns: int = 0,
) -> bool:
    """One cancellation, at store call number ``at`` or after ``turns`` turns; False when the call has no such point."""
    queue = pond.queue("orders")
    store: Any = pond.store
    messages: list[Message] = []
    if prepare is not None:
        await prepare(queue, messages)
    store.plan(at, applied=applied)
    task = asyncio.ensure_future(_run(act, queue, messages))
    if at:
        store.task = task
        reached = asyncio.ensure_future(store.reached.wait())
        await asyncio.wait([task, reached], return_when=asyncio.FIRST_COMPLETED)
        reached.cancel()
        await asyncio.gather(reached, return_exceptions=True)
    else:
        for _ in range(turns):
            await asyncio.sleep(0)
    task.cancel()
    [result] = await asyncio.gather(task, return_exceptions=True)
    if isinstance(result, BaseException):
        assert isinstance(result, asyncio.CancelledError)
    elif act is _receive:
        await queue.defer_many(result)  # It had come to its end.
    # A write under way when its caller was cancelled is decided before a later one.
    await pond.queue("later").pause()
    await world.settle()
    await check(world, pond, messages)
    # Nothing is left of it for the next, and nothing is left lying.
    world.clock.advance(100_000)
    for name in await pond.queues():
        rest = pond.queue(name.queue)
        await rest.dead_letters.purge()
        await rest.purge()
        await rest.resume()
    await pond.collect()
    assert await pond.verify() == []
    return store.reached.is_set()


# Enqueue


async def _all_or_nothing(world: World, pond: Pond, messages: list[Message]) -> None:
    queue = pond.queue("orders")
    counts = await queue.counts()
    assert counts.ready in (0, 1)
    async with world.queue() as there:
        assert len(await there.peek(5)) == counts.ready
    assert len(await _free(queue)) == counts.ready


@pytest.mark.parametrize("payload", [b"x", b"x" * LARGE], ids=["inline", "apart"])
async def test_enqueue(world: World, payload: bytes) -> None:
    async def enqueue(queue: Queue, messages: list[Message]) -> None:
        await queue.enqueue(payload)

    assert await _interrupted(world, enqueue, _all_or_nothing) >= 2


async def test_an_enqueue_that_is_repeated_after_it_was_cancelled(world: World) -> None:
    async def enqueue(queue: Queue, messages: list[Message]) -> None:
        await queue.enqueue(b"x", dedup_key="k")

    async def check(world: World, pond: Pond, messages: list[Message]) -> None:
        queue = pond.queue("orders")
        await queue.enqueue(b"x", dedup_key="k")
        assert await _free(queue) == [b"x"]

    assert await _interrupted(world, enqueue, check) >= 2


async def test_enqueue_many(world: World) -> None:
    async def enqueue(queue: Queue, messages: list[Message]) -> None:
        await queue.enqueue_many([b"%d" % number for number in range(510)])

    async def check(world: World, pond: Pond, messages: list[Message]) -> None:
        found = await _free(pond.queue("orders"))
        # Whole chunks, in order.
        assert len(found) in (0, 500, 510)
        assert found == [b"%d" % number for number in range(len(found))]

    assert await _interrupted(world, enqueue, check) >= 4


# Receive


async def _five(queue: Queue, messages: list[Message]) -> None:
    await queue.enqueue_many([b"0", b"1", b"2", b"3", b"4"])


async def _receive(queue: Queue, messages: list[Message]) -> list[Message]:
    return await queue.receive(4)


async def _all_are_back(world: World, pond: Pond, messages: list[Message]) -> None:
    queue = pond.queue("orders")
    assert (await queue.counts())[:3] == (5, 0, 0)
    assert sorted(await _free(queue)) == [b"0", b"1", b"2", b"3", b"4"]


@pytest.mark.parametrize("page", [512, 2], ids=["one-write", "several-writes"])
async def test_a_cancelled_receive_gives_everything_back(
    world: World, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claiming, "MAX_TAKE", page)
    config = Config(ready_page_size=page, ready_cache_size=page)
    assert await _interrupted(world, _receive, _all_are_back, prepare=_five, config=config) >= 2


async def test_a_cancelled_receive_that_waits_gives_everything_back(world: World) -> None:
    for turns in range(TURNS):
        async with world.queue() as queue:
            task = await world.waiting(queue.receive(wait=1000))
            await queue.enqueue(b"x")
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            [result] = await asyncio.gather(task, return_exceptions=True)
            if isinstance(result, list):
                await queue.ack_many(result)
                continue
            await queue.resume()  # A write that comes later than those of the cancelled one.
            await world.settle()
            assert await _free(queue) == [b"x"]


async def test_the_others_who_wait_get_what_a_cancelled_one_leaves(world: World) -> None:
    for turns in range(TURNS):
        async with world.queue() as queue:
            first = await world.waiting(queue.receive(wait=1000))
            second = await world.waiting(queue.receive(wait=1000))
            await queue.enqueue(b"x")
            for _ in range(turns):
                await asyncio.sleep(0)
            first.cancel()
            [result] = await asyncio.gather(first, return_exceptions=True)
            if isinstance(result, list):
                await queue.defer_many(result)
            await world.settle()
            [message] = await world.soon(second)
            assert message.failures == 0
            await message.ack()


# Answers


async def _one_held(queue: Queue, messages: list[Message]) -> None:
    await queue.enqueue(b"x", visibility=30)
    messages += await queue.receive()


def _answered(*states: str) -> Check:
    """Afterwards the message is as it was, or as the answer would have it; and its holder may answer again."""

    async def check(world: World, pond: Pond, messages: list[Message]) -> None:
        queue = pond.queue("orders")
        try:
            view = await queue.get(messages[0].id)
        except MessageNotFound:
            assert "gone" in states
        else:
            assert view.state in states
            assert view.failures == (1 if view.state in ("ready", "delayed") and "failed" in states else 0)
        try:
            await messages[0].ack()
        except LeaseLost:
            pass
        else:
            assert (await queue.counts())[:5] == (0, 0, 0, 0, 0)

    return check


ANSWERS: dict[str, tuple[Callable[[Message], Awaitable[Any]], Check]] = {
    "ack": (lambda message: message.ack(), _answered("leased", "gone")),
    "nack": (lambda message: message.nack("no"), _answered("leased", "ready", "failed")),
    "nack-later": (lambda message: message.nack("no", delay=9), _answered("leased", "delayed", "failed")),
    "defer": (lambda message: message.defer(), _answered("leased", "ready")),
    "extend": (lambda message: message.extend(90), _answered("leased")),
    "bury": (lambda message: message.bury("hopeless"), _answered("leased", "dead")),
    "save-state": (lambda message: message.state.save(1), _answered("leased")),
    "delete-state": (lambda message: message.state.delete(), _answered("leased")),
}


@pytest.mark.parametrize("answer", ANSWERS)
async def test_answers(world: World, answer: str) -> None:
    call, check = ANSWERS[answer]

    async def act(queue: Queue, messages: list[Message]) -> None:
        await call(messages[0])

    assert await _interrupted(world, act, check, prepare=_one_held) >= 2


async def test_batch_answers(world: World) -> None:
    async def prepare(queue: Queue, messages: list[Message]) -> None:
        await queue.enqueue_many([b"1", b"2", b"3"])
        messages += await queue.receive(3)

    async def act(queue: Queue, messages: list[Message]) -> None:
        await queue.ack_many(messages)

    async def check(world: World, pond: Pond, messages: list[Message]) -> None:
        queue = pond.queue("orders")
        held = (await queue.counts()).leased
        assert held in (0, 3)
        answers = await queue.ack_many(messages)
        assert sum(answer.error is None for answer in answers) == held

    assert await _interrupted(world, act, check, prepare=prepare) >= 2


@pytest.mark.parametrize("payload", [b"y", b"y" * LARGE], ids=["inline", "apart"])
async def test_a_hand_off_happens_or_does_not(world: World, payload: bytes) -> None:
    async def act(queue: Queue, messages: list[Message]) -> None:
        await messages[0].ack(then=[("next", payload), ("next", b"second")])

    async def check(world: World, pond: Pond, messages: list[Message]) -> None:
        held = (await pond.queue("orders").counts()).leased
        assert (held, (await pond.queue("next").counts()).ready) in ((1, 0), (0, 2))
        if held:
            await messages[0].ack(then=[("next", payload), ("next", b"second")])
        assert await _free(pond.queue("next")) == [payload, b"second"]

    assert await _interrupted(world, act, check, prepare=_one_held) >= 2


# Those who wait for what a cancelled call made ready


async def _keyed(queue: Queue, messages: list[Message]) -> None:
    for payload in (b"first", b"next"):
        await queue.enqueue(payload, ordering_key="k")
    messages += await queue.receive()


async def _dead(queue: Queue, messages: list[Message]) -> None:
    await _one_held(queue, messages)
    await messages[0].bury("hopeless")


async def _paused(queue: Queue, messages: list[Message]) -> None:
    await queue.enqueue(b"x")
    await queue.pause()


async def _nothing(queue: Queue, messages: list[Message]) -> None:
    assert messages == []


CAUSES: dict[str, tuple[Act, Act]] = {
    "enqueue": (_nothing, lambda queue, messages: queue.enqueue(b"x")),
    "enqueue_many": (_nothing, lambda queue, messages: queue.enqueue_many([b"x"])),
    "nack": (_one_held, lambda queue, messages: messages[0].nack("no")),
    "nack-later": (_one_held, lambda queue, messages: messages[0].nack("no", delay=7)),
    "defer_many": (_one_held, lambda queue, messages: queue.defer_many(messages)),
    "ack": (_keyed, lambda queue, messages: messages[0].ack()),
    "ack_many": (_keyed, lambda queue, messages: queue.ack_many(messages)),
    "hand-off": (_one_held, lambda queue, messages: messages[0].ack(then=[("orders", b"x")])),
    "redrive": (_dead, lambda queue, messages: queue.dead_letters.redrive()),
    "resume": (_paused, lambda queue, messages: queue.resume()),
}


@pytest.mark.parametrize("cause", CAUSES)
async def test_who_waits_is_woken_by_what_a_cancelled_call_did(world: World, cause: str) -> None:
    prepare, act = CAUSES[cause]

    async def waited(queue: Queue, messages: list[Message]) -> None:
        await prepare(queue, messages)
        waiting.append(await world.waiting(queue.receive(wait=1000)))

    async def check(world: World, pond: Pond, messages: list[Message]) -> None:
        queue, task = pond.queue("orders"), waiting.pop()
        if (await queue.counts()).delayed:
            await world.advance(7)
        if (await queue.counts()).ready and not (await queue.policy()).paused:
            await asyncio.wait([task], timeout=5)
            assert task.done(), "there is something for it, and nobody told it"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await world.settle()

    waiting: list[asyncio.Task[list[Message]]] = []
    assert await _interrupted(world, act, check, prepare=waited) >= 2
