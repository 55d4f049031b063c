from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from millpond import errors
from millpond.cli.app import app, os_error_text
from millpond.cli.enqueue import parse_attributes
from millpond.cli.settings import Settings

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command in a folder of its own, without what the environment may say."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str, **more: str) -> Result:
        return CliRunner().invoke(app, list(arguments), **more)  # type: ignore[arg-type]

    return invoke


WRONG = [
    (["nonsense"], "No such command 'nonsense'"),
    (["receive"], "Missing argument 'QUEUE'"),
    (["receive", "q", "--nonsense"], "No such option '--nonsense'"),
    (["receive", "q", "-n", "0"], "0 is not in the range x>=1"),
    (["receive", "q", "--wait", "soon"], "'soon' is no duration"),
    (["receive", "q", "--visibility", "0"], "must be more than 0"),
    (["receive", "q", "-n", "2", "-o", "file"], "use --output-dir"),
    (["receive", "q", "-o", "file", "--output-dir", "d"], "either --output or --output-dir"),
    (["receive", "q", "-o", "-", "--json"], "both want stdout"),
    (["enqueue", "q", "data", "--file", "f"], "either DATA or --file"),
    (["enqueue", "q", "data", "--lines"], "--lines reads stdin or --file"),
    (["enqueue", "q", "--lines", "--dedup-key", "k"], "use --dedup-lines"),
    (["enqueue", "q", "data", "--skip-empty"], "goes with --lines"),
    (["enqueue", "q", "data", "--priority", "10"], "10 is not in the range 0<=x<=9"),
    (["enqueue", "q", "data", "--ttl", "0"], "must be more than 0"),
    (["enqueue", "q", "data", "--attributes", "[1]"], "must be a JSON object"),
    (["enqueue", "q", "data", "--attributes", "{"], "is not JSON"),
    (["enqueue", "q", "data", "-a", "novalue"], "is not KEY=VALUE"),
    (["enqueue", "q", "data", "-a", "n:=x"], "the value is not JSON"),
    (["ack", "q"], "missing --message, --lease, --token"),
    (["ack", "q", "--message", "m", "--token", "1"], "missing --lease"),
    (["ack", "q", "--message", "m", "--from-json", "-"], "either --from-json or"),
    (["nack", "q", "--message", "m", "--lease", "l", "--token", "0"], "0 is not in the range x>=1"),
    (["extend", "q", "--message", "m", "--lease", "l", "--token", "1"], "Missing option '--by'"),
    (["peek", "q", "-n", "2", "-o", "f"], "--output holds one payload"),
    (["purge", "q"], "give --yes"),
    (["dlq", "redrive", "q"], "name messages, or --all"),
    (["dlq", "redrive", "q", "--all", "id"], "either messages or --all"),
    (["dlq", "purge", "q", "--all"], "give --yes"),
    (["policy", "set", "q"], "nothing to set"),
    (["policy", "set", "q", "--max-attempts", "-3"], "is not a number"),
    (["policy", "set", "q", "--on-expired", "explode"], "is not one of"),
    (["rekey"], "no keyring"),
    (["completion", "tcsh"], "is not one of"),
    (["work", "q"], "Missing argument"),
    (["work", "q", "--", "no-such-program-anywhere"], "there is no such program"),
]


