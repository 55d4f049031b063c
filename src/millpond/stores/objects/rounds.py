"""Listings too long for one pass are gone through in several, each of which goes on where the last one ended."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from millpond.stores.objects.bucket import Entry
from millpond.stores.objects.engine import Engine

LOOKED_AT = 100_000
"""Objects listed by one pass below one prefix: a hundred requests."""


class Rounds:
    """How far sweeps have come, below each prefix of which they have not seen the end."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._after: dict[str, str] = {}

    async def pass_over(
        self, prefix: str, together: Callable[[str], str] = lambda name: name
    ) -> AsyncGenerator[list[Entry], None]:
        """The objects below ``prefix``, from where the last pass ended: each once, those that ``together`` gives one
        name at once. A reader that stops early goes on behind what it was given last."""
        start = self._after.get(prefix)
        looked_at = 0
        for after in (None,) if start is None else (start, None):
            async with aclosing(self._groups(prefix, after, together)) as groups:
                async for group in groups:
                    if after is None and start is not None and group[0].name > start:
                        break
                    looked_at += len(group)
                    self._after[prefix] = group[-1].name
                    yield group
                    if looked_at >= LOOKED_AT:
                        return
        self._after.pop(prefix, None)

    async def _groups(
        self, prefix: str, after: str | None, together: Callable[[str], str]
    ) -> AsyncGenerator[list[Entry], None]:
        group: list[Entry] = []
        common = ""
        async with self._engine.listing(prefix, after) as pages:
            async for page in pages:
                for entry in page:
                    name = together(entry.name)
                    if group and name != common:
                        yield group
                        group = []
                    common = name
                    group.append(entry)
        if group:
            yield group

    def go_on(self, prefix: str, after: str) -> None:
        """The next pass goes on behind this object."""
        self._after[prefix] = after

    def keep(self, prefixes: tuple[str, ...]) -> None:
        """Forget all that is below none of these."""
        self._after = {prefix: after for prefix, after in self._after.items() if prefix.startswith(prefixes)}
