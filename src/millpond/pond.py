"""`Pond`: a connection to a store, and everything of this process that works on it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from millpond.errors import InvalidInput, MessageNotFound, MillpondError, StoreBusy, StoreClosed, StoreCorrupt
from millpond.model import names
from millpond.model.clock import Clock, CorrectedClock, SystemClock, TimerHandle
from millpond.model.ids import IdSource
from millpond.queue import Queue
from millpond.requests import PondRequests, since, snapshot
from millpond.service.collector import Collected, collect
from millpond.service.config import Config
from millpond.service.dispatcher import Dispatcher
from millpond.service.operations import Operations
from millpond.service.service import QueueService
from millpond.service.watch import watch_factory_from_storage
from millpond.stores.base import (
    Box,
    Capabilities,
    Conflict,
    Discarding,
    Finding,
    Problem,
    QueueName,
    Reach,
    Remove,
    Store,
    Stored,
)
from millpond.stores.sealed import refuse_sealed
from millpond.worker.catalog import Catalog

log = logging.getLogger("millpond.pond")
# Silent until the application configures logging; the root logger is the application's.
logging.getLogger("millpond").addHandler(logging.NullHandler())

DEFAULT_URL = "sqlite:///millpond.db"


VERIFIED_AT_ONCE = 16
"""Messages that `Pond.verify` reads at once: of large payloads a MiB of each is in memory."""
LARGEST_OPTION = 2**40
"""Of an option of a store's URL: a TiB, or 35,000 years. More is a slip, and SQLite's own numbers have 63 bits."""


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:
        raise InvalidInput(f"{url!r} is not a URL: {error}") from error


def sqlite_path(url: str) -> str | None:
    """The file that an ``sqlite:`` URL names, and None for other URLs; nothing is opened. In a path, ``%``, ``?`` and
    ``#`` are written ``%25``, ``%3F`` and ``%23``. Raises InvalidInput."""
    if _is_bucket(url):
        return None
    parts = _split(url)
    if parts.scheme != "sqlite":
        return None
    path = unquote(parts.path, errors="surrogateescape").removeprefix("/")
    # sqlite:/a.db could mean either kind of path.
    if not url[len("sqlite:") :].startswith("///") or not path:
        raise InvalidInput(f"{url!r} names no file: write sqlite:///relative/path.db or sqlite:////absolute/path.db")
    if parts.fragment or url.endswith("#"):
        raise InvalidInput(f"{url!r} has a #, which ends a URL's path: write %23 where it belongs to the file's name")
    if "\0" in path:
        raise InvalidInput(f"{url!r} has a NUL, which no file's name can have")
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"{url!r} is not UTF-8, which SQLite needs of a path; name another file") from error
    return path


def _is_bucket(url: str) -> bool:
    """Whether it is a bucket's URL; what is wrong with one is told without quoting it, as it may hold secrets."""
    return url.partition(":")[0].lower() in {"s3", "gs", "az"}


def open_store(url: str, clock: Clock) -> Store:
    """The store that a URL names, not opened yet.

    ``sqlite:///relative/path.db``, ``sqlite:////absolute/path.db`` (options: ``busy_timeout`` seconds, ``inline_limit``
    and ``cache_bytes`` bytes), ``memory://``; ``s3://bucket/prefix``, ``gs://bucket/prefix``,
    ``az://container/prefix`` (options in `millpond.stores.objects.opening`). Raises InvalidInput, and StoreError where
    a package is missing."""
    if _is_bucket(url):
        from millpond.stores.objects.opening import open_object_store

        return open_object_store(url, clock=clock)
    parts = _split(url)
    query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
    if parts.scheme == "memory":
        from millpond.stores.memory import MemoryStore

        _no_more(url, query)
        return MemoryStore(clock=clock)
    if parts.scheme == "sqlite":
        from millpond.stores.sqlite import SqliteStore

        path = sqlite_path(url)
        assert path is not None
        options: dict[str, Any] = {}
        for name, convert in (("busy_timeout", float), ("inline_limit", int), ("cache_bytes", int)):
            if name in query:
                value = query.pop(name)
                try:
                    number = convert(value)
                except ValueError as error:
                    raise InvalidInput(f"{name}={value} in {url!r} is not a number") from error
                if not 0 <= number <= LARGEST_OPTION:  # neither is NaN
                    raise InvalidInput(f"{name}={value} in {url!r} is not a number from 0 to 2**40")
                options[name] = number
        _no_more(url, query)
        return SqliteStore(path, clock=clock, **options)
    known = "sqlite:///path.db, s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or memory://"
    raise InvalidInput(f"this version opens no store by {url!r}; it knows {known}")


