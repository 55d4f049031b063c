"""What type checkers know of the synchronous API; docs/make_sync_types.py writes it from the other one."""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable, Iterator, Sequence
from datetime import datetime, timedelta, tzinfo
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar, Unpack, overload

from millpond.errors import MillpondError
from millpond.message import Lease
from millpond.model.clock import Clock
from millpond.queue import Answer, QueueCounts, Receipt
from millpond.requests import PondRequests
from millpond.service.collector import Collected
from millpond.service.config import Config, EnqueueFields, PolicyFields, QueuePolicy
from millpond.service.ready import Record
from millpond.stores.base import Capabilities, Problem, QueueName
from millpond.worker.catalog import TaskDecorator
from millpond.worker.hooks import Gate, Middleware, Service
from millpond.worker.limits import Limiter
from millpond.worker.periodic import CatchUp
from millpond.worker.registry import Consumer, RunIn
from millpond.worker.retries import RetryPolicy
from millpond.worker.tasks import Call, CoroutineTask, FunctionTask, SendFields, State

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

class SyncMessageState:
    """`MessageState`, for synchronous code."""

    def load(self) -> Any:
        """The value as last saved, by this holder or an earlier one; None when there is none."""

    def save(self, value: Any) -> None:
        """Replace the value. Raises LeaseLost (nothing changed), InvalidInput, TooLarge."""

    def delete(self) -> None:
        """Forget the value; fine when there is none. Raises LeaseLost."""

class SyncMessage:
    """`Message`, for synchronous code."""

    @property
    def id(self) -> str:
        """The message's id, a UUIDv7."""

    @property
    def namespace(self) -> str:
        """The namespace of its queue."""

    @property
    def queue(self) -> str:
        """The name of its queue."""

    @property
    def lease(self) -> Lease:
        """The lease, with the end that the last extension gave it."""

    @property
    def payload(self) -> bytes:
        """The payload. Raises PayloadNotLoaded when it is stored apart (use `read` or `stream`), and what reading it
        raised when it cannot be read (Tampered, UnknownKey), StoreCorrupt when it is not what was enqueued."""

    @property
    def payload_size(self) -> int:
        """The payload's size in bytes."""

    @property
    def attempts(self) -> int:
        """Deliveries so far, this one included."""

    @property
    def failures(self) -> int:
        """Failures so far: nacks, and leases that ran out unanswered."""

    @property
    def max_attempts(self) -> int:
        """Failures after which it is a dead letter; 0 = without limit."""

    @property
    def priority(self) -> int:
        """0-9, higher first."""

    @property
    def attributes(self) -> dict[str, Any]:
        """The producer's attributes."""

    @property
    def content_type(self) -> str | None:
        """What the producer said the payload is."""

    @property
    def correlation_id(self) -> str | None:
        """The producer's correlation id."""

    @property
    def ordering_key(self) -> str | None:
        """Messages of one key come one at a time, in order."""

    @property
    def dedup_key(self) -> str | None:
        """The key by which a second enqueue was recognised."""

    @property
    def enqueued_at(self) -> datetime:
        """When it was enqueued."""

    @property
    def expires_at(self) -> datetime | None:
        """From when on it is not delivered again."""

    @property
    def last_error(self) -> Any:
        """What an earlier consumer gave as its error."""

    @property
    def state(self) -> SyncMessageState:
        """The workflow state."""

    def stream(self) -> Iterator[bytes]:
        """The payload in chunks, in bounded memory, wherever it is stored. Raises StoreCorrupt while reading, at the
        end if it is stored apart: act on nothing before the end."""

    def read(self, limit: int | None = ...) -> bytes:
        """The whole payload in memory. Raises TooLarge when it is larger than ``limit`` bytes."""

    def text(self) -> str:
        """The payload as UTF-8 text. Raises InvalidInput when it is not that."""

    def json(self) -> Any:
        """The payload as JSON (or MessagePack, if its content type says so). Raises InvalidInput."""

    def decode(self, type: type[T]) -> T:
        """The payload as ``type``: a msgspec Struct, a dataclass, whatever msgspec decodes. Raises InvalidInput."""

    def ack(self, then: Sequence[tuple[Any, ...]] = ...) -> None:
        """Done: the message, its payload and its state are gone for good.

        ``then``: messages to enqueue in the same commit, as (queue, payload) or (queue, payload, options dict); a
        namespace may be given among the options. Raises LeaseLost (nothing changed)."""

    def nack(self, error: Any = ..., delay: float = ...) -> None:
        """Failed: counts a failure; returns after ``delay`` seconds, or becomes a dead letter if its budget is spent.

        ``error``: an exception (of its text the first 8 KiB are kept), text or JSON-like value (at most
        `Config.max_error_bytes`), kept with the message. Raises LeaseLost, InvalidInput, TooLarge."""

    def defer(self, delay: float = ...) -> None:
        """Give it back without a failure, visible after ``delay`` seconds. Raises LeaseLost."""

    def extend(self, seconds: float) -> Lease:
        """The lease ends ``seconds`` (> 0) from now. Raises LeaseLost."""

    def bury(self, reason: str, error: Any = ...) -> None:
        """Give it up: a dead letter with this reason. Raises LeaseLost."""

