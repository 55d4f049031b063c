"""`millpond work` as a process among processes: signalled, killed, side by side, on a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import millpond

BOUND = 60.0
"""Seconds for whatever a process is to do, on the busiest machine."""
SUMMARY = ["namespace", "queue", "taken", "acked", "nacked", "dead", "lost", "given_back", "seconds"]

HOLD = 'echo "$MILLPOND_MESSAGE_ID" >> "$MARKS/started"; while [ ! -e "$MARKS/go" ]; do sleep 0.01; done; ' + (
    'echo "$MILLPOND_MESSAGE_ID" >> "$MARKS/finished"'
)
"""Runs until the test lets it."""


class Works:
    """Starts the command on one store, and ends what a test leaves running."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLPOND_")}
        self.environment |= {
            "MILLPOND_STORE": f"sqlite:///{folder}/pond.db",
            "PYTHONPATH": str(Path(millpond.__file__).parents[1]),
            "MARKS": str(folder),
        }
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str, **more: Any) -> subprocess.Popen[bytes]:
        """Start `work`, as the leader of a process group, as a shell starts a job."""
        more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "process_group": 0} | more
        process = subprocess.Popen(
            [sys.executable, "-m", "millpond", "work", *arguments], cwd=self.folder, env=self.environment, **more
        )
        self._started.append(process)
        return process

    def __call__(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        """Run `work` to its end; its summary."""
        out, errors = self.finish(self.start("--json", *arguments), code)
        summary = json.loads(out.splitlines()[-1])
        assert list(summary) == SUMMARY
        assert b"Traceback" not in errors
        return summary

    def finish(self, process: subprocess.Popen[bytes], code: int = 0) -> tuple[bytes, bytes]:
        out, errors = process.communicate(timeout=BOUND)
        assert process.returncode == code, errors.decode()
        return out, errors

    def run(self, *arguments: str, input: bytes = b"") -> bytes:
        """Any other command."""
        return subprocess.run(
            [sys.executable, "-m", "millpond", *arguments],
            input=input,
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            check=True,
            timeout=BOUND,
        ).stdout

    def enqueue(self, count: int, *options: str) -> None:
        self.run("enqueue", "q", "--lines", *options, input=b"".join(b"%d\n" % number for number in range(count)))

    def counts(self) -> dict[str, Any]:
        counts: dict[str, Any] = json.loads(self.run("stats", "q", "--json"))
        return counts

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().split() if path.exists() else []

    def until(self, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + BOUND
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.01)

    def close(self) -> None:
        (self.folder / "go").touch()
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


@pytest.fixture
def works(tmp_path: Path) -> Iterator[Works]:
    found = Works(tmp_path)
    yield found
    found.close()


def test_each_message_once_and_a_summary(works: Works) -> None:
    works.enqueue(30)
    summary = works("q", "-c", "4", "--until-empty", "--", "sh", "-c", 'read -r x; echo "$x" >> "$MARKS/done"')
    assert summary.pop("seconds") > 0
    assert summary == {
        "namespace": "default",
        "queue": "q",
        "taken": 30,
        "acked": 30,
        "nacked": 0,
        "dead": 0,
        "lost": 0,
        "given_back": 0,
    }
    assert sorted(works.lines("done"), key=int) == [str(number) for number in range(30)]


def test_for_people_the_summary_is_a_line_on_stderr(works: Works) -> None:
    works.enqueue(3)
    out, errors = works.finish(works.start("q", "--until-empty", "--", "cat"))
    assert sorted(out) == sorted(b"012")
    assert errors.startswith(b"millpond: q: 3 taken, 3 acked, 0 failed in ")
    assert errors.count(b"\n") == 1
    assert works.finish(works.start("q", "--until-empty", "-q", "--", "cat")) == (b"", b"")


def test_failures_are_retried_and_then_dead_letters(works: Works) -> None:
    works.enqueue(3, "--max-attempts", "3")
    # 0 always fails, 1 fails once, 2 never does
    script = 'read -r x; echo "$x" >> "$MARKS/tries"; echo "no $x" >&2; [ "$x" = 2 ] || [ "$x$MILLPOND_ATTEMPTS" = 12 ]'
    options = ("q", "-c", "3", "--until-empty", "--backoff", "10ms")
    summary = works(*options, "--fail-dead", "--", "sh", "-c", script, code=3)
    assert Counter(works.lines("tries")) == {"0": 3, "1": 2, "2": 1}
    assert (summary["taken"], summary["acked"], summary["nacked"], summary["dead"]) == (6, 2, 4, 1)
    letter = json.loads(works.run("dlq", "list", "q", "--json"))
    assert letter["last_error"] == {"error": "exit code 1", "exit_code": 1, "stderr": "no 0\n"}
    assert b"exit code 1: no 0" in works.run("dlq", "list", "q")
    works.run("dlq", "redrive", "q", "--all")
    assert works(*options, "--", "true")["acked"] == 1


def test_a_command_longer_than_its_lease_is_run_once(works: Works) -> None:
    works.enqueue(2)
    script = 'echo x >> "$MARKS/tries"; sleep 1.2'
    summary = works("q", "-c", "2", "--until-empty", "--visibility", "300ms", "--", "sh", "-c", script)
    assert (summary["taken"], summary["acked"], summary["lost"]) == (2, 2, 0)
    assert works.lines("tries") == ["x", "x"]


def test_a_time_out_is_a_failure(works: Works) -> None:
    works.enqueue(1, "--max-attempts", "1")
    assert works("q", "--until-empty", "--timeout", "100ms", "--", "sleep", "1000")["dead"] == 1
    letter = json.loads(works.run("dlq", "list", "q", "--json"))
    assert letter["last_error"]["error"] == "timed out after 0.1 s"


def test_ctrl_c_lets_the_commands_finish_and_leaves_the_rest(works: Works) -> None:
    works.enqueue(5)
    process = works.start("q", "-c", "2", "--until-empty", "--", "sh", "-c", HOLD)
    works.until(lambda: len(works.lines("started")) == 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of its foreground job
    assert process.stderr is not None
    assert process.stderr.readline() == b"millpond: letting 2 running finish; once more to end them\n"
    (works.folder / "go").touch()
    _, errors = works.finish(process, 130)
    assert b"2 taken, 2 acked, 0 failed" in errors
    assert sorted(works.lines("finished")) == sorted(works.lines("started"))
    assert (works.counts()["ready"], works.counts()["leased"]) == (3, 0)
    assert works("q", "--until-empty", "--", "sh", "-c", 'echo "$MILLPOND_FAILURES" >> "$MARKS/failures"')["acked"] == 3
    assert works.lines("failures") == ["0"] * 3


def test_ctrl_c_twice_ends_the_commands_and_gives_their_messages_back(works: Works) -> None:
    works.enqueue(3)
    process = works.start("q", "-c", "2", "--", "sh", "-c", HOLD)
    works.until(lambda: len(works.lines("started")) == 2)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, errors = works.finish(process, 130)
    assert b"2 taken, 0 acked, 0 failed, 2 given back" in errors
    assert works.lines("finished") == []
    counts = works.counts()
    assert (counts["ready"], counts["leased"]) == (3, 0)
    (works.folder / "go").touch()
    assert works("q", "--until-empty", "--", "sh", "-c", 'echo "$MILLPOND_FAILURES" >> "$MARKS/failures"')["acked"] == 3
    assert works.lines("failures") == ["0"] * 3


@pytest.mark.parametrize(("options", "code"), [((), 0), (("--until-empty",), 143), (("--limit", "9"), 143)])
def test_sigterm_is_the_end_of_a_service_but_cuts_a_job_short(
    works: Works, options: tuple[str, ...], code: int
) -> None:
    works.enqueue(1)
    process = works.start("q", *options, "--", "sh", "-c", HOLD)
    works.until(lambda: works.lines("started"))
    process.terminate()
    assert process.stderr is not None
    assert process.stderr.readline()
    (works.folder / "go").touch()
    _, errors = works.finish(process, code)
    assert b"1 taken, 1 acked" in errors


def test_killed_in_the_middle_nothing_is_lost(works: Works) -> None:
    """The promise of the whole: kill -9 amid the work, start another, and every message was done."""
    works.enqueue(200, "--max-attempts", "5")
    done = 'read -r x; echo "$x" >> "$MARKS/done"'
    options = ("q", "-c", "4", "--until-empty", "--visibility", "500ms")
    process = works.start(*options, "--", "sh", "-c", done)
    works.until(lambda: len(works.lines("done")) >= 50)
    process.kill()
    works.finish(process, -signal.SIGKILL)
    first = len(works.lines("done"))
    assert first < 200
    summary = works(*options, "--", "sh", "-c", done)
    assert summary["dead"] == 0
    times = Counter(works.lines("done"))
    assert set(times) == {str(number) for number in range(200)}
    assert sum(times.values()) - 200 <= 4  # done again: at most what ran when it was killed
    assert sum(works.counts()[name] for name in ("ready", "delayed", "leased", "blocked", "dead")) == 0
    assert json.loads(works.run("stats", "q", "--json"))["bytes"] == 0
    assert works.run("verify", "--json") == b""


def test_side_by_side_no_message_is_done_twice(works: Works) -> None:
    works.enqueue(150)
    script = 'read -r x; echo "$x" >> "$MARKS/done"'
    both = [works.start("q", "-c", "3", "--until-empty", "--json", "--", "sh", "-c", script) for _ in range(2)]
    summaries = [json.loads(works.finish(process)[0]) for process in both]
    assert sum(summary["acked"] for summary in summaries) == 150
    assert Counter(works.lines("done")) == {str(number): 1 for number in range(150)}


def test_work_starts_at_once_when_another_process_enqueues(works: Works) -> None:
    process = works.start("q", "--limit", "1", "--", "cat")
    works.run("enqueue", "q", "hello")
    assert works.finish(process)[0] == b"hello"


def test_a_program_that_is_not_there_is_wrong_usage(works: Works) -> None:
    _, errors = works.finish(works.start("q", "--until-empty", "--", "no-such-program-anywhere"), 2)
    assert errors.startswith(b"millpond: error: cannot run 'no-such-program-anywhere'")
    assert list(works.folder.iterdir()) == []


def test_a_program_that_cannot_be_run_gives_the_message_back(works: Works) -> None:
    works.enqueue(2)
    script = works.folder / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    _, errors = works.finish(works.start("q", "--until-empty", "--", "./script"), 1)
    assert b"millpond: error: cannot run './script'" in errors
    assert b"[cannot_start]" in errors
    assert works.counts()["ready"] == 2


def test_a_payload_larger_than_memory_should_hold_reaches_the_command(works: Works) -> None:
    data = os.urandom(30_000_000)
    (works.folder / "large").write_bytes(data)
    works.run("enqueue", "q", "--file", "large")
    assert works("q", "--until-empty", "--", "sh", "-c", 'cat > "$MARKS/copy"')["acked"] == 1
    assert (works.folder / "copy").read_bytes() == data


def test_on_a_terminal_progress_is_one_line_beneath_the_output(works: Works) -> None:
    works.enqueue(20)
    screen, terminal = pty.openpty()
    process = works.start("q", "-c", "2", "--until-empty", "--", "sh", "-c", "sleep 0.05; echo out; printf err >&2",
                          stdin=terminal, stdout=terminal, stderr=terminal)  # fmt: skip
    os.close(terminal)
    shown = read_screen(screen, process)
    os.close(screen)
    assert process.returncode == 0
    # What is left once each line that was cleared is gone: output whole, the summary last, no progress.
    kept = [line.rpartition(b"\x1b[2K")[2] for line in shown.replace(b"\r\n", b"\n").split(b"\n")]
    assert Counter(kept)[b"out"] == 20
    assert Counter(kept)[b"err"] == 20
    assert kept[-1] == b""
    assert kept[-2].startswith(b"millpond: q: 20 taken, 20 acked")
    assert len([line for line in kept if line]) == 41
    assert b" running" in shown
    assert b" left" in shown
    assert b"\x1b[3" not in shown  # no colours


def test_a_dumb_terminal_gets_no_progress(works: Works) -> None:
    works.enqueue(2)
    works.environment["TERM"] = "dumb"
    screen, terminal = pty.openpty()
    process = works.start("q", "--until-empty", "--", "true", stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = read_screen(screen, process)
    os.close(screen)
    assert b"\x1b" not in shown
    assert shown.startswith(b"millpond: q: 2 taken, 2 acked")


def test_lines_have_a_progress_bar_on_a_terminal_only(works: Works) -> None:
    (works.folder / "lines").write_bytes(b"x\n" * 20_000)
    screen, terminal = pty.openpty()
    arguments = [sys.executable, "-m", "millpond", "enqueue", "q", "--lines", "--file", "lines"]
    process = subprocess.Popen(
        arguments, cwd=works.folder, env=works.environment | {"TERM": "xterm"}, stdout=subprocess.PIPE, stderr=terminal
    )
    os.close(terminal)
    shown = read_screen(screen, process)
    os.close(screen)
    assert process.stdout is not None
    assert process.stdout.read() == b"20000 messages queued in q\n"
    process.stdout.close()
    assert b"100%" in shown
    plain = subprocess.run(arguments, cwd=works.folder, env=works.environment, capture_output=True, check=True)
    assert plain.stderr == b""


def read_screen(screen: int, process: subprocess.Popen[bytes]) -> bytes:
    """All that is written to the terminal until the process has ended."""
    shown = b""
    end = time.monotonic() + BOUND
    while time.monotonic() < end:
        if select.select([screen], [], [], 0.05)[0]:
            with contextlib.suppress(OSError):  # EIO: the last writer has closed the terminal
                if data := os.read(screen, 65_536):
                    shown += data
                    continue
        if process.poll() is not None:
            return shown
    raise AssertionError("the process did not end")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the disk that is full is Linux's /dev/full")
def test_a_log_on_a_full_disk_leaves_no_message_unanswered(works: Works) -> None:
    """What the commands say cannot be kept; what they did is done, and must not be done again."""
    works.enqueue(5)
    with open("/dev/full", "wb") as full:
        command = ("q", "-c", "2", "--until-empty", "--quiet", "--", "sh", "-c", 'echo moan >&2; cat >> "$MARKS/done"')
        assert works.start(*command, stdout=subprocess.DEVNULL, stderr=full).wait(BOUND) == 0
    assert len(works.lines("done")[0]) == 5
    counts = works.counts()
    assert (counts["ready"], counts["leased"], counts["delayed"]) == (0, 0, 0)
