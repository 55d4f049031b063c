"""The SQLite store's own: files that are no store, busy and full disks, group commit, several processes."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import apsw
import pytest

import millpond
from millpond.errors import OutcomeUnknown, StoreBusy, StoreClosed, StoreError, StoreFull, StoreMismatch
from millpond.stores.sqlite import schema, writer
from millpond.stores.sqlite.lock import Turnstile

Scenario = Callable[[millpond.Pond], Awaitable[None]]


def url(path: Path, options: str = "") -> str:
    return f"sqlite:///{path}{options}"


def run(path: Path, scenario: Scenario, options: str = "") -> None:
    async def main() -> None:
        async with millpond.connect(url(path, options)) as pond:
            await scenario(pond)

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "work.db"


async def nothing(pond: millpond.Pond) -> None:
    """Opening is enough."""


def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    path.write_bytes(b"no database, but long enough to look like a page of one" * 100)
    with pytest.raises(StoreMismatch):
        run(path, nothing)
    assert path.read_bytes().startswith(b"no database")


def test_somebody_elses_database_is_refused(path: Path) -> None:
    with apsw.Connection(str(path)) as connection:
        connection.execute("CREATE TABLE theirs(x)")
    with pytest.raises(StoreMismatch):
        run(path, nothing)


def test_a_newer_schema_is_refused_by_its_number(path: Path) -> None:
    run(path, nothing)
    connection = apsw.Connection(str(path))
    connection.execute("PRAGMA user_version=999")
    connection.close()
    with pytest.raises(StoreMismatch, match="999"):
        run(path, nothing)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere"):
        run(tmp_path / "nowhere" / "work.db", nothing)


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        run(tmp_path, nothing)


def test_commits_reach_the_disk_before_they_are_acknowledged(path: Path) -> None:
    """L14 of lockd: acknowledged without fsync by default."""

    async def scenario(pond: millpond.Pond) -> None:
        execute = pond.store._writer._applier.execute  # type: ignore[attr-defined]
        assert execute("PRAGMA synchronous").get == 2, "FULL"
        assert execute("PRAGMA journal_mode").get == "wal"

    run(path, scenario)


def test_concurrent_calls_share_commits(path: Path) -> None:
    async def scenario(pond: millpond.Pond) -> None:
        queue = pond.queue("q")
        await queue.enqueue(b"first")
        before = pond.statistics()["store"]["commits"]
        receipts = await asyncio.gather(*(queue.enqueue(b"x") for _ in range(200)))
        assert len({receipt.message_id for receipt in receipts}) == 200
        assert pond.statistics()["store"]["commits"] - before <= 4
        assert (await queue.counts()).ready == 201

    run(path, scenario)


def test_a_large_commit_has_begun_before_the_loop_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the loop would keep the GIL from the thread until it has nothing more to do, and then wait for the disk."""
    monkeypatch.setattr(writer, "HAND_OVER", 30.0)

    async def scenario(pond: millpond.Pond) -> None:
        own = pond.store._writer  # type: ignore[attr-defined]
        sizes: list[int] = []
        commit = own._commit_in_thread

        def recorded(batch: writer.Batch) -> None:
            sizes.append(batch.ops)
            commit(batch)

        async def look() -> list[int]:
            await asyncio.sleep(0)  # the flush that the enqueues asked for comes first
            return sizes.copy()

        queue = pond.queue("q")
        await queue.enqueue(b"first")
        own._commit_in_thread = recorded
        *_, begun = await asyncio.gather(*(queue.enqueue(b"x") for _ in range(writer.SPLIT_OPS)), look())
        assert begun == [writer.SPLIT_OPS]

    run(path, scenario)


@pytest.mark.parametrize(("seconds", "on_the_loop"), [(0.0, True), (1.0, False)])
def test_with_others_waiting_the_loop_commits_while_that_is_quick(
    path: Path, seconds: float, on_the_loop: bool
) -> None:
    async def scenario(pond: millpond.Pond) -> None:
        own = pond.store._writer  # type: ignore[attr-defined]
        threads: list[int] = []
        commit = own._commit

        def recorded(batch: writer.Batch, freed: Callable[[], object] | None = None) -> None:
            threads.append(threading.get_ident())
            commit(batch, freed)

        own._commit = recorded
        own._commit_seconds = seconds
        other = Turnstile(f"{path}-millpond", 0o600)
        assert other.try_acquire()
        enqueue = asyncio.create_task(pond.queue("q").enqueue(b"x"))
        while not own._waiting:
            await asyncio.sleep(0)
        other.release()
        await enqueue
        other.close()
        assert [thread == threading.get_ident() for thread in threads] == [on_the_loop]

    run(path, scenario)


