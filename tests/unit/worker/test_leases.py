"""Leases are renewed while handlers run; a lease or a time limit that is over ends its handler."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tests.unit.worker.conftest import BOUND, Held, MakeSite, Site, until

import millpond
from millpond import Context, Message, RetryPolicy, StoreError
from millpond.stores.faulty import Call, Fault, fail_before
from millpond.worker.line import UNWIND
from millpond.worker.worker import Worker

STEADY = RetryPolicy(base=10.0, jitter=0.0)


async def taken_by_another(s: Site, renew: float) -> Message:
    """The wall clock jumps, as after a suspend: the lease is over, and somebody else takes the message before the
    worker's timers notice. Then they do."""
    await s.pond.jump(1000)
    [stolen] = await s.queue.receive(visibility=5000)
    await s.pass_(renew)
    return stolen


async def test_a_lease_is_renewed_for_as_long_as_the_handler_runs(site: MakeSite, held: Held) -> None:
    async with site() as s:
        s.pond.consumer("q", visibility=30.0)(held.wait)
        receipt = await s.queue.enqueue(b"")
        worker = s.start()
        await until(lambda: held.started)
        await s.pass_(300, steps=30)
        view = await s.queue.get(receipt.message_id)
        assert (view.state, view.failures, view.attempts) == ("leased", 0, 1)
        assert await s.queue.receive() == []
        held.go.set()
        await s.empty()
        await s.end(worker)
        assert worker.counts()["ack"] == 1


async def test_without_a_length_of_its_own_the_lease_is_renewed_by_the_messages(site: MakeSite, held: Held) -> None:
    async with site() as s:
        s.pond.consumer("q")(held.wait)
        await s.queue.enqueue(b"long", visibility=300)
        await s.queue.enqueue(b"short", visibility=6)
        worker = s.start()
        await until(lambda: len(held.started) == 2)
        await s.pass_(60, steps=30)
        assert (await s.queue.counts()).leased == 2
        assert await s.queue.receive() == []
        held.go.set()
        await s.empty()
        await s.end(worker)


async def test_a_handler_that_answered_by_itself_and_goes_on_is_not_renewed(site: MakeSite, held: Held) -> None:
    """It once kept whoever renews busy: due, and never renewed."""
    async with site() as s:
        seen: list[bytes] = []

        @s.pond.consumer("q", visibility=30.0)
        async def handler(payload: bytes, message: Message) -> None:
            seen.append(payload)
            if payload == b"early":
                await message.ack()
                await held.wait()

        await s.queue.enqueue(b"early")
        worker = s.start()
        await until(lambda: held.started)
        await s.pass_(60, steps=6)
        await s.queue.enqueue(b"next")
        await until(lambda: seen == [b"early", b"next"])
        held.go.set()
        await until(lambda: worker.counts()["answered"] == 1)
        await s.end(worker)
        assert worker.counts()["lost"] == 0


async def test_a_lost_lease_cancels_a_coroutine_and_is_not_acked(site: MakeSite, held: Held) -> None:
    ends: list[str] = []
    async with site() as s:

        @s.pond.consumer("q", visibility=30.0)
        async def handler(payload: bytes, context: Context) -> None:
            try:
                await held.wait()
            except asyncio.CancelledError:
                ends.append(f"cancelled={context.cancelled}")
                raise

        await s.queue.enqueue(b"")
        worker = s.start()
        await until(lambda: held.started)
        stolen = await taken_by_another(s, 10)
        await until(lambda: ends)
        await s.end(worker)
        assert ends == ["cancelled=True"]
        assert (worker.counts()["lost"], worker.counts()["ack"], stolen.failures) == (1, 0, 1)
        await stolen.ack()


async def test_a_lost_lease_interrupts_a_thread_and_is_not_acked(site: MakeSite, held: Held) -> None:
    ends: list[str] = []
    async with site() as s:

        @s.pond.consumer("q", visibility=30.0)
        def handler(payload: bytes) -> None:
            try:
                held.block(payload)
            except asyncio.CancelledError:
                ends.append("cancelled")
                raise

        await s.queue.enqueue(b"")
        worker = s.start()
        await until(lambda: held.started)
        stolen = await taken_by_another(s, 10)
        await until(lambda: ends)
        await s.end(worker)
        assert (worker.counts()["lost"], worker.counts()["ack"]) == (1, 0)
        await stolen.ack()


