"""The names of objects: the only place that knows them.

    millpond.json                               which format this is
    clock/<chance>                              written and deleted at each opening, to compare clocks
    probe.json                                  a note that the bucket's writes are conditional
    probe/<chance>/…                            what was written to find that out; removed again
    q/<namespace>/<queue>/m/<lane>/<name>       live messages
    q/<namespace>/<queue>/d/<name>              dead letters
    q/<namespace>/<queue>/u/<hash>              unique-key markers
    q/<namespace>/<queue>/i/<id>                id markers
    q/<namespace>/<queue>/g/<hash>              which message of an ordering group is the first
    q/<namespace>/<queue>/b/<id>-<time>-<chance>   payloads stored apart; with .<time> a sign that one is on its way
    q/<namespace>/<queue>/policy                the queue's document

The lane of a live message is ``9 - priority``, so that what is to be handed out first is listed first, or ``o`` if it
has an ordering group. ``<name>`` holds what never changes and a listing should tell, and sorts by time:
``<key>-<id>-<size>-<expires>-<group>``. The key is 128 bits, of which the upper 48 are the time (ms UTC) when the
message was to be due, or entered its group; the rest is chance. A name of a message is never used twice.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import NamedTuple

from millpond.errors import StoreCorrupt
from millpond.stores.base import Box

ROOT = "millpond.json"
PROBE_NOTE = "probe.json"
PROBES = "probe/"
QUEUES = "q/"
CLOCKS = "clock/"
GROUP_LANE = "o"
LANES = (*"0123456789", GROUP_LANE)

KEY_BITS = 80
"""Bits of a key below its time, as in a UUIDv7."""
_LOW = (1 << KEY_BITS) - 1
LATEST = (1 << 48) - 1
"""The last millisecond that a key can tell, in the year 10889."""
HASH = 16
"""Hex digits of a group's hash in a name. Two groups of a queue that share one would wait for each other, no more."""


class Name(NamedTuple):
    """The name of a message's object, taken apart."""

    path: str
    """All of it."""
    namespace: str
    queue: str
    box: Box
    lane: str
    """Empty in the dead box."""
    key: int
    id: str
    size: int
    expires: int | None
    group: str
    """The group's hash; empty without one."""
    priority: int | None
    """None where the name does not tell: of dead letters without a group."""

    @property
    def time(self) -> int:
        """When it was to be due, or entered its group."""
        return self.key >> KEY_BITS

    @property
    def place(self) -> str:
        """The part within the queue: what an ETag says."""
        return self.path[len(folder(self.namespace, self.queue)) :]

    @property
    def last(self) -> str:
        """The part that it keeps in the other box."""
        return self.path.rsplit("/", 1)[1]


@lru_cache(maxsize=4096)
def folder(namespace: str, queue: str) -> str:
    """Everything of a queue is below this."""
    return f"{QUEUES}{namespace}/{queue}/"


def box_prefix(namespace: str, queue: str, box: Box) -> str:
    """What the names of a box begin with."""
    return f"{folder(namespace, queue)}{'m' if box is Box.LIVE else 'd'}/"


def lane_of(priority: int, group: str | None) -> str:
    """The lane of a live message."""
    return GROUP_LANE if group is not None else str(9 - priority)


def hex_id(id: str) -> str:
    """A message id without its hyphens."""
    return id.replace("-", "")


def dashed(id: str) -> str:
    """A message id in hex with its hyphens."""
    return f"{id[:8]}-{id[8:12]}-{id[12:16]}-{id[16:20]}-{id[20:]}"


def id_number(id: str) -> int:
    """A message id as a number: its key, if the id tells when the message is due."""
    return int(hex_id(id), 16)


def key_of(time: int, number: int) -> int:
    """The key with this time, and the chance of this number."""
    return min(max(time, 0), LATEST) << KEY_BITS | number & _LOW


def group_hash(group: str) -> str:
    """A group as names tell of it."""
    return hashlib.sha256(group.encode("utf-8", "surrogatepass")).hexdigest()[:HASH]


def message(
    namespace: str,
    queue: str,
    box: Box,
    *,
    key: int,
    id: str,
    priority: int,
    size: int,
    expires: int | None,
    group: str | None,
) -> Name:
    """The name for a message."""
    hashed = "" if group is None else group_hash(group)
    lane = lane_of(priority, group) if box is Box.LIVE else ""
    told = "" if expires is None else f"{max(expires, 0):x}"
    last = f"{key:032x}-{hex_id(id)}-{size:x}-{told}-{f'{hashed}{priority}' if hashed else ''}"
    path = f"{box_prefix(namespace, queue, box)}{f'{lane}/' if lane else ''}{last}"
    expires = None if expires is None else max(expires, 0)
    return Name(path, namespace, queue, box, lane, key, id, size, expires, hashed, priority)


