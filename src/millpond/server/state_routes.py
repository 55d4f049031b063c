"""lockd's routes of keys, as far as a message's workflow state needs them: ``q/<queue>/state/<message id>``.

What lockd keeps as a lock with a state of its own is here the state document of the message: written under the
message's lease, there for whoever holds it next, and gone with its ack. Locks that belong to no message, and
transactions, are not here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from millpond.errors import InvalidMessageId, StateConflict, StoreBusy
from millpond.model import names
from millpond.server.context import Call, Handler, Header
from millpond.server.lockd_requests import place, read
from millpond.service.consuming import Delivery
from millpond.service.states import StateResult
from millpond.wire import lockd
from millpond.wire.faults import Refusal

_KEY = re.compile(r"q/([^/]+)/state/([^/]+)")
_INT64 = re.compile(r"[0-9]{1,18}")
_metadata = lockd.Reader(lockd.Metadata)

RETRIES = 8
"""Times that an unconditional write is tried again when another with the same lease came first."""

METADATA = {"query_hidden": True}
"""Of every state: there are no queries that it could show up in."""


def hot() -> Mapping[str, Handler]:
    """Path → handler, any method."""
    return {
        "/v1/get": get,
        "/v1/update": update,
        "/v1/remove": remove,
        "/v1/metadata": metadata,
        **dict.fromkeys(("/v1/acquire", "/v1/keepalive", "/v1/release", "/v1/describe"), locks),
        **dict.fromkeys(("/v1/mutate", "/v1/query"), queries),
        **dict.fromkeys([f"/v1/txn/{step}" for step in ("decide", "commit", "rollback", "replay")], transactions),
    }


async def locks(call: Call) -> None:
    """Locks are refused."""
    raise Refusal(
        501, "locks_unsupported", "this server has queues and the workflow state of their messages, and no other locks"
    )


async def queries(call: Call) -> None:
    """So is lockd's query language."""
    raise Refusal(501, "queries_unsupported", "read the state, change it, and write it back with X-If-State-ETag")


async def transactions(call: Call) -> None:
    """And so are transactions over several leases."""
    raise Refusal(
        501, "transactions_unsupported", "there are no transactions over several leases; hand off with the ack instead"
    )


class _Held(NamedTuple):
    """What a request is about."""

    delivery: Delivery
    key: str


async def _held(call: Call, *, writes: bool) -> _Held:
    """The message whose state is meant. Raises Refusal."""
    await call.context.gate.admit("answer")
    key = call.query.get("key", "").strip()
    if not key:
        raise Refusal(400, "missing_key", "name the key: ?key=q/<queue>/state/<message id>")
    found = _KEY.fullmatch(key)
    if found is None:
        await locks(call)
    assert found is not None
    namespace, queue = place(call, call.query.get("namespace", "").strip(), found.group(1), "invalid_queue_state_key")
    call.authorise("consume", namespace, queue)
    lease_id = _text(call, b"x-lease-id")
    if not lease_id:
        raise Refusal(400, "missing_lease", "send the delivery's state_lease_id as X-Lease-ID")
    token = _number(call, b"x-fencing-token", "invalid_fencing_token")
    if token is None:
        raise Refusal(400, "missing_fencing_token", "send the delivery's state_fencing_token as X-Fencing-Token")
    txn_id = _text(call, b"x-txn-id")
    if writes and not txn_id:
        raise Refusal(400, "missing_txn", "send the delivery's state_txn_id as X-Txn-ID")
    if txn_id and txn_id != lockd.transaction_id(lease_id):
        raise Refusal(409, "txn_mismatch", "X-Txn-ID is not the one of this lease")
    try:
        id = names.message_id(found.group(2))
    except InvalidMessageId as error:
        raise Refusal(400, "invalid_queue_state_key", str(error)) from error
    return _Held(Delivery(namespace, queue, id, lease_id, token), key)


def _text(call: Call, name: bytes) -> str:
    value = call.header(name)
    return "" if value is None else value.decode("latin-1").strip()


def _number(call: Call, name: bytes, code: str) -> int | None:
    text = _text(call, name)
    if not text:
        return None
    if _INT64.fullmatch(text) is None:
        raise Refusal(400, code, f"{name.decode()} is not a whole number")
    return int(text)


def _fields(delivery: Delivery, version: int, etag: str) -> list[Header]:
    fields = [(b"x-key-version", b"%d" % version), (b"x-fencing-token", b"%d" % delivery.token)]
    if etag:
        fields.append((b"etag", f'"{etag}"'.encode()))
    return fields


