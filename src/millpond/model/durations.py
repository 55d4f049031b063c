"""Durations as people type them: ``30``, ``1.5``, ``500ms``, ``5m``, ``1h30m``. Seconds as float everywhere else."""

from __future__ import annotations

import re

UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}

_PART = re.compile(r"(\d+(?:\.\d+)?|\.\d+)(ms|s|m|h|d|w)", re.ASCII)
_PLAIN = re.compile(r"\d+(?:\.\d+)?|\.\d+", re.ASCII)


def parse_duration(text: str) -> float:
    """Seconds. A bare number is seconds; parts with units add up (``1h30m``). Raises ValueError, also below zero."""
    value = text.strip().lower().replace(" ", "")
    if _PLAIN.fullmatch(value):
        return float(value)
    at, total = 0, 0.0
    while at < len(value):
        part = _PART.match(value, at)
        if part is None:
            break
        total += float(part[1]) * UNITS[part[2]]
        at = part.end()
    if not value or at < len(value):
        raise ValueError(
            f"{text!r} is no duration: write seconds (30, 1.5) or with a unit (500ms, 30s, 5m, 2h, 1d, 1h30m)"
        )
    return total


def format_duration(seconds: float) -> str:
    """A duration for people, to two units at most: ``250ms``, ``4.2s``, ``5m``, ``1h30m``, ``2d4h``."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    if seconds < 60:
        return f"{seconds:.1f}".removesuffix(".0") + "s"
    whole = round(seconds)
    for (large, size), (small, unit) in ((("d", 86_400), ("h", 3600)), (("h", 3600), ("m", 60)), (("m", 60), ("s", 1))):
        if whole >= size:
            count, rest = divmod(whole, size)
            return f"{count}{large}" + (f"{rest // unit}{small}" if rest >= unit else "")
    return f"{whole}s"
