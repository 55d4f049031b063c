"""One thread that does blocking work for an event loop, one thing after another."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def tell(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *arguments: object) -> None:
    """Have the loop call back, from any thread; nothing when the loop was closed, for then nobody waits any more."""
    try:
        loop.call_soon_threadsafe(callback, *arguments)
    except RuntimeError:
        if not loop.is_closed():
            raise


class Background:
    """A daemon thread with a queue of work; a program that forgets to stop it still exits."""

    def __init__(self, name: str) -> None:
        self._work: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def _main(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    def post(self, work: Callable[[], object]) -> None:
        """Do ``work`` when all before it is done. It must not raise."""
        self._work.put(work)

    def call(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Do ``work`` when all before it is done; its result or exception is the future's."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            try:
                result = work()
            except BaseException as error:  # it is the waiter's
                tell(loop, settle, None, error)
            else:
                tell(loop, settle, result, None)

        self._work.put(run)
        return future

    def stop(self) -> None:
        """End the thread when all before is done."""
        self._work.put(None)
