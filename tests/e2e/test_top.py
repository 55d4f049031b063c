"""`millpond top` as a person or a script meets it: real processes, a real terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.test_http_client import Served
from tests.servers.process import answers

import millpond

BOUND = 60.0


@pytest.fixture(params=["sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A store, or a server of one, with a queue, somebody who holds a message, and a dead letter."""
    url = f"sqlite:///{tmp_path}/pond.db"
    with millpond.connect_sync(url) as pond:
        orders = pond.queue("orders")
        orders.enqueue_many([b"x"] * 4)
        orders.receive(1, owner="worker-1", visibility=600)
        orders.receive(1)[0].bury("gave_up")
    if request.param == "sqlite":
        yield url
        return
    server = Served(url)
    server.start()
    try:
        end = time.monotonic() + BOUND
        while not answers(server.port, "/healthz")():
            assert time.monotonic() < end, "the server has not started"
        yield server.url
    finally:
        server.kill()


def run(url: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "millpond", "--store", url, "top", *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(millpond.__file__).parents[1])} | more
    return subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment, timeout=BOUND, check=False
    )


def test_where_stdout_is_no_terminal_it_prints_one_snapshot(url: str) -> None:
    done = run(url)
    assert (done.returncode, done.stderr) == (0, "")
    assert "orders" in done.stdout
    assert "worker-1" in done.stdout
    assert "gave_up" in done.stdout
    assert "\x1b" not in done.stdout


def test_json(url: str) -> None:
    [line] = run(url, "--json").stdout.splitlines()
    found = json.loads(line)
    assert (found["queue"], found["ready"], found["leased"], found["dead"]) == ("orders", 2, 1, 1)
    assert found["owners"][0]["owner"] == "worker-1"
    assert found["dead_letters"] == [{"reason": "gave_up", "messages": 1}]
    # Who names a queue sees it, also one that has nothing.
    assert json.loads(run(url, "--json", "nothing").stdout)["ready"] == 0


class Terminal:
    """A terminal with `millpond top` on it."""

    def __init__(self, url: str) -> None:
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        environment = os.environ | {
            "PYTHONPATH": str(Path(millpond.__file__).parents[1]),
            "TERM": "xterm",
            "COLUMNS": "100",
            "LINES": "30",
        }
        command = [sys.executable, "-m", "millpond", "--store", url, "top", "--interval", "200ms"]
        ends = {"stdin": self.slave, "stdout": self.slave, "stderr": self.slave}
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **ends)  # type: ignore[call-overload]
        self.seen = b""

    def until(self, text: str) -> None:
        """Read until this was shown since the last call."""
        end = time.monotonic() + BOUND
        while text.encode() not in self.seen:
            assert time.monotonic() < end, f"{text!r} was not shown: {self.seen[-3000:]!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536)
            assert self.process.poll() is None, self.seen[-3000:]
        self.seen = b""

    def until_matches(self, pattern: bytes) -> None:
        """The same for a pattern, in what is drawn, without what says where and how."""
        end = time.monotonic() + BOUND
        while not re.search(pattern, re.sub(rb"\x1b\[[\d;?]*[A-Za-z]", b"", self.seen)):
            assert time.monotonic() < end, f"{pattern!r} was not shown: {self.seen[-3000:]!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536)
            assert self.process.poll() is None, self.seen[-3000:]
        self.seen = b""

    def press(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def end(self) -> int:
        """Its exit code; what it still writes is read meanwhile."""
        end = time.monotonic() + BOUND
        while self.process.poll() is None:
            assert time.monotonic() < end, "it did not end"
            if select.select([self.master], [], [], 0.05)[0]:
                self.seen += os.read(self.master, 65536)
        return self.process.wait()


@contextlib.contextmanager
def terminal(url: str) -> Iterator[Terminal]:
    made = Terminal(url)
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.process.kill()
            made.process.wait()
        os.close(made.master)
        os.close(made.slave)


@pytest.mark.parametrize("url", ["sqlite", "http"], indirect=True)
def test_on_a_terminal_it_shows_what_changes_and_obeys_keys(url: str) -> None:
    with terminal(url) as shown, millpond.connect_sync(url) as pond:
        shown.until("worker-1")
        orders = pond.queue("orders")
        shown.press(b"p")
        shown.until("orders is paused")
        assert orders.policy().paused
        shown.press(b"r")
        shown.until("y redrives")
        shown.press(b"y")
        shown.until("1 redriven")
        assert orders.counts().dead == 0
        pond.queue("mails").enqueue(b"x")
        shown.until("mails")
        shown.until("in/s")
        # A rate, of the chosen queue: what comes is acked at once, so its depth does not change.
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                pond.queue("mails").enqueue(b"x", priority=9)
                pond.queue("mails").receive(1)[0].ack()

        worker = threading.Thread(target=work)
        worker.start()
        try:
            shown.until_matches(rb"mails[^\n]*? 1 +[\d.,]+ +[\d.,]+ +0 ")
        finally:
            stop.set()
            worker.join()
        shown.press(b"q")
        assert shown.end() == 0
        assert termios.tcgetattr(shown.slave) == shown.before


def test_an_interrupt_leaves_the_terminal_as_it_was(url: str) -> None:
    with terminal(url) as shown:
        shown.until("worker-1")
        shown.process.send_signal(2)
        assert shown.end() == 130
        assert termios.tcgetattr(shown.slave) == shown.before
        assert b"Traceback" not in shown.seen


def test_without_a_terminal_for_keys_it_says_what_to_do(url: str) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "millpond", "--store", url, "top"]
    environment = os.environ | {"PYTHONPATH": str(Path(millpond.__file__).parents[1]), "TERM": "xterm"}
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=slave, stderr=subprocess.PIPE, env=environment, check=False
    )
    os.close(master)
    os.close(slave)
    assert done.returncode == 2
    assert b"--once" in done.stderr
