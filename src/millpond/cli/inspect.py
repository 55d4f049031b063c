"""``millpond peek``, ``queues``, ``stats`` and ``verify``: look, and change nothing."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from millpond.cli.codes import EXIT_ERROR
from millpond.cli.settings import Command, Settings, option, pass_settings, queue_argument

if TYPE_CHECKING:
    from millpond.cli.output import Output
    from millpond.message import MessageView
    from millpond.pond import Pond
    from millpond.stores.base import Finding


@click.command(cls=Command)
@queue_argument()
@option("--count", "-n", type=click.IntRange(1), default=1, help="At most this many messages.")
@option("--message", metavar="ID", environment=False, help="This message, whatever its state.")
@option(
    "--output",
    "-o",
    environment=False,
    type=click.Path(dir_okay=False),
    help="Write the payload into this file; - is stdout, bare.",
)
@option("--no-payload", is_flag=True, help="Leave the payload out.")
@pass_settings
def peek(settings: Settings, queue: str, count: int, message: str | None, output: str | None, no_payload: bool) -> None:
    """Show the next messages of QUEUE without taking them.

    In the order in which they would be handed out; only those that are ready. With --message, one message in any state.
    """
    if output is not None and count != 1:
        raise click.UsageError("--output holds one payload")
    if output == "-" and settings.json:
        raise click.UsageError("--output - and --json both want stdout")

    async def look(pond: Pond) -> None:
        source = settings.queue(pond, queue)
        views = [await source.get(message)] if message is not None else await source.peek(count)
        if not views:
            settings.output().note(f"nothing is ready in {source.name}")
        for view in views:
            await show(settings.output(), view, output, not no_payload)

    settings.run(look, existing=True)


async def show(output: Output, view: MessageView, file: str | None, with_payload: bool) -> None:
    """One message in full: its fields and, if wanted, its payload, which may go to a file."""
    from millpond.cli import records
    from millpond.cli.consume import SHOWN_BINARY, open_output

    if file == "-":
        async for chunk in view.stream():
            output.raw(chunk)
        return
    fields = records.view(view)
    if file is not None:
        with open_output(file) as target:
            async for chunk in view.stream():
                target.write(chunk)
        fields |= {"payload": None, "payload_encoding": "file", "payload_file": file}
    elif with_payload:
        small = view.payload_size <= records.JSON_PAYLOAD_LIMIT
        fields |= records.payload_fields(await view.payload() if small else None)
    if output.json:
        output.record(fields)
        return
    encoding = fields.get("payload_encoding")
    if encoding == "utf-8":
        del fields["payload_encoding"]
    elif encoding == "base64" and view.payload_size > SHOWN_BINARY:
        fields |= {"payload": None, "payload_encoding": "no text; --json or --output shows it"}
    elif encoding == "omitted":
        fields["payload_encoding"] = "large; --output shows it"
    output.block(fields)
    output.line()


@click.command(cls=Command)
@pass_settings
def queues(settings: Settings) -> None:
    """List the queues.

    All of them, or those of --namespace.
    """

    async def look(pond: Pond) -> None:
        from millpond.cli.records import all_queues
        from millpond.errors import MillpondError

        output = settings.output()
        rows: list[tuple[str, str, bool | None]] = []
        for at, name in await all_queues(pond, settings.namespace):
            try:
                rows.append((at, name, (await pond.queue(name, namespace=at).policy()).paused))
            except MillpondError as error:
                # One queue with a policy that cannot be read must not hide the others.
                output.note(f"{error} [{error.code}]; `millpond policy reset` puts the default in its place")
                rows.append((at, name, None))
        states = {True: "paused", False: "", None: "policy unreadable"}
        if output.json:
            for at, name, paused in rows:
                output.record({"namespace": at, "queue": name, "paused": paused})
        elif rows:
            output.rows(("namespace", "queue", "state"), [(at, name, states[paused]) for at, name, paused in rows])
        else:
            output.note("no queues")

    settings.run(look, existing=True)


@click.command(cls=Command)
@queue_argument(required=False)
@option("--cost", is_flag=True, help="Add what messages cost where the store charges for requests.")
@pass_settings
def stats(settings: Settings, queue: str | None, cost: bool) -> None:
    """Count the messages of QUEUE, or of every queue.

    blocked waits for an earlier message of its ordering key; bytes are payload bytes waiting or held; oldest is for how
    long the first of the ready ones has waited. -v adds the store's own counters.

    --cost says what a message costs by design, and what this command itself asked for. What your workers really take
    is measured in them: `millpond work --cost`, or Pond.requests. Prices are list prices; the output says of when.
    """

    async def look(pond: Pond) -> None:
        from millpond.cli.durations import format_duration
        from millpond.cli.records import all_queues, counts

        output = settings.output()
        if queue is not None:
            one = settings.queue(pond, queue)
            names = [(one.namespace, one.name)]
        else:
            names = await all_queues(pond, settings.namespace)
        found = [counts(at, name, await pond.queue(name, namespace=at).counts()) for at, name in names]
        if output.json:
            for record in found:
                output.record(record)
            if settings.verbose:
                output.record({"store": pond.statistics()})
            if cost:
                output.record({"cost": _cost(pond)})
            return
        columns = ("namespace", "queue", "ready", "delayed", "leased", "blocked", "dead", "bytes")
        if found:
            output.rows(
                (*columns, "oldest"),
                [
                    (
                        *(record[column] for column in columns),
                        "" if record["oldest_age"] is None else format_duration(record["oldest_age"]),
                    )
                    for record in found
                ],
            )
        else:
            output.note("no queues")
        if settings.verbose:
            output.line()
            output.block(pond.statistics())
        if cost:
            _show_cost(output, pond)

    settings.run(look, existing=True)


def _cost(pond: Pond) -> dict[str, Any] | None:
    from millpond.cli import cost

    measured = cost.measured(pond, pond.requests())
    if measured is None:
        return None
    return {"prices": cost.prices(pond), "computed": cost.computed(pond), "measured": measured}


def _show_cost(output: Output, pond: Pond) -> None:
    from millpond.cli import cost

    report = _cost(pond)
    if report is None:
        output.note(cost.NOTHING_TO_PAY)
        return
    output.line()
    if report["computed"] is not None:
        for line in cost.computed_lines(report["computed"], report["prices"]):
            output.line(line)
    for line in cost.measured_lines(report["measured"], report["prices"]):
        output.line(f"this command, {line}")


@click.command(cls=Command)
@pass_settings
def verify(settings: Settings) -> None:
    """Check the whole store and print what is wrong.

    Reads every record and payload, and shows on a terminal how far it is. Exit code 0 when all is well, 1 when
    something is not.

    Of a bucket it first finds out by trying what its storage can do, and how fast, with some hundred requests.
    """
    probed = settings.probe()
    if probed:
        show_probe(settings.output(), probed)
    if refused := [finding.check for finding in probed if finding.serious and not finding.ok]:
        print(f"millpond: error: this bucket cannot hold a queue: {', '.join(refused)}", file=sys.stderr)
        raise click.exceptions.Exit(EXIT_ERROR)

    async def check(pond: Pond) -> int:
        from millpond.cli.display import Display

        output = settings.output()
        display = Display(progress=not settings.quiet)
        try:
            problems = await pond.verify(progress=lambda count: display.draw(f"{count:,} messages checked"))
        finally:
            await display.close()
        for problem in problems:
            if output.json:
                output.record({"where": problem.where, "what": problem.what})
            else:
                output.line(f"{problem.where}: {problem.what}")
        if not problems:
            output.note("all is well")
        return len(problems)

    if found := settings.run(check, existing=True):
        print(f"millpond: error: {found} problem{'' if found == 1 else 's'} found", file=sys.stderr)
        raise click.exceptions.Exit(EXIT_ERROR)


def show_probe(output: Output, findings: list[Finding]) -> None:
    """What was found out about a bucket, as a table or as JSON lines."""
    if output.json:
        for finding in findings:
            output.record(
                {
                    "check": finding.check,
                    "ok": finding.ok,
                    "serious": finding.serious,
                    "detail": finding.detail,
                    "milliseconds": finding.milliseconds,
                }
            )
        return
    words = {(True, True): "ok", (True, False): "ok", (False, True): "FAILED", (False, False): "warning"}
    output.rows(
        ("check", "result", "found"),
        [(finding.check, words[finding.ok, finding.serious], finding.detail) for finding in findings],
    )
