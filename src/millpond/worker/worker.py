"""`Worker`: runs a pond's consumers until it is told to stop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from millpond.pond import Pond
from millpond.worker.hooks import Middleware, Service
from millpond.worker.registry import Consumer


class Worker:
    """Runs consumers of a pond on the running event loop."""

    def __init__(
        self,
        pond: Pond,
        consumers: Iterable[Consumer | str] | None = None,
        *,
        middleware: Sequence[Middleware] = (),
        services: Sequence[Service] | None = None,
        owner: str | None = None,
        grace: float = 30.0,
    ) -> None:
        """``consumers``: which of the pond's, by name, or others; default all of them."""
        raise NotImplementedError

    async def run(self) -> None:
        """Open the pond if it is not, take messages until `stop`, answer for all of them, and put things back."""
        raise NotImplementedError

    def stop(self, *, grace: float | None = None) -> None:
        """Take no more; running handlers have ``grace`` seconds, then their messages are given back. Again: at once."""
        raise NotImplementedError
