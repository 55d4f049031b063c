"""Bearer tokens: their form, what they grant, and the file that they stand in.

The file holds SHA-256 of each token, never the token. A plain hash is enough because a token is 256 bits of chance
that this module drew: there is nothing to guess, so the salt and the slow function that passwords need would only slow
requests.

A token is ``mpt_<id>_<secret>``. The id is public: by it the entry is found, lists show it, logs name it. The prefix
lets scanners of source code see a token that was committed by mistake.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import logging
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, NamedTuple

from millpond.errors import InvalidInput

log = logging.getLogger("millpond.server")

SCOPES = ("read", "write", "consume", "admin")
"""To look; to enqueue; to receive and answer; to destroy and to change settings. None of them implies another."""
PREFIX = "mpt"
_SECRET_BYTES = 32
_ID_BYTES = 6
LARGEST_FILE = 4 * 1024 * 1024
"""Bytes: some ten thousand tokens. A larger file is not one of tokens."""
LONGEST_TOKEN = 256
"""Characters that are looked at of what a client sends."""

_ID = re.compile(r"[0-9a-f]{12}")
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_PATTERN = re.compile(r"[a-z0-9._*-]{1,128}")


class Grant(NamedTuple):
    """What a token may do somewhere. In the patterns ``*`` stands for any characters, none included."""

    scopes: frozenset[str]
    namespace: str
    queue: str

    def __str__(self) -> str:
        return f"{','.join(scope for scope in SCOPES if scope in self.scopes)}:{self.namespace}/{self.queue}"

    def allows(self, scope: str, namespace: str | None, queue: str | None) -> bool:
        """Whether it covers this; None stands for all of them."""
        return scope in self.scopes and _covers(self.namespace, namespace) and _covers(self.queue, queue)


def _covers(pattern: str, name: str | None) -> bool:
    if name is None:
        return not pattern.strip("*")
    first, *rest = pattern.split("*")
    if not rest:
        return pattern == name
    # Part by part, each as far left as it can be: a regular expression could take exponential time here.
    *middle, last = rest
    if not name.startswith(first) or not name.endswith(last) or len(name) < len(first) + len(last):
        return False
    at, end = len(first), len(name) - len(last)
    for part in middle:
        found = name.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True


def parse_grant(text: str) -> Grant:
    """``write,read:shop/orders-*``: scopes, namespace, queue. ``*`` for the scopes is all of them. Raises
    InvalidInput."""
    scopes, colon, place = text.strip().partition(":")
    namespace, slash, queue = place.partition("/")
    named = SCOPES if scopes.strip() == "*" else tuple(scope.strip() for scope in scopes.split(","))
    if not colon or not slash or not set(named) <= set(SCOPES):
        raise InvalidInput(
            f"{text[:100]!r} is no grant: write SCOPES:NAMESPACE/QUEUE, as in write,read:default/orders-* ; scopes are "
            f"{', '.join(SCOPES)} or *"
        )
    for part in (namespace, queue):
        if not _PATTERN.fullmatch(part.strip().lower()):
            raise InvalidInput(f"{text[:100]!r}: {part[:100]!r} is no pattern of names (a-z 0-9 . _ - and *)")
    return Grant(frozenset(named), namespace.strip().lower(), queue.strip().lower())


class Token(NamedTuple):
    """One entry of the file."""

    id: str
    name: str
    """For people and logs."""
    hash: str
    grants: tuple[Grant, ...]
    created_at: int
    """ms UTC"""
    expires_at: int | None = None
    """ms UTC; from then on it is refused."""

    def expired(self, now: int) -> bool:
        """It is past its time (ms UTC)."""
        return self.expires_at is not None and now >= self.expires_at


def hash_of(text: str) -> str:
    """What the file holds of a token."""
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def create(
    name: str, grants: Iterable[Grant], *, random_bytes: Callable[[int], bytes], now: int, expires_at: int | None = None
) -> tuple[Token, str]:
    """A new token, and its text, which is not kept anywhere. Raises InvalidInput."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"token name {name[:64]!r} is not 1 to 64 of A-Z a-z 0-9 . _ @ -, beginning with one of the first"
        )
    found = tuple(grants)
    if not found:
        raise InvalidInput("a token without a grant could do nothing: say what it may do, as in write:default/orders")
    id = random_bytes(_ID_BYTES).hex()
    secret = base64.urlsafe_b64encode(random_bytes(_SECRET_BYTES)).decode().rstrip("=")
    text = f"{PREFIX}_{id}_{secret}"
    return Token(id, name, hash_of(text), found, now, expires_at), text


