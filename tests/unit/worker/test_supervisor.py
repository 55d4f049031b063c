"""The supervisor's decisions, with processes and time of the test's own. Real ones: tests/e2e/test_worker.py."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from millpond.model.clock import ManualClock
from millpond.worker import supervisor as module
from millpond.worker.probe import Report
from millpond.worker.supervisor import KILL_AFTER, LIFELINE, LONGEST_PAUSE, ONE_SIGNAL, STEADY, Supervisor


class Process:
    """Plays a process."""

    made: list[Process]

    def __init__(self, command: list[str], *, env: Mapping[str, str], **options: Any) -> None:
        self.command, self.environment, self.options = command, env, options
        self.pid = len(self.made)
        self.code: int | None = None
        self.signals: list[int] = []
        self.made.append(self)

    def poll(self) -> int | None:
        return self.code

    def send_signal(self, number: int) -> None:
        self.signals.append(number)

    def kill(self) -> None:
        self.code = -9

    def wait(self) -> None: ...


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Process]:
    Process.made = []
    monkeypatch.setattr(module.subprocess, "Popen", Process)
    return Process.made


def supervisor(count: int = 1, **options: Any) -> Supervisor:
    options = {"hopeless": frozenset({2})} | options
    made = Supervisor(["work"], {"A": "b"}, count, 30.0, clock=ManualClock(), **options)  # type: ignore[arg-type]
    made._theirs = 99
    return made


def test_it_starts_as_many_as_it_should_apart_from_the_terminal_and_with_a_lifeline(made: list[Process]) -> None:
    assert supervisor(3, probe_file="/run/p")._step()
    assert [process.command for process in made] == [["work", "--probe-file", f"/run/p.{n}"] for n in range(3)]
    assert made[0].environment == {"A": "b", LIFELINE: "99"}
    assert made[0].options == {"pass_fds": (99,), "process_group": 0}


def test_what_dies_is_started_again_after_a_growing_pause(made: list[Process]) -> None:
    boss = supervisor()
    boss._step()
    pauses = []
    for death in range(8):
        made[-1].code = 1
        boss._step()
        waited = 0.0
        while len(made) == death + 1:
            boss.clock.advance(0.25)  # type: ignore[attr-defined]
            waited += 0.25
            boss._step()
        pauses.append(waited)
    assert pauses == [1, 2, 4, 8, 16, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]
    boss.clock.advance(STEADY)  # type: ignore[attr-defined]
    made[-1].code = -11
    boss._step()
    boss.clock.advance(1)  # type: ignore[attr-defined]
    boss._step()
    assert len(made) == 10  # it was well for long: the pause is the first again


def test_what_no_restart_cures_ends_it(made: list[Process]) -> None:
    boss = supervisor(2)
    boss._step()
    made[0].code = 2
    assert boss._step()
    assert boss._step()
    assert made[1].signals == [signal.SIGTERM]
    made[1].code = 0
    assert not boss._step()
    assert (boss._code, len(made)) == (2, 2)


def test_signals_are_passed_on_and_nothing_is_started_any_more(made: list[Process]) -> None:
    boss = supervisor(2)
    boss._step()
    boss.interrupt(signal.SIGINT)
    boss.clock.advance(2)  # type: ignore[attr-defined]
    boss.interrupt(signal.SIGTERM)
    assert [process.signals for process in made] == [[2, 15], [2, 15]]
    made[0].code = 130
    assert boss._step()
    boss.clock.advance(60)  # type: ignore[attr-defined]
    made[1].code = 143
    assert not boss._step()
    assert len(made) == 2


def test_a_second_signal_that_comes_at_once_reaches_processes_that_take_two_within_a_second_for_one(
    made: list[Process],
) -> None:
    """It was once lost on them, and who pressed Ctrl-C twice waited for the grace."""
    boss = supervisor(2)
    boss._step()
    boss.interrupt(signal.SIGINT)
    boss.clock.advance(0.25)  # type: ignore[attr-defined]
    boss.interrupt(signal.SIGINT)
    boss._step()
    assert [process.signals for process in made] == [[2], [2]]
    for _ in range(20):
        boss.clock.advance(0.1)  # type: ignore[attr-defined]
        boss._step()
        if len(made[0].signals) == 1:
            quiet = boss.clock.monotonic()
    assert quiet >= ONE_SIGNAL
    assert [process.signals for process in made] == [[2, 2], [2, 2]]
    made[0].code = made[1].code = 130
    assert not boss._step()


def test_what_does_not_end_is_killed_some_time_after_the_grace(made: list[Process]) -> None:
    boss = supervisor()
    boss._step()
    boss.interrupt(signal.SIGTERM)
    boss.clock.advance(30 + KILL_AFTER)  # type: ignore[attr-defined]
    boss._step()
    assert made[0].code is None
    boss.clock.advance(1)  # type: ignore[attr-defined]
    boss._step()
    assert made[0].code == -9
    assert not boss._step()


def test_a_reload_ends_all_and_starts_them_at_once(made: list[Process]) -> None:
    boss = supervisor(2)
    boss._step()
    boss.reload()
    boss._step()
    assert [process.signals for process in made] == [[signal.SIGTERM], [signal.SIGTERM]]
    made[0].code = made[1].code = 0
    boss._step()
    boss._step()
    assert len(made) == 4


def test_a_second_reload_does_not_cut_short_what_is_ending_for_the_first(made: list[Process]) -> None:
    """To a worker a second signal means: at once. Saving a file twice is not to say that."""
    boss = supervisor(2)
    boss._step()
    boss.reload()
    boss._step()
    made[0].code = 0
    boss._step()
    boss._step()  # one has come back; the other still lets its handlers end
    assert len(made) == 3
    for _ in range(3):
        boss.reload()
        boss._step()
    assert made[1].signals == [signal.SIGTERM]
    assert made[2].signals == [signal.SIGTERM]  # it may have read what was changed since
    made[1].code = made[2].code = 0
    boss._step()
    boss._step()
    assert len(made) == 5


@pytest.mark.parametrize(
    ("codes", "signals", "expected"),
    [
        ((0,), [15], 0),
        ((1,), [15], 1),
        ((-9,), [15], 1),
        ((-15,), [15], 0),
        ((143,), [15, 15], 143),
        ((130,), [2, 2], 130),
    ],
)
def test_the_exit_code_says_how_it_ended(
    made: list[Process], tmp_path: Path, codes: tuple[int, ...], signals: list[int], expected: int
) -> None:
    boss = supervisor(probe_file=str(tmp_path / "p"))
    steps = iter(range(100))

    def wait(_: float) -> None:
        if next(steps) == 0:
            assert Report.__struct_fields__
            assert (tmp_path / "p").exists()
            for number in signals:
                boss.interrupt(number)
        else:
            made[0].code = codes[0]

    boss._wake.wait = wait  # type: ignore[method-assign,assignment]
    assert boss.run() == expected
    assert not (tmp_path / "p").exists()
