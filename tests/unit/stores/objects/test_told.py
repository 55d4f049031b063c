"""Processes of one machine that tell each other of messages by name: what that asks of the bucket, and that nothing is
stuck whatever becomes of those who were told."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

import millpond.testing
from millpond.model.clock import ManualClock
from millpond.stores import wake
from millpond.stores.objects import told
from millpond.stores.objects.faulty_bucket import FaultyBucket
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.store import ObjectStore

QUEUE = ("default", "q")


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="mp") as made:
        monkeypatch.setenv("XDG_RUNTIME_DIR", made)
        yield


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


class Host:
    """A machine with a producer and some consumers, each a store of its own, and a clock that is moved."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.root = MemoryBucket(clock=self.clock)
        self.buckets: list[FaultyBucket] = []
        self.stores: list[ObjectStore] = []
        self.taken: list[tuple[int, bytes]] = []
        self.tasks: list[asyncio.Task[None]] = []

    @contextlib.asynccontextmanager
    async def ponds(self, number: int) -> AsyncIterator[list[millpond.testing.TestPond]]:
        """The producer's, and those of so many consumers."""
        async with contextlib.AsyncExitStack() as stack:
            made = []
            for each in range(number + 1):
                bucket = FaultyBucket(self.root.share())
                store = ObjectStore(bucket, clock=self.clock, measure_skew=False)
                self.buckets.append(bucket)
                self.stores.append(store)
                pond = millpond.testing.pond(store=store, clock=self.clock, seed=each)
                made.append(await stack.enter_async_context(pond))
            try:
                yield made
            finally:
                for task in self.tasks:
                    task.cancel()
                await asyncio.gather(*self.tasks, return_exceptions=True)

    async def consume(self, pond: millpond.testing.TestPond, number: int, *, busy: asyncio.Event | None = None) -> None:
        """Take messages until the end, and wait for ``busy`` with each; returns when it waits for the first."""

        async def take() -> None:
            while True:
                for message in await pond.queue("q").receive(1, wait=3600.0):
                    self.taken.append((number, message.payload))
                    if busy is not None:
                        await busy.wait()
                    await message.ack()

        self.tasks.append(asyncio.ensure_future(take()))
        store = self.stores[number]
        await until(lambda: QUEUE in store._told._queues and self.waits(number))

    def waits(self, number: int) -> bool:
        queue = self.stores[number]._told._of(QUEUE)
        return queue is not None and queue.free() > 0

    def reset(self) -> None:
        for bucket in self.buckets:
            bucket.requests.clear()

    def requests(self) -> Counter[str]:
        return Counter(request.method for bucket in self.buckets for request in bucket.requests)


async def warm(host: Host, ponds: list[millpond.testing.TestPond]) -> None:
    """Everybody waits."""
    for number, pond in enumerate(ponds[1:], start=1):
        await host.consume(pond, number)
    host.reset()


@pytest.mark.parametrize("consumers", [1, 8])
async def test_a_message_for_those_who_wait_costs_four_requests(consumers: int) -> None:
    host = Host()
    async with host.ponds(consumers) as ponds:
        await warm(host, ponds)
        for number in range(40):
            await ponds[0].queue("q").enqueue(b"%d" % number)
            await until(lambda count=number + 1: len(host.taken) == count)
            await until(lambda: all(map(host.waits, range(1, consumers + 1))))
        counts = host.requests()
        assert counts["list"] == 0
        # The policy of the queue is read by each once.
        assert counts["read"] <= 40 + consumers + 1
        assert counts["create"] == counts["replace"] == counts["delete"] == 40
        assert {payload for _, payload in host.taken} == {b"%d" % number for number in range(40)}
        if consumers > 1:
            assert len({number for number, _ in host.taken}) > consumers // 2


async def test_what_is_a_busy_process_s_goes_to_the_next_at_once() -> None:
    host = Host()
    async with host.ponds(3) as ponds:
        free = asyncio.Event()
        for number in (1, 2):
            await host.consume(ponds[number], number, busy=free)
        for _ in range(2):
            await ponds[0].queue("q").enqueue(b"long")
        await until(lambda: len(host.taken) == 2)
        await host.consume(ponds[3], 3)
        host.reset()
        for number in range(10):
            await ponds[0].queue("q").enqueue(b"short")
            await until(lambda count=number + 3: len(host.taken) == count)
            await until(lambda: host.waits(3))
        assert [who for who, _ in host.taken[2:]] == [3] * 10
        assert host.requests()["list"] == 0
        free.set()


