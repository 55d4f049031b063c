"""From what comes over the wire to the records that queues and messages show, and back to what goes out."""

from __future__ import annotations

from typing import Any, NamedTuple

from msgspec import UNSET

from millpond.errors import InvalidInput
from millpond.model.clock import Clock
from millpond.service.config import QueuePolicy, Wishes, milliseconds
from millpond.service.consuming import Delivery
from millpond.service.ready import Record
from millpond.stores.base import Box, Item, Mark, Requests
from millpond.wire import faults, native


class Seen(Record, frozen=True):
    """A record, and how its message stood by the server's clock when it was read."""

    state: str = ""


class Moment(NamedTuple):
    """A time by both of a client's clocks. The monotonic one stands still while a machine sleeps, the other may be set:
    what has to be over by either is over."""

    monotonic: float
    wall: int
    """ms UTC"""

    @classmethod
    def now(cls, clock: Clock) -> Moment:
        """Now."""
        return cls(clock.monotonic(), clock.now_ms())

    def after(self, ms: int) -> Moment:
        """So many milliseconds later."""
        return Moment(self.monotonic + ms / 1000, self.wall + ms)

    def at_most(self, other: Moment) -> Moment:
        """The earlier of both, by each clock."""
        return Moment(min(self.monotonic, other.monotonic), min(self.wall, other.wall))

    def passed(self, clock: Clock) -> bool:
        """It may be over."""
        return clock.monotonic() >= self.monotonic or clock.now_ms() >= self.wall


NEVER = Moment(float("-inf"), -1)
"""Before everything."""


class Held(Delivery):
    """A delivery, and what this client knows of its lease besides."""

    held_until: Moment = NEVER
    """The lease lasts at least as long: counted from before it was asked for."""
    unsure: str | None = None
    """The answer that was sent without a reply, and may have been carried out."""
    line: int = 0
    """Number of the connection that its stream had then."""


def _item(message: native.MessageFields) -> Item:
    return Item(
        message.namespace,
        message.queue,
        message.message_id,
        message.priority,
        message.ordering_key,
        message.payload_size,
        message.stored_apart,
        int(message.cursor),
    )


def seen(view: native.MessageView) -> Seen:
    """The record behind a view."""
    dead = view.dead_at_ms is not None
    mark = Mark(
        view.etag, view.visible_at_ms, view.lease is not None, view.expires_at_ms, Box.DEAD if dead else Box.LIVE
    )
    return Seen(_item(view), mark, native.head_of(view), native.status_of(view), None, view.state)


def held(delivery: native.Delivery, asked: Moment) -> Held:
    """The delivery, of a receive that was sent at ``asked``."""
    mark = Mark(delivery.etag, delivery.lease_expires_at_ms, True, delivery.expires_at_ms, Box.LIVE)
    record = Record(_item(delivery), mark, native.head_of(delivery), native.status_of(delivery), delivery.payload)
    trouble = delivery.trouble
    return Held(
        delivery.namespace,
        delivery.queue,
        delivery.message_id,
        delivery.lease_id,
        delivery.fencing_token,
        record,
        delivery.payload,
        record,
        False,
        None if trouble is None else faults.exception(0, trouble.error, trouble.detail),
        held_until=NEVER if asked is NEVER else asked.after(delivery.lease_expires_at_ms - delivery.updated_at_ms),
    )


def new_message(data: bytes, wishes: Wishes | None, id: str, content_type: str | None = None) -> native.NewMessage:
    """A message to enqueue; without wishes it is a plain one."""
    if wishes is None:
        return native.NewMessage(payload=data, message_id=id, content_type=content_type)
    return native.NewMessage(
        payload=data,
        delay_ms=wishes.delay,
        ttl_ms=wishes.ttl,
        priority=wishes.priority,
        max_attempts=wishes.max_attempts,
        visibility_ms=wishes.visibility,
        attributes=wishes.attributes,
        dedup_key=wishes.dedup_key,
        dedup_window_ms=wishes.dedup_window,
        ordering_key=wishes.ordering_key,
        content_type=wishes.content_type or content_type,
        correlation_id=wishes.correlation_id,
        message_id=id,
    )


_DURATIONS = {"default_visibility": "default_visibility_ms", "ttl": "ttl_ms", "dedup_window": "dedup_window_ms"}


def policy_change(fields: dict[str, Any]) -> native.PolicyChange:
    """Fields of a policy, checked before, as they are sent."""
    change: dict[str, Any] = dict.fromkeys(native.PolicyChange.__struct_fields__, UNSET)
    for name, value in fields.items():
        if name in _DURATIONS:
            change[_DURATIONS[name]] = None if value is None else milliseconds(value, name, positive=True)
        else:
            change[name] = value
    return native.PolicyChange(**change)


def policy(answer: native.Policy) -> QueuePolicy:
    """The policy of an answer."""
    seconds = {
        name: None if (value := getattr(answer, wire)) is None else value / 1000 for name, wire in _DURATIONS.items()
    }
    return QueuePolicy(
        max_attempts=answer.max_attempts,
        on_expired=answer.on_expired,
        on_exhausted=answer.on_exhausted,
        paused=answer.paused,
        **seconds,
    )


def requests(costs: native.RequestCosts) -> Requests:
    """Requests of the server's to its store."""
    return Requests(**{name: getattr(costs, name) for name in native.RequestCosts.__struct_fields__})


def handle(delivery: Delivery) -> native.Handle:
    """What proves the right to answer for it. Raises InvalidInput for a token that no message has."""
    if delivery.token >= 1 << 63:
        raise InvalidInput("a fencing token is smaller than 2**63")
    return native.Handle(delivery.id, delivery.lease_id, delivery.token)
