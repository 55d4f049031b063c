"""`millpond worker` as processes among processes: killed, signalled, supervised."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import millpond
from millpond.queue import QueueCounts

BOUND = 60.0
"""Seconds for whatever a process is to do, on the busiest machine."""

MODULE = """
import asyncio, os, pathlib, time
import millpond

FOLDER = pathlib.Path({folder!r})
pond = millpond.connect(f"sqlite:///{{FOLDER}}/pond.db")
VERSION = "one"

def mark(what, text=""):
    with open(FOLDER / what, "a") as file:
        file.write(f"{{os.getpid()}} {{text}}\\n")

@pond.consumer("quick", concurrency=4)
async def quick(text: str):
    mark("quick", f"{{text}} {{VERSION}}")

@pond.consumer("held", visibility=2.0)
async def held(text: str):
    mark("started", text)
    while not (FOLDER / "go").exists():
        await asyncio.sleep(0.01)
    mark("finished", text)

@pond.consumer("stubborn")
async def stubborn(text: str):
    mark("started", text)
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass

@pond.consumer("deadly", retry=millpond.RetryPolicy(base=0.0), visibility=0.5)
async def deadly(text: str):
    mark("deadly", text)
    if not (FOLDER / "go").exists():
        os.kill(os.getpid(), 9)

if (FOLDER / "broken").exists():
    raise SystemExit(2)
"""


class Workers:
    """Starts the command in one folder, and ends what a test leaves running."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLPOND_")}
        self.environment |= {"PYTHONPATH": str(Path(millpond.__file__).parents[1])}
        (folder / "shop.py").write_text(MODULE.format(folder=str(folder)))
        self.url = f"sqlite:///{folder}/pond.db"
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a worker; its stderr is in the file ``log``."""
        with open(self.folder / "log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "millpond", "-v", "worker", "shop", *arguments],
                cwd=self.folder,
                env=self.environment,
                stderr=log,
                process_group=0,
            )
        self._started.append(process)
        return process

    def end(self, process: subprocess.Popen[bytes], code: int = 0, *, by: int | None = signal.SIGTERM) -> None:
        """Signal it and wait for it."""
        if by is not None:
            process.send_signal(by)
        assert process.wait(BOUND) == code, self.log()

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def lines(self, what: str) -> list[list[str]]:
        """What handlers have marked."""
        path = self.folder / what
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + BOUND
        while not condition():
            assert time.monotonic() < end, self.log()
            time.sleep(0.01)

    def go(self) -> None:
        """Let held handlers end."""
        (self.folder / "go").touch()

    def close(self) -> None:
        self.go()
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.wait()
        for pid in {int(pid) for what in ("quick", "started", "deadly") for pid, *_ in self.lines(what)}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # of ours, left by a supervisor that was killed


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    made = Workers(tmp_path)
    yield made
    made.close()


@pytest.fixture
def pond(workers: Workers) -> Iterator[millpond.SyncPond]:
    with millpond.connect_sync(workers.url) as opened:
        yield opened


def counts(pond: millpond.SyncPond, queue: str) -> QueueCounts:
    return pond.queue(queue).counts()


def empty(pond: millpond.SyncPond, queue: str) -> bool:
    found = counts(pond, queue)
    return (found.ready, found.delayed, found.leased, found.dead) == (0, 0, 0, 0)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_rq_2015_a_job_whose_worker_is_killed_outright_comes_back_with_one_failure(
    workers: Workers, pond: millpond.SyncPond
) -> None:
    """rq#2015, saq#127: a job that ran when its worker got SIGKILL is lost, or stranded until somebody looks."""
    receipt = pond.queue("held").enqueue(b"work")
    first = workers.start("-c", "held")
    workers.until(lambda: workers.lines("started"))
    workers.end(first, -signal.SIGKILL, by=signal.SIGKILL)
    assert pond.queue("held").get(receipt.message_id).state in ("leased", "lapsed")
    second = workers.start("-c", "held")
    workers.until(lambda: len(workers.lines("started")) == 2)
    view = pond.queue("held").get(receipt.message_id)
    assert (view.attempts, view.failures) == (2, 1)
    workers.go()
    workers.until(lambda: empty(pond, "held"))
    workers.end(second)
    assert [pid for pid, _ in workers.lines("finished")] == [str(second.pid)]


