"""Enqueues whose replies are lost, sent again to servers that were killed meanwhile, or to others on the same file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.e2e.test_http_client import Served, _open

import millpond
from millpond import Message, Pond


class Cut:
    """Passes bytes on to a server, until it is told to keep back what the server says, and then to hang up."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.kept = asyncio.Event()
        self._hang_up = asyncio.Event()
        self._keeping = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def keep(self) -> None:
        """From now on nothing of what the server says gets through."""
        self._keeping = True

    def go_on(self) -> None:
        """Hang up, and be a good connection from the next one on."""
        self._keeping = False
        self._hang_up.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            back, there = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            writer.close()
            return

        async def forth() -> None:
            while data := await reader.read(65_536):
                there.write(data)

        sending = asyncio.ensure_future(forth())
        try:
            while data := await back.read(65_536):
                if self._keeping:
                    self.kept.set()
                    await self._hang_up.wait()
                    return
                writer.write(data)
        except (OSError, asyncio.CancelledError):
            pass  # one of them went away
        finally:
            sending.cancel()
            writer.close()
            there.close()


@asynccontextmanager
async def _cut(port: int) -> AsyncIterator[tuple[Cut, str]]:
    cut = Cut(port)
    address = await cut.start()
    try:
        yield cut, address
    finally:
        await cut.stop()


async def _take(pond: Pond, count: int) -> list[Message]:
    """Receive and ack so many messages."""
    taken: list[Message] = []
    queue = pond.queue("orders")
    async with asyncio.timeout(30):
        while len(taken) < count:
            some = await queue.receive(count - len(taken), wait=5)
            assert [answer.error for answer in await queue.ack_many(some)] == [None] * len(some)
            taken += some
    return taken


SMALL, LARGE = b"small", b"large" * 100_000


@pytest.mark.parametrize(
    "payloads", [[SMALL], [LARGE], [b"%d" % number for number in range(40)]], ids=["one", "large", "batch"]
)
async def test_a_server_that_is_killed_leaves_no_message_twice(tmp_path: Path, payloads: list[bytes]) -> None:
    served = Served(f"sqlite:///{tmp_path / 'http.db'}")
    served.start()
    try:
        async with _cut(served.port) as (cut, address):
            direct, producer = await _open(served.url), await _open(f"http://{address}")
            cut.keep()
            sending = asyncio.ensure_future(producer.queue("orders").enqueue_many(payloads))
            taken = await _take(direct, len(payloads))
            async with asyncio.timeout(30):
                await cut.kept.wait()
            served.kill()
            served.start()
            again = await _open(served.url)
            cut.go_on()
            receipts = await sending
            assert producer.statistics()["transport"]["repeats"] > 0
            assert receipts == [(message.id, False) for message in taken]
            assert (await again.queue("orders").counts())[:3] == (0, 0, 0)
            assert (await producer.queue("orders").enqueue(b"next")).duplicate is False
            assert [message.payload for message in await _take(again, 1)] == [b"next"]
            for pond in (direct, producer, again):
                await pond.close()
    finally:
        served.kill()
    async with millpond.connect(served.store) as pond:
        assert await pond.verify() == []


async def test_another_server_on_the_file_knows_what_was_carried_out(tmp_path: Path) -> None:
    one, other = (Served(f"sqlite:///{tmp_path / 'http.db'}") for _ in range(2))
    one.start()
    other.start()
    try:
        async with _cut(one.port) as (cut, address):
            consumer = await _open(other.url)
            await (await _open(one.url)).close()  # else the producer would begin with the other
            producer = await _open(f"http://{address},127.0.0.1:{other.port}")
            queue = producer.queue("orders")
            cut.keep()
            sending = asyncio.ensure_future(queue.enqueue_many([b"1", b"2", b"3"]))
            taken = await _take(consumer, 2)  # of the batch a part is gone, and a part is there
            async with asyncio.timeout(30):
                await cut.kept.wait()
            cut.go_on()
            receipts = await sending
            assert producer.statistics()["transport"]["repeats"] > 0
            assert len(receipts) == 3
            assert [receipt.duplicate for receipt in receipts] == [False] * 3
            taken += await _take(consumer, 3 - len(taken))
            assert sorted(message.id for message in taken) == [receipt.message_id for receipt in receipts]
            assert (await consumer.queue("orders").counts())[:3] == (0, 0, 0)
            await producer.close()
            await consumer.close()
    finally:
        one.kill()
        other.kill()
