"""``millpond pause``, ``resume``, ``policy`` and ``purge``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from millpond.cli.durations import Duration
from millpond.cli.settings import Command, Group, Settings, can_ask, confirm, option, pass_settings, queue_argument

if TYPE_CHECKING:
    from millpond.errors import MillpondError
    from millpond.pond import Pond
    from millpond.queue import Queue

INHERIT = "default"
"""The word that takes a setting back to the pond's default."""


async def _governed(settings: Settings, pond: Pond, name: str) -> Queue:
    """The queue, and a note when the store has nothing of it: that may be a misspelt name. No error, because a queue
    whose messages are all done has nothing either, and what a script does must not hang on that."""
    from millpond.cli.records import all_queues

    queue = settings.queue(pond, name)
    if (queue.namespace, queue.name) not in await all_queues(pond, queue.namespace):
        where = "" if queue.namespace == "default" else f" in namespace {queue.namespace}"
        settings.output().note(f"queue {queue.name}{where} has no messages and no policy; is the name right?")
    return queue


@click.command(cls=Command)
@queue_argument()
@pass_settings
def pause(settings: Settings, queue: str) -> None:
    """Hand out nothing from QUEUE until resume.

    Producers go on, and so do those who hold messages. It may come before the first message; a note says when there is
    none.
    """

    async def change(pond: Pond) -> None:
        await (await _governed(settings, pond, queue)).pause()

    settings.run(change)


@click.command(cls=Command)
@queue_argument()
@pass_settings
def resume(settings: Settings, queue: str) -> None:
    """Hand out messages of QUEUE again."""

    async def change(pond: Pond) -> None:
        await (await _governed(settings, pond, queue)).resume()

    settings.run(change, existing=True)


@click.command(cls=Command)
@queue_argument()
@option("--yes", "-y", is_flag=True, environment=False, help="Do not ask.")
@pass_settings
def purge(settings: Settings, queue: str, yes: bool) -> None:
    """Remove every message of QUEUE that no consumer holds.

    Dead letters stay; `dlq purge` removes those. Asks first; where nobody can be asked, --yes is needed.
    """
    confirm(f"Remove all messages of {queue}?", yes)

    async def remove(pond: Pond) -> None:
        output = settings.output()
        target = settings.queue(pond, queue)
        count = await target.purge()
        if output.json:
            output.record({"namespace": target.namespace, "queue": target.name, "purged": count})
        else:
            output.line(f"{count} removed")

    settings.run(remove, existing=True)


@click.command("discard-unreadable", cls=Command)
@queue_argument()
@click.argument("messages", metavar="[MESSAGE]...", nargs=-1)
@option("--all", "everything", is_flag=True, environment=False, help="All messages of the queue that cannot be read.")
@option("--yes", "-y", is_flag=True, environment=False, help="Do not ask.")
@pass_settings
def discard_unreadable(settings: Settings, queue: str, messages: tuple[str, ...], everything: bool, yes: bool) -> None:
    """Remove messages of QUEUE that cannot be read, for good.

    Such a message was written under a key that the keyring lacks, was changed or damaged, or is from a newer Millpond.
    `verify` lists them. Nobody is given one, no other command removes one, and one with an ordering key holds up those
    behind it. First look for the missing key: with it the message could still be read.

    In a bucket MESSAGE may also be the name of a damaged object, as `verify` tells it, and --all means these, too. Of
    an id or an ordering key the object is written anew, from what the queue shows; a dedup key becomes free.

    Only what cannot be read is removed; a message named here that can be read is an error. Says what it would remove
    and asks; where nobody can be asked, --yes is needed. A payload that cannot be read needs no discarding: the message
    is handed out, fails, and ends among the dead letters.
    """
    if bool(messages) == everything:
        raise click.UsageError("name messages, or --all of them" if not messages else "give either messages or --all")
    output = settings.output()
    question = f"Remove messages of {queue} that cannot be read, for good?"
    if yes or not can_ask():
        confirm(question, yes)

    async def find(pond: Pond) -> list[tuple[str, MillpondError]]:
        found = await pond.unreadable(queue, namespace=settings.namespace)
        return [(id, error) for id, error in found if everything or id in messages]

    async def remove(pond: Pond) -> None:
        ids = [id for id, _ in found] if everything else list(messages)
        for id in ids:
            await pond.discard_unreadable(queue, id, namespace=settings.namespace)
            if output.json:
                target = settings.queue(pond, queue)
                record = {"namespace": target.namespace, "queue": target.name, "message_id": id, "discarded": True}
                output.record(record)
        if not output.json:
            output.line(f"{len(ids)} removed")

    found = settings.run(find, existing=True)
    for id, error in found:
        output.note(f"{id}: {error} [{error.code}]")
    if found and not yes:
        confirm(question, yes)
    settings.run(remove, existing=True)


