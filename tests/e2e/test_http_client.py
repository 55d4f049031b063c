"""Clients of a server process that is killed under load and started again on the same port: they carry on, and nothing
that was acknowledged is lost."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import millpond
from millpond import MillpondError, OutcomeUnknown

KILLS = 2
BETWEEN = 60
"""Messages enqueued between two kills."""


class Served:
    """``millpond serve`` as a process of its own."""

    def __init__(self, store: str) -> None:
        self.store = store
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "millpond",
            "serve",
            "--store",
            self.store,
            "--port",
            str(self.port),
            "--quiet",
        ]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLPOND_")}
        self.process = subprocess.Popen([*command, "--port", str(self.port)], env=environment)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


async def _until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.005)


async def _open(url: str) -> millpond.Pond:
    """A client, as soon as the server listens."""
    end = time.monotonic() + 30
    while True:
        pond = millpond.connect(url, timeout=20)
        try:
            return await pond.open()
        except MillpondError:
            await pond.close()
            if time.monotonic() > end:
                raise


async def test_nothing_acknowledged_is_lost_when_the_server_is_killed(tmp_path: Path) -> None:
    served = Served(f"sqlite:///{tmp_path / 'http.db'}")
    served.start()
    enqueued: dict[str, bytes] = {}
    acked: set[bytes] = set()
    unsure: set[bytes] = set()
    twice: list[bytes] = []
    unknown = 0
    try:
        producer, consumer = await _open(served.url), await _open(served.url)
        done, drained = asyncio.Event(), asyncio.Event()

        async def produce(worker: int) -> None:
            nonlocal unknown
            number = 0
            while not done.is_set():
                payload = b"%d-%d" % (worker, number)
                number += 1
                try:
                    receipt = await producer.queue("orders").enqueue(payload)
                    assert not receipt.duplicate
                    enqueued[receipt.message_id] = payload
                except OutcomeUnknown:
                    unknown += 1

        async def consume() -> None:
            queue = consumer.queue("orders")
            while not drained.is_set() or (await queue.counts())[:3] != (0, 0, 0):
                for message in await queue.receive(5, wait=0.2, visibility=2):
                    try:
                        await message.ack()
                        # One whose lease ended while this stood still may be another's by now, and acked: that is no
                        # second ack, for this one is refused.
                        if message.payload in acked:
                            twice.append(message.payload)
                        acked.add(message.payload)
                    except millpond.LeaseLost:
                        unsure.add(message.payload)  # its lease ended while the server was away

        producers = [asyncio.ensure_future(produce(worker)) for worker in range(4)]
        workers = [*producers, *(asyncio.ensure_future(consume()) for _ in range(2))]
        for _ in range(KILLS):
            goal = len(enqueued) + BETWEEN
            await _until(lambda goal=goal: len(enqueued) >= goal or any(task.done() for task in workers))  # type: ignore[misc]
            served.kill()
            served.start()
        goal = len(enqueued) + BETWEEN
        await _until(lambda: len(enqueued) >= goal or any(task.done() for task in workers))
        done.set()
        async with asyncio.timeout(30):
            await asyncio.gather(*producers)
            drained.set()
            await asyncio.gather(*workers)
        assert unknown == 0, "they did not carry on"
        assert set(enqueued.values()) <= acked | unsure, "an acknowledged enqueue was lost"
        assert len(unsure) <= 10 * KILLS, "leases of 2 s end while a server starts, and only those that were held then"
        assert twice == [], "an acknowledged ack was lost, or an enqueue doubled"
        assert producer.statistics()["transport"]["failures"] > 0
        await producer.close()
        await consumer.close()
    finally:
        served.kill()
    async with millpond.connect(served.store) as pond:
        assert await pond.verify() == []
        assert (await pond.queue("orders").counts())[:3] == (0, 0, 0)


def test_the_command_line_by_way_of_a_server(tmp_path: Path) -> None:
    served = Served(f"sqlite:///{tmp_path / 'http.db'}")
    served.start()

    def command(*arguments: str, input: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        line = [sys.executable, "-m", "millpond", "--store", served.url, *arguments]
        return subprocess.run(line, input=input, capture_output=True, check=False, timeout=60)

    try:
        end = time.monotonic() + 30
        while (done := command("enqueue", "orders", "hello")).returncode and time.monotonic() < end:
            pass
        assert done.returncode == 0, done.stderr
        done = command("work", "orders", "--until-empty", "--", "cat")
        assert (done.returncode, b"hello" in done.stdout) == (0, True), done.stderr
        done = command("stats", "orders", "--json")
        assert (done.returncode, b'"ready": 0' in done.stdout.replace(b'":0', b'": 0')) == (0, True), done
        done = command("verify")
        assert done.returncode != 0
        assert b"run it where that is" in done.stderr
    finally:
        served.kill()


def test_a_synchronous_pond_by_way_of_a_server(tmp_path: Path) -> None:
    served = Served(f"sqlite:///{tmp_path / 'http.db'}")
    served.start()
    try:
        end = time.monotonic() + 30
        while True:
            try:
                pond = millpond.connect_sync(served.url).open()
                break
            except MillpondError:
                assert time.monotonic() < end
        with pond:
            queue = pond.queue("orders")
            queue.enqueue(b"small")
            queue.enqueue(iter([b"large" * 50_000] * 3))
            small, large = queue.receive(2, wait=5)
            assert (small.payload, sum(map(len, large.stream()))) == (b"small", 750_000)
            small.state.save({"step": 1})
            assert small.state.load() == {"step": 1}
            assert [answer.error for answer in queue.ack_many([small, large])] == [None, None]
            assert queue.counts().leased == 0
    finally:
        served.kill()
