"""Every store against the suite that ships with the package."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.servers.corner import ALL, CORNERS, PLAIN, MakeCorner

from millpond.crypto.keyring import Keyring
from millpond.model.clock import ManualClock, SystemClock
from millpond.stores.base import Store
from millpond.stores.conformance import CHECKS, Check, attached
from millpond.stores.encrypted import EncryptedStore
from millpond.stores.memory import MemoryStore
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.store import ObjectStore
from millpond.stores.sqlite import SqliteStore


class _Harness:
    """Handles on one fresh store."""

    shared = True
    persistent = True

    def __init__(self, make: Callable[[], Store], *, slow: bool = False) -> None:
        self._make = make
        self.slow = slow

    def handle(self) -> Store:
        return self._make()


def _memory(_: Path) -> Callable[[], Store]:
    return MemoryStore(clock=ManualClock()).share


def _candidates(_: Path) -> Callable[[], Store]:
    return MemoryStore(clock=ManualClock(), takes=False).share


def _sqlite(directory: Path) -> Callable[[], Store]:
    # Waiting for another handle's lock takes real time.
    return lambda: SqliteStore(directory / "pond.db", clock=SystemClock())


def _objects(_: Path) -> Callable[[], Store]:
    clock = ManualClock()
    bucket = MemoryBucket(clock=clock)
    return lambda: ObjectStore(bucket.share(), clock=clock, measure_skew=False)


def _encrypted(inner: Callable[[Path], Callable[[], Store]]) -> Callable[[Path], Callable[[], Store]]:
    def store(directory: Path) -> Callable[[], Store]:
        make, keyring = inner(directory), Keyring({"old": bytes(32), "new": bytes(range(32))})
        return lambda: EncryptedStore(make(), keyring)

    return store


STORES: dict[str, Callable[[Path], Callable[[], Store]]] = {
    "memory": _memory,
    "memory-candidates": _candidates,
    "sqlite": _sqlite,
    "objects": _objects,
    "memory-encrypted": _encrypted(_memory),
    "sqlite-encrypted": _encrypted(_sqlite),
    "objects-encrypted": _encrypted(_objects),
}


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check: Check, store: str, tmp_path: Path) -> None:
    asyncio.run(check(_Harness(STORES[store](tmp_path))))


ON_SERVERS = [
    pytest.param(check, server, id=f"{check.__name__}-{server}")
    for check in CHECKS
    for server in CORNERS
    # What encryption changes is what lies with a record, whichever server keeps it.
    if ALL or server in PLAIN or check.__module__ == attached.__name__
]


@pytest.mark.parametrize(("check", "server"), ON_SERVERS)
def test_conformance_on_servers(check: Check, server: str, make_corner: MakeCorner, tmp_path: Path) -> None:
    corner = make_corner(server.partition("-")[0], ManualClock())
    make = _encrypted(lambda _: corner.store)(tmp_path) if server.endswith("-encrypted") else corner.store
    asyncio.run(check(_Harness(make, slow=not ALL)))


def test_checks_have_distinct_names() -> None:
    names = [check.__name__ for check in CHECKS]
    assert len(names) == len(set(names))
    assert len(names) > 50
