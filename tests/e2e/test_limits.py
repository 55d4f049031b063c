"""A limit holds over real worker processes on one file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import millpond

BOUND = 60.0
MODULE = """
import os
import time

import millpond

pond = millpond.connect(os.environ["MILLPOND_STORE"])

@pond.consumer("jobs", concurrency=4, gate=pond.limit("jobs", concurrency=2))
def job(payload: bytes) -> None:
    with open("log", "a") as log:
        log.write("+\\n")
    time.sleep(0.01)
    with open("log", "a") as log:
        log.write("-\\n")
"""


def test_no_more_at_once_than_allowed_over_all_processes(tmp_path: Path) -> None:
    (tmp_path / "limited.py").write_text(MODULE)
    store = f"sqlite:///{tmp_path}/pond.db"
    with millpond.connect_sync(store) as pond:
        pond.queue("jobs").enqueue_many([b"x"] * 60)
    environment = os.environ | {
        "PYTHONPATH": str(Path(millpond.__file__).parents[1]),
        "MILLPOND_STORE": store,
    }
    command = [sys.executable, "-m", "millpond", "worker", "limited", "--processes", "3"]
    with (tmp_path / "errors").open("wb") as errors:
        worker = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=errors)
    try:
        end = time.monotonic() + BOUND
        log = tmp_path / "log"
        while not log.exists() or log.read_text().count("-") < 60:
            assert time.monotonic() < end, (tmp_path / "errors").read_text()
            time.sleep(0.02)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(BOUND) == 0, (tmp_path / "errors").read_text()
    finally:
        if worker.poll() is None:
            worker.kill()
            worker.wait()
    running = most = 0
    for sign in log.read_text().split():
        running += 1 if sign == "+" else -1
        most = max(most, running)
    assert most == 2
    with millpond.connect_sync(store) as pond:
        counts = pond.queue("jobs").counts()
        assert (counts.ready, counts.leased, counts.dead) == (0, 0, 0)
        permits = pond.queue("millpond.limit.concurrency.jobs").counts()
        assert (permits.ready, permits.leased) == (2, 0)
