"""The table of lockd's defects and the tests in tests/defects agree."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs" / "reference" / "seed-defects.md").read_text()
NUMBERS = [
    *(f"L{number}" for number in range(1, 22)),
    "N1",
    "N2",
    *(f"M{number}" for number in range(1, 8)),
    *(f"P{number}" for number in range(1, 15)),
]


def rows() -> dict[str, tuple[str, list[str]]]:
    found = re.findall(r"^\| ([A-Z]\d+) \| (.+?) \| (.+) \|$", TABLE, re.MULTILINE)
    assert len(found) == len({number for number, _, _ in found}), "a number stands twice"
    return {number: (what, re.findall(r"`(\w+)`", tests)) for number, what, tests in found}


def written() -> set[str]:
    files = sorted((ROOT / "tests" / "defects").glob("test_*.py"))
    found = [name for file in files for name in re.findall(r"^(?:async )?def (test_\w+)\(", file.read_text(), re.M)]
    assert len(found) == len(set(found)), "two tests have one name"
    return set(found)


def test_every_number_has_a_row_in_its_order() -> None:
    assert list(rows()) == NUMBERS


def test_every_row_says_what_it_was_and_names_tests_of_its_number() -> None:
    for number, (what, named) in rows().items():
        assert what.strip()
        assert named, f"{number} has no test"
        assert all(name.startswith(f"test_{number}_") for name in named), f"{number}: {named}"


def test_the_named_tests_are_those_that_exist() -> None:
    named = [name for _, names in rows().values() for name in names]
    assert len(named) == len(set(named)), "a test stands in two rows"
    assert set(named) == written()
