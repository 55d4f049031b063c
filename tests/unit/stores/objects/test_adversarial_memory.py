"""What looking at a long queue takes of memory."""

from __future__ import annotations

import tracemalloc

import pytest
from tests.unit.stores.objects.late import scripted
from tests.unit.stores.objects.rig import NOW, Rig

from millpond.stores.base import Box
from millpond.stores.objects import names

MESSAGES = 4_000


@pytest.mark.parametrize(
    "group",
    [
        None,
        pytest.param(
            "g",
            marks=pytest.mark.xfail(
                strict=True, reason="counts keeps every message with a group in memory until it has seen them all"
            ),
        ),
    ],
)
async def test_counting_a_long_queue_takes_the_memory_of_a_few_pages(group: str | None) -> None:
    rig = Rig(page_size=100)
    bucket = rig.root.share()
    for number in range(MESSAGES):
        id = f"0197a3c2-0000-7000-8000-{number:012x}"
        name = names.message(
            "default", "q", Box.LIVE, key=names.id_number(id), id=id, priority=5, size=1, expires=None, group=group
        )
        await bucket.create(name.path, b"x" * 17)
    store, _ = await scripted(rig)
    tracemalloc.start()
    try:
        counts = await store.counts("default", "q", NOW)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert counts.ready + counts.delayed + counts.blocked in (MESSAGES, MESSAGES - 1)
    assert peak < MESSAGES * 250
