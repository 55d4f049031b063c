"""The store protocol: conditional primitives on records, batch first.

What a store may know of a message: where it belongs (namespace, queue, id), when it is due, its priority, when it
expires, whether somebody holds it, whether it lies in the live or the dead box, its ordering group, and sizes. Head,
status, payload and state are bytes to it. It never decides what may happen to a message: that is the life cycle's
and the service's business. What a store owes in return:

1. Every write is conditional on the ETag that the caller last saw; of several writers with one ETag exactly one wins.
2. ``write`` applies each op on its own; ``commit`` applies all of its ops or none.
3. When ``write`` or ``commit`` returns, its effects survive whatever the store's medium survives (for SQLite: loss of
   power). When they raise, nothing of the call was applied, unless the error says that the outcome is unknown.
4. Order: ``ready`` yields higher priority first, then earlier due time, then earlier insertion.
5. A record with an ordering group is *ready* only if no record that entered that group earlier is still in the live
   box of its queue. Entering is the insert, or the return from the dead box: one that comes back joins at the end, so
   that it can never become ready beside one that is held.
6. A removed record takes payload and state with it in the same step.
7. A payload stored apart belongs to the one record whose insert named it. Two of one message id never mix: that of a
   refused insert falls to ``sweep``.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import msgspec

from millpond.errors import MillpondError


class Box(enum.IntEnum):
    """Where a record lies in its queue."""

    LIVE = 0
    DEAD = 1


class Reach(enum.Enum):
    """Who can open the same store at the same time."""

    PROCESS = "process"
    HOST = "host"
    NETWORK = "network"


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a store can do, for those who plan around it."""

    name: str
    reach: Reach
    atomic_groups: bool
    conditional_delete: bool
    change_feed: bool
    durable: bool
    inline_limit: int
    """Largest payload, bytes, that belongs in the record; larger ones go to a blob."""
    hand_offs: bool = False
    """`Store.commit` takes a ``Remove`` followed by ``Insert`` ops: in the end all of them are applied or none, however
    many die on the way, but others may see some of them before the rest. ``atomic_groups`` promises more."""
    insertion_order: bool = True
    """A larger ``Item.key`` means a later insert, and lists and what is due at the same moment are in that order.
    Otherwise keys, lists and ties are in order of due time, or of entry for records with a group, by the clocks of
    those who inserted them."""
    sees_behind: bool = True
    """`ReadyPage.next_due` is right also where ``more`` is true. Otherwise it may then be missing, or too late."""
    guards_groups: bool = False
    """It refuses to lease a record that its group blocks (`Cause.BLOCKED`); others only leave it out of ``ready``."""
    takes: bool = False
    """It can choose and write in one step (`Store.take`), so that consumers never compete for the same records."""
    requests_cost_money: bool = False
    encrypted: bool = False
    """What it stores is unreadable without its keyring."""


class Item(msgspec.Struct, frozen=True, gc=False):
    """Identity of a stored record and the facts about it that never change."""

    namespace: str
    queue: str
    id: str
    priority: int
    group: str | None
    """The ordering group within the queue."""
    size: int
    """Bytes of payload as its owner counts them, for ``counts``; the bytes stored may be more (encryption)."""
    external: bool
    """The payload is a blob that ``write_blob`` stored; the insert names it."""
    key: int = 0
    """The store's own locator and insertion rank; meaningless to others except that within one store a larger one was
    inserted later. 0 before the insert."""


class Mark(msgspec.Struct, frozen=True, gc=False):
    """The changeable facts about a stored record, and the ETag of that version."""

    etag: str
    due: int
    """When it is next worth looking at, ms UTC: visible-at of a free message, end of the lease of a held one."""
    leased: bool
    """Somebody holds it (until ``due``)."""
    expires: int | None
    """When it expires, ms UTC."""
    box: Box


class Stored(msgspec.Struct, frozen=True, gc=False):
    """A record as read."""

    item: Item
    mark: Mark
    head: bytes
    status: bytes
    payload: bytes | None = None
    """The inline payload, where it was asked for."""


