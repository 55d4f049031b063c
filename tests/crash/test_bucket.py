"""The process dies, a reply gets lost, or a cloud tells yesterday's truth, at each request to the bucket.

Over a bucket in memory, so that nothing but the order of the requests decides what is left. Afterwards a process that
knows nothing opens the bucket: nothing acknowledged is lost, nothing acked is back, nothing is there that nobody put
in, a stale lease changes nothing, and groups go one at a time. A crash is looked at by that process only; after any
other fault the first one lives, with all that it remembers, and goes on.

By default each fault strikes at some of the requests, other ones for each fault; MILLPOND_CRASH_ALL=1 has each of them
strike at every one (some minutes).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import NamedTuple

import pytest
from tests.crash.workload import (
    CONFIG,
    INLINE,
    STEPS,
    Standing,
    Workload,
    check,
    differences,
    facts,
    lease,
    live_on,
    refuse_stale_answers,
    run,
)
from tests.model.hasty import HastyClock
from tests.model.model import Model, require

from millpond.crypto.keyring import Keyring
from millpond.errors import LeaseLost, MessageNotFound, StoreError
from millpond.message import Message
from millpond.model.clock import ManualClock
from millpond.stores.base import Store
from millpond.stores.encrypted import EncryptedStore
from millpond.stores.faulty import Crash
from millpond.stores.objects.faulty_bucket import (
    CHANGING,
    READING,
    Fault,
    FaultyBucket,
    Request,
    crash_after,
    crash_before,
    fits,
    lost_done,
    lost_later,
    lost_partly,
    lost_undone,
    repeated,
    skewed,
    stale,
    throttled,
    truncated,
)
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.store import ObjectStore
from millpond.testing import TestPond, pond

ALL = os.environ.get("MILLPOND_CRASH_ALL") == "1"
EVERY = 1 if ALL else 5
"""Of how many requests one is visited."""
KEYRING = Keyring({"key": bytes(32)})
REMEMBER = 40
FAULTS: dict[str, Fault] = {
    "crash-before": crash_before(),
    "crash-after": crash_after(),
    "lost-done": lost_done(),
    "lost-undone": lost_undone(),
    "lost-and-done-soon": lost_later(1),
    "lost-and-done-much-later": lost_later(30),
    "lost-partly": lost_partly(),
    "throttled": throttled(),
    "repeated": repeated(),
    "stale-listing": stale(6),
    "very-stale-listing": stale(REMEMBER),
    "truncated": truncated(),
    "fast-clock": skewed(60_000),
    "slow-clock": skewed(-60_000),
}
HARMLESS = {"repeated", "fast-clock", "slow-clock"}
"""Nobody need learn of these."""
MISLEADING = {"stale-listing", "very-stale-listing"}
"""Others are handed out, or fewer; no call fails."""


class Setting(NamedTuple):
    """What is the same for a workload and whoever looks at it afterwards."""

    encrypted: bool = False
    skew: int = 0
    """How far the bucket's clock is fast, ms. Stores find that out; without it they need not look."""


class Stage:
    """A workload over a bucket that fails at request number ``at``."""

    def __init__(self, setting: Setting, at: int = 0, fault: Fault | None = None) -> None:
        self.clock = ManualClock()
        self.root = MemoryBucket(clock=self.clock, page_size=4)
        plan = {} if fault is None else {at: fault}
        remember = REMEMBER if fault is not None and fault.requests and fits(fault, "list") else 0
        self.bucket = FaultyBucket(self.root.share(), plan, skew=setting.skew, remember=remember)
        self.struck = lambda: len(self.bucket.requests) >= at
        self._setting = setting
        self._handles = [self.bucket]
        self.work = Working(self._store, self.clock, self.look)

    def _store(self) -> Store:
        # One for each time the pond is opened; they count on.
        self._handles.append(self.bucket.share(self.root.share()))
        return self._wrap(self._handles[-1])

    def _wrap(self, bucket: FaultyBucket) -> Store:
        store = ObjectStore(
            bucket,
            clock=HastyClock(self.clock),
            inline_limit=INLINE,
            spread=False,
            measure_skew=self._setting.skew != 0,
        )
        return EncryptedStore(store, KEYRING) if self._setting.encrypted else store

    @property
    def crashed(self) -> bool:
        """The process is dead."""
        return any(handle.crashed for handle in self._handles)

    def look(self) -> TestPond:
        """Another process, on a bucket that works."""
        store = self._wrap(FaultyBucket(self.root.share(), skew=self.bucket.skew))
        return pond(store=store, clock=self.clock, config=CONFIG, seed=99)

    def survivor(self) -> TestPond:
        """Another process, afterwards; from now on all works."""
        self.bucket.plan = {}
        return self.look()


