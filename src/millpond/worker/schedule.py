"""When a periodic job is due: cron expressions and intervals, in a time zone. Pure: it is told the time, and knows no
store.

A tick is a point in time, in milliseconds UTC. Which ticks there are follows from the schedule alone, not from when a
worker was started, so that all workers of a schedule agree on each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, Protocol
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from millpond.errors import InvalidInput, MillpondError

SECOND = 1000
UNITS = {"s": SECOND, "m": 60 * SECOND, "h": 3600 * SECOND, "d": 86_400 * SECOND}
_INTERVAL = re.compile(r"every\s+((?:\d+[smhd])+)", re.IGNORECASE)
_PART = re.compile(r"(\d+)([smhd])", re.IGNORECASE)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LONGEST = 366 * UNITS["d"]
"""Of an interval. One that is longer is a slip, and better said by cron."""


class Schedule(Protocol):
    """The ticks of a periodic job."""

    text: str
    """What it was made from, in one spelling: two schedules with the same text have the same ticks."""

    def after(self, moment: int) -> int | None:
        """The first tick after ``moment`` (ms UTC); None when there is none within fifty years."""

    def newest(self, moment: int, after: int, limit: int) -> list[int]:
        """The newest ``limit`` of the ticks t with ``after`` < t ≤ ``moment``, oldest first."""


class Interval:
    """A tick every so often. Counted from 1970 UTC: `every 1h` is at each full hour, whoever was started when."""

    def __init__(self, milliseconds: int) -> None:
        if not SECOND <= milliseconds <= LONGEST:
            raise InvalidInput("an interval is between one second and a year")
        self.milliseconds = milliseconds
        self.text = f"every {milliseconds // SECOND}s"

    def after(self, moment: int) -> int:
        """The first tick after ``moment``."""
        return (moment // self.milliseconds + 1) * self.milliseconds

    def newest(self, moment: int, after: int, limit: int) -> list[int]:
        """The newest ticks of a span, oldest first."""
        last = moment // self.milliseconds
        first = max(after // self.milliseconds, last - limit)
        return [number * self.milliseconds for number in range(first + 1, last + 1)]


class Cron:
    """A cron expression of five fields, as Debian's cron reads it, in a time zone.

    Where a clock change leaves out the time of a job, the job comes right after the gap; where one repeats it, the job
    comes once. Jobs of every hour, or of every so many minutes, keep their distance in real time instead.
    """

    def __init__(self, expression: str, zone: tzinfo) -> None:
        self.expression = " ".join(expression.split())
        self.zone = zone
        self.text = f"{self.expression} {zone}"
        if len(self.expression.split(" ")) != 5:
            raise InvalidInput(
                f"{expression!r} is no cron expression: it needs five fields (minute hour day-of-month month "
                "day-of-week), or write every 10s, every 5m, every 1h30m"
            )
        self._simulate(_EPOCH, False)

    def _simulate(self, start: datetime, reverse: bool) -> Iterator[datetime]:
        try:
            from cronsim import CronSim, CronSimError
        except ImportError as error:
            raise MillpondError("cron expressions need the package cronsim: pip install 'millpond[worker]'") from error
        try:
            return CronSim(self.expression, start, reverse)
        except CronSimError as error:
            raise InvalidInput(f"cron expression {self.expression!r}: {error}") from error

    def _local(self, moment: int) -> datetime:
        return (_EPOCH + timedelta(milliseconds=moment)).astimezone(self.zone)

    def after(self, moment: int) -> int | None:
        """The first tick after ``moment``; None when there is none within fifty years."""
        for tick in self._simulate(self._local(moment), False):
            found = _milliseconds(tick)
            # Within an hour that a clock change repeats, the simulation begins in the first of the two.
            if found > moment:
                return found
        return None

    def newest(self, moment: int, after: int, limit: int) -> list[int]:
        """The newest ticks of a span, oldest first."""
        found: list[int] = []
        # Two hours on, and back: a moment in an hour that is repeated names an earlier one otherwise.
        start = self._local(moment - moment % SECOND + 2 * UNITS["h"])
        for tick in self._simulate(start, True):
            at = _milliseconds(tick)
            if at <= after or len(found) == limit:
                break
            if at <= moment:
                found.append(at)
        return found[::-1]


def _milliseconds(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(milliseconds=1)


def zone_of(tz: str | tzinfo | None) -> tzinfo:
    """A time zone by its IANA name; None is UTC. Raises InvalidInput."""
    if tz is None:
        return ZoneInfo("UTC")
    if isinstance(tz, tzinfo):
        return tz
    try:
        return ZoneInfo(tz)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InvalidInput(
            f"there is no time zone {tz!r} on this machine: write it as Europe/Berlin, and install the package tzdata "
            "where the system has no time zones"
        ) from error


def parse(when: Any, tz: str | tzinfo | None = None) -> Schedule:
    """A schedule from a cron expression of five fields, from ``every 10s`` (``5m``, ``1h30m``, ``1d``), or from a
    timedelta. ``tz``: the time zone in which a cron expression is read. Raises InvalidInput."""
    if isinstance(when, timedelta):
        whole, rest = divmod(when, timedelta(seconds=1))
        if rest:
            raise InvalidInput("an interval is a whole number of seconds")
        return Interval(whole * SECOND)
    if not isinstance(when, str):
        raise InvalidInput(f"a schedule is text or a timedelta, not {type(when).__name__}")
    zone = zone_of(tz)
    match = _INTERVAL.fullmatch(when.strip())
    if match is not None:
        return Interval(sum(int(number) * UNITS[unit.lower()] for number, unit in _PART.findall(match[1])))
    if when.strip().lower().startswith("every"):
        raise InvalidInput(f"{when!r} is no interval: write every 10s, every 5m, every 1h30m or every 1d")
    return Cron(when, zone)
