"""Files that were cut, changed, mislaid, mixed up or locked by others: a clear error that names the file, and no
garbage. What has no checksum, the bytes of a payload in a store without encryption, is not looked at here."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import millpond
from millpond.errors import StoreBusy, StoreCorrupt, StoreError, StoreMismatch
from millpond.model.clock import ManualClock
from millpond.stores.sqlite import SqliteStore
from millpond.testing import pond

PAGE = 4096
LARGE = bytes(range(256)) * 400
"""Stored apart."""


def payload(number: int) -> bytes:
    return b"%d " % number + bytes([number % 251]) * 1500


PAYLOADS = {*map(payload, range(120)), LARGE}


async def fill(path: Path, first: int = 0) -> None:
    async with millpond.connect(f"sqlite:///{path}") as live:
        await live.queue("q").enqueue_many([payload(number) for number in range(first, first + 60)])
        await live.queue("q").enqueue(LARGE)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store that was closed in order."""
    folder = tmp_path_factory.mktemp("sound")
    asyncio.run(fill(folder / "work.db"))
    return folder


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose process died: much is in the log only."""
    folder = tmp_path_factory.mktemp("crashed")

    async def go() -> None:
        await fill(folder / "work.db")
        async with millpond.connect(f"sqlite:///{folder / 'work.db'}") as live:
            await live.queue("q").enqueue_many([payload(number) for number in range(60, 120)])
            shutil.copytree(folder, folder / "copy", ignore=lambda *_: ["copy"])

    asyncio.run(go())
    shutil.rmtree(folder / "copy" / "work.db-millpond")
    (folder / "copy" / "work.db-shm").unlink()
    return folder / "copy"


@pytest.fixture
def copied(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "copied")
    return tmp_path / "copied" / "work.db"


def flip(path: Path, at: int, count: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        found = file.read(count)
        file.seek(at)
        file.write(bytes(byte ^ 0xFF for byte in found))


async def opened(path: Path) -> None:
    async with millpond.connect(f"sqlite:///{path}?busy_timeout=0.2"):
        pass


async def use(path: Path) -> list[str]:
    """Do all one can; what was said to be wrong. Errors have to be clear, and what is given out is what was put in."""
    wrong: list[str] = []
    async with millpond.connect(f"sqlite:///{path}") as live:
        queue = live.queue("q")
        problems = await live.verify()
        wrong += [f"{problem.where}: {problem.what}" for problem in problems]
        for call in (queue.counts, lambda: queue.enqueue(payload(0)), queue.dead_letters.list, live.collect):
            try:
                await call()  # type: ignore[operator]
            except StoreError as error:
                wrong.append(str(error))
        try:
            while messages := await queue.receive(50):
                for message in messages:
                    assert await message.read() in PAYLOADS
                    await message.ack()
        except StoreError as error:
            wrong.append(str(error))
    assert [each for each in wrong[len(problems) :] if str(path) not in each] == [], "an error does not name the file"
    return wrong


@pytest.mark.parametrize("size", [10, 99, 100, 1000, PAGE, PAGE * 3 + 7, -PAGE])
def test_a_file_that_was_cut_is_refused(size: int, copied: Path) -> None:
    whole = copied.stat().st_size
    cut = size if size > 0 else whole + size
    os.truncate(copied, cut)
    with pytest.raises((StoreCorrupt, StoreMismatch), match=r"work\.db is (damaged|not a Millpond store)"):
        asyncio.run(opened(copied))
    assert copied.stat().st_size == cut, "it was left as it is"


@pytest.mark.parametrize(
    ("at", "count", "error", "says"),
    [
        (0, 16, StoreMismatch, "not a Millpond store"),
        (16, 2, StoreMismatch, "not a Millpond store"),
        (18, 2, StoreMismatch, "not a Millpond store"),
        (28, 4, StoreCorrupt, "damaged"),
        (60, 4, StoreCorrupt, "schema version -2 was never written"),
        (63, 1, StoreMismatch, "schema version 254"),
        (68, 4, StoreMismatch, "not a Millpond store"),
        (100, 8, StoreCorrupt, "damaged"),
    ],
)
async def test_a_changed_header_is_refused(
    at: int, count: int, error: type[StoreError], says: str, copied: Path
) -> None:
    flip(copied, at, count)
    with pytest.raises(error, match=rf"work\.db.*{says}"):
        await opened(copied)


async def test_a_changed_page_is_found_and_no_call_gives_garbage(sound: Path, tmp_path: Path) -> None:
    pages = (sound / "work.db").stat().st_size // PAGE
    found = 0
    for page in range(1, pages, max(1, pages // 24)):
        folder = tmp_path / str(page)
        shutil.copytree(sound, folder)
        # The header of a page says of what kind it is and where things are.
        flip(folder / "work.db", page * PAGE, 8)
        try:
            wrong = await use(folder / "work.db")
        except StoreError as error:
            wrong = [str(error)] if str(folder / "work.db") in str(error) else []
        found += bool(wrong)
    assert found >= 20, f"only {found} noticed"


async def test_verify_reports_what_it_cannot_read_any_more(copied: Path) -> None:
    async with millpond.connect(f"sqlite:///{copied}") as live:
        root = live.store._near.connection.execute(  # type: ignore[attr-defined]
            "SELECT rootpage FROM sqlite_master WHERE name='message'"
        ).get
    flip(copied, (root - 1) * PAGE, 8)
    async with millpond.connect(f"sqlite:///{copied}") as live:
        problems = await live.verify()
    assert any(problem.where == "database" for problem in problems)
    assert any(problem.where == "records" and str(copied) in problem.what for problem in problems)


async def test_a_log_that_is_missing_leaves_what_was_there_before(crashed: Path, tmp_path: Path) -> None:
    shutil.copytree(crashed, tmp_path / "copied")
    path = tmp_path / "copied" / "work.db"
    assert path.with_name("work.db-wal").stat().st_size > 60 * 1500
    path.with_name("work.db-wal").unlink()
    async with millpond.connect(f"sqlite:///{path}") as live:
        assert (await live.queue("q").counts()).ready == 61
    assert await use(path) == []


@pytest.mark.parametrize("empty", [False, True], ids=["missing", "empty"])
async def test_the_log_of_a_database_that_is_not_there_is_kept(empty: bool, crashed: Path, tmp_path: Path) -> None:
    shutil.copytree(crashed, tmp_path / "copied")
    path = tmp_path / "copied" / "work.db"
    path.rename(tmp_path / "mislaid")
    if empty:
        path.touch()
    before = path.with_name("work.db-wal").read_bytes()
    with pytest.raises(StoreCorrupt, match=r"work\.db is missing or empty, but its log .*work\.db-wal is there"):
        await opened(path)
    assert path.with_name("work.db-wal").read_bytes() == before
    (tmp_path / "mislaid").rename(path)
    async with millpond.connect(f"sqlite:///{path}") as live:
        assert (await live.queue("q").counts()).ready == 121


async def test_a_log_whose_checksums_do_not_fit_ends_there(crashed: Path, tmp_path: Path) -> None:
    log = (crashed / "work.db-wal").stat().st_size
    for number, at in enumerate((0, 16, 32, 60, log // 2, log - 10)):
        shutil.copytree(crashed, tmp_path / str(number))
        path = tmp_path / str(number) / "work.db"
        flip(path.with_name("work.db-wal"), at, 4)
        async with millpond.connect(f"sqlite:///{path}") as live:
            assert (await live.queue("q").counts()).ready in {61, 121}
        assert await use(path) == []


async def test_the_log_of_another_store_gives_no_garbage(sound: Path, crashed: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "copied")
    path = tmp_path / "copied" / "work.db"
    async with millpond.connect(f"sqlite:///{path}") as live:
        await live.queue("other").enqueue_many([payload(number) for number in range(100)])
    shutil.copy(crashed / "work.db-wal", path.with_name("work.db-wal"))
    try:
        wrong = await use(path)
    except StoreError as error:
        wrong = [str(error)]
    assert wrong, "a mixture of two stores was taken for a sound one"
    assert any("damaged" in each or "database" in each for each in wrong)


HOLDER = """
import sys, apsw
connection = apsw.Connection(sys.argv[1])
for statement in sys.argv[2].split(";"):
    connection.execute(statement).fetchall()
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def stranger(path: Path, statements: str) -> Iterator[None]:
    """Another program, which knows SQLite and not Millpond, holds a lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), statements], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
    finally:
        process.communicate("")


async def test_a_strangers_write_lock_makes_calls_busy_and_nothing_of_them_is_applied(tmp_path: Path) -> None:
    path, clock = tmp_path / "work.db", ManualClock()
    async with pond(store=SqliteStore(path, clock=clock, busy_timeout=10.0), clock=clock) as live:
        queue = live.queue("q")
        await queue.enqueue_many([b"one", b"two"])
        [message, _] = await queue.receive(2)
        with stranger(path, "BEGIN IMMEDIATE"):
            calls: list[Callable[[], object]] = [
                lambda: queue.enqueue(b"refused"),
                message.ack,
                lambda: queue.enqueue(LARGE),
            ]
            for call in calls:
                task = asyncio.ensure_future(call())  # type: ignore[arg-type]
                waits = live.statistics()["store"]["busy_errors"]
                while not task.done():
                    # Every ten of the clock's seconds, as often as it takes the call to reach the store.
                    clock.advance(10.0)
                    await asyncio.sleep(0.01)
                with pytest.raises(StoreBusy, match=r"work\.db.*nothing of this call was written"):
                    await task
                assert live.statistics()["store"]["busy_errors"] > waits
            counts = await queue.counts()
            assert counts.ready + counts.leased == 2, "reads go on, and show that nothing was applied"
        await message.ack()
        await queue.enqueue(b"three")
        counts = await queue.counts()
        assert counts.ready + counts.leased == 2
        assert await live.verify() == []


async def test_a_file_that_a_stranger_has_for_itself_is_busy_at_opening(copied: Path) -> None:
    with (
        stranger(copied, "PRAGMA locking_mode=EXCLUSIVE;BEGIN IMMEDIATE;COMMIT"),
        pytest.raises(StoreBusy, match=r"work\.db"),
    ):
        await opened(copied)
    assert await use(copied) == []


READ_ONLY = """
import asyncio, os, sys
import millpond, millpond.connecting, millpond.pond, millpond.stores.sqlite
if os.geteuid() == 0:
    os.seteuid(65534)  # one to whom permissions apply
async def main():
    try:
        async with millpond.connect(f"sqlite:///{sys.argv[1]}"):
            print("opened")
    except millpond.StoreError as error:
        print(error)
asyncio.run(main())
"""


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_a_directory_that_cannot_be_written_is_named(existing: bool, sound: Path) -> None:
    # Not below tmp_path, into which other users may not look.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if existing:
            shutil.copytree(sound, folder, dirs_exist_ok=True)
        for each in [*folder.rglob("*"), folder]:
            each.chmod(0o555 if each.is_dir() else 0o444)
        try:
            done = subprocess.run(
                [sys.executable, "-c", READ_ONLY, str(folder / "work.db")],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        finally:
            for each in [folder, *folder.rglob("*")]:
                each.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert f"{folder / 'work.db'}" in done.stdout
    assert "Permission denied" in done.stdout