async def probe_store(url: str, clock: Clock | None = None) -> list[Finding]:
    """What the storage behind a bucket's URL can do, found out by trying, line by line; [] for other stores. Some
    hundred requests; leaves nothing behind. Raises InvalidInput, and StoreError where a package is missing."""
    if not _is_bucket(url):
        return []
    from millpond.stores.objects.opening import probe_url

    return await probe_url(url, clock=clock or SystemClock())


def _no_more(url: str, query: dict[str, str]) -> None:
    if query:
        unknown = ", ".join(sorted(query))
        raise InvalidInput(
            f"{url!r} has options that this store does not know: {unknown} (a ? in a file's name is written %3F)"
        )


class Pond(Catalog):
    """A connection to a store. Use as ``async with``; safe for any number of tasks of its event loop."""

    _twin: Callable[[], Pond] | None = None
    """Makes another on the same store; set by whoever knows how this one was made."""

    def __init__(
        self,
        store: Store,
        *,
        clock: Clock | None = None,
        config: Config | None = None,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """For a store of one's own; otherwise see `millpond.connect`."""
        self.clock = clock or SystemClock()
        if store.capabilities.reach is Reach.NETWORK:
            # Others whose clocks are not this machine's go by the same leases and due times.
            self.clock = CorrectedClock(self.clock, lambda: store.clock_offset)
        self.config = config = config or Config()
        self.store = store
        self.ids = IdSource(self.clock, random_bytes)
        self.service = QueueService(store, self.clock, self.ids, config)
        self.dispatcher = Dispatcher(
            self.service,
            clock=self.clock,
            ids=self.ids,
            poll_interval=config.poll_interval,
            poll_jitter=config.poll_jitter,
            poll_max_interval=max(config.poll_interval, config.poll_max_interval),
            resilient_poll_interval=config.resilient_poll_interval,
            max_consumers=config.max_consumers,
            page_size=max(config.page_size, config.ready_page_size),
            watch_factory=watch_factory_from_storage(store),
            partial_watch=store.capabilities.reach is Reach.NETWORK,
            thrifty=store.capabilities.requests_cost_money,
        )
        self._operations: Operations = self.service
        self.service.waiter = self.dispatcher
        self.service.on_ready = self.dispatcher.ready
        self.service.on_due = self.dispatcher.due
        self._opened = False
        self._opening = asyncio.Lock()
        """Held by whoever opens it: a second store that was opened beside would be left behind open."""
        self._closed = False
        self._process = 0
        """Which opened it; tasks, threads and connections stay behind when another forks off."""
        self._collecting: asyncio.Task[None] | None = None
        self._collect_timer: TimerHandle | None = None
        self._requests_before = snapshot({}, {})
        self._twin = None

    @property
    def is_open(self) -> bool:
        """It was opened and not closed since."""
        return self._opened and not self._closed

    def twin(self) -> Pond | None:
        """Another pond on the same store, not opened yet, for another thread's event loop. None where there can be
        none: in memory, on a store of one's own, under a clock of one's own."""
        return None if self._twin is None else self._twin()

    async def open(self) -> Pond:
        """Open the store; `async with` does it. Safe to repeat, also at the same time. Raises StoreError."""
        if self._forked:
            await self.store.open()  # it says what is wrong
        async with self._opening:
            await self._open()
        return self

    async def _open(self) -> None:
        if self._closed:
            raise StoreClosed("this pond was closed; connect again")
        if not self._opened:
            self._process = os.getpid()
            await self.store.open()
            if not self.store.capabilities.encrypted:
                try:
                    await refuse_sealed(self.store)
                except BaseException:
                    await self.store.close()
                    raise
            self._opened = True
            self._schedule_collection()

    async def close(self) -> None:
        """Let what is under way finish, wake whoever waits with StoreClosed, release the store. Safe to repeat.

        In a child of the process that opened it there is nothing to close: it is the parent's."""
        if self._closed:
            return
        self._closed = True
        if self._forked:
            return
        async with self._opening:
            pass  # What is just being opened would be left open.
        if self._collect_timer is not None:
            self._collect_timer.cancel()
        if self._collecting is not None:
            await asyncio.gather(self._collecting, return_exceptions=True)
        await self.dispatcher.close()
        await self.service.close()
        await self.store.close()

    @property
    def capabilities(self) -> Capabilities:
        """What the store can do, for those who plan around it."""
        return self.store.capabilities

    @property
    def _forked(self) -> bool:
        return self._process not in {0, os.getpid()}

    async def __aenter__(self) -> Pond:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def queue(self, name: str, *, namespace: str | None = None) -> Queue:
        """A queue by its name; no I/O. Raises InvalidQueue."""
        return Queue(self._operations, name, namespace)

    async def notify(self, queue: str, *, namespace: str | None = None) -> None:
        """As `Queue.notify`, for a queue by its name. Raises InvalidQueue."""
        await self.queue(queue, namespace=namespace).notify()

    async def queues(self) -> list[QueueName]:
        """Every queue in the store, by namespace and name."""
        return await self._operations.list_queues()

    async def collect(self) -> Collected:
        """One pass of the collector, which otherwise runs every `Config.collect_interval` seconds: settles expired
        messages, removes orphaned payloads and ended dedup keys. Safe in any number of processes."""
        return await collect(self.service)

    def _schedule_collection(self) -> None:
        # Spread by a random part, so that processes started together do not all sweep at once.
        interval = self.config.collecting(self.service.costs) * (0.75 + self.ids.below(500) / 1000)
        self._collect_timer = self.clock.call_later(interval, self._start_collection)

    def _start_collection(self) -> None:
        if self._closed:
            return
        if self.service.costs and not self.service.looked:
            self._schedule_collection()  # This pond only produces, or does nothing: it is to cost nothing either.
            return
        self.service.looked = False

        async def run() -> None:
            try:
                await self.collect()
            except MillpondError as error:
                # The next pass tries again; until then only disk space and counts are affected.
                log.warning("millpond.collect.failed", extra={"reason": f"{type(error).__name__}: {error}"})
            if not self._closed:
                self._schedule_collection()

        self._collecting = asyncio.create_task(run(), name="millpond collector")

    async def verify(self, *, progress: Callable[[int], object] | None = None) -> list[Problem]:
        """Check the store's integrity, that every record can be read and that every payload is what was enqueued; []
        when all is well. Reads everything, some payloads at once. ``progress`` is told now and then how many messages
        have been looked at."""
        problems = await self.store.verify()
        told = {problem.where for problem in problems}
        checked = 0
        try:
            for name in await self.queues():
                async for found, count in self._verify_queue(name, told):
                    problems += found
                    checked += count
                    if progress is not None:
                        progress(checked)
        except StoreCorrupt as error:
            # Where the store is so broken that its records cannot be listed, that is a finding like others.
            problems.append(Problem("records", str(error)))
        return problems

    async def _verify_queue(self, name: QueueName, told: set[str]) -> AsyncIterator[tuple[list[Problem], int]]:
        try:
            await self.service.queue_policy(*name)
        except MillpondError as error:
            where = f"queue {name.namespace}/{name.queue}"
            if where not in told:
                yield [Problem(where, str(error))], 0
        for box in Box:
            after: int | None = None
            while True:
                page = await self.store.list(*name, box, after=after, limit=500)
                for start in range(0, len(page.records), VERIFIED_AT_ONCE):
                    some = page.records[start : start + VERIFIED_AT_ONCE]
                    found = await asyncio.gather(*(self._verify_message(name, stored, told) for stored in some))
                    yield [problem for problem in found if problem is not None], len(some)
                if page.next_after is None:
                    break
                after = page.next_after

    async def _verify_message(self, name: QueueName, stored: Stored, told: set[str]) -> Problem | None:
        where = f"message {stored.item.id} in {name.namespace}/{name.queue}"
        try:
            record = self.service.record(stored)
            if record.head.id != stored.item.id or record.status.visible_at != stored.mark.due:
                return Problem(where, "the record and its index disagree")
            # What the store found wrong with the message need not be found again.
            if record.head.checksum is not None and f"message {stored.item.id}" not in told:
                async for _ in self.service.payload_chunks(record):
                    pass
        except MessageNotFound:
            return None  # acked meanwhile
        except MillpondError as error:
            return Problem(where, str(error))
        return None

    async def unreadable(self, queue: str, *, namespace: str | None = None) -> list[tuple[str, MillpondError]]:
        """The ids of the queue's messages whose record cannot be read, live or dead, each with the reason: written
        under a key that the keyring lacks, changed, damaged, or by a newer Millpond. Nobody is given such a message.
        In a bucket also the names of its other objects that are damaged: markers of dedup keys and ids, pointers of
        ordering keys. Reads the whole queue. Raises InvalidQueue."""
        key = self.service.key(namespace, queue)
        found = await self.store.unreadable(*key) if isinstance(self.store, Discarding) else []
        for box in Box:
            after: int | None = None
            while True:
                page = await self.store.list(*key, box, after=after, limit=500)
                for stored in page.records:
                    try:
                        self.service.record(stored)
                    except MillpondError as error:
                        found.append((stored.item.id, error))
                if page.next_after is None:
                    break
                after = page.next_after
        return found

    async def discard_unreadable(self, queue: str, message_id: str, *, namespace: str | None = None) -> None:
        """Remove a message whose record cannot be read, with its payload and state, for good. With the key that is
        missing, or the newer Millpond that wrote it, it could still be read.

        In a bucket ``message_id`` may also be the name of a damaged object, as `unreadable` and `verify` tell it. A
        marker of an id and a pointer of an ordering key are written anew from what the queue shows; a dedup key whose
        marker is damaged is free from then on.

        Raises MessageNotFound when there is none, InvalidInput when it can be read, StoreBusy when it is being
        changed.
        """
        key = self.service.key(namespace, queue)
        discarding = self.store if isinstance(self.store, Discarding) else None
        is_object = discarding is not None and "/" in str(message_id)
        id = message_id if is_object else names.message_id(message_id)
        if discarding is not None and await discarding.discard_unreadable(*key, id):
            return
        stored = await self.store.get(*key, id)
        if stored is None:
            raise MessageNotFound(f"there is no message {id} in queue {key[1]} of namespace {key[0]}")
        try:
            self.service.record(stored)
        except MillpondError:
            [outcome] = await self.store.write((Remove(stored.item, stored.mark),))
            if isinstance(outcome, Conflict):
                raise StoreBusy(f"message {id} is being changed; try again") from None
            return
        raise InvalidInput(f"message {id} can be read: ack it, or purge it as any other")

    async def rekey(self, progress: Callable[[int], None] | None = None, *, encrypt_plain: bool = False) -> int:
        """Rewrite everything that is not under the keyring's newest key; how many records. Safe while others work, and
        to repeat. ``encrypt_plain``: also what was never encrypted. Raises InvalidInput without a keyring."""
        if self.store.capabilities.encrypted:  # where it is not, the package that this needs may not be there
            from millpond.stores.encrypted import EncryptedStore
            from millpond.stores.rekey import rekey

            if isinstance(self.store, EncryptedStore):
                return await rekey(self.store, progress=progress, encrypt_plain=encrypt_plain)
        raise InvalidInput("this pond was opened without a keyring; there is nothing to rekey with")

    def requests(self) -> PondRequests:
        """The requests that this pond has made, where its store charges for them, in total, per queue, and per message
        acked; empty for other stores. Since it was opened, or since `reset_requests`. Asks the store nothing."""
        return since(snapshot(self.store.requests(), self.service.acks), self._requests_before)

    def reset_requests(self) -> None:
        """Count `requests` from now on."""
        self._requests_before = snapshot(self.store.requests(), self.service.acks)

    def statistics(self) -> dict[str, Any]:
        """Counters of the store, the ready caches and the dispatcher, and of requests where the store charges for them;
        for operators."""
        import msgspec

        requests = self.requests()
        total = requests.total
        counted: dict[str, Any] = {}
        if total.total:
            counted = {
                **msgspec.structs.asdict(total),
                "acknowledged": requests.acknowledged,
                "queues": {
                    f"{namespace}/{queue}": {
                        **msgspec.structs.asdict(one.requests),
                        "acknowledged": one.acknowledged,
                    }
                    for (namespace, queue), one in requests.queues.items()
                },
            }
        return {
            "store": self.store.statistics(),
            "ready_cache": msgspec.structs.asdict(self.service.ready_cache_stats()),
            "dispatcher": {"polls": self.dispatcher.polls},
            "requests": counted,
        }
