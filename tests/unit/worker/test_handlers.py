"""What handlers get, and what becomes of their message."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import pydantic
import pytest
from tests.unit.worker.conftest import Held, MakeSite, until

import millpond
from millpond import (
    Consumer,
    Context,
    Defer,
    GiveUp,
    InvalidInput,
    Lease,
    Message,
    MessageState,
    Pond,
    Queue,
    Retry,
    RetryPolicy,
    SyncMessage,
    SyncMessageState,
    SyncPond,
    SyncQueue,
)
from millpond.service.payloads import Payload
from millpond.stores.faulty import Call, Fault, fail_before
from millpond.worker.binding import Bound, Unfit, decoder

NO_JITTER = RetryPolicy(base=10.0, jitter=0.0)


class Order(msgspec.Struct):
    id: int
    items: Annotated[list[str], msgspec.Meta(min_length=1)]


@dataclass
class Point:
    x: int
    y: int = 0


class Model(pydantic.BaseModel):
    id: int = pydantic.Field(gt=0)


ORDER = b'{"id": 7, "items": ["a"]}'


@pytest.mark.parametrize(
    ("kind", "payload", "value"),
    [
        (Order, Payload(ORDER, "application/json"), Order(7, ["a"])),
        (Order, Payload(ORDER, ""), Order(7, ["a"])),
        (Order, millpond.msgpack(Order(7, ["a"])), Order(7, ["a"])),
        (Point, millpond.json({"x": 1}), Point(1)),
        (list[Point], millpond.json([{"x": 1}]), [Point(1)]),
        (Model, millpond.json({"id": 3}), Model(id=3)),
        (Model, millpond.msgpack({"id": 3}), Model(id=3)),
        (list[Model], millpond.json([{"id": 3}]), [Model(id=3)]),
        (bytes, millpond.json([1]), b"[1]"),
        (str, millpond.text("é"), "é"),
        (str, millpond.json("é"), "é"),
        (str, millpond.msgpack("é"), "é"),
        (int, millpond.json(3), 3),
        (Any, millpond.json({"a": 1}), {"a": 1}),
        (None, millpond.msgpack({"a": 1}), {"a": 1}),
        (None, millpond.text("t"), "t"),
        (None, Payload(b"\xff", "image/png"), b"\xff"),
    ],
)
def test_a_payload_is_decoded_as_the_annotation_says(kind: Any, payload: Payload, value: Any) -> None:
    assert decoder(kind)(payload.data, payload.content_type or None) == value


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (Order, Payload(b'{"id": "x", "items": ["a"]}', "")),
        (Order, millpond.json({"id": 1, "items": []})),
        (Order, Payload(b"{", "")),
        (Order, Payload(b"\xff", "application/json")),
        (Order, Payload(b"\xc1", "application/msgpack")),
        (Model, millpond.json({"id": 0})),
        (Model, Payload(b"\xc1", "application/msgpack")),
        (Model, Payload(b"{", "")),
        (str, Payload(b"\xff", "")),
        (str, millpond.json(1)),
        (None, Payload(b"{", "application/json")),
        (None, Payload(b"\xff", "text/plain")),
    ],
)
def test_a_payload_that_is_something_else_does_not_fit(kind: Any, payload: Payload) -> None:
    with pytest.raises(Unfit):
        decoder(kind)(payload.data, payload.content_type or None)


def consumer(handler: Any, **options: Any) -> Consumer:
    return Consumer(name="c", queue="q", namespace=None, handler=handler, **options)


async def _two(a: int, b: int) -> None: ...
async def _sync_message(payload: bytes, message: SyncMessage) -> None: ...
async def _position(message: Message, payload: bytes, /) -> None: ...
async def _thing(payload: object) -> None: ...
async def _unknown(payload: Nowhere) -> None: ...  # noqa: F821 - that it is not there is the point


def _async_message(payload: bytes, message: Message) -> None: ...


def _generator(payload: bytes) -> Any:
    yield payload


async def _asynchronous_generator(payload: bytes) -> Any:
    yield payload


class _Odd:
    pass


@pytest.mark.parametrize(
    ("handler", "options", "text"),
    [
        (_two, {}, "parameter 'b' is filled by nothing"),
        (_sync_message, {}, "a coroutine function takes Message"),
        (_async_message, {}, "takes SyncMessage"),
        (_async_message, {"run_in": "loop"}, "does not go with it"),
        (_two, {"run_in": "process"}, "does not go with it"),
        (lambda payload, message: None, {"type": int}, "parameter 'message' is filled by nothing"),
        (_position, {}, "can only be given by position"),
        (lambda payload: None, {"type": _Odd}, "no payload can be decoded as"),
        (_generator, {}, "it is a generator"),
        (_asynchronous_generator, {}, "it is a generator"),
        (_unknown, {}, "its parameters cannot be told"),
    ],
)
def test_a_handler_that_cannot_be_called_is_refused_before_any_message(handler: Any, options: Any, text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        Bound(consumer(handler, **options))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"concurrency": 0}, "concurrency"),
        ({"visibility": 0}, "visibility"),
        ({"time_limit": float("inf")}, "time_limit"),
        ({"retry": 3}, "retry"),
        ({"run_in": "moon"}, "run_in"),
        ({"queue": ".."}, "queue"),
    ],
)
def test_options_that_cannot_be_right_are_refused_where_they_are_given(options: dict[str, Any], text: str) -> None:
    pond = millpond.connect("memory://")
    with pytest.raises(InvalidInput, match=text):
        pond.consumer(**({"queue": "q"} | options))(lambda payload: None)
    assert pond.consumers == {}


def test_a_function_stays_what_it_is_and_needs_no_open_pond() -> None:
    pond = millpond.connect("memory://")

    @pond.consumer("orders", concurrency=3)
    def double(payload: int) -> int:
        return 2 * payload

    assert double(2) == 4
    assert pond.consumers["double"].concurrency == 3
    with pytest.raises(InvalidInput, match="another name"):
        pond.consumer("others")(double)
    pond.consumer("others", name="again")(double)
    assert list(pond.consumers) == ["double", "again"]


async def test_a_coroutine_gets_what_it_asks_for_by_annotation(site: MakeSite) -> None:
    seen: dict[str, Any] = {}
    async with site() as s:

        @s.pond.consumer("q")
        async def handler(
            message: Message,
            order: Order,
            lease: Lease,
            state: MessageState,
            context: Context,
            queue: Queue,
            pond: Pond,
        ) -> None:
            await state.save({"step": 1})
            seen.update(
                id=message.id, order=order, token=lease.token, state=await state.load(), name=context.consumer,
                payload=context.payload, queue=queue.name, pond=pond,
            )  # fmt: skip

        receipt = await s.queue.enqueue(ORDER)
        worker = s.start()
        await s.empty()
        await s.end(worker)
        assert seen == {
            "id": receipt.message_id, "order": Order(7, ["a"]), "token": 1, "state": {"step": 1}, "name": "handler",
            "payload": Order(7, ["a"]), "queue": "q", "pond": s.pond,
        }  # fmt: skip
        assert worker.counts()["ack"] == 1


async def test_a_function_in_a_thread_gets_the_synchronous_forms(site: MakeSite) -> None:
    seen: dict[str, Any] = {}
    async with site() as s:

        @s.pond.consumer("q")
        def handler(
            text: str, message: SyncMessage, state: SyncMessageState, queue: SyncQueue, pond: SyncPond, context: Context
        ) -> None:
            state.save([1])
            pond.queue("next").enqueue(text.encode())
            seen.update(text=text, id=message.id, state=state.load(), ready=queue.counts().leased, at=context.deadline)

        receipt = await s.queue.enqueue(b"t")
        worker = s.start()
        await s.empty()
        await s.end(worker)
        assert seen == {"text": "t", "id": receipt.message_id, "state": [1], "ready": 1, "at": None}
        assert (await s.pond.queue("next").counts()).ready == 1


async def test_partials_methods_and_objects_are_handlers(site: MakeSite) -> None:
    seen = []

    class Shop:
        async def take(self, number: int) -> None:
            seen.append(("method", number))

        async def __call__(self, number: int) -> None:
            seen.append(("object", number))

    async def add(to: str, number: int) -> None:
        seen.append((to, number))

    async with site() as s:
        for name, handler in (("a", Shop().take), ("b", Shop()), ("c", functools.partial(add, "partial"))):
            s.pond.consumer(name, name=name)(handler)
            await s.pond.queue(name).enqueue(millpond.json(1))
        worker = s.start()
        await until(lambda: len(seen) == 3)
        await s.end(worker)
    assert sorted(seen) == [("method", 1), ("object", 1), ("partial", 1)]


async def test_a_payload_that_does_not_fit_is_a_dead_letter_at_once(site: MakeSite) -> None:
    async with site() as s:
        called = []

        @s.pond.consumer("q")
        async def handler(order: Order) -> None:
            called.append(order)

        await s.queue.enqueue(b'{"id": "seven", "items": []}')
        worker = s.start()
        await s.empty(dead=1)
        await s.end(worker)
        [letter] = await s.queue.dead_letters.list()
        assert letter.dead_reason.startswith("the payload does not fit: Expected `int`, got `str`")
        assert letter.last_error["type"] == "Unfit"
        assert (called, letter.failures, worker.counts()["dead"]) == ([], 0, 1)


async def test_a_large_payload_is_read_for_the_handler(site: MakeSite) -> None:
    large = b"x" * 3_000_000
    async with site() as s:
        got = []

        @s.pond.consumer("q")
        async def handler(payload: bytes) -> None:
            got.append(payload == large)

        await s.queue.enqueue(large)
        worker = s.start()
        await s.empty()
        await s.end(worker)
        assert got == [True]


async def test_an_outage_while_a_large_payload_is_read_is_no_failure(site: MakeSite) -> None:
    calls: list[Call] = []

    def plan(call: Call) -> Fault | None:
        if call.method == "read_blob":
            calls.append(call)
            return fail_before() if len(calls) < 4 else None
        return None

    async with site(plan=plan) as s:
        got: list[int] = []

        @s.pond.consumer("q", visibility=60.0)
        async def handler(payload: bytes, message: Message) -> None:
            got.append(len(payload) + message.failures)

        await s.queue.enqueue(b"x" * 3_000_000)
        worker = s.start()
        await until(lambda: calls)
        await s.pass_(20, steps=20)
        await s.empty()
        await s.end(worker)
        assert (got, len(calls)) == ([3_000_000], 4)


async def test_small_limits_of_errors_are_kept_to(site: MakeSite) -> None:
    async with site(config=millpond.Config(max_error_bytes=100)) as s:

        @s.pond.consumer("q", retry=NO_JITTER)
        async def handler(what: str) -> None:
            if what == "give up":
                raise GiveUp("é" * 1000)
            raise ValueError("long " * 1000)

        dead = await s.queue.enqueue(b"give up")
        failed = await s.queue.enqueue(b"fail")
        worker = s.start()
        await until(lambda: worker.counts()["dead"] == worker.counts()["retry"] == 1)
        await s.end(worker)
        why = (await s.queue.get(dead.message_id)).dead_reason
        assert why is not None
        assert set(why) == {"é"}
        assert 12 <= len(why) <= 50
        assert (await s.queue.get(failed.message_id)).last_error is None


async def test_a_failure_is_kept_with_type_text_and_a_traceback_of_the_handler_alone(site: MakeSite) -> None:
    async with site() as s:

        @s.pond.consumer("q", retry=NO_JITTER)
        def handler(payload: bytes) -> None:
            raise LookupError("no such order")

        receipt = await s.queue.enqueue(b"")
        worker = s.start()
        await until(lambda: worker.counts()["retry"] == 1)
        view = await s.queue.get(receipt.message_id)
        assert (view.failures, view.state) == (1, "delayed")
        assert (view.visible_at - view.updated_at).total_seconds() == 10.0
        assert (view.last_error["type"], view.last_error["message"]) == ("LookupError", "no such order")
        trace = view.last_error["traceback"]
        assert 'raise LookupError("no such order")' in trace
        assert "millpond/worker" not in trace
        await s.pass_(10)
        await until(lambda: worker.counts()["retry"] == 2)
        view = await s.queue.get(receipt.message_id)
        assert (view.visible_at - view.updated_at).total_seconds() == 20.0
        await s.end(worker)


async def test_a_message_that_keeps_failing_becomes_a_dead_letter(site: MakeSite) -> None:
    async with site() as s:
        tries = []

        @s.pond.consumer("q", retry=RetryPolicy(base=0.0))
        async def handler(payload: bytes) -> None:
            tries.append(1)
            raise ValueError("never")

        await s.queue.enqueue(b"", max_attempts=3)
        worker = s.start()
        await s.empty(dead=1)
        await s.end(worker)
        [letter] = await s.queue.dead_letters.list()
        assert (len(tries), letter.failures, letter.dead_reason) == (3, 3, "max_attempts_exceeded")
        assert letter.last_error["message"] == "never"


@pytest.mark.parametrize("run_in", ["loop", "thread"])
async def test_exceptions_that_are_answers(site: MakeSite, run_in: str) -> None:
    raised: dict[bytes, BaseException] = {
        b"retry": Retry(after=77.0, reason="busy"),
        b"policy": Retry(),
        b"give up": GiveUp("no such customer"),
        b"defer": Defer(delay=5.0),
        b"listed": KeyError("k"),
        b"exit": SystemExit(3),
    }
    async with site() as s:
        policy = RetryPolicy(base=10.0, jitter=0.0, give_up_on=(KeyError,))
        if run_in == "loop":

            @s.pond.consumer("q", retry=policy)
            async def handler(payload: bytes) -> None:
                raise raised[payload]
        else:

            @s.pond.consumer("q", retry=policy)
            def threaded(payload: bytes) -> None:
                raise raised[payload]

        ids = {what: (await s.queue.enqueue(what)).message_id for what in raised}
        worker = s.start()
        await until(lambda: sum(worker.counts().values()) == 6)
        views = {what: await s.queue.get(id) for what, id in ids.items()}
        waits = {
            what.decode(): (view.visible_at - view.updated_at).total_seconds() if view.dead_reason is None else "dead"
            for what, view in views.items()
        }
        assert waits == {
            "retry": 77.0, "policy": 10.0, "give up": "dead", "defer": 5.0, "listed": "dead", "exit": 10.0
        }  # fmt: skip
        assert {what.decode(): view.failures for what, view in views.items()} == {
            "retry": 1, "policy": 1, "give up": 0, "defer": 0, "listed": 0, "exit": 1
        }  # fmt: skip
        assert views[b"give up"].dead_reason == "no such customer"
        assert views[b"listed"].dead_reason == "KeyError: 'k'"
        assert views[b"exit"].last_error["type"] == "SystemExit"
        await s.end(worker)


async def test_an_exception_that_cannot_be_stored_as_it_is_is_stored_all_the_same(site: MakeSite) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    errors: list[BaseException] = [Mute(), ValueError("\udcff" * 5), ValueError("long " * 100_000)]
    async with site(config=millpond.Config(max_error_bytes=3000)) as s:

        @s.pond.consumer("q", retry=NO_JITTER)
        async def handler(number: int) -> None:
            raise errors[number]

        ids = [(await s.queue.enqueue(millpond.json(number))).message_id for number in range(3)]
        worker = s.start()
        await until(lambda: worker.counts()["retry"] == 3)
        found = [(await s.queue.get(id)).last_error for id in ids]
        assert "its text cannot be had" in found[0]["message"]
        assert found[1]["message"] == "?????"
        assert (found[2]["message"][:10], found[2]["traceback"]) == ("long long ", "")
        await s.end(worker)


async def test_a_handler_may_answer_by_itself(site: MakeSite) -> None:
    async with site() as s:

        @s.pond.consumer("q")
        async def handler(payload: bytes, message: Message) -> None:
            if payload == b"ack":
                await message.ack(then=[("next", b"x")])
            elif payload == b"nack":
                await message.nack("tired", delay=60)
            elif payload == b"bury":
                await message.bury("unwanted")
            else:
                await message.defer(60)
                raise ValueError("after the answer")

        for what in (b"ack", b"nack", b"bury", b"defer"):
            await s.queue.enqueue(what)
        worker = s.start()
        await until(lambda: worker.counts()["answered"] == 4)
        await s.end(worker)
        counts = await s.queue.counts()
        assert (counts.delayed, counts.dead, counts.ready, counts.leased) == (2, 1, 0, 0)
        assert (await s.pond.queue("next").counts()).ready == 1
        assert worker.counts()["lost"] == 0


async def test_what_is_handed_off_is_enqueued_with_the_ack_or_not_at_all(site: MakeSite) -> None:
    async with site() as s:

        @s.pond.consumer("q", retry=NO_JITTER)
        async def handler(payload: bytes, context: Context) -> None:
            context.hand_off("next", b"from " + payload, priority=7)
            if payload == b"bad":
                context.hand_off("next", b"", priority=99)
            if payload == b"fails":
                raise ValueError("after handing off")

        ids = [(await s.queue.enqueue(what)).message_id for what in (b"good", b"bad", b"fails")]
        worker = s.start()
        await until(lambda: sum(worker.counts().values()) == 3)
        await s.end(worker)
        [passed] = await s.pond.queue("next").peek(5)
        assert (await passed.payload(), passed.priority) == (b"from good", 7)
        assert (await s.queue.get(ids[1])).last_error["type"].endswith("InvalidInput")
        assert (await s.queue.get(ids[2])).last_error["type"] == "ValueError"


async def test_a_coroutine_that_a_decorator_hides_is_not_acked_unrun(site: MakeSite) -> None:
    async with site() as s:

        async def hidden(payload: bytes) -> None: ...

        @s.pond.consumer("q", retry=NO_JITTER)
        def decorated(payload: bytes) -> Any:
            return hidden(payload)

        receipt = await s.queue.enqueue(b"")
        worker = s.start()
        await until(lambda: worker.counts()["retry"] == 1)
        await s.end(worker)
        assert "register the coroutine function itself" in (await s.queue.get(receipt.message_id)).last_error["message"]


async def test_handlers_run_at_the_same_time_up_to_their_concurrency_and_nothing_is_taken_beyond(
    site: MakeSite, held: Held
) -> None:
    async with site() as s:
        s.pond.consumer("q", concurrency=3)(held.wait)
        await s.queue.enqueue_many([b"%d" % number for number in range(10)])
        worker = s.start()
        await until(lambda: len(held.started) == 3)
        await s.settle()
        assert (await s.queue.counts()).leased == 3
        held.go.set()
        await s.empty()
        await s.end(worker)
        assert len(held.ended) == 10


async def test_each_message_has_a_context_of_its_own(site: MakeSite) -> None:
    import contextvars

    mine: contextvars.ContextVar[int] = contextvars.ContextVar("mine", default=0)
    seen = []
    async with site() as s:

        @s.pond.consumer("q", concurrency=1)
        async def handler(payload: bytes) -> None:
            seen.append(mine.get())
            mine.set(1)

        await s.queue.enqueue_many([b"", b"", b""])
        worker = s.start()
        await s.empty()
        await s.end(worker)
    assert seen == [0, 0, 0]


async def test_only_chosen_consumers_run(site: MakeSite) -> None:
    async with site() as s:
        seen = []

        @s.pond.consumer("q")
        async def first(payload: bytes) -> None:
            seen.append("first")

        @s.pond.consumer("other")
        async def second(payload: bytes) -> None:
            seen.append("second")

        await s.queue.enqueue(b"")
        await s.pond.queue("other").enqueue(b"")
        worker = s.start(consumers=["second"])
        await until(lambda: seen)
        await s.end(worker)
        assert seen == ["second"]
        with pytest.raises(InvalidInput, match="the pond has: first, second"):
            s.start(consumers=["third"])


def test_a_worker_without_work_is_refused() -> None:
    with pytest.raises(InvalidInput, match="nothing to run"):
        millpond.Worker(millpond.connect("memory://"))
    with pytest.raises(InvalidInput, match="not on a SyncPond"):
        millpond.Worker(millpond.connect_sync("memory://"))  # type: ignore[arg-type]


def test_the_backoff_grows_to_its_limit_and_is_spread() -> None:
    ids = millpond.connect("memory://").ids
    plain = RetryPolicy(base=2.0, factor=3.0, longest=50.0, jitter=0.0)
    assert [plain.delay(n, None, ids) for n in (0, 1, 2, 3, 4, 5, 10_000)] == [2, 2, 6, 18, 50, 50, 50]
    assert RetryPolicy(factor=1e300, jitter=0.0).delay(900, None, ids) == 300
    spread = [RetryPolicy(base=100.0, jitter=0.5).delay(1, None, ids) for _ in range(300)]
    assert 50 <= min(spread) < 60
    assert 90 < max(spread) <= 100


@pytest.mark.parametrize(
    "fields", [{"base": -1}, {"longest": "5"}, {"jitter": 1.5}, {"factor": 0.5}, {"give_up_on": (3,)}]
)
def test_a_policy_that_cannot_be_right_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        RetryPolicy(**fields)


@pytest.mark.parametrize("make", [lambda: Retry(-1), lambda: Defer("5"), lambda: Retry(float("nan"))])  # type: ignore[arg-type]
def test_an_answer_that_cannot_be_right_is_refused(make: Any) -> None:
    with pytest.raises(InvalidInput):
        make()


async def test_cancelling_oneself_is_a_failure_like_others(site: MakeSite) -> None:
    async with site() as s:

        @s.pond.consumer("q", retry=NO_JITTER)
        async def handler(payload: bytes) -> None:
            raise asyncio.CancelledError("of its own")

        receipt = await s.queue.enqueue(b"")
        worker = s.start()
        await until(lambda: worker.counts()["retry"] == 1)
        assert "CancelledError" in (await s.queue.get(receipt.message_id)).last_error["type"]
        await s.end(worker)
