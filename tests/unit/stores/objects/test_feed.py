"""The change feed of a bucket among the processes of one machine: quick, private, and never relied on."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from millpond.errors import StoreClosed, StoreError
from millpond.model.clock import ManualClock
from millpond.stores import wake
from millpond.stores.objects.feed import HostFeed, feed_directory

CLOCK = ManualClock()
STORE = "4f7c-the-store's-own-id"


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory of the test's own, with a path short enough for sockets everywhere."""
    with tempfile.TemporaryDirectory(prefix="mp") as made:
        monkeypatch.setenv("XDG_RUNTIME_DIR", made)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(made)


class Heard:
    """Notes the calls of a subscription."""

    def __init__(self) -> None:
        self.count = 0
        self._event = asyncio.Event()

    def __call__(self) -> None:
        self.count += 1
        self._event.set()

    async def once(self) -> None:
        async with asyncio.timeout(20):
            await self._event.wait()
        self._event.clear()


async def test_one_store_hears_of_another_and_not_of_itself() -> None:
    here, there = HostFeed(STORE, clock=CLOCK), HostFeed(STORE, clock=CLOCK)
    heard, other, own = Heard(), Heard(), Heard()
    here.subscribe("default", "a", heard)
    here.subscribe("default", "b", other)
    there.subscribe("default", "a", own)
    there.announce([("default", "a")])
    await heard.once()
    assert (heard.count, other.count, own.count) == (1, 0, 0)
    there.announce({("default", "a"), ("default", "b")})
    await heard.once()
    await other.once()
    assert own.count == 0
    assert there.numbers["sent"] == 2
    assert here.numbers["received"] == 2
    here.close()
    there.close()


async def test_other_stores_are_not_told() -> None:
    here, there = HostFeed(STORE, clock=CLOCK), HostFeed("another", clock=CLOCK)
    here.subscribe("default", "a", Heard())
    there.announce([("default", "a")])
    assert there.numbers == {}
    assert feed_directory(STORE) != feed_directory("another")
    assert "/" not in feed_directory("s3://bucket/../../prefix").name
    here.close()


async def test_another_process_is_heard() -> None:
    here = HostFeed(STORE, clock=CLOCK)
    heard = Heard()
    here.subscribe("default", "a", heard)
    script = f"""
from millpond.model.clock import SystemClock
from millpond.stores.objects.feed import HostFeed
feed = HostFeed({STORE!r}, clock=SystemClock())
feed.announce([("default", "a")])
assert feed.numbers["sent"] == 1, feed.numbers
"""
    run = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", script], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    await heard.once()
    here.close()


async def test_who_only_announces_makes_nothing(runtime: Path) -> None:
    feed = HostFeed(STORE, clock=CLOCK)
    feed.announce([("default", "a")])
    assert os.listdir(runtime) == []
    feed.close()


async def test_what_is_made_is_closed_to_others_and_the_socket_goes_with_its_owner(runtime: Path) -> None:
    feed = HostFeed(STORE, clock=CLOCK)
    old = os.umask(0)
    try:
        feed.subscribe("default", "a", Heard())
    finally:
        os.umask(old)
    directory = feed_directory(STORE)
    assert directory.parent.parent == runtime
    [socket] = directory.iterdir()
    modes = [path.lstat().st_mode & 0o777 for path in (directory.parent, directory, socket)]
    assert modes == [0o700, 0o700, 0o600]
    feed.close()
    feed.close()
    assert list(directory.iterdir()) == []


async def test_after_the_end_nothing_is_told_and_nobody_may_listen() -> None:
    here, there = HostFeed(STORE, clock=CLOCK), HostFeed(STORE, clock=CLOCK)
    heard = Heard()
    subscription = here.subscribe("default", "a", heard)
    there.announce([("default", "a")])
    there.close()
    there.announce([("default", "a")])
    assert there.numbers["sent"] == 1
    await heard.once()
    with pytest.raises(StoreClosed):
        there.subscribe("default", "a", heard)
    here.close()
    assert not subscription.active


