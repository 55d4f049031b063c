"""Figures of Millpond in a bucket, and of four peers, in one run on this machine. Prints JSON.

    python benchmarks/bucket.py [--quick] [--runs N] [--seconds S] [--only NAME …] [--systems NAME …]

The bucket is SeaweedFS on loopback, whose processes share this machine's cores with everything else; each figure has a
new one. 1 KiB messages. ``loopback`` is without a network; ``30 ms`` goes through `bucket_proxy.py`, which has each
request wait for 30 ms, and counts. Throughput is the median of several runs (all are in ``runs``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # The tests know how to start the server.

from bucket_peers import PEERS, REGION, missing  # noqa: E402
from tests.servers.seaweed import ENVIRONMENT, seaweed_server  # noqa: E402

import millpond  # noqa: E402

CALLERS = (1, 64, 512)
DELAY = 30
LIMIT = 120.0
"""Seconds beyond its time that a run may take."""


def environment() -> dict[str, str]:
    """What the clients of the server are told, each by the variables that it reads."""
    names = {"AWS_DEFAULT_REGION": REGION, "S3_REGION": REGION, "AWS_EC2_METADATA_DISABLED": "true"}
    return {**os.environ, **ENVIRONMENT, **names}


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A process of one of the scripts beside this one."""
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(), **pipes)  # type: ignore[call-overload, no-any-return]


def answer(process: subprocess.Popen[str], seconds: float = 0.0) -> dict[str, Any]:
    """The JSON object that a process ends with."""
    try:
        output, _ = process.communicate("\n", timeout=LIMIT + seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise RuntimeError(f"{process.args} did not end") from None
    if process.returncode:
        raise RuntimeError(f"{process.args} failed with exit code {process.returncode}")
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


@contextlib.contextmanager
def server() -> Iterator[int]:
    """An empty SeaweedFS; its port."""
    with tempfile.TemporaryDirectory(prefix="millpond-bench-") as folder, seaweed_server(Path(folder)) as running:
        yield running.port


class Proxy:
    """`bucket_proxy.py` before a server."""

    def __init__(self, port: int, delay: int) -> None:
        self._process = start("bucket_proxy.py", port, delay)
        self.port = int(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def counts(self) -> dict[str, int]:
        """Requests by kind, since this was asked before."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        result: dict[str, int] = json.loads(self._line())
        return result

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


@contextlib.contextmanager
def proxy(port: int, delay: int) -> Iterator[Proxy]:
    """A proxy for the block."""
    one = Proxy(port, delay)
    try:
        yield one
    finally:
        one.close()


def url(port: int, prefix: str) -> str:
    """Millpond's store on a server or proxy."""
    return f"s3://millpond-test/{prefix}?endpoint=http://127.0.0.1:{port}"


def run_once(system: str, port: int, callers: int, seconds: float, number: int, before: Proxy | None) -> dict[str, Any]:
    """One run of Millpond or a peer, in a prefix or bucket of its own, and what the server was asked for it."""
    through = before.port if before else port
    if system == "millpond":
        process = start("bucket_worker.py", "lifecycles", url(through, f"run-{number}"), callers, seconds)
        assert process.stdout is not None
        process.stdout.readline()
        if before:
            before.counts()  # Of the opening, which is the same for any number of messages.
    else:
        bucket = f"bench-{number}"
        make_bucket(port, bucket, versions=system == "buquet")
        process = start("bucket_peers.py", system, f"http://127.0.0.1:{through}", bucket, callers, seconds)
    result = answer(process, seconds)
    # Peers are cut short when the time is up, and what they had begun is not counted as finished.
    finished = result.get("finished", result["lifecycles"])
    if before and finished:
        result["server_requests_each"] = sum(before.counts().values()) / finished
    return result


def make_bucket(port: int, bucket: str, *, versions: bool) -> None:
    """A bucket for a peer; the server makes one for each, out of room for a few."""
    import boto3

    credentials = {
        "aws_access_key_id": ENVIRONMENT["AWS_ACCESS_KEY_ID"],
        "aws_secret_access_key": ENVIRONMENT["AWS_SECRET_ACCESS_KEY"],
    }
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name=REGION, **credentials)
    client.create_bucket(Bucket=bucket)
    if versions:
        client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})