async def get(call: Call) -> None:
    """Reads the state; 204 when there is none."""
    delivery = (await _held(call, writes=False)).delivery
    found = await call.context.pond.service.held_state(delivery)
    if found is None or found.document.value is None:
        await call.answer(b"", 204, content_type=None, more=_fields(delivery, 0, ""))
        return
    await call.answer(_json(found.document.value), more=_fields(delivery, found.document.version, found.etag))


def _json(value: Any) -> bytes:
    try:
        return lockd.encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        # A program that uses the library may have saved what JSON has no form for.
        raise Refusal(409, "state_not_json", f"the state has a value that JSON has no form for: {error}") from error


async def update(call: Call) -> None:
    """Replaces the state."""
    held = await _held(call, writes=True)
    body = await call.body()
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, "invalid_body", f"the state is not JSON: {error}") from error
    compact = _json(value)
    _check_expected(call, body, compact)
    delivery, service = held.delivery, call.context.pond.service
    for _ in range(RETRIES):
        current = await service.held_state(delivery)
        conditional = _check_conditions(call, current)
        try:
            etag = await service.save_state(delivery, value, etag=None if current is None else current.etag)
        except StateConflict:
            if conditional:
                raise _conflict("etag_mismatch", await service.held_state(delivery)) from None
            continue
        version = 1 if current is None else current.document.version + 1
        await call.answer(
            lockd.encode(lockd.Updated(version, etag, len(compact), METADATA)) + b"\n",
            more=_fields(delivery, version, etag),
        )
        return
    raise StoreBusy(f"the state of message {delivery.id} keeps changing; try again")


def _check_expected(call: Call, *forms: bytes) -> None:
    """What a client expects of the body that it sent, as sent or without spaces."""
    size = _number(call, b"x-expected-bytes", "invalid_body")
    if size is not None and size not in {len(form) for form in forms}:
        raise Refusal(409, "expected_bytes_mismatch", "the body has another length than X-Expected-Bytes says")
    digest = _text(call, b"x-expected-sha256").lower()
    if digest and digest not in {hashlib.sha256(form).hexdigest() for form in forms}:
        raise Refusal(409, "expected_sha256_mismatch", "the body has another hash than X-Expected-SHA256 says")


def _check_conditions(call: Call, current: StateResult | None) -> bool:
    """Whether the client sent any. Raises Refusal when one does not hold."""
    etag = _text(call, b"x-if-state-etag").strip('"')
    if etag and (current is None or current.etag != etag):
        raise _conflict("etag_mismatch", current)
    version = _number(call, b"x-if-version", "invalid_version")
    if version is not None and version != (0 if current is None else current.document.version):
        raise _conflict("version_conflict", current)
    return bool(etag) or version is not None


def _conflict(code: str, current: StateResult | None) -> Refusal:
    return Refusal(
        409,
        code,
        "the state is not at this version any more; read it again",
        current_version=0 if current is None else current.document.version,
        current_etag="" if current is None else current.etag,
    )


async def remove(call: Call) -> None:
    """Deletes the state; fine when there is none."""
    delivery = (await _held(call, writes=True)).delivery
    service = call.context.pond.service
    for _ in range(RETRIES):
        current = await service.held_state(delivery)
        conditional = _check_conditions(call, current)
        if current is None:
            await call.answer(lockd.encode(lockd.Removed(False)) + b"\n", more=_fields(delivery, 0, ""))
            return
        try:
            await service.delete_state(delivery, etag=current.etag)
        except StateConflict:
            if conditional:
                raise _conflict("etag_mismatch", await service.held_state(delivery)) from None
            continue
        await call.answer(lockd.encode(lockd.Removed(True)) + b"\n", more=_fields(delivery, 0, ""))
        return
    raise StoreBusy(f"the state of message {delivery.id} keeps changing; try again")


async def metadata(call: Call) -> None:
    """Takes what lockd's clients say of queries, which there are none of."""
    held = await _held(call, writes=True)
    request: lockd.Metadata = await read(call, _metadata)
    if request.query_hidden is False:
        raise Refusal(501, "queries_unsupported", "a workflow state is never shown in queries: there are none")
    current = await call.context.pond.service.held_state(held.delivery)
    version = 0 if current is None else current.document.version
    await call.answer(
        lockd.encode(lockd.MetadataUpdated(held.delivery.namespace, held.key, version, METADATA)) + b"\n",
        more=_fields(held.delivery, version, ""),
    )
