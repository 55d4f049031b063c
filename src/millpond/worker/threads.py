"""Threads for the handlers that are no coroutines.

Threads are made as they are needed, up to the consumer's concurrency, and take calls from one queue. Results go back to
the event loop together: one wake-up however many calls ended. They are daemons: a handler that hangs in a system call
must not keep a worker from ending, and its message comes back all the same.

A call is interrupted by an exception that Python raises in its thread (``CancelledError``, as coroutines get it) at the
next instruction there; a call into C that does not return is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import ctypes
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Have ``error`` raised in a thread at its next instruction; None takes back what was not raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), None if error is None else ctypes.py_object(error)
    )


class Call:
    """A call in a thread."""

    __slots__ = ("_context", "_ended", "_function", "_interrupted", "_lock", "_stop", "_thread", "future")

    def __init__(self, function: Callable[[], Any], loop: asyncio.AbstractEventLoop) -> None:
        self.future: asyncio.Future[Any] = loop.create_future()
        self._function = function
        self._context = contextvars.copy_context()
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._interrupted = False
        self._stop: Callable[[], object] | None = None
        self._ended = False

    def interrupt(self) -> None:
        """Have it end. From the event loop."""
        with self._lock:
            if self._interrupted or self._ended:
                return
            self._interrupted = True
            if self._stop is not None:
                self._stop()
            elif self._thread is not None:
                _raise_in(self._thread, asyncio.CancelledError)

    def stop_by(self, stop: Callable[[], object]) -> None:
        """From the call itself: it is interrupted by calling this, rather than by an exception in its thread. Raises
        CancelledError when it has been interrupted already."""
        with self._lock:
            if self._interrupted:
                raise asyncio.CancelledError
            self._stop = stop

    def end(self) -> None:
        """From the call itself: it is past interrupting."""
        with self._lock:
            self._ended = True

    def run(self) -> tuple[Any, BaseException | None]:
        """In the thread: the result, or what was raised."""
        result: Any = None
        failure: BaseException | None = None
        try:
            try:
                with self._lock:
                    if self._interrupted:
                        raise asyncio.CancelledError
                    self._thread = threading.get_ident()
                result = self._context.run(self._function)
            except BaseException as error:  # also SystemExit: a handler does not end the worker
                failure = error
            self._leave()
        except asyncio.CancelledError as error:  # the interruption came when the function had just ended
            failure = error
            self._leave()
        return result, failure

    def _leave(self) -> None:
        with self._lock:
            self._ended = True
            self._thread = None
        if self._interrupted and self._stop is None:
            _raise_in(threading.get_ident(), None)


class Threads:
    """Runs calls, up to ``limit`` at the same time."""

    def __init__(self, limit: int, name: str) -> None:
        self._limit = limit
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._open = 0
        """Calls that have not ended."""
        self._threads = 0
        self._done: deque[tuple[Call, Any, BaseException | None]] = deque()
        self._told = False

    def start(self, call: Call) -> None:
        """Run it in the next free thread; its future has the outcome."""
        self._open += 1
        if self._threads < self._open and self._threads < self._limit:
            self._threads += 1
            threading.Thread(target=self._serve, name=f"millpond {self._name}", daemon=True).start()
        self._calls.put(call)

    def close(self) -> None:
        """Let idle threads end, and others when their call has."""
        for _ in range(self._threads):
            self._calls.put(None)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            self._done.append((call, *call.run()))
            del call
            # Looked at after appending, and reset before emptying: nothing is left lying.
            if not self._told:
                self._told = True
                with contextlib.suppress(RuntimeError):  # the loop has ended; nobody wants the result
                    self._loop.call_soon_threadsafe(self._collect)

    def _collect(self) -> None:
        self._told = False
        while self._done:
            call, result, failure = self._done.popleft()
            self._open -= 1
            if call.future.done():
                continue
            if failure is None:
                call.future.set_result(result)
            elif isinstance(failure, StopIteration):
                # A future refuses it, as a coroutine would.
                call.future.set_exception(RuntimeError("the handler raised StopIteration"))
            else:
                call.future.set_exception(failure)
