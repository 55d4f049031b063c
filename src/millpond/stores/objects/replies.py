"""What an error of obstore says: did the request take place, and what is to be done about it?

obstore has few exceptions, and most of what went wrong stands in their text alone: the status and the code that the
cloud answered with, and how a connection failed. This module is the only one that reads that text. It quotes nothing
of it but codes, because the text holds URLs, and these may hold signatures.
"""

from __future__ import annotations

import enum
import re
from typing import NamedTuple


class Outcome(enum.Enum):
    """What an error means for the request that got it."""

    MISSING = "missing"
    """There is no such object."""
    EXISTS = "exists"
    """A create found the name taken."""
    CHANGED = "changed"
    """The condition did not hold."""
    AGAIN = "again"
    """The cloud was busy with another write to the same name; this one did not take place. To be sent again."""
    THROTTLED = "throttled"
    """Too many requests; this one did not take place."""
    NOT_SENT = "not sent"
    """No connection: the request did not leave."""
    UNKNOWN = "unknown"
    """It was sent, or may have been, and what came back does not say what became of it."""
    NO_BUCKET = "no bucket"
    DENIED = "denied"
    CREDENTIALS = "credentials"
    """None were found, or the cloud does not accept them."""
    SKEWED = "skewed"
    """This machine's clock is too far off for its signatures."""
    ELSEWHERE = "elsewhere"
    """The bucket is in another region."""
    REFUSED = "refused"
    """Anything else that the cloud, or obstore before it, says no to."""


class Reply(NamedTuple):
    """An error, understood."""

    outcome: Outcome
    detail: str
    """The cloud's own words for it: status and code; for people."""
    certain: bool = True
    """Of a throttled request: it was turned away for its number. Servers also say that they are busy or unavailable
    when a part of them failed with the request under way."""


_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"(?:<Code>|\(code: )([A-Za-z0-9_.]{1,100})(?:</Code>|\))")
"""As the clouds write it, and as obstore does of one name among several."""
_HTTP_KIND = re.compile(r"HttpError \{\s*kind: (\w+)")
_CONNECTING = re.compile(r"\(\s*Connect,")
"""hyper's name for the phase before there is a connection; a time-out in it has sent nothing."""
_URL = re.compile(r"https?://[^\s?\"]+")
_CREDENTIAL_URL = re.compile(
    r"https?://(169\.254\.\d+\.\d+|\[?fd00:ec2|metadata\.google\.internal|oauth2\.googleapis\.com"
    r"|iamcredentials\.googleapis\.com|login\.microsoftonline\.|sts\.[a-z0-9.-]*amazonaws"
    # On a host of its own, as variables of the environment may name one; a bucket comes before these in any other URL.
    r"|[^/]+/(latest/api/token|latest/meta-data/|computeMetadata/|metadata/identity/))"
)
_CREDENTIAL_WORDS = re.compile(r"(?i)credential|token (request|response)|service account|\.aws/|security token")

_THROTTLED = {
    "SlowDown", "ServiceUnavailable", "ServerBusy", "Throttling", "ThrottlingException", "RequestThrottled",
    "RequestLimitExceeded", "BandwidthLimitExceeded", "TooManyRequests", "rateLimitExceeded", "userRateLimitExceeded",
}  # fmt: skip
_OVERLOADED = {"ServiceUnavailable", "ServerBusy"}
_AGAIN = {"ConditionalRequestConflict", "OperationAborted"}
"""S3: "a conflicting conditional operation is in progress; try again"."""
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted", "ContainerDisabled", "InvalidBucketName"}
_CREDENTIALS = {
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "ExpiredTokenException", "InvalidToken",
    "TokenRefreshRequired", "AuthenticationFailed", "InvalidAuthenticationInfo", "NoAuthenticationInformation",
    "AuthenticationRequired", "AuthorizationHeaderMalformed", "InvalidSecurity",
}  # fmt: skip
_SKEWED = {"RequestTimeTooSkewed", "RequestExpired"}
_ELSEWHERE = {"PermanentRedirect", "TemporaryRedirect", "IllegalLocationConstraintException"}
_DENIED = {"AccessDenied", "AuthorizationPermissionMismatch", "AuthorizationFailure"}
_UNKNOWN = {"InternalError", "RequestTimeout", "OperationTimedOut"}


