"""Thumbnails: work that burns CPU, in processes of its own.

    millpond worker thumbnails --app-dir examples
    python examples/thumbnails.py OUTPUT WIDTH IMAGE...           queues images, and returns at once

Reads and writes binary PPM (``P6``), which needs no library: each pixel of the small image is the mean of those that it
stands for. An image that cannot be read is a dead letter at once; `millpond dlq list thumbnails` says why.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import msgspec

import millpond

pond = millpond.connect(os.environ.get("MILLPOND_STORE", "sqlite:///thumbnails.db"))
HEADER = re.compile(rb"P6\s+(?:#[^\n]*\n\s*)*(\d+)\s+(\d+)\s+255\s")


class Broken(Exception):
    """This is no image that we can read."""


class Image(msgspec.Struct):
    """An image that is to be made small."""

    source: str
    target: str
    width: int


@pond.consumer(
    "thumbnails",
    run_in="process",
    concurrency=os.cpu_count() or 1,
    time_limit=300,
    retry=millpond.RetryPolicy(give_up_on=(Broken,)),
)
def shrink(image: Image) -> None:
    """Write the small image. It appears under its name when it is whole, so doing it twice does no harm."""
    small = resized(Path(image.source).read_bytes(), image.width)
    unfinished = f"{image.target}.{os.getpid()}"
    Path(unfinished).write_bytes(small)
    os.replace(unfinished, image.target)


def resized(data: bytes, width: int) -> bytes:
    """A PPM image, that wide. Raises Broken."""
    header = HEADER.match(data)
    if header is None:
        raise Broken("not a binary PPM image with 8 bits a colour")
    across, down = int(header[1]), int(header[2])
    pixels = data[header.end() :]
    if len(pixels) != across * down * 3 or not across or not down:
        raise Broken(f"{len(pixels)} bytes of pixels where {across}×{down} need {across * down * 3}")
    width = min(width, across)
    height = max(1, down * width // across)
    out = bytearray()
    for y in range(height):
        rows = range(y * down // height, max((y + 1) * down // height, y * down // height + 1))
        for x in range(width):
            columns = range(x * across // width, max((x + 1) * across // width, x * across // width + 1))
            for colour in range(3):
                total = sum(pixels[(row * across + column) * 3 + colour] for row in rows for column in columns)
                out.append(total // (len(rows) * len(columns)))
    return b"P6\n%d %d\n255\n" % (width, height) + bytes(out)


def main(output: str, width: str, *images: str) -> None:
    with millpond.connect_sync(os.environ.get("MILLPOND_STORE", "sqlite:///thumbnails.db")) as connection:
        jobs = [Image(image, str(Path(output) / Path(image).name), int(width)) for image in images]
        connection.queue("thumbnails").enqueue_many(millpond.json(job) for job in jobs)
    print(len(jobs), "images queued")


if __name__ == "__main__":
    main(*sys.argv[1:])