@pytest.mark.parametrize(
    ("arguments", "text"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_wrong_usage_is_one_line_and_code_2(run: Run, tmp_path: Path, arguments: list[str], text: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert text in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("millpond: error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["stats"],
        ["queues"],
        ["verify"],
        ["peek", "q"],
        ["purge", "q", "--yes"],
        ["resume", "q"],
        ["policy", "reset", "q", "--yes"],
        ["policy", "show", "q"],
        ["dlq", "list", "q"],
        ["dlq", "show", "q", "id"],
        ["dlq", "redrive", "q", "--all"],
        ["ack", "q", "--message", "m", "--lease", "l", "--token", "1"],
    ],
    ids=" ".join,
)
def test_what_asks_about_a_store_does_not_make_one(run: Run, tmp_path: Path, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("millpond: error: there is no store at millpond.db")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["queues", "--store", "ftp://x"], "this version opens no store by 'ftp://x'"),
        (["enqueue", "no/such", "x", "--store", "memory://"], "has a character other than"),
        (["enqueue", "q", "--file", "absent"], "absent: No such file or directory"),
        (["enqueue", "q", "x", "--keyring", "absent"], "keyring file absent cannot be read"),
        (["peek", "q", "--message", "nonsense", "--store", "memory://"], "is not a UUID"),
        (["ack", "q", "--message", "x", "--lease", "l", "--token", "1", "--store", "memory://"], "is not a UUID"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line_and_code_1(run: Run, arguments: list[str], text: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert text in result.stderr
    assert result.stderr.startswith("millpond: error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("environment", [{}, {"MILLPOND_DEBUG": "1"}])
def test_a_traceback_only_for_those_who_ask(run: Run, environment: dict[str, str]) -> None:
    arguments = ["enqueue", "q", "--file", "absent", *([] if environment else ["-vv"])]
    result = CliRunner().invoke(app, arguments, env=environment)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1] == "millpond: error: absent: No such file or directory"


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def open_(self: Settings) -> None:
        raise error

    monkeypatch.setattr(Settings, "open", open_)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (errors.LeaseLost("gone\nfor good"), 1, "millpond: error: gone for good [lease_lost]\n"),
        (errors.StoreFull(), 1, "[store_full]\n"),
        (PermissionError(13, "Permission denied", "/x.db"), 1, "millpond: error: /x.db: Permission denied\n"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 141, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_each_kind_of_end_has_its_code(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, text: str
) -> None:
    fail_with(monkeypatch, error)
    result = run("queues", "--store", "memory://")
    assert result.exit_code == code
    assert result.stderr.strip("\n").endswith(text.strip("\n"))
    assert result.stderr.count("\n") <= 1
    assert "Traceback" not in result.output


def test_a_bug_is_not_dressed_up_as_an_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ZeroDivisionError("bug"))
    assert isinstance(run("queues", "--store", "memory://").exception, ZeroDivisionError)


def test_an_os_error_is_told_without_its_number() -> None:
    assert os_error_text(FileNotFoundError(2, "No such file or directory", "f")) == "f: No such file or directory"
    assert os_error_text(OSError(28, "No space left on device")) == "No space left on device"
    assert os_error_text(OSError("odd")) == "odd"


@pytest.mark.parametrize("where", ["before", "after", "both", "environment"])
def test_global_options_before_and_after_the_command(run: Run, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    seen: list[Settings] = []

    def open_(self: Settings) -> None:
        seen.append(self)
        raise errors.StoreBusy

    monkeypatch.setattr(Settings, "open", open_)
    given = ["--store", "memory://given", "--namespace", "ns", "--json", "-q", "-vv", "--keyring", "ring"]
    result = {
        "before": lambda: run(*given, "queues"),
        "after": lambda: run("queues", *given),
        "both": lambda: run("--store", "memory://other", "--namespace", "other", "queues", *given),
        "environment": lambda: CliRunner().invoke(
            app,
            ["queues"],
            env={
                "MILLPOND_STORE": "memory://given",
                "MILLPOND_NAMESPACE": "ns",
                "MILLPOND_JSON": "1",
                "MILLPOND_QUIET": "1",
                "MILLPOND_VERBOSE": "2",
                "MILLPOND_KEYRING_FILE": "ring",
            },
        ),
    }[where]()
    assert result.exit_code == 1
    (settings,) = seen
    assert (settings.store, settings.namespace, settings.keyring) == ("memory://given", "ns", "ring")
    assert (settings.json, settings.quiet, settings.verbose) == (True, True, 2)


def test_an_option_wins_over_its_variable(run: Run) -> None:
    result = CliRunner().invoke(app, ["queues", "--store", "memory://"], env={"MILLPOND_STORE": "ftp://x"})
    assert result.exit_code == 0
    result = CliRunner().invoke(app, ["--store", "memory://", "queues"], env={"MILLPOND_STORE": "ftp://x"})
    assert result.exit_code == 0


def test_the_keyring_may_be_in_the_environment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLPOND_KEYRING", "broken")
    result = run("queues", "--store", "memory://")
    assert result.exit_code == 1
    assert "MILLPOND_KEYRING, line 1" in result.stderr


@pytest.mark.parametrize("arguments", [[], ["dlq"], ["policy"]], ids=str)
def test_without_a_command_the_help_is_shown_as_wrong_usage(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(" ".join(["Usage: millpond", *arguments, "[OPTIONS]"]))


def test_attributes_from_pairs_and_json() -> None:
    found = parse_attributes('{"a": 1, "b": [2]}', ("a=text", "n:=3", "empty=", "eq=x=y", 'o:={"k": null}'))
    assert found == {"a": "text", "b": [2], "n": 3, "empty": "", "eq": "x=y", "o": {"k": None}}
    assert parse_attributes(None, ()) == {}


def test_version(run: Run) -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("millpond ")


def test_keygen_prints_a_line_or_appends_it(run: Run, tmp_path: Path) -> None:
    from millpond.crypto.keyring import Keyring

    printed = run("keygen", "--id", "first")
    assert Keyring.load(printed.stdout).newest == "first"
    ring = tmp_path / "ring"
    assert run("keygen", "-o", "ring", "--id", "a").exit_code == 0
    assert ring.stat().st_mode & 0o077 == 0
    ring.write_text(ring.read_text().rstrip("\n"))
    assert run("keygen", "-o", "ring", "--id", "b").exit_code == 0
    assert Keyring.from_file(ring).ids == ("a", "b")
    again = run("keygen", "-o", "ring", "--id", "b")
    assert again.exit_code == 1
    assert "is there already" in again.stderr
    assert Keyring.from_file(ring).ids == ("a", "b")
