"""Every Python name in the table of lockd's items exists."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

TABLE = (Path(__file__).parents[2] / "docs" / "reference" / "seed.md").read_text()
NAMES = sorted(set(re.findall(r"`(millpond(?:\.\w+)+)`", TABLE)))


def resolve(name: str) -> object:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_name_exists(name: str) -> None:
    assert resolve(name) is not None


def test_the_table_is_not_empty() -> None:
    assert len(NAMES) > 50


def test_the_dispatchers_options_exist() -> None:
    from inspect import signature

    from millpond.service.dispatcher import Dispatcher

    options = set(re.findall(r"`(\w+)=`", TABLE)) - {"then"}
    assert options <= set(signature(Dispatcher).parameters)
    assert len(options) == 7
