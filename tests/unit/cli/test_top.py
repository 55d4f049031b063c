"""What `millpond top` reads, draws, and does at a key."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from rich.console import Console

import millpond
from millpond import testing
from millpond.cli import snapshot
from millpond.cli.screen import HELP, Screen, View, keys_in
from millpond.errors import StoreBusy
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.store import ObjectStore


async def fill(pond: testing.TestPond) -> None:
    """Two queues of one's own and one of Millpond's."""
    orders = pond.queue("orders")
    await orders.enqueue_many([b"x"] * 10)
    for owner, count in (("worker-1", 3), ("worker-2", 1)):
        await orders.receive(count, owner=owner, visibility=60)
    for message in await orders.receive(2):
        await message.nack(error={"type": "ValueError", "message": "no flour", "traceback": "…"}, delay=100)
    for message in await orders.receive(2):
        await message.bury("gave_up", error="sour")
    await pond.queue("mails").enqueue(b"x")
    await pond.queue("millpond.limit.rate.orders").enqueue(b"0")
    await pond.advance(5)


async def names(pond: millpond.Pond) -> list[tuple[str, str]]:
    return [(at, name) for at, name in await pond.queues()]


def drawn(view: View, height: int = 30, width: int = 110) -> str:
    console = Console(width=width, height=height, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(view.draw(height))
    console.file.close()
    return console.export_text()


async def test_a_snapshot_counts_and_tells_who_holds_what_and_what_went_wrong() -> None:
    async with testing.pond() as pond:
        await fill(pond)
        found = await snapshot.take(pond, await names(pond))
        assert [one.queue for one in found.queues] == ["mails", "orders"]
        orders = found.queues[1]
        more = await snapshot.details(pond, orders)
        assert [(who, number) for who, number, _ in more.owners] == [("worker-1", 3), ("worker-2", 1)]
        assert more.owners[0][2] == 55
        assert more.errors == (("ValueError: no flour", 2),)
        assert more.dead == (("gave_up: sour", 2),)
        assert not more.partial
        line = snapshot.record(orders, more)
        assert (line["ready"], line["delayed"], line["leased"], line["dead"], line["paused"]) == (2, 2, 4, 2, False)
        assert line["owners"][0] == {"owner": "worker-1", "messages": 3, "lease_ends_in": 55.0}
        assert (await snapshot.take(pond, await names(pond), internal=True)).queues[1].queue.startswith("millpond.")


async def test_rates_are_told_from_two_snapshots() -> None:
    async with testing.pond() as pond:
        await fill(pond)
        first = await snapshot.take(pond, await names(pond))
        assert first.queues[0].change is None
        await pond.queue("mails").enqueue_many([b"x"] * 8)
        await pond.advance(4)
        second = await snapshot.take(pond, await names(pond), before=first)
        assert second.queues[0].change == 2.0
        assert (second.queues[0].enqueued_rate, second.queues[0].done_rate) == (2.0, 0.0)
        again = await snapshot.take(pond, await names(pond), before=second)
        assert again.queues[0].change == again.queues[0].enqueued_rate == 2.0  # no time has passed


async def test_what_comes_and_what_goes_is_told_apart_though_the_queue_stays_as_long_as_it_was() -> None:
    """It once showed the net change alone: nothing at all for a queue that is worked off as fast as it fills."""
    async with testing.pond() as pond:
        queue = pond.queue("busy")
        await queue.enqueue_many([b"x"] * 3)
        first = await snapshot.take(pond, await names(pond))
        for _ in range(10):
            await queue.enqueue_many([b"x"] * 4)
            for message in await queue.receive(4):
                await message.ack()
        [buried] = await queue.receive()
        await buried.bury("hopeless")
        await pond.advance(5)
        second = await snapshot.take(pond, await names(pond), before=first)
        [busy] = second.queues
        assert (busy.change, busy.dead_change, busy.enqueued_rate, busy.done_rate) == (-0.2, 0.2, 8.0, 8.0)
        view = View()
        view.show(second, snapshot.Details())
        text = drawn(view)
        assert "in/s" in text
        assert "out/s" in text
        assert text.count("8.0") == 2
        line = snapshot.record(busy, snapshot.Details())
        assert (line["enqueued_rate"], line["done_rate"]) == (8.0, 8.0)


async def test_looks_that_follow_one_another_quickly_tell_a_rate_all_the_same() -> None:
    """With --interval 300ms, or a key held down, there once was never a rate."""
    async with testing.pond() as pond:
        queue = pond.queue("busy")
        await queue.enqueue(b"x")
        last = first = await snapshot.take(pond, await names(pond))
        rates = []
        for _ in range(6):
            await queue.enqueue_many([b"x"] * 3)
            await pond.advance(0.3)
            last = await snapshot.take(pond, await names(pond), before=last)
            rates.append(last.queues[0].enqueued_rate)
            assert last.basis is None or last.basis.basis is None  # they do not pile up
        assert rates == [None, 10.0, 10.0, 10.0, 10.0, 10.0]
        assert first.basis is None


async def test_where_the_store_counts_nothing_it_is_the_change_that_is_told() -> None:
    clock = testing.ManualClock()
    store = ObjectStore(MemoryBucket(clock=clock), clock=clock, measure_skew=False)
    async with testing.pond(store=store, clock=clock) as pond:
        first = await snapshot.take(pond, [("default", "q")])
        await pond.queue("q").enqueue_many([b"x"] * 8)
        await pond.advance(4)
        second = await snapshot.take(pond, [("default", "q")], before=first)
        [one] = second.queues
        assert (one.change, one.enqueued_rate, one.done_rate) == (2.0, None, None)
        view = View()
        view.show(second, snapshot.Details())
        assert "±/s" in drawn(view)
        assert "out/s" not in drawn(view)


async def test_a_queue_that_was_forgotten_and_counts_anew_has_no_rate_for_a_while() -> None:
    async with testing.pond() as pond:
        await pond.queue("q").enqueue_many([b"x"] * 8)
        first = await snapshot.take(pond, [("default", "q")])
        for message in await pond.queue("q").receive(8):
            await message.ack()
        await pond.collect()
        await pond.queue("q").enqueue(b"x")
        await pond.advance(4)
        [one] = (await snapshot.take(pond, [("default", "q")], before=first)).queues
        assert one.enqueued_rate is None or one.enqueued_rate == 0.25


async def test_reads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "MESSAGES", 3)
    monkeypatch.setattr(snapshot, "QUEUES", 1)
    async with testing.pond() as pond:
        await fill(pond)
        found = await snapshot.take(pond, [("default", "orders"), ("default", "mails")])
        assert (len(found.queues), found.left_out) == (1, 1)
        more = await snapshot.details(pond, found.queues[0])
        assert more.partial
        assert sum(number for _, number, _ in more.owners) == 3


async def test_what_is_drawn() -> None:
    async with testing.pond() as pond:
        await fill(pond)
        view = View()
        found = await snapshot.take(pond, await names(pond))
        view.show(found, snapshot.Details())
        view.move(1)
        assert view.current is not None
        view.show(found, await snapshot.details(pond, view.current))
        text = drawn(view)
        for part in ("orders", "mails", "held by", "worker-1", "ValueError: no flour", "gave_up: sour", HELP[:10]):
            assert part in text
        assert len(drawn(view, height=12).rstrip().splitlines()) <= 14


async def test_control_characters_of_messages_do_not_reach_the_terminal() -> None:
    async with testing.pond() as pond:
        await pond.queue("q").enqueue(b"x")
        [message] = await pond.queue("q").receive()
        await message.bury("\x1b[2Jgone")
        view = View()
        found = await snapshot.take(pond, await names(pond))
        view.show(found, await snapshot.details(pond, found.queues[0]))
        assert "\x1b[2J" not in drawn(view)
        assert "gone" in drawn(view)


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        (b"q", ["quit"]),
        (b"\x1b[A\x1b[Bjk", ["up", "down", "down", "up"]),
        (b"\x1bOA", ["up"]),
        (b"\x1b[5~", ["other"]),
        (b"\x1b", ["other"]),
        (b"zp", ["other", "pause"]),
        (b"\x03", ["quit"]),
        (b"", []),
    ],
)
def test_keys(data: bytes, keys: list[str]) -> None:
    assert keys_in(data) == keys


async def screen(pond: testing.TestPond) -> Screen:
    made = Screen(pond, lambda: names(pond), 2.0, internal=False)
    await made._look()
    return made


async def test_keys_pause_and_redrive_the_chosen_queue() -> None:
    async with testing.pond() as pond:
        await fill(pond)
        made = await screen(pond)
        orders = pond.queue("orders")
        await made.press("down")
        await made.press("pause")
        assert (await orders.policy()).paused
        assert made.view.said == "orders is paused"
        await made._look()
        await made.press("pause")
        assert not (await orders.policy()).paused
        await made.press("redrive")
        assert "y redrives" in made.view.said
        assert (await orders.counts()).dead == 2
        await made.press("yes")
        assert (await orders.counts()).dead == 0
        assert made.view.said == "2 redriven into orders"


async def test_only_a_yes_that_was_asked_for_redrives() -> None:
    async with testing.pond() as pond:
        await fill(pond)
        made = await screen(pond)
        await made.press("down")
        await made.press("yes")
        await made.press("redrive")
        await made.press("down")
        await made.press("yes")
        assert (await pond.queue("orders").counts()).dead == 2
        await made.press("up")
        await made.press("redrive")
        assert made.view.said == "mails has no dead letters"


async def test_the_chosen_queue_stays_chosen_when_others_come() -> None:
    async with testing.pond() as pond:
        await fill(pond)
        made = await screen(pond)
        await made.press("down")
        await pond.queue("aaa").enqueue(b"x")
        await made._look()
        assert made.view.current is not None
        assert made.view.current.queue == "orders"
        await made.press("internal")
        await made._look()
        assert len(made.view.snapshot.queues) == 4


async def test_what_the_store_cannot_tell_now_is_said_and_the_rest_stays() -> None:
    async with testing.pond() as pond:
        await fill(pond)
        made = await screen(pond)

        async def busy(*arguments: Any) -> Any:
            raise StoreBusy("somebody writes")

        pond.service.counts = busy  # type: ignore[method-assign]
        await made._look()
        assert made.view.said == "somebody writes [store_busy]"
        assert len(made.view.snapshot.queues) == 2


async def test_it_looks_again_after_its_interval_and_at_once_at_a_key() -> None:
    async with testing.pond() as pond:
        await fill(pond)
        made = await screen(pond)
        waiting = asyncio.create_task(made._wait())
        await pond.settle()
        assert not waiting.done()
        await pond.advance(2)
        assert await waiting
        made._pressed.append("quit")
        assert not await made._wait()
