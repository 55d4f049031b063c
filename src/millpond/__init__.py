"""Millpond: a durable, at-least-once message queue that lives in storage you already have.

async with millpond.connect("sqlite:///work.db") as pond:
    orders = pond.queue("orders")
    await orders.enqueue(b"…")
    for message in await orders.receive(count=10, wait=5.0):
        await message.ack()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public names are loaded when they are first used, so that `millpond --help` and a mere import stay quick.
_WHERE = {
    "Answer": "queue",
    "Config": "service.config",
    "DeadLetters": "queue",
    "EnqueueOptions": "service.config",
    "Lease": "message",
    "Message": "message",
    "MessageState": "message",
    "MessageStream": "stream",
    "MessageView": "message",
    "Payload": "service.payloads",
    "Pond": "pond",
    "PondRequests": "requests",
    "Queue": "queue",
    "QueueCounts": "queue",
    "QueuePolicy": "service.config",
    "QueueRequests": "requests",
    "Receipt": "queue",
    "Requests": "stores.base",
    "SyncDeadLetters": "sync",
    "SyncMessage": "sync",
    "SyncMessageState": "sync",
    "SyncMessageStream": "sync",
    "SyncMessageView": "sync",
    "SyncPond": "sync",
    "SyncQueue": "sync",
    "SyncTaskHandle": "sync",
    "connect": "connecting",
    "connect_sync": "sync",
    "Consumer": "worker.registry",
    "Context": "worker.hooks",
    "Defer": "worker.outcomes",
    "GiveUp": "worker.outcomes",
    "Middleware": "worker.hooks",
    "Outcome": "worker.outcomes",
    "Retry": "worker.outcomes",
    "RetryPolicy": "worker.retries",
    "Task": "worker.tasks",
    "TaskHandle": "worker.tasks",
    "Tick": "worker.periodic",
    "Worker": "worker.worker",
    "current_task": "worker.tasks",
    "json": "service.payloads",
    "msgpack": "service.payloads",
    "text": "service.payloads",
    "Keyring": "crypto.keyring",
    "CryptoError": "errors",
    "InvalidInput": "errors",
    "InvalidMessageId": "errors",
    "InvalidQueue": "errors",
    "LeaseLost": "errors",
    "MessageNotFound": "errors",
    "MillpondError": "errors",
    "PayloadNotLoaded": "errors",
    "StateConflict": "errors",
    "StoreBusy": "errors",
    "StoreClosed": "errors",
    "StoreCorrupt": "errors",
    "StoreError": "errors",
    "StoreFull": "errors",
    "StoreMismatch": "errors",
    "StoreUnreachable": "errors",
    "OutcomeUnknown": "errors",
    "Tampered": "errors",
    "TaskFailed": "errors",
    "TooLarge": "errors",
    "Unauthorized": "errors",
    "Forbidden": "errors",
    "Throttled": "errors",
    "TooManyConsumers": "errors",
    "UnknownKey": "errors",
}

if TYPE_CHECKING:
    from millpond.connecting import connect
    from millpond.crypto.keyring import Keyring
    from millpond.errors import (
        CryptoError,
        Forbidden,
        InvalidInput,
        InvalidMessageId,
        InvalidQueue,
        LeaseLost,
        MessageNotFound,
        MillpondError,
        OutcomeUnknown,
        PayloadNotLoaded,
        StateConflict,
        StoreBusy,
        StoreClosed,
        StoreCorrupt,
        StoreError,
        StoreFull,
        StoreMismatch,
        StoreUnreachable,
        Tampered,
        TaskFailed,
        Throttled,
        TooLarge,
        TooManyConsumers,
        Unauthorized,
        UnknownKey,
    )
    from millpond.message import Lease, Message, MessageState, MessageView
    from millpond.pond import Pond
    from millpond.queue import Answer, DeadLetters, Queue, QueueCounts, Receipt
    from millpond.requests import PondRequests, QueueRequests
    from millpond.service.config import Config, EnqueueOptions, QueuePolicy
    from millpond.service.payloads import Payload, json, msgpack, text
    from millpond.stores.base import Requests
    from millpond.stream import MessageStream
    from millpond.sync import (
        SyncDeadLetters,
        SyncMessage,
        SyncMessageState,
        SyncMessageStream,
        SyncMessageView,
        SyncPond,
        SyncQueue,
        SyncTaskHandle,
        connect_sync,
    )
    from millpond.worker.hooks import Context, Middleware
    from millpond.worker.outcomes import Defer, GiveUp, Outcome, Retry
    from millpond.worker.periodic import Tick
    from millpond.worker.registry import Consumer
    from millpond.worker.retries import RetryPolicy
    from millpond.worker.tasks import Task, TaskHandle, current_task
    from millpond.worker.worker import Worker


def __getattr__(name: str) -> Any:
    where = _WHERE.get(name)
    if where is None:
        raise AttributeError(f"module 'millpond' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"millpond.{where}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])


__all__ = [
    "Answer",
    "Config",
    "Consumer",
    "Context",
    "CryptoError",
    "DeadLetters",
    "Defer",
    "EnqueueOptions",
    "Forbidden",
    "GiveUp",
    "InvalidInput",
    "InvalidMessageId",
    "InvalidQueue",
    "Keyring",
    "Lease",
    "LeaseLost",
    "Message",
    "MessageNotFound",
    "MessageState",
    "MessageStream",
    "MessageView",
    "Middleware",
    "MillpondError",
    "Outcome",
    "OutcomeUnknown",
    "Payload",
    "PayloadNotLoaded",
    "Pond",
    "PondRequests",
    "Queue",
    "QueueCounts",
    "QueuePolicy",
    "QueueRequests",
    "Receipt",
    "Requests",
    "Retry",
    "RetryPolicy",
    "StateConflict",
    "StoreBusy",
    "StoreClosed",
    "StoreCorrupt",
    "StoreError",
    "StoreFull",
    "StoreMismatch",
    "StoreUnreachable",
    "SyncDeadLetters",
    "SyncMessage",
    "SyncMessageState",
    "SyncMessageStream",
    "SyncMessageView",
    "SyncPond",
    "SyncQueue",
    "SyncTaskHandle",
    "Tampered",
    "Task",
    "TaskFailed",
    "TaskHandle",
    "Throttled",
    "Tick",
    "TooLarge",
    "TooManyConsumers",
    "Unauthorized",
    "UnknownKey",
    "Worker",
    "__version__",
    "connect",
    "connect_sync",
    "current_task",
    "json",
    "msgpack",
    "text",
]
