"""What looking at a long queue takes of memory."""

from __future__ import annotations

import tracemalloc

import pytest
from tests.unit.stores.objects.late import scripted
from tests.unit.stores.objects.rig import NOW, QUEUE, Rig, apply, fresh, insert, lease

from millpond.stores.base import Box, Conflict, Updated
from millpond.stores.objects import names

MESSAGES = 4_000


@pytest.mark.parametrize("group", [None, "g"])
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


async def test_a_group_held_in_the_middle_of_its_line_counts_once() -> None:
    """The one that is held is of the line that is blocked by it, on whichever page it is found."""
    rig = Rig(page_size=3)
    store, _ = await scripted(rig)
    other, _ = await scripted(rig)
    await insert(store, fresh(5, group="g"))
    later = await insert(store, fresh(6, group="g"))
    held = await apply(other, lease(later, NOW + 1000))
    assert isinstance(held, Conflict)
    first = (await other.ready(*QUEUE, NOW, limit=1)).records[0]
    assert isinstance(await apply(other, lease(first, NOW + 60_000)), Updated)
    for number in range(4):
        await insert(store, fresh(number, group="g"))
    await insert(store, fresh(9, group="h"))
    counts = await store.counts(*QUEUE, NOW)
    assert (counts.ready, counts.delayed, counts.leased, counts.blocked) == (1, 0, 1, 5)
    after = await store.counts(*QUEUE, NOW + 60_000)
    assert (after.ready, after.delayed, after.leased, after.blocked) == (2, 0, 0, 5)
