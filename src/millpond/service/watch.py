"""Watching a queue for changes made by others, over a store's change feed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from millpond.stores.base import Store, Subscription


class WatchFactory(Protocol):
    """Makes subscriptions for queues."""

    def subscribe(self, namespace: str, queue: str, callback: Callable[[], object]) -> Subscription:
        """Call ``callback`` soon after somebody else changed the queue. Raises StoreError when it cannot be had."""


class _StoreWatch:
    def __init__(self, store: Store) -> None:
        self._store = store

    def subscribe(self, namespace: str, queue: str, callback: Callable[[], object]) -> Subscription:
        return self._store.subscribe(namespace, queue, callback)


def watch_factory_from_storage(store: Store | None) -> WatchFactory | None:
    """A watch factory over the store's change feed; None when there is no store or it has no feed."""
    if store is None or not store.capabilities.change_feed:
        return None
    return _StoreWatch(store)
