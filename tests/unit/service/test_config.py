"""Limits and policies: what cannot be right is refused where it is given, above all before it is stored."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any, get_type_hints

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import millpond.testing
from millpond.errors import InvalidInput, StoreCorrupt, StoreMismatch
from millpond.service.config import (
    MAX_ATTEMPTS,
    MAX_SECONDS,
    POLICY_FORMAT,
    Config,
    EnqueueFields,
    EnqueueOptions,
    PolicyFields,
    QueuePolicy,
    decode_policy,
    encode_policy,
    milliseconds,
)

DURATIONS = (
    "default_visibility",
    "default_dedup_window",
    "policy_max_age",
    "orphan_age",
    "collect_interval",
    "poll_interval",
    "poll_max_interval",
    "resilient_poll_interval",
)
NO_DURATIONS: list[Any] = [0, -1, 1e-9, float("nan"), float("inf"), MAX_SECONDS * 1.01, True, "5", timedelta(seconds=5)]
NO_BUDGETS: list[Any] = [-1, 2.5, 3.0, True, "3", MAX_ATTEMPTS + 1, 2**70]

policies = st.builds(
    QueuePolicy,
    default_visibility=st.none() | st.floats(0.001, MAX_SECONDS),
    max_attempts=st.none() | st.integers(0, MAX_ATTEMPTS),
    ttl=st.none() | st.floats(0.001, MAX_SECONDS) | st.integers(1, 1000),
    on_expired=st.sampled_from(["discard", "dead_letter"]),
    on_exhausted=st.sampled_from(["discard", "dead_letter"]),
    dedup_window=st.none() | st.floats(0.001, MAX_SECONDS),
    paused=st.booleans(),
)

# Config


def test_the_defaults_are_valid() -> None:
    config = Config()
    assert config == Config(**msgspec.structs.asdict(config))


@pytest.mark.parametrize("value", NO_DURATIONS, ids=repr)
@pytest.mark.parametrize("name", [*DURATIONS, "default_ttl"])
def test_durations_of_a_config(name: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=name):
        Config(**{name: value})
    assert getattr(Config(**{name: 5}), name) == 5


def test_what_depends_on_the_store_unless_it_is_given() -> None:
    config = Config()
    assert (config.policy_age(costs=False), config.policy_age(costs=True)) == (1, 60)
    assert (config.collecting(costs=False), config.collecting(costs=True)) == (30, 3600)
    given = Config(policy_max_age=7, collect_interval=8)
    assert (given.policy_age(costs=False), given.policy_age(costs=True)) == (7, 7)
    assert (given.collecting(costs=False), given.collecting(costs=True)) == (8, 8)


@pytest.mark.parametrize("value", [-0.1, float("nan"), True, "1"], ids=repr)
def test_the_jitter_may_be_nothing_but_not_less(value: Any) -> None:
    assert Config(poll_jitter=0).poll_jitter == 0
    with pytest.raises(InvalidInput, match="poll_jitter"):
        Config(poll_jitter=value)


@pytest.mark.parametrize("value", NO_BUDGETS, ids=repr)
def test_the_budget_of_a_config(value: Any) -> None:
    assert Config(default_max_attempts=0).default_max_attempts == 0
    with pytest.raises(InvalidInput, match="default_max_attempts"):
        Config(default_max_attempts=value)


@pytest.mark.parametrize(
    "name", ["ready_cache_size", "ready_page_size", "thrifty_page_size", "max_consumers", "page_size"]
)
@pytest.mark.parametrize("value", [0, -1, 1.5, True], ids=repr)
def test_sizes_of_a_config(name: str, value: Any) -> None:
    assert getattr(Config(**{name: 1}), name) == 1
    with pytest.raises(InvalidInput, match=name):
        Config(**{name: value})


@pytest.mark.parametrize("name", ["max_payload_bytes", "max_attributes_bytes", "max_error_bytes", "max_state_bytes"])
@pytest.mark.parametrize("value", [-1, 1.5], ids=repr)
def test_limits_of_a_config(name: str, value: Any) -> None:
    assert getattr(Config(**{name: 0}), name) == 0
    with pytest.raises(InvalidInput, match=name):
        Config(**{name: value})


# Policies


@pytest.mark.parametrize("value", NO_DURATIONS, ids=repr)
@pytest.mark.parametrize("name", ["default_visibility", "ttl", "dedup_window"])
def test_durations_of_a_policy(name: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=name):
        QueuePolicy(**{name: value})


@pytest.mark.parametrize("value", NO_BUDGETS, ids=repr)
def test_the_budget_of_a_policy(value: Any) -> None:
    with pytest.raises(InvalidInput, match="max_attempts"):
        QueuePolicy(max_attempts=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("on_expired", "bury"), ("on_expired", None), ("on_exhausted", ""), ("paused", 1), ("paused", None)],
)
def test_choices_of_a_policy(name: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=name):
        QueuePolicy(**{name: value})


@given(policies)
def test_every_policy_that_can_be_made_can_be_read(policy: QueuePolicy) -> None:
    assert decode_policy(encode_policy(policy), "default/q") == policy


def test_fields_that_are_not_stored_yet_have_their_defaults() -> None:
    data = msgspec.msgpack.encode({"format": 1, "policy": {"ttl": 60, "of a later version": 1}})
    assert decode_policy(data, "default/q") == QueuePolicy(ttl=60)


@pytest.mark.parametrize("policy", [{}, {"on_expired": "archive"}, "laid out anew"])
def test_a_newer_format_is_refused_by_name(policy: Any) -> None:
    data = msgspec.msgpack.encode({"format": POLICY_FORMAT + 1, "policy": policy})
    with pytest.raises(StoreMismatch, match="policy of queue default/q has format 2"):
        decode_policy(data, "default/q")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        msgspec.msgpack.encode({"policy": {}}),
        msgspec.msgpack.encode({"format": 1}),
        msgspec.msgpack.encode({"format": 1, "policy": {"ttl": "long"}}),
        msgspec.msgpack.encode({"format": 1, "policy": {"ttl": -1}}),
        encode_policy(QueuePolicy(ttl=60))[:-1],
    ],
)
def test_garbage_is_reported_as_such(data: bytes) -> None:
    with pytest.raises(StoreCorrupt, match="policy of queue default/q"):
        decode_policy(data, "default/q")


@pytest.mark.parametrize(
    "fields",
    [{"max_attempts": 2.5}, {"max_attempts": True}, {"paused": 1}, {"ttl": 1e-9}, {"ttl": "5"}, {"tll": 5}],
    ids=repr,
)
async def test_what_cannot_be_read_back_is_never_stored(fields: dict[str, Any]) -> None:
    """Such a policy once made its queue useless: every later call read it first, also the one to put it right."""
    async with millpond.testing.pond() as pond:
        queue = pond.queue("q")
        await queue.set_policy(ttl=60)
        with pytest.raises(InvalidInput):
            await queue.set_policy(**fields)
        await pond.advance(2)
        assert await queue.policy() == QueuePolicy(ttl=60)
        await queue.enqueue(b"x")
        assert len(await queue.receive()) == 1


async def test_a_policy_goes_before_the_config_and_the_call_before_both() -> None:
    config = Config(default_visibility=11, default_max_attempts=1, default_ttl=111)
    async with millpond.testing.pond(config=config) as pond:
        queue = pond.queue("q")

        async def head(**options: Any) -> tuple[int, int, int | None]:
            receipt = await queue.enqueue(b"x", **options)
            found = (await queue.get(receipt.message_id)).record.head
            return found.visibility, found.max_attempts, found.ttl

        assert await head() == (11_000, 1, 111_000)
        await queue.set_policy(default_visibility=22, max_attempts=2, ttl=222)
        assert await head() == (22_000, 2, 222_000)
        assert await head(visibility=33, max_attempts=3, ttl=333) == (33_000, 3, 333_000)
        await queue.set_policy(max_attempts=0)
        assert await head() == (22_000, 0, 222_000)
        await queue.set_policy(default_visibility=None, max_attempts=None, ttl=None)
        assert await head() == (11_000, 1, 111_000)


# Durations


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, 0), (1, 1000), (0.5, 500), (0.001, 1), (0.0001, 1), (1.0001, 1001), (0.1 + 0.2, 300), (2.675, 2675)],
)
def test_seconds_are_rounded_up_to_milliseconds(seconds: float, expected: int) -> None:
    assert milliseconds(seconds, "delay") == expected


@given(st.integers(0, 100 * 366 * 86_400_000))
def test_whole_milliseconds_stay_what_they_are(number: int) -> None:
    assert milliseconds(number / 1000, "delay") == number


def test_a_timedelta_is_a_duration() -> None:
    assert milliseconds(timedelta(minutes=1, milliseconds=5), "delay") == 60_005  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value",
    [
        *(-0.001, -1, float("nan"), float("inf"), MAX_SECONDS + 1, True, False, None, "5", b"5", [5]),
        *(Decimal(5), 5j, Fraction(1, 2), timedelta(seconds=-1)),
    ],
    ids=repr,
)
def test_what_is_no_duration(value: Any) -> None:
    with pytest.raises(InvalidInput, match="delay"):
        milliseconds(value, "delay")


@pytest.mark.parametrize("value", [0, 0.0, 1e-9, timedelta(0)], ids=repr)
def test_some_durations_must_be_more_than_nothing(value: Any) -> None:
    assert milliseconds(value, "ttl") == 0
    with pytest.raises(InvalidInput, match="ttl must be more than 0"):
        milliseconds(value, "ttl", positive=True)


@pytest.mark.parametrize(("fields", "struct"), [(EnqueueFields, EnqueueOptions), (PolicyFields, QueuePolicy)])
def test_keyword_parameters_are_those_of_the_struct(fields: Any, struct: Any) -> None:
    assert get_type_hints(fields) == get_type_hints(struct)
