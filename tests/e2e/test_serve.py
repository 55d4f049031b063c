"""A server as a process of its own: told to stop, and killed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.unit.server.lockd import Connection, Delivery, error_of, form, parts_of
from tests.unit.server.raw import request

import millpond

WORKER = Path(__file__).parent / "serve_worker.py"


class Process(NamedTuple):
    """A running server."""

    process: asyncio.subprocess.Process
    url: str


@contextlib.asynccontextmanager
async def served(store: str) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(WORKER), store, "0", stdout=subprocess.PIPE, env=os.environ
    )
    assert process.stdout is not None
    try:
        yield Process(process, (await process.stdout.readline()).decode().strip())
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def dequeue(url: str, **fields: object) -> list[Delivery]:
    body = json.dumps({"queue": "q", "owner": "o", "wait_seconds": -1, **fields}).encode()
    answer = await request(url, "POST", "/v1/queue/dequeue", body)
    return parts_of(answer) if answer.status == 200 else []


async def test_told_to_stop_it_sends_away_who_waits_and_takes_what_is_held(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/q.db"
    async with millpond.connect(store) as pond:
        queue = pond.queue("q")
        await queue.enqueue_many([b"held", b"streamed"])
        async with served(store) as server, Connection(server.url) as waiting, Connection(server.url) as stream:
            [held] = await dequeue(server.url)
            await stream.send("POST", "/v1/queue/subscribe", b'{"queue":"q","owner":"o"}')
            status, _ = await stream.head()
            assert status == 200
            assert b"streamed" in await stream.chunk()
            await waiting.send("POST", "/v1/queue/dequeue", b'{"queue":"empty","owner":"o"}')
            async with Connection(server.url) as answering:
                await answering.send("GET", "/healthz")
                await answering.answer()
                server.process.send_signal(signal.SIGTERM)
                answer = await waiting.answer()
                assert error_of(answer) == (503, "shutdown_draining")
                assert answer.headers["shutdown-imminent"] == "true"
                assert (await stream.rest()).endswith(b"--\r\n")
                assert error_of(await request(server.url, "GET", "/readyz")) == (503, "shutdown_draining")
                await answering.send("POST", "/v1/queue/ack", json.dumps(held.answer()).encode())
                assert (await answering.answer()).status == 200
            waiting.writer.close()
            stream.writer.close()
            async with asyncio.timeout(40):
                assert await server.process.wait() == 0
            with pytest.raises(OSError):
                await request(server.url, "GET", "/healthz")
        counts = await queue.counts()
        assert (counts.ready, counts.leased) == (0, 1)


async def test_killed_under_load_it_has_lost_nothing_that_it_had_said(tmp_path: Path) -> None:
    """Three lives of one server on one file. What was confirmed as enqueued and not acked is there, in the end, and
    what was confirmed as acked is not."""
    store = f"sqlite:///{tmp_path}/q.db"
    stored: set[bytes] = set()
    acked: set[bytes] = set()
    maybe: set[bytes] = set()
    numbers = itertools.count()

    async def produce(url: str) -> None:
        async with Connection(url) as connection:
            while True:
                name = b"%d" % next(numbers)
                body, kind = form({"queue": "q"}, name)
                await connection.send("POST", "/v1/queue/enqueue", body, {"Content-Type": kind})
                assert (await connection.answer()).status == 200
                stored.add(name)

    async def consume(url: str) -> None:
        async with Connection(url) as connection:
            while True:
                await connection.send("POST", "/v1/queue/dequeue", b'{"queue":"q","owner":"o","wait_seconds":5}')
                [delivery] = parts_of(await connection.answer())
                if int(delivery.payload) % 2:
                    continue
                maybe.add(delivery.payload)
                await connection.send("POST", "/v1/queue/ack", json.dumps(delivery.answer()).encode())
                assert (await connection.answer()).status == 200
                acked.add(delivery.payload)

    for _ in range(3):
        async with served(store) as server:
            workers = [asyncio.create_task(work(server.url)) for work in (produce, produce, consume, consume)]
            goal = len(stored) + 60
            while len(stored) < goal and not any(worker.done() for worker in workers):
                await asyncio.sleep(0.005)
            server.process.kill()
            ends = await asyncio.gather(*workers, return_exceptions=True)
            assert all(isinstance(end, (OSError, asyncio.IncompleteReadError)) for end in ends), ends
    assert len(stored) >= 180
    assert acked
    async with millpond.connect(store) as pond:
        left = set()
        records, after = await pond.service.list_messages(None, "q", limit=10_000)
        assert after is None
        for record in records:
            left.add(b"".join([chunk async for chunk in pond.service.payload_chunks(record)]))
        assert not left & acked
        assert stored - maybe <= left
        assert await pond.verify() == []
