"""A pond on memory whose store can be made to fail, and another pond on the same store."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

import millpond.testing
from millpond import Config
from millpond.model.clock import ManualClock
from millpond.stores.base import Op, Outcome
from millpond.stores.faulty import FaultyStore
from millpond.stores.memory import MemoryStore
from millpond.testing import TestPond

LIMITS = Config(
    collect_interval=1e6,  # The collector runs when a test says so.
    max_state_bytes=200,
    max_error_bytes=100,
    orphan_age=60,
    policy_max_age=1,
)


class Bench:
    """Two ponds on one store."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.memory = MemoryStore(clock=self.clock)
        self.faulty = FaultyStore(self.memory.share())
        self.pond = millpond.testing.pond(store=self.faulty, clock=self.clock, config=LIMITS)
        self.other = millpond.testing.pond(store=self.memory.share(), clock=self.clock, config=LIMITS, seed=1)
        self.service = self.pond.service
        self.queue = self.pond.queue("q")

    async def elsewhere(self) -> TestPond:
        """The other pond, opened; it sees the same store and no fault."""
        return await self.other.open()

    def calls(self, method: str) -> int:
        """How often the pond has called this method of its store, since its list of calls was cleared."""
        return sum(call.method == method for call in self.faulty.calls)

    def never_win(self) -> None:
        """Whatever the pond writes from now on meets a record that somebody has just changed."""
        write = self.faulty.write

        async def lose(ops: Sequence[Op]) -> list[Outcome]:
            for op in ops:
                # As the message's holder in another process does: the ETag is another one, the lease the same.
                item = getattr(op, "item", None)
                assert item is not None
                record = await self.other.service.load(item.namespace, item.queue, item.id)
                assert record is not None
                await self.memory.write([self.other.service.update(record, record.status)])
            return await write(ops)

        self.faulty.write = lose  # type: ignore[method-assign]


@pytest.fixture
def bench() -> Bench:
    """Not opened: ``async with bench.pond``."""
    return Bench()
