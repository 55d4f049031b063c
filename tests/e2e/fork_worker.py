"""A process of the fork test: opens a pond, forks, and fails if anything is not as it should be.

python fork_worker.py SCENARIO DATABASE
"""

from __future__ import annotations

import asyncio
import fcntl
import multiprocessing
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Awaitable, Callable

import pytest

import millpond
from millpond.stores.sqlite import fork, schema

# Python warns of forks in processes with threads; this is about just those.
warnings.filterwarnings("ignore", category=DeprecationWarning)

PATH = sys.argv[2]
URL = f"sqlite:///{PATH}"


def child(work: Callable[[], object]) -> int:
    """Do it in a child that ends without further ado; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def join(pid: int) -> None:
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "the child failed"


async def refused(call: Callable[[], Awaitable[object]]) -> None:
    with pytest.raises(millpond.StoreError, match="before this process forked; open it anew in the child"):
        async with asyncio.timeout(10):
            await call()


async def every_call() -> None:
    """In the child each call says what is wrong; the parent, its waiters and its locks notice nothing."""
    async with millpond.connect(URL) as pond:
        queue = pond.queue("q")
        await queue.enqueue(bytes(100_000))
        [message] = await queue.receive()
        waiting = asyncio.create_task(pond.queue("news").receive(wait=50.0))
        while not pond.dispatcher.has_active_watcher(None, "news"):
            await asyncio.sleep(0.01)

        async def in_child() -> None:
            calls: list[Callable[[], Awaitable[object]]] = [
                lambda: queue.enqueue(b"x"),
                lambda: queue.enqueue_many([b"x", b"y"]),
                lambda: queue.enqueue(bytes(100_000)),
                queue.receive,
                lambda: queue.receive(wait=5.0),
                message.ack,
                message.nack,
                lambda: message.defer(1.0),
                lambda: message.extend(5.0),
                message.read,
                lambda: message.state.save(1),
                message.state.load,
                queue.counts,
                queue.purge,
                queue.dead_letters.list,
                queue.dead_letters.redrive,
                pond.queues,
                pond.collect,
                pond.verify,
                pond.open,
            ]
            for call in calls:
                await refused(call)
            await pond.close()
            async with millpond.connect(URL) as mine:
                await mine.queue("q").enqueue(b"from the child")
                assert await mine.verify() == []

        pid = child(lambda: asyncio.run(in_child()))
        await asyncio.to_thread(join, pid)
        assert not waiting.done()
        async with millpond.connect(URL) as other:
            await other.queue("news").enqueue(b"news")
            [news] = await asyncio.wait_for(waiting, 10)
        assert news.payload == b"news"
        await message.ack()
        assert [each.payload for each in await queue.receive(10)] == [b"from the child"]
        assert await pond.verify() == []


async def parent_closes() -> None:
    """A child's pond holds the file as anybody else's does: the parent's close does not take its log away."""
    told, go_on = os.pipe(), os.pipe()
    pond = await millpond.connect(URL).open()
    await pond.queue("q").enqueue(b"0")

    async def in_child() -> None:
        async with millpond.connect(URL) as mine:
            await mine.queue("q").enqueue(b"1")
            os.write(told[1], b".")
            os.read(go_on[0], 1)
            await mine.queue("q").enqueue(b"2")
            os.write(told[1], b".")
            os.read(go_on[0], 1)

    pid = child(lambda: asyncio.run(in_child()))
    assert os.read(told[0], 1)
    await pond.close()
    os.write(go_on[1], b".")
    assert os.read(told[0], 1)
    async with millpond.connect(URL) as again:
        assert [message.payload for message in await again.queue("q").receive(10)] == [b"0", b"1", b"2"]
    os.write(go_on[1], b".")
    join(pid)


