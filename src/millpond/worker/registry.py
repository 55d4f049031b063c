"""What `Pond.consumer` was told: which function handles which queue, and how.

Registered at import time, when the pond is not open and what annotations name may not exist yet; so a handler's
parameters are looked at when a worker starts, and only the options are checked here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, TypeVar

import msgspec

from millpond.errors import InvalidInput
from millpond.model import names
from millpond.worker.hooks import Gate, Middleware, Service
from millpond.worker.retries import RetryPolicy

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_CONCURRENCY = 16
"""Handlers of a consumer at the same time: enough for what waits on networks, few enough to be held in mind."""
MAX_CONCURRENCY = 10_000

RunIn = Literal["loop", "thread", "process"]


class Consumer(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A handler and how it is to be run. Durations are seconds."""

    name: str
    queue: str
    namespace: str | None
    handler: Callable[..., Any]
    concurrency: int = DEFAULT_CONCURRENCY
    visibility: float | None = None
    retry: RetryPolicy = RetryPolicy()
    time_limit: float | None = None
    type: Any = None
    run_in: RunIn | None = None
    middleware: tuple[Middleware, ...] = ()
    gate: Gate | None = None

    def __post_init__(self) -> None:
        names.queue_name(self.queue)
        names.namespace_name(self.namespace)
        if not callable(self.handler):
            raise InvalidInput(f"the handler of consumer {self.name!r} is {self.handler!r:.100}, which is no function")
        if self.concurrency.__class__ is not int or not 1 <= self.concurrency <= MAX_CONCURRENCY:
            raise InvalidInput(
                f"concurrency of consumer {self.name!r} is a whole number from 1 to {MAX_CONCURRENCY:,}, "
                f"not {self.concurrency!r:.100}"
            )
        for what, value in (("visibility", self.visibility), ("time_limit", self.time_limit)):
            if value is not None and (value.__class__ not in (int, float) or not 0 < value < float("inf")):
                raise InvalidInput(f"{what} of consumer {self.name!r} is a number of seconds, not {value!r:.100}")
        if self.run_in not in (None, "loop", "thread", "process"):
            raise InvalidInput(
                f"run_in of consumer {self.name!r} is 'loop', 'thread' or 'process', not {self.run_in!r}"
            )
        if not isinstance(self.retry, RetryPolicy):
            raise InvalidInput(f"retry of consumer {self.name!r} is a millpond.RetryPolicy, not {self.retry!r:.100}")


class Registrations:
    """What a pond knows of its handlers; a base class of ponds, so that registering needs nothing to be open."""

    # Made when first asked for: a pond that only queues pays nothing, and every kind of pond has them.

    @cached_property
    def consumers(self) -> dict[str, Consumer]:
        """By name, in order of registration."""
        return {}

    @cached_property
    def middleware(self) -> list[Middleware]:
        """Around every consumer's handlers, outside of the consumer's own."""
        return []

    @cached_property
    def services(self) -> list[Service]:
        """Run by each worker beside the consumers."""
        return []

    def register(self, consumer: Consumer) -> None:
        """Add a consumer. Raises InvalidInput when there is one of that name."""
        if consumer.name in self.consumers:
            raise InvalidInput(
                f"there is a consumer {consumer.name!r} already; give one of the two another name: consumer(…, name=…)"
            )
        self.consumers[consumer.name] = consumer

    def consumer(
        self,
        queue: str,
        *,
        name: str | None = None,
        namespace: str | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
        visibility: float | None = None,
        retry: RetryPolicy | None = None,
        time_limit: float | None = None,
        type: Any = None,
        run_in: RunIn | None = None,
        middleware: Sequence[Middleware] = (),
        gate: Gate | None = None,
    ) -> Callable[[F], F]:
        """Register a function as the handler of a queue's messages; a worker (`millpond worker`, `Worker`) runs it.

        The function stays what it is. Of its parameters one is the payload, decoded and checked by its annotation (or
        ``type``): bytes, str, a msgspec Struct, dataclass, TypedDict, pydantic model …; others are filled by theirs:
        `Message`, `Lease`, `MessageState`, `Context`, `Queue`, `Pond`, or the Sync forms in functions that are no
        coroutines. It returns: ack. It raises: nack, with the delay that ``retry`` says; `Retry`, `GiveUp` and `Defer`
        say otherwise. A payload that does not fit is a dead letter at once.

        ``name``: default the function's. ``concurrency``: handlers at the same time, per process. ``visibility``:
        length of the lease, which is renewed while the handler runs; None for the messages' own. ``time_limit``:
        seconds after which a handler is cancelled, and has failed. ``run_in``: "loop" (coroutine functions), "thread"
        (others), or "process" for work that burns CPU; such a handler can be imported, and gets its payload and `Lease`
        only. Raises InvalidInput."""

        def register(handler: F) -> F:
            self.register(
                Consumer(
                    name=name or str(getattr(handler, "__name__", handler)),
                    queue=queue,
                    namespace=namespace,
                    handler=handler,
                    concurrency=concurrency,
                    visibility=visibility,
                    retry=RetryPolicy() if retry is None else retry,
                    time_limit=time_limit,
                    type=type,
                    run_in=run_in,
                    middleware=tuple(middleware),
                    gate=gate,
                )
            )
            return handler

        return register
