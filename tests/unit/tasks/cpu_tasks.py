"""Tasks that processes of their own import."""

from __future__ import annotations

import os
import uuid

import millpond

pond = millpond.connect("memory://")


@pond.task(run_in="process", keep_result=60, concurrency=1, max_attempts=1)
def square(number: int, tag: uuid.UUID | None = None) -> tuple[int, int]:
    """What it is, and which process found out."""
    if number < 0:
        raise ValueError("less than nothing")
    return number * number, os.getpid()


@pond.task(run_in="process", keep_result=60, concurrency=1)
def nothing() -> object:
    """Returns what has no form in JSON."""
    return object()
