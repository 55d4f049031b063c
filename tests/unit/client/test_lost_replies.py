"""Answers whose reply was lost, by way of a proxy that drops it after the real server has handled the request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

import millpond
from millpond import Config, InvalidInput, LeaseLost, Message, OutcomeUnknown, Pond, Queue, StateConflict
from millpond.client.asking import encode
from millpond.client.pond import RemotePond
from millpond.model.clock import ManualClock, SystemClock
from millpond.server.run import running
from millpond.service.config import DEFAULT_OPTIONS
from millpond.service.producing import Numbered
from millpond.stores.memory import MemoryStore
from millpond.wire import native


class Proxy:
    """Passes bytes on. Told to, it does not pass on the answer to the next request for a path, and hangs up."""

    def __init__(self, url: str) -> None:
        self._port = int(url.rpartition(":")[2])
        self._drop: str | None = None
        self._lose: str | None = None
        self.dropped = 0
        self.between: Callable[[], Awaitable[Any]] | None = None
        """Done after the server handled the request and before the client knows that no answer comes."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def drop(self, path: str) -> None:
        self._drop = path

    def lose(self, path: str) -> None:
        """The next request for the path does not reach the server, either."""
        self._lose = path

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        back, there = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            while True:
                path, request = await self._message(reader)
                if self._lose is not None and self._lose in path:
                    self._lose = None
                    return
                there.write(request)
                _, answer = await self._message(back)
                if self._drop is not None and self._drop in path:
                    self._drop = None
                    self.dropped += 1
                    if self.between is not None:
                        await self.between()
                    return
                writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # one of them went away
        finally:
            writer.close()
            there.close()

    @staticmethod
    async def _message(reader: asyncio.StreamReader) -> tuple[str, bytes]:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        return head.decode("latin-1").partition("\r\n")[0], head + await reader.readexactly(length)


class Lab:
    """A store, a server, the proxy, and a client behind it; the clock stands still."""

    def __init__(self, local: Pond, remote: RemotePond, proxy: Proxy, clock: ManualClock, url: str) -> None:
        self.local = local.queue("orders")
        self.remote = remote.queue("orders")
        self.remote_pond = remote
        self.pond = local
        self.proxy = proxy
        self.url = url
        self.clock = clock

    async def held(self, **options: Any) -> Message:
        """A message, received by way of the proxy."""
        await self.local.enqueue(b"x", **options)
        [message] = await self.remote.receive()
        return message


@asynccontextmanager
async def lab(config: Config | None = None) -> AsyncIterator[Lab]:
    clock = ManualClock()
    async with Pond(MemoryStore(clock=clock), clock=clock, config=config or Config()) as local, running(local) as url:
        proxy = Proxy(url)
        remote = RemotePond(await proxy.start(), clock=clock)
        remote.transport.io_clock = SystemClock()
        try:
            async with remote:
                yield Lab(local, remote, proxy, clock, url)
        finally:
            await proxy.stop()


async def test_an_enqueue_is_not_doubled() -> None:
    async with lab() as at:
        at.proxy.drop("enqueueBatch")
        receipt = await at.remote.enqueue(b"x")
        at.proxy.drop("enqueueBatch")
        receipts = await at.remote.enqueue_many([b"1", b"2"], priority=3)
        assert at.proxy.dropped == 2
        assert [one.duplicate for one in (receipt, *receipts)] == [False] * 3
        assert (await at.local.counts()).ready == 3
        found = {message.id: message.payload for message in await at.local.receive(9)}
        assert found == dict(zip((one.message_id for one in (receipt, *receipts)), (b"x", b"1", b"2"), strict=True))


