"""The command tree, and how each kind of end becomes an exit code and one line on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from millpond.cli.codes import EXIT_BROKEN_PIPE, EXIT_ERROR, EXIT_INTERRUPTED, EXIT_USAGE
from millpond.cli.settings import Group, Settings
from millpond.errors import MillpondError

SECTIONS = {
    "Produce and consume": ("enqueue", "receive", "ack", "nack", "defer", "extend", "work", "worker"),
    "Serve": ("serve", "token"),
    "Look": ("peek", "queues", "stats", "top", "dlq"),
    "Administer": (
        "pause",
        "resume",
        "policy",
        "purge",
        "verify",
        "discard-unreadable",
        "rekey",
        "keygen",
        "completion",
    ),
}


class _StdoutGone(Exception):
    """Whoever read stdout has gone."""


class App(Group):
    """The root: help in sections, errors in one line."""

    root = True

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = formatter.width - 6 - max(map(len, self.commands))
        for title, names in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(width)) for name in names])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError as error:  # before click sees it: it would end with code 1
            raise _StdoutGone from error
        return result

    def main(self, args: Sequence[str] | None = None, *rest: Any, **more: Any) -> Any:
        """Run; always ends in SystemExit."""
        settings = Settings()
        more |= {"standalone_mode": False, "obj": settings}
        try:
            code = super().main(args, *rest, **more)
            sys.stdout.flush()
        except (BrokenPipeError, _StdoutGone):
            _forget_stdout()
            code = EXIT_BROKEN_PIPE
        except click.exceptions.NoArgsIsHelpError as error:
            print(error.format_message(), file=sys.stderr)
            code = EXIT_USAGE
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "millpond"
            code = _fail(f"{error.format_message().rstrip('.')}; see `{command} --help`", EXIT_USAGE, settings)
        except click.ClickException as error:
            code = _fail(error.format_message(), error.exit_code, settings)
        except (click.Abort, KeyboardInterrupt):
            code = EXIT_INTERRUPTED
        except MillpondError as error:
            code = _fail(f"{error} [{error.code}]", EXIT_ERROR, settings)
        except OSError as error:
            code = _fail(os_error_text(error), EXIT_ERROR, settings)
        raise SystemExit(code if isinstance(code, int) else 0)


def os_error_text(error: OSError) -> str:
    """``path: reason`` rather than Python's ``[Errno 2] …``."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else reason


def _fail(text: str, code: int, settings: Settings) -> int:
    if settings.debug:
        import traceback

        traceback.print_exc()
    line = " ".join(text.split())
    print(f"millpond: error: {line}", file=sys.stderr, flush=True)
    return code


def _forget_stdout() -> None:
    """Nobody reads stdout any more: let what is buffered go nowhere, or the interpreter complains as it exits."""
    with contextlib.suppress(OSError, ValueError):  # a replaced stdout has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


EPILOG = """Durations are seconds (30, 1.5) or carry a unit: 500ms, 30s, 5m, 2h, 1d, 1h30m. Exit codes: 0 done, 1 error,
2 wrong usage, 3 an outcome asked for by --fail-empty or --fail-dead, 130/143 stopped by a signal."""


@click.group(
    name="millpond",
    cls=App,
    epilog=EPILOG,
    context_settings={"auto_envvar_prefix": "MILLPOND", "help_option_names": ["-h", "--help"], "show_default": True},
)
def app() -> None:
    """Millpond: a durable message queue that needs no broker.

    \b
    millpond enqueue orders '{"id": 1}'          put a message in
    millpond receive orders --json               take one, with its lease
    millpond work orders -- ./handle-order       run a command for each
    """


def _add_commands() -> None:
    from millpond.cli import (
        admin,
        completion,
        consume,
        dlq,
        enqueue,
        inspect,
        keys,
        serve,
        token,
        top,
        work,
        worker,
    )

    for command in (
        enqueue.enqueue,
        consume.receive,
        consume.ack,
        consume.nack,
        consume.defer,
        consume.extend,
        work.work,
        worker.worker,
        serve.serve,
        token.token,
        inspect.peek,
        inspect.queues,
        inspect.stats,
        top.top,
        dlq.dlq,
        admin.pause,
        admin.resume,
        admin.policy,
        admin.purge,
        inspect.verify,
        admin.discard_unreadable,
        keys.rekey,
        keys.keygen,
        completion.completion,
    ):
        app.add_command(command)


_add_commands()
