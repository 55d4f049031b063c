"""TLS: contexts from PEM files, and a context whose certificates can be exchanged while the server runs.

`Exchangeable` is the context that sockets are opened with. Each new connection is wrapped by whichever context is
current then, so a reload replaces everything at once: certificate, key, CAs. Changing a live context could not do that:
it can be given more CAs, but none can be taken away.
"""

from __future__ import annotations

import contextlib
import os
import re
import ssl
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from millpond.errors import InvalidInput
from millpond.server.config import ServerConfig

LARGEST = 4 * 1024 * 1024
"""Bytes of a PEM file; a bundle of all public CAs has a quarter of a MiB."""

_BLOCK = re.compile(r"-----BEGIN ([A-Z ]+)-----.*?-----END \1-----", re.DOTALL)


class Exchangeable(ssl.SSLContext):
    """A server's context that hands each new connection to the current one."""

    current: ssl.SSLContext

    def __new__(cls, current: ssl.SSLContext) -> Exchangeable:
        made = super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)
        made.current = current
        return made

    def __init__(self, current: ssl.SSLContext) -> None:
        pass

    def wrap_bio(self, *arguments: Any, **options: Any) -> ssl.SSLObject:
        """What an event loop calls for each connection."""
        return self.current.wrap_bio(*arguments, **options)


def files(config: ServerConfig) -> list[str]:
    """The files that the context is made from; what to watch for changes."""
    named = (config.tls_bundle, config.tls_cert, config.tls_key, config.tls_client_ca)
    return list(dict.fromkeys(path for path in named if path))


def context(config: ServerConfig) -> ssl.SSLContext:
    """A server's context from the files that the config names: TLS 1.2 and up. Raises InvalidInput, which names the
    file and never quotes it."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    # A client that could renegotiate could keep a core busy; compression would tell lengths of secrets.
    made.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    made.set_alpn_protocols(["http/1.1"])
    if config.tls_bundle is not None:
        _load_bundle(made, config.tls_bundle)
    else:
        assert config.tls_cert is not None, "the caller asked for TLS"
        _load_chain(made, config.tls_cert, config.tls_key)
        if config.tls_client_ca is not None:
            _load_ca(made, _read(config.tls_client_ca), config.tls_client_ca)
    if config.client_auth != "none":
        made.verify_mode = ssl.CERT_REQUIRED if config.client_auth == "required" else ssl.CERT_OPTIONAL
    return made


def no_longer_trusted(before: ssl.SSLContext, now: ssl.SSLContext) -> Callable[[Mapping[str, Any]], bool] | None:
    """Whether a client's certificate, which ``before`` let in, may be one that ``now`` would not. None: no CA is gone.

    Of a connection only the client's own certificate is known, not those between it and the CA. It is certain to be
    good when the CA that issued it is still there; any other is taken for one that is not: its client connects again,
    and shows by that whether it was."""
    if set(before.get_ca_certs(binary_form=True)) <= set(now.get_ca_certs(binary_form=True)):
        return None
    kept = _names(now) - _names(before, without=now)
    return lambda certificate: certificate.get("issuer") not in kept


def _names(of: ssl.SSLContext, without: ssl.SSLContext | None = None) -> set[Any]:
    """The subjects of a context's CAs, but for those that are the other's as well."""
    same = set() if without is None else set(without.get_ca_certs(binary_form=True))
    pairs = zip(of.get_ca_certs(), of.get_ca_certs(binary_form=True), strict=True)
    return {shown.get("subject") for shown, der in pairs if der not in same}


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            text = file.read(LARGEST + 1)
    except OSError as error:
        raise InvalidInput(
            f"{path} cannot be read: {error.strerror or error}; name a PEM file that the server may read"
        ) from error
    if len(text) > LARGEST:
        raise InvalidInput(f"{path} is larger than {LARGEST} bytes: it is no PEM file")
    return text


def _load_chain(made: ssl.SSLContext, cert: str, key: str | None) -> None:
    _read(cert)  # for the name of the file in its error: OpenSSL's says only what is wrong
    if key is not None:
        _read(key)
    try:
        made.load_cert_chain(cert, key, lambda: _encrypted(key or cert))
    except ssl.SSLError as error:
        where = cert if key is None else f"{cert} and {key}"
        raise InvalidInput(
            f"{where}: no certificate with its private key in PEM, or they do not belong together ({_reason(error)})"
        ) from None


def _load_ca(made: ssl.SSLContext, text: str, path: str) -> None:
    try:
        made.load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError) as error:
        raise InvalidInput(f"{path}: no CA certificates in PEM ({_reason(error)})") from None
    if not made.get_ca_certs():
        raise InvalidInput(f"{path} holds no certificate of a CA; name the file of the CA that signs clients")


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or str(error).partition("(")[0].strip() or type(error).__name__


def _load_bundle(made: ssl.SSLContext, path: str) -> None:
    """CAs, certificate and key in one file, as lockd has them: a CA's certificate is told by its being one."""
    text = _read(path)
    authorities: list[str] = []
    chain: list[str] = []
    keys: list[str] = []
    for block in _BLOCK.finditer(text):
        if block[1] == "CERTIFICATE":
            (authorities if _is_ca(block[0], path) else chain).append(block[0])
        elif block[1].endswith("PRIVATE KEY"):
            keys.append(block[0])
    if not authorities or not chain or not keys:
        raise InvalidInput(
            f"{path} holds {len(authorities)} CA certificates, {len(chain)} others and {len(keys)} private keys: a "
            "bundle has at least one CA, the server's certificate and its key"
        )
    _load_ca(made, "\n".join(authorities), path)
    reason = ""
    for key in keys:  # a bundle may hold the CA's, too
        # Intermediates are CAs as well: sent along, as those who verify may not have them.
        with _as_file("\n".join([key, *chain, *authorities]) + "\n") as name:
            try:
                made.load_cert_chain(name, password=lambda: _encrypted(path))
            except ssl.SSLError as error:
                reason = _reason(error)
            else:
                return
    raise InvalidInput(f"{path}: certificate and private key do not belong together ({reason})")


def _encrypted(path: str) -> str:
    raise InvalidInput(f"the private key in {path} is encrypted; give one that is not, and that only its user may read")


@contextlib.contextmanager
def _as_file(text: str) -> Iterator[str]:
    """A file with this text: OpenSSL takes a chain from nothing else. In memory where that can be, so that no key
    is written to a disk."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("millpond-tls", os.MFD_CLOEXEC)
        name = f"/proc/self/fd/{descriptor}"
    else:
        descriptor, name = tempfile.mkstemp()
    try:
        with os.fdopen(os.dup(descriptor), "w") as file:
            file.write(text)
        yield name
    finally:
        os.close(descriptor)
        if not name.startswith("/proc/"):
            os.unlink(name)


def _is_ca(pem: str, path: str) -> bool:
    # A context lists what was loaded into it as CAs when it is one: the standard library has no other way to ask.
    trial = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        trial.load_verify_locations(cadata=pem)
    except (ssl.SSLError, ValueError) as error:
        raise InvalidInput(f"{path} holds a certificate that cannot be read ({_reason(error)})") from None
    return bool(trial.get_ca_certs())
