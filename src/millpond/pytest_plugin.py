"""Fixtures for pytest; there wherever Millpond is installed.

They give what `millpond.testing` makes, not opened yet, because only the test knows its event loop:

    async def test_a_report(millpond_memory):
        async with millpond_memory(app.pond) as pond:
            await app.report.send(month=6)
            assert await pond.work() == …
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from millpond.pond import Pond
    from millpond.testing import ManualClock, TestPond


@pytest.fixture
def millpond_clock() -> ManualClock:
    """The clock of this test's ponds; it stands still until the test moves it."""
    from millpond.testing import ManualClock

    return ManualClock()


@pytest.fixture
def millpond_pond(millpond_clock: ManualClock) -> TestPond:
    """An empty pond on memory, under `millpond_clock`; ``async with`` it."""
    from millpond.testing import pond

    return pond(clock=millpond_clock)


@pytest.fixture
def millpond_memory(millpond_clock: ManualClock) -> Callable[[Pond], AbstractAsyncContextManager[TestPond]]:
    """A function that puts a pond of yours on memory, under `millpond_clock`: `millpond.testing.in_memory`."""
    from millpond.testing import in_memory

    return lambda pond: in_memory(pond, clock=millpond_clock)
