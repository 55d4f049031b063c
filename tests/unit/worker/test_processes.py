"""Handlers in processes of their own: results, failures, deaths, cancellation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tests.unit.worker import burning
from tests.unit.worker.conftest import MakeSite, until

import millpond
from millpond import Context, InvalidInput, Middleware, RetryPolicy
from millpond.worker.processes import Child, ProcessDied
from millpond.worker.worker import Worker

STEADY = RetryPolicy(base=10.0, jitter=0.0, give_up_on=(KeyError,))


class Results(Middleware):
    """Keeps what handlers return."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    async def after(self, context: Context, result: Any) -> None:
        self.found.append(result)


def gone(process: int) -> bool:
    """It has ended, and been waited for."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


async def test_one_process_handles_message_after_message_whatever_it_raises(site: MakeSite) -> None:
    results = Results()
    async with site() as s:
        s.pond.consumer("q", run_in="process", concurrency=1, retry=STEADY, middleware=[results])(burning.work)
        cases = ["add", "raise", "picky", "exit", "give up", "retry", "defer", "lock", "add"]
        ids = [(await s.queue.enqueue(millpond.json({"what": case, "number": 4}))).message_id for case in cases]
        unfit = await s.queue.enqueue(millpond.json({"number": 4}))
        worker = s.start()
        await until(lambda: sum(worker.counts().values()) == len(cases) + 1)
        await s.end(worker)
        assert worker.counts() == {"ack": 2, "retry": 5, "dead": 2, "defer": 1, "lost": 0, "answered": 0}
        (first, second) = results.found
        assert first[:2] == second[:2] == (5, 1)
        assert first[2] == second[2] != os.getpid()
        await until(lambda: gone(first[2]))
        views = {case: await s.queue.get(id) for case, id in zip(cases[1:-1], ids[1:-1], strict=True)}
        assert views["raise"].last_error["type"] == "LookupError"
        assert 'raise LookupError(f"no {order.number}")' in views["raise"].last_error["traceback"]
        assert views["picky"].last_error["message"] == "1 and 2"
        assert views["exit"].last_error["type"] == "SystemExit"
        assert "pickle" in views["lock"].last_error["message"]
        assert views["give up"].dead_reason == "hopeless"
        waits = {case: (view.visible_at - view.updated_at).total_seconds() for case, view in views.items()}
        assert (waits["raise"], waits["retry"], waits["defer"], views["defer"].failures) == (10, 44, 33, 0)
        assert "does not fit" in (await s.queue.get(unfit.message_id)).dead_reason


async def test_a_process_that_dies_is_one_failure_of_its_own_message(site: MakeSite) -> None:
    results = Results()
    async with site() as s:
        s.pond.consumer("q", run_in="process", concurrency=1, retry=STEADY, middleware=[results])(burning.work)
        dying = await s.queue.enqueue(millpond.json({"what": "die"}))
        await s.queue.enqueue(millpond.json({"what": "add"}))
        worker = s.start()
        await until(lambda: (worker.counts()["retry"], worker.counts()["ack"]) == (1, 1))
        await s.end(worker)
        view = await s.queue.get(dying.message_id)
        assert (view.failures, view.last_error["message"]) == (1, "the handler's process died (killed by SIGKILL)")


@pytest.mark.parametrize("why", ["time", "stop"])
async def test_to_cancel_is_to_kill(site: MakeSite, tmp_path: Path, why: str) -> None:
    async with site() as s:
        s.pond.consumer("q", run_in="process", time_limit=50.0, retry=STEADY)(burning.work)
        receipt = await s.queue.enqueue(millpond.json({"what": "burn", "marks": str(tmp_path)}), visibility=1000)
        worker = s.start()
        mark = tmp_path / "started"
        await until(lambda: mark.exists() and mark.read_text())
        process = int(mark.read_text())
        if why == "time":
            await s.pass_(51)
            await until(lambda: worker.counts()["retry"] == 1)
        else:
            worker.stop(grace=0)
            await s.pass_(0)
            await s.ended(worker)
            assert worker.counts()["defer"] == 1
        await until(lambda: gone(process))
        view = await s.queue.get(receipt.message_id)
        assert (view.failures, view.state) == ((1, "delayed") if why == "time" else (0, "ready"))
        if why == "time":
            assert view.last_error["type"] == "TimeLimit"
            await s.end(worker)


def test_a_handler_that_no_process_could_import_is_refused(tmp_path: Path) -> None:
    pond = millpond.connect(f"sqlite:///{tmp_path}/pond.db")

    def local(payload: bytes) -> None: ...

    pond.consumer("q", run_in="process")(local)
    with pytest.raises(InvalidInput, match="cannot be imported by a process"):
        Worker(pond)

    def context(payload: bytes, context: Context) -> None: ...

    pond.consumer("q", run_in="process", name="c")(context)
    with pytest.raises(InvalidInput, match="only the payload and Lease"):
        Worker(pond, ["c"])


def test_a_process_whose_worker_is_gone_ends() -> None:
    child = Child("tests.unit.worker.burning", "work", None)
    child._pipe.close()
    child._process.join(30)
    assert child._process.exitcode == 0


def test_a_process_that_cannot_find_its_handler_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    child = Child("tests.unit.worker.burning", "nothing", None)
    with pytest.raises(ProcessDied, match="exit code 1"):
        child.call(b"", None, millpond.Lease("x", 1))
    child.close()
    assert "has no attribute 'nothing'" in capfd.readouterr().err
