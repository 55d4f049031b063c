"""What docs/format.md says of a bucket: real messages in a bucket in memory, and the page's own words about them."""

from __future__ import annotations

import contextlib
import datetime
import io
import random
import re
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from millpond.errors import LeaseLost, MessageNotFound, StoreError
from millpond.pond import Pond
from millpond.stores.objects import names, records
from millpond.stores.objects.engine import OLD
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.records import Kind
from millpond.stores.objects.store import INLINE_LIMIT, ObjectStore
from millpond.testing import ManualClock

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
BUCKET = PAGE[PAGE.index("## In a bucket") :]
PREFIX = "jobs/"
NINE = int(datetime.datetime(2026, 3, 2, 9, tzinfo=datetime.UTC).timestamp() * 1000)
"""When the example begins."""
CHANCE = re.compile(r"(?<![0-9a-f])([0-9a-f]{12})[0-9a-f]{20}(?![0-9a-f])|(?<=-)[0-9a-f]{16}$", re.MULTILINE)
"""The part of a key, an id or a payload's name that is chance."""


class Shown(NamedTuple):
    """A line of the page's listing."""

    written: str
    size: int
    name: str


def listing() -> list[Shown]:
    [block] = re.findall(r"```listing\n(.*?)```", BUCKET, re.DOTALL)
    lines = [re.fullmatch(r"(\S+ \S+) +(\d+) (\S+)", line) for line in block.splitlines()]
    return [Shown(line[1], int(line[2]), line[3].removeprefix(PREFIX)) for line in lines if line]


def python_blocks() -> list[tuple[str, str]]:
    """Each Python block of the page and what it says that this prints."""
    return re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", BUCKET, re.DOTALL)


def table_after(title: str) -> list[str]:
    part = BUCKET[BUCKET.index(title) :].split("\n\n")[1]
    return re.findall(r"^\| \d+ \| `(\w+)` \|", part, re.MULTILINE)


class Bench:
    """A bucket, and ponds on it."""

    def __init__(self) -> None:
        self.clock = ManualClock(NINE)
        self.bucket = MemoryBucket(clock=self.clock)
        self.chance = random.Random(7)

    def pond(self) -> Pond:
        store = ObjectStore(
            self.bucket.share(), clock=self.clock, measure_skew=False, random_bytes=self.chance.randbytes
        )
        return Pond(store, clock=self.clock, random_bytes=self.chance.randbytes)

    def names(self, part: str) -> list[str]:
        return [name for name in self.bucket.objects if part in name]

    async def listed(self) -> list[Shown]:
        found = []
        async for page in self.bucket.list(""):
            for entry in page:
                moment = datetime.datetime.fromtimestamp(entry.modified / 1000, datetime.UTC)
                found.append(Shown(f"{moment:%Y-%m-%d %H:%M:%S}", entry.size, entry.name))
        return found


async def play_the_example(bench: Bench, pond: Pond) -> None:
    orders = pond.queue("orders")
    await orders.set_policy(max_attempts=1)
    await orders.enqueue(b'{"sku": "oops"}', dedup_key="order-4711")
    [message] = await orders.receive()
    await message.nack(error="no such flour")
    for payload, options in (
        (b'{"sku": "rye-1kg"}', {"priority": 9}),
        (b'{"sku": "spelt-5kg"}', {}),
        (b'{"sku": "oat-500g"}', {"delay": 3600}),
        (bytes(1_000_000), {"ttl": 86_400}),
        (b'{"sku": "rye-5kg"}', {"ordering_key": "customer-7"}),
    ):
        bench.clock.advance(1)
        await orders.enqueue(payload, **options)
    bench.clock.advance(1)
    [message] = await orders.receive()
    assert message.payload == b'{"sku": "rye-1kg"}'


def masked(lines: list[Shown]) -> list[Shown]:
    return sorted(line._replace(name=CHANCE.sub(r"\1~", line.name)) for line in lines)


async def test_the_listing_is_that_of_a_real_queue() -> None:
    bench = Bench()
    async with bench.pond() as pond:
        await play_the_example(bench, pond)
        assert masked(await bench.listed()) == masked(listing())
        assert len(listing()) == 10