def read_reply(error: BaseException) -> Reply:
    """What ``error``, raised by obstore, means."""
    text = str(error)
    kind = type(error).__name__
    # What obstore quotes of the reply's body comes first; the Debug part after it repeats it.
    status = int(found[1]) if (found := _STATUS.search(text)) else 0
    code = found[1] if (found := _CODE.search(text)) else ""
    detail = " ".join(filter(None, [str(status or ""), code]))
    if _asks_for_credentials(text):
        return Reply(Outcome.CREDENTIALS, detail or "none found")
    by_code = _by_code(code)
    if by_code is not None:
        return Reply(by_code, detail, code not in _OVERLOADED)
    if status:
        return Reply(_by_status(status, kind), detail)
    if "redirect without LOCATION" in text:
        return Reply(Outcome.ELSEWHERE, "redirected")
    if kind == "RustPanic":
        return Reply(Outcome.UNKNOWN, "an unreadable answer")
    if found := _HTTP_KIND.search(text):
        return _by_connection(found[1], text)
    by_kind = {
        "FileNotFoundError": Outcome.MISSING,
        "NotFoundError": Outcome.MISSING,
        "AlreadyExistsError": Outcome.EXISTS,
        "PreconditionError": Outcome.CHANGED,
        "NotModifiedError": Outcome.CHANGED,
        "PermissionDeniedError": Outcome.DENIED,
        "UnauthenticatedError": Outcome.CREDENTIALS,
    }
    if kind in by_kind:
        return Reply(by_kind[kind], kind)
    if _CREDENTIAL_WORDS.search(text.partition("\n")[0]):
        return Reply(Outcome.CREDENTIALS, "none found")
    return Reply(Outcome.REFUSED, _clean(text))


def _asks_for_credentials(text: str) -> bool:
    first = _URL.search(text)
    return first is not None and _CREDENTIAL_URL.match(first[0]) is not None


def _by_code(code: str) -> Outcome | None:
    for codes, outcome in (
        (_THROTTLED, Outcome.THROTTLED),
        (_AGAIN, Outcome.AGAIN),
        (_NO_BUCKET, Outcome.NO_BUCKET),
        (_DENIED, Outcome.DENIED),
        (_SKEWED, Outcome.SKEWED),
        (_CREDENTIALS, Outcome.CREDENTIALS),
        (_ELSEWHERE, Outcome.ELSEWHERE),
        (_UNKNOWN, Outcome.UNKNOWN),
    ):
        if code in codes:
            return outcome
    return None


def _by_status(status: int, kind: str) -> Outcome:
    if status in {304, 412}:
        return Outcome.EXISTS if kind == "AlreadyExistsError" else Outcome.CHANGED
    if status == 409:
        return Outcome.EXISTS
    if status == 404:
        # obstore calls a replace of what is not there a failed condition, as it should be.
        return Outcome.CHANGED if kind == "PreconditionError" else Outcome.MISSING
    if status == 401:
        return Outcome.CREDENTIALS
    if status == 403:
        return Outcome.DENIED
    if status == 429:
        return Outcome.THROTTLED
    if status in {301, 302, 307, 308}:
        return Outcome.ELSEWHERE
    if status == 501:
        return Outcome.REFUSED
    if status >= 500 or status == 408:
        # A 500, or a 502 or 503 from something on the way, says nothing of what the storage did behind it.
        return Outcome.UNKNOWN
    return Outcome.REFUSED


def _by_connection(kind: str, text: str) -> Reply:
    if kind == "Connect":
        return Reply(Outcome.NOT_SENT, "no connection")
    if kind == "Timeout":
        if _CONNECTING.search(text):
            return Reply(Outcome.NOT_SENT, "no connection in time")
        return Reply(Outcome.UNKNOWN, "no reply in time")
    # Also "Request": a connection that was kept open and that the server had closed meanwhile.
    return Reply(Outcome.UNKNOWN, "the connection broke")


def _clean(text: str) -> str:
    first = text.strip().partition("\n")[0]
    return re.sub(r"\?\S*", "", first)[:300]
