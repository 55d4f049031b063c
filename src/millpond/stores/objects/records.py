"""What the objects hold, to bytes and back.

Each is a MessagePack array that begins with the format version and a write id: 16 random bytes, different with every
write, by which a writer whose reply got lost knows its own work again. An object of a message is padded, so that its
size tells a listing what it is: ``size % 16`` is the `Kind`, and the four bits above say for how long at least it stays
as it is (see `stays`). Of most objects that others hold nothing else need be read.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple, TypeVar

import msgspec

from millpond.errors import StoreCorrupt, StoreMismatch
from millpond.stores.base import Box, Item, Mark, Stored
from millpond.stores.objects.names import Name

FORMAT = 1
WRITE_ID_BYTES = 16
BIRTH_BYTES = 8
KEYS = 16
"""Former keys kept in a record."""
_MODULUS = 256
_LENGTH = 4

T = TypeVar("T")


class Kind(enum.IntEnum):
    """What the object of a message is; part of its size."""

    PLAIN = 1
    """Free, and due and expiring as its name says."""
    HELD = 2
    """Leased."""
    WAITING = 3
    """Free; its due time is another than the name's."""
    MOVING = 4
    """On its way into other objects: an `Intent`."""
    GONE = 5
    """Removed: a `Tombstone`, whose object will go as well."""
    OTHER = 6
    """Its expiry is another than the name's: only the record tells."""