class SyncMessageView:
    """`MessageView`, for synchronous code."""

    state: str

    @property
    def record(self) -> Record:
        """The record behind the view."""

    @property
    def id(self) -> str:
        """The message's id."""

    @property
    def namespace(self) -> str:
        """The namespace of its queue."""

    @property
    def queue(self) -> str:
        """Its queue."""

    @property
    def priority(self) -> int:
        """0-9, higher first."""

    @property
    def attempts(self) -> int:
        """Deliveries so far."""

    @property
    def failures(self) -> int:
        """Failures so far."""

    @property
    def max_attempts(self) -> int:
        """Failures after which it is a dead letter; 0 = without limit."""

    @property
    def enqueued_at(self) -> datetime:
        """When it was enqueued."""

    @property
    def updated_at(self) -> datetime:
        """When it last changed."""

    @property
    def visible_at(self) -> datetime:
        """From when it can be delivered (again)."""

    @property
    def expires_at(self) -> datetime | None:
        """From when on it is not delivered again."""

    @property
    def attributes(self) -> dict[str, Any]:
        """The producer's attributes."""

    @property
    def content_type(self) -> str | None:
        """What the producer said the payload is."""

    @property
    def correlation_id(self) -> str | None:
        """The producer's correlation id."""

    @property
    def dedup_key(self) -> str | None:
        """The key by which a second enqueue is recognised."""

    @property
    def ordering_key(self) -> str | None:
        """Messages of one key come one at a time, in order."""

    @property
    def payload_size(self) -> int:
        """The payload's size in bytes."""

    @property
    def last_error(self) -> Any:
        """What the last failing consumer gave as its error."""

    @property
    def dead_reason(self) -> str | None:
        """Why it was given up; None while it is alive."""

    @property
    def dead_at(self) -> datetime | None:
        """When it was given up."""

    @property
    def lease(self) -> Lease | None:
        """The lease, if somebody holds it (or held it and never answered)."""

    def stream(self) -> Iterator[bytes]:
        """The payload in chunks. Raises MessageNotFound when the message is gone by now."""

    def payload(self) -> bytes:
        """The whole payload. Raises MessageNotFound when the message is gone by now."""

class SyncMessageStream:
    """`MessageStream`, for synchronous code."""

    def __enter__(self) -> SyncMessageStream: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
    def __iter__(self) -> SyncMessageStream: ...
    def __next__(self) -> SyncMessage: ...

class SyncDeadLetters:
    """`DeadLetters`, for synchronous code."""

    def list(self, *, after: str | None = ..., limit: int = ...) -> builtins.list[SyncMessageView]:
        """Dead letters in order of insertion, from after the one with id ``after``. Raises MessageNotFound."""

    def get(self, message_id: str) -> SyncMessageView:
        """One dead letter. Raises MessageNotFound."""

    def payload(self, message_id: str) -> bytes:
        """A dead letter's payload. Raises MessageNotFound."""

    def redrive(self, ids: Sequence[str] | None = ...) -> int:
        """Back into the queue with a new budget: those with these ids, or all; how many. Raises MessageNotFound."""

    def purge(self, ids: Sequence[str] | None = ...) -> int:
        """Remove for good: those with these ids, or all; how many. Raises MessageNotFound."""

