"""The engine of ``millpond work``: takes messages, runs a command for each, answers for it.

What holds at every moment: a message is taken only when a command can be started for it at once; every message that
was taken is answered exactly once (ack, nack or defer), unless its lease was lost; a lease is renewed from the moment
its message is taken until it is answered.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from millpond.cli.process import Child
from millpond.errors import LeaseLost, MillpondError, PayloadNotLoaded

if TYPE_CHECKING:
    from millpond.cli.display import Display
    from millpond.message import Message
    from millpond.model.clock import Clock
    from millpond.pond import Pond
    from millpond.queue import Queue

log = logging.getLogger("millpond.work")

RENEWALS = 3
"""Renewals per lease length: two may fail and the third still comes in time."""
RETRIES_PER_LEASE = 12
"""Tries per lease length once a renewal or an answer has failed for a passing reason."""
IDLE_WAIT = 60.0
"""Seconds of one wait for messages; only how often a waiting ``work`` turns over in its sleep."""
EMPTY_CHECK = 0.25
"""Seconds between looks at a queue that ``--until-empty`` cannot leave yet: another consumer's ack wakes nobody."""
PAID_CHECK = 30.0
"""The same where looks cost money, once they have been in vain for a while; the seconds double up to it."""
STORE_PAUSE = 5.0
"""Longest pause before the store is tried again after a passing error."""
MAX_ARGUMENT = 128 * 1024 - 1
"""Bytes of one argument that Linux passes to a program (MAX_ARG_STRLEN, with its final NUL)."""
CANNOT_RETRY = 0.2
"""Seconds of the first pause after a passing store error; it doubles."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What ``work`` was asked to do. Durations are seconds."""

    command: tuple[str, ...]
    concurrency: int = 1
    until_empty: bool = False
    visibility: float | None = None
    timeout: float | None = None
    kill_after: float = 5.0
    backoff: float = 1.0
    max_backoff: float = 300.0
    limit: int | None = None
    owner: str | None = None
    replace: str = "{}"
    store: str | None = None


@dataclass
class Tally:
    """What became of the messages: taken = acked + nacked + lost + given_back, once all is done."""

    taken: int = 0
    acked: int = 0
    nacked: int = 0
    """Failed and given back to be tried again, or (``dead`` of them) for the last time."""
    dead: int = 0
    lost: int = 0
    """Another holder had the message before this one could answer."""
    given_back: int = 0
    """Deferred: not run to an end, no failure counted."""
    seconds: float = 0.0


class CannotStart(MillpondError):
    """The command cannot be started."""

    code = "cannot_start"


class Unfit(Exception):
    """The payload cannot be an argument."""


