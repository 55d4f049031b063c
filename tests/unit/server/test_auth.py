"""Who is let in, and what he may do: tokens, certificates with claims, nobody."""

from __future__ import annotations

import os
from typing import Any

import pytest

from millpond.errors import Forbidden, InvalidQueue, Unauthorized
from millpond.server import tokens
from millpond.server.auth import ANONYMOUS, MEMORY, PEER, Guard, Identity, Scope, certificate_identity
from millpond.server.tokens import SCOPES, parse_grant
from millpond.testing import ManualClock
from millpond.wire.faults import Refusal


def token(*allow: str, name: str = "ci", clock: ManualClock | None = None, expires_in: int | None = None) -> Any:
    now = (clock or ManualClock()).now_ms()
    return tokens.create(
        name,
        [parse_grant(one) for one in allow],
        random_bytes=os.urandom,
        now=now,
        expires_at=None if expires_in is None else now + expires_in,
    )


def asked(authorization: str | None = None, peer: Identity | None = None) -> dict[str, Any]:
    headers = [(b"host", b"x")]
    if authorization is not None:
        headers.append((b"authorization", authorization.encode("latin-1")))
    scope: dict[str, Any] = {"headers": headers, "client": ("192.0.2.7", 1)}
    if peer is not None:
        scope[PEER] = peer
    return scope


def allowed(guard: Guard, identity: Identity, scope: Scope, namespace: str | None, queue: str | None) -> bool:
    try:
        guard.authorise(identity, scope, namespace, queue)
    except (Forbidden, Refusal):
        return False
    return True


@pytest.mark.parametrize("granted", SCOPES)
def test_a_token_may_do_what_its_scopes_say_and_nothing_else(granted: str) -> None:
    entry, text = token(f"{granted}:shop/orders")
    guard = Guard(ManualClock(), [entry])
    identity = guard.identify(asked(f"Bearer {text}"))
    assert (identity.name, identity.kind, identity.id) == ("ci", "token", entry.id)
    scopes: tuple[Scope, ...] = ("read", "write", "consume", "admin")
    assert [scope for scope in scopes if allowed(guard, identity, scope, "shop", "orders")] == [granted]
    assert guard.forbidden == 3


def test_names_are_compared_as_the_engine_reads_them() -> None:
    entry, text = token("write:shop/orders", "read:default/*")
    guard = Guard(ManualClock(), [entry])
    identity = guard.identify(asked(f"bearer  {text} "))
    assert allowed(guard, identity, "write", " Shop ", "ORDERS")
    assert allowed(guard, identity, "read", None, "anything")
    assert allowed(guard, identity, "read", "", "anything")
    assert not allowed(guard, identity, "read", "shop", "orders")
    assert allowed(guard, identity, "read", "default", None)
    assert not allowed(guard, identity, "read", None, None)  # nothing named is everything
    with pytest.raises(InvalidQueue):
        guard.authorise(identity, "write", "shop", "../orders")


def test_the_servers_own_default_namespace_counts() -> None:
    entry, text = token("read:team/*")
    guard = Guard(ManualClock(), [entry], namespace="team")
    identity = guard.identify(asked(f"Bearer {text}"))
    assert allowed(guard, identity, "read", None, "q")
    assert not allowed(guard, identity, "read", "default", "q")


def test_who_is_forbidden_is_told_which_grant_it_takes() -> None:
    entry, text = token("read:shop/*")
    guard = Guard(ManualClock(), [entry])
    with pytest.raises(
        Forbidden, match=r"token ci may not write shop/orders: it needs a grant such as write:shop/orders"
    ):
        guard.authorise(guard.identify(asked(f"Bearer {text}")), "write", "shop", "orders")


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic abc",
        "Bearer mpt_0_0",
        "Bearer \xff",
        "Bearer a b",
        "bearer mpt_" + "x" * 10_000,
    ],
)
def test_without_a_good_token_nobody_is_let_in(header: str | None) -> None:
    guard = Guard(ManualClock(), [token("*:*/*")[0]])
    with pytest.raises(Unauthorized) as caught:
        guard.identify(asked(header))
    assert "token" in str(caught.value)
    assert guard.refused == 1


def test_an_answer_does_not_tell_a_wrong_secret_from_an_unknown_or_expired_token(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "millpond")
    clock = ManualClock()
    good, text = token("*:*/*", clock=clock)
    old, old_text = token("*:*/*", clock=clock, expires_in=1000)
    guard = Guard(clock, [good, old])
    assert guard.identify(asked(f"Bearer {old_text}")).id == old.id
    clock.advance(1)
    said = set()
    for sent in (text[:-2] + "zz", "mpt_000000000000_zz", old_text):
        with pytest.raises(Unauthorized) as caught:
            guard.identify(asked(f"Bearer {sent}"))
        said.add(str(caught.value))
    assert len(said) == 1
    told = [(record.message, vars(record)["client"], vars(record)["reason"]) for record in caplog.records]
    assert told == [("millpond.auth.refused", "192.0.2.7", reason) for reason in ("wrong secret", "unknown", "expired")]
    assert not any(secret.split("_", 2)[2] in caplog.text for secret in (text, old_text))


def test_new_tokens_take_the_place_of_the_old_ones_at_once() -> None:
    first, first_text = token("read:*/*")
    second, second_text = token("write:*/*")
    guard = Guard(ManualClock(), [first])
    assert guard.identify(asked(f"Bearer {first_text}")).id == first.id
    guard.replace([second])
    with pytest.raises(Unauthorized):
        guard.identify(asked(f"Bearer {first_text}"))
    assert allowed(guard, guard.identify(asked(f"Bearer {second_text}")), "write", "a", "b")


