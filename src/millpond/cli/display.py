"""What ``work`` shows while it runs: the commands' output, and on a terminal one line of progress beneath it.

Everything is written by one thread, so that a terminal that somebody paused, or a slow reader, holds up the commands
that write but never the event loop, which has leases to renew.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import IO

from millpond.cli.output import is_terminal

CLEAR_LINE = b"\r\x1b[2K"


class Display:
    """Output of the commands, and the progress line where a person watches stderr."""

    def __init__(self, *, progress: bool) -> None:
        self._stdout: IO[bytes] = sys.stdout.buffer
        self._stderr: IO[bytes] = sys.stderr.buffer
        self.progress = progress and is_terminal(sys.stderr)
        self.pipe_stdout = self.progress and is_terminal(sys.stdout)
        """The commands' stdout shares the screen with the progress line, so it has to pass through here."""
        self._line = b""
        self._broken = False
        self._drawing: asyncio.Future[None] | None = None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="millpond-output")

    async def stdout(self, data: bytes) -> None:
        """Output of a command."""
        await self._through(self._stdout, data)

    async def stderr(self, data: bytes) -> None:
        """Errors of a command."""
        await self._through(self._stderr, data)

    async def _through(self, stream: IO[bytes], data: bytes) -> None:
        if not self._broken:
            await asyncio.get_running_loop().run_in_executor(self._writer, self._write, stream, data)

    def _write(self, stream: IO[bytes], data: bytes) -> None:
        try:
            if self._line:
                self._stderr.write(CLEAR_LINE)
                self._stderr.flush()
            stream.write(data)
            if self.progress and not data.endswith(b"\n"):
                stream.write(b"\n")  # or the progress line would wipe it out
            stream.flush()
            if self._line:
                self._stderr.write(self._line)
                self._stderr.flush()
        except (OSError, ValueError):
            # Nobody reads any more, the terminal is gone, or the disk of a log is full. That is no reason to stop the
            # work, still less to leave a message unanswered whose command is done.
            self._broken = True

    def draw(self, text: str) -> None:
        """Show this as the progress line; left out while the screen does not keep up."""
        if not self.progress or self._broken or (self._drawing is not None and not self._drawing.done()):
            return
        width = shutil.get_terminal_size().columns - 1
        line = CLEAR_LINE + text[:width].encode("utf-8", "replace")
        self._drawing = asyncio.get_running_loop().run_in_executor(self._writer, self._redraw, line)

    def _redraw(self, line: bytes) -> None:
        self._line = line
        try:
            self._stderr.write(line)
            self._stderr.flush()
        except (OSError, ValueError):
            self._broken = True

    async def note(self, text: str) -> None:
        """A line of our own on stderr."""
        await self.stderr(f"millpond: {text}\n".encode("utf-8", "replace"))

    async def close(self) -> None:
        """Take the progress line away."""
        if self._line and not self._broken:
            await asyncio.get_running_loop().run_in_executor(self._writer, self._redraw, CLEAR_LINE)
            self._line = b""
        self._writer.shutdown(wait=not self._broken)
