"""Mistakes that a type checker has to find. Each line has the error that it must be; a comment that silences nothing is
an error itself. Never run."""

from __future__ import annotations

import millpond


async def asynchronous(pond: millpond.Pond) -> None:
    queue = pond.queue("orders")
    await queue.enqueue(b"x", prio=3)  # type: ignore[call-arg]
    await queue.enqueue(b"x", delay="1")  # type: ignore[arg-type]
    await queue.enqueue(b"x", 5)  # type: ignore[call-arg]
    await queue.enqueue_many([b"x"], prio=3)  # type: ignore[call-arg]
    await queue.enqueue_many([b"x"], delay="1")  # type: ignore[arg-type]
    await queue.set_policy(max_attempt=3)  # type: ignore[call-arg]
    await queue.set_policy(on_expired="keep")  # type: ignore[arg-type]
    receipt = queue.enqueue(b"x")
    receipt.message_id  # type: ignore[attr-defined]  # noqa: B018
    [message] = await queue.receive("1")  # type: ignore[arg-type]
    message.payload = b"y"  # type: ignore[misc]
    message.akc()  # type: ignore[attr-defined]
    await message.extend()  # type: ignore[call-arg]
    await message.lease.token  # type: ignore[misc]
    for _ in message.stream():  # type: ignore[attr-defined]
        pass
    await queue.ack_many(["id"])  # type: ignore[list-item]
    with pond:  # type: ignore[attr-defined]
        pass


def synchronous(pond: millpond.SyncPond) -> None:
    queue = pond.queue("orders")
    pond.queues("orders")  # type: ignore[call-arg]
    pond.dispatcher  # type: ignore[attr-defined]  # noqa: B018
    queue.enqueue(b"x", prio=3)  # type: ignore[call-arg]
    queue.enqueue(b"x", delay="1")  # type: ignore[arg-type]
    queue.enqueue(b"x", 5)  # type: ignore[call-arg]
    queue.enqueue_many([b"x"], prio=3)  # type: ignore[call-arg]
    queue.enqueue_many([b"x"], delay="1")  # type: ignore[arg-type]
    queue.set_policy(max_attempt=3)  # type: ignore[call-arg]
    queue.set_policy(on_expired="keep")  # type: ignore[arg-type]
    queue.enqueue(b"x").id  # type: ignore[attr-defined]  # noqa: B018
    [message] = queue.receive("1")  # type: ignore[arg-type]
    message.payload = b"y"  # type: ignore[misc]
    message.akc()  # type: ignore[attr-defined]
    message.extend()  # type: ignore[call-arg]
    message.lease.tokn  # type: ignore[attr-defined]  # noqa: B018
    queue.ack_many(["id"])  # type: ignore[list-item]
    queue.dead_letters.redrive(5)  # type: ignore[arg-type]
    text: str = message.read()  # type: ignore[assignment]
    millpond.connect_sync(5)  # type: ignore[arg-type]
    asynchronous_message: millpond.Message = message  # type: ignore[assignment]
    print(text, asynchronous_message)


async def mixed(pond: millpond.SyncPond) -> None:
    await pond.queue("orders").enqueue(b"x")  # type: ignore[misc]
    async with pond:  # type: ignore[attr-defined]
        pass
    async for _ in pond.queue("orders").receive()[0].stream():  # type: ignore[attr-defined]
        pass


shop = millpond.connect()


@shop.task
async def add(a: int, b: int = 2) -> int:
    """A task."""
    return a + b


@shop.task(keep_result=60)
def shout(text: str) -> str:
    """Another."""
    return text


async def tasks(pond: millpond.SyncPond) -> None:
    await add.send("1")  # type: ignore[arg-type]
    await add.send()  # type: ignore[call-arg]
    await add.send(1, c=3)  # type: ignore[call-arg]
    add.call(1, b="2")  # type: ignore[arg-type]
    await add.options(priorty=3).send(1)  # type: ignore[call-arg]
    await add.send_many([shout.call("a")])  # type: ignore[list-item]
    number: int = shout("a")  # type: ignore[assignment]
    text: str = await (await add.send(1)).result()  # type: ignore[assignment]
    await pond.send(add.call(1)).result()  # type: ignore[misc]
    shop.task(keep_results=60)  # type: ignore[call-overload]
    shop.periodic(5)  # type: ignore[arg-type]
    shop.limit("orders", rates=5)  # type: ignore[call-arg]
    print(number, text)
    await bare.send(1)  # type: ignore[call-arg]
    await add.send(a=1, d=2)  # type: ignore[call-arg]
    count: int = await (await shop.send(shout.call("a"))).result()  # type: ignore[assignment]
    await add.options(delay="soon").send(1)  # type: ignore[arg-type]
    millpond.Worker(shop, grase=5)  # type: ignore[call-arg]
    millpond.RetryPolicy(bas=5.0)  # type: ignore[call-arg]
    millpond.Retry(after="soon")  # type: ignore[arg-type]
    shop.consumer("orders", run_in="fibre")  # type: ignore[arg-type]
    shop.consumer("orders", concurency=5)  # type: ignore[call-arg]
    shop.periodic("every 5m", catch_up="all")  # type: ignore[arg-type]
    shop.task(run_in="fibre")  # type: ignore[call-overload]
    print(count)


@shop.task
async def bare() -> None:
    """A task without arguments."""


class Late(millpond.Middleware):
    """Its hooks do not take what they are given."""

    async def before(self, message: millpond.Message) -> None:  # type: ignore[override]
        """A handler begins."""
