"""`millpond token`: tokens are made, listed and revoked, and their text is shown once."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from millpond.cli.app import app
from millpond.server import tokens


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokens.toml"


def run(file: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["token", *arguments, "--tokens", str(file)])


def test_a_token_is_made_listed_and_revoked(file: Path) -> None:
    made = run(file, "create", "ci", "write:shop/orders-*", "read:*/*", "--expires-in", "90d")
    assert made.exit_code == 0
    text = made.stdout.strip()
    other = json.loads(run(file, "create", "ops", "*:*/*", "--json").stdout)
    assert (other["name"], other["allow"], other["expires"]) == ("ops", ["read,write,consume,admin:*/*"], None)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    one, two = tokens.load(str(file))
    assert one.expires_at == one.created_at + 90 * 86_400_000
    assert two.expires_at is None
    found = tokens.Tokens([one, two])
    assert found.find(text, one.created_at) == (one, "")
    assert found.find(other["token"], one.created_at) == (two, "")

    listed = run(file, "list")
    assert [line.split()[:3] for line in listed.stdout.splitlines()] == [
        ["ID", "NAME", "MAY"],
        [one.id, "ci", "write:shop/orders-*"],
        [two.id, "ops", "read,write,consume,admin:*/*"],
    ]
    rows = [json.loads(line) for line in run(file, "list", "--json").stdout.splitlines()]
    assert [(row["id"], row["expired"]) for row in rows] == [(one.id, False), (two.id, False)]
    for output in (listed.stdout, str(rows), file.read_text(), made.stderr):
        assert text.split("_", 2)[2] not in output

    assert run(file, "revoke", one.id).exit_code == 0
    assert [token.id for token in tokens.load(str(file))] == [two.id]
    gone = run(file, "revoke", one.id)
    assert gone.exit_code == 1
    assert f"there is no token with id {one.id}" in gone.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["create", "ci", "orders"], "'orders' is no grant"),
        (["create", "c i", "read:*/*"], "token name 'c i' is not"),
        (["create", "ci"], "Missing argument"),
        (["list"], "cannot be read"),
    ],
)
def test_what_cannot_be_makes_no_file(file: Path, arguments: list[str], said: str) -> None:
    done = run(file, *arguments)
    assert done.exit_code in {1, 2}
    assert said in " ".join(done.stderr.split())
    assert not file.exists()


def test_a_file_that_cannot_be_read_is_not_written_over(file: Path) -> None:
    file.write_text("something else = 1")
    done = run(file, "create", "ci", "read:*/*")
    assert done.exit_code == 1
    assert file.read_text() == "something else = 1"
