"""`millpond.crypto.vault`."""

from __future__ import annotations

import msgspec
import pytest

from millpond.crypto.envelope import VAULT, Envelope
from millpond.crypto.keyring import Keyring
from millpond.crypto.vault import PLACE, Index, Vault
from millpond.errors import InvalidQueue, StoreMismatch, Tampered, UnknownKey
from millpond.model import names


def sealer(key_id: str = "a", key: bytes = bytes(32)) -> Envelope:
    return Envelope(Keyring({key_id: key}))


def test_round_trip_and_generations() -> None:
    vault = Vault.new()
    assert Vault.open(sealer(), vault.seal(sealer())) == vault
    later = vault.next_generation()
    assert later.index_key == vault.index_key
    assert later.stream_keys[:-1] == vault.stream_keys
    assert len({vault.index_key, *later.stream_keys}) == 3


def test_it_opens_with_its_own_root_key_alone() -> None:
    sealed = Vault.new().seal(sealer())
    with pytest.raises(UnknownKey, match=r"the store's key document needs root key 'a', which the keyring lacks"):
        Vault.open(sealer("b"), sealed)
    with pytest.raises(Tampered, match="the store's key document does not open"):
        Vault.open(sealer("a", b"x" * 32), sealed)


def test_a_newer_vault_and_one_that_is_none() -> None:
    newer = msgspec.structs.replace(Vault.new(), format=2).seal(sealer())
    with pytest.raises(StoreMismatch, match="format 2"):
        Vault.open(sealer(), newer)
    with pytest.raises(Tampered, match="not that of a vault"):
        Vault.open(sealer(), sealer().seal(VAULT, *PLACE, "", msgspec.msgpack.encode("nonsense")))


def test_no_queue_can_be_named_as_the_vault() -> None:
    with pytest.raises(InvalidQueue):
        names.namespace_name(PLACE[0])
    with pytest.raises(InvalidQueue):
        names.queue_name(PLACE[1])


def test_a_vault_shows_no_key() -> None:
    vault = Vault.new()
    assert repr(vault) == "Vault(generations=1)"


def test_the_index_hides_keys_and_keeps_them_apart() -> None:
    index = Index(bytes(32))
    first = index.hash("group", "default", "orders", "customer-7")
    assert first == Index(bytes(32)).hash("group", "default", "orders", "customer-7")
    assert len(first) == 32
    others = {
        index.hash("unique", "default", "orders", "customer-7"),
        index.hash("group", "other", "orders", "customer-7"),
        index.hash("group", "default", "other", "customer-7"),
        index.hash("group", "default", "orders", "customer-8"),
        Index(b"x" * 32).hash("group", "default", "orders", "customer-7"),
        index.hash("group", "default", "orders", "\udcff"),
        index.hash("group", "default", "orders", ""),
    }
    assert len(others | {first}) == 8


def test_keys_are_of_256_bits_and_cannot_be_changed() -> None:
    vault = Vault.new().next_generation()
    assert [len(key) for key in (vault.index_key, *vault.stream_keys)] == [32, 32, 32]
    with pytest.raises(AttributeError, match="immutable"):
        vault.index_key = b""  # type: ignore[misc]