@pytest.mark.parametrize("why", ["lost", "late"])
async def test_a_handler_that_will_not_be_cancelled_is_not_acked(site: MakeSite, held: Held, why: str) -> None:
    """Whether it goes on and returns as if nothing were, or its lease is gone when it returns."""
    async with site() as s:

        @s.pond.consumer("q", visibility=30.0)
        async def handler(payload: bytes) -> None:
            while True:
                with contextlib.suppress(asyncio.CancelledError):
                    await held.wait()
                    return
                await asyncio.sleep(0)

        await s.queue.enqueue(b"")
        worker = s.start()
        await until(lambda: held.started)
        stolen = await taken_by_another(s, 10 if why == "lost" else 0)
        held.go.set()
        await until(lambda: worker.counts()["lost"] == 1)
        await s.end(worker)
        assert worker.counts()["ack"] == 0
        await stolen.ack()


async def test_a_lease_that_cannot_be_renewed_is_given_up_when_it_ends_and_not_before(
    site: MakeSite, held: Held
) -> None:
    down = threading.Event()

    def plan(call: Call) -> Fault | None:
        return fail_before() if down.is_set() else None

    async with site(plan=plan) as s:

        @s.pond.consumer("q", visibility=60.0)
        async def handler(payload: bytes) -> None:
            await held.wait()

        await s.queue.enqueue(b"")
        worker = s.start()
        await until(lambda: held.started)
        down.set()
        await s.pass_(55, steps=11)
        assert worker.counts()["lost"] == 0
        await s.pass_(10, steps=2)
        assert worker.counts()["lost"] == 1
        down.clear()
        await until(lambda: not worker.lines[0].running)
        # Nobody answered for it: it comes back, with one failure, to whoever asks next.
        held.go.set()
        await s.pass_(30, steps=3)
        await s.empty()
        await s.end(worker)
        assert (worker.counts()["ack"], held.ended) == (1, [None])


async def test_an_outage_that_is_shorter_than_the_lease_costs_nothing(site: MakeSite, held: Held) -> None:
    down = threading.Event()

    def plan(call: Call) -> Fault | None:
        return fail_before() if down.is_set() else None

    async with site(plan=plan) as s:
        s.pond.consumer("q", visibility=60.0)(held.wait)
        receipt = await s.queue.enqueue(b"")
        worker = s.start()
        await until(lambda: held.started)
        down.set()
        await s.pass_(40, steps=8)
        down.clear()
        await s.pass_(100, steps=10)
        view = await s.queue.get(receipt.message_id)
        assert (view.state, view.failures, worker.counts()["lost"]) == ("leased", 0, 0)
        held.go.set()
        await s.empty()
        await s.end(worker)


async def test_in_one_loop_a_handler_that_blocked_it_keeps_its_message(site: MakeSite) -> None:
    """Where no thread renews, what is overdue is renewed before anything is taken again."""
    async with site() as s:
        seen: list[int] = []

        @s.pond.consumer("q", visibility=30.0, concurrency=4)
        async def handler(payload: bytes, message: Message) -> None:
            seen.append(message.attempts)
            if payload == b"blocks":
                s.pond.manual_clock.advance(31)  # nothing else on this loop runs meanwhile
                await s.queue.enqueue(b"another")
                await until(lambda: len(seen) == 2)

        await s.queue.enqueue(b"blocks")
        worker = s.start()
        await s.empty()
        await s.end(worker)
        assert seen == [1, 1]


async def test_what_is_overdue_is_renewed_before_more_is_taken(site: MakeSite, held: Held) -> None:
    """Also when the turn of the taking task comes before that of the renewing one."""
    async with site() as s:
        seen: list[bytes] = []

        @s.pond.consumer("q", visibility=30.0, concurrency=2)
        async def handler(payload: bytes) -> None:
            seen.append(payload)
            if payload == b"stays":
                await held.wait()
            else:
                await until(lambda: len(seen) == 2)
                worker.lines[0]._renewals._task.cancel()  # type: ignore[attr-defined]
                s.pond.manual_clock.advance(31)

        await s.queue.enqueue_many([b"stays", b"blocks"])
        worker = s.start()
        await until(lambda: worker.counts()["ack"] == 1)
        await s.settle()
        assert seen == [b"stays", b"blocks"]
        held.go.set()
        await s.empty()
        await s.end(worker)
        assert worker.counts()["lost"] == 0


# Time limits


