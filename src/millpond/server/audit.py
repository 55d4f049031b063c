"""Who destroyed what: one line of JSON for each call that cannot be undone or changes what others may do.

Lines go to a file of their own, or to the log ``millpond.audit``. Written before the answer is sent: whoever was told
that something is gone finds it here.
"""

from __future__ import annotations

import logging
import os
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from millpond.errors import InvalidInput
from millpond.model.clock import Clock
from millpond.server.auth import Identity

log = logging.getLogger("millpond.audit")

MOST_IDS = 100
"""Message ids in one line; of more than that their number must do."""


class Who(NamedTuple):
    """Who asked."""

    identity: Identity
    address: str
    correlation_id: str


class Audit:
    """Writes the audit log."""

    def __init__(self, clock: Clock, path: str | None = None) -> None:
        """``path`` None: to the log. Raises InvalidInput when the file cannot be written."""
        self._clock = clock
        self._path = path
        self._descriptor: int | None = None
        self.reopen()

    def reopen(self) -> None:
        """Go on in the file that has the path now: after `logrotate` moved the old one. Raises InvalidInput, and goes
        on in the old one then."""
        if self._path is None:
            return
        try:
            opened = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InvalidInput(
                f"audit log {self._path} cannot be written: {error.strerror or error}; set log.audit to another file"
            ) from error
        self.close()
        self._descriptor = opened

    def close(self) -> None:
        """Close the file. Safe to repeat."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def note(self, action: str, who: Who | None, **fields: Any) -> None:
        """One line: ``action`` such as ``queue.purge``, by whom (None: by the server itself), and on what. Of long
        lists of ids the first are kept."""
        entry: dict[str, Any] = {"at": _text(self._clock.now_ms()), "action": action}
        if who is not None:
            entry["who"] = who.identity.name or who.identity.kind
            entry["kind"] = who.identity.kind
            entry["id"] = who.identity.id
            entry["address"] = who.address
            entry["correlation_id"] = who.correlation_id
        ids = fields.get("ids")
        if ids is not None and len(ids) > MOST_IDS:
            fields |= {"ids": list(ids[:MOST_IDS]), "more_ids": len(ids) - MOST_IDS}
        entry |= {name: value for name, value in fields.items() if value is not None}
        if self._descriptor is None:
            log.info("millpond.audit", extra={"entry": entry})
            return
        line = msgspec.json.encode(entry) + b"\n"
        try:
            written = os.write(self._descriptor, line)
        except OSError as error:
            written, reason = 0, error.strerror or str(error)
        else:
            reason = "the disk took only a part of the line"
        if written != len(line):
            # It has happened already; what can be done is to tell of it in the other place.
            log.error("millpond.audit.not_written", extra={"entry": entry, "reason": reason})


def _text(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
