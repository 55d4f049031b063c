"""The reference pages say what the code says: errors, API, log events, the format of the file, fields to watch."""

from __future__ import annotations

import ast
import re
import runpy
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import millpond
from millpond import errors
from millpond.cli.records import counts
from millpond.model import message as records
from millpond.pond import Pond
from millpond.service.config import POLICY_FORMAT
from millpond.service.states import STATE_FORMAT
from millpond.stores.objects.memory_bucket import MemoryBucket
from millpond.stores.objects.store import ObjectStore
from millpond.stores.sqlite import schema
from millpond.testing import ManualClock

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SOURCE = ROOT / "src" / "millpond"


@pytest.mark.parametrize("name", ["errors", "api"])
def test_a_page_made_from_the_code_is_current(name: str) -> None:
    script = DOCS / f"make_{name}_reference.py"
    made = runpy.run_path(str(script))["page"]()
    assert (DOCS / "reference" / f"{name}.md").read_text() == made, f"run python docs/{script.name}"


@pytest.mark.parametrize("name", ["server-settings", "metrics"])
def test_a_page_made_from_the_servers_tables_is_current(name: str) -> None:
    made = runpy.run_path(str(DOCS / "make_server_reference.py"))["PAGES"][name]()
    assert (DOCS / "reference" / f"{name}.md").read_text() == made, "run python docs/make_server_reference.py"


def test_every_error_of_the_package_is_described() -> None:
    described = set(re.findall(r"^## (\w+)$", (DOCS / "reference" / "errors.md").read_text(), re.MULTILINE))
    raised = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert raised > {"MillpondError", "LeaseLost"}
    elsewhere = set()
    for path in SOURCE.rglob("*.py"):
        if path.name == "faulty.py":
            continue  # its errors are those that tests plant
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                if bases & raised:
                    elsewhere.add(node.name)
    # What a bucket tells the store in it, which goes no further.
    assert described == raised | elsewhere - {"ObjectExists", "ObjectChanged"}


def test_an_error_without_a_cure_stops_the_page() -> None:
    made = runpy.run_path(str(DOCS / "make_errors_reference.py"))
    del made["page"].__globals__["CURES"][errors.StoreFull]
    with pytest.raises(SystemExit, match="StoreFull"):
        made["page"]()


def log_calls() -> Iterator[tuple[str, str, frozenset[str]]]:
    """(event, level, fields) of every log call in the source; the fields may be those of a variable, then none."""
    levels = {"debug", "info", "warning", "error", "exception", "critical"}
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = ast.unparse(node.func.value)
            if node.func.attr not in levels or not re.search(r"\b_?log(ger)?$", owner):
                continue
            event = node.args[0]
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            assert isinstance(event, ast.Constant), f"{where}: an event's name is constant"
            assert len(node.args) == 1, f"{where}: what an event is about goes into extra"
            extra = next((keyword.value for keyword in node.keywords if keyword.arg == "extra"), None)
            keys = extra.keys if isinstance(extra, ast.Dict) else []
            fields = frozenset(key.value for key in keys if isinstance(key, ast.Constant))
            yield str(event.value), node.func.attr, fields


def test_every_log_event_is_described_and_none_that_is_not_there() -> None:
    page = (DOCS / "reference" / "log-events.md").read_text()
    listed = {}
    for event, level, fields in re.findall(r"^\| \[`([\w.]+)`\]\(#\w+\) \| (\w+) \| (.*) \|$", page, re.MULTILINE):
        listed[event] = (level, set(re.findall(r"`(\w+)`", fields)))
    calls = list(log_calls())
    assert len(calls) >= 16
    assert {event for event, _, _ in calls} == set(listed)
    for event, level, fields in calls:
        assert level == listed[event][0], event
        assert fields <= listed[event][1], event
    assert re.findall(r"^### ([\w.]+)$", page, re.MULTILINE) == list(listed)
    for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        for entry in re.split(r"^### .*\n\n(?=###)|^### ", part, flags=re.MULTILINE)[1:]:
            if entry.strip():
                assert "**Cause.**" in entry, entry
                assert "**Cure.**" in entry, entry


def test_links_between_the_pages_lead_somewhere() -> None:
    broken = []
    for page in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"\w+:", target):
                continue
            file, _, anchor = target.partition("#")
            found = (page.parent / file).resolve() if file else page
            if not found.exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
            elif anchor and anchor not in anchors(found.read_text()):
                broken.append(f"{page.relative_to(ROOT)}: {target} (no such heading)")
    assert broken == []


