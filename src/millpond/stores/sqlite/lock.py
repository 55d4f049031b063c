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
        if not self.try_line_up():
            return False
        if self.try_enter():
            return True
        self.step_back()
        return False

    def acquire(self) -> None:
        """Wait in line for it, as long as it takes."""
        self.line_up()
        self.enter()

    # The two halves, for whoever wants to do something between them.

    def try_line_up(self) -> bool:
        """Become the next in line if nobody is. To be followed by ``enter`` or ``step_back``."""
        try:
            fcntl.flock(self._turn, _TRY)
        except BlockingIOError:
            return False
        return True

    def line_up(self) -> None:
        """Wait until this is the next in line. To be followed by ``enter`` or ``step_back``."""
        fcntl.flock(self._turn, fcntl.LOCK_EX)

    def step_back(self) -> None:
        """Be the next in line no longer."""
        fcntl.flock(self._turn, fcntl.LOCK_UN)

    def try_enter(self) -> bool:
        """As the next in line: take it if it is free, and let somebody else be next; otherwise nothing changes."""
        try:
            fcntl.flock(self._write, _TRY)
        except BlockingIOError:
            return False
        fcntl.flock(self._turn, fcntl.LOCK_UN)
        return True

    def enter(self) -> None:
        """As the next in line: wait for it, as long as it takes, and let somebody else be next."""
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
