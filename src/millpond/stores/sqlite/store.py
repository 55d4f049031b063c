"""SqliteStore: the store protocol over the modules beside this one."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import apsw

from millpond.errors import MessageNotFound, StoreClosed, StoreCorrupt, StoreError
from millpond.model.clock import Clock
from millpond.stores.base import (
    Blob,
    Box,
    Capabilities,
    Counts,
    Decide,
    Document,
    Item,
    Op,
    Outcome,
    Page,
    Problem,
    QueueName,
    Reach,
    ReadyPage,
    Removed,
    Requests,
    Stored,
    Subscription,
    Updated,
)
from millpond.stores.sqlite import fork
from millpond.stores.sqlite.apply import Take
from millpond.stores.sqlite.blobs import SLICE
from millpond.stores.sqlite.check import check
from millpond.stores.sqlite.failures import translate
from millpond.stores.sqlite.opening import Opened, open_database
from millpond.stores.sqlite.reads import Reads
from millpond.stores.sqlite.schema import CHUNK, MIGRATIONS, connect
from millpond.stores.sqlite.threads import Background, tell
from millpond.stores.sqlite.writer import Writer
from millpond.stores.wake import ChangeFeed, Name

INLINE_LIMIT = 65_536
"""Bytes of payload that stay in the record: up to here one write is cheaper than two."""
CACHE_BYTES = 64 * 1024 * 1024
"""Page cache of all connections together."""
BUSY_TIMEOUT = 10.0
"""Seconds that a call waits for other writers."""
NEAR_LIMIT = 512
"""Records up to which a read of what is ready is done on the event loop (about 1 ms); more are read in a thread."""

P = ParamSpec("P")
T = TypeVar("T")


class SqliteStore:
    """A store in the SQLite database at ``path``.

    ``clock`` is the pond's. ``busy_timeout`` is in seconds. ``inline_limit`` is the largest payload, bytes, that
    belongs in a record. ``cache_bytes`` bounds the page caches together; ``max_bytes`` (None: the disk does) the
    database, beyond which writes raise StoreFull. ``vfs`` names an SQLite VFS. ``migrations`` is for tests.

    It belongs to the event loop that opened it, and does not survive a fork: a child opens its own.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        clock: Clock,
        busy_timeout: float = BUSY_TIMEOUT,
        inline_limit: int = INLINE_LIMIT,
        cache_bytes: int = CACHE_BYTES,
        max_bytes: int | None = None,
        vfs: str | None = None,
        migrations: Sequence[str] = MIGRATIONS,
    ) -> None:
        self._path = os.path.abspath(os.fspath(path))
        self._clock = clock
        self._busy_timeout = busy_timeout
        self._cache_bytes = cache_bytes
        self._max_bytes = max_bytes
        self._vfs = vfs
        self._migrations = migrations
        self._refusal: StoreError | None = StoreClosed(
            f"the store {self._path} is not open: use the pond in `async with` (or `with`), or call its open()"
        )
        self._opened = self._inherited = False
        self._closing: asyncio.Task[None] | None = None
        self._reclaiming: asyncio.Task[None] | None = None
        self._capabilities = Capabilities(
            name="sqlite",
            reach=Reach.HOST,
            atomic_groups=True,
            conditional_delete=True,
            change_feed=True,
            durable=True,
            inline_limit=inline_limit,
            takes=True,
        )

    @property
    def capabilities(self) -> Capabilities:
        """What this store can do."""
        return self._capabilities

    @property
    def clock_offset(self) -> int:
        """0: all who have the file open are on one machine."""
        return 0

    @property
    def path(self) -> str:
        """The database file."""
        return self._path

    # Opening and closing

    async def open(self) -> None:
        """Create the file (its directory must exist), or bring it to the newest schema. Repeatable.

        Raises StoreMismatch, StoreBusy, StoreError.
        """
        if self._opened:
            self._check()
            return
        if self._closing is not None:
            raise self._closed()
        thread = Background("millpond-reader")
        fork.hold(self)
        made: list[Opened] = []

        def work() -> Opened:
            made.append(
                open_database(
                    self._path,
                    cache_bytes=self._cache_bytes,
                    max_bytes=self._max_bytes,
                    vfs=self._vfs,
                    busy_timeout=self._busy_timeout,
                    migrations=self._migrations,
                )
            )
            return made[0]

        try:
            opened = await thread.call(work)
        except BaseException:
            # Who is cancelled has nobody left who would close what the thread opens all the same.
            thread.post(lambda: [one.close() for one in made])
            thread.stop()
            fork.drop(self)
            raise
        self._thread = thread
        self._loop, self._home = asyncio.get_running_loop(), threading.get_ident()
        self._near, self._far, self._bulk, self._lock = Reads(opened.near), Reads(opened.far), opened.bulk, opened.lock
        self._writer = Writer(
            opened.write,
            opened.lock,
            self._path,
            clock=self._clock,
            busy_timeout=self._busy_timeout,
            committed=self._committed,
        )
        self._feed = ChangeFeed(opened.feed, mode=opened.mode, clock=self._clock, look=self._writer.when_foreign)
        self._opened, self._refusal = True, None

    async def close(self) -> None:
        """Finish the writes under way, then release everything. Repeatable."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        if not self._opened or self._inherited:
            return
        self._refusal = self._closed()
        self._feed.close()
        await self._writer.finish()
        if self._reclaiming is not None:
            await self._reclaiming
        self._near.connection.close()
        await self._thread.call(self._close_far)
        self._thread.stop()
        # The last connection to close brings the log into the database, which may take a moment: in the thread.
        await self._writer.shut()
        fork.drop(self)

    def _close_far(self) -> None:
        self._far.connection.close()
        self._bulk.close()

    def _closed(self) -> StoreClosed:
        return StoreClosed(f"the store {self._path} is closed")

    def _check(self) -> None:
        if self._refusal is not None:
            raise type(self._refusal)(str(self._refusal))

    def threads(self) -> list[Callable[[Callable[[], object]], object]]:
        """To have something done in those of its threads, this one apart, that read."""
        if not self._opened:
            return []
        found: list[Callable[[Callable[[], object]], object]] = [self._thread.post]
        if self._home != threading.get_ident() and self._loop.is_running():
            found.append(lambda work: tell(self._loop, work))
        return found

    def forked(self) -> None:
        """This is a child of the process that opened this store, or was opening it."""
        self._refusal = StoreError(f"{self._path} was opened before this process forked; open it anew in the child")
        if self._opened:
            self._inherited = True
            self._lock.close()
            self._feed.abandon()

    # Writing

    async def write(self, ops: Sequence[Op]) -> list[Outcome]:
        """Apply each op on its own, durably. Shares its transaction with concurrent calls."""
        if self._refusal is not None:
            self._check()
        return await self._writer.submit(ops, False)

    async def commit(self, ops: Sequence[Op]) -> list[Outcome]:
        """Apply all ops or none, durably."""
        if self._refusal is not None:
            self._check()
        return await self._writer.submit(ops, True)

    async def take(
        self, namespace: str, queue: str, now: int, *, limit: int, decide: Decide
    ) -> list[tuple[Any, Updated | Removed]]:
        """Settle the first ready records as ``decide`` says, durably. Shares its transaction with concurrent calls."""
        if self._refusal is not None:
            self._check()
        return await self._writer.take(Take(namespace, queue, now, limit, decide))

    def _committed(self, changed: set[Name], doomed: bool) -> None:
        if changed:
            self._feed.publish(changed)
        if doomed and self._reclaiming is None and self._refusal is None:
            self._reclaiming = asyncio.get_running_loop().create_task(self._reclaim_later())

    async def _reclaim_later(self) -> None:
        try:
            await self._reclaim()
        except StoreError:
            pass  # closed, busy or broken: what is doomed stays so, and the next sweep tries again
        finally:
            self._reclaiming = None

    async def _reclaim(self) -> None:
        while await self._writer.job(self._bulk.reclaim):
            pass

    # Reading

    async def _read(self, read: Callable[Concatenate[Reads, P], T], /, *arguments: P.args, **options: P.kwargs) -> T:
        """A short read, on the event loop; in the thread if somebody has the database locked."""
        if self._refusal is not None:
            self._check()
        try:
            return read(self._near, *arguments, **options)
        except apsw.BusyError:
            return await self._read_far(read, *arguments, **options)
        except apsw.Error as error:
            raise translate(error, self._path) from error

    async def _read_far(
        self, read: Callable[Concatenate[Reads, P], T], /, *arguments: P.args, **options: P.kwargs
    ) -> T:
        """A read that may take long, in the thread."""
        if self._refusal is not None:
            self._check()
        try:
            return await self._thread.call(lambda: read(self._far, *arguments, **options))
        except apsw.Error as error:
            raise translate(error, self._path) from error

    async def get(self, namespace: str, queue: str, id: str, *, payload: bool = False) -> Stored | None:
        """The record, from whichever box it lies in."""
        return await self._read(Reads.get, namespace, queue, id, payload)

    async def ready(self, namespace: str, queue: str, now: int, *, limit: int) -> ReadyPage:
        """The first due and unblocked records, in hand-out order."""
        if limit <= NEAR_LIMIT:
            return await self._read(Reads.ready, namespace, queue, now, limit)
        return await self._read_far(Reads.ready, namespace, queue, now, limit)

    async def payload(self, item: Item) -> bytes | None:
        """The inline payload of a record."""
        return await self._read(Reads.payload, item.key)

    async def state(self, item: Item) -> Document | None:
        """The state document of a record."""
        return await self._read(Reads.state, item.key)

    async def document(self, namespace: str, queue: str) -> Document | None:
        """The queue's own document."""
        return await self._read(Reads.document, namespace, queue)

    async def expired(self, now: int, *, limit: int) -> list[Stored]:
        """Expired records that nobody holds, earliest first."""
        return await self._read_far(Reads.expired, now, limit)

    async def queues(self) -> list[QueueName]:
        """Every queue that holds something or has a document, in name order."""
        return await self._read_far(Reads.queues)

    async def counts(self, namespace: str, queue: str, now: int) -> Counts:
        """How the queue stands at ``now``."""
        return await self._read_far(Reads.counts, namespace, queue, now)

    # Blobs

    async def write_blob(self, namespace: str, queue: str, id: str, chunks: AsyncIterator[bytes], now: int) -> Blob:
        """Store a payload apart, a few MiB at a time."""
        self._check()
        began = self._clock.monotonic()
        size = written = 0
        blob: int | None = None
        rest = bytearray()
        rows: list[bytes] = []

        async def flush(end: int | None) -> None:
            nonlocal blob, written, rows
            created = now + round((self._clock.monotonic() - began) * 1000)
            ready, first, number = rows, written, blob
            rows = []
            blob = await self._writer.job(
                lambda: self._bulk.append(namespace, queue, id, number, first, ready, created, end)
            )
            written += len(ready)

        try:
            async for chunk in chunks:
                size += len(chunk)
                rest += chunk
                while len(rest) >= CHUNK:
                    rows.append(bytes(memoryview(rest)[:CHUNK]))
                    del rest[:CHUNK]
                    if len(rows) == SLICE:
                        await flush(None)
            if rest:
                rows.append(bytes(rest))
            await flush(size)
        except BaseException:
            if blob is not None:
                await self._discard(blob)
            raise
        assert blob is not None  # the last flush wrote it, if no earlier one did
        return Blob(size, str(blob))

    async def _discard(self, blob: int) -> None:
        """Remove what was written of a blob that will not be finished."""
        try:
            await asyncio.shield(self._writer.job(lambda: self._bulk.doom(blob)))
        except StoreError:
            return  # closed or broken: an orphan, for the sweep
        self._committed(set(), True)

    async def read_blob(self, item: Item) -> AsyncIterator[bytes]:
        """The payload's bytes, a MiB at a time. Raises MessageNotFound, StoreCorrupt."""
        found = await self._read(Reads.blob, item.key)
        if found is None:
            raise MessageNotFound(f"the payload of message {item.id} is not (or no longer) there")
        blob, size = found
        read = number = 0
        while size is None or read < size:
            chunk, there = await self._read_far(Reads.chunk, blob, number)
            if not there:
                raise MessageNotFound(f"the payload of message {item.id} is no longer there")
            if chunk is None:
                raise StoreCorrupt(f"the payload of message {item.id} is incomplete: {read} of {size} bytes are there")
            yield chunk
            read += len(chunk)
            number += 1

    # Upkeep

    async def sweep(self, now: int, *, older_than: int, limit: int) -> int:
        """Remove orphaned blobs and ended unique keys."""
        self._check()
        swept: int = await self._writer.job(lambda: self._bulk.sweep(now, older_than, limit))
        await self._reclaim()
        return swept

    async def verify(self) -> list[Problem]:
        """Check the file's structure, and all that is written down twice. Takes its time in a thread of its own."""
        self._check()

        def work() -> list[Problem]:
            connection = connect(self._path, cache_bytes=self._cache_bytes // 8, vfs=self._vfs)
            try:
                return check(connection)
            finally:
                connection.close()

        thread = Background("millpond-verify")
        try:
            return await thread.call(work)
        except apsw.CorruptError as error:
            return [Problem("database", str(error))]
        except apsw.Error as error:
            raise translate(error, self._path) from error
        finally:
            thread.stop()

    # The change feed

    def subscribe(self, namespace: str, queue: str, callback: Callable[[], object]) -> Subscription:
        """Call back soon after another process, or another store on the same file, changed the queue."""
        self._check()
        return self._feed.subscribe(namespace, queue, callback)

    def statistics(self) -> dict[str, Any]:
        """Of this store: commits, calls, ops, largest_commit, commit_seconds, lock_waits, lock_wait_seconds,
        batches_in_thread, busy_errors, failed_commits, jobs, news_*; waiting_ops, which wait for a commit now; of the
        file: wal_bytes."""
        if not self._opened:
            return {}
        try:
            wal = os.stat(f"{self._path}-wal").st_size
        except FileNotFoundError:
            wal = 0
        news = {f"news_{name}": number for name, number in self._feed.numbers.items()}
        return {**self._writer.numbers, **news, "waiting_ops": self._writer.waiting_ops, "wal_bytes": wal}

    def requests(self) -> dict[QueueName | None, Requests]:
        """None are made."""
        return {}

    # Last in the class: below it, ``list`` would name the method in annotations.
    async def list(self, namespace: str, queue: str, box: Box, *, after: int | None = None, limit: int = 100) -> Page:
        """Records of a box in order of insertion."""
        return await self._read_far(Reads.list, namespace, queue, box, after, limit)
