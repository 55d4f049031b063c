"""``millpond receive`` and the answers to what it printed: ack, nack, defer, extend."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from millpond.cli.codes import EXIT_ERROR, EXIT_OUTCOME
from millpond.cli.durations import Duration
from millpond.cli.settings import Command, Settings, option, pass_settings, queue_argument
from millpond.errors import InvalidInput, MillpondError

if TYPE_CHECKING:
    from millpond.cli.output import Output
    from millpond.message import Message
    from millpond.pond import Pond
    from millpond.queue import Queue

SHOWN_BINARY = 1024
"""Bytes of a payload that is no text that are shown to people (as base64); programs get them with --json."""
ANSWERS_AT_ONCE = 1000
"""Answers under way together: they share commits; more would only hold more of the input in memory."""


@click.command(cls=Command)
@queue_argument()
@option("--count", "-n", type=click.IntRange(1), default=1, help="At most this many messages.")
@option("--wait", type=Duration(), default=0.0, help="Wait this long for the first one.")
@option("--visibility", type=Duration(positive=True), help="Length of the lease; default the message's own.")
@option("--owner", help="A name for the holder, shown to people.")
@option("--ack", is_flag=True, help="Ack each message as soon as it is written out.")
@option(
    "--output",
    "-o",
    environment=False,
    type=click.Path(dir_okay=False),
    help="Stream the payload into this file; - is stdout, bare.",
)
@option(
    "--output-dir",
    environment=False,
    type=click.Path(file_okay=False),
    help="Stream each payload into DIR/<message id>.",
)
@option("--fail-empty", is_flag=True, help="Exit with code 3 when nothing came.")
@pass_settings
def receive(
    settings: Settings,
    queue: str,
    count: int,
    wait: float,
    visibility: float | None,
    owner: str | None,
    ack: bool,
    output: str | None,
    output_dir: str | None,
    fail_empty: bool,
) -> None:
    """Take messages from QUEUE, each under a lease.

    With --json, one object a message: message_id, lease_id and fencing_token are what ack, nack, defer and extend take
    back; payload is text, or base64 where payload_encoding says so. When nothing came nothing is printed and the exit
    code is 0. Messages that could not be written out are given back.
    """
    if output is not None and output_dir is not None:
        raise click.UsageError("give either --output or --output-dir")
    if output is not None and output != "-" and count != 1:
        raise click.UsageError("--output holds one payload; with --count use --output-dir")
    if output == "-" and settings.json:
        raise click.UsageError("--output - and --json both want stdout")
    if output_dir is not None:
        os.makedirs(output_dir, exist_ok=True)

    async def take(pond: Pond) -> int:
        from_queue = settings.queue(pond, queue)
        messages = await from_queue.receive(count, wait=wait, visibility=visibility, owner=owner)
        printer = Printer(settings.output(), output, output_dir)
        shown = 0
        try:
            for message in messages:
                await printer.show(message)
                shown += 1
                if ack:
                    await message.ack()
        finally:
            # At once and each for itself: one whose lease is over does not keep the others from going back.
            await from_queue.defer_many(messages[shown:])
        return len(messages)

    if not settings.run(take) and fail_empty:
        raise click.exceptions.Exit(EXIT_OUTCOME)


class Printer:
    """Writes received messages out."""

    def __init__(self, output: Output, file: str | None, directory: str | None) -> None:
        self._output = output
        self._file = file
        self._directory = directory

    async def show(self, message: Message) -> None:
        """One message, flushed: when this returns, the reader has it or at least can."""
        from millpond.cli.records import delivery, payload_fields

        fields = delivery(message)
        path = self._file
        if self._directory is not None:
            path = os.path.join(self._directory, message.id)
        if path == "-":
            async for chunk in message.stream():
                self._output.raw(chunk)
        elif path is not None:
            with open_output(path) as target:
                size = await _write(message, target)
            fields |= {"payload": None, "payload_encoding": "file", "payload_file": path, "payload_size": size}
            self._finish(fields, None)
        else:
            payload = await small_payload(message)
            fields |= payload_fields(payload) | {"payload_size": message.payload_size}
            self._finish(fields, payload)
        self._output.flush()

    def _finish(self, fields: dict[str, Any], payload: bytes | None) -> None:
        if self._output.json:
            self._output.record(fields)
            return
        from millpond.cli.output import printable

        place = fields.get("payload_file")
        self._output.line(
            f"{fields['message_id']}  lease {fields['lease_id']}  token {fields['fencing_token']}  "
            f"until {fields['lease_until']}  attempt {fields['attempts']}"
        )
        if place is not None:
            self._output.line(f"  {fields['payload_size']} bytes in {place}")
        elif payload is None:
            self._output.line("  (a large payload: --output or --output-dir streams it into a file)")
        elif fields["payload_encoding"] == "utf-8":
            self._output.line("  " + printable(fields["payload"], indent=2))
        elif len(payload) <= SHOWN_BINARY:
            self._output.line(f"  base64 {fields['payload']}")
        else:
            self._output.line(f"  ({fields['payload_size']} bytes that are no text: --json, --output or --output-dir)")


def open_output(path: str) -> BinaryIO:
    """The file that a payload is written into; what it held is gone."""
    return open(path, "wb")


async def small_payload(message: Message) -> bytes | None:
    """The payload, or None when it is larger than a JSON line carries."""
    from millpond.cli.records import JSON_PAYLOAD_LIMIT

    return await message.read() if message.payload_size <= JSON_PAYLOAD_LIMIT else None


async def _write(message: Message, target: BinaryIO) -> int:
    size = 0
    async for chunk in message.stream():
        target.write(chunk)
        size += len(chunk)
    return size


Answer = Callable[["Message"], Awaitable[object]]


def _delivery_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that name a delivery."""
    for decorate in (
        option("--from-json", type=click.Path(), metavar="FILE", environment=False,
               help="Answer every delivery in these lines of `receive --json`; - is stdin."),
        option("--token", type=click.IntRange(1), environment=False, help="Its fencing_token."),
        option("--lease", environment=False, metavar="ID", help="Its lease_id."),
        option("--message", environment=False, metavar="ID", help="The delivery's message_id."),
        queue_argument(),
    ):  # fmt: skip
        command = decorate(command)
    return command