@pytest.mark.parametrize("run_in", ["loop", "thread"])
async def test_a_time_limit_cancels_the_handler_and_counts_a_failure(site: MakeSite, held: Held, run_in: str) -> None:
    ended: list[str] = []
    async with site() as s:
        if run_in == "loop":

            @s.pond.consumer("q", time_limit=5.0, retry=STEADY)
            async def handler(payload: bytes) -> None:
                try:
                    await held.wait()
                finally:
                    ended.append("finally")
        else:

            @s.pond.consumer("q", time_limit=5.0, retry=STEADY)
            def threaded(payload: bytes) -> None:
                try:
                    held.block()
                finally:
                    ended.append("finally")

        receipt = await s.queue.enqueue(b"")
        worker = s.start()
        await until(lambda: held.started)
        await s.pass_(4)
        assert ended == []
        await s.pass_(2)
        await until(lambda: worker.counts()["retry"] == 1)
        assert ended == ["finally"]
        view = await s.queue.get(receipt.message_id)
        assert (view.failures, view.state) == (1, "delayed")
        assert (view.last_error["type"], view.last_error["message"]) == (
            "TimeLimit", "took longer than its time limit of 5 s"
        )  # fmt: skip
        assert "held." in view.last_error["traceback"]
        await s.end(worker)


async def test_each_message_has_its_own_time_limit(site: MakeSite) -> None:
    async with site() as s:
        started: list[bytes] = []

        @s.pond.consumer("q", time_limit=10.0, retry=STEADY)
        async def handler(payload: bytes) -> None:
            started.append(payload)
            await asyncio.Event().wait()

        await s.queue.enqueue(b"1")
        worker = s.start()
        await until(lambda: len(started) == 1)
        await s.pass_(6)
        await s.queue.enqueue(b"2")
        await until(lambda: len(started) == 2)
        await s.pass_(5)
        assert worker.counts()["retry"] == 1
        await s.pass_(6)
        assert worker.counts()["retry"] == 2
        await s.end(worker)


async def test_a_handler_that_outstays_its_limit_is_answered_for_and_keeps_its_place(
    site: MakeSite, held: Held
) -> None:
    async with site() as s:

        @s.pond.consumer("q", time_limit=5.0, concurrency=1, retry=RetryPolicy(base=1000.0))
        async def handler(payload: bytes) -> None:
            while not held.go.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await held.wait(payload)

        await s.queue.enqueue(b"stays")
        await s.queue.enqueue(b"waits")
        worker = s.start()
        await until(lambda: held.started)
        await s.pass_(6)
        assert worker.counts()["retry"] == 0  # it may still be ending
        await s.pass_(UNWIND)
        await until(lambda: worker.counts()["retry"] == 1)
        counts = await s.queue.counts()
        assert (counts.delayed, counts.ready, counts.leased) == (1, 1, 0)
        assert set(held.started) == {b"stays"}  # nothing is taken that could not start
        held.go.set()
        await until(lambda: worker.counts()["ack"] == 1)  # "waits" has its turn
        await s.end(worker)
        assert worker.counts()["retry"] == 1


async def test_an_interrupted_thread_serves_the_next_message(site: MakeSite, held: Held) -> None:
    async with site() as s:
        threads: list[int] = []

        @s.pond.consumer("q", time_limit=5.0, concurrency=1, retry=RetryPolicy(base=1000.0))
        def handler(payload: bytes) -> None:
            threads.append(threading.get_ident())
            if payload == b"long":
                held.block()

        await s.queue.enqueue(b"long")
        worker = s.start()
        await until(lambda: held.started)
        await s.pass_(6)
        await s.queue.enqueue_many([b"1", b"2", b"3"])
        await until(lambda: worker.counts()["ack"] == 3)
        await s.end(worker)
        assert len(threads) == 4
        assert len(set(threads)) == 1


# With real time: a renewing thread


class Watcher:
    """Reads the lease of a message in the file, from any thread, by a pond of its own."""

    def __init__(self, url: str, message_id: str) -> None:
        self._pond = millpond.connect_sync(url).open()
        self._id = message_id

    def renewals_seen(self, count: int) -> None:
        """Block until the lease has been renewed so often. Burns CPU between looks, without letting go of it."""
        end = time.monotonic() + BOUND
        seen = set()
        while len(seen) <= count:
            assert time.monotonic() < end, "the lease is not renewed"
            lease = self._pond.queue("q").get(self._id).lease
            assert lease is not None
            seen.add(lease.until_ms)
            until = time.monotonic() + 0.05
            while time.monotonic() < until:
                sum(range(500))

    def close(self) -> None:
        self._pond.close()


async def run_blocking(tmp_path: Path, register: Any) -> tuple[Worker, int]:
    """A worker on a file, whose handler watches its own lease; what became of it, and how often it was delivered."""
    url = f"sqlite:///{tmp_path}/pond.db"
    pond = millpond.connect(url)
    async with pond:
        receipt = await pond.queue("q").enqueue(b"", visibility=1.0)
        watcher = Watcher(url, receipt.message_id)
        attempts: list[int] = []
        register(pond, watcher, attempts)
        worker = Worker(pond)
        task = asyncio.create_task(worker.run())
        await until(lambda: sum(worker.counts().values()))
        worker.stop()
        await task
        watcher.close()
        return worker, len(attempts)


