"""Tasks: typed calls, their results, progress and failures."""

from __future__ import annotations

import asyncio
import importlib
import os
import threading
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pydantic
import pytest

import millpond
from millpond import testing
from millpond.errors import InvalidInput, MessageNotFound, TaskFailed
from millpond.worker.tasks import RESULTS


class Point(msgspec.Struct):
    x: int
    y: int = 0


@dataclass
class Box:
    corner: Point
    when: datetime


class Form(pydantic.BaseModel):
    name: str
    size: int = pydantic.Field(gt=0)


def connect() -> millpond.Pond:
    return millpond.connect("memory://")


async def test_a_task_is_called_as_before_and_sent_as_it_is_called() -> None:
    app = connect()

    @app.task(keep_result=60)
    async def add(a: int, b: int = 2) -> int:
        """Adds."""
        return a + b

    assert add.__name__ == "add"
    assert add.__doc__ == "Adds."
    async with testing.in_memory(app) as pond:
        assert await add(1) == 3
        handles = [await add.send(1), await add.send(1, b=5), await add.send(a=1, b=1)]
        assert await handles[0].state() == "waiting"
        assert (await pond.work())["ack"] == 3
        assert [await handle.result() for handle in handles] == [3, 6, 2]
        assert await handles[0].state() == "done"
        assert await add.handle(handles[1].id).result() == 6


async def test_arguments_and_results_keep_their_types() -> None:
    app = connect()
    seen: list[Any] = []

    @app.task(keep_result=60)
    def take(
        point: Point, /, box: Box, *rest: UUID, form: Form, data: bytes = b"", **more: set[int]
    ) -> dict[str, Point | None]:
        seen.append((point, box, rest, form, data, more))
        return {"it": point, "none": None}

    box = Box(Point(3, 4), datetime(2025, 6, 15, 12, 0))
    id = UUID(int=5)
    async with testing.in_memory(app) as pond:
        handle = await take.send(Point(1), box, id, form=Form(name="a", size=1), data=b"\xff", odd={1, 3})
        [message] = await pond.queue("tasks.take").peek()
        assert message.content_type == "application/json"
        await pond.work()
        assert seen == [(Point(1), box, (id,), Form(name="a", size=1), b"\xff", {"odd": {1, 3}})]
        assert await handle.result() == {"it": Point(1), "none": None}


async def test_wrong_arguments_are_found_by_the_sender() -> None:
    app = connect()

    @app.task
    def f(a: int, form: Form | None = None) -> None: ...

    async with testing.in_memory(app) as pond:
        with pytest.raises(TypeError, match="missing"):
            await f.send()  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="unexpected"):
            await f.send(1, c=3)  # type: ignore[call-arg]
        with pytest.raises(InvalidInput, match="a"):
            await f.send("x")  # type: ignore[arg-type]
        with pytest.raises(InvalidInput, match="cannot be sent"):
            await f.send(object())  # type: ignore[arg-type]
        assert (await pond.queue("tasks.f").counts()).ready == 0


@pytest.mark.parametrize("payload", [b"[]", b'{"a": "x"}', b"{}", b'{"a": 1, "z": 2}', b"\x80\x04K\x01.", b""])
async def test_a_payload_that_is_no_call_is_a_dead_letter_with_the_reason(payload: bytes) -> None:
    app = connect()
    called = False

    @app.task
    def f(a: int) -> None:
        nonlocal called
        called = True

    async with testing.in_memory(app) as pond:
        await pond.queue("tasks.f").enqueue(payload)
        assert (await pond.work())["dead"] == 1
        [dead] = await pond.queue("tasks.f").dead_letters.list()
        assert "bad_arguments" in (dead.dead_reason or "")
        assert not called


async def test_a_task_that_fails_says_so_by_type_and_message() -> None:
    app = connect()

    @app.task(keep_result=60, max_attempts=2)
    async def fail() -> None:
        raise KeyError("flour")

    async with testing.in_memory(app) as pond:
        handle = await fail.send()
        assert (await pond.work())["retry"] == 1
        assert await handle.state() == "waiting"
        await pond.advance(600)
        await pond.work()
        assert await handle.state() == "failed"
        with pytest.raises(TaskFailed, match="flour") as caught:
            await handle.result()
        assert (caught.value.kind, caught.value.text) == ("KeyError", "'flour'")
        assert caught.value.code == "task_failed"


