"""Deliveries as lockd's clients get them: pairs of parts in a multipart body."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

from millpond.errors import CryptoError, StoreCorrupt
from millpond.server.context import Call, Context, Header
from millpond.server.receiving import fail
from millpond.service.consuming import Delivery
from millpond.wire import headers, lockd
from millpond.wire.multipart import Writer

DEFAULT_TYPE = "application/octet-stream"

_HEADER_SAFE = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")


def correlation_of(delivery: Delivery) -> str:
    """The correlation id that a message carries for ever. Its own id takes the place of one that it was not given, or
    that cannot stand in a header: that is as good for finding it, and need not be stored."""
    record = delivery.given or delivery.record
    return (record and headers.correlation_id(record.head.correlation_id)) or delivery.id


def message(delivery: Delivery, stateful: bool) -> lockd.Message:
    """A delivery as lockd's clients see it."""
    record = delivery.given
    assert record is not None
    head, status = record.head, record.status
    lease = status.lease
    assert lease is not None
    until = lease.until // 1000
    txn_id = lockd.transaction_id(lease.id)
    made = lockd.Message(
        namespace=delivery.namespace,
        queue=delivery.queue,
        message_id=delivery.id,
        attempts=status.attempts,
        max_attempts=head.max_attempts,
        failure_attempts=status.failures,
        not_visible_until_unix=until,
        visibility_timeout_seconds=lockd.seconds_up(max(0, lease.until - status.updated_at)),
        attributes=head.attributes,
        payload_content_type=head.content_type or DEFAULT_TYPE,
        payload_bytes=head.payload_size,
        correlation_id=correlation_of(delivery),
        lease_id=lease.id,
        lease_expires_at_unix=until,
        fencing_token=lease.token,
        txn_id=txn_id,
        meta_etag=lockd.meta_etag(lease.token, lease.until),
    )
    if stateful:
        # The lease on the state is the message's own: it is held, renewed and given up with it.
        made.state_etag = lockd.state_etag(delivery.id)
        made.state_lease_id = lease.id
        made.state_lease_expires_at_unix = until
        made.state_fencing_token = lease.token
        made.state_txn_id = txn_id
    return made


def content_type(delivery: Delivery) -> bytes:
    """The payload's type as it may stand in a header."""
    record = delivery.given
    kind = record.head.content_type if record is not None else None
    if kind is None or _HEADER_SAFE.fullmatch(kind) is None:
        return DEFAULT_TYPE.encode()
    return kind.encode()


def writer(context: Context) -> Writer:
    """A writer with a boundary that nobody can guess, and so no payload holds."""
    return Writer(context.pond.ids.random(16).hex())


def fields(call: Call, made: Writer, first: Delivery) -> list[Header]:
    """The headers of an answer that begins with this message."""
    call.correlation_id = correlation_of(first)
    return [
        (b"content-type", b"multipart/related; boundary=" + made.boundary.encode()),
        (headers.CORRELATION, call.correlation_id.encode()),
    ]


def head(made: Writer, delivery: Delivery, stateful: bool, number: int | None = None) -> bytes:
    """What comes before the payload of a message."""
    record = delivery.given
    assert record is not None
    meta = lockd.encode(lockd.Delivered(message(delivery, stateful))) + b"\n"
    return made.head(meta, record.head.payload_size, content_type(delivery), number)


async def payload(context: Context, delivery: Delivery) -> AsyncIterator[bytes]:
    """The payload in chunks, as many bytes as its head says. Raises what reading it raises; one that is
    damaged has failed by that."""
    if delivery.payload is not None:
        yield delivery.payload
        return
    record = delivery.given
    assert record is not None
    left = record.head.payload_size
    try:
        async for chunk in context.pond.service.payload_chunks(record):
            left -= len(chunk)
            if left < 0:
                break
            yield chunk
        if left:
            raise StoreCorrupt(f"the payload of message {delivery.id} has another length than its record says")
    except (StoreCorrupt, CryptoError) as error:
        fail(context, delivery, error)
        raise


async def answer(call: Call, deliveries: Sequence[Delivery], stateful: bool) -> None:
    """One answer with these messages. Payloads that are stored apart are streamed. A message whose payload turns out to
    be unreadable after the answer has begun breaks it off: the client sees that there is something wrong."""
    context = call.context
    made = writer(context)
    several = len(deliveries) > 1
    parts: list[Any] = [made.open]
    size = len(made.open) + len(made.close)
    whole = True
    for number, delivery in enumerate(deliveries):
        start = head(made, delivery, stateful, number if several else None)
        parts.append(start)
        record = delivery.given
        assert record is not None
        size += len(start) + record.head.payload_size + len(made.after)
        if delivery.payload is None:
            whole = False
            parts.append(delivery)
        else:
            parts.append(delivery.payload)
        parts.append(made.after)
    parts.append(made.close)
    answered = fields(call, made, deliveries[0])
    answered.append((b"content-length", b"%d" % size))
    if whole:
        for delivery in deliveries:
            context.held.keep(delivery)
        await call.whole(b"".join(parts), 200, answered)
        return
    await call.start(200, answered)
    for part in parts:
        if isinstance(part, bytes):
            await call.write(part)
            continue
        async for chunk in payload(context, part):
            await call.write(chunk)
    for delivery in deliveries:
        context.held.keep(delivery)
    await call.end()
