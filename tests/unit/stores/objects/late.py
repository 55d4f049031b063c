"""A network whose single requests a test can have lost, refused, held up, or take effect much later."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from tests.unit.stores.objects.rig import DROPPED, LOST, REFUSED, Network, Rig

from millpond.errors import OutcomeUnknown, StoreError
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.store import ObjectStore

T = TypeVar("T")

LATE = "late"
"""The reply is given up, and the request takes place when the test says so (`Scripted.arrive`)."""

Rule = Callable[[str, str], Awaitable[str | None]]
"""What happens to a request, given its kind and the object's name; None: nothing out of the ordinary."""


class Scripted(Network):
    """A network on which a test decides about each request as it is made."""

    def __init__(self, inner: MemoryBucket) -> None:
        super().__init__(inner)
        self.rule: Rule | None = None
        self.late: list[Callable[[], Awaitable[Any]]] = []

    async def _do(self, kind: str, name: str, request: Callable[[], Awaitable[T]]) -> T:
        fault = None if self.rule is None else await self.rule(kind, name)
        if fault == REFUSED:
            raise StoreError("the bucket refused; try again later")
        if fault == DROPPED:
            raise OutcomeUnknown("the request did not arrive")
        if fault == LATE:
            self.late.append(request)
            raise OutcomeUnknown("no reply within the time allowed")
        result = await super()._do(kind, name, request)
        if fault == LOST:
            raise OutcomeUnknown("the reply did not arrive")
        return result

    async def arrive(self) -> None:
        """What is late takes place now, or is refused by its condition."""
        late, self.late = self.late, []
        for request in late:
            try:
                await request()
            except StoreError:
                continue


def script(*steps: tuple[str, str, str]) -> Rule:
    """Each step (kind, part of the name, what happens) in turn, to the first request that it fits."""
    rest = list(steps)

    async def rule(kind: str, name: str) -> str | None:
        if rest and rest[0][0] == kind and rest[0][1] in name:
            return rest.pop(0)[2]
        return None

    return rule


async def scripted(rig: Rig, **options: Any) -> tuple[ObjectStore, Scripted]:
    """Another process's store, open, and its network."""
    rig._made += 1
    network = Scripted(rig.root.share())
    chance = random.Random(rig._made)
    store = ObjectStore(
        network, clock=rig.clock, measure_skew=False, random_bytes=chance.randbytes, **(rig.options | options)
    )
    await store.open()
    network.reset()
    return store, network
