"""AWS profiles: keys in ``~/.aws/credentials`` and ``~/.aws/config``, which obstore does not read.

Only keys that stand there. Profiles that say how to get keys (single sign-on, roles, a program) are the business of
Amazon's own tools, and the error says how these hand over what they got.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from millpond.errors import InvalidInput, StoreError
from millpond.model.clock import Clock

_FRESH = 300
"""Seconds until the files are read again: other tools replace short-lived keys in them."""
_BEYOND_US = (
    "role_arn", "credential_process", "sso_session", "sso_start_url", "login_session", "web_identity_token_file"
)  # fmt: skip


class Profile(NamedTuple):
    """A profile with keys. Its text shows none of them."""

    name: str
    region: str | None
    provider: Callable[[], dict[str, Any]]
    """Gives obstore the keys, and reads the files anew for it."""

    def __repr__(self) -> str:
        return f"Profile({self.name!r}, region={self.region!r})"


def credentials_of_profile(name: str | None, *, clock: Clock) -> Profile | None:
    """The profile ``name``, else that of AWS_PROFILE, else ``default``; None where nobody named one and there is none
    with keys.

    Raises InvalidInput for a named profile that is not there, StoreError for one that Millpond cannot use."""
    named = name or os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
    chosen = named or "default"
    fields = _fields(chosen)
    if not fields:
        if named is None:
            return None
        raise InvalidInput(
            f"there is no AWS profile {chosen!r} in the files {_file('credentials')} and {_file('config')}; name "
            "another, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if "aws_access_key_id" not in fields or "aws_secret_access_key" not in fields:
        if named is None:
            return None
        how = next((key for key in _BEYOND_US if key in fields), None)
        why = f"gets its keys by {how}" if how is not None else "has no keys"
        raise StoreError(
            f"the AWS profile {chosen!r} {why}, which Millpond does not do; run your program with what "
            f"`aws configure export-credentials --profile {chosen} --format env` prints in its environment"
        )

    def provide() -> dict[str, Any]:
        now = _fields(chosen)
        try:
            return {
                "access_key_id": now["aws_access_key_id"],
                "secret_access_key": now["aws_secret_access_key"],
                "token": now.get("aws_session_token"),
                "expires_at": datetime.fromtimestamp(clock.now_ms() / 1000 + _FRESH, UTC),
            }
        except KeyError:
            raise StoreError(f"the AWS profile {chosen!r} has no keys any more; put them back") from None

    return Profile(chosen, fields.get("region"), provide)


def _file(kind: str) -> Path:
    variable = {"credentials": "AWS_SHARED_CREDENTIALS_FILE", "config": "AWS_CONFIG_FILE"}[kind]
    return Path(os.environ.get(variable) or f"~/.aws/{kind}").expanduser()


def _fields(profile: str) -> dict[str, str]:
    """What both files say of a profile; the credentials file wins."""
    fields: dict[str, str] = {}
    for kind in ("config", "credentials"):
        path = _file(kind)
        parser = configparser.RawConfigParser(strict=False)
        try:
            parser.read_string(path.read_text("utf-8"))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise StoreError(f"the AWS file {path} cannot be read: {error.strerror}; mend its permissions") from error
        except (configparser.Error, UnicodeDecodeError):
            # The parser quotes the line, and that may be a key.
            raise StoreError(f"the AWS file {path} is not in the form that Amazon's tools write; mend it") from None
        sections = (f"profile {profile}", profile) if kind == "config" else (profile,)
        for section in sections:
            if parser.has_section(section):
                fields |= dict(parser.items(section))
    return fields