def throughput(system: str, callers: int, delay: int, runs: int, seconds: float) -> dict[str, Any]:
    """The run in the middle, with the life cycles per second of all, and what the server was asked for each."""
    results = []
    with server() as port:
        for number in range(runs):
            with proxy(port, delay) if delay else contextlib.nullcontext() as before:
                results.append(run_once(system, port, callers, seconds, number, before))
    results.sort(key=lambda one: one["per_second"])
    middle = dict(results[len(results) // 2])
    return {**middle, "runs": [one["per_second"] for one in results]}


def requests_one_process(callers: int, messages: int) -> dict[str, Any]:
    """Requests per life cycle when one process enqueues and takes, by its own count and by the server's."""
    with server() as port, proxy(port, 0) as before:
        process = start("bucket_worker.py", "requests", url(before.port, "one"), callers, messages)
        assert process.stdout is not None
        process.stdout.readline()
        opening = sum(before.counts().values())
        own = answer(process)
        seen = before.counts()
    return {
        "own_each": own["requests"] / messages,
        "server_each": sum(seen.values()) / messages,
        "own": own["kinds"],
        "server": seen,
        "opening_and_first": opening,
    }


def requests_two_processes(callers: int, messages: int) -> dict[str, Any]:
    """The same when one process enqueues and another one, which waits, takes."""
    with server() as port, proxy(port, 0) as before:
        processes = [
            start("bucket_worker.py", task, url(before.port, "two"), callers, messages)
            for task in ("consume", "produce")
        ]
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        opening = sum(before.counts().values())
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        consumed, produced = map(answer, processes)
        seen = before.counts()
    return {
        "own_each": (consumed["requests"] + produced["requests"]) / messages,
        "server_each": sum(seen.values()) / messages,
        "own": {name: consumed["kinds"][name] + produced["kinds"][name] for name in consumed["kinds"]},
        "server": seen,
        "opening": opening,
    }


COMPETING = 8
SETTLED = 3.0
"""Seconds in which all wait, or have taken what there was."""


def requests_competing(callers: int, messages: int) -> dict[str, Any]:
    """The same when several processes work off what was put in before."""
    each = messages // COMPETING
    with server() as port, proxy(port, 0) as before:
        where = url(before.port, "many")
        producer = start("bucket_worker.py", "produce", where, 64, each * COMPETING)
        assert producer.stdout is not None
        producer.stdout.readline()
        before.counts()
        answer(producer)
        made = before.counts()
        processes = [start("bucket_worker.py", "consume", where, callers, each) for _ in range(COMPETING)]
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        before.counts()
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        for process in processes:
            answer(process)
        seen = before.counts()
    return {
        "server_each": (sum(made.values()) + sum(seen.values())) / (each * COMPETING),
        "processes": COMPETING,
        "server": {kind: made.get(kind, 0) + seen.get(kind, 0) for kind in {**made, **seen}},
    }


PACES = (30, 1000)
"""Messages a second; the second is more than can be put in, one after the other."""


def requests_waiting(rate: int, messages: int) -> dict[str, Any]:
    """The same when several processes wait for what one puts in, and how long each message was on its way."""
    with server() as port, proxy(port, 0) as before:
        where = url(before.port, "wait")
        processes = [start("bucket_worker.py", "wait", where, 1, 0) for _ in range(COMPETING)]
        producer = start("bucket_worker.py", "pace", where, rate, messages)
        for process in (*processes, producer):
            assert process.stdout is not None
            process.stdout.readline()
        time.sleep(SETTLED)
        before.counts()
        answer(producer, messages / rate + messages / 50)
        time.sleep(SETTLED)
        seen = before.counts()
        waits = sorted(wait for process in processes for wait in answer(process)["waits"])
    return {
        "server_each": sum(seen.values()) / messages,
        "processes": COMPETING,
        "server": seen,
        "taken": len(waits),
        "p50_ms": waits[len(waits) // 2] * 1e3 if waits else 0.0,
        "p99_ms": waits[int(len(waits) * 0.99)] * 1e3 if waits else 0.0,
    }


def median_by(runs: int, measure: Callable[[], dict[str, Any]], key: str) -> dict[str, Any]:
    """The run in the middle by ``key``, with that figure of all."""
    results = sorted((measure() for _ in range(runs)), key=lambda one: one[key])
    return {
        **results[len(results) // 2],
        "median": statistics.median(one[key] for one in results),
        "runs": [one[key] for one in results],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short run of each: to see that it works")
    parser.add_argument("--runs", type=int, default=3, help="runs of each figure")
    parser.add_argument("--seconds", type=float, default=8.0, help="seconds of a run")
    parser.add_argument("--only", nargs="*", help="names of figures to take: loopback, 30ms, requests, idle")
    parser.add_argument("--systems", nargs="*", help="Millpond or peers, where not all")
    options = parser.parse_args()
    runs, seconds = (1, 2.0) if options.quick else (options.runs, options.seconds)
    messages = 200 if options.quick else 2000
    result: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()},
        "millpond": millpond.__version__,
    }

    def note(*words: object) -> None:
        print(*words, "…", file=sys.stderr, flush=True)

    wanted = lambda name: not options.only or name in options.only  # noqa: E731
    for name, delay in (("loopback", 0), (f"{DELAY}ms", DELAY)):
        if not wanted(name):
            continue
        figures: dict[str, Any] = {}
        result[f"lifecycles_{name}"] = figures
        for system in ("millpond", *PEERS):
            if options.systems and system not in options.systems:
                continue
            if system in PEERS and (why := missing(system)) is not None:
                figures[system] = why
                continue
            figures[system] = {}
            for callers in CALLERS:
                note(name, system, callers)
                try:
                    figures[system][callers] = throughput(system, callers, delay, runs, seconds)
                except RuntimeError as error:
                    figures[system][callers] = str(error)
    if wanted("requests"):
        result["requests_one_process"], result["requests_two_processes"] = {}, {}
        result["requests_competing"] = {}
        for callers in CALLERS:
            note("requests", callers)
            result["requests_one_process"][callers] = median_by(
                runs, lambda callers=callers: requests_one_process(callers, messages), "server_each"
            )
            result["requests_two_processes"][callers] = median_by(
                runs, lambda callers=callers: requests_two_processes(callers, messages), "server_each"
            )
            if callers < CALLERS[-1]:
                result["requests_competing"][callers] = median_by(
                    runs, lambda callers=callers: requests_competing(callers, max(messages, 1600)), "server_each"
                )
        result["requests_waiting"] = {}
        for rate in PACES:
            note("requests waiting", rate)
            result["requests_waiting"][rate] = median_by(
                runs, lambda rate=rate: requests_waiting(rate, messages), "server_each"
            )
    if wanted("idle"):
        note("idle")
        result["requests_of_an_idle_hour"] = answer(start("bucket_worker.py", "idle"))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
