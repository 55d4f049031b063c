"""``millpond dlq``: the dead letters of a queue."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import click

from millpond.cli.settings import Group, Settings, confirm, option, pass_settings, queue_argument

if TYPE_CHECKING:
    from millpond.message import MessageView
    from millpond.pond import Pond
    from millpond.queue import Queue

PAGE = 100
"""Dead letters read at a time."""


@click.group(cls=Group)
def dlq() -> None:
    """Look at dead letters, send them again, remove them.

    A message becomes a dead letter when it failed as often as it may; reason, last error, payload and state stay.
    """


@dlq.command("list")
@queue_argument()
@option("--limit", "-n", type=click.IntRange(1), default=100, help="At most this many.")
@option("--all", "everything", is_flag=True, environment=False, help="All of them, however many.")
@option("--after", metavar="ID", environment=False, help="Go on after this message.")
@pass_settings
def list_(settings: Settings, queue: str, limit: int, everything: bool, after: str | None) -> None:
    """List the dead letters of QUEUE, oldest message first."""

    async def look(pond: Pond) -> None:
        from millpond.cli.records import error_text, timestamp, view

        output = settings.output()
        found = _all(settings.queue(pond, queue), after, None if everything else limit)
        if output.json:
            async for letter in found:
                output.record(view(letter))
            return
        rows = [
            (letter.id, timestamp(letter.dead_at), letter.dead_reason, letter.attempts, error_text(letter.last_error))
            async for letter in found
        ]
        if rows:
            output.rows(("message", "dead at", "reason", "attempts", "last error"), rows)
        else:
            output.note("no dead letters")

    settings.run(look, existing=True)


async def _all(queue: Queue, after: str | None, limit: int | None) -> AsyncIterator[MessageView]:
    left = limit
    while left is None or left > 0:
        size = PAGE if left is None else min(PAGE, left)
        page = await queue.dead_letters.list(after=after, limit=size)
        for letter in page:
            yield letter
        if len(page) < size:
            return
        after = page[-1].id
        left = None if left is None else left - len(page)


@dlq.command("show")
@queue_argument()
@click.argument("message")
@option(
    "--output",
    "-o",
    environment=False,
    type=click.Path(dir_okay=False),
    help="Write the payload into this file; - is stdout, bare.",
)
@option("--no-payload", is_flag=True, help="Leave the payload out.")
@pass_settings
def show_(settings: Settings, queue: str, message: str, output: str | None, no_payload: bool) -> None:
    """Show a dead letter of QUEUE in full, payload included."""
    if output == "-" and settings.json:
        raise click.UsageError("--output - and --json both want stdout")

    async def look(pond: Pond) -> None:
        from millpond.cli.inspect import show

        letter = await settings.queue(pond, queue).dead_letters.get(message)
        await show(settings.output(), letter, output, not no_payload)

    settings.run(look, existing=True)


def _chosen(messages: tuple[str, ...], everything: bool) -> list[str] | None:
    """The ids, or None for all. Raises click.UsageError."""
    if bool(messages) == everything:
        raise click.UsageError("name messages, or --all of them" if not messages else "give either messages or --all")
    return None if everything else list(messages)


@dlq.command("redrive")
@queue_argument()
@click.argument("messages", metavar="[MESSAGE]...", nargs=-1)
@option("--all", "everything", is_flag=True, environment=False, help="All dead letters of the queue.")
@pass_settings
def redrive(settings: Settings, queue: str, messages: tuple[str, ...], everything: bool) -> None:
    """Send dead letters of QUEUE through it again.

    They become ready at once, with attempts and failures at 0; their fencing tokens go on from where they were.
    """
    ids = _chosen(messages, everything)

    async def send(pond: Pond) -> None:
        output = settings.output()
        target = settings.queue(pond, queue)
        count = await target.dead_letters.redrive(ids)
        if output.json:
            output.record({"namespace": target.namespace, "queue": target.name, "redriven": count})
        else:
            output.line(f"{count} sent again")

    settings.run(send, existing=True)


@dlq.command("purge")
@queue_argument()
@click.argument("messages", metavar="[MESSAGE]...", nargs=-1)
@option("--all", "everything", is_flag=True, environment=False, help="All dead letters of the queue.")
@option("--yes", "-y", is_flag=True, environment=False, help="Do not ask.")
@pass_settings
def purge(settings: Settings, queue: str, messages: tuple[str, ...], everything: bool, yes: bool) -> None:
    """Remove dead letters of QUEUE for good.

    Asks first; where nobody can be asked, --yes is needed.
    """
    ids = _chosen(messages, everything)
    what = f"all dead letters of {queue}" if ids is None else f"{len(ids)} dead letter{'' if len(ids) == 1 else 's'}"
    confirm(f"Remove {what} for good?", yes)

    async def remove(pond: Pond) -> None:
        output = settings.output()
        target = settings.queue(pond, queue)
        count = await target.dead_letters.purge(ids)
        if output.json:
            output.record({"namespace": target.namespace, "queue": target.name, "purged": count})
        else:
            output.line(f"{count} removed")

    settings.run(remove, existing=True)
