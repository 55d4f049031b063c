"""The global options, accepted before and after the command, and how a command gets its pond.

Precedence: an option after the command, then one before it, then its environment variable, then the default.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    import logging

    from millpond.cli.output import Output
    from millpond.crypto.keyring import Keyring
    from millpond.pond import Pond
    from millpond.queue import Queue
    from millpond.stores.base import Finding

T = TypeVar("T")

DEFAULT_STORE = "sqlite:///millpond.db"


class Settings:
    """What the global options say."""

    def __init__(self) -> None:
        self.store = DEFAULT_STORE
        self.namespace: str | None = None
        self.keyring: str | None = None
        self.json = False
        self.quiet = False
        self.verbose = 0
        self.given: dict[str, str] = {}
        """What was given on the command line itself, rather than by the environment."""

    @property
    def debug(self) -> bool:
        """Show the traceback of an error."""
        return self.verbose >= 2 or bool(os.environ.get("MILLPOND_DEBUG"))

    def output(self) -> Output:
        """Where results go."""
        from millpond.cli.output import Output

        return Output(json=self.json, quiet=self.quiet)

    def queue(self, pond: Pond, name: str) -> Queue:
        """A queue of the chosen namespace."""
        return pond.queue(name, namespace=self.namespace or "default")

    def open(self) -> Pond:
        """The pond at ``--store``. A server's token comes from MILLPOND_TOKEN, for others can read a command line."""
        import millpond

        token = os.environ.get("MILLPOND_TOKEN") if self.store.lower().startswith(("http://", "https://")) else None
        return millpond.connect(self.store, keyring=self.load_keyring(), token=token or None)

    @property
    def has_keyring(self) -> bool:
        """A keyring was named; it is not read for that."""
        return self.keyring is not None or bool(os.environ.get("MILLPOND_KEYRING"))

    def load_keyring(self) -> Keyring | None:
        """The keyring of ``--keyring``, else of MILLPOND_KEYRING, else None. Raises InvalidInput, OSError."""
        if not self.has_keyring:
            return None
        from millpond.crypto.keyring import Keyring

        if self.keyring is not None:
            return Keyring.from_file(self.keyring)
        return Keyring.load(os.environ["MILLPOND_KEYRING"], source="MILLPOND_KEYRING")

    def run(self, work: Callable[[Pond], Awaitable[T]], *, existing: bool = False) -> T:
        """Open the pond, do the work, close it. ``existing`` refuses to make a new, empty store where there is none:
        asking a file that is not there is a wrong path or directory, never a question about an empty queue."""
        import asyncio

        self.start_logging()
        if existing:
            self._check_exists()

        async def session() -> T:
            async with self.open() as pond:
                return await work(pond)

        result = asyncio.run(session())
        if not existing and self.store.startswith("memory:"):
            self.output().note("memory:// lasted no longer than this command; name a file with --store")
        return result

    def probe(self) -> list[Finding]:
        """What the storage of a bucket can do, found out by trying; [] for other stores."""
        import asyncio

        from millpond.pond import probe_store

        return asyncio.run(probe_store(self.store))

    def store_file(self) -> str | None:
        """The path of an SQLite store; None for any other kind. Raises InvalidInput."""
        from millpond.pond import sqlite_path

        return sqlite_path(self.store)

    def _check_exists(self) -> None:
        path = self.store_file()
        if path is not None and not os.path.exists(path):
            raise click.ClickException(
                f"there is no store at {path}: name it with --store or MILLPOND_STORE (`millpond enqueue` makes one)"
            )

    def start_logging(self) -> None:
        """Log to stderr, as much as --verbose and --quiet say."""
        import logging

        if self.verbose:
            level = logging.DEBUG if self.verbose >= 2 else logging.INFO
            form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
        else:
            level = logging.ERROR if self.quiet else logging.WARNING
            form = "millpond: %(levelname)s: %(message)s"
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_fields_formatter(form))
        logging.basicConfig(level=level, handlers=[handler])


def _fields_formatter(form: str) -> logging.Formatter:
    """Event names alone say little: append the fields that the library gives with each."""
    import logging

    usual = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    class Fields(logging.Formatter):
        def formatMessage(self, record: logging.LogRecord) -> str:
            fields = [f"{name}={value}" for name, value in vars(record).items() if name not in usual]
            return " ".join([super().formatMessage(record), *fields])

    return Fields(form)


pass_settings = click.make_pass_decorator(Settings, ensure=True)


class Text(click.ParamType[str]):
    """A click type: text, and not the bytes that a shell also passes. Payloads and file names may be those."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            str(value).encode()
        except UnicodeEncodeError:
            self.fail("is not UTF-8 text", param, ctx)
        return str(value)


class Option(click.Option):
    """An option that also reads ``MILLPOND_<COMMAND>_<OPTION>`` and says so in its help.

    ``environment=False`` for what belongs to one call alone: ids, and the consent to destroy.
    """

    def __init__(self, *args: Any, environment: bool = True, **attributes: Any) -> None:
        attributes.setdefault("show_envvar", environment)
        attributes["allow_from_autoenv"] = environment
        if isinstance(attributes.get("type"), click.IntRange):
            attributes["type"].name = "integer"  # rather than "integer range", in what click says
            attributes.setdefault("metavar", "N")
        elif not attributes.get("is_flag"):
            attributes.setdefault("type", Text())
        super().__init__(*args, **attributes)


def option(*names: str, **attributes: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``click.option`` with our `Option`."""
    return click.option(*names, cls=Option, **attributes)