def parse(path: str) -> Name:
    """Take a message's name apart. Raises StoreCorrupt for one that is none."""
    try:
        parts = path.split("/")
        if len(parts) == 6 and parts[3] == "m":
            _, namespace, queue, _, lane, last = parts
            box = Box.LIVE
        else:
            _, namespace, queue, dead, last = parts
            if dead != "d":
                raise ValueError(dead)
            box, lane = Box.DEAD, ""
        key, id, size, expires, group = last.split("-")
        if len(key) != 32 or len(id) != 32 or (group and len(group) != HASH + 1):
            raise ValueError(last)
        priority = int(group[-1]) if group else 9 - int(lane) if lane else None
        return Name(
            path,
            namespace,
            queue,
            box,
            lane,
            int(key, 16),
            dashed(id),
            int(size, 16),
            int(expires, 16) if expires else None,
            group[:-1],
            priority,
        )
    except ValueError:
        raise StoreCorrupt(f"object {path} has no name that Millpond gives; move it out of the prefix") from None


def in_box(name: Name, box: Box, priority: int) -> Name:
    """The name of the same message in the other box, where it keeps its last part."""
    lane = "" if box is Box.DEAD else GROUP_LANE if name.group else str(9 - priority)
    path = f"{box_prefix(name.namespace, name.queue, box)}{f'{lane}/' if lane else ''}{name.last}"
    return name._replace(path=path, box=box, lane=lane, priority=priority)


def of_place(namespace: str, queue: str, place: str) -> Name:
    """The name that an ETag or a marker tells. Raises StoreCorrupt."""
    return parse(folder(namespace, queue) + place)


def key_prefix(key: int) -> str:
    """What the last parts of names with this key begin with."""
    return f"{key:032x}-"


def after_key(key: int) -> str:
    """Above all last parts with this key, and below those with the next."""
    return f"{key:032x}~"


def key_hash(key: str) -> str:
    """A unique key as names tell of it."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def unique_marker(namespace: str, queue: str, key: str) -> str:
    """The marker of a unique key."""
    return f"{folder(namespace, queue)}u/{key_hash(key)}"


def id_marker(namespace: str, queue: str, id: str) -> str:
    """The marker of a message id."""
    return f"{folder(namespace, queue)}i/{hex_id(id)}"


def pointer(namespace: str, queue: str, group: str) -> str:
    """The pointer to the first of a group, given by its hash."""
    return f"{folder(namespace, queue)}g/{group}"


def markers_prefix(namespace: str, queue: str, kind: str) -> str:
    """All unique-key markers (``u``), id markers (``i``) or pointers (``g``) of a queue."""
    return f"{folder(namespace, queue)}{kind}/"


def consumers(namespace: str, queue: str) -> str:
    """What processes say that compete for a queue's messages."""
    return f"{folder(namespace, queue)}c/"


def consumer(namespace: str, queue: str, process: bytes) -> str:
    """What one of them says."""
    return consumers(namespace, queue) + process.hex()


def clock(chance: bytes) -> str:
    """An object that tells what time it is in the bucket."""
    return f"{CLOCKS}{chance.hex()}"


def policy(namespace: str, queue: str) -> str:
    """The queue's document."""
    return f"{folder(namespace, queue)}policy"


class BlobName(NamedTuple):
    """The name of a payload stored apart, taken apart."""

    path: str
    id: str
    """The message's id in hex, without hyphens."""
    written: int
    """When its upload began; of a sign of life, when that was given."""
    payload: str
    """The name of the payload; another than its own for a sign of life."""


def blobs_prefix(namespace: str, queue: str) -> str:
    """All payloads stored apart of a queue."""
    return f"{folder(namespace, queue)}b/"


def blob(namespace: str, queue: str, id: str, written: int, chance: bytes) -> str:
    """A new name for a payload, below the queue's `blobs_prefix`."""
    return f"{hex_id(id)}-{min(max(written, 0), LATEST):012x}-{chance.hex()}"


def sign_of_life(blob: str, time: int) -> str:
    """The name of an object that says that the upload of this payload was going on."""
    return f"{blob}.{min(max(time, 0), LATEST):012x}"


def parse_blob(path: str) -> BlobName | None:
    """Take the name of a payload, or of a sign of life, apart; None when it is none."""
    last = path.rsplit("/", 1)[-1]
    told, dot, later = last.partition(".")
    parts = told.split("-")
    try:
        if len(parts) != 3 or len(parts[0]) != 32:
            return None
        payload = path[: len(path) - len(dot) - len(later)]
        return BlobName(path, parts[0], int(later if dot else parts[1], 16), payload)
    except ValueError:
        return None


def last_part(path: str) -> str:
    """The part after the last slash."""
    return path.rstrip("/").rsplit("/", 1)[-1]
