"""What a JSON line of the command holds. These names are promised: fields are added, never renamed or dropped."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from millpond.message import Message, MessageView
    from millpond.pond import Pond
    from millpond.queue import QueueCounts

JSON_PAYLOAD_LIMIT = 16 * 1024 * 1024
"""Bytes of payload that a JSON line will carry: one line of more helps no reader, and it is held in memory. A larger
payload is marked ``omitted``; ``--output`` and ``--output-dir`` stream it into a file."""


def timestamp(moment: datetime | None) -> str | None:
    """ISO 8601 in UTC to the millisecond, ``2025-06-15T15:06:40.123Z``."""
    if moment is None:
        return None
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def payload_fields(payload: bytes | None) -> dict[str, Any]:
    """The payload as text, or as base64 and marked so, or (None) marked as left out."""
    if payload is None:
        return {"payload": None, "payload_encoding": "omitted"}
    try:
        return {"payload": payload.decode(), "payload_encoding": "utf-8"}
    except UnicodeDecodeError:
        return {"payload": base64.b64encode(payload).decode("ascii"), "payload_encoding": "base64"}


def delivery(message: Message) -> dict[str, Any]:
    """A message as received: what `ack`, `nack`, `defer` and `extend` need, and what the producer said."""
    lease = message.lease
    return {
        "message_id": message.id,
        "lease_id": lease.id,
        "fencing_token": lease.token,
        "attempts": message.attempts,
        "failures": message.failures,
        "namespace": message.namespace,
        "queue": message.queue,
        "priority": message.priority,
        "enqueued_at": timestamp(message.enqueued_at),
        "lease_until": timestamp(lease.until),
        "owner": lease.owner,
        "attributes": dict(message.attributes or {}),
        "content_type": message.content_type,
        "correlation_id": message.correlation_id,
        "ordering_key": message.ordering_key,
    }


def view(message: MessageView) -> dict[str, Any]:
    """A message as it lies in its queue or among the dead letters."""
    lease = message.lease
    return {
        "message_id": message.id,
        "namespace": message.namespace,
        "queue": message.queue,
        "state": message.state,
        "priority": message.priority,
        "attempts": message.attempts,
        "failures": message.failures,
        "max_attempts": message.max_attempts,
        "enqueued_at": timestamp(message.enqueued_at),
        "visible_at": timestamp(message.visible_at),
        "expires_at": timestamp(message.expires_at),
        "attributes": dict(message.attributes or {}),
        "content_type": message.content_type,
        "correlation_id": message.correlation_id,
        "dedup_key": message.dedup_key,
        "ordering_key": message.ordering_key,
        "payload_size": message.payload_size,
        "last_error": message.last_error,
        "dead_reason": message.dead_reason,
        "dead_at": timestamp(message.dead_at),
        "lease_id": lease.id if lease else None,
        "fencing_token": lease.token if lease else None,
        "lease_until": timestamp(lease.until) if lease else None,
        "owner": lease.owner if lease else None,
    }


def counts(namespace: str, queue: str, found: QueueCounts) -> dict[str, Any]:
    """How a queue stands."""
    return {
        "namespace": namespace,
        "queue": queue,
        "ready": found.ready,
        "delayed": found.delayed,
        "leased": found.leased,
        "blocked": found.blocked,
        "dead": found.dead,
        "bytes": found.bytes,
        "oldest_age": found.oldest_age,
    }


def error_text(error: Any) -> str:
    """A message's last error for people: its gist when it has one, else all of it."""
    if error is None:
        return ""
    if isinstance(error, dict) and isinstance(error.get("error"), str):
        stderr = error.get("stderr")
        return f"{error['error']}: {stderr.strip()}" if isinstance(stderr, str) and stderr.strip() else error["error"]
    if isinstance(error, dict) and error.keys() >= {"type", "message"}:  # as a worker keeps what a handler raised
        return f"{error['type']}: {error['message']}" if error["message"] else str(error["type"])
    return str(error)


async def all_queues(pond: Pond, namespace: str | None) -> list[tuple[str, str]]:
    """Every queue of the pond, or of one namespace. Raises InvalidQueue."""
    from millpond.model.names import namespace_name

    namespace = namespace and namespace_name(namespace)
    return [(at, name) for at, name in await pond.queues() if namespace is None or at == namespace]