async def test_a_child_leaves_its_parents_socket_alone() -> None:
    feed = HostFeed(STORE, clock=CLOCK)
    feed.subscribe("default", "a", Heard())
    loop = asyncio.get_running_loop()
    inner = feed._feed
    assert inner is not None
    assert inner._socket is not None
    loop.remove_reader(inner._socket.fileno())  # As in a child, which has no such loop.
    feed.abandon()
    assert len(list(feed_directory(STORE).iterdir())) == 1
    feed.announce([("default", "a")])


async def test_a_directory_that_was_cleaned_up_is_made_anew() -> None:
    clock = ManualClock()
    here, there = HostFeed(STORE, clock=clock), HostFeed(STORE, clock=clock)
    heard = Heard()
    subscription = here.subscribe("default", "a", heard)
    directory = feed_directory(STORE)
    for socket in directory.iterdir():
        socket.unlink()
    directory.rmdir()
    there.announce([("default", "a")])  # Reaches nobody, and harms nobody.
    clock.advance(wake.POLL)
    await heard.once()
    assert not subscription.active
    here.subscribe("default", "a", heard)
    there.announce([("default", "a")])
    await heard.once()
    here.close()
    there.close()


# Whose directory


def lax(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True)
    directory.chmod(0o750)


def link(directory: Path) -> None:
    directory.parent.mkdir(mode=0o700, exist_ok=True)
    elsewhere = directory.parent / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    directory.symlink_to(elsewhere)


def file(directory: Path) -> None:
    directory.parent.mkdir(mode=0o700, exist_ok=True)
    directory.write_bytes(b"")


@pytest.mark.parametrize("level", ["own", "parent"])
@pytest.mark.parametrize("plant", [lax, link, file])
async def test_a_directory_that_is_not_ours_alone_is_not_used(
    plant: Callable[[Path], None], level: str, caplog: pytest.LogCaptureFixture
) -> None:
    directory = feed_directory(STORE)
    plant(directory if level == "own" else directory.parent)
    feed = HostFeed(STORE, clock=CLOCK)
    with pytest.raises(StoreError, match=r"change feed"):
        feed.subscribe("default", "a", Heard())
    with caplog.at_level(logging.WARNING, "millpond.objects"):
        feed.announce([("default", "a")])
        feed.announce([("default", "a")])
    assert [entry.message for entry in caplog.records] == ["millpond.feed.refused"]
    assert feed.numbers == {}
    feed.close()


@pytest.mark.parametrize("whose", ["own", "parent"])
async def test_another_users_directory_is_not_used(whose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = HostFeed(STORE, clock=CLOCK)
    listener.subscribe("default", "a", Heard())
    feed = HostFeed(STORE, clock=CLOCK)
    planted = feed_directory(STORE) if whose == "own" else feed_directory(STORE).parent
    real = Path.lstat

    def lstat(path: Path) -> os.stat_result:
        found = real(path)
        if path != planted:
            return found
        return os.stat_result((*found[:4], found.st_uid + 1, *found[5:10]))

    monkeypatch.setattr(Path, "lstat", lstat)
    with pytest.raises(StoreError, match="is not this user's directory"):
        feed.subscribe("default", "a", Heard())
    feed.announce([("default", "a")])
    assert feed.numbers == {}, "nothing was sent to whoever listens there"
    monkeypatch.undo()
    listener.close()


@pytest.mark.parametrize("set_to", [None, "", "relative/path", "missing", "lax"])
def test_without_a_runtime_directory_it_is_below_the_temporary_one(
    set_to: str | None, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(runtime))
    monkeypatch.setattr(tempfile, "tempdir", None)
    if set_to is None:
        monkeypatch.delenv("XDG_RUNTIME_DIR")
    else:
        lax_one = runtime / "lax"
        lax_one.mkdir()
        lax_one.chmod(0o755)
        where = str(runtime / set_to) if set_to in ("missing", "lax") else set_to
        monkeypatch.setenv("XDG_RUNTIME_DIR", where)
    directory = feed_directory(STORE)
    assert directory.parent == runtime / f"millpond-{os.geteuid()}"
