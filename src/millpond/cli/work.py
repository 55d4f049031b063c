"""``millpond work``: a durable xargs."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from millpond.cli.codes import EXIT_INTERRUPTED, EXIT_OUTCOME, EXIT_TERMINATED
from millpond.cli.durations import Duration, format_duration
from millpond.cli.settings import Command, Settings, option, pass_settings, queue_argument
from millpond.errors import StoreError

if TYPE_CHECKING:
    from millpond.cli.display import Display
    from millpond.cli.runner import Runner, Tally
    from millpond.pond import Pond
    from millpond.queue import Queue

REDRAW = 0.2
"""Seconds between progress lines: fast enough to look alive, slow enough to read."""
RECOUNT = 5
"""Progress lines per look at what is left in the queue."""
PAID_RECOUNT = 300
"""The same where looks cost money: once a minute."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))


@click.command(cls=Command)
@queue_argument()
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND [ARGUMENT]...")
@option("--concurrency", "-c", type=click.IntRange(1), default=1, help="Commands at the same time.")
@option("--until-empty", is_flag=True, help="End when nothing is left to do, rather than wait for more.")
@option("--limit", "-n", type=click.IntRange(1), help="End after this many messages.")
@option("--visibility", type=Duration(positive=True), help="Length of the lease; default the message's own.")
@option("--timeout", type=Duration(positive=True), help="End a command that takes longer; that is a failure.")
@option("--kill-after", type=Duration(), default=5.0, help="From SIGTERM to SIGKILL, when a command is to end.")
@option("--backoff", type=Duration(), default=1.0, help="Delay after the first failure; it doubles with each.")
@option("--max-backoff", type=Duration(), default=300.0, help="Longest delay after a failure.")
@option("--replace", "-I", metavar="TEXT", default="{}", help="What stands for the payload; empty for nothing.")
@option("--owner", help="A name for the holder of the leases; default host and process.")
@option("--fail-dead", is_flag=True, help="Exit with code 3 when a message was given up for good.")
@option("--cost", is_flag=True, help="Say at the end what it took and cost, where the store charges for requests.")
@pass_settings
def work(settings: Settings, /, queue: str, command: tuple[str, ...], fail_dead: bool, cost: bool, **plan: Any) -> None:
    """Run COMMAND for each message of QUEUE: a durable xargs.

    The payload is the command's stdin; {} in an argument is replaced by it (where it is UTF-8 without NUL and short
    enough). MILLPOND_MESSAGE_ID, _QUEUE, _NAMESPACE, _LEASE_ID, _FENCING_TOKEN, _ATTEMPTS, _FAILURES, _ATTRIBUTES
    (JSON), _CONTENT_TYPE and _CORRELATION_ID are in its environment. No shell is involved.

    Exit code 0 acks the message. Anything else nacks it, with the end of the command's stderr as its last error; it
    comes back after the backoff, until it has failed as often as it may and is a dead letter. The lease is renewed
    while the command runs; where it is lost all the same, the command is ended. Messages are taken only when their
    command can start.

    Ctrl-C or SIGTERM: take no more, let the running commands finish. Once more: end them and give their messages back,
    no failure counted. A command killed by other means, this process's kill -9 included, is one failure when its lease
    runs out, and the message comes back.

    --until-empty ends when no message is ready, running here, held by another consumer, or due again within
    --max-backoff. What is delayed longer is left for later; a paused queue counts as empty.

    Exit code 0 when what was asked for is done, whatever became of single messages (but see --fail-dead); also after
    SIGTERM without --until-empty or --limit. 130 after Ctrl-C, 143 after another SIGTERM.

    \b
    millpond work thumbnails -c 4 -- ./make-thumbnail
    millpond work mails --until-empty --timeout 30s -- sh -c 'sendmail "$RCPT"'
    millpond work urls -c 8 -- curl -fsSO {}
    """
    if not (plan["replace"] and plan["replace"] in command[0]) and shutil.which(command[0]) is None:
        raise click.UsageError(f"cannot run {command[0]!r}: there is no such program")

    async def session(pond: Pond) -> int:
        import socket

        from millpond.cli.display import Display
        from millpond.cli.runner import Plan, Runner

        target = settings.queue(pond, queue)
        plan["owner"] = plan["owner"] or f"{socket.gethostname()}:{os.getpid()}"
        chosen = Plan(command=command, store=settings.store, **plan)
        display = Display(progress=not settings.quiet)
        runner = Runner(pond, target, chosen, display)
        try:
            with _signals(runner, display):
                await _watched(runner, target, display, pond)
        finally:
            await display.close()
            _summary(settings, target, runner.tally, pond if cost else None)
        return _code(runner, endless=not chosen.until_empty and chosen.limit is None, fail_dead=fail_dead)

    if code := settings.run(session):
        raise click.exceptions.Exit(code)


