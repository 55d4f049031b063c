"""Figures of Millpond's server on SQLite with fsync, and of five brokers, in one run on this machine. Prints JSON.

    python benchmarks/server.py [--quick] [--runs N] [--seconds S] [--only NAME …] [--systems NAME …]
    python benchmarks/server.py --endpoint URL [--bundle PEM] [--pid PID]     any server of lockd's protocol

1 KiB messages. The server, one process, has one core and the load the other; each figure has a new server, with new
data, and is the median of several runs (all are in ``runs``). A lifecycle is an enqueue, a receive and an ack.

- **single**: a message a call, 64 callers with a connection each.
- **latency_at_half_load**: the same, begun at even times at half the rate that ``single`` found, whether or not
  earlier ones are done; ``lifecycle`` counts from when one was to begin, ``call`` from when a call was sent.
- **batches_of_100**: a hundred messages a call, eight callers.
- **stream**: messages on streams, acked in batches of what came, enqueued in batches of a hundred.
- **idle_subscribers**: memory and CPU of the server while a thousand wait for messages that do not come.

``server_cpu_us_each`` and ``load_cpu_us_each`` are CPU time for each lifecycle: where the load's is the larger one,
its client is what was measured. *millpond_lockd* and *millpond_native* are the server's two protocols, driven by
`load.py`, which costs little; *millpond_client* is Millpond's own client, as programs use it. The brokers are driven
by their usual clients (`server_peers.py`), and each runs in its durable setting (`brokers.py`)."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import brokers

import millpond

HERE = Path(__file__).parent
LIMIT = 60.0
"""Seconds beyond its time that a run may take."""
CALLERS = {"single": 64, "latency": 64, "batch": 8, "stream": 64, "idle": 1000}
FIGURES = {
    "single": "single",
    "latency": "latency_at_half_load",
    "batch": "batches_of_100",
    "stream": "stream",
    "idle": "idle_subscribers",
}
IDLE_SECONDS = 35.0
"""Two heartbeats and a bit."""


@contextlib.contextmanager
def pond(core: int | None) -> Iterator[brokers.Broker]:
    """`millpond serve` on an SQLite file."""
    [port] = brokers.free_ports(1)
    with brokers.folder_for("server") as folder:
        command = [sys.executable, "-m", "millpond", "serve", "--port", str(port)]
        environment = {"MILLPOND_STORE": f"sqlite:///{folder / 'pond.db'}"}
        with brokers.serving(command, folder / "log", brokers.listens(port), core=core, environment=environment) as pid:
            yield brokers.Broker(f"http://127.0.0.1:{port}", pid, f"millpond {millpond.__version__}")


@dataclass(frozen=True)
class System:
    """A server, and what drives it."""

    server: Callable[[int | None], contextlib.AbstractContextManager[brokers.Broker]]
    load: tuple[str, ...]
    """The script, and what comes before the mode."""
    protocol: str = ""
    """For `load.py`."""
    modes: tuple[str, ...] = ("single", "latency", "batch")

    def command(self, url: str, mode: str, seconds: float, rate: float, bundle: str | None) -> list[str]:
        """The load's command line."""
        script, *rest = self.load
        command = [sys.executable, str(HERE / script)]
        if self.protocol:
            command += [mode, url, "--protocol", self.protocol, "--connections", str(CALLERS[mode])]
            command += ["--seconds", str(seconds), "--rate", str(rate)]
            return command + (["--bundle", bundle] if bundle else [])
        return [*command, *rest, url, mode, str(CALLERS[mode]), str(seconds), str(rate)]


def peer(name: str) -> tuple[str, ...]:
    """Driven by `server_peers.py`."""
    return ("server_peers.py", name)


SYSTEMS = {
    "millpond_lockd": System(pond, ("load.py",), "lockd", ("single", "latency", "stream", "idle")),
    "millpond_native": System(pond, ("load.py",), "native", ("single", "latency", "batch", "stream", "idle")),
    "millpond_client": System(pond, peer("millpond")),
    "redis": System(brokers.redis, peer("redis")),
    "rabbitmq": System(brokers.rabbitmq, peer("rabbitmq")),
    "beanstalkd": System(brokers.beanstalkd, peer("beanstalkd")),
    "jetstream": System(brokers.jetstream, peer("jetstream")),
    "postgresql": System(brokers.postgresql, peer("postgresql")),
}


class Failed(Exception):
    """A run came to nothing; the text says why."""


def drive(system: System, broker: brokers.Broker, mode: str, seconds: float, rate: float, bundle: str | None) -> Any:
    """One run against a server that is up."""
    command = system.command(broker.url, mode, seconds, rate, bundle)
    before = brokers.cpu_seconds(broker.pid) if broker.pid else 0.0
    try:
        with brokers.pinned(brokers.cores()[1]):
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + LIMIT, check=False)
    except subprocess.TimeoutExpired:
        raise Failed(f"failed: no end after {seconds + LIMIT:.0f} s") from None
    if done.returncode:
        raise Failed("failed: " + done.stderr.strip()[-2000:])
    result = json.loads(done.stdout.splitlines()[-1])
    count = max(1, result["lifecycles"])
    # Warming up is in it: a tenth of the run, whose lifecycles are not.
    share = seconds / (seconds + 0.5) * 1e6 / count
    result["load_cpu_us_each"] = result.pop("cpu_seconds") * share
    if broker.pid:
        result["server_cpu_us_each"] = (brokers.cpu_seconds(broker.pid) - before) * share
    return result


