"""A report every night at three, by the clock of the shop, however many workers there are.

    millpond worker nightly_report --app-dir examples

Adds up yesterday's sales (``SALES``, a CSV file of time, sku and amount) and writes ``REPORTS/2025-06-15.txt``. A night
in which nothing ran is made up for when a worker starts again: the newest seven of them. Which day a report is for
comes from the tick and not from the clock on the wall, so a report that is made late, or twice, is the same report.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from zoneinfo import ZoneInfo

import millpond

SALES = Path(os.environ.get("SALES", "sales.csv"))
REPORTS = Path(os.environ.get("REPORTS", "reports"))
ZONE = "Europe/Berlin"

pond = millpond.connect(os.environ.get("MILLPOND_STORE", "sqlite:///reports.db"))


@pond.periodic(os.environ.get("REPORT_AT", "0 3 * * *"), tz=ZONE, catch_up=7)
def nightly_report(tick: millpond.Tick) -> None:
    """The report of the day before the tick."""
    write_report(tick.at.astimezone(ZoneInfo(ZONE)).date() - timedelta(days=1))


def write_report(day: date) -> None:
    """Add up a day's sales; the file appears when it is whole."""
    sums: Counter[str] = Counter()
    total = Decimal(0)
    with SALES.open(newline="") as file:
        for row in csv.DictReader(file):
            if datetime.fromisoformat(row["time"]).astimezone(ZoneInfo(ZONE)).date() == day:
                sums[row["sku"]] += 1
                total += Decimal(row["amount"])
    lines = [f"Sales of {day}", *(f"{sku:<20} {count:>6}" for sku, count in sorted(sums.items())), f"Total {total:>21}"]
    REPORTS.mkdir(parents=True, exist_ok=True)
    unfinished = REPORTS / f".{day}.{os.getpid()}"
    unfinished.write_text("\n".join(lines) + "\n")
    unfinished.replace(REPORTS / f"{day}.txt")