class SyncQueue:
    """`Queue`, for synchronous code."""

    name: str
    namespace: str
    dead_letters: SyncDeadLetters

    def enqueue(
        self,
        payload: Any,
        *,
        delay: float = ...,
        ttl: float | None = ...,
        priority: int = ...,
        max_attempts: int | None = ...,
        visibility: float | None = ...,
        attributes: dict[str, Any] | None = ...,
        dedup_key: str | None = ...,
        dedup_window: float | None = ...,
        ordering_key: str | None = ...,
        content_type: str | None = ...,
        correlation_id: str | None = ...,
        message_id: str | None = ...,
    ) -> Receipt:
        """Put a message into the queue; when this returns, it is stored for good.

        ``payload``: bytes, `millpond.text`/`json`/`msgpack` of a value, a binary file, or an iterator of bytes, async
        or not (streamed in bounded memory). ``delay``, ``ttl``, ``visibility``, ``dedup_window``: seconds.
        ``priority``: 0-9, higher first. ``max_attempts``: failures until it is a dead letter, 0 = never. ``dedup_key``:
        a second enqueue within the window returns the first message. ``ordering_key``: messages of one key are
        delivered one at a time, in order. None means the queue's policy, then the pond's default.

        Raises InvalidInput and TooLarge before anything is written, StoreError."""

    def enqueue_many(
        self,
        payloads: Iterable[Any] | AsyncIterable[Any],
        **options: Unpack[EnqueueFields],
    ) -> builtins.list[Receipt]:
        """Put messages into the queue, in order, in shared commits of up to 500; each stands on its own.

        ``payloads``: any iterable, also an async one, of what `enqueue` takes. ``options``: as for `enqueue`, the same
        for all. If it raises part-way, the chunks before are stored."""

    def receive(
        self,
        count: int = ...,
        *,
        wait: float = ...,
        visibility: float | None = ...,
        owner: str | None = ...,
    ) -> builtins.list[SyncMessage]:
        """Lease up to ``count`` messages, in order of priority and due time; [] when none came within ``wait`` seconds.

        Returns as soon as there is one. ``visibility``: seconds until the leases end, None for the messages' own.
        ``owner``: a name for operators to see. Raises TooManyConsumers, InvalidInput, StoreError."""

    def stream(
        self,
        *,
        credit: int = ...,
        visibility: float | None = ...,
        owner: str | None = ...,
    ) -> SyncMessageStream:
        """Messages as they come: ``async with queue.stream() as messages: async for message in messages: …``.

        At most ``credit`` (1 to 1,000) are unanswered at a time, those that lie ready to be handed out included: so
        many are taken ahead, and their leases run. ``visibility``, ``owner``: as for `receive`. When the block is left,
        what was not answered goes back at once, without a failure. See `MessageStream`. Raises InvalidInput."""

    def ack_many(self, messages: Iterable[SyncMessage]) -> builtins.list[Answer]:
        """Ack each in shared commits; one that fails (LeaseLost) does not hinder the others and is in its answer."""

    def nack_many(
        self,
        messages: Iterable[SyncMessage],
        *,
        error: Any = ...,
        delay: float = ...,
    ) -> builtins.list[Answer]:
        """Nack each in shared commits."""

    def defer_many(self, messages: Iterable[SyncMessage], *, delay: float = ...) -> builtins.list[Answer]:
        """Give each back in shared commits, without a failure."""

    def extend_many(self, messages: Iterable[SyncMessage], seconds: float) -> builtins.list[Answer]:
        """Extend each lease to ``seconds`` from now, in shared commits."""

    def handle(self, message_id: str, lease_id: str, token: Any) -> SyncMessage:
        """A message held by this lease, to be answered from here: for answers that arrive by another way than the
        delivery (a command line, a web request). Nothing is read; a wrong lease shows in the answer."""

    def notify(self) -> None:
        """Tell this process that the queue may have changed: who waits looks at once instead of at the next poll. For
        what is told from outside Millpond, as by a bucket's notifications. Costs nothing while nobody waits; spurious
        and repeated calls cost a look at most."""

    def counts(self) -> QueueCounts:
        """How the queue stands now; costs the same however long it is."""

    def get(self, message_id: str) -> SyncMessageView:
        """Any message of the queue, live or dead. Raises MessageNotFound."""

    def peek(self, count: int = ...) -> builtins.list[SyncMessageView]:
        """The messages that would be handed out next, without taking them."""

    def browse(self, *, after: str | None = ..., limit: int = ...) -> builtins.list[SyncMessageView]:
        """Live messages in order of insertion, held, delayed or ready, from after the one with id ``after``; changes
        nothing. One that cannot be read is left out and logged. Raises MessageNotFound when ``after`` is gone."""

    def next_due(self) -> float | None:
        """Seconds until the earliest message that is not ready now comes due (a delay or a lease ends); None when there
        is none."""

    def purge(self) -> int:
        """Remove every live message that no consumer holds; how many. Dead letters stay."""

    def pause(self) -> None:
        """Hand nothing out until `resume`, in every process within a second (a minute where requests cost money, see
        `Config.policy_max_age`). Safe to repeat. It may come before the first message: the queue is then there by its
        policy."""

    def resume(self) -> None:
        """Hand out again. Safe to repeat."""

    def policy(self) -> QueuePolicy:
        """The queue's policy."""

    def set_policy(self, **fields: Unpack[PolicyFields]) -> QueuePolicy:
        """Change fields of the queue's policy (see `QueuePolicy`); it holds for messages enqueued from now on.

        Raises InvalidInput for unknown fields and values out of range."""

    def reset_policy(self) -> QueuePolicy:
        """Put the default policy in place of the queue's, which also resumes it; the way out when the stored one is
        damaged, or under a key that is lost (StoreCorrupt, Tampered, UnknownKey at every enqueue and receive). Safe to
        repeat. Look for the key first, and for a newer Millpond if it is StoreMismatch: what the policy was is gone."""

