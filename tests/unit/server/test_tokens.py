"""Bearer tokens: what they grant, the file, and what is said of a file that cannot be right."""

from __future__ import annotations

import hashlib
import os
import random
import stat
from pathlib import Path

import pytest

from millpond.errors import InvalidInput
from millpond.server import tokens
from millpond.server.tokens import Token, Tokens, parse_grant

NOW = 1_800_000_000_000


def make(name: str = "ci", allow: str = "*:*/*", expires_at: int | None = None, seed: int = 1) -> tuple[Token, str]:
    chance = random.Random(seed).randbytes
    return tokens.create(name, [parse_grant(allow)], random_bytes=chance, now=NOW, expires_at=expires_at)


@pytest.mark.parametrize(
    ("grant", "scope", "namespace", "queue", "allowed"),
    [
        ("write:shop/orders", "write", "shop", "orders", True),
        ("write:shop/orders", "read", "shop", "orders", False),
        ("write:shop/orders", "consume", "shop", "orders", False),
        ("write:shop/orders", "admin", "shop", "orders", False),
        ("admin:shop/orders", "write", "shop", "orders", False),
        ("write:shop/orders", "write", "shop", "orders2", False),
        ("write:shop/orders", "write", "other", "orders", False),
        ("write:shop/orders", "write", "shop", None, False),
        ("write:shop/orders", "write", None, None, False),
        ("write,read:shop/orders-*", "read", "shop", "orders-eu", True),
        ("write,read:shop/orders-*", "read", "shop", "orders-", True),
        ("write,read:shop/orders-*", "read", "shop", "orders", False),
        ("write,read:shop/orders-*", "read", "shop", "my-orders-eu", False),
        ("read:*-eu/*.in", "read", "shop-eu", "a.in", True),
        ("read:*-eu/*.in", "read", "shop-eu", "axin", False),
        ("read:a/ab*ba", "read", "a", "aba", False),
        ("read:a/ab*ba", "read", "a", "abba", True),
        ("read:a/x*b*cd*e", "read", "a", "x1b2cd3e", True),
        ("read:a/x*b*cd*e", "read", "a", "x1cd2b3e", False),
        ("read:a/x*be*e", "read", "a", "x1be", False),
        ("read:a/**", "read", "a", None, True),
        ("read:shop/*", "read", "shop", None, True),
        ("read:shop/*", "read", None, None, False),
        ("read:*/*", "read", None, None, True),
        ("*:*/*", "admin", "any", "thing", True),
        (" WRITE : shop/orders", "write", "shop", "orders", None),
        ("write:Shop/Orders", "write", "shop", "orders", True),
    ],
)
def test_what_a_grant_covers(
    grant: str, scope: str, namespace: str | None, queue: str | None, allowed: bool | None
) -> None:
    if allowed is None:
        with pytest.raises(InvalidInput, match="is no grant"):
            parse_grant(grant)
    else:
        assert parse_grant(grant).allows(scope, namespace, queue) is allowed


@pytest.mark.parametrize(
    "text",
    ["", "write", "write:shop", "write:/q", "write:shop/", "fly:a/b", "write:a/b c", "write:a/b/c", "write:a/(.+)"],
)
def test_what_is_no_grant(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"is no (grant|pattern)"):
        parse_grant(text)


def test_a_pattern_of_many_stars_takes_no_longer_for_a_hostile_name() -> None:
    grant = parse_grant("read:a/" + "*a" * 60)
    assert not grant.allows("read", "a", "a" * 59 + "b")


def test_a_token_is_found_by_its_text_alone() -> None:
    token, text = make()
    other, _ = make("other", seed=2)
    found = Tokens([token, other])
    assert found.find(text, NOW) == (token, "")
    assert text.startswith(f"mpt_{token.id}_")
    assert len(text.split("_", 2)[2]) == 43
    assert token.hash == "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    assert found.find(text[:-1] + "A", NOW) == (None, "wrong secret")
    assert found.find(f"mpt_{other.id}_{text.split('_', 2)[2]}", NOW) == (None, "wrong secret")
    for sent in ("", "mpt", "mpt_000000000000_x", text.replace("mpt", "xyz"), "mpt_" * 1000, "\udcff_\udcff_\udcff"):
        assert found.find(sent, NOW) == (None, "unknown")


