"""When periodic jobs are due."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from millpond.errors import InvalidInput
from millpond.worker.schedule import Schedule, parse

BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str, zone: ZoneInfo | None = None) -> int:
    """A time as ms UTC."""
    moment = datetime.fromisoformat(text)
    return round(moment.replace(tzinfo=zone or UTC, fold=0).timestamp() * 1000)


def ticks(schedule: Schedule, start: int, count: int) -> list[str]:
    """The next ticks, in UTC."""
    found = []
    for _ in range(count):
        tick = schedule.after(start)
        assert tick is not None
        assert tick > start
        found.append(datetime.fromtimestamp(tick / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S"))
        start = tick
    return found


def test_an_interval_is_counted_from_the_epoch_whoever_was_started_when() -> None:
    schedule = parse("every 10s")
    assert ticks(schedule, at("2025-06-15 12:00:03"), 3) == [
        "2025-06-15 12:00:10",
        "2025-06-15 12:00:20",
        "2025-06-15 12:00:30",
    ]
    assert schedule.after(at("2025-06-15 12:00:10")) == at("2025-06-15 12:00:20")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("every 10s", 10), ("every 5m", 300), ("EVERY 1h30m", 5400), ("every 1d", 86_400), ("every 2h", 7200)],
)
def test_intervals_as_people_write_them(text: str, seconds: int) -> None:
    schedule = parse(text)
    first = schedule.after(at("2025-06-15 12:00:03"))
    assert first is not None
    assert schedule.after(first) == first + seconds * 1000
    assert parse(timedelta(seconds=seconds)).text == schedule.text


def test_cron_in_a_time_zone() -> None:
    schedule = parse("0 3 * * *", "Europe/Berlin")
    assert ticks(schedule, at("2025-06-15 12:00"), 2) == ["2025-06-16 01:00:00", "2025-06-17 01:00:00"]
    assert ticks(parse("0 3 * * *"), at("2025-06-15 12:00"), 1) == ["2025-06-16 03:00:00"]
    assert ticks(parse("30 8 * * MON-FRI", "America/New_York"), at("2025-06-13 13:00"), 1) == ["2025-06-16 12:30:00"]


def test_a_time_that_a_clock_change_leaves_out_comes_right_after_the_gap() -> None:
    schedule = parse("30 2 * * *", "Europe/Berlin")  # 2025-03-30, 02:00 becomes 03:00 = 01:00 UTC
    assert ticks(schedule, at("2025-03-29 12:00"), 2) == ["2025-03-30 01:00:00", "2025-03-31 00:30:00"]


def test_a_time_that_a_clock_change_repeats_comes_once() -> None:
    schedule = parse("30 2 * * *", "Europe/Berlin")  # 2025-10-26, 03:00 becomes 02:00 = 01:00 UTC
    assert ticks(schedule, at("2025-10-25 12:00"), 2) == ["2025-10-26 00:30:00", "2025-10-27 01:30:00"]
    # Asked between the two half past two, or after both: not again.
    assert schedule.after(at("2025-10-26 01:10")) == at("2025-10-27 01:30")
    assert schedule.newest(at("2025-10-26 01:45"), at("2025-10-26 00:30"), 5) == []


def test_jobs_of_every_hour_keep_their_distance_over_clock_changes() -> None:
    schedule = parse("0 * * * *", "Europe/Berlin")
    for start in ("2025-03-29 22:00", "2025-10-25 22:00"):
        found, moment = [], at(start)
        for _ in range(6):
            tick = schedule.after(moment)
            assert tick is not None
            found.append(tick - moment)
            moment = tick
        assert found == [3_600_000] * 6


@pytest.mark.parametrize(
    "text", ["30 2 * * *", "0,30 2 * * *", "0 * * * *", "*/15 * * * *", "15 3 * * SUN", "0 0 1 * *"]
)
@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "UTC"])
def test_looking_back_finds_what_looking_ahead_found(text: str, zone: str) -> None:
    """What a worker catches up with are the very ticks that another would have fired."""
    schedule = parse(text, zone)
    chance = random.Random(text + zone)
    changes = ["2025-03-09 07:00", "2025-03-30 01:00", "2025-10-05 15:30", "2025-10-26 01:00", "2025-11-02 06:00"]
    for _ in range(8):
        begin = at(chance.choice(changes)) - chance.randrange(0, 8 * 3_600_000)
        end = begin + chance.randrange(3_600_000, 40 * 3_600_000)
        ahead, moment = [], begin
        while (tick := schedule.after(moment)) is not None and tick <= end:
            ahead.append(tick)
            moment = tick
        assert schedule.newest(end, begin, 10_000) == ahead
        assert schedule.newest(end, begin, 3) == ahead[-3:]


def test_newest_is_bounded_whatever_the_gap() -> None:
    moment = at("2025-06-15 12:00:00")
    assert parse("every 1s").newest(moment, 0, 3) == [moment - 2000, moment - 1000, moment]
    assert parse("* * * * *").newest(moment, 0, 2) == [moment - 60_000, moment]
    assert parse("* * * * *").newest(moment, moment, 2) == []
    assert parse("every 10s").newest(moment + 5, moment - 1, 9) == [moment]


def test_a_day_that_never_comes() -> None:
    with pytest.raises(InvalidInput, match="day-of-month"):
        parse("0 0 30 2 *")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("* * * *", "five fields"),
        ("0 0 0 * * *", "five fields"),
        ("61 * * * *", "minute"),
        ("every", "every 10s"),
        ("every 0s", "between one second"),
        ("every 10", "every 10s"),
        ("every 400d", "between one second"),
        ("nightly", "five fields"),
        (5, "not int"),
        (timedelta(milliseconds=1500), "whole number"),
    ],
)
def test_what_is_no_schedule_is_told_how_to_be_one(text: object, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        parse(text).after(0)


@pytest.mark.parametrize("zone", ["Mars/Olympus", "../etc/passwd", ""])
def test_an_unknown_time_zone_is_told_how_to_be_known(zone: str) -> None:
    with pytest.raises(InvalidInput, match="Europe/Berlin"):
        parse("0 3 * * *", zone)
