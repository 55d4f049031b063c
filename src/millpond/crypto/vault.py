"""The store's own keys: random, kept in the store sealed under a root key, and rewrapped when that changes.

Two things must outlive a root key. The **index key** turns ordering and dedup keys into what the store's indexes
hold: were it derived from a root key, each rotation would part the messages of an ordering key and forget what was
enqueued already. The **stream keys** open payloads stored apart, so that a rekey need not rewrite gigabytes: it
rewraps these 32 bytes, and adds a new stream key for the payloads to come.

So whoever had an old root key *and* read the store while that root key was in use keeps the power to guess ordering
and dedup keys, and to read the streams written in that time. Old root key and *later* store open nothing.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable

import msgspec

from millpond.crypto.envelope import VAULT, Envelope
from millpond.crypto.place import PLACE
from millpond.errors import StoreMismatch, Tampered

FORMAT = 1
_KEY_BYTES = 32
_INDEX_BYTES = 16
"""128 bits: two of a million million keys share a stand-in with probability 1e-15."""


class Vault(msgspec.Struct, frozen=True, array_like=True):
    """The store's keys in the clear."""

    format: int
    index_key: bytes
    stream_keys: tuple[bytes, ...]
    """By generation; the last one is used for new payloads."""

    def __repr__(self) -> str:
        return f"Vault(generations={len(self.stream_keys)})"

    @classmethod
    def new(cls, random_bytes: Callable[[int], bytes] = os.urandom) -> Vault:
        """Fresh keys."""
        return cls(FORMAT, random_bytes(_KEY_BYTES), (random_bytes(_KEY_BYTES),))

    def next_generation(self, random_bytes: Callable[[int], bytes] = os.urandom) -> Vault:
        """The same keys and one more stream key."""
        return msgspec.structs.replace(self, stream_keys=(*self.stream_keys, random_bytes(_KEY_BYTES)))

    def seal(self, envelope: Envelope) -> bytes:
        """The vault under the newest root key."""
        return envelope.seal(VAULT, *PLACE, "", msgspec.msgpack.encode(self))

    @classmethod
    def open(cls, envelope: Envelope, sealed: bytes) -> Vault:
        """Raises UnknownKey, Tampered (also for another root key of the same id), StoreMismatch."""
        data = envelope.open(VAULT, *PLACE, "", sealed)
        try:
            vault = _decoder.decode(data)
        except msgspec.DecodeError:
            # Not chained: a decoder's error may quote what it read.
            raise Tampered("the store's key document opens, but what it says is not that of a vault") from None
        if vault.format > FORMAT:
            raise StoreMismatch(f"the store's key document has format {vault.format}; this Millpond reads {FORMAT}")
        return vault


_decoder = msgspec.msgpack.Decoder(Vault)


class Index:
    """Replaces ordering and dedup keys by keyed hashes (HMAC-SHA256), each bound to its queue and its use."""

    __slots__ = ("_mac",)

    def __init__(self, index_key: bytes) -> None:
        # Keyed once and copied for each use: half the price of starting anew.
        self._mac = hmac.new(index_key, digestmod="sha256")

    def hash(self, use: str, namespace: str, queue: str, key: str) -> str:
        """The key's stand-in: 32 hexadecimal digits; the same key gives the same, for ever and in every process."""
        mac = self._mac.copy()
        # Surrogates can come from file names and environment variables.
        mac.update(f"{use}\0{namespace}\0{queue}\0{key}".encode("utf-8", "surrogatepass"))
        return mac.hexdigest()[: 2 * _INDEX_BYTES]
