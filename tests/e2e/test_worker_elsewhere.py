"""`millpond worker` on a store that is elsewhere: behind a server, which dies and is started again, and in a bucket."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.test_http_client import Served
from tests.e2e.test_worker import BOUND, Workers

import millpond
from millpond import MillpondError

MODULE = """
import asyncio, os, pathlib, time
import millpond

FOLDER = pathlib.Path({folder!r})
pond = millpond.connect({url!r})

def mark(what, text=""):
    with open(FOLDER / what, "a") as file:
        file.write(f"{{os.getpid()}} {{text}}\\n")

@pond.consumer("quick", concurrency=4)
async def quick(text: str):
    mark("quick", text)

@pond.consumer("blocking", visibility=2.0, concurrency=2)
async def blocking(text: str):
    mark("started", text)
    while not (FOLDER / "go").exists():
        time.sleep(0.02)
    mark("finished", text)
"""


class Elsewhere(Workers):
    """Workers on a store that this process reaches by the same URL."""

    def __init__(self, folder: Path, url: str, server: Served | None) -> None:
        super().__init__(folder)
        (folder / "shop.py").write_text(MODULE.format(folder=str(folder), url=url))
        self.url = url
        self.server = server

    def connect(self) -> millpond.SyncPond:
        """As soon as somebody answers."""
        end = time.monotonic() + BOUND
        while True:
            try:
                return millpond.connect_sync(self.url).open()
            except MillpondError:
                assert time.monotonic() < end, self.log()


@pytest.fixture(params=["http", "bucket"])
def elsewhere(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Elsewhere]:
    if request.param == "http":
        server = Served(f"sqlite:///{tmp_path}/behind.db")
        server.start()
        made = Elsewhere(tmp_path, server.url, server)
    else:
        seaweed = request.getfixturevalue("seaweed")
        for name, value in seaweed.environment.items():
            monkeypatch.setenv(name, value)
        made = Elsewhere(tmp_path, seaweed.url(f"worker-{time.time_ns()}"), None)
        made.environment |= seaweed.environment
    yield made
    made.close()
    if made.server is not None:
        made.server.kill()


def test_a_blocked_loop_keeps_its_lease_and_a_killed_worker_costs_one_failure(elsewhere: Elsewhere) -> None:
    with elsewhere.connect() as pond:
        queue = pond.queue("blocking")
        receipt = queue.enqueue(b"work")
        first = elsewhere.start("-c", "blocking")
        elsewhere.until(lambda: elsewhere.lines("started"))
        ends: set[int | None] = set()

        def renewed() -> bool:
            lease = queue.get(receipt.message_id).lease
            assert lease is not None
            ends.add(lease.until_ms)
            return len(ends) > 4  # its first lease is over by now

        elsewhere.until(renewed)
        view = queue.get(receipt.message_id)
        assert (view.state, view.attempts, view.failures) == ("leased", 1, 0)
        elsewhere.end(first, -signal.SIGKILL, by=signal.SIGKILL)
        second = elsewhere.start("-c", "blocking")
        elsewhere.until(lambda: len(elsewhere.lines("started")) == 2)
        view = queue.get(receipt.message_id)
        assert (view.attempts, view.failures) == (2, 1)
        elsewhere.go()
        elsewhere.until(lambda: sum(queue.counts()[:5]) == 0)
        elsewhere.end(second)
        assert [pid for pid, _ in elsewhere.lines("finished")] == [str(second.pid)]


@pytest.mark.parametrize("elsewhere", ["http"], indirect=True)
def test_celery_8030_a_worker_goes_on_when_its_server_was_away(elsewhere: Elsewhere) -> None:
    server = elsewhere.server
    assert server is not None
    with elsewhere.connect() as pond:
        pond.queue("quick").enqueue(b"before")
        worker = elsewhere.start("-c", "quick")
        elsewhere.until(lambda: [line[1:] for line in elsewhere.lines("quick")] == [["before"]])
        elsewhere.until(lambda: sum(pond.queue("quick").counts()[:5]) == 0)
        for _ in range(2):
            server.kill()  # while the worker waits for messages there
            server.start()  # takes a second or more, in which nobody answers
        pond.queue("quick").enqueue_many([b"%d" % number for number in range(20)])
        elsewhere.until(lambda: len(elsewhere.lines("quick")) == 21)
        elsewhere.until(lambda: sum(pond.queue("quick").counts()[:5]) == 0)
        elsewhere.end(worker)
        assert sorted(text for _, text in elsewhere.lines("quick")) == sorted(
            ["before", *(str(number) for number in range(20))]
        )
        assert {pid for pid, _ in elsewhere.lines("quick")} == {str(worker.pid)}
