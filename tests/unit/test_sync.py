"""The synchronous API: the same names without ``await``, from any thread, with an end that nobody hangs at."""

from __future__ import annotations

import asyncio
import gc
import inspect
import io
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import millpond
from millpond import (
    InvalidInput,
    LeaseLost,
    MessageNotFound,
    PayloadNotLoaded,
    StoreClosed,
    SyncDeadLetters,
    SyncMessage,
    SyncMessageState,
    SyncMessageView,
    SyncPond,
    SyncQueue,
    sync,
)
from millpond import message as message_module
from millpond import pond as pond_module
from millpond import queue as queue_module
from millpond import stream as stream_module

ROOT = Path(__file__).parents[2]
LARGE = 3_000_000
PATIENCE = 30.0
"""Real seconds after which something that should have come never will."""


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/pond.db"


@pytest.fixture
def pond() -> Iterator[SyncPond]:
    with millpond.connect_sync("memory://") as pond:
        yield pond


def one(queue: SyncQueue) -> SyncMessage:
    [message] = queue.receive()
    return message


# What it offers


def asynchronous_classes() -> dict[str, type]:
    """Every public class of the API with something to await or to iterate over asynchronously."""
    return {
        name: value
        for module in (message_module, stream_module, queue_module, pond_module)
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and not name.startswith("_")
        if any(map(inspect.iscoroutinefunction, vars(value).values())) or "stream" in vars(value)
    } | {"TaskHandle": millpond.TaskHandle}  # of a task, that alone: tasks are sent by their pond


def public(cls: type) -> list[str]:
    return [name for name in dir(cls) if not name.startswith("_")]


def instances(pond: SyncPond) -> dict[str, Any]:
    """One of each synchronous class."""
    queue = pond.queue("orders")
    queue.enqueue(b"x")
    message = one(queue)
    task = millpond.connect("memory://").task(name="task")(lambda: None)
    return {
        "Pond": pond,
        "Queue": queue,
        "Message": message,
        "MessageState": message.state,
        "MessageView": queue.get(message.id),
        "MessageStream": queue.stream(),
        "DeadLetters": queue.dead_letters,
        "TaskHandle": pond.send(task.call()),
    }


def test_every_class_with_something_to_await_has_a_synchronous_one(pond: SyncPond) -> None:
    assert set(asynchronous_classes()) == set(instances(pond))
    assert {cls.__name__ for cls in sync.PROXIES} == set(asynchronous_classes()) - {"Pond"}
    assert {name: type(value).__name__ for name, value in instances(pond).items()} == {
        name: f"Sync{name}" for name in asynchronous_classes()
    }


@pytest.mark.parametrize("name", asynchronous_classes())
def test_nothing_has_to_be_awaited(pond: SyncPond, name: str) -> None:
    cls, target = asynchronous_classes()[name], instances(pond)[name]
    awaited = [each for each in public(cls) if inspect.iscoroutinefunction(getattr(cls, each))]
    assert awaited or name in ("Pond", "MessageStream")  # which have a block and a loop
    for each in awaited:
        attribute = getattr(target, each)
        assert callable(attribute)
        assert not inspect.iscoroutinefunction(attribute)
        assert attribute.__name__ == each
        assert (attribute.__doc__ or "").strip()
    for each in public(cls):
        assert each in dir(target)
        assert not isinstance(inspect.getattr_static(target, each, None), AsyncIterator)


@pytest.mark.parametrize("name", asynchronous_classes())
def test_type_checkers_know_every_name(name: str) -> None:
    generator = runpy.run_path(str(ROOT / "docs" / "make_sync_types.py"))
    stubs = {cls.__name__: stub for stub, (cls, _) in generator["CLASSES"].items()}
    text = re.split(rf"class {stubs[name]}[:(]", generator["page"]())[1].partition("\nclass ")[0]
    hidden = generator["HIDDEN"].get(stubs[name], set()) | generator["OWN"].get(stubs[name], set())
    cls = asynchronous_classes()[name]
    source = inspect.getsource(cls)
    # Those in its body, and those that its methods set.
    names = set(public(cls)) | set(re.findall(r"^ +self\.([a-z]\w*)(?:: [^=]+)? = ", source, re.MULTILINE))
    assert set(generator["ATTRIBUTES"].get(stubs[name], {})) <= names
    for each in names - hidden:
        assert f"def {each}(" in text or f"    {each}: " in text, f"{name}.{each} is unknown to type checkers"