class Working(Workload):
    """A workload that goes by the time that its pond has found out."""

    def __init__(self, make_store: Callable[[], Store], clock: ManualClock, look: Callable[[], TestPond]) -> None:
        super().__init__(make_store, clock)
        self._look = look

    def holds_old_ones(self) -> bool:
        """The consumer still has a delivery at hand that it has answered."""
        return any(
            message.id not in model.messages or model.messages[message.id].lease != lease(message)[1]
            for model in [self.models["orders"]]
            for message in self.held.values()
        )

    async def settle(self, name: str, messages: list[Message]) -> None:
        model = self.models[name]
        deliverable = {message.id for message in model.deliverable(self.now)}
        if deliverable >= {message.id for message in messages}:
            return
        async with self._look() as other:
            found = (await self.standing(other))[name]
        # The eleventh fact is why it is a dead letter.
        model.settle(self.now, lambda id: "gone" if id not in found else "dead" if found[id][11] else "live")

    @property
    def now(self) -> int:
        return self.pond.clock.now_ms() if self.opened else super().now


class Reference(NamedTuple):
    """A workload that nothing came in the way of."""

    kept: list[dict[str, Model]]
    """The models after each step."""
    requests: list[Request]


REFERENCES: dict[Setting, Reference] = {}


def reference(setting: Setting) -> Reference:
    """It is taken once."""

    async def go() -> Reference:
        stage, kept = Stage(setting), list[dict[str, Model]]()
        done, error = await run(stage.work, kept)
        assert (done, error) == (len(STEPS), None)
        requests = list(stage.bucket.requests)
        await check(stage.work.pond, stage.work, kept, done)
        await stage.work.pond.close()
        return Reference(kept, requests)

    if setting not in REFERENCES:
        REFERENCES[setting] = asyncio.run(go())
    return REFERENCES[setting]


class Way(NamedTuple):
    """How a workload went that met a fault."""

    done: int
    """Steps that were acknowledged before the one that was not."""
    error: StoreError | None
    left_out: list[str]
    """Steps that had nothing to work on, since what they are about was not handed out."""


async def _through(stage: Stage) -> Way:
    work, left_out = stage.work, list[str]()
    try:
        await work.open()
    except StoreError as error:
        return Way(0, error, left_out)
    for done, step in enumerate(STEPS):
        work.clock.advance(1)
        try:
            await step.run(work)
        except (KeyError, StopIteration):
            left_out.append(step.name)
        except (LeaseLost, MessageNotFound):
            require(work.holds_old_ones(), f"an answer of step {step.name} was refused")
            left_out.append(step.name)
        except StoreError as error:
            return Way(done, error, left_out)
        if stage.crashed:
            # A store may answer for part of a call, but a dead process hears nothing.
            return Way(done, Crash(), left_out)
    return Way(len(STEPS), None, left_out)


