"""The page about the life cycle is the one that the table draws."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_current() -> None:
    drawn = runpy.run_path(str(DOCS / "make_life_cycle.py"))["page"]()
    assert (DOCS / "concepts" / "life-cycle.md").read_text() == drawn, "run python docs/make_life_cycle.py"