async def test_the_words_about_the_listing_are_true() -> None:
    blob, dead, held, small, large, later, grouped = (line for line in listing() if re.search("/[bdm]/", line.name))
    assert names.parse_blob(blob.name) is not None
    parsed = [names.parse(line.name) for line in (dead, held, small, large, later, grouped)]
    assert [name.lane for name in parsed] == ["", "0", "4", "4", "4", "o"]
    assert [name.priority for name in parsed] == [None, 9, 5, 5, 5, 5]
    assert f"`{parsed[3].id}`" in BUCKET
    assert blob.name.split("/")[-1].startswith(names.hex_id(parsed[3].id))
    kinds = [records.form(line.size).kind for line in (dead, held, small, large, later, grouped)]
    assert kinds == [Kind.PLAIN, Kind.HELD, *[Kind.PLAIN] * 4]
    assert (held.size % 256, records.stays(records.form(held.size).code)) == (0x52, 16_000)
    assert (parsed[2].size, parsed[3].size) == (0x14, 1_000_000)
    assert parsed[3].expires == NINE + 4_000 + 86_400_000
    assert parsed[4].time == NINE + 3_000 + 3_600_000
    assert all(name.key == names.id_number(name.id) for name in parsed)
    assert parsed[5].group == names.group_hash("customer-7")
    [marker] = [line.name for line in listing() if "/u/" in line.name]
    assert marker == names.unique_marker("default", "orders", "order-4711")


async def test_the_snippets_read_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    async with bench.pond() as pond:
        await play_the_example(bench, pond)
        [dead] = bench.names("/d/")
        (tmp_path / "message").write_bytes(bench.bucket.objects[dead])
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks()
    assert len(blocks) == 2
    for code, shown in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "docs/format.md", "exec"), {})
        assert printed.getvalue() == shown


@pytest.mark.parametrize(
    ("title", "struct"),
    [
        ("**Message** (kinds", records.Record),
        ("**Intent** (kind 4)", records.Intent),
        ("**Tombstone** (kind 5)", records.Tombstone),
        ("**Marker** (", records.Marker),
        ("**Pointer** (", records.Pointer),
        ("**Document** (", records.Text),
    ],
)
def test_the_fields_are_those_of_the_code(title: str, struct: Any) -> None:
    assert table_after(title) == list(struct.__struct_fields__)
    assert records.Target.__struct_fields__ == ("path", "data", "birth")
    assert records.Goal.__struct_fields__ == ("path", "data", "target")


def test_the_kinds_and_numbers_are_those_of_the_code() -> None:
    kinds = re.findall(r"^\| (\d) \| `([A-Z]+)` \|", BUCKET, re.MULTILINE)
    assert {name: int(number) for number, name in kinds} == {kind.name: kind.value for kind in Kind}
    assert records.FORMAT == 1
    assert records.WRITE_ID_BYTES == 16
    assert names.HASH == 16
    assert names.KEY_BITS == 4 * 20
    assert (INLINE_LIMIT, OLD) == (64 * 1024, 60_000)
    assert [records.Standing(number).name for number in range(3)] == ["PENDING", "CONFIRMED", "GOING"]
    for code in range(1, 16):
        assert records.stays(code) == 1000 * 2 ** (code - 1)


def test_every_name_that_the_store_gives_is_in_the_table() -> None:
    table = BUCKET[: BUCKET.index("### Names of messages")]
    shown = set(re.findall(r"`([^` ]+)`", table))
    given = re.findall(r"^    (\S+) {2,}", names.__doc__ or "", re.MULTILINE)
    assert len(given) == 11
    for name in given:
        page = name.replace("<namespace>/<queue>", "default/orders").replace("probe/<chance>/…", "probe/…")
        assert page in shown, name