def test_a_token_is_refused_from_the_moment_it_expires() -> None:
    token, text = make(expires_at=NOW + 10)
    assert Tokens([token]).find(text, NOW + 9) == (token, "")
    assert Tokens([token]).find(text, NOW + 10) == (None, "expired")


@pytest.mark.parametrize("name", ["", "a b", "-a", "x" * 65, 'quo"te', "line\nbreak"])
def test_names_that_no_token_may_have(name: str) -> None:
    with pytest.raises(InvalidInput, match="token name"):
        make(name)


def test_a_token_without_a_grant_is_refused() -> None:
    with pytest.raises(InvalidInput, match="without a grant"):
        tokens.create("ci", [], random_bytes=os.urandom, now=NOW)


# The file


def test_the_file_is_read_as_it_was_written_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "tokens.toml")
    one, text = make(expires_at=NOW + 1)
    two, _ = make("two", "write,consume:shop/*", seed=2)
    old = os.umask(0)
    try:
        tokens.save(path, [one, two])
    finally:
        os.umask(old)
    assert tokens.load(path) == [one, two]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert os.listdir(tmp_path) == ["tokens.toml"]
    assert text not in Path(path).read_text()
    assert text.split("_", 2)[2] not in Path(path).read_text()


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = str(tmp_path / "tokens.toml")
    token, _ = make()
    tokens.save(path, [token])
    with pytest.raises(AttributeError):
        tokens.save(path, [token, None])  # type: ignore[list-item]
    assert tokens.load(path) == [token]
    assert os.listdir(tmp_path) == ["tokens.toml"]


def test_a_file_that_others_may_change_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "tokens.toml"
    tokens.save(str(path), [make()[0]])
    path.chmod(0o640)
    tokens.load(str(path))
    assert caplog.records == []
    path.chmod(0o664)
    tokens.load(str(path))
    [record] = caplog.records
    assert (record.message, vars(record)["mode"]) == ("millpond.auth.tokens_exposed", "0664")


GOOD = f'id = "0123456789ab"\nname = "ci"\nhash = "sha256:{"0" * 64}"\nallow = ["read:a/b"]\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("= 1", "is not TOML"),
        ("tokens = 1", "something else than [[token]] entries"),
        ("token = 1", "something else than [[token]] entries"),
        ("token = [1]", "token 1 is no table"),
        ("[[token]]\n" + GOOD.replace("sha256:", ""), "token 1: hash is missing or not of its form"),
        ("[[token]]\n" + GOOD.replace("0123456789ab", "x"), "token 1: id is missing or not of its form"),
        ("[[token]]\n" + GOOD.replace('name = "ci"', ""), "token 1: name is missing"),
        ("[[token]]\n" + GOOD.replace("read:", "fly:"), "token 1: 'fly:a/b' is no grant"),
        ("[[token]]\n" + GOOD.replace('["read:a/b"]', "[]"), "token 1: allow must be a list of grants"),
        ("[[token]]\n" + GOOD + "alow = 1", "token 1: a token has no alow"),
        ("[[token]]\n" + GOOD + "expires = 2030-01-01", "token 1: expires must be a time with its zone"),
        ("[[token]]\n" + GOOD + "expires = 2030-01-01T00:00:00", "token 1: expires must be a time with its zone"),
        ("[[token]]\n" + GOOD + "[[token]]\n" + GOOD, "token 2: id 0123456789ab is there already"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused_by_its_entry(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(text)
    with pytest.raises(InvalidInput) as caught:
        tokens.load(str(path))
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_token_where_its_hash_belongs_is_not_quoted(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text("[[token]]\n" + GOOD.replace(f"sha256:{'0' * 64}", "mpt_hunter2"))
    with pytest.raises(InvalidInput) as caught:
        tokens.load(str(path))
    assert "hunter2" not in str(caught.value)


def test_files_that_are_none_of_tokens(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    with pytest.raises(InvalidInput, match=r"cannot be read: .*`millpond token create`"):
        tokens.load(str(path))
    path.write_bytes(b"\xff")
    with pytest.raises(InvalidInput, match="not UTF-8"):
        tokens.load(str(path))
    path.write_bytes(b"#" * (tokens.LARGEST_FILE + 1))
    with pytest.raises(InvalidInput, match="is larger than"):
        tokens.load(str(path))