def amid_writes() -> None:
    """Forks at any moment while other threads enqueue: what parent and children were told is there."""
    kept: list[str] = []
    stop = threading.Event()
    with millpond.connect_sync(URL) as pond:

        def write() -> None:
            while not stop.is_set():
                kept.append(pond.queue("parent").enqueue(b"x").message_id)

        threads = [threading.Thread(target=write) for _ in range(2)]
        for thread in threads:
            thread.start()

        def in_child() -> None:
            with pytest.raises(millpond.StoreError, match="before this process forked"):
                pond.queue("parent").enqueue(b"x")
            pond.close()
            with millpond.connect_sync(URL) as mine:
                for _ in range(5):
                    mine.queue("child").enqueue(b"x")

        for _ in range(12):
            join(child(in_child))
        stop.set()
        for thread in threads:
            thread.join()
        assert pond.queue("child").counts().ready == 60
        assert pond.queue("parent").counts().ready == len(set(kept)) > 0
        assert pond.verify() == []


def _drain(number: int) -> None:
    with millpond.connect_sync(URL) as mine:
        while message := mine.queue("jobs").receive():
            mine.queue("done").enqueue(message[0].payload + b" by %d" % number)
            message[0].ack()


def processes() -> None:
    """`multiprocessing` by fork, the usual way to have workers, with a pond open in the parent."""
    with millpond.connect_sync(URL) as pond:
        pond.queue("jobs").enqueue_many([b"%d" % number for number in range(60)])
        workers = [multiprocessing.get_context("fork").Process(target=_drain, args=(number,)) for number in range(3)]
        for worker in workers:
            worker.start()
        pond.queue("jobs").enqueue_many([b"%d" % number for number in range(60, 90)])
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0
        _drain(9)
        done = [message.payload.split()[0] for message in pond.queue("done").receive(1000)]
        assert sorted(map(int, done)) == list(range(90))
        assert pond.verify() == []


def an_ordinary_end() -> None:
    """A child that ends as programs do, with the parent's objects torn down, takes nothing along."""
    with millpond.connect_sync(URL) as pond:
        pond.queue("q").enqueue(b"1")
        pid = os.fork()
        if not pid:
            sys.exit(0)
        join(pid)
        pond.queue("q").enqueue(b"2")
        join(child(lambda: asyncio.run(_count(2))))
        assert pond.verify() == []


async def _count(number: int) -> None:
    async with millpond.connect(URL) as mine:
        assert (await mine.queue("q").counts()).ready == number


def amid_a_read() -> None:
    """What a thread of the parent was in the middle of makes the file one that the child may not open."""
    with millpond.connect_sync(URL) as pond:
        pond.queue("q").enqueue(b"1")
        reading, enough = threading.Event(), threading.Event()
        connection = schema.connect(PATH, cache_bytes=1 << 20)

        def wait() -> int:
            reading.set()
            enough.wait()
            return 1

        connection.create_scalar_function("wait", wait, 0)
        thread = threading.Thread(target=lambda: connection.execute("SELECT wait() FROM message").fetchall())
        thread.start()
        reading.wait()
        pid = child(_cannot_open)
        join(pid)
        enough.set()
        thread.join()
        connection.close()
        join(child(lambda: asyncio.run(_count(1))))


def _cannot_open() -> None:
    pond = millpond.connect_sync(URL)
    with pytest.raises(millpond.StoreError, match=r"work\.db was in use by another thread when this process forked"):
        pond.open()


def no_turn() -> None:
    """A writer that does not come to an end keeps nobody from forking for long, but the child from opening."""
    fork.TRIES = 3
    with millpond.connect_sync(URL) as pond:
        pond.queue("q").enqueue(b"1")
        stranger = os.open(f"{PATH}-millpond/write.lock", os.O_RDWR)
        fcntl.flock(stranger, fcntl.LOCK_EX)
        join(child(_cannot_open))
        os.close(stranger)
        join(child(lambda: asyncio.run(_count(1))))
        pond.queue("q").enqueue(b"2")


scenario = globals()[sys.argv[1]]
if asyncio.iscoroutinefunction(scenario):
    asyncio.run(scenario())
else:
    scenario()
print("done")
