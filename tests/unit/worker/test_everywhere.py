"""What a worker does in short, on each kind of store, with state, hand-off and competition, where they differ most."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.unit.worker.conftest import MakeSite, until

from millpond import Context, MessageState, RetryPolicy


async def test_handlers_run_fail_keep_state_and_hand_off(site: MakeSite) -> None:
    async with site() as s:
        seen: list[Any] = []

        @s.pond.consumer("q", retry=RetryPolicy(base=0.0), concurrency=4)
        async def handler(number: int, state: MessageState, context: Context) -> None:
            tries = (await state.load() or 0) + 1
            await state.save(tries)
            if number == 3 and tries < 3:
                raise ValueError("not yet")
            seen.append((number, tries))
            context.hand_off("next", b"%d" % number)

        await s.queue.enqueue_many([b"%d" % number for number in range(6)])
        worker = s.start()
        await until(lambda: len(seen) == 6)
        await s.empty()
        await s.end(worker)
        assert sorted(seen) == [(0, 1), (1, 1), (2, 1), (3, 3), (4, 1), (5, 1)]
        assert (await s.pond.queue("next").counts()).ready == 6
        assert worker.counts()["retry"] == 2


async def test_two_workers_do_each_message_once(site: MakeSite) -> None:
    async with site() as s:
        seen: list[bytes] = []

        @s.pond.consumer("q", concurrency=5)
        async def handler(payload: bytes) -> None:
            seen.append(payload)
            await asyncio.sleep(0)

        payloads = [b"%d" % number for number in range(60)]
        await s.queue.enqueue_many(payloads)
        workers = [s.start(), s.start()]
        await s.empty()
        for worker in workers:
            await s.end(worker)
        assert sorted(seen) == sorted(payloads)
