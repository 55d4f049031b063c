"""The `millpond` command as a person or a script meets it: real processes, a real file."""

from __future__ import annotations

import base64
import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import millpond

BOUND = 60.0
"""Seconds for any one command, on the busiest machine."""

RECEIVED = [
    "message_id",
    "lease_id",
    "fencing_token",
    "attempts",
    "failures",
    "namespace",
    "queue",
    "priority",
    "enqueued_at",
    "lease_until",
    "owner",
    "attributes",
    "content_type",
    "correlation_id",
    "ordering_key",
    "payload",
    "payload_encoding",
    "payload_size",
]
VIEWED = [
    "message_id",
    "namespace",
    "queue",
    "state",
    "priority",
    "attempts",
    "failures",
    "max_attempts",
    "enqueued_at",
    "visible_at",
    "expires_at",
    "attributes",
    "content_type",
    "correlation_id",
    "dedup_key",
    "ordering_key",
    "payload_size",
    "last_error",
    "dead_reason",
    "dead_at",
    "lease_id",
    "fencing_token",
    "lease_until",
    "owner",
]
COUNTED = ["namespace", "queue", "ready", "delayed", "leased", "blocked", "dead", "bytes", "oldest_age"]


class Cli:
    """Runs the command on one store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLPOND_")}
        self.environment["PYTHONPATH"] = str(Path(millpond.__file__).parents[1])  # wherever the command is run
        self.environment["MILLPOND_STORE"] = f"sqlite:///{folder}/pond.db"

    def __call__(
        self, *arguments: str, input: bytes = b"", code: int = 0, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        done = subprocess.run(
            [sys.executable, "-m", "millpond", *arguments],
            input=input,
            capture_output=True,
            cwd=self.folder,
            env=self.environment | (env or {}),
            timeout=BOUND,
            check=False,
        )
        assert done.returncode == code, done.stderr.decode()
        assert b"Traceback" not in done.stderr
        return done

    def json(self, *arguments: str, **more: Any) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self(*arguments, "--json", **more).stdout.splitlines()]

    def one(self, *arguments: str, **more: Any) -> dict[str, Any]:
        (record,) = self.json(*arguments, **more)
        return record


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path)


def named(record: dict[str, Any]) -> list[str]:
    return ["--message", record["message_id"], "--lease", record["lease_id"], "--token", str(record["fencing_token"])]


def test_round_trip(cli: Cli) -> None:
    id = cli("enqueue", "orders", "grün", "-a", "a=b", "-a", "n:=3", "--priority", "7").stdout.decode().strip()
    record = cli.one("receive", "orders", "--owner", "me", "--visibility", "5m")
    assert list(record) == RECEIVED
    assert record["message_id"] == id
    assert (record["fencing_token"], record["attempts"], record["failures"]) == (1, 1, 0)
    assert (record["payload"], record["payload_encoding"], record["payload_size"]) == ("grün", "utf-8", 5)
    assert (record["attributes"], record["priority"], record["owner"]) == ({"a": "b", "n": 3}, 7, "me")
    assert record["lease_until"] > record["enqueued_at"]
    done = cli("ack", "orders", *named(record))
    assert (done.stdout, done.stderr) == (b"", b"")
    assert cli.one("stats", "orders") | {"oldest_age": None} == dict.fromkeys(COUNTED, 0) | {
        "namespace": "default",
        "queue": "orders",
        "oldest_age": None,
    }


def test_an_answer_that_comes_too_late_is_an_error_and_changes_nothing(cli: Cli) -> None:
    cli("enqueue", "q", "x")
    first = cli.one("receive", "q")
    cli("defer", "q", *named(first))
    second = cli.one("receive", "q")
    assert second["fencing_token"] == 2
    for command in (["ack"], ["nack"], ["defer"], ["extend", "--by", "1m"]):
        failed = cli(command[0], "q", *named(first), *command[1:], code=1)
        assert failed.stderr.startswith(b"millpond: error: ")
        assert failed.stderr.endswith(b"[lease_lost]\n")
        assert failed.stderr.count(b"\n") == 1
    cli("ack", "q", *named(second))


def test_binary_and_empty_payloads(cli: Cli) -> None:
    data = bytes(range(256))
    cli("enqueue", "q", input=data)
    cli("enqueue", "q", "", "--delay", "0")
    first, second = cli.json("receive", "q", "-n", "2")
    assert first["payload_encoding"] == "base64"
    assert first["payload"] == base64.b64encode(data).decode()
    assert (second["payload"], second["payload_encoding"]) == ("", "utf-8")
    cli("enqueue", "raw", "-", input=data)
    assert cli("receive", "raw", "--output", "-", "--ack").stdout == data
    assert cli.one("stats", "raw")["leased"] == 0


def test_a_large_payload_streams_in_and_out(cli: Cli) -> None:
    data = os.urandom(20_000_000)
    (cli.folder / "large").write_bytes(data)
    cli("enqueue", "q", "--file", "large")
    peeked = cli.one("peek", "q")
    assert (peeked["payload"], peeked["payload_encoding"], peeked["payload_size"]) == (None, "omitted", len(data))
    assert cli("peek", "q", "--output", "-").stdout == data
    record = cli.one("receive", "q", "--output-dir", "out")
    assert (record["payload"], record["payload_encoding"]) == (None, "file")
    assert record["payload_size"] == len(data)
    assert Path(cli.folder / record["payload_file"]).read_bytes() == data
    cli("defer", "q", *named(record))
    cli("receive", "q", "-o", "copy")
    assert (cli.folder / "copy").read_bytes() == data


def test_lines(cli: Cli) -> None:
    (cli.folder / "lines").write_bytes(b"one\r\n\ntwo \xff\nlast")
    done = cli("enqueue", "q", "--lines", "--file", "lines")
    assert done.stdout == b"4 messages queued in q\n"
    assert done.stderr == b""
    received = cli.json("receive", "q", "-n", "10")
    assert [record["payload"] for record in received] == ["one\r", "", "dHdvIP8=", "last"]
    assert cli("enqueue", "skipped", "--lines", "--skip-empty", input=b"a\n\n\nb\n").stdout.startswith(b"2 messages")
    receipts = cli.json("enqueue", "nul", "--lines", "-0", input=b"a\nb\0c\0")
    assert [list(receipt) for receipt in receipts] == [["message_id", "duplicate", "namespace", "queue"]] * 2
    assert [record["payload"] for record in cli.json("receive", "nul", "-n", "9")] == ["a\nb", "c"]
    assert cli("enqueue", "none", "--lines", "-q", input=b"").stdout == b""


def test_many_lines_keep_their_order_and_can_be_queued_again_without_harm(cli: Cli) -> None:
    data = b"".join(b"line %d\n" % number for number in range(3000))
    assert cli("enqueue", "q", "--lines", "--dedup-lines", input=data).stdout == b"3000 messages queued in q\n"
    again = cli("enqueue", "q", "--lines", "--dedup-lines", input=data + b"new\n")
    assert again.stdout == b"1 message queued in q, 3000 already there\n"
    received = cli.json("receive", "q", "-n", "5000")
    assert [record["payload"] for record in received] == [f"line {number}" for number in range(3000)] + ["new"]


def test_lines_are_queued_as_they_arrive(cli: Cli) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "millpond", "enqueue", "q", "--lines", "--json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=cli.environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        for _ in range(3):
            process.stdin.write(b"x\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["duplicate"] is False
        process.stdin.close()
    assert process.returncode == 0


def test_every_option_of_enqueue_arrives(cli: Cli) -> None:
    options = {
        "--delay": "1h",
        "--ttl": "2h",
        "--priority": "9",
        "--max-attempts": "7",
        "--dedup-key": "k",
        "--dedup-window": "1d",
        "--ordering-key": "customer-1",
        "--content-type": "text/plain",
        "--correlation-id": "c",
        "--visibility": "90s",
        "--attributes": '{"a": [1]}',
    }
    receipt = cli.one("enqueue", "q", "x", *(word for pair in options.items() for word in pair))
    assert receipt["duplicate"] is False
    again = cli.one("enqueue", "q", "y", "--dedup-key", "k")
    assert again == receipt | {"duplicate": True}
    view = cli.one("peek", "q", "--message", receipt["message_id"])
    assert list(view) == [*VIEWED, "payload", "payload_encoding"]
    expected = {
        "state": "delayed",
        "priority": 9,
        "max_attempts": 7,
        "dedup_key": "k",
        "ordering_key": "customer-1",
        "content_type": "text/plain",
        "correlation_id": "c",
        "attributes": {"a": [1]},
        "payload": "x",
        "attempts": 0,
    }
    assert {name: view[name] for name in expected} == expected
    assert view["enqueued_at"] < view["visible_at"] < view["expires_at"]
    assert cli.one("stats", "q")["delayed"] == 1


def test_nack_dead_letters_redrive_and_purge(cli: Cli) -> None:
    for payload in ("a", "b", "c"):
        cli("enqueue", "q", payload, "--max-attempts", "1")
    received = cli("receive", "q", "-n", "3", "--json").stdout
    answers = cli.json("nack", "q", "--error", "no good", "--from-json", "-", input=received)
    assert [list(answer) for answer in answers] == [["message_id", "answer", "ok", "code", "error"]] * 3
    assert all(answer["ok"] for answer in answers)
    letters = cli.json("dlq", "list", "q")
    assert [list(letter) for letter in letters] == [VIEWED] * 3
    assert {(letter["state"], letter["last_error"], letter["dead_reason"]) for letter in letters} == {
        ("dead", "no good", "max_attempts_exceeded")
    }
    ids = [letter["message_id"] for letter in letters]
    assert [letter["message_id"] for letter in cli.json("dlq", "list", "q", "--after", ids[0], "-n", "1")] == [ids[1]]
    assert cli.one("dlq", "show", "q", ids[0])["payload"] == "a"
    assert cli("dlq", "show", "q", ids[0], "-o", "-").stdout == b"a"
    assert b"no good" in cli("dlq", "list", "q").stdout
    assert b"max_attempts_exceeded" in cli("dlq", "show", "q", ids[0]).stdout
    assert cli.one("dlq", "redrive", "q", ids[0]) == {
        "namespace": "default",
        "queue": "q",
        "redriven": 1,
    }
    again = cli.one("receive", "q")
    assert (again["message_id"], again["attempts"], again["failures"], again["fencing_token"]) == (ids[0], 1, 0, 2)
    assert cli("dlq", "purge", "q", ids[1], "--yes").stdout == b"1 removed\n"
    assert cli("dlq", "redrive", "q", "--all").stdout == b"1 sent again\n"
    assert b"no dead letters" in cli("dlq", "list", "q").stderr
    cli("dlq", "show", "q", ids[1], code=1)


def test_each_answer_of_many_stands_alone(cli: Cli) -> None:
    cli("enqueue", "q", "--lines", input=b"a\nb\nc\n")
    received = cli("receive", "q", "-n", "3", "--json").stdout
    cli("ack", "q", *named(json.loads(received.splitlines()[1])))
    failed = cli("ack", "q", "--from-json", "-", input=received, code=1)
    assert b"ack: 2 done, 1 failed" in failed.stderr
    assert failed.stderr.count(b"[lease_lost]") == 1
    assert cli.one("stats", "q")["leased"] == 0
    for line, text in ((b"{", b"not a line of"), (b"[]", b"not an object"), (b'{"message_id":"x"}', b"lacks")):
        assert text in cli("ack", "q", "--from-json", "-", input=line, code=1).stderr
    other = received.splitlines()[0].replace(b'"queue":"q"', b'"queue":"other"')
    assert b"was received from queue 'other'" in cli("ack", "q", "--from-json", "-", input=other, code=1).stderr
    elsewhere = cli("ack", "q", "--namespace", "other", "--from-json", "-", input=received, code=1).stderr
    assert b"was received in namespace 'default', not in 'other': give --namespace" in elsewhere


def test_extend_tells_the_new_end(cli: Cli) -> None:
    cli("enqueue", "q", "x")
    record = cli.one("receive", "q", "--visibility", "10s")
    answer = cli.one("extend", "q", *named(record), "--by", "1h")
    assert answer["ok"] is True
    assert answer["lease_until"] > record["lease_until"]
    assert cli.one("peek", "q", "--message", record["message_id"])["lease_until"] == answer["lease_until"]


def test_delays(cli: Cli) -> None:
    cli("enqueue", "q", "x")
    cli("nack", "q", *named(cli.one("receive", "q")), "--delay", "1h")
    assert cli.one("stats", "q")["delayed"] == 1
    done = cli("receive", "q", "--json")
    assert (done.stdout, done.stderr) == (b"", b"")
    cli("receive", "q", "--fail-empty", code=3)


def test_waiting_ends_with_a_message_of_another_process(cli: Cli) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "millpond", "receive", "q", "--wait", str(BOUND), "--json"],
        stdout=subprocess.PIPE,
        env=cli.environment,
    )
    with process:
        cli("enqueue", "q", "x")
        assert process.stdout is not None
        assert json.loads(process.stdout.read())["payload"] == "x"
    assert process.returncode == 0


def test_pause_and_resume_and_policy(cli: Cli) -> None:
    cli("pause", "q")
    cli("enqueue", "q", "x")
    assert cli.json("receive", "q") == []
    assert cli.one("queues") == {"namespace": "default", "queue": "q", "paused": True}
    assert b"paused" in cli("queues").stdout
    cli("resume", "q")
    assert len(cli.json("receive", "q")) == 1
    shown = cli.one("policy", "set", "q", "--max-attempts", "3", "--ttl", "1h", "--on-expired", "dead_letter")
    assert shown == {
        "namespace": "default",
        "queue": "q",
        "default_visibility": None,
        "max_attempts": 3,
        "ttl": 3600.0,
        "on_expired": "dead_letter",
        "on_exhausted": "dead_letter",
        "dedup_window": None,
        "paused": False,
    }
    assert cli.one("policy", "set", "q", "--ttl", "default")["ttl"] is None
    assert cli.one("policy", "show", "q")["max_attempts"] == 3
    assert b"max-attempts" in cli("policy", "show", "q").stdout


def test_purge_leaves_what_is_held(cli: Cli) -> None:
    cli("enqueue", "q", "--lines", input=b"a\nb\nc\n")
    record = cli.one("receive", "q")
    assert cli.one("purge", "q", "--yes") == {"namespace": "default", "queue": "q", "purged": 2}
    cli("ack", "q", *named(record))


def test_namespaces(cli: Cli) -> None:
    cli("--namespace", "shop", "enqueue", "q", "x")
    cli("enqueue", "q", "y")
    assert [(r["namespace"], r["queue"]) for r in cli.json("queues")] == [("default", "q"), ("shop", "q")]
    assert [r["namespace"] for r in cli.json("stats", "--namespace", "shop")] == ["shop"]
    assert cli.one("receive", "q", env={"MILLPOND_NAMESPACE": "shop"})["payload"] == "x"


def test_verify_and_verbose_stats(cli: Cli) -> None:
    cli("enqueue", "q", "x")
    assert cli("verify").stderr == b"millpond: all is well\n"
    assert cli.json("verify") == []
    counts, store = cli.json("stats", "-v")
    assert list(counts) == COUNTED
    assert store["store"]
    assert cli("stats", "-v").stdout.startswith(b"NAMESPACE  QUEUE")


def test_no_store_but_a_file_of_something_else(cli: Cli) -> None:
    (cli.folder / "pond.db").write_bytes(b"this is no database, but it is long enough to look at" * 100)
    for command in (["stats"], ["enqueue", "q", "x"], ["work", "q", "--until-empty", "--", "true"]):
        failed = cli(*command, code=1).stderr.splitlines()
        assert failed[-1].startswith(b"millpond: error: ") or command[0] == "work"
        assert any(line.startswith(b"millpond: error: ") for line in failed)


def test_an_encrypted_store_and_its_keys(cli: Cli) -> None:
    cli("keygen", "-o", "ring", "--id", "a")
    secret = "nobody reads this"
    cli("enqueue", "q", secret, "--keyring", "ring")
    assert not any(secret.encode() in path.read_bytes() for path in cli.folder.glob("pond.db*") if path.is_file())
    cli("keygen", "-o", "ring", "--id", "b")
    assert cli.one("rekey", env={"MILLPOND_KEYRING_FILE": "ring"})["rewritten"] >= 1
    newest = (cli.folder / "ring").read_text().splitlines()[-1]
    assert cli.one("receive", "q", env={"MILLPOND_KEYRING": newest})["payload"] == secret
    cli("enqueue", "q", "other", "--keyring", "ring")
    (cli.folder / "wrong").write_bytes(cli("keygen", "--id", "c").stdout)
    failed = cli("receive", "q", "--keyring", "wrong", code=1)
    assert b"\nmillpond: error: " in b"\n" + failed.stderr


def test_when_the_reader_goes_away_unread_messages_are_given_back(cli: Cli) -> None:
    cli("enqueue", "q", "--lines", input=b"".join(b"%d" % n + b"x" * 50_000 + b"\n" for n in range(20)))
    process = subprocess.Popen(
        [sys.executable, "-m", "millpond", "receive", "q", "-n", "20", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=cli.environment,
    )
    assert process.stdout is not None
    first = json.loads(process.stdout.readline())
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(BOUND), errors) == (141, b"")
    counts = cli.one("stats", "q")
    assert counts["leased"] < 10
    assert counts["ready"] == 20 - counts["leased"]
    cli("ack", "q", *named(first))


def test_ctrl_c_while_waiting(cli: Cli) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "millpond", "receive", "q", "--wait", str(BOUND), "-vv"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=cli.environment | {"PYTHONUNBUFFERED": "1"},
    )
    with process:
        assert process.stderr is not None
        assert process.stderr.readline()  # asyncio logs its selector: the loop runs and minds SIGINT
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=BOUND)
    assert process.returncode == 130
    assert b"millpond: error" not in errors


def test_completion_knows_the_queues(cli: Cli) -> None:
    complete = {"_MILLPOND_COMPLETE": "bash_complete", "COMP_WORDS": "millpond receive or", "COMP_CWORD": "2"}
    script = "from millpond.cli import main; main()"

    def completed() -> bytes:
        return subprocess.run(
            [sys.executable, "-c", script], env=cli.environment | complete, capture_output=True, check=False
        ).stdout

    assert completed().strip() == b""
    assert list(cli.folder.iterdir()) == []
    cli("enqueue", "orders", "x")
    cli("enqueue", "invoices", "x")
    assert completed().split() == [b"plain,orders"]


def test_human_forms_say_the_same(cli: Cli) -> None:
    id = cli("enqueue", "q", "two\nlines").stdout.decode().strip()
    peeked = cli("peek", "q").stdout.decode()
    assert f"message_id    {id}" in peeked
    received = cli("receive", "q").stdout.decode()
    assert received.startswith(f"{id}  lease ")
    assert received.endswith("\n  two\n  lines\n")


def test_what_is_printed_is_stored(cli: Cli) -> None:
    """An id on stdout means that the message survives anything, this process's kill included."""
    process = subprocess.Popen(
        [sys.executable, "-m", "millpond", "enqueue", "q", "--lines", "--json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=cli.environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        payloads = [b"%d" % number for number in range(200)]
        process.stdin.write(b"\n".join(payloads) + b"\n")
        process.stdin.flush()
        printed = [json.loads(process.stdout.readline())["message_id"] for _ in payloads]
        process.kill()
    stored = cli.json("receive", "q", "-n", "1000")
    assert [record["message_id"] for record in stored] == printed
    assert [record["payload"].encode() for record in stored] == payloads


def shell(cli: Cli, script: str) -> subprocess.CompletedProcess[bytes]:
    """A shell line in which $M is the command."""
    environment = cli.environment | {"M": f"{sys.executable} -m millpond"}
    return subprocess.run(
        ["sh", "-c", script], cwd=cli.folder, env=environment, capture_output=True, timeout=BOUND, check=False
    )


def test_closed_standard_streams_harm_nothing(cli: Cli) -> None:
    first = cli("enqueue", "q", "first").stdout.decode().strip()
    done = shell(cli, "$M enqueue q second >&- 2>&-; echo $?; $M stats >&- <&-; echo $?; $M work q -n 1 -- cat <&- >&-")
    assert (done.stdout, done.returncode) == (b"0\n0\n", 0)
    assert b"Traceback" not in done.stderr
    assert b"1 acked" in done.stderr
    done = shell(cli, "$M enqueue q <&-")
    assert done.returncode == 2
    assert done.stderr.startswith(b"millpond: error: stdin is closed")
    done = shell(cli, "$M purge q <&-")
    assert done.returncode == 2
    assert b"give --yes" in done.stderr
    left = cli.one("peek", "q")
    assert (left["payload"], left["message_id"] != first) == ("second", True)
    cli("verify")


def test_a_full_disk_behind_stdout_gives_messages_back(cli: Cli) -> None:
    cli("enqueue", "q", "x")
    done = shell(cli, "$M receive q --json --ack > /dev/full")
    assert (done.returncode, done.stderr) == (1, b"millpond: error: No space left on device\n")
    assert cli.one("stats", "q")["ready"] == 1


def test_what_cannot_be_read_is_discarded_and_frees_those_behind_it(cli: Cli) -> None:
    ids = [cli.one("enqueue", "q", text, "--ordering-key", "k")["message_id"] for text in ("first", "second")]
    file = sqlite3.connect(cli.folder / "pond.db")
    file.execute("UPDATE body SET head = x'00' WHERE seq = (SELECT seq FROM message WHERE id = ?)", ids[:1])
    file.commit()
    file.close()
    assert cli.json("receive", "q") == []
    assert ids[0] in cli("verify", code=1).stdout.decode()
    assert b"give --yes" in cli("discard-unreadable", "q", "--all", code=2).stderr
    assert cli.one("discard-unreadable", "q", "--all", "--yes")["message_id"] == ids[0]
    assert cli.one("receive", "q")["payload"] == "second"
    cli("verify")
