"""HTTP in front of a pond: lockd's queue protocol and Millpond's own routes. Needs ``pip install 'millpond[server]'``.

Nothing here decides what may happen to a message; that is the service's business. A route decodes, asks the pond, and
encodes. Importing this package, `options` or `tokens` costs nothing: the command line does so to print its help.
"""

from __future__ import annotations