def test_without_tokens_and_certificates_everybody_is_let_in_where_that_was_meant() -> None:
    guard = Guard(ManualClock(), None, anonymous=True)
    for header in (None, "Bearer whatever"):
        identity = guard.identify(asked(header))
        assert identity is ANONYMOUS
        assert allowed(guard, identity, "admin", None, None)
    with pytest.raises(Unauthorized, match="client certificate"):
        Guard(ManualClock(), None).identify(asked())


def test_what_is_remembered_of_an_identity_is_bounded() -> None:
    entry, text = token("read:a/x*")
    guard = Guard(ManualClock(), [entry])
    identity = guard.identify(asked(f"Bearer {text}"))
    for number in range(MEMORY * 2 + 10):
        assert allowed(guard, identity, "read", "a", f"x{number}")
        assert not allowed(guard, identity, "read", "a", f"y{number}")
        assert len(identity.decided) <= MEMORY


# Certificates


def certificate(*uris: str, subject: Any = ((("organizationName", "Mill, Inc"),), (("commonName", "worker"),))) -> Any:
    return {
        "subject": subject,
        "serialNumber": "0A1F",
        "subjectAltName": (("DNS", "x"), *(("URI", uri) for uri in uris)),
    }


SPIFFE = "spiffe://lockd/sdk/worker"


def test_a_certificate_is_named_by_subject_and_serial_number() -> None:
    identity = certificate_identity(certificate(SPIFFE))
    assert (identity.name, identity.kind, identity.id) == (r"CN=worker,O=Mill\, Inc#a1f", "certificate", "a1f")


@pytest.mark.parametrize(
    ("claims", "scope", "namespace", "may"),
    [
        (["lockd://ns/shop?perm=r"], "read", "shop", True),
        (["lockd://ns/shop?perm=r"], "consume", "shop", True),
        (["lockd://ns/shop?perm=r"], "write", "shop", False),
        (["lockd://ns/shop?perm=w"], "write", "shop", True),
        (["lockd://ns/shop?perm=w"], "consume", "shop", False),
        (["lockd://ns/shop?perm=rw"], "consume", "shop", True),
        (["lockd://ns/shop"], "write", "shop", True),
        (["lockd://ns/shop"], "admin", "shop", False),
        (["lockd://ns/shop"], "read", "other", False),
        (["lockd://ns/ALL"], "write", "other", True),
        (["lockd://ns/ALL"], "read", None, True),
        (["lockd://ns/ALL", "lockd://ns/shop?perm=r"], "write", "shop", False),
        (["lockd://ns/ALL", "lockd://ns/shop?perm=r"], "write", "other", True),
        (["lockd://ns/all"], "write", "other", False),
        (["lockd://ns/shop?perm=r", "lockd://ns/shop?perm=w"], "write", "shop", True),
        (["millpond://ns/shop?scope=admin"], "admin", "shop", True),
        (["millpond://ns/shop?scope=admin"], "read", "shop", False),
        (["millpond://ns/ALL?scope=read,admin"], "admin", "any", True),
        ([], "read", "shop", False),
    ],
)
def test_what_claims_grant(claims: list[str], scope: Scope, namespace: str | None, may: bool) -> None:
    guard = Guard(ManualClock(), None)
    identity = guard.identify(asked(peer=certificate_identity(certificate(SPIFFE, *claims))))
    if may:
        guard.authorise(identity, scope, namespace, "orders" if namespace else None)
        return
    with pytest.raises(Refusal) as caught:
        guard.authorise(identity, scope, namespace, "orders")
    assert (caught.value.status, caught.value.fault.error) == (403, "namespace_forbidden")
    assert f"{scope} {namespace}/orders" in caught.value.fault.detail


@pytest.mark.parametrize(
    "uris",
    [
        ["lockd://ns/shop"],
        [SPIFFE, "lockd://ns/shop?perm=x"],
        [SPIFFE, "lockd://ns/shop?perm=r&perm=w"],
        [SPIFFE, "lockd://ns/"],
        [SPIFFE, "lockd://ns/../shop"],
        [SPIFFE, "lockd://ns/sh op"],
        [SPIFFE, "lockd://shop"],
        [SPIFFE, "lockd://ns/*"],
        [SPIFFE, "lockd://[shop"],
        [SPIFFE, "millpond://ns/shop"],
        [SPIFFE, "millpond://ns/shop?scope=root"],
        [SPIFFE, "lockd://ns/shop", "lockd://ns/shop?perm=all"],
    ],
)
def test_claims_that_cannot_be_used_grant_nothing(uris: list[str]) -> None:
    guard = Guard(ManualClock(), None)
    with pytest.raises(Refusal) as caught:
        guard.authorise(certificate_identity(certificate(*uris)), "read", "shop", "orders")
    assert (caught.value.status, caught.value.fault.error) == (403, "invalid_namespace_claims")


def test_a_token_counts_before_the_certificate_that_its_connection_shows() -> None:
    entry, text = token("read:shop/*")
    guard = Guard(ManualClock(), [entry])
    peer = certificate_identity(certificate(SPIFFE, "lockd://ns/shop"))
    assert guard.identify(asked(peer=peer)) is peer
    assert not allowed(guard, guard.identify(asked(f"Bearer {text}", peer)), "write", "shop", "q")
    with pytest.raises(Unauthorized):
        guard.identify(asked("Bearer wrong", peer))
