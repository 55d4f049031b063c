"""From a handler's signature to a call: which parameter is the payload and how it is decoded, and what the others get.

Looked at when a worker starts, when everything that annotations name exists. What cannot work is refused then, not at
the first message.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import msgspec.inspect

from millpond.errors import InvalidInput
from millpond.message import Lease, Message, MessageState
from millpond.pond import Pond
from millpond.queue import Queue
from millpond.service.payloads import JSON, MSGPACK
from millpond.sync import SyncMessage, SyncMessageState, SyncPond, SyncQueue
from millpond.worker.hooks import Context
from millpond.worker.registry import Consumer, RunIn

Decode = Callable[[bytes, str | None], Any]

ASYNCHRONOUS = (Message, MessageState, Queue, Pond)
SYNCHRONOUS = (SyncMessage, SyncMessageState, SyncQueue, SyncPond)
SPECIAL: tuple[type, ...] = (*ASYNCHRONOUS, *SYNCHRONOUS, Lease, Context)
"""What a parameter gets by its annotation alone."""


class Unfit(Exception):
    """The payload is not what the handler takes."""


class Bound:
    """A consumer with its handler's parameters looked through."""

    def __init__(self, consumer: Consumer) -> None:
        """Raises InvalidInput for a handler that cannot be called with what there is."""
        self.consumer = consumer
        self.handler = consumer.handler
        self.asynchronous = is_coroutine_function(self.handler)
        self.run_in: RunIn = consumer.run_in or ("loop" if self.asynchronous else "thread")
        if inspect.isgeneratorfunction(self.handler) or inspect.isasyncgenfunction(self.handler):
            raise self._wrong("it is a generator: calling it would do nothing")
        if (self.run_in == "loop") is not self.asynchronous:
            raise self._wrong(
                f"run_in={self.run_in!r} does not go with it: coroutine functions run on the loop, others in threads "
                f"or processes"
            )
        self.specials: list[tuple[str, type]] = []
        """Parameters that are filled by annotation, with the class that they name."""
        self.payload: str | None = None
        """The parameter that gets the payload; None when the handler does not want it."""
        self._positional = True
        self._type: Any = consumer.type
        self._look()
        self.decode: Decode = decoder(self._type, self._wrong)
        self.plain = bool(self.payload) and not self.specials and self._positional
        """The handler is called with the payload alone."""

    def call(self, value: Any, specials: dict[str, Any]) -> Any:
        """Call the handler; for coroutine functions, what is to be awaited."""
        if self.payload is None:
            return self.handler(**specials)
        if self._positional:
            return self.handler(value, **specials)
        return self.handler(**specials, **{self.payload: value})

    def _wrong(self, text: str) -> InvalidInput:
        return InvalidInput(f"the handler of consumer {self.consumer.name!r}: {text}")

    def _look(self) -> None:
        try:
            parameters = inspect.signature(self.handler).parameters
            function = self.handler
            while isinstance(function, functools.partial):
                function = function.func
            if not (inspect.isfunction(function) or inspect.ismethod(function)):
                function = type(function).__call__
            hints = typing.get_type_hints(function, include_extras=True)
        except (TypeError, ValueError, NameError) as error:
            raise self._wrong(f"its parameters cannot be told: {error}") from error
        for name, parameter in parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            hint = hints.get(name)
            if isinstance(hint, type) and issubclass(hint, SPECIAL):
                self._special(name, hint)
            elif self.payload is None:
                self.payload = name
                if self._type is None:
                    self._type = hint
            elif parameter.default is parameter.empty:
                raise self._wrong(
                    f"parameter {name!r} is filled by nothing: one is the payload ({self.payload!r}), the others are "
                    f"annotated with Message, Lease, MessageState, Context, Queue or Pond"
                )
            if name == self.payload:
                self._positional = parameter.kind is not parameter.KEYWORD_ONLY
                if self._positional and self.specials:
                    self._positional = False  # it is not the first: by name
            if parameter.kind is parameter.POSITIONAL_ONLY and (name != self.payload or not self._positional):
                raise self._wrong(f"parameter {name!r} can only be given by position; the payload alone can be, first")

    def _special(self, name: str, hint: type) -> None:
        if self.run_in == "process" and not issubclass(hint, Lease):
            raise self._wrong(
                f"parameter {name!r}: in a process of its own there is no {hint.__name__}, only the payload and Lease"
            )
        if not self.asynchronous and issubclass(hint, ASYNCHRONOUS):
            raise self._wrong(f"parameter {name!r}: a function that is no coroutine takes Sync{hint.__name__}")
        if self.asynchronous and issubclass(hint, SYNCHRONOUS):
            better = hint.__name__.removeprefix("Sync")
            raise self._wrong(f"parameter {name!r}: a coroutine function takes {better}, which does not block the loop")
        self.specials.append((name, hint))


