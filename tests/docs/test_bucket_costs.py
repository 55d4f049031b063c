"""What docs/concepts/guarantees.md says that each step asks of a bucket is what it asks."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from millpond.model.ids import IdSource
from millpond.pond import Pond
from millpond.queue import Queue
from millpond.service.config import Config
from millpond.service.ready import FIRST_PAGE
from millpond.stores.base import Requests
from millpond.stores.objects.engine import HALF, MARGIN, OLD
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.obstore_bucket import DELETE_WINDOW, TIMEOUT
from millpond.stores.objects.probe import check_at_opening
from millpond.stores.objects.ready import WINDOW
from millpond.stores.objects.requests import CountedBucket
from millpond.stores.objects.store import ObjectStore
from millpond.testing import ManualClock

PAGE = (Path(__file__).parents[2] / "docs" / "concepts" / "guarantees.md").read_text()
LARGE = 100_000
KINDS = ("create", "replace", "read", "delete", "list", "part")


def table() -> dict[str, str]:
    """Each step of the page and the requests that it is said to take."""
    part = PAGE[PAGE.index("### What each step asks of the bucket") :]
    rows = re.findall(r"^\| (.+?) \| (\d .+?) \|$", part[: part.index("\n## ")], re.MULTILINE)
    return {step: re.sub(r"(?<=[a-z])s\b", "", said) for step, said in rows}


def words(requests: Requests) -> str:
    counts = msgspec.structs.asdict(requests)
    return ", ".join(f"{counts[kind + 's']} {kind}" for kind in KINDS if counts[kind + "s"])


class Bench:
    """Two processes, which know the queue's policy."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.bucket = MemoryBucket(clock=self.clock)
        self.measured: dict[str, str] = {}
        self.mine: Pond
        self.theirs: Pond
        self.queue: Queue
        self.other: Queue

    @asynccontextmanager
    async def pond(self) -> AsyncIterator[Pond]:
        store = ObjectStore(self.bucket.share(), clock=self.clock, measure_skew=False)
        async with Pond(store, clock=self.clock, config=Config(policy_max_age=3600.0)) as pond:
            yield pond

    async def count(self, step: str, call: Any, pond: Pond | None = None) -> Any:
        pond = pond or self.mine
        pond.reset_requests()
        result = await call
        said = words(pond.requests().total)
        assert self.measured.setdefault(step, said) == said, step
        return result

    async def lease(self, step: str, queue: Queue, pond: Pond) -> Any:
        """Receive one; the look that finds it, which is needed or not, is counted apart."""
        pond.reset_requests()
        [message] = await queue.receive()
        self.measured[step] = words(msgspec.structs.replace(pond.requests().total, lists=0))
        assert pond.requests().total.lists <= 1
        return message

    async def one(self, **options: Any) -> Any:
        """A message, leased."""
        await self.queue.enqueue(b"x", **options)
        [message] = await self.queue.receive()
        return message


async def play(bench: Bench) -> None:
    count, queue, other = bench.count, bench.queue, bench.other
    # So that both know the policy of both queues.
    await (await bench.one()).ack(then=[("next", b"x")])
    await other.receive()

    await count("`enqueue`", queue.enqueue(b"x"))
    message = await bench.lease("lease a message that this process enqueued", queue, bench.mine)
    await count("`ack`", message.ack())
    await count("a look that finds messages, or none", queue.receive())

    await queue.enqueue(b"x")
    await (await bench.lease("lease a message of another process", other, bench.theirs)).ack()

    await count("`enqueue(dedup_key=…)`", queue.enqueue(b"x", dedup_key="k"))
    await count("the same again, a duplicate", queue.enqueue(b"x", dedup_key="k"))
    chosen = "7d2f7c1e-5a34-4f0b-9c57-0d6f0b1c2a11"
    await count("`enqueue(message_id=…)`, not a UUIDv7", queue.enqueue(b"x", message_id=chosen))
    await queue.purge()

    await count("`enqueue` of a payload above 64 KiB", queue.enqueue(bytes(LARGE)))
    [message] = await queue.receive()
    await count("read a payload above 64 KiB", message.read())
    await count("`ack` of a payload above 64 KiB", message.ack())

    for _ in range(3):
        await queue.enqueue(b"x", ordering_key="a")
    [message] = await queue.receive()
    await message.ack()
    await (await bench.lease("lease the next of an `ordering_key`", queue, bench.mine)).ack()
    await queue.purge()

    message = await bench.one()
    await count("`extend`, `nack`, `defer`", message.extend(60))
    await count("`state.save`", message.state.save({"step": 1}))
    await count("`state.save`", message.state.save({"step": 2}))
    await count("`extend`, `nack`, `defer`", message.nack())
    [message] = await queue.receive()
    await count("`extend`, `nack`, `defer`", message.defer(3600))

    message = await bench.one(visibility=MARGIN / 1000 - 0.001)
    await count("`ack` in the last 15 seconds of the lease", message.ack())
    message = await bench.one(visibility=MARGIN / 1000 + 0.001)
    await count("`ack`", message.ack())

    await count("`ack(then=…)` with one successor", (await bench.one()).ack(then=[("next", b"x")]))
    await count("a `nack` that makes a dead letter", (await bench.one(max_attempts=1)).nack())
    await count("redrive a dead letter", queue.dead_letters.redrive())
    await count("`counts` of a short queue", queue.counts())


async def opening(bench: Bench) -> str:
    requests = Requests()
    for _ in range(2):
        counted = CountedBucket(bench.bucket.share())
        check = partial(check_at_opening, counted, where="s3://b", clock=bench.clock, ids=IdSource(bench.clock))
        store = ObjectStore(counted, clock=bench.clock, check=check)
        await store.open()
        requests = counted.requests()[None]
        await store.close()
    return words(requests)


async def test_each_step_takes_the_requests_that_the_page_says() -> None:
    bench = Bench()
    async with bench.pond() as bench.mine, bench.pond() as bench.theirs:
        bench.queue, bench.other = bench.mine.queue("orders"), bench.theirs.queue("orders")
        await play(bench)
    bench.measured["open a store (but for the first time, or a month later)"] = await opening(bench)
    assert bench.measured == table()


def test_the_seconds_of_the_page_are_those_of_the_code() -> None:
    assert (MARGIN, OLD, HALF) == (15_000, 60_000, 30_000)
    assert TIMEOUT + 5 == MARGIN / 1000
    assert DELETE_WINDOW == 2
    assert "(15 s; a delete is sent again for two seconds only" in PAGE
    config = Config()
    assert (FIRST_PAGE, config.thrifty_page_size, WINDOW) == (4, 128, 1000)
    assert (config.poll_interval, config.poll_max_interval) == (3.0, 60.0)
    assert (config.policy_age(True), config.policy_age(False)) == (60.0, 1.0)
    assert (config.collecting(True), config.collecting(False)) == (3600.0, 30.0)
