"""Millpond's own operations over the wire: a decoded request in, an answer out. Nothing of HTTP is known here.

No decision about a message is made here: each operation is one call of the queue's, its service's or its pond's, and
errors are theirs. What is added is this process's memory of what it handed out (`Held`, `Streams`), which saves reads
and gives streams their credit back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from msgspec import UNSET

from millpond.errors import Forbidden, InvalidInput, LeaseLost, MillpondError
from millpond.message import MessageView
from millpond.model import names
from millpond.queue import Queue
from millpond.server import receiving, views
from millpond.server.context import Call, Context
from millpond.server.receiving import Wish
from millpond.service.config import DEFAULT_OPTIONS
from millpond.service.consuming import Delivery, HandOff
from millpond.service.states import WHATEVER, Write
from millpond.stores.base import Box
from millpond.wire import native
from millpond.wire.faults import Refusal

MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""Payloads that one receive may hand out together, if all are as large as is kept inline."""
SLICE = 1000
"""Names of queues that are looked at in one go; others get their turn in between."""
CURSOR_DIGITS = 39
"""Of a store's key, which has 128 bits at most."""
FOREIGN_CURSOR = "cursor is none that a list of this queue was answered with"


def _queue(call: Call, request: native.Request) -> Queue:
    return call.context.pond.queue(request.queue, namespace=request.namespace)


def _held(context: Context, request: native.Request, handles: Sequence[native.Handle]) -> list[Delivery]:
    namespace, queue = names.queue_key(request.namespace, request.queue)
    meant = context.held.meant
    return [meant(namespace, queue, one.message_id, one.lease_id, one.fencing_token) for one in handles]


def _answered(context: Context, deliveries: Sequence[Delivery], errors: Sequence[MillpondError | None]) -> None:
    """Those that went through are nobody's any more."""
    held = context.held
    for delivery, error in zip(deliveries, errors, strict=True):
        if error is None:
            held.drop(delivery)


def results(
    context: Context,
    handles: Sequence[native.Handle],
    deliveries: Sequence[Delivery],
    errors: Sequence[MillpondError | None],
) -> native.Results:
    """What became of each; those that went through are forgotten."""
    _answered(context, deliveries, errors)
    return native.Results(views.results([one.message_id for one in handles], errors))


async def _for_good(context: Context, delivery: Delivery) -> None:
    """Return when what refuses an ack is on the disk. A client concludes from the refusal that an earlier try of its
    own, which another process may have taken and not synced yet, has removed the message; that must outlive the power,
    as the answer to that try would have. (In a bucket there is nothing to wait for.)"""
    if context.pond.store.capabilities.takes:
        await context.pond.service.decided(delivery.namespace, delivery.queue)


# Producers


async def enqueue_batch(call: Call, request: native.EnqueueBatchRequest) -> native.Receipts:
    """Enqueue up to 1,000 messages in one commit."""
    context = call.context
    await context.gate.admit("producer")
    await context.quota.admit(*names.queue_key(request.namespace, request.queue))
    service = context.pond.service
    messages = [(new.payload, views.options(new), new.message_id) for new in request.messages]
    numbered = views.numbered(request)
    if numbered is None and all(options is DEFAULT_OPTIONS and id is None for _, options, id in messages):
        # Nothing but payloads: the way with the least work for each.
        receipts = await service.enqueue_many(request.namespace, request.queue, [one[0] for one in messages])
    else:
        receipts = await service.enqueue_each(request.namespace, request.queue, messages, numbered=numbered)
    return native.Receipts([native.Receipt(*receipt) for receipt in receipts])


# Consumers


