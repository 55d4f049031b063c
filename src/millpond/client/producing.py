"""Enqueue by way of a server."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec

from millpond.client import records
from millpond.client.asking import Asking, decoder, encode, read
from millpond.client.asking import key as queue_key
from millpond.client.transport import Attempt
from millpond.errors import InvalidInput, TooLarge
from millpond.service.config import DEFAULT_OPTIONS, EnqueueOptions, Wishes, check_options
from millpond.service.payloads import Inline, Payload, Streamed, prepare
from millpond.service.producing import Receipt
from millpond.wire import headers, native

INLINE = 64 * 1024
"""Payloads up to this size travel in a message; larger ones, and what is read from a source, in a body of their own."""
BATCH_BYTES = 8 * 1024 * 1024
"""Payloads of one request together: a quarter of what a server takes unless told otherwise."""
HAND_OFF_BYTES = 16 * 1024 * 1024
"""Largest payload of a hand-off: it goes in the body that acks."""
MOST_BYTES = 1 << 62
"""The server's limit of a payload is not known here; it says so itself."""
BOUNDARY = "millpond"

receipts = decoder(native.Receipts)


class _Uploaded(msgspec.Struct):
    """What is read of the answer to a multipart enqueue."""

    message_id: str
    duplicate: bool = False