def idle(system: System, broker: brokers.Broker, seconds: float, bundle: str | None) -> dict[str, Any]:
    """What a server costs while a thousand wait."""
    memory = brokers.memory_mb(broker.pid) if broker.pid else 0.0
    command = system.command(broker.url, "idle", seconds + LIMIT, 1.0, bundle)
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with brokers.pinned(brokers.cores()[1]):
        process = subprocess.Popen(command, text=True, **pipes)
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        result: dict[str, Any] = {}
        if ready and broker.pid:
            begun, cpu = time.perf_counter(), brokers.cpu_seconds(broker.pid)
            time.sleep(seconds)
            cpu = brokers.cpu_seconds(broker.pid) - cpu
            result["server_cpu_percent"] = cpu / (time.perf_counter() - begun) * 100
            result["server_memory_mb"] = brokers.memory_mb(broker.pid)
            result["server_memory_mb_before"] = memory
        output, said = process.communicate("\n", timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise Failed("failed: the subscribers did not end") from None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode:
        raise Failed("failed: " + said.strip()[-2000:])
    return {**result, **json.loads(output.splitlines()[-1])}


@dataclass(frozen=True)
class Plan:
    """How often and how long."""

    runs: int
    seconds: float
    idle_seconds: float
    bundle: str | None


def measure(system: System, mode: str, plan: Plan, rate: float) -> dict[str, Any]:
    """The run in the middle, and the figure of all. A server of its own for each run."""
    if mode == "idle":
        with system.server(brokers.cores()[0]) as broker:
            return {**idle(system, broker, plan.idle_seconds, plan.bundle), "version": broker.version}
    results = []
    for _ in range(plan.runs):
        with system.server(brokers.cores()[0]) as broker:
            results.append({**drive(system, broker, mode, plan.seconds, rate, plan.bundle), "version": broker.version})
    key = (lambda one: one["lifecycle"]["p50_ms"]) if mode == "latency" else (lambda one: one["per_second"])
    results.sort(key=key)
    return {**results[len(results) // 2], "runs": [key(one) for one in results]}


def running(url: str, pid: int) -> Callable[[int | None], contextlib.AbstractContextManager[brokers.Broker]]:
    """A server that somebody else started."""
    return lambda core: contextlib.nullcontext(brokers.Broker(url, pid, "a running server"))


def note(*words: object) -> None:
    """Say on stderr what is going on."""
    print(*words, "…", file=sys.stderr, flush=True)


def take(systems: dict[str, System], plan: Plan, only: list[str] | None) -> dict[str, Any]:
    """All figures."""
    figures: dict[str, Any] = {}
    for mode, title in FIGURES.items():
        if only and mode not in only and not (mode == "single" and "latency" in only):
            continue
        figures[title] = {}
        for name, system in systems.items():
            if mode not in system.modes:
                continue
            rate = 0.0
            if mode == "latency":
                found = figures["single"][name]
                if isinstance(found, str):
                    figures[title][name] = found
                    continue
                rate = max(1.0, found["per_second"] / 2)
            note(title, name)
            try:
                figures[title][name] = measure(system, mode, plan, rate)
            except (brokers.NotInstalled, Failed) as why:
                figures[title][name] = str(why)
            except RuntimeError as error:  # a server did not start
                figures[title][name] = f"failed: {error}"
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short run of each: to see that it works")
    parser.add_argument("--runs", type=int, default=3, help="runs of each figure")
    parser.add_argument("--seconds", type=float, default=8.0, help="seconds of a run")
    parser.add_argument("--only", nargs="*", choices=list(FIGURES), help="figures to take, where not all")
    parser.add_argument("--systems", nargs="*", choices=list(SYSTEMS), help="systems to measure, where not all")
    parser.add_argument("--endpoint", help="measure a running server of lockd's protocol instead")
    parser.add_argument("--protocol", choices=["lockd", "native"], default="lockd", help="of that server")
    parser.add_argument("--bundle", help="PEM with authority, certificate and key, for its https")
    parser.add_argument("--pid", type=int, default=0, help="its process, if it is on this machine, for CPU and memory")
    options = parser.parse_args()
    plan = Plan(options.runs, options.seconds, IDLE_SECONDS, options.bundle)
    if options.quick:
        plan = Plan(1, 2.0, 5.0, options.bundle)
    systems = {name: each for name, each in SYSTEMS.items() if not options.systems or name in options.systems}
    if options.endpoint:
        like = SYSTEMS[f"millpond_{options.protocol}"]
        systems = {"endpoint": System(running(options.endpoint, options.pid), like.load, like.protocol, like.modes)}
    server, load = brokers.cores()
    result: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()},
        "millpond": millpond.__version__,
        "core_of_the_server": server,
        "core_of_the_load": load,
        "load_average_before": os.getloadavg(),
        **take(systems, plan, options.only),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
