"""The real queue on a bucket that loses replies, beside its model.

What a call raises then is no verdict: the step was taken, or it was not, and the next look says which. So a step that
failed is tried on a copy of the model, and the copy is kept if the bucket is as it says. Each message must be in one of
these two conditions, whatever else went wrong: what was acknowledged is not lost, what was acked does not come back, a
stale lease changes nothing. Only the order is left open, and which of two calls at once was first.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, ClassVar, NamedTuple, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from tests.model.hasty import HastyClock
from tests.model.machine import (
    ANSWERS,
    ENQUEUES,
    INLINE,
    NTH,
    PAYLOADS,
    SECONDS,
    WHICH,
    Answer,
    Held,
    ObjectsMachine,
    ms,
)
from tests.model.model import LeaseIsLost, Model, NotAllowed, require

from millpond.errors import LeaseLost, MessageNotFound, OutcomeUnknown, StoreBusy, StoreError
from millpond.message import Message
from millpond.model.clock import CorrectedClock
from millpond.stores.base import Box, Store
from millpond.stores.objects import records
from millpond.stores.objects.faulty_bucket import (
    Fault,
    FaultyBucket,
    Request,
    fits,
    lost_done,
    lost_later,
    lost_undone,
    repeated,
    skewed,
    throttled,
)
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.store import ObjectStore

T = TypeVar("T")

ARRIVES = 10.0
"""Seconds within which a request that was given up takes effect, if it ever does: the store relies on that."""
A_WHILE = 61_000
"""Milliseconds after which what was left half done is anybody's to finish."""
Standing = dict[str, tuple[str, tuple[Any, ...]]]
Step = Callable[[Model], None]
"""What something does to the model; raises NotAllowed or LeaseIsLost where it cannot have been done."""


def _nothing(model: Model) -> None:
    """It was not done."""


class Tried(NamedTuple):
    """What came of a call."""

    result: Any
    error: StoreError | LeaseLost | None

    @property
    def perhaps(self) -> bool:
        """It may have been done, or some of it."""
        return isinstance(self.error, OutcomeUnknown)


class Weather:
    """A bucket that fails, but for those who only look."""

    def __init__(self, machine: FaultyObjectsMachine, calm: MemoryBucket, stormy: FaultyBucket) -> None:
        self._machine = machine
        self._calm = calm
        self._stormy = stormy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._calm if self._machine.calm else self._stormy, name)


