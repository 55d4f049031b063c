"""lockd's queue routes, but for the streams (`subscribe`, `watch`) and the workflow state (`state_routes`).

What differs from lockd, and why, is in docs/reference/lockd-protocol.md; the order of checks is lockd's: throttle,
drain, fields, namespace, message, lease, version.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec

from millpond.errors import InvalidMessageId, LeaseLost
from millpond.model import names
from millpond.model.message import DEFAULT_PRIORITY, Lease
from millpond.server import deliveries, state_routes, subscribe, watch
from millpond.server.context import Call, Handler
from millpond.server.lockd_requests import DEQUEUE, MAX_PAGE, place, read, waiting, wish
from millpond.server.receiving import give_back, receive
from millpond.server.watches import head_of
from millpond.service.config import DEFAULT_OPTIONS, MAX_SECONDS, EnqueueOptions
from millpond.service.consuming import Delivery
from millpond.wire import headers, lockd, multipart
from millpond.wire.faults import Refusal
from millpond.wire.multipart import Begin, Close, Data, Event, MultipartError, Parser, boundary_of

_ack = lockd.Reader(lockd.Ack)
_nack = lockd.Reader(lockd.Nack)
_extend = lockd.Reader(lockd.Extend)
_stats = lockd.Reader(lockd.Named, empty=True)
_meta = msgspec.json.Decoder(lockd.EnqueueMeta).decode
_packed_meta = msgspec.msgpack.Decoder(lockd.EnqueueMeta).decode


def hot() -> Mapping[str, Handler]:
    """Path → handler, any method."""
    return {
        "/v1/queue/enqueue": enqueue,
        "/v1/queue/dequeue": functools.partial(dequeue, stateful=False),
        "/v1/queue/dequeueWithState": functools.partial(dequeue, stateful=True),
        "/v1/queue/subscribe": functools.partial(subscribe.subscribe, stateful=False),
        "/v1/queue/subscribeWithState": functools.partial(subscribe.subscribe, stateful=True),
        "/v1/queue/watch": watch.watch,
        "/v1/queue/stats": stats,
        "/v1/queue/ack": ack,
        "/v1/queue/nack": nack,
        "/v1/queue/extend": extend,
        **state_routes.hot(),
    }


# Producers


class Upload:
    """A multipart enqueue as it comes in: first its meta, then its payload."""

    def __init__(self, call: Call, boundary: bytes, max_meta: int, begin: bytes) -> None:
        """``begin``: what was read of the body."""
        self._call = call
        self._begin = begin
        self._chunks = call.chunks()
        self._parser = Parser(boundary)
        self._events: deque[Event] = deque()
        self._max_meta = max_meta
        self._over = False
        """There is no payload (any more)."""
        self.size = 0
        """Bytes of the payload so far."""

    async def _next(self) -> Event:
        while not self._events:
            chunk, self._begin = self._begin, b""
            if not chunk:
                try:
                    chunk = await anext(self._chunks)
                except StopAsyncIteration:
                    raise Refusal(400, "multipart_error", "the body ends before its closing delimiter") from None
            try:
                self._events.extend(self._parser.feed(chunk))
            except MultipartError as error:
                raise Refusal(400, "multipart_error", str(error)) from error
        return self._events.popleft()

    async def meta(self) -> tuple[Begin, bytes] | None:
        """The meta part, if there is one before the payload. Raises Refusal, Disconnected."""
        meta: tuple[Begin, bytes] | None = None
        while True:
            event = await self._next()
            if isinstance(event, Close):
                self._over = True
                return meta
            if isinstance(event, Begin):
                if event.name != "meta":
                    return meta
                meta = event, await self._collect()

    async def _collect(self) -> bytes:
        parts: list[bytes] = []
        size = 0
        while isinstance(event := await self._next(), Data):
            size += len(event.data)
            if size > self._max_meta:
                raise Refusal(400, "invalid_body", f"the meta part is larger than {self._max_meta} bytes")
            parts.append(event.data)
        return b"".join(parts)

    async def payload(self) -> AsyncIterator[bytes]:
        """The payload as it comes; what follows its part is left unread. Raises Refusal, Disconnected, Unauthorized."""
        while not self._over and isinstance(event := await self._next(), Data):
            self.size += len(event.data)
            yield event.data
        # It may have taken hours. Nothing is stored yet.
        self._call.check_rights()


async def enqueue(call: Call) -> None:
    """Puts a message into a queue."""
    context = call.context
    await context.gate.admit("producer")
    kind = call.header(b"content-type")
    boundary = None if kind is None else boundary_of(kind.decode("latin-1"))
    if boundary is None:
        raise Refusal(
            400, "invalid_content_type", "an enqueue is multipart/related or multipart/form-data, with a boundary"
        )
    max_meta = context.config.max_meta_bytes
    begin = await call.first()
    pair = multipart.pair(begin, boundary) if call.complete else None
    upload: Upload | None = None
    payload: Any
    part: tuple[Begin, bytes] | None
    if pair is not None and pair[0].name == "meta" != pair[2].name and len(pair[1]) <= max_meta:
        part, payload = pair[:2], pair[3]
    else:
        upload = Upload(call, boundary, max_meta, begin)
        part = await upload.meta()
        payload = upload.payload()
    try:
        meta = lockd.EnqueueMeta() if part is None else _read_meta(*part)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, "invalid_body", f"the meta part: {error}") from error
    key = place(call, meta.namespace.strip(), meta.queue.strip() or call.query.get("queue", ""))
    call.authorise("write", *key)
    await context.quota.admit(*key)
    given = meta.correlation_id or headers.correlation_id(call.header(headers.CORRELATION))
    options = _options(meta, given)
    service = context.pond.service
    receipt = await service.enqueue(*key, payload, options)
    size = len(payload) if upload is None else upload.size
    defaults = service.defaults_at_hand(key) or await service.defaults(key)
    max_attempts = defaults.max_attempts if options.max_attempts is None else options.max_attempts
    visibility = defaults.visibility if options.visibility is None else round(options.visibility * 1000)
    visible_at = context.pond.clock.now_ms() + round(options.delay * 1000)
    attempts = failures = 0
    if receipt.duplicate:
        # What is told is of the message that is there; it may be gone again, too.
        given = None
        record = await service.load(*key, receipt.message_id)
        if record is not None:
            head, status = record.head, record.status
            given = head.correlation_id
            max_attempts, visibility, visible_at = head.max_attempts, head.visibility, status.visible_at
            attempts, failures, size = status.attempts, status.failures, head.payload_size
    call.correlation_id = headers.correlation_id(given) or receipt.message_id  # what can stand in a header
    await call.answer(
        lockd.encode(
            lockd.Enqueued(
                namespace=key[0],
                queue=key[1],
                message_id=receipt.message_id,
                attempts=attempts,
                max_attempts=max_attempts,
                failure_attempts=failures,
                not_visible_until_unix=visible_at // 1000,
                visibility_timeout_seconds=lockd.seconds_up(visibility),
                payload_bytes=size,
                correlation_id=call.correlation_id,
                duplicate=receipt.duplicate,
            )
        )
        + b"\n"
    )


def _read_meta(part: Begin, data: bytes) -> lockd.EnqueueMeta:
    """A meta part: JSON, or MessagePack where its Content-Type says so, for attributes that JSON has no form for."""
    kind = part.headers.get("content-type", "").partition(";")[0].strip().lower()
    return _packed_meta(data) if kind == headers.MSGPACK else _meta(data)


def _options(meta: lockd.EnqueueMeta, correlation_id: str | None) -> EnqueueOptions:
    max_attempts = meta.max_attempts if meta.max_attempts and meta.max_attempts > 0 else None
    options = EnqueueOptions(
        delay=_seconds(meta.delay_ms, max(0, meta.delay_seconds)) or 0.0,
        ttl=_seconds(meta.ttl_ms, meta.ttl_seconds if meta.ttl_seconds > 0 else None),
        priority=DEFAULT_PRIORITY if meta.priority is None else meta.priority,
        max_attempts=0 if meta.unlimited_attempts else max_attempts,
        visibility=_seconds(
            meta.visibility_ms, meta.visibility_timeout_seconds if meta.visibility_timeout_seconds > 0 else None
        ),
        attributes=meta.attributes,
        dedup_key=meta.dedup_key,
        dedup_window=_seconds(meta.dedup_window_ms, None),
        ordering_key=meta.ordering_key,
        content_type=meta.content_type or meta.payload_content_type.strip() or None,
        correlation_id=correlation_id,
        message_id=meta.message_id,
    )
    return DEFAULT_OPTIONS if options == DEFAULT_OPTIONS else options


def _seconds(ms: int | None, seconds: int | None) -> float | None:
    if ms is not None:
        return ms / 1000
    return None if seconds is None else float(seconds)


# Consumers


async def dequeue(call: Call, *, stateful: bool) -> None:
    """Leases the next messages."""
    context = call.context
    await context.gate.admit("consumer")
    context.refuse_while_draining()
    request: lockd.Dequeue = await read(call, DEQUEUE)
    count = 1 if stateful else min(max(request.page_size, 1), MAX_PAGE)
    asked, patience = wish(call, request, count)
    call.authorise("consume", asked.namespace, asked.queue)
    found = await receive(call, asked, patience)
    if not found:
        raise waiting(request.wait_seconds)
    try:
        await deliveries.answer(call, found, stateful)
    except BaseException:
        if not call.started:
            give_back(context, found)
        raise


# Answers


async def _held(call: Call, request: lockd.Answer, *, etag_needed: bool) -> Delivery:
    """The delivery that the answer is for. Raises Refusal, in lockd's order of checks."""
    context = call.context
    if not (request.queue.strip() and request.message_id.strip() and request.lease_id.strip()):
        raise Refusal(400, "missing_fields", "queue, message_id and lease_id are needed")
    meta_etag = request.meta_etag.strip()
    if etag_needed and not meta_etag:
        raise Refusal(400, "missing_fields", "meta_etag is needed")
    namespace, queue = place(call, request.namespace.strip(), request.queue, "invalid_queue_key")
    call.authorise("consume", namespace, queue)
    try:
        id = names.message_id(request.message_id)
    except InvalidMessageId as error:
        raise Refusal(404, "not_found", f"there is no message {request.message_id[:64]!r}") from error
    lease_id = request.lease_id.strip()
    delivery = context.held.get(namespace, queue, id, lease_id, request.fencing_token)
    remembered = delivery.record is not None
    lease = await _lease(call, delivery)
    if etag_needed and remembered and (lease is None or lockd.meta_etag(lease.token, lease.until) != meta_etag):
        # Another process may have extended it, or given it to somebody else, since this one delivered it.
        delivery.record = None
        lease = await _lease(call, delivery)
    if lease is None:
        return delivery  # what is wrong with it the service says, in words
    if request.txn_id.strip() and request.txn_id.strip() != lockd.transaction_id(lease_id):
        raise _mismatch("txn_id is not this lease's")
    if request.state_lease_id.strip() and request.state_lease_id.strip() != lease_id:
        raise _mismatch("state_lease_id is not this delivery's")
    if etag_needed and lockd.meta_etag(lease.token, lease.until) != meta_etag:
        raise Refusal(409, "cas_mismatch", "meta_etag is not the message's any more; send what the last extend gave")
    return delivery


