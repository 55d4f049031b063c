"""``millpond serve``: HTTP in front of the store. Its options are made from the table of the server's settings."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from millpond.cli.settings import Command, Option, Settings, option, pass_settings
from millpond.server.options import GLOBAL, SETTINGS, Setting

if TYPE_CHECKING:
    from millpond.pond import Pond
    from millpond.server.config import Loaded, ServerConfig


class SettingOption(Option):
    """An option for a setting. Its variable is read with the file and the defaults, not by click: then an error names
    the variable, and every value knows where it came from."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        return None


_METAVARS = {"text": "TEXT", "path": "FILE", "number": "N", "bytes": "BYTES", "duration": "DURATION", "list": "A,B,…"}


def _settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of all settings but those that every command has."""
    for setting in reversed(SETTINGS):
        if setting.place not in GLOBAL:
            command = _option(setting)(command)
    return command


def _option(setting: Setting) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    more: dict[str, Any] = {"metavar": _METAVARS.get(setting.kind)}
    name = setting.flag
    if setting.kind == "flag":
        name = f"{setting.flag}/--no-{setting.flag.removeprefix('--')}"
        more = {"is_flag": True}
    elif setting.kind == "choice":
        more = {"metavar": "|".join(setting.choices)}
    return click.option(name, setting.option, cls=SettingOption, default=None, help=setting.help, **more)


@click.command(cls=Command)
@option("--config", metavar="FILE", help="TOML file of settings.")
@option("--show-config", is_flag=True, help="Print every setting, its value and where that came from, and end.")
@_settings
@pass_settings
def serve(settings: Settings, /, config: str | None, show_config: bool, **flags: Any) -> None:
    """Serve the store over HTTP.

    Speaks lockd's queue protocol and Millpond's own, on 127.0.0.1:9341 unless told otherwise. On an address that others
    can reach it wants TLS, and tokens or client certificates. A setting is an option, an environment variable, or a
    line of the TOML file, in this order. Sizes may carry a unit (64KiB, 100MiB).

    SIGTERM or Ctrl-C drains: nothing more is handed out, /readyz answers 503, consumers may answer what they hold, and
    what is under way ends. Once more ends at once. SIGHUP reads tokens and certificates again, which changed files are
    within seconds anyway, and opens the audit log anew.

    Exit code 0 after a drain, 1 when the server could not start, 2 for a setting that cannot be, 130 and 143 when a
    second signal cut the drain short.

    \b
    millpond serve --store sqlite:////var/lib/millpond/millpond.db
    millpond serve --host 0.0.0.0 --tls-cert server.pem --auth-tokens tokens.toml
    millpond serve --config /etc/millpond.toml --show-config
    """
    from millpond.errors import InvalidInput
    from millpond.server.config import load

    flags |= {name: settings.given.get(name) for name in GLOBAL}
    try:
        loaded = load(flags, file=config)
        if show_config:
            _show(settings, loaded)
            return
        loaded.config.check_exposure()
        code = _run(settings, loaded.config)
    except InvalidInput as error:
        # Also a file that is not there or cannot be used: trying again would change nothing.
        raise click.UsageError(str(error)) from error
    raise click.exceptions.Exit(code)


def _run(settings: Settings, config: ServerConfig) -> int:
    import millpond
    from millpond.server import process
    from millpond.server.config import redact_url
    from millpond.server.logs import logging_to

    settings.keyring = config.keyring
    keyring = settings.load_keyring()

    def pond() -> Pond:
        return millpond.connect(config.store, keyring=keyring, config=process.pond_config(config))

    def ready(url: str) -> None:
        # Whoever reads JSON lines has this as an event, and wants nothing else in between.
        if sys.stderr.isatty():
            settings.output().note(f"serving {redact_url(config.store)} at {url}; Ctrl-C stops it")

    level = "debug" if settings.verbose >= 2 else "error" if settings.quiet else config.log_level
    with logging_to(form=config.log_format, level=level):
        return process.main(pond, config, ready=ready)


def _show(settings: Settings, loaded: Loaded) -> None:
    from millpond.server.config import show

    output = settings.output()
    rows = show(loaded)
    if settings.json:
        for row in rows:
            output.record({"setting": row.name, "value": row.value, "origin": row.origin})
        return
    output.rows(("setting", "value", "from"), rows)
