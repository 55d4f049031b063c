"""What obstore's errors say; the texts are obstore 0.12.1's, shortened. Most are met for real in test_bucket_faults."""

from __future__ import annotations

import pytest

from millpond.stores.objects.replies import Outcome, read_reply

CONNECTION = """Generic S3 error: Error performing PUT http://127.0.0.1:42451/b/a in 303.221µs - HTTP error: error

Debug source:
Generic {
    store: "S3",
    source: RetryError(
        RetryErrorImpl {
            inner: Http(
                HttpError {
                    kind: %s,
                    source: reqwest::Error {
                        kind: Request,
                        source: hyper_util::client::legacy::Error(
                            %s,
"""
STATUS = (
    "Generic %s error: Error performing PUT https://host/b/a?sig=TOPSECRET in 1ms - Server returned non-2xx status "
    "code: %s: %s"
)


def raised(name: str, text: str) -> BaseException:
    return type(name, (Exception,), {})(text)


@pytest.mark.parametrize(
    ("kind", "phase", "outcome"),
    [
        ("Connect", "Connect", Outcome.NOT_SENT),
        ("Timeout", "Connect", Outcome.NOT_SENT),
        ("Timeout", "SendRequest", Outcome.UNKNOWN),
        ("Interrupted", "SendRequest", Outcome.UNKNOWN),
        ("Request", "SendRequest", Outcome.UNKNOWN),
        ("Decode", "SendRequest", Outcome.UNKNOWN),
        ("Unknown", "SendRequest", Outcome.UNKNOWN),
    ],
)
def test_connections(kind: str, phase: str, outcome: Outcome) -> None:
    assert read_reply(raised("GenericError", CONNECTION % (kind, phase))).outcome is outcome


@pytest.mark.parametrize(
    ("status", "code", "outcome"),
    [
        ("429 Too Many Requests", "", Outcome.THROTTLED),
        ("503 Service Unavailable", "SlowDown", Outcome.THROTTLED),
        ("503 Service Unavailable", "ServerBusy", Outcome.THROTTLED),
        ("503 Service Unavailable", "", Outcome.UNKNOWN),
        ("500 Internal Server Error", "InternalError", Outcome.UNKNOWN),
        ("504 Gateway Timeout", "", Outcome.UNKNOWN),
        ("408 Request Timeout", "", Outcome.UNKNOWN),
        ("400 Bad Request", "RequestTimeout", Outcome.UNKNOWN),
        ("400 Bad Request", "InvalidArgument", Outcome.REFUSED),
        ("409 Conflict", "ConditionalRequestConflict", Outcome.AGAIN),
        ("409 Conflict", "BlobAlreadyExists", Outcome.EXISTS),
        ("412 Precondition Failed", "ConditionNotMet", Outcome.CHANGED),
        ("404 Not Found", "NoSuchKey", Outcome.MISSING),
        ("404 Not Found", "ContainerNotFound", Outcome.NO_BUCKET),
        ("403 Forbidden", "AccessDenied", Outcome.DENIED),
        ("403 Forbidden", "AuthenticationFailed", Outcome.CREDENTIALS),
        ("403 Forbidden", "RequestTimeTooSkewed", Outcome.SKEWED),
        ("507 Insufficient Storage", "", Outcome.UNKNOWN),
    ],
)
def test_statuses_and_codes(status: str, code: str, outcome: Outcome) -> None:
    body = f"<Error><Code>{code}</Code><Message>TOPSECRET</Message></Error>" if code else ""
    reply = read_reply(raised("GenericError", STATUS % ("S3", status, body)))
    assert reply.outcome is outcome
    assert reply.detail == f"{status[:3]} {code}".strip()


def test_credentials_that_cannot_be_had() -> None:
    for text in (
        "Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 1ms - HTTP error: error",
        "Generic GCS error: Error performing token request: Error performing GET "
        "http://169.254.169.254/computeMetadata/v1/x - Server returned non-2xx status code: 403 Forbidden: no",
        "Generic MicrosoftAzure error: Error performing token request: Error performing GET "
        "http://169.254.169.254/metadata/identity/oauth2/token?resource=x in 1ms - HTTP error: error",
        "Generic S3 error: Missing credential",
    ):
        assert read_reply(raised("GenericError", text)).outcome is Outcome.CREDENTIALS


def test_an_object_s_name_is_no_word_for_credentials() -> None:
    """Names are the users'; one of these stands in the URL of an ordinary error."""
    for name in (
        "metadata/identity/m",
        "credentials/a",
        "latest/meta-data/a",
        "computeMetadata/a",
        "a/latest/api/token",
    ):
        text = (
            f"Error performing GET https://host/bucket/q/{name} in 1ms - Server returned non-2xx status code: 404 Not"
        )
        assert read_reply(raised("FileNotFoundError", text)).outcome is Outcome.MISSING


def test_nothing_is_quoted_that_may_be_signed() -> None:
    text = (
        "Generic MicrosoftAzure error: something odd at https://host/c/a?sv=1&sig=TOPSECRET happened\n\n"
        "Debug source: sig=TOPSECRET"
    )
    reply = read_reply(raised("GenericError", text))
    assert reply.outcome is Outcome.REFUSED
    assert reply.detail == "Generic MicrosoftAzure error: something odd at https://host/c/a happened"
