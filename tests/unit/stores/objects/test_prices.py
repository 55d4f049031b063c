"""From counts to dollars."""

from __future__ import annotations

import re

import pytest

from millpond.stores.base import Requests
from millpond.stores.objects.prices import (
    AS_OF,
    PRICES,
    cost,
    cost_per_million,
    idle_month,
    life_cycle,
    prices_of,
)

S3 = PRICES["s3"]


@pytest.mark.parametrize(
    ("requests", "dollars"),
    [
        (Requests(), 0.0),
        (Requests(creates=1000), 0.005),
        (Requests(replaces=1000), 0.005),
        (Requests(parts=1000), 0.005),
        (Requests(lists=1000), 0.005),
        (Requests(reads=1000), 0.0004),
        (Requests(deletes=1000), 0.0),
        (Requests(bytes_sent=10**12, bytes_received=10**12), 0.0),
        (Requests(creates=10**6, replaces=10**6, reads=10**6, deletes=10**6), 10.4),
    ],
    ids=repr,
)
def test_requests_cost_what_the_list_says(requests: Requests, dollars: float) -> None:
    assert cost(requests, S3) == pytest.approx(dollars)


def test_a_million_life_cycles() -> None:
    assert cost_per_million(Requests(creates=10, replaces=10), 10, S3) == pytest.approx(10.0)
    assert cost_per_million(Requests(lists=10), 0, S3) is None
    own = life_cycle(other_process=False, per_listing=32)
    assert own == Requests(creates=10**6, replaces=10**6, deletes=10**6, lists=31_250)
    assert cost(own, S3) == pytest.approx(10.15625)
    others = life_cycle(other_process=True, per_listing=1)
    assert others == Requests(creates=10**6, replaces=10**6, reads=10**6, deletes=10**6, lists=10**6)


def test_waiting_for_a_month() -> None:
    assert idle_month(S3, polls_an_hour=100) == pytest.approx(100 * 730 * 0.000005)


def test_each_cloud_has_a_list_with_its_source_and_date() -> None:
    assert set(PRICES) == {"s3", "gs", "az"}
    for name, prices in PRICES.items():
        assert prices_of(name) is prices
        assert prices.cloud == name
        assert prices.source.startswith("https://")
        # A slip of a factor of ten would be seen: they have been within these bounds for many years.
        assert 1 <= prices.list <= 20
        assert 1 <= prices.put <= 20
        assert 0.1 <= prices.get <= 2
        assert prices.delete == 0
    assert prices_of("sqlite") is None
    assert re.fullmatch(r"20\d\d-\d\d", AS_OF)
