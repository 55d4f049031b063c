"""Files that are read again when they change, or when a signal says so: tokens and certificates.

A file that cannot be used leaves in force what was read before: whoever renews a certificate at night must not take the
server down with a slip.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from millpond.errors import InvalidInput
from millpond.model.clock import Clock, TimerHandle

log = logging.getLogger("millpond.server")

EVERY = 5.0
"""Seconds between looks. A look is a `stat` per file; a certificate is renewed weeks before it ends."""


class _Watched(NamedTuple):
    what: str
    paths: tuple[str, ...]
    load: Callable[[], object]


class Reloader:
    """Watches files by their times and sizes."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._watched: list[_Watched] = []
        self._seen: dict[str, object] = {}
        self._timer: TimerHandle | None = None
        self.reloads = 0
        self.failures = 0

    def watch(self, what: str, paths: Sequence[str], load: Callable[[], object]) -> None:
        """Call ``load`` when one of the files has changed. It raises InvalidInput for what it cannot use, and then has
        changed nothing. What is there now counts as read."""
        self._watched.append(_Watched(what, tuple(paths), load))
        self._seen[what] = _look(paths)

    def start(self) -> None:
        """Look every few seconds, on the running event loop."""
        if self._watched and self._timer is None:
            self._timer = self._clock.call_later(EVERY, self._again)

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _again(self) -> None:
        self._timer = None
        self.check()
        self.start()

    def check(self, *, force: bool = False) -> None:
        """Read what has changed; ``force``: everything."""
        for what, paths, load in self._watched:
            seen = _look(paths)
            if seen == self._seen[what] and not force:
                continue
            self._seen[what] = seen
            try:
                load()
            except InvalidInput as error:
                self.failures += 1
                log.error("millpond.server.reload_failed", extra={"what": what, "reason": str(error)})
            else:
                self.reloads += 1
                log.info("millpond.server.reloaded", extra={"what": what})


def _look(paths: Sequence[str]) -> object:
    found: list[object] = []
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            found.append((path, error.errno))
        else:
            found.append((path, status.st_mtime_ns, status.st_size, status.st_ino))
    return found