class Record(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A message."""

    format: int
    write_id: bytes
    birth: bytes
    """Chance of its own for each record that was ever inserted, whatever becomes of it."""
    version: int
    """One more with each update; not with writes that leave the record's ETag alone."""
    namespace: str
    queue: str
    id: str
    priority: int
    group: str | None
    size: int
    external: bool
    due: int
    leased: bool
    expires: int | None
    box: int
    head: bytes
    status: bytes
    payload: bytes
    blob: str
    """The name of the payload stored apart, below the queue's; empty when it is inline."""
    state: bytes | None
    state_version: int
    """Only grows, also over a delete of the state."""
    via: str
    """The object that this one came out of; as long as that is there, this name must not become free: whoever finishes
    the move would write it again. Empty when it is known to be gone."""
    keys: tuple[bytes, ...] = ()
    """The keys that it had before, the last few: who has seen it under one of them means this record."""
    pledge: str = ""
    """The hash of its unique key, while that may not be confirmed. Who removes the message sees to it first: of a
    pending marker without a message others think that the message never came."""


class Target(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An object that an intent wants written."""

    path: str
    data: bytes
    birth: bytes


class Goal(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A marker that an intent wants written."""

    path: str
    data: bytes
    target: int
    """Whose it is: the number of the target that has the unique key or id; -1: it tells where a message went."""


class Intent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What becomes of a message: it is gone, and these objects are there in its place. To be finished by who wrote it,
    or by anybody once it is old."""

    format: int
    write_id: bytes
    origin: bytes
    """The write id of its first writer; kept by those who take it over to finish it."""
    birth: bytes
    version: int
    id: str
    targets: list[Target]
    goals: list[Goal]
    blob: str
    """The payload that goes with the message; empty when it stays."""
    via: str


class Tombstone(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A message was here."""

    format: int
    write_id: bytes
    birth: bytes
    version: int
    via: str


class Standing(enum.IntEnum):
    """How certain a marker is."""

    PENDING = 0
    """Its message may not be there yet."""
    CONFIRMED = 1
    GOING = 2
    """Somebody is about to delete it, for good reasons."""


class Marker(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Says that a unique key or an id is taken, and by whom."""

    format: int
    write_id: bytes
    standing: int
    birth: bytes
    version: int
    """Of the record when this was written: of two markers of one record the higher one is right."""
    id: str
    place: str
    """Where the message was put; in the dead box it has the same last part."""
    until: int
    """When a unique key ends, ms UTC. In an id marker, when the id is free again unless its message is there; 0: at
    once."""
    via: str
    """While pending: the object whose intent will bring the message; empty when it is a plain insert."""


class Pointer(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The first message of an ordering group."""

    format: int
    write_id: bytes
    place: str
    going: bool
    """Somebody is about to delete it."""


class Text(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A queue's document."""

    format: int
    write_id: bytes
    version: int
    data: bytes


class Root(msgspec.Struct, frozen=True):
    """The store's own object."""

    format: int
    store: str


Held = Record | Intent | Tombstone
"""What the object of a message may hold."""

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
"""A marker, pointer or document as bytes."""
_decoders: dict[type, msgspec.msgpack.Decoder[Any]] = {
    each: msgspec.msgpack.Decoder(each) for each in (Record, Intent, Tombstone, Marker, Pointer, Text)
}
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Form(NamedTuple):
    """What the size of a message's object tells."""

    kind: int
    code: int


def form(size: int) -> Form:
    """What an object of this size is; the kind may be none of `Kind`."""
    return Form(size % 16, size % _MODULUS >> 4)


def code_for(milliseconds: int) -> int:
    """How the padding says that a record stays as it is for this long: the exponent of two of the seconds, plus one."""
    return min(max(milliseconds // 1000, 0).bit_length(), 15)


def stays(code: int) -> int:
    """For how many milliseconds after it was written a record with this code stays held, or waiting, at least."""
    return 1000 << (code - 1) if code else 0


def _pad(body: bytes, kind: int, code: int) -> bytes:
    padding = (code << 4 | kind) - _LENGTH - len(body)
    return len(body).to_bytes(_LENGTH) + body + bytes(padding % _MODULUS)


def kind_of(record: Record, name: Name) -> Kind:
    """What a listing is to know of a record under this name."""
    if (None if record.expires is None else max(record.expires, 0)) != name.expires:
        return Kind.OTHER
    if record.leased:
        return Kind.HELD
    return Kind.PLAIN if record.due == name.time else Kind.WAITING


def encode_record(record: Record, name: Name, now: int) -> bytes:
    """A record as the bytes of its object; ``now`` is when it is written."""
    kind = kind_of(record, name)
    code = 0 if kind in (Kind.PLAIN, Kind.OTHER) else code_for(record.due - now)
    return _pad(encode(record), kind, code)


def encode_intent(intent: Intent) -> bytes:
    """An intent as the bytes of its object."""
    return _pad(encode(intent), Kind.MOVING, 0)


def encode_tombstone(tombstone: Tombstone) -> bytes:
    """A tombstone as the bytes of its object; its code is 1 if it must wait for another object to go."""
    return _pad(encode(tombstone), Kind.GONE, 1 if tombstone.via else 0)


def decode_held(data: bytes, path: str) -> Held:
    """What the object of a message holds. Raises StoreCorrupt, StoreMismatch."""
    kind = len(data) % 16
    expected: type[Held] = Intent if kind == Kind.MOVING else Tombstone if kind == Kind.GONE else Record
    end = _LENGTH + int.from_bytes(data[:_LENGTH])
    if end > len(data) or any(data[end:]):
        raise StoreCorrupt(f"object {path} is cut short or was changed; restore it from a backup, or delete it")
    return decode(expected, data[_LENGTH:end], path)


def decode(expected: type[T], data: bytes, path: str) -> T:
    """A marker, pointer or document. Raises StoreCorrupt, StoreMismatch."""
    try:
        found: T = _decoders[expected].decode(data)
    except _UNREADABLE as error:
        raise _undecodable(data, path, error) from error
    if found.format > FORMAT:  # type: ignore[attr-defined]
        raise _newer(path, found.format)  # type: ignore[attr-defined]
    return found


class _Versioned(msgspec.Struct, array_like=True):
    format: int


_versioned = msgspec.msgpack.Decoder(_Versioned)


def _undecodable(data: bytes, path: str, error: Exception) -> StoreCorrupt | StoreMismatch:
    # A newer format may have types where this one has others; that is no corruption.
    try:
        format = _versioned.decode(data).format
    except _UNREADABLE:
        format = 0
    if format > FORMAT:
        return _newer(path, format)
    return StoreCorrupt(f"object {path} cannot be decoded: {error}; restore it from a backup, or delete it")


def _newer(path: str, format: int) -> StoreMismatch:
    return StoreMismatch(f"object {path} has format {format}; this Millpond reads up to {FORMAT}: use a newer one")


# Records as the protocol has them


def etag(record: Record, name: Name) -> str:
    """The ETag of a record: its version, which record it is, and where it lies, so that who has it can find it."""
    return f"{record.version}-{record.birth.hex()}-{name.place}"


class Etag(NamedTuple):
    """An ETag taken apart."""

    version: int
    birth: bytes
    place: str


def parse_etag(text: str) -> Etag | None:
    """Take an ETag apart; None when it is none of this store's."""
    version, _, rest = text.partition("-")
    birth, _, place = rest.partition("-")
    try:
        return Etag(int(version), bytes.fromhex(birth), place) if place else None
    except ValueError:
        return None


def item(record: Record, name: Name) -> Item:
    """The record's identity."""
    return Item(
        record.namespace,
        record.queue,
        record.id,
        record.priority,
        record.group,
        record.size,
        record.external,
        name.key,
    )


def is_of(what: Item, record: Record, name: Name) -> bool:
    """Whether an item is that of this record, by the key that it has or had; one without a key is that of its id."""
    return what.key in (0, name.key) or what.key.to_bytes(16) in record.keys


def mark(record: Record, name: Name) -> Mark:
    """What of it changes."""
    return Mark(etag(record, name), record.due, record.leased, record.expires, Box(record.box))


def stored(record: Record, name: Name, payload: bool = False) -> Stored:
    """The record as the store returns it."""
    return Stored(
        item(record, name), mark(record, name), record.head, record.status, record.payload if payload else None
    )