class FaultyObjectsMachine(ObjectsMachine):
    """A bucket of whose requests every tenth goes wrong, and sometimes more in a row: then trying again is no help."""

    RATE: ClassVar[int] = 10

    def __init__(self) -> None:
        self.calm = True
        self.faults = 0
        """In the call under way, or the last one."""
        self.outage = 0
        """So many requests that follow get lost."""
        self.chance = random.Random(11)
        super().__init__()

    def stores(self) -> Callable[[], Store]:
        self.bucket = MemoryBucket(clock=self.clock, page_size=5)
        self.faulty = FaultyBucket(self.bucket, self.plan)
        chance = random.Random(7)

        def make(ahead: int = 0) -> ObjectStore:
            own = self.bucket.share()
            return ObjectStore(
                Weather(self, own, self.faulty.share(own)),  # type: ignore[arg-type]
                clock=CorrectedClock(HastyClock(self.clock), lambda: ahead),
                inline_limit=INLINE,
                measure_skew=False,
                fenced_removals=self.fenced,
                margin=2000,
                spread=False,
                random_bytes=chance.randbytes,
            )

        self.make = make
        return make

    @initialize(seed=st.integers(0, 10_000))
    def weather(self, seed: int) -> None:
        self.chance.seed(seed)

    def plan(self, request: Request) -> Fault | None:
        chance = self.chance
        if request.method == "download" or (chance.randrange(self.RATE) and not self.outage):
            return None
        self.faults += 1
        if self.outage:
            self.outage -= 1
            return lost_undone()
        if not chance.randrange(3):
            self.outage = chance.randrange(12)
        faults = [
            lost_done(),
            lost_undone(),
            lost_later(chance.randrange(12)),
            repeated(),
            skewed(chance.choice([-60_000, 60_000])),
            throttled(),
        ]
        return chance.choice([fault for fault in faults if fits(fault, request.method)])

    # Calls that may fail

    def attempt(self, work: Awaitable[T], *, some: bool = False) -> Tried:
        """Do it in bad weather. What was left half done is finished then, as others would after a minute; and what is
        on its way arrives if the call failed, or some of it may have (``some``), so that a look tells what was done."""
        self.faults = 0
        self.calm = False
        try:
            tried = Tried(self.run(work), None)
        except StoreError as error:
            # A message whose DELETE was given up is left alone, by later calls, too, while that may take place.
            doomed = not self.fenced and isinstance(error, OutcomeUnknown)
            require(self.faults or doomed, f"without a fault it raised {error!r}")
            require(isinstance(error, OutcomeUnknown | StoreBusy) or type(error) is StoreError, f"it raised {error!r}")
            tried = Tried(None, error)
        except LeaseLost as error:
            tried = Tried(None, error)
        finally:
            self.run(self._idle())
            self.calm = True
            self.outage = 0
        if some or tried.error is not None or self._half_done():
            self.run(self.faulty.settle())
        if self._half_done():
            self.run(self._finish())
        return tried

    async def _idle(self) -> None:
        for one in self.ponds:
            while one.service.tasks or one.store._engine.tasks:  # type: ignore[attr-defined]
                await one.settle()

    def _half_done(self) -> bool:
        return any(
            records.form(len(data)).kind == records.Kind.MOVING
            for name, data in self.bucket.objects.items()
            if "/m/" in name or "/d/" in name
        )

    async def _finish(self) -> None:
        """By somebody for whom a minute has passed since."""
        store = self.make(A_WHILE)
        await store.open()
        for _ in range(3):
            for box in Box:
                await store.list("default", "q", box)
            while store._engine.tasks:
                await self.ponds[0].settle()
        await store.close()
        require(not self._half_done(), "something stays half done")

    def perhaps(self, id: str, changed: Model) -> None:
        """A step on a message may have been taken: then it is as in the changed model."""
        there = self.run(self.standing()).get(id)
        message = changed.messages.get(id)
        if (there is None) if message is None else (there is not None and there[1] == message.facts()):
            self.model = changed

    def perhaps_enqueued(self, tried: Tried, payloads: list[bytes], options: dict[str, Any]) -> None:
        """These may have been put in, or some of them."""
        standing = self.run(self.standing())
        new = sorted(id for id in standing if id not in self.model.messages)
        require(tried.perhaps or not new, f"an enqueue that failed with {tried.error!r} went through")
        left = list(payloads)
        for id in new:
            payload = standing[id][1][0]
            require(payload in left, "a message is there that nobody enqueued")
            left.remove(payload)
            self._enqueued(self.model, id, False, payload, options)

    # Producers

    @rule(which=WHICH, payload=PAYLOADS, options=ENQUEUES)
    def enqueue(self, which: int, payload: bytes, options: dict[str, Any]) -> None:
        self.tick()
        tried = self.attempt(self.queue(which).enqueue(payload, **options))
        if tried.error is None:
            receipt = tried.result
            self._enqueued(self.model, receipt.message_id, receipt.duplicate, payload, options)
        else:
            self.perhaps_enqueued(tried, [payload], options)

    @rule(which=WHICH, payloads=st.lists(PAYLOADS, max_size=6), options=ENQUEUES)
    def enqueue_many(self, which: int, payloads: list[bytes], options: dict[str, Any]) -> None:
        self.tick()
        tried = self.attempt(self.queue(which).enqueue_many(payloads, **options))
        if tried.error is not None:
            self.perhaps_enqueued(tried, payloads, options)
            return
        require(len(tried.result) == len(payloads), "not every payload has a receipt")
        for receipt, payload in zip(tried.result, payloads, strict=True):
            self._enqueued(self.model, receipt.message_id, receipt.duplicate, payload, options)

    @precondition(lambda self: self.model.messages)
    @rule(which=WHICH, nth=NTH)
    def enqueue_with_a_known_id(self, which: int, nth: int) -> None:
        id = sorted(self.model.messages)[nth % len(self.model.messages)]
        tried = self.attempt(self.queue(which).enqueue(b"another", message_id=id))
        require(tried.error is not None or tried.result == (id, True), "a known id was let in")

    # Consumers

    def _receive(self, which: int, count: int, visibility: float | None, fresh: bool) -> list[Held]:
        queue, service = self.queue(which), self.ponds[which].service
        knows = False
        if fresh:
            knows = self.attempt(service.refresh_ready_cache("default", "q")).error is None and not self.faults
        tried = self.attempt(queue.receive(count, visibility=visibility), some=True)
        messages: list[Message] = tried.result or []
        if self._must_be_paused(which):
            require(messages == [], "a paused queue delivered")
            return []
        require(len(messages) <= count, "more came than were asked for")
        standing = self.run(self.standing())
        self.settle(self.model, standing)
        expected = self.model.deliverable(self.now)
        self._delivered(self.model, which, messages, visibility)
        self._delivered_to_nobody(self.model, standing, visibility)
        self._took(which, messages)
        if knows and not self.faults and not self._may_be_paused(which):
            require(messages or not expected, "nothing came although something was ready")
        return self.held[len(self.held) - len(messages) :]

    def _delivered_to_nobody(self, model: Model, standing: Standing, visibility: float | None) -> None:
        """A claim that went through, and whose reply did not come: its lease is nobody's, and ends."""
        for id, (_, facts) in standing.items():
            message, lease = model.messages.get(id), facts[9]
            if message is not None and lease is not None and lease != message.lease and self.faults:
                model.deliver(id, lease, self.now, None if visibility is None else ms(visibility))

    def _check_answer(self, held: Held, which: int, answer: Answer) -> None:
        changed = self.model.copy()
        before = self.run(self.standing())
        try:
            self._answered(changed, held, answer)
        except LeaseIsLost:
            stale = self.attempt(self._answer(held, which, answer))
            again = answer == ("ack",) and self._acked_for_all_it_knows(held)
            require(stale.error is not None or again, f"{answer} with a stale lease went through")
            require(self.run(self.standing()) == before, "a stale lease changed something")
            return
        self._judge(self.attempt(self._answer(held, which, answer)), held, changed)

    def _acked_for_all_it_knows(self, held: Held) -> bool:
        """Where a holder's plain delete may have taken place unnoticed he may ack again: nothing is there to change."""
        return not self.fenced and self.model.gone.get(held.id) == "acked"

    def _judge(self, tried: Tried, held: Held, changed: Model) -> None:
        """An answer of somebody who holds the message."""
        require(not isinstance(tried.error, LeaseLost), "who holds a message was told that he does not")
        if tried.error is None:
            self.model = changed
        elif tried.perhaps:
            self.perhaps(held.id, changed)

    @precondition(lambda self: self.held)
    @rule(which=WHICH, nths=st.lists(NTH, min_size=1, max_size=5), answer=st.sampled_from(["ack", "nack", "extend"]))
    def answer_many(self, which: int, nths: list[int], answer: str) -> None:
        several = list({held.lease: held for held in map(self._pick, nths)}.values())
        if not self.shares_leases:
            several = [held for held in several if held.which == which]
        queue = self.queue(which)
        messages = [queue.handle(held.id, *held.lease) for held in several]
        one: Answer = {"ack": ("ack",), "nack": ("nack", 0.5, "boom"), "extend": ("extend", 3.0)}[answer]
        work: Awaitable[Any] = {
            "ack": lambda: queue.ack_many(messages),
            "nack": lambda: queue.nack_many(messages, error="boom", delay=0.5),
            "extend": lambda: queue.extend_many(messages, 3.0),
        }[answer]()
        tried = self.attempt(work, some=True)
        answers = tried.result or [tried] * len(several)
        for held, real in zip(several, answers, strict=True):
            changed = self.model.copy()
            try:
                self._answered(changed, held, one)
            except LeaseIsLost:
                again = answer == "ack" and self._acked_for_all_it_knows(held)
                require(real.error is not None or again, f"a stale {answer} went through")
            else:
                self._judge(Tried(None, real.error), held, changed)

    @precondition(lambda self: self.held)
    @rule(which=WHICH, nth=NTH, payload=PAYLOADS, options=ENQUEUES)
    def hand_off(self, which: int, nth: int, payload: bytes, options: dict[str, Any]) -> None:
        held = self._pick(nth)
        self.tick()
        if not self.shares_leases:
            which = held.which
        message = self.queue(which).handle(held.id, *held.lease)
        changed = self.model.copy()
        before = self.run(self.standing())
        try:
            changed.ack(held.id, held.lease)
        except LeaseIsLost:
            stale = self.attempt(message.ack(then=[("q", payload, options)]))
            require(stale.error is not None, "a stale hand-off went through")
            require(self.run(self.standing()) == before, "a stale hand-off changed something")
            return
        tried = self.attempt(message.ack(then=[("q", payload, options)]))
        require(not isinstance(tried.error, LeaseLost), "who holds a message was told that he does not")
        standing = self.run(self.standing())
        if tried.error is not None and (held.id in standing or not tried.perhaps):
            return
        self.model = changed
        new = [id for id in standing if id not in self.model.messages]
        require(len(new) <= 1, "a hand-off made several messages")
        known = self.model.unique.get(options.get("dedup_key", ""))
        self._enqueued(self.model, new[0] if new else (known or (0, ""))[1], not new, payload, options)

    # Several at once

    def _after(self, held: Held, answer: Answer, error: BaseException | None) -> list[Step]:
        """What an answer may have done, given what it raised."""

        def done(model: Model) -> None:
            self._answered(model, held, answer)

        def stale(model: Model) -> None:
            try:
                done(model)
            except LeaseIsLost:
                return
            raise NotAllowed("who holds a message was told that he does not")

        if error is None:
            return [done]
        if isinstance(error, LeaseLost):
            return [stale]
        require(isinstance(error, StoreError), f"an answer raised {error!r}")
        return [done, _nothing] if isinstance(error, OutcomeUnknown) else [_nothing]

    def _explain(self, standing: Standing, one: list[Step], other: list[Step]) -> None:
        """Two steps at once must have had the effect of the one before the other, or the other way round."""
        refusals = []
        for first, second in [*itertools.product(one, other), *itertools.product(other, one)]:
            model = self.model.copy()
            try:
                first(model)
                second(model)
                self.compare(model, standing)
            except (NotAllowed, LeaseIsLost) as refusal:
                refusals.append(repr(refusal))
            else:
                self.model = model
                return
        raise NotAllowed(f"nothing explains what happened: {refusals}")

    def _together(self, *work: Awaitable[Any]) -> list[Any]:
        async def all_of_them() -> list[Any]:
            return await asyncio.gather(*work, return_exceptions=True)

        results: list[Any] = self.attempt(all_of_them(), some=True).result
        return results

    @precondition(lambda self: self.held)
    @rule(nth=NTH, first=ANSWERS, second=ANSWERS, same_pond=st.booleans())
    def two_answers_at_once(self, nth: int, first: Answer, second: Answer, same_pond: bool) -> None:
        held = self._pick(nth)
        results = self._together(self._answer(held, 0, first), self._answer(held, 0 if same_pond else 1, second))
        standing = self.run(self.standing())
        self._explain(standing, self._after(held, first, results[0]), self._after(held, second, results[1]))

    @rule(counts=st.tuples(st.integers(1, 4), st.integers(1, 4)))
    def two_receive_at_once(self, counts: tuple[int, int]) -> None:
        if self.paused or self._may_be_paused(0) or self._may_be_paused(1):
            return
        results = self._together(self.queue(0).receive(counts[0]), self.queue(1).receive(counts[1]))
        standing = self.run(self.standing())
        self.settle(self.model, standing)
        for which in (0, 1):
            require(isinstance(results[which], list | StoreError), f"receive raised {results[which]!r}")
            results[which] = results[which] if isinstance(results[which], list) else []
            self._delivered(self.model, which, results[which], None)
        self._delivered_to_nobody(self.model, standing, None)
        for which in (0, 1):
            self._took(which, results[which])

    @precondition(lambda self: self.held)
    @rule(nth=NTH, answer=ANSWERS, count=st.integers(1, 4))
    def answer_while_another_receives(self, nth: int, answer: Answer, count: int) -> None:
        if self._may_be_paused(1):
            return
        held = self._pick(nth)
        result, received = self._together(self._answer(held, 0, answer), self.queue(1).receive(count))
        require(isinstance(received, list | StoreError), f"receive raised {received!r}")
        messages = received if isinstance(received, list) else []
        standing = self.run(self.standing())

        def came(model: Model) -> None:
            self.settle(model, standing)
            self._delivered(model, 1, messages, None)
            self._delivered_to_nobody(model, standing, None)

        self._explain(standing, self._after(held, answer, result), [came])
        self._took(1, messages)

    # Time

    @rule(seconds=SECONDS)
    def advance(self, seconds: float) -> None:
        if seconds >= ARRIVES:
            self.run(self.faulty.settle())
        super().advance(seconds)

    @rule(seconds=st.sampled_from([0.001, 1.0, 40.0]))
    def jump(self, seconds: float) -> None:
        if seconds >= ARRIVES:
            self.run(self.faulty.settle())
        super().jump(seconds)

    # Operators: each message is as before, or as after.

    @rule(which=WHICH, action=st.sampled_from(["collect", "collect", "reopen", "resume", "resume", "pause", "purge"]))
    def operate(self, which: int, action: str) -> None:
        if action == "collect":
            self._collect(which)
        elif action == "purge":
            free = [message.id for message in self.model.live() if not message.held(self.now)]
            self._some(self.attempt(self.queue(which).purge(), some=True), free, "gone", self._purged)
        else:
            super().operate(which, action)

    def _collect(self, which: int) -> None:
        self.attempt(self.ponds[which].collect(), some=True)
        if not self.faults:
            self.model.collect(self.now)
            return
        standing = self.run(self.standing())
        for message in self.model.live():
            over = message.expires is not None and message.expires <= self.now and not message.held(self.now)
            if over and standing.get(message.id, ("gone",))[0] != "live":
                self.model._give_up(message, self.now)

    def _purged(self, ids: Iterable[str]) -> None:
        for id in ids:
            self.model._remove(self.model.messages[id], "purged")

    def _some(self, tried: Tried, ids: list[str], box: str, take: Callable[[Iterable[str]], None]) -> None:
        """Those of the messages that are in that box now have come there by this call, and it counted them."""
        standing = self.run(self.standing())
        done = [id for id in ids if standing.get(id, ("gone",))[0] == box]
        if box == "live":
            # In the order in which they have come back to their groups.
            done.sort(key=list(standing).index)
        if tried.error is None:
            require(tried.result == len(done), f"{tried.result} were counted, and {len(done)} were done")
            require(self.faults or len(done) == len(ids), "some were left out")
        take(done)

    @precondition(lambda self: self.model.dead())
    @rule(which=WHICH, nths=st.one_of(st.none(), st.lists(NTH, min_size=1, max_size=3)))
    def redrive(self, which: int, nths: list[int] | None) -> None:
        self.tick()
        ids = self._dead(nths)
        tried = self.attempt(self.queue(which).dead_letters.redrive(None if nths is None else ids), some=True)
        self._some(tried, ids, "live", lambda done: self.model.redrive(done, self.now))

    @precondition(lambda self: len(self.model.dead()) > 2)
    @rule(which=WHICH, nths=st.one_of(st.none(), st.lists(NTH, min_size=1, max_size=3)))
    def purge_dead_letters(self, which: int, nths: list[int] | None) -> None:
        ids = self._dead(nths)
        tried = self.attempt(self.queue(which).dead_letters.purge(None if nths is None else ids), some=True)
        self._some(tried, ids, "gone", self.model.purge_dead)

    @precondition(lambda self: self.model.gone)
    @rule(which=WHICH, nth=NTH)
    def look_for_what_is_gone(self, which: int, nth: int) -> None:
        id = sorted(self.model.gone)[nth % len(self.model.gone)]
        try:
            tried = self.attempt(self.queue(which).get(id))
        except MessageNotFound:
            return
        require(tried.error is not None, f"{id} was {self.model.gone[id]} and is back")


class FaultyDeletingMachine(FaultyObjectsMachine):
    """The same where who holds a message deletes it."""

    fenced = False
    shares_leases = False


__all__ = ["FaultyDeletingMachine", "FaultyObjectsMachine"]
