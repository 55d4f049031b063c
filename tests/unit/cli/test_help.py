from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from millpond.cli.app import SECTIONS, app
from millpond.cli.settings import GlobalOption, Option

ROOT = Path(__file__).parents[3]
GLOBAL_VARIABLES = {
    "--store": "MILLPOND_STORE",
    "--namespace": "MILLPOND_NAMESPACE",
    "--keyring": "MILLPOND_KEYRING_FILE",
    "--json": "MILLPOND_JSON",
    "--quiet": "MILLPOND_QUIET",
    "--verbose": "MILLPOND_VERBOSE",
}
PER_CALL = {
    *("--message", "--lease", "--token", "--from-json", "--after", "--dedup-key", "--ordering-key", "--correlation-id"),
    *("--attribute", "--attributes", "--file", "--output", "--output-dir", "--all", "--yes", "--id", "--check"),
    "--expires-in",
}
"""What belongs to one call alone: an environment variable would do it to every call."""
HEAVY = ("apsw", "asyncio", "cryptography", "msgspec", "rich", "millpond.pond", "logging", "subprocess")


def commands(group: click.Group = app, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


ALL = dict(commands())


def help_of(path: tuple[str, ...]) -> str:
    result = CliRunner().invoke(app, [*path, "--help"])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_help_loads_nothing_heavy() -> None:
    """What keeps `millpond --help` quick, told without a clock."""
    script = (
        "import sys\nfrom millpond.cli import main\n"
        "try: main(['--help'])\n"
        f"except SystemExit as end: print(sorted(set(sys.modules) & set({HEAVY!r})), end.code, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "[] 0\n"
    assert "Produce and consume" in done.stdout


def test_every_command_has_its_place_in_the_help() -> None:
    assert [name for names in SECTIONS.values() for name in names] == list(app.commands)
    for name in app.commands:
        assert f" {name} " in help_of(())


@pytest.mark.parametrize("path", [(), *ALL], ids=lambda path: " ".join(path) or "millpond")
def test_every_command_takes_the_global_options_and_names_their_variables(path: tuple[str, ...]) -> None:
    text = help_of(path)
    for name, variable in GLOBAL_VARIABLES.items():
        assert name in text
        assert f"[env var: {variable}]" in text


@pytest.mark.parametrize("path", list(ALL), ids=" ".join)
def test_every_option_says_what_it_does_and_names_its_variable(path: tuple[str, ...]) -> None:
    text = help_of(path)
    command = ALL[path]
    assert command.help
    assert command.get_short_help_str()
    for param in command.params:
        if not isinstance(param, click.Option) or isinstance(param, GlobalOption):
            continue
        assert isinstance(param, Option), param.name
        assert param.help, f"{path} {param.name} has no help"
        variable = "_".join(["MILLPOND", *path, param.name or ""]).upper()
        named = {variable in text, param.opts[0] not in PER_CALL, param.show_envvar}
        assert len(named) == 1, f"{' '.join(path)} {param.opts[0]}: its help and {variable} disagree"


def test_an_options_variable_is_read(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["receive", "q"], env={"MILLPOND_RECEIVE_COUNT": "many", "MILLPOND_STORE": f"sqlite:///{tmp_path}/x.db"}
    )
    assert result.exit_code == 2
    assert "'many' is not a valid integer" in result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    result = CliRunner().invoke(app, ["completion", shell])
    assert result.exit_code == 0
    assert "_MILLPOND_COMPLETE" in result.stdout


def test_the_reference_is_what_the_commands_say() -> None:
    """Every command and option is documented, in the words of its help."""
    done = subprocess.run(
        [sys.executable, "docs/make_cli_reference.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    for path, command in ALL.items():
        assert f"# {' '.join(path)}\n" in page
        for param in command.params:
            assert not isinstance(param, click.Option) or f"`{param.opts[0]}`" in page
