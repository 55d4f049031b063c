"""Payloads stored apart: streamed in before their record, each under a name of its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress

from millpond.errors import MessageNotFound, StoreError
from millpond.stores.base import Blob, Insert, Item
from millpond.stores.objects import names
from millpond.stores.objects.engine import Engine
from millpond.stores.objects.find import Finder

CHANCE_BYTES = 8
WRITTEN = 10_000
"""Payloads remembered from their upload to their insert."""
LONG = 600_000
"""Milliseconds between two signs of life of an upload."""
TRUST = 600_000
"""Milliseconds after its upload began for which a payload is not looked for again before its insert."""


class Blobs:
    """The payloads of all queues."""

    def __init__(self, engine: Engine, finder: Finder) -> None:
        self._engine = engine
        self._finder = finder
        self._written: OrderedDict[str, int] = OrderedDict()

    async def write(self, namespace: str, queue: str, id: str, chunks: AsyncIterator[bytes], now: int) -> Blob:
        """Stream a payload in. Whatever the chunks raise goes on, and nothing is left."""
        engine = self._engine
        name = names.blob(namespace, queue, id, now, engine.ids.random(CHANCE_BYTES))
        path = names.blobs_prefix(namespace, queue) + name
        size = await engine.exchange.upload(path, self._with_signs(path, chunks))
        self._written[path] = engine.now()
        if len(self._written) > WRITTEN:
            self._written.popitem(last=False)
        return Blob(size, name)

    async def _with_signs(self, path: str, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The chunks; from time to time a sign of life is written meanwhile. Nothing else tells a sweep, reliably, that
        a payload whose upload began long ago is no orphan but a moment old."""
        engine = self._engine
        told = engine.now()
        async for chunk in chunks:
            yield chunk
            now = engine.now()
            if now - told > LONG:
                told = now
                with suppress(StoreError):
                    await engine.exchange.create(names.sign_of_life(path, now), b"", insist=True)

    async def is_there(self, op: Insert) -> bool:
        """Whether an insert's payload was stored, for a message of this id, and is there."""
        parsed = names.parse_blob(op.blob)
        item = op.item
        if parsed is None or "/" in op.blob or "." in op.blob or parsed.id != names.hex_id(item.id):
            return False
        path = names.blobs_prefix(item.namespace, item.queue) + op.blob
        written = self._written.get(path)
        if written is not None and self._engine.now() - written < TRUST:
            return True
        async with self._engine.listing(path) as pages:
            async for page in pages:
                return any(entry.name == path for entry in page)
        return False

    def used(self, namespace: str, queue: str, blob: str) -> None:
        """A record has it now."""
        if blob:
            self._written.pop(names.blobs_prefix(namespace, queue) + blob, None)

    def swept(self, path: str) -> None:
        """It was removed as an orphan."""
        self._written.pop(path, None)

    async def read(self, item: Item) -> AsyncGenerator[bytes, None]:
        """Stream a payload out. Raises MessageNotFound, StoreCorrupt."""
        known = await self._finder.of_item(item)
        gone = MessageNotFound(f"the payload of message {item.id} is not (or no longer) there")
        if known is None or not known.record.blob:
            raise gone
        path = names.blobs_prefix(item.namespace, item.queue) + known.record.blob
        try:
            chunks = self._engine.bucket.download(path)
            try:
                async for chunk in chunks:
                    yield chunk
            finally:
                closing = getattr(chunks, "aclose", None)
                if closing is not None:
                    await closing()
        except MessageNotFound:
            raise gone from None
