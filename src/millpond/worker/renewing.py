"""What is renewed (messages in work, permits), and by whom, for those who hold leases and stand below the worker."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from millpond.worker.hooks import Gate

if TYPE_CHECKING:
    from millpond.message import Message


class Renewable(Protocol):
    """A message whose lease is held. Who renews reads it from another thread, and writes what is not a property."""

    ends: float
    """When the lease ends as far as is known, by the monotonic clock."""
    renew_at: float
    handle: Message | None
    """The message as the pond that renews knows it."""

    @property
    def message(self) -> Message:
        """As it was taken."""

    @property
    def span(self) -> float:
        """Seconds for which the lease is taken, and renewed."""

    @property
    def wants_lease(self) -> bool:
        """It is to be renewed."""

    @property
    def ending(self) -> bool:
        """It is being answered for: a lease that is gone then is no news."""

    def not_renewed(self, reason: str) -> None:
        """Tell that it could not be renewed just now; in the thread of who renews."""


class Renewer(Protocol):
    """Who renews."""

    due: float
    """When it next looks, by the monotonic clock."""

    def watch(self, held: Callable[[], Iterable[Renewable]], lost: Callable[[Any, str], object]) -> None:
        """Also renew what ``held`` says is held; ``lost`` is told, on the worker's loop, of a lease that is gone, and
        why."""

    def expect(self, at: float) -> None:
        """There is something to renew at ``at``, earlier than ``due``."""


class SharedGate(Gate, Protocol):
    """A gate that asks the store."""

    @property
    def asked(self) -> float | None:
        """When it last did so successfully, by the monotonic clock; None: not yet."""


@runtime_checkable
class Shared(Protocol):
    """A gate that several consumers go through, of this process or others, and that holds leases."""

    def seat(self, queue: str, renewer: Renewer) -> SharedGate:
        """The gate as the consumer of that queue (namespace and name) goes through it in the worker of ``renewer``."""
