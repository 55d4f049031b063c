"""``pip install millpond``, without extras, is a whole queue; and what needs an extra says which."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
from tests.e2e.bare import lacking

BARE = Path(__file__).parent / "bare.py"

QUEUE = """
import millpond
from millpond import testing
with millpond.connect_sync("sqlite:///q.db") as pond:
    queue = pond.queue("q")
    queue.enqueue(b"x" * 100_000, dedup_key="k", ordering_key="o")
    [message] = queue.receive()
    message.state.save(1)
    assert len(message.read()) == 100_000
    message.ack(then=[("r", b"y")])
    assert pond.verify() == []
    try:
        pond.rekey()
    except millpond.InvalidInput as error:
        assert "without a keyring" in str(error)
"""

NEEDS = """
import millpond, os
keyring = millpond.Keyring.load(millpond.Keyring.generate_key())
for call, extra in (
    (lambda: millpond.connect("sqlite:///e.db", keyring=keyring), "encryption"),
    (lambda: millpond.connect("s3://bucket/prefix"), "s3"),
    (lambda: millpond.connect("memory://").periodic("0 3 * * *"), "worker"),
):
    try:
        call()
    except millpond.MillpondError as error:
        assert f"pip install 'millpond[{extra}]'" in str(error), error
    else:
        raise AssertionError(extra)
assert not os.path.exists("e.db")
"""


@lru_cache
def without() -> str:
    """What an installation without extras lacks of what is here."""
    packages = lacking()
    assert {"cryptography", "starlette", "uvicorn", "obstore", "cronsim"} <= packages
    assert not {"apsw", "click", "msgspec", "rich", "millpond"} & packages
    return ",".join(sorted(packages))


def bare(cwd: Path, *arguments: str, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLPOND_")}
    return subprocess.run(
        [sys.executable, str(BARE), without(), *arguments],
        cwd=cwd,
        env=environment | more,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("code", [QUEUE, NEEDS], ids=["queue", "needs"])
def test_the_library(tmp_path: Path, code: str) -> None:
    run = bare(tmp_path, "-c", code)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_the_command(tmp_path: Path) -> None:
    def millpond(*arguments: str, stdin: str = "", code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
        run = bare(tmp_path, "-m", "millpond", *arguments, stdin=stdin, **more)
        assert run.returncode == code, run.stderr
        return run

    millpond("enqueue", "q", "--lines", stdin="a\nb\n")
    assert sorted(millpond("work", "q", "--until-empty", "--", "cat").stdout) == ["a", "b"]
    assert "all is well" in millpond("verify").stderr
    key = millpond("keygen").stdout.strip()
    refused = millpond("stats", code=1, MILLPOND_KEYRING=key).stderr
    assert refused.splitlines() == [
        "millpond: error: encryption needs the package cryptography: pip install 'millpond[encryption]' [store_error]"
    ]
    assert "pip install 'millpond[server]'" in millpond("serve", code=1).stderr
