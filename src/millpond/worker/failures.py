"""What is kept of an exception as a message's last error."""

from __future__ import annotations

import os
import traceback
from typing import Any

from millpond.model.text import clipped, text_of

MESSAGE_LIMIT = 2_000
"""Characters of the exception's text."""
TRACEBACK_LIMIT = 6_000
"""Characters of the traceback's end. With the text, of at most 4 bytes each, it fits into the smallest part of
`Config.max_error_bytes` that a traceback of ASCII needs: half of it."""
FRAMES = 20
"""The innermost frames of each exception in a chain: where it went wrong."""
REASON_LIMIT = 500
"""Characters of a dead letter's reason: one line for people."""
OURS = os.path.dirname(__file__)


def kind(error: BaseException) -> str:
    """The exception's class, by module unless it is built in."""
    cls = type(error)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def message(error: BaseException) -> str:
    """The exception's text."""
    return clipped(text_of(error), MESSAGE_LIMIT)


def reason(error: BaseException) -> str:
    """The exception in one line."""
    text = message(error)
    return clipped(" ".join(f"{kind(error)}: {text}".split()) if text else kind(error), REASON_LIMIT)


def details(error: BaseException, *, trace: bool = True) -> dict[str, Any]:
    """``type``, ``message`` and ``traceback`` (its end, without the worker's own frames; empty where ``trace`` is
    False)."""
    found = {"type": kind(error), "message": message(error), "traceback": ""}
    if trace:
        found["traceback"] = _traceback(error)
    return found


def _traceback(error: BaseException) -> str:
    try:
        whole = traceback.TracebackException.from_exception(error, limit=-FRAMES)
        one: traceback.TracebackException | None = whole
        while one is not None:
            one.stack[:] = [frame for frame in one.stack if os.path.dirname(frame.filename) != OURS]
            one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
        text = "".join(whole.format())
    except Exception as broken:  # from the user's own __str__ or __repr__
        return f"(the traceback cannot be had: {type(broken).__name__})"
    text = text.rstrip()
    if len(text) > TRACEBACK_LIMIT:
        text = "…" + text[-TRACEBACK_LIMIT:]
    return clipped(text, len(text))
