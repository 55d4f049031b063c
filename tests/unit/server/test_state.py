"""The workflow state, as lockd's clients use it: by key, lease and headers."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec
import pytest
from tests.unit.server.lockd import Client, Delivery, error_of, serving
from tests.unit.server.raw import Answer

UNKNOWN = "0197a3c2-0000-7000-8000-000000000001"


class State:
    """lockd's StateHandle: keeps version and ETag of what it read or wrote last, and sends them if it has any."""

    def __init__(self, client: Client, delivery: Delivery) -> None:
        message = delivery.message
        self.client = client
        self.query = f"?key=q/{message['queue']}/state/{message['message_id']}&namespace={message['namespace']}"
        self.headers = {
            "X-Lease-ID": message["state_lease_id"],
            "X-Fencing-Token": str(message["state_fencing_token"]),
            "X-Txn-ID": message["state_txn_id"],
        }
        self.etag = ""
        self.version = 0

    async def call(self, route: str, body: Any = None, **headers: str) -> Answer:
        named = self.headers | {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.post(
            f"/v1/{route}{self.query}",
            body,
            **{name.replace("-", "_"): value for name, value in named.items() if value},
        )

    def conditions(self) -> dict[str, str]:
        return {"X_If_State_ETag": self.etag, "X_If_Version": str(self.version)} if self.etag else {}

    async def load(self) -> Any:
        answer = await self.call("get")
        if answer.status == 204:
            assert answer.body == b""
            return None
        assert answer.status == 200, answer
        self.etag, self.version = answer.headers["etag"].strip('"'), int(answer.headers["x-key-version"])
        return json.loads(answer.body)

    async def save(self, value: Any) -> Answer:
        answer = await self.call("update", value, **self.conditions())
        if answer.status == 200:
            body = json.loads(answer.body)
            self.etag, self.version = body["new_state_etag"], body["new_version"]
            assert self.etag == answer.headers["etag"].strip('"')
            assert str(self.version) == answer.headers["x-key-version"]
        return answer


async def held(client: Client, **fields: Any) -> tuple[Delivery, State]:
    await client.enqueue("q", b"x", **fields)
    [delivery] = await client.dequeue("q", "dequeueWithState")
    return delivery, State(client, delivery)


async def test_load_save_load_save_on_a_fresh_message() -> None:
    """lockd's regression: nothing yet is 204, the first save meets no condition, the next ones go on from it."""
    async with serving() as client:
        delivery, state = await held(client)
        assert await state.load() is None
        answer = await state.save({"step": 1, "text": "é"})
        assert answer.status == 200
        assert json.loads(answer.body) == {
            "new_version": 1,
            "new_state_etag": state.etag,
            "bytes": len('{"step":1,"text":"é"}'.encode()),
            "metadata": {"query_hidden": True},
        }
        assert answer.headers["x-fencing-token"] == "1"
        assert await state.load() == {"step": 1, "text": "é"}
        for step in (2, 3):
            assert (await state.save({"step": step})).status == 200
            assert (await state.load(), state.version) == ({"step": step}, step)
        await client.ack(delivery)


async def test_a_first_save_without_a_load_meets_no_condition() -> None:
    async with serving() as client:
        _, state = await held(client)
        assert (await state.save([1, None, 2.5, {"a": "b"}])).status == 200
        assert (await state.call("update", {"unconditional": True})).status == 200
        assert await state.load() == {"unconditional": True}


@pytest.mark.parametrize("intent", ["failure", "defer"])
async def test_what_was_saved_is_there_for_the_next_delivery(intent: str) -> None:
    async with serving() as client:
        delivery, state = await held(client)
        await state.save({"done": 3})
        answer = await client.post("/v1/queue/nack", delivery.answer(intent=intent))
        assert answer.status == 200
        [again] = await client.dequeue("q", "dequeueWithState")
        assert again.message["state_etag"] == delivery.message["state_etag"]
        following = State(client, again)
        assert await following.load() == {"done": 3}
        assert following.version == 1
        assert (await following.save({"done": 4})).status == 200
        # The first holder may look and write no more.
        for route in ("get", "update", "remove", "metadata"):
            answer = await state.call(route, {})
            assert error_of(answer) == (409, "queue_message_lease_mismatch"), route
        fields = again.answer(state_etag=again.message["state_etag"])
        assert (await client.post("/v1/queue/ack", fields)).status == 200
        assert error_of(await following.call("get"))[1] == "queue_message_lease_mismatch"


async def test_what_was_saved_survives_a_consumer_that_died() -> None:
    async with serving() as client:
        _, state = await held(client)
        await state.save("progress")
        await client.pond.advance(31)
        [again] = await client.dequeue("q", "dequeueWithState")
        assert await State(client, again).load() == "progress"


async def test_a_library_user_sees_the_same_state() -> None:
    async with serving() as client:
        delivery, state = await held(client)
        message = delivery.message
        handle = client.pond.queue("q").handle(message["message_id"], message["lease_id"], message["fencing_token"])
        await handle.state.save({"from": "python"})
        assert await state.load() == {"from": "python"}
        await state.save({"from": "http"})
        assert await handle.state.load() == {"from": "http"}
        await handle.state.save({1: b"bytes"})
        assert await state.load() == {"1": "Ynl0ZXM="}
        await handle.state.save(msgspec.msgpack.Ext(1, b"x"))
        assert error_of(await state.call("get")) == (409, "state_not_json")


async def test_stale_versions_conflict_and_the_answer_has_the_current_one() -> None:
    async with serving() as client:
        _, state = await held(client)
        await state.save(1)
        old, old_version = state.etag, state.version
        await state.save(2)
        for route in ("update", "remove"):
            answer = await state.call(route, 3, X_If_State_ETag=old)
            assert error_of(answer) == (409, "etag_mismatch")
            assert json.loads(answer.body)["current_etag"] == state.etag
            answer = await state.call(route, 3, X_If_Version=str(old_version))
            assert error_of(answer) == (409, "version_conflict")
            assert json.loads(answer.body)["current_version"] == state.version == 2
        answer = await state.call("update", 3, X_If_State_ETag=f'"{state.etag}"', X_If_Version="2")
        assert answer.status == 200
        fresh = (await held(client))[1]
        assert error_of(await fresh.call("update", 1, X_If_State_ETag="x")) == (409, "etag_mismatch")
        assert (await fresh.call("update", 1, X_If_Version="0")).status == 200


async def test_remove_forgets_and_may_be_repeated() -> None:
    async with serving() as client:
        _, state = await held(client)
        assert json.loads((await state.call("remove")).body) == {"removed": False}
        await state.save(1)
        assert json.loads((await state.call("remove", **state.conditions())).body) == {"removed": True}
        assert await state.load() is None
        assert json.loads((await state.call("remove")).body) == {"removed": False}
        assert (await state.call("update", 2)).status == 200


async def test_expectations_of_the_body() -> None:
    async with serving() as client:
        _, state = await held(client)
        body = b'{ "a" :  1 }'
        for form in (body, b'{"a":1}'):
            digest = hashlib.sha256(form).hexdigest()
            good = await state.call("update", body, X_Expected_SHA256=digest, X_Expected_Bytes=str(len(form)))
            assert good.status == 200
        answer = await state.call("update", body, X_Expected_SHA256="0" * 64)
        assert error_of(answer) == (409, "expected_sha256_mismatch")
        answer = await state.call("update", body, X_Expected_Bytes="1")
        assert error_of(answer) == (409, "expected_bytes_mismatch")


async def test_metadata_is_taken_for_what_it_is() -> None:
    async with serving() as client:
        _, state = await held(client)
        await state.save(1)
        answer = await state.call("metadata", {"query_hidden": True})
        assert json.loads(answer.body) == {
            "namespace": "default",
            "key": state.query.partition("=")[2].partition("&")[0],
            "version": 1,
            "metadata": {"query_hidden": True},
        }
        assert error_of(await state.call("metadata", {"query_hidden": False})) == (501, "queries_unsupported")
        assert error_of(await state.call("metadata", {"other": 1})) == (400, "invalid_body")


@pytest.mark.parametrize("body", [b"", b"{", b"{} {}", b"\xff", b"[" * 100_000])
async def test_a_state_is_json(body: bytes) -> None:
    async with serving() as client:
        _, state = await held(client)
        assert error_of(await state.call("update", body)) == (400, "invalid_body")
        assert await state.load() is None


async def test_a_state_above_its_limit() -> None:
    async with serving() as client:
        _, state = await held(client)
        answer = await state.call("update", "x" * (client.pond.config.max_state_bytes + 1))
        assert error_of(answer) == (413, "too_large")
        assert error_of(await state.call("update", 2**70)) == (400, "invalid_input")


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"X-Lease-ID": ""}, "missing_lease"),
        ({"X-Fencing-Token": ""}, "missing_fencing_token"),
        ({"X-Fencing-Token": "-1"}, "invalid_fencing_token"),
        ({"X-Fencing-Token": "1.5"}, "invalid_fencing_token"),
        ({"X-Fencing-Token": "9" * 30}, "invalid_fencing_token"),
        ({"X-Txn-ID": ""}, "missing_txn"),
        ({"X-If-Version": "x"}, "invalid_version"),
    ],
)
async def test_headers_that_are_missing_or_wrong(headers: dict[str, str], code: str) -> None:
    async with serving() as client:
        _, state = await held(client)
        state.headers |= headers
        for route in ("update", "remove"):
            assert error_of(await state.call(route, 1)) == (400, code)


