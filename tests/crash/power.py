"""A disk that loses power: an SQLite VFS that remembers which of what was written has also been synced.

`Disk` passes everything on to the ordinary VFS (locks and the shared memory file too) except the syncs, which it only
notes: nothing here depends on a real disk. It numbers the operations that change something. What a power loss after
any of them would have left is then worked out by `Medium`:

- what was synced is there;
- of what was not, nothing is there, or all of it, or a seeded choice of it, sector by sector. That covers writes that
  the disk did in another order, and those that it was in the middle of;
- a name that was created or deleted stays so once its directory was synced. Before, the directory is as it was, or as
  it would be, or between: file systems write names in order, whatever they do with data.

The write that is torn in the middle is the last one of its point; a sync that is cut in the middle has written some of
what it should, so its point is the one before it with a choice of what was not synced. Therefore every "before", "in
the middle of" and "after" is one of the points, with one of the fates.

A disk can also be told to lose power for the process that uses it (`Trouble`): from that operation on every one fails.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
from collections.abc import Callable
from typing import NamedTuple

import apsw

SECTOR = 512
"""Bytes that a disk writes as a whole or not at all."""

_numbers = itertools.count(1)


class Quiet(apsw.Connection):
    """A connection that closes as with a VFS in C: SQLite says nothing of a checkpoint that failed while it closed, for
    the log keeps everything; apsw passes on what a VFS in Python raised."""

    def close(self, force: bool = False) -> None:
        """Close."""
        try:
            super().close(force)
        except apsw.Error:
            return


class Operation(NamedTuple):
    """Something that changed a file or a directory, or made a change last."""

    kind: str
    """create, write, truncate, sync, delete, sync-directory"""
    name: str
    file: int = 0
    """Which file: a name that is deleted and made again is another."""
    offset: int = 0
    data: bytes = b""
    directory: bool = False
    """A sync or delete that includes the directory."""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" + (f" {len(self.data)} bytes at {self.offset}" if self.data else "")


class Trouble(NamedTuple):
    """What happens to the process at operation number ``at`` (from 1)."""

    at: int
    how: str
    """``before``, ``middle``, ``after``: the power fails then. ``error``, ``full``: this one operation fails, once."""


class Disk(apsw.VFS):
    """The VFS. ``trouble`` (None: none) is what will go wrong."""

    def __init__(self, trouble: Trouble | None = None) -> None:
        self.vfs_name = f"power-{next(_numbers)}"
        self.operations: list[Operation] = []
        self.trouble = trouble
        self.met = False
        """The trouble came."""
        self.off = False
        """There is no power any more."""
        self.broken_reads = False
        """Reads fail, as from a disk with a bad sector."""
        self._lock = threading.Lock()
        """The loop, the writer thread and the reader threads all come here: what is done and what is noted must be in
        one order."""
        self._files = itertools.count(1)
        self._present: dict[str, int] = {}
        super().__init__(self.vfs_name, "unix")

    def _fail(self, what: str) -> None:
        raise apsw.IOError(what)

    def power(self) -> None:
        """Raise unless there is power."""
        if self.off:
            self._fail("the power is off")

    def do(self, operation: Operation, act: Callable[[], object]) -> None:
        """Do and note an operation, or let it fail."""
        with self._lock:
            self.power()
            if self.trouble is None or len(self.operations) + 1 != self.trouble.at or self.met:
                act()
                self.operations.append(operation)
                return
            self.met = True
            how = self.trouble.how
            if how == "full":
                raise apsw.FullError("no space left on device")
            if how == "error":
                self._fail("input/output error")
            self.off = True
            if how == "middle" and operation.kind != "sync":
                self.operations.append(operation)
            if how == "after":
                self.operations.append(operation)
                act()
            self._fail("the power fails")

    def sync_directory(self, path: str) -> None:
        """In place of `millpond.stores.sqlite.schema.sync_directory`, which goes to the disk by another way."""
        try:
            self.do(Operation("sync-directory", "", directory=True), lambda: None)
        except apsw.Error as error:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path) from error

    def sync_log(self, path: str) -> None:
        """In place of `millpond.stores.sqlite.schema.sync_log`, likewise."""
        log = os.path.basename(path) + "-wal"
        try:
            self.do(Operation("sync", log, self._present[log]), lambda: None)
        except apsw.Error as error:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path) from error

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:
        """A temporary file (no name) is nobody's concern after a power loss."""
        self.power()
        if name is None:
            return apsw.VFSFile("unix", None, flags)
        path = name if isinstance(name, str) else name.filename()
        short = os.path.basename(path)
        opened = _File(self, short, flags)
        if os.path.exists(path):
            opened.open(name)
        else:
            number = next(self._files)
            self.do(Operation("create", short, number), lambda: opened.open(name))
            self._present[short] = number
        opened.number = self._present[short]
        return opened

    def xDelete(self, path: str, sync: bool) -> None:
        """Delete a name."""
        short = os.path.basename(path)
        self.do(Operation("delete", short, directory=sync), lambda: super(Disk, self).xDelete(path, sync))
        self._present.pop(short, None)


