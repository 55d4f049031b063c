"""``millpond enqueue``."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from millpond.cli.durations import Duration
from millpond.cli.settings import Command, Settings, option, pass_settings, queue_argument

if TYPE_CHECKING:
    from millpond.cli.output import Output
    from millpond.pond import Pond
    from millpond.queue import Queue, Receipt

BATCH_LINES = 500
"""Lines per enqueue_many, which writes as many in one commit."""


@click.command(cls=Command)
@queue_argument()
@click.argument("data", required=False)
@option(
    "--file", environment=False, type=click.Path(), help="Queue this file's bytes; with --lines, its lines. - is stdin."
)
@option(
    "--lines",
    is_flag=True,
    help="One message a line, from stdin or --file, without its line feed; a carriage return stays.",
)
@option("--null", "-0", "null", is_flag=True, help="With --lines: items end with a NUL byte, as find -print0 writes.")
@option("--skip-empty", is_flag=True, help="With --lines: leave out empty lines (they are messages otherwise).")
@option("--dedup-lines", is_flag=True, help="With --lines: each line's SHA-256 is its dedup key; safe to run again.")
@option("--delay", type=Duration(), help="Not before this long from now.")
@option("--ttl", type=Duration(positive=True), help="Never delivered after this long.")
@option("--priority", type=click.IntRange(0, 9), help="Higher first.  [default: 5]")
@option("--max-attempts", type=click.IntRange(0), help="Failures until it is a dead letter; 0 for no limit.")
@option("--visibility", type=Duration(positive=True), help="How long a delivery may take.")
@option("--attribute", "-a", "pairs", multiple=True, metavar="KEY=VALUE", environment=False,
        help="An attribute, repeatable; KEY:=JSON for a value that is not text.")  # fmt: skip
@option("--attributes", metavar="JSON", environment=False, help="Attributes as one JSON object.")
@option("--dedup-key", environment=False, help="A second enqueue with this key returns the first message.")
@option("--dedup-window", type=Duration(positive=True), help="For how long the dedup key holds.")
@option("--ordering-key", environment=False, help="Messages of one key are handed out one at a time, in order.")
@option("--content-type", help="Media type of the payload.")
@option("--correlation-id", environment=False, help="Id for tracing.")
@pass_settings
def enqueue(
    settings: Settings,
    /,
    queue: str,
    data: str | None,
    file: str | None,
    lines: bool,
    null: bool,
    skip_empty: bool,
    dedup_lines: bool,
    pairs: tuple[str, ...],
    attributes: str | None,
    **options: Any,
) -> None:
    """Put a message, or many, into QUEUE.

    The payload is DATA, or the bytes of --file, or of stdin (DATA is - or left out). Prints the message id; with
    --lines the number of messages, or with --json every id. What is printed is stored durably.
    """
    if data is not None and (file is not None or (lines and data != "-")):
        raise click.UsageError("give either DATA or --file" if file is not None else "--lines reads stdin or --file")
    if lines and options["dedup_key"] is not None:
        raise click.UsageError("one --dedup-key for all lines would keep only the first; use --dedup-lines")
    for name, given in (("--null", null), ("--skip-empty", skip_empty), ("--dedup-lines", dedup_lines)):
        if given and not lines:
            raise click.UsageError(f"{name} goes with --lines")
    chosen = {name: value for name, value in options.items() if value is not None}
    found = parse_attributes(attributes, pairs)
    if found:
        chosen["attributes"] = found
    output = settings.output()
    if data is not None and data != "-":
        payload = os.fsencode(data)

        async def one(pond: Pond) -> None:
            target = settings.queue(pond, queue)
            _report(output, target, await target.enqueue(payload, **chosen))

        settings.run(one)
        return
    with open_input(file) as source:
        if lines:
            work = _Lines(settings, queue, source, chosen, b"\0" if null else b"\n", skip_empty, dedup_lines)
            settings.run(work.run)
            return

        async def stream(pond: Pond) -> None:
            from millpond.cli.input import chunks

            target = settings.queue(pond, queue)
            _report(output, target, await target.enqueue(chunks(source.fileno()), **chosen))

        settings.run(stream)


def parse_attributes(text: str | None, pairs: tuple[str, ...]) -> dict[str, Any]:
    """Attributes from a JSON object and ``key=text`` / ``key:=json`` pairs; pairs win. Raises click.UsageError."""
    found: dict[str, Any] = {}
    if text is not None:
        try:
            found = _strict_json(text)
        except ValueError as error:
            raise click.UsageError(f"--attributes is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise click.UsageError("--attributes must be a JSON object")
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key or key == ":":
            raise click.UsageError(f"--attribute {pair!r} is not KEY=VALUE or KEY:=JSON")
        if not key.endswith(":"):
            found[key] = value
            continue
        try:
            found[key[:-1]] = _strict_json(value)
        except ValueError as error:
            raise click.UsageError(f"--attribute {key}…: the value is not JSON: {error}") from error
    return found


def _strict_json(text: str) -> Any:
    """JSON of the standard: no NaN, nothing beyond a float's range, for neither could be printed again. Raises
    ValueError."""

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"{digits} is no number that JSON can hold")
        return value

    try:
        return json.loads(text, parse_float=number, parse_constant=number)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def open_input(file: str | None) -> BinaryIO:
    """The file, or stdin. Raises click.UsageError when that is closed, or a terminal that nobody asked to type on."""
    if file is not None and file != "-":
        return open(file, "rb", buffering=0)
    if sys.stdin is None:
        raise click.UsageError("stdin is closed: give DATA, --file, or pipe the payload in")
    if file is None and sys.stdin.isatty():
        raise click.UsageError("nothing to queue: give DATA, --file, or pipe the payload in")
    return os.fdopen(os.dup(sys.stdin.fileno()), "rb", buffering=0)


def _report(output: Output, target: Queue, receipt: Receipt) -> None:
    if output.json:
        output.record(
            {
                "message_id": receipt.message_id,
                "duplicate": receipt.duplicate,
                "namespace": target.namespace,
                "queue": target.name,
            }
        )
    else:
        output.line(receipt.message_id)
        if receipt.duplicate:
            output.note("that dedup key is taken: this is the message queued before; nothing was added")


class _Lines:
    """One message a line, in batches as large as the input allows and as small as it is slow."""

    def __init__(
        self,
        settings: Settings,
        queue: str,
        source: BinaryIO,
        options: dict[str, Any],
        separator: bytes,
        skip_empty: bool,
        dedup: bool,
    ) -> None:
        self._settings = settings
        self._output = settings.output()
        self._queue = queue
        self._source = source
        self._options = options
        self._separator = separator
        self._skip_empty = skip_empty
        self._dedup = dedup
        self._messages = 0
        self._duplicates = 0

    async def run(self, pond: Pond) -> None:
        from millpond.cli.input import LineTooLong, batches, lines

        target = self._settings.queue(pond, self._queue)
        progress = _progress(self._source, self._settings)
        try:
            async for found, read in lines(self._source.fileno(), self._separator):
                items = [line for line in found if line] if self._skip_empty else found
                for batch in batches(items, BATCH_LINES):
                    await self._enqueue(target, batch)
                progress.advance(read, self._messages)
        except LineTooLong as error:
            raise click.ClickException(f"after {self._messages} messages: {error}") from error
        finally:
            progress.close()
            self._summary(target)

    async def _enqueue(self, target: Queue, batch: list[bytes]) -> None:
        receipts = await (self._enqueue_unique(target, batch) if self._dedup else self._enqueue_plain(target, batch))
        self._messages += len(receipts)
        self._duplicates += sum(receipt.duplicate for receipt in receipts)
        if self._output.json:
            for receipt in receipts:
                _report(self._output, target, receipt)
            self._output.flush()

    async def _enqueue_plain(self, target: Queue, batch: list[bytes]) -> list[Receipt]:
        return await target.enqueue_many(batch, **self._options)

    async def _enqueue_unique(self, target: Queue, batch: list[bytes]) -> list[Receipt]:
        import asyncio
        import hashlib

        calls = [
            target.enqueue(line, dedup_key=f"sha256:{hashlib.sha256(line).hexdigest()}", **self._options)
            for line in batch
        ]
        return await asyncio.gather(*calls)

    def _summary(self, target: Queue) -> None:
        """Also after an error: whoever has to go on needs to know how far it came."""
        if self._output.json:
            return
        added = self._messages - self._duplicates
        text = f"{added} message{'' if added == 1 else 's'} queued in {target.name}"
        if self._duplicates:
            text += f", {self._duplicates} already there"
        if not self._output.quiet:
            self._output.line(text)


class _NoProgress:
    def advance(self, read: int, messages: int) -> None: ...

    def close(self) -> None: ...


class _Bar:
    """A progress bar on stderr: bytes of a file whose size is known, else a count."""

    def __init__(self, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = [BarColumn(), TaskProgressColumn(), TimeRemainingColumn()] if total is not None else []
        self._progress = Progress(
            TextColumn("{task.fields[messages]:>9,} messages"), *columns, console=Console(stderr=True), transient=True
        )
        self._task = self._progress.add_task("", total=total, messages=0)
        self._progress.start()

    def advance(self, read: int, messages: int) -> None:
        self._progress.update(self._task, advance=read, messages=messages)

    def close(self) -> None:
        self._progress.stop()


def _progress(source: BinaryIO, settings: Settings) -> _Bar | _NoProgress:
    from millpond.cli.output import is_terminal

    if settings.quiet or not is_terminal(sys.stderr) or (settings.json and is_terminal(sys.stdout)):
        return _NoProgress()
    status = os.fstat(source.fileno())
    return _Bar(status.st_size if stat.S_ISREG(status.st_mode) else None)
