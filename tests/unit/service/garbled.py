"""A store in which some records cannot be read, and whose calls can be held up or made to fail."""

from __future__ import annotations

import msgspec

from millpond.stores.base import ReadyPage, Store, Stored
from millpond.stores.faulty import FaultyStore


class GarbledStore(FaultyStore):
    """``inner``, with the heads of the messages in ``bad`` turned to garbage wherever many are read at once."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.bad: set[str] = set()

    def _garble(self, records: list[Stored]) -> list[Stored]:
        return [msgspec.structs.replace(one, head=b"\xc1") if one.item.id in self.bad else one for one in records]

    async def ready(self, namespace: str, queue: str, now: int, *, limit: int) -> ReadyPage:
        page = await super().ready(namespace, queue, now, limit=limit)
        return page._replace(records=self._garble(page.records))

    async def expired(self, now: int, *, limit: int) -> list[Stored]:
        return self._garble(await super().expired(now, limit=limit))

    def count(self, method: str) -> int:
        """How often the method was called."""
        return sum(call.method == method for call in self.calls)
