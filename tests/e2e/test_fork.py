"""Processes that fork while they have a pond open."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("fork_worker.py")
SCENARIOS = ("every_call", "parent_closes", "amid_writes", "processes", "an_ordinary_end", "amid_a_read", "no_turn")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_fork(scenario: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(WORKER), scenario, str(tmp_path / "work.db")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert "Traceback" not in done.stderr
