"""Group commit: concurrent calls share one transaction, and with it the price of one fsync.

While one transaction is on its way to the disk, calls gather for the next one. Who does what is a matter of the GIL
and of the lock:

- The statements of a transaction run in one go on the event loop's thread. Each statement gives up the GIL and takes it
  back, which is free while nobody else wants it, and costs up to 5 ms a statement when the loop is busy beside.
- Only what waits is done in the writer thread: for the lock, and for COMMIT. The loop gathers meanwhile. The loop lets
  the thread begin before it goes on: a thread that wants the GIL of a busy loop gets it after 5 ms, and a COMMIT that
  begins only then is one that the loop waits for.
- A COMMIT of many ops only writes the log; the fsync follows, and the loop fills the next transaction meanwhile.
- Where other processes wait for the lock, the loop commits by itself as long as that takes next to no time: the thread
  would want the GIL once more to give the lock back, and all processes would wait for that. And the lock is given back
  as soon as the transaction is in the log, before the log is on the disk: the fsync is most of a COMMIT, and others can
  write meanwhile. Nobody is answered before it is done. What others build on such a transaction comes behind it in the
  log, so that their fsync makes both durable.
- The next in line for the lock looks for it from the loop, as long as others keep it for a moment only: by the time
  that a thread has told the loop of it, half a transaction could have been written.
- A lock that is waited for longer is waited for in the thread and offered to the loop; if the loop does not come for it
  within `GRACE` (somebody blocks it), the thread runs the statements itself. So nobody else's write waits for a busy
  event loop for longer.

The write connection belongs to one side at a time: to the loop, until it posts work to the thread and sets ``_away``;
to the thread, until it calls back.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import apsw

from millpond.errors import MillpondError, OutcomeUnknown, StoreBusy, StoreClosed, StoreError, StoreFull
from millpond.model.clock import Clock, TimerHandle
from millpond.stores.base import Op, Outcome, QueueName, Removed, Updated
from millpond.stores.sqlite.apply import Take
from millpond.stores.sqlite.calls import Batch, Call, Job, Offer, Place
from millpond.stores.sqlite.failures import translate
from millpond.stores.sqlite.filling import fill
from millpond.stores.sqlite.lock import Turnstile
from millpond.stores.sqlite.room import Gauge
from millpond.stores.sqlite.schema import sync_log
from millpond.stores.sqlite.threads import Background, tell
from millpond.stores.sqlite.together import Together

MAX_OPS = 1000
"""Ops after which a transaction takes no further call: larger ones gain nothing (60 k messages/s at 200, 66 k at 1000)
and make everybody wait."""
QUICK = 0.002
"""Seconds, on average of late, that a COMMIT may take for the loop to wait for it."""
HAND_OVER = 0.002
"""Seconds that the loop waits at most for the thread to begin a COMMIT; 40 µs are usual."""
SPLIT_OPS = 64
"""Ops from which a transaction takes only half of what there is to do. While one half is on its way to the disk, the
callers of the other half compute: both cores work. Below, a second fsync costs more than that gains."""
AHEAD_OPS = 200
"""Ops from which a COMMIT only writes the log, and the loop fills the next transaction while that is synced: one part
in twenty with large batches, and nothing with 256 callers of single messages."""
LOOK = 0.002
"""Seconds for which the next in line looks for the lock from the loop."""
LOOK_EVERY = 0.00025
"""Seconds between such looks. With fewer the lock lies idle, with more the looks take time from the others."""
GRACE = 0.005
"""Seconds that the loop has to come for the lock: the interpreter's own switch interval."""
STRANGER = 0.005
"""Seconds between tries while somebody who does not know the turnstile (a shell, a backup) holds SQLite's own lock."""