async def test_a_waiting_caller_is_woken_by_the_result() -> None:
    app = connect()

    @app.task(keep_result=60)
    async def f() -> str:
        return "done"

    async with testing.in_memory(app) as pond, pond.working():
        handle = await f.send()
        waiting = asyncio.create_task(handle.result(timeout=10))
        await pond.settle()
        assert waiting.done()  # no time has passed
        assert await waiting == "done"


async def test_a_result_made_by_another_process_is_found_by_looking() -> None:
    app, other = connect(), connect()

    @app.task(keep_result=60, name="f")
    async def f() -> str:
        return "done"

    @other.task(keep_result=60, name="f")
    async def g() -> str:
        return "done elsewhere"

    async with testing.in_memory(app) as pond:
        handle = await f.send()
        waiting = asyncio.create_task(handle.result(timeout=100))
        for _ in range(20):
            await pond.advance(1)
        message = (await pond.queue("tasks.f").receive())[0]
        await message.ack(then=[(RESULTS, millpond.json("done elsewhere"), {"message_id": message.id, "ttl": 60})])
        await pond.settle()
        assert not waiting.done()
        await pond.advance(1.1)
        assert await waiting == "done elsewhere"


async def test_waiting_ends_with_its_time_and_leaves_nothing_behind() -> None:
    app = connect()

    @app.task(keep_result=60)
    async def never() -> None: ...

    async with testing.in_memory(app) as pond:
        handle = await never.send()
        waiting = asyncio.create_task(handle.result(timeout=10))
        for _ in range(12):
            await pond.advance(1)
        with pytest.raises(TimeoutError, match="10 seconds"):
            await waiting
        assert never.waiters._waiting == {}


async def test_results_are_kept_as_long_as_was_asked_for_and_then_collected() -> None:
    app = connect()

    @app.task
    async def f(n: int) -> int:
        return n

    async with testing.in_memory(app) as pond:
        kept, unkept = await f.options(keep_result=60).send(1), await f.send(2)
        await pond.work()
        assert (await pond.queue(RESULTS).counts()).ready == 1
        with pytest.raises(InvalidInput, match="keep_result=60"):
            await unkept.result()
        assert await unkept.state() == "gone"
        assert await kept.result() == 1
        await pond.advance(61)
        await pond.collect()
        assert (await pond.queue(RESULTS).counts()).ready == 0
        with pytest.raises(MessageNotFound, match="its time is over"):
            await kept.result()


async def test_a_result_that_has_no_form_is_a_failure_with_the_reason() -> None:
    app = connect()

    @app.task(keep_result=60)
    async def f() -> object:
        return object()

    async with testing.in_memory(app) as pond:
        handle = await f.send()
        await pond.work()
        with pytest.raises(TaskFailed, match="bad_result"):
            await handle.result()


@pytest.mark.parametrize("threads", [False, True])
async def test_progress(threads: bool) -> None:
    app = connect()
    go = asyncio.Event()
    go_thread = threading.Event()

    if threads:

        @app.task(name="count", keep_result=60)
        def count() -> int:
            millpond.current_task().progress_sync({"done": 3})
            go_thread.wait(20)
            return 5

        task: Any = count
    else:

        @app.task(name="count", keep_result=60)
        async def count_async() -> int:
            await millpond.current_task().progress({"done": 3})
            await go.wait()
            return 5

        task = count_async

    async with testing.in_memory(app) as pond:
        async with pond.working() as worker:
            handle = await task.send()
            assert await handle.progress() is None
            async with asyncio.timeout(20):
                while await handle.progress() is None:
                    await asyncio.sleep(0.001 if threads else 0)
            assert await handle.state() == "running"
            assert await handle.progress() == {"done": 3}
            go.set()
            go_thread.set()
            await pond.settle()
            assert worker.counts()["ack"] == 1
        assert await handle.result() == 5
        assert await handle.progress() is None


async def test_outside_of_a_worker_there_is_no_current_task() -> None:
    app = connect()

    @app.task
    async def f() -> None:
        millpond.current_task()

    with pytest.raises(InvalidInput, match="only a worker"):
        await f()