async def _lease(call: Call, delivery: Delivery) -> Lease | None:
    """The message's lease, if it is the delivery's. Raises Refusal ``not_found`` when the message is gone."""
    record = delivery.record
    if record is None:
        record = await call.context.pond.service.load(delivery.namespace, delivery.queue, delivery.id)
        if record is None:
            raise _gone(delivery)
        delivery.record = record
    call.correlation_id = deliveries.correlation_of(delivery)
    lease = record.status.lease
    return lease if lease is not None and lease.id == delivery.lease_id and lease.token == delivery.token else None


def _gone(delivery: Delivery) -> Refusal:
    return Refusal(404, "not_found", f"message {delivery.id} is gone (acked, removed), or never was in this queue")


def _mismatch(detail: str) -> Refusal:
    return Refusal(409, "queue_message_lease_mismatch", f"{detail}; nothing was changed")


async def _missing_or_lost(call: Call, delivery: Delivery, error: LeaseLost) -> Exception:
    """lockd tells a message that is gone from one that somebody else holds."""
    call.context.held.drop(delivery)
    gone = await call.context.pond.service.load(delivery.namespace, delivery.queue, delivery.id) is None
    return _gone(delivery) if gone else error


async def ack(call: Call) -> None:
    """Removes a message that is done."""
    await call.context.gate.admit("answer")
    request: lockd.Ack = await read(call, _ack)
    delivery = await _held(call, request, etag_needed=False)
    if request.state_etag.strip() and request.state_etag.strip() != lockd.state_etag(delivery.id):
        raise Refusal(409, "cas_mismatch", "state_etag is not the one of this message's deliveries")
    try:
        await call.context.pond.service.ack(delivery)
    except LeaseLost as error:
        raise await _missing_or_lost(call, delivery, error) from error
    call.context.held.drop(delivery)
    await call.answer(lockd.encode(lockd.Acked(True, call.correlation_id)) + b"\n")


