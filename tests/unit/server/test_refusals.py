"""A refusal from which a client concludes something is told when that is on the disk."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import millpond
from millpond import LeaseLost, Message, Queue
from millpond.server.run import running
from millpond.stores.sqlite import schema, writer

ACKS: dict[str, Callable[[Message, Queue], Awaitable[Any]]] = {
    "ack": lambda message, queue: message.ack(),
    "ack_many": lambda message, queue: queue.ack_many([message]),
    "hand-off": lambda message, queue: message.ack(then=[("next", b"y")]),
}


@pytest.mark.parametrize("answer", ACKS)
async def test_an_ack_is_refused_when_the_message_is_gone_for_good(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may have removed it, been answered by nobody yet, and not have synced its log."""
    synced: list[str] = []

    def sync_log(path: str) -> None:
        synced.append(path)
        schema.sync_log(path)

    monkeypatch.setattr(writer, "sync_log", sync_log)
    url = f"sqlite:///{tmp_path}/q.db"
    async with (
        millpond.connect(url) as pond,
        running(pond) as first,
        running(pond) as second,
        millpond.connect(first) as remote,
        millpond.connect(second) as elsewhere,
        millpond.connect(url) as other,
    ):
        await remote.queue("orders").enqueue(b"x")
        [given] = await remote.queue("orders").receive()
        queue = elsewhere.queue("orders")  # a server that did not hand it out, and has to look
        message = queue.handle(given.id, given.lease.id, given.lease.token)
        await other.queue("orders").handle(message.id, message.lease.id, message.lease.token).ack()
        synced.clear()
        if answer == "ack_many":
            [done] = await ACKS[answer](message, queue)
            assert isinstance(done.error, LeaseLost)
        else:
            with pytest.raises(LeaseLost):
                await ACKS[answer](message, queue)
        assert synced
