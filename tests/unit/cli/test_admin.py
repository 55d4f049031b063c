"""Commands that govern a queue: which queues they take, and the way out of a policy that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import apsw
import pytest
from click.testing import CliRunner, Result

from millpond.cli.app import app

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command in a folder of its own that has a store with the queue ``orders``."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str, code: int = 0) -> Result:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == code, result.output
        return result

    invoke("enqueue", "orders", "x")
    return invoke


def _queues(run: Run) -> list[tuple[str, bool | None]]:
    found = [json.loads(line) for line in run("queues", "--json").stdout.splitlines()]
    return [(record["queue"], record["paused"]) for record in found]


@pytest.mark.parametrize("command", [["pause"], ["resume"], ["policy", "reset", "--yes"]], ids=" ".join)
def test_a_queue_of_which_there_is_nothing_is_noted(run: Run, command: list[str]) -> None:
    assert (
        run(*command, "ordres").stderr == "millpond: queue ordres has no messages and no policy; is the name right?\n"
    )
    elsewhere = run(*command, "orders", "--namespace", "other")
    assert elsewhere.stderr.startswith("millpond: queue orders in namespace other has no messages")
    assert run("--quiet", *command, "odrers").stderr == ""
    assert run(*command, "orders").stderr == ""
    # Only what changes something leaves a trace.
    made = [("odrers", True), ("orders", True), ("ordres", True), ("orders", True)]
    assert _queues(run) == (made if command == ["pause"] else [("orders", False)])


def test_a_queue_whose_messages_are_done_is_paused_like_any_other(run: Run) -> None:
    run("purge", "orders", "--yes")
    run("pause", "orders")
    run("enqueue", "orders", "y")
    assert run("receive", "orders", "--json").stdout == ""
    run("resume", "orders")
    assert _queues(run) == [("orders", False)]
    assert json.loads(run("receive", "orders", "--json").stdout)["payload"] == "y"


def _garble(tmp_path: Path) -> None:
    connection = apsw.Connection(str(tmp_path / "millpond.db"))
    connection.execute("UPDATE queue SET document = x'ff' WHERE name = 'orders'")
    assert connection.changes() == 1
    connection.close()


def test_a_policy_that_cannot_be_read_is_reset(run: Run, tmp_path: Path) -> None:
    run("enqueue", "beside", "y")
    run("policy", "set", "orders", "--max-attempts", "2")
    _garble(tmp_path)
    for arguments in (["policy", "show"], ["policy", "set", "--ttl", "1h"], ["receive"], ["pause"]):
        assert "[store_corrupt]" in run(*arguments, "orders", code=1).stderr
    assert run("verify", code=1).stdout.startswith("queue default/orders: policy of queue default/orders cannot be")
    listed = run("queues")
    assert "policy unreadable" in listed.stdout
    assert "`millpond policy reset`" in listed.stderr
    assert _queues(run) == [("beside", False), ("orders", None)]
    assert "--yes" in run("policy", "reset", "orders", code=2).stderr
    shown = json.loads(run("policy", "reset", "orders", "--yes", "--json").stdout)
    assert (shown["queue"], shown["max_attempts"], shown["paused"]) == ("orders", None, False)
    assert run("verify").stderr == "millpond: all is well\n"
    assert json.loads(run("receive", "orders", "--json").stdout)["payload"] == "x"