def test_the_whole_life_of_a_message(pond: SyncPond) -> None:
    queue = pond.queue("orders", namespace="shop")
    assert isinstance(queue, SyncQueue)
    assert (queue.name, queue.namespace) == ("orders", "shop")
    receipt = queue.enqueue(millpond.json({"a": 1}), attributes={"b": 2}, priority=7)
    assert [view.id for view in queue.peek(5)] == [receipt.message_id]
    message = one(queue)
    assert isinstance(message, SyncMessage)
    assert (message.id, message.json(), message.attributes) == (receipt.message_id, {"a": 1}, {"b": 2})
    assert isinstance(message.state, SyncMessageState)
    message.state.save({"step": 1})
    assert message.state.load() == {"step": 1}
    message.state.delete()
    assert message.state.load() is None
    assert message.extend(90).token == message.lease.token == 1
    view = queue.get(message.id)
    assert isinstance(view, SyncMessageView)
    assert (view.state, view.payload()) == ("leased", b'{"a":1}')
    message.nack(ValueError("no"))
    message = one(queue)
    assert message.last_error == "ValueError: no"
    message.defer()
    one(queue).bury("hopeless")
    assert isinstance(queue.dead_letters, SyncDeadLetters)
    [dead] = queue.dead_letters.list()
    assert isinstance(dead, SyncMessageView)
    assert dead.dead_reason == queue.dead_letters.get(dead.id).dead_reason == "hopeless"
    assert queue.dead_letters.payload(dead.id) == b'{"a":1}'
    assert queue.dead_letters.redrive([dead.id]) == 1
    message = one(queue)
    queue.handle(message.id, message.lease.id, message.lease.token).ack(then=[("next", b"y", {"namespace": "shop"})])
    assert [(name.namespace, name.queue) for name in pond.queues()] == [("shop", "next")]
    assert pond.verify() == []
    assert pond.collect().expired == 0
    assert pond.statistics()["dispatcher"]["polls"] == 0


def test_batches_take_any_collection_of_messages(pond: SyncPond) -> None:
    queue = pond.queue("orders")
    kinds: list[Callable[[list[SyncMessage]], Any]] = [
        list,
        tuple,
        set,
        iter,
        lambda messages: (message for message in messages),
        lambda messages: {message.id: message for message in messages}.values(),
    ]
    for kind in kinds:
        queue.enqueue_many([b"1", b"2"])
        messages = queue.receive(5)
        assert [answer.error for answer in queue.extend_many(kind(messages), 60)] == [None, None]
        answers = queue.ack_many(kind(messages))
        assert sorted(answer.message_id for answer in answers) == sorted(message.id for message in messages)
    assert queue.counts()[:3] == (0, 0, 0)


def test_errors_pass_through(pond: SyncPond) -> None:
    queue = pond.queue("orders")
    queue.enqueue(b"x", visibility=5)
    message = one(queue)
    message.ack()
    with pytest.raises(LeaseLost, match="gone"):
        message.ack()
    with pytest.raises(InvalidInput, match="priority"):
        queue.enqueue(b"x", priority=11)
    with pytest.raises(MessageNotFound):
        queue.get(message.id)
    with pytest.raises(millpond.InvalidQueue):
        pond.queue("..")
    with pytest.raises(TypeError, match="prio"):
        queue.enqueue(b"x", prio=1)  # type: ignore[call-arg]
    with pytest.raises(AttributeError, match="akc"):
        message.akc()  # type: ignore[attr-defined]
    with pytest.raises(InvalidInput, match="int"):
        queue.ack_many([5])  # type: ignore[list-item]


def test_proxies_are_equal_when_they_stand_for_the_same(pond: SyncPond) -> None:
    queue = pond.queue("orders")
    queue.enqueue_many([b"1", b"2"])
    first, second = queue.receive(2)
    assert first == first  # noqa: PLR0124
    assert first != second
    assert queue.dead_letters == queue.dead_letters
    assert hash(queue.dead_letters) == hash(queue.dead_letters)
    assert len({first, second, first}) == 2
    assert repr(first).startswith("<synchronous <Message")