class Unique(msgspec.Struct, frozen=True, gc=False):
    """At most one insert with this key per queue until ``until`` (ms UTC)."""

    key: str
    now: int
    until: int


class Serial(msgspec.Struct, frozen=True, gc=False):
    """Which of a producer's requests an insert belongs to, so that one that is sent again is known as long as
    ``until`` (ms UTC) at least, whatever has become of its messages.

    Requests of a session come one after the other, and their numbers rise. So a store needs to keep of each session
    only the last that was carried out, whose inserts it applies in one step: a record for each session, not for each
    message. (MongoDB's retryable writes do the same.) A store that has no such step keeps the ids of these inserts
    instead, where they are ``fresh``.
    """

    session: str
    number: int
    """1 to 2^53 - 1."""
    first: str
    """The id of the first message of the request: a number that is given to two requests is found out by it."""
    now: int
    until: int
    fresh: bool = True
    """The ids were made for this request, and no other message will ever have them."""


class Insert(msgspec.Struct, frozen=True, gc=False):
    """Insert a record if neither its id nor a live ``unique`` key is there, and its request was not carried out before.

    Outcome: ``Inserted``, or ``Conflict`` with the id of the record that is in the way. Raises StoreError when nothing
    is in the way, but the payload is external and ``blob`` is not there, or another record's.
    """

    item: Item
    due: int
    expires: int | None
    head: bytes
    status: bytes
    payload: bytes
    """The inline payload; empty when external."""
    unique: Unique | None = None
    blob: str = ""
    """`Blob.name` of the payload, as ``write_blob`` returned it; empty unless external. It is this record's from now
    on."""
    chosen: bool = False
    """The id was chosen by the caller, and may be there already. Otherwise an `IdSource` made it for this insert: it is
    nobody else's, and its time is about when the record comes due (for one with a group, when it was made)."""
    serial: Serial | None = None
    """The inserts of one call that belong to one request have the same object here, and follow one another. Only with
    a ``chosen`` id. Of a request that was carried out before, they are refused with ``EXISTS`` or ``UNIQUE``, as if
    their records were there still."""


class Update(msgspec.Struct, frozen=True, gc=False):
    """Replace the status if the record's ETag is still ``mark.etag``. Outcome: ``Updated`` or ``Conflict``.

    ``box`` may differ from ``mark.box``: that is how a record becomes a dead letter and comes back. Payload and state
    stay with the record.
    """

    item: Item
    mark: Mark
    due: int
    leased: bool
    expires: int | None
    box: Box
    status: bytes
    want_payload: bool = False
    """Return the inline payload in the outcome (for claims)."""


class Remove(msgspec.Struct, frozen=True, gc=False):
    """Remove record, payload and state if the ETag is still ``mark.etag``. Outcome: ``Removed`` or ``Conflict``."""

    item: Item
    mark: Mark


class Reseal(msgspec.Struct, frozen=True, gc=False):
    """Replace the bytes of a record if its ETag is still ``mark.etag``: they say the same, under another key.

    Box, due time, lease, expiry, group and counts stay, and nobody needs waking. Record and state keep their ETags
    where the store can do that, so that a consumer at work notices nothing; where it cannot, ``Updated.mark`` has the
    new one. Outcome: ``Updated`` (without payload), or ``Conflict``: ``STALE``, ``MISSING``, or ``STATE`` when the
    state document is not the expected one any more.
    """

    item: Item
    mark: Mark
    head: bytes
    status: bytes
    payload: bytes | None
    """The new inline payload; None leaves it alone."""
    state: Document | None
    """The new state bytes, with the ETag that the state must still have; None leaves the state alone."""


class PutState(msgspec.Struct, frozen=True, gc=False):
    """Write the state document of a record whose ETag is still ``mark.etag``.

    ``expect`` is the state's ETag, or None for "there is none yet". Outcome: ``StateWritten`` or ``Conflict``.
    """

    item: Item
    mark: Mark
    expect: str | None
    data: bytes


