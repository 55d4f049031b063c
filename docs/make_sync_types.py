"""Writes src/millpond/sync_types.pyi: what type checkers know of the synchronous API.

    python docs/make_sync_types.py          writes the file

The synchronous objects are proxies without methods of their own, so that nothing is implemented twice; nor is a
signature written twice: they are the asynchronous ones without ``async``, with the proxies' names.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from millpond import message, pond, queue, stream
from millpond.worker import catalog, registry, tasks

STUB = Path(__file__).parents[1] / "src" / "millpond" / "sync_types.pyi"
WIDTH = 120

CLASSES: dict[str, tuple[type, ModuleType]] = {
    "SyncMessageState": (message.MessageState, message),
    "SyncMessage": (message.Message, message),
    "SyncMessageView": (message.MessageView, message),
    "SyncMessageStream": (stream.MessageStream, stream),
    "SyncDeadLetters": (queue.DeadLetters, queue),
    "SyncQueue": (queue.Queue, queue),
    "SyncTaskHandle": (tasks.TaskHandle, tasks),
    "PondCalls": (pond.Pond, pond),
}
"""Name for type checkers → the class behind it, and its module. `SyncPond` adds opening and closing to PondCalls."""

BASES: dict[str, list[tuple[type, ModuleType]]] = {
    "PondCalls": [(registry.Registrations, registry), (catalog.Catalog, catalog)]
}
"""Base classes of ours whose methods are offered as well."""

GENERIC = {"SyncTaskHandle": "Generic[R]"}
"""Classes that have a base for type checkers."""

ATTRIBUTES = {
    "SyncTaskHandle": {"id": "str", "duplicate": "bool"},
    "SyncMessageView": {"state": "str"},
    "SyncQueue": {"name": "str", "namespace": "str", "dead_letters": "SyncDeadLetters"},
    "PondCalls": {
        "config": "Config",
        "clock": "Clock",
        "consumers": "dict[str, Consumer]",
        "middleware": "builtins.list[Middleware]",
        "services": "builtins.list[Service]",
    },
}
"""Attributes that are set in ``__init__``, where no annotation says their type."""

OWN = {"PondCalls": {"open", "close"}}
"""What the synchronous class defines itself."""

HIDDEN = {
    "PondCalls": {"store", "ids", "service", "dispatcher", "twin", "register", "consumers", "middleware", "services"}
}
"""What is of use on the pond's own event loop only, and so is not offered."""

IMPORTS = """\
import builtins
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable, Iterator, Sequence
from datetime import datetime, timedelta, tzinfo
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar, Unpack, overload

from millpond.errors import MillpondError
from millpond.message import Lease
from millpond.model.clock import Clock
from millpond.queue import Answer, QueueCounts, Receipt
from millpond.requests import PondRequests
from millpond.service.collector import Collected
from millpond.service.config import Config, EnqueueFields, PolicyFields, QueuePolicy
from millpond.service.ready import Record
from millpond.stores.base import Capabilities, Problem, QueueName
from millpond.worker.catalog import TaskDecorator
from millpond.worker.hooks import Gate, Middleware, Service
from millpond.worker.limits import Limiter
from millpond.worker.periodic import CatchUp
from millpond.worker.registry import Consumer, RunIn
from millpond.worker.retries import RetryPolicy
from millpond.worker.tasks import Call, CoroutineTask, FunctionTask, SendFields, State

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
"""

RENAMED = {
    "MessageState": "SyncMessageState",
    "MessageView": "SyncMessageView",
    "MessageStream": "SyncMessageStream",
    "Message": "SyncMessage",
    "DeadLetters": "SyncDeadLetters",
    "TaskHandle": "SyncTaskHandle",
    "Queue": "SyncQueue",
    "AsyncIterator": "Iterator",
    "list": "builtins.list",
}


def annotation(node: ast.expr | None) -> str:
    """A type as the synchronous side has it."""
    assert node is not None, "every public signature is annotated"
    return re.sub(r"\b(" + "|".join(RENAMED) + r")\b", lambda found: RENAMED[found[0]], ast.unparse(node))


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """The parameters with types and defaults; a default is ``...``, for only the implementation knows it."""
    arguments = function.args
    yield "self"
    plain = [*arguments.posonlyargs, *arguments.args][1:]
    required = len(plain) - len(arguments.defaults)
    for index, each in enumerate(plain):
        yield f"{each.arg}: {annotation(each.annotation)}" + ("" if index < required else " = ...")
        if arguments.posonlyargs and each is arguments.posonlyargs[-1]:
            yield "/"
    if arguments.kwonlyargs:
        yield "*"
    for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield f"{each.arg}: {annotation(each.annotation)}" + ("" if default is None else " = ...")
    if arguments.kwarg is not None:
        yield f"**{arguments.kwarg.arg}: {annotation(arguments.kwarg.annotation)}"


def is_overload(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """One of several signatures; the implementation after them is none."""
    return any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list)


def method(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """The lines of one method or property."""
    for decorator in function.decorator_list:
        yield f"    @{ast.unparse(decorator)}"
    given = list(parameters(function))
    returned = annotation(function.returns)
    overlap = "  # type: ignore[overload-overlap]" if returned.startswith("CoroutineTask") else ""
    end = " ..." if is_overload(function) else ""
    line = f"    def {function.name}({', '.join(given)}) -> {returned}:{end}{overlap}"
    if len(line) <= WIDTH:
        yield line
    else:
        yield f"    def {function.name}({overlap}"
        yield from (f"        {each}," for each in given)
        yield f"    ) -> {returned}:{end}"
    if is_overload(function):
        return
    text = ast.get_docstring(function, clean=True)
    assert text is not None, f"{function.name} has no docstring"
    lines = [*f'"""{text}"""'.splitlines()]
    yield from (f"        {each}".rstrip() for each in lines)
    yield ""


BLOCK = (
    "    def __enter__(self) -> SyncMessageStream: ...",
    "    def __exit__(",
    "        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None",
    "    ) -> None: ...",
    "    def __iter__(self) -> SyncMessageStream: ...",
    "    def __next__(self) -> SyncMessage: ...",
    "",
)
"""What a stream is for: it has no other methods."""


def stub(name: str, cls: type, module: ModuleType) -> Iterator[str]:
    """The lines of one class."""
    yield f"class {name}({GENERIC[name]}):" if name in GENERIC else f"class {name}:"
    yield f'    """`{cls.__name__}`, for synchronous code."""'
    yield ""
    attributes = ATTRIBUTES.get(name, {})
    yield from (f"    {attribute}: {kind}" for attribute, kind in attributes.items())
    if attributes:
        yield ""
    if cls is stream.MessageStream:
        yield from BLOCK
    for kind, where in [(cls, module), *BASES.get(name, [])]:
        tree = ast.parse(inspect.getsource(where))
        [body] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind.__name__]
        overloaded = {
            node.name
            for node in body.body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and is_overload(node)
        }
        for node in body.body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
                continue
            if node.name in overloaded and not is_overload(node):
                continue
            if node.name not in OWN.get(name, ()) and node.name not in HIDDEN.get(name, ()):
                yield from method(node)


def page() -> str:
    """The file's text."""
    lines = [
        '"""What type checkers know of the synchronous API; docs/make_sync_types.py writes it from the other one."""',
        "",
        "from __future__ import annotations",
        "",
        *IMPORTS.splitlines(),
        "",
    ]
    for name, (cls, module) in CLASSES.items():
        lines += stub(name, cls, module)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    STUB.write_text(page(), "utf-8")
