"""Counting jobs over all threads and processes: each appends the time to one file, which costs microseconds."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

URL = os.environ.get("BENCH_URL", "")
RECORD = struct.Struct("<d")
_file = -1


def tick() -> None:
    """The job ran."""
    global _file  # noqa: PLW0603
    if _file < 0:
        _file = os.open(os.environ["BENCH_TICKS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(_file, RECORD.pack(time.time()))


def count(file: Path) -> int:
    """How many ran."""
    return file.stat().st_size // RECORD.size if file.exists() else 0


def times(file: Path) -> list[float]:
    """When they ran, in order."""
    return sorted(value for (value,) in RECORD.iter_unpack(file.read_bytes()))
