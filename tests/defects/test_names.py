"""N1 and N2: names and ids that climb out of where they belong. See docs/reference/seed-defects.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from millpond import InvalidQueue
from millpond.errors import InvalidMessageId
from millpond.model.keys import message_lease_key, state_lease_key

if TYPE_CHECKING:
    from tests.defects.conftest import Defects

ID = "0197a3c2-0000-7000-8000-000000000000"
CLIMBING = ["", ".", "..", "../other", "a/b", "/", "a\0b", "\\..", "..\n"]


@pytest.mark.parametrize("name", CLIMBING)
async def test_N1_no_name_climbs(world: Defects, name: str) -> None:
    for key in (message_lease_key, state_lease_key):
        with pytest.raises(InvalidQueue):
            key("default", name, ID)
        with pytest.raises(InvalidQueue):
            key(name or "..", "q", ID)
    async with world.pond() as pond:
        with pytest.raises(InvalidQueue):
            pond.queue(name)
        with pytest.raises(InvalidQueue):
            pond.queue("q", namespace=name or "..")
        for call in (pond.service.next_candidate, pond.service.counts, pond.service.list_messages, pond.service.purge):
            operation: Callable[..., Any] = call
            with pytest.raises(InvalidQueue):
                await operation(None, name)
        assert await pond.queues() == []


@pytest.mark.parametrize("id", [*CLIMBING, "../../other/msg/x", f"../{ID}", f"{ID}/..", ID[:-1]])
async def test_N2_no_id_climbs(world: Defects, id: str) -> None:
    for key in (message_lease_key, state_lease_key):
        with pytest.raises(InvalidMessageId):
            key("default", "q", id)
    async with world.pond() as pond:
        queue = pond.queue("q")
        with pytest.raises(InvalidMessageId):
            await queue.enqueue(b"x", message_id=id)
        with pytest.raises(InvalidMessageId):
            await queue.get(id)
        with pytest.raises(InvalidMessageId):
            queue.handle(id, "0" * 32, 1)
        with pytest.raises(InvalidMessageId):
            await queue.dead_letters.get(id)
        assert await pond.queues() == []
