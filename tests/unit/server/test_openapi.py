"""The OpenAPI document says what the server does: the same routes, and answers of the forms that it promises."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tests.unit.server.raw import request

from millpond import testing
from millpond.server import openapi
from millpond.server.app import App
from millpond.server.context import Context
from millpond.server.native_routes import ROUTES
from millpond.server.run import running

ENDLESS = {"/v1/queue/stream", "/v1/queue/subscribe", "/v1/queue/subscribeWithState", "/v1/queue/watch"}
"""Their answers have no end; tests of their own read them."""
REFUSED = {route.path for route in openapi.DESCRIBED if route.tag == "not here"}


async def test_the_document_has_every_route_and_no_other() -> None:
    async with testing.pond() as pond:
        assert App(Context(pond)).paths == set(openapi.document()["paths"])


async def test_it_is_served_as_json_to_everybody() -> None:
    async with testing.pond() as pond, running(pond) as url:
        answer = await request(url, "GET", openapi.PATH)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert json.loads(answer.body) == json.loads(json.dumps(openapi.document()))


def test_every_reference_leads_somewhere_and_every_operation_has_its_own_name() -> None:
    document = openapi.document()
    names = [one["operationId"] for methods in document["paths"].values() for one in methods.values()]
    assert len(names) == len(set(names)) == len(document["paths"])

    def follow(value: Any) -> None:
        if isinstance(value, dict):
            reference = value.get("$ref")
            if reference is not None:
                target: Any = document
                for step in reference.removeprefix("#/").split("/"):
                    target = target[step]
            for one in value.values():
                follow(one)
        elif isinstance(value, list):
            for one in value:
                follow(one)

    follow(document)


async def test_own_routes_take_post_and_nothing_else() -> None:
    async with testing.pond() as pond, running(pond) as url:
        for route in ROUTES:
            for method in ("GET", "PUT", "DELETE"):
                answer = await request(url, method, route.path)
                assert (answer.status, answer.headers["allow"]) == (405, "POST"), route.path
        answer = await request(url, "POST", openapi.PATH)
        assert answer.status == 405
        assert "GET" in answer.headers["allow"]


async def test_parts_of_lockds_protocol_that_are_not_here_say_so() -> None:
    async with testing.pond() as pond, running(pond) as url:
        for path in REFUSED:
            answer = await request(url, "POST", path, b"{}", {"Content-Type": "application/json"})
            assert answer.status == 501, path
            assert json.loads(answer.body)["error"].endswith("_unsupported")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server on an event loop of its own thread: what drives it is synchronous."""
    ready = threading.Event()
    told: list[Any] = []

    async def serve() -> None:
        stop = asyncio.Event()
        async with testing.pond() as pond, running(pond) as listening:
            queue = pond.queue("0")
            await queue.enqueue_many([b"one", b"two"], attributes={"a": 1}, content_type="text/plain")
            told.extend((listening, asyncio.get_running_loop(), stop))
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(30)
    try:
        yield told[0]
    finally:
        told[1].call_soon_threadsafe(told[2].set)
        thread.join(30)


def _fuzzed() -> list[str]:
    return sorted(set(openapi.document()["paths"]) - ENDLESS - REFUSED)


@pytest.mark.parametrize("path", _fuzzed())
def test_whatever_the_document_allows_is_answered_as_the_document_says(path: str, url: str) -> None:
    """Requests made up from the document: no failure of the server, and answers that fit their schemas."""
    whole = openapi.document()
    one = {**whole, "paths": {path: _json_only(whole["paths"][path])}}
    schema = schemathesis.openapi.from_dict(one)
    [result] = schema.get_all_operations()

    @hypothesis.settings(
        max_examples=10,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=result.ok().as_strategy())
    def ask(case: schemathesis.Case) -> None:
        body: Any = case.body
        if isinstance(body, dict):
            # It would wait for what nobody sends.
            if "wait_ms" in body:
                body["wait_ms"] = 0
            if path.startswith("/v1/queue/dequeue"):
                body["wait_seconds"] = -1
        elif path.startswith("/v1/queue/dequeue"):
            case.body = {"wait_seconds": -1}
        case.call_and_validate(
            base_url=url,
            checks=[
                not_a_server_error,
                status_code_conformance,
                content_type_conformance,
                response_schema_conformance,
            ],
        )

    ask()


def _json_only(methods: dict[str, Any]) -> dict[str, Any]:
    """Schemathesis knows no MessagePack; the forms have one set of types."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            several = len(value) > 1
            return {key: without(one) for key, one in value.items() if not (several and key == "application/msgpack")}
        return [without(one) for one in value] if isinstance(value, list) else value

    made: dict[str, Any] = without(methods)
    return made
