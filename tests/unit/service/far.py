"""A store in memory that plays one in a bucket: somewhere else, and every call is to be paid for."""

from __future__ import annotations

from typing import Any

import msgspec

from millpond.model.clock import ManualClock
from millpond.stores.base import Capabilities
from millpond.stores.memory import MemoryStore


class Far:
    """A memory store that says what it is told to of itself; everything else is the inner one's."""

    def __init__(self, clock: ManualClock, inner: MemoryStore | None = None, **capabilities: Any) -> None:
        self.inner = inner or MemoryStore(clock=clock, takes=False)
        self.clock_offset = 0
        self._capabilities = msgspec.structs.replace(self.inner.capabilities, **capabilities)

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
