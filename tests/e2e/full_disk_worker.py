"""A process of the full disk test: fills a store, empties it, fills it again; fails if anything is not as it should be.

python full_disk_worker.py file-system|reported|file-size|max-bytes DIRECTORY

``file-system``: DIRECTORY is a small file system of its own. ``reported``: it is not, but the system says so.
``file-size``: the system lets no file grow beyond LIMIT. ``max-bytes``: the store has that limit itself.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
from pathlib import Path

import millpond
from millpond.model.clock import SystemClock
from millpond.pond import Pond
from millpond.stores.sqlite import SqliteStore

LIMIT = 4 << 20
WHOLE = 8 << 20
"""Bytes of the file system."""
ENOUGH = {"file-system": WHOLE // 2, "reported": WHOLE // 2, "file-size": LIMIT, "max-bytes": LIMIT // 2}
"""Bytes of payload that have to fit. A limit of files' sizes leaves as much again in the log as in the database."""
SIZES = (100, 3000, 30_000, 200_000)
"""Bytes of payload; the last is stored apart from its record."""


def limit_file_size(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def report_small_file_system(directory: Path) -> None:
    real = os.statvfs

    def statvfs(path: str) -> os.statvfs_result:
        used = sum(each.stat().st_size for each in directory.rglob("*") if each.is_file())
        found = list(real(path))
        # f_bsize, f_frsize, f_blocks, f_bfree, f_bavail
        found[:5] = 4096, 4096, WHOLE // 4096, (WHOLE - used) // 4096, (WHOLE - used) // 4096
        return os.statvfs_result(found)

    os.statvfs = statvfs  # type: ignore[assignment]


async def fill(queue: millpond.Queue, name: str) -> dict[str, int]:
    """Enqueue some of each size, and then until not even the smallest fits; the sizes of what was acknowledged."""
    kept: dict[str, int] = {}
    for size, rounds in [*((size, 2) for size in SIZES), *((size, sys.maxsize) for size in reversed(SIZES))]:
        full = False
        for _ in range(rounds):
            if full:
                break
            # Some at once: they share a transaction, and each hears for itself.
            answers = await asyncio.gather(*(queue.enqueue(os.urandom(size)) for _ in range(3)), return_exceptions=True)
            for answer in answers:
                if isinstance(answer, millpond.StoreFull):
                    assert name in str(answer), answer
                    assert "Free some space" in str(answer), answer
                    full = True
                elif isinstance(answer, BaseException):
                    raise answer
                else:
                    kept[answer.message_id] = size
    return kept


async def standing(pond: millpond.Pond, queue: millpond.Queue, kept: dict[str, int]) -> None:
    assert (await queue.counts()).ready == len(kept)
    assert await pond.verify() == []


async def drain(queue: millpond.Queue, kept: dict[str, int]) -> None:
    """Receive and ack everything."""
    left = dict(kept)
    while messages := await queue.receive(20):
        for message in messages:
            assert len(await message.read()) == left.pop(message.id)
        assert [answer.error for answer in await queue.ack_many(messages)] == [None] * len(messages)
    assert not left, f"{len(left)} messages are lost"


def make(path: Path, how: str) -> Pond:
    clock = SystemClock()
    return Pond(SqliteStore(path, clock=clock, max_bytes=LIMIT if how == "max-bytes" else None), clock=clock)


async def main(how: str, directory: Path) -> None:
    path = directory / "work.db"
    ballast = directory / "ballast"
    ballast.write_bytes(bytes(1 << 20))
    if how == "reported":
        report_small_file_system(directory)
    if how == "file-size":
        limit_file_size(LIMIT)
    async with make(path, how) as pond:
        queue = pond.queue("q")
        kept = await fill(queue, "work.db")
        # Full is full: the log gave back its room first.
        assert sum(kept.values()) > ENOUGH[how], sum(kept.values())
        await standing(pond, queue, kept)
        # Room is made outside: the next call works.
        ballast.unlink()
        if how == "file-size":
            limit_file_size(2 * LIMIT)
        if how != "max-bytes":
            kept[(await queue.enqueue(bytes(100))).message_id] = 100
            kept.update(await fill(queue, "work.db"))
            await standing(pond, queue, kept)
    if how == "file-size":
        limit_file_size(resource.RLIM_INFINITY)  # such a limit leaves no log in which an ack could be written
    # What is full can be opened and emptied, and what was emptied filled again.
    async with make(path, how) as pond:
        queue = pond.queue("q")
        await standing(pond, queue, kept)
        await drain(queue, kept)
        if how != "file-size":
            again = await fill(queue, "work.db")
            assert sum(again.values()) > sum(kept.values()) / 2, (sum(again.values()), sum(kept.values()))
            await drain(queue, again)
        assert await pond.verify() == []
    print("done")


asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
