"""What type checkers make of programs that use Millpond, and that the synchronous types are those of today."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


def mypy(*paths: Path) -> subprocess.CompletedProcess[str]:
    """As a user runs it, and with the cache of the repository's own run."""
    environment = os.environ | {"MYPYPATH": str(ROOT / "src")}
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )


def test_right_and_wrong_programs(tmp_path: Path) -> None:
    """One run for all, for most of its time is its start."""
    wrong = HERE / "wrong.py"
    # The same mistakes with nothing that silences them: that mypy sees this file at all, and each of them.
    loud = tmp_path / "loud.py"
    text = wrong.read_text("utf-8")
    loud.write_text(re.sub(r"# type: ignore\[.*?\]", "", text), "utf-8")
    expected = {number for number, line in enumerate(text.splitlines(), 1) if "type: ignore" in line}
    run = mypy(HERE / "api.py", wrong, loud)
    lines = run.stdout.splitlines()
    assert [line for line in lines if "loud.py" not in line] == []
    seen = {int(found[1]) for line in lines if (found := re.search(r"loud\.py:(\d+): error", line))}
    assert seen == expected
    assert (run.returncode, run.stderr) == (1, "")


def test_the_synchronous_types_are_those_of_the_asynchronous_classes() -> None:
    written = runpy.run_path(str(ROOT / "docs" / "make_sync_types.py"))["page"]()
    stub = ROOT / "src" / "millpond" / "sync_types.pyi"
    assert stub.read_text("utf-8") == written, "run python docs/make_sync_types.py"


@pytest.mark.parametrize("name", ["api.py", "wrong.py"])
def test_the_programs_are_valid(name: str) -> None:
    compile((HERE / name).read_text("utf-8"), name, "exec")