async def test_unique_calls() -> None:
    app = connect()
    runs: list[int] = []

    @app.task(unique_for=60)
    async def f(n: int) -> None:
        runs.append(n)

    async with testing.in_memory(app) as pond:
        first = await f.options(unique="k").send(1)
        second = await f.options(unique="k").send(2)
        assert (first.id, second.duplicate) == (second.id, True)
        same = [await f.options(unique=True).send(3), await f.options(unique=True).send(3)]
        assert same[0].id == same[1].id
        assert not (await f.options(unique=True).send(4)).duplicate
        many = await f.options(unique=True).send_many([f.call(7), f.call(7), f.call(8)])
        assert len({handle.id for handle in many}) == 2
        await pond.work()
        assert sorted(runs) == [1, 3, 4, 7, 8]
        await pond.advance(61)
        assert not (await f.options(unique="k").send(9)).duplicate


async def test_how_a_call_is_sent() -> None:
    app = connect()
    order: list[int] = []

    @app.task(concurrency=1)
    async def f(n: int) -> None:
        order.append(n)

    async with testing.in_memory(app) as pond:
        await f.options(delay=10).send(1)
        await f.send(2)
        await f.options(priority=9, correlation_id="c", attributes={"a": 1}).send(3)
        [peeked] = await pond.queue("tasks.f").peek()
        assert (peeked.priority, peeked.correlation_id, peeked.attributes) == (9, "c", {"a": 1})
        await pond.work()
        assert order == [3, 2]
        await pond.advance(10)
        await pond.work()
        assert order == [3, 2, 1]


async def test_many_calls_at_once() -> None:
    app = connect()
    total = 0

    @app.task(keep_result=60)
    async def f(n: int) -> int:
        nonlocal total
        total += n
        return n

    @app.task
    async def g(n: int) -> int:
        return n

    async with testing.in_memory(app) as pond:
        handles = await f.send_many(f.call(number) for number in range(100))
        await pond.work()
        assert total == 4950
        assert [await handle.result() for handle in handles] == list(range(100))
        with pytest.raises(InvalidInput, match="its own calls"):
            await f.send_many([f.call(1), g.call(2)])
        with pytest.raises(InvalidInput, match="one unique key"):
            await f.options(unique="k").send_many([f.call(1)])
        assert (await f.queue.counts()).ready == 0


@pytest.mark.parametrize("options", [{"keep_result": 0}, {"keep_result": "1"}, {"priorty": 3}])
def test_options_that_cannot_be(options: Any) -> None:
    app = connect()
    with pytest.raises(InvalidInput):

        @app.task(**options)
        def f() -> None: ...


def test_two_tasks_of_one_name() -> None:
    app = connect()
    app.task(name="f")(lambda: None)
    with pytest.raises(InvalidInput, match="another name"):
        app.task(name="f")(lambda: None)


async def test_annotations_may_name_what_is_defined_later() -> None:
    app = connect()

    @app.task(keep_result=60)
    def f(later: Later) -> Later:
        return later

    async with testing.in_memory(app) as pond:
        handle = await f.send(Later(3))
        await pond.work()
        assert await handle.result() == Later(3)


async def test_a_redriven_call_has_one_result() -> None:
    app = connect()
    broken = True

    @app.task(keep_result=600, max_attempts=1)
    async def f() -> str:
        if broken:
            raise ValueError("not yet")
        return "done"

    async with testing.in_memory(app) as pond:
        handle = await f.send()
        await pond.work()
        broken = False
        assert await f.queue.dead_letters.redrive() == 1
        await pond.work()
        assert await handle.result() == "done"


