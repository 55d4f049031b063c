"""Back-pressure: who must wait, and who is sent away, when there is too much to do."""

from __future__ import annotations

from typing import Literal, Protocol

Kind = Literal["producer", "consumer", "answer", "other"]
"""Whom a request is from. Answers make room, so they are the last to be slowed."""


class Gate(Protocol):
    """Lets requests in."""

    @property
    def state(self) -> str:
        """How loaded the server is, as lockd calls it: ``disengaged``, ``soft_arm``, ``engaged`` or ``recovery``."""

    def lets_in(self, kind: Kind) -> bool:
        """`admit` would return at once. To be called once for a request, in its place or before it."""

    async def admit(self, kind: Kind) -> None:
        """Return when a request may go on, perhaps a little later. Raises Throttled, or a Refusal with Retry-After."""
