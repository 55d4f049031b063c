"""Draws docs/concepts/life-cycle.md from the table that the code runs.

python docs/make_life_cycle.py          writes the page
"""

from __future__ import annotations

from pathlib import Path

from millpond.lifecycle import RESET, TABLE, Event, LeaseRule, State

PAGE = Path(__file__).parent / "concepts" / "life-cycle.md"

INTRODUCTION = """# The life cycle of a message

Drawn from `millpond.lifecycle.TABLE`, through which every change of a message goes; `python docs/make_life_cycle.py`
writes this page, and a test checks that it is current.

A **delayed** message becomes **ready** when its visible-at is reached, and a **leased** one has **lapsed** when its
lease has ended: both only by time passing. A lapsed lease stays its holder's until somebody else is given the message,
so a late answer to a message that nobody took in between still counts. An event without a row cannot happen: it is
refused.
"""


def _count(change: int) -> str:
    return {RESET: "0", 0: "=", 1: "+1"}[change]


def page() -> str:
    """The page's text."""
    lines = [
        INTRODUCTION,
        "```mermaid",
        "stateDiagram-v2",
        "    [*] --> delayed: enqueue",
        "    [*] --> ready: enqueue",
    ]
    lines += ["    delayed --> ready: time", "    leased --> lapsed: time"]
    for (state, event), change in TABLE.items():
        target = "[*]" if change.to is State.GONE else change.to.value
        lines.append(f"    {state.value} --> {target}: {event.value}")
    lines += ["```", "", "| state | event | becomes | attempts | failures | lease | visible at |"]
    lines.append("|---|---|---|---|---|---|---|")
    for (state, event), change in TABLE.items():
        kept = change.to not in {State.GONE, State.DEAD}
        lease = change.lease.value if kept or change.lease is not LeaseRule.CLEAR else "none"
        visible = change.visible if kept else ""
        row = [
            state.value,
            event.value,
            change.to.value,
            _count(change.attempts),
            _count(change.failures),
            lease,
            visible,
        ]
        lines.append("| " + " | ".join(row) + " |")
    used = {event for _, event in TABLE}
    assert used == set(Event), "every event has a row"
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
