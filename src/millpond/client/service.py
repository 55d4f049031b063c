"""The operations of a queue, asked of a server: what `QueueService` is to a store of one's own.

What can be wrong about a call is found here by the same functions as there, before anything is sent; every decision
about a message is the server's. When no reply comes a call is sent again, but for what counts (purge, redrive), whose
second count would be wrong. An enqueue carries an id that was chosen before, so that the server knows a repetition. An
extension only sets the end of the lease once more, a state only the same value; what the refusal of another answer
means is told in `millpond.client.consuming`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from millpond.client import records
from millpond.client.asking import decoder, encode
from millpond.client.asking import key as queue_key
from millpond.client.consuming import Consuming
from millpond.client.records import Seen
from millpond.model import names
from millpond.service.config import QueuePolicy, changed_policy, check_count
from millpond.service.ready import Record
from millpond.stores.base import Counts, QueueName
from millpond.wire import native

_view = decoder(native.View)
_views = decoder(native.Views)
_page = decoder(native.Page)
_counts = decoder(native.Counts)
_policy = decoder(native.PolicyAnswer)
_queues = decoder(native.Queues)
_counted = decoder(native.Counted)
_purged = decoder(native.Purged)
_next_due = decoder(native.NextDue)
_costs = decoder(native.Costs)


class RemoteService(Consuming):
    """A queue's operations by way of a server."""

    # Looking

    def state_of(self, record: Record) -> str:
        """How it stood when it was read, as the server said."""
        assert isinstance(record, Seen)
        return record.state

    async def counts(self, namespace: str | None, queue: str) -> Counts:
        """As `QueueService.counts`."""
        found = await self._ask("/v1/queue/counts", _named(namespace, queue), _counts, changes=False)
        age = found.oldest_age_ms
        return Counts(
            ready=found.ready,
            delayed=found.delayed,
            leased=found.leased,
            blocked=found.blocked,
            dead=found.dead,
            bytes=found.bytes,
            # By this machine's clock, which is the one that the age will be taken from.
            oldest_due=None if age is None else self.clock.now_ms() - age,
            enqueued=found.enqueued,
        )

    async def get_message(self, namespace: str | None, queue: str, id: str) -> Record:
        """As `QueueService.get_message`."""
        return await self._one("/v1/queue/get", namespace, queue, id)

    async def dead_letter(self, namespace: str | None, queue: str, id: str) -> Record:
        """As `QueueService.dead_letter`."""
        return await self._one("/v1/dlq/get", namespace, queue, id)

    async def _one(self, path: str, namespace: str | None, queue: str, id: str) -> Record:
        key = queue_key(namespace, queue)
        request = native.MessageRequest(namespace=key[0], queue=key[1], message_id=names.message_id(id))
        return records.seen((await self._ask(path, request, _view, changes=False)).message)

    async def peek(self, namespace: str | None, queue: str, limit: int) -> list[Record]:
        """As `QueueService.peek`; at most 1,000."""
        key = queue_key(namespace, queue)
        request = native.PeekRequest(
            namespace=key[0], queue=key[1], count=min(check_count(limit, "count"), native.MAX_LIST)
        )
        return [
            records.seen(view) for view in (await self._ask("/v1/queue/peek", request, _views, changes=False)).messages
        ]

    async def until_due(self, namespace: str | None, queue: str) -> float | None:
        """As `QueueService.until_due`."""
        found = await self._ask("/v1/queue/nextDue", _named(namespace, queue), _next_due, changes=False)
        return None if found.in_ms is None else found.in_ms / 1000

    async def list_queues(self) -> list[QueueName]:
        """As `QueueService.list_queues`; those that the server lets this client see."""
        found = await self._ask("/v1/queue/list", native.NamespaceRequest(), _queues, changes=False)
        return [QueueName(one.namespace, one.queue) for one in found.queues]

    async def costs(self) -> native.Costs:
        """What the server has asked of its store, if that charges for requests."""
        return await self._ask("/v1/requests", native.Nothing(), _costs, changes=False)

    # Administering

    async def purge(self, namespace: str | None, queue: str) -> int:
        """As `QueueService.purge`."""
        return (await self._ask("/v1/queue/purge", _named(namespace, queue), _purged, repeat=False)).purged

    async def pause(self, namespace: str | None, queue: str) -> None:
        """As `QueueService.pause`."""
        await self.transport.call("/v1/queue/pause", encode(_named(namespace, queue)))

    async def resume(self, namespace: str | None, queue: str) -> None:
        """As `QueueService.resume`."""
        await self.transport.call("/v1/queue/resume", encode(_named(namespace, queue)))

    async def notify(self, namespace: str, queue: str) -> None:
        """As `QueueService.notify`, for those who wait by way of the server."""
        await self.transport.call("/v1/queue/notify", encode(_named(namespace, queue)), changes=False)

    async def queue_policy(self, namespace: str | None, queue: str) -> QueuePolicy:
        """As `QueueService.queue_policy`."""
        key = queue_key(namespace, queue)
        return await self._policy(native.PolicyRequest(namespace=key[0], queue=key[1]))

    async def set_policy(self, namespace: str | None, queue: str, **fields: Any) -> QueuePolicy:
        """As `QueueService.set_policy`."""
        key = queue_key(namespace, queue)
        changed_policy(QueuePolicy(), fields)
        return await self._policy(
            native.PolicyRequest(namespace=key[0], queue=key[1], set=records.policy_change(fields))
        )

    async def reset_policy(self, namespace: str | None, queue: str) -> QueuePolicy:
        """As `QueueService.reset_policy`."""
        key = queue_key(namespace, queue)
        return await self._policy(native.PolicyRequest(namespace=key[0], queue=key[1], reset=True))

    async def _policy(self, request: native.PolicyRequest) -> QueuePolicy:
        return records.policy((await self._ask("/v1/queue/policy", request, _policy)).policy)

    # Dead letters

    async def list_dead_letters(
        self, namespace: str | None, queue: str, *, after: str | None = None, limit: int = 100
    ) -> list[Record]:
        """As `QueueService.list_dead_letters`, a page at a time."""
        return await self._list("/v1/dlq/list", namespace, queue, after, limit)

    async def browse(
        self, namespace: str | None, queue: str, *, after: str | None = None, limit: int = 100
    ) -> list[Record]:
        """As `QueueService.browse`, a page at a time."""
        return await self._list("/v1/queue/browse", namespace, queue, after, limit)

    async def _list(self, path: str, namespace: str | None, queue: str, after: str | None, limit: int) -> list[Record]:
        key = queue_key(namespace, queue)
        left = check_count(limit, "limit")
        start = None if after is None else names.message_id(after)
        cursor: str | None = None
        found: list[Record] = []
        while left > 0:
            request = native.ListRequest(
                namespace=key[0], queue=key[1], after=start, cursor=cursor, limit=min(left, native.MAX_LIST)
            )
            page = await self._ask(path, request, _page, changes=False)
            found += [records.seen(view) for view in page.messages]
            left -= len(page.messages)
            start, cursor = None, page.next_cursor
            if cursor is None:
                break
        return found

    async def redrive(self, namespace: str | None, queue: str, ids: Sequence[str] | None = None) -> int:
        """As `QueueService.redrive`."""
        return await self._dead_letters("/v1/dlq/redrive", namespace, queue, ids)

    async def purge_dead_letters(self, namespace: str | None, queue: str, ids: Sequence[str] | None = None) -> int:
        """As `QueueService.purge_dead_letters`."""
        return await self._dead_letters("/v1/dlq/purge", namespace, queue, ids)

    async def _dead_letters(self, path: str, namespace: str | None, queue: str, ids: Sequence[str] | None) -> int:
        key = queue_key(namespace, queue)
        wanted = None if ids is None else names.message_ids(ids)
        pages: list[list[str] | None] = [None]
        if wanted is not None:
            pages = [wanted[at : at + native.MAX_BATCH] for at in range(0, len(wanted), native.MAX_BATCH)]
        total = 0
        for page in pages:
            request = native.DeadLetterIdsRequest(namespace=key[0], queue=key[1], ids=page)
            total += (await self._ask(path, request, _counted, repeat=False)).count
        return total


def _named(namespace: str | None, queue: str) -> native.QueueRequest:
    key = queue_key(namespace, queue)
    return native.QueueRequest(namespace=key[0], queue=key[1])
