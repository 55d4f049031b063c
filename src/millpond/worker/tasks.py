"""Tasks: functions that are called in one process and run in another.

A call is a message. Its payload is a JSON object of the arguments by name, made and checked by the function's own
annotations, at both ends; nothing is pickled, so a call can be read, written by other programs, and never runs code by
being decoded.

A result that was asked for is a message as well: in the queue `RESULTS` of the task's namespace, under the id of the
call, enqueued in the same commit that acks the call. Nobody consumes it; its time to live ends it, and the collector
removes it then. Progress is the workflow state of the call's message, and goes with it.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import typing
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextvars import ContextVar
from functools import update_wrapper
from typing import Any, Generic, Literal, ParamSpec, TypedDict, TypeVar, Unpack, cast

import msgspec

from millpond.errors import InvalidInput, MessageNotFound, TaskFailed
from millpond.message import Message
from millpond.model.message import DEFAULT_PRIORITY
from millpond.model.names import message_id, namespace_name, queue_name
from millpond.queue import Queue
from millpond.service.config import EnqueueFields
from millpond.service.payloads import JSON, Payload
from millpond.worker.hooks import Context, Middleware
from millpond.worker.outcomes import GiveUp
from millpond.worker.source import Source

P = ParamSpec("P")
R = TypeVar("R")

RESULTS = "millpond.results"
"""The queue in which results lie until their time to live ends."""
KEEP = "millpond.keep_result"
"""The attribute of a call that asks for its result: for how many seconds it is kept."""
FIRST_LOOK = 0.01
LONGEST_LOOK = 1.0
"""Seconds between looks for a result that another process makes: rarer the longer it takes."""
PROGRESS = "progress"
LOOP = "millpond.loop"

State = Literal["waiting", "running", "done", "failed", "gone"]


class SendFields(TypedDict, total=False):
    """How a call is sent. Durations are seconds."""

    delay: float
    priority: int
    ttl: float | None
    max_attempts: int | None
    ordering_key: str | None
    correlation_id: str | None
    attributes: dict[str, Any]
    unique: str | bool
    """A second call with this key, within ``unique_for``, is the first one. True: with the same arguments."""
    unique_for: float | None
    keep_result: float | None
    """Seconds for which the result can be asked for; None: it is not kept."""


class _Options(msgspec.Struct, frozen=True, kw_only=True):
    """`SendFields`, checked."""

    delay: float = 0.0
    priority: int = DEFAULT_PRIORITY
    ttl: float | None = None
    max_attempts: int | None = None
    ordering_key: str | None = None
    correlation_id: str | None = None
    attributes: dict[str, Any] = {}
    unique: str | bool = False
    unique_for: float | None = None
    keep_result: float | None = None

    def __post_init__(self) -> None:
        keep: Any = self.keep_result
        if keep is not None and (keep.__class__ not in (int, float) or not keep > 0):
            raise InvalidInput(f"keep_result is a number of seconds, more than 0, or None, not {keep!r:.100}")

    def changed(self, fields: SendFields) -> _Options:
        """With these fields instead. Raises InvalidInput."""
        try:
            return _Options(**(msgspec.structs.asdict(self) | dict(fields)))
        except TypeError as error:
            raise InvalidInput(f"options of a task: {error}") from error


def _encode_other(value: Any) -> Any:
    if hasattr(value, "model_dump"):  # a pydantic model
        return value.model_dump(mode="json")
    raise NotImplementedError(f"a {type(value).__name__} has no form in JSON")


def _decode_other(kind: Any, value: Any) -> Any:
    if hasattr(kind, "model_validate"):
        return kind.model_validate(value)
    if isinstance(value, kind):
        return value
    raise NotImplementedError(f"nothing is known of how a {kind!r} is made from JSON")


_json = msgspec.json.Encoder(enc_hook=_encode_other)
_UNENCODABLE = (TypeError, ValueError, OverflowError, RecursionError, NotImplementedError)


class Signature:
    """A function's parameters, and how a call's arguments become JSON and come back. Annotations are looked at when the
    first call is made, because what they name may be defined further down."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._signature = inspect.signature(function)
        self._decoder: msgspec.json.Decoder[Any] | None = None
        self._result: msgspec.json.Decoder[Any] | None = None

    def _hints(self) -> dict[str, Any]:
        try:
            return typing.get_type_hints(self._function, include_extras=True)
        except NameError as error:
            raise InvalidInput(
                f"the annotations of task {self._function.__name__} cannot be read: {error}; import what they name at "
                "run time, not under TYPE_CHECKING only"
            ) from error

    @property
    def decoder(self) -> msgspec.json.Decoder[Any]:
        """Reads the arguments: a struct with a field per parameter."""
        if self._decoder is None:
            hints = self._hints()
            fields = []
            for at, parameter in enumerate(self._signature.parameters.values()):
                kind: Any = hints.get(parameter.name, Any)
                default: Any = msgspec.NODEFAULT
                if parameter.kind is parameter.VAR_POSITIONAL:
                    kind, default = list[kind], msgspec.UNSET
                elif parameter.kind is parameter.VAR_KEYWORD:
                    kind, default = dict[str, kind], msgspec.UNSET
                elif parameter.default is not parameter.empty:
                    default = msgspec.UNSET  # the function knows its own default
                if default is msgspec.UNSET and kind is not Any:
                    kind = kind | msgspec.UnsetType
                fields.append((f"field{at}", kind, msgspec.field(default=default, name=parameter.name)))
            struct = msgspec.defstruct("Arguments", fields, forbid_unknown_fields=True, kw_only=True)
            self._decoder = msgspec.json.Decoder(struct, dec_hook=_decode_other)
        return self._decoder

    def encode(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bytes:
        """The arguments as JSON. Raises TypeError as the call itself would, and InvalidInput for what does not fit the
        annotations."""
        bound = self._signature.bind(*args, **kwargs)
        try:
            data = _json.encode(bound.arguments)
        except _UNENCODABLE as error:
            raise InvalidInput(f"an argument of task {self._function.__name__} cannot be sent: {error}") from error
        self.decode(data)
        return data

    def decode(self, data: bytes) -> inspect.BoundArguments:
        """The arguments that a call's payload holds. Raises InvalidInput."""
        try:
            fields = msgspec.structs.astuple(self.decoder.decode(data))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidInput(f"these are no arguments of task {self._function.__name__}: {error}") from error
        bound = inspect.BoundArguments(self._signature, typing.cast(Any, {}))
        for parameter, value in zip(self._signature.parameters.values(), fields, strict=True):
            if value is not msgspec.UNSET:
                bound.arguments[parameter.name] = tuple(value) if parameter.kind is parameter.VAR_POSITIONAL else value
        return bound

    def result(self, data: bytes) -> Any:
        """A result, as the function's annotation says. Raises InvalidInput."""
        if self._result is None:
            kind = self._hints().get("return", Any)
            self._result = msgspec.json.Decoder(kind, dec_hook=_decode_other)
        try:
            return self._result.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidInput(f"this is no result of task {self._function.__name__}: {error}") from error


class Waiters:
    """Who of this process waits for which result, so that those made here need no looking for."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Event]] = {}

    def add(self, id: str, event: asyncio.Event) -> None:
        """Set the event when the call is over."""
        self._waiting.setdefault(id, set()).add(event)

    def remove(self, id: str, event: asyncio.Event) -> None:
        """No longer."""
        events = self._waiting.get(id, set())
        events.discard(event)
        if not events:
            self._waiting.pop(id, None)

    def over(self, id: str) -> None:
        """A call is over, one way or another."""
        for event in self._waiting.get(id, ()):
            event.set()


class TaskRun:
    """The call that is being run; see `current_task`."""

    def __init__(self, context: Context, loop: asyncio.AbstractEventLoop | None) -> None:
        self._context = context
        self._loop = loop

    @property
    def id(self) -> str:
        """The call's id: that of its message and of its handle."""
        return self._context.message.id

    @property
    def message(self) -> Message:
        """The call's message."""
        return self._context.message

    @property
    def cancelled(self) -> bool:
        """It need not go on: see `Context.cancelled`."""
        return self._context.cancelled

    async def progress(self, value: Any) -> None:
        """Tell how far it is: anything that JSON holds; who has the handle can ask. Raises LeaseLost, InvalidInput."""
        await self.message.state.save({PROGRESS: value})

    def progress_sync(self, value: Any) -> None:
        """As `progress`, for functions that are no coroutines."""
        if self._loop is None:
            raise InvalidInput("progress_sync is for tasks that run in threads; await progress(…) instead")
        asyncio.run_coroutine_threadsafe(self.progress(value), self._loop).result()


_current: ContextVar[TaskRun] = ContextVar("millpond_task")


def current_task() -> TaskRun:
    """The call that is being run here. Raises InvalidInput outside of a task's function, and in a function that was
    called as such."""
    try:
        return _current.get()
    except LookupError:
        raise InvalidInput("no task is being run here: only a worker runs tasks") from None


class TaskHandle(Generic[R]):
    """A call that was sent: ask it for its result."""

    def __init__(
        self, task: Task[Any, R], id: str, *, duplicate: bool = False, kept: bool = True, source: Source | None = None
    ) -> None:
        self._task = task
        self._source = task.source if source is None else source
        self.id = message_id(id)
        """The call's id. It may be stored: `Task.handle` makes it a handle again."""
        self.duplicate = duplicate
        """An earlier call had the same unique key; this is that one."""
        self._kept = kept

    @property
    def _calls(self) -> Queue:
        return self._task.calls(self._source)

    @property
    def _results(self) -> Queue:
        return self._source.queue(RESULTS, namespace=self._task.calls(self._source).namespace)

    async def result(self, timeout: float | None = None) -> R:
        """What the function returned, as soon as it has, decoded by its annotation.

        Raises TaskFailed when the call was given up, MessageNotFound when neither it nor its result is there (any
        more), TimeoutError after ``timeout`` seconds, InvalidInput when the result is not kept."""
        if not self._kept:
            raise InvalidInput(
                f"the result of task {self._task.name} is not kept: send it with keep_result=60 (seconds), by "
                "@pond.task(keep_result=…) or .options(keep_result=…)"
            )
        clock = self._source.clock
        end = None if timeout is None else clock.monotonic() + timeout
        over = asyncio.Event()
        here = self._source is self._task.source
        if here:  # another pond may have another event loop, in another thread
            self._task.waiters.add(self.id, over)
        pause = FIRST_LOOK
        try:
            while True:
                over.clear()
                found, value = await self._look()
                if found:
                    return value
                left = LONGEST_LOOK if end is None else end - clock.monotonic()
                if left <= 0:
                    raise TimeoutError(f"task {self._task.name} {self.id} has no result after {timeout} seconds")
                timer = clock.call_later(min(pause, left), over.set)
                try:
                    await over.wait()
                finally:
                    timer.cancel()
                pause = min(pause * 2, LONGEST_LOOK)
        finally:
            if here:
                self._task.waiters.remove(self.id, over)

    async def _look(self) -> tuple[bool, R]:
        """Whether there is a result, and which. Raises what `result` does."""
        task = self._task
        # The call first: a result that comes between the two looks is seen by the second.
        try:
            call = await self._calls.get(self.id)
        except MessageNotFound:
            call = None
        if call is not None:
            if call.dead_reason is not None:
                raise _failed(task.name, call.last_error, call.dead_reason)
            return False, cast(R, None)
        try:
            view = await self._results.get(self.id)
            return True, task.signature.result(await view.payload())
        except MessageNotFound:
            raise MessageNotFound(
                f"task {task.name} {self.id} is not there, and no result of it: it is done and the result was not kept "
                "or its time is over, or the call was removed, or never sent"
            ) from None

    async def state(self) -> State:
        """``waiting``, ``running``, ``done`` (its result is there), ``failed`` (given up), or ``gone`` (done, with no
        result kept; or removed)."""
        try:
            call = await self._calls.get(self.id)
            if call.dead_reason is not None:
                return "failed"
            return "running" if call.state == "leased" else "waiting"
        except MessageNotFound:
            pass
        try:
            await self._results.get(self.id)
            return "done"
        except MessageNotFound:
            return "gone"

    async def progress(self) -> Any:
        """What the function last said about how far it is; None when it said nothing, or is over."""
        # A handle for looking only: a state is read by the message's id.
        state = await self._calls.handle(self.id, "looking", 1).state.load()
        return state.get(PROGRESS) if isinstance(state, dict) else None

    def __repr__(self) -> str:
        return f"<TaskHandle {self.id} of {self._task.name}>"


def _failed(name: str, error: Any, reason: str) -> TaskFailed:
    kind, text = "", ""
    if isinstance(error, dict):
        kind, text = str(error.get("type", "")), str(error.get("message", ""))
    elif error is not None:
        text = str(error)
    said = ": ".join(part for part in (kind, text) if part)
    return TaskFailed(f"task {name} failed ({reason})" + (f": {said}" if said else ""), kind=kind, text=text)


class Call(Generic[R]):
    """A call of a task with its arguments, not sent yet; for `Task.send_many` and `Pond.send`."""

    def __init__(self, task: Task[Any, R], payload: bytes) -> None:
        self.task = task
        self.payload = payload
        """The arguments, as JSON."""


class Sender(Generic[P, R]):
    """A task with options for sending it."""

    def __init__(self, task: Task[P, R], options: _Options, source: Source) -> None:
        self._task = task
        self._options = options
        self._source = source

    def options(self, **fields: Unpack[SendFields]) -> Sender[P, R]:
        """The same with these options, too. Raises InvalidInput."""
        return Sender(self._task, self._options.changed(fields), self._source)

    async def send(self, *args: P.args, **kwargs: P.kwargs) -> TaskHandle[R]:
        """Have it run elsewhere; when this returns, the call is stored for good.

        Raises TypeError for arguments that the function does not take, InvalidInput for those that do not fit its
        annotations, and what `Queue.enqueue` raises."""
        return await self.send_call(self._task.signature.encode(args, kwargs))

    async def send_many(self, calls: Iterable[Call[R]]) -> list[TaskHandle[R]]:
        """Send many calls, made by `Task.call`, in shared commits. Raises InvalidInput, before any is sent, for a call
        of another task."""
        given: list[Any] = list(calls)
        for call in given:
            if not isinstance(call, Call) or call.task is not self._task:
                raise InvalidInput(
                    f"send_many of task {self._task.name} takes its own calls: {self._task.name}.call(…)"
                )
        if self._options.unique:
            if isinstance(self._options.unique, str):
                raise InvalidInput("calls with one unique key are one call: use unique=True, or send them one by one")
            return list(await asyncio.gather(*(self.send_call(call.payload) for call in given)))
        receipts = await self._task.calls(self._source).enqueue_many(
            [Payload(call.payload, JSON) for call in given], **self._fields(None)
        )
        return [self._handle(receipt.message_id, receipt.duplicate) for receipt in receipts]

    async def send_call(self, payload: bytes) -> TaskHandle[R]:
        """Send a call whose arguments are encoded. Raises what `Queue.enqueue` raises."""
        unique = self._options.unique
        key = None
        if unique:
            key = unique if isinstance(unique, str) else hashlib.sha256(payload).hexdigest()
        receipt = await self._task.calls(self._source).enqueue(Payload(payload, JSON), **self._fields(key))
        return self._handle(receipt.message_id, receipt.duplicate)

    def _handle(self, id: str, duplicate: bool) -> TaskHandle[R]:
        return TaskHandle(
            self._task, id, duplicate=duplicate, kept=self._options.keep_result is not None, source=self._source
        )

    def _fields(self, key: str | None) -> EnqueueFields:
        options = self._options
        attributes = dict(options.attributes)
        for each in self._task.outgoing():
            each(attributes)
        if options.keep_result is not None:
            attributes[KEEP] = options.keep_result
        return {
            "delay": options.delay,
            "priority": options.priority,
            "ttl": options.ttl,
            "max_attempts": options.max_attempts,
            "ordering_key": options.ordering_key,
            "correlation_id": options.correlation_id,
            "attributes": attributes or None,
            "dedup_key": None if key is None else f"task:{self._task.name}:{key}",
            "dedup_window": options.unique_for,
        }


class Task(Sender[P, R]):
    """A function whose calls can be sent. Called itself, it is the function. Made by `Pond.task`."""

    def __init__(
        self,
        source: Source,
        function: Callable[P, R] | Callable[P, Coroutine[Any, Any, R]],
        *,
        name: str,
        queue: str,
        namespace: str | None,
        options: SendFields,
        waiters: Waiters,
    ) -> None:
        super().__init__(self, _Options().changed(options), source)
        self.source = source
        self.name = name
        self._queue = queue_name(queue)
        self._namespace = namespace_name(namespace)
        self.function = function
        self.waiters = waiters
        self.signature = Signature(function)
        update_wrapper(self, function)
        self.in_process = self._in_process()
        """What a process that only runs this task's calls runs for one. It finds it as ``function.in_process``."""

    def _in_process(self) -> Callable[[bytes], bytes]:
        def in_process(payload: bytes) -> bytes:
            bound = self.arguments(payload)
            return self.encode_result(self.function(*bound.args, **bound.kwargs))

        in_process.__module__ = self.function.__module__
        in_process.__qualname__ = f"{self.function.__qualname__}.in_process"
        return in_process

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Call the function, here and now."""
        return self.function(*args, **kwargs)

    def outgoing(self) -> list[Callable[[dict[str, Any]], None]]:
        """What the pond's middleware adds to the attributes of calls that are sent: a trace's context."""
        return [each.outgoing for each in self.source.middleware if hasattr(each, "outgoing")]

    @property
    def queue(self) -> Queue:
        """Where its calls wait."""
        return self.calls(self.source)

    def calls(self, source: Source) -> Queue:
        """Where its calls wait, as another pond on the same store has it."""
        return source.queue(self._queue, namespace=self._namespace)

    def call(self, *args: P.args, **kwargs: P.kwargs) -> Call[R]:
        """A call for `send_many`. Raises as `send` does."""
        return Call(self, self.signature.encode(args, kwargs))

    def sender(self, source: Source, fields: SendFields) -> Sender[P, R]:
        """The same, sent by another pond on the same store. Raises InvalidInput."""
        return Sender(self, self._options.changed(fields), source)

    def handle(self, id: str) -> TaskHandle[R]:
        """The handle of a call that was sent earlier, by its id. Raises InvalidMessageId."""
        return TaskHandle(self, id)

    def handler(self) -> Callable[..., Any]:
        """What a worker runs for a call's message."""
        raise NotImplementedError

    def begin(self, payload: bytes, context: Context) -> inspect.BoundArguments:
        """The arguments of a call that is run here and now. Raises GiveUp."""
        bound = self.arguments(payload)
        _current.set(TaskRun(context, context.values.get(LOOP)))
        return bound

    def arguments(self, payload: bytes) -> inspect.BoundArguments:
        """The arguments of a call. Raises GiveUp."""
        try:
            return self.signature.decode(payload)
        except InvalidInput as error:
            raise GiveUp(f"bad_arguments: {error}") from error

    @staticmethod
    def encode_result(result: Any) -> bytes:
        """A result as it is kept. Raises GiveUp."""
        try:
            return _json.encode(result)
        except _UNENCODABLE as error:
            # It would fail again, and its work is done: no retry mends that.
            raise GiveUp(f"bad_result: {error}") from error

    def end(self, context: Context, result: Any) -> None:
        """Keep the result, if it was asked for. Raises GiveUp."""
        if _kept(context) is not None:
            keep_result(context, self.encode_result(result))

    def __repr__(self) -> str:
        return f"<Task {self.name}>"


def _kept(context: Context) -> float | None:
    """For how many seconds a call's result is to be kept."""
    keep = context.message.attributes.get(KEEP)
    return float(keep) if isinstance(keep, (int, float)) else None


def keep_result(context: Context, data: bytes) -> None:
    """Have a result stored in the commit that acks its call, if it was asked for."""
    keep = _kept(context)
    if keep is not None:
        context.hand_off(
            RESULTS,
            Payload(data, JSON),
            namespace=context.message.namespace,
            message_id=context.message.id,
            ttl=keep,
        )


class FunctionTask(Task[P, R]):
    """A task that is a function, run in a thread."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function, here and now."""
        return cast(R, self.function(*args, **kwargs))

    def handler(self) -> Callable[..., Any]:
        """What a worker runs for a call's message."""

        def run(payload: bytes, context: Context) -> None:
            bound = self.begin(payload, context)
            self.end(context, self.function(*bound.args, **bound.kwargs))

        return run


class CoroutineTask(Task[P, R]):
    """A task that is a coroutine function, run on the event loop."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Call the function, here and now."""
        return cast("Coroutine[Any, Any, R]", self.function(*args, **kwargs))

    def handler(self) -> Callable[..., Any]:
        """What a worker runs for a call's message."""

        async def run(payload: bytes, context: Context) -> None:
            bound = self.begin(payload, context)
            self.end(context, await cast(Awaitable[Any], self.function(*bound.args, **bound.kwargs)))

        return run


class Around(Middleware):
    """What a task needs around its runs: a function in a thread has to find the event loop, and who of this process
    waits for the result need not wait for the next look."""

    def __init__(self, waiters: Waiters) -> None:
        self._waiters = waiters

    async def before(self, context: Context) -> None:
        """A run begins."""
        context.values[LOOP] = asyncio.get_running_loop()

    async def settled(self, context: Context, kind: str) -> None:
        """A run is over."""
        self._waiters.over(context.message.id)


class AroundProcess(Around):
    """As `Around`, for a task whose calls run in processes of their own: they give the result back, encoded."""

    async def after(self, context: Context, result: Any) -> None:
        """A run has returned."""
        keep_result(context, result)
