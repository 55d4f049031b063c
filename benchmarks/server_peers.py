"""Clients of brokers that keep messages durably, and Millpond's own client, under the same load as Millpond's server.

    python benchmarks/server_peers.py NAME URL MODE CALLERS SECONDS [PER_SECOND]

MODE is ``single`` (each caller puts a message in, takes one out and confirms it, a call each), ``batch`` (the same, a
hundred messages a call) or ``latency`` (lifecycles as in ``single``, begun PER_SECOND at even times, whether or not
the ones before are done; latency counts from when one was to begin). Prints one JSON object. Messages are 1 KiB.

Each peer is driven as its documentation has it, by its usual client for asyncio, on uvloop:

- *redis*: a stream and a consumer group: XADD; XREADGROUP; XACK and XDEL, sent together. A connection per caller.
  Batches are pipelines and XREADGROUP with COUNT.
- *rabbitmq*: a quorum queue; publishes that wait for their confirmation; consumers with a prefetch of 1 (100 in
  batches); acks, which nobody confirms. A channel per caller, eight channels to a connection.
- *beanstalkd*: put, reserve, delete on a connection per caller, by a client of ours of thirty lines: those on the
  package index are synchronous, and slower. Batches are a hundred commands sent together.
- *jetstream*: a work-queue stream in files; publishes that wait for their acknowledgement; fetches on a pull
  consumer; acks, which nobody confirms. One connection, as is its custom.
- *postgresql*: INSERT; UPDATE of the first row that is due, FOR UPDATE SKIP LOCKED; DELETE. A connection per caller;
  batches are arrays in one statement.
- *millpond*: `millpond.connect("http://…")`. What a program of yours would reach; `load.py`, which does the least
  that the protocol needs, shows the server."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

PAYLOAD = os.urandom(1024)
BATCH = 100
WARM_UP = 0.5
"""Seconds that are not counted."""
LATE = 3.0
"""Seconds after the end of a run in which what was begun must be done."""


class Caller(Protocol):
    """One who puts in, takes out and confirms. Takes may come back empty."""

    async def put(self, count: int) -> None:
        """Durably, ``count`` messages in one call."""

    async def take(self, count: int) -> list[Any]:
        """Up to ``count`` messages."""

    async def confirm(self, messages: list[Any]) -> None:
        """All of them, in one call."""


class RedisCaller:
    """A connection to Redis."""

    def __init__(self, client: Any, name: str) -> None:
        self._client, self._name = client, name

    async def put(self, count: int) -> None:
        """XADD."""
        if count == 1:
            await self._client.xadd("bench", {b"m": PAYLOAD})
            return
        pipeline = self._client.pipeline(transaction=False)
        for _ in range(count):
            pipeline.xadd("bench", {b"m": PAYLOAD})
        await pipeline.execute()

    async def take(self, count: int) -> list[Any]:
        """XREADGROUP."""
        found = await self._client.xreadgroup("workers", self._name, {"bench": ">"}, count=count, block=1000)
        return [message_id for _, messages in found for message_id, _ in messages]

    async def confirm(self, messages: list[Any]) -> None:
        """XACK and XDEL."""
        pipeline = self._client.pipeline(transaction=False)
        pipeline.xack("bench", "workers", *messages)
        pipeline.xdel("bench", *messages)
        await pipeline.execute()


@contextlib.asynccontextmanager
async def redis(url: str, callers: int, batch: int) -> AsyncIterator[list[Caller]]:
    """Redis streams."""
    from redis.asyncio import Redis

    clients = [Redis.from_url(url, single_connection_client=True, protocol=2) for _ in range(callers)]
    await clients[0].xgroup_create("bench", "workers", id="0", mkstream=True)
    yield [RedisCaller(client, str(number)) for number, client in enumerate(clients)]
    for client in clients:
        await client.aclose()


class RabbitCaller:
    """A channel to RabbitMQ, which has messages pushed to it."""

    def __init__(self, channel: Any, queue: Any, pushed: asyncio.Queue[Any]) -> None:
        self._channel, self._queue, self._pushed = channel, queue, pushed

    async def consume(self) -> None:
        """Have messages pushed from now on."""
        await self._queue.consume(self._pushed.put)

    async def put(self, count: int) -> None:
        """Publishes and their confirmations."""
        from aio_pika import DeliveryMode, Message

        publish = self._channel.default_exchange.publish
        messages = [Message(PAYLOAD, delivery_mode=DeliveryMode.PERSISTENT) for _ in range(count)]
        if count == 1:
            await publish(messages[0], "bench")
        else:
            await asyncio.gather(*(publish(message, "bench") for message in messages))

    async def take(self, count: int) -> list[Any]:
        """What was pushed."""
        messages = [await self._pushed.get()]
        while len(messages) < count and not self._pushed.empty():
            messages.append(self._pushed.get_nowait())
        return messages

    async def confirm(self, messages: list[Any]) -> None:
        """An ack of all up to the last."""
        await messages[-1].ack(multiple=len(messages) > 1)


@contextlib.asynccontextmanager
async def rabbitmq(url: str, callers: int, batch: int) -> AsyncIterator[list[Caller]]:
    """A quorum queue of RabbitMQ."""
    import aio_pika

    connections = [await aio_pika.connect(url) for _ in range((callers + 7) // 8)]
    made = []
    # Singly, all callers take from what was pushed to any of them: otherwise one would wait for a message that lies
    # with another who does not ask. An ack of many is for those of one channel.
    shared: asyncio.Queue[Any] = asyncio.Queue()
    for number in range(callers):
        channel = await connections[number // 8].channel(publisher_confirms=True)
        await channel.set_qos(prefetch_count=batch)
        queue = await channel.declare_queue("bench", durable=True, arguments={"x-queue-type": "quorum"})
        made.append(RabbitCaller(channel, queue, shared if batch == 1 else asyncio.Queue()))
    for caller in made:
        await caller.consume()
    yield list(made)
    for connection in connections:
        await connection.close()


class BeanstalkCaller:
    """A connection to beanstalkd."""

    PUT = b"put 0 0 60 %d\r\n%s\r\n" % (len(PAYLOAD), PAYLOAD)

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def put(self, count: int) -> None:
        """put"""
        self._writer.write(self.PUT * count)
        for _ in range(count):
            self._expect(await self._reader.readline(), b"INSERTED")

    async def take(self, count: int) -> list[Any]:
        """reserve"""
        self._writer.write(b"reserve-with-timeout 1\r\n" + b"reserve-with-timeout 0\r\n" * (count - 1))
        messages = []
        for _ in range(count):
            said = (await self._reader.readline()).split()
            if said != [b"TIMED_OUT"]:
                self._expect(said[0], b"RESERVED")
                messages.append(said[1])
                await self._reader.readexactly(int(said[2]) + 2)
        return messages

    async def confirm(self, messages: list[Any]) -> None:
        """delete"""
        self._writer.write(b"".join([b"delete " + message + b"\r\n" for message in messages]))
        for _ in messages:
            self._expect(await self._reader.readline(), b"DELETED")

    @staticmethod
    def _expect(said: bytes, word: bytes) -> None:
        if not said.startswith(word):
            raise RuntimeError(f"beanstalkd said {said!r}, not {word!r}")


@contextlib.asynccontextmanager
async def beanstalkd(url: str, callers: int, batch: int) -> AsyncIterator[list[Caller]]:
    """beanstalkd."""
    host, _, port = url.rpartition(":")
    pairs = [await asyncio.open_connection(host, int(port)) for _ in range(callers)]
    yield [BeanstalkCaller(*pair) for pair in pairs]
    for _, writer in pairs:
        writer.close()


class NatsCaller:
    """One of those who share a connection to NATS."""

    def __init__(self, context: Any, subscription: Any) -> None:
        self._context, self._subscription = context, subscription

    async def put(self, count: int) -> None:
        """Publishes and their acknowledgements."""
        if count == 1:
            await self._context.publish("bench", PAYLOAD)
        else:
            await asyncio.gather(*(self._context.publish("bench", PAYLOAD) for _ in range(count)))

    async def take(self, count: int) -> list[Any]:
        """fetch"""
        import nats.errors

        try:
            return list(await self._subscription.fetch(count, timeout=1))
        except nats.errors.TimeoutError:
            return []

    async def confirm(self, messages: list[Any]) -> None:
        """ack"""
        for message in messages:
            await message.ack()


@contextlib.asynccontextmanager
async def jetstream(url: str, callers: int, batch: int) -> AsyncIterator[list[Caller]]:
    """A work queue of JetStream."""
    import nats
    from nats.js.api import ConsumerConfig, RetentionPolicy, StorageType

    connection = await nats.connect(url)
    context = connection.jetstream(timeout=30, publish_async_max_pending=100_000)
    await context.add_stream(
        name="bench", subjects=["bench"], storage=StorageType.FILE, retention=RetentionPolicy.WORK_QUEUE
    )
    settings = ConsumerConfig(durable_name="workers", max_ack_pending=100_000)
    await context.add_consumer("bench", settings)
    made = [NatsCaller(context, await context.pull_subscribe_bind("workers", stream="bench")) for _ in range(callers)]
    yield list(made)
    await connection.close()


class PostgresCaller:
    """A connection to PostgreSQL."""

    PUT = "INSERT INTO bench (payload) SELECT unnest($1::bytea[])"
    TAKE = """
        UPDATE bench SET visible_at = now() + interval '60 seconds', attempts = attempts + 1
        WHERE id = ANY(ARRAY(
            SELECT id FROM bench WHERE visible_at <= now() ORDER BY visible_at, id LIMIT $1 FOR UPDATE SKIP LOCKED))
        RETURNING id, payload"""
    CONFIRM = "DELETE FROM bench WHERE id = ANY($1::bigint[])"

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def put(self, count: int) -> None:
        """INSERT"""
        await self._connection.execute(self.PUT, [PAYLOAD] * count)

    async def take(self, count: int) -> list[Any]:
        """UPDATE"""
        return [row[0] for row in await self._connection.fetch(self.TAKE, count)]

    async def confirm(self, messages: list[Any]) -> None:
        """DELETE"""
        await self._connection.execute(self.CONFIRM, messages)


@contextlib.asynccontextmanager
async def postgresql(url: str, callers: int, batch: int) -> AsyncIterator[list[Caller]]:
    """A table and SKIP LOCKED."""
    import asyncpg

    connections = [await asyncpg.connect(url) for _ in range(callers)]
    await connections[0].execute(
        "CREATE TABLE bench (id bigserial PRIMARY KEY, visible_at timestamptz NOT NULL DEFAULT now(),"
        " attempts int NOT NULL DEFAULT 0, payload bytea NOT NULL); CREATE INDEX ON bench (visible_at, id)"
    )
    yield [PostgresCaller(connection) for connection in connections]
    for connection in connections:
        await connection.close()


class MillpondCaller:
    """One of those who share a pond."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    async def put(self, count: int) -> None:
        """enqueue"""
        if count == 1:
            await self._queue.enqueue(PAYLOAD)
        else:
            await self._queue.enqueue_many([PAYLOAD] * count)

    async def take(self, count: int) -> list[Any]:
        """receive"""
        return list(await self._queue.receive(count, wait=1.0))

    async def confirm(self, messages: list[Any]) -> None:
        """ack"""
        if len(messages) == 1:
            await messages[0].ack()
        else:
            await self._queue.ack_many(messages)


