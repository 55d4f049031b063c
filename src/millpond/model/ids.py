"""Message ids (UUIDv7, RFC 9562 section 5.7), lease ids and nonces, from one source of chance per pond.

Ids of one source rise strictly even when the wall clock stands still or goes back (RFC 9562 section 6.2, method 2:
the random part is a counter that is re-seeded each millisecond). Between processes they are ordered by their clocks
only, so nothing may take id order for the truth about who came first. The id of a message that is not due yet tells
when it will be (`IdSource.later_id`), so that a store which sorts by id sorts by due time.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

from millpond.model.clock import Clock

_HIGH_BITS = 26
_LOW_BITS = 48
"""The 74 random bits of a UUIDv7, cut where its last group begins: the text before that group is kept between ids."""
_LATEST = (1 << 48) - 1
"""The last millisecond that a UUIDv7 can tell, in the year 10889."""
_LEASE_IDS = 32
"""Lease ids made at once."""
_POOL = 4096
"""Bytes of randomness fetched at once: one system call for 256 ids instead of one each (378 ns apiece, measured)."""


class IdSource:
    """Makes ids. Not thread-safe: a pond uses its own on its own event loop."""

    def __init__(self, clock: Clock, random_bytes: Callable[[int], bytes] = os.urandom) -> None:
        self._clock = clock
        self._random_bytes = random_bytes
        self._pool = b""
        self._at = 0
        self._last_ms = -1
        self._high = 0
        self._low = 0
        self._prefix = ""
        self._later_ms = -1
        self._later = 0
        self._hex = ""
        self._hex_at = 0

    def random(self, count: int) -> bytes:
        """``count`` (≤ 4,096) unpredictable bytes."""
        at = self._at
        if at + count > len(self._pool):
            self._pool = self._random_bytes(_POOL)
            at = 0
        self._at = at + count
        return self._pool[at : at + count]

    def below(self, bound: int) -> int:
        """A number in [0, bound), for jitter and spreading (not for secrets: slightly biased)."""
        return int.from_bytes(self.random(8)) % bound

    def message_id(self) -> str:
        """A new UUIDv7, greater than every one this source made before."""
        now = self._clock.now_ms()
        if now > self._last_ms:
            self._last_ms = now
            self._reseed()
        else:
            at = self._at
            if at + 4 > len(self._pool):
                self._pool = self._random_bytes(_POOL)
                at = 0
            self._at = at + 4
            self._low += 1 + int.from_bytes(self._pool[at : at + 4])
            if self._low >> _LOW_BITS:
                self._high += 1
                if self._high >> _HIGH_BITS:
                    self._last_ms += 1
                    self._reseed()
                else:
                    self._low = int.from_bytes(self.random(6)) >> 1
                    self._compose()
        return f"{self._prefix}{self._low:012x}"

    def message_ids(self, count: int) -> list[str]:
        """As many new ids, rising: as `message_id`, for less each."""
        ids: list[str] = []
        while count > 0:
            ids.append(self.message_id())
            count -= 1
            some = min(count, _POOL // 4)
            prefix, low = self._prefix, self._low
            for step in struct.unpack(f">{some}I", self._random_bytes(4 * some)) if some else ():
                low += 1 + step
                ids.append(f"{prefix}{low:012x}")
            if low >> _LOW_BITS:
                # Once in a very long time: those past the end of the counter are made again, with another prefix.
                del ids[-some:]
                continue
            self._low = low
            count -= some
        return ids

    def later_id(self, at: int) -> str:
        """A new UUIDv7 that tells the time ``at`` (ms UTC) instead of now. Ids asked for in a row with the same time
        rise; they are unique, as those of different sources are, by their 73 bits of chance."""
        at = min(max(at, 0), _LATEST)
        if at == self._later_ms:
            self._later += 1 + int.from_bytes(self.random(4))
        if at != self._later_ms or self._later >> _HIGH_BITS + _LOW_BITS:
            self._later_ms = at
            # The first bit stays 0, as in `_reseed`.
            self._later = int.from_bytes(self.random(10)) >> (80 - _HIGH_BITS - _LOW_BITS + 1)
        high, low = self._later >> _LOW_BITS, self._later & (1 << _LOW_BITS) - 1
        return f"{at >> 16:08x}-{at & 0xFFFF:04x}-7{high >> 14:03x}-{0x8000 | high & 0x3FFF:04x}-{low:012x}"

    def _reseed(self) -> None:
        # The first bit stays 0, which leaves the counter room to count (RFC 9562 section 6.2).
        self._high = int.from_bytes(self.random(4)) >> (32 - _HIGH_BITS + 1)
        self._low = int.from_bytes(self.random(6)) >> 1
        self._compose()

    def _compose(self) -> None:
        last, high = self._last_ms, self._high
        self._prefix = f"{last >> 16:08x}-{last & 0xFFFF:04x}-7{high >> 14:03x}-{0x8000 | high & 0x3FFF:04x}-"

    def lease_id(self) -> str:
        """128 random bits in hex; knowing one is part of the right to answer for a delivery."""
        at = self._hex_at
        if at == len(self._hex):
            # Some at once, for less each; few enough that a consumer of single messages pays for none in vain.
            self._hex, at = self.random(_LEASE_IDS * 16).hex(), 0
        self._hex_at = at + 32
        return self._hex[at : at + 32]
