"""The documents of queues, each an object of its own with a number that only grows."""

from __future__ import annotations

from millpond.stores.base import Cause, Conflict, Document, DocumentWritten, Outcome, PutDocument
from millpond.stores.objects import names, records
from millpond.stores.objects.bucket import Content, Tag
from millpond.stores.objects.engine import Engine
from millpond.stores.objects.exchange import undecided
from millpond.stores.objects.records import Text


class Documents:
    """The documents of all queues."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: dict[str, tuple[int, Tag]] = {}

    async def read(self, namespace: str, queue: str) -> Document | None:
        """The queue's document."""
        path = names.policy(namespace, queue)
        content = await self._engine.exchange.read(path)
        if content is None:
            self._known.pop(path, None)
            return None
        text = records.decode(Text, content.data, path)
        self._known[path] = (text.version, content.tag)
        return Document(text.data, str(text.version))

    async def put(self, op: PutDocument) -> Outcome:
        """Write it, if it is as the op expects."""
        path = names.policy(op.namespace, op.queue)
        exchange = self._engine.exchange
        version = 1
        if op.expect is not None:
            if not op.expect.isascii() or not op.expect.isdigit():
                return Conflict(Cause.STATE)
            version = int(op.expect) + 1
        data = records.encode(Text(records.FORMAT, self._engine.write_id(), version, op.data))

        def lost(content: Content) -> bool:
            # Of one number there is one document; those above may have been written over this one.
            return records.decode(Text, content.data, path).version <= version

        result: Tag | Content | None
        if op.expect is None:
            created = await exchange.create_until(path, data, insist=True, check=None)
            result = created.result
            if isinstance(result, Content) and created.unsure and not lost(result):
                raise undecided(path)
        else:
            if self._known.get(path, (0, None))[0] != version - 1:
                await self.read(op.namespace, op.queue)
            known = self._known.get(path)
            if known is None or known[0] != version - 1:
                return Conflict(Cause.STATE)
            result = await exchange.swap(path, data, known[1], lost=lost)
        if not isinstance(result, Tag):
            self._known.pop(path, None)
            return Conflict(Cause.STATE)
        self._known[path] = (version, result)
        return DocumentWritten(str(version))
