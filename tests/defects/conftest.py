"""Each defect is tried on both kinds of store: some of them are the service's, some a store's, and one cannot tell."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tests.conformance.queue.conftest import World

from millpond import Config, Pond
from millpond.stores.faulty import FaultyStore


class Defects(World):
    """A world whose ponds count what they ask of their store."""

    def pond(self, *, config: Config | None = None, plan: object = None) -> Pond:
        """As a world's, always with a `FaultyStore` outermost; without a plan it only counts."""
        return super().pond(config=config, plan={} if plan is None else plan)  # type: ignore[arg-type]

    @staticmethod
    def asked(pond: Pond) -> Counter[str]:
        """How often the pond has called each method of its store, since `forget`."""
        assert isinstance(pond.store, FaultyStore)
        return Counter(call.method for call in pond.store.calls)

    def looks(self, pond: Pond) -> int:
        """How often it has looked for something to hand out, by whichever call."""
        asked = self.asked(pond)
        return asked["ready"] + asked["take"]

    def changes(self, pond: Pond) -> int:
        """How often it has written, by whichever call."""
        asked = self.asked(pond)
        return asked["write"] + asked["commit"] + asked["take"]

    @staticmethod
    def forget(pond: Pond) -> None:
        """Count from here."""
        assert isinstance(pond.store, FaultyStore)
        pond.store.calls.clear()


@pytest.fixture(params=["memory", "sqlite"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Defects:
    """A fresh store of each kind."""
    return Defects(request.param, tmp_path)
