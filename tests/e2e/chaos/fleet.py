"""The processes of the chaos test, and what is done to them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.e2e.chaos.client import KINDS
from tests.e2e.chaos.ledger import Left
from tests.e2e.chaos.proxy import Proxy
from tests.servers.process import free_ports

import millpond
from millpond.errors import MillpondError

ROOT = Path(__file__).parents[3]
START = 30.0
"""Seconds for a process to do what it is waited for, on a busy machine."""
QUEUES = ("next", *KINDS)


class Member:
    """A process with a command that is started again when it has ended."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]) -> None:
        self.command = command
        self.log = log
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None
        self.stopped = False
        self.expected = False
        """Somebody has told it to end."""

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=self.environment, cwd=ROOT, start_new_session=True
            )
        self.stopped = self.expected = False

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def send(self, number: int) -> None:
        assert self.process is not None
        if self.running():
            self.process.send_signal(number)
        self.stopped = number == signal.SIGSTOP
        self.expected |= number in (signal.SIGTERM, signal.SIGKILL)

    def end(self) -> None:
        if self.running():
            self.send(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()


class Fleet:
    """Servers on one store, proxies before them, clients and workers behind these; clients on the store itself."""

    def __init__(
        self, folder: Path, store: str, seed: int, *, servers: int, clients: int, workers: int, direct: int, pace: float
    ) -> None:
        self.folder = folder
        self.store = store
        self.chance = random.Random(seed)
        self.counts = (servers, clients, workers, direct)
        self.pace = pace
        self.done: Counter[str] = Counter()
        self.servers: list[Member] = []
        self.others: list[Member] = []
        self.proxies: list[Proxy] = []
        self.trouble: list[str] = []

    def _environment(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MILLPOND_")}
        path = os.pathsep.join((str(Path(millpond.__file__).parents[1]), str(ROOT)))
        return {**kept, "PYTHONPATH": path, "PYTHONWARNINGS": "error::RuntimeWarning", **more}

    async def start(self) -> None:
        servers, clients, workers, direct = self.counts
        hosts = []
        for number, port in enumerate(free_ports(servers)):
            command = [sys.executable, "-m", "millpond", "serve", "--store", self.store, "--port", str(port)]
            command += ["--auth-tokens", str(self.folder / "tokens.toml"), "--timeout-drain", "0.5"]
            command += ["--timeout-shutdown", "1", "--log-level", "warning"]
            self.servers.append(Member(command, self.folder / f"server-{number}.log", self._environment()))
            proxy = Proxy(port, random.Random(self.chance.random()))
            self.proxies.append(proxy)
            hosts.append(await proxy.start())
        text = self._token("chaos")
        for server in self.servers:
            server.start()
        url = f"http://{','.join(hosts)}?token={text}"
        journals = str(self.folder)
        for number in range(clients + direct):
            where = url if number < clients else self.store
            if number % 2 and number < clients:  # each has another server first
                where = f"http://{','.join(reversed(hosts))}?token={text}"
            command = [
                sys.executable,
                "-m",
                "tests.e2e.chaos.client",
                where,
                journals,
                str(self.chance.randrange(1 << 40)),
            ]
            self.others.append(
                Member([*command, str(self.pace)], self.folder / f"client-{number}.log", self._environment())
            )
        for number in range(workers):
            environment = self._environment(CHAOS_URL=url if number % 2 == 0 else self.store, CHAOS_FOLDER=journals)
            command = [sys.executable, "-m", "millpond", "-q", "worker", "tests.e2e.chaos.app", "--app-dir", str(ROOT)]
            self.others.append(Member([*command, "--grace", "1"], self.folder / f"worker-{number}.log", environment))
        for member in self.others:
            member.start()

    def _token(self, name: str) -> str:
        command = [sys.executable, "-m", "millpond", "token", "create", name, "*:*/*"]
        command += ["--tokens", str(self.folder / "tokens.toml")]
        done = subprocess.run(command, env=self._environment(), capture_output=True, check=True, timeout=START)
        return done.stdout.decode().strip()

    async def stop(self) -> None:
        for member in (*self.others, *self.servers):
            member.end()
        for proxy in self.proxies:
            await proxy.stop()

    # Harm

    async def run(self, seconds: float, harm: float) -> None:
        """Do harm for so long."""
        end = time.monotonic() + seconds
        for proxy in self.proxies:
            proxy.harm = harm
        acts = [
            self._kill_server, self._kill_server, self._stop_server, self._drain_server, self._cut,
            self._kill_other, self._kill_other, self._stop_other, self._stop_other, self._leave_other,
            self._reload, self._administer, self._administer,
        ]  # fmt: skip
        later: set[asyncio.Task[None]] = set()
        try:
            while (now := time.monotonic()) < end:
                await asyncio.sleep(min(self.chance.uniform(0.1, 0.8), end - now))  # the moment of the harm, no wait
                self._raise_the_dead()
                act = self.chance.choice(acts)
                self.done[act.__name__.strip("_")] += 1
                later.add(asyncio.create_task(act()))
                later = {task for task in later if not task.done() or task.result()}
        finally:
            for task in later:
                task.cancel()
            for result in await asyncio.gather(*later, return_exceptions=True):
                if isinstance(result, Exception):
                    self.trouble.append(f"{type(result).__name__}: {result}")
            for member in (*self.servers, *self.others):
                if member.stopped:
                    member.send(signal.SIGCONT)

    def _raise_the_dead(self) -> None:
        for member in (*self.servers, *self.others):
            if not member.running():
                assert member.process is not None
                said = member.log.read_text("utf-8", "replace")[-2000:]
                # A worker that cannot open its store ends, and so does a server that begins amid `_reload`; whoever
                # supervises it starts it again.
                fine = "[store_unreachable]" in said or "is not TOML" in said
                if not member.expected and not fine:
                    self.trouble.append(f"{member.log.name} ended by itself ({member.process.returncode}): {said}")
                member.start()

    async def _kill_server(self) -> None:
        self.chance.choice(self.servers).send(signal.SIGKILL)

    async def _drain_server(self) -> None:
        self.chance.choice(self.servers).send(signal.SIGTERM)

    async def _stop_server(self) -> None:
        await self._halt(self.chance.choice(self.servers))

    async def _halt(self, member: Member) -> None:
        if member.running() and not member.stopped:
            member.send(signal.SIGSTOP)
            await asyncio.sleep(self.chance.uniform(0.3, 4.0))
            member.send(signal.SIGCONT)

    async def _cut(self) -> None:
        self.chance.choice(self.proxies).cut_all()

    async def _kill_other(self) -> None:
        self.chance.choice(self.others).send(signal.SIGKILL)

    async def _stop_other(self) -> None:
        await self._halt(self.chance.choice(self.others))

    async def _leave_other(self) -> None:
        self.chance.choice(self.others).send(signal.SIGTERM)

    async def _reload(self) -> None:
        """The file of tokens is written anew, and once in a while is no such file for a moment."""
        path = self.folder / "tokens.toml"
        whole = path.read_bytes()
        if self.chance.random() < 0.3:
            path.write_bytes(whole[: len(whole) // 2])
            await asyncio.sleep(0.05)
        new = path.with_suffix(".new")
        new.write_bytes(whole + b"\n")
        new.chmod(0o600)
        new.replace(path)

    async def _administer(self) -> None:
        """What operators do, by way of the store."""
        what = self.chance.choice(("pause", "policy", "redrive", "collect", "verify", "look"))
        self.done[what] += 1
        async with millpond.connect(self.store) as pond:
            queue = pond.queue(self.chance.choice(KINDS))
            with contextlib.suppress(MillpondError):
                if what == "pause":
                    await queue.pause()
                    await asyncio.sleep(self.chance.uniform(0.0, 0.5))
                    await queue.resume()
                elif what == "policy":
                    await queue.set_policy(on_expired=self.chance.choice(("dead_letter", "discard")))
                elif what == "redrive":
                    await pond.queue("failing").dead_letters.redrive()
                elif what == "collect":
                    await pond.collect()
                elif what == "verify":
                    problems = await pond.verify()
                    self.trouble += [f"verify: {problem}" for problem in problems]
                else:
                    await queue.counts()
                    await queue.browse(limit=50)

    # The end

    async def left(self, clock: Any = None) -> list[Left]:
        """Take out what is left: everything that is live, and a look at the dead letters."""
        found: list[Left] = []
        async with millpond.connect(self.store, clock=clock) as pond:
            assert await pond.verify() == []
            for name in QUEUES:
                queue = pond.queue(name)
                await queue.resume()
                while (counts := await queue.counts()).ready + counts.delayed + counts.leased + counts.blocked:
                    messages = await queue.receive(500, wait=0.0 if clock else 1.0, visibility=600)
                    for message in messages:
                        body = await _name(message.read())
                        found.append(Left(message.id, body, name, message.lease.token, None, message.attempts))
                    assert all(answer.error is None for answer in await queue.ack_many(messages))
                after: str | None = None
                while page := await queue.dead_letters.list(after=after, limit=500):
                    after = page[-1].id
                    for view in page:
                        body = await _name(view.payload())
                        token = view.record.status.token
                        found.append(Left(view.id, body, name, token, view.dead_reason, view.attempts, view.failures))
            assert await pond.verify() == []
        return found


async def _name(payload: Any) -> str:
    import json

    return str(json.loads(await payload)["n"])
