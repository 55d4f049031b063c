"""``millpond worker``: the consumers of a Python module, as a service."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import click

from millpond.cli.codes import EXIT_ERROR, EXIT_USAGE
from millpond.cli.durations import Duration
from millpond.cli.settings import Command, Settings, Text, option, pass_settings
from millpond.errors import InvalidInput

if TYPE_CHECKING:
    from millpond.model.clock import Clock
    from millpond.pond import Pond
    from millpond.worker.worker import Worker

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
DEFAULT_NAME = "pond"
LIFELINE = "MILLPOND_LIFELINE"
"""Environment variable of a supervised process: the descriptor of the pipe from its supervisor."""


@click.command(cls=Command)
@click.argument("target", required=False, type=Text(), metavar="MODULE[:POND]")
@option("--consumer", "-c", "consumers", multiple=True, metavar="NAME", help="Only this one; may be repeated.")
@option("--processes", "-p", type=click.IntRange(1), default=1, help="Worker processes; those that die are restarted.")
@option("--grace", type=Duration(), default=30.0, help="What running handlers have to end when it stops.")
@option("--owner", help="A name for the holder of the leases; default host and process.")
@option(
    "--app-dir", type=click.Path(exists=True, file_okay=False), default=".", help="Where MODULE is looked for first."
)
@option("--reload", is_flag=True, help="For development: start anew when a Python file in --app-dir changes.")
@option("--probe-file", type=click.Path(dir_okay=False), help="Write there every second what --check reads.")
@option(
    "--check", is_flag=True, environment=False, help="Do not work: say whether the worker of --probe-file consumes."
)
@option("--max-age", type=Duration(positive=True), default=120.0, help="For --check: longest time without a look.")
@pass_settings
def worker(
    settings: Settings,
    /,
    target: str | None,
    consumers: tuple[str, ...],
    processes: int,
    grace: float,
    owner: str | None,
    app_dir: str,
    reload: bool,
    probe_file: str | None,
    check: bool,
    max_age: float,
) -> None:
    """Run the consumers that MODULE registers on its pond.

    MODULE:POND is where the pond is that functions were registered on with @pond.consumer(QUEUE); POND is `pond` unless
    given. The store is the pond's: --store, --namespace and --keyring do not apply.

    SIGTERM or Ctrl-C: take nothing more, let handlers end within --grace, then cancel them and give their messages
    back, no failure counted. Once more: cancel and give back at once. A third time: end without that; the messages come
    back when their leases end.

    With --processes, or --reload, a supervisor starts the workers, restarts those that die (after 1 second, doubling
    up to 30), and passes signals on. A worker whose supervisor dies stops as after SIGTERM.

    With --probe-file, `millpond worker --check --probe-file FILE` says whether the worker still consumes: exit code 1
    when its event loop is blocked, it is gone, or a consumer with room for more has not asked the store successfully
    for --max-age. Give it to your service manager as the liveness probe.

    Exit code 0 after one signal, when all was finished or given back; 130 or 143 after a second one; 1 for an error,
    also while it runs; 2 for a module, pond or consumer that is not there, which no restart cures.

    \b
    millpond worker shop.tasks
    millpond worker shop.tasks:pond -c mails -c invoices --processes 4
    """
    if check:
        _check(settings, probe_file, max_age)
        return
    if target is None:
        raise click.UsageError("name the module that registers the consumers: millpond worker MODULE:POND")
    settings.start_logging()
    if processes > 1 or reload:
        command = _command(settings, target, consumers, grace, owner, app_dir)
        code = _supervise(command, processes, grace, app_dir if reload else None, probe_file)
    else:
        sys.path.insert(0, os.path.abspath(app_dir))
        code = _work(load_pond(target), list(consumers) or None, grace, owner, probe_file)
    if code:
        raise click.exceptions.Exit(code)


def _check(settings: Settings, probe_file: str | None, max_age: float) -> None:
    from millpond.model.clock import SystemClock
    from millpond.worker.probe import check

    if probe_file is None:
        raise click.UsageError("--check needs --probe-file: the file that the worker writes")
    problems = check(probe_file, now_ms=SystemClock().now_ms(), max_age=max_age)
    output = settings.output()
    if settings.json:
        output.record({"ok": not problems, "problems": problems})
    else:
        for problem in problems:
            print(f"millpond: {problem}", file=sys.stderr)
    if problems:
        raise click.exceptions.Exit(EXIT_ERROR)


def load_pond(target: str) -> Pond:
    """The pond that MODULE:POND names. Raises click.UsageError."""
    import importlib

    from millpond.pond import Pond
    from millpond.sync import SyncPond

    module_name, _, name = target.partition(":")
    name = name or DEFAULT_NAME
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # That the module itself is missing, and not one that it imports.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        hint = ""
        if module_name.endswith(".py"):
            hint = "; it is named as in an import, without .py and with dots for slashes"
        raise click.UsageError(
            f"there is no module {module_name!r} in --app-dir or on the Python path{hint}"
        ) from error
    except (ValueError, TypeError) as error:
        raise click.UsageError(f"{module_name!r} is no module's name: {error}") from error
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if isinstance(found, SyncPond):
        found = found._target
    if not isinstance(found, Pond):
        what = "nothing" if found is None else f"a {type(found).__name__}"
        raise click.UsageError(f"{target!r}: {name} is {what}, not a pond; name one as MODULE:POND")
    if found.is_open:
        raise click.UsageError(f"{target!r}: {module_name} opens its pond; the worker does that, on a loop of its own")
    return found


def _work(pond: Pond, consumers: list[str] | None, grace: float, owner: str | None, probe_file: str | None) -> int:
    import asyncio

    from millpond.worker.probe import Probe
    from millpond.worker.worker import Worker

    stops = _Stops(pond.clock)

    async def session() -> None:
        try:
            made = Worker(pond, consumers, owner=owner, grace=grace)
        except InvalidInput as error:
            raise click.UsageError(str(error)) from error
        if probe_file is not None:
            made.add_service(Probe(made, probe_file, pond.clock))
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, stops.signal, made, number)
        _follow(loop, lambda: stops.signal(made, signal.SIGTERM))
        await made.run()
        if any(line.running for line in made.lines):
            # They refuse to be cancelled, and would keep the process from ending. All else is done.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(stops.code)

    asyncio.run(session())
    return stops.code


class _Stops:
    """The signals so far. To a supervised process, those within `ONE_SIGNAL` are one."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._numbers: list[int] = []
        self._last = 0.0
        self._supervised = LIFELINE in os.environ

    @property
    def code(self) -> int:
        """What to exit with."""
        return 128 + self._numbers[-1] if len(self._numbers) > 1 else 0

    def signal(self, made: Worker, number: int) -> None:
        """One more."""
        from millpond.worker.supervisor import ONE_SIGNAL

        now = self._clock.monotonic()
        if self._supervised and self._numbers and now - self._last < ONE_SIGNAL:
            return
        self._last = now
        self._numbers.append(number)
        if len(self._numbers) > 2:
            os._exit(self.code)
        made.stop()


