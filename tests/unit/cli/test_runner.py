"""The engine of `millpond work`, on the memory store; with a manual clock wherever time matters."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import millpond
from millpond.cli.display import Display
from millpond.cli.process import TAIL_SIZE
from millpond.cli.runner import CannotStart, Plan, Runner, Tally
from millpond.errors import StoreBusy, StoreCorrupt
from millpond.model.clock import ManualClock
from millpond.pond import Pond
from millpond.queue import Queue

PATIENCE = 20.0
"""Seconds for a real process to do what it is told: a bound for the unlucky, not a wait."""


class Bench:
    """A pond, a queue, and runners on it."""

    def __init__(self, pond: Pond, clock: ManualClock, folder: Path) -> None:
        self.pond = pond
        self.clock = clock
        self.folder = folder
        self.queue: Queue = pond.queue("jobs")
        self.display = Display(progress=False)

    def runner(self, *command: str, **plan: Any) -> Runner:
        plan.setdefault("until_empty", True)
        return Runner(self.pond, self.queue, Plan(command=command, **plan), self.display)

    async def run(self, *command: str, **plan: Any) -> Tally:
        return await asyncio.wait_for(self.runner(*command, **plan).run(), PATIENCE)

    async def until(self, condition: Callable[[], Any]) -> None:
        """Until a real process has made this true."""
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0.002)

    async def settled(self, condition: Callable[[], Awaitable[Any]]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not await condition():
                await asyncio.sleep(0.002)

    async def advance_until(self, task: asyncio.Task[Any], step: float = 0.5) -> Any:
        """Let time pass until the task is done."""
        async with asyncio.timeout(PATIENCE):
            while not task.done():
                self.clock.advance(step)
                await asyncio.sleep(0.002)
        return await task

    @property
    def marks(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


Use = Callable[[Callable[[Bench], Awaitable[None]]], None]


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Use:
    monkeypatch.setenv("MARKS", str(tmp_path))

    def run(test: Callable[[Bench], Awaitable[None]]) -> None:
        async def session() -> None:
            clock = ManualClock()
            async with millpond.connect("memory://", clock=clock) as pond:
                bench = Bench(pond, clock, tmp_path)
                try:
                    await test(bench)
                finally:
                    await bench.display.close()

        asyncio.run(session())

    return run


HOLD = ("sh", "-c", 'touch "$MARKS/started-$MILLPOND_MESSAGE_ID"; while [ ! -e "$MARKS/go" ]; do sleep 0.01; done')
"""Runs until the test lets it."""


def test_exit_0_acks(use: Use) -> None:
    async def test(bench: Bench) -> None:
        await bench.queue.enqueue_many([b"a", b"b", b"c"])
        tally = await bench.run("sh", "-c", 'read -r x || :; touch "$MARKS/$x"')
        assert (tally.taken, tally.acked, tally.nacked, tally.lost, tally.given_back) == (3, 3, 0, 0, 0)
        assert bench.marks == ["a", "b", "c"]
        assert sum((await bench.queue.counts())[:5]) == 0

    use(test)


def test_the_payload_is_stdin_byte_for_byte(use: Use) -> None:
    async def test(bench: Bench) -> None:
        small, large = os.urandom(1000), os.urandom(3_000_000)
        await bench.queue.enqueue_many([small, large, b""])
        tally = await bench.run("sh", "-c", 'cat > "$MARKS/$MILLPOND_MESSAGE_ID"', concurrency=3)
        assert tally.acked == 3
        assert {path.read_bytes() for path in bench.folder.iterdir()} == {small, large, b""}

    use(test)


def test_a_command_need_not_read_its_stdin(use: Use) -> None:
    async def test(bench: Bench) -> None:
        await bench.queue.enqueue(os.urandom(3_000_000))
        assert (await bench.run("true")).acked == 1

    use(test)


def test_ids_and_attributes_are_in_the_environment(use: Use) -> None:
    async def test(bench: Bench) -> None:
        receipt = await bench.queue.enqueue(
            b"x", attributes={"colour": "grün", "n": [1]}, content_type="text/plain", correlation_id="c-1"
        )
        script = "import json, os, sys; json.dump(dict(os.environ), open(os.environ['MARKS'] + '/env', 'w'))"
        await bench.run(sys.executable, "-c", script, store="sqlite:///x.db")
        found = {k: v for k, v in json.loads((bench.folder / "env").read_text()).items() if k.startswith("MILLPOND_")}
        assert len(found.pop("MILLPOND_LEASE_ID")) >= 16
        assert json.loads(found.pop("MILLPOND_ATTRIBUTES")) == {"colour": "grün", "n": [1]}
        assert found == {
            "MILLPOND_MESSAGE_ID": receipt.message_id,
            "MILLPOND_QUEUE": "jobs",
            "MILLPOND_NAMESPACE": "default",
            "MILLPOND_FENCING_TOKEN": "1",
            "MILLPOND_ATTEMPTS": "1",
            "MILLPOND_FAILURES": "0",
            "MILLPOND_CONTENT_TYPE": "text/plain",
            "MILLPOND_CORRELATION_ID": "c-1",
            "MILLPOND_STORE": "sqlite:///x.db",
        }

    use(test)


def test_braces_are_replaced_by_the_payload_without_a_shell(use: Use) -> None:
    async def test(bench: Bench) -> None:
        await bench.queue.enqueue("$(touch no) 'ü' *".encode())
        script = "import os, sys; open(os.environ['MARKS'] + '/out', 'w', encoding='utf-8').write(sys.argv[1])"
        await bench.run(sys.executable, "-c", script, "<{}|{}>")
        assert (bench.folder / "out").read_text("utf-8") == "<$(touch no) 'ü' *|$(touch no) 'ü' *>"
        await bench.queue.enqueue(b"x")
        await bench.run(sys.executable, "-c", script, "{}@", replace="@")
        assert (bench.folder / "out").read_text("utf-8") == "{}x"
        await bench.queue.enqueue(b"x")
        await bench.run(sys.executable, "-c", script, "{}", replace="")
        assert (bench.folder / "out").read_text("utf-8") == "{}"

    use(test)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [(b"a\0b", "NUL"), (b"\xff", "not UTF-8"), (b"x" * 140_000, "too long"), (b"x" * 2_000_000, "too long")],
    ids=["nul", "binary", "long", "stored apart"],
)
def test_a_payload_that_cannot_be_an_argument_fails_and_says_why(use: Use, payload: bytes, reason: str) -> None:
    async def test(bench: Bench) -> None:
        await bench.queue.enqueue(payload, max_attempts=1)
        tally = await bench.run("touch", str(bench.folder / "{}"))
        assert (tally.nacked, tally.dead) == (1, 1)
        (letter,) = await bench.queue.dead_letters.list()
        assert reason in letter.last_error["error"]
        assert "stdin" in letter.last_error["error"]
        assert bench.marks == []

    use(test)


def test_a_failure_is_retried_after_a_growing_backoff_and_becomes_a_dead_letter(use: Use) -> None:
    async def test(bench: Bench) -> None:
        await bench.queue.enqueue(b"x", max_attempts=4)
        runner = bench.runner("sh", "-c", 'echo "try $MILLPOND_ATTEMPTS" >&2; exit 3', backoff=10.0)
        task = asyncio.create_task(runner.run())
        waits: list[float] = []
        for failures in (1, 2, 3):
            await bench.until(lambda failures=failures: runner.tally.nacked == failures)
            due = await bench.queue.next_due()
            assert due is not None
            waits.append(due)
            bench.clock.advance(due)
        tally = await bench.advance_until(task)
        assert (tally.taken, tally.acked, tally.nacked, tally.dead) == (4, 0, 4, 1)
        for wait, full in zip(waits, (10, 20, 40), strict=True):
            assert full / 2 <= wait <= full
        (letter,) = await bench.queue.dead_letters.list()
        assert letter.last_error == {"error": "exit code 3", "exit_code": 3, "stderr": "try 4\n"}
        assert (letter.attempts, letter.failures) == (4, 4)

    use(test)


def test_the_backoff_is_bounded_and_half_of_it_is_chance(use: Use) -> None:
    async def test(bench: Bench) -> None:
        runner = bench.runner("true", backoff=2.0, max_backoff=60.0)
        for failures, full in ((0, 2.0), (1, 4.0), (4, 32.0), (5, 60.0), (10_000, 60.0)):
            delays = [runner.delay(failures) for _ in range(200)]
            assert all(full / 2 <= delay <= full for delay in delays)
            assert max(delays) - min(delays) > full / 4
        assert bench.runner("true", backoff=0.0).delay(3) == 0.0

    use(test)


def test_of_stderr_the_end_is_kept(use: Use) -> None:
    async def test(bench: Bench) -> None:
        await bench.queue.enqueue(b"x", max_attempts=1)
        script = "import sys; sys.stderr.write('a' * 1_000_000 + 'ü' * 3000 + 'the end'); sys.exit(1)"
        await bench.run(sys.executable, "-c", script)
        (letter,) = await bench.queue.dead_letters.list()
        kept = letter.last_error["stderr"]
        assert kept.endswith("üthe end")
        assert len(kept.encode()) <= TAIL_SIZE + 4

    use(test)


def test_a_signal_is_a_failure_with_its_name(use: Use) -> None:
    async def test(bench: Bench) -> None:
        await bench.queue.enqueue(b"x", max_attempts=1)
        await bench.run("sh", "-c", "kill -9 $$")
        (letter,) = await bench.queue.dead_letters.list()
        assert letter.last_error == {"error": "killed by SIGKILL", "exit_code": -9, "stderr": ""}

    use(test)


def test_no_more_is_taken_than_can_start(use: Use) -> None:
    async def test(bench: Bench) -> None:
        await bench.queue.enqueue_many([b"x"] * 10)
        runner = bench.runner(*HOLD, concurrency=3)
        task = asyncio.create_task(runner.run())
        await bench.until(lambda: len(bench.marks) == 3)
        counts = await bench.queue.counts()
        assert (counts.leased, counts.ready) == (3, 7)
        (bench.folder / "go").touch()
        tally = await asyncio.wait_for(task, PATIENCE)
        assert tally.acked == 10

    use(test)


def test_the_lease_is_renewed_while_the_command_runs(use: Use) -> None:
    async def test(bench: Bench) -> None:
        receipt = await bench.queue.enqueue(b"x", visibility=30.0)
        runner = bench.runner(*HOLD)
        task = asyncio.create_task(runner.run())
        await bench.until(lambda: bench.marks)
        for _ in range(12):  # two minutes, four times the lease
            bench.clock.advance(10.0)

            async def renewed() -> bool:
                lease = (await bench.queue.get(receipt.message_id)).lease
                return lease is not None and lease.until_ms == bench.clock.now_ms() + 30_000

            await bench.settled(renewed)
            assert await bench.queue.receive() == []
        (bench.folder / "go").touch()
        assert (await asyncio.wait_for(task, PATIENCE)).acked == 1

    use(test)


def test_a_lost_lease_ends_the_command_and_nothing_is_answered(use: Use) -> None:
    async def test(bench: Bench) -> None:
        receipt = await bench.queue.enqueue(b"x", visibility=30.0)
        runner = bench.runner(*HOLD, limit=1)
        task = asyncio.create_task(runner.run())
        await bench.until(lambda: bench.marks)
        bench.clock.jump(31.0)  # this machine slept through its lease
        (other,) = await bench.queue.receive()
        bench.clock.advance(10.0)
        tally = await asyncio.wait_for(task, PATIENCE)
        assert (tally.taken, tally.acked, tally.nacked, tally.lost) == (1, 0, 0, 1)
        assert (other.id, other.lease.token) == (receipt.message_id, 2)
        await other.ack()

    use(test)


def test_a_renewal_that_fails_for_a_passing_reason_is_tried_again(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench) -> None:
        receipt = await bench.queue.enqueue(b"x", visibility=36.0)
        real, failures = bench.pond.service.extend, []

        async def extend(*args: Any, **more: Any) -> Any:
            if len(failures) < 3:
                failures.append(1)
                raise StoreBusy
            return await real(*args, **more)

        monkeypatch.setattr(bench.pond.service, "extend", extend)
        runner = bench.runner(*HOLD)
        task = asyncio.create_task(runner.run())
        await bench.until(lambda: bench.marks)
        for at, step in enumerate((12.0, 3.0, 3.0), 1):
            bench.clock.advance(step)
            await bench.until(lambda at=at: len(failures) == at)
            await asyncio.sleep(0)
        bench.clock.advance(3.0)

        async def renewed() -> bool:
            lease = (await bench.queue.get(receipt.message_id)).lease
            return lease is not None and lease.until_ms == bench.clock.now_ms() + 36_000

        await bench.settled(renewed)
        (bench.folder / "go").touch()
        assert (await asyncio.wait_for(task, PATIENCE)).acked == 1

    use(test)


def test_a_command_that_takes_too_long_is_ended_with_all_it_started(use: Use) -> None:
    async def test(bench: Bench) -> None:
        await bench.queue.enqueue(b"x", max_attempts=1)
        stubborn = 'trap "" TERM; echo $$ > "$MARKS/pid"; sleep 1000 & wait; sleep 1000'
        runner = bench.runner("sh", "-c", stubborn, timeout=60.0, kill_after=5.0)
        task = asyncio.create_task(runner.run())
        await bench.until(lambda: bench.marks and (bench.folder / "pid").read_text())
        bench.clock.advance(59.0)
        await asyncio.sleep(0.05)
        assert not task.done()
        bench.clock.advance(1.0)
        await asyncio.sleep(0.05)
        assert not task.done()  # it ignores SIGTERM
        bench.clock.advance(5.0)
        assert (await asyncio.wait_for(task, PATIENCE)).dead == 1
        (letter,) = await bench.queue.dead_letters.list()
        assert letter.last_error["error"] == "timed out after 60 s"
        group = int((bench.folder / "pid").read_text())

        def gone() -> bool:
            try:
                os.killpg(group, 0)
            except ProcessLookupError:
                return True
            return all(state in "ZX" for state in states_of_group(group))

        await bench.until(gone)

    use(test)


def states_of_group(group: int) -> list[str]:
    """States of the processes of a group, on Linux; a killed orphan may stay a zombie where nobody reaps."""
    states = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group:
            states.append(fields[0])
    return states


def test_a_first_interrupt_lets_commands_finish(use: Use) -> None:
    async def test(bench: Bench) -> None:
        await bench.queue.enqueue_many([b"x"] * 5)
        runner = bench.runner(*HOLD, concurrency=2)
        task = asyncio.create_task(runner.run())
        await bench.until(lambda: len(bench.marks) == 2)
        runner.interrupt(2)
        (bench.folder / "go").touch()
        tally = await asyncio.wait_for(task, PATIENCE)
        assert (tally.taken, tally.acked, tally.given_back) == (2, 2, 0)
        assert (await bench.queue.counts()).ready == 3

    use(test)


def test_a_second_interrupt_ends_commands_and_gives_their_messages_back(use: Use) -> None:
    async def test(bench: Bench) -> None:
        await bench.queue.enqueue_many([b"x"] * 5)
        runner = bench.runner(*HOLD, concurrency=2)
        task = asyncio.create_task(runner.run())
        await bench.until(lambda: len(bench.marks) == 2)
        runner.interrupt(2)
        runner.interrupt(2)
        tally = await asyncio.wait_for(task, PATIENCE)
        assert (tally.taken, tally.acked, tally.nacked, tally.given_back) == (2, 0, 0, 2)
        assert (await bench.queue.counts()).ready == 5
        assert {view.failures for view in await bench.queue.peek(5)} == {0}

    use(test)


def test_a_second_interrupt_also_ends_a_command_that_is_just_being_started(use: Use) -> None:
    async def test(bench: Bench) -> None:
        await bench.queue.enqueue(b"x")
        runner = bench.runner(*HOLD)
        spawn = runner._spawn

        def interrupted(*arguments: Any) -> Any:
            runner.interrupt(2)
            runner.interrupt(2)
            return spawn(*arguments)

        runner._spawn = interrupted  # type: ignore[method-assign]
        tally = await asyncio.wait_for(runner.run(), PATIENCE)
        assert (tally.given_back, (await bench.queue.counts()).ready) == (1, 1)

    use(test)


def test_a_third_interrupt_kills(use: Use) -> None:
    async def test(bench: Bench) -> None:
        await bench.queue.enqueue(b"x")
        runner = bench.runner("sh", "-c", 'trap "" TERM; touch "$MARKS/started"; while :; do sleep 0.01; done')
        task = asyncio.create_task(runner.run())
        await bench.until(lambda: bench.marks)
        for _ in range(3):
            runner.interrupt(15)
        tally = await asyncio.wait_for(task, PATIENCE)
        assert (tally.given_back, (await bench.queue.counts()).ready) == (1, 1)

    use(test)


def test_an_interrupt_while_it_waits_for_messages_ends_it(use: Use) -> None:
    async def test(bench: Bench) -> None:
        runner = bench.runner("true", until_empty=False)
        task = asyncio.create_task(runner.run())
        await asyncio.sleep(0.02)
        assert not task.done()
        runner.interrupt(15)
        assert (await asyncio.wait_for(task, PATIENCE)).taken == 0

    use(test)


def test_without_until_empty_it_waits_for_more(use: Use) -> None:
    async def test(bench: Bench) -> None:
        runner = bench.runner("true", until_empty=False)
        task = asyncio.create_task(runner.run())
        for count in (1, 2):
            await bench.queue.enqueue(b"x")
            await bench.until(lambda count=count: runner.tally.acked == count)
        assert not task.done()
        runner.interrupt(15)
        await asyncio.wait_for(task, PATIENCE)

    use(test)


def test_limit(use: Use) -> None:
    async def test(bench: Bench) -> None:
        await bench.queue.enqueue_many([b"x"] * 10)
        tally = await bench.run("true", concurrency=4, limit=6, until_empty=False)
        assert (tally.taken, tally.acked) == (6, 6)
        assert (await bench.queue.counts()).ready == 4

    use(test)


def test_until_empty_leaves_what_is_scheduled_for_later(use: Use) -> None:
    async def test(bench: Bench) -> None:
        await bench.queue.enqueue(b"now")
        await bench.queue.enqueue(b"tomorrow", delay=86_400)
        assert (await bench.run("true")).acked == 1
        assert (await bench.queue.counts()).delayed == 1

    use(test)


def test_until_empty_waits_for_what_is_due_soon(use: Use) -> None:
    async def test(bench: Bench) -> None:
        await bench.queue.enqueue(b"soon", delay=200)
        task = asyncio.create_task(bench.runner("true", max_backoff=300.0).run())
        tally = await bench.advance_until(task, 10.0)
        assert tally.acked == 1

    use(test)


def test_until_empty_waits_for_what_others_hold_and_takes_it_over(use: Use) -> None:
    async def test(bench: Bench) -> None:
        await bench.queue.enqueue(b"x", visibility=1000.0)
        (held,) = await bench.queue.receive()
        task = asyncio.create_task(bench.runner("true", max_backoff=1.0).run())
        for _ in range(5):
            bench.clock.advance(1.0)
            await asyncio.sleep(0.01)
        assert not task.done()
        tally = await bench.advance_until(task, 100.0)
        assert tally.acked == 1
        with pytest.raises(millpond.LeaseLost):
            await held.ack()

    use(test)


def test_until_empty_ends_at_once_when_another_acks_the_last(use: Use) -> None:
    async def test(bench: Bench) -> None:
        await bench.queue.enqueue(b"x")
        (held,) = await bench.queue.receive()
        task = asyncio.create_task(bench.runner("true").run())
        await asyncio.sleep(0.02)
        await held.ack()
        assert (await bench.advance_until(task)).taken == 0

    use(test)


def test_a_paused_queue_counts_as_empty(use: Use, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    async def test(bench: Bench) -> None:
        await bench.queue.enqueue(b"x")
        await bench.queue.pause()
        assert (await bench.run("true")).taken == 0
        await bench.display.close()
        assert b"millpond: queue jobs is paused\n" in capfdbinary.readouterr().err

    use(test)


def test_a_command_that_cannot_be_started_stops_the_work_and_costs_no_failure(use: Use) -> None:
    async def test(bench: Bench) -> None:
        await bench.queue.enqueue_many([b"x"] * 5)
        script = bench.folder / "not-executable"
        script.write_text("#!/no/such/interpreter\n")
        with pytest.raises(CannotStart, match="cannot run"):
            await bench.run(str(script), concurrency=2)
        counts = await bench.queue.counts()
        assert (counts.ready, counts.leased) == (5, 0)
        assert {view.failures for view in await bench.queue.peek(5)} == {0}

    use(test)


def test_a_command_named_by_the_payload_fails_for_its_message_alone(use: Use) -> None:
    async def test(bench: Bench) -> None:
        await bench.queue.enqueue(b"no-such-program-anywhere", max_attempts=1)
        await bench.queue.enqueue(b"true")
        tally = await bench.run("{}")
        assert (tally.acked, tally.dead) == (1, 1)

    use(test)


def test_a_payload_that_breaks_off_kills_the_command_that_reads_it(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench) -> None:
        await bench.queue.enqueue(os.urandom(3_000_000), max_attempts=1)

        def broken(*args: Any) -> AsyncIterator[bytes]:
            async def chunks() -> AsyncIterator[bytes]:
                yield b"beginning"
                raise StoreCorrupt("the payload is incomplete")

            return chunks()

        monkeypatch.setattr(bench.pond.service, "payload_chunks", broken)
        tally = await bench.run("sh", "-c", 'cat >/dev/null; touch "$MARKS/thought-it-was-whole"')
        assert (tally.acked, tally.dead) == (0, 1)
        assert bench.marks == []
        (letter,) = await bench.queue.dead_letters.list()
        assert letter.last_error["error"] == "the payload could not be read: the payload is incomplete"

    use(test)


def test_a_process_left_behind_with_the_pipes_open_holds_nothing_up(use: Use) -> None:
    async def test(bench: Bench) -> None:
        await bench.queue.enqueue(b"x")
        began = asyncio.get_running_loop().time()
        tally = await bench.run("sh", "-c", "sleep 5 & echo left >&2; exit 0")
        assert tally.acked == 1
        assert asyncio.get_running_loop().time() - began < 4

    use(test)


def test_passing_store_errors_are_waited_out(
    use: Use, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    async def test(bench: Bench) -> None:
        await bench.queue.enqueue(b"x")
        real, failures = bench.pond.service.claim, []

        async def claim(*args: Any, **more: Any) -> Any:
            if len(failures) < 2:
                failures.append(1)
                raise StoreBusy
            return await real(*args, **more)

        monkeypatch.setattr(bench.pond.service, "claim", claim)
        tally = await bench.advance_until(asyncio.create_task(bench.runner("true").run()))
        assert tally.acked == 1
        await bench.display.close()
        assert capfdbinary.readouterr().err.count(b"[store_busy]; trying again in") == 2

    use(test)


def test_other_store_errors_end_the_work_after_what_runs(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench) -> None:
        await bench.queue.enqueue_many([b"x"] * 3)

        async def ack(*args: Any, **more: Any) -> None:
            raise StoreCorrupt("broken")

        monkeypatch.setattr(bench.pond.service, "ack", ack)
        with pytest.raises(StoreCorrupt):
            await bench.run("true", concurrency=2)

    use(test)


def test_output_of_commands_passes_through_line_by_line(use: Use, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    async def test(bench: Bench) -> None:
        await bench.queue.enqueue_many([b"1", b"2", b"3", b"4"])
        await bench.run("sh", "-c", "read x || :; printf 'out%s\\n' $x; printf 'err%s-' $x >&2; printf 'end\\n' >&2",
                        concurrency=4)  # fmt: skip
        await bench.display.close()
        captured = capfdbinary.readouterr()
        assert sorted(captured.out.split()) == [b"out1", b"out2", b"out3", b"out4"]
        assert sorted(captured.err.split()) == [b"err1-end", b"err2-end", b"err3-end", b"err4-end"]

    use(test)
