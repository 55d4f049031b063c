"""What is counted about requests."""

from __future__ import annotations

from typing import Protocol


class Metrics(Protocol):
    """Counts."""

    timed: bool
    """Whether `request` wants to know how long a request took."""

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request to a known route is over."""


class NoMetrics:
    """Counts nothing."""

    timed = False

    def request(self, route: str, status: int, seconds: float) -> None:
        return None
