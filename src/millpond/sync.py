"""The same API for synchronous code: one event loop in a background thread, and one portal into it.

Nothing is implemented twice. Every object that the asynchronous API returns is handed out inside a thin proxy: calling
one of its coroutines runs it on the loop and waits, its async iterators become iterators, everything else is passed
through. A call that is interrupted (Ctrl-C) is cancelled on the loop, too.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from millpond.errors import StoreClosed, StoreError
from millpond.message import Message, MessageState, MessageView
from millpond.pond import DEFAULT_URL, Pond, connect
from millpond.queue import DeadLetters, Queue

if TYPE_CHECKING:
    from millpond.crypto.keyring import Keyring
    from millpond.model.clock import Clock
    from millpond.service.config import Config


class Portal:
    """A background event loop and the way into it."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="millpond portal", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()

    def run(self, awaitable: Awaitable[Any]) -> Any:
        """Run on the loop and wait for the result. Raises what it raises."""

        async def call() -> Any:
            return await awaitable

        if self.forked:
            # The thread stayed behind in the parent, and with it whoever could answer.
            if inspect.iscoroutine(awaitable):
                awaitable.close()
            raise StoreError("this pond was opened before this process forked; open it anew in the child")
        if self._loop.is_closed():
            if inspect.iscoroutine(awaitable):
                awaitable.close()
            raise StoreClosed("this pond is closed")
        if threading.current_thread() is self._thread:
            if inspect.iscoroutine(awaitable):
                awaitable.close()
            raise RuntimeError("a synchronous call from the pond's own loop would wait for itself")
        future = asyncio.run_coroutine_threadsafe(call(), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    @property
    def forked(self) -> bool:
        """This is a child of the process that started it."""
        return self._process != os.getpid()

    def close(self) -> None:
        """End the loop and its thread. Safe to repeat."""
        if self.forked or self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


_PROXIED = (Queue, Message, MessageState, MessageView, DeadLetters)


class Synchronous:
    """An object of the asynchronous API, seen from synchronous code: the same names without ``await``."""

    __slots__ = ("_portal", "_target")

    def __init__(self, portal: Portal, target: Any) -> None:
        self._portal = portal
        self._target = target

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


def _inside(value: Any) -> Any:
    """The object behind a proxy, also in lists and tuples of arguments."""
    if isinstance(value, Synchronous):
        return value._target
    if isinstance(value, list):
        return [_inside(each) for each in value]
    return value


def _outside(portal: Portal, value: Any) -> Any:
    """What synchronous code gets in place of ``value``."""
    if isinstance(value, _PROXIED):
        return Synchronous(portal, value)
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
    while True:
        try:
            value = portal.run(anext(source))
        except StopAsyncIteration:
            return
        yield value


class SyncPond(Synchronous):
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
) -> SyncPond:
    """As `millpond.connect`, for synchronous code: ``with millpond.connect_sync(url) as pond: …``."""
    return SyncPond(connect(url, keyring=keyring, config=config, clock=clock, accept_plain=accept_plain))
