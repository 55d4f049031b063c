"""Sealed streams: payloads that are never held in memory as a whole.

The STREAM construction (Hoang, Reyhanitabar, Rogaway, Vizár: "Online Authenticated-Encryption and its Nonce-Reuse
Misuse-Resistance", 2015), laid out as in age (https://age-encryption.org/v1):

    0xC1 'S'    magic
    0x01        format version
    generation  4 bytes, big endian: which stream key of the vault
    salt        32 random bytes
    chunks      each 256 KiB of plaintext, sealed with AES-256-GCM (+ 16 bytes); the last one is shorter or equal, and
                empty only when the whole payload is

Each stream has a key of its own: HKDF-SHA256 from the vault's stream key, the info being salt, namespace, queue and
message id. So a nonce need only be unique within the stream: 11 bytes of chunk counter, and one byte that is 1 in the
last chunk. A chunk that was moved, repeated or left out has the wrong counter; a stream that was cut at a chunk's end
lacks the last mark, one that was lengthened has it in the wrong place. No plaintext leaves a chunk that did not open.

The payload of a stream cut within is found out at the end only: whoever reads must not act on it before the end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Final

from millpond.crypto.ciphers import AESGCM, InvalidTag
from millpond.crypto.envelope import context, derive
from millpond.errors import StoreMismatch, Tampered

MAGIC: Final = b"\xc1S"
VERSION: Final = 1
_SALT_BYTES = 32
"""Random per stream, for as many streams of one message as there may ever be."""
HEADER_BYTES: Final = 3 + 4 + _SALT_BYTES
CHUNK_BYTES: Final = 1 << 18
"""Plaintext bytes per chunk: 256 KiB hold up the event loop for 0.03 to 0.35 ms, and what each chunk costs besides is
lost in that. Part of the format."""
TAG_BYTES: Final = 16
_INFO = b"millpond/1 stream\0"


def sealed_size(size: int) -> int:
    """How many bytes a payload of ``size`` bytes takes when sealed."""
    return HEADER_BYTES + size + TAG_BYTES * max(1, -(-size // CHUNK_BYTES))


def is_sealed(data: bytes | bytearray) -> bool:
    """Whether ``data`` begins as a sealed stream does."""
    return data[:2] == MAGIC


def _nonce(counter: int, last: bool) -> bytes:
    return counter.to_bytes(11) + (b"\1" if last else b"\0")


class StreamSealer:
    """Turns one payload into its sealed stream: ``feed`` it, then ``finish``. What both yield is the stream, in
    order."""

    def __init__(
        self,
        secret: bytes,
        generation: int,
        namespace: str,
        queue: str,
        id: str,
        *,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.size = 0
        """Plaintext bytes taken in so far."""
        self._header = MAGIC + bytes((VERSION,)) + generation.to_bytes(4) + random_bytes(_SALT_BYTES)
        place = context(namespace, queue, id)
        self._aead = AESGCM(derive(secret, _INFO + self._header + place))
        self._additional = self._header + place
        self._unsent: bytes = self._header
        self._buffer = bytearray()
        self._counter = 0

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[bytes]:
        """Take in some of the payload."""
        self.size += len(data)
        self._buffer += data
        # One chunk stays behind even when it is full: only ``finish`` knows which is the last.
        while len(self._buffer) > CHUNK_BYTES:
            yield self._seal(bytes(self._buffer[:CHUNK_BYTES]), last=False)
            del self._buffer[:CHUNK_BYTES]

    def finish(self) -> bytes:
        """The end of the stream."""
        return self._seal(bytes(self._buffer), last=True)

    def _seal(self, chunk: bytes, last: bool) -> bytes:
        sealed = self._unsent + self._aead.encrypt(_nonce(self._counter, last), chunk, self._additional)
        self._unsent = b""
        self._counter += 1
        return sealed


class StreamOpener:
    """Turns a sealed stream back into its payload: ``feed`` it what follows the header, then ``finish``."""

    def __init__(self, secret: bytes, header: bytes, namespace: str, queue: str, id: str) -> None:
        place = context(namespace, queue, id)
        self._what = f"payload of message {id} in {namespace}/{queue}"
        self._aead = AESGCM(derive(secret, _INFO + header + place))
        self._additional = header + place
        self._buffer = bytearray()
        self._counter = 0

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[bytes]:
        """Take in some of the stream; yields the chunks that it completes. Raises Tampered."""
        self._buffer += data
        while len(self._buffer) > CHUNK_BYTES + TAG_BYTES:
            yield self._open(bytes(self._buffer[: CHUNK_BYTES + TAG_BYTES]), last=False)
            del self._buffer[: CHUNK_BYTES + TAG_BYTES]

    def finish(self) -> bytes:
        """The last chunk. Raises Tampered when what was fed is not the whole stream, and nothing but it."""
        return self._open(bytes(self._buffer), last=True)

    def _open(self, sealed: bytes, last: bool) -> bytes:
        try:
            chunk = self._aead.decrypt(_nonce(self._counter, last), sealed, self._additional)
        except InvalidTag:
            raise Tampered(
                f"{self._what} does not open at byte {self._counter * CHUNK_BYTES}: it was changed, cut, lengthened or "
                f"moved"
            ) from None
        self._counter += 1
        return chunk


def generation(header: bytes, namespace: str, queue: str, id: str) -> int:
    """Which stream key of the vault a stream that begins with ``header`` needs. Raises Tampered, StoreMismatch."""
    what = f"payload of message {id} in {namespace}/{queue}"
    if len(header) < HEADER_BYTES:
        raise Tampered(f"{what} is cut short")
    if not is_sealed(header):
        raise Tampered(f"{what} is not a ciphertext: it was changed, or written without a keyring")
    if header[2] != VERSION:
        raise StoreMismatch(f"{what} has encryption format {header[2]}; this Millpond reads up to {VERSION}")
    return int.from_bytes(header[3:7])
