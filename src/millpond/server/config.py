"""`ServerConfig`: how a server is set up, from flags, environment, a TOML file and defaults, in that order.

Each value knows where it came from (`Loaded.origins`). An error names the place (the flag, the variable, the file and
the key in it) and what may stand there. Nothing here opens a socket or a store.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qsl, quote, urlsplit

import msgspec

from millpond.errors import InvalidInput
from millpond.model import names
from millpond.model.durations import format_duration, parse_duration
from millpond.server.options import BY_OPTION, BY_PLACE, PREFIX, SECTIONS, SETTINGS, Setting

KIB, MIB, GIB = 1024, 1024**2, 1024**3
LONGEST = 7 * 86_400.0
"""Seconds of any time-out. Longer ones are a slip: milliseconds for seconds."""
LARGEST = 1 << 50
"""Of any number or size here; beyond it lies no machine."""


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How a server is set up. Durations are seconds. `load` makes one from the places people write settings in."""

    store: str = "sqlite:///millpond.db"
    keyring: str | None = None
    namespace: str = names.DEFAULT_NAMESPACE
    host: str = "127.0.0.1"
    port: int = 9341
    """lockd's, so that its clients find it; 0 takes a free one."""
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    tls_bundle: str | None = None
    tls_client_auth: Literal["auto", "none", "optional", "required"] = "auto"
    tls_revoked: tuple[str, ...] = ()
    auth_tokens: str | None = None
    insecure_plaintext: bool = False
    insecure_anonymous: bool = False
    max_body_bytes: int = 32 * MIB
    """Largest body that is read as a whole: JSON, MessagePack, batches. It is held in memory, so this times the
    connections that send one is what a server may need. Payloads that are streamed are not bounded by it."""
    max_meta_bytes: int = MIB
    """Largest ``meta`` part of a multipart enqueue."""
    max_payload_bytes: int = 16 * GIB
    max_attributes_bytes: int = 64 * KIB
    max_header_bytes: int = 32 * KIB
    """Twice what Node takes, four times what nginx does; whole certificate chains do not belong in a header."""
    max_headers: int = 100
    max_connections: int = 4096
    max_connections_per_address: int = 0
    """None by default: behind a proxy everybody has one address."""
    max_unsent_bytes: int = 256 * MIB
    """Of answers that clients have not read yet, in memory, of all connections together. One answer may have 64 MiB."""
    backlog: int = 2048
    """Connections that wait to be accepted."""
    max_consumers: int = 4096
    retry_window: float = 600.0
    """As `Config.retry_window`."""
    max_queues_per_namespace: int = 10_000
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    keep_alive: float = 75.0
    """Idle connections are closed after this: longer than the 60 s for which load balancers keep theirs, so that it is
    they who end one, and no request meets a connection that is being closed."""
    write_timeout: float = 60.0
    drain_grace: float = 10.0
    """From the signal to stop until new connections are refused: consumers answer what they hold."""
    shutdown_timeout: float = 10.0
    """From then on until what is still under way is cut off. Both are within the 30 s that Kubernetes waits."""
    max_visibility: float = 1800.0
    """Longer wishes of a dequeue by lockd's protocol are cut to this."""
    log_format: Literal["auto", "text", "json"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_access: bool = False
    log_audit: str | None = None
    metrics_off: bool = False
    metrics_public: bool = False
    metrics_queues: int = 1000
    traces: Literal["auto", "on", "off"] = "auto"

    def __post_init__(self) -> None:
        if not self.host or not self.host.isprintable() or any(char in " /@?#[]" for char in self.host):
            raise InvalidInput(f"host {self.host[:100]!r} is no address: write 127.0.0.1, ::1 or a name")
        if not 0 <= self.port <= 65_535:
            raise InvalidInput(f"port must be 0 to 65535, not {self.port}")
        names.namespace_name(self.namespace)
        if self.store.partition(":")[0].lower() in {"http", "https"}:
            raise InvalidInput("store is the URL of a server: name the store itself, such as sqlite:///millpond.db")
        for setting in SETTINGS:
            value = getattr(self, setting.field)
            if setting.kind == "duration" and not (_NOT_AT_ALL.get(setting.field, 0.001) <= value <= LONGEST):
                raise InvalidInput(f"{setting.place} must be more than 0 and at most a week, not {value!r}")
            least = _LEAST.get(setting.field, 1)
            if setting.kind in {"number", "bytes"} and not least <= value <= LARGEST:
                raise InvalidInput(f"{setting.place} must be at least {least:,} and at most 2**50, not {value!r}")
        if self.tls_bundle and (self.tls_cert or self.tls_key or self.tls_client_ca):
            raise InvalidInput(
                "tls.bundle holds certificate, key and CA: leave out tls.cert, tls.key and tls.client_ca"
            )
        if self.tls_key and not self.tls_cert:
            raise InvalidInput("tls.key is given without tls.cert: name the certificate's file, too")
        if self.tls_client_ca and not self.tls_cert:
            raise InvalidInput("tls.client_ca is given without tls.cert: clients show certificates over TLS only")
        if self.tls_client_auth in {"optional", "required"} and not (self.tls_client_ca or self.tls_bundle):
            raise InvalidInput(
                f"tls.client_auth is {self.tls_client_auth}, but no CA for clients is given: set tls.client_ca"
            )
        if self.tls_revoked and self.client_auth == "none":
            raise InvalidInput("tls.revoked is given, but no client shows a certificate: set tls.client_ca")
        for serial in self.tls_revoked:
            if not serial or set(serial.lower()) - set("0123456789abcdef"):
                raise InvalidInput(f"tls.revoked: {serial[:64]!r} is no serial number in hexadecimal, without colons")
        if self.insecure_anonymous and self.auth_tokens:
            raise InvalidInput("insecure.anonymous lets everybody in, auth.tokens does not: keep one of them")

    @property
    def tls(self) -> bool:
        """It speaks TLS."""
        return self.tls_cert is not None or self.tls_bundle is not None

    @property
    def client_auth(self) -> Literal["none", "optional", "required"]:
        """Whether clients must show a certificate."""
        if self.tls_client_auth != "auto":
            return self.tls_client_auth
        return "required" if self.tls_client_ca or self.tls_bundle else "none"

    @property
    def anonymous(self) -> bool:
        """Who shows neither token nor certificate may do everything."""
        return self.auth_tokens is None and self.client_auth == "none"

    def check_exposure(self) -> None:
        """Refuse to be open to others by accident. Raises InvalidInput, which says what to do."""
        host = self.host
        if is_loopback(host):
            return
        if not self.tls and not self.insecure_plaintext:
            raise InvalidInput(
                f"refusing to listen on {host} without TLS, where others can read and change what is sent: give "
                "--tls-cert and --tls-key (or --tls-bundle), listen on 127.0.0.1 behind a proxy that speaks TLS, or "
                "consent with --insecure-plaintext"
            )
        if self.anonymous and not self.insecure_anonymous:
            raise InvalidInput(
                f"refusing to listen on {host} without knowing who is there, where others can do everything: give "
                "--auth-tokens (see `millpond token create`) or --tls-client-ca, or consent with --insecure-anonymous"
            )


def is_loopback(host: str) -> bool:
    """Only this machine reaches it. A name is believed when it is ``localhost``; others may resolve to anything."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


_LEAST = {
    "port": 0,
    "max_connections_per_address": 0,
    "max_queues_per_namespace": 0,
    "metrics_queues": 0,
    # Requests of real clients need about 400 bytes of head; a body of nothing would close every route.
    "max_header_bytes": 1024,
    "max_headers": 10,
    "max_body_bytes": 1024,
    "max_meta_bytes": 1024,
}
_NOT_AT_ALL = {"retry_window": 0.0, "drain_grace": 0.0, "shutdown_timeout": 0.0}
"""Durations that may be nothing."""


# From text and TOML to values

_UNITS = {
    "b": 1,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "k": KIB,
    "m": MIB,
    "g": GIB,
    "kb": 1000,
    "mb": 10**6,
    "gb": 10**9,
}


def parse_bytes(text: str) -> int:
    """``65536``, ``64KiB``, ``100 MiB`` as bytes; k, m, g are binary. Raises ValueError."""
    value = text.strip().lower()
    digits = value.rstrip("bkmgi ")
    unit = value[len(digits) :].strip() or "b"
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 20) or unit not in _UNITS:
        raise ValueError("a number of bytes, such as 65536, 64KiB or 100MiB")
    return int(digits) * _UNITS[unit]


_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


def _convert(setting: Setting, value: Any) -> Any:
    """The value as the config has it. Raises ValueError that says what may stand there."""
    text = isinstance(value, str)
    match setting.kind:
        case "flag":
            if isinstance(value, bool):
                return value
            if text and value.strip().lower() in _TRUE | _FALSE:
                return value.strip().lower() in _TRUE
            raise ValueError("true or false")
        case "number":
            if text and value.strip().isascii() and value.strip().isdecimal() and len(value) < 20:
                return int(value)
            if value.__class__ is int:
                return value
            raise ValueError("a whole number")
        case "bytes":
            if value.__class__ is int:
                return value
            if text:
                return parse_bytes(value)
            raise ValueError("a number of bytes, such as 65536 or 64KiB")
        case "duration":
            if value.__class__ in {int, float}:
                return float(value)
            if text:
                return parse_duration(value)
            raise ValueError("a duration: seconds (30, 1.5) or with a unit (500ms, 30s, 5m)")
        case "choice":
            if value in setting.choices:
                return value
            raise ValueError(f"one of {', '.join(setting.choices)}")
        case "list":
            if text:
                return tuple(part.strip() for part in value.split(",") if part.strip())
            if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
                return tuple(value)
            raise ValueError("a list of texts")
        case _:
            if text and value.strip():
                return value
            raise ValueError("text that is not empty")


# Putting it together


class Loaded(NamedTuple):
    """A config, and where each of its values came from."""

    config: ServerConfig
    origins: dict[str, str]
    """Setting (by its place) → ``--tls-cert``, ``MILLPOND_SERVE_TLS_CERT``, ``millpond.toml`` or ``default``."""


class _Given(NamedTuple):
    setting: Setting
    value: Any
    origin: str


def load(
    flags: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None, file: str | None = None
) -> Loaded:
    """The config: ``flags`` (``tls_cert`` → value, None where not given) over ``environment`` over the TOML ``file``
    over the defaults.

    ``file`` None: what MILLPOND_SERVE_CONFIG names, if anything. Raises InvalidInput."""
    environment = os.environ if environment is None else environment
    file = file or environment.get(PREFIX + "CONFIG") or None
    given = [*(_from_file(file) if file else ()), *_from_environment(environment)]
    given += [
        _Given(BY_OPTION[name], value, BY_OPTION[name].flag)
        for name, value in (flags or {}).items()
        if value is not None
    ]
    origins = {setting.place: "default" for setting in SETTINGS}
    values: dict[str, Any] = {}
    for setting, value, origin in given:
        try:
            values[setting.field] = _convert(setting, value)
        except ValueError as error:
            shown = "" if setting.secret else f", not {value!r:.100}"
            raise InvalidInput(f"{origin}: {setting.place} must be {error}{shown}") from None
        origins[setting.place] = origin
    try:
        return Loaded(ServerConfig(**values), origins)
    except InvalidInput as error:
        # The checks of single values and of several name the settings; say where those came from.
        words = set(re.findall(r"[\w.]+\w", str(error)))
        named = [
            f"{place} from {origin}" for place, origin in origins.items() if place in words and origin != "default"
        ]
        raise InvalidInput(f"{error}" + (f" ({'; '.join(named)})" if named else "")) from None


def _from_environment(environment: Mapping[str, str]) -> list[_Given]:
    known = {setting.variable: setting for setting in SETTINGS}
    found = []
    for variable, value in sorted(environment.items()):
        if variable in known:
            if value:
                found.append(_Given(known[variable], value, variable))
        elif variable.startswith(PREFIX) and variable not in {PREFIX + "CONFIG", PREFIX + "SHOW_CONFIG"}:
            raise InvalidInput(f"{variable} is no setting of the server{_nearest(variable, known)}; unset it")
    return found


def _from_file(path: str) -> list[_Given]:
    try:
        with open(path, "rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        raise InvalidInput(f"config file {path} cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"config file {path} is not TOML: {error}") from error
    found = []
    for key, value in document.items():
        rows = [(key, value)]
        if key in SECTIONS:
            if not isinstance(value, dict):
                raise InvalidInput(f"config file {path}: {key} is a table: write [{key}] and its settings below")
            rows = [(f"{key}.{inner}", one) for inner, one in value.items()]
        for place, one in rows:
            if place not in BY_PLACE:
                raise InvalidInput(f"config file {path}: there is no setting {place}{_nearest(place, BY_PLACE)}")
            found.append(_Given(BY_PLACE[place], one, path))
    return found


def _nearest(name: str, known: Mapping[str, Setting]) -> str:
    # Somebody who writes tls_cert at the top means [tls] cert.
    plain = {one.replace(".", "_"): one for one in known}
    close = [plain[name]] if name in plain else difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


# Showing it

_SHOWN_OPTIONS = {
    *("busy_timeout", "inline_limit", "cache_bytes", "region", "endpoint", "account", "profile", "virtual_hosted"),
    *("anonymous", "allow_http", "timeout", "retry_for"),
}
"""Options of a store's URL that say nothing secret; the values of others are left out."""


def redact_url(url: str) -> str:
    """A store's URL without what might be secret in it: user and password, options that are not known to be harmless,
    the fragment. For logs, errors and people."""
    try:
        parts = urlsplit(url)
        query = parse_qsl(parts.query, keep_blank_values=True)
        location = parts.netloc.rpartition("@")
    except ValueError:
        return "(not a URL)"
    if not parts.scheme:
        return "(not a URL)"
    shown = "&".join(
        f"{name}={redact_url(value) if '://' in value else quote(value, safe='/:')}" if name in _SHOWN_OPTIONS
        else f"{quote(name, safe='')}=***"
        for name, value in query
    )  # fmt: skip
    head, _, _ = url.partition("?")
    head, _, _ = head.partition("#")
    if location[0]:
        head = head.replace(location[0] + "@", "***@", 1)
    return head + (f"?{shown}" if shown else "")


class Shown(NamedTuple):
    """A setting as people may see it."""

    name: str
    value: str
    origin: str


def show(loaded: Loaded) -> list[Shown]:
    """Every setting with its value and origin; secrets are left out."""
    rows = []
    for setting in SETTINGS:
        value = getattr(loaded.config, setting.field)
        if value is None:
            text = ""
        elif setting.secret:
            text = redact_url(value)
        elif setting.kind == "flag":
            text = "true" if value else "false"
        elif setting.kind == "duration":
            text = format_duration(value)
        elif setting.kind == "bytes":
            text = format_bytes(value)
        elif setting.kind == "list":
            text = ", ".join(value)
        else:
            text = str(value)
        rows.append(Shown(setting.place, text, loaded.origins[setting.place]))
    return rows


def format_bytes(count: int) -> str:
    """``64KiB``, or the plain number where it is none of those."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if count and count % unit == 0:
            return f"{count // unit}{name}"
    return str(count)