def _follow(loop: Any, stop: Any) -> None:
    """Stop when the supervisor is gone: its end of the pipe closes with it."""
    given = os.environ.pop(LIFELINE, None)  # ours alone: commands that handlers run have no such descriptor
    if given is None:
        return
    descriptor = int(given)

    def gone() -> None:
        loop.remove_reader(descriptor)
        stop()

    loop.add_reader(descriptor, gone)


def _supervise(command: list[str], processes: int, grace: float, watched: str | None, probe_file: str | None) -> int:
    import threading

    from millpond.worker.supervisor import Supervisor, watch_files

    # What was given to this process is in the command, or is its own.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLPOND_WORKER_")}
    # While a developer edits, the next change may be the cure.
    hopeless = frozenset({EXIT_USAGE} if watched is None else ())
    supervisor = Supervisor(command, environment, processes, grace, hopeless, probe_file)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: supervisor.interrupt(number))
    stop = threading.Event()
    if watched is not None:
        try:
            watch_files([watched], supervisor.reload, stop)
        except ImportError:
            raise click.ClickException("--reload needs watchfiles: pip install 'millpond[worker]'") from None
    try:
        return supervisor.run()
    finally:
        stop.set()


def _command(
    settings: Settings, target: str, consumers: tuple[str, ...], grace: float, owner: str | None, app_dir: str
) -> list[str]:
    """This command for one process. Whatever the environment says, it is not to supervise others."""
    command = [sys.executable, "-m", "millpond", *(["-v"] * settings.verbose), *(["-q"] if settings.quiet else [])]
    command += ["worker", target, "--processes", "1", "--grace", f"{grace:g}", "--app-dir", app_dir]
    for name in consumers:
        command += ["--consumer", name]
    return command + (["--owner", owner] if owner else [])
