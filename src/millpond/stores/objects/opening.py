"""From a URL to a bucket: ``s3://bucket/prefix``, ``gs://bucket/prefix``, ``az://container/prefix``.

A URL says where the bucket is and never who is asking: it ends in logs, in shell histories and in `ps`. Who is asking
is found as the cloud's own tools find it. Nothing here quotes more of a URL than scheme, bucket and prefix.
"""

from __future__ import annotations

import atexit
import ipaddress
import math
import os
import re
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import cache, partial
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, parse_qsl, urlsplit

import msgspec

from millpond.errors import InvalidInput, StoreError
from millpond.model.clock import Clock
from millpond.model.ids import IdSource
from millpond.stores.objects.clouds import Cloud
from millpond.stores.objects.obstore_bucket import DELETE_WINDOW, PART, PATIENCE, TIMEOUT, Clients, ObstoreBucket
from millpond.stores.objects.probe import check_at_opening, probe
from millpond.stores.objects.profile import credentials_of_profile
from millpond.stores.objects.requests import CountedBucket

if TYPE_CHECKING:
    from millpond.stores.base import Finding, Store

SCHEMES = {"s3": Cloud.S3, "gs": Cloud.GOOGLE, "az": Cloud.AZURE}

_EXAMPLE = {
    Cloud.S3: "s3://bucket/prefix?region=eu-central-1",
    Cloud.GOOGLE: "gs://bucket/prefix",
    Cloud.AZURE: "az://container/prefix?account=name",
}
_EXTRA = {Cloud.S3: "s3", Cloud.GOOGLE: "gcs", Cloud.AZURE: "azure"}
_ENDPOINTS = {
    Cloud.S3: ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    Cloud.GOOGLE: ("GOOGLE_BASE_URL",),
    Cloud.AZURE: ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_SEGMENT = re.compile(r"[A-Za-z0-9._=@+,-]+")
"""What no cloud and no proxy writes differently in a URL."""
_LONGEST_PREFIX = 400
"""Of the 1,024 bytes that clouds give a name, some 500 are for what stands below the prefix."""
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CONNECT_TIMEOUT = 5.0
_CLOCKS_APART = 3.0
"""Seconds by which a corrected clock may still be wrong: clouds tell whole seconds, and replies take time."""
_SILENCE = 60.0
"""Seconds without a byte after which the transfer of a large part is given up; also for the part to be sent in."""
_PART_RETRIES = 4
_BEFORE_PROFILES = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE")
"""Variables that win over the files of profiles, as with Amazon's own tools."""
_AT_EXIT = 0.05
"""Seconds; the threads need microseconds, and a busy machine may keep them waiting."""
LARGEST_INLINE = 4 * 2**20
"""Bytes of payload in a record. A record is read whole and held in memory."""


class Location(msgspec.Struct, frozen=True, kw_only=True):
    """A bucket's URL, read."""

    cloud: Cloud
    scheme: str
    bucket: str
    prefix: str
    endpoint: str | None = None
    region: str | None = None
    account: str | None = None
    profile: str | None = None
    virtual_hosted: bool = False
    anonymous: bool = False
    allow_http: bool = False
    timeout: float = TIMEOUT
    retry_for: float = PATIENCE
    inline_limit: int | None = None

    @property
    def where(self) -> str:
        """The URL without its options."""
        return f"{self.scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")

    @property
    def identity(self) -> str:
        """Which bucket it is of all that there are, as far as a URL tells."""
        at = self.endpoint or self.account
        return self.where + (f" at {at}" if at else "")


def _boolean(value: str) -> bool:
    if value not in {"true", "false"}:
        raise ValueError("true or false")
    return value == "true"


