"""Coroutine checks are run with `asyncio.run`, one fresh event loop each; no pytest plugin is needed for that."""

from __future__ import annotations
