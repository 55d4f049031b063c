"""The power fails at each operation of the SQLite store on its files: what was acknowledged is there afterwards.

The workload runs once, and what each power loss would have left is worked out from what it wrote and synced. Then it
is run again for some operations at which the power, or one operation, really fails, and must be told so. All of them,
instead of a spread of about one in ten: MILLPOND_CRASH_ALL=1.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import pytest
from tests.crash.power import Disk, Fate, Medium, Operation, Quiet, Trouble
from tests.crash.workload import CONFIG, INLINE, STEPS, Workload, check, live_on, refuse_stale_answers, run
from tests.model.model import Model

from millpond.errors import MillpondError, OutcomeUnknown, StoreError, StoreFull
from millpond.message import Message
from millpond.model.clock import ManualClock
from millpond.stores.sqlite import SqliteStore, opening, schema, writer
from millpond.testing import pond

ALL = bool(os.environ.get("MILLPOND_CRASH_ALL"))
FATES: dict[str, Callable[[int], Fate]] = {
    "lost": lambda _: False,
    "kept": lambda _: True,
    "torn": random.Random,
    "torn differently": lambda seed: random.Random(-seed - 1),
}
CHECKPOINT_PAGES = 25
"""So that the log is brought into the database, and begun anew, several times while the workload runs."""
HANG = 60.0
"""Real seconds."""


@pytest.fixture(autouse=True)
def frequent_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "CHECKPOINT_PAGES", CHECKPOINT_PAGES)
    monkeypatch.setattr(apsw, "Connection", Quiet)


class Answered(NamedTuple):
    """How things stood when a step was acknowledged."""

    operations: int
    deliveries: int
    now: int


class Record(NamedTuple):
    """All of a run without trouble."""

    work: Workload
    kept: list[dict[str, Model]]
    answered: list[Answered]
    operations: list[Operation]


class Stage:
    """The workload over a SQLite store on a disk of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, trouble: Trouble | None = None) -> None:
        folder.mkdir()
        self.path = folder / "work.db"
        self.clock = ManualClock()
        self.disk = Disk(trouble)
        monkeypatch.setattr(opening, "sync_directory", self._sync_directory)
        monkeypatch.setattr(writer, "sync_log", self._sync_log)
        self.work = Workload(self._store, self.clock)

    def _sync_directory(self, path: str) -> None:
        (self.disk.sync_directory if path == str(self.path) else schema.sync_directory)(path)

    def _sync_log(self, path: str) -> None:
        (self.disk.sync_log if path == str(self.path) else schema.sync_log)(path)

    def _store(self) -> SqliteStore:
        return SqliteStore(self.path, clock=self.clock, inline_limit=INLINE, vfs=self.disk.vfs_name)