# Streams


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(lambda data: data, id="bytes"),
        pytest.param(io.BytesIO, id="file"),
        pytest.param(lambda data: iter([data[:70_000], data[70_000:]]), id="iterator"),
        pytest.param(lambda data: (data[at : at + 65_000] for at in range(0, LARGE, 65_000)), id="generator"),
    ],
)
def test_large_payloads_in_and_out(url: str, source: Callable[[bytes], Any]) -> None:
    data = bytes(range(250)) * (LARGE // 250)
    with millpond.connect_sync(url) as pond:
        queue = pond.queue("orders")
        queue.enqueue(source(data))
        message = one(queue)
        with pytest.raises(PayloadNotLoaded):
            _ = message.payload
        chunks = list(message.stream())
        assert len(chunks) > 1
        assert b"".join(chunks) == data == message.read()
        assert b"".join(queue.get(message.id).stream()) == data


def test_a_source_that_fails_leaves_nothing(pond: SyncPond) -> None:
    def broken() -> Iterator[bytes]:
        yield b"x" * LARGE
        raise ConnectionError("cut")

    queue = pond.queue("orders")
    with pytest.raises(ConnectionError, match="cut"):
        queue.enqueue(broken())
    assert queue.counts()[:6] == (0, 0, 0, 0, 0, 0)


def test_a_stream_that_is_left_early_is_closed(pond: SyncPond) -> None:
    closed = threading.Event()

    async def source() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x"
        finally:
            closed.set()

    held = source()  # Or the garbage collector would close it.
    chunks = sync._iterate(pond._portal, held)
    assert next(chunks) == b"x"
    chunks.close()  # type: ignore[attr-defined]
    assert closed.wait(5)


def test_a_stream_outlives_its_pond_by_nothing(url: str) -> None:
    with millpond.connect_sync(url) as pond:
        pond.queue("orders").enqueue(b"x" * LARGE)
        chunks = one(pond.queue("orders")).stream()
        assert next(chunks)
    with pytest.raises(StoreClosed):
        next(chunks)
    del chunks
    gc.collect()


def test_a_source_that_calls_the_pond_is_told(pond: SyncPond) -> None:
    """It is drawn from on the pond's own loop, where a synchronous call would wait for itself."""
    queue = pond.queue("orders")
    with pytest.raises(RuntimeError, match="wait for itself"):
        queue.enqueue_many(str(queue.counts()).encode() for _ in range(2))
    assert queue.counts().ready == 0


# Threads


def test_threads_share_one_pond(url: str) -> None:
    done: list[bytes] = []

    def work(number: int) -> None:
        queue = pond.queue("orders")
        for count in range(10):
            queue.enqueue(b"%d-%d" % (number, count))
        while messages := queue.receive(3):
            for message in messages:
                done.append(message.payload)
                message.ack()

    with millpond.connect_sync(url) as pond, ThreadPoolExecutor(8) as threads:
        for result in [threads.submit(work, number) for number in range(8)]:
            result.result(PATIENCE)
        while messages := pond.queue("orders").receive(10):
            done += [message.payload for message in messages]
            pond.queue("orders").ack_many(messages)
    assert sorted(done) == sorted(b"%d-%d" % (number, count) for number in range(8) for count in range(10))


def test_one_thread_waits_while_another_enqueues(pond: SyncPond) -> None:
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(lambda: pond.queue("orders").receive(wait=PATIENCE))
        pond.queue("orders").enqueue(b"x")
        assert [message.payload for message in waiting.result(PATIENCE)] == [b"x"]


# The end


def test_after_the_end(url: str) -> None:
    with millpond.connect_sync(url) as pond:
        queue = pond.queue("orders")
        queue.enqueue(b"x")
        message = one(queue)
        stream = message.stream()
    calls: list[Callable[[], Any]] = [
        lambda: queue.enqueue(b"y"),
        queue.receive,
        queue.counts,
        message.ack,
        lambda: message.state.save(1),
        queue.dead_letters.list,
        pond.queues,
        pond.open,
        lambda: next(stream),
    ]
    for call in calls:
        with pytest.raises(StoreClosed):
            call()
    pond.close()
    # What is known needs no store.
    assert (message.payload, message.lease.token) == (b"x", 1)


def test_never_opened(url: str) -> None:
    pond = millpond.connect_sync(url)
    with pytest.raises(StoreClosed):
        pond.queue("orders").counts()
    pond.close()
    pond.close()


def test_a_pond_that_cannot_be_opened_leaves_no_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with pytest.raises(millpond.StoreError), millpond.connect_sync(f"sqlite:///{tmp_path}/no/such/place.db"):
        pass
    for thread in set(threading.enumerate()) - before:
        thread.join(30)  # One that was told to end may still be about to.
        assert not thread.is_alive()


def test_connecting_alone_starts_nothing() -> None:
    before = threading.active_count()
    pond = millpond.connect_sync("memory://")
    gone = weakref.ref(pond._portal)
    del pond
    gc.collect()
    assert gone() is None
    assert threading.active_count() == before


def test_closing_ends_the_calls_of_other_threads(pond: SyncPond) -> None:
    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(lambda: pond.queue("orders").receive(wait=PATIENCE * 10)) for _ in range(4)]
        while pond._target.dispatcher.queue_stats("default", "orders").waiting_consumers < 4:
            assert not any(each.done() for each in waiting)
            time.sleep(0.001)
        pond.close()
        for each in waiting:
            with pytest.raises(StoreClosed):
                each.result(PATIENCE)


