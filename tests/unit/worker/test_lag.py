"""A handler that blocks the event loop is named in the log."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import Any

import pytest
from tests.unit.worker.conftest import BOUND, MakeSite, until

from millpond import Context
from millpond.worker import lag
from millpond.worker.lag import BLOCKED, EVERY, Watchdog

EVENT = "millpond.worker.loop_blocked"


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lag, "EVERY", 0.02)
    monkeypatch.setattr(lag, "BLOCKED", 0.1)


def told(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [vars(record) for record in caplog.records if record.getMessage() == EVENT]


def block_until(condition: Any) -> None:
    """Block this thread."""
    end = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < end, "nothing is told"
        time.sleep(0.01)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("annotated", [False, True])
@pytest.mark.parametrize("site", ["memory"], indirect=True)
async def test_who_blocks_the_loop_is_told_with_the_line_and_once(
    site: MakeSite, caplog: pytest.LogCaptureFixture, annotated: bool
) -> None:
    async with site() as s:
        rounds: list[float] = []

        async def blocking(payload: bytes) -> None:
            block_until(lambda: told(caplog))
            rounds.append(time.monotonic())
            block_until(lambda: time.monotonic() > rounds[-1] + 0.4)  # long enough to be told again

        async def with_context(payload: bytes, context: Context) -> None:
            await blocking(payload)

        s.pond.consumer("other")(lambda payload: None)
        s.pond.consumer("q", name="reports")(with_context if annotated else blocking)
        ids = {receipt.message_id for receipt in await s.queue.enqueue_many([b"1", b"2"])}
        worker = s.start()
        await s.empty()
        await s.end(worker)
        assert len(rounds) == 2
        [one] = told(caplog)
        assert (one["consumer"], one["levelno"]) == ("reports", logging.WARNING)
        assert one["message_id"] in ids
        assert one["where"].startswith("test_lag.py:")
        assert one["where"].endswith("in with_context" if annotated else "in blocking")
        assert one["seconds"] >= 0.1


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("site", ["memory"], indirect=True)
async def test_what_is_no_handler_is_told_by_its_line(site: MakeSite, caplog: pytest.LogCaptureFixture) -> None:
    async with site() as s:
        s.pond.consumer("q")(lambda payload: None)
        worker = s.start()
        await until(lambda: worker.lines and worker.lines[0].polled is not None)
        asyncio.get_running_loop().call_soon(block_until, lambda: told(caplog))
        await until(lambda: told(caplog))
        await s.end(worker)
        [one] = told(caplog)
        assert (one["consumer"], one["message_id"]) == ("", "")
        assert "test_lag.py" in one["where"]


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("site", ["memory"], indirect=True)
async def test_handlers_that_wait_or_run_in_threads_are_not_told(
    site: MakeSite, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lag, "BLOCKED", 0.4)  # so that a busy machine is not taken for a blocked loop
    async with site() as s:

        @s.pond.consumer("q")
        def threaded(payload: bytes) -> None:
            time.sleep(0.7)

        @s.pond.consumer("waits")
        async def waits(payload: bytes) -> None:
            await asyncio.sleep(0.7)

        await s.queue.enqueue(b"")
        await s.pond.queue("waits").enqueue(b"")
        worker = s.start()
        await until(lambda: worker.counts()["ack"] == 2)
        await s.end(worker)
        assert told(caplog) == []


async def test_a_process_that_stood_still_is_nobodys_fault() -> None:
    watchdog = Watchdog()
    begun, cpu = watchdog._looked_at, watchdog._cpu
    assert watchdog._silent(begun + EVERY, cpu) <= 0
    # Stopped for a minute, loop and thread alike.
    assert watchdog._silent(begun + 60, cpu + 0.1) < BLOCKED
    # The same, but somebody has computed all the time, and kept the interpreter to himself.
    assert watchdog._silent(begun + 70, cpu + 10) > 9
    # The loop alone is silent.
    watchdog._beat_at = begun + 70
    assert watchdog._silent(begun + 70 + EVERY, cpu + 10) <= 0
    assert watchdog._silent(begun + 71, cpu + 10) < BLOCKED
    assert watchdog._silent(begun + 71.5, cpu + 10) >= BLOCKED


@pytest.mark.parametrize("site", ["memory"], indirect=True)
async def test_the_watching_thread_ends_with_its_worker(site: MakeSite) -> None:
    def threads() -> int:
        return sum(thread.name == "millpond watchdog" for thread in threading.enumerate())

    async with site() as s:
        s.pond.consumer("q")(lambda payload: None)
        await until(lambda: threads() == 0)
        worker = s.start()
        await until(lambda: threads() == 1)
        await s.end(worker)
        await until(lambda: threads() == 0)
