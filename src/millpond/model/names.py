"""Names of queues and namespaces, and the form of message ids: checked wherever one enters.

Invariant: a name or id that passed here can stand in a file name, an object key or a URL path without escaping
from the place it was given (the ``..`` holes of path-joined keys cannot arise).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from millpond.errors import InvalidInput, InvalidMessageId, InvalidQueue

DEFAULT_NAMESPACE = "default"
MAX_NAME_BYTES = 128
"""As in lockd; leaves room for prefixes in the 1,024 bytes that object stores give a key."""

_NAME = re.compile(r"[a-z0-9._-]+")
_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


@lru_cache(maxsize=4096)
def _name(kind: str, value: str) -> str:
    name = value.strip().lower()
    if not name:
        raise InvalidQueue(f"{kind} name is empty")
    if len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES:
        raise InvalidQueue(f"{kind} name is longer than {MAX_NAME_BYTES} bytes: {name[:32]!r}…")
    if name in {".", ".."}:
        raise InvalidQueue(f"{kind} name may not be {name!r}")
    if not _NAME.fullmatch(name):
        raise InvalidQueue(f"{kind} name {name!r} has a character other than a-z 0-9 . _ -")
    return name


def queue_name(value: str) -> str:
    """The normalised queue name (trimmed, lower-cased). Raises InvalidQueue."""
    if not isinstance(value, str):
        raise InvalidQueue(f"queue name must be text, not {type(value).__name__}")
    return _name("queue", value)


def namespace_name(value: str | None) -> str:
    """The normalised namespace; empty or None means ``default``. Raises InvalidQueue."""
    if value is None or value == "":
        return DEFAULT_NAMESPACE
    if not isinstance(value, str):
        raise InvalidQueue(f"namespace name must be text, not {type(value).__name__}")
    return _name("namespace", value)


@lru_cache(maxsize=4096)
def queue_key(namespace: str | None, queue: str) -> tuple[str, str]:
    """(namespace, queue), both normalised. Raises InvalidQueue."""
    return namespace_name(namespace), queue_name(queue)


def message_id(value: str) -> str:
    """The message id in canonical lower-case UUID form. Raises InvalidMessageId."""
    if not isinstance(value, str):
        raise InvalidMessageId(f"message id must be text, not {type(value).__name__}")
    text = value.strip().lower()
    if not _ID.fullmatch(text):
        raise InvalidMessageId(f"message id {value[:64]!r} is not a UUID such as 0197a3c2-…")
    return text


def message_ids(values: Iterable[str]) -> list[str]:
    """Each message id once, in canonical form. Raises InvalidInput, InvalidMessageId."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise InvalidInput("ids must be a list of message ids, or None for all")
    return list(dict.fromkeys([message_id(value) for value in values]))
