"""Writes docs/reference/cli.md from the command tree: ``python docs/make_cli_reference.py`` (``--check`` compares)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

import click

from millpond.cli.app import SECTIONS, app
from millpond.cli.settings import GlobalOption

PAGE = Path(__file__).parent / "reference" / "cli.md"
INTRODUCTION = """\
# The `millpond` command

<!-- Made by docs/make_cli_reference.py from the commands themselves; change those, then run it again. -->

`millpond` and `python -m millpond` are the same. Results go to stdout, notes, progress and errors to stderr. Tables and
progress are drawn on a terminal only (`NO_COLOR` is heeded); elsewhere the same is aligned text.

**Options and the environment.** The global options may stand before or after the command. What is given after the
command wins over what is given before it, that over the environment variable, and that over the default.

**Durations** are seconds (`30`, `1.5`) or carry a unit: `500ms`, `30s`, `5m`, `2h`, `1d`, `1w`, `1h30m`.

**JSON.** With `--json` a command prints one object a line. Names are stable: fields are added, never renamed or
removed. Times are ISO 8601 in UTC with milliseconds, durations are seconds, absent values are `null`. A payload is text
with `"payload_encoding":"utf-8"`, or base64 with `"base64"`; above 16 MiB it is left out (`"omitted"`), in a file it is
`"file"` with `payload_file`.

**Errors** are one line on stderr, `millpond: error: what happened [code]`; the codes are those of the exceptions.
`-vv` or `MILLPOND_DEBUG=1` adds the traceback.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | an error, or `verify` found problems, or an answer of `--from-json` failed |
| 2 | wrong usage; nothing was done |
| 3 | done, with the outcome that `--fail-empty` or `--fail-dead` asks to be told of |
| 130 | stopped by Ctrl-C |
| 143 | stopped by SIGTERM before what was asked for was done |
| 141 | the reader of stdout went away |

**Shell completion** of commands, options and queue names: see [completion](#completion).
"""


def cell(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def variable(ctx: click.Context, option: click.Option) -> str:
    """The environment variable of an option."""
    if option.envvar:
        return f"`{option.envvar}`"
    if option.allow_from_autoenv and ctx.auto_envvar_prefix and option.name:
        return f"`{ctx.auto_envvar_prefix}_{option.name.upper()}`"
    return ""


def default(option: click.Option) -> str:
    """The default of an option that has one worth naming."""
    value = option.default
    plain = isinstance(value, int | float | str) and not isinstance(value, bool) and not option.count
    return f" Default `{value:g}`." if plain and isinstance(value, float) else f" Default `{value}`." if plain else ""


def table(ctx: click.Context, options: list[click.Option]) -> Iterator[str]:
    """A table of options."""
    yield "| option | | environment |"
    yield "|---|---|---|"
    for option in options:
        names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
        if not option.is_flag and not option.count:
            names += f" *{cell(option.make_metavar(ctx).replace('|', ' or '))}*"
        help = cell((option.help or "").split("  [env var:")[0])
        yield f"| {names} | {help}{'' if '[default' in help else default(option)} | {variable(ctx, option)} |"


def describe(command: click.Command, ctx: click.Context, level: int) -> Iterator[str]:
    """One command, and those below it."""
    name = ctx.command_path.removeprefix("millpond ")
    yield f"{'#' * level} {name}"
    yield ""
    usage = " ".join(command.collect_usage_pieces(ctx))
    yield f"    millpond {name} {usage}"
    yield ""
    for paragraph in cleandoc(command.help or "").split("\n\n"):
        if paragraph.startswith("\b\n"):
            yield "\n".join(f"    {line}" for line in paragraph[2:].split("\n"))
        else:
            yield paragraph
        yield ""
    own = [param for param in command.params if isinstance(param, click.Option) and not isinstance(param, GlobalOption)]
    if own:
        yield from table(ctx, own)
        yield ""
    if isinstance(command, click.Group):
        for below in command.commands.values():
            yield from describe(below, context(below, ctx), level + 1)


def context(command: click.Command, parent: click.Context) -> click.Context:
    """A context to describe a command in."""
    return click.Context(command, info_name=command.name, parent=parent)


def page() -> str:
    """The whole page."""
    root = click.Context(app, info_name="millpond", auto_envvar_prefix="MILLPOND")
    lines = [INTRODUCTION, "## Global options", ""]
    lines += table(root, [param for param in app.params if isinstance(param, GlobalOption)])
    lines.append("")
    for section, names in SECTIONS.items():
        lines += [f"## {section}", ""]
        for name in names:
            lines += describe(app.commands[name], context(app.commands[name], root), 3)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Write the page, or with ``--check`` say whether it is up to date."""
    text = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
            raise SystemExit(f"{PAGE} is out of date; run python docs/make_cli_reference.py")
        return
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
