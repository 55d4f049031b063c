"""Opening and closing a pond, whoever else does so at the same time; and what `connect` says of wrong arguments."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import millpond
from millpond import Config, InvalidInput, Keyring, StoreClosed, StoreMismatch, TooLarge, UnknownKey
from millpond.stores.sqlite import store as sqlite_store

PATIENCE = 30.0
"""Real seconds after which something that should have come never will."""


def held(tmp_path: Path) -> list[str]:
    """The files of the store that this process has open, and its threads that work for a store."""
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:  # the listing's own
            continue
    files = [link for link in links if link.startswith(str(tmp_path))]
    return files + [thread.name for thread in threading.enumerate() if thread.name.startswith("millpond-")]


async def nothing_held(tmp_path: Path) -> None:
    end = time.monotonic() + PATIENCE
    while held(tmp_path) and time.monotonic() < end:
        await asyncio.sleep(0.001)
    assert held(tmp_path) == []


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="descriptors are counted in /proc")


@needs_proc
async def test_who_opens_it_at_the_same_time_opens_one_store(tmp_path: Path) -> None:
    pond = millpond.connect(f"sqlite:///{tmp_path}/pond.db")
    assert await asyncio.gather(*(pond.open() for _ in range(5))) == [pond] * 5
    await pond.queue("q").enqueue(b"x")
    assert sum(one == "millpond-writer" for one in held(tmp_path)) == 1
    await asyncio.gather(*(pond.close() for _ in range(3)))
    await nothing_held(tmp_path)


class Slow:
    """`open_database`, which goes on once a test lets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.real = sqlite_store.open_database
        monkeypatch.setattr(sqlite_store, "open_database", self)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.reached.set()
        assert self.go_on.wait(PATIENCE)
        return self.real(*arguments, **options)

    async def begun(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, PATIENCE)


@needs_proc
async def test_opening_that_is_cancelled_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    pond = millpond.connect(f"sqlite:///{tmp_path}/pond.db")
    opening = asyncio.ensure_future(pond.open())
    await slow.begun()
    opening.cancel()
    slow.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await nothing_held(tmp_path)
    async with pond:  # it can be tried again
        await pond.queue("q").enqueue(b"x")
    await nothing_held(tmp_path)


@needs_proc
async def test_closing_waits_for_an_opening_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    pond = millpond.connect(f"sqlite:///{tmp_path}/pond.db")
    opening = asyncio.ensure_future(pond.open())
    await slow.begun()
    closing = asyncio.ensure_future(pond.close())
    slow.go_on.set()
    await asyncio.gather(opening, closing)
    await nothing_held(tmp_path)
    with pytest.raises(StoreClosed):
        await pond.open()


def test_a_pond_that_outlived_its_event_loop_says_so(tmp_path: Path) -> None:
    """As when a program keeps one pond, and calls `asyncio.run` twice."""
    pond = millpond.connect(f"sqlite:///{tmp_path}/pond.db")
    queue = pond.queue("q")

    async def first() -> None:
        await pond.open()
        await queue.enqueue(b"x")

    async def second() -> None:
        for _ in range(2):
            with pytest.raises(StoreClosed, match=r"event loop that opened .* has ended.*connect anew"):
                await queue.enqueue(b"y")
        async with millpond.connect(f"sqlite:///{tmp_path}/pond.db") as again:
            assert (await again.queue("q").counts()).ready == 1

    asyncio.run(first())
    asyncio.run(second())


async def test_a_pond_that_was_not_opened_says_how(tmp_path: Path) -> None:
    queue = millpond.connect(f"sqlite:///{tmp_path}/pond.db").queue("q")
    for call in (queue.enqueue(b"x"), queue.receive(), queue.receive(wait=5), queue.counts()):
        with pytest.raises(StoreClosed, match=r"is not open: use the pond in `async with`"):
            await call


