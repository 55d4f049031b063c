"""Runs code as an installation without extras would: of what is installed here, only what `pip install millpond` brings
can be imported. ``python bare.py LACKING -c CODE`` or ``python bare.py LACKING -m millpond ARGUMENTS…``, where LACKING
are the packages that are not to be found, with commas between."""

from __future__ import annotations

import re
import runpy
import sys
import tomllib
from collections.abc import Sequence
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def normal(name: str) -> str:
    """A distribution's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed() -> set[str]:
    """The distributions that the project's own dependencies bring."""
    waiting = list(tomllib.loads(PROJECT.read_text("utf-8"))["project"]["dependencies"])
    found = {"millpond"}
    while waiting:
        requirement = waiting.pop()
        name = normal(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])
        if name in found or "extra ==" in requirement:
            continue
        try:
            waiting += metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another Python or another system
            continue
        found.add(name)
    return found


def lacking() -> set[str]:
    """The packages that can be imported here and could not be without extras."""
    there = needed()
    found = metadata.packages_distributions().items()  # reads the list of files of everything that is installed
    return {package for package, distributions in found if not there & {normal(name) for name in distributions}}


class Missing(MetaPathFinder):
    """Finds none of these packages."""

    def __init__(self, packages: set[str]) -> None:
        self.packages = packages

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None


if __name__ == "__main__":
    sys.meta_path.insert(0, Missing(set(sys.argv[1].split(","))))
    how, what = sys.argv[2:4]
    sys.argv[:] = [what, *sys.argv[4:]]
    if how == "-c":
        exec(what)
    else:
        runpy.run_module(what, run_name="__main__", alter_sys=True)
