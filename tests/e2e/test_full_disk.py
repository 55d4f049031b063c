"""A disk without room: a clear error, nothing lost, acks that still work, and all is well again once there is room."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("full_disk_worker.py")
MOUNT = 'mount -t tmpfs -o size=8m none "$0" && exec "$@"'
"""In a mount namespace of its own, which ends with the process."""


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("how", ["reported", "file-size", "max-bytes"])
def test_a_limit_is_survived(how: str, tmp_path: Path) -> None:
    done = run(sys.executable, WORKER, how, tmp_path)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_full_file_system_is_survived(tmp_path: Path) -> None:
    """Where a small one may be mounted; elsewhere the same with a directory of which the system only says so."""
    for unshare in (("unshare", "--mount"), ("unshare", "--map-root-user", "--mount")):
        try:
            if run(*unshare, "sh", "-c", MOUNT, tmp_path, "true").returncode == 0:
                done = run(*unshare, "sh", "-c", MOUNT, tmp_path, sys.executable, WORKER, "file-system", tmp_path)
                break
        except FileNotFoundError:
            continue
    else:
        done = run(sys.executable, WORKER, "reported", tmp_path)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert done.args[-2] == "reported" or not (tmp_path / "work.db").exists(), "it was not mounted"