async def test_an_enqueue_is_not_doubled_when_its_message_is_gone_before_it_is_repeated() -> None:
    async with lab() as at, RemotePond(at.url, clock=at.clock) as other:
        other.transport.io_clock = SystemClock()
        consumer = other.queue("orders")

        async def work() -> None:
            for message in await consumer.receive(9):
                await message.ack()

        at.proxy.between = work
        at.proxy.drop("enqueueBatch")
        receipts = await at.remote.enqueue_many([b"1", b"2"])
        assert [one.duplicate for one in receipts] == [False, False]
        assert (await at.local.counts())[:3] == (0, 0, 0)


async def test_an_id_of_the_callers_own_is_known_beyond_its_message_too() -> None:
    id = "0197a3c2-0000-7000-8000-000000000001"
    async with lab() as at:

        async def work() -> None:
            [message] = await at.local.receive()
            await message.ack()

        at.proxy.between = work
        at.proxy.drop("enqueueBatch")
        assert (await at.remote.enqueue(b"1", message_id=id)).message_id == id
        assert (await at.local.counts()).ready == 0
        assert await at.remote.enqueue(b"2", message_id=id) == (id, False), "another request, with an id that is free"


async def test_the_window_may_be_nothing_and_then_a_repetition_is_a_message() -> None:
    async with lab(Config(retry_window=0)) as at:

        async def work() -> None:
            for message in await at.local.receive(9):
                await message.ack()

        at.proxy.between = work
        at.proxy.drop("enqueueBatch")
        await at.remote.enqueue(b"1")
        assert (await at.local.counts()).ready == 1


async def test_a_request_that_was_overtaken_is_not_carried_out_later() -> None:
    """A call was cancelled, and its session went on with the next: what comes of the first after that is refused."""
    async with lab() as at:
        service = at.pond.service
        ids = [at.pond.ids.message_id() for _ in range(2)]
        later = [(b"2", DEFAULT_OPTIONS, ids[1])]
        assert await service.enqueue_each(None, "orders", later, numbered=Numbered("s", 2)) == [(ids[1], False)]
        with pytest.raises(OutcomeUnknown, match="higher number"):
            await service.enqueue_each(None, "orders", [(b"1", DEFAULT_OPTIONS, ids[0])], numbered=Numbered("s", 1))
        with pytest.raises(InvalidInput, match="message_id"):
            await service.enqueue_each(None, "orders", [(b"1", DEFAULT_OPTIONS, None)], numbered=Numbered("s", 3))
        assert [message.payload for message in await at.local.receive(9)] == [b"2"]


async def test_one_that_comes_too_late_is_told_alone() -> None:
    """Requests that come at once are done together; what is wrong with one is not told to the others."""
    async with lab() as at:
        transport = at.remote_pond.transport

        def request(session: str, number: int) -> bytes:
            new = native.NewMessage(payload=session.encode(), message_id=at.pond.ids.message_id())
            return encode(native.EnqueueBatchRequest(queue="orders", messages=[new], session=session, number=number))

        await transport.call("/v1/queue/enqueueBatch", request("late", 2))
        calls = [("a", 1), ("late", 1), ("b", 1)]
        found = await asyncio.gather(
            *(transport.call("/v1/queue/enqueueBatch", request(*call)) for call in calls), return_exceptions=True
        )
        assert [isinstance(one, OutcomeUnknown) for one in found] == [False, True, False]
        assert sorted(message.payload for message in await at.local.receive(9)) == [b"a", b"b", b"late"]


async def test_sessions_are_as_many_as_requests_at_a_time() -> None:
    asked: list[tuple[str, int]] = []
    async with lab() as at:
        each = at.pond.service.enqueue_each

        async def seen(*arguments: Any, numbered: Any) -> Any:
            some = [numbered] if isinstance(numbered, Numbered) else numbered
            asked.extend(one[:2] for one in some)
            return await each(*arguments, numbered=numbered)

        at.pond.service.enqueue_each = seen  # type: ignore[method-assign,assignment]
        for _ in range(3):
            await at.remote.enqueue(b"x")
        await asyncio.gather(*(at.remote.enqueue(b"x") for _ in range(5)))
        assert len({session for session, _ in asked[:3]}) == 1
        assert [number for _, number in asked[:3]] == [1, 2, 3]
        assert len({session for session, _ in asked}) == 5
        assert len(set(asked)) == 8