@pytest.mark.parametrize(
    ("arguments", "options", "told"),
    [
        ((Path("work.db"),), {}, "a store is named by a URL, as sqlite:///work.db, not by a PosixPath"),
        ((None,), {}, "not by a NoneType"),
        (("memory://",), {"config": {"default_ttl": 5}}, "config is a millpond.Config, not a dict"),
        (("memory://",), {"keyring": "k:c2VjcmV0"}, "keyring is a millpond.Keyring, not a str: see Keyring.from_file"),
    ],
)
def test_connect_names_what_is_wrong(arguments: Any, options: Any, told: str) -> None:
    for connect in (millpond.connect, millpond.connect_sync):
        with pytest.raises(InvalidInput) as error:
            connect(*arguments, **options)
        assert told in str(error.value)
        assert "c2VjcmV0" not in str(error.value)


# What a consumer was raised, it can nack with

LONG = "\u00e9" * 20_000


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (ValueError("no such flour"), "ValueError: no such flour"),
        (ValueError("half \udc80"), "ValueError: half ?"),
        (Unprintable(), "Unprintable: (its text cannot be had: RuntimeError)"),
        (ValueError(LONG), "ValueError: " + LONG[:4090]),
    ],
    ids=["plain", "surrogate", "unprintable", "long"],
)
async def test_any_exception_can_be_given_as_the_error(error: Exception, kept: str) -> None:
    async with millpond.connect("memory://") as pond:
        queue = pond.queue("q")
        await queue.enqueue(b"x", max_attempts=1)
        [message] = await queue.receive()
        await message.nack(error=error)
        [dead] = await queue.dead_letters.list()
        assert dead.last_error == kept


async def test_an_exception_is_cut_to_what_this_pond_keeps() -> None:
    async with millpond.connect("memory://", config=Config(max_error_bytes=100)) as pond:
        queue = pond.queue("q")
        await queue.enqueue(b"x", max_attempts=1)
        [message] = await queue.receive()
        with pytest.raises(TooLarge):
            await message.nack(error=LONG)  # a value of the caller's own is not touched
        await message.nack(error=ValueError(LONG))
        [dead] = await queue.dead_letters.list()
        assert dead.last_error == "ValueError: " + "\u00e9" * 41


# Payloads that are not what somebody took them for


@pytest.mark.parametrize("value", [5, b"bytes", None])
def test_text_takes_text(value: Any) -> None:
    with pytest.raises(InvalidInput, match="takes text, not"):
        millpond.text(value)


def test_text_without_utf_8_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no UTF-8"):
        millpond.text("\ud800")


@pytest.mark.parametrize("payload", [b"[" * 60_000, b'{"a":' * 10_000])
async def test_json_that_is_nested_too_deeply_is_bad_input(payload: bytes) -> None:
    async with millpond.connect("memory://") as pond:
        queue = pond.queue("q")
        await queue.enqueue(payload)
        [message] = await queue.receive()
        with pytest.raises(InvalidInput):
            message.json()
        await message.bury("bad_payload")


# A plain store that is to be encrypted


async def test_a_plain_store_is_encrypted_by_what_its_refusal_says(tmp_path: Path) -> None:
    url, keyring = f"sqlite:///{tmp_path}/pond.db", Keyring.load(Keyring.generate_key())
    async with millpond.connect(url) as pond:
        await pond.queue("q").enqueue(b"once plain", attributes={"a": 1})
    with pytest.raises(StoreMismatch, match=r"accept_plain=True\), then rekey\(encrypt_plain=True\)"):
        await millpond.connect(url, keyring=keyring).open()
    async with millpond.connect(url, keyring=keyring, accept_plain=True) as pond:
        assert await pond.rekey(encrypt_plain=True) > 0
    with pytest.raises(UnknownKey):
        await millpond.connect(url).open()
    async with millpond.connect(url, keyring=keyring) as pond:
        [message] = await pond.queue("q").receive()
        assert (message.payload, message.attributes) == (b"once plain", {"a": 1})
        assert await pond.verify() == []
