"""Who asks, and what he may do: bearer tokens, client certificates with lockd's namespace claims, or nobody.

Somebody who shows a token is judged by the token alone; else by the certificate of his connection; else he is let in
only where the server was told to let everybody in.
"""

from __future__ import annotations

import logging
import re
import ssl
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol
from urllib.parse import parse_qsl, urlsplit

import msgspec

from millpond.errors import Forbidden, InvalidQueue, Unauthorized
from millpond.model import names
from millpond.model.clock import Clock
from millpond.server.tokens import SCOPES, Grant, Token, Tokens
from millpond.wire.faults import Refusal

log = logging.getLogger("millpond.server")

Scope = Literal["read", "write", "consume", "admin"]
"""What a request wants: to look, to enqueue, to receive and answer, to destroy and to change settings."""

PEER = "millpond.peer"
"""Where in an ASGI scope the `Identity` of the connection's certificate is, if it has one."""
MEMORY = 1024
"""Decisions remembered per identity: a client works on few queues, and what it makes up must not fill the memory."""


class Identity(msgspec.Struct):
    """Who asks."""

    name: str = ""
    """For logs and lease owners; empty for somebody unknown."""
    kind: Literal["anonymous", "token", "certificate"] = "anonymous"
    id: str = ""
    """The token's id, or the certificate's serial number."""
    grants: tuple[Grant, ...] = ()
    problem: str = ""
    """Why the claims of a certificate cannot be used."""
    hash: str = ""
    """Of a token: a new one under its id is somebody else's."""
    expires_at: int | None = None
    """ms UTC; from then on it is nobody's."""
    withdrawn: bool = False
    """The CA that vouched for the certificate is not one of the server's any more."""
    decided: dict[tuple[str, str | None, str | None], bool] = msgspec.field(default_factory=dict)

    def may(self, scope: str, namespace: str | None, queue: str | None) -> bool:
        """Whether a grant covers this; None stands for all of them."""
        if self.kind == "anonymous":
            return True
        key = (scope, namespace, queue)
        known = self.decided.get(key)
        if known is None:
            if len(self.decided) >= MEMORY:
                self.decided.clear()
            known = any(grant.allows(scope, namespace, queue) for grant in self._applicable(namespace))
            self.decided[key] = known
        return known

    def _applicable(self, namespace: str | None) -> Iterable[Grant]:
        # lockd's rule: the exact claim of a certificate beats that for all namespaces, also where it allows less.
        exact = [grant for grant in self.grants if grant.namespace == namespace]
        return exact if self.kind == "certificate" and exact else self.grants


ANONYMOUS = Identity()


class Authority(Protocol):
    """Knows who asks, and what he may do."""

    def identify(self, scope: Mapping[str, Any]) -> Identity:
        """Who sent the request with this ASGI scope. Raises Unauthorized."""

    def authorise(self, identity: Identity, scope: Scope, namespace: str | None, queue: str | None) -> None:
        """Return if ``identity`` may do this on the queue (None: on all of them, or on none in particular). Names as
        the caller wrote them. Raises Forbidden, Unauthorized."""

    def again(self, identity: Identity, scope: Mapping[str, Any]) -> Identity:
        """Who `identify` once said that it was, by what counts now: a stream lasts longer than a token may. Raises
        Unauthorized."""


class OpenAuthority:
    """Everybody may do everything: a server on loopback without tokens."""

    def identify(self, scope: Mapping[str, Any]) -> Identity:
        return ANONYMOUS

    def authorise(self, identity: Identity, scope: Scope, namespace: str | None, queue: str | None) -> None:
        return None

    def again(self, identity: Identity, scope: Mapping[str, Any]) -> Identity:
        return identity


