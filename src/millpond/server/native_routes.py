"""Millpond's own routes under /v1: batches, streams, looking, administering.

One table says of each route what it takes, what it answers and what its caller must be allowed to do; the routes and
the OpenAPI document are made from it. All of them are POST, with JSON or MessagePack in the body, and an answer in the
same form. Another content type is refused: a browser may send one to any server without asking, but not these two.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from millpond.errors import Forbidden, StoreCorrupt, TooLarge
from millpond.model import names
from millpond.server import native_operations as operations
from millpond.server import views
from millpond.server.auth import Scope
from millpond.server.context import JSON_HEADER, MSGPACK_HEADER, Call, Disconnected, Handler
from millpond.server.receiving import give_back
from millpond.server.streams import stream
from millpond.wire import headers, native
from millpond.wire.faults import Refusal

_JSON = headers.JSON.encode()
_MSGPACK = headers.MSGPACK.encode()

_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not the body that they should be; the last for nesting without end."""

_HEADER_SAFE = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,510}[\x21-\x7e])?")

_to_json = msgspec.json.Encoder(enc_hook=views.as_json)
_to_msgpack = msgspec.msgpack.Encoder()


class Route(NamedTuple):
    """One of Millpond's own routes."""

    path: str
    request: type[msgspec.Struct]
    answer: Any
    """The type of the answer; None where it is no single value (see ``kind``)."""
    scope: Scope
    operation: Callable[[Call, Any], Awaitable[Any]]
    kind: str = "value"
    """``value``: one body; ``receive``: one body, whose messages are its reader's; ``stream``: frames; ``payload``:
    bytes."""
    optional: bool = False
    """The body may be empty."""
    also: Callable[[Any], Iterable[tuple[Scope, str | None, str]]] = lambda request: ()
    """What the caller must be allowed besides: scope, namespace, queue."""

    @property
    def summary(self) -> str:
        """What it does, in a line."""
        return (self.operation.__doc__ or "").strip().splitlines()[0]


def _targets(request: native.HandOffRequest) -> Iterable[tuple[Scope, str | None, str]]:
    return [("write", target.namespace or request.namespace, target.queue) for target in request.then]


def _changes(request: native.PolicyRequest) -> Iterable[tuple[Scope, str | None, str]]:
    changed = request.set is not None or request.reset
    return [("admin", request.namespace, request.queue)] if changed else []


async def payload(call: Call, request: native.MessageRequest) -> None:
    """A message's payload, as it is."""
    service = call.context.pond.service
    record = await service.get_message(request.namespace, request.queue, request.message_id)
    chunks = service.payload_chunks(record)
    # Damage shows at the end, after which the last chunk is sent: a reader who got it all has it whole.
    last = await anext(chunks, b"")
    kind = record.head.content_type
    if kind is None or _HEADER_SAFE.fullmatch(kind) is None:
        kind = headers.OCTETS
    left = record.head.payload_size - len(last)
    if left < 0:
        raise _another_length(request)
    fields = [
        (b"content-type", kind.encode()),
        (b"content-length", b"%d" % record.head.payload_size),
        (b"x-content-type-options", b"nosniff"),
        (headers.CORRELATION, call.correlation_id.encode()),
    ]
    began = False
    async for chunk in chunks:
        left -= len(chunk)
        if left < 0:
            raise _another_length(request)
        if not began:
            began = True
            await call.start(200, fields)
        await call.write(last)
        last = chunk
    if left:
        raise _another_length(request)
    if not began:
        await call.start(200, fields)
    await call.end(last)


def _another_length(request: native.MessageRequest) -> StoreCorrupt:
    return StoreCorrupt(f"the payload of message {request.message_id} has another length than its record says")


_Q = "/v1/queue/"
ROUTES: tuple[Route, ...] = (
    Route(_Q + "enqueueBatch", native.EnqueueBatchRequest, native.Receipts, "write", operations.enqueue_batch),
    Route(_Q + "receive", native.ReceiveRequest, native.Deliveries, "consume", operations.receive, "receive"),
    Route(_Q + "ackBatch", native.AckBatchRequest, native.Results, "consume", operations.ack_batch),
    Route(_Q + "nackBatch", native.NackBatchRequest, native.Results, "consume", operations.nack_batch),
    Route(_Q + "extendBatch", native.ExtendBatchRequest, native.Results, "consume", operations.extend_batch),
    Route(_Q + "bury", native.BuryRequest, native.Done, "consume", operations.bury),
    Route(_Q + "handOff", native.HandOffRequest, native.Receipts, "consume", operations.hand_off, also=_targets),
    Route(_Q + "stream", native.StreamRequest, None, "consume", stream, "stream"),
    Route(_Q + "credit", native.CreditRequest, native.Credit, "consume", operations.credit),
    Route(_Q + "payload", native.MessageRequest, None, "read", payload, "payload"),
    Route(_Q + "list", native.NamespaceRequest, native.Queues, "read", operations.queues, optional=True),
    Route(_Q + "counts", native.QueueRequest, native.Counts, "read", operations.counts),
    Route(_Q + "peek", native.PeekRequest, native.Views, "read", operations.peek),
    Route(_Q + "browse", native.ListRequest, native.Page, "read", operations.browse),
    Route(_Q + "get", native.MessageRequest, native.View, "read", operations.get),
    Route(_Q + "nextDue", native.QueueRequest, native.NextDue, "read", operations.next_due),
    Route(_Q + "notify", native.QueueRequest, native.Done, "write", operations.notify),
    Route(_Q + "policy", native.PolicyRequest, native.PolicyAnswer, "read", operations.policy, also=_changes),
    Route(_Q + "pause", native.QueueRequest, native.Done, "admin", operations.pause),
    Route(_Q + "resume", native.QueueRequest, native.Done, "admin", operations.resume),
    Route(_Q + "purge", native.QueueRequest, native.Purged, "admin", operations.purge),
    Route("/v1/dlq/list", native.ListRequest, native.Page, "read", operations.dead_letters),
    Route("/v1/dlq/get", native.MessageRequest, native.View, "read", operations.dead_letter),
    Route("/v1/dlq/redrive", native.DeadLetterIdsRequest, native.Counted, "admin", operations.redrive),
    Route("/v1/dlq/purge", native.DeadLetterIdsRequest, native.Counted, "admin", operations.purge_dead_letters),
    Route("/v1/state/load", native.StateLoadRequest, native.StateAnswer, "consume", operations.state_load),
    Route("/v1/state/save", native.StateSaveRequest, native.StateSaved, "consume", operations.state_save),
    Route("/v1/state/delete", native.StateDeleteRequest, native.Done, "consume", operations.state_delete),
    Route("/v1/requests", native.Nothing, native.Costs, "admin", operations.requests, optional=True),
)
"""All of them."""