async def nack(call: Call) -> None:
    """Gives a message back, with a failure or (``defer``) without."""
    await call.context.gate.admit("answer")
    request: lockd.Nack = await read(call, _nack)
    intent = request.intent.strip().lower() or "failure"
    if intent not in {"failure", "defer"}:
        raise Refusal(400, "invalid_nack_intent", "intent is failure or defer")
    if intent == "defer" and request.last_error is not None:
        raise Refusal(400, "invalid_nack_last_error", "a deferred message has no error; leave last_error out")
    delivery = await _held(call, request, etag_needed=True)
    delay = float(min(max(0, request.delay_seconds), round(MAX_SECONDS)))
    service = call.context.pond.service
    try:
        if intent == "defer":
            await service.defer(delivery, delay=delay)
        else:
            await service.nack(delivery, delay=delay, error=request.last_error)
    except LeaseLost as error:
        raise await _missing_or_lost(call, delivery, error) from error
    call.context.held.drop(delivery)
    # Nobody holds it now, so that nothing can be asked of this version; it only must be another.
    etag = lockd.meta_etag(delivery.token, 0)
    await call.answer(lockd.encode(lockd.Requeued(True, etag, call.correlation_id)) + b"\n")


async def extend(call: Call) -> None:
    """Renews a lease."""
    await call.context.gate.admit("answer")
    request: lockd.Extend = await read(call, _extend)
    delivery = await _held(call, request, etag_needed=True)
    record = delivery.record
    assert record is not None
    seconds = record.head.visibility / 1000
    if request.extend_by_seconds > 0:
        seconds = float(min(request.extend_by_seconds, round(MAX_SECONDS)))
    try:
        lease = await call.context.pond.service.extend(delivery, seconds)
    except LeaseLost as error:
        raise await _missing_or_lost(call, delivery, error) from error
    call.context.streams.extended(lease.id, lease.until)
    until = lease.until // 1000
    await call.answer(
        lockd.encode(
            lockd.Extended(
                lease_expires_at_unix=until,
                visibility_timeout_seconds=lockd.seconds_up(round(seconds * 1000)),
                meta_etag=lockd.meta_etag(lease.token, lease.until),
                state_lease_expires_at_unix=until if request.state_lease_id.strip() else 0,
                correlation_id=call.correlation_id,
            )
        )
        + b"\n"
    )


