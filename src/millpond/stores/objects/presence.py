"""Objects by which the processes that compete for a queue's messages know of each other (see `rivals`).

Nobody relies on them. One that is missing, or that outlives its process, costs lost claims, or a wait of some seconds.
"""

from __future__ import annotations

from millpond.errors import StoreError
from millpond.stores.objects import names
from millpond.stores.objects.bucket import Content, Tag
from millpond.stores.objects.engine import Engine, log
from millpond.stores.objects.rivals import Queue


class Presence:
    """What this process says of itself, and what others do."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tags: dict[str, Tag] = {}

    async def tell(self, queue: Queue) -> None:
        """Say that this process takes messages of the queue, and see who else does, if it is time for that. For those
        who have met others: it is two requests a minute."""
        rivals = self._engine.rivals
        try:
            if rivals.wants_to_say(queue):
                # First, so that of two who begin at the same time one at least sees the other.
                await self._say(names.consumer(*queue, rivals.me))
            if rivals.wants_to_look(queue):
                await self._look(queue)
        except StoreError as error:
            log.warning("millpond.objects.presence_failed", extra={"queue": "/".join(queue), "reason": str(error)})

    async def _say(self, path: str) -> None:
        exchange = self._engine.exchange
        tag = self._tags.get(path)
        data = self._engine.write_id()
        result: Tag | Content | None = None if tag is None else await exchange.swap(path, data, tag)
        if result is None:
            result = await exchange.create(path, data, insist=True)
        self._tags[path] = result if isinstance(result, Tag) else result.tag

    async def _look(self, queue: Queue) -> None:
        engine = self._engine
        async with engine.listing(names.consumers(*queue)) as pages:
            # Of more than fit into a page those that are left out are met as anybody is.
            for entry in await anext(pages, []):
                try:
                    name = bytes.fromhex(names.last_part(entry.name))
                except ValueError:
                    continue
                engine.rivals.heard(queue, name, engine.ago(entry.modified))

    async def end(self) -> None:
        """This process takes no more messages of any queue."""
        paths, self._tags = list(self._tags), {}
        try:
            if len(paths) == 1:
                await self._engine.exchange.delete(paths[0])
            elif paths:
                await self._engine.exchange.delete_many(paths)
        except StoreError as error:
            log.warning("millpond.objects.presence_failed", extra={"queue": "", "reason": str(error)})
