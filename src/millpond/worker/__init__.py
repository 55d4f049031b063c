"""Workers: from a function to a service.

``registry`` holds what `Pond.consumer` was told, at import time, before anything is opened; ``hooks`` what handlers
and those around them get to see; ``outcomes`` and ``retries`` how a handler says what is to become of its message.
These lie below the pond. Everything else lies above it and knows no store: it takes messages and answers for them by
the calls that any consumer has, so that it works over whatever a pond does.
"""

from __future__ import annotations