async def _interrupt(setting: Setting, at: int, name: str, kept: list[dict[str, Model]]) -> None:
    fault = FAULTS[name]
    stage = Stage(setting, at, fault)
    work = stage.work
    done, error, left_out = await _through(stage)
    at_step = STEPS[min(done, len(STEPS) - 1)].name
    assert stage.struck(), f"the workload made only {len(stage.bucket.requests)} requests"
    assert error is None or name not in HARMLESS | MISLEADING, f"step {at_step}: {error}"
    assert error is None or not left_out, f"step {at_step}: {error}, after {left_out} had been left out"
    assert not left_out or name not in HARMLESS
    await stage.bucket.settle()
    if fault.crash:
        assert stage.crashed, f"step {at_step} is where it ended, but nothing crashed"
        assert error is not None
        await work.pond.close()
    elif error is None:
        # All that it was told is true, whatever it had to do for it.
        kept, done = [{queue: model.copy() for queue, model in work.models.items()}], 0
    async with stage.survivor() as other:
        # What was decided is made known within a minute, by whoever comes by.
        stage.clock.advance(61)
        await work.standing(other)
        if error is None:
            found, told = await work.standing(other), facts(kept[0])
            if name not in HARMLESS:
                _forgive_purges(kept[0], found, told)
            require(found == told, f"what is there is not what was acknowledged: {differences(found, told)}")
            require(await other.verify() == [], "verify found something")
        else:
            await check(other, work, kept, done)
        if fault.crash or not work.opened:
            await refuse_stale_answers(other, work, work.delivered)
            await live_on(other, kept, done)
            return
    await refuse_stale_answers(work.pond, work, work.delivered)
    await live_on(work.pond, kept, done)
    await work.pond.close()


def _forgive_purges(models: dict[str, Model], found: Standing, told: Standing) -> None:
    """A purge removes what it sees. It may not see what a listing does not show yet, or what is on its way into the box
    because a reply got lost."""
    for queue, model in models.items():
        missed = [id for id in found[queue] if model.gone.get(id) == "purged"]
        require(len(missed) < 2, f"a purge left {missed}")
        for id in missed:
            told[queue][id] = found[queue][id]
            del model.gone[id]


def _moves(request: Request) -> bool:
    """It brings a message into another object: where most may go wrong, so no thinning out leaves these out."""
    key, *rest = request.name.rsplit("/", 1)[-1].split("-")
    return request.method == "create" and ("/d/" in request.name or rest[:1] not in ([], [key]))


def _visit(setting: Setting, name: str, every: int) -> int:
    """Have a fault strike at one of ``every`` requests that it fits; how many these were."""
    kept, requests = reference(setting)
    fitting = [request for request in requests if fits(FAULTS[name], request.method)]
    some = fitting[list(FAULTS).index(name) % every :: every] or fitting
    points = [request for request in fitting if request in some or _moves(request)]
    for request in points:
        try:
            asyncio.run(_interrupt(setting, request.number, name, kept))
        except Exception as error:
            what = f"{name} at request {request.number} ({request.method} {request.name})"
            raise AssertionError(f"{what}: {error}") from error
    return len(points)


@pytest.mark.parametrize("name", FAULTS)
def test_nothing_is_lost_or_half_done(name: str) -> None:
    assert _visit(Setting(), name, EVERY)


@pytest.mark.parametrize("name", FAULTS)
def test_nothing_is_lost_or_half_done_when_it_is_encrypted(name: str) -> None:
    assert _visit(Setting(encrypted=True), name, EVERY if ALL else EVERY * 6)


@pytest.mark.parametrize("skew", [-60_000, 60_000])
@pytest.mark.parametrize("name", ["crash-before", "crash-after", "lost-done", "lost-and-done-soon"])
def test_nothing_is_lost_or_half_done_when_the_clocks_are_a_minute_apart(name: str, skew: int) -> None:
    assert _visit(Setting(skew=skew), name, EVERY if ALL else EVERY * 6)


def test_the_workload_does_what_it_is_for() -> None:
    requests = reference(Setting()).requests
    seen = {request.method for request in requests}
    assert seen == CHANGING | READING
    parts = {request.name.split("/")[3] for request in requests if request.name.count("/") > 2}
    assert parts >= {"m", "d", "u", "g", "b", "policy"}