class DropState(msgspec.Struct, frozen=True, gc=False):
    """Delete the state document, under the same conditions. Outcome: ``StateWritten`` (etag ""), or ``Conflict``."""

    item: Item
    mark: Mark
    expect: str


class PutDocument(msgspec.Struct, frozen=True, gc=False):
    """Write a queue's document (its policy) if its ETag is still ``expect`` (None: it has none yet).

    Outcome: ``DocumentWritten`` or ``Conflict``.
    """

    namespace: str
    queue: str
    expect: str | None
    data: bytes


Op = Insert | Update | Remove | Reseal | PutState | DropState | PutDocument


class Inserted(msgspec.Struct, frozen=True, gc=False):
    """The record is in."""

    asked: Item
    """As the insert had it, or with its key."""
    mark: Mark
    key: int = 0
    """Its key, unless ``asked`` has it: of a thousand inserts few are ever asked for what `item` makes of that."""

    @property
    def item(self) -> Item:
        """The record's item, with its key."""
        return msgspec.structs.replace(self.asked, key=self.key) if self.key else self.asked


class Updated(msgspec.Struct, frozen=True, gc=False):
    """The record was replaced."""

    mark: Mark
    payload: bytes | None


class Removed(msgspec.Struct, frozen=True, gc=False):
    """The record is gone."""


class StateWritten(msgspec.Struct, frozen=True, gc=False):
    """The state document has this ETag now."""

    etag: str


class DocumentWritten(msgspec.Struct, frozen=True, gc=False):
    """The queue's document has this ETag now."""

    etag: str


class Cause(enum.Enum):
    """Which condition of an op did not hold."""

    EXISTS = "exists"
    """The id is taken."""
    UNIQUE = "unique"
    """The unique key is taken; ``Conflict.id`` says by which message."""
    STALE = "stale"
    """The record has another ETag."""
    MISSING = "missing"
    """There is no such record."""
    STATE = "state"
    """The state or document has another ETag than expected."""
    PASSED = "passed"
    """The session of the insert has carried out a later request, or another one with this number."""
    BLOCKED = "blocked"
    """The record cannot be leased before another of its ordering group has left the live box (see
    `Capabilities.guards_groups`)."""
    ABORTED = "aborted"
    """Another op of the same ``commit`` failed, so this one was not applied."""


class Conflict(msgspec.Struct, frozen=True, gc=False):
    """The op was not applied."""

    cause: Cause
    id: str = ""


Outcome = Inserted | Updated | Removed | StateWritten | DocumentWritten | Conflict


Decide = Callable[[Stored], tuple[Update | Remove, Any] | None]
"""What `Store.take` asks about a ready record: the op that settles it, with whatever the asker wants back beside the
outcome; or None to leave the record where it is. Plain computation: it runs while the store is locked, and runs again
for the same records when the step has to be repeated."""


class Page(NamedTuple):
    """Some records in order of insertion, and the key to continue after (None: that was all)."""

    records: list[Stored]
    next_after: int | None


class ReadyPage(NamedTuple):
    """Due records in hand-out order."""

    records: list[Stored]
    more: bool
    """There are due records beyond these."""
    next_due: int | None
    """When the earliest record that is not due yet becomes due (ms UTC); None when there is none. Always filled."""


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """How a queue stands at one moment."""

    ready: int
    delayed: int
    leased: int
    blocked: int
    """Waiting for an earlier message of their ordering group; not in ``ready``."""
    dead: int
    bytes: int
    """Payload bytes in the live box."""
    oldest_due: int | None
    """When the longest-waiting ready record became due (ms UTC)."""
    enqueued: int | None = None
    """Records that were inserted, whatever became of them, counted from some moment on: what tells a rate is the
    difference of two of them. None where the store does not count."""


class QueueName(NamedTuple):
    """A queue that the store has seen."""

    namespace: str
    queue: str


