"""A pipeline with hand-off: split a text, count each part, add up. Nothing is lost or counted twice, whatever dies.

    millpond worker pipeline --app-dir examples
    python examples/pipeline.py FILE...                    queues files
    python examples/pipeline.py                            prints the words counted so far

Each stage acks its message and enqueues the next one's in the same commit (`Context.hand_off`), so that a part is
always in exactly one stage. The last stage writes into a database of its own, which no commit of Millpond's reaches; it
therefore notes which parts it has added, and a part that comes twice changes nothing.
"""

from __future__ import annotations

import os
import re
import sqlite3
import sys
from collections import Counter
from pathlib import Path

import msgspec

import millpond

LINES = 50
"""Lines of a part."""
TOTALS = os.environ.get("TOTALS", "totals.db")

pond = millpond.connect(os.environ.get("MILLPOND_STORE", "sqlite:///pipeline.db"))


class Part(msgspec.Struct):
    """A part of a file."""

    file: str
    first: int
    text: str


class Counted(msgspec.Struct):
    """How often each word is in a part."""

    part: str
    words: dict[str, int]


@pond.consumer("split")
def split(file: str, context: millpond.Context) -> None:
    """A file becomes parts."""
    lines = Path(file).read_text().splitlines()
    for first in range(0, len(lines), LINES):
        context.hand_off("count", millpond.json(Part(file, first, "\n".join(lines[first : first + LINES]))))


@pond.consumer("count")
def count(part: Part, context: millpond.Context) -> None:
    """A part becomes numbers. All numbers have one ordering key: they are added up one after the other."""
    words = Counter(re.findall(r"[a-z]+", part.text.lower()))
    counted = Counted(f"{part.file}:{part.first}", dict(words))
    context.hand_off("add", millpond.json(counted), ordering_key="totals")


@pond.consumer("add", concurrency=1)
def add(counted: Counted) -> None:
    """Numbers are added, once."""
    with totals() as database:
        if database.execute("INSERT OR IGNORE INTO part VALUES(?)", (counted.part,)).rowcount:
            database.executemany(
                "INSERT INTO word VALUES(?, ?) ON CONFLICT(word) DO UPDATE SET number = number + excluded.number",
                counted.words.items(),
            )
    database.close()


def totals() -> sqlite3.Connection:
    """Where the words are added up."""
    database = sqlite3.connect(TOTALS, timeout=30)
    database.execute("CREATE TABLE IF NOT EXISTS part(name TEXT PRIMARY KEY)")
    database.execute("CREATE TABLE IF NOT EXISTS word(word TEXT PRIMARY KEY, number INTEGER)")
    return database


def main(*files: str) -> None:
    if files:
        with millpond.connect_sync(os.environ.get("MILLPOND_STORE", "sqlite:///pipeline.db")) as connection:
            connection.queue("split").enqueue_many(millpond.text(file) for file in files)
        return
    database = totals()
    for word, number in database.execute("SELECT word, number FROM word ORDER BY number DESC, word"):
        print(f"{number:>8} {word}")
    database.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
