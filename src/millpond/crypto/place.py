"""Where an encrypted store keeps its own keys, for those who must know it without knowing any cipher."""

from __future__ import annotations

PLACE = ("~millpond", "~vault")
"""Namespace and queue of the vault among the queues' documents. None can be named so: ``~`` is refused in names."""