def is_coroutine_function(handler: Any) -> bool:
    """Calling it gives a coroutine; also for partials, methods and objects with an asynchronous ``__call__``."""
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(getattr(handler, "__call__", None))  # noqa: B004


def decoder(kind: Any, wrong: Callable[[str], InvalidInput] = InvalidInput) -> Decode:
    """How a payload becomes a ``kind``; it raises Unfit. Raises InvalidInput for a kind that nothing decodes.

    bytes: as it is. str: text. None or Any: what the content type says. Others: msgspec's types from JSON or
    MessagePack, pydantic's where its models are meant."""
    if kind is None or kind is Any:
        return _by_content_type
    if kind is bytes:
        return _bytes
    if kind is str:
        return _text
    if _is_pydantic(kind):
        return _pydantic_decoder(kind)
    try:
        from_json, from_msgpack = msgspec.json.Decoder(kind).decode, msgspec.msgpack.Decoder(kind).decode
    except (TypeError, NotImplementedError, NameError) as error:
        raise wrong(f"no payload can be decoded as {kind!r:.200}: {error}") from error
    for strange in _strangers(msgspec.inspect.type_info(kind), set()):
        # msgspec would take it, and then find at every message that it is something else.
        raise wrong(f"no payload can be decoded as {strange!r:.200}; use a Struct, a dataclass or a pydantic model")

    def decode(data: bytes, content_type: str | None) -> Any:
        try:
            return from_msgpack(data) if content_type == MSGPACK else from_json(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Unfit(str(error)) from error

    return decode


def _strangers(info: Any, seen: set[int]) -> Iterator[Any]:
    """The classes within a type that msgspec can check for, but cannot make."""
    if isinstance(info, msgspec.inspect.CustomType):
        yield info.cls
    if isinstance(info, tuple):
        for part in info:
            yield from _strangers(part, seen)
    elif isinstance(info, msgspec.Struct) and id(info) not in seen:
        seen.add(id(info))
        for name in info.__struct_fields__:
            yield from _strangers(getattr(info, name), seen)


def _bytes(data: bytes, content_type: str | None) -> bytes:
    return data


def _text(data: bytes, content_type: str | None) -> str:
    try:
        if content_type == MSGPACK:
            return msgspec.msgpack.decode(data, type=str)
        return msgspec.json.decode(data, type=str) if content_type == JSON else data.decode()
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unfit(str(error)) from error


def _by_content_type(data: bytes, content_type: str | None) -> Any:
    try:
        if content_type == JSON:
            return msgspec.json.decode(data)
        if content_type == MSGPACK:
            return msgspec.msgpack.decode(data)
        return data.decode() if content_type is not None and content_type.startswith("text/plain") else data
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unfit(str(error)) from error


def _is_pydantic(kind: Any) -> bool:
    """A model or dataclass of pydantic's, or something made of them."""
    if isinstance(kind, type) and hasattr(kind, "__pydantic_validator__"):
        return True
    return any(_is_pydantic(part) for part in typing.get_args(kind))


def _pydantic_decoder(kind: Any) -> Decode:
    import pydantic  # it is installed: the type is one of its own

    adapter: Any = pydantic.TypeAdapter(kind)

    def decode(data: bytes, content_type: str | None) -> Any:
        try:
            if content_type == MSGPACK:
                return adapter.validate_python(msgspec.msgpack.decode(data))
            return adapter.validate_json(data)
        except (pydantic.ValidationError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Unfit(str(error)) from error

    return decode
