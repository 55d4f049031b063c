"""``millpond top``: the queues as they are now, on a terminal for as long as one looks, otherwise once."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from millpond.cli.durations import Duration
from millpond.cli.settings import Command, Settings, option, pass_settings

if TYPE_CHECKING:
    from millpond.cli.output import Output
    from millpond.cli.snapshot import Snapshot
    from millpond.pond import Pond

THRIFTY_INTERVAL = 30.0
"""Seconds between looks where each costs money, unless --interval says otherwise."""


@click.command(cls=Command)
@click.argument("queues", metavar="[QUEUE]...", nargs=-1)
@option("--interval", type=Duration(), default=None, help="Time between looks; default 2s, 30s where they cost money.")
@option("--once", is_flag=True, help="Print one snapshot and end, as where stdout is no terminal.")
@option("--internal", is_flag=True, help="Also the queues that Millpond keeps for itself (millpond.*).")
@pass_settings
def top(settings: Settings, queues: tuple[str, ...], interval: float | None, once: bool, internal: bool) -> None:
    """Watch the queues, or those named.

    Depths, messages a second that come (in/s) and leave for good (out/s: acked, or expired or purged), ages, who holds
    messages, errors and dead letters. A bucket does not count what comes, so there it is by how many a queue grows or
    shrinks a second (±/s). Rates are those since the look before. Keys: up and down choose a queue, p
    pauses or resumes it, r redrives its dead letters, i shows internal queues, q ends. Who holds what, and errors, are
    those of the oldest 500 messages of a queue.

    Where stdout is no terminal, with --json or --once: one snapshot, and no keys.
    """
    from millpond.cli.output import is_terminal

    live = not once and not settings.json and is_terminal(sys.stdout)
    if live and not is_terminal(sys.stdin):
        raise click.UsageError("top takes its keys from stdin, which is no terminal: give --once, or --json")

    async def watch(pond: Pond) -> None:
        if not live:
            await _print(settings, pond, queues, internal)
            return
        from millpond.cli.screen import Screen

        pause = interval
        if pause is None:
            pause = THRIFTY_INTERVAL if pond.store.capabilities.requests_cost_money else 2.0
        await Screen(pond, lambda: named(settings, pond, queues), pause, internal=internal).run()

    settings.run(watch, existing=True)


async def named(settings: Settings, pond: Pond, queues: tuple[str, ...]) -> list[tuple[str, str]]:
    """The queues asked for, by namespace and name."""
    from millpond.cli.records import all_queues

    if not queues:
        return await all_queues(pond, settings.namespace)
    chosen = [settings.queue(pond, name) for name in queues]
    return [(queue.namespace, queue.name) for queue in chosen]


async def _print(settings: Settings, pond: Pond, queues: tuple[str, ...], internal: bool) -> None:
    from millpond.cli import snapshot

    output = settings.output()
    found = await snapshot.take(pond, await named(settings, pond, queues), internal=internal or bool(queues))
    for one in found.queues if output.json else ():
        output.record(snapshot.record(one, await snapshot.details(pond, one)))
    if not output.json:
        await _tables(output, pond, found)
    if found.left_out:
        output.note(f"{found.left_out} more queues are not shown; name those that you want to see")


async def _tables(output: Output, pond: Pond, found: Snapshot) -> None:
    from millpond.cli import snapshot
    from millpond.cli.durations import format_duration

    if not found.queues:
        output.note("no queues")
        return
    output.rows(
        ("namespace", "queue", "ready", "delayed", "leased", "blocked", "dead", "oldest", "state"),
        [
            (
                *(one.namespace, one.queue, one.counts.ready, one.counts.delayed, one.counts.leased),
                *(one.counts.blocked, one.counts.dead),
                "" if one.counts.oldest_age is None else format_duration(one.counts.oldest_age),
                {True: "paused", False: "", None: "policy unreadable"}[one.paused],
            )
            for one in found.queues
        ],
    )
    rows: list[tuple[str, str, str, int]] = []
    for one in found.queues:
        more = await snapshot.details(pond, one)
        rows += [(one.queue, "held by", who, number) for who, number, _ in more.owners]
        rows += [(one.queue, "error", error, number) for error, number in more.errors]
        rows += [(one.queue, "dead", reason, number) for reason, number in more.dead]
    if rows:
        output.line()
        output.rows(("queue", "what", "who or why", "messages"), rows)