@contextmanager
def _signals(runner: Runner, display: Display) -> Iterator[None]:
    import asyncio

    loop = asyncio.get_running_loop()
    notes: set[asyncio.Task[None]] = set()

    def stop(number: int) -> None:
        runner.interrupt(number)
        if len(runner.signals) == 1 and runner.running:
            text = f"letting {runner.running} running finish; once more to end them"
            notes.add(loop.create_task(display.note(text)))

    caught = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in caught:
        loop.add_signal_handler(number, stop, number)
    try:
        yield
    finally:
        for number in caught:
            loop.remove_signal_handler(number)


async def _watched(runner: Runner, queue: Queue, display: Display, pond: Pond) -> None:
    """Run, and show how it goes."""
    import asyncio

    if not display.progress:
        await runner.run()
        return
    began = pond.clock.monotonic()
    recount = PAID_RECOUNT if pond.capabilities.requests_cost_money else RECOUNT

    async def show() -> None:
        left, round = 0, 0
        while True:
            if round % recount == 0:
                with suppress(StoreError):  # the runner meets it too, and tells; the last figure stays
                    counts = await queue.counts()
                    left = counts.ready + counts.delayed + counts.blocked
            round += 1
            display.draw(progress_text(runner.tally, runner.running, left, pond.clock.monotonic() - began))
            await asyncio.sleep(REDRAW)

    shown = asyncio.ensure_future(show())
    try:
        await runner.run()
    finally:
        shown.cancel()
        await asyncio.wait((shown,))


def progress_text(tally: Tally, running: int, left: int, seconds: float) -> str:
    """The line of progress."""
    done = tally.acked + tally.nacked
    parts = [f"{tally.acked:,} done", f"{running} running", f"{left:,} left"]
    if tally.nacked:
        parts.insert(1, f"{tally.nacked:,} failed")
    if seconds > 0:
        parts.append(f"{done / seconds:,.1f}/s")
    return " · ".join(parts)


def _summary(settings: Settings, queue: Queue, tally: Tally, paying: Pond | None) -> None:
    """``paying``: whose requests are to be told, too."""
    from dataclasses import asdict

    output = settings.output()
    if settings.json:
        fields = {"namespace": queue.namespace, "queue": queue.name, **asdict(tally)}
        if paying is not None:
            from millpond.cli import cost

            measured = cost.measured(paying, paying.requests())
            fields["cost"] = None if measured is None else {"prices": cost.prices(paying), "measured": measured}
        output.record(fields)
        return
    rate = f", {tally.acked / tally.seconds:.1f} acked a second" if tally.acked and tally.seconds > 0 else ""
    failed = f"{tally.nacked} failed" + (f" ({tally.dead} for good)" if tally.dead else "")
    more = "".join(
        f", {count} {name}" for count, name in ((tally.lost, "lost"), (tally.given_back, "given back")) if count
    )
    time = format_duration(tally.seconds)
    output.note(f"{queue.name}: {tally.taken} taken, {tally.acked} acked, {failed}{more} in {time}{rate}")
    if paying is not None:
        from millpond.cli import cost

        measured = cost.measured(paying, paying.requests())
        lines = [cost.NOTHING_TO_PAY] if measured is None else cost.measured_lines(measured, cost.prices(paying))
        for line in lines:
            output.note(line)


def _code(runner: Runner, *, endless: bool, fail_dead: bool) -> int:
    if signal.SIGINT in runner.signals:
        return EXIT_INTERRUPTED
    if runner.signals and not (endless and len(runner.signals) == 1):
        return EXIT_TERMINATED
    return EXIT_OUTCOME if fail_dead and runner.tally.dead else 0
