"""When a message that failed is tried again."""

from __future__ import annotations

from typing import Any

import msgspec

from millpond.errors import InvalidInput
from millpond.model.ids import IdSource

MAX_DOUBLINGS = 1000
"""Exponents beyond this overflow a float, and mean the longest delay anyway."""


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Exponential backoff with jitter. How often a message may fail is the message's own (``max_attempts``).

    The delay after failure n is ``base * factor ** (n - 1)``, at most ``longest``, of which the part ``jitter`` is by
    chance, so that messages that failed together do not come back together. Durations are seconds. Subclass it and
    override `delay` for another curve.
    """

    base: float = 1.0
    factor: float = 2.0
    longest: float = 300.0
    jitter: float = 0.5
    """From 0 (none) to 1 (anything from 0 to the full delay)."""
    give_up_on: tuple[type[BaseException], ...] = ()
    """Exceptions that no retry can cure: a dead letter at once."""

    def __post_init__(self) -> None:
        for name in ("base", "factor", "longest", "jitter"):
            value = getattr(self, name)
            if value.__class__ not in (int, float) or not 0 <= value < float("inf"):
                raise InvalidInput(f"{name} of a RetryPolicy is a number, 0 or more, not {value!r:.100}")
        if self.jitter > 1:
            raise InvalidInput(f"jitter of a RetryPolicy is a share from 0 to 1, not {self.jitter!r}")
        if self.factor < 1:
            raise InvalidInput(f"factor of a RetryPolicy is 1 or more, not {self.factor!r}")
        given: tuple[Any, ...] = self.give_up_on
        wrong = [kind for kind in given if not (isinstance(kind, type) and issubclass(kind, BaseException))]
        if wrong:
            raise InvalidInput(f"give_up_on of a RetryPolicy is a tuple of exception classes; {wrong[0]!r} is none")

    def delay(self, failures: int, error: BaseException | None, ids: IdSource) -> float:
        """Seconds until the next try. ``failures``: how often it has failed, this time included; ``error``: by what,
        None for the time limit; ``ids``: the pond's chance."""
        try:
            full = min(self.longest, self.base * self.factor ** min(max(failures, 1) - 1, MAX_DOUBLINGS))
        except OverflowError:
            full = self.longest
        return full * (1 - self.jitter) + full * self.jitter * ids.below(1_000_001) / 1_000_000
