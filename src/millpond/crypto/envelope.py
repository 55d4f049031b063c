"""Sealed records: AES-256-GCM under a key that belongs to one message alone.

    0xC1 'M'   magic: 0xC1 begins no MessagePack value, no JSON and no UTF-8 text
    0x01       format version
    n          length of the key id
    key id     n bytes, which root key
    nonce      12 bytes
    ciphertext and 16 bytes of tag

**Key.** HKDF-SHA256 from the root key, the info being namespace, queue and message id. One derivation serves all
parts of a message (head, status, payload, state), because deriving costs several times what sealing a small part
does.

**Additional data.** Everything before the nonce, the context again, and the *kind* of the part. A head put in the
place of a status, or a part of one message in the place of another's, does not open.

**Nonces** are 96 random bits, fresh for each write. One key seals one message's head and payload once, its state at
each save, and its status at each delivery. The bound for random nonces is 2**32 writes under one key (NIST SP
800-38D, 8.3); a message delivered once a millisecond would take 49 days to get there. They come from the operating
system at each write rather than from a pool in the process, which a fork or a restored snapshot of the machine would
use twice.

What this cannot see: an *older* ciphertext of the same part put back in its place, and a record removed altogether.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Final, NewType

from millpond.crypto.ciphers import AESGCM, SHA256, HKDFExpand, InvalidTag
from millpond.crypto.keyring import Keyring
from millpond.errors import StoreMismatch, Tampered, UnknownKey

MAGIC: Final = b"\xc1M"
VERSION: Final = 1
NONCE_BYTES: Final = 12
_TAG_BYTES = 16
_INFO = b"millpond/1 record\0"

MAX_CIPHERS: Final = 8192
"""Ciphers kept, of the messages used last; about 3 KiB each, 25 MiB in all. Twice what a ready cache holds, so that a
message filled in from the store is still here when it is claimed and acked."""


Kind = NewType("Kind", bytes)
"""Which part of a message, or which document. Bytes and no enum: each write pays for what it adds to them."""

HEAD: Final = Kind(b"h")
STATUS: Final = Kind(b"s")
PAYLOAD: Final = Kind(b"p")
STATE: Final = Kind(b"w")
DOCUMENT: Final = Kind(b"d")
VAULT: Final = Kind(b"v")

_PARTS = {
    HEAD: "head",
    STATUS: "status",
    PAYLOAD: "payload",
    STATE: "state",
    DOCUMENT: "document",
}


def context(namespace: str, queue: str, id: str) -> bytes:
    """Where something belongs, as bytes. No name or id holds a NUL, so no two places have the same bytes."""
    return f"{namespace}\0{queue}\0{id}".encode()


def derive(secret: bytes, info: bytes) -> bytes:
    """A 32-byte key from a uniformly random secret: HKDF-Expand with SHA-256 (RFC 5869, 2.3)."""
    return HKDFExpand(SHA256(), 32, info).derive(secret)


def describe(kind: Kind, namespace: str, queue: str, id: str) -> str:
    """How errors name a part."""
    if kind == VAULT:
        return "the store's key document"
    if kind == DOCUMENT:
        return f"the document of queue {namespace}/{queue}"
    return f"{_PARTS[kind]} of message {id} in {namespace}/{queue}"


def is_sealed(data: bytes) -> bool:
    """Whether ``data`` begins as a sealed record does."""
    return data[:2] == MAGIC


def looks_plain(data: bytes) -> bool:
    """Whether ``data`` begins as the MessagePack array that a head or status is when it is not sealed."""
    return bool(data) and (0x90 <= data[0] <= 0x9F or data[0] in {0xDC, 0xDD})


class MessageCipher:
    """Seals the parts of one message under one root key."""

    __slots__ = ("_additional", "_decrypt", "_encrypt", "_start", "prefix")

    def __init__(self, root: bytes, key_id: str, place: bytes) -> None:
        self.prefix = _prefix(key_id)
        aead = AESGCM(derive(root, _INFO + place))
        self._encrypt = aead.encrypt
        self._decrypt = aead.decrypt
        self._additional = self.prefix + place + b"\0"
        self._start = len(self.prefix)

    def seal(self, kind: Kind, data: bytes, nonce: bytes) -> bytes:
        """``data`` as a sealed part. ``nonce``: 12 fresh random bytes."""
        return self.prefix + nonce + self._encrypt(nonce, data, self._additional + kind)

    def open(self, kind: Kind, sealed: bytes) -> bytes:
        """What ``seal`` was given; ``sealed`` begins with ``prefix``. Raises cryptography's InvalidTag."""
        start = self._start
        end = start + NONCE_BYTES
        if len(sealed) < end + _TAG_BYTES:
            raise InvalidTag
        return self._decrypt(sealed[start:end], sealed[end:], self._additional + kind)


