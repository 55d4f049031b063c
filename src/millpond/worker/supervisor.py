"""Several worker processes, and restarts: of those that die, with a growing pause; of all, when a source file changes.

The supervisor imports nothing of the user's and opens no store: whatever breaks in a worker, this does not. A worker
ends when the pipe from its supervisor closes, so that none is left behind by a supervisor that is killed.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from millpond.model.clock import SystemClock
from millpond.worker import probe

log = logging.getLogger("millpond.supervisor")

FIRST_PAUSE = 1.0
"""Seconds before a process that died is started again; they double up to `LONGEST_PAUSE`."""
LONGEST_PAUSE = 30.0
STEADY = 60.0
"""A process that lived this many seconds was well: the next pause is the first again."""
KILL_AFTER = 15.0
"""Seconds beyond the grace period after which a process that does not end is killed: it may need some for its last
answers."""
TICK = 0.2
"""Seconds between looks: a signal handler must not touch the lock of what would wake the supervisor sooner."""
LIFELINE = "MILLPOND_LIFELINE"
"""Environment variable that names the descriptor of the pipe from the supervisor; the command line reads it."""
ONE_SIGNAL = 1.0
"""Seconds within which signals to a supervised process are one: service managers send theirs to everybody, and the
supervisor passes its own on."""

ENDED = frozenset({0, *(code for number in (signal.SIGINT, signal.SIGTERM) for code in (-number, 128 + number))})
"""Exit codes of a process that did as it was told. By the signal itself: it had not begun, and so had taken nothing."""


@dataclass
class Place:
    """One of the processes that are to run."""

    number: int
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    deaths: int = 0
    """In a row, of processes that did not live for long."""
    start_at: float = 0.0
    asked: float | None = None
    """When it was told to end."""


@dataclass
class Supervisor:
    """Keeps ``count`` processes of ``command`` running until it is told to stop."""

    command: Sequence[str]
    environment: Mapping[str, str]
    count: int
    grace: float
    hopeless: frozenset[int]
    """Exit codes that no restart cures: the supervisor ends with the first of them."""
    probe_file: str | None = None
    clock: SystemClock = field(default_factory=SystemClock)

    def __post_init__(self) -> None:
        self.places = [Place(number) for number in range(self.count)]
        self.signals: list[int] = []
        self._hasty: list[int] = []
        """Signals to be passed on as soon as the processes do not take them for the one before."""
        self._told_at = -math.inf
        self._wake = threading.Event()
        self._reload = False
        self._code: int | None = None
        self._unclean = False
        self._lifeline, self._theirs = -1, -1

    def probe_of(self, number: int) -> str | None:
        """The probe's file of one process."""
        return None if self.probe_file is None else f"{self.probe_file}.{number}"

    def interrupt(self, number: int) -> None:
        """Stop: pass the signal on. From a signal handler."""
        self.signals.append(number)
        self._hasty.append(number)
        self._pass_on()

    def _pass_on(self) -> None:
        """Tell the processes of one more signal, once it counts as one of its own."""
        now = self.clock.monotonic()
        # A little more than that: a process counts from when it has seen the one before.
        if self._hasty and now - self._told_at > 1.5 * ONE_SIGNAL:
            self._told_at = now
            number = self._hasty.pop(0)
            for place in self.places:
                self._tell(place, number)

    def reload(self) -> None:
        """Start all processes anew. From any thread."""
        self._reload = True
        self._wake.set()

    def run(self) -> int:
        """Until all is stopped; the exit code: 0, 1 when a process did not end well, a hopeless one's, or 128 + the
        second signal."""
        self._theirs, self._lifeline = os.pipe()
        try:
            if self.probe_file is not None:
                files = [f"{self.probe_file}.{place.number}" for place in self.places]
                probe.write(self.probe_file, probe.Report(os.getpid(), self.clock.now_ms(), [], files))
            while self._step():
                self._wake.wait(TICK)
                self._wake.clear()
        finally:
            for place in self.places:
                if place.process is not None:
                    place.process.kill()
                    place.process.wait()
            os.close(self._lifeline)
            os.close(self._theirs)
            if self.probe_file is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.probe_file)
        if self._code is not None:
            return self._code
        return 128 + self.signals[-1] if len(self.signals) > 1 else int(self._unclean)

    def _step(self) -> bool:
        """One look; whether there is more to do."""
        self._pass_on()
        now = self.clock.monotonic()
        leaving = bool(self.signals) or self._code is not None
        if self._reload and not leaving:
            self._reload = False
            log.info("millpond.supervisor.reload", extra={"processes": self.count})
            for place in self.places:
                place.deaths, place.start_at = 0, now
                # One that is ending already comes back with the new code; a second signal would cut its handlers short.
                if place.asked is None:
                    self._tell(place, signal.SIGTERM)
        for place in self.places:
            self._look(place, now, leaving)
        return not leaving or any(place.process is not None for place in self.places)

    def _look(self, place: Place, now: float, leaving: bool) -> None:
        process = place.process
        if process is None:
            if not leaving and place.start_at <= now:
                self._start(place, now)
            return
        code = process.poll()
        if code is None:
            if leaving and place.asked is None:
                self._tell(place, signal.SIGTERM)
            if place.asked is not None and now > place.asked + self.grace + KILL_AFTER:
                log.error("millpond.supervisor.killed", extra={"pid": process.pid, "seconds": now - place.asked})
                process.kill()
            return
        place.process = None
        if leaving:
            self._unclean = self._unclean or code not in ENDED
            return
        if place.asked is not None:  # for a reload
            place.start_at = now
            return
        if code in self.hopeless:
            self._code = code
            self._wake.set()
            return
        place.deaths = 0 if now - place.started >= STEADY else place.deaths
        seconds = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(place.deaths, 10))
        place.deaths += 1
        place.start_at = now + seconds
        log.error(
            "millpond.supervisor.died",
            extra={"pid": process.pid, "exit_code": code, "pause": seconds, "number": place.number},
        )

    def _start(self, place: Place, now: float) -> None:
        command = [*self.command]
        if (file := self.probe_of(place.number)) is not None:
            command += ["--probe-file", file]
        # A process group of its own: Ctrl-C at the terminal reaches the supervisor alone, which passes it on.
        place.process = subprocess.Popen(
            command,
            pass_fds=(self._theirs,),
            env={**self.environment, LIFELINE: str(self._theirs)},
            process_group=0,
        )
        place.started, place.asked = now, None
        log.info("millpond.supervisor.started", extra={"pid": place.process.pid, "number": place.number})

    def _tell(self, place: Place, number: int) -> None:
        if place.process is not None:
            place.asked = self.clock.monotonic() if place.asked is None else place.asked
            place.process.send_signal(number)


def watch_files(paths: Sequence[str], changed: Callable[[], None], stop: threading.Event) -> threading.Thread:
    """A thread that calls back when a Python file below ``paths`` changes. Raises ImportError without watchfiles."""
    import watchfiles

    def watch() -> None:
        python = watchfiles.PythonFilter()
        for _ in watchfiles.watch(*paths, watch_filter=python, stop_event=stop, raise_interrupt=False):
            changed()

    thread = threading.Thread(target=watch, name="millpond reload", daemon=True)
    thread.start()
    return thread
