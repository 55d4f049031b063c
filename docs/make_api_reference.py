"""Writes docs/reference/api.md from the public names and their docstrings: ``python docs/make_api_reference.py``."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

import millpond
from millpond import errors, testing

PAGE = Path(__file__).parent / "reference" / "api.md"

INTRODUCTION = """\
# The Python API

<!-- Made by docs/make_api_reference.py from the docstrings; change those, then run it again. -->

Public is what `millpond` and `millpond.testing` export, with the beginning of its docstring; `help(millpond.Queue)` and
the like say it all. Everything else may change without notice.

All coroutines are safe to call from any number of tasks of the event loop that opened the pond. The objects that
`connect_sync` gives out have the same names without `await`, and may be used from any number of threads. Durations are
seconds, or a `timedelta`. Errors have a [page of their own](errors.md).
"""

GROUPS = {
    "Opening": ("connect", "connect_sync", "Pond", "SyncPond", "Config", "Keyring"),
    "Queues": ("Queue", "DeadLetters", "QueuePolicy", "QueueCounts", "EnqueueOptions", "Receipt", "Answer"),
    "Messages": ("Message", "Lease", "MessageState", "MessageView", "MessageStream"),
    "Workers": ("Worker", "Consumer", "Context", "Middleware", "RetryPolicy", "Retry", "GiveUp", "Defer", "Outcome"),
    "Tasks and periodic jobs": ("Task", "TaskHandle", "current_task", "Tick"),
    "Without asyncio": (
        "SyncQueue",
        "SyncDeadLetters",
        "SyncMessage",
        "SyncMessageState",
        "SyncMessageView",
        "SyncMessageStream",
        "SyncTaskHandle",
    ),
    "Requests and their cost": ("PondRequests", "QueueRequests", "Requests"),
    "Payloads": ("json", "msgpack", "text", "Payload"),
}
"""Every name of ``millpond.__all__`` but the errors and ``__version__``; `page` refuses to leave one out."""


MACHINERY = frozenset(
    {"begin", "calls", "end", "handler", "outgoing", "register", "send_call", "sender"}  # what a pond's parts call
)
"""Public in the code, and of no use outside of it."""


def first_line(text: str | None) -> str:
    """The first sentence or line of a docstring, in one line."""
    paragraph = inspect.cleandoc(text or "").split("\n\n")[0]
    return " ".join(paragraph.split()).replace("|", "\\|")


def signature(value: Any, *, drop_self: bool = False) -> str:
    """A signature without annotations, which the docstrings put into words."""
    found = inspect.signature(value)
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for number, parameter in enumerate(found.parameters.values())
        if not (drop_self and number == 0)
    ]
    return str(found.replace(parameters=parameters, return_annotation=inspect.Signature.empty)).replace("|", "\\|")


def attribute_docs(kind: type) -> dict[str, str]:
    """The texts below attributes, which Python itself throws away."""
    found: dict[str, str] = {}
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    for before, after in zip(body.body, body.body[1:], strict=False):
        named = isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name)
        if named and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[before.target.id] = first_line(str(after.value.value))
    return found


def fields(kind: type) -> Iterator[tuple[str, str]]:
    """(field and default, text) of a Struct or NamedTuple."""
    texts = attribute_docs(kind)
    if issubclass(kind, msgspec.Struct):
        for field in msgspec.structs.fields(kind):
            default = "" if field.required else f" = {field.default!r}"
            yield f"{field.name}{default}", texts.get(field.name, "")
    elif issubclass(kind, tuple):
        for name in kind._fields:  # type: ignore[attr-defined]
            yield name, texts.get(name, "")


def instance_attributes(kind: type) -> Iterator[tuple[str, str]]:
    """(name, text) of what ``__init__`` gives each object for all to read."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    inits = [each for each in body.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
    for init in inits:
        for before, after in zip(init.body, [*init.body[1:], None], strict=True):
            target = before.targets[0] if isinstance(before, ast.Assign) else None
            if isinstance(target, ast.Attribute) and not target.attr.startswith("_"):
                told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                yield target.attr, first_line(str(after.value.value)) if told else ""  # type: ignore[union-attr]


def members(kind: type) -> Iterator[tuple[str, str]]:
    """(what is written, text) of the public methods and properties, in the order of the source."""
    inherited = [base for base in kind.__mro__[1:] if base.__name__ in {"Catalog", "Registrations", "Sender"}]
    own: dict[str, Any] = {}
    for base in (kind, *inherited):
        own |= {name: value for name, value in vars(base).items() if name not in own}
    hidden = MACHINERY if inherited else frozenset()
    for name, value in own.items():
        if name.startswith("_") or isinstance(value, type) or name in hidden:
            continue
        if isinstance(value, property):
            yield name, first_line(value.__doc__)
        elif isinstance(value, (classmethod, staticmethod)):
            yield f"{name}{signature(getattr(kind, name))}", first_line(value.__doc__)
        elif inspect.isfunction(value):
            word = "await " if inspect.iscoroutinefunction(value) else ""
            yield f"{word}{name}{signature(value, drop_self=True)}", first_line(value.__doc__)


def describe(name: str, value: Any, module: str) -> Iterator[str]:
    """One public name."""
    yield from ("", f"### {name}", "")
    if not isinstance(value, type):
        yield f"`{module}.{name}{signature(value)}`"
        yield ""
    yield first_line(value.__doc__)
    if isinstance(value, type):
        simple = name in {"Lease", "MessageView", "Queue"}  # elsewhere they are the machinery
        rows = [*fields(value), *(instance_attributes(value) if simple else ()), *members(value)]
        if rows:
            yield from ("", "| | |", "|---|---|")
            yield from (f"| `{code}` | {text} |" for code, text in rows)


def page() -> str:
    """The page's text."""
    raised = {name for name in millpond.__all__ if hasattr(errors, name)}
    grouped = [name for names in GROUPS.values() for name in names]
    left = set(millpond.__all__) - raised - {"__version__"} - set(grouped)
    if left or len(grouped) != len(set(grouped)):
        raise SystemExit(f"in no group of {Path(__file__).name}: {sorted(left)}")
    lines = [INTRODUCTION]
    for title, names in GROUPS.items():
        lines.append(f"## {title}")
        for name in names:
            lines += describe(name, getattr(millpond, name), "millpond")
        lines.append("")
    lines += ["## millpond.testing"]
    for name in testing.__all__:
        lines += describe(name, getattr(testing, name), "millpond.testing")
    lines += ["", "## Errors", "", ", ".join(f"[`{name}`](errors.md#{name.lower()})" for name in sorted(raised))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
