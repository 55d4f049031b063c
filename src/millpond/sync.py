"""The same API for synchronous code: one event loop in a background thread, and one portal into it.

Nothing is implemented twice. Every object that the asynchronous API returns is handed out inside a thin proxy: calling
one of its coroutines runs it on the loop and waits, its async iterators become iterators, everything else is passed
through. A call that is interrupted (Ctrl-C) is cancelled on the loop, too. What type checkers know of the proxies is
in ``sync_types.pyi``, which is written from the asynchronous classes.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, KeysView, ValuesView
from concurrent.futures import CancelledError, Future
from types import TracebackType
from typing import TYPE_CHECKING, Any

from millpond.connecting import connect
from millpond.errors import StoreClosed, StoreError
from millpond.message import Message, MessageState, MessageView
from millpond.pond import DEFAULT_URL, Pond
from millpond.queue import DeadLetters, Queue
from millpond.stream import MessageStream
from millpond.worker.tasks import TaskHandle

if TYPE_CHECKING:
    from millpond.crypto.keyring import Keyring
    from millpond.model.clock import Clock
    from millpond.service.config import Config
    from millpond.sync_types import (
        PondCalls,
        SyncDeadLetters,
        SyncMessage,
        SyncMessageState,
        SyncMessageStream,
        SyncMessageView,
        SyncQueue,
        SyncTaskHandle,
    )


__all__ = [
    "SyncDeadLetters",
    "SyncMessage",
    "SyncMessageState",
    "SyncMessageStream",
    "SyncMessageView",
    "SyncPond",
    "SyncQueue",
    "SyncTaskHandle",
    "connect_sync",
]


class Portal:
    """A background event loop and the way into it. Loop and thread begin with the first call."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._mutex = threading.Lock()
        """Guards what follows: no call is put on a loop that has ended, where it would wait for ever."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self.closing = threading.Lock()
        """Held by whoever closes what runs here, so that a second one waits for the first to be done."""

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
            # Calls of other threads that are still under way end here, and their callers are told.
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()

    def _submit(self, awaitable: Awaitable[Any]) -> Future[Any]:
        async def call() -> Any:
            return await awaitable

        if self.forked:
            # The thread stayed behind in the parent, and with it whoever could answer.
            _discard(awaitable)
            raise StoreError("this pond was opened before this process forked; open it anew in the child")
        with self._mutex:
            if self._closed:
                _discard(awaitable)
                raise StoreClosed("this pond is closed")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._serve, args=(self._loop,), name="millpond portal", daemon=True
                )
                self._thread.start()
            future = asyncio.run_coroutine_threadsafe(call(), self._loop)
        # One that was cancelled before its first step has never looked at what it was to wait for.
        future.add_done_callback(lambda _: _discard(awaitable))
        return future

    def run(self, awaitable: Awaitable[Any]) -> Any:
        """Run on the loop and wait for the result. Raises what it raises, and StoreClosed when the loop ends first."""
        if threading.current_thread() is self._thread:
            _discard(awaitable)
            raise RuntimeError("a synchronous call from the pond's own loop would wait for itself")
        future = self._submit(awaitable)
        try:
            return future.result()
        except CancelledError:
            if not self._closed:
                raise
            raise StoreClosed("the pond was closed while this call was under way") from None
        except BaseException:
            future.cancel()
            raise

    def forget(self, awaitable: Awaitable[Any]) -> None:
        """Run on the loop without waiting, from any thread; nothing when the loop has ended."""
        with contextlib.suppress(StoreClosed):
            self._submit(awaitable)

    def close(self) -> None:
        """End the loop and its thread. Safe to repeat; does nothing in a forked child."""
        if self.forked:
            return
        with self._mutex:
            begun, self._closed = self._closed, True  # first, so that whom the end of the loop meets knows why
            if not begun and self._loop is not None:
                self._loop.call_soon_threadsafe(self._loop.stop)
        if self._thread is not None:
            self._thread.join()

    @property
    def forked(self) -> bool:
        """This is a child of the process that made it."""
        return self._process != os.getpid()


def _discard(awaitable: Awaitable[Any]) -> None:
    if inspect.iscoroutine(awaitable) and inspect.getcoroutinestate(awaitable) == inspect.CORO_CREATED:
        awaitable.close()


class Synchronous:
    """An object of the asynchronous API, seen from synchronous code: the same names without ``await``."""

    __slots__ = ("_portal", "_target")

    def __init__(self, portal: Portal, target: Any) -> None:
        self._portal = portal
        self._target = target

    if not TYPE_CHECKING:  # A type checker goes by millpond.sync_types, where a wrong name is wrong.

        def __getattr__(self, name: str) -> Any:
            return _outside(self._portal, getattr(self._target, name))

    def __dir__(self) -> list[str]:
        return dir(self._target)

    def __repr__(self) -> str:
        return f"<synchronous {self._target!r}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Synchronous) and other._target is self._target

    def __hash__(self) -> int:
        return id(self._target)


if not TYPE_CHECKING:

    class PondCalls:
        """What `Pond` and `SyncPond` have in common; for type checkers only."""

        __slots__ = ()

    class SyncQueue(Synchronous):
        """`Queue`, for synchronous code."""

        __slots__ = ()

    class SyncMessage(Synchronous):
        """`Message`, for synchronous code."""

        __slots__ = ()

    class SyncMessageState(Synchronous):
        """`MessageState`, for synchronous code."""

        __slots__ = ()

    class SyncMessageView(Synchronous):
        """`MessageView`, for synchronous code."""

        __slots__ = ()

    class SyncMessageStream(Synchronous):
        """`MessageStream`, for synchronous code: ``with queue.stream() as messages: for message in messages: …``."""

        __slots__ = ()

        def __enter__(self) -> SyncMessageStream:
            self._portal.run(self._target.__aenter__())
            return self

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
        ) -> None:
            self._portal.run(self._target.__aexit__(kind, error, traceback))

        def __iter__(self) -> SyncMessageStream:
            return self

        def __next__(self) -> SyncMessage:
            return _outside(self._portal, self._portal.run(self._target.__anext__()))

    class SyncTaskHandle(Synchronous):
        """`TaskHandle`, for synchronous code."""

        __slots__ = ()

    class SyncDeadLetters(Synchronous):
        """`DeadLetters`, for synchronous code."""

        __slots__ = ()


PROXIES: dict[type, Any] = {
    Queue: SyncQueue,
    Message: SyncMessage,
    MessageState: SyncMessageState,
    MessageView: SyncMessageView,
    MessageStream: SyncMessageStream,
    DeadLetters: SyncDeadLetters,
    TaskHandle: SyncTaskHandle,
}
"""What synchronous code gets for an object of these classes."""


def _inside(value: Any) -> Any:
    """The object behind a proxy, also in what an argument holds; what is drawn from an iterator, as it is drawn."""
    if isinstance(value, Synchronous):
        return value._target
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(map(_inside, value))
    if isinstance(value, (KeysView, ValuesView)):
        return [_inside(each) for each in value]
    if isinstance(value, Iterator) and not hasattr(value, "read"):
        return map(_inside, value)
    return value


def _outside(portal: Portal, value: Any) -> Any:
    """What synchronous code gets in place of ``value``."""
    proxy = PROXIES.get(type(value))
    if proxy is not None:
        return proxy(portal, value)
    if type(value) is list:
        return [_outside(portal, each) for each in value]
    if isinstance(value, AsyncIterator):
        return _iterate(portal, value)
    if inspect.ismethod(value):
        return _method(portal, value)
    return value


def _method(portal: Portal, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        result = method(*map(_inside, args), **{name: _inside(value) for name, value in kwargs.items()})
        if inspect.isawaitable(result):
            result = portal.run(result)
        return _outside(portal, result)

    call.__name__ = method.__name__
    call.__doc__ = method.__doc__
    return call


def _iterate(portal: Portal, source: AsyncIterator[Any]) -> Iterator[Any]:
    try:
        while True:
            try:
                value = portal.run(anext(source))
            except StopAsyncIteration:
                return
            yield value
    finally:
        # Whoever stops early releases at once what the source holds. Not waited for: the garbage collector may be the
        # one who stops, in any thread.
        close = getattr(source, "aclose", None)
        if close is not None:
            portal.forget(close())


class SyncPond(Synchronous, PondCalls):
    """A pond for synchronous code. Use as ``with``; safe for any number of threads."""

    __slots__ = ()

    def __init__(self, pond: Pond) -> None:
        super().__init__(Portal(), pond)

    def open(self) -> SyncPond:
        """Open the store; ``with`` does it. Raises StoreError."""
        try:
            self._portal.run(self._target.open())
        except BaseException:
            self._portal.close()
            raise
        return self

    def close(self) -> None:
        """As `Pond.close`; safe to repeat."""
        if self._portal.forked:
            return
        with self._portal.closing:
            try:
                self._portal.run(self._target.close())
            except StoreClosed:
                return  # Closed before.
            finally:
                self._portal.close()

    def __enter__(self) -> SyncPond:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def connect_sync(
    url: str = DEFAULT_URL,
    *,
    keyring: Keyring | None = None,
    config: Config | None = None,
    clock: Clock | None = None,
    accept_plain: bool = False,
    token: str | None = None,
    ca: str | None = None,
    cert: str | None = None,
    key: str | None = None,
    timeout: float | None = None,
) -> SyncPond:
    """As `millpond.connect`, for synchronous code: ``with millpond.connect_sync(url) as pond: …``."""
    return SyncPond(
        connect(
            url,
            keyring=keyring,
            config=config,
            clock=clock,
            accept_plain=accept_plain,
            token=token,
            ca=ca,
            cert=cert,
            key=key,
            timeout=timeout,
        )
    )
