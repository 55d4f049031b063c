"""Requests that come at once are done together: fewer operations, and each of them answered as if it had come alone."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from tests.unit.server.native import JSON, MSGPACK, Reply, decoded, handle, server, text
from tests.unit.server.raw import Connection

from millpond import testing
from millpond.errors import StoreFull
from millpond.server import logs, together
from millpond.server.auth import Guard
from millpond.server.context import Context
from millpond.server.exchange import Exchange
from millpond.server.metrics import ServerMetrics
from millpond.server.run import Server
from millpond.server.together import MOST_ACKS
from millpond.server.tokens import create, parse_grant

ENQUEUE, RECEIVE, ACK = "/v1/queue/enqueueBatch", "/v1/queue/receive", "/v1/queue/ackBatch"


def enqueue(payload: bytes, **more: Any) -> dict[str, Any]:
    """The body of a request for one message."""
    return {"queue": "q", "messages": [{"payload": text(payload), **more}]}


class Fleet:
    """A server, connections to it, and the operations that its service was asked for."""

    def __init__(self, server: Server, connections: list[Connection]) -> None:
        self.server = server
        self.connections = connections
        self.service = server.context.pond.service
        self.headers = dict(JSON)
        self.operations: list[tuple[str, int]] = []

    def write(self, path: str, *bodies: Any) -> None:
        """A request on each of as many connections, all at once."""
        for connection, body in zip(self.connections, bodies, strict=False):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.write(self.head(path, len(data)) + data)

    def head(self, path: str, length: int) -> bytes:
        """As `write` sends it."""
        fields = {"Host": "t", "Content-Length": str(length), **self.headers}
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        return "\r\n".join(lines).encode() + b"\r\n\r\n"

    async def ask(self, path: str, *bodies: Any) -> list[Reply]:
        """The answers to `write`, of known heads."""
        await self.meet(path, *bodies)
        self.operations.clear()
        self.write(path, *bodies)
        return await self.answers(len(bodies))

    async def meet(self, path: str, *bodies: Any) -> None:
        """Have the server know the heads of such requests."""
        for length in {len(body if isinstance(body, bytes) else json.dumps(body).encode()) for body in bodies}:
            if self.head(path, length) not in self.server.app.heads.known:
                self.connections[0].write(self.head(path, length) + b" " * length)
                assert (await self.connections[0].answer()).status >= 400
                assert self.head(path, length) in self.server.app.heads.known

    async def answers(self, count: int) -> list[Reply]:
        """Of the first connections."""
        return [decoded(await connection.answer()) for connection in self.connections[:count]]

    async def deliveries(self, count: int) -> list[dict[str, Any]]:
        """That many messages, enqueued and received."""
        assert {one.status for one in await self.ask(ENQUEUE, *[enqueue(b"x")] * count)} == {200}
        replies = await self.ask(RECEIVE, *[{"queue": "q"}] * count)
        return [reply.body["messages"][0] for reply in replies]


@contextlib.asynccontextmanager
async def fleet(count: int = 5, **more: Any) -> AsyncIterator[Fleet]:
    """A server with so many connections."""
    async with testing.pond() as pond:
        context: Context = server(pond, **{name: make(pond) if callable(make) else make for name, make in more.items()})
        made = Server(context)
        await made.start()
        if isinstance(context.metrics, ServerMetrics):
            context.metrics.routes = made.app.paths
        try:
            async with contextlib.AsyncExitStack() as stack:
                connections = [await stack.enter_async_context(Connection(made.url)) for _ in range(count)]
                result = Fleet(made, connections)
                spy(result)
                # The queue is known from now on, and its first message is out of the way.
                connections[0].write(result.head("/v1/queue/pause", 13) + b'{"queue":"q"}')
                await connections[0].answer()
                connections[0].write(result.head("/v1/queue/resume", 13) + b'{"queue":"q"}')
                await connections[0].answer()
                yield result
        finally:
            await made.stop()


def spy(fleet: Fleet) -> None:
    """Note how many messages each operation of the service is for."""
    service: Any = fleet.service
    for name in ("enqueue_many", "enqueue_each", "claim", "ack_many"):
        operation = getattr(service, name)

        def around(operation: Any = operation, name: str = name) -> Any:
            async def noted(*given: Any, **more: Any) -> Any:
                number = given[2] if name == "claim" else len(given[0] if name == "ack_many" else given[2])
                fleet.operations.append((name, number))
                return await operation(*given, **more)

            return noted

        setattr(service, name, around())


async def test_what_comes_at_once_is_one_operation_and_many_answers() -> None:
    async with fleet() as made:
        replies = await made.ask(ENQUEUE, *[enqueue(b"%d" % number) for number in range(5)])
        assert made.operations == [("enqueue_many", 5)]
        ids = [reply.body["receipts"][0]["message_id"] for reply in replies]
        assert len(set(ids)) == 5
        assert len({reply.headers["x-correlation-id"] for reply in replies}) == 5

        replies = await made.ask(RECEIVE, *[{"queue": "q"}] * 5)
        assert made.operations == [("claim", 5)]
        messages = [message for reply in replies for message in reply.body["messages"]]
        assert [(one["message_id"], one["payload"]) for one in messages] == [
            (id, text(b"%d" % number)) for number, id in enumerate(ids)
        ]

        replies = await made.ask(ACK, *[{"queue": "q", "messages": [handle(one)]} for one in messages])
        assert made.operations == [("ack_many", 5)]
        assert [reply.body for reply in replies] == [{"results": [{"message_id": id}]} for id in ids]
        counts = await made.service.counts("default", "q")
        assert (counts.ready, counts.leased) == (0, 0)


async def test_messagepack_joins_json() -> None:
    async with fleet(2) as made:
        packed = msgspec.msgpack.encode({"queue": "q", "messages": [{"payload": b"packed"}]})
        made.headers = dict(MSGPACK)
        await made.ask(ENQUEUE, packed)
        packed_head = made.head(ENQUEUE, len(packed))
        made.headers = dict(JSON)
        await made.ask(ENQUEUE, enqueue(b"json"))
        made.operations.clear()
        made.connections[1].write(packed_head + packed)
        made.write(ENQUEUE, enqueue(b"json"))
        replies = await made.answers(2)
        assert made.operations == [("enqueue_many", 2)]
        assert [reply.headers["content-type"] for reply in replies] == ["application/json", "application/msgpack"]
        assert {type(reply.body["receipts"][0]["message_id"]) for reply in replies} == {str}


async def test_an_id_of_the_producers_own_is_taken_once() -> None:
    async with fleet(3) as made:
        id = "0197a3c2-0000-7000-8000-000000000001"
        replies = await made.ask(ENQUEUE, *[enqueue(b"x", message_id=id)] * 3)
        assert made.operations == [("enqueue_each", 3)]
        assert [reply.body["receipts"] for reply in replies] == [
            [{"message_id": id, "duplicate": number > 0}] for number in range(3)
        ]


async def test_one_that_is_wrong_is_refused_and_the_others_are_not() -> None:
    async with fleet(4) as made:
        bodies = [
            enqueue(b"x"),
            enqueue(b"x", message_id="no id"),
            {**enqueue(b"x"), "queue": "not a name!"},
            enqueue(b"y"),
        ]
        replies = await made.ask(ENQUEUE, *bodies)
        assert [reply.status for reply in replies] == [200, 400, 400, 200]
        assert [reply.code for reply in replies[1:3]] == ["invalid_message_id", "invalid_queue"]
        assert ("enqueue_many", 2) in made.operations
        assert (await made.service.counts("default", "q")).ready == 2


UNUSUAL = {
    "several messages": {"queue": "q", "messages": [{"payload": text(b"x")}] * 2},
    "options": enqueue(b"x", priority=9),
    "numbered": {**enqueue(b"x", message_id="0197a3c2-0000-7000-8000-000000000001"), "session": "s", "number": 1},
    "another queue": {**enqueue(b"x"), "queue": "another"},
}


@pytest.mark.parametrize("kind", UNUSUAL)
async def test_what_is_unusual_goes_its_own_way(kind: str) -> None:
    async with fleet(3) as made:
        made.server.context.quota._known.setdefault("default", set()).add("q")
        replies = await made.ask(ENQUEUE, enqueue(b"a"), UNUSUAL[kind], enqueue(b"b"))
        assert [reply.status for reply in replies] == [200] * 3
        assert ("enqueue_many", 2) in made.operations
        assert len(made.operations) == 2


async def test_who_gets_no_message_waits_for_one() -> None:
    async with fleet(3) as made:
        await made.ask(ENQUEUE, enqueue(b"first"))
        await made.meet(RECEIVE, {"queue": "q", "wait_ms": 60_000})
        made.write(RECEIVE, *[{"queue": "q", "wait_ms": 60_000}] * 2)
        [first, second] = made.connections[:2]
        one = asyncio.ensure_future(first.answer())
        two = asyncio.ensure_future(second.answer())
        done, waiting = await asyncio.wait({one, two}, return_when=asyncio.FIRST_COMPLETED, timeout=20)
        assert done == {one}, "whoever came first has the message"
        assert decoded(one.result()).body["messages"][0]["payload"] == text(b"first")
        await made.service.enqueue("default", "q", b"second")
        assert decoded(await asyncio.wait_for(two, 60)).body["messages"][0]["payload"] == text(b"second")
        assert waiting == {two}


async def test_who_does_not_wait_is_told_that_there_is_none() -> None:
    async with fleet(2) as made:
        replies = await made.ask(RECEIVE, *[{"queue": "q"}] * 2)
        assert [reply.body for reply in replies] == [{"messages": []}] * 2


async def test_wishes_that_differ_are_kept_apart() -> None:
    async with fleet(4) as made:
        await made.ask(ENQUEUE, *[enqueue(b"x")] * 4)
        owners = ["anna", "ben", "anna", "ben"]
        replies = await made.ask(RECEIVE, *[{"queue": "q", "owner": owner} for owner in owners])
        assert sorted(made.operations) == [("claim", 2), ("claim", 2)]
        assert [reply.body["messages"][0]["owner"] for reply in replies] == owners


async def test_two_acks_of_one_delivery_are_one_ack() -> None:
    async with fleet(3) as made:
        [message, other] = await made.deliveries(2)
        body = {"queue": "q", "messages": [handle(message)]}
        replies = await made.ask(ACK, body, body, {"queue": "q", "messages": [handle(other)]})
        assert made.operations[0] == ("ack_many", 3)
        errors = [reply.body["results"][0].get("error") for reply in replies]
        assert errors[0] is None
        assert errors[1] is not None
        assert errors[1]["error"] == "lease_lost"
        assert errors[2] is None


async def test_acks_of_several_messages_join_and_keep_their_results_apart() -> None:
    async with fleet(5) as made:
        messages = await made.deliveries(5)
        wrong = {**handle(messages[4]), "lease_id": "0" * 32}
        replies = await made.ask(
            ACK,
            {"queue": "q", "messages": [handle(one) for one in messages[:2]]},
            {"queue": "q", "messages": [wrong, handle(messages[2])]},
        )
        assert made.operations[0] == ("ack_many", 4)
        assert [[("error" in one) for one in reply.body["results"]] for reply in replies] == [
            [False, False],
            [True, False],
        ]
        many = [{**wrong, "message_id": f"0197a3c2-0000-7000-8000-{number:012x}"} for number in range(MOST_ACKS + 1)]
        await made.ask(ACK, {"queue": "q", "messages": many}, {"queue": "q", "messages": [handle(messages[3])]})
        assert ("ack_many", MOST_ACKS + 1) in made.operations, "a batch is a batch of its own"


async def test_trouble_of_the_store_is_told_to_each() -> None:
    async with fleet(3) as made:
        await made.ask(ENQUEUE, enqueue(b"x"))

        async def full(*given: Any, **more: Any) -> Any:
            raise StoreFull("no room")

        made.server.context.pond.service.enqueue_many = full  # type: ignore[method-assign]
        replies = await made.ask(ENQUEUE, *[enqueue(b"x")] * 3)
        assert [(reply.status, reply.code) for reply in replies] == [(503, "store_full")] * 3


async def test_what_is_logged_of_all_of_them_carries_all_their_ids() -> None:
    async with fleet(3) as made:
        await made.ask(ENQUEUE, enqueue(b"x"))
        service: Any = made.server.context.pond.service
        enqueue_many, kept = service.enqueue_many, []

        async def noisy(*given: Any, **more: Any) -> Any:
            logging.getLogger("millpond.test").warning("millpond.test.slow")
            kept.append(logs.current.get())
            return await enqueue_many(*given, **more)

        service.enqueue_many = noisy
        stream = io.StringIO()
        with logs.logging_to(stream, form="json"):
            replies = await made.ask(ENQUEUE, *[enqueue(b"x")] * 3)
        [line] = [json.loads(line) for line in stream.getvalue().splitlines()]
        ids = [reply.headers["x-correlation-id"] for reply in replies]
        assert len(set(ids)) == 3
        assert sorted(line["correlation_id"].split()) == sorted(ids)
        # What goes on in the background does not keep the requests.
        assert [one.correlation_id for one in kept] == [""]


async def test_an_unforeseen_error_is_told_to_each_without_its_text() -> None:
    async with fleet(2) as made:
        await made.ask(ENQUEUE, enqueue(b"x"))

        async def broken(*given: Any, **more: Any) -> Any:
            raise RuntimeError("secret")

        made.server.context.pond.service.enqueue_many = broken  # type: ignore[method-assign]
        replies = await made.ask(ENQUEUE, *[enqueue(b"x")] * 2)
        assert [reply.status for reply in replies] == [500] * 2
        assert "secret" not in str(replies)


async def test_a_message_for_who_has_gone_goes_back() -> None:
    async with fleet(3) as made:
        await made.ask(ENQUEUE, enqueue(b"a"), enqueue(b"b"))
        await made.ask(RECEIVE, {"queue": "p"})
        held = asyncio.Event()
        claim = made.server.context.pond.service.claim

        async def slow(*given: Any, **more: Any) -> Any:
            deliveries = await claim(*given, **more)
            await held.wait()
            return deliveries

        made.server.context.pond.service.claim = slow  # type: ignore[method-assign]
        made.write(RECEIVE, *[{"queue": "q"}] * 2)
        for _ in range(1000):
            if made.operations and made.operations[-1] == ("claim", 2):
                break
            await asyncio.sleep(0)
        made.connections[0].writer.close()
        cycles = lambda: [one.cycle for one in made.server._state.connections]  # type: ignore[attr-defined]  # noqa: E731
        for _ in range(1000):
            if sum(isinstance(one, Exchange) and not one.response_complete for one in cycles()) < 2:
                break
            await asyncio.sleep(0.001)
        held.set()
        assert decoded(await made.connections[1].answer()).body["messages"][0]["payload"] == text(b"b")
        for _ in range(1000):
            if (await made.service.counts("default", "q")).ready == 1:
                break
            await asyncio.sleep(0.001)
        counts = await made.service.counts("default", "q")
        assert (counts.ready, counts.leased) == (1, 1)


async def test_who_may_not_is_refused_and_the_others_are_not() -> None:
    allowed_token, allowed = create("may", [parse_grant("write:default/q")], random_bytes=os.urandom, now=0)
    other_token, other = create("not", [parse_grant("write:default/z")], random_bytes=os.urandom, now=0)

    def guard(pond: Any) -> Guard:
        return Guard(pond.clock, [allowed_token, other_token])

    async with fleet(3, authority=guard) as made:
        made.server.context.quota._known.setdefault("default", set()).add("q")
        made.headers["Authorization"] = f"Bearer {other}"
        [reply] = await made.ask(ENQUEUE, enqueue(b"x"))
        assert (reply.status, reply.code) == (403, "forbidden")
        made.headers["Authorization"] = f"Bearer {allowed}"
        assert {one.status for one in await made.ask(ENQUEUE, *[enqueue(b"x")] * 3)} == {200}
        assert made.operations == [("enqueue_many", 3)]
        made.server.context.authority.replace([other_token])  # type: ignore[attr-defined]
        before = made.server.context.authority.refused  # type: ignore[attr-defined]
        replies = await made.ask(ENQUEUE, *[enqueue(b"x")] * 3)
        assert [(one.status, one.code) for one in replies] == [(401, "unauthorized")] * 3
        assert made.operations == []
        assert made.server.context.authority.refused == before + 3  # type: ignore[attr-defined]


async def test_producers_that_have_to_wait_do_not_join() -> None:
    async with fleet(2) as made:
        await made.ask(ENQUEUE, enqueue(b"x"))
        gate: Any = made.server.context.gate
        gate.closed = True
        made.write(ENQUEUE, *[enqueue(b"x")] * 2)
        for _ in range(1000):
            if len(gate._waiting) == 2:
                break
            await asyncio.sleep(0.001)
        assert len(gate._waiting) == 2
        gate.closed = False
        for future in gate._waiting:
            future.set_result(True)
        assert [reply.status for reply in await made.answers(2)] == [200, 200]


async def test_each_request_is_counted() -> None:
    def metrics(pond: Any) -> ServerMetrics:
        return ServerMetrics(pond)

    async with fleet(4, metrics=metrics) as made:
        await made.ask(ENQUEUE, enqueue(b"x"))
        found: Any = made.server.context.metrics
        before = found._requests[ENQUEUE, 200]
        await made.ask(ENQUEUE, *[enqueue(b"x")] * 4)
        assert found._requests[ENQUEUE, 200] == before + 4


async def test_a_client_that_reads_slowly_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with fleet(3) as made:
        await made.ask(ENQUEUE, *[enqueue(b"x")] * 3)
        await made.ask(RECEIVE, {"queue": "q"})
        slow = next(iter(made.server._state.connections))
        slow.flow.pause_writing()  # type: ignore[union-attr]
        made.write(RECEIVE, *[{"queue": "q"}] * 3)
        tasks = [asyncio.ensure_future(connection.answer()) for connection in made.connections]
        done, _ = await asyncio.wait(tasks, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        for _ in range(1000):
            if sum(task.done() for task in tasks) == 2:
                break
            await asyncio.sleep(0.001)
        assert sum(task.done() for task in tasks) == 2
        slow.flow.resume_writing()  # type: ignore[union-attr]
        assert len(await asyncio.wait_for(asyncio.gather(*tasks), 60)) == 3
        assert done


async def test_a_server_that_ends_leaves_no_request_open() -> None:
    async with fleet(2) as made:
        await made.ask(ENQUEUE, enqueue(b"x"))
        never = asyncio.Event()

        async def stuck(*given: Any, **more: Any) -> Any:
            await never.wait()

        made.server.context.pond.service.enqueue_many = stuck  # type: ignore[method-assign]
        made.write(ENQUEUE, *[enqueue(b"x")] * 2)
        for _ in range(1000):
            if made.server.app.together._joined >= 3 and not made.server.app.together._open:
                break
            await asyncio.sleep(0.001)
        for task in list(made.server._state.tasks):
            task.cancel()
        for connection in made.connections:
            assert await asyncio.wait_for(connection.reader.read(), 60) == b""
        assert not made.server.app.together._open


async def test_nobody_waits_for_the_end_of_a_flow_that_has_none() -> None:
    async with fleet(1) as made:
        await made.meet(ENQUEUE, enqueue(b"x"))

        async def flow() -> None:
            while True:  # others join other groups, in every turn of the loop
                made.server.app.together._joined += 1
                await asyncio.sleep(0)

        others = asyncio.create_task(flow())
        try:
            [reply] = await asyncio.wait_for(made.ask(ENQUEUE, enqueue(b"x")), 60)
        finally:
            others.cancel()
            await asyncio.wait({others})
        assert reply.status == 200


async def test_a_group_is_no_larger_than_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "MOST", 2)
    async with fleet(5) as made:
        replies = await made.ask(ENQUEUE, *[enqueue(b"x")] * 5)
        assert {reply.status for reply in replies} == {200}
        assert sorted(made.operations) == [("enqueue_many", 1), ("enqueue_many", 2), ("enqueue_many", 2)]


async def test_an_answer_that_goes_wrong_ends_its_connection_and_those_behind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with fleet(3) as made:
        await made.ask(ENQUEUE, enqueue(b"x"))
        answer = together.Together._answer
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: None)
        seen: list[Any] = []

        def wrong(self: together.Together, member: Any, *rest: Any) -> None:
            seen.append(member)
            if len(seen) == 2:
                raise RuntimeError("nobody foresaw this")
            answer(self, member, *rest)

        monkeypatch.setattr(together.Together, "_answer", wrong)
        made.write(ENQUEUE, *[enqueue(b"x")] * 3)
        assert (await made.connections[0].answer()).status == 200
        for connection in made.connections[1:]:
            assert await asyncio.wait_for(connection.reader.read(), 60) == b""