# Looking


async def stats(call: Call) -> None:
    """How the queue stands, without a change to it."""
    await call.context.gate.admit("other")
    request: lockd.Named = await read(call, _stats)
    query = call.query
    written = request.queue.strip() or query.get("queue", "").strip()
    if not written:
        raise Refusal(400, "missing_queue", "name the queue")
    key = place(call, request.namespace.strip() or query.get("namespace", "").strip(), written)
    call.authorise("read", *key)
    pond = call.context.pond
    seen = pond.dispatcher.queue_stats(*key)
    head = await head_of(pond, key)
    told = lockd.Stats(
        namespace=key[0],
        queue=key[1],
        waiting_consumers=seen.waiting_consumers,
        pending_candidates=seen.pending_candidates,
        total_consumers=seen.total_consumers,
        has_active_watcher=pond.dispatcher.has_active_watcher(*key),
        available=head is not None,
        correlation_id=call.correlation_id,
    )
    if head is not None:
        now = pond.clock.now_ms()
        told.head_message_id = head.item.id
        told.head_enqueued_at_unix = head.head.enqueued_at // 1000
        told.head_not_visible_until_unix = head.status.visible_at // 1000
        told.head_age_seconds = max(0, now - head.head.enqueued_at) // 1000
    await call.answer(lockd.encode(told) + b"\n")
