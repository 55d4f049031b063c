"""Everything at once, and harm done to all of it: what was acknowledged is never lost, what is acked never comes back,
and a stale lease changes nothing.

Servers on one store, with a bad network before them; producers, consumers and `millpond worker` behind it, and on the
store itself; killed, stopped for longer than their leases, drained, restarted; policies, pauses, redrives, tokens
meanwhile. Each writes down what it was told. In the end the accounts must balance.

MILLPOND_CHAOS_SECONDS sets for how long (4 by default), MILLPOND_CHAOS_SEED the seed, which is printed;
MILLPOND_CHAOS_RUNS how many times, with seeds that follow. MILLPOND_CHAOS_BUCKET=1: in a bucket as well.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path

import pytest
from tests.e2e.chaos.fleet import Fleet
from tests.e2e.chaos.journal import read
from tests.e2e.chaos.ledger import Ledger
from tests.servers.process import Server

from millpond.model.clock import ManualClock

SECONDS = float(os.environ.get("MILLPOND_CHAOS_SECONDS", "4"))
LONG = SECONDS > 10
RUNS = int(os.environ.get("MILLPOND_CHAOS_RUNS", "1"))
HARM = float(os.environ.get("MILLPOND_CHAOS_HARM", "0.05"))
BUCKET = bool(os.environ.get("MILLPOND_CHAOS_BUCKET"))
PACE = float(os.environ.get("MILLPOND_CHAOS_PACE", "0.1"))


async def _play(fleet: Fleet, seconds: float) -> None:
    try:
        await fleet.start()
        end = time.monotonic() + 60
        while not any(event["event"] == "ack:done" for event in read(fleet.folder)):
            assert time.monotonic() < end, "it does not come into motion"
            await asyncio.sleep(0.05)
        await fleet.run(seconds, HARM)
    finally:
        await fleet.stop()


def _run(folder: Path, store: str, seed: int, *, skip: float | None) -> None:
    print(f"MILLPOND_CHAOS_SEED={seed}")
    folder.mkdir()
    size = (2, 2, 2, 1) if LONG else (2, 1, 1, 1)
    fleet = Fleet(folder, store, seed, servers=size[0], clients=size[1], workers=size[2], direct=size[3], pace=PACE)
    asyncio.run(_play(fleet, SECONDS))
    # Leases and delays of those that were killed are over at once, by this clock.
    clock = None if skip is None else ManualClock(time.time_ns() // 1_000_000 + round(skip * 1000))
    left = asyncio.run(fleet.left(clock))
    ledger = Ledger(read(folder), left)
    violations = ledger.check()
    harm = sum((proxy.done for proxy in fleet.proxies), fleet.done)
    print(dict(sorted(harm.items())))
    print(dict(sorted(ledger.kinds.items())), f"left: {len(left)}")
    assert not violations, "\n".join(violations)
    assert not fleet.trouble, "\n".join(fleet.trouble)
    assert ledger.acked


@pytest.mark.parametrize("kind", ["file", *(["bucket"] if BUCKET else [])])
def test_the_accounts_balance(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = int(os.environ.get("MILLPOND_CHAOS_SEED", random.SystemRandom().randrange(2**32)))
    for seed in range(first, first + RUNS):
        folder = tmp_path / str(seed)
        if kind == "file":
            _run(folder, f"sqlite:///{tmp_path}/{seed}.db", seed, skip=3600.0)
            continue
        seaweed: Server = request.getfixturevalue("seaweed")
        for name, value in seaweed.environment.items():
            monkeypatch.setenv(name, value)
        _run(folder, seaweed.url(f"chaos-{time.time_ns()}"), seed, skip=None)