@click.command(cls=Command)
@_delivery_options
@pass_settings
def ack(settings: Settings, /, queue: str, **delivery: Any) -> None:
    """Done: remove a received message from QUEUE.

    Name the delivery by --message, --lease and --token, or pipe the lines of `receive --json` into --from-json -.
    """
    Answers(settings, queue, "ack", lambda message: message.ack()).run(**delivery)


@click.command(cls=Command)
@_delivery_options
@option("--error", help="Why; kept with the message as its last error.")
@option("--delay", type=Duration(), default=0.0, help="Not again before this long from now.")
@pass_settings
def nack(settings: Settings, /, queue: str, error: str | None, delay: float, **delivery: Any) -> None:
    """Failed: give a received message back to QUEUE and count a failure.

    The failure that uses up max-attempts makes it a dead letter at once.
    """
    Answers(settings, queue, "nack", lambda message: message.nack(error=error, delay=delay)).run(**delivery)


@click.command(cls=Command)
@_delivery_options
@option("--delay", type=Duration(), default=0.0, help="Not again before this long from now.")
@pass_settings
def defer(settings: Settings, /, queue: str, delay: float, **delivery: Any) -> None:
    """Not now: give a received message back to QUEUE without counting a failure."""
    Answers(settings, queue, "defer", lambda message: message.defer(delay=delay)).run(**delivery)


@click.command(cls=Command)
@_delivery_options
@option("--by", type=Duration(positive=True), required=True, help="The lease ends this long from now.")
@pass_settings
def extend(settings: Settings, /, queue: str, by: float, **delivery: Any) -> None:
    """More time: the lease of a received message ends --by from now."""
    Answers(settings, queue, "extend", lambda message: message.extend(by)).run(**delivery)


class Delivery:
    """Which delivery is answered for."""

    def __init__(self, message: str, lease: str, token: int) -> None:
        self.message = message
        self.lease = lease
        self.token = token


