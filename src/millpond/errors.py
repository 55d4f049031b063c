"""Everything Millpond raises on purpose.

    MillpondError
     ├── InvalidInput                what was asked for cannot be right; fix the call
     │    ├── InvalidQueue           a queue or namespace name
     │    ├── InvalidMessageId       a message id
     │    └── TooLarge               payload, attributes, error or state above its limit
     ├── MessageNotFound             no such message (any more)
     ├── LeaseLost                   the lease is not the message's current one; nothing was changed
     ├── StateConflict               the workflow state has another ETag than expected
     ├── TooManyConsumers            the cap on waiting consumers is reached
     ├── Unauthorized                the server does not know who asks
     ├── Forbidden                   the server knows, and will not let him
     ├── Throttled                   the server is loaded; ask again a little later
     ├── PayloadNotLoaded            the payload is stored apart from its record; stream it
     ├── TaskFailed                  a task was given up; its own error is inside
     ├── StoreError                  the storage said no
     │    ├── StoreBusy              another writer holds it; try again
     │    ├── StoreFull              no room left; free some, then try again
     │    ├── StoreClosed            the pond was closed
     │    ├── StoreUnreachable       no server that was given answers; try again
     │    ├── OutcomeUnknown         it was sent, and no reply came: it may have been done
     │    ├── StoreMismatch          not a Millpond store, or one from a newer version
     │    └── StoreCorrupt           a record that cannot be read
     └── CryptoError                 a ciphertext that does not open
          ├── UnknownKey             written with a root key that the keyring lacks
          └── Tampered               changed, truncated, moved, or written with another key

A class's docstring is its default message. ``code`` is a stable name for logs, JSON and HTTP; ``http_status`` is what a
server answers; ``retryable`` says whether the very same call may succeed later.
"""

from __future__ import annotations

from typing import ClassVar


class MillpondError(Exception):
    """Millpond could not do what was asked."""

    code: ClassVar[str] = "error"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())


class InvalidInput(MillpondError, ValueError):
    """The arguments cannot be right."""

    code = "invalid_input"
    http_status = 400


class InvalidQueue(InvalidInput):
    """The queue or namespace name is not valid."""

    code = "invalid_queue"


class InvalidMessageId(InvalidInput):
    """The message id is not valid."""

    code = "invalid_message_id"


class TooLarge(InvalidInput):
    """Something is larger than its limit; nothing was written."""

    code = "too_large"
    http_status = 413


class MessageNotFound(MillpondError, LookupError):
    """There is no such message (any more)."""

    code = "message_not_found"
    http_status = 404


class LeaseLost(MillpondError):
    """The lease is not the message's current one; nothing was changed."""

    code = "lease_lost"
    http_status = 409


class StateConflict(MillpondError):
    """The workflow state has another ETag than expected; load it again."""

    code = "state_conflict"
    http_status = 409


class TooManyConsumers(MillpondError):
    """Too many consumers are waiting already."""

    code = "too_many_consumers"
    http_status = 503
    retryable = True


class Unauthorized(MillpondError):
    """The server does not know who asks: no token or certificate, or one that it does not accept."""

    code = "unauthorized"
    http_status = 401


class Forbidden(MillpondError):
    """Who asks may not do this there."""

    code = "forbidden"
    http_status = 403


class Throttled(MillpondError):
    """The server has too much to do; ask again a little later."""

    code = "throttled"
    http_status = 429
    retryable = True


class PayloadNotLoaded(MillpondError):
    """The payload is stored apart from its record; use message.stream() or message.read()."""

    code = "payload_not_loaded"


class TaskFailed(MillpondError):
    """The task was given up: its call is a dead letter."""

    code = "task_failed"

    def __init__(self, message: str | None = None, *, kind: str = "", text: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        """The class name of what the function raised last; empty when it raised nothing (its worker died, say)."""
        self.text = text
        """Its message."""


class StoreError(MillpondError):
    """The storage failed."""

    code = "store_error"
    http_status = 503


class StoreBusy(StoreError):
    """Another writer holds the store; try again."""

    code = "store_busy"
    retryable = True


class StoreFull(StoreError):
    """The store has no room left; nothing of this call was written. Free some space and try again."""

    code = "store_full"
    retryable = True


class StoreClosed(StoreError):
    """The store is closed."""

    code = "store_closed"


class StoreUnreachable(StoreError):
    """No server answers at the addresses that were given; nothing is known to have been done. Try again."""

    code = "store_unreachable"
    retryable = True


class OutcomeUnknown(StoreError):
    """The request was sent and no usable reply came back: it may have taken place, now or a little later."""

    code = "outcome_unknown"


class StoreMismatch(StoreError):
    """This is not a Millpond store, or a newer Millpond wrote it."""

    code = "store_mismatch"


class StoreCorrupt(StoreError):
    """A stored record cannot be read."""

    code = "store_corrupt"
    http_status = 500


class CryptoError(MillpondError):
    """A ciphertext could not be opened."""

    code = "crypto_error"


class UnknownKey(CryptoError):
    """The ciphertext was written with a root key that the keyring does not hold."""

    code = "unknown_key"


class Tampered(CryptoError):
    """The ciphertext does not open: it was changed, cut, moved, or written with another key."""

    code = "tampered"
