"""Lease keys: the logical names under which lockd locks a queue's messages and states.

Millpond keeps the lease inside the message, so nothing is locked under these keys; they remain as the names by which
the wire protocol and its clients speak of a message or of its state.
"""

from __future__ import annotations

from typing import NamedTuple

from millpond.errors import InvalidQueue
from millpond.model import names


class LeaseKeyParts(NamedTuple):
    """The queue and the message id in a lease key."""

    queue: str
    id: str


def message_lease_key(namespace: str | None, queue: str, id: str) -> str:
    """``<namespace>/q/<queue>/msg/<id>``. Raises InvalidQueue, InvalidMessageId."""
    return f"{names.namespace_name(namespace)}/q/{names.queue_name(queue)}/msg/{names.message_id(id)}"


def state_lease_key(namespace: str | None, queue: str, id: str) -> str:
    """``<namespace>/q/<queue>/state/<id>``. Raises InvalidQueue, InvalidMessageId."""
    return f"{names.namespace_name(namespace)}/q/{names.queue_name(queue)}/state/{names.message_id(id)}"


def _parse(relative: str, kind: str) -> LeaseKeyParts | None:
    parts = relative.removeprefix("/").split("/")
    if len(parts) != 4 or parts[0] != "q" or parts[2] != kind or not parts[3] or parts[3] in {".", ".."}:
        return None
    try:
        return LeaseKeyParts(names.queue_name(parts[1]), parts[3])
    except InvalidQueue:
        return None


def parse_message_lease_key(relative: str) -> LeaseKeyParts | None:
    """The parts of ``q/<queue>/msg/<id>`` (one leading ``/`` allowed); None when the key has another layout."""
    return _parse(relative, "msg")


def parse_state_lease_key(relative: str) -> LeaseKeyParts | None:
    """The parts of ``q/<queue>/state/<id>``; None when the key has another layout."""
    return _parse(relative, "state")


def is_queue_message_key(relative: str) -> bool:
    """Whether the relative key is that of a message's lease."""
    return parse_message_lease_key(relative) is not None


def is_queue_state_key(key: str) -> bool:
    """Whether the key, with or without a namespace in front, is that of a state's lease."""
    parts = key.removeprefix("/").split("/")
    return len(parts) in {4, 5} and all(parts) and _parse("/".join(parts[-4:]), "state") is not None
