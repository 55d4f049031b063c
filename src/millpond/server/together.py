"""Small requests that come at once, done together: one operation of the service for all of them, an answer for each.

Dozens of clients that each enqueue, receive or ack a message of the same queue make dozens of requests in a moment.
They share a transaction in any case; here they share the way to it as well, which costs the service as much for one
message as for many. A request joins only if it is of the plainest kind and nothing stands in its way: every check is
made for each of them, and whatever is to be refused, to wait, or is in any way unusual goes the usual way by itself,
where all of that is decided. So what a request is answered with does not depend on whether it joined others.

What fails for all of them is told to each: one that could fail by itself does not join.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from millpond.errors import MillpondError, OutcomeUnknown
from millpond.model import names
from millpond.server import logs, views
from millpond.server import native_operations as operations
from millpond.server.auth import Scope
from millpond.server.context import JSON_HEADER, MSGPACK_HEADER, Context, Disconnected
from millpond.server.limits import Kind
from millpond.server.receiving import give_back
from millpond.service.config import DEFAULT_OPTIONS
from millpond.service.consuming import Delivery
from millpond.service.producing import PASSED, Numbered
from millpond.wire import native

if TYPE_CHECKING:
    from millpond.server.app import App
    from millpond.server.exchange import Exchange
    from millpond.server.heads import Head

MOST = 128
"""Requests of a group: by then another one gains nothing, and their payloads take memory together."""
MOST_ACKS = 16
"""Messages of an ack that joins others; more are a batch of their own."""

_to_json = msgspec.json.Encoder(enc_hook=views.as_json)
_to_msgpack = msgspec.msgpack.Encoder()

Place = tuple[str, str]
"""Namespace and queue, normalised."""


class Member(msgspec.Struct, frozen=True, gc=False):
    """A request that joined."""

    call: Exchange
    head: Head
    item: Any
    """What of it the operation needs."""
    began: float


class Group:
    """Requests that are done together, as far as the log is concerned: what it says of all of them carries all their
    ids, which each is given before its time if somebody wants to know."""

    __slots__ = ("_members",)

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members

    def forget(self) -> None:
        """All are answered. What was begun meanwhile and goes on is none of theirs, and must not keep their bodies."""
        self._members = ()

    @property
    def correlation_id(self) -> str:
        """Those of the requests, with spaces between them."""
        return " ".join(member.call.correlation_id for member in self._members)


class Joining(NamedTuple):
    """A kind of request that may join others."""

    request: type[native.Request]
    scope: Scope
    gate: Kind
    prepare: Callable[[Context, Any, Place], tuple[Hashable, Any] | None]
    """What requests of one group have in common, and what this one has of its own; None where it does not join. Raises
    MillpondError for one that is to be refused."""
    run: Callable[[Together, Place, Any, Sequence[Member]], Awaitable[Sequence[Any]]]
    """The answer for each, or an error; None where it is to go the usual way. Raises what concerns all of them."""


# Producers


def _prepare_enqueue(
    context: Context, request: native.EnqueueBatchRequest, place: Place
) -> tuple[Hashable, tuple[bytes, str | None, Numbered | None]] | None:
    if len(request.messages) != 1 or not context.quota.knows(*place):
        return None
    [new] = request.messages
    if len(new.payload) > context.pond.service.inline_limit or views.options(new) is not DEFAULT_OPTIONS:
        return None
    id = new.message_id
    numbered = views.numbered(request)
    if numbered is not None and id is None:
        return None
    return numbered is not None, (new.payload, None if id is None else names.message_id(id), numbered)


async def _enqueue(together: Together, place: Place, numbered: Any, members: Sequence[Member]) -> Sequence[Any]:
    service = together.context.pond.service
    items = [member.item for member in members]
    if numbered:
        messages = [(payload, DEFAULT_OPTIONS, id) for payload, id, _ in items]
        try:
            receipts = await service.enqueue_each(*place, messages, numbered=[number for _, _, number in items])
        except OutcomeUnknown as error:
            if str(error) != PASSED:
                raise
            # One of them came too late. The others are in, and known by their numbers: each is told by itself.
            return [None] * len(members)
    elif all(id is None for _, id, _ in items):
        receipts = await service.enqueue_many(*place, [payload for payload, _, _ in items])
    else:
        receipts = await service.enqueue_each(*place, [(payload, DEFAULT_OPTIONS, id) for payload, id, _ in items])
    return [native.Receipts([native.Receipt(id, duplicate)]) for id, duplicate in receipts]


# Consumers


def _prepare_receive(context: Context, request: native.ReceiveRequest, place: Place) -> tuple[Hashable, None] | None:
    if request.count != 1 or context.draining or context.pond.dispatcher.looks_after(*place):
        return None
    return (request.visibility_ms, request.owner), None


async def _receive(together: Together, place: Place, wish: Any, members: Sequence[Member]) -> Sequence[Any]:
    context = together.context
    visibility_ms, owner = wish
    visibility = None if visibility_ms is None else visibility_ms / 1000
    deliveries = await context.pond.service.claim(*place, len(members), visibility=visibility, owner=owner)
    # Who gets none waits for one.
    return [*deliveries, *[None] * (len(members) - len(deliveries))]


def _prepare_ack(
    context: Context, request: native.AckBatchRequest, place: Place
) -> tuple[Hashable, tuple[Sequence[native.Handle], list[Delivery]]] | None:
    handles = request.messages
    if len(handles) > MOST_ACKS:
        return None
    meant = context.held.meant
    return None, (handles, [meant(*place, one.message_id, one.lease_id, one.fencing_token) for one in handles])


async def _ack(together: Together, place: Place, _: Any, members: Sequence[Member]) -> Sequence[Any]:
    context = together.context
    errors = await context.pond.service.ack_many([one for member in members for one in member.item[1]])
    answers = []
    at = 0
    for member in members:
        handles, deliveries = member.item
        end = at + len(deliveries)
        answers.append(operations.results(context, handles, deliveries, errors[at:end]))
        at = end
    return answers


JOINING = {
    "/v1/queue/enqueueBatch": Joining(native.EnqueueBatchRequest, "write", "producer", _prepare_enqueue, _enqueue),
    "/v1/queue/receive": Joining(native.ReceiveRequest, "consume", "consumer", _prepare_receive, _receive),
    "/v1/queue/ackBatch": Joining(native.AckBatchRequest, "consume", "answer", _prepare_ack, _ack),
}
"""By path."""


class Together:
    """The groups of a server."""

    def __init__(self, app: App) -> None:
        self.context = app.context
        self._app = app
        self._open: dict[Hashable, list[Member]] = {}
        """Groups that still gather."""
        self._joined = 0
        """Requests that joined any group so far."""
        self._lets_in: Callable[[Kind], bool] | None = getattr(self.context.gate, "lets_in", None)
        # A trace is of one request's operation.
        self._off = self.context.tracing is not None or self._lets_in is None
        self._kinds = {
            path: (
                joining,
                msgspec.msgpack.Decoder(joining.request).decode,
                msgspec.json.Decoder(joining.request).decode,
            )
            for path, joining in JOINING.items()
        }

    def take(self, call: Exchange, head: Head, body: bytes) -> bool:
        """Whether the request joined others; it then is answered. Otherwise nothing was done about it."""
        found = self._kinds.get(head.path)
        if found is None or head.packed is None or self._off:
            return False
        joining, from_msgpack, from_json = found
        context = self.context
        began = context.pond.clock.monotonic()
        try:
            request: Any = from_msgpack(body) if head.packed else from_json(body)
            place = names.queue_key(request.namespace or context.config.namespace, request.queue)
            prepared = joining.prepare(context, request, place)
        except (MillpondError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return False  # the usual way finds the same, and tells it
        assert self._lets_in is not None
        if prepared is None or not self._lets_in(joining.gate):
            return False
        try:
            call.identity = context.authority.identify(call.scope)
            call.authorise(joining.scope, *place)
        except Exception as error:
            call.begin(self._refuse(call, error, began))
            return True
        common, item = prepared
        key = (head.path, place, common)
        members = self._open.get(key)
        if members is None:
            members = self._open[key] = []
            call.begin(self._work(key, joining, members))
        members.append(Member(call, head, item, began))
        self._joined += 1
        if len(members) >= MOST:
            del self._open[key]
        return True

    async def _refuse(self, call: Exchange, error: Exception, began: float) -> None:
        logs.current.set(call)
        try:
            await self._app.tell(call, error)
        finally:
            self._app.note(call, began)
            call.over()

    async def _work(self, key: tuple[str, Place, Any], joining: Joining, members: list[Member]) -> None:
        answered = 0
        group = Group(members)
        logs.current.set(group)
        try:
            # Who comes by network comes turn by turn; the last of those that came at once is the one to wait for.
            # Where there is no end to them, of whatever kind, it is not waited for.
            before, last = -1, self._joined + MOST
            while before < self._joined < last and len(members) < MOST:
                before = self._joined
                await asyncio.sleep(0)
            self._close(key, members)
            answers: Sequence[Any]
            try:
                answers = await joining.run(self, key[1], key[2], members)
            except Exception as error:
                answers = [error] * len(members)
            # Made together they cost a third; no head that is known names one.
            for member, id in zip(members, self.context.pond.ids.message_ids(len(members)), strict=True):
                if not member.call.has_correlation:
                    member.call.correlation_id = id
            now = self.context.pond.clock.monotonic()
            for member, answer in zip(members, answers, strict=True):
                self._answer(member, answer, now)
                answered += 1
        finally:
            group.forget()
            self._close(key, members)
            for member in members[answered:]:
                member.call.over()

    def _close(self, key: Hashable, members: list[Member]) -> None:
        """Nobody joins this group any more."""
        if self._open.get(key) is members:
            del self._open[key]

    def _answer(self, member: Member, answer: Any, now: float) -> None:
        call, head = member.call, member.head
        if answer is None:
            call.begin_usual(head.handler)
            return
        if isinstance(answer, Exception):
            call.begin(self._refuse(call, answer, member.began))
            return
        delivery: Delivery | None = None
        if answer.__class__ is Delivery:
            delivery = answer
        try:
            if delivery is not None:
                answer = native.Deliveries([views.delivery(delivery)])
            if head.packed:
                data, kind = _to_msgpack.encode(answer), MSGPACK_HEADER
            else:
                data, kind = views.json_bytes(_to_json, answer), JSON_HEADER
                if delivery is None:
                    data += b"\n"
        except Exception as error:
            if delivery is not None:
                give_back(self.context, (delivery,))
            call.begin(self._refuse(call, error, member.began))
            return
        if delivery is not None:
            if call.vanished:
                # It went while the message was claimed: what is written now is lost.
                give_back(self.context, (delivery,))
                call.begin(self._refuse(call, Disconnected(), member.began))
                return
            self.context.held.keep(delivery)
        if call.answer_now(data, kind):
            self._app.note(call, member.began, now)
        else:
            call.begin(self._answer_later(call, data, kind, member.began))

    async def _answer_later(self, call: Exchange, data: bytes, kind: Any, began: float) -> None:
        logs.current.set(call)
        try:
            await call.answer(data, 200, kind)
        finally:
            self._app.note(call, began)
            call.over()
