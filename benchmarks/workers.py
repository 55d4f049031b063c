"""No-op jobs per second of one worker process: Millpond and seven others, in one run on this machine. Prints JSON.

    python benchmarks/workers.py [--quick] [--runs N] [--jobs N] [--systems NAME …]

Jobs are enqueued first, then one worker is started; counted is from the tenth of the jobs that is done first to the
last, so that starting is not. All of it is durable: Millpond and Huey on SQLite with fsync, Redis with ``appendfsync
always``, PostgreSQL as it comes. The worker has one core and the broker, where there is one, the other. Each system
is set up as its documentation recommends, in `worker_apps`; where that leaves a choice that matters for speed, the
choices stand side by side. ``cpu_us_each`` is the worker's CPU time for a job, without the broker's.

- *millpond*: `millpond worker`, one process, with a consumer; *millpond_task*: with a task, as the others have it.
- *celery*: prefork with one child process (``-c 1``), prefetching as it comes; *celery_solo*: the pool without a
  child.
- *dramatiq*: one process with eight threads, as it comes.
- *rq*: the worker that forks for each job, as it comes; *rq_simple*: the one that does not.
- *taskiq*: one process, a hundred tasks at a time, as it comes; jobs are acknowledged when they are done.
- *saq*: ten jobs at a time, as it comes.
- *huey*: one thread, as it comes; *huey_threads*: four.
- *procrastinate*: thirty jobs at a time; it does one as it comes."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import brokers
from worker_apps import ticks

import millpond

HERE = Path(__file__).parent
SCRIPTS = Path(sysconfig.get_path("scripts"))
LIMIT = 300.0
"""Seconds for a worker to do all its jobs in."""


@contextlib.contextmanager
def embedded(core: int | None) -> Iterator[brokers.Broker]:
    """No server: a file."""
    with brokers.folder_for("file") as folder:
        yield brokers.Broker(str(folder / "jobs.db"), 0, "")


@dataclass(frozen=True)
class System:
    """How a system is run."""

    app: str
    broker: Callable[[int | None], contextlib.AbstractContextManager[brokers.Broker]]
    worker: tuple[str, ...]
    """The command, its program from where packages put theirs."""
    share: float = 1.0
    """Of the jobs: fewer for who is slow."""
    prefix: str = ""
    """Before the broker's URL."""


MILLPOND = ("millpond", "worker")
CELERY = ("celery", "-A", "worker_apps.celery_app", "worker", "-l", "WARNING", "-c", "1")
LEAN = ("--without-gossip", "--without-mingle", "--without-heartbeat")
SYSTEMS = {
    "millpond": System("millpond_app", embedded, (*MILLPOND, "worker_apps.millpond_app"), 5, "sqlite:///"),
    "millpond_task": System(
        "millpond_task_app", embedded, (*MILLPOND, "worker_apps.millpond_task_app"), 5, "sqlite:///"
    ),
    "celery": System("celery_app", brokers.redis, (*CELERY, *LEAN)),
    "celery_solo": System("celery_app", brokers.redis, (*CELERY, *LEAN, "--pool", "solo")),
    "dramatiq": System("dramatiq_app", brokers.redis, ("dramatiq", "worker_apps.dramatiq_app", "-p", "1")),
    "rq": System("rq_app", brokers.redis, ("rq", "worker", "--quiet"), 0.05),
    "rq_simple": System("rq_app", brokers.redis, ("rq", "worker", "--quiet", "-w", "rq.SimpleWorker"), 0.3),
    "taskiq": System(
        "taskiq_app",
        brokers.redis,
        ("taskiq", "worker", "worker_apps.taskiq_app:broker", "-w", "1", "--ack-type", "when_executed"),
    ),
    "saq": System("saq_app", brokers.redis, ("saq", "worker_apps.saq_app.settings", "--quiet")),
    "huey": System("huey_app", embedded, ("huey_consumer", "worker_apps.huey_app.huey", "-q")),
    "huey_threads": System("huey_app", embedded, ("huey_consumer", "worker_apps.huey_app.huey", "-q", "-w", "4")),
    "procrastinate": System(
        "procrastinate_app",
        brokers.postgresql,
        ("procrastinate", "--app", "worker_apps.procrastinate_app.app", "worker", "--concurrency", "30"),
        0.3,
    ),
}


def run_once(system: System, jobs: int) -> dict[str, Any]:
    """Fill a new queue, have one worker empty it."""
    broker_core, worker_core = brokers.cores()
    with system.broker(broker_core) as broker, brokers.folder_for("ticks") as folder:
        file = folder / "ticks"
        environment = {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")])),
            "BENCH_URL": system.prefix + broker.url,
            "BENCH_TICKS": str(file),
            "RQ_REDIS_URL": broker.url,
        }
        subprocess.run(
            [sys.executable, "-m", "worker_apps.fill", system.app, str(jobs)],
            env={**os.environ, **environment}, check=True, timeout=LIMIT, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        command = [str(SCRIPTS / system.worker[0]), *system.worker[1:]]
        begun = lambda: ticks.count(file) > 0  # noqa: E731
        log = folder / "log"
        with brokers.serving(command, log, begun, core=worker_core, environment=environment) as pid:
            until = time.monotonic() + LIMIT
            while ticks.count(file) < jobs:
                if time.monotonic() > until:
                    said = log.read_text("utf-8", "replace")[-2000:]
                    raise RuntimeError(f"only {ticks.count(file)} of {jobs} jobs were done:\n{said}")
                time.sleep(0.02)
            cpu = brokers.cpu_seconds(pid)
        times = ticks.times(file)
        first = len(times) // 10
        return {
            "per_second": (len(times) - 1 - first) / (times[-1] - times[first]),
            "jobs": jobs,
            "done": len(times),
            "cpu_us_each": cpu / jobs * 1e6,
            "broker": broker.version,
        }


def measure(name: str, jobs: int, runs: int) -> dict[str, Any]:
    """The run in the middle, with the figures of all."""
    system = SYSTEMS[name]
    if not (SCRIPTS / system.worker[0]).exists():
        raise brokers.NotInstalled(f"not measured: {system.worker[0]} is not installed (make bench installs it)")
    results = sorted(
        (run_once(system, max(20, int(jobs * system.share))) for _ in range(runs)), key=lambda one: one["per_second"]
    )
    return {**results[len(results) // 2], "runs": [one["per_second"] for one in results]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one run of few jobs: to see that it works")
    parser.add_argument("--runs", type=int, default=3, help="runs of each")
    parser.add_argument(
        "--jobs", type=int, default=20_000, help="jobs of a run; more for the quick, fewer for the slow"
    )
    parser.add_argument("--systems", nargs="*", choices=list(SYSTEMS), help="where not all")
    options = parser.parse_args()
    runs, jobs = (1, 2000) if options.quick else (options.runs, options.jobs)
    result: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()},
        "millpond": millpond.__version__,
        "jobs_per_second_of_one_worker": {},
    }
    for name in SYSTEMS:
        if options.systems and name not in options.systems:
            continue
        print(name, "…", file=sys.stderr, flush=True)
        figures = result["jobs_per_second_of_one_worker"]
        try:
            figures[name] = measure(name, jobs, runs)
        except brokers.NotInstalled as missing:
            figures[name] = str(missing)
        except (RuntimeError, subprocess.SubprocessError) as error:
            figures[name] = f"failed: {error}"
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