def test_a_busy_loop_that_is_next_in_line_holds_up_nobody(path: Path) -> None:
    async def scenario(pond: millpond.Pond) -> None:
        own = pond.store._writer  # type: ignore[attr-defined]
        own._commit_seconds = 0.0
        rival = Turnstile(f"{path}-millpond", 0o600)
        assert rival.try_acquire()
        enqueue = asyncio.create_task(pond.queue("q").enqueue(b"x"))
        while not own._waiting:
            await asyncio.sleep(0)
        again = threading.Event()

        def work() -> None:
            rival.release()
            rival.acquire()
            rival.release()
            again.set()

        thread = threading.Thread(target=work)
        thread.start()
        came = again.wait(10)  # the loop does nothing else meanwhile
        await enqueue
        thread.join()
        rival.close()
        assert came
        assert pond.store.statistics()["batches_in_thread"] == 1

    run(path, scenario)


def test_whoever_is_next_in_line_looks_for_a_moment_and_then_waits_in_the_thread(path: Path) -> None:
    async def scenario(pond: millpond.Pond) -> None:
        own = pond.store._writer  # type: ignore[attr-defined]
        own._commit_seconds = 0.0
        looks: list[bool] = []
        look = own._lock.try_enter

        def recorded() -> bool:
            looks.append(look())
            return looks[-1]

        own._lock.try_enter = recorded
        other = Turnstile(f"{path}-millpond", 0o600)
        assert other.try_acquire()
        enqueue = asyncio.create_task(pond.queue("q").enqueue(b"x"))
        before = -1
        while before != len(looks):  # until it looks no more
            before = len(looks)
            await asyncio.sleep(writer.LOOK)
        other.release()
        await enqueue
        other.close()
        assert len(looks) > 1
        assert not any(looks)

    run(path, scenario)


def test_who_is_told_of_a_duplicate_waits_until_that_is_on_the_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(writer, "sync_log", synced.append)

    async def scenario(pond: millpond.Pond) -> None:
        queue = pond.queue("q")
        assert not (await queue.enqueue(b"x", dedup_key="k")).duplicate
        assert not synced
        assert await queue.receive(1)
        assert not await queue.receive(1)
        assert not synced
        assert (await queue.enqueue(b"x", dedup_key="k")).duplicate
        assert synced == [str(path)]

    run(path, scenario)


def test_a_log_that_cannot_be_synced_leaves_it_open_whether_that_was_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(pond: millpond.Pond) -> None:
        def refuse(path: str) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)

        queue = pond.queue("q")
        with monkeypatch.context() as broken:
            broken.setattr(writer, "sync_log", refuse)
            with pytest.raises(OutcomeUnknown, match=r"work\.db was written, but the disk did not confirm it"):
                await queue.enqueue(b"perhaps")
        await queue.enqueue(b"surely")
        assert [message.payload for message in await queue.receive(2)] == [b"perhaps", b"surely"]

    monkeypatch.setattr(writer.Writer, "always_early", True)
    run(path, scenario)


