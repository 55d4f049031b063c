"""What the processes of the chaos test write down: one JSON line per event, with the machine's monotonic time.

A line is written before the step that it announces and after the answer that it tells, so that whatever a kill cuts off
is in doubt, and nothing else is.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from millpond.errors import LeaseLost, MillpondError, StoreBusy, StoreUnreachable, TooManyConsumers


class Journal:
    """A file of events that only its own process writes."""

    def __init__(self, folder: str, role: str) -> None:
        name = f"{role}-{os.getpid()}-{time.monotonic_ns()}.journal"
        self._file = os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(self, event: str, **fields: Any) -> None:
        """One line, out of this process's hands when this returns."""
        line = json.dumps({"at": time.monotonic_ns(), "event": event, **fields}) + "\n"
        os.write(self._file, line.encode())

    @contextlib.contextmanager
    def answer(self, event: str, **fields: Any) -> Iterator[None]:
        """An answer for a message: ``event`` before it, and after it ``…:done``, ``…:refused`` (it certainly was not
        carried out) or ``…:doubt``. What Millpond raises ends here."""
        self.note(event, **fields)
        try:
            yield
        except LeaseLost as error:
            # Such an error says that an earlier try of the same answer may have been what settled the message.
            certain = "earlier try" not in str(error)
            self.note(f"{event}:refused" if certain else f"{event}:doubt", error=str(error), **fields)
        except MillpondError as error:
            self.note(f"{event}:doubt", error=f"{type(error).__name__}: {error}", **fields)
        else:
            self.note(f"{event}:done", **fields)


CERTAIN = (StoreUnreachable, StoreBusy, TooManyConsumers)
"""Errors that say that nothing was done."""


def read(folder: Path) -> list[dict[str, Any]]:
    """All events, in order of time. A line that a kill cut off counts for nothing."""
    events: list[dict[str, Any]] = []
    for path in folder.glob("*.journal"):
        role = path.name.partition("-")[0]
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                events.append({"by": path.name, "role": role, **json.loads(line)})
    events.sort(key=lambda event: event["at"])
    return events
