"""The suite that every store passes; it ships, so that whoever writes a store can run it.

A check is a coroutine function that is given a `Harness` over an empty store and raises AssertionError where the store
breaks the protocol of `millpond.stores.base`. With pytest::

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_store(check, tmp_path):
        asyncio.run(check(MyHarness(tmp_path)))

A change of the protocol starts here: first the check, then the stores.
"""

from __future__ import annotations

from millpond.stores.conformance import attached, groups, hand_out, lifetime, many, overview, resending, taking, writes
from millpond.stores.conformance.harness import CHECKS, Check, Harness

__all__ = [
    "CHECKS",
    "Check",
    "Harness",
    "attached",
    "groups",
    "hand_out",
    "lifetime",
    "many",
    "overview",
    "resending",
    "taking",
    "writes",
]
