"""The liveness probe: is this worker still consuming?

A worker writes a small file about itself every second, on its event loop. `check` reads it, from another process, and
says what is wrong: nothing written for too long (the process is gone, or its loop is blocked), or a consumer that has a
free place and has not asked the store successfully for too long, neither for messages nor for the permits of the limit
that holds it back. A connection that is open and a process that exists prove neither; workers of other queues have been
found alive and idle for days.

A file rather than a port: there is nothing to secure, nothing to collide when several workers share a host, and a
blocked loop cannot answer "fine" from another thread.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import msgspec

from millpond.model.clock import Clock
from millpond.worker.jobs import pause

if TYPE_CHECKING:
    from millpond.worker.worker import Worker

EVERY = 1.0
"""Seconds between writes."""
MAX_AGE = 120.0
"""Seconds without a successful look that are too long: twice the longest poll of an idle queue in a bucket."""


class ConsumerReport(msgspec.Struct, frozen=True):
    """One consumer."""

    name: str
    polled_at_ms: int
    """When messages, or the permits of a limit, were last asked for successfully, or need not be; when it began, before
    that."""
    occupied: bool
    """Every place is taken by a running handler, or a gate that asks no store holds it back: it need not ask."""
    running: int


class Report(msgspec.Struct, frozen=True):
    """What the file says."""

    pid: int
    at_ms: int
    consumers: list[ConsumerReport]
    processes: list[str] = []
    """The files of the processes that a supervisor has; its own says nothing else."""


def write(path: str, report: Report) -> None:
    """Replace the file. Raises OSError."""
    beside = f"{path}.{os.getpid()}.new"
    with open(beside, "wb") as file:
        file.write(msgspec.json.encode(report))
    os.replace(beside, path)


class Probe:
    """Writes the file of one worker, as a service beside its consumers."""

    name = "probe"

    def __init__(self, worker: Worker, path: str, clock: Clock) -> None:
        self._worker = worker
        self._path = path
        self._clock = clock
        self._began = clock.monotonic()

    def report(self) -> Report:
        """How the worker stands."""
        now, wall = self._clock.monotonic(), self._clock.now_ms()
        consumers = []
        for line in self._worker.lines:
            looked = line.looked
            since = self._began if looked is None else looked
            consumers.append(
                ConsumerReport(
                    line.consumer.name,
                    wall - round((now - since) * 1000),
                    line.occupied,
                    len(line.running),
                )
            )
        return Report(os.getpid(), wall, consumers)

    async def run(self) -> None:
        """Write until cancelled, then take the file away."""
        try:
            while True:
                write(self._path, self.report())
                await pause(self._clock, EVERY)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)


def check(path: str, *, now_ms: int, max_age: float = MAX_AGE) -> list[str]:
    """What is wrong with the worker that writes ``path``; [] when it is consuming. ``max_age`` in seconds."""
    try:
        with open(path, "rb") as file:
            report = msgspec.json.decode(file.read(), type=Report)
    except FileNotFoundError:
        return [f"{path} is not there: the worker has not begun, or has ended"]
    except (OSError, msgspec.DecodeError) as error:
        return [f"{path} cannot be read: {error}"]
    if report.processes:
        return [problem for each in report.processes for problem in check(each, now_ms=now_ms, max_age=max_age)]
    age = (now_ms - report.at_ms) / 1000
    if age > max_age:
        return [f"process {report.pid} has not written {path} for {age:.0f} s: it is gone, or its loop is blocked"]
    problems = []
    for consumer in report.consumers:
        silent = (now_ms - consumer.polled_at_ms) / 1000
        if not consumer.occupied and silent > max_age:
            problems.append(
                f"consumer {consumer.name} of process {report.pid} has not asked for messages for {silent:.0f} s"
            )
    return problems
