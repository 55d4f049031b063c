"""Errors on the wire: from an exception to a status and a body, and back to the very same exception.

Two vocabularies. On Millpond's own routes a code is the ``code`` of the exception's class. On lockd's routes it is the
one that lockd's clients look for, so that one exception may go by several names, depending on what was asked.
"""

from __future__ import annotations

from typing import Any

import msgspec

from millpond import errors
from millpond.errors import MillpondError


class Fault(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of every answer that is not a success. What has its default is left out."""

    error: str
    """The code: stable, for programs."""
    detail: str = ""
    """What is wrong and what to do, for people."""
    leader_endpoint: str = ""
    current_version: int = 0
    current_etag: str = ""
    retry_after_seconds: int = 0
    """Also in the header Retry-After."""


class Refusal(Exception):
    """A request that is refused with a status and a fault of its own, where no exception of the engine says it."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str = "",
        *,
        retry_after: int = 0,
        current_version: int = 0,
        current_etag: str = "",
    ) -> None:
        super().__init__(f"{code}: {detail}" if detail else code)
        self.status = status
        self.fault = Fault(code, detail, "", current_version, current_etag, retry_after)


def _tree(root: type[MillpondError]) -> list[type[MillpondError]]:
    return [root, *(one for child in root.__subclasses__() for one in _tree(child))]


BY_CODE: dict[str, type[MillpondError]] = {
    one.code: one for one in _tree(MillpondError) if one.__module__ == errors.__name__
}
"""Every exception of `millpond.errors`, by its code."""

BUSY_RETRY = 1
"""Seconds after which a call that met a passing trouble may be sent again, unless the error says otherwise."""

INTERNAL = Refusal(500, "internal_error", "the server failed at this; its log says why")

LOCKD: dict[str, tuple[int, str]] = {
    "invalid_queue": (400, "invalid_queue"),
    "message_not_found": (404, "not_found"),
    "lease_lost": (409, "queue_message_lease_mismatch"),
    "state_conflict": (409, "etag_mismatch"),
    "too_many_consumers": (503, "queue_busy"),
}
"""What lockd's clients call an exception (by its code), where that differs; a route may know better."""


def native(error: MillpondError) -> tuple[int, Fault]:
    """Status and body for an exception on Millpond's own routes."""
    return error.http_status, Fault(error.code, _detail(error), retry_after_seconds=_retry_after(error))


def lockd(error: MillpondError) -> tuple[int, Fault]:
    """Status and body for an exception on lockd's routes."""
    status, code = LOCKD.get(error.code, (error.http_status, error.code))
    return status, Fault(code, _detail(error), retry_after_seconds=_retry_after(error))


def _detail(error: MillpondError) -> str:
    # What the storage says may name files, hosts and buckets; those are for the log of the server.
    if isinstance(error, errors.StoreError | errors.CryptoError):
        return (type(error).__doc__ or "").strip()
    return str(error)


def _retry_after(error: MillpondError) -> int:
    return BUSY_RETRY if error.retryable and error.http_status in {429, 503} else 0


def exception(status: int, code: str, detail: str = "") -> MillpondError:
    """The exception that a fault stands for on the client's side, with the server's text; of the class that the same
    call would have raised on a local store. A code that this version does not know becomes the nearest class that its
    status allows."""
    kind = BY_CODE.get(code)
    if kind is None:
        kind = _BY_STATUS.get(status, MillpondError)
        detail = f"{code}: {detail}" if detail else code
    error: MillpondError = kind(detail or None)
    return error


_BY_STATUS: dict[int, type[MillpondError]] = {
    400: errors.InvalidInput,
    401: errors.Unauthorized,
    403: errors.Forbidden,
    404: errors.MessageNotFound,
    409: errors.LeaseLost,
    413: errors.TooLarge,
    429: errors.Throttled,
    503: errors.StoreBusy,
}

_decoder = msgspec.json.Decoder(Fault)


def decode(data: bytes) -> Fault | None:
    """The fault in a body; None when it is something else (a proxy's page, nothing)."""
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


encode = msgspec.json.Encoder().encode
"""A fault as a body."""


def as_json(fault: Fault) -> bytes:
    """A fault as JSON with the final newline that lockd's bodies have."""
    body: Any = encode(fault)
    return bytes(body) + b"\n"