def _form(call: Call, body: bytes) -> bool:
    """Whether request and answer are MessagePack; otherwise they are JSON. Raises Refusal for another content type."""
    kind = call.header(b"content-type")
    if kind is None and not body:
        return _MSGPACK in (call.header(b"accept") or b"")
    if kind == _MSGPACK:
        return True
    if kind == _JSON:
        return False
    name = (kind or b"").partition(b";")[0].strip().lower()
    if name in {_MSGPACK, b"application/x-msgpack"}:
        return True
    if name == _JSON:
        return False
    raise Refusal(
        415,
        "unsupported_media_type",
        f"send the body as {headers.JSON} or {headers.MSGPACK}, and say so in Content-Type",
    )


def _handler(route: Route) -> Handler:
    from_json = msgspec.json.Decoder(route.request)
    from_msgpack = msgspec.msgpack.Decoder(route.request)
    operation, scope, optional, kind, also = route.operation, route.scope, route.optional, route.kind, route.also
    named = issubclass(route.request, native.Request)
    # These hand the names on as they are, to whom no name is the default one; where that is the server's own default
    # as well, nothing has to be put in its place, which is paid for each message.
    handing_on = operation in {operations.enqueue_batch, operations.receive, operations.ack_batch}
    # A message that its consumer holds is his to read; so it is for who may look at the queue.
    other: Scope | None = "consume" if kind == "payload" else None

    async def handle(call: Call) -> None:
        body, packed = call.at_hand, call.packed
        if body is None or packed is None:
            if call.method != "POST":
                raise Refusal(405, "method_not_allowed", "this route takes POST")
            body = await _body(call)
            packed = _form(call, body)
        if not body and optional:
            request: Any = route.request()
        else:
            try:
                request = from_msgpack.decode(body) if packed else from_json.decode(body)
            except _UNREADABLE as error:
                raise Refusal(400, "invalid_body", _why(error)) from error
        if named:
            # What nobody named is the server's own default, for the caller's rights as for the operation.
            default = call.context.config.namespace
            namespace, queue = names.queue_key(request.namespace or default, request.queue)
            light = handing_on and default == names.DEFAULT_NAMESPACE
            if request.namespace != namespace and not (light and request.namespace is None):
                request = msgspec.structs.replace(request, namespace=namespace)
            _authorise(call, scope, other, namespace, queue)
            for wanted, *place in also(request):
                call.authorise(wanted, *names.queue_key(*place))
        elif scope == "admin":
            call.authorise(scope)
        answer = await operation(call, request)
        if kind == "value":
            await _respond(call, packed, answer)
        elif kind == "receive":
            deliveries = answer
            try:
                data = _encoded(packed, native.Deliveries([views.delivery(delivery) for delivery in deliveries]))
            except BaseException:
                give_back(call.context, deliveries)
                raise
            if call.vanished:
                # It went while the messages were claimed: what is written now is lost.
                give_back(call.context, deliveries)
                raise Disconnected
            held = call.context.held
            for delivery in deliveries:
                held.keep(delivery)
            await call.answer(data, 200, MSGPACK_HEADER if packed else JSON_HEADER)

    return handle


def _authorise(call: Call, scope: Scope, other: Scope | None, namespace: str, queue: str) -> None:
    if other is None:
        call.authorise(scope, namespace, queue)
        return
    try:
        call.authorise(other, namespace, queue)
    except (Forbidden, Refusal):
        call.authorise(scope, namespace, queue)


async def _body(call: Call) -> bytes:
    most = call.context.config.max_body_bytes
    length = call.header(b"content-length")
    if length is not None and length.isdigit() and int(length) > most:
        raise TooLarge(f"the body has {int(length)} bytes, more than the limit of {most}; send less at once")
    try:
        return await call.body()
    except Refusal as error:
        if error.fault.error != "invalid_body":
            raise
        raise TooLarge(error.fault.detail) from error


def _why(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "the body is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return "the body has text that is not UTF-8"
    return str(error)


def _encoded(packed: bool, answer: Any) -> bytes:
    return _to_msgpack.encode(answer) if packed else views.json_bytes(_to_json, answer)


async def _respond(call: Call, packed: bool, answer: Any) -> None:
    if packed:
        await call.answer(_to_msgpack.encode(answer), 200, MSGPACK_HEADER)
    else:
        await call.answer(views.json_bytes(_to_json, answer) + b"\n", 200, JSON_HEADER)


def hot() -> Mapping[str, Handler]:
    """Path → handler: all of them are found in a dict, and run straight on ASGI."""
    return {route.path: _handler(route) for route in ROUTES}


def routes() -> Mapping[str, Handler]:
    """Path → handler, for what is rarely asked for."""
    return {}