@click.group(cls=Group)
def policy() -> None:
    """Show or change what the messages of a queue get.

    A message's own options win over its queue's policy, and that over the pond's defaults.
    """


@policy.command("show")
@queue_argument()
@pass_settings
def policy_show(settings: Settings, queue: str) -> None:
    """Show the policy of QUEUE."""
    settings.run(lambda pond: _print_policy(settings, settings.queue(pond, queue)), existing=True)


@policy.command("set")
@queue_argument()
@option("--default-visibility", type=Duration(positive=True, word=INHERIT), help="How long a delivery may take.")
@option("--max-attempts", metavar="N|default", callback=lambda ctx, param, value: _count(value),
        help="Failures until a message is a dead letter; 0 for no limit.")  # fmt: skip
@option("--ttl", type=Duration(positive=True, word=INHERIT), help="Messages expire after this long.")
@option("--on-expired", type=click.Choice(["discard", "dead_letter"]), help="What becomes of an expired message.")
@option("--on-exhausted", type=click.Choice(["dead_letter", "discard"]), help="… of one that failed too often.")
@option("--dedup-window", type=Duration(positive=True, word=INHERIT), help="For how long dedup keys hold.")
@pass_settings
def policy_set(settings: Settings, /, queue: str, **fields: Any) -> None:
    """Change the policy of QUEUE; what is not named stays.

    `default` takes a setting back to the pond's default. Messages that are queued already keep what they got. It may
    come before the first message.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    chosen: dict[str, Any] = {name: None if value == INHERIT else value for name, value in given.items()}
    if not chosen:
        raise click.UsageError("nothing to set")

    async def change(pond: Pond) -> None:
        target = settings.queue(pond, queue)
        await target.set_policy(**chosen)
        await _print_policy(settings, target)

    settings.run(change)


@policy.command("reset")
@queue_argument()
@option("--yes", "-y", is_flag=True, environment=False, help="Do not ask.")
@pass_settings
def policy_reset(settings: Settings, queue: str, yes: bool) -> None:
    """Put the default policy in place of the one of QUEUE, which also resumes it.

    The way out when the stored policy cannot be read: it is damaged, or was written under a key that is lost, and every
    enqueue and receive fails. Look for the key first; what the policy was is gone. Asks first; where nobody can be
    asked, --yes is needed.
    """
    confirm(f"Put the default policy in place of the one of {queue}?", yes)

    async def change(pond: Pond) -> None:
        target = await _governed(settings, pond, queue)
        await target.reset_policy()
        await _print_policy(settings, target)

    settings.run(change, existing=True)


def _count(value: str | None) -> int | str | None:
    if value is None or value == INHERIT:
        return value
    if not value.isdecimal():
        raise click.BadParameter(f"{value!r} is not a number, 0 or more, or {INHERIT}")
    return int(value)


POLICY_FIELDS = ("default_visibility", "max_attempts", "ttl", "on_expired", "on_exhausted", "dedup_window", "paused")


async def _print_policy(settings: Settings, queue: Queue) -> None:
    from millpond.cli.durations import format_duration

    output = settings.output()
    found = await queue.policy()
    fields = {name: getattr(found, name) for name in POLICY_FIELDS}
    if output.json:
        output.record({"namespace": queue.namespace, "queue": queue.name, **fields})
        return

    def shown(value: Any) -> str:
        if value is None:
            return INHERIT
        if isinstance(value, bool):
            return "yes" if value else "no"
        return format_duration(value) if isinstance(value, float) else str(value)

    output.block({name.replace("_", "-"): shown(value) for name, value in fields.items()})
