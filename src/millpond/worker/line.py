"""`Line`: one consumer in a worker. Takes messages, runs the handler for each, answers.

What holds at every moment: a message is taken only when its handler can start at once; every message that was taken is
answered exactly once (ack, nack, defer, bury), after its handler has ended, unless its lease was lost or its handler
did it; its lease is renewed until then; and an answer that the store does not take for a passing reason is tried until
it does. What is running, and what waits for its answer to be stored, are both bounded by the consumer's concurrency.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from millpond.errors import (
    InvalidInput,
    LeaseLost,
    MillpondError,
    PayloadNotLoaded,
    StoreClosed,
    StoreCorrupt,
    StoreError,
    StoreMismatch,
    TooLarge,
)
from millpond.message import Message
from millpond.model.text import clipped
from millpond.pond import Pond
from millpond.queue import Queue
from millpond.worker.binding import Bound, Unfit
from millpond.worker.deciding import decide
from millpond.worker.failures import REASON_LIMIT, reason
from millpond.worker.filling import fillers
from millpond.worker.hooks import Context, Gate, Middleware
from millpond.worker.jobs import Job, pause
from millpond.worker.leases import SHARE, Renewals
from millpond.worker.outcomes import KINDS, Kind, Outcome
from millpond.worker.processes import Processes
from millpond.worker.renewing import Shared, SharedGate
from millpond.worker.threads import Call, Threads

log = logging.getLogger("millpond.worker")

IDLE_WAIT = 15.0
"""Seconds of one wait for messages: how often a worker that has nothing to do shows that it still looks."""
UNWIND = 10.0
"""Seconds that a cancelled handler has to end. Then its message is answered for without it."""
FIRST_PAUSE = 0.2
"""Seconds of the first pause after a failure of the store; it doubles up to `LONGEST_PAUSE`."""
LONGEST_PAUSE = 15.0
"""So that a store that is back is used again within that, and a worker is not taken for dead by its probe."""
LAST_WAIT = 1.0
"""Seconds that tasks have to end once nothing that they do counts any more."""
FATAL = (StoreClosed, StoreMismatch, InvalidInput)
"""What no waiting cures."""


def overridden(middleware: Sequence[Middleware], hook: str) -> list[Any]:
    """The hooks of that name that do something."""
    return [getattr(each, hook) for each in middleware if getattr(type(each), hook) is not getattr(Middleware, hook)]


class Line:
    """Runs one consumer."""

    def __init__(
        self,
        pond: Pond,
        bound: Bound,
        renewals: Renewals,
        middleware: Sequence[Middleware],
        owner: str | None,
        fail: Callable[[BaseException], None],
    ) -> None:
        """``fail`` is told of what no waiting cures. Raises InvalidInput."""
        consumer = bound.consumer
        self.bound = bound
        self.consumer = consumer
        self._pond = pond
        self._clock = pond.clock
        self._loop = asyncio.get_running_loop()
        self._queue: Queue = pond.queue(consumer.queue, namespace=consumer.namespace)
        self._renewals = renewals
        self._owner = owner
        self._fail = fail
        middleware = (*middleware, *consumer.middleware)
        self._before = overridden(middleware, "before")
        self._after = overridden(middleware[::-1], "after")
        self._error = overridden(middleware[::-1], "error")
        self._settled = overridden(middleware[::-1], "settled")
        gate: Any = consumer.gate
        self._shared: SharedGate | None = None
        if isinstance(gate, Shared):
            gate = self._shared = gate.seat(f"{self._queue.namespace}/{self._queue.name}", renewals)
        self._gate: Gate | None = gate
        self._threads = None if bound.run_in == "loop" else Threads(consumer.concurrency, consumer.name)
        self._processes = Processes(consumer) if bound.run_in == "process" else None
        self._fillers = fillers(bound, pond, self._queue)
        self.held: dict[Job, None] = {}
        """Not answered for yet. Renewals read it from another thread."""
        self.running: dict[Job, None] = {}
        """Their handler has not ended; in order of starting."""
        self._acks: list[Job] = []
        self._flusher: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.changed = asyncio.Event()
        """There may be room, or nothing left to do."""
        self._taker: asyncio.Task[None] | None = None
        self._idle = False
        """The taking task waits for something that a stop need not wait for."""
        self._deadline: asyncio.TimerHandle | Any = None
        self._unwinding: dict[Job, float] = {}
        self._closed = False
        self.stopping = False
        self.polled: float | None = None
        """When messages were last asked for successfully, or none could have been started, by the monotonic clock."""
        self.at_gate = False
        self.counts: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        renewals.watch(lambda: self.held, self.lost)

    @property
    def busy(self) -> bool:
        """Every place is taken by a handler."""
        return len(self.running) >= self.consumer.concurrency

    @property
    def looked(self) -> float | None:
        """When the store was last asked successfully, by the monotonic clock: for messages, or for the permits without
        which none may be taken."""
        if self._shared is not None and self.at_gate and self._shared.asked is not None:
            return max(self._shared.asked, self.polled or 0.0)
        return self.polled

    @property
    def occupied(self) -> bool:
        """It need not ask: every place is taken, or a gate holds it back that asks no store."""
        return self.busy or (self.at_gate and self._shared is None)

    @property
    def quiet(self) -> bool:
        """Nothing is running or unanswered."""
        return not self.held and not self.running

    # Taking

    def start(self) -> None:
        """Begin to take messages."""
        self._taker = self._loop.create_task(self._take(), name=f"millpond consumer {self.consumer.name}")
        self._taker.add_done_callback(self._taker_ended)

    def _taker_ended(self, task: asyncio.Task[None]) -> None:
        self.changed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def stop(self) -> None:
        """Take nothing more."""
        self.stopping = True
        self.changed.set()
        if self._idle and self._taker is not None:
            self._taker.cancel()

    @property
    def taking(self) -> bool:
        """A claim may still be under way."""
        return self._taker is not None and not self._taker.done()

    def _room(self) -> int:
        limit = self.consumer.concurrency
        return min(limit - len(self.running), 2 * limit - len(self.held))

    async def _take(self) -> None:
        troubles = 0
        wait = 0.0
        while not self.stopping:
            wanted = self._room()
            if wanted <= 0:
                busy = self.busy
                self.changed.clear()
                self._idle = True
                await self.changed.wait()
                self._idle = False
                if busy:
                    self.polled = self._clock.monotonic()
                continue
            if self._gate is not None:
                wanted = await self._admitted(wanted)
            if self._renewals.due <= self._clock.monotonic():
                await self._renewals.due_now()
            try:
                messages = await self._receive(wanted, wait)
            except MillpondError as error:
                if self._gate is not None:
                    self._gate.unused(wanted)
                if isinstance(error, FATAL):
                    raise
                troubles += 1
                self._idle = True
                await self._trouble("take messages", error, troubles)
                self._idle = False
                continue
            except asyncio.CancelledError:
                if self._gate is not None:
                    self._gate.unused(wanted)
                raise
            if troubles:
                log.info("millpond.worker.recovered", extra={"consumer": self.consumer.name, "failures": troubles})
                troubles = 0
            self.polled = self._clock.monotonic()
            if self._gate is not None and len(messages) < wanted:
                self._gate.unused(wanted - len(messages))
            if bool(self.stopping):  # set meanwhile
                self._return(messages)
                return
            if messages:
                self._begin(messages)
            wait = 0.0 if len(messages) >= wanted else IDLE_WAIT

    async def _admitted(self, wanted: int) -> int:
        assert self._gate is not None
        self.at_gate = self._idle = True
        try:
            admitted = await self._gate.admit(wanted)
            self.polled = self._clock.monotonic()
            return admitted
        finally:
            self.at_gate = self._idle = False

    async def _receive(self, count: int, wait: float) -> list[Message]:
        visibility, owner = self.consumer.visibility, self._owner
        if not wait:
            # Not to be cut short: a claim cancelled under way gives back what it leased, an attempt for nothing.
            return await self._queue.receive(count, visibility=visibility, owner=owner)
        if self._gate is not None:
            wait = 1.0  # What is admitted and waits here is not admitted elsewhere meanwhile.
        self._idle = True
        try:
            return await self._queue.receive(count, wait=wait, visibility=visibility, owner=owner)
        finally:
            self._idle = False

    def _return(self, messages: Sequence[Message]) -> None:
        """They came when the worker was leaving."""
        if self._gate is not None:
            self._gate.unused(len(messages))
        for message in messages:
            job = self._job(message, self._clock.monotonic(), self._clock.now_ms())
            self.held[job] = None
            self._spawn(self._settle(job, Outcome("defer")))

    async def _trouble(self, doing: str, error: MillpondError, times: int) -> None:
        seconds = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(times - 1, 20))
        seconds *= 0.5 + self._pond.ids.below(501) / 1000
        log.warning(
            "millpond.worker.store_failed",
            extra={
                "consumer": self.consumer.name,
                "doing": doing,
                "reason": clipped(f"{error} [{error.code}]", REASON_LIMIT),
                "pause": round(seconds, 3),
            },
        )
        await pause(self._clock, seconds)

    def _job(self, message: Message, now: float, wall: int) -> Job:
        until = message.lease.until_ms
        left = self.consumer.visibility or 0.0
        if until is not None:
            left = max(0, until - wall) / 1000
        span = max(0.001, self.consumer.visibility or left)
        limit = self.consumer.time_limit
        context = Context(self.consumer.name, message, now, None if limit is None else now + limit)
        return Job(message, context, span, now + left, now + left - span + span / SHARE)

    def _begin(self, messages: Sequence[Message]) -> None:
        now, wall = self._clock.monotonic(), self._clock.now_ms()
        due = self._renewals.due
        create_task, held, running = self._loop.create_task, self.held, self.running
        for message in messages:
            job = self._job(message, now, wall)
            due = min(due, job.renew_at)
            held[job] = running[job] = None
            job.task = create_task(self._work(job))
        if due < self._renewals.due:
            self._renewals.expect(due)
        if self.consumer.time_limit is not None and self._deadline is None:
            self._arm()

    # One message

    async def _work(self, job: Job) -> None:
        job.entered = True
        context = job.context
        error: BaseException | None = None
        unfit = False
        result: Any = None
        try:
            if job.why is not None:
                raise asyncio.CancelledError
            if self._processes is not None:
                result = await self._in_process(job)
            else:
                if self.bound.payload is not None:
                    context.payload = await self._payload(job)
                for hook in self._before:
                    await hook(context)
                result = await self._call(job)
            for hook in self._after:
                await hook(context, result)
        except Unfit as raised:
            error, unfit = raised, True
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as raised:  # all that a handler may raise; SystemExit as well: it does not end the worker
            error = raised
            if isinstance(error, asyncio.CancelledError):
                task = asyncio.current_task()
                if self._closed or (task is not None and task.cancelling() and job.why is None):
                    raise  # not by the worker, or too late: the event loop is being torn down
                if task is not None:
                    task.uncancel()
        del self.running[job]
        self._unwinding.pop(job, None)
        if self._gate is not None:
            self._gate.ended(1)
        self.changed.set()
        if job.why == "lost":
            await self._tell_error(job, error, Outcome("lost", reason="the lease was lost"))
            await self._tell_settled(job, "lost")
            return
        if job.abandoned:
            return
        if error is None and job.why is None and not job.answered:
            if context._then is not None:
                await self._guarded(self._hand_off(job))
                return
            job.settling = True
            self._acks.append(job)
            if self._flusher is None:
                self._flusher = self._spawn(self._flush())
            return
        if job.answered:
            await self._guarded(self._answered(job, error))
            return
        await self._guarded(self._settle(job, self._outcome(job, error, unfit), error))

    async def _guarded(self, work: Awaitable[None]) -> None:
        """What goes wrong here is the worker's to know; nobody waits for the task of a message."""
        try:
            await work
        except Exception as error:  # passed on: `run` raises it
            self._fail(error)

    async def _payload(self, job: Job) -> Any:
        try:
            payload = job.message.payload
        except (PayloadNotLoaded, StoreError):
            payload = await self._read(job)
        return self.bound.decode(payload, job.message.content_type)

    async def _read(self, job: Job) -> bytes:
        """A payload that did not come with its message. An outage now is no failure of the handler's."""
        troubles = 0
        while True:
            try:
                return await job.message.read()
            except (StoreCorrupt, StoreClosed, StoreMismatch):
                raise
            except StoreError as error:
                troubles += 1
                await self._trouble("read a payload", error, troubles)

    def _call(self, job: Job) -> Awaitable[Any]:
        bound = self.bound
        specials = {name: fill(job) for name, fill in self._fillers} if self._fillers else {}
        if self._threads is None:
            called: Awaitable[Any] = (
                bound.handler(job.context.payload) if bound.plain else bound.call(job.context.payload, specials)
            )
            return called
        payload = job.context.payload
        return self._threaded(job, Call(lambda: bound.call(payload, specials), self._loop))

    async def _threaded(self, job: Job, call: Call) -> Any:
        assert self._threads is not None
        if job.why is not None:
            raise asyncio.CancelledError
        job.call = call
        try:
            self._threads.start(call)
            result = await call.future
            if inspect.iscoroutine(result):
                # A decorator has hidden that it is a coroutine function. Nothing was done, so it must not be acked.
                result.close()
                raise InvalidInput("the handler returned a coroutine; register the coroutine function itself")
            return result
        finally:
            job.call = None

    async def _in_process(self, job: Job) -> Any:
        """The payload is decoded in the child, so middleware sees none."""
        message, processes = job.message, self._processes
        assert processes is not None
        payload = b""
        if self.bound.payload is not None:
            try:
                payload = message.payload
            except (PayloadNotLoaded, StoreError):
                payload = await self._read(job)
        for hook in self._before:
            await hook(job.context)
        lease, content_type = message.lease, message.content_type
        call: Call = Call(lambda: processes.run(call, payload, content_type, lease), self._loop)
        return await self._threaded(job, call)

    def _outcome(self, job: Job, error: BaseException | None, unfit: bool) -> Outcome:
        return decide(self.consumer, job.message.failures, job.why, error, unfit, self._pond.ids)

    # Answering

    async def _settle(self, job: Job, outcome: Outcome, error: BaseException | None = None) -> None:
        """Answer other than by an ack."""
        message = job.message
        self._log(job, outcome)
        await self._tell_error(job, error, outcome)
        if outcome.kind == "dead":
            # A character takes 4 bytes at most, and the encoding some more.
            text = outcome.reason[: max(1, self._pond.config.max_error_bytes // 8)]

            def shorten() -> bool:
                # The limit is that of where the store is, and a server's may be less than this pond's.
                nonlocal text
                text, before = text[: max(1, len(text) // 2)], text
                return text != before

            await self._answer(job, "dead", lambda kept: message.bury(text, kept), outcome.error, shorten)
        elif outcome.kind == "defer":
            await self._answer(job, "defer", lambda kept: message.defer(outcome.delay))
        else:
            await self._answer(job, "retry", lambda kept: message.nack(kept, outcome.delay), outcome.error)

    async def _tell_error(self, job: Job, error: BaseException | None, outcome: Outcome) -> None:
        for hook in self._error:
            try:
                await hook(job.context, error, outcome)
            except Exception:  # a user's hook, which may raise anything; the answer must not depend on it
                log.error("millpond.worker.hook_failed", exc_info=True, extra={"consumer": self.consumer.name})

    def _log(self, job: Job, outcome: Outcome) -> None:
        if outcome.kind == "defer":
            return
        log.warning(
            "millpond.worker.handler_failed",
            extra={
                "consumer": self.consumer.name,
                "message_id": job.message.id,
                "outcome": outcome.kind,
                "delay": round(outcome.delay, 3),
                "reason": outcome.reason,
            },
        )

    async def _answer(
        self,
        job: Job,
        kind: Kind,
        answer: Callable[[Any], Awaitable[object]],
        error: Any = None,
        shorten: Callable[[], bool] = lambda: False,
    ) -> None:
        """Answer until it is stored, or there is nothing to answer for any more. ``shorten``: what makes the answer
        shorter besides leaving out the error; False when nothing does."""
        job.settling = True
        troubles = 0
        while job in self.held:
            try:
                await answer(error)
            except LeaseLost as refused:
                await self._lose(job, str(refused))
            except TooLarge:
                if error is None:
                    if not shorten():
                        raise
                    continue
                # What the pond's limit leaves room for: without the traceback, or nothing.
                short = {"type": error["type"][:200], "message": error["message"][:200], "traceback": ""}
                error = None if error == short else short
            except FATAL:
                raise
            except MillpondError as failure:
                troubles += 1
                await self._trouble("answer", failure, troubles)
            else:
                await self._finish(job, kind)

    async def _hand_off(self, job: Job) -> None:
        """Ack together with what the handler wants enqueued; if that cannot be enqueued, the handler has failed."""
        message, then = job.message, job.context._then
        assert then is not None

        async def ack(_: Any) -> None:
            await message.ack(then)

        try:
            await self._answer(job, "ack", ack)
        except StoreClosed:
            raise
        except MillpondError as error:
            await self._settle(job, self._outcome(job, error, False), error)

    async def _answered(self, job: Job, error: BaseException | None) -> None:
        if error is not None:
            log.warning(
                "millpond.worker.failed_after_answer",
                extra={"consumer": self.consumer.name, "message_id": job.message.id, "reason": reason(error)},
            )
            await self._tell_error(job, error, Outcome("answered", reason=reason(error)))
        await self._finish(job, "answered")

    async def _flush(self) -> None:
        """Ack what has gathered, in shared commits, until nothing is left."""
        troubles = 0
        while self._acks:
            batch, self._acks = self._acks, []
            failure: MillpondError | None = None
            try:
                answers = await self._queue.ack_many([job.message for job in batch])
            except FATAL:
                raise
            except MillpondError as error:
                failure, answers = error, []
                self._acks[:0] = batch
            acked = []
            for job, (_, refused) in zip(batch, answers, strict=False):
                if refused is None:
                    acked.append(job)
                    del self.held[job]
                elif isinstance(refused, LeaseLost):
                    await self._lose(job, str(refused))
                else:
                    failure = refused
                    self._acks.append(job)
            self.counts["ack"] += len(acked)
            self.changed.set()
            if self._settled:
                for job in acked:
                    await self._tell_settled(job, "ack")
            if failure is None:
                troubles = 0
            else:
                troubles += 1
                await self._trouble("answer", failure, troubles)
        self._flusher = None

    async def _finish(self, job: Job, kind: Kind) -> None:
        if job not in self.held:
            return
        del self.held[job]
        self.counts[kind] += 1
        self.changed.set()
        await self._tell_settled(job, kind)

    async def _tell_settled(self, job: Job, kind: Kind) -> None:
        for hook in self._settled:
            try:
                await hook(job.context, kind)
            except Exception:  # as in `_tell_error`
                log.error("millpond.worker.hook_failed", exc_info=True, extra={"consumer": self.consumer.name})

    async def _lose(self, job: Job, why: str) -> None:
        """The answer was refused."""
        self._log_lost(job, why)
        await self._finish(job, "lost")

    def _log_lost(self, job: Job, why: str) -> None:
        log.warning(
            "millpond.worker.lease_lost",
            extra={"consumer": self.consumer.name, "message_id": job.message.id, "reason": why},
        )

    # Ending handlers

    def lost(self, job: Job, why: str) -> None:
        """A renewal found that the lease is somebody else's, or nobody's: no answer is due any more."""
        if job in self.held and not job.settling and not job.answered:
            self._log_lost(job, why)
            del self.held[job]
            self.counts["lost"] += 1
            job.cancel("lost")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _arm(self) -> None:
        """Set the timer to the first time limit, or to the first cancelled handler that is to have ended."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        at = min(self._unwinding.values(), default=None)
        for job in self.running:
            if job.why is None and job.context.deadline is not None:
                at = job.context.deadline if at is None else min(at, job.context.deadline)
                break  # one limit for all: they end in the order in which they began
        if at is not None:
            self._deadline = self._clock.call_later(max(0.0, at - self._clock.monotonic()), self._time_up)

    def _time_up(self) -> None:
        self._deadline = None
        now = self._clock.monotonic()
        for job in self.running:
            if job.why is not None:
                continue
            if job.context.deadline is None or job.context.deadline > now:
                break
            job.cancel("time")
            self._unwinding[job] = now + UNWIND
        for job in [job for job, at in self._unwinding.items() if at <= now]:
            del self._unwinding[job]
            self.abandon(job)
        self._arm()

    def abandon(self, job: Job) -> None:
        """Answer for a message whose handler was cancelled and does not end. It keeps its place until it does."""
        if job in self.held and not job.settling and not job.answered:
            job.abandoned = True
            log.error(
                "millpond.worker.handler_stuck",
                extra={"consumer": self.consumer.name, "message_id": job.message.id},
            )
            self._spawn(self._settle(job, self._outcome(job, None, False)))

    def cancel_all(self) -> None:
        """Have every handler end; their messages are given back."""
        for job in list(self.running):
            job.cancel("stop")

    def abandon_all(self) -> None:
        """Give back the messages of handlers that were cancelled and have not ended."""
        for job in list(self.running):
            self.abandon(job)

    async def close(self) -> None:
        """Leave nothing behind; what is unanswered now comes back when its lease ends."""
        if self.held:
            log.error("millpond.worker.unanswered", extra={"consumer": self.consumer.name, "messages": len(self.held)})
        self._closed = True
        if self._deadline is not None:
            self._deadline.cancel()
        jobs = [job.task for job in {**self.held, **self.running}]
        left = [task for task in (self._taker, *self._tasks, *jobs) if task is not None and not task.done()]
        for task in left:
            task.cancel()
        if left:
            # Not for ever: a handler may refuse to be cancelled.
            await asyncio.wait(left, timeout=LAST_WAIT)
        if self._threads is not None:
            self._threads.close()
        if self._processes is not None:
            self._processes.close()
