"""`RemotePond`: a `Pond` whose store is a server's."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NoReturn

from millpond.client import records
from millpond.client.address import parse
from millpond.client.service import RemoteService
from millpond.client.transport import Transport
from millpond.errors import InvalidInput, MillpondError, StoreClosed, StoreError
from millpond.model.clock import Clock, SystemClock
from millpond.model.ids import IdSource
from millpond.pond import Pond
from millpond.requests import PondRequests, QueueRequests, snapshot
from millpond.service.collector import Collected
from millpond.service.config import Config
from millpond.stores.base import Capabilities, Problem, QueueName, Reach

CAPABILITIES = Capabilities(
    name="http",
    reach=Reach.NETWORK,
    atomic_groups=True,
    conditional_delete=True,
    change_feed=True,
    durable=True,
    inline_limit=64 * 1024,
    takes=True,
)
"""What a server offers whatever its store is; what its store charges for, it pays."""


FIRST_ANSWER = 5.0
"""Seconds within which a server must answer at the opening: a wrong address is not to take a call's whole time-out."""


class RemotePond(Pond):
    """A connection to one or more servers of a store. Use as ``async with``; safe for any number of tasks of its event
    loop. Queues, messages and errors are the same as on a store of one's own."""

    def __init__(
        self,
        url: str,
        *,
        clock: Clock | None = None,
        random_bytes: Callable[[int], bytes] = os.urandom,
        **options: Any,
    ) -> None:
        """For its URL and options see `millpond.connect`. Connects to nothing. Raises InvalidInput."""
        super(Pond, self).__init__()  # what it knows of handlers; the rest of a pond is a store's
        address = parse(url, options)
        self.clock = clock or SystemClock()
        self.config = Config()
        """This client's view of defaults; those that count are the server's."""
        self.ids = IdSource(self.clock, random_bytes)
        self.transport = Transport(address, self.clock, self.ids)
        self._remote = RemoteService(self.transport, self.clock, self.ids)
        self._operations = self._remote
        self._opened = False
        self._closed = False
        self._process = 0
        self._twin = None

    def __getattr__(self, name: str) -> Any:
        if name in ("store", "service", "dispatcher"):
            raise AttributeError(f"a pond behind a server has no {name}: it is in the server")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    async def open(self) -> Pond:
        """Connect. Raises StoreUnreachable when no server answers within a few seconds, StoreClosed after `close`."""
        if self._closed:
            raise StoreClosed("this pond was closed; connect again")
        if self._forked:
            raise StoreError("this pond was opened before this process forked; open it anew in the child")
        if not self._opened:
            self._process = os.getpid()
            await self.transport.open()
            try:
                await self.transport.call("/healthz", b"", changes=False, within=FIRST_ANSWER)
            except BaseException:
                await self.transport.close()
                raise
            self._opened = True
        return self

    async def close(self) -> None:
        """End what is under way with StoreClosed, and close the connections. Safe to repeat."""
        if self._closed:
            return
        self._closed = True
        if self._forked:
            return
        await self._remote.close()
        await self.transport.close()

    @property
    def capabilities(self) -> Capabilities:
        """What a server offers."""
        return CAPABILITIES

    def requests(self) -> PondRequests:
        """Empty: what a store charges for is asked by the server. See `server_requests`."""
        return snapshot({}, {})

    def reset_requests(self) -> None:
        """Nothing: `requests` is always empty."""

    async def server_requests(self) -> PondRequests:
        """What the server has asked of a store that charges for requests, since it began. Needs the scope admin."""
        found = await self._remote.costs()
        return PondRequests(
            {
                QueueName(one.namespace, one.queue): QueueRequests(records.requests(one.requests), one.acknowledged)
                for one in found.queues
            },
            records.requests(found.other),
        )

    def statistics(self) -> dict[str, Any]:
        """Counters of this client: requests, failures, repetitions, and the servers as they stand."""
        transport = self.transport
        return {
            "transport": {
                "requests": transport.requests,
                "failures": transport.failures,
                "repeats": transport.repeats,
                "under_way": transport.under_way,
                "current": transport.current,
                "endpoints": {
                    endpoint.url: {"failures": endpoint.failures, "trouble": endpoint.trouble}
                    for endpoint in transport.endpoints
                },
            },
            "requests": {},
        }

    # What needs the store itself

    def _elsewhere(self, what: str) -> NoReturn:
        raise InvalidInput(
            f"{what} needs the store itself: run it where that is, with the store's own URL instead of "
            f"{self.transport.where}"
        )

    async def collect(self) -> Collected:
        """Not by way of a server, which collects by itself. Raises InvalidInput."""
        self._elsewhere("a pass of the collector")

    async def verify(self, *, progress: Callable[[int], object] | None = None) -> list[Problem]:
        """Not by way of a server. Raises InvalidInput."""
        self._elsewhere("verify")

    async def unreadable(self, queue: str, *, namespace: str | None = None) -> list[tuple[str, MillpondError]]:
        """Not by way of a server. Raises InvalidInput."""
        self._elsewhere("looking for messages that cannot be read")

    async def discard_unreadable(self, queue: str, message_id: str, *, namespace: str | None = None) -> None:
        """Not by way of a server. Raises InvalidInput."""
        self._elsewhere("discarding a message that cannot be read")

    async def rekey(self, progress: Callable[[int], None] | None = None, *, encrypt_plain: bool = False) -> int:
        """Not by way of a server. Raises InvalidInput."""
        self._elsewhere("rekey")

    def __repr__(self) -> str:
        return f"<RemotePond {self.transport.where}>"