class Requests(msgspec.Struct, frozen=True, kw_only=True):
    """How many requests went to a store that charges for each, by kind, and the bytes that they carried."""

    creates: int = 0
    replaces: int = 0
    reads: int = 0
    """Of whole objects; also those that found none."""
    deletes: int = 0
    lists: int = 0
    """Pages of listings."""
    parts: int = 0
    """Requests that uploads of large payloads took."""
    bytes_sent: int = 0
    bytes_received: int = 0
    """Payload, records and documents; neither headers nor listings."""

    @property
    def total(self) -> int:
        """Requests of all kinds."""
        return self.creates + self.replaces + self.reads + self.deletes + self.lists + self.parts

    def plus(self, other: Requests) -> Requests:
        """The sum."""
        return Requests(**{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__})

    def minus(self, other: Requests) -> Requests:
        """The difference."""
        return Requests(**{name: getattr(self, name) - getattr(other, name) for name in self.__struct_fields__})


class Document(NamedTuple):
    """A document with its ETag."""

    data: bytes
    etag: str


class Change(NamedTuple):
    """Something may have become ready in a queue, or its document changed."""

    namespace: str
    queue: str


class Subscription(Protocol):
    """A live interest in the changes of one queue."""

    @property
    def active(self) -> bool:
        """False once the feed broke or was closed: subscribe again."""

    def close(self) -> None:
        """End it; harmless when repeated."""


@runtime_checkable
class Attentive(Protocol):
    """A subscription that tells of messages by name: of those that its owner is to take, and not of all others."""

    def attend(self, waiting: Callable[[], int], appeared: Callable[[], object]) -> None:
        """From now on call ``appeared`` when `Telling.told` has something new, or may have once somebody waits, and the
        other callback only after what is not told by name. ``waiting``: how many wait for messages at this moment."""


@runtime_checkable
class Telling(Protocol):
    """A store whose subscriptions are `Attentive`."""

    async def told(self, namespace: str, queue: str, now: int, *, limit: int) -> list[Stored]:
        """Up to ``limit`` ready records that others put in, and that this process was told of since it was asked last;
        what else is ready, `Store.ready` says."""


class Blob(NamedTuple):
    """A payload stored apart."""

    size: int
    name: str = ""
    """The store's own name for it, never used twice: what `Insert.blob` must say."""


