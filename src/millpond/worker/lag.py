"""Tells which handler blocks a worker's event loop.

A handler that blocks the loop keeps its message (`leases`), but holds up all else in the process: other handlers,
claims, acks, the liveness probe. From outside that looks like a slow store. So the loop gives a sign of life twice a
second, and a thread looks for it; where it is missing, what the loop's own thread is doing says whose handler it is.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from types import FrameType

from millpond.model.clock import SystemClock, cpu_seconds
from millpond.worker.jobs import Job
from millpond.worker.line import Line

log = logging.getLogger("millpond.worker")

EVERY = 0.5
"""Seconds between signs of life, and between looks."""
BLOCKED = 1.0
"""Seconds of silence that are told. Less is a busy machine; a handler that computes for so long belongs elsewhere."""
QUIET = 60.0
"""Seconds in which one consumer is not told of again."""
OURS = os.path.dirname(__file__)
_WORK = Line._work.__code__


class Watchdog:
    """Watches the event loop that it is started on. By the machine's clock, whichever the pond has: it is the machine
    that stands still."""

    def __init__(self) -> None:
        self._clock = SystemClock()
        self._loop = asyncio.get_running_loop()
        self._of = threading.get_ident()
        self._beat_at = self._looked_at = self._clock.monotonic()
        self._cpu = cpu_seconds()
        self._timer: asyncio.TimerHandle | None = None
        self._told: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="millpond watchdog", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._stop.set()
        if self._timer is not None:
            self._timer.cancel()

    def _beat(self) -> None:
        self._beat_at = self._clock.monotonic()
        self._timer = self._loop.call_later(EVERY, self._beat)

    # In the thread

    def _watch(self) -> None:
        while not self._stop.wait(EVERY):
            silent = self._silent(self._clock.monotonic(), cpu_seconds())
            if silent >= BLOCKED:
                self._tell(silent)

    def _silent(self, now: float, cpu: float) -> float:
        """For how long the loop has been silent. Where this thread has not run either, and nobody in the process has
        computed, the whole process stood still (suspended, stopped, or the machine had no time for it): nobody's
        fault. Where somebody did, he kept the interpreter to himself."""
        slept, worked = now - self._looked_at, cpu - self._cpu
        self._looked_at, self._cpu = now, cpu
        if slept >= EVERY + BLOCKED and worked < slept / 2:
            self._beat_at = now
        return now - self._beat_at - EVERY

    def _tell(self, seconds: float) -> None:
        frame = sys._current_frames().get(self._of)
        consumer, message_id, where = _whose(frame)
        if self._told.get(consumer, 0.0) > self._looked_at:
            return
        self._told[consumer] = self._looked_at + QUIET
        log.warning(
            "millpond.worker.loop_blocked",
            extra={"consumer": consumer, "message_id": message_id, "where": where, "seconds": round(seconds, 1)},
        )


def _whose(frame: FrameType | None) -> tuple[str, str, str]:
    """The consumer's name and the message's id, "" where it is no handler; and the handler's line that is being run, or
    the innermost one."""
    innermost = where = frame
    while frame is not None:
        if frame.f_code is _WORK:
            job, line = frame.f_locals.get("job"), frame.f_locals.get("self")
            if isinstance(job, Job) and isinstance(line, Line):
                return line.consumer.name, job.message.id, _place(where)
        if os.path.dirname(frame.f_code.co_filename) != OURS:
            where = frame
        frame = frame.f_back
    return "", "", _place(innermost)


def _place(frame: FrameType | None) -> str:
    if frame is None:
        return ""
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"
