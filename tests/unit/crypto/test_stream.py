"""`millpond.crypto.stream`."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Iterable

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from millpond.crypto import stream
from millpond.crypto.stream import CHUNK_BYTES, HEADER_BYTES, TAG_BYTES, StreamOpener, StreamSealer
from millpond.errors import StoreMismatch, Tampered

PLACE = ("default", "orders", "0197a3c2-0000-7000-8000-000000000001")
SECRET = bytes(range(32))
SEALED_CHUNK = CHUNK_BYTES + TAG_BYTES


def seal(pieces: Iterable[bytes], place: tuple[str, str, str] = PLACE) -> bytes:
    sealer = StreamSealer(SECRET, 0, *place)
    sealed = b"".join(part for piece in pieces for part in sealer.feed(piece))
    return sealed + sealer.finish()


def unseal(sealed: bytes, step: int = 100_000, place: tuple[str, str, str] = PLACE, secret: bytes = SECRET) -> bytes:
    assert stream.generation(sealed[:HEADER_BYTES], *place) == 0
    opener = StreamOpener(secret, sealed[:HEADER_BYTES], *place)
    body = sealed[HEADER_BYTES:]
    opened = [part for at in range(0, len(body), step) for part in opener.feed(body[at : at + step])]
    return b"".join((*opened, opener.finish()))


SIZES = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, 3 * CHUNK_BYTES + 5]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("step", [65_536, CHUNK_BYTES, SEALED_CHUNK, 1 << 20])
def test_round_trip(size: int, step: int) -> None:
    data = os.urandom(size)
    sealed = seal(data[at : at + step] for at in range(0, size, step))
    assert len(sealed) == stream.sealed_size(size)
    assert unseal(sealed, step) == data


def test_how_the_payload_is_cut_does_not_matter() -> None:
    assert unseal(seal([b"", b"ab", b"", b"c"]), 1) == b"abc"


def test_the_format_is_as_written_down() -> None:
    header = b"\xc1S\x01" + bytes(4) + b"s" * 32
    place = "\0".join(PLACE).encode()
    aead = AESGCM(HKDFExpand(SHA256(), 32, b"millpond/1 stream\0" + header + place).derive(SECRET))
    first, last = b"x" * CHUNK_BYTES, b"y"
    sealed = header + aead.encrypt(bytes(12), first, header + place)
    sealed += aead.encrypt(bytes(10) + b"\1\1", last, header + place)
    assert unseal(sealed) == first + last


def test_two_streams_of_one_payload_have_nothing_in_common() -> None:
    first, second = seal([b"x" * 100]), seal([b"x" * 100])
    assert first[HEADER_BYTES:] != second[HEADER_BYTES:]
    with pytest.raises(Tampered):
        unseal(first[:HEADER_BYTES] + second[HEADER_BYTES:])


def chunk(number: int) -> slice:
    return slice(HEADER_BYTES + number * SEALED_CHUNK, HEADER_BYTES + (number + 1) * SEALED_CHUNK)


def without(sealed: bytes, number: int) -> bytes:
    return sealed[: chunk(number).start] + sealed[chunk(number).stop :]


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "cut at the first chunk's end": lambda sealed: sealed[: chunk(0).stop],
    "cut at the second chunk's end": lambda sealed: sealed[: chunk(1).stop],
    "cut after the header": lambda sealed: sealed[:HEADER_BYTES],
    "cut by a byte": lambda sealed: sealed[:-1],
    "cut within a tag": lambda sealed: sealed[: chunk(1).stop - 3],
    "first chunk gone": lambda sealed: without(sealed, 0),
    "second chunk gone": lambda sealed: without(sealed, 1),
    "swapped": lambda sealed: sealed[:HEADER_BYTES] + sealed[chunk(1)] + sealed[chunk(0)] + sealed[chunk(2)],
    "repeated": lambda sealed: sealed[: chunk(1).stop] + sealed[chunk(1)] + sealed[chunk(2)],
    "last repeated": lambda sealed: sealed + sealed[chunk(2)],
    "a byte more": lambda sealed: sealed + b"\0",
    "a chunk more": lambda sealed: sealed + bytes(SEALED_CHUNK),
    "another stream behind": lambda sealed: sealed + sealed,
}


@pytest.mark.parametrize("size", [3 * CHUNK_BYTES, 2 * CHUNK_BYTES + 7])
@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not_the_whole_stream_and_nothing_else_is_refused(name: str, size: int) -> None:
    changed = CHANGES[name](seal([os.urandom(size)]))
    with pytest.raises(Tampered, match=rf"^payload of message {PLACE[2]} in default/orders does not open at byte \d+"):
        unseal(changed)


@pytest.mark.parametrize("at", [3, 7, 38, HEADER_BYTES, chunk(0).stop - 1, chunk(1).start, chunk(1).stop, -1])
def test_a_flipped_byte_is_seen(at: int) -> None:
    sealed = bytearray(seal([bytes(2 * CHUNK_BYTES + 7)]))
    sealed[at] ^= 1
    opener = StreamOpener(SECRET, bytes(sealed[:HEADER_BYTES]), *PLACE)
    with pytest.raises(Tampered):
        b"".join((*opener.feed(sealed[HEADER_BYTES:]), opener.finish()))


def test_chunks_before_the_broken_one_come_out_and_none_after() -> None:
    sealed = bytearray(seal([b"a" * CHUNK_BYTES, b"b" * CHUNK_BYTES, b"c"]))
    sealed[chunk(1).start] ^= 1
    opener = StreamOpener(SECRET, bytes(sealed[:HEADER_BYTES]), *PLACE)
    opened = opener.feed(sealed[HEADER_BYTES:])
    assert next(opened) == b"a" * CHUNK_BYTES
    with pytest.raises(Tampered, match=f"at byte {CHUNK_BYTES}"):
        next(opened)


@pytest.mark.parametrize("place", [("x", *PLACE[1:]), (PLACE[0], "x", PLACE[2]), (*PLACE[:2], "x")])
def test_a_stream_of_another_message_does_not_open(place: tuple[str, str, str]) -> None:
    with pytest.raises(Tampered):
        unseal(seal([b"data"]), place=place)


def test_another_stream_key_does_not_open() -> None:
    with pytest.raises(Tampered):
        unseal(seal([b"data"]), secret=bytes(32))


def test_headers_that_are_none() -> None:
    header = seal([b""])[:HEADER_BYTES]
    with pytest.raises(Tampered, match="is cut short"):
        stream.generation(header[:-1], *PLACE)
    with pytest.raises(Tampered, match="is not a ciphertext"):
        stream.generation(b"x" + header[1:], *PLACE)
    with pytest.raises(StoreMismatch, match="encryption format 9; this Millpond reads up to 1"):
        stream.generation(header[:2] + b"\x09" + header[3:], *PLACE)


def test_memory_does_not_grow_with_the_payload() -> None:
    sealer = StreamSealer(SECRET, 0, *PLACE)
    piece = bytes(CHUNK_BYTES)
    opener: StreamOpener | None = None
    opened = 0
    tracemalloc.start()
    try:
        for _ in range(64):
            for part in sealer.feed(piece):
                if opener is None:
                    opener, part = StreamOpener(SECRET, part[:HEADER_BYTES], *PLACE), part[HEADER_BYTES:]
                opened += sum(map(len, opener.feed(part)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert opened >= 62 * CHUNK_BYTES
    assert peak < 12 * CHUNK_BYTES


def test_figures_of_the_format() -> None:
    """What is stored today must be readable tomorrow."""
    assert (HEADER_BYTES, CHUNK_BYTES, TAG_BYTES) == (39, 262_144, 16)


@pytest.mark.parametrize("number", [0, 1, 255, 256, 0x01020304, 2**32 - 1])
def test_the_generation_is_four_bytes(number: int) -> None:
    header = b"\xc1S\x01" + number.to_bytes(4) + bytes(32)
    assert stream.generation(header, *PLACE) == number
