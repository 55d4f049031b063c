"""What is kept and done for each way in which a handler fails."""

from __future__ import annotations

from typing import Any

import pytest

import millpond
from millpond import Consumer, Defer, GiveUp, Outcome, Retry, RetryPolicy
from millpond.worker.deciding import LONGEST_DELAY, decide
from millpond.worker.processes import RaisedInProcess

IDS = millpond.connect("memory://").ids
REMOTE = {"type": "KeyError", "message": "'k'", "traceback": "there"}


def made(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """The exception, as it is when it has been raised."""
    try:
        raise error from cause
    except BaseException as raised:
        return raised


def outcome(error: BaseException | None, *, why: Any = None, failures: int = 0) -> Outcome:
    policy = RetryPolicy(base=10.0, jitter=0.0, give_up_on=(KeyError,))
    consumer = Consumer(name="c", queue="q", namespace=None, handler=print, retry=policy, time_limit=5.0)
    return decide(consumer, failures, why, error, False, IDS)


@pytest.mark.parametrize(
    ("error", "kind", "delay", "reason", "kept"),
    [
        (ValueError("v"), "retry", 10, "ValueError: v", "ValueError"),
        (KeyError("k"), "dead", 0, "KeyError: 'k'", "KeyError"),
        (made(GiveUp("why"), ValueError("v")), "dead", 0, "why", "ValueError"),
        (GiveUp(""), "dead", 0, "given up", "millpond.worker.outcomes.GiveUp"),
        (made(Retry(3.0), ValueError("v")), "retry", 3, "ValueError: v", "ValueError"),
        (Retry(3.0, "busy"), "retry", 3, "busy", "millpond.worker.outcomes.Retry"),
        (Retry(1e300), "retry", LONGEST_DELAY, None, "millpond.worker.outcomes.Retry"),
        (Defer(7.0, "closed"), "defer", 7, "closed", None),
        (RaisedInProcess(REMOTE, KeyError("k")), "dead", 0, "KeyError: 'k'", "KeyError"),
        (RaisedInProcess(REMOTE, None), "retry", 10, "KeyError: 'k'", "KeyError"),
    ],
)
def test_what_was_raised_decides(
    error: BaseException, kind: str, delay: float, reason: str | None, kept: str | None
) -> None:
    found = outcome(error)
    assert (found.kind, found.delay) == (kind, delay)
    assert reason is None or found.reason == reason
    assert (found.error and found.error["type"]) == kept


def test_why_it_was_cancelled_comes_before_what_it_raised() -> None:
    assert outcome(ValueError("v"), why="stop").kind == "defer"
    late = outcome(made(ValueError("v")), why="time", failures=2)
    assert (late.kind, late.delay, late.error["type"]) == ("retry", 40, "TimeLimit")
    assert "ValueError: v" in late.error["traceback"]
    assert outcome(None, why="time").error["traceback"] == ""
