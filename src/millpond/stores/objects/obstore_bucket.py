"""A bucket of S3, Google Cloud Storage or Azure Blob, or of anything that speaks like them, through obstore.

What obstore would do by itself and must not: send a request again (a conditional write that is sent twice meets its
own first copy), and answer with its few exceptions for everything. So its retries are off, `read_reply` says what an
error means, and only what certainly did not take place, or may take place twice, is sent again here: with a growing,
jittered pause, for a bounded time. Everything else is the store's to decide.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from millpond.errors import MessageNotFound, OutcomeUnknown, StoreBusy, StoreClosed, StoreCorrupt, StoreError
from millpond.model.clock import Clock
from millpond.model.ids import IdSource
from millpond.stores.objects.bucket import Content, Entry, Folder, ObjectChanged, ObjectExists, Tag
from millpond.stores.objects.clouds import CREDENTIALS, PERMISSIONS, Cloud
from millpond.stores.objects.replies import Outcome, Reply, read_reply

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

T = TypeVar("T")

TIMEOUT = 10.0
"""Seconds for one small request, connecting included. A healthy cloud answers in a tenth of a second."""
PATIENCE = 30.0
"""Seconds for which what did not take place is sent again, all tries together."""
DELETE_WINDOW = 2.0
"""Seconds after the call in which a DELETE is still sent again. A message's DELETE is safe while its lease lasts, so a
late one must not be; who knows that the lease still lasts may call again."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds before the second try, doubled with each one up to the second number; a random half of it is left out, so
that those who were refused together do not come back together."""
MOST_TRIES = 12
"""Of a request whose every try takes long, patience or not."""
PART = 8 * 2**20
"""Bytes of a part of a large upload. S3 takes 10,000 parts, so 80 GB; two of them are in memory at a time."""
_PARTS_AT_ONCE = 2
_CHUNK = 1 << 20
"""Largest piece that ``download`` may yield, by the protocol."""
_AT_ONCE = 10
"""Deletes on their way at the same time where the cloud has none for several names."""


class Clients(NamedTuple):
    """obstore's stores for one bucket and prefix, the same but for their settings."""

    small: ObjectStore
    """No retries, short time-outs, one DELETE per name."""
    bulk: ObjectStore
    """As ``small``; deletes many names in one request where the cloud can."""
    large: ObjectStore
    """For whole payloads: time-outs by silence rather than in all. No retries either."""
    parts: ObjectStore
    """As ``large``, for uploads in parts: with obstore's own retries, which are harmless there."""