async def test_an_id_of_the_callers_own_may_be_used_again() -> None:
    """A repetition of it cannot be told from a new message under an old id, so nothing is kept from the queue."""
    id = "0197a3c2-0000-7000-8000-000000000001"
    async with lab() as at, RemotePond(at.url, clock=at.clock) as other:
        other.transport.io_clock = SystemClock()
        await at.local.enqueue(b"1", message_id=id)
        [message] = await other.queue("orders").receive()
        await message.ack()
        at.proxy.lose("enqueueBatch")
        assert await at.remote.enqueue(b"2", message_id=id) == (id, False)
        assert (await at.local.counts()).ready == 1


ANSWERS: dict[str, tuple[str, Callable[[Message, Queue], Awaitable[Any]]]] = {
    "ack": ("ackBatch", lambda message, queue: message.ack()),
    "nack": ("nackBatch", lambda message, queue: message.nack("no", delay=5)),
    "defer": ("nackBatch", lambda message, queue: message.defer(5)),
    "bury": ("bury", lambda message, queue: message.bury("hopeless")),
    "hand-off": ("handOff", lambda message, queue: message.ack(then=[("next", b"y")])),
    "ack_many": ("ackBatch", lambda message, queue: queue.ack_many([message])),
    "nack_many": ("nackBatch", lambda message, queue: queue.nack_many([message])),
    "defer_many": ("nackBatch", lambda message, queue: queue.defer_many([message])),
}


async def _standing(at: Lab) -> Any:
    counts = await at.local.counts()
    after = await at.pond.queue("next").counts()
    views = [(view.attempts, view.failures, view.last_error) for view in await at.local.peek(9)]
    return counts[:6], after[:6], views


@pytest.mark.parametrize("answer", ANSWERS)
async def test_an_answer_that_was_carried_out_is_done(answer: str) -> None:
    path, act = ANSWERS[answer]
    standing = []
    for lose in (False, True):
        async with lab() as at:
            message = await at.held()
            if lose:
                at.proxy.drop(path)
            result = await act(message, at.remote)
            if answer.endswith("many"):
                assert [one.error for one in result] == [None]
            assert at.proxy.dropped == lose
            standing.append(await _standing(at))
    assert standing[0] == standing[1]


@pytest.mark.parametrize("answer", ANSWERS)
async def test_an_answer_is_not_done_when_another_may_have_been_given(answer: str) -> None:
    """After the end of the lease the same refusal proves nothing."""
    path, act = ANSWERS[answer]
    async with lab() as at:
        message = await at.held(visibility=10)

        async def later() -> None:
            at.clock.advance(11)

        at.proxy.between = later
        at.proxy.drop(path)
        if answer.endswith("many"):
            [done] = await act(message, at.remote)
            assert isinstance(done.error, LeaseLost)
            assert "earlier try" in str(done.error)
        else:
            with pytest.raises(LeaseLost, match="earlier try"):
                await act(message, at.remote)


async def test_a_refusal_without_a_lost_reply_is_a_refusal() -> None:
    async with lab() as at:
        message = await at.held()
        await message.ack()
        with pytest.raises(LeaseLost):
            await message.ack()
        message = await at.held()
        await message.nack()
        for act in (message.ack, message.nack, message.defer):
            with pytest.raises(LeaseLost):
                await act()


async def test_a_lost_reply_to_a_refusal_is_a_refusal() -> None:
    """A handle says nothing of its lease, so nothing is inferred from it."""
    async with lab() as at:
        message = await at.held()
        handle = at.remote.handle(message.id, message.lease.id, message.lease.token)
        at.proxy.drop("ackBatch")
        with pytest.raises(LeaseLost, match="earlier try"):
            await handle.ack()


