"""A server on a pond: it listens, answers, drains and ends."""

from __future__ import annotations

import asyncio
import json

import pytest
from tests.unit.server.raw import Connection, request

from millpond import testing
from millpond.server.config import ServerConfig
from millpond.server.context import Context
from millpond.server.run import Server, running


async def test_healthz_and_readyz_answer() -> None:
    async with testing.pond() as pond, running(pond) as url:
        for path in ("/healthz", "/readyz"):
            answer = await request(url, "GET", path)
            assert (answer.status, answer.body) == (200, b"")
            assert answer.headers["x-correlation-id"]


async def test_an_unknown_path_is_404_with_a_code() -> None:
    async with testing.pond() as pond, running(pond) as url:
        answer = await request(url, "POST", "/v1/nothing", headers={"X-Correlation-Id": "mine"})
        assert answer.status == 404
        assert json.loads(answer.body)["error"] == "unknown_route"
        assert answer.headers["x-correlation-id"] == "mine"


async def test_another_method_is_405_with_a_code() -> None:
    async with testing.pond() as pond, running(pond) as url:
        answer = await request(url, "DELETE", "/healthz")
        assert (answer.status, json.loads(answer.body)["error"]) == (405, "method_not_allowed")


async def test_readyz_says_when_the_store_is_gone_and_names_no_path() -> None:
    async with testing.pond() as pond, running(pond) as url:
        await pond.store.close()
        answer = await request(url, "GET", "/readyz")
        assert answer.status == 503
        assert json.loads(answer.body)["error"] == "store_closed"
        assert (await request(url, "GET", "/healthz")).status == 200


async def test_answers_while_draining_say_so() -> None:
    context = None
    async with testing.pond() as pond:
        context = Context(pond, ServerConfig(port=0, shutdown_timeout=1.0, drain_grace=7.0))
        async with running(pond, context=context) as url:
            assert "shutdown-imminent" not in (await request(url, "GET", "/healthz")).headers
            context.begin_drain()
            assert (await request(url, "GET", "/healthz")).headers["shutdown-imminent"] == "true"
            answer = await request(url, "GET", "/readyz")
            assert (answer.status, json.loads(answer.body)["error"]) == (503, "shutdown_draining")
            assert answer.headers["retry-after"] == "7"


async def test_a_port_that_is_taken_is_an_error_in_words() -> None:
    async with testing.pond() as pond, running(pond) as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1 port {port}"):
            await Server(Context(pond, ServerConfig(port=port))).start()


async def test_stopping_waits_for_what_is_under_way() -> None:
    async with testing.pond() as pond:
        context = Context(pond, ServerConfig(port=0, shutdown_timeout=5.0))
        server = Server(context)
        entered, go = asyncio.Event(), asyncio.Event()

        async def slow(call: object) -> None:
            entered.set()
            await go.wait()
            await call.answer(b"{}")  # type: ignore[attr-defined]

        server.app.hot["/slow"] = slow
        await server.start()
        async with Connection(server.url) as connection:
            await connection.send("POST", "/slow")
            await entered.wait()
            stopping = asyncio.create_task(server.stop())
            await asyncio.sleep(0)
            go.set()
            assert (await connection.answer()).status == 200
            await stopping
        with pytest.raises(OSError):
            await request(server.url, "GET", "/healthz")


async def test_an_unforeseen_error_shows_nothing_of_itself(caplog: pytest.LogCaptureFixture) -> None:
    async with testing.pond() as pond:
        server = Server(Context(pond, ServerConfig(port=0)))

        async def broken(call: object) -> None:
            raise RuntimeError("/secret/path")

        server.app.hot["/broken"] = broken
        await server.start()
        answer = await request(server.url, "POST", "/broken")
        await server.stop()
    assert (answer.status, json.loads(answer.body)["error"]) == (500, "internal_error")
    assert b"secret" not in answer.body
    assert [record.message for record in caplog.records if record.exc_info] == ["millpond.server.request_failed"]
