"""Errors on the wire, there and back."""

from __future__ import annotations

import pytest

from millpond import errors
from millpond.wire import faults


@pytest.mark.parametrize("kind", sorted(faults.BY_CODE.values(), key=lambda kind: kind.code))
def test_every_exception_comes_back_as_itself(kind: type[errors.MillpondError]) -> None:
    status, fault = faults.native(kind("why"))
    assert status == kind.http_status >= 400
    read = faults.decode(faults.as_json(fault))
    assert read == fault
    again = faults.exception(status, fault.error, fault.detail)
    assert type(again) is kind


def test_every_exception_has_a_code_of_its_own() -> None:
    kinds = [
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.MillpondError)
    ]
    assert len(kinds) == len(faults.BY_CODE) == len({kind.code for kind in kinds})


def test_what_the_storage_says_stays_on_the_server() -> None:
    for kind in (errors.StoreError, errors.StoreFull, errors.StoreCorrupt, errors.UnknownKey):
        for told in (faults.native, faults.lockd):
            _, fault = told(kind("/var/lib/secret.db: no"))
            assert "secret" not in fault.detail
            assert fault.detail == (kind.__doc__ or "").strip()


def test_lockd_has_its_own_names() -> None:
    assert faults.lockd(errors.LeaseLost("x"))[0] == 409
    assert faults.lockd(errors.LeaseLost("x"))[1].error == "queue_message_lease_mismatch"
    assert faults.lockd(errors.MessageNotFound("x"))[1].error == "not_found"
    assert faults.lockd(errors.TooManyConsumers("x"))[1].error == "queue_busy"
    assert faults.lockd(errors.TooLarge("x")) == (413, faults.Fault("too_large", "x"))


def test_what_may_be_sent_again_says_when() -> None:
    assert faults.native(errors.StoreBusy())[1].retry_after_seconds == faults.BUSY_RETRY
    assert faults.native(errors.LeaseLost())[1].retry_after_seconds == 0


def test_an_unknown_code_becomes_the_nearest_class() -> None:
    error = faults.exception(409, "news", "text")
    assert type(error) is errors.LeaseLost
    assert str(error) == "news: text"
    # A certificate's claims are refused by lockd's own codes.
    assert type(faults.exception(403, "namespace_forbidden", "text")) is errors.Forbidden
    assert type(faults.exception(401, "news")) is errors.Unauthorized
    assert type(faults.exception(429, "news")) is errors.Throttled
    assert type(faults.exception(418, "teapot")) is errors.MillpondError


def test_what_is_no_fault_is_none() -> None:
    for body in (b"", b"<html>", b"[]", b'{"error": 1}', b"\xff"):
        assert faults.decode(body) is None