def anchors(text: str) -> set[str]:
    """The anchors that headings make, as code hosts make them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text()
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} - {"README.md"}
    assert {page for page in pages if f"({page})" not in index} == set()


# The format


FORMAT = (DOCS / "format.md").read_text()


def column_table(title: str) -> list[str]:
    """The field names of the table after a title."""
    part = FORMAT[FORMAT.index(title) :].split("\n\n")[1]
    return re.findall(r"^\| \d+ \| `(\w+)` \|", part, re.MULTILINE)


def test_the_tables_of_the_format_are_those_of_the_schema() -> None:
    described = {
        table: re.findall(r"`(\w+)`", columns)
        for table, columns in re.findall(r"^\| `(\w+)` \| (`.*?`) \| .* \|$", FORMAT, re.MULTILINE)
    }
    database = sqlite3.connect(":memory:")
    database.executescript("".join(schema.MIGRATIONS))
    names = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    real = {name: [row[1] for row in database.execute(f"PRAGMA table_info({name})")] for name in names}
    database.close()
    assert described == real
    assert f"now {len(schema.MIGRATIONS)})" in FORMAT
    assert f"0x{schema.APPLICATION_ID:08X}" in FORMAT
    assert f"bucket of {schema.BUCKET // 1000} s" in FORMAT
    assert f"`blob << {schema.CHUNK_BITS}`" in FORMAT
    kinds = ["free", "leased", "blocked", "blocked+leased", "dead", "bytes"]
    numbers = [schema.FREE, schema.LEASED, schema.BLOCKED, schema.BLOCKED_LEASED, schema.DEAD, schema.BYTES]
    assert dict(zip(kinds, numbers, strict=True)) == {kind: number for number, kind in enumerate(kinds)}


def test_the_fields_of_the_records_are_those_of_the_code() -> None:
    assert column_table("**Head** (format 1)") == list(records.Head.__struct_fields__)
    assert column_table("**Status** (format 1)") == list(records.Status.__struct_fields__)
    assert (records.HEAD_FORMAT, records.STATUS_FORMAT, POLICY_FORMAT, STATE_FORMAT) == (1, 1, 1, 1)
    assert records.Lease.__struct_fields__ == ("id", "token", "until", "owner", "txn_id")
    assert records.DeadLetter.__struct_fields__ == ("reason", "at")


def test_the_queries_of_the_format_find_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "work.db"
    with millpond.connect_sync(f"sqlite:///{path}") as pond:
        orders = pond.queue("orders")
        orders.enqueue(b"low", priority=1)
        orders.enqueue(b"high", priority=9)
        orders.enqueue(b"\x07" * 2_000_000, priority=5)
        orders.set_policy(max_attempts=3)
        [message] = orders.receive()
        message.state.save({"step": 1})
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    listed, raw, apart = [database.execute(query).fetchall() for query in re.findall(r"```sql\n(.*?)```", FORMAT, re.S)]
    assert [(row[1], row[2], row[5]) for row in listed] == [(9, 1, "high"), (5, 0, "(apart)"), (1, 0, "low")]
    head, status = (msgspec.msgpack.decode(bytes.fromhex(text)) for text in raw[0])
    assert (head[0], head[3], status[0]) == (1, "orders", 1)
    assert b"".join(row[0] for row in apart) == b"\x07" * 2_000_000
    policy = msgspec.msgpack.decode(database.execute("SELECT document FROM queue").fetchone()[0])
    state = msgspec.msgpack.decode(database.execute("SELECT data FROM state").fetchone()[0])
    database.close()
    assert set(policy) == {"format", "policy"}
    assert set(state) == {"format", "value", "created_at", "updated_at", "version"}
    assert {entry.name for entry in (tmp_path / "work.db-millpond").iterdir()} == {"turn.lock", "write.lock", "feed"}


# What to watch


def test_the_checklist_names_every_figure_that_can_be_watched(tmp_path: Path) -> None:
    page = (DOCS / "production" / "checklist.md").read_text()
    table = page[page.index("## What to watch") :]
    named = set(re.findall(r"`(?:\w+\.)?(\w+)\*?`", table))
    shown: dict[str, Any] = {}
    millpond_keyring = millpond.Keyring.load(millpond.Keyring.generate_key())
    with millpond.connect_sync(f"sqlite:///{tmp_path}/work.db", keyring=millpond_keyring) as pond:
        queue = pond.queue("orders")
        fields = set(counts("default", "orders", queue.counts())) - {"namespace", "queue"}
        shown = pond.statistics()
    figures = {name for part in shown.values() for name in part if not name.startswith("ciphers_")}
    assert len(figures) > 25
    assert (figures | fields) - named == set()


async def test_the_checklist_names_every_figure_of_a_bucket() -> None:
    page = (DOCS / "production" / "checklist.md").read_text()
    table = page[page.index("On a bucket `store` has other fields") :]
    table = table[: table.index("\n\n", table.index("\n|"))]
    cells = " ".join(re.findall(r"^\| (.+?) \|", table, re.MULTILINE))
    named = set(re.findall(r"`(?:\w+\.)?(\w+)\*?`", cells))
    clock = ManualClock()
    async with Pond(ObjectStore(MemoryBucket(clock=clock), clock=clock, measure_skew=False), clock=clock) as pond:
        await pond.queue("orders").enqueue(b"x")
        shown = pond.statistics()
    figures = {name for part in ("store", "requests") for name in shown[part]}
    assert len(figures) > 15
    assert {name for name in figures if not name.startswith("news_")} - named == set()
    assert named - figures == {"news_"}


# The picture of the code


def test_every_module_of_the_store_in_a_bucket_has_its_place_in_the_picture() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    table = page[page.index("## The store in a bucket") :].split("\n\n")[2]
    cells = re.findall(r"^\| (.+?) \|", table, re.MULTILINE)
    named = re.findall(r"`(\w+)`", " ".join(cells))
    modules = {path.stem for path in (SOURCE / "stores" / "objects").glob("*.py")} - {"__init__"}
    assert sorted(named) == sorted(modules)
    seam = ast.parse((SOURCE / "stores" / "objects" / "bucket.py").read_text())
    [protocol] = [node for node in seam.body if isinstance(node, ast.ClassDef) and node.name == "Bucket"]
    methods = [node for node in protocol.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert len(methods) == 10
    assert "ten methods" in table


@pytest.mark.parametrize("name", ["Config", "QueuePolicy", "EnqueueOptions"])
def test_every_setting_says_what_it_means(name: str) -> None:
    """A field's own text stands below it; the page of the API would show an empty cell."""
    tree = ast.parse((ROOT / "src" / "millpond" / "service" / "config.py").read_text("utf-8"))
    [found] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    pairs = list(zip(found.body, found.body[1:], strict=False))
    silent = [
        ast.unparse(field.target)
        for field, below in pairs
        if isinstance(field, ast.AnnAssign)
        and not (
            isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
        )
    ]
    assert silent == []
    assert len(pairs) > 10