async def test_what_came_while_all_were_busy_is_taken_by_whoever_waits_first_without_a_listing() -> None:
    host = Host()
    async with host.ponds(2) as ponds:
        free = [asyncio.Event(), asyncio.Event()]
        for number in (1, 2):
            await host.consume(ponds[number], number, busy=free[number - 1])
        for _ in range(2):
            await ponds[0].queue("q").enqueue(b"long")
        await until(lambda: len(host.taken) == 2)
        host.reset()
        await ponds[0].queue("q").enqueue(b"next")
        await until(lambda: all(host.stores[one]._told._of(QUEUE).mine for one in (1, 2)))  # type: ignore[union-attr]
        free[0].set()
        await until(lambda: len(host.taken) == 3)
        assert host.taken[2] == (1, b"next")
        await until(lambda: not host.stores[2]._told._of(QUEUE).mine)  # type: ignore[union-attr]
        free[1].set()
        await until(lambda: host.waits(2))
        assert host.requests()["list"] == 0
        assert host.requests()["read"] <= 2 + 1, "of the message, and of the policy"


@pytest.mark.parametrize("fate", ["hangs", "dies"])
async def test_what_is_told_to_one_who_does_not_take_it_is_taken_by_others(fate: str) -> None:
    """One that hangs was told, and does nothing; of one that died the socket is still there."""
    host = Host()
    async with host.ponds(2) as ponds:
        await warm(host, ponds)
        feed = host.stores[1]._feed
        assert feed is not None
        inner = feed._feed
        assert inner is not None
        assert inner._socket is not None
        asyncio.get_running_loop().remove_reader(inner._socket.fileno())
        if fate == "dies":
            inner._socket.close()
            inner._socket = None
        for _ in range(6):
            await ponds[0].queue("q").enqueue(b"x")
        if fate == "hangs":
            listener = host.stores[2]._told._of(QUEUE)
            assert listener is not None
            await until(lambda: len(host.taken) + len(listener.others) == 6)
            assert len(host.taken) < 6, "some were told to the one that hangs"
            for _ in range(4):
                host.clock.advance(told.PATIENCE)
                await asyncio.sleep(0.02)
        await until(lambda: len(host.taken) == 6)
        assert {who for who, _ in host.taken} == {2}
        assert host.requests()["list"] == 0


async def test_who_is_not_told_finds_it_at_the_next_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    async with host.ponds(1) as ponds:
        await warm(host, ponds)
        monkeypatch.setattr(wake.ChangeFeed, "_send", lambda *arguments: False)
        await ponds[0].queue("q").enqueue(b"x")
        for _ in range(70):
            host.clock.advance(1.0)
            await asyncio.sleep(0.001)
        await until(lambda: len(host.taken) == 1)


async def test_a_delayed_message_is_taken_when_it_is_due_and_not_before() -> None:
    host = Host()
    async with host.ponds(2) as ponds:
        await warm(host, ponds)
        await ponds[0].queue("q").enqueue(b"later", delay=1.5)
        await until(lambda: all(host.stores[one]._told._of(QUEUE).later for one in (1, 2)))  # type: ignore[union-attr]
        host.clock.advance(1.0)
        await asyncio.sleep(0.05)
        assert host.taken == []
        assert host.requests()["read"] <= 2, "of nothing but policies"
        host.clock.advance(0.6)
        await until(lambda: len(host.taken) == 1)
        assert host.requests()["list"] == 0


async def test_messages_of_a_group_come_one_at_a_time_and_in_order() -> None:
    host = Host()
    async with host.ponds(2) as ponds:
        await warm(host, ponds)
        for number in range(6):
            await ponds[0].queue("q").enqueue(b"%d" % number, ordering_key="g")
        await until(lambda: len(host.taken) == 6)
        assert [payload for _, payload in host.taken] == [b"%d" % number for number in range(6)]


async def test_a_paused_queue_hands_out_nothing_that_was_told() -> None:
    host = Host()
    async with host.ponds(1) as ponds:
        await warm(host, ponds)
        await ponds[0].queue("q").pause()
        host.clock.advance(2.0)
        await asyncio.sleep(0.05)
        await ponds[0].queue("q").enqueue(b"x")
        await asyncio.sleep(0.05)
        assert host.taken == []
        await ponds[0].queue("q").resume()
        for _ in range(70):
            host.clock.advance(1.0)
            await asyncio.sleep(0.001)
        await until(lambda: len(host.taken) == 1)


def test_each_who_knows_the_same_listeners_finds_the_same_order() -> None:
    listeners = [f"{1000 + number}-0" for number in range(8)]
    firsts: Counter[str] = Counter()
    for key in range(2000):
        line = told.order(listeners, key)
        assert line == told.order(reversed(listeners), key)
        assert sorted(line) == listeners
        firsts[line[0]] += 1
        assert told.order(line[1:], key) == line[1:], "who goes changes nothing else"
    assert min(firsts.values()) > 180
