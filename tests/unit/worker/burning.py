"""Handlers that processes import."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

from millpond import Defer, GiveUp, Lease, Retry


@dataclasses.dataclass
class Sum:
    """What is to be done."""

    what: str
    number: int = 0
    marks: str = ""


class Picky(Exception):
    """An exception that a pickle does not bring back."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def work(order: Sum, lease: Lease) -> object:
    """Whatever the message says."""
    if order.what == "add":
        return (order.number + 1, lease.token, os.getpid())
    if order.what == "raise":
        raise LookupError(f"no {order.number}")
    if order.what == "picky":
        raise Picky(1, 2)
    if order.what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if order.what == "exit":
        raise SystemExit(3)
    if order.what == "give up":
        raise GiveUp("hopeless")
    if order.what == "retry":
        raise Retry(after=44.0)
    if order.what == "defer":
        raise Defer(33.0)
    if order.what == "lock":
        return threading.Lock()
    if order.what == "burn":
        Path(order.marks, "started").write_text(str(os.getpid()))
        end = time.monotonic() + 60
        while time.monotonic() < end:
            sum(range(1000))
    raise AssertionError(order.what)
