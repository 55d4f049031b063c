"""A process of the kill test on a bucket: puts numbers in or works them off, and keeps a journal of what it was told.

    python bucket_worker.py produce URL JOURNAL FIRST COUNT
    python bucket_worker.py consume URL JOURNAL VISIBILITY

A producer begins where its journal ends. A consumer works until it is killed, one message in SLOW for longer than its
lease.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import millpond

BATCH = 8
SLOW = 25
"""Of how many messages one is worked on for longer than its lease."""
LONG = 5.0
"""Seconds; longer leases are never outworked."""


def note(file: int, *words: object) -> None:
    """One line, with the time, on the disk before the next step."""
    os.write(file, " ".join(map(str, (*words, time.time_ns() // 1_000_000))).encode() + b"\n")
    os.fsync(file)


async def produce(queue: millpond.Queue, journal: int, left: list[int]) -> None:
    """Each number once: one that a kill left in doubt is put in again, under its key."""
    for start in range(0, len(left), BATCH):
        batch = left[start : start + BATCH]
        receipts = await asyncio.gather(*(queue.enqueue(b"%d" % number, dedup_key=str(number)) for number in batch))
        for number, receipt in zip(batch, receipts, strict=True):
            note(journal, "enqueued", number, receipt.message_id)


async def consume(queue: millpond.Queue, journal: int, visibility: float) -> None:
    """Take and ack, and say so before and after."""

    async def handle(message: millpond.Message) -> None:
        number, id, token = int(await message.read()), message.id, message.lease.token
        until = round(message.lease.until.timestamp() * 1000)
        note(journal, "got", number, id, token, until)
        if number % SLOW == 0 and visibility < LONG:
            await asyncio.sleep(visibility * 1.5)
        note(journal, "acking", number, id, token)
        try:
            await message.ack()
        except millpond.LeaseLost:
            note(journal, "lost", number, id, token)
        else:
            note(journal, "acked", number, id, token)

    while True:
        await asyncio.gather(*map(handle, await queue.receive(BATCH, wait=1.0, visibility=visibility)))


def unfinished(path: str, first: int, count: int) -> list[int]:
    """The numbers that no line of the journal says are in."""
    lines = [line.split() for line in Path(path).read_text().splitlines()]
    done = {int(words[1]) for words in lines if words[0] == "enqueued"}
    return [number for number in range(first, first + count) if number not in done]


async def main(task: str, url: str, path: str, *rest: str) -> None:
    """As the arguments say."""
    journal = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    config = millpond.Config(default_max_attempts=0, poll_interval=0.2, poll_max_interval=1.0)
    async with millpond.connect(url, config=config) as pond:
        queue = pond.queue("kill")
        if task == "consume":
            await consume(queue, journal, float(rest[0]))
        await produce(queue, journal, unfinished(path, int(rest[0]), int(rest[1])))


asyncio.run(main(*sys.argv[1:]))