class ObstoreBucket:
    """A bucket through obstore. Make it with `millpond.stores.objects.opening.open_bucket`.

    ``where`` is what errors call it. ``sent`` counts the requests that were sent, by kind, those sent again
    included (parts of large uploads by their number; what obstore repeats of them is not seen); ``on_request`` is told
    of each, with the object's name. ``patience``: see `PATIENCE`.
    """

    def __init__(
        self,
        clients: Clients,
        cloud: Cloud,
        *,
        where: str,
        clock: Clock,
        ids: IdSource,
        patience: float = PATIENCE,
        on_request: Callable[[str, str], None] | None = None,
    ) -> None:
        import obstore
        from obstore.exceptions import BaseError

        self._obstore = obstore
        self._errors = (BaseError, FileNotFoundError, NotImplementedError)
        self._clients = clients
        self._closed = False
        self.cloud = cloud
        self.where = where
        self._clock = clock
        self._ids = ids
        self._patience = patience
        self._on_request = on_request
        self.on_repeat: Callable[[str, str], None] = lambda kind, name: None
        """Told of every request that is sent again, by kind and name: for those who count calls of methods."""
        self.sent: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"ObstoreBucket({self.where!r})"

    async def create(self, name: str, data: bytes) -> Tag:
        """Write an object that is not there. Raises ObjectExists."""
        try:
            return await self._send("create", name, lambda: self._put(name, data, "create"))
        except _Failed as failed:
            # Some servers answer a create that lost as they do a replace.
            if failed.reply.outcome in {Outcome.EXISTS, Outcome.CHANGED}:
                raise ObjectExists(f"object {name} is there already; read it to see whose it is") from None
            raise self._error(failed, "create", name) from None

    async def replace(self, name: str, data: bytes, tag: Tag) -> Tag:
        """Write an object that still is the version ``tag``. Raises ObjectChanged."""
        if self.cloud is Cloud.GOOGLE and tag.version is None:
            tag = await self._generation(name, tag)
        # obstore takes a key whose value is None for a mistake.
        condition = {"e_tag": tag.etag, "version": tag.version}
        mode = {key: value for key, value in condition.items() if value is not None}
        try:
            return await self._send("replace", name, lambda: self._put(name, data, mode))
        except _Failed as failed:
            if failed.reply.outcome in {Outcome.CHANGED, Outcome.MISSING}:
                raise ObjectChanged(f"object {name} was changed or removed; read it again") from None
            raise self._error(failed, "replace", name) from None

    async def _generation(self, name: str, tag: Tag) -> Tag:
        """Google compares generations, and its listings do not tell them."""
        try:
            found = await self._send("read", name, lambda: self._obstore.head_async(self._small, name), repeatable=True)
        except _Failed as failed:
            if failed.reply.outcome is Outcome.MISSING:
                raise ObjectChanged(f"object {name} was removed; read it again") from None
            raise self._error(failed, "read", name) from None
        if found["e_tag"] != tag.etag:
            raise ObjectChanged(f"object {name} was changed; read it again")
        return Tag(found["e_tag"], found["version"])

    async def _put(self, name: str, data: bytes, mode: Any) -> Tag:
        result = await self._obstore.put_async(self._small, name, data, mode=mode, use_multipart=False)
        return Tag(result["e_tag"], result["version"])

    async def read(self, name: str) -> Content | None:
        """The whole object; None when there is none."""

        async def get() -> Content:
            result = await self._obstore.get_async(self._small, name)
            data = bytes(await result.bytes_async())
            meta = result.meta
            return Content(data, Tag(meta["e_tag"], meta["version"]), _ms(meta))

        try:
            return await self._send("read", name, get, repeatable=True)
        except _Failed as failed:
            if failed.reply.outcome is Outcome.MISSING:
                return None
            raise self._error(failed, "read", name) from None

    async def delete(self, name: str, *, once: bool = False) -> None:
        """Remove an object, if it is there. Sent at the latest `DELETE_WINDOW` seconds after the call; ``once``: sent
        again only where no copy of it can be on its way."""
        await self._delete(name, min(self._patience, DELETE_WINDOW), once=once)

    async def _delete(self, name: str, patience: float, *, once: bool = False) -> None:
        try:
            await self._send(
                "delete", name, lambda: self._obstore.delete_async(self._small, name), patience=patience, once=once
            )
        except _Failed as failed:
            if failed.reply.outcome is not Outcome.MISSING:
                raise self._error(failed, "delete", name) from None

    async def delete_many(self, names: list[str]) -> None:
        """Remove objects, in as few requests as the cloud allows. Repeatable; when it raises, some may be left. As with
        ``delete``, nothing is sent later than `DELETE_WINDOW` seconds after the call."""
        until = self._clock.monotonic() + min(self._patience, DELETE_WINDOW)
        if self.cloud.deletes == 1:
            await self._each(names, until)
            return
        for start in range(0, len(names), self.cloud.deletes):
            some = names[start : start + self.cloud.deletes]
            try:
                await self._send("delete_many", some[0], partial(self._delete_some, some), patience=self._left(until))
            except _Failed as failed:
                if failed.reply.outcome is not Outcome.MISSING:
                    raise self._error(failed, "delete_many", some[0]) from None
                # Of several errors obstore tells the first, and one that is gone already is one: ask for each.
                await self._each(some, until)

    def _left(self, until: float) -> float:
        left = until - self._clock.monotonic()
        if left < 0:
            raise OutcomeUnknown(f"deleting many in {self.where}: it takes too long, and some may be left; try again")
        return left

    async def _delete_some(self, names: list[str]) -> None:
        await self._obstore.delete_async(self._open(self._clients.bulk), names)

    async def _each(self, names: list[str], until: float) -> None:
        for start in range(0, len(names), _AT_ONCE):
            done = await asyncio.gather(
                *(self._delete(name, self._left(until)) for name in names[start : start + _AT_ONCE]),
                return_exceptions=True,
            )
            for result in done:
                if isinstance(result, BaseException):
                    raise result

    async def list(self, prefix: str, *, after: str | None = None) -> AsyncIterator[list[Entry]]:
        """The objects whose names begin with ``prefix`` and, if given, are above ``after``: in pages, in order of name,
        each page one request; an empty one if there are none.

        Every page is in order, and pages are among one another, except on servers that list by folders (SeaweedFS)
        where a folder's name begins with that of an object or folder beside it: there a page may be behind the one
        before it, and a listing with ``after`` lack some. So Millpond lists across no folders whose names do that.
        """
        # obstore's prefixes are whole folders. A listing that starts where the names begin that are wanted, and ends
        # where they end, finds them in as many requests.
        folder, _, rest = prefix.rpartition("/")
        start = prefix[:-1] if rest else None
        position = max(filter(None, (start, after)), default=None)
        stream: Any = None
        yielded = False

        async def page() -> Sequence[ObjectMeta] | None:
            nonlocal stream
            if stream is None:
                stream = self._obstore.list(self._small, folder or None, offset=position, chunk_size=self.cloud.page)
            try:
                return await anext(stream)
            except StopAsyncIteration:
                return None
            except BaseException:
                stream = None  # a broken one does not go on; another takes up where it broke
                raise

        while True:
            try:
                found = await self._send("list", prefix, page, repeatable=True)
            except _Failed as failed:
                if failed.reply.outcome is not Outcome.MISSING:
                    raise self._error(failed, "list", prefix) from None
                found = None
            if found is None:
                if yielded:
                    self.sent["list"] -= 1  # the page before was the last, and full: nothing was asked
                break
            entries = [_entry(meta) for meta in found]
            wanted = [e for e in _objects(entries, prefix) if after is None or e.name > after]
            wanted.sort()
            if wanted:
                yielded = True
                yield wanted
            if len(found) < self.cloud.page or all(e.name > prefix and not e.name.startswith(prefix) for e in entries):
                break
            position = entries[-1].name
        if not yielded:
            yield []

    async def folder(self, prefix: str) -> Folder:
        """One level below ``prefix`` (which ends with a slash); folders by their whole names. SeaweedFS shows a folder
        for some time after its last object went."""
        path = prefix.removesuffix("/") or None
        try:
            found = await self._send(
                "list",
                prefix,
                lambda: self._obstore.list_with_delimiter_async(self._small, path),
                repeatable=True,
            )
        except _Failed as failed:
            if failed.reply.outcome is Outcome.MISSING:
                return Folder([], [])
            raise self._error(failed, "list", prefix) from None
        folders = sorted(found["common_prefixes"])
        entries = sorted(_objects(map(_entry, found["objects"]), prefix))
        more = (len(folders) + len(entries) - 1) // self.cloud.page  # obstore reads all pages
        for _ in range(more):
            self._count("list", prefix)
        return Folder(folders, entries)

    async def upload(self, name: str, chunks: AsyncIterator[bytes]) -> int:
        """Stream an object in, at most two parts of it in memory; its size. If ``chunks`` raises, or the caller is
        cancelled, nothing is left behind."""
        async with aclosing(_parts(chunks)) as parts:
            first = await anext(parts, b"")
            second = await anext(parts, None) if len(first) == PART else None
            if second is not None:
                return await self._upload_parts(name, first, second, parts)
        # One request instead of three.
        try:
            await self._send("upload", name, lambda: self._put_large(name, first), repeatable=True)
        except _Failed as failed:
            raise self._error(failed, "upload", name) from None
        return len(first)

    async def _put_large(self, name: str, data: bytes) -> None:
        await self._obstore.put_async(self._open(self._clients.large), name, data, use_multipart=False)

    async def _upload_parts(self, name: str, first: bytes, second: bytes, parts: AsyncIterator[bytes]) -> int:
        # What obstore reads from is a queue, so that it can be told to give up when the caller is cancelled: then, as
        # when the source fails, it takes back the parts that are stored already.
        queue: asyncio.Queue[bytes | _GiveUp | None] = asyncio.Queue(1)
        size = 0

        async def feed() -> AsyncIterator[bytes]:
            while (part := await queue.get()) is not None:
                if isinstance(part, _GiveUp):
                    raise part
                self._count("part", name)
                yield part

        async def put() -> None:
            await self._obstore.put_async(
                self._open(self._clients.parts),
                name,
                feed(),
                use_multipart=True,
                chunk_size=PART,
                max_concurrency=_PARTS_AT_ONCE,
            )

        async def give(part: bytes | None) -> bool:
            """False when obstore has ended before it took the part."""
            putting = asyncio.ensure_future(queue.put(part))
            await asyncio.wait((putting, task), return_when=asyncio.FIRST_COMPLETED)
            if not putting.done():
                putting.cancel()
            return not task.done()

        self._count("upload", name)
        task = asyncio.ensure_future(put())
        try:
            for part in (first, second):
                size += len(part)
                await give(part)
            async for part in parts:
                size += len(part)
                if not await give(part):
                    break
            await give(None)
            await asyncio.shield(task)
        except self._errors as error:
            # Unconditional, and under a name that nobody knows yet: the caller may upload anew, under another.
            raise self._error(_Failed(read_reply(error)), "upload", name) from None
        except BaseException:
            # The feed ends at the first thing that it is given, whatever waits in the queue.
            while not queue.empty():
                queue.get_nowait()
            queue.put_nowait(_GiveUp())
            with suppress(_GiveUp, *self._errors):
                await task
                await self.delete(name)  # it was completed already
            raise
        self._count("upload", name)  # the one that completes it
        return size

    async def download(self, name: str) -> AsyncIterator[bytes]:
        """Stream an object out, in chunks of at most 1 MiB; where a connection breaks, it goes on with another.

        Raises MessageNotFound when it is not there, StoreCorrupt when it ends early or changes meanwhile."""
        done, size, etag = 0, None, None
        tries = 0
        while size is None or done < size:
            options: dict[str, Any] = {}
            if etag is not None:
                options["if_match"] = etag
            if done:
                options["range"] = {"offset": done}

            async def get(options: dict[str, Any] = options) -> Any:
                return await self._obstore.get_async(self._open(self._clients.large), name, options=options)

            try:
                result = await self._send("download", name, get, repeatable=True)
            except _Failed as failed:
                if failed.reply.outcome is Outcome.MISSING:
                    raise MessageNotFound(f"object {name} is not (or no longer) there") from None
                if failed.reply.outcome is Outcome.CHANGED:
                    raise StoreCorrupt(f"object {name} was replaced while it was read; read it again") from None
                raise self._error(failed, "download", name) from None
            size, etag = result.meta["size"], result.meta["e_tag"]
            before = done
            try:
                async for chunk in result.stream(min_chunk_size=1):
                    view = memoryview(chunk)
                    for start in range(0, len(view), _CHUNK):
                        piece = bytes(view[start : start + _CHUNK])
                        done += len(piece)
                        yield piece
                broke = ""
            except self._errors as error:
                broke = read_reply(error).detail
            if done >= size:
                break
            tries = 0 if done > before else tries + 1
            if (not broke and done == before) or tries >= MOST_TRIES:
                raise StoreCorrupt(
                    f"object {name} ends after {done:,} of {size:,} bytes; {broke or 'it is incomplete'}"
                )
            if not await self._pause(tries, until=self._clock.monotonic() + self._patience):
                break
        if size is not None and done != size:
            raise StoreCorrupt(f"object {name} has {done:,} bytes where {size:,} were announced")

    async def close(self) -> None:
        """No more requests. Repeatable."""
        self._closed = True

    @property
    def _small(self) -> ObjectStore:
        return self._open(self._clients.small)

    def _open(self, store: ObjectStore) -> ObjectStore:
        if self._closed:
            raise StoreClosed(f"the bucket {self.where} is closed; connect again")
        return store

    def _count(self, kind: str, name: str) -> None:
        self.sent[kind] += 1
        if self._on_request is not None:
            self._on_request(kind, name)

    async def _send(
        self,
        kind: str,
        name: str,
        call: Callable[[], Awaitable[T]],
        *,
        repeatable: bool = False,
        patience: float | None = None,
        once: bool = False,
    ) -> T:
        """Send a request, and again while it did not take place, or (``repeatable``) while it is not known to have.
        ``once``: not on the word of something on the way. Raises _Failed."""
        self._open(self._clients.small)
        until = self._clock.monotonic() + (self._patience if patience is None else patience)
        tries = 0
        while True:
            self._count(kind, name)
            if tries:
                self.on_repeat(kind, name)
            try:
                return await call()
            except Exception as error:
                # A panic inside obstore is of a class that cannot be named here.
                if not isinstance(error, self._errors) and type(error).__name__ != "RustPanic":
                    raise
                reply = read_reply(error)
            tries += 1
            outcome = reply.outcome
            if outcome is Outcome.EXISTS and kind == "replace":
                # A 409 of a replace: there is nothing else that it could mean.
                reply = Reply(Outcome.AGAIN, reply.detail)
            if once and reply.outcome is Outcome.THROTTLED and not reply.certain:
                reply = Reply(Outcome.UNKNOWN, reply.detail)
            again = reply.outcome in {Outcome.AGAIN, Outcome.THROTTLED, Outcome.NOT_SENT}
            if not (again or (repeatable and outcome is Outcome.UNKNOWN)) or tries >= MOST_TRIES:
                raise _Failed(reply, repeatable=repeatable)
            if not await self._pause(tries, until):
                raise _Failed(reply, repeatable=repeatable)

    async def _pause(self, tries: int, until: float) -> bool:
        """Wait before another try; False, at once, when that would be too late."""
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** max(0, tries - 1))
        seconds = longest * (500 + self._ids.below(501)) / 1000
        if self._clock.monotonic() + seconds > until:
            return False
        over = asyncio.get_running_loop().create_future()
        timer = self._clock.call_later(seconds, lambda: None if over.done() else over.set_result(None))
        try:
            await over
        finally:
            timer.cancel()
        return True

    def _error(self, failed: _Failed, kind: str, name: str) -> StoreError:
        """What the caller is told of a request that failed for good."""
        outcome, detail, _ = failed.reply
        what = f"{_WORDS[kind]} {name or 'the bucket'} in {self.where}"
        match outcome:
            case Outcome.THROTTLED:
                return StoreBusy(f"{what}: the bucket takes no more requests for now ({detail}); try again later")
            case Outcome.AGAIN:
                return StoreBusy(f"{what}: others write the same object all the time ({detail}); try again")
            case Outcome.UNKNOWN if not failed.repeatable:
                return OutcomeUnknown(f"{what}: it is not known whether it took place ({detail}); read it back")
            case Outcome.UNKNOWN:
                return StoreError(f"{what}: no usable answer ({detail}); try again, or check the network")
            case Outcome.NOT_SENT:
                return StoreError(f"{what}: {detail}; check the endpoint, the region and the network")
            case Outcome.NO_BUCKET | Outcome.MISSING:
                return StoreError(
                    f"{what}: there is no such bucket ({detail}); create it, or check its name and region"
                )
            case Outcome.DENIED:
                return StoreError(f"{what}: no permission ({detail}); allow {PERMISSIONS[kind][self.cloud]}")
            case Outcome.CREDENTIALS:
                return StoreError(f"{what}: no valid credentials ({detail}); {CREDENTIALS[self.cloud]}")
            case Outcome.SKEWED:
                return StoreError(f"{what}: this machine's clock is too far off ({detail}); set it by NTP")
            case Outcome.ELSEWHERE:
                return StoreError(f"{what}: the bucket is in another region ({detail}); name it with ?region=")
            case _:
                return StoreError(f"{what}: refused ({detail}); `millpond verify` checks what the bucket can do")


