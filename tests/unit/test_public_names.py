"""What users may import and call stays what it is: renames and losses fail here before they fail for them."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from pathlib import Path

import pytest

import millpond
from millpond import errors

ROOT = Path(__file__).parents[2]

CONTRACT: dict[str, set[str]] = {
    "Pond": {"queue", "queues", "collect", "verify", "rekey", "statistics", "requests", "notify", "close"},
    "Queue": {
        *("name", "namespace", "enqueue", "enqueue_many", "receive", "ack_many", "nack_many", "extend_many"),
        *("counts", "peek", "get", "handle", "purge", "pause", "resume", "policy", "set_policy", "notify"),
    },
    "Message": {
        *("id", "queue", "namespace", "payload", "read", "stream", "text", "json", "decode"),
        *("attempts", "failures", "priority", "attributes", "content_type", "correlation_id", "ordering_key"),
        *("enqueued_at", "lease", "state", "ack", "nack", "defer", "extend", "bury"),
    },
}
"""Names that programs rely on: class → its public attributes, at least."""

ENQUEUE_OPTIONS = {
    *("delay", "ttl", "priority", "max_attempts", "visibility", "attributes", "dedup_key", "dedup_window"),
    *("ordering_key", "content_type", "correlation_id"),
}


def exception_classes() -> list[str]:
    return sorted(
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.MillpondError)
    )


def public_classes() -> list[str]:
    return sorted(name for name in millpond.__all__ if inspect.isclass(getattr(millpond, name)))


def attributes(cls: type) -> set[str]:
    """Public attributes of a class, declared in its body or its slots, or set in its methods."""
    names = set(dir(cls)) | set(re.findall(r"\bself\.(\w+)(?:: [^=]+)? =", inspect.getsource(cls)))
    return {name for name in names if not name.startswith("_")}


def test_all_names_exist_once() -> None:
    assert len(set(millpond.__all__)) == len(millpond.__all__)
    assert [name for name in millpond.__all__ if not hasattr(millpond, name)] == []


def test_type_checkers_see_the_names_that_programs_see() -> None:
    """Names are loaded when first used; those that a type checker reads are written apart, and must be the same."""
    tree = ast.parse(Path(millpond.__file__).read_text("utf-8"))
    imported = [
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("millpond.")
        for alias in node.names
    ]
    assert sorted([*imported, "__version__"]) == sorted(millpond.__all__)


@pytest.mark.parametrize("name", exception_classes())
def test_every_exception_can_be_imported_from_the_top(name: str) -> None:
    assert name in millpond.__all__
    assert getattr(millpond, name) is getattr(errors, name)


@pytest.mark.parametrize("name", ["connect", "connect_sync", *public_classes()])
def test_public_names_are_documented(name: str) -> None:
    assert (getattr(millpond, name).__doc__ or "").strip()


@pytest.mark.parametrize("name", public_classes())
def test_public_methods_are_documented(name: str) -> None:
    cls = getattr(millpond, name)
    own = {key: value for key, value in vars(cls).items() if not key.startswith("_")}
    bare = [
        key
        for key, value in own.items()
        if (inspect.isfunction(value) or isinstance(value, property)) and not (value.__doc__ or "").strip()
    ]
    assert bare == []


@pytest.mark.parametrize("name", CONTRACT)
def test_the_names_that_programs_rely_on_are_there(name: str) -> None:
    assert CONTRACT[name] - attributes(getattr(millpond, name)) == set()


def test_enqueue_options_are_keyword_only() -> None:
    parameters = inspect.signature(millpond.Queue.enqueue).parameters.values()
    options = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    assert ENQUEUE_OPTIONS - options == set()


def test_the_two_connects_take_the_same() -> None:
    names = [list(inspect.signature(connect).parameters) for connect in (millpond.connect, millpond.connect_sync)]
    assert names[0] == names[1]


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(millpond.__file__).parent / "py.typed").is_file()


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert millpond.__version__ == project["version"]
