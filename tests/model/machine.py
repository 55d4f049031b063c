"""The real queue, step by step beside its model.

Each rule does something to the queue through one of two ponds on one store, tells the model, and then everything that
is in the store is compared with everything that is in the model.
"""

from __future__ import annotations

import asyncio
import math
import random
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.model.model import LeaseIsLost, Model, Msg, NotAllowed, require

from millpond.crypto.keyring import Keyring
from millpond.errors import LeaseLost, MessageNotFound
from millpond.message import Message
from millpond.model.clock import ManualClock, SystemClock
from millpond.queue import Queue
from millpond.service.config import Config
from millpond.stores.base import Box, Store
from millpond.stores.encrypted import EncryptedStore
from millpond.stores.memory import MemoryStore
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.store import ObjectStore
from millpond.stores.sqlite import SqliteStore
from millpond.testing import TestPond, pond

T = TypeVar("T")

INLINE = 48
"""Bytes; longer payloads are stored apart, so that both kinds occur."""
POLICY_AGE = 1000
"""ms for which a pond may go by an old policy: `Config.policy_max_age`."""
CACHE_AGE = 1000
"""ms after which a ready cache looks again: `millpond.service.ready.MAX_AGE`."""
CONFIG = Config(
    ready_cache_size=4,  # Bounded caches are met with queues of a dozen messages.
    ready_page_size=3,
    default_visibility=10,
    default_max_attempts=3,
    collect_interval=1e6,  # The collector runs when a rule says so.
    policy_max_age=POLICY_AGE / 1000,
)
KEYRING = Keyring({"old": bytes(32), "new": bytes(range(32))})

SECONDS = st.sampled_from([0.001, 0.05, 0.5, 1.0, 3.0, 10.0, 40.0])
DELAYS = st.sampled_from([0.0, 0.0, 0.0, 0.0, 0.001, 0.5, 1.0, 10.0])
WHICH = st.integers(0, 1)
NTH = st.integers(0, 10_000)
PAYLOADS = st.one_of(st.binary(max_size=8), st.sampled_from([b"", b"x" * INLINE, b"y" * (INLINE + 1), b"z" * 300]))
ENQUEUES = st.fixed_dictionaries(
    {},
    optional={
        "delay": DELAYS,
        "ttl": SECONDS,
        "priority": st.sampled_from([0, 4, 5, 6, 9]),
        "max_attempts": st.sampled_from([0, 1, 2, 5]),
        "visibility": SECONDS,
        "dedup_key": st.sampled_from(["a", "b"]),
        "dedup_window": SECONDS,
        "ordering_key": st.sampled_from(["g", "h"]),
    },
)
NACKS = st.tuples(st.just("nack"), DELAYS, st.sampled_from([None, "boom", {"code": 7}]))
DEFERS = st.tuples(st.just("defer"), DELAYS)
ANSWERS = st.one_of(
    st.just(("ack",)),
    NACKS,
    NACKS,
    DEFERS,
    DEFERS,
    st.tuples(st.just("extend"), SECONDS),
    st.tuples(st.just("bury"), st.just("by hand")),
    st.tuples(st.just("save"), st.integers(0, 9)),
    st.tuples(st.just("forget")),
)
Answer = tuple[Any, ...]


def ms(seconds: float) -> int:
    """Seconds as the queue counts them."""
    return round(seconds * 1000)


@dataclass
class Held:
    """A delivery that was made once, whatever has become of it."""

    id: str
    lease: tuple[str, int]
    which: int
    message: Message | None
    """The object that the consumer has; None once its pond was closed."""