async def test_the_callers_own_repetition_is_told_apart_from_a_second_answer() -> None:
    async with lab() as at:
        message = await at.held()
        remote = at.remote._service
        assert isinstance(remote, millpond.client.service.RemoteService)
        at.proxy.drop("ackBatch")
        task = asyncio.ensure_future(message.ack())
        async with asyncio.timeout(60):
            while not at.proxy.dropped:
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await message.ack()  # whoever was cancelled does not know, and asks again
        assert (await at.local.counts()).leased == 0


async def test_an_extension_and_a_state_are_only_set_again() -> None:
    async with lab() as at:
        message = await at.held(visibility=10)
        at.proxy.drop("extendBatch")
        lease = await message.extend(60)
        assert lease.until_ms == at.clock.now_ms() + 60_000
        at.proxy.drop("state/save")
        await message.state.save({"step": 1})
        assert await message.state.load() == {"step": 1}
        at.proxy.drop("state/delete")
        await message.state.delete()
        assert await message.state.load() is None
        assert at.proxy.dropped == 3
        at.clock.advance(59)
        # The extension counts for what a lost reply proves, too.
        at.proxy.drop("ackBatch")
        await message.ack()


async def test_a_save_of_a_version_is_known_when_it_is_repeated() -> None:
    async with lab() as at:
        message = await at.held(visibility=60)
        service, delivery = at.remote_pond._remote, message._delivery
        at.proxy.drop("state/save")
        first = await service.save_state(delivery, 1, etag=None)
        at.proxy.drop("state/save")
        second = await service.save_state(delivery, 2, etag=first)
        assert second != first
        with pytest.raises(StateConflict):
            await service.save_state(delivery, 3, etag=first)
        at.proxy.drop("state/delete")
        await service.delete_state(delivery, etag=second)
        assert await message.state.load() is None
        assert at.proxy.dropped == 3
        with pytest.raises(StateConflict):
            await service.delete_state(delivery, etag=second)
        await service.save_state(delivery, 4, etag=None)
        assert await message.state.load() == 4


async def test_a_policy_is_only_set_again() -> None:
    async with lab() as at:
        at.proxy.drop("policy")
        assert (await at.remote.set_policy(max_attempts=7)).max_attempts == 7
        at.proxy.drop("pause")
        await at.remote.pause()
        assert (await at.local.policy()).paused


async def test_what_a_lost_receive_leased_comes_back_when_its_lease_ends() -> None:
    async with lab() as at:
        await at.local.enqueue(b"x", visibility=10)
        at.proxy.drop("receive")
        assert await at.remote.receive() == []
        at.clock.advance(10)
        [message] = await at.remote.receive()
        assert (message.payload, message.attempts) == (b"x", 2)


REMOVING = ("ack", "hand-off", "ack_many")


async def _refused(at: Lab, answer: str, message: Message) -> None:
    path, act = ANSWERS[answer]
    at.proxy.lose(path)
    if answer.endswith("many"):
        [done] = await act(message, at.remote)
        assert isinstance(done.error, LeaseLost)
    else:
        with pytest.raises(LeaseLost):
            await act(message, at.remote)
    assert (await at.pond.queue("next").counts()).ready == 0


@pytest.mark.parametrize("answer", REMOVING)
async def test_an_ack_is_not_done_because_an_operator_moved_the_message(answer: str) -> None:
    """The first try never arrived; the second is refused while the lease would still last."""
    async with lab() as at:
        message = await at.held(visibility=60)
        await at.pond.service.move_to_dlq(await at.pond.service.get_message(None, "orders", message.id))
        await _refused(at, answer, message)
        assert (await at.local.counts()).dead == 1


@pytest.mark.parametrize("answer", REMOVING)
async def test_an_ack_is_not_done_when_time_has_passed_that_only_the_wall_clock_knows_of(answer: str) -> None:
    """A machine that slept: its monotonic clock stood still, and somebody else has done the work meanwhile."""
    async with lab() as at:
        message = await at.held(visibility=60)
        at.clock.jump(61)
        [again] = await at.local.receive()
        await again.ack()
        await _refused(at, answer, message)