@contextlib.asynccontextmanager
async def millpond(url: str, callers: int, batch: int) -> AsyncIterator[list[Caller]]:
    """Millpond's own client."""
    from millpond import connect

    async with connect(url) as pond:
        yield [MillpondCaller(pond.queue("bench")) for _ in range(callers)]


PEERS: dict[str, Callable[[str, int, int], contextlib.AbstractAsyncContextManager[list[Caller]]]] = {
    "redis": redis,
    "rabbitmq": rabbitmq,
    "beanstalkd": beanstalkd,
    "jetstream": jetstream,
    "postgresql": postgresql,
    "millpond": millpond,
}


class Tally:
    """What was done, and when it counts."""

    def __init__(self, seconds: float) -> None:
        self.begin = time.perf_counter() + WARM_UP
        self.end = self.begin + seconds
        self.done = 0

    def add(self, count: int) -> None:
        """So many lifecycles ended now."""
        if self.begin <= time.perf_counter() < self.end:
            self.done += count

    @property
    def over(self) -> bool:
        """The time is up."""
        return time.perf_counter() >= self.end


async def lifecycles(caller: Caller, count: int, tally: Tally) -> None:
    """Lifecycles of ``count`` messages, one after the other."""
    while not tally.over:
        await caller.put(count)
        missing = count
        while missing and not tally.over:
            messages = await caller.take(missing)
            if messages:
                missing -= len(messages)
                await caller.confirm(messages)
                tally.add(len(messages))


