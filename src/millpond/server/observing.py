"""Seeing the engine's operations pass: around each operation of a service, for counts and traces.

The engine has no hooks of its own that a program without a server would pay for. So a server puts a layer around the
operations of its own pond's service: what arrives by any route, or by code beside the server, is seen once.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, Protocol

from millpond.errors import MillpondError
from millpond.model import names
from millpond.service.consuming import Delivery
from millpond.service.service import QueueService

Operation = Callable[..., Awaitable[Any]]


class Done(NamedTuple):
    """An operation that has ended."""

    name: str
    """``enqueue``, ``receive``, ``ack``, ``nack``, ``defer``, ``extend`` or ``bury``."""
    namespace: str
    queue: str
    number: int
    """Messages that it went through for."""
    ids: Sequence[str]
    """Their ids, for as long as nobody changes them."""
    errors: Sequence[MillpondError]
    duplicates: int = 0
    """Of an enqueue: messages that were there already. They are not in ``number``."""
    again: int = 0
    """Of a receive: messages that were delivered before."""


class Observer(Protocol):
    """Told of operations."""

    def began(self) -> Any:
        """One begins; what is returned is handed to `ended`."""

    def ended(self, began: Any, done: Done) -> None:
        """One has ended, as a success or not."""


def observe(service: QueueService, observer: Observer) -> None:
    """From now on tell ``observer`` of each operation of ``service``."""
    for name, around in _AROUND.items():
        # mypy would have it that methods never change; here exactly that is wanted, for one object.
        setattr(service, name, around(getattr(service, name), observer))


def _key(namespace: str | None, queue: str) -> tuple[str, str]:
    try:
        return names.queue_key(namespace, queue)
    except MillpondError:
        return "", ""  # refused by the operation itself, which says why


def _enqueues(operation: Operation, observer: Observer) -> Operation:
    @functools.wraps(operation)
    async def observed(namespace: str | None, queue: str, *rest: Any, **more: Any) -> Any:
        began = observer.began()
        try:
            result = await operation(namespace, queue, *rest, **more)
        except MillpondError as error:
            observer.ended(began, Done("enqueue", *_key(namespace, queue), 0, (), (error,)))
            raise
        receipts = result if result.__class__ is list else (result,)
        fresh = [receipt.message_id for receipt in receipts if not receipt.duplicate]
        observer.ended(
            began, Done("enqueue", *_key(namespace, queue), len(fresh), fresh, (), len(receipts) - len(fresh))
        )
        return result

    return observed


def _claims(operation: Operation, observer: Observer) -> Operation:
    @functools.wraps(operation)
    async def observed(namespace: str | None, queue: str, *rest: Any, **more: Any) -> list[Delivery]:
        began = observer.began()
        try:
            deliveries: list[Delivery] = await operation(namespace, queue, *rest, **more)
        except MillpondError as error:
            observer.ended(began, Done("receive", *_key(namespace, queue), 0, (), (error,)))
            raise
        if deliveries:
            again = sum(one.given is not None and one.given.status.attempts > 1 for one in deliveries)
            ids = [one.id for one in deliveries]
            observer.ended(began, Done("receive", *_key(namespace, queue), len(ids), ids, (), 0, again))
        return deliveries

    return observed


def _answers(name: str) -> Callable[[Operation, Observer], Operation]:
    def around(operation: Operation, observer: Observer) -> Operation:
        @functools.wraps(operation)
        async def observed(delivery: Delivery, *rest: Any, **more: Any) -> Any:
            began = observer.began()
            try:
                result = await operation(delivery, *rest, **more)
            except MillpondError as error:
                observer.ended(began, Done(name, delivery.namespace, delivery.queue, 0, (delivery.id,), (error,)))
                raise
            observer.ended(began, Done(name, delivery.namespace, delivery.queue, 1, (delivery.id,), ()))
            return result

        return observed

    return around


def _answers_many(name: str) -> Callable[[Operation, Observer], Operation]:
    def around(operation: Operation, observer: Observer) -> Operation:
        @functools.wraps(operation)
        async def observed(deliveries: Sequence[Delivery], *rest: Any, **more: Any) -> Any:
            if not deliveries:
                return await operation(deliveries, *rest, **more)
            began = observer.began()
            # Batches are of one queue, whoever sends them; where they are not, the first stands for all.
            first = deliveries[0]
            ids = [one.id for one in deliveries]
            try:
                results = await operation(deliveries, *rest, **more)
            except MillpondError as error:
                observer.ended(began, Done(name, first.namespace, first.queue, 0, ids, (error,)))
                raise
            errors = [error for error in results if error is not None]
            observer.ended(began, Done(name, first.namespace, first.queue, len(ids) - len(errors), ids, errors))
            return results

        return observed

    return around


_AROUND: dict[str, Callable[[Operation, Observer], Operation]] = {
    "enqueue": _enqueues,
    "enqueue_many": _enqueues,
    "enqueue_each": _enqueues,
    "claim": _claims,
    "ack": _answers("ack"),
    "nack": _answers("nack"),
    "defer": _answers("defer"),
    "extend": _answers("extend"),
    "bury": _answers("bury"),
    "ack_many": _answers_many("ack"),
    "nack_many": _answers_many("nack"),
    "defer_many": _answers_many("defer"),
    "extend_many": _answers_many("extend"),
}
