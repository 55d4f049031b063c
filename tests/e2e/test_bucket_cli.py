"""The command on a bucket: what ``verify`` finds out, and that a bucket which ignores conditions is refused."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.servers.faults import FaultProxy
from tests.servers.process import Server

import millpond
from millpond.errors import StoreMismatch

SOURCE = Path(millpond.__file__).parents[1]


class Ran(NamedTuple):
    code: int | None
    out: str
    err: str


async def run(server: Server, url: str, *arguments: str) -> Ran:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "millpond",
        *arguments,
        "--store",
        url,
        env={**os.environ, **server.environment, "PYTHONPATH": str(SOURCE)},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return Ran(process.returncode, out.decode(), err.decode())


@pytest.mark.parametrize("kind", ["seaweed", "azurite", "google"])
async def test_verify_prints_what_the_bucket_can_do(kind: str, request: pytest.FixtureRequest) -> None:
    server = request.getfixturevalue(kind)
    ran = await run(server, server.url("verify"), "verify")
    assert (ran.code, ran.err) == (0, "millpond: all is well\n")
    heading, *lines = ran.out.splitlines()
    assert heading.split() == ["CHECK", "RESULT", "FOUND"]
    assert len(lines) == 18
    assert all("  ok  " in line for line in lines)
    if kind == "seaweed":
        return  # it takes its time over races
    ran = await run(server, server.url("verify"), "verify", "--json")
    records = [json.loads(line) for line in ran.out.splitlines()]
    assert [record["check"] for record in records][:2] == ["may write", "may read"]
    assert all(record["ok"] for record in records)
    assert [record["milliseconds"] > 0 for record in records if record["check"].startswith("time of")] == [True] * 5


@pytest.mark.parametrize("what", ["create", "replace"])
async def test_a_bucket_that_ignores_conditions_is_refused(what: str, google: Server) -> None:
    def drop(name: str, value: str) -> bool:
        # The condition of a create is generation 0. (Those of the other clouds are under their signatures.)
        return name == "x-goog-if-generation-match" and (value == "0") == (what == "create")

    async with FaultProxy(google.port, drop=drop) as proxy:
        url = google.url(f"liar/{what}").replace(str(google.port), str(proxy.port))
        pond = millpond.connect(url)
        with pytest.raises(StoreMismatch, match=r"cannot hold a queue: .* succeeded where one may"):
            await pond.open()
        await pond.close()
        ran = await run(google, url, "enqueue", "orders", "text")
        assert ran.code == 1
        assert "cannot hold a queue" in ran.err
        assert "[store_mismatch]" in ran.err
        ran = await run(google, url, "verify")
        assert ran.code == 1
        assert f"conditional {what}" in ran.err
        assert any(line.startswith(f"conditional {what} ") and " FAILED " in line for line in ran.out.splitlines())


async def test_the_command_and_the_library_share_a_bucket(seaweed: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    url = seaweed.url("shared")
    ran = await run(seaweed, url, "enqueue", "orders", "from the shell")
    assert ran.code == 0, ran.err
    async with millpond.connect(url) as pond:
        [message] = await pond.queue("orders").receive()
        assert await message.read() == b"from the shell"
        await message.ack()
    ran = await run(seaweed, url, "stats", "orders", "--json")
    assert json.loads(ran.out)["ready"] == 0


async def test_errors_of_a_url_are_one_line(seaweed: Server) -> None:
    ran = await run(seaweed, "s3://bucket/p?colour=red", "queues")
    assert ran.code == 1
    assert ran.err.count("\n") == 1
    assert "'colour'" in ran.err


async def test_verify_says_in_full_what_is_to_be_done(seaweed: Server) -> None:
    """The table cuts what is long; a wrong key is no fault of the bucket's, and the cure comes last."""
    wrong = replace(seaweed, environment={**seaweed.environment, "AWS_SECRET_ACCESS_KEY": "wrong"})
    ran = await run(wrong, seaweed.url("wrong-key"), "verify")
    assert ran.code == 1
    assert "no valid credentials (403 SignatureDoesNotMatch)" in ran.err
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in ran.err