async def receive(call: Call, request: native.ReceiveRequest) -> list[Delivery]:
    """Receive up to `count` messages, as soon as there is one; none when nothing came within `wait_ms`."""
    context = call.context
    context.refuse_while_draining()
    await context.gate.admit("consumer")
    service = context.pond.service
    most = max(1, MAX_ANSWER_BYTES // max(1, service.inline_limit))
    visibility = None if request.visibility_ms is None else request.visibility_ms / 1000
    wish = Wish(
        *service.key(request.namespace, request.queue), min(request.count, most), visibility, request.owner, True
    )
    return await receiving.receive(call, wish, request.wait_ms / 1000)


async def ack_batch(call: Call, request: native.AckBatchRequest) -> native.Results:
    """Ack each message; one that is refused does not hinder the others, and is told in its result."""
    await call.context.gate.admit("answer")
    deliveries = _held(call.context, request, request.messages)
    errors = await call.context.pond.service.ack_many(deliveries)
    if any(isinstance(error, LeaseLost) for error in errors):
        await _for_good(call.context, deliveries[0])
    return results(call.context, request.messages, deliveries, errors)


async def nack_batch(call: Call, request: native.NackBatchRequest) -> native.Results:
    """Give each message back: as a failure, or (intent "defer") without one."""
    await call.context.gate.admit("answer")
    service = call.context.pond.service
    deliveries = _held(call.context, request, request.messages)
    delay = request.delay_ms / 1000
    if request.intent == "failure":
        errors = await service.nack_many(deliveries, delay=delay, error=request.error)
    elif request.error is not None:
        raise InvalidInput('an error is kept of a failure only; leave it out with intent "defer"')
    else:
        errors = await service.defer_many(deliveries, delay=delay)
    return results(call.context, request.messages, deliveries, errors)


async def extend_batch(call: Call, request: native.ExtendBatchRequest) -> native.Results:
    """Let each lease end so much from now."""
    await call.context.gate.admit("answer")
    context = call.context
    deliveries = _held(context, request, request.messages)
    errors = await context.pond.service.extend_many(deliveries, request.extend_by_ms / 1000)
    found = []
    for handle, delivery, error in zip(request.messages, deliveries, errors, strict=True):
        if error is not None:
            found.append(native.Result(handle.message_id, views.refusal(error)))
            continue
        record = delivery.record
        until = None if record is None or record.status.lease is None else record.status.lease.until
        if until is not None:
            context.held.keep(delivery)
            context.streams.extended(delivery.lease_id, until)
        found.append(native.Result(handle.message_id, None, until))
    return native.Results(found)


async def bury(call: Call, request: native.BuryRequest) -> native.Done:
    """Give a message up: a dead letter with this reason."""
    await call.context.gate.admit("answer")
    [delivery] = _held(call.context, request, [request.message])
    await call.context.pond.service.bury(delivery, request.reason, error=request.error)
    call.context.held.drop(delivery)
    return native.Done()


async def hand_off(call: Call, request: native.HandOffRequest) -> native.Receipts:
    """Ack a message and enqueue others, in one commit: all of it happens, or nothing."""
    await call.context.gate.admit("answer")
    [delivery] = _held(call.context, request, [request.message])
    then = []
    for target in request.then:
        await call.context.quota.admit(*names.queue_key(target.namespace or delivery.namespace, target.queue))
        options = views.options(target.message)
        if target.message.message_id is not None:
            options = views.with_id(options, target.message.message_id)
        then.append(HandOff(target.namespace or delivery.namespace, target.queue, target.message.payload, options))
    try:
        receipts = await call.context.pond.service.ack(delivery, then)
    except LeaseLost:
        await _for_good(call.context, delivery)
        raise
    call.context.held.drop(delivery)
    return native.Receipts([native.Receipt(*receipt) for receipt in receipts])


async def credit(call: Call, request: native.CreditRequest) -> native.Credit:
    """Give a stream more credit."""
    stream = call.context.streams.find(request.stream_id)
    if stream is None:
        raise Refusal(404, "stream_not_found", "no such stream is open on this server; open one, and use its stream_id")
    call.authorise("consume", stream.namespace, stream.queue)
    return native.Credit(stream.more(request.credit))


# Workflow state


async def state_load(call: Call, request: native.StateLoadRequest) -> native.StateAnswer:
    """A message's workflow state."""
    found = await call.context.pond.service.load_state(
        request.namespace, request.queue, names.message_id(request.message_id)
    )
    if found is None:
        return native.StateAnswer(False)
    document = found.document
    return native.StateAnswer(True, document.value, found.etag, document.created_at, document.updated_at)


async def state_save(call: Call, request: native.StateSaveRequest) -> native.StateSaved:
    """Replace a message's workflow state, under its lease."""
    [delivery] = _held(call.context, request, [request.message])
    etag = WHATEVER if request.etag is UNSET else request.etag
    service = call.context.pond.service
    return native.StateSaved(await service.save_state(delivery, request.value, etag=etag, write=_write(request)))


async def state_delete(call: Call, request: native.StateDeleteRequest) -> native.Done:
    """Forget a message's workflow state, under its lease."""
    [delivery] = _held(call.context, request, [request.message])
    etag = WHATEVER if request.etag is UNSET else request.etag
    await call.context.pond.service.delete_state(delivery, etag=etag, write=_write(request))
    return native.Done()


def _write(request: native.StateSaveRequest | native.StateDeleteRequest) -> Write | None:
    return Write(request.writer, request.number) if request.writer else None


# Looking


async def queues(call: Call, request: native.NamespaceRequest) -> native.Queues:
    """Every queue that the caller may look at, of one namespace or of all."""
    found = await call.context.pond.queues()
    if request.namespace is not None:
        namespace = names.namespace_name(request.namespace)
        found = [name for name in found if name.namespace == namespace]
    shown = []
    for at, name in enumerate(found):
        if at % SLICE == SLICE - 1:
            await asyncio.sleep(0)  # a hundred thousand would keep everybody waiting
        if _may_read(call, *name):
            shown.append(native.QueueName(*name))
    return native.Queues(shown)


def _may_read(call: Call, namespace: str, queue: str) -> bool:
    try:
        call.authorise("read", namespace, queue)
    except (Refusal, Forbidden):
        return False
    return True


async def counts(call: Call, request: native.QueueRequest) -> native.Counts:
    """How a queue stands."""
    service = call.context.pond.service
    found = await service.counts(request.namespace, request.queue)
    oldest = found.oldest_due
    return native.Counts(
        ready=found.ready,
        delayed=found.delayed,
        leased=found.leased,
        blocked=found.blocked,
        dead=found.dead,
        bytes=found.bytes,
        oldest_due_at_ms=oldest,
        oldest_age_ms=None if oldest is None else max(0, service.clock.now_ms() - oldest),
        enqueued=found.enqueued,
    )


def _views(found: Sequence[MessageView]) -> list[native.MessageView]:
    return [views.message(view) for view in found]


async def peek(call: Call, request: native.PeekRequest) -> native.Views:
    """The messages that would be handed out next, left where they are."""
    return native.Views(_views(await _queue(call, request).peek(request.count)))


async def get(call: Call, request: native.MessageRequest) -> native.View:
    """One message, live or dead."""
    return native.View(_views([await _queue(call, request).get(request.message_id)])[0])


async def next_due(call: Call, request: native.QueueRequest) -> native.NextDue:
    """When the earliest message that is not ready now comes due."""
    seconds = await _queue(call, request).next_due()
    return native.NextDue(None if seconds is None else round(seconds * 1000))


async def requests(call: Call, request: native.Nothing) -> native.Costs:
    """What this server has asked of a store that charges for requests."""
    return views.costs(call.context.pond.requests())


# Administering


async def policy(call: Call, request: native.PolicyRequest) -> native.PolicyAnswer:
    """Read a queue's policy; change fields of it, or put the default in its place."""
    queue = _queue(call, request)
    if request.set is not None and request.reset:
        raise InvalidInput("give set or reset, not both")
    if request.reset:
        found = await queue.reset_policy()
        call.audit("policy.reset", queue.namespace, queue.name)
    elif request.set is not None:
        await call.context.quota.admit(queue.namespace, queue.name)
        fields: dict[str, Any] = views.policy_fields(request.set)
        found = await queue.set_policy(**fields)
        call.audit("policy.set", queue.namespace, queue.name, set=fields)
    else:
        found = await queue.policy()
    return native.PolicyAnswer(views.policy(found))


async def pause(call: Call, request: native.QueueRequest) -> native.Done:
    """Hand nothing out until `resume`."""
    queue = _queue(call, request)
    await call.context.quota.admit(queue.namespace, queue.name)
    await queue.pause()
    call.audit("queue.pause", queue.namespace, queue.name)
    return native.Done()


async def resume(call: Call, request: native.QueueRequest) -> native.Done:
    """Hand out again."""
    queue = _queue(call, request)
    await queue.resume()
    call.audit("queue.resume", queue.namespace, queue.name)
    return native.Done()


async def purge(call: Call, request: native.QueueRequest) -> native.Purged:
    """Remove every live message that no consumer holds."""
    queue = _queue(call, request)
    count = await queue.purge()
    call.audit("queue.purge", queue.namespace, queue.name, messages=count)
    return native.Purged(count)


async def notify(call: Call, request: native.QueueRequest) -> native.Done:
    """Have those who wait look at the queue now."""
    await _queue(call, request).notify()
    # Let the dispatcher begin before the caller is told.
    await asyncio.sleep(0)
    return native.Done()


# Dead letters


async def dead_letters(call: Call, request: native.ListRequest) -> native.Page:
    """Dead letters in order of insertion."""
    return await _page(call, request, Box.DEAD)


async def browse(call: Call, request: native.ListRequest) -> native.Page:
    """Live messages in order of insertion, held, delayed or ready."""
    return await _page(call, request, Box.LIVE)


async def _page(call: Call, request: native.ListRequest, box: Box) -> native.Page:
    service = call.context.pond.service
    key = service.key(request.namespace, request.queue)
    after = None
    if request.after is not None and request.cursor is not None:
        raise InvalidInput("give after or cursor, not both")
    if request.after is not None:
        look = service.dead_letter if box is Box.DEAD else service.get_message
        after = (await look(*key, request.after)).item.key
    elif request.cursor is not None:
        after = _cursor(request.cursor)
    try:
        page = await service.list_messages(*key, after=after, limit=request.limit, box=box)
    except OverflowError as error:
        raise InvalidInput(FOREIGN_CURSOR) from error
    found = [MessageView(service, record) for record in page.records]
    return native.Page(_views(found), None if page.next_after is None else str(page.next_after))


def _cursor(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > CURSOR_DIGITS:
        raise InvalidInput(FOREIGN_CURSOR)
    return int(text)


async def dead_letter(call: Call, request: native.MessageRequest) -> native.View:
    """One dead letter."""
    return native.View(_views([await _queue(call, request).dead_letters.get(request.message_id)])[0])


async def redrive(call: Call, request: native.DeadLetterIdsRequest) -> native.Counted:
    """Put dead letters back into their queue with a new budget: those with these ids, or all."""
    queue = _queue(call, request)
    count = await queue.dead_letters.redrive(request.ids)
    call.audit("dlq.redrive", queue.namespace, queue.name, messages=count, ids=request.ids)
    return native.Counted(count)


async def purge_dead_letters(call: Call, request: native.DeadLetterIdsRequest) -> native.Counted:
    """Remove dead letters for good: those with these ids, or all."""
    queue = _queue(call, request)
    count = await queue.dead_letters.purge(request.ids)
    call.audit("dlq.purge", queue.namespace, queue.name, messages=count, ids=request.ids)
    return native.Counted(count)
