from __future__ import annotations

import pytest

from millpond.errors import InvalidMessageId, InvalidQueue
from millpond.model import keys

ID = "0197a3c2-1111-7abc-8def-0123456789ab"


def test_keys_name_what_they_lock() -> None:
    assert keys.message_lease_key(None, "Orders", ID.upper()) == f"default/q/orders/msg/{ID}"
    assert keys.state_lease_key("team", "orders", ID) == f"team/q/orders/state/{ID}"


@pytest.mark.parametrize("bad", [".", ".."])
def test_N1_no_key_leaves_its_namespace(bad: str) -> None:
    for make in (keys.message_lease_key, keys.state_lease_key):
        with pytest.raises(InvalidQueue):
            make(bad, "orders", ID)
        with pytest.raises(InvalidQueue):
            make("default", bad, ID)
    assert keys.parse_message_lease_key(f"q/{bad}/msg/{ID}") is None
    assert keys.parse_message_lease_key(f"q/orders/msg/{bad}") is None


def test_N2_no_key_names_another_message() -> None:
    for make in (keys.message_lease_key, keys.state_lease_key):
        with pytest.raises(InvalidMessageId):
            make("default", "orders", f"../../other/msg/{ID}")


def test_parsers_take_apart_what_the_makers_made() -> None:
    relative = keys.message_lease_key("team", "orders", ID).removeprefix("team/")
    assert keys.parse_message_lease_key(relative) == keys.LeaseKeyParts("orders", ID)
    assert keys.parse_message_lease_key("/" + relative) == keys.LeaseKeyParts("orders", ID)
    assert keys.parse_state_lease_key(relative) is None
    relative = keys.state_lease_key("team", "orders", ID).removeprefix("team/")
    assert keys.parse_state_lease_key(relative) == keys.LeaseKeyParts("orders", ID)
    assert keys.is_queue_state_key(relative)
    assert keys.is_queue_state_key("team/" + relative)
    assert not keys.is_queue_message_key(relative)


@pytest.mark.parametrize(
    "other", ["", "q", "q/orders", f"q/orders/{ID}", "q/orders/msg/", "x/orders/msg/1", "q/a b/msg/1", "q/a/msg/1/2"]
)
def test_other_layouts_are_none(other: str) -> None:
    assert keys.parse_message_lease_key(other) is None
    assert keys.parse_state_lease_key(other) is None
    assert not keys.is_queue_message_key(other)
    assert not keys.is_queue_state_key(other)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("default/q/orders/state/m", True),
        ("q/orders/state/m", True),
        ("/q/orders/state/m", True),
        ("default/q/orders/msg/m", False),
        ("default/q//state/m", False),
        ("state/m", False),
        ("default/q/orders/state", False),
        ("default/q/orders/state/", False),
        ("a/b/q/orders/state/m", False),
    ],
)
def test_which_keys_are_those_of_a_state(key: str, expected: bool) -> None:
    assert keys.is_queue_state_key(key) is expected


def test_a_state_key_may_have_one_part_before_it() -> None:
    key = f"q/orders/state/{ID}"
    for good in (key, f"/{key}", f"default/{key}", f"/default/{key}"):
        assert keys.is_queue_state_key(good)
    for bad in (f"a/b/{key}", f"//{key}", f"default//{key}", f"/a/b/{key}", f"{key}/x", f"default/{key}/"):
        assert not keys.is_queue_state_key(bad)
