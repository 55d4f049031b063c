"""The exit codes."""

from __future__ import annotations

EXIT_ERROR = 1
"""An error, told in one line on stderr; also problems found by ``verify``."""
EXIT_USAGE = 2
"""Wrong usage; nothing was done."""
EXIT_OUTCOME = 3
"""Done, with the outcome that ``--fail-empty`` or ``--fail-dead`` asks to be told of."""
EXIT_INTERRUPTED = 130
"""Stopped by SIGINT: 128 + 2, as shells report it."""
EXIT_TERMINATED = 143
"""Stopped by SIGTERM before what was asked for was done: 128 + 15."""
EXIT_BROKEN_PIPE = 141
"""The reader of stdout went away: 128 + SIGPIPE, what a program looks like that is simply killed by it."""