class _Failed(Exception):
    """A request that was not answered as hoped; never leaves this module."""

    def __init__(self, reply: Reply, *, repeatable: bool = False) -> None:
        super().__init__(reply.detail)
        self.reply = reply
        self.repeatable = repeatable


class _GiveUp(Exception):
    """Tells obstore to take back a large upload; never leaves this module."""


_WORDS = {
    "create": "creating",
    "replace": "replacing",
    "read": "reading",
    "delete": "deleting",
    "delete_many": "deleting",
    "list": "listing",
    "upload": "uploading",
    "download": "downloading",
}


def _ms(meta: ObjectMeta) -> int:
    return round(meta["last_modified"].timestamp() * 1000)


def _entry(meta: ObjectMeta) -> Entry:
    etag = meta["e_tag"]
    if etag is not None and not etag.endswith('"'):
        etag = f'"{etag}"'  # Azure leaves the quotes out of listings
    return Entry(meta["path"], meta["size"], Tag(etag, meta["version"]), _ms(meta))


def _objects(entries: Iterable[Entry], prefix: str) -> Iterator[Entry]:
    """Those below the prefix, without what SeaweedFS says of a folder itself: an object of no bytes and no ETag."""
    return (e for e in entries if e.name.startswith(prefix) and e.tag.etag not in {None, '""'})


async def _parts(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The same bytes in pieces of `PART`, the last one shorter."""
    buffer = bytearray()
    async for chunk in chunks:
        view = memoryview(chunk)
        while view:
            room = PART - len(buffer)
            buffer += view[:room]
            view = view[room:]
            if len(buffer) == PART:
                yield bytes(buffer)
                buffer.clear()
    if buffer:
        yield bytes(buffer)