class _File(apsw.VFSFile):
    """A file of the disk."""

    def __init__(self, disk: Disk, short: str, flags: list[int]) -> None:
        self.number = 0
        self._disk = disk
        self._short = short
        # SQLite syncs the directory with the first sync of a log or journal, lest the name be lost (os_unix.c).
        self._sync_directory = bool(
            flags[0] & apsw.SQLITE_OPEN_CREATE and flags[0] & (apsw.SQLITE_OPEN_WAL | apsw.SQLITE_OPEN_MAIN_JOURNAL)
        )
        self._flags = flags

    def open(self, name: str | apsw.URIFilename) -> None:
        """Open it, on the ordinary VFS."""
        super().__init__("unix", name, self._flags)

    def xRead(self, amount: int, offset: int) -> bytes:
        """Read."""
        self._disk.power()
        if self._disk.broken_reads:
            raise apsw.IOError("input/output error")
        return super().xRead(amount, offset)

    def xWrite(self, data: bytes, offset: int) -> None:
        """Write; not durable until the next sync."""
        copy = bytes(data)
        self._disk.do(
            Operation("write", self._short, self.number, offset, copy), lambda: super(_File, self).xWrite(copy, offset)
        )

    def xTruncate(self, size: int) -> None:
        """Cut; not durable until the next sync."""
        self._disk.do(Operation("truncate", self._short, self.number, size), lambda: super(_File, self).xTruncate(size))

    def xSync(self, flags: int) -> None:
        """Note that all before is durable."""
        self._disk.do(Operation("sync", self._short, self.number, directory=self._sync_directory), lambda: None)
        self._sync_directory = False


Fate = random.Random | bool
"""What became of what was not synced: all was lost (False) or kept (True), or chance decided."""


class Medium:
    """What the disk itself holds, as operations come."""

    def __init__(self) -> None:
        self._durable: dict[int, bytearray] = {}
        self._loose: dict[int, list[Operation]] = {}
        """Per file, what came since its last sync."""
        self._names: dict[str, int] = {}
        self._loose_names: list[Operation] = []

    def apply(self, operation: Operation) -> None:
        """The next operation."""
        kind, file = operation.kind, operation.file
        if kind in {"write", "truncate"}:
            self._loose[file].append(operation)
        elif kind == "sync":
            for each in self._loose[file]:
                _change(self._durable[file], each)
            self._loose[file] = []
        elif kind in {"create", "delete"}:
            self._loose_names.append(operation)
            if kind == "create":
                self._durable[file], self._loose[file] = bytearray(), []
        if operation.directory:
            for each in self._loose_names:
                _rename(self._names, each)
            self._loose_names = []

    def after_power_loss(self, fate: Fate) -> dict[str, bytes]:
        """The files, by name, that are found when the power is back."""
        names = dict(self._names)
        last = len(self._loose_names)
        for each in self._loose_names[: _choose(fate, last)]:
            _rename(names, each)
        found: dict[str, bytes] = {}
        for name, file in sorted(names.items()):
            content = bytearray(self._durable[file])
            for each in self._loose[file]:
                if fate is False:
                    continue
                if fate is True:
                    _change(content, each)
                elif each.kind == "truncate":
                    if fate.random() < 0.5:
                        _change(content, each)
                else:
                    _tear(content, each, fate)
            found[name] = bytes(content)
        return found


def _choose(fate: Fate, last: int) -> int:
    if isinstance(fate, bool):
        return last if fate else 0
    return fate.randint(0, last)


def _rename(names: dict[str, int], operation: Operation) -> None:
    if operation.kind == "create":
        names[operation.name] = operation.file
    else:
        names.pop(operation.name, None)


def _change(content: bytearray, operation: Operation) -> None:
    if operation.kind == "truncate":
        del content[operation.offset :]
        return
    if len(content) < operation.offset:
        content.extend(bytes(operation.offset - len(content)))
    content[operation.offset : operation.offset + len(operation.data)] = operation.data


def _tear(content: bytearray, operation: Operation, chance: random.Random) -> None:
    """Write none, all or some sectors."""
    draw = chance.random()
    if draw < 0.3:
        return
    if draw < 0.6:
        _change(content, operation)
        return
    start, end = operation.offset, operation.offset + len(operation.data)
    while start < end:
        stop = min(end, (start // SECTOR + 1) * SECTOR)
        if chance.random() < 0.5:
            part = operation.data[start - operation.offset : stop - operation.offset]
            _change(content, operation._replace(offset=start, data=part))
        start = stop
