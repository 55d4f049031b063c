"""`millpond worker`: what it refuses, and how it finds a pond. Workers at work: tests/e2e/test_worker.py."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from millpond.cli.app import app
from millpond.cli.settings import Settings
from millpond.cli.worker import LIFELINE, _command, _follow
from millpond.model.clock import SystemClock
from millpond.worker.probe import Report, write


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [*sys.path])
    names = set(sys.modules)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["worker", "--app-dir", str(tmp_path), *arguments])

    yield run
    for name in set(sys.modules) - names:
        if name.startswith("hf_"):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("source", "target", "text"),
    [
        ("", "hf_missing", "there is no module 'hf_missing'"),
        ("", "hf_missing.inner:pond", "there is no module 'hf_missing.inner'"),
        ("", "src/hf_file.py", "named as in an import, without .py and with dots for slashes"),
        ("", ".hf_relative", "is no module's name"),
        ("", "hf_module", "pond is nothing, not a pond"),
        ("pond = 3", "hf_module", "pond is a int, not a pond"),
        ("pond = 3", "hf_module:a.b", "a.b is nothing"),
        ("import millpond\npond = millpond.connect('memory://')", "hf_module:pond", "there is nothing to run"),
        ("import millpond\npond = millpond.connect_sync('memory://').open()", "hf_module", "opens its pond"),
        (
            "import millpond\npond = millpond.connect('memory://')\n@pond.consumer('q')\ndef f(a, b): ...",
            "hf_module",
            "parameter 'b' is filled by nothing",
        ),
        (
            "import millpond\npond = millpond.connect_sync('memory://')\n@pond.consumer('q')\ndef f(a): ...",
            "hf_module -c g",
            "there is no consumer 'g'; the pond has: f",
        ),
    ],
)
def test_what_cannot_be_run_is_wrong_usage(run: Any, tmp_path: Path, source: str, target: str, text: str) -> None:
    (tmp_path / "hf_module.py").write_text(source)
    result = run(*target.split())
    assert (result.exit_code, text in result.stderr) == (2, True), result.stderr


def test_a_module_that_cannot_be_imported_shows_why(run: Any, tmp_path: Path) -> None:
    (tmp_path / "hf_broken.py").write_text("import hf_not_there")
    result = run("hf_broken")
    assert result.exit_code == 1
    assert isinstance(result.exception, ModuleNotFoundError)
    assert "hf_not_there" in str(result.exception)


def test_a_folder_that_is_not_there_is_wrong_usage(run: Any, tmp_path: Path) -> None:
    """With --reload, a supervisor would watch nothing, and start processes in vain for ever."""
    result = run("--app-dir", str(tmp_path / "no"), "--reload", "hf_module")
    assert (result.exit_code, "does not exist" in result.stderr) == (2, True)


async def test_who_loses_his_supervisor_stops_and_no_command_of_a_handler_inherits_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs, lifeline = os.pipe()
    try:
        monkeypatch.setenv(LIFELINE, str(theirs))
        stopped = asyncio.Event()
        _follow(asyncio.get_running_loop(), stopped.set)
        assert LIFELINE not in os.environ
        assert not stopped.is_set()
    finally:
        os.close(lifeline)
    async with asyncio.timeout(30):
        await stopped.wait()
    os.close(theirs)


def test_it_needs_a_module_or_a_probe_to_check(run: Any) -> None:
    assert run().exit_code == 2
    result = run("--check")
    assert (result.exit_code, "--probe-file" in result.stderr) == (2, True)


def test_check_tells_by_its_exit_code(run: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "alive")
    result = run("--check", "--probe-file", path)
    assert (result.exit_code, "is not there" in result.stderr) == (1, True)
    write(path, Report(1, SystemClock().now_ms(), []))
    result = run("--check", "--probe-file", path, "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (0, {"ok": True, "problems": []})
    write(path, Report(1, SystemClock().now_ms() - 10_000, []))
    assert run("--check", "--probe-file", path).exit_code == 0
    assert run("--check", "--probe-file", path, "--max-age", "5s").exit_code == 1


def test_a_process_gets_the_options_of_its_supervisor_and_none_of_its_own() -> None:
    settings = Settings()
    settings.verbose = 2
    assert _command(settings, "shop:pond", ("a", "b"), 12.5, "me", "/srv")[1:] == [
        "-m", "millpond", "-v", "-v", "worker", "shop:pond", "--processes", "1", "--grace", "12.5",
        "--app-dir", "/srv", "--consumer", "a", "--consumer", "b", "--owner", "me",
    ]  # fmt: skip