def test_who_closes_second_waits_for_the_first(pond: SyncPond) -> None:
    """Else it would end the loop, and with it the first one's close, in the midst of it."""
    entered, release = threading.Event(), threading.Event()
    both = threading.Semaphore(0)
    lock, released = pond._portal.closing, []
    store = pond._target.store
    close = store.close

    class Seen:
        def __enter__(self) -> None:
            both.release()
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()

    async def slow() -> None:
        entered.set()
        await asyncio.to_thread(release.wait, PATIENCE)
        await close()
        released.append(True)

    pond._portal.closing = Seen()  # type: ignore[assignment]
    store.close = slow
    with ThreadPoolExecutor(2) as threads:
        try:
            first = threads.submit(pond.close)
            assert entered.wait(PATIENCE)
            second = threads.submit(pond.close)
            for _ in range(2):
                assert both.acquire(timeout=PATIENCE)
        finally:
            release.set()
        first.result(PATIENCE)
        second.result(PATIENCE)
    assert released == [True]


def test_a_call_that_cannot_end_is_told_of_the_close(pond: SyncPond) -> None:
    reached = threading.Event()

    async def never() -> None:
        reached.set()
        await asyncio.Event().wait()

    with ThreadPoolExecutor(1) as threads:
        stuck = threads.submit(pond._portal.run, never())
        assert reached.wait(PATIENCE)
        pond.close()
        with pytest.raises(StoreClosed, match="under way"):
            stuck.result(PATIENCE)


def test_calls_and_closes_at_once_end_all(url: str) -> None:
    """Each call is answered or refused; none waits on a loop that has ended."""

    def work() -> int:
        count = 0
        try:
            while True:
                pond.queue("orders").enqueue(b"x")
                count += 1
        except StoreClosed:
            return count

    for _ in range(5):
        pond = millpond.connect_sync(url).open()
        before = pond.queue("orders").counts().ready
        with ThreadPoolExecutor(6) as threads:
            workers = [threads.submit(work) for _ in range(4)]
            while pond.queue("orders").counts().ready < before + 3:
                time.sleep(0.001)
            closers = [threads.submit(pond.close) for _ in range(2)]
            for closer in closers:
                closer.result(PATIENCE)
            sent = sum(worker.result(PATIENCE) for worker in workers)
        with millpond.connect_sync(url) as again:
            # One that was under way at the end may have been stored without its caller knowing.
            assert sent <= again.queue("orders").counts().ready - before <= sent + 4


# Inside an event loop


async def test_it_works_inside_a_running_loop() -> None:
    """It blocks that loop, as any synchronous call does, but it does not stand in its own way."""
    with millpond.connect_sync("memory://") as pond:
        pond.queue("orders").enqueue(b"x")
        message = one(pond.queue("orders"))
        assert b"".join(message.stream()) == b"x"
        await asyncio.to_thread(message.ack)
        assert pond.queue("orders").counts().leased == 0


def test_on_its_own_loop_it_refuses(pond: SyncPond) -> None:
    async def call() -> Any:
        return pond.queue("orders").counts()

    with pytest.raises(RuntimeError, match="wait for itself"):
        pond._portal.run(call())


# Processes


def run(script: str, *, interrupt_at: str | None = None) -> tuple[int, str, str]:
    """Run a program, interrupted (Ctrl-C) once it has printed a line; its exit code and output."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONWARNINGS": "error"}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        first = ""
        if interrupt_at is not None:
            assert process.stdout is not None
            first = process.stdout.readline()
            assert first.strip() == interrupt_at
            process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    return process.returncode, first + output, errors


def test_a_program_ends_that_never_closes(url: str) -> None:
    script = f"""
