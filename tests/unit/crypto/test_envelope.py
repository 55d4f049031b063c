"""`millpond.crypto.envelope`."""

from __future__ import annotations

import os

import msgspec
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from millpond.crypto import envelope
from millpond.crypto.envelope import HEAD, PAYLOAD, STATUS, Envelope
from millpond.crypto.keyring import Keyring
from millpond.errors import CryptoError, StoreMismatch, Tampered, UnknownKey

PLACE = ("default", "orders", "0197a3c2-0000-7000-8000-000000000001")
KEY = bytes(range(32))
DATA = b"what nobody else may read"


@pytest.fixture
def sealer() -> Envelope:
    return Envelope(Keyring({"a": KEY}))


@pytest.mark.parametrize("data", [b"", DATA, os.urandom(100_000)], ids=["empty", "short", "long"])
def test_round_trip(sealer: Envelope, data: bytes) -> None:
    sealed = sealer.seal(PAYLOAD, *PLACE, data)
    assert envelope.is_sealed(sealed)
    assert Envelope.key_id(sealed) == "a"
    assert len(sealed) == len(data) + 4 + 1 + 12 + 16
    assert sealer.open(PAYLOAD, *PLACE, sealed) == data


def test_the_format_is_as_written_down() -> None:
    """Made with the library alone, from the description: a change of the format cannot go unnoticed."""
    root_key, nonce, place = KEY, b"n" * 12, "\0".join(PLACE).encode()
    # HKDF in one go: the keyring extracts, the envelope expands.
    key = HKDF(SHA256(), 32, b"millpond/1 root key", b"millpond/1 record\0" + place).derive(root_key)
    prefix = b"\xc1M\x01\x01a"
    sealed = prefix + nonce + AESGCM(key).encrypt(nonce, DATA, prefix + place + b"\0h")
    assert Envelope(Keyring({"a": KEY})).open(HEAD, *PLACE, sealed) == DATA
    assert Envelope(Keyring({"a": KEY}), random_bytes=lambda n: b"n" * n).seal(HEAD, *PLACE, DATA) == sealed


def test_no_two_ciphertexts_are_alike(sealer: Envelope) -> None:
    assert len({sealer.seal(STATUS, *PLACE, DATA) for _ in range(100)}) == 100


def test_a_sealed_record_is_no_messagepack(sealer: Envelope) -> None:
    with pytest.raises(msgspec.DecodeError):
        msgspec.msgpack.decode(sealer.seal(HEAD, *PLACE, DATA))


def test_every_flipped_byte_is_seen(sealer: Envelope) -> None:
    sealed = sealer.seal(HEAD, *PLACE, DATA)
    for at in range(len(sealed)):
        changed = bytearray(sealed)
        changed[at] ^= 0x80
        with pytest.raises((CryptoError, StoreMismatch), match=rf"^head of message {PLACE[2]} in default/orders "):
            sealer.open(HEAD, *PLACE, bytes(changed))


def test_every_cut_and_every_tail_is_seen(sealer: Envelope) -> None:
    sealed = sealer.seal(HEAD, *PLACE, DATA)
    for end in range(len(sealed)):
        with pytest.raises(Tampered, match=r"^head of message "):
            sealer.open(HEAD, *PLACE, sealed[:end])
    with pytest.raises(Tampered):
        sealer.open(HEAD, *PLACE, sealed + b"\0")


@pytest.mark.parametrize(
    "place",
    [
        ("other", PLACE[1], PLACE[2]),
        (PLACE[0], "other", PLACE[2]),
        (PLACE[0], PLACE[1], PLACE[2][:-1] + "2"),
        ("defaultorders", "", PLACE[2]),
        ("default", "order", "s" + PLACE[2]),
    ],
)
def test_what_was_moved_does_not_open(sealer: Envelope, place: tuple[str, str, str]) -> None:
    sealed = sealer.seal(HEAD, *PLACE, DATA)
    with pytest.raises(Tampered, match="changed, cut or moved"):
        sealer.open(HEAD, *place, sealed)


