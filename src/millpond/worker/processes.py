"""Processes for handlers that burn CPU: each call runs in a child that does nothing else, one call at a time.

Why not a `ProcessPoolExecutor`: when one of its processes dies, everything that it had under way fails with it, and it
cannot end a single call. Here a child that is killed, or kills itself, is one failure of the one message that it had,
and to cancel a call is to kill its child. Children are spawned, never forked: a fork copies the locks of other threads
and the store's connections. They end when their pipe does, whatever became of the worker.
"""

from __future__ import annotations

import asyncio
import importlib
import multiprocessing
import pickle
import queue
import signal
from multiprocessing.connection import Connection
from typing import Any, Literal

from millpond.errors import InvalidInput, MillpondError
from millpond.message import Lease
from millpond.worker.binding import Bound, Unfit
from millpond.worker.failures import details
from millpond.worker.outcomes import HandlerAnswer
from millpond.worker.registry import Consumer
from millpond.worker.threads import Call

Verdict = Literal["done", "unfit", "raised"]


class ProcessDied(MillpondError):
    """The process in which the handler ran has died."""

    code = "process_died"


class RaisedInProcess(Exception):
    """The handler raised, in another process."""

    def __init__(self, found: dict[str, Any], original: BaseException | None) -> None:
        super().__init__(found["message"])
        self.details = found
        """As `millpond.worker.failures.details` made it there."""
        self.original = original
        """What was raised; None when it could not be sent."""


def find(module: str, name: str) -> Any:
    """The function of that name; where a decorator has put something in its place, what that wraps. Raises ImportError,
    AttributeError."""
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def address(consumer: Consumer) -> tuple[str, str]:
    """Where a child finds the handler. Raises InvalidInput when it cannot."""
    handler = consumer.handler
    module, name = getattr(handler, "__module__", None), getattr(handler, "__qualname__", None)
    text = (
        f"the handler of consumer {consumer.name!r} cannot be imported by a process: it must be a function of a module"
    )
    if not isinstance(module, str) or not isinstance(name, str):
        raise InvalidInput(text)
    try:
        found = find(module, name)
    except (ImportError, AttributeError) as error:
        raise InvalidInput(f"{text} ({error})") from error
    if found is not handler and getattr(found, "__wrapped__", None) is not handler:
        raise InvalidInput(f"{text}, and {module}.{name} is something else")
    try:
        pickle.dumps(consumer.type)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise InvalidInput(f"the type of consumer {consumer.name!r} cannot be sent to a process: {error}") from error
    return module, name


def serve(pipe: Connection, module: str, name: str, kind: Any) -> None:
    """The child: calls the handler until the pipe ends."""
    # Whether and when to stop is the worker's decision; terminals and service managers signal the whole group.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    found = find(module, name)
    wrapped = getattr(found, "__wrapped__", None)
    handler = found if wrapped is None else wrapped
    bound = Bound(Consumer(name=name, queue=name, namespace=None, handler=handler, type=kind, run_in="process"))
    while True:
        try:
            payload, content_type, lease = pipe.recv()
        except EOFError:
            return
        pipe.send_bytes(_answer(bound, payload, content_type, lease))


def _answer(bound: Bound, payload: bytes, content_type: str | None, lease: Lease) -> bytes:
    try:
        arguments: dict[str, Any] = {name: lease for name, _ in bound.specials}
        value = None if bound.payload is None else bound.decode(payload, content_type)
        result = bound.call(value, arguments)
        return pickle.dumps(("done", result, None))
    except Unfit as error:
        return pickle.dumps(("unfit", str(error), None))
    except BaseException as error:  # all that a handler may raise; SystemExit as well
        found = details(error)
        # An exception may take what a pickle does not bring, and tell only when it is read: so that is tried here.
        try:
            sent = pickle.dumps(("raised", found, error.with_traceback(None)))
            pickle.loads(sent)
            return sent
        except Exception:  # from the exception's own code; its details say what there is to know
            return pickle.dumps(("raised", found, None))


class Child:
    """One process, one call at a time."""

    def __init__(self, module: str, name: str, kind: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=serve, args=(theirs, module, name, kind), name=f"millpond {name}", daemon=True
        )
        try:
            self._process.start()
        finally:
            theirs.close()

    @property
    def alive(self) -> bool:
        """It can be given a call."""
        return self._process.is_alive()

    def call(self, payload: bytes, content_type: str | None, lease: Lease) -> tuple[Verdict, Any, BaseException | None]:
        """Have it handle one message. Raises ProcessDied."""
        try:
            self._pipe.send((payload, content_type, lease))
            found: tuple[Verdict, Any, BaseException | None] = pickle.loads(self._pipe.recv_bytes())
            return found
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode or 0
            how = f"exit code {code}" if code >= 0 else f"killed by {_signal_name(-code)}"
            raise ProcessDied(f"the handler's process died ({how})") from None

    def kill(self) -> None:
        """End it now."""
        self._process.kill()

    def close(self) -> None:
        """End it, and leave nothing behind."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self._pipe.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Processes:
    """The children of one consumer: as many as there are calls at the same time."""

    def __init__(self, consumer: Consumer) -> None:
        """Raises InvalidInput when the handler cannot be imported."""
        self._where = address(consumer)
        self._kind = consumer.type
        self._free: queue.SimpleQueue[Child] = queue.SimpleQueue()
        self._all: set[Child] = set()

    def run(self, call: Call, payload: bytes, content_type: str | None, lease: Lease) -> Any:
        """In a thread: the handler's result. Raises what it raises: Unfit, Retry, GiveUp and Defer as they are, others
        as RaisedInProcess; ProcessDied, and CancelledError when it was interrupted."""
        child = self._child()
        killed = False

        def kill() -> None:
            nonlocal killed
            killed = True
            child.kill()

        call.stop_by(kill)
        try:
            verdict, value, original = child.call(payload, content_type, lease)
        except ProcessDied:
            self._all.discard(child)
            call.end()
            child.close()
            if killed:
                raise asyncio.CancelledError from None
            raise
        call.end()  # an interruption that comes now must not kill a child that has another call
        if killed:
            self._all.discard(child)
            child.close()
            raise asyncio.CancelledError
        self._free.put(child)
        if verdict == "done":
            return value
        if verdict == "unfit":
            raise Unfit(value)
        if isinstance(original, HandlerAnswer):
            raise original
        raise RaisedInProcess(value, original)

    def _child(self) -> Child:
        while True:
            try:
                child = self._free.get_nowait()
            except queue.Empty:
                child = Child(*self._where, self._kind)
                self._all.add(child)
                return child
            if child.alive:
                return child
            self._all.discard(child)
            child.close()

    def close(self) -> None:
        """End all children, and what is still under way in them."""
        while not self._free.empty():
            child = self._free.get()
            self._all.discard(child)
            child.close()
        for child in list(self._all):
            child.kill()  # whoever calls it cleans up
