"""Millpond's own routes under /v1: batches, streams, looking, administering."""

from __future__ import annotations

from collections.abc import Mapping

from millpond.server.context import Handler


def hot() -> Mapping[str, Handler]:
    """Path → handler, for routes that must be fast: any method, matched before everything else."""
    return {}


def routes() -> Mapping[str, Handler]:
    """Path → handler, POST only."""
    return {}