class SyncTaskHandle(Generic[R]):
    """`TaskHandle`, for synchronous code."""

    id: str
    duplicate: bool

    def result(self, timeout: float | None = ...) -> R:
        """What the function returned, as soon as it has, decoded by its annotation.

        Raises TaskFailed when the call was given up, MessageNotFound when neither it nor its result is there (any
        more), TimeoutError after ``timeout`` seconds, InvalidInput when the result is not kept."""

    def state(self) -> State:
        """``waiting``, ``running``, ``done`` (its result is there), ``failed`` (given up), or ``gone`` (done, with no
        result kept; or removed)."""

    def progress(self) -> Any:
        """What the function last said about how far it is; None when it said nothing, or is over."""

class PondCalls:
    """`Pond`, for synchronous code."""

    config: Config
    clock: Clock
    consumers: dict[str, Consumer]
    middleware: builtins.list[Middleware]
    services: builtins.list[Service]

    @property
    def is_open(self) -> bool:
        """It was opened and not closed since."""

    @property
    def capabilities(self) -> Capabilities:
        """What the store can do, for those who plan around it."""

    def queue(self, name: str, *, namespace: str | None = ...) -> SyncQueue:
        """A queue by its name; no I/O. Raises InvalidQueue."""

    def notify(self, queue: str, *, namespace: str | None = ...) -> None:
        """As `Queue.notify`, for a queue by its name. Raises InvalidQueue."""

    def queues(self) -> builtins.list[QueueName]:
        """Every queue in the store, by namespace and name."""

    def collect(self) -> Collected:
        """One pass of the collector, which otherwise runs every `Config.collect_interval` seconds: settles expired
        messages, removes orphaned payloads and ended dedup keys. Safe in any number of processes."""

    def verify(self, *, progress: Callable[[int], object] | None = ...) -> builtins.list[Problem]:
        """Check the store's integrity, that every record can be read and that every payload is what was enqueued; []
        when all is well. Reads everything, some payloads at once. ``progress`` is told now and then how many messages
        have been looked at."""

    def unreadable(self, queue: str, *, namespace: str | None = ...) -> builtins.list[tuple[str, MillpondError]]:
        """The ids of the queue's messages whose record cannot be read, live or dead, each with the reason: written
        under a key that the keyring lacks, changed, damaged, or by a newer Millpond. Nobody is given such a message.
        In a bucket also the names of its other objects that are damaged: markers of dedup keys and ids, pointers of
        ordering keys. Reads the whole queue. Raises InvalidQueue."""

    def discard_unreadable(self, queue: str, message_id: str, *, namespace: str | None = ...) -> None:
        """Remove a message whose record cannot be read, with its payload and state, for good. With the key that is
        missing, or the newer Millpond that wrote it, it could still be read.

        In a bucket ``message_id`` may also be the name of a damaged object, as `unreadable` and `verify` tell it. A
        marker of an id and a pointer of an ordering key are written anew from what the queue shows; a dedup key whose
        marker is damaged is free from then on.

        Raises MessageNotFound when there is none, InvalidInput when it can be read, StoreBusy when it is being
        changed."""

    def rekey(self, progress: Callable[[int], None] | None = ..., *, encrypt_plain: bool = ...) -> int:
        """Rewrite everything that is not under the keyring's newest key; how many records. Safe while others work, and
        to repeat. ``encrypt_plain``: also what was never encrypted. Raises InvalidInput without a keyring."""

    def requests(self) -> PondRequests:
        """The requests that this pond has made, where its store charges for them, in total, per queue, and per message
        acked; empty for other stores. Since it was opened, or since `reset_requests`. Asks the store nothing."""

    def reset_requests(self) -> None:
        """Count `requests` from now on."""

    def statistics(self) -> dict[str, Any]:
        """Counters of the store, the ready caches and the dispatcher, and of requests where the store charges for them;
        for operators."""

    def consumer(
        self,
        queue: str,
        *,
        name: str | None = ...,
        namespace: str | None = ...,
        concurrency: int = ...,
        visibility: float | None = ...,
        retry: RetryPolicy | None = ...,
        time_limit: float | None = ...,
        type: Any = ...,
        run_in: RunIn | None = ...,
        middleware: Sequence[Middleware] = ...,
        gate: Gate | None = ...,
    ) -> Callable[[F], F]:
        """Register a function as the handler of a queue's messages; a worker (`millpond worker`, `Worker`) runs it.

        The function stays what it is. Of its parameters one is the payload, decoded and checked by its annotation (or
        ``type``): bytes, str, a msgspec Struct, dataclass, TypedDict, pydantic model …; others are filled by theirs:
        `Message`, `Lease`, `MessageState`, `Context`, `Queue`, `Pond`, or the Sync forms in functions that are no
        coroutines. It returns: ack. It raises: nack, with the delay that ``retry`` says; `Retry`, `GiveUp` and `Defer`
        say otherwise. A payload that does not fit is a dead letter at once.

        ``name``: default the function's. ``concurrency``: handlers at the same time, per process. ``visibility``:
        length of the lease, which is renewed while the handler runs; None for the messages' own. ``time_limit``:
        seconds after which a handler is cancelled, and has failed. ``run_in``: "loop" (coroutine functions), "thread"
        (others), or "process" for work that burns CPU; such a handler can be imported, and gets its payload and `Lease`
        only. Raises InvalidInput."""

    @overload
    def task(  # type: ignore[overload-overlap]
        self,
        function: Callable[P, Coroutine[Any, Any, R]],
        /,
    ) -> CoroutineTask[P, R]: ...
    @overload
    def task(self, function: Callable[P, R], /) -> FunctionTask[P, R]: ...
    @overload
    def task(
        self,
        *,
        name: str | None = ...,
        queue: str | None = ...,
        namespace: str | None = ...,
        concurrency: int = ...,
        visibility: float | None = ...,
        retry: RetryPolicy | None = ...,
        time_limit: float | None = ...,
        run_in: RunIn | None = ...,
        middleware: Sequence[Middleware] = ...,
        gate: Gate | None = ...,
        **options: Unpack[SendFields],
    ) -> TaskDecorator: ...
    def send(self, call: Call[R], **options: Unpack[SendFields]) -> SyncTaskHandle[R]:
        """Send a task's call by this pond, whichever pond of the same store the task was registered with:
        ``pond.send(resize.call("a.png"), delay=60)``. What synchronous code has in place of `Task.send`. Raises as
        `Task.send` does."""

    def periodic(
        self,
        when: str | timedelta,
        *,
        tz: str | tzinfo | None = ...,
        catch_up: CatchUp = ...,
        grace: float = ...,
        name: str | None = ...,
        queue: str | None = ...,
        namespace: str | None = ...,
        concurrency: int = ...,
        visibility: float | None = ...,
        retry: RetryPolicy | None = ...,
        time_limit: float | None = ...,
        run_in: RunIn | None = ...,
        middleware: Sequence[Middleware] = ...,
        gate: Gate | None = ...,
    ) -> Callable[[F], F]:
        """Run a function by the clock: ``@pond.periodic("0 3 * * *", tz="Europe/Berlin")``, or ``"every 10s"``.

        Each tick becomes one message, however many workers there are, and the function is its handler: a failure is
        tried again as for any consumer. A parameter annotated `Tick` gets the time for which it was fired. ``tz``:
        where the expression is read, default UTC. ``catch_up``: of ticks that came while no worker ran, ``"latest"``
        fires the newest, ``"skip"`` none that is later than ``grace`` seconds, a number so many of the newest.
        ``name``: default the function's; ``queue``: default ``periodic.`` and the name. The rest as for `consumer`.
        Raises InvalidInput."""

    def limit(
        self,
        name: str,
        *,
        concurrency: int | None = ...,
        rate: int | None = ...,
        per: float = ...,
        namespace: str | None = ...,
    ) -> Limiter:
        """A limit over all processes, as the ``gate`` of a consumer, task or periodic job.

        ``concurrency``: messages worked on at once. ``rate``: messages begun within any ``per`` seconds. ``name``: what
        makes it the same limit in every process: a queue's, for all of its consumers, or a consumer's. A worker that
        may not begin takes no message. Raises InvalidInput."""