def test_the_next_transaction_is_filled_while_the_log_is_synced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was first is answered when that is done, and not before; closing waits for it."""
    monkeypatch.setattr(writer, "AHEAD_OPS", 1)
    syncing, go_on = threading.Event(), threading.Event()

    def slow(path: str) -> None:
        syncing.set()
        assert go_on.wait(30)
        schema.sync_log(path)

    async def scenario(pond: millpond.Pond) -> None:
        queue = pond.queue("q")
        await queue.enqueue(b"warm")
        monkeypatch.setattr(writer, "sync_log", slow)
        first = asyncio.create_task(queue.enqueue(b"first"))
        assert await asyncio.to_thread(syncing.wait, 30)
        own = pond.store._writer  # type: ignore[attr-defined]
        while own._away:
            await asyncio.sleep(0)
        second = asyncio.create_task(queue.enqueue(b"second"))
        while not own._away:
            await asyncio.sleep(0)
        assert not own._pending, "the second is in its transaction"
        assert not first.done()
        closing = asyncio.create_task(pond.close())
        await asyncio.sleep(0)
        assert not closing.done()
        go_on.set()
        await asyncio.gather(first, second, closing)
        async with millpond.connect(url(path)) as again:
            messages = await again.queue("q").receive(10)
        assert [message.payload for message in messages] == [b"warm", b"first", b"second"]

    run(path, scenario)


def test_of_transactions_one_upon_the_other_each_hears_of_its_own_sync(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "AHEAD_OPS", 1)

    async def scenario(pond: millpond.Pond) -> None:
        queue = pond.queue("q")
        await queue.enqueue(b"warm")
        fate = [OSError(errno.EIO, os.strerror(errno.EIO)), None]

        def sync(path: str) -> None:
            error = fate.pop(0)
            if error is not None:
                raise error
            schema.sync_log(path)

        monkeypatch.setattr(writer, "sync_log", sync)
        own = pond.store._writer  # type: ignore[attr-defined]
        first = asyncio.create_task(queue.enqueue(b"perhaps"))
        while not own._away:
            await asyncio.sleep(0)
        second = asyncio.create_task(queue.enqueue(b"surely"))
        with pytest.raises(OutcomeUnknown):
            await first
        await second
        assert not fate
        assert own._syncing == 0

    run(path, scenario)


def test_a_foreign_writer_makes_it_busy_and_nothing_is_lost(path: Path) -> None:
    async def scenario(pond: millpond.Pond) -> None:
        queue = pond.queue("q")
        await queue.enqueue(b"before")
        stranger = apsw.Connection(str(path))
        stranger.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreBusy):
            await queue.enqueue(b"refused")
        stranger.execute("ROLLBACK")
        stranger.close()
        await queue.enqueue(b"after")
        assert [message.payload for message in await queue.receive(10)] == [b"before", b"after"]

    run(path, scenario, "?busy_timeout=0.2")


def test_a_full_disk_is_an_error_and_acks_still_work(path: Path) -> None:
    async def scenario(pond: millpond.Pond) -> None:
        queue = pond.queue("q")
        execute = pond.store._writer._applier.execute  # type: ignore[attr-defined]
        kept = {receipt.message_id for receipt in await queue.enqueue_many([bytes(1000)] * 50)}
        limit = execute("PRAGMA page_count").get + 5
        execute(f"PRAGMA max_page_count={limit}")
        with pytest.raises(StoreFull):
            await queue.enqueue_many([bytes(50_000)] * 20)
        assert (await queue.counts()).ready == 50
        messages = await queue.receive(50)
        assert {message.id for message in messages} == kept
        await queue.ack_many(messages)
        execute("PRAGMA max_page_count=1000000")
        await queue.enqueue(bytes(50_000))
        assert (await queue.counts()).ready == 1
        assert await pond.verify() == []

    run(path, scenario)


def test_another_process_wakes_a_waiter(path: Path) -> None:
    async def scenario(pond: millpond.Pond) -> None:
        waiting = asyncio.create_task(pond.queue("q").receive(wait=50.0))
        while not pond.dispatcher.has_active_watcher(None, "q"):
            await asyncio.sleep(0.01)
        program = f"import millpond\nwith millpond.connect_sync({url(path)!r}) as p: p.queue('q').enqueue(b'hello')"
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
        assert await process.wait() == 0
        [message] = await asyncio.wait_for(waiting, 5.0)
        assert message.payload == b"hello"

    run(path, scenario)


def test_two_ponds_on_one_file_give_each_message_once(path: Path) -> None:
    async def scenario(pond: millpond.Pond) -> None:
        async with millpond.connect(url(path)) as other:
            await pond.queue("q").enqueue_many([b"%d" % number for number in range(500)])
            seen: list[bytes] = []

            async def work(queue: millpond.Queue) -> None:
                while messages := await queue.receive(7):
                    seen.extend(message.payload for message in messages)
                    assert all(answer.error is None for answer in await queue.ack_many(messages))

            await asyncio.gather(*(work(each.queue("q")) for each in (pond, other, pond, other)))
            assert sorted(map(int, seen)) == list(range(500))
            assert await pond.verify() == []

    run(path, scenario)


LARGE = """
import asyncio, resource, sys, millpond
BLOCK = bytes(range(256)) * 4096  # 1 MiB
async def source():
    for _ in range(1024):
        yield BLOCK
async def main():
    async with millpond.connect(sys.argv[1]) as pond:
        queue = pond.queue("large")
        await queue.enqueue(b"warm"); [message] = await queue.receive(); await message.ack()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        await queue.enqueue(source())
        [message] = await queue.receive(visibility=600)
        assert message.payload_size == 1 << 30, message.payload_size
        size = 0
        async for chunk in message.stream():
            assert len(chunk) <= 1 << 20
            size += len(chunk)
        assert size == 1 << 30, size
        await message.ack()
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
asyncio.run(main())
"""


def test_a_payload_of_a_gibibyte_takes_less_than_100_mebibytes_of_memory(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LARGE, url(path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100


def test_a_closed_store_says_so(path: Path) -> None:
    async def main() -> None:
        pond = await millpond.connect(url(path)).open()
        queue = pond.queue("q")
        pending = [asyncio.create_task(queue.enqueue(b"x")) for _ in range(20)]
        await asyncio.sleep(0)
        await pond.close()
        assert len(await asyncio.gather(*pending)) == 20
        with pytest.raises(StoreClosed):
            await queue.enqueue(b"late")
        async with millpond.connect(url(path)) as again:
            assert (await again.queue("q").counts()).ready == 20

    asyncio.run(main())
