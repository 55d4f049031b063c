"""One command run for one message: started, fed, watched, ended. Nothing here knows of queues.

Why not asyncio's own subprocesses: they cost a thread and three transports a command (500 to 1,400 starts a second
against 2,300 this way, one core), and their ``wait`` may hang on a grandchild that keeps a pipe open. A command is
*done* here when the process that was started ends, whatever it left behind.

Each command leads a session of its own: Ctrl-C at the terminal reaches ``work`` alone, which lets commands finish, and
a command is killed together with what it started.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor

from millpond.model.clock import Clock, TimerHandle

READ_SIZE = 64 * 1024
"""A pipe's usual capacity: one read empties it."""
TAIL_SIZE = 4096
"""Bytes of a command's last words that are kept: a traceback's end, well inside the limit of a last error."""
READS_AFTER_EXIT = 16
"""Reads of a pipe after the command's end: all that it can have left (1 MiB, the largest pipe Linux allows by default),
but not what a process that it left behind goes on writing."""

Sink = Callable[[bytes], Awaitable[object]]
"""Takes output that a command wrote."""


class Child:
    """A running command."""

    def __init__(self, process: subprocess.Popen[bytes], clock: Clock) -> None:
        self._process = process
        self._clock = clock
        self._timers: list[TimerHandle] = []
        self._ended = asyncio.Event()
        self._wakes: set[asyncio.Event] = set()
        self._jobs: list[asyncio.Task[None]] = []
        self._tail: deque[bytes] = deque()
        self._tail_held = 0
        self._killed = False
        self.feed_error: BaseException | None = None
        """Why the payload could not be given to the command in full; it was killed for that."""

    @classmethod
    def start(
        cls,
        argv: Sequence[str],
        environment: Mapping[str, str],
        clock: Clock,
        payload: bytes,
        rest: AsyncIterator[bytes] | None,
        stdout: Sink | None,
        stderr: Sink,
    ) -> Child:
        """Start ``argv``. ``payload``, then ``rest``, is its stdin; ``stdout`` None lets it share ours.

        Raises OSError when it cannot be started.
        """
        pipes: list[int] = []

        def pipe() -> tuple[int, int]:
            ends = os.pipe()
            pipes.extend(ends)
            return ends

        try:
            stdin_read, stdin_write = pipe()
            # What fits into the pipe goes in before the command exists: for most messages that is all there is to feed.
            os.set_blocking(stdin_write, False)
            left = memoryview(payload)[_write(stdin_write, memoryview(payload)) :]
            error_read, error_write = pipe()
            out_read, out_write = pipe() if stdout is not None else (-1, -1)
            process = subprocess.Popen(
                list(argv),
                stdin=stdin_read,
                stdout=out_write if stdout is not None else None,
                stderr=error_write,
                env=environment,
                start_new_session=True,
            )
        except BaseException:
            for descriptor in pipes:
                os.close(descriptor)
            raise
        for descriptor in (stdin_read, error_write, *((out_write,) if stdout is not None else ())):
            os.close(descriptor)
        child = cls(process, clock)
        if left or rest is not None:
            child._job(child._feed(stdin_write, left, rest))
        else:
            os.close(stdin_write)
        child._job(child._pump(error_read, stderr, tail=True))
        if stdout is not None:
            child._job(child._pump(out_read, stdout, tail=False))
        return child

    def _job(self, work: Awaitable[None]) -> None:
        self._jobs.append(asyncio.ensure_future(work))

    @property
    def tail(self) -> str:
        """The end of what the command wrote to stderr."""
        return b"".join(self._tail)[-TAIL_SIZE:].decode("utf-8", "replace")

    async def wait(self, threads: Executor) -> int:
        """The exit code, negative for a signal, once the command has ended and its output is passed on."""
        await self._exit(threads)
        if self._killed:  # its leader is gone; what it started and shielded from SIGTERM goes too
            self._signal(signal.SIGKILL)
        code = self._process.wait()
        for timer in self._timers:
            timer.cancel()
        self._ended.set()
        for wake in self._wakes:
            wake.set()
        await asyncio.gather(*self._jobs)
        return code

    async def _exit(self, threads: Executor) -> None:
        """Until the command has ended; it is not reaped yet where the system can tell without."""
        try:
            descriptor = os.pidfd_open(self._process.pid)
        except (AttributeError, OSError):  # not Linux, an old kernel, or out of descriptors: a thread waits
            await asyncio.get_running_loop().run_in_executor(threads, self._process.wait)
            return
        try:
            await self._ready(descriptor, write=False)
        finally:
            os.close(descriptor)

    def terminate(self, grace: float) -> None:
        """Ask the command and all that it started to end; kill them when they have not after ``grace`` seconds."""
        if self._killed or self._ended.is_set():
            return
        self._killed = True
        self._signal(signal.SIGTERM)
        self._timers.append(self._clock.call_later(grace, self.kill))

    def kill(self) -> None:
        """End the command and all that it started, now."""
        if not self._ended.is_set():
            self._killed = True
            self._signal(signal.SIGKILL)

    def after(self, seconds: float, callback: Callable[[], object]) -> None:
        """Call back unless the command has ended by then."""
        self._timers.append(self._clock.call_later(seconds, callback))

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone already, or (macOS) a zombie
            os.killpg(self._process.pid, number)

    async def _feed(self, descriptor: int, left: memoryview, rest: AsyncIterator[bytes] | None) -> None:
        try:
            await self._write_all(descriptor, left)
            if rest is not None:
                async for chunk in rest:
                    await self._write_all(descriptor, memoryview(chunk))
        except BrokenPipeError:
            pass  # the command does not want (the rest of) it
        except Exception as error:
            # Closing the pipe now would show the command a payload that ends early as if it were whole.
            self.feed_error = error
            self.kill()
        finally:
            os.close(descriptor)

    async def _write_all(self, descriptor: int, data: memoryview) -> None:
        while data:
            data = data[_write(descriptor, data) :]
            if data:
                if self._ended.is_set():
                    raise BrokenPipeError
                await self._ready(descriptor, write=True)

    async def _pump(self, descriptor: int, sink: Sink, *, tail: bool) -> None:
        """Pass on what the command writes, line by line so that commands do not cut into each other's."""
        os.set_blocking(descriptor, False)
        held = b""
        after_exit = 0
        try:
            while after_exit < READS_AFTER_EXIT:
                after_exit += self._ended.is_set()
                try:
                    data = os.read(descriptor, READ_SIZE)
                except BlockingIOError:
                    if self._ended.is_set():
                        break
                    await self._ready(descriptor, write=False)
                    continue
                if not data:
                    break
                if tail:
                    self._keep(data)
                whole, newline, held = (held + data).rpartition(b"\n")
                if len(held) > READ_SIZE:
                    whole, newline, held = whole + newline + held, b"", b""
                if whole or newline:
                    await sink(whole + newline)
            if held:
                await sink(held)
        finally:
            os.close(descriptor)

    async def _ready(self, descriptor: int, *, write: bool) -> None:
        """Until the descriptor can be read, or written, or the command has ended. It is watched no longer than that: a
        descriptor that nobody empties for a while would keep the event loop spinning."""
        loop = asyncio.get_running_loop()
        if self._ended.is_set():
            return
        wake = asyncio.Event()
        self._wakes.add(wake)
        (loop.add_writer if write else loop.add_reader)(descriptor, wake.set)
        try:
            await wake.wait()
        finally:
            (loop.remove_writer if write else loop.remove_reader)(descriptor)
            self._wakes.discard(wake)

    def _keep(self, data: bytes) -> None:
        self._tail.append(data)
        self._tail_held += len(data)
        while self._tail_held - len(self._tail[0]) >= TAIL_SIZE:
            self._tail_held -= len(self._tail.popleft())


def _write(descriptor: int, data: memoryview) -> int:
    """Write what fits; how much that was."""
    if not data:
        return 0
    try:
        return os.write(descriptor, data)
    except BlockingIOError:
        return 0
