"""The server: HTTP in front of a store. Needs the extra ``server``; see docs/guides/server.md.

Invariant: importing this package, `options` or `tokens` costs nothing: the command line does so to print its help.
"""

from __future__ import annotations
