"""Some minutes in the life of a queue, step by step, and what must be found after it was cut short in one of them.

The workload is run once without trouble, and after each step the model is kept. Time, ids and leases come from the
test, so every other run does the same up to the point where it crashes. Then each message must be as it was after the
last step that was acknowledged, or as it would have been after the one that was under way; and the queue must go on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from tests.model.model import Model, require

from millpond.errors import LeaseLost, MessageNotFound, MillpondError
from millpond.message import Message
from millpond.model.clock import ManualClock
from millpond.queue import Queue
from millpond.service.config import Config
from millpond.service.consuming import HandOff
from millpond.stores.base import Box, Store
from millpond.testing import TestPond, pond

INLINE = 1000
"""Bytes; payloads above it are stored apart."""
LARGE = b"0123456789abcdef" * 500
CONFIG = Config(default_visibility=30, default_max_attempts=2, collect_interval=1e6, orphan_age=60)
QUEUES = ("orders", "invoices")

Facts = tuple[Any, ...]
Standing = dict[str, dict[str, Facts]]


class Step(NamedTuple):
    """Something that one caller asks for and is answered."""

    name: str
    run: Callable[[Workload], Awaitable[None]]
    whole: bool
    """It happens as one or not at all; otherwise each message for itself."""


STEPS: list[Step] = []


def step(*, whole: bool = True) -> Callable[[Callable[[Workload], Awaitable[None]]], None]:
    """Add a step to the workload."""

    def add(function: Callable[[Workload], Awaitable[None]]) -> None:
        STEPS.append(Step(function.__name__, function, whole))

    return add


def lease(message: Message) -> tuple[str, tuple[str, int]]:
    """How the model names a delivery."""
    return message.id, (message.lease.id, message.lease.token)


class Workload:
    """The queue that is worked on, and a model of each of its queues."""

    def __init__(self, make_store: Callable[[], Store], clock: ManualClock) -> None:
        self.make_store = make_store
        self.clock = clock
        self.models = {name: Model() for name in QUEUES}
        self.lives = 0
        self.opened = False
        self.pond: TestPond
        self.held: dict[bytes, Message] = {}
        """By payload."""
        self.delivered: list[Message] = []
        """All that were ever received, in order."""

    async def open(self) -> None:
        """Begin, or go on after a stop."""
        self.lives += 1
        self.opened = False
        self.pond = pond(store=self.make_store(), clock=self.clock, config=CONFIG, seed=self.lives)
        await self.pond.open()
        self.opened = True

    def queue(self, name: str = "orders") -> Queue:
        """One of the queues."""
        return self.pond.queue(name)

    @property
    def now(self) -> int:
        """ms."""
        return self.clock.now_ms()

    async def enqueue(self, payloads: list[bytes], name: str = "orders", **options: Any) -> list[str]:
        """Enqueue, and tell the model."""
        if len(payloads) == 1:
            receipts = [await self.queue(name).enqueue(payloads[0], **options)]
        else:
            receipts = await self.queue(name).enqueue_many(payloads, **options)
        for receipt, payload in zip(receipts, payloads, strict=True):
            self.enqueued(receipt.message_id, receipt.duplicate, payload, name, **options)
        return [receipt.message_id for receipt in receipts]

    def enqueued(self, id: str, duplicate: bool, payload: bytes, name: str, **options: Any) -> None:
        """Tell the model of an enqueue."""
        dedup = options.get("dedup_key")
        self.models[name].enqueue(
            id,
            duplicate,
            self.now,
            payload=payload,
            delay=round(options.get("delay", 0) * 1000),
            ttl=round(options["ttl"] * 1000) if "ttl" in options else None,
            priority=options.get("priority", 5),
            max_attempts=options.get("max_attempts", CONFIG.default_max_attempts),
            visibility=round(CONFIG.default_visibility * 1000),
            dedup=None if dedup is None else (dedup, round(CONFIG.default_dedup_window * 1000)),
            group=options.get("ordering_key"),
        )

    async def receive(self, count: int, name: str = "orders") -> list[Message]:
        """Receive, and tell the model."""
        messages = await self.queue(name).receive(count)
        self.delivered += messages
        await self.settle(name, messages)
        for message in messages:
            self.models[name].deliver(*lease(message), self.now, None)
            self.held[self.models[name].messages[message.id].payload] = message
        return messages

    async def settle(self, name: str, messages: list[Message]) -> None:
        """Have the model take over what hand-out settled on its way. In a run without trouble that is nothing."""

    async def standing(self, live: TestPond) -> Standing:
        """All that is in the store."""
        found: Standing = {}
        for name in QUEUES:
            found[name] = {}
            for box in Box:
                for record in (await live.service.list_messages(None, name, limit=1000, box=box)).records:
                    head, status = record.head, record.status
                    payload = b"".join([chunk async for chunk in live.service.payload_chunks(record)])
                    state = await live.service.load_state(None, name, head.id)
                    found[name][head.id] = (
                        payload,
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
        return found


# The steps. Each is one call that the queue answers, and only then tells the model: a crash between is in the step.


@step()
async def enqueue_one(work: Workload) -> None:
    await work.enqueue([b"plain"], priority=7)


@step(whole=False)
async def enqueue_a_batch(work: Workload) -> None:
    await work.enqueue([b"one", b"two", b"three", b"four", b"five"])


@step()
async def enqueue_a_large_one(work: Workload) -> None:
    await work.enqueue([LARGE], priority=9)


@step()
async def enqueue_with_a_dedup_key(work: Workload) -> None:
    await work.enqueue([b"once"], dedup_key="once")


@step()
async def enqueue_it_again(work: Workload) -> None:
    await work.enqueue([b"twice"], dedup_key="once")


@step(whole=False)
async def enqueue_in_order(work: Workload) -> None:
    await work.enqueue([b"first", b"second", b"third"], ordering_key="line", priority=8)


@step()
async def enqueue_for_later(work: Workload) -> None:
    await work.enqueue([b"later"], delay=1000, ttl=5000)


@step()
async def claim_one(work: Workload) -> None:
    await work.receive(1)


@step(whole=False)
async def claim_several(work: Workload) -> None:
    # As many as the first look of a consumer that pays for looking has left: one write, so that its failure is theirs.
    await work.receive(3)


@step()
async def read_the_large_one(work: Workload) -> None:
    require(await work.held[LARGE].read() == LARGE, "a payload came otherwise than it went")


@step()
async def extend(work: Workload) -> None:
    message = work.held[LARGE]
    await message.extend(50)
    work.models["orders"].extend(*lease(message), work.now, 50_000)


@step()
async def save_state(work: Workload) -> None:
    await work.held[LARGE].state.save({"step": 1})
    work.models["orders"].save(*lease(work.held[LARGE]), {"step": 1})


@step()
async def save_state_again(work: Workload) -> None:
    await work.held[LARGE].state.save({"step": 2})
    work.models["orders"].save(*lease(work.held[LARGE]), {"step": 2})


@step()
async def ack_the_large_one(work: Workload) -> None:
    await work.held[LARGE].ack()
    work.models["orders"].ack(*lease(work.held[LARGE]))


@step()
async def ack_the_first_in_line(work: Workload) -> None:
    await work.held[b"first"].ack()
    work.models["orders"].ack(*lease(work.held[b"first"]))


@step()
async def save_the_state_of_another(work: Workload) -> None:
    await work.held[b"plain"].state.save("kept over retries")
    work.models["orders"].save(*lease(work.held[b"plain"]), "kept over retries")


@step()
async def nack(work: Workload) -> None:
    await work.held[b"plain"].nack("no luck")
    work.models["orders"].nack(*lease(work.held[b"plain"]), work.now, 0, "no luck")


@step()
async def defer(work: Workload) -> None:
    await work.held[b"one"].defer(5)
    work.models["orders"].defer(*lease(work.held[b"one"]), work.now, 5000)


@step(whole=False)
async def claim_again(work: Workload) -> None:
    work.held.clear()
    await work.receive(3)


@step(whole=False)
async def nack_into_the_dead_letters(work: Workload) -> None:
    messages = list(work.held.values())
    answers = await work.queue().nack_many(messages, error="again")
    for message, answer in zip(messages, answers, strict=True):
        if answer.error is not None:
            raise answer.error
        work.models["orders"].nack(*lease(message), work.now, 0, "again")


@step()
async def claim_the_second_in_line(work: Workload) -> None:
    await work.receive(1)


@step()
async def hand_off(work: Workload) -> None:
    message = work.held[b"second"]
    then = [HandOff(None, "invoices", b"made from an order"), HandOff(None, "invoices", LARGE)]
    made = await work.pond.service.ack(message._delivery, then)
    work.models["orders"].ack(*lease(message))
    for each, one in zip(then, made, strict=True):
        work.enqueued(one.message_id, one.duplicate, each.source, "invoices")


@step()
async def stop_and_start_again(work: Workload) -> None:
    # Leases end meanwhile, and what was deferred is due.
    await work.pond.close()
    work.clock.advance(100)
    await work.open()


@step(whole=False)
async def claim_what_lapsed(work: Workload) -> None:
    work.held.clear()
    await work.receive(2)


@step(whole=False)
async def redrive(work: Workload) -> None:
    ids = [message.id for message in work.models["orders"].dead()]
    await work.queue().dead_letters.redrive()
    work.models["orders"].redrive(ids, work.now)


@step()
async def bury(work: Workload) -> None:
    message = next(iter(work.held.values()))
    await message.bury("by hand")
    work.models["orders"].bury(*lease(message), work.now, "by hand")


@step(whole=False)
async def claim_some_more(work: Workload) -> None:
    work.held.clear()
    await work.receive(3)


@step(whole=False)
async def ack_many(work: Workload) -> None:
    messages = list(work.held.values())
    for message, answer in zip(messages, await work.queue().ack_many(messages), strict=True):
        if answer.error is not None:
            raise answer.error
        work.models["orders"].ack(*lease(message))


@step(whole=False)
async def purge_the_dead(work: Workload) -> None:
    ids = [message.id for message in work.models["orders"].dead()]
    await work.queue().dead_letters.purge()
    work.models["orders"].purge_dead(ids)


@step(whole=False)
async def collect(work: Workload) -> None:
    work.clock.advance(6000)
    await work.pond.collect()
    for model in work.models.values():
        model.collect(work.now)


@step(whole=False)
async def purge(work: Workload) -> None:
    await work.queue().purge()
    work.models["orders"].purge(work.now)


@step()
async def enqueue_after_all(work: Workload) -> None:
    await work.enqueue([b"last"])


# Running it


class Run(NamedTuple):
    """How far a run came."""

    done: int
    """Steps that were acknowledged."""
    error: MillpondError | None


async def run(
    work: Workload, kept: list[dict[str, Model]] | None = None, answered: Callable[[], object] = lambda: None
) -> Run:
    """Work until the end or the first error. ``kept`` gets the models, first those of the empty queue; ``answered`` is
    called after each step that was acknowledged."""
    done = 0
    if kept is not None:
        kept.append({name: model.copy() for name, model in work.models.items()})
    try:
        if work.lives == 0:
            await work.open()
        for each in STEPS:
            work.clock.advance(1)
            await each.run(work)
            done += 1
            answered()
            if kept is not None:
                kept.append({name: model.copy() for name, model in work.models.items()})
    except MillpondError as error:
        return Run(done, error)
    return Run(done, None)


def facts(models: dict[str, Model]) -> Standing:
    """As `Workload.standing`, of the models."""
    return {
        name: {message.id: message.facts() for message in model.messages.values()} for name, model in models.items()
    }


def differences(found: Standing, expected: Standing) -> str:
    """What is otherwise than expected, in a few lines."""
    return "\n".join(
        f"{queue} {id}: found {found[queue].get(id)!s:.300}, expected {expected[queue].get(id)!s:.300}"
        for queue in expected
        for id in {**found[queue], **expected[queue]}
        if found[queue].get(id) != expected[queue].get(id)
    )


async def check(live: TestPond, work: Workload, kept: list[dict[str, Model]], done: int) -> None:
    """What is found after a stop in step number ``done`` (counted from 0)."""
    problems = await live.verify()
    require(problems == [], f"verify found {problems}")
    found = await work.standing(live)
    before = facts(kept[done])
    after = facts(kept[min(done + 1, len(kept) - 1)])
    whole = done >= len(STEPS) or STEPS[done].whole
    if whole:
        require(
            found in [before, after],
            "what is there is neither as before nor as after: "
            f"{differences(found, before)}\n\n{differences(found, after)}",
        )
        return
    for name in QUEUES:
        for id in {*before[name], *after[name], *found[name]}:
            allowed = [before[name].get(id), after[name].get(id)]
            require(
                found[name].get(id) in allowed,
                f"{id} is {found[name].get(id)!s:.300}, which is none of {allowed!s:.700}",
            )


async def refuse_stale_answers(live: TestPond, work: Workload, delivered: list[Message]) -> None:
    """Everything is delivered anew; then the leases of before change nothing, and what was delivered is given back."""
    live.manual_clock.advance(10_000)
    messages: list[Message] = []
    for name in QUEUES:
        while more := await live.queue(name).receive(10):
            messages += more
        groups = [message.ordering_key for message in messages if message.ordering_key is not None]
        require(len(set(groups)) == len(groups), "two messages of one ordering key were delivered at once")
    before = await work.standing(live)
    current = {(message.id, message.lease.token) for message in messages}
    for old in delivered:
        require(
            (old.id, old.lease.token) not in current,
            f"the fencing token {old.lease.token} of {old.id} was given out twice",
        )
        for answer in (live.service.ack, live.service.nack):
            try:
                await answer(old._delivery)
            except (LeaseLost, MessageNotFound):
                continue
            require(False, f"a stale lease of {old.id} was taken for a current one")
    require(await work.standing(live) == before, "answers with stale leases changed something")
    for message in messages:
        await message.defer(0)


async def live_on(live: TestPond, kept: list[dict[str, Model]], done: int) -> None:
    """The queue goes on: what is there is delivered once, nothing that was acked is, and all can be settled."""
    live.manual_clock.advance(10_000)
    gone = {id for models in kept[: done + 1] for model in models.values() for id in model.gone}
    for name in QUEUES:
        queue = live.queue(name)
        await queue.dead_letters.redrive()
        expected = {record.item.id for record in (await live.service.list_messages(None, name, limit=1000)).records}
        require(not expected & gone, f"what was acked or purged is back: {expected & gone}")
        payloads: set[str] = set()
        while messages := await queue.receive(3):
            for message in messages:
                await message.read()
                require(message.id not in payloads, "a message was delivered twice")
                payloads.add(message.id)
            answers = await queue.ack_many(messages)
            require(all(answer.error is None for answer in answers), f"acks failed: {answers}")
        left = {view.id for view in await queue.dead_letters.list()}
        expired = {id for id in expected if id not in payloads | left}
        late = {id for models in kept for id, message in models[name].messages.items() if message.ttl is not None}
        require(expired <= late, f"{expired - late} were there and did not come")
        await queue.dead_letters.purge()
        counts = await queue.counts()
        require(counts[:6] == (0, 0, 0, 0, 0, 0), f"counts of an empty queue are {counts}")
    await live.collect()
    problems = await live.verify()
    require(problems == [], f"verify found {problems}")