async def test_a_message_id_leads_to_its_object() -> None:
    bench = Bench()
    chosen = "7d2f7c1e-5a34-4f0b-9c57-0d6f0b1c2a11"
    async with bench.pond() as pond:
        orders = pond.queue("orders")
        first = (await orders.enqueue(b"1")).message_id
        later = (await orders.enqueue(b"2", delay=60, priority=0)).message_id
        await orders.enqueue(b"3", message_id=chosen)
        died = (await orders.enqueue(b"4", priority=9, max_attempts=1)).message_id
        [message] = await orders.receive()
        assert message.id == died
        await message.nack()
        bench.clock.advance(1)

        def found(id: str) -> list[str]:
            return [name for name in bench.names(names.hex_id(id)) if "/i/" not in name]

        [direct], [delayed] = found(first), found(later)
        assert direct.startswith(f"q/default/orders/m/4/{names.hex_id(first)}-")
        assert delayed.startswith(f"q/default/orders/m/9/{names.hex_id(later)}-")
        assert found(died)[0].startswith(f"q/default/orders/d/{names.hex_id(died)}-")
        assert marker_place(bench, chosen) == found(chosen)[0].removeprefix("q/default/orders/")
        assert not found(chosen)[0].split("/")[-1].startswith(names.hex_id(chosen))

        await pond.queue("orders").dead_letters.redrive([died])
        [redriven] = found(died)
        assert not redriven.split("/")[-1].startswith(names.hex_id(died))
        place = marker_place(bench, died)
        assert place == redriven.removeprefix("q/default/orders/")
        [again] = await orders.receive()
        assert again.id == died
        await again.nack()
        # The marker is old by one step now.
        assert marker_place(bench, died) == place
        assert found(died) == [f"q/default/orders/d/{place.split('/')[-1]}"]


def marker_place(bench: Bench, id: str) -> str:
    marker = msgspec.msgpack.decode(bench.bucket.objects[f"q/default/orders/i/{names.hex_id(id)}"])
    return str(marker[6])


# What may be deleted by hand


async def only(bench: Bench, part: str) -> str:
    [name] = bench.names(part)
    await bench.bucket.delete(name)
    return name


async def test_a_message_that_is_deleted_by_hand_is_lost_and_no_more() -> None:
    bench = Bench()
    async with bench.pond() as pond, bench.pond() as other:
        orders = pond.queue("orders")
        await orders.enqueue(b"1", ordering_key="a")
        second = (await orders.enqueue(b"2", ordering_key="a")).message_id
        [message] = await orders.receive()
        await bench.bucket.delete(bench.names("/m/o/")[0])
        with pytest.raises((LeaseLost, MessageNotFound)):
            await message.extend(60)
        [after] = await other.queue("orders").receive()
        assert after.id == second
        await after.ack()
        assert await pond.verify() == []


async def test_an_ack_well_inside_its_lease_does_not_notice_that_its_message_was_deleted() -> None:
    bench = Bench()
    async with bench.pond() as pond:
        orders = pond.queue("orders")
        for _ in range(2):
            await orders.enqueue(b"1")
        early, late = await orders.receive(count=2)
        for name in bench.names("/m/"):
            await bench.bucket.delete(name)
        await early.ack()
        bench.clock.advance(25)
        with pytest.raises((LeaseLost, MessageNotFound)):
            await late.ack()


async def test_what_is_damaged_is_passed_over_and_named_and_holds_up_its_ordering_key() -> None:
    bench = Bench()
    async with bench.pond() as pond:
        orders = pond.queue("orders")
        await orders.enqueue(b"damaged")
        await orders.enqueue(b"damaged, too", ordering_key="a")
        for name in bench.names("/m/"):
            found = await bench.bucket.read(name)
            assert found is not None
            await bench.bucket.replace(name, found.data[:-256], found.tag)
        bench.clock.advance(1)
        await orders.enqueue(b"behind it", ordering_key="a")
        good = (await orders.enqueue(b"good")).message_id
        damaged = bench.names("/m/4/")[0]
    async with bench.pond() as pond:
        orders = pond.queue("orders")
        assert [message.id for message in await orders.receive(count=10)] == [good]
        problems = await pond.verify()
        assert len(problems) == 2
        assert all("is cut short or was changed" in problem.what for problem in problems)
        await pond.discard_unreadable("orders", names.parse(damaged).id)
        [problem] = await pond.verify()
        await bench.bucket.delete(problem.where.removeprefix("object "))
        [message] = await orders.receive(count=10)
        assert message.payload == b"behind it"
        assert await pond.verify() == []


async def test_the_notes_that_may_be_deleted_may_be_deleted() -> None:
    bench = Bench()
    async with bench.pond() as pond:
        orders = pond.queue("orders")
        first = await orders.enqueue(b"1", dedup_key="k")
        assert (await orders.enqueue(b"1", dedup_key="k")).message_id == first.message_id
        await only(bench, "/u/")
        assert (await orders.enqueue(b"1", dedup_key="k")).message_id != first.message_id
        await orders.pause()
        assert await orders.receive() == []
        await only(bench, "/policy")
        bench.clock.advance(60)
        assert len(await orders.receive(count=10)) == 2
    await only(bench, "millpond.json")
    async with bench.pond() as pond:
        assert len(bench.names("millpond.json")) == 1
        assert (await pond.queue("orders").counts()).leased == 2


