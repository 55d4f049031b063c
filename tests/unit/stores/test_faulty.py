from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from millpond.errors import StoreBusy, StoreError
from millpond.model.clock import ManualClock
from millpond.stores.base import Box, Insert, Inserted, Item, Op, Store
from millpond.stores.conformance import CHECKS, Check
from millpond.stores.faulty import (
    Call,
    Crash,
    Fault,
    FaultyStore,
    Gate,
    crash_after,
    crash_before,
    crash_middle,
    fail_after,
    fail_before,
    fail_middle,
    hold,
    nth,
)
from millpond.stores.memory import MemoryStore

NOW = 1_750_000_000_000


def ident(number: int) -> str:
    return f"0197a3c2-0000-7000-8000-{number:012x}"


def inserts(*numbers: int) -> list[Op]:
    return [
        Insert(Item("default", "q", ident(number), 5, None, 1, False), NOW, None, b"h", b"s", b"p")
        for number in numbers
    ]


async def present(store: MemoryStore) -> list[int]:
    page = await store.share().list("default", "q", Box.LIVE)
    return [int(record.item.id[-12:], 16) for record in page.records]


class _Harness:
    shared = True
    persistent = True
    slow = False

    def __init__(self) -> None:
        self._store = MemoryStore(clock=ManualClock())

    def handle(self) -> Store:
        return FaultyStore(self._store.share())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_without_faults_it_is_the_store_inside(check: Check) -> None:
    asyncio.run(check(_Harness()))


@pytest.mark.parametrize(
    ("fault", "written", "committed"),
    [
        (fail_before(), [], []),
        (fail_middle(), [1, 2], []),
        (fail_middle(1), [1], []),
        (fail_middle(0), [], []),
        (fail_after(), [1, 2, 3, 4], [1, 2, 3, 4]),
        (crash_before(), [], []),
        (crash_middle(), [1, 2], []),
        (crash_middle(3), [1, 2, 3], []),
        (crash_after(), [1, 2, 3, 4], [1, 2, 3, 4]),
    ],
)
@pytest.mark.parametrize("method", ["write", "commit"])
def test_what_is_left_of_a_write(fault: Fault, written: list[int], committed: list[int], method: str) -> None:
    async def main() -> None:
        inner = MemoryStore(clock=ManualClock())
        store = FaultyStore(inner, {2: fault})
        await store.write(inserts(9))
        with pytest.raises(Crash if fault.crash else StoreError):
            await (store.write if method == "write" else store.commit)(inserts(1, 2, 3, 4))
        assert await present(inner) == [9, *(written if method == "write" else committed)]
        assert store.crashed is fault.crash
        if fault.crash:
            with pytest.raises(Crash):
                await store.write(inserts(5))
            assert len(store.calls) == 2
        else:
            await store.write(inserts(5))
            assert (await present(inner))[-1] == 5

    asyncio.run(main())


async def _source() -> AsyncIterator[bytes]:
    yield b"one"
    yield b"two"


@pytest.mark.parametrize(
    ("fault", "left"),
    [(crash_before(), []), (crash_middle(), []), (fail_after(), [b"onetwo"]), (crash_after(), [b"onetwo"])],
)
def test_what_is_left_of_a_blob(fault: Fault, left: list[bytes]) -> None:
    async def main() -> None:
        inner = MemoryStore(clock=ManualClock())
        store = FaultyStore(inner, {1: fault})
        with pytest.raises(StoreError):
            await store.write_blob("default", "q", ident(1), _source(), NOW)
        assert [blob.data for blob in inner._data.blobs.values()] == left

    asyncio.run(main())


async def _collect(store: FaultyStore, item: Item, seen: list[bytes]) -> None:
    async for chunk in store.read_blob(item):
        seen.append(chunk)


def test_reading_a_blob_breaks_after_its_first_chunk() -> None:
    async def main() -> None:
        inner = MemoryStore(clock=ManualClock())
        blob = await inner.write_blob("default", "q", ident(1), _source(), NOW)
        apart = Item("default", "q", ident(1), 5, None, blob.size, True)
        [outcome] = await inner.write([Insert(apart, NOW, None, b"h", b"s", b"", None, blob.name)])
        assert isinstance(outcome, Inserted)
        item = outcome.item
        store = FaultyStore(inner, {1: fail_before(), 2: fail_middle()})
        for expected in ([], [b"onetwo"]):
            seen: list[bytes] = []
            with pytest.raises(StoreError):
                await _collect(store, item, seen)
            assert seen == expected
        assert b"".join([chunk async for chunk in store.read_blob(item)]) == b"onetwo"

    asyncio.run(main())


