"""Names of objects: what they tell, and that they sort as they must."""

from __future__ import annotations

import random

import pytest

from millpond.errors import StoreCorrupt
from millpond.model.clock import ManualClock
from millpond.model.ids import IdSource
from millpond.model.names import MAX_NAME_BYTES
from millpond.stores.base import Box
from millpond.stores.objects import names

ID = "0197a3c2-0000-7000-8000-000000000001"
NOW = ManualClock().now_ms()


def _name(box: Box = Box.LIVE, **changes: object) -> names.Name:
    told = {"key": 5 << 80 | 7, "id": ID, "priority": 5, "size": 10, "expires": None, "group": None} | changes
    return names.message("shop", "orders", box, **told)  # type: ignore[arg-type]


@pytest.mark.parametrize("box", Box)
@pytest.mark.parametrize("group", [None, "customer 7", "\ud800"])
@pytest.mark.parametrize("expires", [None, 0, NOW])
@pytest.mark.parametrize("priority", [0, 5, 9])
def test_a_name_tells_what_was_put_in(box: Box, group: str | None, expires: int | None, priority: int) -> None:
    name = _name(box, group=group, expires=expires, priority=priority, size=1 << 40, key=(1 << 128) - 1)
    read = names.parse(name.path)
    assert read._replace(priority=priority) == name
    assert read.priority == (priority if box is Box.LIVE or group else None)
    assert (read.namespace, read.queue, read.id, read.size, read.expires) == ("shop", "orders", ID, 1 << 40, expires)
    assert names.of_place("shop", "orders", name.place) == read
    assert len(name.path) < 300


def test_the_layout_is_as_documented() -> None:
    key = "00000000000500000000000000000007"
    id = names.hex_id(ID)
    assert _name().path == f"q/shop/orders/m/4/{key}-{id}-a--"
    assert _name(Box.DEAD, expires=255).path == f"q/shop/orders/d/{key}-{id}-a-ff-"
    group = names.group_hash("g")
    assert _name(group="g", priority=3).path == f"q/shop/orders/m/o/{key}-{id}-a--{group}3"
    assert names.policy("shop", "orders") == "q/shop/orders/policy"
    assert names.id_marker("shop", "orders", ID) == f"q/shop/orders/i/{id}"
    assert names.pointer("shop", "orders", group) == f"q/shop/orders/g/{group}"
    assert names.unique_marker("shop", "orders", "a/b").startswith("q/shop/orders/u/")
    assert names.blob("shop", "orders", ID, 4096, b"\x01\x02") == f"{id}-000000001000-0102"


def test_the_longest_names_fit_into_an_object_name() -> None:
    long = "n" * MAX_NAME_BYTES
    name = names.message(
        long, long, Box.LIVE, key=names.LATEST << 80, id=ID, priority=0, size=1 << 50, expires=1 << 47, group="g" * 1024
    )
    # Beside the user's prefix; clouds allow 1,024 bytes.
    assert len(name.path) < 500


def test_what_is_to_be_handed_out_first_is_listed_first() -> None:
    chance = random.Random(1)
    several = [
        _name(priority=chance.randrange(10), key=names.key_of(chance.randrange(1 << 40), chance.getrandbits(128)))
        for _ in range(300)
    ]
    assert sorted(several, key=lambda one: one.path) == sorted(
        several, key=lambda one: (9 - (one.priority or 0), one.key)
    )
    assert [one.time for one in several] == [one.key >> 80 for one in several]


def test_the_id_of_a_message_is_its_key() -> None:
    ids = IdSource(ManualClock())
    for id, time in ((ids.message_id(), NOW), (ids.later_id(NOW + 5000), NOW + 5000)):
        name = _name(id=id, key=names.id_number(id))
        assert name.time == time
        assert name.last.startswith(f"{names.hex_id(id)}-{names.hex_id(id)}-")
        assert name.last.startswith(names.key_prefix(names.id_number(id)))


def test_keys_stay_within_their_bits() -> None:
    for time in (-5, 0, NOW, names.LATEST, names.LATEST + 1, 1 << 70):
        key = names.key_of(time, (1 << 200) + 3)
        assert 0 <= key < 1 << 128
        assert key >> 80 == min(max(time, 0), names.LATEST)
        assert key & 0xFF == 3


def test_after_a_key_is_behind_all_of_it_and_before_the_next() -> None:
    for key in (0, 9, 15, (1 << 128) - 2):
        here, there = _name(key=key).last, _name(key=key + 1).last
        assert here < names.after_key(key) < there


def test_a_name_keeps_its_last_part_in_the_other_box() -> None:
    for group in (None, "g"):
        name = _name(group=group, priority=2)
        dead = names.in_box(name, Box.DEAD, 2)
        assert (
            dead.path
            == names.message(
                "shop", "orders", Box.DEAD, key=name.key, id=ID, priority=2, size=10, expires=None, group=group
            ).path
        )
        assert names.in_box(dead, Box.LIVE, 2) == name


@pytest.mark.parametrize(
    "path",
    [
        "",
        "q",
        "millpond.json",
        "q/shop/orders/policy",
        "q/shop/orders/m/4/",
        "q/shop/orders/m/4/x",
        f"q/shop/orders/m/x/{'0' * 32}-{'0' * 32}-a--",
        f"q/shop/orders/m/4/{'0' * 31}-{'0' * 32}-a--",
        f"q/shop/orders/m/4/{'0' * 32}-{'0' * 31}-a--",
        f"q/shop/orders/m/4/{'g' * 32}-{'0' * 32}-a--",
        f"q/shop/orders/m/4/{'0' * 32}-{'0' * 32}-x--",
        f"q/shop/orders/m/4/{'0' * 32}-{'0' * 32}-a--abc",
        f"q/shop/orders/b/{'0' * 32}-{'0' * 32}-a--",
    ],
)
def test_other_names_are_refused(path: str) -> None:
    with pytest.raises(StoreCorrupt, match="no name that Millpond gives"):
        names.parse(path)


def test_names_of_payloads() -> None:
    path = names.blobs_prefix("shop", "orders") + names.blob("shop", "orders", ID, NOW, bytes(8))
    assert names.parse_blob(path) == names.BlobName(path, names.hex_id(ID), NOW, path)
    for bad in ("", "x", "q/shop/orders/b/x-y-z", f"{'0' * 32}-zz-00", f"{'0' * 31}-00-00"):
        assert names.parse_blob(bad) is None