import millpond
pond = millpond.connect_sync({url!r}).open()
queue = pond.queue("orders")
queue.enqueue(b"x")
queue.enqueue(b"y" * 3_000_000)
[message, large] = queue.receive(2)
stream = large.stream()
next(stream)
print(message.payload.decode())
"""
    assert run(script) == (0, "x\n", "")
    with millpond.connect_sync(url) as pond:
        assert pond.queue("orders").counts().leased == 2


def test_a_program_ends_that_forgets_its_pond(url: str) -> None:
    script = f"""
import gc, millpond
def work():
    pond = millpond.connect_sync({url!r}).open()
    pond.queue("orders").enqueue(b"x")
    return one(pond.queue("orders"))
def one(queue):
    [message] = queue.receive()
    return message
message = work()
gc.collect()
message.ack()
print("done")
"""
    assert run(script) == (0, "done\n", "")


def test_a_program_ends_while_a_thread_of_its_waits(url: str) -> None:
    script = f"""
import threading, time, millpond
pond = millpond.connect_sync({url!r}).open()
waiting = threading.Thread(target=lambda: pond.queue("orders").receive(wait=1000), daemon=True)
waiting.start()
while pond._target.dispatcher.queue_stats(None, "orders").waiting_consumers < 1:
    time.sleep(0.001)
print("done")
"""
    assert run(script) == (0, "done\n", "")


def test_an_interrupt_ends_the_call_and_not_the_pond(url: str) -> None:
    script = f"""
import threading, time, millpond
with millpond.connect_sync({url!r}) as pond:
    queue = pond.queue("orders")
    def tell():
        while pond._target.dispatcher.queue_stats(None, "orders").waiting_consumers < 1:
            time.sleep(0.001)
        print("waiting", flush=True)
    threading.Thread(target=tell).start()
    try:
        queue.receive(wait=1000)
    except KeyboardInterrupt:
        print("interrupted")
    while pond._target.dispatcher.queue_stats(None, "orders").waiting_consumers:
        time.sleep(0.001)
    queue.enqueue(b"x")
    print(queue.receive()[0].payload.decode())
"""
    assert run(script, interrupt_at="waiting") == (0, "waiting\ninterrupted\nx\n", "")


def test_an_interrupt_that_nobody_catches_ends_the_program(url: str) -> None:
    script = f"""
import threading, time, millpond
with millpond.connect_sync({url!r}) as pond:
    def tell():
        while pond._target.dispatcher.queue_stats(None, "orders").waiting_consumers < 1:
            time.sleep(0.001)
        print("waiting", flush=True)
    threading.Thread(target=tell).start()
    pond.queue("orders").receive(wait=1000)
"""
    code, output, errors = run(script, interrupt_at="waiting")
    assert (code, output) == (-signal.SIGINT, "waiting\n")
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "Exception ignored" not in errors


def _take(queue: SyncQueue) -> list[bytes]:
    found = []
    with queue.stream(credit=3) as stream:
        assert iter(stream) is stream
        for message in stream:
            found.append(message.payload)
            assert isinstance(message, SyncMessage)
            assert [answer.error for answer in queue.ack_many([message])] == [None]
            if len(found) == 5:
                break
    with pytest.raises(InvalidInput, match="async with"):
        next(stream)
    return found


@pytest.mark.parametrize("url", ["memory://", "sqlite"])
def test_a_stream_without_asyncio(url: str, tmp_path: Path) -> None:
    with millpond.connect_sync(f"sqlite:///{tmp_path / 'a.db'}" if url == "sqlite" else url) as pond:
        queue = pond.queue("orders")
        queue.enqueue_many([b"%d" % number for number in range(9)])
        assert _take(queue) == [b"0", b"1", b"2", b"3", b"4"]
        assert queue.counts()[:3] == (4, 0, 0), "what lay ready went back"


def test_who_waits_in_a_stream_is_told_when_the_pond_is_closed() -> None:
    pond = millpond.connect_sync("memory://").open()
    begun = threading.Event()
    ended: list[BaseException] = []

    def work() -> None:
        try:
            with pond.queue("orders").stream() as stream:
                begun.set()
                next(stream)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(10)
    pond.close()
    thread.join(10)
    assert not thread.is_alive()
    assert isinstance(ended[0], StoreClosed)
