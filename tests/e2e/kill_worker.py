"""A process of the kill test: enqueues or works until it is killed, and keeps a journal of what it was told.

python kill_worker.py produce|consume DATABASE JOURNAL
"""

from __future__ import annotations

import asyncio
import os
import sys

import millpond


def note(file: int, line: str) -> None:
    """One line, on the disk before the next step."""
    os.write(file, line.encode() + b"\n")
    os.fsync(file)


async def produce(queue: millpond.Queue, journal: int) -> None:
    number = 0
    while True:
        number += 1
        payload = b"%d-%d" % (os.getpid(), number)
        for receipt in await asyncio.gather(*(queue.enqueue(payload) for _ in range(8))):
            note(journal, f"enqueued {receipt.message_id}")


async def consume(queue: millpond.Queue, journal: int) -> None:
    while True:
        for message in await queue.receive(16, wait=1.0, visibility=0.5):
            note(journal, f"got {message.id} {message.lease.token}")
            try:
                await message.ack()
            except millpond.LeaseLost:
                note(journal, f"lost {message.id}")
            else:
                note(journal, f"acked {message.id}")


async def main() -> None:
    task, database, path = sys.argv[1:]
    journal = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    config = millpond.Config(default_max_attempts=0)
    async with millpond.connect(f"sqlite:///{database}", config=config) as pond:
        await (produce if task == "produce" else consume)(pond.queue("kill"), journal)


asyncio.run(main())