async def test_bull_412_a_handler_that_blocks_the_loop_keeps_its_lease(tmp_path: Path) -> None:
    """bull#412 and saq#209: whoever renews on the loop that the handler blocks loses the lease, and the job runs
    twice."""

    def register(pond: millpond.Pond, watcher: Watcher, attempts: list[int]) -> None:
        @pond.consumer("q", concurrency=2)
        async def handler(payload: bytes) -> None:
            attempts.append(1)
            watcher.renewals_seen(4)  # by now its first lease is long over

    worker, attempts = await run_blocking(tmp_path, register)
    assert (worker.counts()["ack"], worker.counts()["lost"], attempts) == (1, 0, 1)


async def test_bull_412_a_handler_that_burns_cpu_in_a_thread_keeps_its_lease(tmp_path: Path) -> None:
    def register(pond: millpond.Pond, watcher: Watcher, attempts: list[int]) -> None:
        @pond.consumer("q", concurrency=2)
        def handler(payload: bytes) -> None:
            attempts.append(1)
            watcher.renewals_seen(4)

    worker, attempts = await run_blocking(tmp_path, register)
    assert (worker.counts()["ack"], worker.counts()["lost"], attempts) == (1, 0, 1)


async def test_the_thread_that_finds_a_lease_lost_has_the_handler_cancelled(tmp_path: Path) -> None:
    async with millpond.connect(f"sqlite:///{tmp_path}/pond.db") as pond:
        ends: list[str] = []

        @pond.consumer("q", visibility=0.5)
        async def handler(payload: bytes, message: Message) -> None:
            lease = message.lease
            # As by an operator's hand, so that the worker does not notice by itself.
            await pond.queue("q").handle(message.id, lease.id, lease.token).defer(3600)
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ends.append("cancelled")
                raise

        await pond.queue("q").enqueue(b"")
        worker = Worker(pond)
        task = asyncio.create_task(worker.run())
        await until(lambda: ends)
        worker.stop()
        await task
        assert (worker.counts()["lost"], worker.counts()["ack"]) == (1, 0)
        assert (await pond.queue("q").counts()).delayed == 1


class Refusing:
    """A pond that does not open."""

    def __init__(self, error: Exception, tries: list[int]) -> None:
        self._error = error
        self._tries = tries

    async def open(self) -> None:
        self._tries.append(1)
        raise self._error


async def test_a_lease_that_no_second_pond_can_renew_is_given_up_when_it_ends(tmp_path: Path) -> None:
    tries: list[int] = []
    ends: list[str] = []
    async with millpond.connect(f"sqlite:///{tmp_path}/pond.db") as pond:
        pond._twin = lambda: Refusing(StoreError("not now"), tries)  # type: ignore[assignment,return-value]

        @pond.consumer("q", visibility=0.4)
        async def handler(payload: bytes) -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ends.append("cancelled")
                raise

        await pond.queue("q").enqueue(b"", max_attempts=1)
        worker = Worker(pond)
        task = asyncio.create_task(worker.run())
        await until(lambda: ends)
        assert (worker.counts()["lost"], len(tries) > 1) == (1, True)
        worker.stop()
        await task


async def test_a_worker_that_can_renew_nothing_any_more_ends_with_the_reason(tmp_path: Path) -> None:
    async with millpond.connect(f"sqlite:///{tmp_path}/pond.db") as pond:
        pond._twin = lambda: Refusing(RuntimeError("a defect"), [])  # type: ignore[assignment,return-value]
        pond.consumer("q")(lambda payload: None)
        with pytest.raises(RuntimeError, match="a defect"):
            await Worker(pond).run()


async def test_the_renewing_thread_ends_with_its_worker(tmp_path: Path) -> None:
    async with millpond.connect(f"sqlite:///{tmp_path}/pond.db") as pond:
        pond.consumer("q")(lambda payload: None)
        worker = Worker(pond)
        task = asyncio.create_task(worker.run())
        await until(lambda: worker.lines)

        def threads() -> list[str]:
            return [thread.name for thread in threading.enumerate() if thread.name.startswith("millpond renewals")]

        assert threads() == ["millpond renewals"]
        await until(lambda: worker.lines[0].polled is not None)
        worker.stop()
        await task
        await until(lambda: threads() == [])
