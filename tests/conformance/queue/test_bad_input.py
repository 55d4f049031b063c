"""Arguments that cannot be right: each call says so with the error that it documents, before anything is written."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from millpond import Config, InvalidInput, InvalidMessageId, InvalidQueue, Message, MessageNotFound, Pond, TooLarge
from millpond.stores.faulty import FaultyStore

if TYPE_CHECKING:
    from tests.conformance.queue.conftest import World

NAN, INF = float("nan"), float("inf")
HUGE = 1 << 70
SURROGATE = "\ud800"
LARGE = 300_000
ID = "0197a3c2-0000-7000-8000-000000000001"

DURATIONS: list[Any] = [-1, -0.001, NAN, INF, -INF, 1e12, HUGE, -HUGE, "1", b"1", [], {}, True, object(), 1j]
"""No durations, wherever one is asked for."""
POSITIVE: list[Any] = [*DURATIONS, 0, 0.0, 1e-9]
"""Nor these where nothing is not enough."""
COUNTS: list[Any] = [0, -1, -HUGE, 1.0, 1.5, NAN, INF, "1", b"1", True, None, [], object()]
NAMES: list[Any] = [
    "",
    " ",
    ".",
    "..",
    " .. ",
    "a/b",
    "../a",
    "a b",
    "\u00e4",
    "a" * 129,
    "a\x00",
    SURROGATE,
    5,
    b"a",
    [],
    {},
]
IDS: list[Any] = ["", "x", "..", "../" + ID, ID + "/", ID[:-1], ID[:-1] + "g", SURROGATE, 5, b"x", [], {}, object()]
TEXTS: list[Any] = ["", 5, b"x", [], True, object(), SURROGATE]


def _nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


UNENCODABLE: list[Any] = [
    *(object(), {"a": object()}, [HUGE], SURROGATE, [SURROGATE], _nested(5000), {1, object()}, iter("a")),
    # What one process can just encode another may be unable to decode.
    *(_nested(levels) for levels in (101, 400, 900, 950, 980)),
    msgspec.Raw(b"\xc1"),
]


async def _stream() -> AsyncIterator[bytes]:
    yield b"x" * LARGE


Call = Callable[[Any], Any]


class Context:
    """What a call may be made on."""

    def __init__(self, pond: Pond, message: Message) -> None:
        self.pond = pond
        self.queue = pond.queue("orders")
        self.message = message


def _enqueue(name: str) -> Call:
    return lambda value: lambda at: at.queue.enqueue(b"x", **{name: value})


def _enqueue_stream(name: str) -> Call:
    return lambda value: lambda at: at.queue.enqueue(_stream(), **{name: value})


def _enqueue_many(name: str) -> Call:
    return lambda value: lambda at: at.queue.enqueue_many([b"x", b"y"], **{name: value})


def _hand_off(name: str) -> Call:
    return lambda value: lambda at: at.message.ack(then=[("next", b"x", {name: value})])


ENQUEUES = {"enqueue": _enqueue, "stream": _enqueue_stream, "enqueue_many": _enqueue_many, "ack": _hand_off}

CASES: dict[str, tuple[Call, list[Any], type[Exception]]] = {
    f"{way}({name})": (make(name), values, InvalidInput)
    for way, make in ENQUEUES.items()
    for name, values in {
        "delay": [*DURATIONS, None],
        "ttl": POSITIVE,
        "visibility": POSITIVE,
        "dedup_window": [],
        "priority": [-1, 10, HUGE, 4.0, "5", None, True, NAN, []],
        "max_attempts": [-1, 1_000_001, HUGE, 1.0, "1", True, NAN, []],
        "attributes": [
            0,
            5,
            "",
            "x",
            b"x",
            [],
            [1],
            (),
            False,
            {1: 2},
            {"a": object()},
            {"a": HUGE},
            {SURROGATE: 1},
            {"a": _nested(400)},
        ],
        "dedup_key": TEXTS,
        "ordering_key": TEXTS,
        "content_type": TEXTS,
        "correlation_id": TEXTS,
        "message_id": IDS,
        "colour": ["red"],
    }.items()
    if name != "colour" or way in ("enqueue_many", "ack")
}
CASES |= {
    "enqueue(dedup_window)": (
        lambda value: lambda at: at.queue.enqueue(b"x", dedup_key="k", dedup_window=value),
        POSITIVE,
        InvalidInput,
    ),
    "enqueue(payload)": (
        lambda value: lambda at: at.queue.enqueue(value),
        ["x", 5, None, {}, [b"x"], object(), b""[:0].decode(), True],
        InvalidInput,
    ),
    "enqueue_many(payloads)": (
        lambda value: lambda at: at.queue.enqueue_many(value),
        ["x", b"x", bytearray(b"x"), 5, None, [b"x", 5], [b"x", "y"], [None], object()],
        InvalidInput,
    ),
    "enqueue(attributes too large)": (_enqueue("attributes"), [{"a": "b" * 1000}, {"a" * 1000: 1}], TooLarge),
    "enqueue(key too large)": (_enqueue("ordering_key"), ["k" * 513, "\u00e4" * 257], TooLarge),
    "receive(count)": (lambda value: lambda at: at.queue.receive(value), COUNTS, InvalidInput),
    "receive(wait)": (lambda value: lambda at: at.queue.receive(wait=value), [*DURATIONS, None], InvalidInput),
    "receive(visibility)": (lambda value: lambda at: at.queue.receive(visibility=value), POSITIVE, InvalidInput),
    "receive(owner)": (lambda value: lambda at: at.queue.receive(owner=value), TEXTS, InvalidInput),
    "receive(owner too large)": (lambda value: lambda at: at.queue.receive(owner=value), ["o" * 513], TooLarge),
    "peek(count)": (lambda value: lambda at: at.queue.peek(value), COUNTS, InvalidInput),
    "get(id)": (lambda value: lambda at: at.queue.get(value), [*IDS, None], InvalidMessageId),
    "get(unknown)": (lambda value: lambda at: at.queue.get(value), [ID], MessageNotFound),
    "handle(id)": (lambda value: lambda at: at.queue.handle(value, "0" * 32, 1), [*IDS, None], InvalidMessageId),
    "handle(lease)": (lambda value: lambda at: at.queue.handle(ID, value, 1), ["", 5, None, b"0"], InvalidInput),
    "handle(token)": (lambda value: lambda at: at.queue.handle(ID, "0" * 32, value), COUNTS, InvalidInput),
    "nack(delay)": (lambda value: lambda at: at.message.nack(delay=value), [*DURATIONS, None], InvalidInput),
    "nack(error)": (lambda value: lambda at: at.message.nack(value), UNENCODABLE, InvalidInput),
    "nack(error too large)": (
        lambda value: lambda at: at.message.nack(value),
        ["e" * 1000, ["e" * 1000]],
        TooLarge,
    ),
    "defer(delay)": (lambda value: lambda at: at.message.defer(value), [*DURATIONS, None], InvalidInput),
    "extend(seconds)": (lambda value: lambda at: at.message.extend(value), [*POSITIVE, None], InvalidInput),
    "bury(reason)": (
        lambda value: lambda at: at.message.bury(value),
        [5, b"x", [], True, object(), SURROGATE, None],
        InvalidInput,
    ),
    "bury(error)": (lambda value: lambda at: at.message.bury("r", value), UNENCODABLE, InvalidInput),
    "bury(too large)": (lambda value: lambda at: at.message.bury(value), ["r" * 1000], TooLarge),
    "save(value)": (lambda value: lambda at: at.message.state.save(value), UNENCODABLE, InvalidInput),
    "save(too large)": (lambda value: lambda at: at.message.state.save(value), ["s" * 1000], TooLarge),
    "read(limit)": (lambda value: lambda at: at.message.read(value), ["1", 1.5, True, -1, []], InvalidInput),
    "ack(then)": (lambda value: lambda at: at.message.ack(value), [5, True, "ab", [5], object()], InvalidInput),
    "ack_many": (lambda value: lambda at: at.queue.ack_many(value), [5, None, "ab", [5], [None]], InvalidInput),
    "nack_many": (lambda value: lambda at: at.queue.nack_many(value), [5, [5]], InvalidInput),
    "nack_many(delay)": (
        lambda value: lambda at: at.queue.nack_many([at.message], delay=value),
        [*DURATIONS, None],
        InvalidInput,
    ),
    "nack_many(error)": (
        lambda value: lambda at: at.queue.nack_many([at.message], error=value),
        UNENCODABLE,
        InvalidInput,
    ),
    "defer_many(delay)": (
        lambda value: lambda at: at.queue.defer_many([at.message], delay=value),
        [*DURATIONS, None],
        InvalidInput,
    ),
    "defer_many": (lambda value: lambda at: at.queue.defer_many(value), [5, [5]], InvalidInput),
    "extend_many": (lambda value: lambda at: at.queue.extend_many(value, 5), [5, [5]], InvalidInput),
    "extend_many(seconds)": (
        lambda value: lambda at: at.queue.extend_many([at.message], value),
        [*POSITIVE, None],
        InvalidInput,
    ),
    "dead_letters.list(limit)": (
        lambda value: lambda at: at.queue.dead_letters.list(limit=value),
        COUNTS,
        InvalidInput,
    ),
    "dead_letters.list(after)": (
        lambda value: lambda at: at.queue.dead_letters.list(after=value),
        IDS,
        InvalidMessageId,
    ),
    "dead_letters.get": (lambda value: lambda at: at.queue.dead_letters.get(value), [*IDS, None], InvalidMessageId),
    "dead_letters.payload": (lambda value: lambda at: at.queue.dead_letters.payload(value), IDS, InvalidMessageId),
    "dead_letters.redrive": (
        lambda value: lambda at: at.queue.dead_letters.redrive(value),
        [*([id] for id in IDS), [None]],
        InvalidMessageId,
    ),
    "dead_letters.redrive(ids)": (
        lambda value: lambda at: at.queue.dead_letters.redrive(value),
        [5, True, ID, b"x", object()],
        InvalidInput,
    ),
    "dead_letters.redrive(unknown)": (
        lambda value: lambda at: at.queue.dead_letters.redrive(value),
        [[ID]],
        MessageNotFound,
    ),
    "dead_letters.purge": (
        lambda value: lambda at: at.queue.dead_letters.purge(value),
        [*([id] for id in IDS), [None]],
        InvalidMessageId,
    ),
    "dead_letters.purge(ids)": (
        lambda value: lambda at: at.queue.dead_letters.purge(value),
        [5, True, ID, b"x", object()],
        InvalidInput,
    ),
    "set_policy": (lambda value: lambda at: at.queue.set_policy(**value), [{"colour": "red"}], InvalidInput),
    "queue(name)": (lambda value: lambda at: at.pond.queue(value), [*NAMES, None], InvalidQueue),
    "queue(namespace)": (
        lambda value: lambda at: at.pond.queue("q", namespace=value),
        [name for name in NAMES if name != ""],
        InvalidQueue,
    ),
}


@pytest.fixture
def limits() -> Config:
    return Config(max_attributes_bytes=900, max_error_bytes=900, max_state_bytes=900)


@pytest.mark.parametrize("case", CASES)
async def test_refused_before_anything_is_written(world: World, case: str, limits: Config) -> None:
    call, values, expected = CASES[case]
    async with world.pond(config=limits, plan={}) as pond:
        queue = pond.queue("orders")
        await queue.enqueue(b"held")
        await queue.enqueue(b"ready")
        at = Context(pond, await world.one(queue))
        before = await queue.counts()
        store = pond.store
        assert isinstance(store, FaultyStore)
        store.calls.clear()
        wrong = []
        for value in values:
            try:
                result = call(value)(at)
                if isinstance(result, Awaitable):
                    result = await result
            except expected as error:
                # One line that says what is wrong, whatever was given.
                if not str(error) or "\n" in str(error) or len(str(error)) > 1000:
                    wrong.append(f"{value!r:.40}: {error}")
            except Exception as error:
                wrong.append(f"{value!r:.40} raised {type(error).__name__}: {error}")
            else:
                wrong.append(f"{value!r:.40} gave {result!r}")
        assert wrong == []
        assert [call for call in store.calls if call.changing] == []
        assert await queue.counts() == before
        # Nothing was lost on the way, either.
        assert [message.payload for message in await queue.receive(5)] == [b"ready"]
        await at.message.ack()
        assert (await pond.queue("next").counts())[:7] == (0, 0, 0, 0, 0, 0, None)


async def test_a_huge_count_is_no_mistake(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue_many([b"1", b"2", b"3"], max_attempts=1)
        assert len(await queue.peek(HUGE)) == 3
        messages = await queue.receive(HUGE)
        assert len(messages) == 3
        await queue.nack_many(messages)
        assert len(await queue.dead_letters.list(limit=HUGE)) == 3


async def test_batch_answers_take_any_iterable(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue_many([b"1", b"2", b"3"])
        messages = await queue.receive(3)
        answers = await queue.ack_many(message for message in messages)
        assert [(answer.message_id, answer.error) for answer in answers] == [(message.id, None) for message in messages]


async def test_a_batch_with_one_stranger_answers_none(world: World) -> None:
    async with world.queue() as queue:
        await queue.enqueue_many([b"1", b"2"])
        messages: list[Any] = await queue.receive(2)
        with pytest.raises(InvalidInput, match="str"):
            await queue.ack_many([*messages, "stranger"])
        assert (await queue.counts()).leased == 2


async def test_nesting_up_to_the_limit(world: World) -> None:
    async with world.queue() as here, world.queue() as there:
        await here.enqueue(b"x", attributes={"a": _nested(99)})
        message = await world.one(here)
        await message.state.save(_nested(100))
        await message.nack(_nested(100))
        message = await world.one(there)
        assert (message.attributes, message.last_error) == ({"a": _nested(99)}, _nested(100))
        assert await message.state.load() == _nested(100)