class Tokens:
    """The tokens of a file, ready to be looked up."""

    def __init__(self, tokens: Iterable[Token]) -> None:
        self.by_id = {token.id: token for token in tokens}

    def find(self, text: str, now: int) -> tuple[Token | None, str]:
        """The token with this text if it is good now (ms UTC), else None and why, for the server's log."""
        parts = text.split("_", 2) if len(text) <= LONGEST_TOKEN else []
        token = self.by_id.get(parts[1]) if len(parts) == 3 and parts[0] == PREFIX else None
        # Compared in constant time, and also where there is nothing to compare with: how long an answer takes says
        # nothing about which ids there are, or how much of a secret was right.
        same = hmac.compare_digest(hash_of(text[: LONGEST_TOKEN + 1]), token.hash if token is not None else _NO_HASH)
        if token is None:
            return None, "unknown"
        if not same:
            return None, "wrong secret"
        if token.expired(now):
            return None, "expired"
        return token, ""


_NO_HASH = "sha256:" + "0" * 64


# The file


def parse(text: str, source: str) -> list[Token]:
    """The tokens of a file's text. Raises InvalidInput, which names ``source`` and the entry."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{source} is not TOML: {error}") from None
    entries = document.pop("token", [])
    if document or not isinstance(entries, list):
        raise InvalidInput(f"{source} holds something else than [[token]] entries; `millpond token create` writes them")
    tokens: dict[str, Token] = {}
    for number, entry in enumerate(entries, 1):
        token = _entry(entry, f"{source}, token {number}")
        if token.id in tokens:
            raise InvalidInput(f"{source}, token {number}: id {token.id} is there already")
        tokens[token.id] = token
    return list(tokens.values())


def _entry(entry: Any, where: str) -> Token:
    if not isinstance(entry, dict):
        raise InvalidInput(f"{where} is no table")
    unknown = set(entry) - {"id", "name", "hash", "allow", "created", "expires"}
    if unknown:
        raise InvalidInput(f"{where}: a token has no {', '.join(sorted(unknown))}")
    for key, form in (("id", _ID), ("name", _NAME), ("hash", _HASH)):
        value = entry.get(key)
        if not isinstance(value, str) or not form.fullmatch(value):
            # Not quoted: somebody may have put a token where its hash belongs.
            raise InvalidInput(f"{where}: {key} is missing or not of its form; `millpond token create` writes it")
    allow = entry.get("allow")
    if not isinstance(allow, list) or not allow or not all(isinstance(one, str) for one in allow):
        raise InvalidInput(f"{where}: allow must be a list of grants such as 'write:default/orders-*'")
    try:
        grants = tuple(parse_grant(one) for one in allow)
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}") from None
    created, expires = entry.get("created"), entry.get("expires")
    return Token(
        entry["id"],
        entry["name"],
        entry["hash"],
        grants,
        0 if created is None else _time(created, where, "created"),
        None if expires is None else _time(expires, where, "expires"),
    )


def _time(value: Any, where: str, key: str) -> int:
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise InvalidInput(f"{where}: {key} must be a time with its zone, such as 2030-01-31T00:00:00Z")
    return round(value.timestamp() * 1000)


def time_text(ms: int) -> str:
    """A time (ms UTC) as the file has it."""
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def dump(tokens: Iterable[Token]) -> str:
    """The text of a file with these tokens."""
    lines = ["# Written by `millpond token`; the server sees changes by itself. Comments are not kept."]
    for token in tokens:
        lines += ["", "[[token]]", f'id = "{token.id}"', f'name = "{token.name}"', f'hash = "{token.hash}"']
        lines.append("allow = [" + ", ".join(f'"{grant}"' for grant in token.grants) + "]")
        lines.append(f"created = {time_text(token.created_at)}")
        if token.expires_at is not None:
            lines.append(f"expires = {time_text(token.expires_at)}")
    return "\n".join(lines) + "\n"


def load(path: str) -> list[Token]:
    """The tokens in a file. One that others may read or change is used all the same, with the log event
    ``millpond.auth.tokens_exposed``. Raises InvalidInput."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise InvalidInput(
            f"tokens file {path} cannot be read: {error.strerror or error}; `millpond token create` makes one, which "
            "has to belong to the user that runs the server"
        ) from error
    if len(data) > LARGEST_FILE:
        raise InvalidInput(f"tokens file {path} is larger than {LARGEST_FILE} bytes; name the right file")
    if os.name == "posix" and mode & (stat.S_IWGRP | stat.S_IROTH | stat.S_IWOTH):
        log.warning(
            "millpond.auth.tokens_exposed",
            extra={"path": path, "mode": f"{stat.S_IMODE(mode):04o}", "cure": f"chmod 600 {path}"},
        )
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise InvalidInput(f"tokens file {path} is not UTF-8 text") from None
    return parse(text, f"tokens file {path}")


def save(path: str, tokens: Iterable[Token]) -> None:
    """Put these tokens into the file, which only its owner may read; in one step, so that a server never reads half
    of it. Raises OSError."""
    folder, name = os.path.split(os.path.abspath(path))
    part = os.path.join(folder, f".{name}.{os.getpid()}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o600)  # whatever the umask, and whatever lay there
            file.write(dump(tokens))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        raise