def _seconds(least: float, most: float) -> Callable[[str], float]:
    def convert(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not least <= number <= most:  # nor is NaN
            raise ValueError(f"seconds, {least:g} to {most:g}")
        return number

    return convert


def _bytes(most: int) -> Callable[[str], int]:
    def convert(value: str) -> int:
        if not (value.isascii() and value.isdecimal() and len(value) < 20 and int(value) <= most):
            raise ValueError(f"bytes, 0 to {most}")
        return int(value)

    return convert


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("letters, digits, dots and hyphens")
    return value


def _profile(value: str) -> str:
    if not value.isprintable() or len(value) > 200:
        raise ValueError("the name of a profile in ~/.aws/config")
    return value


def _endpoint(value: str) -> str:
    shape = "https://host or https://host:port"
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError(shape) from None
    if parts.scheme not in {"http", "https"} or not host or "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(f"{shape}, without a name, password or query")
    return value.rstrip("/")


_COMMON: dict[str, Callable[[str], Any]] = {
    "endpoint": _endpoint,
    "allow_http": _boolean,
    "anonymous": _boolean,
    "timeout": _seconds(0.05, 600),
    "retry_for": _seconds(0, 3600),
    "inline_limit": _bytes(LARGEST_INLINE),
}
OPTIONS: dict[Cloud, dict[str, Callable[[str], Any]]] = {
    Cloud.S3: {**_COMMON, "region": _name, "profile": _profile, "virtual_hosted": _boolean},
    Cloud.GOOGLE: _COMMON,
    Cloud.AZURE: {**_COMMON, "account": _name},
}
"""What may stand after the ? of a URL. The ValueError of each says what it should have been."""


def parse_location(url: str) -> Location:
    """Read a URL of the schemes in `SCHEMES`. Raises InvalidInput, which says what to write instead."""
    try:
        parts = urlsplit(url)
    except ValueError:
        raise InvalidInput("the store's URL is not a URL") from None
    cloud = SCHEMES[parts.scheme]
    example = _EXAMPLE[cloud]
    if "@" in parts.netloc:
        raise InvalidInput(
            f"the {parts.scheme}:// URL has credentials in it, or an account before an @: write {example}, and leave "
            "credentials to the environment"
        )
    if not parts.netloc:
        raise InvalidInput(f"the {parts.scheme}:// URL names no bucket: write {example}")
    if not _BUCKET.fullmatch(parts.netloc):
        raise InvalidInput(
            f"{parts.netloc!r} is no bucket's name, which has lower-case letters, digits, dots and hyphens, and no "
            f"port (write ?endpoint= for a server of your own): {example}"
        )
    prefix = _prefix(parts, example)
    at = f"{parts.scheme}://{parts.netloc}/{prefix}"
    if parts.fragment or "#" in url:
        raise InvalidInput(f"{at} is followed by a #, which a bucket's URL cannot have")
    options = _options(cloud, parts.query, at)
    if "endpoint" not in options and (found := _endpoint_of_environment(cloud)) is not None:
        options["endpoint"] = found
    location = Location(cloud=cloud, scheme=parts.scheme, bucket=parts.netloc, prefix=prefix, **options)
    endpoint = location.endpoint
    if endpoint is not None and endpoint.startswith("http:") and not (location.allow_http or _is_loopback(endpoint)):
        raise InvalidInput(
            f"{at}: an endpoint by http:// sends messages in the clear: write https://, or add allow_http=true"
        )
    if cloud is Cloud.AZURE and location.account is None and not os.environ.get("AZURE_STORAGE_ACCOUNT_NAME"):
        raise InvalidInput(f"{at} names no storage account: add ?account=name, or set AZURE_STORAGE_ACCOUNT_NAME")
    return location


def _prefix(parts: SplitResult, example: str) -> str:
    prefix = parts.path.removeprefix("/").removesuffix("/")
    if not prefix:
        return ""
    for segment in prefix.split("/"):
        if segment in {".", ".."} or not _SEGMENT.fullmatch(segment):
            raise InvalidInput(
                f"the prefix {prefix[:100]!r} has a part that is empty, . or .., or has other characters than letters, "
                f"digits and ._=@+,- in it: write {example}"
            )
    if len(prefix) > _LONGEST_PREFIX:
        raise InvalidInput(f"the prefix has {len(prefix)} characters; {_LONGEST_PREFIX} are the most")
    return prefix


def _options(cloud: Cloud, query: str, at: str) -> dict[str, Any]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        raise InvalidInput(f"{at} is followed by options that are not name=value, joined by &") from None
    known = OPTIONS[cloud]
    options: dict[str, Any] = {}
    for name, value in pairs:
        if name not in known:
            # The value may be a secret that was put where it does not belong; the name may be as well.
            shown = repr(name) if _NAME.fullmatch(name) and len(name) <= 40 else "one"
            raise InvalidInput(
                f"{at} has an option that it does not know, {shown}; it knows {', '.join(sorted(known))}. Credentials "
                "come from the environment, a profile or the machine's role"
            )
        if name in options:
            raise InvalidInput(f"{at} has the option {name} twice; write it once")
        try:
            options[name] = known[name](value)
        except ValueError as error:
            raise InvalidInput(f"{at}: {name} is to be {error}") from None
    return options


def _endpoint_of_environment(cloud: Cloud) -> str | None:
    """What obstore would take from there; read here, so that the same is asked of it as of one in the URL."""
    for variable in _ENDPOINTS[cloud]:
        if value := os.environ.get(variable):
            try:
                return _endpoint(value)
            except ValueError as error:
                raise InvalidInput(f"the environment's {variable} is to be {error}") from None
    return None


def _is_loopback(endpoint: str) -> bool:
    host = urlsplit(endpoint).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_bucket(
    location: Location,
    *,
    clock: Clock,
    ids: IdSource | None = None,
    on_request: Callable[[str, str], None] | None = None,
) -> ObstoreBucket:
    """The bucket at ``location``; nothing is asked of it yet. Raises StoreError without the package that it needs."""
    try:
        from obstore import store as stores
        from obstore.exceptions import BaseError
    except ImportError as error:
        raise StoreError(
            f"{location.scheme}:// needs the package obstore: pip install 'millpond[{_EXTRA[location.cloud]}]'"
        ) from error
    _wait_for_obstore_at_exit()
    kind, config, more = {
        Cloud.S3: (stores.S3Store, *_s3(location, clock)),
        Cloud.GOOGLE: (stores.GCSStore, _google(location), {}),
        Cloud.AZURE: (stores.AzureStore, _azure(location), {}),
    }[location.cloud]

    def make(*, large: bool = False, retries: int = 0, **overrides: Any) -> Any:
        return kind(
            location.bucket,
            prefix=location.prefix or None,
            config={**config, **overrides},
            client_options=_client_options(location, large=large),
            retry_config=_retries(retries),
            **more,
        )

    try:
        one_by_one = {"disable_bulk_delete": True} if location.cloud is Cloud.S3 else {}
        bulk = make()
        clients = Clients(
            small=make(**one_by_one) if one_by_one else bulk,
            bulk=bulk,
            large=make(large=True),
            parts=make(large=True, retries=_PART_RETRIES),
        )
    except BaseError as error:
        # A broken file of credentials, an odd variable in the environment: obstore quotes no secrets here.
        raise StoreError(f"{location.where}: {str(error).partition(chr(10))[0]}") from None
    return ObstoreBucket(
        clients,
        location.cloud,
        where=location.where,
        clock=clock,
        ids=ids or IdSource(clock),
        patience=location.retry_for,
        on_request=on_request,
    )


@cache
def _wait_for_obstore_at_exit() -> None:
    """Let obstore's threads put down what they hold of Python before the interpreter ends.

    They do so a moment after the call that they served has returned. A program whose last act is such a call could end
    in that moment; then the thread asks an interpreter for its lock that is no more, and the process aborts
    (measured: one of twenty commands ended with SIGABRT, with everything done)."""
    atexit.register(threading.Event().wait, _AT_EXIT)


def open_object_store(url: str, *, clock: Clock) -> Store:
    """The store in the bucket that ``url`` names, not opened yet. Raises InvalidInput, StoreError."""
    from millpond.stores.objects.store import INLINE_LIMIT, ObjectStore

    location = parse_location(url)
    ids = IdSource(clock)
    inner = open_bucket(location, clock=clock, ids=ids)
    bucket = CountedBucket(inner, part_bytes=PART, batch=location.cloud.deletes)
    inner.on_repeat = bucket.repeated
    return ObjectStore(
        bucket,
        clock=clock,
        inline_limit=INLINE_LIMIT if location.inline_limit is None else location.inline_limit,
        margin=round((location.timeout + DELETE_WINDOW + _CLOCKS_APART) * 1000),
        name=location.scheme,
        check=partial(check_at_opening, bucket, where=location.identity, clock=clock, ids=ids),
    )


async def probe_url(url: str, *, clock: Clock) -> list[Finding]:
    """The whole probe of the bucket that ``url`` names. Raises InvalidInput, StoreError."""
    ids = IdSource(clock)
    bucket = open_bucket(parse_location(url), clock=clock, ids=ids)
    try:
        return await probe(bucket, clock=clock, ids=ids)
    finally:
        await bucket.close()


def _s3(location: Location, clock: Clock) -> tuple[dict[str, Any], dict[str, Any]]:
    config: dict[str, Any] = {}
    more: dict[str, Any] = {}
    if location.endpoint is not None:
        config["endpoint"] = location.endpoint
    if location.virtual_hosted:
        config["virtual_hosted_style_request"] = True
    region = location.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if location.anonymous:
        config["skip_signature"] = True
    elif location.profile is not None or not any(map(os.environ.get, _BEFORE_PROFILES)):
        found = credentials_of_profile(location.profile, clock=clock)
        if found is not None:
            more["credential_provider"] = found.provider
            region = region or found.region
    if region is not None:
        config["region"] = region
    return config, more


def _google(location: Location) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if location.endpoint is not None:
        config["base_url"] = location.endpoint
    if location.anonymous:
        # obstore asks for credentials before it writes even where it is told to sign nothing.
        config["bearer_token"] = "anonymous"
    return config


def _azure(location: Location) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if location.account is not None:
        config["account_name"] = location.account
    if location.endpoint is not None:
        config["endpoint"] = location.endpoint
    if location.anonymous:
        config["skip_signature"] = True
    return config


def _client_options(location: Location, *, large: bool) -> dict[str, Any]:
    options: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=min(_CONNECT_TIMEOUT, location.timeout / 2)),
        "timeout": timedelta(seconds=location.timeout),
    }
    if large:
        silence = max(_SILENCE, location.timeout)
        options["read_timeout"] = timedelta(seconds=silence)
        options["timeout"] = timedelta(hours=1)  # of a whole download: what is slow but flows may go on
    if location.allow_http or (location.endpoint is not None and location.endpoint.startswith("http:")):
        options["allow_http"] = True
    return options


def _retries(count: int) -> dict[str, Any]:
    return {
        "max_retries": count,
        "retry_timeout": timedelta(minutes=3),
        "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
    }
