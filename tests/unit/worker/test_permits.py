"""A handler that blocks the event loop keeps its permit of a concurrency limit, as it keeps its message."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from tests.unit.worker.conftest import BOUND, MakeSite, until

import millpond
from millpond.worker import limits
from millpond.worker.limits import LEASE, Concurrency, Permits, permit_id
from millpond.worker.worker import Worker

LIMIT = "millpond.limit.concurrency.q"


async def test_a_handler_that_blocks_the_loop_keeps_its_permit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was renewed on the loop, and lost when a handler blocked it for longer than its lease."""
    monkeypatch.setattr(limits, "LEASE", 1.0)
    url = f"sqlite:///{tmp_path}/pond.db"
    seen: set[int | None] = set()
    async with millpond.connect(url) as pond:
        with millpond.connect_sync(url) as other:

            @pond.consumer("q", concurrency=1, gate=pond.limit("q", concurrency=1))
            async def handler(payload: bytes) -> None:
                end = time.monotonic() + BOUND
                while len(seen) < 5:  # by now its first lease is long over
                    lease = other.queue(LIMIT).get(permit_id(LIMIT, 0)).lease
                    assert lease is not None
                    seen.add(lease.until_ms)
                    assert time.monotonic() < end, "the permit is not renewed"
                    time.sleep(0.02)  # noqa: ASYNC251 - it is to block the loop

            await pond.queue("q").enqueue(b"", max_attempts=1)
            worker = Worker(pond)
            task = asyncio.create_task(worker.run())
            await until(lambda: sum(worker.counts().values()))
            worker.stop()
            await task
            assert worker.counts()["ack"] == 1
            permit = other.queue(LIMIT).get(permit_id(LIMIT, 0))
            # It was given back, and never somebody else's: one delivery, and no failure.
            assert (permit.state, permit.attempts, permit.failures) == ("ready", 1, 0)


async def test_in_one_loop_a_permit_that_is_overdue_is_renewed_before_more_is_taken(site: MakeSite) -> None:
    async with site() as s:
        limiter = s.pond.limit("q", concurrency=1)

        @s.pond.consumer("q", concurrency=1, gate=limiter)
        async def handler(payload: bytes) -> None:
            s.pond.manual_clock.advance(LEASE - 1)  # nothing else on this loop runs meanwhile
            await s.settle()
            s.pond.manual_clock.advance(LEASE - 1)

        await s.queue.enqueue(b"", visibility=1000)
        worker = s.start()
        await s.empty()
        await s.end(worker)
        end = time.monotonic() + BOUND
        while (await s.pond.queue(LIMIT).counts()).ready != 1:  # a server gives back what it handed to one who left
            assert time.monotonic() < end
        permit = await s.pond.queue(LIMIT).get(permit_id(LIMIT, 0))
        assert (permit.state, permit.failures) == ("ready", 0)


async def test_a_permit_that_was_lost_is_told_and_renewed_no_more(
    site: MakeSite, caplog: pytest.LogCaptureFixture
) -> None:
    async with site() as s:
        go = asyncio.Event()

        @s.pond.consumer("q", concurrency=1, visibility=1000.0, gate=s.pond.limit("q", concurrency=1))
        async def handler(payload: bytes) -> None:
            await go.wait()

        await s.queue.enqueue(b"")
        worker = s.start()
        await until(lambda: worker.lines and worker.lines[0].running)
        permit = await s.pond.queue(LIMIT).get(permit_id(LIMIT, 0))
        assert permit.lease is not None
        # As by an operator's hand.
        await s.pond.queue(LIMIT).handle(permit.id, permit.lease.id, permit.lease.token).defer()
        [other] = await Permits(s.pond, "q", Concurrency(1)).acquire(1, 0)
        await s.pass_(LEASE, steps=6)
        assert [record.message for record in caplog.records] == ["millpond.limit.lost"]
        go.set()
        await s.empty()
        await other.release()
        await s.end(worker)
        end = time.monotonic() + BOUND
        while (await s.pond.queue(LIMIT).counts()).ready != 1:  # a server gives back what it handed to one who left
            assert time.monotonic() < end
