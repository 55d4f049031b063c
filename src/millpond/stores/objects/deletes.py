"""Deletes that are asked for at the same time share requests, where the cloud deletes several objects by one.

An ack is a delete, so this is the group commit of a bucket: with many consumers at work, or acks in batches, most acks
cost a fraction of a request. One that comes alone is sent alone, at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from millpond.errors import OutcomeUnknown, StoreError
from millpond.stores.objects.bucket import Bucket

FLIGHTS = 8
"""Requests under way at once. While there are fewer nothing waits; from then on what comes gathers for the next one."""
MOST = 100
"""Objects of one request, and less where the cloud takes less: a request that fails is asked about one by one."""


class TooLate(Exception):
    """It was not sent: it had to wait for so long that it might do harm by now."""


class Deletes:
    """Deletes in ``bucket``, up to ``batch`` objects by one request."""

    def __init__(self, bucket: Bucket, batch: int) -> None:
        self._bucket = bucket
        self._most = min(batch, MOST)
        self._waiting: deque[tuple[str, Callable[[], bool], asyncio.Future[None]]] = deque()
        self._flights: set[asyncio.Task[None]] = set()
        self._scheduled = False

    async def delete(self, path: str, still: Callable[[], bool] = lambda: True) -> None:
        """Remove an object, by one request that is not repeated, if ``still`` says yes when that is sent.

        Raises TooLate when it does not; OutcomeUnknown, also for a request that failed for another object of it;
        StoreError."""
        if self._most == 1:
            if not still():
                raise TooLate
            await self._bucket.delete(path)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((path, still, future))
        if not self._scheduled:
            # Whoever else asks in this turn of the loop comes along.
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._send)
        await future

    def _send(self) -> None:
        self._scheduled = False
        while self._waiting and len(self._flights) < FLIGHTS:
            some: list[tuple[str, asyncio.Future[None]]] = []
            while self._waiting and len(some) < self._most:
                path, still, future = self._waiting.popleft()
                if still():
                    some.append((path, future))
                elif not future.done():
                    future.set_exception(TooLate())
            if not some:
                return
            flight = asyncio.get_running_loop().create_task(self._fly(some))
            self._flights.add(flight)
            flight.add_done_callback(self._landed)

    def _landed(self, flight: asyncio.Task[None]) -> None:
        self._flights.discard(flight)
        self._send()

    async def _fly(self, some: list[tuple[str, asyncio.Future[None]]]) -> None:
        error: BaseException | None = None
        try:
            if len(some) == 1:
                await self._bucket.delete(some[0][0])
            else:
                await self._bucket.delete_many([path for path, _ in some])
        except StoreError as failure:
            error = failure
            if len(some) > 1 and not isinstance(failure, OutcomeUnknown):
                error = OutcomeUnknown(f"some of {len(some)} objects may have been deleted, others not: {failure}")
        except asyncio.CancelledError:
            error = OutcomeUnknown("a delete was cut short: its objects may be there or not")
        for _, future in some:
            if future.done():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)
