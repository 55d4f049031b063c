"""From a server's URL and options to addresses, credentials and a time-out; no I/O but the reading of certificates."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs

import msgspec

from millpond.errors import InvalidInput

DEFAULT_PORT = 9341
"""lockd's."""
DEFAULT_TIMEOUT = 30.0
LONGEST_TIMEOUT = 86_400.0
MAX_ENDPOINTS = 64
"""More are a slip; each is tried in turn."""
OPTIONS = ("token", "ca", "cert", "key", "timeout")


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Where servers of one store are, and how to speak to them."""

    endpoints: tuple[str, ...]
    """URLs without a final slash, in the order in which they are preferred."""
    secure: bool
    token: str | None = None
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    timeout: float = DEFAULT_TIMEOUT
    """Seconds that a call may take besides its wait, tries included."""

    def tls(self) -> ssl.SSLContext | None:
        """What to check a server by; None without TLS. Raises InvalidInput for files that are none of that."""
        if not self.secure:
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca)
        except (OSError, ssl.SSLError) as error:
            raise InvalidInput(f"ca={self.ca!r} is no file of certificates: {_words(error)}") from error
        if self.cert is not None:
            try:
                context.load_cert_chain(self.cert, self.key)
            except (OSError, ssl.SSLError) as error:
                raise InvalidInput(f"cert={self.cert!r} with its key cannot be used: {_words(error)}") from error
        return context


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or getattr(error, "reason", None) or str(error)


def parse(url: str, given: Mapping[str, Any]) -> Address:
    """The address that ``url`` and keywords give; keywords win. Raises InvalidInput, without quoting the query, which
    may hold a token."""
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    rest, question, query = rest.partition("?")
    rest = rest.replace(f",{scheme}://", ",")  # as it may be written for each
    hosts, slash, path = rest.partition("/")
    shown = f"{scheme}://{hosts}{slash}{path}"
    if scheme not in ("http", "https") or not separator or not hosts.strip(","):
        raise InvalidInput(
            f"{shown!r} names no server: write http://host:{DEFAULT_PORT} or https://host:{DEFAULT_PORT}"
        )
    if "#" in url:
        raise InvalidInput("a server's URL has no #; in a token it is written %23")
    if "@" in hosts:
        raise InvalidInput("a server's URL has no user and password: give a token")
    endpoints: list[str] = []
    for host in hosts.split(","):
        endpoints.append(f"{scheme}://{_host_and_port(host.strip(), shown)}{slash}{path}".rstrip("/"))
    if len(endpoints) > MAX_ENDPOINTS:
        raise InvalidInput(f"{len(endpoints)} servers are more than {MAX_ENDPOINTS}")
    options = _options(query, shown) if question else {}
    options |= {name: value for name, value in given.items() if value is not None}
    timeout = options.get("timeout", DEFAULT_TIMEOUT)
    for name in ("token", "ca", "cert", "key"):
        value = options.get(name)
        if value is not None and (not isinstance(value, str) or not value):
            raise InvalidInput(f"{name} must be text that is not empty")
    token = options.get("token")
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise InvalidInput("a token is printable ASCII without spaces")
    if timeout.__class__ not in (int, float) or not 0 < timeout <= LONGEST_TIMEOUT:
        raise InvalidInput(f"timeout must be more than 0 seconds, and at most a day, not {timeout!r:.100}")
    if scheme == "http" and any(options.get(name) for name in ("ca", "cert", "key")):
        raise InvalidInput("ca, cert and key are of use with https:// only")
    if options.get("key") is not None and options.get("cert") is None:
        raise InvalidInput("key goes with a cert")
    return Address(
        endpoints=tuple(dict.fromkeys(endpoints)),
        secure=scheme == "https",
        token=token,
        ca=options.get("ca"),
        cert=options.get("cert"),
        key=options.get("key"),
        timeout=float(timeout),
    )


def _host_and_port(host: str, shown: str) -> str:
    name, port = host, ""
    if host.startswith("["):  # IPv6
        name, bracket, after = host.partition("]")
        name, port = name + bracket, after.removeprefix(":")
        good = bool(bracket) and (not after or after.startswith(":"))
    else:
        name, colon, port = host.partition(":")
        good = bool(name) and (bool(port) or not colon)
    if not good or not all(each.isalnum() or each in "-._:[]%" for each in name) or not name.isascii():
        raise InvalidInput(f"{host!r} in {shown!r} is no host and port")
    if port and (not port.isascii() or not port.isdecimal() or not 0 < int(port[:6]) < 65_536):
        raise InvalidInput(f"{host!r} in {shown!r} has no port from 1 to 65535")
    return f"{name.lower()}:{port or DEFAULT_PORT}"


def _options(query: str, shown: str) -> dict[str, Any]:
    try:
        parsed = parse_qs(query, keep_blank_values=True, strict_parsing=True, errors="strict")
    except ValueError as error:
        raise InvalidInput(f"the options of {shown!r} are written name=value&name=value") from error
    found: dict[str, Any] = {name: values[-1] for name, values in parsed.items()}
    unknown = sorted(set(found) - set(OPTIONS))
    if unknown:
        raise InvalidInput(f"{shown!r} has options that are none of a server's URL: {', '.join(unknown)}")
    if "timeout" in found:
        try:
            found["timeout"] = float(found["timeout"])
        except ValueError as error:
            raise InvalidInput(f"timeout={found['timeout']} in {shown!r} is not a number of seconds") from error
    return found
