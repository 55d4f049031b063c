"""What all tests share."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Generator
from typing import Any

import pytest
from hypothesis import settings
from tests.servers.corner import ALL
from tests.servers.fixtures import azurite, google, make_corner, seaweed  # noqa: F401 - fixtures
from tests.servers.process import Server

# No deadline per example: an fsync on a busy machine is not a bug. A failure prints what reproduces it.
settings.register_profile("millpond", deadline=None, print_blob=True)
settings.load_profile("millpond")

HANG = 300.0 if ALL else 60.0
"""Real seconds after which a coroutine test has hung. Nothing waits for it; it only ends what never would. Ten thousand
requests to the slowest of the servers that play clouds take a minute and more."""


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run coroutine tests, each on an event loop of its own, which must end with nothing left running on it."""
    test = pyfuncitem.obj
    if not inspect.iscoroutinefunction(test):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    asyncio.run(_alone(test, arguments))
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """A failure shows the logs of the servers that its test used."""
    report = yield
    if report.failed:
        for server in getattr(item, "funcargs", {}).values():
            if isinstance(server, Server):
                report.sections.append((f"Log of {server.name}", server.tail()))
    return report


async def _alone(test: Callable[..., Any], arguments: dict[str, Any]) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    async with asyncio.timeout(HANG):
        await test(**arguments)
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task() and not task.done()]
    assert not left, f"tasks left running: {left}"
    assert not complaints, f"the event loop complained: {complaints}"