class Writer:
    """All writing of one store. Used from the event loop only; ``committed`` is called there after each commit with
    the queues that changed."""

    always_early = False
    """Give the lock back before the log is synced also when nobody waits for it; so that tests can."""

    def __init__(
        self,
        connection: apsw.Connection,
        lock: Turnstile,
        path: str,
        *,
        clock: Clock,
        busy_timeout: float,
        committed: Callable[[set[QueueName | tuple[str, str]], bool], object],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._applier = Together(connection)
        self._gauge = Gauge(path, connection)
        self._lock = lock
        self._path = path
        self._clock = clock
        self._busy_timeout = busy_timeout
        self._report = committed
        self._thread = Background("millpond-writer")
        self._early = False
        """The transaction is committed without a sync, which follows when the lock was given back."""
        self._begun = threading.Lock()
        """Held from when a COMMIT is posted until the thread begins it."""
        self._commit_seconds = QUICK
        """What a COMMIT takes: a moving average."""
        self._pending: deque[Call] = deque()
        self._jobs: deque[Job] = deque()
        self._mutex = threading.Lock()
        """Guards taking from ``_pending``, and ``Job.started``, while ``_waiting``."""
        self._scheduled = False
        self._away = False
        self._waiting = False
        self._job: Job | None = None
        self._job_next = False
        self._answered = 0
        """Ops of the transaction that has just been answered, whose callers are about to come again."""
        self._syncing = 0
        """Ops that are committed, and on their way to the disk."""
        self._timer: TimerHandle | None = None
        self._idle: asyncio.Future[None] | None = None
        self._closing = False
        self._check_foreign: Callable[[bool], object] | None = None
        self._data_version = 0
        self.numbers: dict[str, Any] = {
            "commits": 0,
            "calls": 0,
            "ops": 0,
            "largest_commit": 0,
            "commit_seconds": 0.0,
            "lock_waits": 0,
            "lock_wait_seconds": 0.0,
            "busy_errors": 0,
            "failed_commits": 0,
            "jobs": 0,
            "batches_in_thread": 0,
        }

    @property
    def waiting_ops(self) -> int:
        """Ops that no transaction has taken up yet."""
        return sum([call.size for call in tuple(self._pending)])  # the thread may take some meanwhile

    # Submitting

    def submit(self, ops: Sequence[Op], atomic: bool) -> asyncio.Future[list[Outcome]]:
        """The outcomes of ``ops``, once they are durable."""
        applier = self._applier
        if atomic:
            return self._submit(applier.commit, ops, len(ops))
        return self._submit(applier.write, ops, len(ops), singly=applier.write_singly)

    def take(self, take: Take) -> asyncio.Future[list[tuple[Any, Updated | Removed]]]:
        """What was taken, once that is durable."""
        wanted = self._applier.wanted
        name = take[:2]
        wanted[name] = wanted.get(name, 0) + take.limit
        return self._submit(self._applier.take, take, take.limit, False, self._applier.take_singly)

    def _submit(
        self,
        apply: Callable[[Any], Any],
        request: Any,
        size: int,
        portable: bool = True,
        singly: Callable[[Any], Any] | None = None,
    ) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._closing:
            raise StoreClosed(f"the store {self._path} is closed")
        call = Call(apply, request, future, size, portable, singly)
        self._pending.append(call)
        if self._waiting:
            call.since = self._clock.monotonic()
        elif not self._scheduled and not self._away:
            try:
                self._loop.call_soon(self._gather, 0)
            except RuntimeError:
                self._pending.pop()
                if not self._loop.is_closed():
                    raise
                raise StoreClosed(f"the event loop that opened {self._path} has ended: connect anew") from None
            self._scheduled = True
        return future

    def job(self, work: Callable[[], Any]) -> asyncio.Future[Any]:
        """Run ``work`` in the writer thread while this store holds the lock; it makes its own transaction, on another
        connection."""
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._closing:
            raise StoreClosed(f"the store {self._path} is closed")
        job = Job(work, future)
        self._jobs.append(job)
        if self._waiting:
            job.since = self._clock.monotonic()
        elif not self._scheduled and not self._away:
            self._scheduled = True
            self._loop.call_soon(self._flush)
        return future

    def when_foreign(self, report: Callable[[bool], object]) -> None:
        """Report, now or as soon as the connection is at hand, whether another process has written since the last
        time this was asked."""
        self._check_foreign = report
        if not self._away and not self._waiting:
            self._look_for_foreign()

    def _look_for_foreign(self) -> None:
        report, self._check_foreign = self._check_foreign, None
        if report is None:
            return
        try:
            before, self._data_version = self._data_version, int(self._applier.execute("PRAGMA data_version").get)
        except apsw.Error:
            # Nobody waits for this answer, and it must not keep what comes after it (the next transaction) from
            # running. What was missed differs from the version kept, so the next look finds it.
            report(False)
            return
        report(before not in {0, self._data_version})

    # On the loop

    def _gather(self, before: int) -> None:
        """Begin a transaction once a turn of the loop brings no further call. Who comes by network comes turn by turn,
        and a transaction for the first would make the rest wait for it (a server does a sixth more with this)."""
        waiting = len(self._pending)
        if before < waiting < SPLIT_OPS:
            self._loop.call_soon(self._gather, waiting)
        else:
            self._flush()

    def _flush(self) -> None:
        self._scheduled = False
        if self._away:
            return
        if self._check_foreign is not None:
            self._look_for_foreign()
        if self._jobs and (self._job_next or not self._pending):
            self._start_job()
            return
        if not self._pending:
            self._rest()
            return
        if not self._lock.try_line_up():
            self._wait(self._wait_in_thread)
        elif not self._lock.try_enter():
            place = Place()
            self._wait(lambda: self._stand_in(place))
            self._next_in_line(place, time.perf_counter())
        else:
            try:
                self._begin(self.always_early or self.waiting_ops >= AHEAD_OPS)
            except apsw.BusyError:
                began = time.perf_counter()
                self._wait(lambda: self._begin_in_thread(began))
            except apsw.Error as error:
                self._lock.release()
                self._fail_pending(translate(error, self._path))
            else:
                self._run_batch(self._half())

    def _half(self) -> int:
        """How many ops to take now, so that about as many are left for the transaction after this one."""
        waiting = sum(call.size for call in self._pending)
        return min(MAX_OPS, max(SPLIT_OPS, (waiting + self._answered) // 2))

    def _run_batch(self, limit: int, contended: bool = False) -> None:
        """With the lock held and a transaction begun: run up to ``limit`` ops of what is pending, then have the thread
        commit them; or commit them here, if the lock is ``contended`` and that is quick."""
        try:
            batch = fill(self._applier, self._gauge.measure(), self._path, self._pending, limit)
        except BaseException:  # an interrupt: the loop is about to end, the lock must not stay behind
            self._applier.roll_back()
            self._lock.release()
            raise
        if batch.wrote:
            self._away = True
            if contended and self._commit_seconds < QUICK:
                self._commit(batch)
                self._done(batch)
                return
            self._begun.acquire(blocking=False)
            self._thread.post(lambda: self._commit_in_thread(batch))
            if batch.ops >= SPLIT_OPS:
                self._begun.acquire(timeout=HAND_OVER)
            return
        self._end_unwritten(batch)
        self._settle(batch)
        self._again()

    def _again(self) -> None:
        if self._check_foreign is not None:
            self._look_for_foreign()
        if self._pending or self._jobs:
            self._job_next = bool(self._jobs) and not self._job_next
            self._flush()
        else:
            self._rest()

    @property
    def _settled(self) -> bool:
        """Nothing is under way that anybody waits for. (The thread may still wait for a lock that nobody needs.)"""
        unneeded = self._waiting and (self._job is None or self._job.future.done())
        return not self._pending and not self._jobs and not self._syncing and (not self._away or unneeded)

    async def finish(self) -> None:
        """Take no more; wait for what was submitted."""
        self._closing = True
        while not self._settled:
            self._idle = self._loop.create_future()
            await self._idle

    async def shut(self) -> None:
        """After ``finish``: end the thread, close connection and lock."""
        stuck = self._waiting
        done = self._thread.call(self._shut)
        self._thread.stop()
        if not stuck:
            await done

    def _shut(self) -> None:
        self._connection.close()
        self._lock.close()

    def _rest(self) -> None:
        self._applier.wanted.clear()
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _freed(self, batch: Batch) -> None:
        """The thread has committed, and is about to sync: the next transaction can be filled meanwhile."""
        self._away = False
        self._syncing += batch.ops
        self._answered = batch.ops  # they come once they are answered
        self._again()
        self._answered = 0

    def _synced(self, batch: Batch) -> None:
        """What was committed before is durable, or nobody knows."""
        self._syncing -= batch.ops
        self._settle(batch)
        if self._settled:
            self._rest()

    def _done(self, batch: Batch) -> None:
        """The thread has committed (or failed to) and released the lock."""
        self._away = False
        self._stop_waiting()
        self._settle(batch)
        self._answered = batch.ops
        self._again()
        self._answered = 0

    def _settle(self, batch: Batch) -> None:
        numbers = self.numbers
        if batch.wrote:
            numbers["commits"] += 1
            numbers["calls"] += len(batch.calls)
            numbers["ops"] += batch.ops
            numbers["commit_seconds"] += batch.seconds
            numbers["largest_commit"] = max(numbers["largest_commit"], batch.ops)
            if batch.changed or batch.doomed:
                self._report(batch.changed, batch.doomed)
        if batch.tight and not self._jobs and not self._closing:
            self.job(self._begin_log_anew)  # while the database can still grow by what is in it
        for call in batch.calls:
            future = call.future
            if future.done():
                continue
            if call.error is not None:
                future.set_exception(call.error)
            elif call.outcomes is not None:
                future.set_result(call.outcomes)

    def _fail_pending(self, error: MillpondError) -> None:
        calls, self._pending = self._pending, deque()
        for call in calls:
            if not call.future.done():
                call.future.set_exception(type(error)(str(error)))
        self._again()

    # Waiting for the lock

    def _wait(self, wait: Callable[[], None]) -> None:
        """Have the thread wait; calls that wait for too long hear StoreBusy."""
        self.numbers["lock_waits"] += 1
        self._start_waiting()
        self._thread.post(wait)

    def _next_in_line(self, place: Place, since: float) -> None:
        """Look for the lock until it is free, which is sooner than the thread could tell of it: whoever has it needs a
        moment only. Other callbacks run between looks. Who needs longer is waited for in the thread."""
        with place.mutex:
            if not place.loops:
                return
            wanted = bool(self._pending)
            if not wanted:
                self._lock.step_back()
                place.leave(settled=True)
            elif self._lock.try_enter():
                place.leave(settled=True)
            else:
                now = time.perf_counter()
                place.until = place.until or now + LOOK
                if now > place.until or self._commit_seconds > QUICK:
                    place.leave(settled=False)
                else:
                    self._loop.call_soon(self._look_again, place, since)
                return
        if not wanted:
            self._gave_up(None)
            return
        waited = time.perf_counter() - since
        try:
            self._begin(True)
        except apsw.BusyError:
            self._thread.post(lambda: self._begin_in_thread(since))
            return
        except apsw.Error as error:
            self._lock.release()
            self._gave_up(translate(error, self._path))
            return
        self._take_over(waited)

    def _look_again(self, place: Place, since: float) -> None:
        time.sleep(LOOK_EVERY)
        self._next_in_line(place, since)

    def _take_over(self, waited: float) -> None:
        """The lock is the loop's, after a wait, and a transaction is begun."""
        self._away = False
        self._stop_waiting()
        self.numbers["lock_wait_seconds"] += waited
        self._run_batch(MAX_OPS, contended=True)  # others wait for the lock as well: make the most of it

    def _start_waiting(self) -> None:
        self._away = self._waiting = True
        now = self._clock.monotonic()
        for call in self._pending:
            call.since = now
        for job in self._jobs:
            job.since = now
        self._timer = self._clock.call_later(self._busy_timeout, self._expire)

    def _stop_waiting(self) -> None:
        self._waiting = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        """Calls that have waited for ``busy_timeout`` get StoreBusy; nothing of them is or will be applied."""
        if not self._waiting:
            return
        now = self._clock.monotonic()
        latest = now - self._busy_timeout
        late: list[Call | Job] = []
        with self._mutex:
            while self._pending and self._pending[0].since <= latest:
                late.append(self._pending.popleft())
            while self._jobs and self._jobs[0].since <= latest:
                late.append(self._jobs.popleft())
            if self._job is not None and not self._job.started and self._job.since <= latest:
                self._job.started = True  # the thread must not start it any more
                late.append(self._job)
            oldest = min((one[0].since for one in (self._pending, self._jobs) if one), default=now)
        for one in late:
            if not one.future.done():
                self.numbers["busy_errors"] += 1
                one.future.set_exception(
                    StoreBusy(
                        f"another writer has held {self._path} for {self._busy_timeout:g} s; nothing of this call was "
                        "written. Try again"
                    )
                )
        self._timer = self._clock.call_later(max(oldest - latest, 0.001), self._expire)
        if not self._pending and not self._jobs:
            self._rest()

    def _offered(self, offer: Offer, waited: float) -> None:
        """The thread has the lock, and a transaction is begun."""
        if offer.take():
            self._take_over(waited)

    def _gave_up(self, error: StoreError | None) -> None:
        """The thread stopped waiting: nobody wants the lock any more, or SQLite failed."""
        self._away = False
        self._stop_waiting()
        if error is not None:
            self._fail_pending(error)
        else:
            self._again()

    # Jobs

    def _start_job(self) -> None:
        job = self._job = self._jobs.popleft()
        job.since = self._clock.monotonic()
        self._job_next = False
        self._start_waiting()
        self._thread.post(lambda: self._run_job(job))

    def _job_done(self, job: Job) -> None:
        self._away = False
        self._job = None
        self._stop_waiting()
        self.numbers["jobs"] += 1
        if not job.future.done():
            if job.error is not None:
                job.future.set_exception(job.error)
            else:
                job.future.set_result(job.result)
        self._again()

    def _commit(self, batch: Batch, freed: Callable[[], object] | None = None) -> None:
        """Commit, and see that it is durable; ``freed`` is called in between, if what follows needs no connection."""
        began, early = time.perf_counter(), self._early
        error: StoreError | None = None
        try:
            self._applier.execute("COMMIT")
        except apsw.Error as failure:
            error = translate(failure, self._path, self._connection)
            self._applier.roll_back()
            if isinstance(error, StoreFull):
                self._begin_log_anew()
        self._lock.release()
        if error is None:
            self._applier.committed()
            if early:
                if freed is not None:
                    freed()
                error = self._sync_log()
            batch.seconds = time.perf_counter() - began
            self._commit_seconds += (batch.seconds - self._commit_seconds) / 16
        if error is not None:
            self._fail(batch, error)

    def _sync_log(self) -> StoreError | None:
        try:
            sync_log(self._path)
        except OSError as failure:
            return OutcomeUnknown(
                f"{self._path} was written, but the disk did not confirm it ({failure}): it may be gone after a power "
                "loss. Look at the disk"
            )
        return None

    # In the thread

    def _commit_in_thread(self, batch: Batch) -> None:
        self._begun.release()
        told = self._done

        def freed() -> None:
            nonlocal told
            told = self._synced
            tell(self._loop, self._freed, batch)

        self._commit(batch, freed if batch.ops >= AHEAD_OPS else None)
        tell(self._loop, told, batch)

    def _wait_in_thread(self) -> None:
        began = time.perf_counter()
        self._lock.line_up()
        place = Place()
        tell(self._loop, self._next_in_line, place, began)
        self._stand_in(place)

    def _stand_in(self, place: Place) -> None:
        """Wait for the lock, unless the loop gets it first."""
        began = time.perf_counter()
        if not place.wait(LOOK + GRACE):
            self._lock.enter()
            self._begin_in_thread(began)

    def _begin_in_thread(self, began: float) -> None:
        error: StoreError | None = None
        while True:
            if not self._pending:
                break
            try:
                self._begin(True)
            except apsw.BusyError:
                time.sleep(STRANGER)
                continue
            except apsw.Error as failure:
                error = translate(failure, self._path)
                break
            waited = time.perf_counter() - began
            offer = Offer()
            tell(self._loop, self._offered, offer, waited)
            if not offer.wait(GRACE) and offer.take():
                self._run_in_thread(waited)
            return
        self._lock.release()
        tell(self._loop, self._gave_up, error)

    def _run_in_thread(self, waited: float) -> None:
        source: deque[Call] = deque()
        ops = 0
        with self._mutex:
            left: deque[Call] = deque()
            while self._pending and ops < MAX_OPS:
                call = self._pending.popleft()
                if call.portable:
                    ops += call.size
                    source.append(call)
                else:
                    left.append(call)
            self._pending.extendleft(reversed(left))
        batch = fill(self._applier, self._gauge.measure(), self._path, source, MAX_OPS)
        with self._mutex:
            self._pending.extendleft(reversed(source))
        self.numbers["lock_wait_seconds"] += waited
        self.numbers["batches_in_thread"] += 1
        if batch.wrote:
            self._commit(batch)
        else:
            self._end_unwritten(batch)
        tell(self._loop, self._done, batch)

    def _run_job(self, job: Job) -> None:
        self._lock.acquire()
        with self._mutex:
            start, job.started = not job.started and not job.future.done(), True
        if start:
            try:
                job.result = job.work()
            except apsw.Error as error:
                job.error = translate(error, self._path)
            except BaseException as error:  # it is the waiter's
                job.error = error
        self._lock.release()
        tell(self._loop, self._job_done, job)

    # In either

    def _begin(self, early: bool) -> None:
        """Begin a transaction; ``early``: others wait, so it is to be synced when they can go on. Raises apsw.Error."""
        if early is not self._early:
            self._applier.execute(f"PRAGMA synchronous = {'NORMAL' if early else 'FULL'}")
            self._early = early
        self._applier.execute("BEGIN IMMEDIATE")

    def _end_unwritten(self, batch: Batch) -> None:
        if self._connection.in_transaction:
            self._applier.execute("COMMIT")
        self._lock.release()
        if any(call.request.__class__ is not Take for call in batch.calls):
            # They are told of what is there already, which another process may have written but not synced yet.
            error = self._sync_log()
            if error is not None:
                self._fail(batch, error)

    def _begin_log_anew(self) -> None:
        """Bring the log into the database, if that still can be done, and give back its room."""
        with suppress(apsw.Error):  # no room there either: it is tried again with the next transaction
            self._applier.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _fail(self, batch: Batch, error: StoreError) -> None:
        """Nothing of the batch was applied, or nobody knows: all its callers hear why."""
        self.numbers["failed_commits"] += 1
        batch.wrote = False
        for call in batch.calls:
            if call.error is None:
                call.error = type(error)(str(error))
