"""The rules of ARCHITECTURE.md, held against the source: the table there is what is checked here."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
MAX_LINES = 700
"""A module that says more than this says more than one thing."""
LAZY = (
    *("click", "rich", "cryptography", "millpond.cli"),
    *(
        "starlette",
        "uvicorn",
        "httptools",
        "uvloop",
        "aiohttp",
        "prometheus_client",
        "millpond.server",
        "millpond.client",
    ),
)
"""What a program that only queues must not pay for."""


def module_name(path: Path) -> str:
    """``millpond.stores.base`` for src/millpond/stores/base.py; a package goes by its own name."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((SOURCE / "millpond").rglob("*.py*")) if path.suffix != ".pyc"}
"""Stubs as well: they import as modules do."""


def read_rules(text: str) -> dict[str, frozenset[str]]:
    """Part → the parts that it may import, from the table between the markers."""
    table = text.partition("<!-- rules:begin -->")[2].partition("<!-- rules:end -->")[0]
    rules: dict[str, frozenset[str]] = {}
    for row in table.strip().splitlines()[2:]:
        part, allowed = row.strip().strip("|").split("|")[:2]
        for name in re.findall(r"`([^`]+)`", part):
            assert name not in rules, f"two rows for {name}"
            rules[name] = frozenset(re.findall(r"`([^`]+)`", allowed))
    return rules


RULES = read_rules((ROOT / "ARCHITECTURE.md").read_text("utf-8"))


def part_of(module: str) -> str | None:
    """The part with the longest name that the module lies in; the package itself is the part ``millpond``."""
    if module == "millpond":
        return module
    name = module.removeprefix("millpond.")
    fitting = [part for part in RULES if name == part or name.startswith(part + ".")]
    return max(fitting, key=len, default=None)


class Import(NamedTuple):
    """One import of ours by ours."""

    module: str
    target: str
    line: int


def imports_in(module: str, tree: ast.AST) -> Iterator[Import]:
    """Every import of a millpond module, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in inside]
        else:
            continue
        for name in dict.fromkeys(names):
            if name == "millpond" or name.startswith("millpond."):
                yield Import(module, name, node.lineno)


def breaches(imports: Iterator[Import]) -> list[str]:
    """What the rules say against these imports."""
    found = []
    for module, target, line in imports:
        importer, imported = part_of(module), part_of(target)
        assert importer is not None, f"{module} has no row in ARCHITECTURE.md"
        assert imported is not None, f"{target}, imported by {module}, has no row in ARCHITECTURE.md"
        if importer != imported and imported not in RULES[importer]:
            found.append(f"{module}:{line} imports {target}, but `{importer}` may not import `{imported}`")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_rules(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    assert breaches(imports_in(module, tree)) == []


def test_a_forbidden_import_is_seen() -> None:
    tree = ast.parse("def late():\n    from millpond.stores import base\n    from millpond.errors import StoreError")
    assert breaches(imports_in("millpond.lifecycle", tree)) == [
        "millpond.lifecycle:2 imports millpond.stores.base, but `lifecycle` may not import `stores.base`"
    ]


def test_every_module_has_a_row() -> None:
    assert [module for module in MODULES if part_of(module) is None] == []


def test_rules_name_only_parts_with_rows() -> None:
    unknown = {name for allowed in RULES.values() for name in allowed} - set(RULES)
    assert unknown == set()


def test_rules_have_no_circle() -> None:
    left = {part: set(allowed) - {part} for part, allowed in RULES.items()}
    while free := [part for part, allowed in left.items() if not allowed & left.keys()]:
        for part in free:
            del left[part]
    assert left == {}, "these import one another in a circle"


def test_the_rules_keep_what_must_not_change() -> None:
    """Rows may be added and refined; these may not be loosened."""
    assert RULES["errors"] == set()
    assert RULES["model"] <= {"errors"}
    assert RULES["lifecycle"] <= {"errors", "model"}
    above_stores = {"lifecycle", "service", "service.ready", "service.dispatcher", "queue", "pond", "sync"}
    for part, allowed in RULES.items():
        if part == "stores" or part.startswith("stores."):
            assert not allowed & above_stores, f"{part} must not know who uses it"
        if part != "__main__":
            assert "cli" not in allowed, f"{part} must not import the command line"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_too_long(module: str) -> None:
    lines = len(MODULES[module].read_text("utf-8").splitlines())
    assert lines <= MAX_LINES, f"{module} has {lines} lines; find the second thing that it does and give it a module"


def test_queueing_loads_nothing_for_the_command_line_or_for_encryption(tmp_path: Path) -> None:
    script = f"""
import sys
import millpond
with millpond.connect_sync("sqlite:///{tmp_path}/queue.db") as pond:
    pond.queue("q").enqueue(b"x")
    assert len(pond.queue("q").receive()) == 1
print(*sorted(set(sys.modules) & set({LAZY!r})))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "", "")


def test_importing_millpond_loads_no_store() -> None:
    script = "import sys, millpond; print('apsw' in sys.modules, 'asyncio' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "False False", "")
