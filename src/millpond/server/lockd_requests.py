"""What lockd's routes have in common: bodies, names, and what a consumer asks for."""

from __future__ import annotations

from typing import Any

from millpond.errors import InvalidQueue
from millpond.model import names
from millpond.server.context import Call
from millpond.server.receiving import Wish
from millpond.wire import headers, lockd
from millpond.wire.faults import Refusal

MAX_PAGE = 64
"""Messages of one dequeue, or leased at once for a subscription; lockd's limit."""

DEQUEUE = lockd.Reader(lockd.Dequeue, empty=True)


async def read(call: Call, reader: lockd.Reader) -> Any:
    """The request in the body. Raises Refusal ``invalid_body``."""
    body = await call.body()
    try:
        return reader.read(body)
    except lockd.BadBody as error:
        raise Refusal(400, "invalid_body", str(error)) from error


def place(call: Call, namespace: str, queue: str, code: str = "invalid_queue") -> tuple[str, str]:
    """Namespace and queue, normalised. ``code`` is what a bad queue name is called on this route. Raises Refusal."""
    if not namespace:
        namespace = call.context.config.namespace
    elif namespace.lstrip().startswith("."):
        raise Refusal(400, "invalid_namespace", "a namespace may not begin with a dot")
    try:
        return names.queue_key(namespace, queue)
    except InvalidQueue as error:
        try:
            names.namespace_name(namespace)
        except InvalidQueue as bad:
            raise Refusal(400, "invalid_namespace", str(bad)) from bad
        if not queue.strip():
            raise Refusal(400, "missing_queue", "name the queue") from error
        raise Refusal(400, code, str(error)) from error


def wish(call: Call, request: lockd.Dequeue, count: int) -> tuple[Wish, float | None]:
    """What a consumer asks for, and for how many seconds it waits (None: for ever). Raises Refusal."""
    query = call.query
    queue = request.queue.strip() or query.get("queue", "").strip()
    owner = request.owner.strip() or query.get("owner", "").strip()
    if not queue:
        raise Refusal(400, "missing_queue", "name the queue")
    if not owner:
        raise Refusal(400, "missing_owner", "name the owner: who will hold the message")
    key = place(call, request.namespace.strip() or query.get("namespace", "").strip(), queue)
    if request.txn_id.strip():
        if not headers.is_xid(request.txn_id.strip()):
            raise Refusal(400, "invalid_txn", "a transaction id is 20 characters of 0-9 and a-v")
        raise Refusal(
            501,
            "transactions_unsupported",
            "there are no transactions over several leases; leave txn_id out, and hand off with the ack instead",
        )
    if call.identity.name:
        owner = f"{owner}/{call.identity.name}"
    visibility = None
    if request.visibility_timeout_seconds > 0:
        visibility = float(min(request.visibility_timeout_seconds, call.context.config.max_visibility))
    patience: float | None = None
    if request.wait_seconds:
        patience = max(0.0, float(min(request.wait_seconds, LONGEST_WAIT)))
    return Wish(*key, count, visibility, owner), patience


LONGEST_WAIT = 7 * 86_400
"""Seconds; who waits for longer asks again."""


def waiting(wait_seconds: int) -> Refusal:
    """There was no message: 409, as lockd has it."""
    retry = 0 if wait_seconds < 0 else max(1, min(wait_seconds, LONGEST_WAIT))
    return Refusal(409, "waiting", "no messages available", retry_after=retry)
