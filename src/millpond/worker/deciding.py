"""What becomes of a message whose handler did not return, or not in time. Pure; the life cycle has the last word."""

from __future__ import annotations

from typing import Any

from millpond.model.ids import IdSource
from millpond.model.text import clipped
from millpond.worker.binding import Unfit
from millpond.worker.failures import MESSAGE_LIMIT, REASON_LIMIT, details, reason
from millpond.worker.jobs import Why
from millpond.worker.outcomes import Defer, GiveUp, Outcome, Retry
from millpond.worker.processes import RaisedInProcess
from millpond.worker.registry import Consumer

LONGEST_DELAY = 10 * 366 * 86_400.0
"""Seconds: more than anybody means, and less than the service refuses."""


def decide(
    consumer: Consumer, failures: int, why: Why | None, error: BaseException | None, unfit: bool, ids: IdSource
) -> Outcome:
    """``failures``: how often the message has failed before; ``why``: the handler was cancelled; ``error``: what came
    out of it; ``unfit``: the payload does not fit."""
    if why == "stop":
        return Outcome("defer", reason="the worker is leaving")
    if why == "time":
        text = f"took longer than its time limit of {consumer.time_limit:g} s"
        kept = {"type": "TimeLimit", "message": text, "traceback": ""}
        if error is not None and not isinstance(error, RaisedInProcess):
            kept["traceback"] = details(error)["traceback"]
        return _again(consumer, failures, None, text, kept, ids)
    assert error is not None
    if unfit:
        assert isinstance(error, Unfit)
        text = clipped(f"the payload does not fit: {' '.join(str(error).split())}", REASON_LIMIT)
        kept = {"type": "Unfit", "message": clipped(str(error), MESSAGE_LIMIT), "traceback": ""}
        return Outcome("dead", reason=text, error=kept)
    if isinstance(error, Defer):
        return Outcome("defer", min(error.delay, LONGEST_DELAY), error.reason)
    if isinstance(error, RaisedInProcess):
        found, cause = error.details, error.original
        text = clipped(" ".join(f"{found['type']}: {found['message']}".split()), REASON_LIMIT)
    else:
        # Of an answer that was raised from another exception, that one is what went wrong.
        blamed = error.__cause__ if isinstance(error, (GiveUp, Retry)) and error.__cause__ is not None else error
        found, cause, text = details(blamed), error, reason(blamed)
    if isinstance(error, GiveUp):
        return Outcome("dead", reason=clipped(error.reason, REASON_LIMIT) or "given up", error=found)
    if isinstance(cause, consumer.retry.give_up_on):
        return Outcome("dead", reason=text, error=found)
    if isinstance(error, Retry) and error.after is not None:
        return Outcome("retry", min(error.after, LONGEST_DELAY), error.reason or text, found)
    return _again(consumer, failures, cause, text, found, ids)


def _again(
    consumer: Consumer, failures: int, cause: BaseException | None, text: str, kept: dict[str, Any], ids: IdSource
) -> Outcome:
    return Outcome("retry", min(consumer.retry.delay(failures + 1, cause, ids), LONGEST_DELAY), text, kept)
