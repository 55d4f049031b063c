"""Bytes from files and pipes, as they come, in bounded memory.

A pipe is read through the event loop, so that Ctrl-C and other work go on while its writer is slow. A regular file is
always ready (and cannot be watched), so it is read straight.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from typing import TypeVar

T = TypeVar("T")

READ_SIZE = 256 * 1024
"""Bytes per read: four pipe buffers; large enough that reading is not what costs."""
MAX_LINE = 16 * 1024 * 1024
"""Longest line of ``--lines``. A line is held in memory; a larger thing is a file."""


class LineTooLong(ValueError):
    """A line is longer than `MAX_LINE`."""


async def chunks(descriptor: int) -> AsyncIterator[bytes]:
    """What the descriptor holds, until its end."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    try:
        loop.add_reader(descriptor, ready.set)
        watched = True
    except (PermissionError, NotImplementedError):  # a regular file; an event loop that cannot watch descriptors
        watched = False
    try:
        while True:
            if watched:
                await ready.wait()
                ready.clear()
            data = os.read(descriptor, READ_SIZE)
            if not data:
                return
            yield data
    finally:
        if watched:
            loop.remove_reader(descriptor)


class Splitter:
    """Cuts a stream into lines, whatever the chunks. The separator goes; nothing else is touched."""

    def __init__(self, separator: bytes = b"\n") -> None:
        self._separator = separator
        self._rest: list[bytes] = []
        self._held = 0

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that ``data`` completes. Raises LineTooLong."""
        lines = data.split(self._separator)
        tail = lines.pop()
        if lines and self._rest:
            lines[0] = b"".join([*self._rest, lines[0]])
            self._rest, self._held = [], 0
        if tail:
            self._rest.append(tail)
            self._held += len(tail)
        if self._held > MAX_LINE or any(len(line) > MAX_LINE for line in lines):
            raise LineTooLong(f"a line is longer than {MAX_LINE // 1024**2} MiB; queue it as a message with --file")
        return lines

    def finish(self) -> list[bytes]:
        """The last line, if it lacked its separator."""
        rest = b"".join(self._rest)
        self._rest, self._held = [], 0
        return [rest] if rest else []


async def lines(descriptor: int, separator: bytes = b"\n") -> AsyncIterator[tuple[list[bytes], int]]:
    """Lines in batches as they arrive, each with the bytes read for it. Raises LineTooLong."""
    splitter = Splitter(separator)
    async for data in chunks(descriptor):
        yield splitter.feed(data), len(data)
    yield splitter.finish(), 0


def batches(items: list[T], size: int) -> Iterator[list[T]]:
    """Slices of at most ``size``."""
    for at in range(0, len(items), size):
        yield items[at : at + size]
