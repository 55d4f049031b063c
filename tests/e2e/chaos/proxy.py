"""A network between clients and one server that does what networks do: seeded, and off until told otherwise.

It knows nothing of HTTP. A request may be lost, cut in half, held up, or carried out after its client has been cut off
(as by a server that stood still meanwhile); a reply may be lost, cut in half, or slow.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter

LATE = 2.5
"""Seconds for which a request is held back whose client is already cut off, at most."""


class Proxy:
    """Passes bytes on to ``port``, and on some of them does harm."""

    def __init__(self, port: int, chance: random.Random) -> None:
        self._port = port
        self._chance = chance
        self._tasks: set[asyncio.Task[None]] = set()
        self.harm = 0.0
        """The probability that something happens to a piece of traffic."""
        self.done: Counter[str] = Counter()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut_all(self) -> None:
        """End every connection."""
        self.done["cut all"] += 1
        for task in list(self._tasks):
            task.cancel()

    def _harm(self, *kinds: str) -> str | None:
        if self._chance.random() >= self.harm:
            return None
        kind = self._chance.choice(kinds)
        self.done[kind] += 1
        return kind

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        there: asyncio.StreamWriter | None = None
        try:
            if self._harm("refuse"):
                return
            back, there = await asyncio.open_connection("127.0.0.1", self._port)
            ways = [asyncio.ensure_future(self._there(reader, there, writer))]
            ways.append(asyncio.ensure_future(self._back(back, writer)))
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # the server is not there; or this is the end
        finally:
            for each in (writer, there):
                if each is not None:
                    each.transport.abort() if self._chance.random() < 0.5 else each.close()

    async def _there(
        self, reader: asyncio.StreamReader, there: asyncio.StreamWriter, client: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                kind = self._harm("lose request", "half request", "slow request", "late request", "no reply")
                if kind == "lose request":
                    return
                if kind == "half request":
                    there.write(data[: len(data) // 2])
                    await asyncio.sleep(0)
                    return
                if kind == "late request":
                    client.transport.abort()
                    await asyncio.sleep(self._chance.uniform(0.0, LATE))
                    there.write(data)
                    await asyncio.sleep(0.05)
                    return
                if kind == "slow request":
                    await asyncio.sleep(self._chance.uniform(0.0, 0.5))
                there.write(data)
                if kind == "no reply":
                    await there.drain()
                    await asyncio.sleep(self._chance.choice((0.0, 0.02)))
                    client.transport.abort()
                    await asyncio.sleep(0.05)
                    return

    async def _back(self, back: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await back.read(65_536):
                kind = self._harm("lose reply", "half reply", "slow reply")
                if kind == "lose reply":
                    return
                if kind == "half reply":
                    client.write(data[: len(data) // 2])
                    return
                if kind == "slow reply":
                    await asyncio.sleep(self._chance.uniform(0.0, 1.5))
                client.write(data)
