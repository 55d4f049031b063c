"""Programs as users write them; mypy says that every result has the type that it should have. Never run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, assert_type

import pydantic

import millpond
from millpond import (
    Answer,
    Context,
    DeadLetters,
    Lease,
    Message,
    MessageState,
    MessageView,
    MillpondError,
    Pond,
    Queue,
    QueueCounts,
    QueuePolicy,
    Receipt,
    SyncDeadLetters,
    SyncMessage,
    SyncMessageState,
    SyncMessageView,
    SyncPond,
    SyncQueue,
    SyncTaskHandle,
    TaskHandle,
)


@dataclass
class Order:
    number: int


async def asynchronous() -> None:
    async with millpond.connect("sqlite:///work.db", config=millpond.Config(default_visibility=60)) as pond:
        assert_type(pond, Pond)
        queue = pond.queue("orders", namespace="shop")
        assert_type(queue, Queue)
        assert_type(queue.name, str)
        receipt = await queue.enqueue(millpond.json({"a": 1}), delay=5, priority=7, attributes={"a": 1}, dedup_key="k")
        assert_type(receipt, Receipt)
        assert_type(receipt.message_id, str)
        assert_type(receipt.duplicate, bool)
        assert_type(await queue.enqueue_many([b"1", millpond.text("2")], ttl=5.0), list[Receipt])
        assert_type(await queue.enqueue_many(iter([b"1"]), priority=1, attributes={"a": 1}), list[Receipt])
        messages = await queue.receive(10, wait=20.0, visibility=30, owner="me")
        assert_type(messages, list[Message])
        for message in messages:
            assert_type(message.id, str)
            assert_type(message.payload, bytes)
            assert_type(message.lease, Lease)
            assert_type(message.lease.token, int)
            assert_type(message.lease.until, datetime | None)
            assert_type(message.attempts, int)
            assert_type(message.attributes, dict[str, Any])
            assert_type(message.content_type, str | None)
            assert_type(message.enqueued_at, datetime)
            assert_type(message.text(), str)
            assert_type(message.decode(Order), Order)
            assert_type(message.decode(Order).number, int)
            assert_type(await message.read(limit=1000), bytes)
            assert_type(message.stream(), AsyncIterator[bytes])
            async for chunk in message.stream():
                assert_type(chunk, bytes)
            assert_type(message.state, MessageState)
            assert_type(await message.state.load(), Any)
            await message.state.save({"step": 1})
            await message.state.delete()
            assert_type(await message.extend(30), Lease)
            await message.nack(ValueError("no"), delay=5)
            await message.defer(delay=5)
            await message.bury("hopeless")
            await message.ack()
            await message.ack(then=[("next", b"x"), ("next", b"y", {"delay": 5})])
        answers = await queue.ack_many(messages)
        assert_type(answers, list[Answer])
        assert_type(answers[0].error, MillpondError | None)
        await queue.extend_many((message for message in messages), 30)
        counts = await queue.counts()
        assert_type(counts, QueueCounts)
        assert_type(counts.ready, int)
        assert_type(counts.oldest_age, float | None)
        assert_type(await queue.peek(5), list[MessageView])
        view = await queue.get(receipt.message_id)
        assert_type(view, MessageView)
        assert_type(view.state, str)
        assert_type(view.lease, Lease | None)
        assert_type(await view.payload(), bytes)
        assert_type(queue.handle(view.id, "lease", 1), Message)
        assert_type(await queue.purge(), int)
        assert_type(await queue.set_policy(max_attempts=3), QueuePolicy)
        assert_type(await queue.set_policy(ttl=None, on_expired="dead_letter", paused=True), QueuePolicy)
        assert_type(queue.dead_letters, DeadLetters)
        assert_type(await queue.dead_letters.list(limit=5), list[MessageView])
        assert_type(await queue.dead_letters.redrive(["id"]), int)
        assert_type(await queue.dead_letters.payload("id"), bytes)


def synchronous() -> None:
    with millpond.connect_sync("sqlite:///work.db", config=millpond.Config(default_visibility=60)) as pond:
        assert_type(pond, SyncPond)
        queue = pond.queue("orders", namespace="shop")
        assert_type(queue, SyncQueue)
        assert_type(queue.name, str)
        receipt = queue.enqueue(millpond.json({"a": 1}), delay=5, priority=7, attributes={"a": 1}, dedup_key="k")
        assert_type(receipt, Receipt)
        assert_type(receipt.message_id, str)
        assert_type(receipt.duplicate, bool)
        assert_type(queue.enqueue_many([b"1", millpond.text("2")], ttl=5.0), list[Receipt])
        assert_type(queue.enqueue_many(iter([b"1"]), priority=1, attributes={"a": 1}), list[Receipt])
        messages = queue.receive(10, wait=20.0, visibility=30, owner="me")
        assert_type(messages, list[SyncMessage])
        for message in messages:
            work(message)
        answers = queue.ack_many(messages)
        assert_type(answers, list[Answer])
        assert_type(answers[0].error, MillpondError | None)
        queue.extend_many((message for message in messages), 30)
        counts = queue.counts()
        assert_type(counts, QueueCounts)
        assert_type(counts.ready, int)
        assert_type(queue.peek(5), list[SyncMessageView])
        view = queue.get(receipt.message_id)
        assert_type(view, SyncMessageView)
        assert_type(view.state, str)
        assert_type(view.lease, Lease | None)
        assert_type(view.payload(), bytes)
        assert_type(view.stream(), Iterator[bytes])
        assert_type(queue.handle(view.id, "lease", 1), SyncMessage)
        assert_type(queue.purge(), int)
        assert_type(queue.set_policy(max_attempts=3), QueuePolicy)
        assert_type(queue.set_policy(ttl=None, on_expired="dead_letter", paused=True), QueuePolicy)
        assert_type(queue.next_due(), float | None)
        assert_type(queue.dead_letters, SyncDeadLetters)
        assert_type(queue.dead_letters.list(limit=5), list[SyncMessageView])
        assert_type(queue.dead_letters.redrive(["id"]), int)
        assert_type(queue.dead_letters.payload("id"), bytes)
        assert_type([name.queue for name in pond.queues()], list[str])
        assert_type(pond.collect().expired, int)
        assert_type(pond.rekey(print, encrypt_plain=True), int)
        assert_type(pond.statistics(), dict[str, Any])
    pond = millpond.connect_sync().open()
    assert_type(pond, SyncPond)
    pond.close()


def work(message: SyncMessage) -> None:
    assert_type(message.id, str)
    assert_type(message.payload, bytes)
    assert_type(message.lease.token, int)
    assert_type(message.attributes, dict[str, Any])
    assert_type(message.content_type, str | None)
    assert_type(message.enqueued_at, datetime)
    assert_type(message.decode(Order), Order)
    assert_type(message.read(limit=1000), bytes)
    assert_type(message.stream(), Iterator[bytes])
    for chunk in message.stream():
        assert_type(chunk, bytes)
    assert_type(message.state, SyncMessageState)
    assert_type(message.state.load(), Any)
    message.state.save({"step": 1})
    assert_type(message.extend(30), Lease)
    message.nack(ValueError("no"), delay=5)
    message.defer(delay=5)
    message.bury("hopeless")
    message.ack(then=[("next", b"x"), ("next", b"y", {"delay": 5})])


shop = millpond.connect()


@shop.task
async def add(a: int, b: int = 2) -> int:
    """A task that is a coroutine function."""
    return a + b


@shop.task(keep_result=60, concurrency=3, queue="mail")
def shout(text: str, *, loud: bool = False) -> str:
    """A task that is a function."""
    return text.upper() if loud else text


@shop.periodic("0 3 * * *", tz="Europe/Berlin", catch_up=3)
async def nightly(tick: millpond.Tick) -> None:
    """A periodic job."""
    assert_type(tick.at, datetime)


@shop.consumer("orders", gate=shop.limit("orders", rate=100, per=60, concurrency=5))
async def order(order: Order) -> None:
    """A consumer under a limit."""


async def tasks() -> None:
    assert_type(await add(1), int)
    assert_type(shout("a", loud=True), str)
    handle = await add.send(1, b=3)
    assert_type(handle, TaskHandle[int])
    assert_type(await handle.result(timeout=5), int)
    assert_type(handle.id, str)
    assert_type(await (await shout.options(delay=5, unique=True, priority=9).send("a")).result(), str)
    assert_type(await add.send_many([add.call(1), add.call(2, b=3)]), list[TaskHandle[int]])
    assert_type(add.handle("id"), TaskHandle[int])
    assert_type(await shop.send(shout.call("a"), keep_result=60), TaskHandle[str])
    await millpond.current_task().progress(0.5)
    with millpond.connect_sync() as pond:
        assert_type(pond.send(add.call(1), delay=5), SyncTaskHandle[int])
        assert_type(pond.send(add.call(1)).result(timeout=5), int)


class Timing(millpond.Middleware):
    """Middleware."""

    async def before(self, context: Context) -> None:
        context.values[self] = context.started

    async def error(self, context: Context, error: BaseException | None, outcome: millpond.Outcome) -> None:
        assert_type(outcome.delay, float)
        assert_type(outcome.reason, str)


class Shape(pydantic.BaseModel):
    """A pydantic model."""

    sides: int


@shop.task
async def measure(shape: Shape, order: Order, *, unit: str = "mm") -> dict[str, float]:
    """A task with a model and a dataclass."""
    return {unit: float(shape.sides * order.number)}


@shop.task(run_in="process", time_limit=60.0, max_attempts=3, retry=millpond.RetryPolicy(base=5.0))
def burn(seconds: float) -> None:
    """A task without a result, in a process of its own."""


@shop.task(gate=shop.limit("api", concurrency=2))
async def bare() -> str:
    """A task without arguments."""
    return millpond.current_task().id


@shop.consumer("everything", concurrency=4, visibility=60, time_limit=5.0, middleware=[Timing()], type=Order)
async def everything(
    order: Order, message: Message, lease: Lease, state: MessageState, context: Context, queue: Queue, pond: Pond
) -> None:
    """A coroutine gets the asynchronous forms."""
    assert_type(context.message, Message)
    assert_type(context.cancelled, bool)
    assert_type(context.deadline, float | None)
    assert_type(context.values, dict[Any, Any])
    context.hand_off("next", millpond.json(order.number), delay=5, priority=1)
    if order.number < 0:
        raise millpond.GiveUp("less than nothing")
    if order.number == 0:
        raise millpond.Retry(after=5.0, reason="not yet")
    raise millpond.Defer(60)


@shop.consumer("threaded", run_in="thread", retry=millpond.RetryPolicy(give_up_on=(KeyError,)))
def threaded(
    payload: bytes, message: SyncMessage, state: SyncMessageState, queue: SyncQueue, pond: SyncPond, lease: Lease
) -> None:
    """A function gets the synchronous forms."""
    assert_type(state.load(), Any)


async def workers() -> None:
    assert_type(await measure.send(Shape(sides=3), Order(2), unit="cm"), TaskHandle[dict[str, float]])
    assert_type(await measure(Shape(sides=3), Order(2)), dict[str, float])
    assert_type(await (await bare.send()).result(), str)
    assert_type((await burn.send(1.5)).id, str)
    handle = await bare.options(keep_result=60, unique="k", unique_for=5).send()
    assert_type(await handle.progress(), Any)
    assert_type(handle.duplicate, bool)
    assert_type(everything.__name__, str)  # a consumer's function stays what it is
    worker = millpond.Worker(shop, ["everything", "threaded"], grace=5.0, owner="me", middleware=[Timing()])
    worker.stop(grace=1)
    assert_type(worker.counts(), dict[str, int])
    await worker.run()
    counts = await shop.queue("orders").counts()
    assert_type(counts.enqueued, int | None)