async def test_periodic_jobs_and_limits_run_in_a_worker() -> None:
    app = connect()
    ticks: list[datetime] = []
    done = 0
    most = 0
    running = 0

    @app.periodic("0 3 * * *", tz="Europe/Berlin")
    async def nightly(tick: millpond.Tick) -> None:
        ticks.append(tick.at)

    @app.consumer("orders", gate=app.limit("orders", rate=5, per=60, concurrency=2))
    async def order(payload: bytes) -> None:
        nonlocal done, most, running
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        done += 1

    async with testing.in_memory(app) as pond:
        await pond.queue("orders").enqueue_many([b"x"] * 12)
        async with pond.working() as worker:
            assert (done, most) == (5, 2)
            await pond.advance(60)
            assert done == 10
            await pond.advance(60)
            assert done == 12
            await pond.advance(86_400)
            await pond.advance(86_400)
            assert [tick.isoformat() for tick in ticks] == ["2025-06-16T01:00:00+00:00", "2025-06-17T01:00:00+00:00"]
            assert worker.counts()["defer"] == 0
        for message in await pond.queue("orders").peek(12):
            assert message.attempts == 0
        # Nothing is held by a worker that has ended.
        assert (await pond.queue("millpond.limit.concurrency.orders").counts()).leased == 0


async def test_a_high_rate_holds_to_the_message() -> None:
    """Handlers that end while others begin: none of them gives back what another one is about to use."""
    app = connect()
    begun: list[float] = []

    @app.consumer("orders", gate=app.limit("orders", rate=100, per=60, concurrency=5))
    async def order(payload: bytes) -> None:
        begun.append(app.clock.monotonic())

    async with testing.in_memory(app) as pond:
        await pond.queue("orders").enqueue_many([b"x"] * 450)
        async with pond.working(["order"]) as worker:
            for expected in (100, 200, 300, 400):
                for _ in range(5):
                    await pond.settle()
                assert worker.counts()["ack"] == expected
                await pond.advance(66)
            assert worker.counts()["defer"] == 0
    assert all(sum(start <= at < start + 60 for at in begun) <= 100 for start in set(begun))


async def test_no_limit_burns_an_attempt() -> None:
    app = connect()
    attempts: list[int] = []

    @app.consumer("orders", gate=app.limit("orders", rate=1, per=10))
    async def order(message: millpond.Message) -> None:
        attempts.append(message.attempts)

    async with testing.in_memory(app) as pond:
        await pond.queue("orders").enqueue_many([b"x"] * 5)
        async with pond.working():
            for _ in range(5):
                await pond.advance(10)
        assert attempts == [1] * 5


class Later(msgspec.Struct):
    n: int


def test_synchronous_code_sends_and_waits(tmp_path: Path) -> None:
    """A web application without an event loop, and a worker in a thread of its own, on one file."""
    url = f"sqlite:///{tmp_path}/pond.db"
    app = millpond.connect(url)

    @app.task
    def double(number: int) -> int:
        return 2 * number

    started = threading.Event()
    stop: list[Any] = []

    def serve() -> None:
        async def run() -> None:
            worker = millpond.Worker(app)
            loop = asyncio.get_running_loop()
            stop.append(lambda: loop.call_soon_threadsafe(worker.stop))
            started.set()
            await worker.run()

        asyncio.run(run())

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert started.wait(30)
        with millpond.connect_sync(url) as pond:
            handles = [pond.send(double.call(number), keep_result=60) for number in range(3)]
            assert isinstance(handles[0], millpond.SyncTaskHandle)
            assert [handle.result(timeout=30) for handle in handles] == [0, 2, 4]
            assert handles[0].state() == "done"
            with pytest.raises(InvalidInput, match="not kept"):
                pond.send(double.call(1)).result()
    finally:
        stop[0]()
        thread.join(30)
    assert not thread.is_alive()


async def test_tasks_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    # As an application's module: by a name that a process can import.
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    app = importlib.import_module("cpu_tasks")
    async with testing.in_memory(app.pond) as pond:
        handle = await app.square.send(7, tag=UUID(int=1))
        wrong = await app.square.send(-7)
        odd = await app.nothing.send()
        await pond.queue("tasks.square").enqueue(b'{"number": "seven"}')
        counts = await pond.work()
        assert (counts["ack"], counts["dead"]) == (1, 2)
        value, process = await handle.result()
        assert value == 49
        assert process != os.getpid()
        with pytest.raises(TaskFailed, match="less than nothing"):
            await wrong.result()
        with pytest.raises(TaskFailed, match="bad_result"):
            await odd.result()
        reasons = [letter.dead_reason for letter in await pond.queue("tasks.square").dead_letters.list()]
        assert any("bad_arguments" in str(reason) for reason in reasons)
