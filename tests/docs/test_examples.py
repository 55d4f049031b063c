"""Every Python and shell block that a reader may copy is run, page by page, in order, in a folder of its own.

A page's blocks share one namespace, one event loop (a block may `await` at its top), one environment and one folder. A
```text block after another is what that one prints; … in it stands for anything. A block with a comment
``<!-- not run: why -->`` on the line above it is not run, and counted here.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import millpond

ROOT = Path(__file__).parents[2]
NOT_RUN = {
    "README.md": 4,
    "docs/quickstart.md": 1,
    "docs/guides/producing.md": 0,
    "docs/guides/consuming.md": 0,
    "docs/guides/workers.md": 2,
    "docs/guides/dead-letters.md": 0,
    "docs/guides/large-payloads.md": 0,
    "docs/guides/buckets.md": 1,
    "docs/guides/http-client.md": 1,
    "docs/guides/requests.md": 0,
    "docs/guides/testing.md": 0,
    "docs/guides/tasks.md": 0,
    "docs/guides/schedules-and-limits.md": 0,
    "docs/guides/observing.md": 0,
    "docs/guides/command-line.md": 2,
    "docs/guides/server.md": 2,
    "docs/production/checklist.md": 0,
}
"""How many blocks of each page are not run. A new one needs its comment, and a larger number here."""
QUOTING = {"webhooks.md", "thumbnails.md", "nightly-report.md", "pipeline.md", "shell-work.md"}
"""Guides that quote programs in examples/: tests/e2e/test_examples.py runs those, and compares."""
BOUND = 120.0
"""Seconds for one shell block on the busiest machine; nothing waits for it."""
RUN = {"python", "sh"}
SHOWN = {"text"}
MARKED = re.compile(r"<!-- not run: \S.* -->")


class Block(NamedTuple):
    language: str
    text: str
    line: int
    run: bool


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page."""
    found = []
    lines = page.splitlines()
    at = 0
    while at < len(lines):
        if not lines[at].startswith("```"):
            at += 1
            continue
        end = next(number for number in range(at + 1, len(lines)) if lines[number] == "```")
        run = not (at and MARKED.fullmatch(lines[at - 1]))
        found.append(Block(lines[at][3:].strip(), "\n".join(lines[at + 1 : end]) + "\n", at + 1, run))
        at = end + 1
    return found


def matches(shown: str, printed: str) -> bool:
    """Whether ``printed`` is what is shown, … standing for anything."""
    pattern = ".*".join(re.escape(part) for part in shown.split("…"))
    return re.fullmatch(pattern, printed + "\n" * (not printed.endswith("\n")), re.DOTALL) is not None


class Reader:
    """Somebody who works through a page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.loop = asyncio.new_event_loop()
        programs = folder / "bin"
        programs.mkdir()
        for name, arguments in (("millpond", "-m millpond "), ("python", "")):
            command = programs / name
            command.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
            command.chmod(0o755)
        (folder / "here").mkdir()
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLPOND_")}
        self.environment |= {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(Path(millpond.__file__).parents[1]),
        }

    def python(self, text: str, name: str) -> str:
        """Run a Python block; what it printed."""
        printed = io.StringIO()
        code = compile(text, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        with contextlib.redirect_stdout(printed):
            result = eval(code, self.names)
            if inspect.isawaitable(result):
                self.loop.run_until_complete(asyncio.wait_for(result, BOUND))
        return printed.getvalue()

    def shell(self, text: str, name: str) -> str:
        """Run a shell block; what it printed. What it exports is there for the next."""
        kept = self.folder / "environment"
        done = subprocess.run(
            ["sh", "-euc", f"{text}\nenv -0 > '{kept}'"],
            cwd=self.folder / "here",
            env=self.environment,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=BOUND,
            check=False,
        )
        assert done.returncode == 0, f"{name}: {done.returncode}\n{done.stdout.decode()}\n{done.stderr.decode()}"
        assert b"error" not in done.stderr.lower(), f"{name}: {done.stderr.decode()}"
        entries = kept.read_bytes().decode().rstrip("\0").split("\0")
        self.environment = dict(entry.split("=", 1) for entry in entries)
        return done.stdout.decode()

    def close(self) -> None:
        left = asyncio.all_tasks(self.loop)
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()
        assert not left, f"tasks left running: {left}"


def work_through(reader: Reader, name: str, found: list[Block]) -> int:
    """Run the blocks of a page and compare what they print; how many were run."""
    ran, printed = 0, None
    for block in found:
        where = f"{name}, line {block.line}"
        if block.language in SHOWN:
            if printed is not None:
                assert matches(block.text, printed), f"{where}: this was printed:\n{printed}"
            printed = None
        elif block.run:
            assert block.language in RUN, f"{where}: nobody can run a block of {block.language!r}; mark it"
            printed = (
                reader.python(block.text, where) if block.language == "python" else reader.shell(block.text, where)
            )
            ran += 1
        else:
            printed = None
    return ran


BUCKET = "s3://my-bucket/jobs?region=eu-central-1"
"""What a reader replaces by a bucket of their own; here it is one of SeaweedFS."""


@pytest.mark.parametrize("name", NOT_RUN)
def test_the_blocks_of_a_page_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    text = (ROOT / name).read_text()
    if BUCKET in text:
        server = request.getfixturevalue("seaweed")
        text = text.replace(BUCKET, server.url("guide"))
        for variable, value in server.environment.items():
            monkeypatch.setenv(variable, value)
    found = blocks(text)
    reader = Reader(tmp_path)
    monkeypatch.chdir(tmp_path / "here")
    with contextlib.closing(reader):
        ran = work_through(reader, name, found)
    assert ran > 0
    assert sum(not block.run for block in found) == NOT_RUN[name]


def test_every_page_with_examples_is_among_them() -> None:
    guides = [page for page in (ROOT / "docs/guides").glob("*.md") if page.name not in QUOTING]
    pages = [ROOT / "README.md", ROOT / "docs/quickstart.md", *guides]
    assert {str(page.relative_to(ROOT)) for page in pages} <= set(NOT_RUN)


@pytest.mark.parametrize("name", NOT_RUN)
def test_no_example_hides_in_an_indented_block(name: str) -> None:
    fenced = re.sub(r"^```.*?^```$", "", (ROOT / name).read_text(), flags=re.DOTALL | re.MULTILINE)
    hidden = [line for line in fenced.splitlines() if re.match(r"    .*\b(millpond|import|await|pip|make)\b", line)]
    assert hidden == []


def test_what_is_shown_must_be_what_was_printed() -> None:
    assert matches("a … c\n", "a b c\n")
    assert matches("…\nend\n", "one\ntwo\nend\n")
    assert not matches("a … c\n", "a b d\n")
    assert not matches("a\n", "a\nb\n")
