"""`millpond.crypto.keyring`."""

from __future__ import annotations

import base64
import copy
import logging
import pickle
from pathlib import Path

import pytest

from millpond.crypto.keyring import Keyring
from millpond.errors import InvalidInput, UnknownKey

OLD, NEW = b"\x01" * 32, b"\xfe" * 32


def line(key_id: str, key: bytes) -> str:
    return f"{key_id}:{base64.b64encode(key).decode()}"


def test_the_last_key_is_the_newest_and_comments_and_blanks_count_for_nothing() -> None:
    ring = Keyring.load(f"# keys\n\n  {line('old', OLD)}   # from last year\n{line('new', NEW)}\n\n")
    assert ring.ids == ("old", "new")
    assert ring.newest == "new"
    assert "old" in ring
    assert "other" not in ring


def test_commas_part_keys_as_lines_do() -> None:
    assert Keyring.load(f"{line('old', OLD)}, {line('new', NEW)}").ids == ("old", "new")


def test_both_base64_alphabets_give_the_same_key() -> None:
    plain = Keyring.load(line("k", b"\xfb\xff" * 16))
    safe = Keyring.load(f"k:{base64.urlsafe_b64encode(bytes([0xFB, 0xFF]) * 16).decode()}")
    assert plain.root("k") == safe.root("k")


def test_what_is_derived_from_is_not_the_key_itself() -> None:
    assert Keyring({"k": OLD}).root("k") not in {OLD, Keyring({"k": NEW}).root("k")}


def test_a_key_that_is_not_there() -> None:
    with pytest.raises(UnknownKey, match=r"needs root key 'x', which the keyring lacks \(it has old\)"):
        Keyring({"old": OLD}).root("x")


BAD = {
    "": "keyring holds no root key",
    "# nothing\n\n": "keyring holds no root key",
    f"{line('a', OLD)}\n{line('a', NEW)}": "keyring, line 2: root key id 'a' is there already",
    f"{line('a', OLD)}\n{line('b', OLD)}": "keyring, line 2: root key 'b' repeats an earlier key",
    line("a", b"\x01" * 31): "keyring, line 1: the key of 'a' has 31 bytes instead of 32",
    line("a", b"\x01" * 64): "keyring, line 1: the key of 'a' has 64 bytes instead of 32",
    f"\n{line('a', OLD)}?": "keyring, line 2: the key of 'a' is not valid base64",
    f"{line('a', OLD)[:-1]}": "keyring, line 1: the key of 'a' is not valid base64",
    "a:ключ": "keyring, line 1: the key of 'a' is not valid base64",
    base64.b64encode(OLD).decode(): "keyring, line 1: not of the form id:base64key",
    line("A", OLD): "keyring, line 1: the id before the colon is not 1 to 32 of a-z 0-9 . _ -",
    line("", OLD): "keyring, line 1: the id before the colon is not 1 to 32 of a-z 0-9 . _ -",
    line("a" * 33, OLD): "keyring, line 1: the id before the colon is not 1 to 32 of a-z 0-9 . _ -",
}


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_bad_text_is_refused_in_one_line_that_shows_no_key(text: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        Keyring.load(text)
    message = str(raised.value)
    assert message.startswith(BAD[text])
    assert "\n" not in message
    for part in text.replace("\n", ":").split(":"):
        assert len(part) < 16 or part not in message
    assert raised.value.__cause__ is None


@pytest.mark.parametrize("keys", [{}, {"a": b"short"}, {"A b": OLD}])
def test_bad_keys_are_refused(keys: dict[str, bytes]) -> None:
    with pytest.raises(InvalidInput):
        Keyring(keys)


def test_nothing_prints_or_pickles_a_key() -> None:
    ring = Keyring({"old": OLD, "new": NEW})
    assert repr(ring) == str(ring) == "Keyring(ids=['old', 'new'], newest='new')"
    for take in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError, match="not pickled"):
            take(ring)


def test_generate_key_makes_lines_that_load() -> None:
    lines = [Keyring.generate_key(), Keyring.generate_key(), Keyring.generate_key("mine")]
    ring = Keyring.load("\n".join(lines))
    assert len(ring.ids) == 3
    assert ring.newest == "mine"
    with pytest.raises(InvalidInput, match="root key id 'No Good'"):
        Keyring.generate_key("No Good")


def test_from_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys"
    path.write_text(line("a", OLD))
    path.chmod(0o600)
    assert Keyring.from_file(path).ids == ("a",)
    assert caplog.records == []


@pytest.mark.parametrize("mode", [0o644, 0o602])
def test_a_file_open_to_all_is_warned_of_and_used(tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int) -> None:
    path = tmp_path / "keys"
    path.write_text(line("a", OLD))
    path.chmod(mode)
    with caplog.at_level(logging.WARNING, "millpond.crypto"):
        assert Keyring.from_file(str(path)).ids == ("a",)
    (record,) = caplog.records
    assert record.getMessage() == "millpond.crypto.keyring_exposed"
    assert record.__dict__["mode"] == f"{mode:04o}"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"keyring file .*none cannot be read: No such file"):
        Keyring.from_file(tmp_path / "none")
    path = tmp_path / "binary"
    path.write_bytes(NEW)
    path.chmod(0o600)
    with pytest.raises(InvalidInput, match=r"keyring file .*binary is not UTF-8 text"):
        Keyring.from_file(path)
    path.write_text("nonsense")
    with pytest.raises(InvalidInput, match=r"keyring file .*binary, line 1: not of the form id:base64key"):
        Keyring.from_file(path)


def test_from_env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MILLPOND_KEYRING", raising=False)
    monkeypatch.delenv("MILLPOND_KEYRING_FILE", raising=False)
    with pytest.raises(InvalidInput, match="neither MILLPOND_KEYRING nor MILLPOND_KEYRING_FILE is set"):
        Keyring.from_env()
    path = tmp_path / "keys"
    path.write_text(line("file", OLD))
    path.chmod(0o600)
    monkeypatch.setenv("MILLPOND_KEYRING_FILE", str(path))
    assert Keyring.from_env().ids == ("file",)
    monkeypatch.setenv("MILLPOND_KEYRING", line("env", OLD))
    with pytest.raises(InvalidInput, match="both set"):
        Keyring.from_env()
    monkeypatch.delenv("MILLPOND_KEYRING_FILE")
    assert Keyring.from_env().ids == ("env",)
    monkeypatch.setenv("OTHER", "x")
    with pytest.raises(InvalidInput, match="OTHER, line 1: not of the form"):
        Keyring.from_env("OTHER")
