"""Receive and answer by way of a server.

What is decided here is what the refusal of an answer means whose first try got no reply. An ack, nack, defer or bury
that is repeated is refused (`LeaseLost`) if the first try was carried out. While its lease lasts nobody else may answer
for the message, so that the refusal proves that it was, and the repetition counts as done; of an ack it is also looked
whether the message is gone, because the server's clock may have been set, or an operator have moved it. Once the lease
may have ended, somebody else's answer may be the reason, and the caller is told `LeaseLost`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import timedelta
from typing import Any
from zlib import crc32

import msgspec
from msgspec import UNSET

from millpond.client import records, streaming
from millpond.client.asking import decoder, encode, read
from millpond.client.asking import key as queue_key
from millpond.client.producing import Producing, receipts, whole
from millpond.client.records import NEVER, Held, Moment
from millpond.client.streaming import Frames
from millpond.client.transport import Attempt
from millpond.errors import LeaseLost, MessageNotFound, MillpondError
from millpond.model.codec import encode_value
from millpond.model.message import Lease
from millpond.service.config import (
    Wishes,
    check_count,
    check_options,
    error_value,
    milliseconds,
    reason_text,
    short_text,
)
from millpond.service.consuming import Delivery, HandOff
from millpond.service.operations import Results
from millpond.service.payloads import check
from millpond.service.producing import Receipt
from millpond.service.ready import Record
from millpond.service.states import STATE_FORMAT, WHATEVER, StateDocument, StateResult
from millpond.wire import faults, native

POLL = 20.0
"""Seconds of one long poll; who waits for longer asks again. Proxies give up on silence after 30 to 60 seconds."""
GIVE_BACK = 2.0
"""Seconds for which the answer to a receive that was cancelled is still read, to give back what it brings."""

REMOVING = frozenset({"ack", "hand-off"})
"""Answers after which the message is gone."""

_deliveries = decoder(native.Deliveries)
_results = decoder(native.Results)
_state = decoder(native.StateAnswer)
_saved = decoder(native.StateSaved)


class Consuming(Producing):
    """The consumers' part."""

    async def receive(
        self,
        namespace: str,
        queue: str,
        count: int,
        *,
        wait: float | timedelta = 0.0,
        visibility: float | None = None,
        owner: str | None = None,
    ) -> list[Delivery]:
        """As `QueueService.receive`; at most 1,000 at once. Cancelled, it gives back what was on its way."""
        patience = milliseconds(wait, "wait") / 1000
        wish = None if visibility is None else milliseconds(visibility, "visibility", positive=True)
        owner = short_text(owner, "owner")
        count = check_count(count, "count")
        end = self.clock.monotonic() + patience
        left = patience
        found: list[Delivery] = []
        while True:
            slice_ends = self.clock.monotonic() + min(left, POLL)
            some = min(count - len(found), native.MAX_BATCH)

            def body(slice_ends: float = slice_ends, some: int = some) -> bytes:
                # Made anew for each try: a later one has less time left.
                rest = max(0.0, slice_ends - self.clock.monotonic())
                return encode(
                    native.ReceiveRequest(
                        namespace=namespace,
                        queue=queue,
                        count=some,
                        wait_ms=round(rest * 1000),
                        visibility_ms=wish,
                        owner=owner,
                    )
                )

            try:
                more = await self._poll(body, min(left, POLL))
            except MillpondError:
                if found:
                    return found  # these are leased, and whoever asks again meets the trouble
                raise
            except BaseException:
                if found:
                    self._spawn(self._defer_quietly(found))
                raise
            found = found + more if found else more
            left = end - self.clock.monotonic()
            if found:
                if len(more) < some or len(found) >= count:
                    return found
                left = 0.0
            elif left <= 0:
                return found

    def stream(
        self, namespace: str, queue: str, *, credit: int, visibility: float | None = None, owner: str | None = None
    ) -> Frames:
        """As `QueueService.stream`: one request, over which messages come."""
        wish = None if visibility is None else milliseconds(visibility, "visibility", positive=True)
        asked = streaming.request(namespace, queue, credit, wish, owner)
        return Frames(self.transport, self.clock, asked, self._defer_quietly)

    async def _poll(self, body: Callable[[], bytes], wait: float) -> list[Delivery]:
        attempt = Attempt()
        asked = Moment.now(self.clock)
        call = asyncio.ensure_future(
            self.transport.call("/v1/queue/receive", body, attempt=attempt, wait=wait, changes=False)
        )
        try:
            data = await asyncio.shield(call)
        except asyncio.CancelledError:
            attempt.give_up()
            self._spawn(self._give_back(call, attempt))
            raise
        return [records.held(delivery, asked) for delivery in read(_deliveries, data).messages]

    async def _give_back(self, call: asyncio.Future[bytes], attempt: Attempt) -> None:
        """Defer what a receive brings that nobody waits for any more."""
        if attempt.link is None or attempt.link.connection is None:
            call.cancel()  # nothing was sent
        timer = self.clock.call_later(GIVE_BACK, lambda: None if attempt.link is None else attempt.link.cut())
        try:
            with contextlib.suppress(MillpondError, asyncio.CancelledError):
                data = await call
                await self._defer_quietly([records.held(one, NEVER) for one in read(_deliveries, data).messages])
        finally:
            timer.cancel()

    async def _defer_quietly(self, found: Sequence[Delivery]) -> None:
        # In vain, they come back when their leases end.
        with contextlib.suppress(MillpondError):
            if found:
                await self.defer_many(found)

    # Answers

    async def _answer(
        self, verb: str, path: str, deliveries: Sequence[Delivery], make: Callable[[Any], native.Request]
    ) -> list[native.Result | MillpondError]:
        """One answer to each delivery, by requests for a queue each; what was refused is in its place."""
        outcome: list[native.Result | MillpondError] = []
        for delivery in deliveries:
            outcome.append(native.Result(delivery.id))
        groups: dict[tuple[str, str], list[int]] = {}
        for index, delivery in enumerate(deliveries):
            groups.setdefault((delivery.namespace, delivery.queue), []).append(index)
        for key, indexes in groups.items():
            for start in range(0, len(indexes), native.MAX_BATCH):
                some = indexes[start : start + native.MAX_BATCH]
                attempt = Attempt()
                handles = [records.handle(deliveries[index]) for index in some]
                request = make({"namespace": key[0], "queue": key[1], "messages": handles})
                try:
                    found = await self._ask(path, request, _results, attempt=attempt, changes=False)
                except BaseException:
                    for index in some:
                        _doubt(deliveries[index], verb)
                    raise
                for index, result in zip(some, found.results, strict=True):
                    outcome[index] = await self._settled(verb, deliveries[index], result, attempt)
        return outcome

    async def _settled(
        self, verb: str, delivery: Delivery, result: native.Result, attempt: Attempt
    ) -> native.Result | MillpondError:
        if result.error is None:
            return result
        error = faults.exception(0, result.error.error, result.error.detail)
        return await self._judge(verb, delivery, error, attempt) or native.Result(delivery.id)

    async def _judge(
        self, verb: str, delivery: Delivery, error: MillpondError, attempt: Attempt
    ) -> MillpondError | None:
        """What the refusal of an answer means: None when it proves that an earlier try was carried out."""
        if not isinstance(error, LeaseLost) or verb == "extend":
            return error
        earlier = getattr(delivery, "unsure", None)
        if not attempt.unsure and earlier is None:
            return error
        # Of two kinds of answers that got no reply, either may be the one that was carried out.
        if (
            isinstance(delivery, Held)
            and earlier in (None, verb)
            and not delivery.held_until.passed(self.clock)
            and (verb not in REMOVING or await self._gone(delivery))
        ):
            return None
        return LeaseLost(
            f"{error} (an earlier try of this {verb} got no reply, and the lease may have ended since: it may have "
            "been this answer that settled the message)"
        )

    async def _gone(self, delivery: Delivery) -> bool:
        """Whether the message is in the store no more; not, when that cannot be found out."""
        try:
            await self.load_state(delivery.namespace, delivery.queue, delivery.id)
        except MessageNotFound:
            return True
        except MillpondError:  # it is no proof then, which is what the caller is told
            pass
        return False

    async def _answer_one(
        self, verb: str, path: str, delivery: Delivery, make: Callable[[Any], native.Request]
    ) -> native.Result:
        [outcome] = await self._answer(verb, path, (delivery,), make)
        if isinstance(outcome, MillpondError):
            raise outcome
        return outcome

    async def ack(self, delivery: Delivery, then: Sequence[HandOff] = ()) -> list[Receipt]:
        """As `QueueService.ack`."""
        if then:
            return await self._hand_off(delivery, then)
        await self._answer_one("ack", "/v1/queue/ackBatch", delivery, _ack)
        delivery.record = None
        return []

    async def ack_many(self, deliveries: Sequence[Delivery]) -> Results:
        """As `QueueService.ack_many`."""
        return _settle(deliveries, await self._answer("ack", "/v1/queue/ackBatch", deliveries, _ack))

    async def _hand_off(self, delivery: Delivery, then: Sequence[HandOff]) -> list[Receipt]:
        drafts: list[tuple[tuple[str, str], Wishes, str, bytes, str | None]] = []
        for one in then:
            key = queue_key(one.namespace, one.queue)
            wishes = check_options(one.options)
            content_type, payload = await self._prepare(one.source)
            data = payload if isinstance(payload, bytes) else await whole(payload)
            drafts.append((key, wishes, self._chosen(wishes), data, content_type))
        targets = [
            native.Target(namespace=key[0], queue=key[1], message=records.new_message(data, wishes, id, content_type))
            for key, wishes, id, data, content_type in drafts
        ]
        request = native.HandOffRequest(
            namespace=delivery.namespace, queue=delivery.queue, message=records.handle(delivery), then=targets
        )
        attempt = Attempt()
        try:
            found = await self._ask("/v1/queue/handOff", request, receipts, attempt=attempt, changes=False)
        except LeaseLost as error:
            refused = await self._judge("hand-off", delivery, error, attempt)
            if refused is not None:
                raise refused from None
            delivery.record = None
            # The first try was carried out, and with it these were enqueued.
            return [Receipt(id, False) for _, _, id, _, _ in drafts]
        except BaseException:
            # A repetition by the caller has other successors: that they are there can never be inferred.
            _doubt(delivery, "earlier hand-off")
            raise
        delivery.record = None
        return [
            self._receipt(receipt.message_id, receipt.duplicate, draft[2], attempt, draft[1])
            for receipt, draft in zip(found.receipts, drafts, strict=True)
        ]

    async def nack(self, delivery: Delivery, *, delay: float = 0.0, error: Any = None) -> None:
        """As `QueueService.nack`."""
        await self._answer_one("nack", "/v1/queue/nackBatch", delivery, _nack(delay, error))
        delivery.record = None

    async def nack_many(self, deliveries: Sequence[Delivery], *, delay: float = 0.0, error: Any = None) -> Results:
        """As `QueueService.nack_many`."""
        make = _nack(delay, error)
        return _settle(deliveries, await self._answer("nack", "/v1/queue/nackBatch", deliveries, make))

    async def defer(self, delivery: Delivery, *, delay: float = 0.0) -> None:
        """As `QueueService.defer`."""
        await self._answer_one("defer", "/v1/queue/nackBatch", delivery, _defer(delay))
        delivery.record = None

    async def defer_many(self, deliveries: Sequence[Delivery], *, delay: float = 0.0) -> Results:
        """As `QueueService.defer_many`."""
        make = _defer(delay)
        return _settle(deliveries, await self._answer("defer", "/v1/queue/nackBatch", deliveries, make))

    async def extend(self, delivery: Delivery, seconds: float) -> Lease:
        """As `QueueService.extend`."""
        [outcome] = await self._extend((delivery,), seconds)
        if isinstance(outcome, MillpondError):
            raise outcome
        if outcome.lease_expires_at_ms is None:
            raise LeaseLost("the message was settled while its lease was being extended")
        record = delivery.record
        if record is not None and record.status.lease is not None:
            return record.status.lease
        return Lease(delivery.lease_id, delivery.token, outcome.lease_expires_at_ms)

    async def extend_many(self, deliveries: Sequence[Delivery], seconds: float) -> Results:
        """As `QueueService.extend_many`."""
        return [one if isinstance(one, MillpondError) else None for one in await self._extend(deliveries, seconds)]

    async def _extend(self, deliveries: Sequence[Delivery], seconds: float) -> list[native.Result | MillpondError]:
        extension = milliseconds(seconds, "an extension", positive=True)
        asked = Moment.now(self.clock)

        def make(common: Any) -> native.Request:
            return native.ExtendBatchRequest(extend_by_ms=extension, **common)

        try:
            outcomes = await self._answer("extend", "/v1/queue/extendBatch", deliveries, make)
        except BaseException:
            for delivery in deliveries:
                if isinstance(delivery, Held):  # it may have been carried out, and the lease be shorter now
                    delivery.held_until = delivery.held_until.at_most(asked.after(extension))
            raise
        for delivery, outcome in zip(deliveries, outcomes, strict=True):
            if isinstance(outcome, MillpondError) or outcome.lease_expires_at_ms is None:
                delivery.record = None
                if isinstance(delivery, Held):
                    # A first try without a reply may have made the lease shorter, and somebody else have it by now.
                    lost = isinstance(outcome, LeaseLost)
                    delivery.held_until = NEVER if lost else delivery.held_until.at_most(asked.after(extension))
                continue
            if isinstance(delivery, Held):
                delivery.held_until = asked.after(extension)
            record = delivery.record or delivery.given
            if record is not None and record.status.lease is not None:
                until = outcome.lease_expires_at_ms
                lease = msgspec.structs.replace(record.status.lease, until=until)
                status = msgspec.structs.replace(record.status, lease=lease, visible_at=until)
                delivery.record = msgspec.structs.replace(record, status=status)
        return outcomes

    async def bury(self, delivery: Delivery, reason: str, *, error: Any = None) -> None:
        """As `QueueService.bury`."""
        request = native.BuryRequest(
            namespace=delivery.namespace,
            queue=delivery.queue,
            message=records.handle(delivery),
            reason=reason_text(reason),
            error=error_value(error),
        )
        attempt = Attempt()
        try:
            await self.transport.call("/v1/queue/bury", encode(request), attempt=attempt, changes=False)
        except LeaseLost as lost:
            refused = await self._judge("bury", delivery, lost, attempt)
            if refused is not None:
                raise refused from None
        except BaseException:
            _doubt(delivery, "bury")
            raise
        delivery.record = None

    # Workflow state

    async def load_state(self, namespace: str | None, queue: str, id: str) -> StateResult | None:
        """As `QueueService.load_state`."""
        key = queue_key(namespace, queue)
        request = native.StateLoadRequest(namespace=key[0], queue=key[1], message_id=id)
        found = await self._ask("/v1/state/load", request, _state, changes=False)
        if not found.exists:
            return None
        created, updated = found.created_at_ms or 0, found.updated_at_ms or 0
        return StateResult(StateDocument(STATE_FORMAT, found.value, created, updated), found.etag or "")

    async def save_state(self, delivery: Delivery, value: Any, *, etag: str | None = WHATEVER) -> str:
        """As `QueueService.save_state`. A try without a reply that was carried out is known by its number, unless
        somebody else with this lease has written since."""
        request = native.StateSaveRequest(
            namespace=delivery.namespace,
            queue=delivery.queue,
            message=records.handle(delivery),
            value=encode_value(value, "the state")[1],
            etag=UNSET if etag == WHATEVER else etag,
            **self._write(),
        )
        return (await self._ask("/v1/state/save", request, _saved)).etag

    async def delete_state(self, delivery: Delivery, *, etag: str = WHATEVER) -> None:
        """As `QueueService.delete_state`."""
        request = native.StateDeleteRequest(
            namespace=delivery.namespace,
            queue=delivery.queue,
            message=records.handle(delivery),
            etag=UNSET if etag == WHATEVER else etag,
            **self._write(),
        )
        await self.transport.call("/v1/state/delete", encode(request))

    def _write(self) -> dict[str, Any]:
        """What tells a write of a state from others. A try whose reply did not come may still be on its way (the server
        stands still), and must not be carried out after what is written next."""
        if not self._writer:
            self._writer = self.ids.random(12).hex()
        self._writes += 1
        return {"writer": self._writer, "number": self._writes}

    # Payloads

    def payload_chunks(self, record: Record) -> AsyncIterator[bytes]:
        """As `QueueService.payload_chunks`."""
        return self._payload_chunks(record)

    async def _payload_chunks(self, record: Record) -> AsyncIterator[bytes]:
        item, head = record.item, record.head
        if record.payload is not None and not item.external:
            check(head, crc32(record.payload))
            yield record.payload
            return
        request = native.MessageRequest(namespace=item.namespace, queue=item.queue, message_id=item.id)
        checksum = size = 0
        chunks = self.transport.download("/v1/queue/payload", encode(request))
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                checksum, size = crc32(chunk, checksum), size + len(chunk)
                if size > head.payload_size:
                    break
                yield chunk
        if size != head.payload_size:
            raise MessageNotFound(f"the payload of message {item.id} is not there any more as it was when it was seen")
        check(head, checksum)


def _ack(common: Any) -> native.Request:
    return native.AckBatchRequest(**common)


def _nack(delay: float, error: Any) -> Callable[[Any], native.Request]:
    wait, kept = milliseconds(delay, "delay"), error_value(error)
    return lambda common: native.NackBatchRequest(delay_ms=wait, error=kept, **common)


def _defer(delay: float) -> Callable[[Any], native.Request]:
    wait = milliseconds(delay, "delay")
    return lambda common: native.NackBatchRequest(delay_ms=wait, intent="defer", **common)


def _settle(deliveries: Sequence[Delivery], outcomes: list[native.Result | MillpondError]) -> Results:
    results: Results = []
    for delivery, outcome in zip(deliveries, outcomes, strict=True):
        delivery.record = None
        results.append(outcome if isinstance(outcome, MillpondError) else None)
    return results


def _doubt(delivery: Delivery, verb: str) -> None:
    """It is not known whether this answer was carried out; should the caller repeat it, that is remembered."""
    if isinstance(delivery, Held) and verb != "extend":
        delivery.unsure = verb if delivery.unsure in (None, verb) else "several"