class Runner:
    """Runs a command per message until the plan is done or `interrupt` is called."""

    def __init__(self, pond: Pond, queue: Queue, plan: Plan, display: Display) -> None:
        self._pond = pond
        self._clock: Clock = pond.clock
        self._queue = queue
        self._plan = plan
        self._display = display
        self._threads = ThreadPoolExecutor(max_workers=plan.concurrency, thread_name_prefix="millpond-wait")
        self._tasks: set[asyncio.Task[None]] = set()
        self._children: set[Child] = set()
        self._changed = asyncio.Event()
        """A command ended, or a stop was asked for."""
        self._failure: BaseException | None = None
        self._environment = dict(os.environ) | {
            "MILLPOND_QUEUE": queue.name,
            "MILLPOND_NAMESPACE": queue.namespace,
            **({"MILLPOND_STORE": plan.store} if plan.store else {}),
        }
        self._uses_argument = bool(plan.replace) and any(plan.replace in part for part in plan.command)
        self._in_vain = 0
        """Looks in a row at a queue that is not empty and has nothing to take."""
        self.tally = Tally()
        self.signals: list[int] = []
        """The stops asked for, in order."""

    @property
    def running(self) -> int:
        """Messages being worked on."""
        return len(self._tasks)

    @property
    def _stopping(self) -> bool:
        return bool(self.signals) or self._failure is not None

    def interrupt(self, number: int) -> None:
        """Stop: the first call lets commands finish, the second ends them, the third kills them."""
        self.signals.append(number)
        self._changed.set()
        for child in list(self._children):
            if len(self.signals) == 2:
                child.terminate(self._plan.kill_after)
            elif len(self.signals) > 2:
                child.kill()

    async def run(self) -> Tally:
        """Work. Raises the MillpondError that made it stop, after the running commands have finished."""
        began = self._clock.monotonic()
        try:
            await self._loop()
            while self._tasks:
                await asyncio.wait(self._tasks)
        except BaseException:
            for child in list(self._children):
                child.kill()
            raise
        finally:
            self.tally.seconds = self._clock.monotonic() - began
            self._threads.shutdown(wait=False)
        if self._failure is not None:
            raise self._failure
        return self.tally

    async def _loop(self) -> None:
        wait, troubles = 0.0, 0
        while not self._stopping:
            left = self._plan.concurrency - self.running
            if self._plan.limit is not None:
                left = min(left, self._plan.limit - self.tally.taken)
                if self.tally.taken >= self._plan.limit:
                    return
            self._changed.clear()
            if left <= 0:
                await self._changed.wait()
                continue
            try:
                messages = await self._receive(left, wait)
                troubles = 0
            except MillpondError as error:
                if not error.retryable:
                    raise
                troubles += 1
                pause = min(STORE_PAUSE, CANNOT_RETRY * 2**troubles)
                await self._display.note(f"{error} [{error.code}]; trying again in {pause:g} s")
                await self._pause_or_change(pause)
                continue
            for message in messages:
                self._start(message)
            if messages:
                self._in_vain = 0
                wait = 0.0 if self._plan.until_empty else IDLE_WAIT
            elif self._plan.until_empty:
                patience = await self._patience()
                if patience is None:
                    return
                await self._pause_or_change(patience)
                wait = 0.0
            else:
                wait = IDLE_WAIT

    async def _receive(self, count: int, wait: float) -> list[Message]:
        """Messages for free places. A stop meanwhile ends the wait; messages that came all the same are given back."""
        if wait <= 0:
            # Not to be cut short: a claim cancelled under way gives back what it leased, an attempt for nothing.
            messages = await self._queue.receive(count, visibility=self._plan.visibility, owner=self._plan.owner)
            return await self._accept(messages)
        receiving = asyncio.ensure_future(
            self._queue.receive(count, wait=wait, visibility=self._plan.visibility, owner=self._plan.owner)
        )
        try:
            while not receiving.done():
                changed = asyncio.ensure_future(self._changed.wait())
                try:
                    await asyncio.wait((receiving, changed), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    changed.cancel()
                self._changed.clear()
                if self._stopping:
                    break
        finally:
            receiving.cancel()
        try:
            messages = await receiving
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            return []
        return await self._accept(messages)

    async def _accept(self, messages: list[Message]) -> list[Message]:
        self.tally.taken += len(messages)
        if not self._stopping:
            return messages
        for message in messages:
            await self._answer(message, message.defer(), "given_back")
        return []

    async def _patience(self) -> float | None:
        """How long to wait before looking again whether the queue is empty; None when it is.

        Nothing ready, nothing running here, nothing held elsewhere, and nothing due within ``max_backoff``: what is
        delayed longer than a retry ever is was scheduled for later, and a run to the end does not wait for it.
        """
        if self._tasks:
            return self._recheck()
        if (await self._queue.policy()).paused:
            await self._display.note(f"queue {self._queue.name} is paused")
            return None
        counts = await self._queue.counts()
        if counts.ready or counts.leased:
            return self._recheck()
        due = await self._queue.next_due()
        if due is not None and due <= self._plan.max_backoff:
            return max(due, EMPTY_CHECK) if self._paying else EMPTY_CHECK
        return None

    @property
    def _paying(self) -> bool:
        return self._pond.capabilities.requests_cost_money

    def _recheck(self) -> float:
        if not self._paying:
            return EMPTY_CHECK
        self._in_vain += 1
        return min(PAID_CHECK, EMPTY_CHECK * (1 << min(self._in_vain, 10)))

    async def _pause(self, seconds: float) -> None:
        done = asyncio.Event()
        timer = self._clock.call_later(seconds, done.set)
        try:
            await done.wait()
        finally:
            timer.cancel()

    async def _pause_or_change(self, seconds: float) -> None:
        timer = self._clock.call_later(seconds, self._changed.set)
        try:
            await self._changed.wait()
        finally:
            timer.cancel()
        self._changed.clear()

    # One message

    def _start(self, message: Message) -> None:
        task = asyncio.get_running_loop().create_task(self._work(message))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)
        self._changed.set()

    def _fail(self, error: BaseException) -> None:
        """Take nothing more; `run` raises this in the end. The first failure counts."""
        if self._failure is None:
            self._failure = error
        self._changed.set()

    async def _work(self, message: Message) -> None:
        span = self._plan.visibility
        if span is None:
            ends = message.lease.until_ms
            span = max(1, (ends or 0) - self._clock.now_ms()) / 1000
        try:
            argv = self._arguments(message)
        except Unfit as error:
            await self._nack(message, {"error": str(error)})
            return
        try:
            child = self._spawn(argv, message)
        except OSError as error:
            await self._cannot_start(message, argv, error)
            return
        self._children.add(child)
        if len(self.signals) >= 2:  # asked for while it was being started
            child.terminate(self._plan.kill_after)
        timed_out = False

        def time_out() -> None:
            nonlocal timed_out
            timed_out = True
            child.terminate(self._plan.kill_after)

        if self._plan.timeout is not None:
            child.after(self._plan.timeout, time_out)
        lease = _Renewal(self, message, child, span)
        try:
            code = await child.wait(self._threads)
        finally:
            self._children.discard(child)
            await lease.stop()
        if lease.lost:
            self.tally.lost += 1
            await self._display.note(f"message {message.id}: {lease.lost}; its command was ended")
        elif child.feed_error is not None:
            await self._nack(message, {"error": f"the payload could not be read: {child.feed_error}"})
        elif timed_out:
            await self._nack(message, self._report(f"timed out after {self._plan.timeout:g} s", code, child))
        elif code == 0:
            await self._answer(message, message.ack(), "acked")
        elif len(self.signals) >= 2:
            await self._answer(message, message.defer(), "given_back")
        else:
            text = f"exit code {code}" if code > 0 else f"killed by {_signal_name(-code)}"
            await self._nack(message, self._report(text, code, child))

    def _report(self, text: str, code: int, child: Child) -> dict[str, object]:
        return {"error": text, "exit_code": code, "stderr": child.tail}

    def _arguments(self, message: Message) -> Sequence[str]:
        """The command, with the payload in place of ``{}``. Raises Unfit."""
        if not self._uses_argument:
            return self._plan.command
        try:
            payload = message.payload
        except PayloadNotLoaded:
            raise Unfit(f"the payload is too long to stand for {self._plan.replace}; use stdin") from None
        if b"\0" in payload:
            raise Unfit(f"the payload has a NUL byte, so it cannot stand for {self._plan.replace}; use stdin")
        try:
            text = payload.decode()
        except UnicodeDecodeError:
            raise Unfit(f"the payload is not UTF-8, so it cannot stand for {self._plan.replace}; use stdin") from None
        argv = [part.replace(self._plan.replace, text) for part in self._plan.command]
        if any(len(part.encode("utf-8", "surrogateescape")) > MAX_ARGUMENT for part in argv):
            raise Unfit(f"the payload is too long to stand for {self._plan.replace}; use stdin")
        return argv

    def _spawn(self, argv: Sequence[str], message: Message) -> Child:
        environment = self._environment | {
            "MILLPOND_MESSAGE_ID": message.id,
            "MILLPOND_LEASE_ID": message.lease.id,
            "MILLPOND_FENCING_TOKEN": str(message.lease.token),
            "MILLPOND_ATTEMPTS": str(message.attempts),
            "MILLPOND_FAILURES": str(message.failures),
            "MILLPOND_ATTRIBUTES": json.dumps(dict(message.attributes or {}), default=str),
            "MILLPOND_CONTENT_TYPE": message.content_type or "",
            "MILLPOND_CORRELATION_ID": message.correlation_id or "",
        }
        rest: AsyncIterator[bytes] | None = None
        try:
            payload = message.payload
        except PayloadNotLoaded:
            payload, rest = b"", message.stream()
        stdout = self._display.stdout if self._display.pipe_stdout else None
        return Child.start(argv, environment, self._clock, payload, rest, stdout, self._display.stderr)

    async def _cannot_start(self, message: Message, argv: Sequence[str], error: OSError) -> None:
        """The message's own fault: it fails. The command's: nothing is to be gained by trying the next message."""
        import errno

        reason = error.strerror or str(error)
        theirs = error.errno == errno.E2BIG or (self._plan.replace and self._plan.replace in self._plan.command[0])
        if theirs:
            await self._nack(message, {"error": f"the command cannot be started for it: {reason}"})
            return
        self._fail(CannotStart(f"cannot run {argv[0]!r}: {reason}; the message was given back"))
        await self._answer(message, message.defer(), "given_back")

    async def _nack(self, message: Message, error: dict[str, object]) -> None:
        limit = message.max_attempts
        log.info("millpond.work.command_failed", extra={"message_id": message.id, "reason": error["error"]})
        if await self._answer(message, message.nack(error=error, delay=self.delay(message.failures)), "nacked"):
            self.tally.dead += bool(limit) and message.failures + 1 >= limit

    def delay(self, failures: int) -> float:
        """Seconds before the next try after ``failures`` earlier ones: exponential, half of it by chance, so that
        messages that failed together do not come back together."""
        full = min(self._plan.max_backoff, self._plan.backoff * 2.0 ** min(failures, 60))
        return full / 2 + full / 2 * self._pond.ids.below(1_000_001) / 1_000_000

    async def _answer(self, message: Message, answer: Awaitable[object], counted: str) -> bool:
        """Answer for a message and count it; whether it was still ours. Raises MillpondError but LeaseLost."""
        try:
            await answer
        except LeaseLost as error:
            self.tally.lost += 1
            await self._display.note(f"message {message.id}: {error}")
            return False
        setattr(self.tally, counted, getattr(self.tally, counted) + 1)
        return True


class _Renewal:
    """Keeps a lease alive until stopped; ends the command when the lease is lost."""

    def __init__(self, runner: Runner, message: Message, child: Child, span: float) -> None:
        self._runner = runner
        self._message = message
        self._child = child
        self._span = span
        self.lost = ""
        """Why the lease is no longer ours; empty while it is."""
        self._task = asyncio.get_running_loop().create_task(self._renew())

    async def _renew(self) -> None:
        clock = self._runner._clock
        ends = clock.monotonic() + self._span
        wait = self._span / RENEWALS
        while True:
            await self._runner._pause(wait)
            asked = clock.monotonic()
            try:
                await self._message.extend(self._span)
            except LeaseLost as error:
                self._lose(str(error))
                return
            except MillpondError as error:
                if clock.monotonic() >= ends:
                    self._lose(f"the lease ran out while it could not be renewed: {error}")
                    return
                wait = self._span / RETRIES_PER_LEASE
            else:
                ends = asked + self._span
                wait = self._span / RENEWALS

    def _lose(self, why: str) -> None:
        self.lost = why
        self._child.terminate(self._runner._plan.kill_after)

    async def stop(self) -> None:
        """No renewal is under way when this returns."""
        self._task.cancel()
        await asyncio.wait((self._task,))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
