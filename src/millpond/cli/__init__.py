"""The ``millpond`` command: one file per noun.

Invariant: importing this package costs click and nothing else. What is heavy (asyncio, the engine, cryptography, rich)
is imported by the command that needs it, when it runs; ``millpond --help`` must answer before a person notices.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run ``millpond`` with these arguments (default: the process's) and exit with its code."""
    _hold_standard_streams()
    from millpond.cli.app import app

    app.main(arguments, prog_name="millpond")
    raise SystemExit(0)


def _hold_standard_streams() -> None:
    """Where stdin, stdout or stderr was closed (``>&-``), put the null device in its place: else the next file to be
    opened would get its number, and what is printed would end up in the database. ``sys.stdin`` stays None."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number is this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
