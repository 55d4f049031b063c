"""Who asks, and what he may do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import msgspec

Scope = Literal["read", "write", "consume", "admin"]
"""What a request wants: to look, to enqueue, to receive and answer, to destroy and to change settings."""


class Identity(msgspec.Struct, frozen=True):
    """Who asks."""

    name: str = ""
    """For logs and lease owners; empty for somebody unknown."""
    kind: Literal["anonymous", "token", "certificate"] = "anonymous"


ANONYMOUS = Identity()


class Authority(Protocol):
    """Knows who asks, and what he may do."""

    def identify(self, scope: Mapping[str, Any]) -> Identity:
        """Who sent the request with this ASGI scope. Raises Unauthorized."""

    def authorise(self, identity: Identity, scope: Scope, namespace: str | None, queue: str | None) -> None:
        """Return if ``identity`` may do this on the queue (None: on all of them, or on none in particular). Names as
        the caller wrote them. Raises Forbidden, Unauthorized."""


class OpenAuthority:
    """Everybody may do everything: a server on loopback without tokens."""

    def identify(self, scope: Mapping[str, Any]) -> Identity:
        return ANONYMOUS

    def authorise(self, identity: Identity, scope: Scope, namespace: str | None, queue: str | None) -> None:
        return None
