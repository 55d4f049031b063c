"""What a newcomer, or a script, gets wrong: one clear line, a documented code, and nothing left behind."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import millpond
from millpond.cli.app import app
from millpond.cli.output import to_json

Run = Callable[..., Result]
STORE = "sqlite:///pond.db"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command in a folder of its own; `code` is the exit code that it must end with."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str, code: int = 0, input: bytes | None = None) -> Result:
        result = CliRunner().invoke(app, list(arguments), input=input, env={"MILLPOND_STORE": STORE})
        assert result.exit_code == code, result.output
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return invoke


def refused(result: Result, text: str) -> None:
    assert text in result.stderr
    assert result.stderr.startswith("millpond: error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("", "opens no store by ''"),
        ("pond.db", "opens no store by 'pond.db'"),
        ("/tmp/pond.db", "opens no store by '/tmp/pond.db'"),
        ("http://[bad", "'http://[bad'"),
        ("sqlite:///", "names no file"),
        ("sqlite:/pond.db", "names no file: write sqlite:///relative/path.db or sqlite:////absolute/path.db"),
        ("sqlite:pond.db", "names no file"),
        ("sqlite://pond.db", "names no file"),
        ("sqlite://host/pond.db", "names no file"),
        ("sqlite:///a#b.db", "write %23"),
        ("sqlite:///a.db#", "write %23"),
        ("sqlite:///a?b.db", "a ? in a file's name is written %3F"),
        ("sqlite:///a%00b.db", "NUL"),
        ("sqlite:///a\udcffb.db", "is not UTF-8"),
        ("sqlite:///a%FFb.db", "is not UTF-8"),
        ("sqlite:///a.db?busy_timeout=nan", "busy_timeout=nan"),
        ("sqlite:///a.db?busy_timeout=inf", "busy_timeout=inf"),
        ("sqlite:///a.db?busy_timeout=-1", "busy_timeout=-1"),
        ("sqlite:///a.db?inline_limit=-1", "inline_limit=-1"),
        ("sqlite:///a.db?cache_bytes=99999999999999999999", "cache_bytes=99999999999999999999"),
        ("sqlite:///none/a.db", "there is no directory"),
    ],
)
@pytest.mark.parametrize("arguments", [("enqueue", "q", "x"), ("stats",)], ids=" ".join)
def test_a_url_that_cannot_be_right_is_refused(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], url: str, text: str
) -> None:
    if arguments == ("stats",) and ("?" in url or "/none/" in url):
        text = "there is no store at"
    refused(run(*arguments, "--store", url, code=1), text)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("with space.db", "with space.db"),
        ("a%20b.db", "a b.db"),
        ("100%.db", "100%.db"),
        ("100%25.db", "100%.db"),
        ("why%3F.db", "why?.db"),
        ("no%231.db", "no#1.db"),
        ("über.db", "über.db"),
    ],
)
def test_the_file_that_a_url_names_is_the_one_that_is_used(run: Run, tmp_path: Path, written: str, name: str) -> None:
    run("enqueue", "q", "x", "--store", f"sqlite:///{written}")
    assert (tmp_path / name).is_file()
    assert '"ready":1' in run("stats", "--json", "--store", f"sqlite:///{written}").stdout


@pytest.mark.parametrize("arguments", [("enqueue", "q", "x"), ("stats",)], ids=" ".join)
def test_another_programs_file_is_refused_and_left_as_it_was(run: Run, tmp_path: Path, arguments: tuple[str]) -> None:
    (tmp_path / "text").write_text("not a store\n")
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE theirs(x)")
    other.close()
    (tmp_path / "folder").mkdir()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    refused(run(*arguments, "--store", "sqlite:///text", code=1), "it is not an SQLite database [store_mismatch]")
    refused(run(*arguments, "--store", "sqlite:///other.db", code=1), "but not a Millpond store")
    refused(run(*arguments, "--store", "sqlite:///folder", code=1), "is a directory")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "other.db", "text"]


HUGE = "99999999999999999999"


def test_huge_numbers_are_refused_in_one_line(run: Run) -> None:
    run("enqueue", "q", "x")
    assert run("peek", "q", "--count", HUGE, "--json").stdout.count("\n") == 1
    refused(run("enqueue", "q", "x", "--max-attempts", HUGE, code=1), "1,000,000")
    refused(run("policy", "set", "q", "--max-attempts", HUGE, code=1), "1,000,000")
    refused(run("enqueue", "q", "x", "--delay", HUGE, code=1), "a century")
    refused(run("receive", "q", "--wait", HUGE, code=1), "a century")
    assert run("dlq", "list", "q", "--limit", HUGE).stdout == ""
    assert run("receive", "q", "--count", HUGE, "--json").stdout.count("\n") == 1


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1e9", "", "1 year"])
def test_what_is_no_duration_is_wrong_usage(run: Run, value: str) -> None:
    refused(run("enqueue", "q", "x", "--delay", value, code=2), "is no duration")


@pytest.mark.parametrize("option", ["--content-type", "--dedup-key", "--ordering-key", "--correlation-id", "-a"])
def test_an_option_that_is_no_text_is_wrong_usage(run: Run, tmp_path: Path, option: str) -> None:
    refused(run("enqueue", "q", "x", option, "k=\udcff", code=2), "is not UTF-8 text")
    assert list(tmp_path.iterdir()) == []


def test_an_owner_that_is_no_text_takes_nothing(run: Run) -> None:
    run("enqueue", "q", "x")
    refused(run("receive", "q", "--owner", "\udcff", code=2), "is not UTF-8 text")
    assert '"ready":1' in run("stats", "q", "--json").stdout


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ('{"a":NaN}', "NaN is no number that JSON can hold"),
        ('{"a":-Infinity}', "-Infinity is no number"),
        ('{"a":1e999}', "1e999 is no number"),
        ("[" * 100_000, "nested too deeply"),
    ],
    ids=["nan", "infinity", "beyond", "deep"],
)
def test_attributes_that_could_not_be_printed_again_are_refused(run: Run, attributes: str, text: str) -> None:
    refused(run("enqueue", "q", "x", "--attributes", attributes, code=2), text)
    value = attributes.removeprefix('{"a":').removesuffix("}")
    refused(run("enqueue", "q", "x", "-a", f"a:={value}", code=2), text)


def test_a_line_of_json_is_json_whatever_a_program_stored() -> None:
    for stored, printed in (
        ({"a": float("nan"), "b": [float("inf"), 1.5]}, {"a": "nan", "b": ["inf", 1.5]}),
        ({"a": {3: "x", b"\xff": None}}, {"a": {"3": "x", "\\xff": None}}),
    ):
        assert json.loads(to_json(stored), parse_constant=pytest.fail) == printed


def test_a_wrong_line_of_json_is_named_by_its_number(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "lines"
    run("enqueue", "q", "x")
    line = run("receive", "q", "--json").stdout.encode()
    wrong = {
        b"garbage\n": "line 3: not a line of `receive --json`",
        b"\xff\xfe\n": "line 3: not a line of `receive --json`",
        b"[" * 100_000 + b"\n": "line 3: not a line of `receive --json`",
        b'{"message_id":1}\n': "line 3: it lacks message_id, lease_id or fencing_token",
    }
    for bad, text in wrong.items():
        file.write_bytes(line + b"\n" + bad)
        result = run("ack", "q", "--from-json", "lines", code=1)
        refused(result, text)
        assert "nothing was answered" in result.stderr
    file.write_bytes(line)
    assert run("ack", "q", "--from-json", "lines").stderr == "millpond: ack: 1 done, 0 failed\n"


def test_people_are_not_shown_long_payloads_that_are_no_text(run: Run, tmp_path: Path) -> None:
    for size in (1024, 1025):
        (tmp_path / "binary").write_bytes(b"\xff" * size)
        run("enqueue", f"q{size}", "--file", "binary")
    assert "base64 ////" in run("receive", "q1024").stdout
    peeked = run("peek", "q1025").stdout
    assert "////" not in peeked
    assert "--json or --output shows it" in peeked
    assert "////" in run("peek", "q1025", "--json").stdout
    received = run("receive", "q1025").stdout
    assert "////" not in received
    assert "(1025 bytes that are no text" in received


def test_a_namespace_is_checked_and_normalised_everywhere(run: Run) -> None:
    run("enqueue", "q", "x", "--namespace", "Shop")
    assert '"namespace":"shop"' in run("stats", "--json", "--namespace", "SHOP").stdout
    assert run("queues", "--json", "--namespace", "SHOP").stdout.count("\n") == 1
    refused(run("stats", "--namespace", "no good", code=1), "has a character other than")


def test_an_empty_answer_says_so(run: Run) -> None:
    run("enqueue", "q", "x", "--delay", "1h")
    assert run("peek", "q").stderr == "millpond: nothing is ready in q\n"
    assert run("peek", "q", "--quiet").stderr == ""
    assert run("queues", "--namespace", "empty").stderr == "millpond: no queues\n"
    assert run("stats", "--namespace", "empty").stderr == "millpond: no queues\n"


def test_memory_is_said_to_be_gone(run: Run, tmp_path: Path) -> None:
    assert "lasted no longer than this command" in run("enqueue", "q", "x", "--store", "memory://").stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def broken(run: Run, tmp_path: Path) -> list[str]:
    """Three messages in q, of which the first and the last cannot be read; their ids."""
    ids = [run("enqueue", "q", text).stdout.strip() for text in ("one", "two", "three")]
    file = sqlite3.connect(tmp_path / "pond.db")
    file.execute("UPDATE body SET head = x'00' WHERE seq IN (SELECT seq FROM message WHERE id IN (?, ?))", ids[::2])
    file.commit()
    file.close()
    return ids


def lines(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_discarding_needs_consent_and_a_choice(run: Run, broken: list[str]) -> None:
    refused(run("discard-unreadable", "q", "--all", code=2), "give --yes")
    refused(run("discard-unreadable", "q", "--yes", code=2), "name messages, or --all")
    refused(run("discard-unreadable", "q", broken[0], "--all", "--yes", code=2), "either messages or --all")
    assert '"ready":3' in run("stats", "q", "--json").stdout


def test_discarding_removes_what_cannot_be_read_and_nothing_else(run: Run, broken: list[str]) -> None:
    run("verify", code=1)
    result = run("discard-unreadable", "q", "--all", "--yes", "--json")
    assert lines(result) == [
        {"namespace": "default", "queue": "q", "message_id": id, "discarded": True} for id in broken[::2]
    ]
    assert f"{broken[0]}: " in result.stderr
    assert "[store_corrupt]" in result.stderr
    run("verify")
    assert [record["message_id"] for record in lines(run("peek", "q", "-n", "9", "--json"))] == [broken[1]]
    assert run("discard-unreadable", "q", "--all", "--yes").stdout == "0 removed\n"


def test_discarding_by_name_refuses_what_can_be_read_and_what_is_not_there(run: Run, broken: list[str]) -> None:
    refused(run("discard-unreadable", "q", broken[1], "--yes", code=1), "can be read")
    refused(run("discard-unreadable", "other", broken[0], "--yes", code=1), "[message_not_found]")
    refused(run("discard-unreadable", "q", "nonsense", "--yes", code=1), "[invalid_message_id]")
    assert run("discard-unreadable", "q", broken[2], "--yes", "--quiet").stdout == "1 removed\n"
    assert '"ready":2' in run("stats", "q", "--json").stdout


def test_a_person_is_shown_what_would_go_and_may_say_no(
    run: Run, broken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millpond.cli.settings.can_ask", lambda: True)
    monkeypatch.setattr("millpond.cli.admin.can_ask", lambda: True)
    result = run("discard-unreadable", "q", "--all", input=b"n\n", code=130)
    assert result.stderr.index(broken[0]) < result.stderr.index("for good?")
    assert '"ready":3' in run("stats", "q", "--json").stdout
    assert run("discard-unreadable", "q", "--all", input=b"y\n").stdout == "2 removed\n"


def test_discarding_in_an_encrypted_store(run: Run, tmp_path: Path) -> None:
    run("keygen", "--output", "ring")
    ids = [run("enqueue", "q", text, "--keyring", "ring").stdout.strip() for text in ("one", "two")]
    with millpond.connect_sync(STORE, keyring=millpond.Keyring.from_file("ring")) as pond:
        assert pond.unreadable("q") == []
    file = sqlite3.connect(tmp_path / "pond.db")
    (status,) = file.execute("SELECT status FROM message WHERE id = ?", ids[:1]).fetchone()
    changed = status[:-1] + bytes([status[-1] ^ 1])
    file.execute("UPDATE message SET status = ? WHERE id = ?", (changed, ids[0]))
    file.commit()
    file.close()
    refused(run("discard-unreadable", "q", ids[1], "--yes", "--keyring", "ring", code=1), "can be read")
    result = run("discard-unreadable", "q", "--all", "--yes", "--keyring", "ring", "--json")
    assert [record["message_id"] for record in lines(result)] == ids[:1]
    assert "[tampered]" in result.stderr
    run("verify", "--keyring", "ring")


def test_every_exit_code_of_a_refusal_is_one_that_the_reference_lists(run: Run) -> None:
    page = (Path(__file__).parents[3] / "docs" / "reference" / "cli.md").read_text()
    listed = {int(line.split("|")[1]) for line in page.splitlines() if line.startswith("| ") and line[2].isdigit()}
    assert listed == {0, 1, 2, 3, 130, 141, 143}