def _prefix(key_id: str) -> bytes:
    return MAGIC + bytes((VERSION, len(key_id))) + key_id.encode()


class Envelope:
    """Seals with the newest key of a keyring, opens with any of them.

    ``random_bytes`` is where nonces come from; anything but the default is for tests.
    """

    def __init__(
        self, keyring: Keyring, *, random_bytes: Callable[[int], bytes] = os.urandom, ciphers: int = MAX_CIPHERS
    ) -> None:
        self.keyring = keyring
        self.random_bytes = random_bytes
        self._newest = keyring.newest
        self._newest_prefix = _prefix(keyring.newest)
        # The one written in C: a look-up costs a tenth of a microsecond.
        self._ciphers = lru_cache(maxsize=ciphers)(self._derive)

    def _derive(self, key_id: str, namespace: str, queue: str, id: str) -> MessageCipher:
        return MessageCipher(self.keyring.root(key_id), key_id, context(namespace, queue, id))

    def cipher(self, namespace: str, queue: str, id: str) -> MessageCipher:
        """The cipher of a message under the newest key."""
        return self._ciphers(self._newest, namespace, queue, id)

    def seal(self, kind: Kind, namespace: str, queue: str, id: str, data: bytes) -> bytes:
        """Seal one part under the newest key."""
        return self._ciphers(self._newest, namespace, queue, id).seal(kind, data, self.random_bytes(NONCE_BYTES))

    def open(self, kind: Kind, namespace: str, queue: str, id: str, sealed: bytes) -> bytes:
        """Open one part. Raises UnknownKey, Tampered, StoreMismatch; each names the part."""
        try:
            if sealed.startswith(self._newest_prefix):
                return self._ciphers(self._newest, namespace, queue, id).open(kind, sealed)
            return self._ciphers(self.key_id(sealed), namespace, queue, id).open(kind, sealed)
        except InvalidTag:
            raise Tampered(
                f"{describe(kind, namespace, queue, id)} does not open: it was changed, cut or moved, or written with "
                f"another root key of the same id"
            ) from None
        except (UnknownKey, Tampered, StoreMismatch) as error:
            raise type(error)(f"{describe(kind, namespace, queue, id)} {error}") from None

    def is_current(self, sealed: bytes) -> bool:
        """Whether ``sealed`` was written with the newest key."""
        return sealed.startswith(self._newest_prefix)

    @staticmethod
    def key_id(sealed: bytes) -> str:
        """The root key that ``sealed`` was written with. Raises Tampered, StoreMismatch (neither names the part)."""
        if sealed[:2] != MAGIC:
            if looks_plain(sealed):
                raise StoreMismatch(
                    "is not encrypted, but the store was opened with a keyring: open it without one, or encrypt it: "
                    "connect(…, keyring=…, accept_plain=True), then rekey(encrypt_plain=True)"
                )
            raise Tampered("is not a ciphertext: it was changed, or written without a keyring")
        if len(sealed) < 4 or len(sealed) < 4 + sealed[3] + NONCE_BYTES + _TAG_BYTES:
            raise Tampered("is cut short")
        if sealed[2] != VERSION:
            raise StoreMismatch(f"has encryption format {sealed[2]}; this Millpond reads up to {VERSION}")
        # A changed id is as good as any other id that the keyring lacks, whatever its bytes.
        return sealed[4 : 4 + sealed[3]].decode("ascii", "backslashreplace")

    def statistics(self) -> dict[str, int]:
        """ciphers_cached, ciphers_derived, ciphers_reused."""
        info = self._ciphers.cache_info()
        return {"ciphers_cached": info.currsize, "ciphers_derived": info.misses, "ciphers_reused": info.hits}
