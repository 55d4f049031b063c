"""What a module registers with a pond besides consumers: tasks, periodic jobs, limits.

`Catalog` is a base class of ponds, so that registering needs nothing to be open.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Sequence
from datetime import timedelta, tzinfo
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, Unpack, cast, overload

import msgspec

from millpond.worker.hooks import Gate, Middleware
from millpond.worker.registry import DEFAULT_CONCURRENCY, Consumer, Registrations, RunIn
from millpond.worker.retries import RetryPolicy
from millpond.worker.source import Source

if TYPE_CHECKING:
    from millpond.worker.limits import Limit, Limiter
    from millpond.worker.periodic import CatchUp
    from millpond.worker.tasks import Call, CoroutineTask, FunctionTask, SendFields, Task, TaskHandle

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


class TaskDecorator(Protocol):
    """Makes a function a `Task`; the result of a coroutine function is what it returns when awaited."""

    @overload
    def __call__(  # type: ignore[overload-overlap]  # the first that fits is meant
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> CoroutineTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> FunctionTask[P, R]: ...


class Catalog(Registrations):
    """What a pond knows of the functions that work for it."""

    def register(self, consumer: Consumer) -> None:
        """Add a consumer. Raises InvalidInput when there is one of that name."""
        gate: Any = consumer.gate
        if isinstance(gate, Middleware) and gate not in consumer.middleware:
            # A limit has to see when a handler begins. Outermost, so that nobody's clock runs while it waits.
            consumer = msgspec.structs.replace(consumer, middleware=(gate, *consumer.middleware))
        super().register(consumer)

    @overload
    def task(  # type: ignore[overload-overlap]  # the first that fits is meant
        self, function: Callable[P, Coroutine[Any, Any, R]], /
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
    def task(  # type: ignore[misc]  # mypy does not see that **options takes what Unpack names
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        queue: str | None = None,
        namespace: str | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
        visibility: float | None = None,
        retry: RetryPolicy | None = None,
        time_limit: float | None = None,
        run_in: RunIn | None = None,
        middleware: Sequence[Middleware] = (),
        gate: Gate | None = None,
        **options: Any,
    ) -> Any:
        """Make a function a task: ``@pond.task``, or with options ``@pond.task(keep_result=60)``.

        It can be called as before; ``await f.send(…)`` with the same arguments has a worker run it, and
        ``f.options(delay=…, priority=…, unique=…, keep_result=…).send(…)`` says how. ``name`` (default the function's)
        and ``queue`` (default ``tasks.`` and the name) are part of what other processes know the task by.
        ``run_in="process"``: for a function that burns CPU; it has no `current_task`. ``options``: what every call is
        sent with unless it says otherwise. The rest as for `consumer`. Raises InvalidInput."""
        from millpond.worker.tasks import Around, AroundProcess, CoroutineTask, FunctionTask, Waiters

        def make(function: Callable[..., Any]) -> Task[..., Any]:
            called = name or str(getattr(function, "__name__", "task"))
            processes = run_in == "process"
            waiters = self.__dict__.setdefault("_waiters", Waiters())
            kind = CoroutineTask if inspect.iscoroutinefunction(function) else FunctionTask
            task: Task[..., Any] = kind(
                cast(Source, self),
                function,
                name=called,
                queue=f"tasks.{called}" if queue is None else queue,
                namespace=namespace,
                options=cast(Any, options),
                waiters=waiters,
            )
            self.register(
                Consumer(
                    name=called,
                    queue=task.queue.name,
                    namespace=namespace,
                    handler=task.in_process if processes else task.handler(),
                    concurrency=concurrency,
                    visibility=visibility,
                    retry=RetryPolicy() if retry is None else retry,
                    time_limit=time_limit,
                    run_in=run_in,
                    middleware=((AroundProcess if processes else Around)(waiters), *middleware),
                    gate=gate,
                )
            )
            return task

        return make if function is None else make(function)

    async def send(self, call: Call[R], **options: Unpack[SendFields]) -> TaskHandle[R]:
        """Send a task's call by this pond, whichever pond of the same store the task was registered with:
        ``pond.send(resize.call("a.png"), delay=60)``. What synchronous code has in place of `Task.send`. Raises as
        `Task.send` does."""
        return await call.task.sender(cast(Source, self), options).send_call(call.payload)

    def periodic(
        self,
        when: str | timedelta,
        *,
        tz: str | tzinfo | None = None,
        catch_up: CatchUp = "latest",
        grace: float = 60.0,
        name: str | None = None,
        queue: str | None = None,
        namespace: str | None = None,
        concurrency: int = 1,
        visibility: float | None = None,
        retry: RetryPolicy | None = None,
        time_limit: float | None = None,
        run_in: RunIn | None = None,
        middleware: Sequence[Middleware] = (),
        gate: Gate | None = None,
    ) -> Callable[[F], F]:
        """Run a function by the clock: ``@pond.periodic("0 3 * * *", tz="Europe/Berlin")``, or ``"every 10s"``.

        Each tick becomes one message, however many workers there are, and the function is its handler: a failure is
        tried again as for any consumer. A parameter annotated `Tick` gets the time for which it was fired. ``tz``:
        where the expression is read, default UTC. ``catch_up``: of ticks that came while no worker ran, ``"latest"``
        fires the newest, ``"skip"`` none that is later than ``grace`` seconds, a number so many of the newest.
        ``name``: default the function's; ``queue``: default ``periodic.`` and the name. The rest as for `consumer`.
        Raises InvalidInput."""
        from millpond.worker.periodic import Periodic, Tick, Ticker
        from millpond.worker.schedule import parse

        schedule = parse(when, tz)
        schedule.after(0)  # what is wrong with it is told here and not when a worker starts

        def make(function: F) -> F:
            called = name or str(getattr(function, "__name__", "job"))
            job = Periodic(
                called,
                schedule,
                f"periodic.{called}" if queue is None else queue,
                namespace=namespace,
                catch_up=catch_up,
                grace=grace,
            )
            self.consumer(
                job.queue,
                name=called,
                namespace=namespace,
                concurrency=concurrency,
                visibility=visibility,
                retry=retry,
                time_limit=time_limit,
                type=Tick,
                run_in=run_in,
                middleware=middleware,
                gate=gate,
            )(function)
            self.services.append(Ticker(cast(Source, self), job))
            return function

        return make

    def limit(
        self,
        name: str,
        *,
        concurrency: int | None = None,
        rate: int | None = None,
        per: float = 1.0,
        namespace: str | None = None,
    ) -> Limiter:
        """A limit over all processes, as the ``gate`` of a consumer, task or periodic job.

        ``concurrency``: messages worked on at once. ``rate``: messages begun within any ``per`` seconds. ``name``: what
        makes it the same limit in every process: a queue's, for all of its consumers, or a consumer's. A worker that
        may not begin takes no message. Raises InvalidInput."""
        from millpond.worker.limits import Concurrency, Limiter, Rate

        limits: list[Limit] = []
        if concurrency is not None:
            limits.append(Concurrency(concurrency))
        if rate is not None:
            limits.append(Rate(rate, per))
        return Limiter(cast(Source, self), name, limits, namespace=namespace)