async def test_an_id_marker_must_stay_while_its_message_is_there() -> None:
    bench = Bench()
    chosen = "7d2f7c1e-5a34-4f0b-9c57-0d6f0b1c2a11"
    async with bench.pond() as pond:
        await pond.queue("orders").enqueue(b"1", message_id=chosen)
    await only(bench, "/i/")
    async with bench.pond() as pond:
        orders = pond.queue("orders")
        with pytest.raises(MessageNotFound):
            await orders.get(chosen)
        assert not (await orders.enqueue(b"2", message_id=chosen)).duplicate
        assert len(bench.names(names.hex_id(chosen))) == 3


async def test_what_is_restored_or_copied_is_handed_out_again_or_refused() -> None:
    bench = Bench()
    async with bench.pond() as pond:
        orders = pond.queue("orders")
        await orders.enqueue(b"1")
        [message] = await orders.receive()
        [name] = bench.names("/m/")
        old = bench.bucket.objects[name]
        await message.ack()
        token = message.lease.token
    # From an old version: held until its lease ends, and then a delivery like any other.
    await bench.bucket.create(name, old)
    bench.clock.advance(60)
    async with bench.pond() as pond:
        [again] = await pond.queue("orders").receive()
        assert (again.payload, again.lease.token) == (b"1", token + 1)
        # Beside itself under another key, and in another queue.
        parsed = names.parse(name)
        copy = name.replace(names.key_prefix(parsed.key), names.key_prefix(parsed.key + 1), 1)
        await bench.bucket.create(copy, old)
        foreign = name.replace("/orders/", "/invoices/")
        await bench.bucket.create(foreign, old)
    async with bench.pond() as pond:
        # Their sizes say that they are held for 16 seconds after they were written.
        bench.clock.advance(20)
        [beside] = await pond.queue("orders").receive()
        assert beside.id == again.id
        assert await pond.queue("invoices").receive() == []
        problems = {problem.where: problem.what for problem in await pond.verify()}
    assert "copied or renamed" in problems[f"object {foreign}"]
    assert "it is there twice" in problems[f"message {again.id}"]


async def test_without_its_pointer_listings_keep_an_ordering_key_in_order_and_it_is_made_again() -> None:
    bench = Bench()
    async with bench.pond() as mine, bench.pond() as theirs:
        for payload in (b"1", b"2"):
            await mine.queue("orders").enqueue(payload, ordering_key="a")
        [first] = await mine.queue("orders").receive()
        assert first.payload == b"1"
        await only(bench, "/g/")
        assert await theirs.queue("orders").receive() == []
        assert bench.names("/g/") == []
        await first.ack()
        bench.clock.advance(1)
        [second] = await theirs.queue("orders").receive()
        assert second.payload == b"2"
        assert len(bench.names("/g/")) == 1


async def test_an_intent_is_the_message_and_is_worked_off_after_a_minute() -> None:
    bench = Bench()
    async with bench.pond() as pond:
        orders = pond.queue("orders")
        await orders.enqueue(b"1", max_attempts=1)
        [message] = await orders.receive()
        real = pond.store._moves._finish  # type: ignore[attr-defined]

        async def die(*_: Any) -> dict[int, str]:
            raise StoreError("killed")

        pond.store._moves._finish = die  # type: ignore[attr-defined]
        await message.nack()
        pond.store._moves._finish = real  # type: ignore[attr-defined]
        [intent] = bench.names(names.hex_id(message.id))
        assert records.form(len(bench.bucket.objects[intent])).kind == Kind.MOVING
    async with bench.pond() as pond:
        orders = pond.queue("orders")
        bench.clock.advance(59)
        await orders.receive()
        assert bench.names(names.hex_id(message.id)) == [intent]
        assert await pond.verify() == []
        bench.clock.advance(2)
        assert [problem.what for problem in await pond.verify()] == ["it is on its way, and nobody finishes that"]
        await orders.receive()
        await pond.store.close()
        [dead] = bench.names(names.hex_id(message.id))
        assert "/d/" in dead
