"""How a handler says what is to become of its message, and what did.

`Retry`, `GiveUp` and `Defer` are raised by handlers. They are no errors of Millpond's: to raise one is an answer.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec

from millpond.errors import InvalidInput


def _seconds(value: Any, what: str) -> float:
    if value.__class__ not in (int, float) or not 0 <= value < float("inf"):
        raise InvalidInput(f"{what} is a number of seconds, 0 or more, not {value!r:.100}")
    return float(value)


class HandlerAnswer(Exception):
    """What a handler raises instead of returning, to decide about its message. Use `Retry`, `GiveUp` or `Defer`."""


class Retry(HandlerAnswer):
    """Failed for now: count a failure, and try again after ``after`` seconds instead of the policy's delay."""

    def __init__(self, after: float | None = None, reason: str = "") -> None:
        """``after`` None: the consumer's retry policy decides. Raises InvalidInput."""
        self.after = None if after is None else _seconds(after, "after")
        self.reason = reason
        super().__init__(reason or "the handler asked to be run again")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.after, self.reason)


class GiveUp(HandlerAnswer):
    """Failed for good: a dead letter now, with this reason, whatever is left of its budget."""

    def __init__(self, reason: str = "the handler gave it up") -> None:
        self.reason = str(reason)
        super().__init__(self.reason)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason,)


class Defer(HandlerAnswer):
    """Not now: give the message back, visible again after ``delay`` seconds; no failure is counted."""

    def __init__(self, delay: float = 0.0, reason: str = "") -> None:
        """Raises InvalidInput."""
        self.delay = _seconds(delay, "delay")
        self.reason = reason
        super().__init__(reason or "the handler gave it back")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.delay, self.reason)


Kind = Literal["ack", "retry", "dead", "defer", "lost", "answered"]
"""``answered``: the handler did it itself. ``lost``: somebody else may have the message, and nothing was answered."""


KINDS: tuple[Kind, ...] = get_args(Kind)


class Outcome(msgspec.Struct, frozen=True):
    """What is to become of a message whose handler did not return normally."""

    kind: Kind
    delay: float = 0.0
    """Seconds until it is visible again (``retry``, ``defer``)."""
    reason: str = ""
    error: Any = None
    """What is kept as its last error: a dict of ``type``, ``message`` and ``traceback``."""
