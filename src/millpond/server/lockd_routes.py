"""lockd's queue routes."""

from __future__ import annotations

from collections.abc import Mapping

from millpond.server.context import Handler


def hot() -> Mapping[str, Handler]:
    """Path → handler, any method."""
    return {}