async def at_a_rate(callers: list[Caller], per_second: float, tally: Tally) -> dict[str, Any]:
    """Lifecycles at even times, and how long each took from when it was to begin."""
    numbers = itertools.count()
    origin = time.perf_counter()
    whole: list[float] = []
    calls: list[float] = []

    async def work(caller: Caller) -> None:
        while True:
            due = origin + next(numbers) / per_second
            if due >= tally.end:
                return
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            moments = [time.perf_counter()]
            await caller.put(1)
            moments.append(time.perf_counter())
            while not (messages := await caller.take(1)):
                if tally.over:
                    return
            moments.append(time.perf_counter())
            await caller.confirm(messages)
            moments.append(time.perf_counter())
            tally.add(1)
            if due >= tally.begin:
                whole.append(moments[-1] - due)
                calls.extend(after - before for before, after in itertools.pairwise(moments))

    await finish([asyncio.ensure_future(work(caller)) for caller in callers], tally)
    return {"lifecycle": percentiles(whole), "call": percentiles(calls)}


async def finish(running: list[asyncio.Future[None]], tally: Tally) -> None:
    """Wait for them until a little after the end: then some wait for a message that was another's."""
    done, late = await asyncio.wait(running, timeout=tally.end + LATE - time.perf_counter())
    for task in late:
        task.cancel()
    for task in done:
        task.result()


def percentiles(seconds: list[float]) -> dict[str, float]:
    """The median and the 99th percentile, in ms."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50_ms": cuts[49] * 1e3, "p99_ms": cuts[98] * 1e3, "max_ms": max(seconds) * 1e3}


async def main() -> None:
    """Drive one server, print what it did."""
    name, url, mode, callers, seconds, *rest = sys.argv[1:]
    batch = BATCH if mode == "batch" else 1
    async with PEERS[name](url, int(callers), batch) as made:
        begun = time.process_time()
        tally = Tally(float(seconds))
        result: dict[str, Any] = {}
        if mode == "latency":
            result = await at_a_rate(made, float(rest[0]), tally)
        else:
            await finish([asyncio.ensure_future(lifecycles(caller, batch, tally)) for caller in made], tally)
        result |= {
            "lifecycles": tally.done,
            "per_second": tally.done / float(seconds),
            "cpu_seconds": time.process_time() - begun,
        }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