class Guard:
    """Lets in by token, by certificate, or not at all."""

    def __init__(
        self,
        clock: Clock,
        tokens: Iterable[Token] | None,
        *,
        anonymous: bool = False,
        namespace: str = names.DEFAULT_NAMESPACE,
    ) -> None:
        """``tokens`` None: there is no file of them. ``anonymous``: who shows nothing may do everything.
        ``namespace``: of requests that name none."""
        self._clock = clock
        self._anonymous = anonymous
        self._namespace = namespace
        self._tokens: Tokens | None = None
        self._identities: dict[str, Identity] = {}
        self.refused = 0
        """Requests whose sender was not known; for metrics."""
        self.forbidden = 0
        """Requests whose sender may not do what he asked for."""
        if tokens is not None:
            self.replace(tokens)

    def replace(self, tokens: Iterable[Token]) -> None:
        """From now on these tokens count, and no others."""
        self._tokens = Tokens(tokens)
        self._identities = {
            token.id: Identity(
                token.name, "token", token.id, token.grants, hash=token.hash, expires_at=token.expires_at
            )
            for token in self._tokens.by_id.values()
        }

    def identify(self, scope: Mapping[str, Any]) -> Identity:
        """Who sent the request. Raises Unauthorized."""
        if self._tokens is not None:
            for name, value in scope["headers"]:
                if name == b"authorization":
                    return self._by_token(value, scope)
        for name, value in scope["headers"]:
            if name == b"origin" or (name == b"sec-fetch-site" and value != b"none"):
                # A page that somebody visits can have his browser send requests to this machine, with his certificate
                # if he has one; only a token cannot be sent along. Nobody else sends these headers; "none" is what is
                # asked for by hand.
                raise Refusal(403, "browser_refused", "requests of web pages (with an Origin) need a bearer token")
        peer: Identity | None = scope.get(PEER)
        if peer is not None:
            self._check_certificate(peer)
            return peer
        if self._anonymous:
            return ANONYMOUS
        self.refused += 1
        if self._tokens is None:
            raise Unauthorized("this server wants a client certificate; connect with one")
        raise Unauthorized("this server wants a token: send it as 'Authorization: Bearer mpt_…'")

    def _by_token(self, value: bytes, scope: Mapping[str, Any]) -> Identity:
        assert self._tokens is not None
        kind, _, text = value.decode("latin-1").strip().partition(" ")
        token, reason = None, "not a bearer token"
        if kind.lower() == "bearer":
            token, reason = self._tokens.find(text.strip(), self._clock.now_ms())
        if token is not None:
            return self._identities[token.id]
        self.refused += 1
        client = scope.get("client")
        log.info("millpond.auth.refused", extra={"client": client[0] if client else "", "reason": reason})
        # One text for all reasons: who tries tokens is not to learn which of them exist.
        raise Unauthorized(
            "the token is not valid: it is unknown, wrong or expired; ask who runs the server for another"
        )

    def _check_certificate(self, peer: Identity) -> None:
        # The handshake has seen to this once; a connection may last for years.
        if peer.withdrawn:
            reason = "the CA of the client certificate is not trusted any more"
        elif peer.expires_at is not None and self._clock.now_ms() >= peer.expires_at:
            reason = "the client certificate has expired"
        else:
            return
        self.refused += 1
        raise Unauthorized(f"{reason}: connect again, with another one")

    def again(self, identity: Identity, scope: Mapping[str, Any]) -> Identity:
        """Who that is now. Raises Unauthorized."""
        peer: Identity | None = scope.get(PEER)
        if peer is not None:
            self._check_certificate(peer)
        if identity.kind != "token":
            return identity
        now = self._identities.get(identity.id)
        if now is not None and now.hash != identity.hash:
            now = None  # another token took its id
        if now is not None and (now.expires_at is None or self._clock.now_ms() < now.expires_at):
            return now
        self.refused += 1
        raise Unauthorized("the token is not valid any more: it was revoked, replaced or has expired; show another")

    def authorise(self, identity: Identity, scope: Scope, namespace: str | None, queue: str | None) -> None:
        """Return if ``identity`` may do this. Raises Forbidden, InvalidQueue."""
        if identity.kind == "anonymous":
            return
        # Nothing named at all is everything; a queue without a namespace is one of the default namespace.
        somewhere = queue is not None or namespace
        namespace = names.namespace_name(namespace or self._namespace) if somewhere else None
        if queue is not None:
            queue = names.queue_name(queue)
        if identity.may(scope, namespace, queue):
            return
        self.forbidden += 1
        place = f"{namespace or '*'}/{queue or '*'}"
        if identity.kind == "certificate":
            if identity.problem:
                raise Refusal(403, "invalid_namespace_claims", identity.problem)
            raise Refusal(403, "namespace_forbidden", f"the certificate has no claim to {scope} {place}")
        raise Forbidden(f"token {identity.name} may not {scope} {place}: it needs a grant such as {scope}:{place}")


