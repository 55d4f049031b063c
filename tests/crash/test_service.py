"""The process dies, or a reply gets lost, before, after or in the middle of each call to the store; over memory, so
that nothing but the order of the calls decides what is left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from tests.crash.workload import CONFIG, INLINE, STEPS, Workload, check, live_on, run
from tests.model.model import Model

from millpond.crypto.keyring import Keyring
from millpond.errors import StoreError
from millpond.model.clock import ManualClock
from millpond.service.core import ATTEMPTS
from millpond.stores.base import Store
from millpond.stores.encrypted import EncryptedStore
from millpond.stores.faulty import (
    Call,
    Fault,
    FaultyStore,
    crash_after,
    crash_before,
    crash_middle,
    fail_after,
    fail_before,
    fail_middle,
)
from millpond.stores.memory import MemoryStore
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.store import ObjectStore
from millpond.testing import pond

KEYRING = Keyring({"key": bytes(32)})
FAULTS: dict[str, Callable[[], Fault]] = {
    "crash-before": crash_before,
    "crash-middle": crash_middle,
    "crash-after": crash_after,
    "fail-before": fail_before,
    "fail-middle": fail_middle,
    "fail-after": fail_after,
}


class _Stage:
    """A workload over a store in memory that fails at call number ``at``, with and without encryption above it."""

    def __init__(self, kind: str, at: int = 0, fault: Fault | None = None) -> None:
        self.clock = ManualClock()
        root, bucket = MemoryStore(clock=self.clock, inline_limit=INLINE), MemoryBucket(clock=self.clock)
        self._handle: Callable[[], Store] = root.share
        if kind.startswith("objects"):
            self._handle = lambda: ObjectStore(
                bucket.share(), clock=self.clock, inline_limit=INLINE, measure_skew=False
            )
        self._encrypted = kind.endswith("encrypted")
        self.faulty: list[FaultyStore] = []
        self._at, self._fault = at, fault
        self.work = Workload(self._store, self.clock)

    def _plan(self, call: Call) -> Fault | None:
        number = sum(len(one.calls) for one in self.faulty)
        return self._fault if number == self._at else None

    def _store(self) -> Store:
        # One for each time the pond is opened; they count on.
        self.faulty.append(FaultyStore(self._handle(), self._plan))
        return EncryptedStore(self.faulty[-1], KEYRING) if self._encrypted else self.faulty[-1]

    def survivor(self) -> Store:
        """What another process opens afterwards."""
        return EncryptedStore(self._handle(), KEYRING) if self._encrypted else self._handle()

    @property
    def calls(self) -> list[Call]:
        """All calls so far."""
        return [call for one in self.faulty for call in one.calls]


def _reference(kind: str) -> tuple[list[dict[str, Model]], list[Call]]:
    """The models after each step, and the calls that the whole workload makes."""

    async def go() -> tuple[list[dict[str, Model]], list[Call]]:
        stage, kept = _Stage(kind), list[dict[str, Model]]()
        done, error = await run(stage.work, kept)
        assert (done, error) == (len(STEPS), None)
        calls = stage.calls
        await check(stage.work.pond, stage.work, kept, done)
        await stage.work.pond.close()
        return kept, calls

    return asyncio.run(go())


async def _interrupt(kind: str, at: int, fault: Fault, kept: list[dict[str, Model]]) -> None:
    stage = _Stage(kind, at, fault)
    done, error = await run(stage.work)
    assert isinstance(error, StoreError), f"call {at} failed, and step {STEPS[min(done, len(STEPS) - 1)].name} went on"
    if fault.crash:
        await stage.work.pond.close()
    async with pond(store=stage.survivor(), clock=stage.clock, config=CONFIG, seed=99) as other:
        await check(other, stage.work, kept, done)
        if fault.crash:
            await live_on(other, kept, done)
            return
    # The process lives, with all that it remembers; it tries again what failed.
    if not stage.work.opened:
        await stage.work.open()
    await live_on(stage.work.pond, kept, done)
    await stage.work.pond.close()


@pytest.mark.parametrize("kind", ["plain", "encrypted", "objects", "objects-encrypted"])
@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost_or_half_done(fault: str, kind: str) -> None:
    kept, calls = _reference(kind)
    points = [number for number, call in enumerate(calls, 1) if call.changing or fault == "fail-before"]
    assert len(points) > len(STEPS) - 5
    for at in points:
        try:
            asyncio.run(_interrupt(kind, at, FAULTS[fault](), kept))
        except AssertionError as error:
            raise AssertionError(f"{fault} at call {at} ({calls[at - 1].method}): {error}") from error


def test_the_workload_does_what_it_is_for() -> None:
    kept, calls = _reference("plain")
    assert {"write", "commit", "write_blob", "sweep"} <= {call.method for call in calls}
    ends = {how for models in kept for model in models.values() for how in model.gone.values()}
    assert ends == {"acked", "purged", "expired"}
    assert any(model.dead() for models in kept for model in models.values())
    assert ATTEMPTS > 1
