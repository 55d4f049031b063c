"""`millpond.service.states`: every refusal, and what is decided anew."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from millpond import InvalidInput, LeaseLost, MessageNotFound, StateConflict, StoreError, TooLarge
from millpond.errors import StoreCorrupt, StoreMismatch
from millpond.service.states import STATE_FORMAT, StateDocument, Write
from millpond.stores.base import Cause, Conflict, PutState
from millpond.stores.faulty import Gate, hold, nth

if TYPE_CHECKING:
    from tests.unit.service.conftest import Bench

    from millpond.service.consuming import Delivery

UNKNOWN = "0197a3c2-0000-7000-8000-000000000001"


async def held(bench: Bench, **options: Any) -> Delivery:
    """A message of the queue, leased."""
    await bench.queue.enqueue(b"x", **options)
    [delivery] = await bench.service.claim(None, "q")
    return delivery


async def stored(bench: Bench, delivery: Delivery) -> StateDocument | None:
    """The state as another process reads it."""
    found = await bench.other.service.load_state(None, "q", delivery.id)
    return None if found is None else found.document


async def test_the_format_is_as_written_down(bench: Bench) -> None:
    async with bench.pond:
        delivery = await held(bench)
        await bench.service.save_state(delivery, {"step": 1})
        assert delivery.record is not None
        document = await bench.memory.state(delivery.record.item)
        assert document is not None
        now = bench.clock.now_ms()
        assert msgspec.msgpack.decode(document.data) == {
            "format": 1,
            "value": {"step": 1},
            "created_at": now,
            "updated_at": now,
            "version": 1,
        }


async def test_a_state_remembers_when_it_was_made_and_when_it_was_changed(bench: Bench) -> None:
    async with bench.pond:
        delivery = await held(bench)
        made = bench.clock.now_ms()
        await bench.service.save_state(delivery, 1)
        bench.clock.advance(5)
        await bench.service.save_state(delivery, 2)
        assert await stored(bench, delivery) == StateDocument(STATE_FORMAT, 2, made, made + 5000, 2)


async def test_what_was_read_cannot_be_changed(bench: Bench) -> None:
    async with bench.pond:
        delivery = await held(bench)
        await bench.service.save_state(delivery, 1)
        found = await bench.service.load_state(None, "q", delivery.id)
        assert found is not None
        for target, name in ((found, "etag"), (found.document, "value")):
            with pytest.raises(AttributeError, match="immutable"):
                setattr(target, name, None)


async def test_no_message_no_state(bench: Bench) -> None:
    async with bench.pond:
        with pytest.raises(MessageNotFound, match=UNKNOWN):
            await bench.service.load_state(None, "q", UNKNOWN)
        delivery = await held(bench)
        assert await bench.service.load_state(None, "q", delivery.id) is None


async def _put_raw(bench: Bench, delivery: Delivery, data: bytes) -> None:
    record = await bench.service.load("default", "q", delivery.id)
    assert record is not None
    await bench.memory.write([PutState(record.item, record.mark, None, data)])


async def test_what_is_no_state_is_named(bench: Bench) -> None:
    async with bench.pond:
        delivery = await held(bench)
        await _put_raw(bench, delivery, b"\xc1")
        with pytest.raises(StoreCorrupt, match=f"state of message {delivery.id} in default/q cannot be decoded"):
            await bench.service.load_state(None, "q", delivery.id)


async def test_a_newer_format_is_refused_by_name_and_left_alone(bench: Bench) -> None:
    async with bench.pond:
        delivery = await held(bench)
        newer = msgspec.msgpack.encode(StateDocument(STATE_FORMAT + 1, 1, 0, 0))
        await _put_raw(bench, delivery, newer)
        for call in (
            bench.service.load_state(None, "q", delivery.id),
            bench.service.save_state(delivery, 2),
            bench.service.delete_state(delivery),
        ):
            step: Awaitable[Any] = call
            with pytest.raises(StoreMismatch, match="format 2; this Millpond reads up to 1"):
                await step
        assert delivery.record is not None
        document = await bench.memory.state(delivery.record.item)
        assert document is not None
        assert document.data == newer


async def test_what_cannot_be_encoded_is_refused(bench: Bench) -> None:
    async with bench.pond:
        delivery = await held(bench)
        for value in (object(), {1: {2: object()}}, 1 << 70):
            with pytest.raises(InvalidInput, match="the state cannot be encoded"):
                await bench.service.save_state(delivery, value)
        assert await stored(bench, delivery) is None


async def test_the_limit_is_exact(bench: Bench) -> None:
    async with bench.pond:
        delivery = await held(bench)
        empty = len(msgspec.msgpack.encode(StateDocument(STATE_FORMAT, b"", bench.clock.now_ms(), 1 << 40)))
        fits = bytes(bench.pond.config.max_state_bytes - empty)
        with pytest.raises(TooLarge, match="201 bytes, more than the limit of 200"):
            await bench.service.save_state(delivery, fits + b"x")
        assert await stored(bench, delivery) is None
        await bench.service.save_state(delivery, fits)
        document = await stored(bench, delivery)
        assert document is not None
        assert len(msgspec.msgpack.encode(document)) == 200


async def test_each_version_can_be_asked_for(bench: Bench) -> None:
    async with bench.pond:
        service = bench.service
        delivery = await held(bench)
        with pytest.raises(StateConflict, match="version 7"):
            await service.save_state(delivery, 1, etag="7")
        first = await service.save_state(delivery, 1, etag=None)
        with pytest.raises(StateConflict, match="version none"):
            await service.save_state(delivery, 2, etag=None)
        second = await service.save_state(delivery, 2, etag=first)
        assert second != first
        for refused in (
            service.save_state(delivery, 3, etag=first),
            service.delete_state(delivery, etag=first),
        ):
            step: Awaitable[Any] = refused
            with pytest.raises(StateConflict, match=f"version {first}"):
                await step
        document = await stored(bench, delivery)
        assert document is not None
        assert document.value == 2
        await service.delete_state(delivery, etag=second)
        assert await stored(bench, delivery) is None
        with pytest.raises(StateConflict, match="has no state"):
            await service.delete_state(delivery, etag=second)
        await service.delete_state(delivery)


async def test_an_empty_state_is_made_once(bench: Bench) -> None:
    async with bench.pond:
        delivery = await held(bench)
        etag = await bench.service.ensure_state_exists(delivery)
        document = await stored(bench, delivery)
        assert document is not None
        assert document.value is None
        assert await bench.service.ensure_state_exists(delivery) == etag
        later = await bench.service.save_state(delivery, "kept")
        assert await bench.service.ensure_state_exists(delivery) == later
        document = await stored(bench, delivery)
        assert document is not None
        assert document.value == "kept"


async def _meanwhile(bench: Bench, step: Callable[[], Awaitable[Any]], method: str, call: Awaitable[Any]) -> Any:
    """``call``, with ``step`` happening before its first ``method`` reaches the store."""
    gate = Gate()
    bench.faulty.plan = nth(1, method, hold(gate))
    task = asyncio.ensure_future(call)
    await gate.reached.wait()
    await step()
    gate.open()
    return await task


async def test_an_empty_state_that_another_makes_first_is_that_ones(bench: Bench) -> None:
    async with bench.pond, bench.other as other:
        delivery = await held(bench)
        record = delivery.record
        twin = other.queue("q").handle(delivery.id, delivery.lease_id, delivery.token)
        await _meanwhile(bench, lambda: twin.state.save("first"), "write", bench.service.ensure_state_exists(delivery))
        document = await stored(bench, delivery)
        assert document is not None
        assert document.value == "first"
        assert delivery.record == record


async def test_a_save_of_whatever_version_is_decided_anew(bench: Bench) -> None:
    async with bench.pond, bench.other as other:
        delivery = await held(bench)
        twin = other.queue("q").handle(delivery.id, delivery.lease_id, delivery.token)
        await _meanwhile(bench, lambda: twin.state.save("first"), "write", bench.service.save_state(delivery, "second"))
        document = await stored(bench, delivery)
        assert document is not None
        assert document.value == "second"
        await _meanwhile(bench, lambda: twin.state.save("third"), "write", bench.service.delete_state(delivery))
        assert await stored(bench, delivery) is None


async def test_what_a_deletion_leaves_is_no_state_and_goes_with_the_ack(bench: Bench) -> None:
    async with bench.pond:
        delivery = await held(bench)
        service = bench.service
        kept = await service.save_state(delivery, "old", write=Write("me", 1))
        await service.delete_state(delivery, write=Write("me", 3))
        assert await stored(bench, delivery) is None
        assert await service.held_state(delivery) is None
        # Earlier ones that come late, with a version or without.
        await service.save_state(delivery, "old", write=Write("me", 2))
        for etag in (kept, None):
            with pytest.raises(StateConflict):
                await service.save_state(delivery, "old", etag=etag, write=Write("me", 2))
        await service.delete_state(delivery, etag=kept, write=Write("me", 2))
        assert await stored(bench, delivery) is None
        # Later ones, and those of others, find that there is none.
        with pytest.raises(StateConflict):
            await service.delete_state(delivery, etag=kept)
        await service.delete_state(delivery)
        etag = await service.ensure_state_exists(delivery)
        document = await stored(bench, delivery)
        assert document is not None
        assert (document.value, document.version, document.created_at) == (None, 1, bench.clock.now_ms())
        await service.delete_state(delivery, etag=etag, write=Write("me", 4))
        await service.save_state(delivery, "new", etag=None, write=Write("me", 5))
        document = await stored(bench, delivery)
        assert document is not None
        assert document.value == "new"
        await service.delete_state(delivery, write=Write("me", 6))
        assert delivery.record is not None
        item = delivery.record.item
        assert await bench.memory.state(item) is not None
        await service.ack(delivery)
        assert await bench.memory.state(item) is None


async def test_a_deletion_of_nothing_keeps_an_earlier_save_away_too(bench: Bench) -> None:
    async with bench.pond:
        delivery = await held(bench)
        await bench.service.delete_state(delivery, write=Write("me", 2))
        await bench.service.save_state(delivery, "old", write=Write("me", 1))
        assert await stored(bench, delivery) is None
        await bench.service.save_state(delivery, "another's", write=Write("other", 1))
        document = await stored(bench, delivery)
        assert document is not None
        assert document.value == "another's"


async def test_a_lease_that_ends_meanwhile_changes_nothing(bench: Bench) -> None:
    async with bench.pond, bench.other as other:
        delivery = await held(bench, visibility=10)
        await bench.service.save_state(delivery, "mine")

        async def taken() -> None:
            bench.clock.advance(11)
            [message] = await other.queue("q").receive()
            await message.state.save("theirs")

        with pytest.raises(LeaseLost):
            await _meanwhile(bench, taken, "write", bench.service.save_state(delivery, "late"))
        for late in (
            bench.service.save_state(delivery, "late"),
            bench.service.delete_state(delivery),
            bench.service.ensure_state_exists(delivery),
        ):
            step: Awaitable[Any] = late
            with pytest.raises(LeaseLost):
                await step
        document = await stored(bench, delivery)
        assert document is not None
        assert document.value == "theirs"


async def test_nothing_to_delete_is_no_proof_of_the_lease(bench: Bench) -> None:
    """There is no write that could be refused, so the record is read."""
    async with bench.pond, bench.other as other:
        delivery = await held(bench, visibility=10)
        bench.clock.advance(11)
        assert len(await other.queue("q").receive()) == 1
        assert delivery.record is not None, "by what it knows, it still holds the message"
        with pytest.raises(LeaseLost):
            await bench.service.delete_state(delivery)


async def test_a_handle_reads_its_record_once(bench: Bench) -> None:
    async with bench.pond:
        delivery = await held(bench)
        delivery.record = None
        bench.faulty.calls.clear()
        await bench.service.save_state(delivery, 1)
        await bench.service.save_state(delivery, 2)
        assert bench.calls("get") == 1


@pytest.mark.parametrize("step", ["save", "delete", "ensure", "annotate"])
async def test_what_never_wins_ends_with_an_error_that_says_so(bench: Bench, step: str) -> None:
    async with bench.pond, bench.other:
        delivery = await held(bench)
        if step == "delete":
            await bench.service.save_state(delivery, 1)
        bench.never_win()
        steps: dict[str, Callable[[], Awaitable[Any]]] = {
            "save": lambda: bench.service.save_state(delivery, 1),
            "delete": lambda: bench.service.delete_state(delivery),
            "ensure": lambda: bench.service.ensure_state_exists(delivery),
            "annotate": lambda: bench.service.save_message_document(delivery, last_error="x"),
        }
        with pytest.raises(StoreError, match="keeps changing; try again"):
            await steps[step]()


async def test_an_empty_state_that_is_never_there_when_looked_for(bench: Bench) -> None:
    """A feed of conflicts without a state to show for them does not go on for ever."""
    async with bench.pond:
        delivery = await held(bench)

        async def refuse(ops: Any) -> Any:
            return [Conflict(Cause.STATE, delivery.id)]

        bench.faulty.write = refuse  # type: ignore[method-assign]
        with pytest.raises(StoreError, match="keeps changing; try again"):
            await bench.service.ensure_state_exists(delivery)