class Answers:
    """One answer to one delivery, or to as many as the input lists. Each stands alone: one that is too late does not
    hold back the others."""

    def __init__(self, settings: Settings, queue: str, name: str, answer: Answer) -> None:
        self._settings = settings
        self._output = settings.output()
        self._queue = queue
        self._name = name
        self._answer = answer
        self._done = 0
        self._failed = 0

    def run(self, *, message: str | None, lease: str | None, token: int | None, from_json: str | None) -> None:
        """Answer; raises MillpondError when the only one fails, exits with 1 when any of many did."""
        if from_json is not None:
            if message is not None or lease is not None or token is not None:
                raise click.UsageError("give either --from-json or --message, --lease and --token")
            self._run_many(from_json)
            return
        given = {"--message": message, "--lease": lease, "--token": token}
        missing = [name for name, value in given.items() if value is None]
        if missing:
            raise click.UsageError(f"missing {', '.join(missing)} (or --from-json)")
        assert message is not None
        assert lease is not None
        assert token is not None
        delivery = Delivery(message, lease, token)

        async def one(pond: Pond) -> None:
            queue = self._settings.queue(pond, self._queue)
            error = await self._try(queue, delivery)
            if error is not None:
                raise error

        self._settings.run(one, existing=True)

    def _run_many(self, file: str) -> None:
        from millpond.cli.enqueue import open_input

        with open_input(file) as source:

            async def many(pond: Pond) -> None:
                from millpond.cli.input import batches, lines

                queue = self._settings.queue(pond, self._queue)
                before = 0
                async for found, _ in lines(source.fileno()):
                    numbered = [(number, line) for number, line in enumerate(found, before + 1) if line.strip()]
                    before += len(found)
                    for batch in batches(numbered, ANSWERS_AT_ONCE):
                        await self._batch(queue, batch)

            self._settings.run(many, existing=True)
        if not self._output.json:
            self._output.note(f"{self._name}: {self._done} done, {self._failed} failed")
        if self._failed:
            raise click.exceptions.Exit(EXIT_ERROR)

    async def _batch(self, queue: Queue, batch: list[tuple[int, bytes]]) -> None:
        import asyncio

        deliveries = []
        for number, line in batch:
            try:
                deliveries.append(parse_delivery(line, queue.name, queue.namespace))
            except InvalidInput as wrong:
                done = f"{self._done} answered before it" if self._done else "nothing was answered"
                raise InvalidInput(f"line {number}: {wrong}; {done}") from wrong
        for delivery, error in zip(
            deliveries, await asyncio.gather(*(self._try(queue, delivery) for delivery in deliveries)), strict=True
        ):
            if error is not None and not self._output.json:
                print(f"millpond: error: {delivery.message}: {error} [{error.code}]", file=sys.stderr)
        self._output.flush()

    async def _try(self, queue: Queue, delivery: Delivery) -> MillpondError | None:
        """Answer for one delivery; what went wrong is returned, so that the others are answered all the same."""
        from millpond.cli.records import timestamp

        fields: dict[str, Any] = {"message_id": delivery.message, "answer": self._name}
        error: MillpondError | None = None
        try:
            answered = await self._answer(queue.handle(delivery.message, delivery.lease, delivery.token))
        except MillpondError as failure:
            error = failure
            self._failed += 1
        else:
            self._done += 1
            if self._name == "extend":
                fields["lease_until"] = timestamp(getattr(answered, "until", None))
        if self._output.json:
            self._output.record(
                fields | {"ok": error is None, "code": error and error.code, "error": error and str(error)}
            )
        return error


def parse_delivery(line: bytes, queue: str, namespace: str) -> Delivery:
    """A delivery from a line of ``receive --json``. Raises InvalidInput."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"not a line of `receive --json`: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidInput("not a line of `receive --json`: not an object")
    message, lease, token = (fields.get(name) for name in ("message_id", "lease_id", "fencing_token"))
    if not isinstance(message, str) or not isinstance(lease, str) or not isinstance(token, int):
        raise InvalidInput(
            "it lacks message_id, lease_id or fencing_token, or they are not what `receive --json` printed"
        )
    if fields.get("queue", queue) != queue:
        raise InvalidInput(f"message {message} was received from queue {fields['queue']!r}, not from {queue!r}")
    if fields.get("namespace", namespace) != namespace:
        raise InvalidInput(
            f"message {message} was received in namespace {fields['namespace']!r}, not in {namespace!r}: give "
            "--namespace"
        )
    return Delivery(message, lease, token)