# Certificates

_LOCKD_SCOPES = {
    "r": frozenset({"read", "consume"}),
    "w": frozenset({"write"}),
    "rw": frozenset({"read", "consume", "write"}),
}
"""lockd's permissions. Purging, redriving and policies are not among them: lockd has none of that."""
EVERYWHERE = "ALL"
"""As a claim's namespace: all of them."""


def _escape(value: str) -> str:
    return re.sub(r"([,+\\])", r"\\\1", value)


def serial_number(text: str) -> str:
    """A serial number in lower-case hexadecimal without leading zeros."""
    return f"{int(text, 16):x}"


def certificate_identity(certificate: Mapping[str, Any]) -> Identity:
    """Who shows a certificate, as `ssl.SSLObject.getpeercert` tells it, and what its claims grant.

    As lockd has it: a ``spiffe://`` URI says that it is a client's, and ``lockd://ns/NAMESPACE?perm=r|w|rw`` (no perm:
    rw; ``ALL``: every namespace) what it may do. What lockd does not know, above all ``admin``, is granted by
    ``millpond://ns/NAMESPACE?scope=read,admin``."""
    subject = ",".join(
        f"{_SHORT.get(name, name)}={_escape(value)}"
        for part in reversed(certificate.get("subject", ()))
        for name, value in part
    )
    serial = serial_number(certificate.get("serialNumber", "0"))
    uris = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"]
    grants: list[Grant] = []
    problem = ""
    if not any(uri.startswith("spiffe://") for uri in uris):
        problem = "the certificate has no spiffe:// URI among its alternative names; issue one for clients"
    for uri in uris:
        if uri.startswith(("lockd://", "millpond://")):
            try:
                grants.append(_claim(uri))
            except ValueError as error:
                problem = problem or f"the certificate's claim {uri[:200]} {error}"
    if problem:
        grants = []
    ends = certificate.get("notAfter")
    expires_at = None if ends is None else int(ssl.cert_time_to_seconds(ends)) * 1000
    return Identity(f"{subject}#{serial}", "certificate", serial, tuple(grants), problem, expires_at=expires_at)


def _claim(uri: str) -> Grant:
    parts = urlsplit(uri)
    if parts.netloc != "ns":
        raise ValueError("names no namespace: it is to begin with lockd://ns/ or millpond://ns/")
    name = parts.path.removeprefix("/")
    try:
        namespace = "*" if name == EVERYWHERE else names.namespace_name(name or "-/-")
    except InvalidQueue as error:
        raise ValueError(f"names no namespace: {error}") from None
    options = parse_qsl(parts.query, keep_blank_values=True)
    if parts.scheme == "millpond":
        named = [one for key, value in options if key == "scope" for one in value.split(",")]
        if not named or not set(named) <= set(SCOPES) or len(options) != 1:
            raise ValueError(f"needs ?scope= and some of {', '.join(SCOPES)}")
        return Grant(frozenset(named), namespace, "*")
    perm = [value.lower() for key, value in options if key == "perm"] or ["rw"]
    if len(perm) != 1 or perm[0] not in _LOCKD_SCOPES:
        raise ValueError("has a perm that is neither r, w nor rw")
    return Grant(_LOCKD_SCOPES[perm[0]], namespace, "*")


_SHORT = {
    "commonName": "CN",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "countryName": "C",
    "stateOrProvinceName": "ST",
    "localityName": "L",
}
