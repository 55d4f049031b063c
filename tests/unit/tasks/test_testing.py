"""`millpond.testing` runs consumers, tasks and jobs as a worker does, without time passing by itself."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

import millpond
from millpond import testing
from millpond.errors import InvalidInput


class Order(msgspec.Struct):
    sku: str
    count: int = 1


def shop() -> tuple[millpond.Pond, list[str]]:
    """An application: what it registers, and what its handlers did."""
    pond = millpond.connect("sqlite:////no-such-folder/never-made.db")
    done: list[str] = []

    @pond.consumer("orders", concurrency=4)
    async def order(order: Order, context: millpond.Context) -> None:
        if order.sku == "oops":
            raise ValueError("no such flour")
        done.append(order.sku)
        context.hand_off("invoices", millpond.json({"sku": order.sku}))

    @pond.consumer("invoices")
    def invoice(invoice: dict[str, str]) -> None:
        done.append(f"invoice {invoice['sku']} {threading.current_thread() is threading.main_thread()}")

    return pond, done


async def test_work_runs_everything_that_is_ready_and_what_follows_from_it() -> None:
    app, done = shop()
    async with testing.in_memory(app) as pond:
        await app.queue("orders").enqueue_many([millpond.json({"sku": f"rye-{number}"}) for number in range(40)])
        counts = await pond.work()
        assert counts["ack"] == 80
        assert sorted(done) == sorted([f"rye-{n}" for n in range(40)] + [f"invoice rye-{n} False" for n in range(40)])
        assert await pond.work() == dict.fromkeys(counts, 0)


async def test_payloads_are_serialised_for_real() -> None:
    app, done = shop()
    async with testing.in_memory(app) as pond:
        await pond.queue("orders").enqueue(millpond.json({"sku": "rye", "count": "many"}))
        counts = await pond.work(["order"])
        assert (counts["dead"], done) == (1, [])
        [dead] = await pond.queue("orders").dead_letters.list()
        assert "count" in (dead.dead_reason or "")


async def test_a_retry_waits_for_the_clock() -> None:
    app, _ = shop()
    async with testing.in_memory(app) as pond:
        await pond.queue("orders").enqueue(millpond.json({"sku": "oops"}), max_attempts=2)
        assert (await pond.work())["retry"] == 1
        assert (await pond.work())["retry"] == 0
        await pond.advance(2)
        assert (await pond.work())["retry"] == 1
        [dead] = await pond.queue("orders").dead_letters.list()
        assert dead.last_error["message"] == "no such flour"


async def test_time_passes_for_a_worker_that_runs() -> None:
    app, done = shop()
    async with testing.in_memory(app) as pond:
        await pond.queue("orders").enqueue(millpond.json({"sku": "later"}), delay=3600)
        async with pond.working(["order"]):
            await pond.advance(3599)
            assert done == []
            await pond.advance(1)
            assert done == ["later"]


async def test_a_handler_that_waits_for_the_test_does_not_hold_it_up() -> None:
    app = millpond.connect("memory://")
    gate = asyncio.Event()

    @app.consumer("slow")
    async def slow(payload: bytes) -> None:
        await gate.wait()

    async with testing.in_memory(app) as pond:
        await pond.queue("slow").enqueue(b"x")
        counts = await pond.work()
        assert counts["defer"] == 0  # not ended when counted; given back by the end of the worker
        assert (await pond.queue("slow").counts()).ready == 1
        gate.set()
        assert (await pond.work())["ack"] == 1


async def test_the_application_has_its_own_pond_back_afterwards(tmp_path: Path) -> None:
    app = millpond.connect(f"sqlite:///{tmp_path}/app.db")
    async with testing.in_memory(app) as pond:
        await app.queue("q").enqueue(b"in memory")
        assert (await pond.queue("q").counts()).ready == 1
        assert app.clock is pond.manual_clock
        with pytest.raises(InvalidInput, match="is open"):
            async with testing.in_memory(app):
                pass
    async with app:
        assert (await app.queue("q").counts()).ready == 0
    assert (tmp_path / "app.db").exists()


async def test_each_in_memory_begins_empty_and_repeats() -> None:
    app, _ = shop()
    ids = []
    for _ in range(2):
        async with testing.in_memory(app, seed=7) as pond:
            ids.append((await app.queue("orders").enqueue(b"x")).message_id)
            assert (await pond.queue("orders").counts()).ready == 1
    assert ids[0] == ids[1]


async def test_a_worker_that_cannot_start_is_told_of_at_once() -> None:
    app = millpond.connect("memory://")

    @app.consumer("q")
    async def wrong(one: bytes, two: bytes) -> None: ...

    async with testing.in_memory(app) as pond:
        with pytest.raises(InvalidInput, match="'two'"):
            await pond.work()


SUITE = """
import asyncio
import millpond

app = millpond.connect("sqlite:///nowhere.db")

@app.task(keep_result=60)
def double(number: int) -> int:
    return 2 * number

def test_fixtures(millpond_memory, millpond_clock):
    async def run():
        async with millpond_memory(app) as pond:
            assert pond.manual_clock is millpond_clock
            handle = await double.send(21)
            await pond.work()
            assert await handle.result() == 42
    asyncio.run(run())

def test_an_empty_pond(millpond_pond, millpond_clock):
    async def run():
        async with millpond_pond as pond:
            await pond.queue("q").enqueue(b"x", delay=5)
            await pond.advance(5)
            assert len(await pond.queue("q").receive()) == 1
            assert millpond_clock.monotonic() == 5
    asyncio.run(run())
"""


def test_the_fixtures_of_the_plug_in(tmp_path: Path) -> None:
    (tmp_path / "test_app.py").write_text(SUITE)
    installed = {point.value for point in importlib.metadata.entry_points(group="pytest11")}
    plugin = [] if "millpond.pytest_plugin" in installed else ["-p", "millpond.pytest_plugin"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, "test_app.py"]
    path = os.pathsep.join([str(Path(millpond.__file__).parents[1]), *sys.path])
    environment = {"PYTHONPATH": path, "PATH": "/usr/bin:/bin"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 passed" in run.stdout