class Producing(Asking):
    """The producers' part."""

    def _chosen(self, wishes: Wishes | None) -> str:
        """The id of a message, chosen before it is sent, as the service chooses it."""
        if wishes is None:
            return self.ids.message_id()
        if wishes.message_id is not None:
            return wishes.message_id
        if wishes.delay and wishes.ordering_key is None:
            return self.ids.later_id(self.clock.now_ms() + wishes.delay)
        return self.ids.message_id()

    async def enqueue(
        self, namespace: str | None, queue: str, source: Any, options: EnqueueOptions = DEFAULT_OPTIONS
    ) -> Receipt:
        """As `QueueService.enqueue`. Sent again when no reply comes, with the same id; OutcomeUnknown when that is in
        vain, or when the payload cannot be read again."""
        [receipt] = await self.enqueue_many(namespace, queue, (source,), options)
        return receipt

    async def enqueue_many(
        self, namespace: str | None, queue: str, sources: Sequence[Any], options: EnqueueOptions = DEFAULT_OPTIONS
    ) -> list[Receipt]:
        """As `QueueService.enqueue_many`, for at most as many as `Queue` sends at once."""
        key = queue_key(namespace, queue)
        wishes = None if options is DEFAULT_OPTIONS else check_options(options)
        prepared = [await self._prepare(source) for source in sources]
        found: list[Receipt] = []
        batch: list[native.NewMessage] = []
        size = 0
        for content_type, payload in prepared:
            id = self._chosen(wishes)
            if isinstance(payload, bytes):
                batch.append(records.new_message(payload, wishes, id, content_type))
                size += len(payload)
                if size < BATCH_BYTES and len(batch) < native.MAX_BATCH:
                    continue
            if batch:
                found += await self._send(key, batch, wishes)
                batch, size = [], 0
            if not isinstance(payload, bytes):
                found.append(await self._upload(key, payload, wishes, id, content_type))
        if batch:
            found += await self._send(key, batch, wishes)
        return found

    async def _prepare(self, source: Any) -> tuple[str | None, bytes | Callable[[], AsyncIterator[bytes]] | Streamed]:
        """The content type, if the source knows it, and: the payload, or a way to make its chunks again and again, or
        chunks that come but once. Raises InvalidInput."""
        content_type = None
        if source.__class__ is Payload:
            source, content_type = source
        if isinstance(source, (bytes, bytearray, memoryview)):
            data = bytes(source)
            return content_type, data if len(data) <= INLINE else lambda: _pieces(data)
        found = await prepare(source, inline_limit=INLINE, limit=MOST_BYTES)
        return content_type, found.data if isinstance(found, Inline) else found

    async def _send(self, key: tuple[str, str], batch: list[native.NewMessage], wishes: Wishes | None) -> list[Receipt]:
        attempt = Attempt()
        own = wishes is None or wishes.message_id is None

        def body() -> bytes:
            repeated = own and attempt.unsure
            return encode(native.EnqueueBatchRequest(namespace=key[0], queue=key[1], messages=batch, repeated=repeated))

        found = read(receipts, await self.transport.call("/v1/queue/enqueueBatch", body, attempt=attempt))
        return [
            self._receipt(receipt.message_id, receipt.duplicate, new.message_id, attempt, wishes)
            for receipt, new in zip(found.receipts, batch, strict=True)
        ]

    @staticmethod
    def _receipt(id: str, duplicate: bool, chosen: str | None, attempt: Attempt, wishes: Wishes | None) -> Receipt:
        own = wishes is None or wishes.message_id is None
        # Nobody else knows an id that was made here: what is there under it is from a try of ours without a reply.
        return Receipt(id, duplicate and not (own and attempt.unsure and id == chosen))

    async def _upload(
        self,
        key: tuple[str, str],
        payload: Callable[[], AsyncIterator[bytes]] | Streamed,
        wishes: Wishes | None,
        id: str,
        content_type: str | None,
    ) -> Receipt:
        message = records.new_message(b"", wishes, id, content_type)
        meta: dict[str, Any] = {
            name: value
            for name in native.NewMessage.__struct_fields__
            if name != "payload" and (value := getattr(message, name)) is not None
        }
        if message.max_attempts == 0:
            meta["unlimited_attempts"] = True  # 0 is lockd's word for "the default"
        kind, head = _meta_part({"namespace": key[0], "queue": key[1], **meta})
        boundary = BOUNDARY + self.ids.random(16).hex()

        opening = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="meta"\r\nContent-Type: {kind}\r\n\r\n'
        ).encode()
        between = (
            f"\r\n--{boundary}\r\n"
            'Content-Disposition: form-data; name="payload"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode()

        async def body() -> AsyncIterator[bytes]:
            yield opening + head + between
            chunks = payload.chunks if isinstance(payload, Streamed) else payload()
            try:
                async for chunk in chunks:
                    yield chunk
            finally:
                close = getattr(chunks, "aclose", None)
                if close is not None:
                    await close()
            yield f"\r\n--{boundary}--\r\n".encode()

        attempt = Attempt()
        data = await self.transport.upload(
            "/v1/queue/enqueue",
            f"multipart/related; boundary={boundary}",
            body,
            again=not isinstance(payload, Streamed),
            attempt=attempt,
        )
        found = read(lambda data: msgspec.json.decode(data, type=_Uploaded), data)
        return self._receipt(found.message_id, found.duplicate, id, attempt, wishes)


def _meta_part(meta: dict[str, Any]) -> tuple[str, bytes]:
    """What is said of a message whose payload is streamed, and its content type: JSON, which every server of lockd's
    protocol reads, unless there are values that it has no form for. Raises InvalidInput."""
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        data = msgspec.json.encode(meta)
        if msgspec.json.decode(data) == meta:
            return headers.JSON, data
    try:
        return headers.MSGPACK, msgspec.msgpack.encode(meta)
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        raise InvalidInput(f"the options of an enqueue cannot be sent: {error}") from error


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    view = memoryview(data)
    for start in range(0, len(data), INLINE * 4):
        yield bytes(view[start : start + INLINE * 4])


async def whole(payload: Callable[[], AsyncIterator[bytes]] | Streamed) -> bytes:
    """All of a payload, for a hand-off. Raises TooLarge."""
    parts: list[bytes] = []
    size = 0
    async for chunk in payload.chunks if isinstance(payload, Streamed) else payload():
        size += len(chunk)
        if size > HAND_OFF_BYTES:
            raise TooLarge(
                f"what is handed on with an ack over HTTP has at most {HAND_OFF_BYTES} bytes; enqueue it first, with a "
                "dedup_key, then ack"
            )
        parts.append(chunk)
    return b"".join(parts)