def test_one_part_is_not_another(sealer: Envelope) -> None:
    with pytest.raises(Tampered, match=r"^status of message"):
        sealer.open(STATUS, *PLACE, sealer.seal(HEAD, *PLACE, DATA))


def test_rotation_writes_with_the_newest_and_reads_with_any(sealer: Envelope) -> None:
    old = sealer.seal(HEAD, *PLACE, DATA)
    both = Envelope(Keyring({"a": KEY, "b": bytes(32)}))
    assert both.open(HEAD, *PLACE, old) == DATA
    assert not both.is_current(old)
    new = both.seal(HEAD, *PLACE, DATA)
    assert Envelope.key_id(new) == "b"
    assert both.is_current(new)
    with pytest.raises(UnknownKey, match=r"head of message .* needs root key 'b', which .* lacks \(it has a\)"):
        sealer.open(HEAD, *PLACE, new)


def test_another_key_of_the_same_id_does_not_open(sealer: Envelope) -> None:
    sealed = sealer.seal(HEAD, *PLACE, DATA)
    with pytest.raises(Tampered, match="another root key of the same id"):
        Envelope(Keyring({"a": bytes(32)})).open(HEAD, *PLACE, sealed)


def test_one_key_id_that_begins_as_another_is_not_taken_for_it() -> None:
    ring = Envelope(Keyring({"ab": KEY, "a": bytes(32)}))
    sealed = Envelope(Keyring({"ab": KEY})).seal(HEAD, *PLACE, DATA)
    assert not ring.is_current(sealed)
    assert ring.open(HEAD, *PLACE, sealed) == DATA


def test_a_plain_record_and_a_newer_format_are_named(sealer: Envelope) -> None:
    with pytest.raises(StoreMismatch, match="is not encrypted, but the store was opened with a keyring"):
        sealer.open(HEAD, *PLACE, msgspec.msgpack.encode([1, 2]))
    newer = bytearray(sealer.seal(HEAD, *PLACE, DATA))
    newer[2] = 2
    with pytest.raises(StoreMismatch, match="encryption format 2; this Millpond reads up to 1"):
        sealer.open(HEAD, *PLACE, bytes(newer))


def test_ciphers_are_kept_but_not_without_bound() -> None:
    sealer = Envelope(Keyring({"a": KEY}), ciphers=10)
    for _ in range(3):
        sealer.seal(HEAD, *PLACE, DATA)
    assert sealer.statistics() == {"ciphers_cached": 1, "ciphers_derived": 1, "ciphers_reused": 2}
    for number in range(100):
        sealer.seal(HEAD, "default", "orders", str(number), DATA)
    assert sealer.statistics()["ciphers_cached"] == 10


def test_what_is_shorter_than_a_seal_is_called_cut_short(sealer: Envelope) -> None:
    """Whatever the length of the key's id; only what could be whole is tried with a key."""
    for keyring in (Keyring({"a": KEY}), Keyring({"a-much-longer-id": KEY})):
        sealed = Envelope(keyring).seal(HEAD, *PLACE, b"")
        (id,) = keyring.ids
        assert len(sealed) == 4 + len(id) + 12 + 16
        for end in range(2, len(sealed)):
            with pytest.raises(Tampered, match=r"^is cut short$"):
                Envelope.key_id(sealed[:end])
        assert Envelope.key_id(sealed) == id


def test_plain_records_are_told_from_rubbish() -> None:
    """A head or status is a MessagePack array of any length; nothing else is taken for one."""
    for first in range(256):
        data = bytes([first]) + b"x" * 40
        arrays = {*(len_ + 0x90 for len_ in range(16)), 0xDC, 0xDD}
        assert envelope.looks_plain(data) is (first in arrays)
    assert not envelope.looks_plain(b"")
    for count in (0, 1, 15, 16, 70_000):
        assert envelope.looks_plain(msgspec.msgpack.encode([0] * count))
