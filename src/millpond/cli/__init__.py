"""The ``millpond`` command: one file per noun.

Invariant: importing this package costs click and nothing else. What is heavy (asyncio, the engine, cryptography, rich)
is imported by the command that needs it, when it runs; ``millpond --help`` must answer before a person notices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run ``millpond`` with these arguments (default: the process's) and exit with its code."""
    from millpond.cli.app import app

    app.main(arguments, prog_name="millpond")
    raise SystemExit(0)