def test_a_crash_silences_everything_but_close() -> None:
    async def main() -> None:
        inner = MemoryStore(clock=ManualClock())
        store = FaultyStore(inner.share(), {1: crash_before()})
        calls: list[str] = []
        store.subscribe("default", "q", lambda: calls.append("woken"))
        item = Item("default", "q", ident(1), 5, None, 1, False)
        attempts: list[Callable[[], Awaitable[object]]] = [
            lambda: store.get("default", "q", ident(1)),
            lambda: store.ready("default", "q", NOW, limit=1),
            lambda: store.list("default", "q", Box.LIVE),
            lambda: store.expired(NOW, limit=1),
            lambda: store.payload(item),
            lambda: store.state(item),
            lambda: store.document("default", "q"),
            lambda: store.counts("default", "q", NOW),
            lambda: store.sweep(NOW, older_than=1, limit=1),
            store.queues,
            store.verify,
            store.open,
            lambda: anext(aiter(store.read_blob(item))),
        ]
        for attempt in attempts:
            with pytest.raises(Crash):
                await attempt()
        with pytest.raises(Crash):
            store.subscribe("default", "q", lambda: None)
        await inner.write(inserts(1))
        await asyncio.sleep(0)
        assert calls == []
        await store.close()

    asyncio.run(main())


def test_a_crash_takes_the_replies_of_others_with_it() -> None:
    async def main() -> None:
        gate = Gate()
        inner = MemoryStore(clock=ManualClock())
        store = FaultyStore(inner, {1: hold(gate), 2: crash_after()})
        waiting = asyncio.ensure_future(store.write(inserts(1)))
        await gate.reached.wait()
        with pytest.raises(Crash):
            await store.write(inserts(2))
        gate.open()
        with pytest.raises(Crash):
            await waiting
        assert await present(inner) == [2]

    asyncio.run(main())


def test_a_gate_holds_a_call_until_it_opens() -> None:
    async def main() -> None:
        gate = Gate()
        inner = MemoryStore(clock=ManualClock())
        store = FaultyStore(inner, nth(2, "write", hold(gate)))
        await store.write(inserts(1))
        waiting = asyncio.ensure_future(store.write(inserts(2)))
        await gate.reached.wait()
        await store.write(inserts(3))
        assert await present(inner) == [1, 3]
        gate.open()
        await waiting
        assert await present(inner) == [1, 3, 2]

    asyncio.run(main())


def test_calls_are_numbered_and_described() -> None:
    async def main() -> None:
        store = FaultyStore(MemoryStore(clock=ManualClock()))
        ops = inserts(1)
        await store.open()
        await store.write(ops)
        await store.ready("default", "q", NOW, limit=1)
        await store.commit(ops)
        assert store.calls == [Call(1, "write", tuple(ops)), Call(2, "ready"), Call(3, "commit", tuple(ops))]
        assert [call.changing for call in store.calls] == [True, False, True]
        assert store.statistics()["calls"] == 3

    asyncio.run(main())


def test_a_plan_may_choose_the_error_and_look_at_the_call() -> None:
    async def main() -> None:
        inner = MemoryStore(clock=ManualClock())
        store = FaultyStore(inner, lambda call: fail_before(StoreBusy()) if len(call.ops) > 1 else None)
        await store.write(inserts(1))
        with pytest.raises(StoreBusy):
            await store.write(inserts(2, 3))
        store.plan = {}
        await store.write(inserts(4, 5))
        assert await present(inner) == [1, 4, 5]

    asyncio.run(main())


def test_nth_counts_one_method_only() -> None:
    plan = nth(2, "get", fail_before())
    methods = ["write", "get", "write", "get", "get"]
    assert [plan(Call(number, method)) is not None for number, method in enumerate(methods, 1)] == [
        False,
        False,
        False,
        True,
        False,
    ]