def _keep(name: str) -> Callable[[click.Context, click.Parameter, Any], Any]:
    def callback(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        settings = ctx.ensure_object(Settings)
        if value is not None and value is not False and value != 0:
            setattr(settings, name, value)
            if param.name and ctx.get_parameter_source(param.name) is click.core.ParameterSource.COMMANDLINE:
                settings.given[name] = value
        return value

    return callback


def _show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        click.echo(f"millpond {version('millpond')}")
    except PackageNotFoundError:  # run from a source tree that is not installed
        click.echo("millpond (not installed)")
    ctx.exit()


class GlobalOption(click.Option):
    """One of the options that every command takes."""


def global_options(*, root: bool) -> list[click.Option]:
    """The options of every command. Only the root's read the environment: lower down it would win over the root's."""

    def make(*names: str, envvar: str | None = None, help: str, **more: Any) -> click.Option:
        key = more.pop("key", names[0].removeprefix("--").replace("-", "_"))
        return GlobalOption(
            list(names),
            envvar=envvar if root else None,
            help=help + (f"  [env var: {envvar}]" if envvar else ""),
            expose_value=False,
            allow_from_autoenv=False,
            callback=_keep(key),
            **more,
        )

    options = [
        make("--store", envvar="MILLPOND_STORE", metavar="URL", help=f"Where the queues are; default {DEFAULT_STORE}."),
        make("--namespace", envvar="MILLPOND_NAMESPACE", metavar="NAME", help="Namespace, where it is not `default`."),
        make(
            "--keyring",
            envvar="MILLPOND_KEYRING_FILE",
            metavar="FILE",
            type=click.Path(dir_okay=False),
            help="Keyring of an encrypted store; MILLPOND_KEYRING may hold the ring itself.",
        ),
        make("--json", envvar="MILLPOND_JSON", is_flag=True, help="Print one JSON object a line."),
        make("-q", "--quiet", key="quiet", envvar="MILLPOND_QUIET", is_flag=True, help="No progress, no notes."),
        make(
            "-v",
            "--verbose",
            key="verbose",
            envvar="MILLPOND_VERBOSE",
            count=True,
            show_default=False,
            help="Say more; twice for everything, tracebacks included.",
        ),
    ]
    if root:
        options.append(
            click.Option(
                ["--version"],
                is_flag=True,
                is_eager=True,
                expose_value=False,
                callback=_show_version,
                help="Show the version and exit.",
            )
        )
    return options


class _WithGlobals(click.Command):
    """Adds the global options, and shows them apart in the help."""

    root = False

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.params.extend(global_options(root=self.root))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own: list[tuple[str, str]] = []
        shared: list[tuple[str, str]] = []
        for param in self.get_params(ctx):
            line = param.get_help_record(ctx)
            if line is not None:
                (shared if isinstance(param, GlobalOption) else own).append(line)
        for title, lines in (("Options", own), ("Global options", shared)):
            if lines:
                with formatter.section(title):
                    formatter.write_dl(lines)


class Command(_WithGlobals):
    """A command."""


class Group(_WithGlobals, click.Group):
    """A group of commands, listed in the order in which they were added."""

    command_class = Command

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _WithGlobals.format_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class QueueArgument(click.Argument):
    """QUEUE, completed by the shell from the store's own queues."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, shell_complete=_complete_queue, **attributes)


def queue_argument(**attributes: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The QUEUE argument."""
    return click.argument("queue", cls=QueueArgument, **attributes)


def _complete_queue(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from millpond.cli.records import all_queues
    from millpond.errors import MillpondError

    settings = ctx.ensure_object(Settings)
    try:
        path = settings.store_file()
    except MillpondError:
        return []
    if path is None or not os.path.exists(path):
        return []

    async def names(pond: Pond) -> list[str]:
        return sorted({name for _, name in await all_queues(pond, settings.namespace) if name.startswith(incomplete)})

    try:
        return settings.run(names)
    except (MillpondError, OSError):  # a shell completes nothing rather than print an error into the prompt
        return []


def can_ask() -> bool:
    """A person is at the terminal."""
    return sys.stdin is not None and sys.stdin.isatty()


def confirm(question: str, yes: bool) -> None:
    """Ask a person; without one at the terminal, ``--yes`` must have been given."""
    if yes:
        return
    if not can_ask():
        raise click.UsageError("this cannot be undone, and nobody is at the terminal to be asked: give --yes")
    click.confirm(question, abort=True, err=True)