def test_one_signal_lets_handlers_end_and_two_give_back(workers: Workers, pond: millpond.SyncPond) -> None:
    receipt = pond.queue("held").enqueue(b"1")
    process = workers.start()
    workers.until(lambda: workers.lines("started"))
    process.send_signal(signal.SIGINT)
    workers.until(lambda: "millpond.worker.stopping" in workers.log())
    assert process.poll() is None
    workers.end(process, 143)
    view = pond.queue("held").get(receipt.message_id)
    assert (view.state, view.failures) == ("ready", 0)
    process = workers.start()
    workers.until(lambda: len(workers.lines("started")) == 2)
    process.send_signal(signal.SIGTERM)
    workers.until(lambda: workers.log().count("millpond.worker.stopping") == 2)
    workers.go()
    workers.end(process, 0, by=None)
    assert empty(pond, "held")
    assert "Traceback" not in workers.log()


def test_a_handler_that_refuses_to_be_cancelled_does_not_keep_the_process(
    workers: Workers, pond: millpond.SyncPond
) -> None:
    receipt = pond.queue("stubborn").enqueue(b"1")
    process = workers.start("--grace", "0.1")
    workers.until(lambda: workers.lines("started"))
    workers.end(process, 0)
    view = pond.queue("stubborn").get(receipt.message_id)
    assert (view.state, view.failures) == ("ready", 0)
    assert "millpond.worker.handler_stuck" in workers.log()


def test_processes_share_the_work_and_are_probed_and_restarted(workers: Workers, pond: millpond.SyncPond) -> None:
    probe = workers.folder / "alive"
    process = workers.start("--processes", "2", "--probe-file", str(probe), "-c", "quick", "-c", "deadly")

    def check() -> tuple[int, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "millpond", "worker", "--check", "--probe-file", str(probe), "--json"],
            env=workers.environment, capture_output=True, check=False,
        )  # fmt: skip
        return done.returncode, json.loads(done.stdout)["problems"]

    files = [Path(f"{probe}.{number}") for number in range(2)]
    workers.until(lambda: all(file.exists() for file in files))
    assert check() == (0, [])
    pond.queue("quick").enqueue_many([b"%d" % number for number in range(400)])
    workers.until(lambda: empty(pond, "quick"))
    assert sorted(int(number) for _, number, _ in workers.lines("quick")) == list(range(400))
    pids = {json.loads(file.read_bytes())["pid"] for file in files}
    # A message that kills its worker: the supervisor brings the worker back, and the message its failures.
    pond.queue("deadly").enqueue(b"x", max_attempts=2)
    workers.until(lambda: counts(pond, "deadly").dead == 1)
    assert len({pid for pid, _ in workers.lines("deadly")}) == 2
    workers.until(lambda: workers.log().count("millpond.worker.started") >= 3)
    workers.until(lambda: workers.log().count("millpond.supervisor.died") == 2)
    workers.end(process)
    assert not any(alive(pid) for pid in pids)
    assert not probe.exists()


def test_a_worker_whose_supervisor_is_killed_stops_by_itself(workers: Workers, pond: millpond.SyncPond) -> None:
    pond.queue("quick").enqueue(b"1")
    process = workers.start("--processes", "2", "-c", "quick")
    workers.until(lambda: workers.lines("quick") and workers.log().count("millpond.worker.started") == 2)
    workers.end(process, -signal.SIGKILL, by=signal.SIGKILL)
    workers.until(lambda: workers.log().count("millpond.worker.stopped") == 2)
    pid = int(workers.lines("quick")[0][0])
    workers.until(lambda: not alive(pid))


def test_what_no_restart_cures_ends_the_supervisor(workers: Workers) -> None:
    (workers.folder / "broken").touch()
    process = workers.start("--processes", "2")
    workers.end(process, 2, by=None)
    assert "millpond.supervisor.died" not in workers.log()


def test_a_changed_file_starts_the_worker_anew(workers: Workers, pond: millpond.SyncPond) -> None:
    process = workers.start("--reload", "-c", "quick")
    pond.queue("quick").enqueue(b"a")
    workers.until(lambda: [line[1:] for line in workers.lines("quick")] == [["a", "one"]])
    source = workers.folder / "shop.py"
    source.write_text(source.read_text().replace('VERSION = "one"', 'VERSION = "two"'))
    workers.until(lambda: workers.log().count("millpond.worker.started") == 2)
    pond.queue("quick").enqueue(b"b")
    workers.until(lambda: [line[1:] for line in workers.lines("quick")] == [["a", "one"], ["b", "two"]])
    workers.end(process)