def record(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    """Run it all, and keep what was written and when it was acknowledged."""
    stage = Stage(folder, monkeypatch)
    answered: list[Answered] = []

    def note() -> None:
        answered.append(Answered(len(stage.disk.operations), len(stage.work.delivered), stage.clock.now_ms()))

    async def go() -> list[dict[str, Model]]:
        kept: list[dict[str, Model]] = []
        assert await run(stage.work, kept, note) == (len(STEPS), None)
        await check(stage.work.pond, stage.work, kept, len(STEPS))
        await stage.work.pond.close()
        return kept

    kept = asyncio.run(asyncio.wait_for(go(), HANG))
    left = after(stage.disk.operations, len(stage.disk.operations), True)
    assert left == {name: (folder / name).read_bytes() for name in os.listdir(folder) if name in left or "-wal" in name}
    return Record(stage.work, kept, answered, list(stage.disk.operations))


def after(operations: list[Operation], count: int, fate: Fate) -> dict[str, bytes]:
    """What a power loss after that many operations leaves."""
    medium = Medium()
    for operation in operations[:count]:
        medium.apply(operation)
    return medium.after_power_loss(fate)


def put(files: dict[str, bytes], folder: Path, seed: int) -> Path:
    """Lay them out as found when the power is back. Shared memory is whatever it is: nothing of it can be relied on."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if seed % 2:
        (folder / "work.db-shm").write_bytes(random.Random(seed).randbytes(32_768))
    return folder / "work.db"


async def survives(
    path: Path, work: Workload, kept: list[dict[str, Model]], done: int, delivered: list[Message], now: int
) -> None:
    """Nothing that was acknowledged is lost, nothing is half done, stale leases are refused, and the queue goes on."""
    clock = ManualClock(now)
    async with pond(
        store=SqliteStore(path, clock=clock, inline_limit=INLINE), clock=clock, config=CONFIG, seed=99
    ) as on:
        await check(on, work, kept, done)
        await refuse_stale_answers(on, work, delivered)
        await live_on(on, kept, done)


def losses(operations: list[Operation]) -> Iterator[tuple[int, str, dict[str, bytes]]]:
    """Every power loss: after how many operations, the fate of what was not synced, what is left."""
    medium = Medium()
    for count in range(len(operations) + 1):
        if count:
            medium.apply(operations[count - 1])
        for fate, make in FATES.items():
            yield count, fate, medium.after_power_loss(make(count))


def survive_losses(made: Record, folder: Path, chosen: Callable[[int, str], bool]) -> tuple[int, set[str]]:
    """Check what those losses leave; how many different cases they were, and what they were in the middle of."""
    seen: set[bytes] = set()
    kinds: set[str] = set()
    for number, (count, fate, files) in enumerate(losses(made.operations)):
        if not chosen(count, fate):
            continue
        done = sum(one.operations <= count for one in made.answered)
        digest = hashlib.sha256(repr((done, sorted(files.items()))).encode()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        last = made.operations[count - 1] if count else "nothing"
        kinds.add(getattr(last, "kind", "nothing"))
        _, deliveries, now = made.answered[done - 1] if done else Answered(0, 0, ManualClock().now_ms())
        step = STEPS[min(done, len(STEPS) - 1)].name
        try:
            path = put(files, folder / f"loss-{number}", number)
            asyncio.run(
                asyncio.wait_for(
                    survives(path, made.work, made.kept, done, made.work.delivered[:deliveries], now), HANG
                )
            )
        except (AssertionError, MillpondError) as error:
            raise AssertionError(
                f"power lost after operation {count} ({last}) in step {step}, the rest {fate}: "
                f"{type(error).__name__}: {error}"
            ) from error
    return len(seen), kinds


def spread(fraction: int) -> Callable[[int, str], bool]:
    """One in so many of the operations for each fate, other ones for each."""
    offsets = {fate: number for number, fate in enumerate(FATES)}
    return lambda count, fate: ALL or (count * 7 + offsets[fate] * 3) % fraction == 0


EARLY = pytest.mark.parametrize(
    ("early", "ahead"),
    [(False, 10**9), (True, 10**9), (True, 1)],
    ids=["synced with the commit", "synced after it", "synced beside the next"],
)
"""With others waiting, the lock is given back before the log is synced; and with many ops, the next transaction is
filled meanwhile."""


@EARLY
def test_nothing_acknowledged_is_lost_with_the_power(
    early: bool, ahead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer.Writer, "always_early", early)
    monkeypatch.setattr(writer, "AHEAD_OPS", ahead)
    made = record(tmp_path / "origin", monkeypatch)
    cases, kinds = survive_losses(made, tmp_path, spread(17))
    assert cases > 80
    assert {"write", "sync"} <= kinds


@pytest.mark.parametrize("level", ["OFF", "NORMAL"])
def test_a_store_that_does_not_sync_is_found_out(level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this harness: what it passes has to mean something."""
    connect = opening.connect

    def careless(path: str, **options: Any) -> apsw.Connection:
        connection = connect(path, **options)
        connection.execute(f"PRAGMA synchronous = {level}")
        return connection

    monkeypatch.setattr(opening, "connect", careless)
    made = record(tmp_path / "origin", monkeypatch)
    with pytest.raises(AssertionError, match="power lost after"):
        survive_losses(made, tmp_path, lambda count, fate: count % 20 == 0 and fate == "lost")


def test_a_sync_that_is_left_out_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this harness, likewise."""
    monkeypatch.setattr(writer.Writer, "always_early", True)
    monkeypatch.setattr(Disk, "sync_log", lambda disk, path: None)
    made = record(tmp_path / "origin", monkeypatch)
    with pytest.raises(AssertionError, match="power lost after"):
        survive_losses(made, tmp_path, lambda count, fate: count % 20 == 0 and fate == "lost")


def test_the_workload_meets_all_that_can_be_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = record(tmp_path / "origin", monkeypatch)
    met = {(one.kind, one.name) for one in made.operations}
    assert {(kind, "work.db") for kind in ("create", "write", "sync")} <= met
    assert {(kind, "work.db-wal") for kind in ("create", "write", "sync", "delete")} <= met
    assert {(kind, "work.db-journal") for kind in ("create", "write", "sync", "delete")} <= met
    first, last = made.answered[0].operations, made.answered[-1].operations
    inside = made.operations[first:last]
    assert sum(one.kind == "sync" and one.name == "work.db" for one in inside) > 3, "checkpoints amid the work"
    assert sum(one.kind == "write" and one.name == "work.db-wal" and one.offset == 0 for one in inside) > 3, "new logs"


async def trouble(stage: Stage, kept: list[dict[str, Model]], folder: Path) -> MillpondError | None:
    """Run into it, and check what is left; what the caller was told."""
    assert stage.disk.trouble is not None
    done, error = await run(stage.work)
    assert stage.disk.met
    if not stage.disk.off:
        # The process lives, with all that it remembers; it tries again what failed.
        if not stage.work.opened:
            await stage.work.open()
        await check(stage.work.pond, stage.work, kept, done)
        await live_on(stage.work.pond, kept, done)
        await stage.work.pond.close()
        return error
    assert isinstance(error, StoreError), f"step {STEPS[min(done, len(STEPS) - 1)].name} went on without power"
    await stage.work.pond.close()
    seed = stage.disk.trouble.at
    for number, fate in enumerate((False, True, random.Random(seed))):
        files = after(stage.disk.operations, len(stage.disk.operations), fate)
        path = put(files, folder / f"loss-{number}", seed + number)
        await survives(path, stage.work, kept, done, stage.work.delivered, stage.clock.now_ms())
    return error


@pytest.mark.parametrize(
    ("how", "early", "ahead"),
    [(how, False, 10**9) for how in ("before", "middle", "after", "error", "full")]
    + [("middle", True, 10**9), ("middle", True, 1)],
)
def test_a_process_is_told_of_trouble_with_its_disk(
    how: str, early: bool, ahead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer.Writer, "always_early", early)
    monkeypatch.setattr(writer, "AHEAD_OPS", ahead)
    made = record(tmp_path / "origin", monkeypatch)
    last = made.answered[-1].operations
    told: set[type[MillpondError]] = set()
    offset = {"before": 1, "middle": 5, "after": 9, "error": 3, "full": 7}[how]
    # Operations of the files' opening and of the last close come too, but one after the last answer is nobody's loss.
    for at in range(1, last - 10) if ALL else range(offset, last - 10, 23):
        stage = Stage(tmp_path / f"run-{at}", monkeypatch, Trouble(at, how))
        try:
            error = asyncio.run(asyncio.wait_for(trouble(stage, made.kept, tmp_path / f"run-{at}"), HANG))
        except (AssertionError, MillpondError, TimeoutError) as failure:
            raise AssertionError(f"{how} at operation {at}: {type(failure).__name__}: {failure}") from failure
        if error is not None:
            told.add(type(error))
            assert str(stage.path) in str(error), f"{error} does not say which file"
    # A file that there is no room to create is one that cannot be opened, to SQLite.
    expected = {StoreError, OutcomeUnknown} if early else {StoreError}
    assert told == expected if how != "full" else {StoreFull} <= told <= {StoreFull, StoreError}
