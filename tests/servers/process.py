"""Servers for tests: programs on free ports of 127.0.0.1, ended by their process id, their logs kept for failures."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

START_LIMIT = 60.0
"""Seconds for a server to be ready on a machine that is busy; it takes one to four otherwise."""


@dataclass(eq=False)
class Server:
    """A running server that plays a cloud."""

    name: str
    port: int
    log: Path
    url: Callable[[str], str] = field(repr=False)
    """The store's URL below a prefix."""
    environment: dict[str, str] = field(repr=False)
    """The credentials, as a user's environment has them."""

    def tail(self, lines: int = 20) -> str:
        """The end of what the server wrote."""
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-lines:])


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 at which nobody listens; each is below 50,000, so that 10,000 may be added."""
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            ports.append(int(probe.getsockname()[1]))
        return ports


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path, ready: Callable[[], bool], *, environment: dict[str, str] | None = None
) -> Iterator[None]:
    """The command as a process, from when it is ready until the end of the block."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # a Ctrl-C at the tests is for the tests, which then end it
        )
    try:
        until = time.monotonic() + START_LIMIT
        while not ready():
            if process.poll() is not None or time.monotonic() > until:
                said = log.read_text("utf-8", "replace")[-4000:]
                raise RuntimeError(f"{command[0]} did not start (exit code {process.returncode}):\n{said}")
            time.sleep(0.05)
        yield
    finally:
        process.kill()  # what it holds is thrown away; SeaweedFS takes five seconds to leave in good order
        process.wait()


def answers(port: int, path: str = "/") -> Callable[[], bool]:
    """Whether an HTTP server answers there, whatever it says."""

    def ask() -> bool:
        import http.client

        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request("GET", path)
            connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        return True

    return ask
