"""The page on lockd's protocol, compared with the server."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from millpond.server import lockd_routes
from millpond.wire import faults

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "lockd-protocol.md").read_text()
SOURCES = ("lockd_routes", "lockd_requests", "state_routes", "subscribe", "watch", "context")


def rows(title: str) -> list[list[str]]:
    """The cells of a section's table."""
    section = PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines[2:]]


def test_every_route_is_listed_and_none_that_is_not_there() -> None:
    listed = [path for row in rows("Routes") for path in re.findall(r"`(/[^`]+)`", row[0])]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(lockd_routes.hot())


def test_every_code_that_is_refused_with_is_listed() -> None:
    listed = {code for row in rows("Errors") for code in re.findall(r"`(\w+)`", " ".join(row[1:]))}
    listed |= set(re.findall(r"501 `(\w+)`", PAGE))
    used = {code for _, code in faults.LOCKD.values()}
    for name in SOURCES:
        tree = ast.parse((ROOT / "src" / "millpond" / "server" / f"{name}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Refusal" and len(node.args) > 1:
                code = node.args[1]
                if isinstance(code, ast.Constant):
                    used.add(code.value)
    assert len(used) > 20
    assert used - listed == set()
