"""The live view of ``top``: what it draws, and what its keys do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import termios
import tty
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from millpond.cli import snapshot
from millpond.cli.durations import format_duration
from millpond.cli.output import one_line
from millpond.cli.snapshot import Details, QueueSnapshot, Snapshot
from millpond.errors import MillpondError

if TYPE_CHECKING:
    from millpond.pond import Pond

KEYS = {
    b"\x1b[A": "up",
    b"\x1bOA": "up",
    b"k": "up",
    b"\x1b[B": "down",
    b"\x1bOB": "down",
    b"j": "down",
    b"p": "pause",
    b"r": "redrive",
    b"y": "yes",
    b"i": "internal",
    b"q": "quit",
    b"\x03": "quit",
    b"\x04": "quit",
}
HELP = "↑↓ choose   p pause/resume   r redrive dead letters   i internal queues   q quit"


def keys_in(data: bytes) -> list[str]:
    """What was pressed; several keys may come in one read."""
    found = []
    while data:
        for sequence, name in KEYS.items():
            if data.startswith(sequence):
                found.append(name)
                data = data[len(sequence) :]
                break
        else:
            found.append("other")
            # Of a sequence that is not known nothing is taken for a key.
            data = b"" if data.startswith(b"\x1b") else data[1:]
    return found


@contextlib.contextmanager
def unbuffered(descriptor: int) -> Iterator[None]:
    """The terminal gives each key at once and shows none; afterwards it is as it was."""
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


class View:
    """What is shown, and which queue is chosen. Draws; reads nothing."""

    def __init__(self) -> None:
        self.snapshot = Snapshot(at=0, queues=())
        self.details = Details()
        self.chosen = 0
        self.said = ""
        """The last line, in place of the keys."""
        self.asking: QueueSnapshot | None = None
        """The queue whose dead letters are to be redriven, if the answer is yes."""

    @property
    def current(self) -> QueueSnapshot | None:
        """The chosen queue."""
        queues = self.snapshot.queues
        return queues[min(self.chosen, len(queues) - 1)] if queues else None

    def show(self, found: Snapshot, details: Details) -> None:
        """Newly read."""
        current = self.current
        self.snapshot, self.details = found, details
        for at, one in enumerate(found.queues):
            if current is not None and (one.namespace, one.queue) == (current.namespace, current.queue):
                self.chosen = at  # the same queue, wherever it stands now

    def move(self, by: int) -> None:
        """Choose the next queue, or the one before."""
        self.chosen = max(0, min(self.chosen + by, len(self.snapshot.queues) - 1))

    def draw(self, height: int) -> RenderableType:
        """Everything, in ``height`` lines."""
        below = max(6, height // 3)
        return Group(self._queues(max(3, height - below - 4)), *self._more(below), Text(self.said or HELP, style="dim"))

    def _queues(self, room: int) -> Table:
        table = Table(box=None, header_style="bold", pad_edge=False, expand=True)
        table.add_column("queue", overflow="ellipsis", no_wrap=True, ratio=1)
        counted = any(one.counts.enqueued is not None for one in self.snapshot.queues)
        rates = ("in/s", "out/s") if counted else ("±/s",)
        for name in ("ready", *rates, "delayed", "leased", "blocked", "dead", "oldest", "state"):
            table.add_column(name, justify="right", no_wrap=True)
        queues = self.snapshot.queues
        first = max(0, min(self.chosen - room // 2, len(queues) - room))
        for at, one in enumerate(queues[first : first + room], first):
            counts = one.counts
            name = one.queue if one.namespace == "default" else f"{one.namespace}/{one.queue}"
            table.add_row(
                one_line(name),
                str(counts.ready),
                *((_rate(one.enqueued_rate), _rate(one.done_rate)) if counted else (_signed(one.change),)),
                *(str(counts.delayed), str(counts.leased), str(counts.blocked)),
                Text(str(counts.dead), style="red" if counts.dead else ""),
                "" if counts.oldest_age is None else format_duration(round(counts.oldest_age)),
                {True: "paused", False: "", None: "policy unreadable"}[one.paused],
                style="reverse" if at == self.chosen else "",
            )
        left = len(queues) - room
        if left > 0 or self.snapshot.left_out:
            table.caption = f"{max(left, 0) + self.snapshot.left_out} more"
        return table

    def _more(self, room: int) -> Iterator[RenderableType]:
        details = self.details
        table = Table(box=None, pad_edge=False, expand=True, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(overflow="ellipsis", no_wrap=True, ratio=1)
        rows: list[tuple[str, int, str]] = [
            ("held by", number, f"{who}, first lease ends in {format_duration(max(0, round(ends)))}")
            for who, number, ends in details.owners
        ]
        rows += [("error", number, error) for error, number in details.errors]
        rows += [("dead", number, reason) for reason, number in details.dead]
        for what, number, text in rows[:room]:
            table.add_row(what, str(number), one_line(text), style="red" if what == "dead" else "")
        current = self.current
        if current is not None:
            note = f" (of the oldest {snapshot.MESSAGES})" if details.partial else ""
            yield Text(f"\n{current.queue}{note}", style="bold")
            yield table


def _signed(change: float | None) -> str:
    return "" if change is None or round(change, 1) == 0 else f"{change:+.1f}"


def _rate(rate: float | None) -> str:
    if rate is None or round(rate, 1) == 0:
        return ""
    return f"{rate:.1f}" if rate < 100 else f"{rate:,.0f}"


class Screen:
    """Draws, reads again, and does what keys say, until one ends it."""

    def __init__(
        self, pond: Pond, names: Callable[[], Awaitable[list[tuple[str, str]]]], interval: float, *, internal: bool
    ) -> None:
        self.view = View()
        self._pond = pond
        self._names = names
        self._interval = interval
        self._internal = internal
        self._stirred = asyncio.Event()
        self._pressed: list[str] = []

    async def run(self) -> None:
        """Until a key ends it."""
        console = Console(file=sys.stdout)
        descriptor = sys.stdin.fileno()
        loop = asyncio.get_running_loop()
        with unbuffered(descriptor), Live(console=console, screen=True, auto_refresh=False) as live:
            loop.add_reader(descriptor, self._read, descriptor)
            try:
                await self._look()
                live.update(self.view.draw(console.height), refresh=True)
                while await self._wait():
                    live.update(self.view.draw(console.height), refresh=True)
            finally:
                loop.remove_reader(descriptor)

    def _read(self, descriptor: int) -> None:
        data = os.read(descriptor, 1024)
        self._pressed += keys_in(data) if data else ["quit"]
        self._stirred.set()

    async def _wait(self) -> bool:
        """Until there is something new to show; False when a key ends it."""
        if not self._pressed:
            timer = self._pond.clock.call_later(self._interval, self._stirred.set)
            self._stirred.clear()
            try:
                await self._stirred.wait()
            finally:
                timer.cancel()
        pressed, self._pressed = self._pressed, []
        for key in pressed:
            if key == "quit":
                return False
            await self.press(key)
        await self._look()
        return True

    async def _look(self) -> None:
        """Read again. What the store cannot tell now is said, and what was read last stays on the screen."""
        view = self.view
        try:
            found = await snapshot.take(
                self._pond,
                await self._names(),
                internal=self._internal,
                before=view.snapshot if view.snapshot.at else None,
            )
            view.show(found, view.details)
            current = view.current
            view.show(found, Details() if current is None else await snapshot.details(self._pond, current))
        except MillpondError as error:
            view.said = f"{error} [{error.code}]"

    async def press(self, key: str) -> None:
        """Do what a key says."""
        view = self.view
        asking, view.asking, view.said = view.asking, None, ""
        if key == "up":
            view.move(-1)
        elif key == "down":
            view.move(1)
        elif key == "internal":
            self._internal = not self._internal
        elif (current := view.current) is None:
            return
        elif key == "redrive":
            if current.counts.dead:
                view.asking = current
                view.said = f"Redrive all {current.counts.dead} dead letters of {current.queue}? y redrives them"
            else:
                view.said = f"{current.queue} has no dead letters"
        else:
            try:
                if key == "pause":
                    await self._pause(current)
                elif key == "yes" and asking is not None:
                    queue = self._pond.queue(asking.queue, namespace=asking.namespace)
                    view.said = f"{await queue.dead_letters.redrive()} redriven into {asking.queue}"
            except MillpondError as error:
                view.said = f"{error} [{error.code}]"

    async def _pause(self, current: QueueSnapshot) -> None:
        queue = self._pond.queue(current.queue, namespace=current.namespace)
        # By what it is now, not by what the screen still shows.
        if (await queue.policy()).paused:
            await queue.resume()
            self.view.said = f"{current.queue} hands out again"
        else:
            await queue.pause()
            self.view.said = f"{current.queue} is paused"
