"""What requests cost, as the command says it: measured and computed are told apart, and prices carry their date."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tests.unit.service.far import Far

import millpond.connecting
from millpond import PondRequests, QueueRequests, Requests
from millpond.cli import cost
from millpond.cli.app import app
from millpond.cli.display import Display
from millpond.cli.runner import EMPTY_CHECK, Plan, Runner
from millpond.model.clock import ManualClock
from millpond.pond import Pond
from millpond.stores.base import QueueName
from millpond.stores.memory import MemoryStore

Run = Callable[..., Result]
LIFE = Requests(creates=10, replaces=10, deletes=10, lists=2, bytes_sent=5)


class Bucket(Far):
    """A store that says that it is in a cloud, and counts as one of its calls each."""

    def __init__(self, name: str) -> None:
        super().__init__(ManualClock(), name=name, requests_cost_money=True)
        self.counted = LIFE

    def requests(self) -> dict[QueueName | None, Requests]:
        return {QueueName("default", "q"): self.counted}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """What every URL names."""
    store = Bucket("s3")
    # Each command opens and closes a handle of its own.
    monkeypatch.setattr(store, "close", _nothing, raising=False)
    monkeypatch.setattr(millpond.connecting, "open_store", lambda url, clock: store)
    return store


async def _nothing() -> None:
    return None


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["--store", "memory://", *arguments])


def pond_in(name: str) -> Pond:
    return Pond(Bucket(name), clock=ManualClock())


def test_what_was_measured() -> None:
    requests = PondRequests({QueueName("default", "q"): QueueRequests(LIFE, 10)}, Requests(lists=8))
    report = cost.measured(pond_in("s3"), requests)
    assert report is not None
    assert report["requests"] == {"creates": 10, "replaces": 10, "reads": 0, "deletes": 10, "lists": 10, "parts": 0}
    assert (report["acknowledged"], report["requests_per_message"], report["bytes_sent"]) == (10, 4.0, 5)
    assert report["usd"] == pytest.approx(30 * 5e-6)
    assert report["usd_per_million_messages"] == pytest.approx(15.0)
    assert list(cost.measured_lines(report, cost.prices(pond_in("s3")))) == [
        "measured: 10 creates, 10 replaces, 10 deletes, 10 lists; 4.00 for each message acked (10)",
        "measured: $0.00015; $15.00 for a million messages, by list prices of Amazon S3 Standard, us-east-1, as of "
        "2025-06",
    ]


def test_where_nothing_was_acked_there_is_no_price_of_a_message() -> None:
    report = cost.measured(pond_in("gs"), PondRequests({}, Requests()))
    assert report is not None
    assert (report["requests_per_message"], report["usd"], report["usd_per_million_messages"]) == (None, 0, None)
    first, second = cost.measured_lines(report, cost.prices(pond_in("gs")))
    assert first == "measured: no requests"
    assert second.startswith("measured: $0.00, by list prices of Google")


def test_a_store_without_a_price_list_has_counts() -> None:
    pond = pond_in("objects")
    report = cost.measured(pond, PondRequests({}, Requests(lists=8)))
    assert report is not None
    assert (report["requests"]["lists"], report["usd"]) == (8, None)
    assert (cost.prices(pond), cost.computed(pond)) == (None, None)
    assert list(cost.measured_lines(report, None))[-1] == "there is no price list for this store"


def test_what_is_computed() -> None:
    pond = pond_in("az")
    report, prices = cost.computed(pond), cost.prices(pond)
    assert report is not None
    assert prices is not None
    assert report["consumed_where_enqueued"]["requests_per_message"] == pytest.approx(3 + 1 / 128)
    assert report["consumed_elsewhere"]["requests_per_message"] == pytest.approx(4 + 1 / 128)
    assert report["consumed_elsewhere"]["usd_per_million_messages"] == pytest.approx(2 * 5.5 + 0.44 + 5.5 / 128)
    assert report["waiting"]["requests_per_hour"] == 60
    lines = list(cost.computed_lines(report, prices))
    assert len(lines) == 4
    assert all(line.startswith("computed") for line in lines)
    assert prices["source"] in lines[-1]


def test_a_store_that_charges_nothing_has_no_cost() -> None:
    pond = Pond(MemoryStore(clock=ManualClock()), clock=ManualClock())
    assert (cost.measured(pond, pond.requests()), cost.computed(pond)) == (None, None)


def test_stats_tell_it(run: Run, bucket: Bucket) -> None:
    result = run("stats", "q", "--cost")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines if "$" in line or "measured" in line] == [
        "computed",
        "computed",
        "computed",
        "this command, measured",
        "this command, measured",
    ]
    result = run("stats", "q", "--cost", "--json")
    counts, told = map(json.loads, result.stdout.splitlines())
    assert counts["queue"] == "q"
    assert told["cost"]["prices"]["as_of"] == "2025-06"
    assert told["cost"]["measured"]["requests"]["creates"] == 10
    assert told["cost"]["computed"]["waiting"]["requests_per_hour"] == 60
    assert "$" not in run("stats", "q").stdout


def test_work_tells_what_it_took(run: Run, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("enqueue", "q", "x").exit_code == 0
    result = run("work", "q", "--until-empty", "--cost", "--", "true")
    assert result.exit_code == 0, result.output
    assert "measured: 10 creates, 10 replaces, 10 deletes, 2 lists; 32.00 for each message acked (1)" in result.stderr
    assert run("enqueue", "q", "x").exit_code == 0
    result = run("work", "q", "--until-empty", "--cost", "--json", "--", "true")
    told: dict[str, Any] = json.loads(result.stdout)
    assert told["acked"] == 1
    assert told["cost"]["measured"]["acknowledged"] == 1
    assert told["cost"]["prices"]["cloud"] == "s3"


def test_where_nothing_is_charged_they_say_so(run: Run) -> None:
    for arguments in (["stats", "--cost"], ["work", "q", "--until-empty", "--cost", "--", "true"]):
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        assert cost.NOTHING_TO_PAY in result.stderr
    result = run("stats", "--cost", "--json")
    assert json.loads(result.stdout) == {"cost": None}
    result = run("work", "q", "--until-empty", "--cost", "--json", "--", "true")
    assert json.loads(result.stdout)["cost"] is None
    assert "cost" not in json.loads(run("work", "q", "--until-empty", "--json", "--", "true").stdout)


@pytest.mark.parametrize(("name", "pauses"), [("s3", [0.5, 1, 2, 4, 8, 16, 30, 30]), (None, [EMPTY_CHECK] * 8)])
def test_looks_in_vain_come_less_and_less_often_where_they_cost_money(name: str | None, pauses: list[float]) -> None:
    pond = Pond(MemoryStore(clock=ManualClock()), clock=ManualClock()) if name is None else pond_in(name)
    runner = Runner(pond, pond.queue("q"), Plan(command=("true",)), Display(progress=False))
    assert [runner._recheck() for _ in pauses] == pauses
