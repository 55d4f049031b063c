"""The programs in examples/, run as a reader would run them: real processes, real files, a server on loopback."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import hmac
import importlib.util
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import millpond
from millpond import testing

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BOUND = 60.0


class Desk:
    """A folder to run an example in, and what it takes to run it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir()
        command = programs / "millpond"
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m millpond "$@"\n')
        command.chmod(0o755)
        self.store = f"sqlite:///{folder}/pond.db"
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLPOND_")}
        self.environment |= {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(Path(millpond.__file__).parents[1]),
            "MILLPOND_STORE": self.store,
        }

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=BOUND,
            check=False,
        )

    def python(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, str(EXAMPLES / name), *arguments)

    def start(self, module: str) -> subprocess.Popen[bytes]:
        """`millpond worker` on the example."""
        command = [sys.executable, "-m", "millpond", "worker", module, "--app-dir", str(EXAMPLES)]
        log = (self.folder / f"{module}.log").open("ab")
        with log:
            return subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=log, stderr=log)

    @contextlib.contextmanager
    def worker(self, module: str) -> Iterator[subprocess.Popen[bytes]]:
        """A worker that is stopped at the end, and has to end well."""
        process = self.start(module)
        try:
            yield process
            process.send_signal(signal.SIGTERM)
            code = process.wait(BOUND)
            assert code == 0, (self.folder / f"{module}.log").read_text()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    def until(self, condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + BOUND
        while not condition():
            logs = "\n".join(log.read_text() for log in self.folder.glob("*.log"))
            assert time.monotonic() < end, f"{what} has not come:\n{logs}"
            time.sleep(0.02)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import an example into this process, for a test on memory."""
    monkeypatch.setenv("MILLPOND_STORE", f"sqlite:///{tmp_path}/no-such-folder/never-made.db")
    monkeypatch.setenv("SALES", str(tmp_path / "sales.csv"))
    monkeypatch.setenv("REPORTS", str(tmp_path / "reports"))
    monkeypatch.setenv("TOTALS", str(tmp_path / "totals.db"))

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


# Web hooks


class Receiver:
    """Somebody's server, which answers each path as it was told: statuses in turn, the last one for ever."""

    def __init__(self, **answers: list[int]) -> None:
        self.answers = answers
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                path = self.path.strip("/")
                before = sum(seen[0] == path for seen in receiver.seen)
                receiver.seen.append((path, dict(self.headers), body))
                answers = receiver.answers[path]
                self.send_response(answers[min(before, len(answers) - 1)])
                self.send_header("Retry-After", "0")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                """It is quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Receiver:
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def test_web_hooks(desk: Desk) -> None:
    desk.environment["WEBHOOK_SECRET"] = "between us"
    with Receiver(paid=[429, 429, 200], gone=[410]) as receiver, desk.worker("webhooks"):
        done = desk.python("webhooks.py", f"{receiver.url}/paid", '{"order": 17}')
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.endswith("delivered, status 200\n")
        lost = desk.python("webhooks.py", f"{receiver.url}/gone", "{}")
        assert lost.returncode == 1
        assert "answered 410" in lost.stdout
    paid = [(headers, body) for path, headers, body in receiver.seen if path == "paid"]
    assert len(paid) == 3
    assert {headers["X-Hook-Id"] for headers, _ in paid} == {done.stdout.split()[0]}
    headers, body = paid[-1]
    assert json.loads(body) == {"order": 17}
    assert headers["X-Hook-Signature"] == "sha256=" + hmac.new(b"between us", body, hashlib.sha256).hexdigest()


async def test_a_web_hook_is_tried_for_as_long_as_the_receiver_may_recover(load: Callable[[str], ModuleType]) -> None:
    webhooks = load("webhooks")
    with Receiver(down=[503, 500, 502, 200]) as receiver:
        async with testing.in_memory(webhooks.pond) as pond:
            hook = await webhooks.deliver.send(f"{receiver.url}/down", {"order": 1})
            await pond.work()
            for _ in range(3):
                await pond.advance(6 * 3600)
                await pond.work()
            assert len(receiver.seen) == 4
            assert await hook.result() == 200
            wrong = await webhooks.deliver.send("file:///etc/passwd", {})
            await pond.work()
            with pytest.raises(millpond.TaskFailed, match="no web address"):
                await wrong.result()


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("90", 90),
        (None, 60),
        ("soon", 60),
        ("nan", 60),
        ("-5", 0),
        ("1e9", 86_400),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Wed, 21 Oct 2015 07:28:00", 60),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86_400),
    ],
)
def test_a_receiver_says_when_by_number_or_by_date(
    load: Callable[[str], ModuleType], said: str | None, seconds: float
) -> None:
    assert load("webhooks").wait(said) == seconds


# Thumbnails


def test_thumbnails(desk: Desk) -> None:
    # The left half red, the right half blue, 64 × 32; the small one likewise.
    row = b"\xff\x00\x00" * 32 + b"\x00\x00\xff" * 32
    (desk.folder / "flag.ppm").write_bytes(b"P6\n# a flag\n64 32\n255\n" + row * 32)
    (desk.folder / "cut.ppm").write_bytes(b"P6\n64 32\n255\n" + row)
    (desk.folder / "small").mkdir()
    done = desk.python("thumbnails.py", "small", "8", "flag.ppm", "cut.ppm")
    assert done.stdout == "2 images queued\n", done.stderr
    with desk.worker("thumbnails"), millpond.connect_sync(desk.store) as pond:
        desk.until((desk.folder / "small/flag.ppm").exists, "the thumbnail")
        desk.until(lambda: pond.queue("thumbnails").counts().dead == 1, "the dead letter")
        [dead] = pond.queue("thumbnails").dead_letters.list()
        assert "96 bytes of pixels" not in (dead.dead_reason or "")
        assert "192 bytes of pixels where 64×32 need 6144" in (dead.dead_reason or "")
    small = b"\xff\x00\x00" * 4 + b"\x00\x00\xff" * 4
    assert (desk.folder / "small/flag.ppm").read_bytes() == b"P6\n8 4\n255\n" + small * 4
    assert sorted(file.name for file in (desk.folder / "small").iterdir()) == ["flag.ppm"]


@pytest.mark.parametrize(
    ("size", "width", "result"), [((7, 5), 3, (3, 2)), ((3, 3), 10, (3, 3)), ((5, 1), 2, (2, 1)), ((1, 9), 1, (1, 9))]
)
def test_every_pixel_of_an_image_counts(
    load: Callable[[str], ModuleType], size: tuple[int, int], width: int, result: tuple[int, int]
) -> None:
    across, down = size
    data = b"P6 %d %d 255\n" % size + bytes([90]) * (across * down * 3)
    small = load("thumbnails").resized(data, width)
    assert small == b"P6\n%d %d\n255\n" % result + bytes([90]) * (result[0] * result[1] * 3)


# The nightly report

SALES = """time,sku,amount
2025-06-15T12:00:00+02:00,rye,3.50
2025-06-15T23:30:00+02:00,rye,3.50
2025-06-15T22:30:00+00:00,oat,9.00
2025-06-16T10:00:00+02:00,oat,4.10
"""


async def test_a_report_for_every_night_also_for_those_in_which_nothing_ran(
    load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    (tmp_path / "sales.csv").write_text(SALES)
    module = load("nightly_report")
    clock = testing.ManualClock(round(datetime(2025, 6, 15, 12, tzinfo=UTC).timestamp() * 1000))
    async with testing.in_memory(module.pond, clock=clock) as pond:
        async with pond.working():
            await pond.advance(86_400)
        await pond.advance(3 * 86_400)  # nobody is there for three nights
        async with pond.working():
            await pond.advance(1)
    reports = {file.stem: file.read_text() for file in sorted((tmp_path / "reports").iterdir())}
    assert list(reports) == ["2025-06-15", "2025-06-16", "2025-06-17", "2025-06-18"]
    assert reports["2025-06-15"].split() == ["Sales", "of", "2025-06-15", "rye", "2", "Total", "7.00"]
    assert reports["2025-06-16"].split()[3:] == ["oat", "2", "Total", "13.10"]


def test_the_report_by_real_workers(desk: Desk) -> None:
    """Two of them, and each tick is one report."""
    (desk.folder / "sales.csv").write_text(SALES)
    desk.environment["REPORT_AT"] = "every 1s"
    reports = desk.folder / "reports"
    with desk.worker("nightly_report"), desk.worker("nightly_report"):
        desk.until(lambda: reports.is_dir() and list(reports.glob("[0-9]*.txt")), "the report")
    [report] = reports.glob("[0-9]*.txt")
    assert report.read_text().startswith(f"Sales of {report.stem}\n")


# The pipeline


def test_a_pipeline_loses_and_repeats_nothing_when_a_worker_is_killed(desk: Desk) -> None:
    words = ["rye", "oat", "spelt", "wheat"]
    lines = [f"{words[number % 4]} {words[number % 3]} flour" for number in range(4000)]
    for number in range(3):
        (desk.folder / f"text-{number}.txt").write_text("\n".join(lines))
    assert desk.python("pipeline.py", *(f"text-{number}.txt" for number in range(3))).returncode == 0

    def added() -> int:
        with contextlib.closing(sqlite3.connect(desk.folder / "totals.db")) as database:
            try:
                return int(database.execute("SELECT count(*) FROM part").fetchone()[0])
            except sqlite3.OperationalError:  # the table is not there yet
                return 0

    with millpond.connect_sync(desk.store) as pond:
        # Short leases, so that what the killed worker held is free again soon.
        for name in ("split", "count", "add"):
            pond.queue(name).set_policy(default_visibility=2.0)
        first = desk.start("pipeline")
        try:
            desk.until(lambda: added() > 5, "the first parts")
        finally:
            first.kill()
            first.wait()
        with desk.worker("pipeline"):
            desk.until(lambda: added() == 240, "the last part")
            desk.until(
                lambda: not any(sum(pond.queue(name).counts()[:4]) for name in ("split", "count", "add")), "rest"
            )
    printed = desk.python("pipeline.py").stdout.splitlines()
    expected = Counter(word for line in lines for word in line.split() for _ in range(3))
    assert {line.split()[1]: int(line.split()[0]) for line in printed} == expected
    assert sum(expected.values()) == 36_000


# The shell


def test_compress(desk: Desk) -> None:
    folder = desk.folder / "logs"
    (folder / "old ones").mkdir(parents=True)
    files = {f"day-{number}.log": f"line {number}\n" * 50 for number in range(6)} | {"old ones/it's.log": "x\n"}
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "empty.log").write_text("")
    done = desk.run("sh", str(EXAMPLES / "compress.sh"), str(folder))
    assert (done.returncode, done.stderr) == (0, "")
    assert "empty.log is empty" in done.stdout
    for name, text in files.items():
        assert gzip.decompress((folder / f"{name}.gz").read_bytes()).decode() == text
        assert not (folder / name).exists()
    # Again: nothing is left to do, and the dead letter is not made a second time.
    again = desk.run("sh", str(EXAMPLES / "compress.sh"), str(folder))
    assert (again.returncode, again.stdout.count("empty.log is empty")) == (0, 1)


def test_every_example_has_a_page_that_quotes_it() -> None:
    """One page per program; the Python on it is the program's own."""
    for name, page in PAGES.items():
        text = (ROOT / "docs/guides" / page).read_text()
        source = (EXAMPLES / name).read_text()
        assert f"examples/{name}" in text
        quoted = [block.partition("\n")[2] for block in text.split("```") if block.startswith(("python\n", "sh\n"))]
        own = [block for block in quoted if f"millpond worker {Path(name).stem}" not in block]
        assert any(block.strip() in source for block in own), page
        for block in own:
            if block.startswith(("@", "def ", "class ", "async def ", "find ", "millpond work ")):
                assert block.strip() in source, f"{page} quotes what is not in {name}:\n{block}"


PAGES = {
    "webhooks.py": "webhooks.md",
    "thumbnails.py": "thumbnails.md",
    "nightly_report.py": "nightly-report.md",
    "pipeline.py": "pipeline.md",
    "compress.sh": "shell-work.md",
}