async def test_an_extension_that_got_no_reply_may_have_made_the_lease_shorter() -> None:
    async with lab() as at:
        message = await at.held(visibility=60)
        at.proxy.drop("extendBatch")
        task = asyncio.ensure_future(message.extend(5))
        async with asyncio.timeout(60):
            while not at.proxy.dropped:
                await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        at.clock.advance(6)
        [again] = await at.local.receive()
        await again.ack()
        await _refused(at, "ack", message)


async def test_an_extension_that_was_refused_has_shown_that_the_lease_is_over() -> None:
    """Its first try made the lease shorter, and was carried out; by the second the message was another's, and done."""
    async with lab() as at:
        message = await at.held(visibility=60)

        async def work() -> None:
            at.clock.advance(6)
            [again] = await at.local.receive()
            await again.ack()

        at.proxy.between = work
        at.proxy.drop("extendBatch")
        with pytest.raises(LeaseLost):
            await message.extend(5)
        await _refused(at, "ack", message)


async def _cancelled(at: Lab, answer: str, message: Message) -> None:
    """It is carried out, but nobody is told."""
    path, act = ANSWERS[answer]
    before = at.proxy.dropped
    at.proxy.drop(path)
    task: asyncio.Future[Any] = asyncio.ensure_future(act(message, at.remote))
    async with asyncio.timeout(60):
        while at.proxy.dropped == before:
            await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("second", ["nack", "defer", "bury", "hand-off"])
async def test_of_two_kinds_of_answers_without_a_reply_neither_is_told_to_be_done(second: str) -> None:
    async with lab() as at:
        message = await at.held(visibility=60)
        await _cancelled(at, "ack", message)
        await _refused(at, second, message)


async def test_a_second_hand_off_does_not_count_the_first_ones_successors_as_its_own() -> None:
    async with lab() as at:
        message = await at.held(visibility=60)
        await _cancelled(at, "hand-off", message)
        at.proxy.lose("handOff")
        with pytest.raises(LeaseLost):
            await message.ack(then=[("next", b"z")])
        [only] = await at.pond.queue("next").receive(9)
        assert only.payload == b"y"


async def test_a_save_that_was_held_up_on_its_way_does_not_undo_a_later_one() -> None:
    """Its client has given up waiting for a server that stood still, saved by way of another, and gone on."""
    async with lab() as at:
        message = await at.held(visibility=60)
        remote = at.remote._service
        requests: list[bytes] = []
        call = remote.transport.call  # type: ignore[attr-defined]

        async def note(path: str, body: Any, **options: Any) -> bytes:
            requests.append(body)
            return bytes(await call(path, body, **options))

        remote.transport.call = note  # type: ignore[attr-defined]
        await message.state.save({"step": 1})
        first = requests.pop()
        await message.state.save({"step": 2})
        second = requests.pop()
        for late in (first, second, first):
            await call("/v1/state/save", late)
        assert await message.state.load() == {"step": 2}
        await message.state.delete()
        deletion = requests.pop()
        await message.state.save({"step": 3})
        for late in (deletion, first):
            await call("/v1/state/delete" if late is deletion else "/v1/state/save", late)
        assert await message.state.load() == {"step": 3}
        await message.state.delete()
        deletion = requests.pop()
        for late in (first, second):
            await call("/v1/state/save", late)
        assert await message.state.load() is None
        await message.state.save({"step": 4})
        await call("/v1/state/delete", deletion)
        assert await message.state.load() == {"step": 4}
        # The next holder is another writer, and writes what it likes.
        at.clock.advance(61)
        [again] = await at.local.receive()
        await again.state.save({"step": 1})
        assert await again.state.load() == {"step": 1}