async def test_another_transaction_lease_or_token_is_refused() -> None:
    async with serving() as client:
        _, state = await held(client)
        assert error_of(await state.call("update", 1, X_Txn_ID="0" * 20)) == (409, "txn_mismatch")
        answer = await state.call("update", 1, X_Fencing_Token="2")
        assert error_of(answer) == (409, "queue_message_lease_mismatch")
        state.headers |= {"X-Lease-ID": "00" * 16, "X-Txn-ID": "0" * 20}
        for route in ("get", "update", "remove", "metadata"):
            assert error_of(await state.call(route, {}))[0] == 409
        assert await client.pond.service.load_state(None, "q", state.query.split("/")[3].split("&")[0]) is None


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("", (400, "missing_key")),
        ("?key=", (400, "missing_key")),
        ("?key=orders", (501, "locks_unsupported")),
        (f"?key=q/q/msg/{UNKNOWN}", (501, "locks_unsupported")),
        (f"?key=q/q/state/{UNKNOWN}/more", (501, "locks_unsupported")),
        (f"?key=q/a%20b/state/{UNKNOWN}", (400, "invalid_queue_state_key")),
        ("?key=q/q/state/x", (400, "invalid_queue_state_key")),
        (f"?key=q/../state/{UNKNOWN}", (400, "invalid_queue_state_key")),
        (f"?key=q/q/state/{UNKNOWN}&namespace=.x", (400, "invalid_namespace")),
        (f"?key=q/q/state/{UNKNOWN}", (409, "queue_message_lease_mismatch")),
    ],
)
async def test_keys(query: str, error: tuple[int, str]) -> None:
    async with serving() as client:
        headers = {"X_Lease_ID": "00" * 16, "X_Fencing_Token": "1", "X_Txn_ID": "0" * 20}
        for route in ("get", "update", "remove"):
            assert error_of(await client.post(f"/v1/{route}{query}", 1, **headers)) == error
