"""The liveness probe: right about workers that consume, and about those that no longer do."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from tests.unit.worker.conftest import Held, MakeSite, Site, until

from millpond.stores.faulty import Call, Fault, fail_before
from millpond.worker.limits import Concurrency, Permits
from millpond.worker.probe import EVERY, Probe, Report, check, write
from millpond.worker.worker import Worker

AGE = 120.0


def probed(s: Site, path: Path) -> Worker:
    """A running worker with a probe."""
    worker = s.start(grace=0)
    worker.add_service(Probe(worker, str(path), s.pond.clock))
    return worker


def problems(s: Site, path: Path) -> list[str]:
    return check(str(path), now_ms=s.pond.clock.now_ms(), max_age=AGE)


async def test_an_idle_worker_is_alive_for_as_long_as_it_looks(site: MakeSite, tmp_path: Path) -> None:
    path = tmp_path / "alive"
    async with site() as s:
        s.pond.consumer("q")(lambda payload: None)
        assert problems(s, path) == [f"{path} is not there: the worker has not begun, or has ended"]
        worker = probed(s, path)
        await until(path.exists)
        await s.pass_(300, steps=30)
        assert problems(s, path) == []
        await s.end(worker)
        assert not path.exists()


async def test_a_worker_that_the_store_refuses_is_not_alive_though_it_is_running(
    site: MakeSite, tmp_path: Path
) -> None:
    path, down = tmp_path / "alive", threading.Event()

    def plan(call: Call) -> Fault | None:
        return fail_before() if down.is_set() else None

    async with site(plan=plan) as s:
        s.pond.consumer("q", name="mails")(lambda payload: None)
        worker = probed(s, path)
        await until(path.exists)
        down.set()
        await s.pass_(100, steps=10)
        assert problems(s, path) == []
        await s.pass_(50, steps=5)
        [problem] = problems(s, path)
        assert problem.startswith(f"consumer mails of process {os.getpid()} has not asked for messages for 1")
        down.clear()
        await s.pass_(60, steps=12)
        assert problems(s, path) == []
        await s.end(worker)


async def test_a_worker_whose_places_are_all_taken_is_alive(site: MakeSite, tmp_path: Path, held: Held) -> None:
    path = tmp_path / "alive"
    async with site() as s:
        s.pond.consumer("q", concurrency=1)(held.wait)
        await s.queue.enqueue_many([b"", b""])
        worker = probed(s, path)
        await until(lambda: held.started)
        await s.pass_(300, steps=37)
        assert problems(s, path) == []
        held.go.set()
        await s.empty()
        await s.end(worker)


async def test_a_worker_that_was_busy_for_long_has_its_time_to_look_again(
    site: MakeSite, tmp_path: Path, held: Held
) -> None:
    """It was once taken for dead between the end of a long handler and its next look."""
    path, down = tmp_path / "alive", threading.Event()

    def plan(call: Call) -> Fault | None:
        return fail_before() if down.is_set() else None

    async with site(plan=plan) as s:
        s.pond.consumer("q", name="mails", concurrency=1)(held.wait)
        await s.queue.enqueue(b"")
        worker = probed(s, path)
        await until(lambda: held.started)
        await s.pass_(300, steps=37)
        down.set()
        held.go.set()
        await until(lambda: held.ended)
        await s.pass_(20, steps=10)
        assert problems(s, path) == []
        await s.pass_(150, steps=15)
        assert [problem.split()[:2] for problem in problems(s, path)] == [["consumer", "mails"]]
        down.clear()
        await s.pass_(60, steps=12)
        assert problems(s, path) == []
        await s.end(worker)


async def test_who_waits_for_a_permit_is_alive_for_as_long_as_the_store_says_that_there_is_none(
    site: MakeSite, tmp_path: Path
) -> None:
    """A worker held back by a limit once counted as alive whatever the store did."""
    path, down = tmp_path / "alive", threading.Event()

    def plan(call: Call) -> Fault | None:
        return fail_before() if down.is_set() else None

    async with site(plan=plan) as s:
        s.pond.consumer("q", name="mails", gate=s.pond.limit("mails", concurrency=1))(lambda payload: None)
        other = Permits(s.pond, "mails", Concurrency(1))
        [permit] = await other.acquire(1, 0)
        worker = probed(s, path)
        await until(lambda: worker.lines and worker.lines[0].at_gate)
        await s.pass_(400, steps=80)
        assert worker.lines[0].at_gate
        assert problems(s, path) == []
        down.set()
        await s.pass_(200, steps=40)
        [problem] = problems(s, path)
        assert problem.startswith(f"consumer mails of process {os.getpid()} has not asked for messages for ")
        down.clear()
        await s.pass_(30, steps=6)  # sooner than it waits for a permit
        assert problems(s, path) == []
        await permit.release()
        await other.close()
        await s.end(worker)


async def test_a_loop_that_is_blocked_is_not_alive(site: MakeSite, tmp_path: Path) -> None:
    path = tmp_path / "alive"
    found: list[list[str]] = []
    async with site() as s:

        @s.pond.consumer("q")
        async def handler(payload: bytes) -> None:
            found.append(check(str(path), now_ms=s.pond.clock.now_ms() + 121_000, max_age=AGE))

        worker = probed(s, path)
        await until(path.exists)
        await s.queue.enqueue(b"")
        await until(lambda: found)
        await s.end(worker)
    [[problem]] = found
    assert "its loop is blocked" in problem


async def test_the_probe_is_written_every_second(site: MakeSite, tmp_path: Path) -> None:
    path = tmp_path / "alive"
    async with site() as s:
        s.pond.consumer("q")(lambda payload: None)
        worker = probed(s, path)
        await until(path.exists)
        before = path.read_bytes()
        await s.pass_(EVERY)
        await until(lambda: path.read_bytes() != before)
        await s.end(worker)


def test_the_file_of_a_supervisor_stands_for_its_processes(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("a", "b")]
    write(str(tmp_path / "all"), Report(1, 0, [], files))
    write(files[0], Report(2, 1_000_000, []))
    assert check(str(tmp_path / "all"), now_ms=1_000_000) == [
        f"{files[1]} is not there: the worker has not begun, or has ended"
    ]
    write(files[1], Report(3, 0, []))
    [problem] = check(str(tmp_path / "all"), now_ms=1_000_000)
    assert problem.startswith("process 3 has not written")


@pytest.mark.parametrize("content", [b"", b"{", b'{"pid": "x"}'])
def test_a_file_that_is_none_of_ours_is_a_problem(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd"
    path.write_bytes(content)
    [problem] = check(str(path), now_ms=0)
    assert "cannot be read" in problem
