"""Fair turns for the writers of one database file.

SQLite's own waiting is a sleep and another try: with a few busy processes one of them loses every race and was seen to
starve for seconds. Here each writer passes a turnstile made of two lock files: it takes ``turn`` (so at most one writer
is next in line), then ``write``, then gives ``turn`` back. A writer that has just finished therefore cannot overtake
the one that waits. The kernel drops both locks when a process dies, however it dies.
"""

from __future__ import annotations

import fcntl
import os

_TRY = fcntl.LOCK_EX | fcntl.LOCK_NB


class Turnstile:
    """The right to write, one holder at a time among all processes and stores on a file.

    Not re-entrant. ``acquire`` blocks and belongs in a thread; a holder may release from another thread.
    """

    def __init__(self, directory: str, mode: int) -> None:
        """Open (and create, with permission bits ``mode``) the lock files in ``directory``. Raises OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._turn = os.open(os.path.join(directory, "turn.lock"), flags, mode)
        try:
            self._write = os.open(os.path.join(directory, "write.lock"), flags, mode)
        except OSError:
            os.close(self._turn)
            raise

    def try_acquire(self) -> bool:
        """Take it if that needs no waiting and nobody waits already."""
        try:
            fcntl.flock(self._turn, _TRY)
        except BlockingIOError:
            return False
        try:
            fcntl.flock(self._write, _TRY)
        except BlockingIOError:
            return False
        finally:
            fcntl.flock(self._turn, fcntl.LOCK_UN)
        return True

    def acquire(self) -> None:
        """Wait in line for it, as long as it takes."""
        fcntl.flock(self._turn, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._write, fcntl.LOCK_EX)
        finally:
            fcntl.flock(self._turn, fcntl.LOCK_UN)

    def release(self) -> None:
        """Give it to the next in line."""
        fcntl.flock(self._write, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close the files. In a forked child this leaves the parent's locks alone: they end with its last descriptor,
        and a child that kept one would hold on to them after the parent's death."""
        os.close(self._turn)
        os.close(self._write)
