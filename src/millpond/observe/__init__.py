"""Middleware that tells others what handlers do: `logs`, `prometheus`, `tracing`. Each needs its own package, if any,
and is imported by whoever wants it.

    from millpond.observe.logs import Logs
    pond.middleware.append(Logs())
"""

from __future__ import annotations
