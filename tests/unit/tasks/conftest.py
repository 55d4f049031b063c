"""Stores for the tests of what workers share: several ponds on one store, and a clock that the test owns."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.conformance.queue.conftest import World

LOCAL = ("memory", "memory-candidates", "sqlite", "objects")
"""For tests that put a fault into the pond's own service. What a worker makes of a server's is in tests/unit/worker."""
STORES = (*LOCAL, "http-sqlite")


@pytest.fixture(params=STORES)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    """A fresh store of each kind."""
    return World(request.param, tmp_path)