class Machine(RuleBasedStateMachine):
    """Over memory; subclasses say where else."""

    persistent: ClassVar[bool] = False
    ordered: ClassVar[bool] = True
    """The store keeps to the order of insertion, whatever the clocks say; otherwise it goes by these."""
    shares_leases: ClassVar[bool] = True
    """Each pond answers under leases that the other was given."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.clock = ManualClock()
        self.model = Model()
        self.held: list[Held] = []
        self.seed = 0
        self.elapsed = 0
        """Monotonic ms."""
        self.paused = False
        self.paused_by = 0
        self.paused_at = -POLICY_AGE
        self.exact = [False, False]
        """The pond's ready cache knows all that is ready, in order, as far as the model can tell."""
        self.stale_since: list[float] = [0, 0]
        self.directory = Path(tempfile.mkdtemp(prefix="millpond-model-"))
        self.store: Store
        self.make_store = self.stores()

    def stores(self) -> Callable[[], Store]:
        """What makes handles on the store under test."""
        return MemoryStore(clock=self.clock, inline_limit=INLINE).share

    # Plumbing

    def run(self, work: Awaitable[T]) -> T:
        """Wait for it."""
        return self.loop.run_until_complete(work)

    def open(self) -> TestPond:
        """A pond on the store, with ids of its own."""
        self.seed += 1
        opened = pond(store=self.make_store(), clock=self.clock, config=CONFIG, seed=self.seed)
        self.run(opened.open())
        return opened

    @property
    def now(self) -> int:
        """Wall clock, ms."""
        return self.clock.now_ms()

    def queue(self, which: int) -> Queue:
        """The queue as one of the ponds has it."""
        return self.ponds[which].queue("q")

    def alike(self, ids: list[str], expected: list[str], *, by_time: bool = True) -> bool:
        """Whether two lists are in the same order, as far as the store promises one."""
        if self.ordered:
            return ids == expected
        if not by_time:
            return sorted(ids) == sorted(expected)

        def ranks(several: list[str]) -> list[tuple[int, int]]:
            return [(-self.model.messages[id].priority, self.model.messages[id].due) for id in several]

        return all(id in self.model.messages for id in ids) and ranks(ids) == ranks(expected)

    def tick(self) -> None:
        """A moment passes where order is a matter of clocks."""
        if not self.ordered:
            self.clock.advance(0.001)
            self.elapsed += 1
            self.exact = [False, False]

    def wrote(self, which: int) -> None:
        """The other pond's ready cache does not know of it."""
        self.exact[1 - which] = False

    @initialize(
        keep_expired=st.booleans(),
        keep_exhausted=st.sampled_from([True, True, False]),
        first=st.lists(st.tuples(WHICH, PAYLOADS, ENQUEUES), min_size=3, max_size=10),
    )
    def start(self, keep_expired: bool, keep_exhausted: bool, first: list[tuple[int, bytes, dict[str, Any]]]) -> None:
        self.model.keep_expired, self.model.keep_exhausted = keep_expired, keep_exhausted
        self.ponds = [self.open(), self.open()]
        self.store = self.make_store()
        self.run(self.store.open())
        self.run(
            self.queue(0).set_policy(
                on_expired="dead_letter" if keep_expired else "discard",
                on_exhausted="dead_letter" if keep_exhausted else "discard",
            )
        )
        # Not left to the rules: most sequences would deal with an empty queue for most of their length.
        for which, payload, options in first:
            self.enqueue(which, payload, options)

    def teardown(self) -> None:
        try:
            for one in getattr(self, "ponds", []):
                self.run(one.close())
            if hasattr(self, "store"):
                self.run(self.store.close())
        finally:
            self.loop.close()
            shutil.rmtree(self.directory)

    # What the store says

    async def standing(self) -> dict[str, tuple[str, tuple[Any, ...]]]:
        """Every message in the store: its box and its facts."""
        found = {}
        service = self.ponds[0].service
        for box in Box:
            for stored in (await self.store.list("default", "q", box, limit=10_000)).records:
                record = service.record(stored)
                head, status = record.head, record.status
                chunks = [chunk async for chunk in self.ponds[0].service.payload_chunks(record)]
                state = await service.load_state("default", "q", head.id)
                facts = (
                    b"".join(chunks),
                    head.priority,
                    head.ordering_key,
                    head.max_attempts,
                    status.visible_at,
                    status.expires_at,
                    status.attempts,
                    status.failures,
                    status.token,
                    None if status.lease is None else (status.lease.id, status.lease.token),
                    status.last_error,
                    None if status.dead is None else status.dead.reason,
                    None if state is None else state.document.value,
                )
                require(record.item.id not in found, "a message is in both boxes")
                found[record.item.id] = ("dead" if box is Box.DEAD else "live", facts)
        return found

    def settle(self, model: Model, standing: dict[str, tuple[str, tuple[Any, ...]]]) -> None:
        """Have the model take over what hand-out settled on its way."""
        model.settle(self.now, lambda id: standing[id][0] if id in standing else "gone")

    @staticmethod
    def compare(model: Model, standing: dict[str, tuple[str, tuple[Any, ...]]]) -> None:
        """Everything in the store is in the model, and the other way round."""
        for id in standing:
            require(id in model.messages, f"{id} is in the store, but is {model.gone.get(id, 'nobody’s')}")
        for id, message in model.messages.items():
            require(id in standing, f"{id} was lost")
            facts = standing[id][1]
            require(facts == message.facts(), f"{id} is {facts}, not {message.facts()}")

    @invariant()
    def store_is_as_the_model_says(self) -> None:
        if not hasattr(self, "ponds"):
            return

        async def look() -> None:
            self.compare(self.model, await self.standing())
            for which in (0, 1):
                counts = await self.queue(which).counts()
                age = -1 if counts.oldest_age is None else round(counts.oldest_age * 1000)
                real = (*counts[:6], age)
                require(real == self.model.counts(self.now), f"counts are {real}, not {self.model.counts(self.now)}")
            dead = [view.id for view in await self.queue(0).dead_letters.list(limit=10_000)]
            expected = [message.id for message in self.model.dead()]
            require(self.alike(dead, expected, by_time=False), "the list of dead letters is another")
            peeked = [view.id for view in await self.queue(1).peek(10_000)]
            due = [message.id for message in self.model.due(self.now)]
            require(self.alike(peeked, due), f"peek shows {peeked}, not {due}")
            problems = await self.ponds[0].verify()
            require(problems == [], f"verify found {problems}")

        self.run(look())

    # Producers

    def _enqueued(self, model: Model, id: str, duplicate: bool, payload: bytes, options: dict[str, Any]) -> None:
        window = ms(options.get("dedup_window", CONFIG.default_dedup_window))
        key = options.get("dedup_key")
        model.enqueue(
            id,
            duplicate,
            self.now,
            payload=payload,
            delay=ms(options.get("delay", 0)),
            ttl=ms(options["ttl"]) if "ttl" in options else None,
            priority=options.get("priority", 5),
            max_attempts=options.get("max_attempts", CONFIG.default_max_attempts),
            visibility=ms(options.get("visibility", CONFIG.default_visibility)),
            dedup=None if key is None else (key, window),
            group=options.get("ordering_key"),
        )

    @rule(which=WHICH, payload=PAYLOADS, options=ENQUEUES)
    def enqueue(self, which: int, payload: bytes, options: dict[str, Any]) -> None:
        self.tick()
        receipt = self.run(self.queue(which).enqueue(payload, **options))
        self._enqueued(self.model, receipt.message_id, receipt.duplicate, payload, options)
        self.wrote(which)

    @rule(which=WHICH, payloads=st.lists(PAYLOADS, max_size=6), options=ENQUEUES)
    def enqueue_many(self, which: int, payloads: list[bytes], options: dict[str, Any]) -> None:
        self.tick()
        receipts = self.run(self.queue(which).enqueue_many(payloads, **options))
        require(len(receipts) == len(payloads), "not every payload has a receipt")
        for receipt, payload in zip(receipts, payloads, strict=True):
            self._enqueued(self.model, receipt.message_id, receipt.duplicate, payload, options)
        self.wrote(which)

    @precondition(lambda self: self.model.messages)
    @rule(which=WHICH, nth=NTH)
    def enqueue_with_a_known_id(self, which: int, nth: int) -> None:
        id = sorted(self.model.messages)[nth % len(self.model.messages)]
        receipt = self.run(self.queue(which).enqueue(b"another", message_id=id))
        require(receipt == (id, True), "an enqueue with the id of a message that is there made another")

    # Consumers

    def _may_be_paused(self, which: int) -> bool:
        """A pond may go by what it knew before, for a while."""
        if which == self.paused_by or self.elapsed - self.paused_at >= POLICY_AGE:
            return self.paused
        return True

    def _must_be_paused(self, which: int) -> bool:
        return self.paused and (which == self.paused_by or self.elapsed - self.paused_at >= POLICY_AGE)

    def _delivered(self, model: Model, which: int, messages: list[Message], visibility: float | None) -> None:
        for message in messages:
            lease = (message.lease.id, message.lease.token)
            model.deliver(message.id, lease, self.now, None if visibility is None else ms(visibility))
            known = model.messages[message.id]
            shown = (message.attempts, message.failures, message.lease.until_ms)
            require(shown == (known.attempts, known.failures, known.due), f"the message says {shown} of itself")

    def _took(self, which: int, messages: list[Message]) -> None:
        for message in messages:
            self.held.append(Held(message.id, (message.lease.id, message.lease.token), which, message))
            require(self.run(message.read()) == self.model.messages[message.id].payload, "the payload is another")
            require(self.run(message.state.load()) == self.model.messages[message.id].state, "the state is another")
        self.wrote(which)

    @rule(
        which=WHICH,
        count=st.sampled_from([1, 1, 2, 3, 5, 20]),
        visibility=st.one_of(st.none(), SECONDS),
        fresh=st.booleans(),
    )
    def receive(self, which: int, count: int, visibility: float | None, fresh: bool) -> None:
        self._receive(which, count, visibility, fresh)

    @rule(which=WHICH, other=WHICH, answers=st.lists(ANSWERS, min_size=1, max_size=6), fresh=st.booleans())
    def receive_and_answer(self, which: int, other: int, answers: list[Answer], fresh: bool) -> None:
        for held, answer in zip(self._receive(which, len(answers), None, fresh), answers, strict=False):
            self._check_answer(held, other, answer)

    def _receive(self, which: int, count: int, visibility: float | None, fresh: bool) -> list[Held]:
        queue, service = self.queue(which), self.ponds[which].service
        if fresh:
            self.run(service.refresh_ready_cache("default", "q"))
            self.exact[which] = True
        elif self.elapsed - self.stale_since[which] >= CACHE_AGE:
            self.exact[which] = True
        exact = self.exact[which] and service.cache(("default", "q")).spread == 0
        at_hand = [message.id for message in self.model.deliverable(self.now)]
        ranked = self.model.copy()

        def before(known: list[str]) -> bool:
            if self.ordered:
                return known == at_hand[: len(known)]
            ranks = [
                [(-ranked.messages[id].priority, ranked.messages[id].due) for id in ids] for ids in (known, at_hand)
            ]
            return ranks[0] == ranks[1][: len(known)]

        if fresh and self.stale_since[which] == math.inf:
            self.stale_since[which] = self.elapsed
        messages = self.run(queue.receive(count, visibility=visibility))
        if self._must_be_paused(which):
            require(messages == [], "a paused queue delivered")
            return []
        standing = self.run(self.standing())
        self.settle(self.model, standing)
        expected = [message.id for message in self.model.deliverable(self.now)]
        self._delivered(self.model, which, messages, visibility)
        self._took(which, messages)
        self.stale_since[which] = max(self.elapsed, self.stale_since[which])
        if not self._may_be_paused(which):
            require(messages or not expected, "nothing came although something was ready")
            if exact:
                # What hand-out settled on its way lets the next of its group out: that one may come late, no other.
                got = [message.id for message in messages]
                known = [id for id in got if id in at_hand]
                require(before(known), f"hand-out order was {got}, not {expected[:count]}")
                # A bucket's look ends with the first page that has some.
                enough = min(count, len(expected)) if self.ordered else min(1, len(expected))
                require(len(got) >= enough, "fewer came than were ready")
        require(len(messages) <= count, "more came than were asked for")
        return self.held[len(self.held) - len(messages) :]

    @property
    def _after_a_race(self) -> float:
        """Since when a pond that met another at the head of the queue goes by what it knew. In a bucket it may have
        lost a message from its sight that the other does not have either, until it looks again for some reason."""
        return self.elapsed if self.ordered else math.inf

    # Answers, from whoever holds the message or held it once

    def _answer(self, held: Held, which: int, answer: Answer) -> Coroutine[Any, Any, None]:
        """The answer, given through the object that was received or, on another pond, through a handle made of ids."""
        message = held.message
        if not self.shares_leases:
            which = held.which
        if message is None or which != held.which:
            message = self.queue(which).handle(held.id, *held.lease)
        match answer:
            case ("ack",):
                return message.ack()
            case ("nack", delay, error):
                return message.nack(error, delay)
            case ("defer", delay):
                return message.defer(delay)
            case ("extend", seconds):
                return self._extend(message, seconds)
            case ("bury", reason):
                return message.bury(reason)
            case ("save", value):
                return message.state.save(value)
            case ("forget",):
                return message.state.delete()
            case _:
                raise AssertionError(answer)

    async def _extend(self, message: Message, seconds: float) -> None:
        lease = await message.extend(seconds)
        require(lease.until_ms == self.now + ms(seconds), "the extension has another end")

    def _answered(self, model: Model, held: Held, answer: Answer) -> None:
        id, lease = held.id, held.lease
        match answer:
            case ("ack",):
                model.ack(id, lease)
            case ("nack", delay, error):
                model.nack(id, lease, self.now, ms(delay), error)
            case ("defer", delay):
                model.defer(id, lease, self.now, ms(delay))
            case ("extend", seconds):
                model.extend(id, lease, self.now, ms(seconds))
            case ("bury", reason):
                model.bury(id, lease, self.now, reason)
            case ("save", value):
                model.save(id, lease, value)
            case ("forget",):
                model.save(id, lease, None)

    def _pick(self, nth: int) -> Held:
        # The younger half as often as all of them: answers from those who do hold the message are the common case.
        if nth % 2:
            return self.held[-1 - (nth // 2) % min(4, len(self.held))]
        return self.held[(nth // 2) % len(self.held)]

    @precondition(lambda self: self.held)
    @rule(which=WHICH, nth=NTH, answer=ANSWERS)
    def answer(self, which: int, nth: int, answer: Answer) -> None:
        self._check_answer(self._pick(nth), which, answer)

    def _check_answer(self, held: Held, which: int, answer: Answer) -> None:
        before = self.run(self.standing())
        try:
            self._answered(self.model, held, answer)
        except LeaseIsLost:
            try:
                self.run(self._answer(held, which, answer))
            except LeaseLost:
                require(self.run(self.standing()) == before, "a stale lease changed something")
            else:
                raise NotAllowed(f"{answer} with a stale lease went through") from None
        else:
            self.run(self._answer(held, which, answer))
            self.wrote(which)

    @precondition(lambda self: self.held)
    @rule(which=WHICH, nths=st.lists(NTH, min_size=1, max_size=5), answer=st.sampled_from(["ack", "nack", "extend"]))
    def answer_many(self, which: int, nths: list[int], answer: str) -> None:
        several = list({held.lease: held for held in map(self._pick, nths)}.values())
        if not self.shares_leases:
            several = [held for held in several if held.which == which]
        messages = [
            held.message
            if held.message is not None and held.which == which
            else self.queue(which).handle(held.id, *held.lease)
            for held in several
        ]
        queue = self.queue(which)
        if answer == "ack":
            one: Answer = ("ack",)
            answers = self.run(queue.ack_many(messages))
        elif answer == "nack":
            one = ("nack", 0.5, "boom")
            answers = self.run(queue.nack_many(messages, error="boom", delay=0.5))
        else:
            one = ("extend", 3.0)
            answers = self.run(queue.extend_many(messages, 3.0))
        self.wrote(which)
        for held, real in zip(several, answers, strict=True):
            try:
                self._answered(self.model, held, one)
            except LeaseIsLost:
                require(isinstance(real.error, LeaseLost), f"a stale {answer} went through")
            else:
                require(real.error is None, f"{answer} failed: {real.error}")

    @precondition(lambda self: self.held)
    @rule(which=WHICH, nth=NTH, payload=PAYLOADS, options=ENQUEUES)
    def hand_off(self, which: int, nth: int, payload: bytes, options: dict[str, Any]) -> None:
        held = self._pick(nth)
        before = self.run(self.standing())
        self.tick()
        if not self.shares_leases:
            which = held.which
        message = self.queue(which).handle(held.id, *held.lease)
        try:
            self.model.ack(held.id, held.lease)
        except LeaseIsLost:
            try:
                self.run(message.ack(then=[("q", payload, options)]))
            except LeaseLost:
                require(self.run(self.standing()) == before, "a stale hand-off changed something")
                return
            raise NotAllowed("a stale hand-off went through") from None
        self.run(message.ack(then=[("q", payload, options)]))
        self.wrote(which)
        # The acknowledgement names no new id; what is new in the store must be it, or nothing for a duplicate.
        new = [id for id in self.run(self.standing()) if id not in self.model.messages]
        require(len(new) <= 1, "a hand-off made several messages")
        known = self.model.unique.get(options.get("dedup_key", ""))
        self._enqueued(self.model, new[0] if new else (known or (0, ""))[1], not new, payload, options)

    # Several at once

    @precondition(lambda self: self.held)
    @rule(nth=NTH, first=ANSWERS, second=ANSWERS, same_pond=st.booleans())
    def two_answers_at_once(self, nth: int, first: Answer, second: Answer, same_pond: bool) -> None:
        held = self._pick(nth)

        async def both() -> list[Any]:
            return await asyncio.gather(
                self._answer(held, 0, first),
                self._answer(held, 0 if same_pond else 1, second),
                return_exceptions=True,
            )

        results = self.run(both())
        for result in results:
            require(result is None or isinstance(result, LeaseLost), f"an answer raised {result!r}")
        self.exact = [False, False]
        self._either_order(
            lambda model: self._expect(model, held, first, results[0]),
            lambda model: self._expect(model, held, second, results[1]),
        )

    def _expect(self, model: Model, held: Held, answer: Answer, result: object) -> None:
        try:
            self._answered(model, held, answer)
        except LeaseIsLost:
            require(isinstance(result, LeaseLost), "a stale answer went through")
        else:
            require(result is None, f"{answer} failed: {result!r}")

    def _either_order(self, first: Callable[[Model], None], second: Callable[[Model], None]) -> None:
        """Concurrent steps must have had the effect of the one before the other, or the other way round."""
        standing = self.run(self.standing())
        refusals = []
        for steps in ((first, second), (second, first)):
            model = self.model.copy()
            try:
                for step in steps:
                    step(model)
                self.compare(model, standing)
            except NotAllowed as refusal:
                refusals.append(str(refusal))
            else:
                self.model = model
                return
        raise NotAllowed(f"no order of the two explains what happened: {refusals}")

    @rule(counts=st.tuples(st.integers(1, 4), st.integers(1, 4)))
    def two_receive_at_once(self, counts: tuple[int, int]) -> None:
        if self.paused or self._may_be_paused(0) or self._may_be_paused(1):
            return

        async def both() -> list[list[Message]]:
            return await asyncio.gather(self.queue(0).receive(counts[0]), self.queue(1).receive(counts[1]))

        results = self.run(both())
        self.settle(self.model, self.run(self.standing()))
        expected = self.model.deliverable(self.now)
        for which in (0, 1):
            self._delivered(self.model, which, results[which], None)
        require(any(results) or not expected, "nothing came although something was ready")
        for which in (0, 1):
            self._took(which, results[which])
        self.exact = [False, False]
        self.stale_since = [self._after_a_race, self._after_a_race]

    @precondition(lambda self: self.held)
    @rule(nth=NTH, answer=ANSWERS, count=st.integers(1, 4))
    def answer_while_another_receives(self, nth: int, answer: Answer, count: int) -> None:
        if self._may_be_paused(1):
            return
        held = self._pick(nth)

        async def both() -> tuple[object, Any]:
            return await asyncio.gather(
                self._answer(held, 0, answer), self.queue(1).receive(count), return_exceptions=True
            )

        result, messages = self.run(both())
        require(isinstance(messages, list), f"receive raised {messages!r}")
        standing = self.run(self.standing())

        def received(model: Model) -> None:
            self.settle(model, standing)
            self._delivered(model, 1, messages, None)

        self._either_order(lambda model: self._expect(model, held, answer, result), received)
        self._took(1, messages)
        self.exact = [False, False]
        self.stale_since[1] = self._after_a_race

    # Time

    @rule(seconds=SECONDS)
    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.elapsed += ms(seconds)
        self.exact = [False, False]

    @rule(seconds=st.sampled_from([-40.0, -3.0, -0.5, -0.001, 0.001, 1.0, 40.0]))
    def jump(self, seconds: float) -> None:
        if not self.ordered:
            # Set back, the clock would put what comes next before what is there.
            seconds = abs(seconds)
        self.clock.jump(seconds)
        self.exact = [False, False]

    @rule(nth=NTH, offset=st.sampled_from([-1, 0, 0, 1]))
    def advance_until_one_is_due(self, nth: int, offset: int) -> None:
        later = sorted({message.due for message in self.model.live() if message.due + offset > self.now})
        if later:
            self.advance((later[nth % len(later)] + offset - self.now) / 1000)

    # Operators

    @rule(
        which=WHICH,
        action=st.sampled_from(["collect", "collect", "reopen", "reopen", "resume", "resume", "pause", "purge"]),
    )
    def operate(self, which: int, action: str) -> None:
        # One rule for all of these, lest every sequence of steps be mostly of them.
        match action:
            case "collect":
                self.run(self.ponds[which].collect())
                self.model.collect(self.now)
                self.wrote(which)
            case "reopen":
                self._reopen(which)
            case "purge":
                removed = self.run(self.queue(which).purge())
                require(removed == self.model.purge(self.now), "purge removed another number")
                self.wrote(which)
            case _:
                self._pause_or_resume(which, action == "pause")

    def _dead(self, nths: list[int] | None) -> list[str]:
        dead = [message.id for message in self.model.dead()]
        return dead if nths is None else list(dict.fromkeys(dead[nth % len(dead)] for nth in nths))

    @precondition(lambda self: self.model.dead())
    @rule(which=WHICH, nths=st.one_of(st.none(), st.lists(NTH, min_size=1, max_size=3)))
    def redrive(self, which: int, nths: list[int] | None) -> None:
        self.tick()
        ids = self._dead(nths)
        if nths is None and not self.ordered:
            # They go as they are listed, which in a bucket is not as they died.
            listed = [view.id for view in self.run(self.queue(which).dead_letters.list(limit=10_000))]
            require(sorted(listed) == sorted(ids), "the list of dead letters is another")
            ids = listed
        count = self.run(self.queue(which).dead_letters.redrive(None if nths is None else ids))
        require(count == len(ids), "another number of dead letters was redriven")
        self.model.redrive(ids, self.now)
        self.wrote(which)

    @precondition(lambda self: len(self.model.dead()) > 2)
    @rule(which=WHICH, nths=st.one_of(st.none(), st.lists(NTH, min_size=1, max_size=3)))
    def purge_dead_letters(self, which: int, nths: list[int] | None) -> None:
        ids = self._dead(nths)
        count = self.run(self.queue(which).dead_letters.purge(None if nths is None else ids))
        require(count == len(ids), "another number of dead letters was purged")
        self.model.purge_dead(ids)
        self.wrote(which)

    @precondition(lambda self: self.model.gone)
    @rule(which=WHICH, nth=NTH)
    def look_for_what_is_gone(self, which: int, nth: int) -> None:
        id = sorted(self.model.gone)[nth % len(self.model.gone)]
        try:
            self.run(self.queue(which).get(id))
        except MessageNotFound:
            return
        raise NotAllowed(f"{id} was {self.model.gone[id]} and is back")

    def _pause_or_resume(self, which: int, paused: bool) -> None:
        queue = self.queue(which)
        self.run(queue.pause() if paused else queue.resume())
        self.paused, self.paused_by, self.paused_at = paused, which, self.elapsed

    def _reopen(self, which: int) -> None:
        self.run(self.ponds[which].close())
        self.ponds[which] = self.open()
        for held in self.held:
            if held.which == which:
                held.message = None
        self.exact[which] = True
        self.stale_since[which] = self.elapsed


class CandidatesMachine(Machine):
    """Memory that cannot take: consumers compete for candidates of their ready caches."""

    def stores(self) -> Callable[[], Store]:
        return MemoryStore(clock=self.clock, inline_limit=INLINE, takes=False).share


class ObjectsMachine(Machine):
    """A bucket. Its order is that of clocks, so each enqueue has a moment of its own, and clocks are not set back.

    It never deletes without a condition: here every lease is answered through both ponds, and one that goes by what it
    knows must notice that the other was first."""

    ordered = False
    fenced = True

    def stores(self) -> Callable[[], Store]:
        bucket = MemoryBucket(clock=self.clock, page_size=5)
        chance = random.Random(7)
        return lambda: ObjectStore(
            bucket.share(),
            clock=self.clock,
            inline_limit=INLINE,
            measure_skew=False,
            fenced_removals=self.fenced,
            # Leases here last ten seconds; and what is ready must come in order.
            margin=2000,
            spread=False,
            random_bytes=chance.randbytes,
        )


class DeletingObjectsMachine(ObjectsMachine):
    """A bucket as it is used: who holds a message deletes it. Each lease is answered by the pond that has it."""

    fenced = False
    shares_leases = False


class SqliteMachine(Machine):
    """One file, two ponds with connections of their own."""

    persistent = True

    def stores(self) -> Callable[[], Store]:
        # The store's own waiting, for locks, is for real; the queue's time is not.
        return lambda: SqliteStore(self.directory / "pond.db", clock=SystemClock(), inline_limit=INLINE)


class EncryptedMemoryMachine(Machine):
    """Memory, encrypted."""

    def stores(self) -> Callable[[], Store]:
        inner = super().stores()
        return lambda: EncryptedStore(inner(), KEYRING)


class EncryptedObjectsMachine(ObjectsMachine):
    """A bucket, encrypted."""

    def stores(self) -> Callable[[], Store]:
        inner = super().stores()
        return lambda: EncryptedStore(inner(), KEYRING)


class EncryptedSqliteMachine(SqliteMachine):
    """SQLite, encrypted."""

    def stores(self) -> Callable[[], Store]:
        inner = super().stores()
        return lambda: EncryptedStore(inner(), KEYRING)


__all__ = [
    "CandidatesMachine",
    "DeletingObjectsMachine",
    "EncryptedMemoryMachine",
    "EncryptedObjectsMachine",
    "EncryptedSqliteMachine",
    "Machine",
    "Msg",
    "ObjectsMachine",
    "SqliteMachine",
]