class Problem(NamedTuple):
    """Something that ``verify`` found wrong."""

    where: str
    what: str


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something that was found out by trying about the storage behind a store."""

    check: str
    ok: bool
    detail: str
    serious: bool = True
    """Where it is not ok, a store on this storage would lose or double messages, or could not work at all."""
    milliseconds: float | None = None
    """Median of a request, where that was measured."""


class Store(Protocol):
    """What every store offers. All methods raise StoreError subclasses only; all are safe to call concurrently from
    tasks of the event loop that opened the store."""

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def clock_offset(self) -> int:
        """Milliseconds to add to this machine's clock for the time that all users of the store go by; it may change
        while the store is open. 0 where they are on one machine. Asked for where ``reach`` is the network only."""

    async def open(self) -> None:
        """Make ready for use: create or migrate what is needed. Raises StoreMismatch, StoreBusy, StoreError."""

    async def close(self) -> None:
        """Let writes under way finish, then release everything. Later calls raise StoreClosed. Repeatable."""

    async def write(self, ops: Sequence[Op]) -> list[Outcome]:
        """Apply each op on its own; one outcome per op, in order."""

    async def commit(self, ops: Sequence[Op]) -> list[Outcome]:
        """Apply all ops in one step, or none: after any Conflict the others are ``Conflict(ABORTED)``. Raises
        StoreError for what the store cannot do (see ``atomic_groups`` and ``hand_offs`` of its capabilities)."""

    async def get(self, namespace: str, queue: str, id: str, *, payload: bool = False) -> Stored | None:
        """The record, from whichever box it lies in."""

    async def ready(self, namespace: str, queue: str, now: int, *, limit: int) -> ReadyPage:
        """The first ``limit`` records of the live box that are due at ``now`` and not blocked by their group."""

    async def take(
        self, namespace: str, queue: str, now: int, *, limit: int, decide: Decide
    ) -> list[tuple[Any, Updated | Removed]]:
        """Read ready records in hand-out order and apply what ``decide`` says of each, in one step that no other writer
        can come between; until ``limit`` ops were applied, or no ready record is left (then there are fewer).

        ``decide`` gets the inline payload with the record unless it is large (then None: ask for it in the op).
        Durable as ``write`` is; concurrent calls share commits. Raises StoreError when ``capabilities.takes`` is false.
        """

    async def expired(self, now: int, *, limit: int) -> list[Stored]:
        """Records of any queue's live box with ``expires`` ≤ now that nobody holds at ``now`` (not leased, or the
        lease's ``due`` ≤ now), earliest first."""

    async def payload(self, item: Item) -> bytes | None:
        """The inline payload of a record; None when the record is gone."""

    async def write_blob(self, namespace: str, queue: str, id: str, chunks: AsyncIterator[bytes], now: int) -> Blob:
        """Store a payload apart, before its record is inserted, without holding it in memory. Nobody can read it until
        an insert of that id names it. If ``chunks`` raises, what was written is removed and the error goes on. Orphans
        fall to ``sweep``."""

    def read_blob(self, item: Item) -> AsyncIterator[bytes]:
        """The payload's bytes, in chunks of at most 1 MiB. ``item`` is as the store returned it. Raises MessageNotFound
        when it is not (or no longer) there, StoreCorrupt when it is incomplete."""

    async def state(self, item: Item) -> Document | None:
        """The state document of a record."""

    async def document(self, namespace: str, queue: str) -> Document | None:
        """The queue's own document (its policy)."""

    async def queues(self) -> list[QueueName]:
        """Every queue that holds something or has a document, in name order."""

    async def counts(self, namespace: str, queue: str, now: int) -> Counts:
        """How the queue stands; zero for an unknown one. Costs the same however long the queue is."""

    async def sweep(self, now: int, *, older_than: int, limit: int) -> int:
        """Remove blobs without a record that are older than ``older_than`` ms, and unique keys that have ended; at most
        about ``limit`` of each. How many went."""

    async def verify(self) -> list[Problem]:
        """Check the store's own integrity (structure, counters, references). Reads only."""

    def subscribe(self, namespace: str, queue: str, callback: Callable[[], object]) -> Subscription:
        """Call ``callback`` on the event loop soon after anyone *else* who has the store open (another process, another
        Store object) may have made something ready in the queue or changed its document. Raises StoreError when the
        store has no change feed (see capabilities). Callbacks may be spurious and may coalesce."""

    def statistics(self) -> dict[str, Any]:
        """Counters for operators: commits, ops, commit size, seconds waited for the lock … Keys are the store's own."""

    def requests(self) -> dict[QueueName | None, Requests]:
        """The requests that this store object made since it was opened, per queue (None: for no queue in particular).
        Empty for a store that makes none."""

    # Last in the class: below it, ``list`` would name the method in annotations.
    async def list(self, namespace: str, queue: str, box: Box, *, after: int | None = None, limit: int = 100) -> Page:
        """Records of a box in order of insertion (``Item.key``), strictly after ``after``."""


@runtime_checkable
class Discarding(Protocol):
    """What a store offers beside, when there may be records or objects in it that it cannot read itself."""

    async def unreadable(self, namespace: str, queue: str) -> list[tuple[str, MillpondError]]:
        """Message ids, and the store's own names of other things, that it cannot read, each with the reason."""

    async def discard_unreadable(self, namespace: str, queue: str, what: str) -> bool:
        """Remove one of these; False when it has none of this name, or can read it. Raises StoreBusy when it is being
        changed, and what there is to say of a name of its own."""


@runtime_checkable
class Sealing(Protocol):
    """What a store around a store offers beside, when it may be unable to open what the inner one holds."""

    async def sealed_document(self, namespace: str, queue: str) -> Document | None:
        """The queue's document as it lies in the inner store: its ETag is what a write that replaces it needs."""
