"""What a command prints: JSON lines, tables on a terminal, aligned text elsewhere.

Results go to stdout, everything else to stderr. JSON and payloads are written as UTF-8 bytes whatever the locale says.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any


def is_terminal(stream: IO[Any] | None) -> bool:
    """A person watches this stream: a terminal that understands control sequences."""
    if stream is None or os.environ.get("TERM") == "dumb":
        return False
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


def to_json(record: Mapping[str, Any]) -> bytes:
    """One line of JSON, keys in the order given."""

    def dump(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_plain, allow_nan=False)

    try:
        text = dump(record)
    except (TypeError, ValueError):  # what a program may put into attributes and errors, and JSON has no word for
        text = dump(_representable(record))
    return text.encode("utf-8", "surrogateescape") + b"\n"


def _representable(value: Any) -> Any:
    """The same with text in place of NaN, infinity, and keys that are no text."""
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(_plain(key)): _representable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_representable(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).decode("utf-8", "backslashreplace")
    return str(value)


class Output:
    """Where a command's results and notes go."""

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet

    def raw(self, data: bytes) -> None:
        """Bytes to stdout as they are."""
        sys.stdout.flush()
        stream = sys.stdout.buffer
        stream.write(data)

    def flush(self) -> None:
        """Hand over to whoever reads stdout. Raises BrokenPipeError when nobody does any more."""
        sys.stdout.flush()

    def record(self, fields: Mapping[str, Any]) -> None:
        """One JSON object, one line."""
        self.raw(to_json(fields))

    def line(self, text: str = "") -> None:
        """A line of text to stdout."""
        self.raw(text.encode("utf-8", "replace") + b"\n")

    def note(self, text: str) -> None:
        """Something worth knowing that is not the result, to stderr; silent with ``--quiet``."""
        if not self.quiet:
            print(f"millpond: {text}", file=sys.stderr, flush=True)

    def rows(self, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A table: drawn on a terminal, aligned text with a heading elsewhere. Numbers stand to the right."""
        table = [["" if cell is None else cell for cell in row] for row in rows]
        right = [bool(table) and all(isinstance(row[at], int | float) for row in table) for at in range(len(columns))]
        cells = [[one_line(str(cell)) for cell in row] for row in table]
        if is_terminal(sys.stdout):
            self._draw(columns, cells, right)
            return
        widths = [max(len(row[at]) for row in [list(columns), *cells]) for at in range(len(columns))]
        for row in [[column.upper() for column in columns], *cells]:
            parts = [
                cell.rjust(width) if to_right else cell.ljust(width)
                for cell, width, to_right in zip(row, widths, right, strict=True)
            ]
            self.line("  ".join(parts).rstrip())

    def _draw(self, columns: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[bool]) -> None:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
        for column, to_right in zip(columns, right, strict=True):
            table.add_column(column, justify="right" if to_right else "left", overflow="fold")
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
        Console(file=sys.stdout).print(table)

    def block(self, fields: Mapping[str, Any]) -> None:
        """One thing in full, a field a line; fields that are None are left out."""
        shown = {name: value for name, value in fields.items() if value is not None and value != {}}
        width = max((len(name) for name in shown), default=0)
        for name, value in shown.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=_plain)
            self.line(f"{name.ljust(width)}  {printable(text, indent=width + 2)}")


def printable(text: str, *, indent: int = 0) -> str:
    """Text that cannot move the cursor or colour the screen: control characters shown as escapes, lines indented."""
    kept = "".join(char if char in "\n\t" or char.isprintable() else repr(char)[1:-1] for char in text.rstrip("\n"))
    return kept.replace("\n", "\n" + " " * indent)


def one_line(text: str, limit: int = 120) -> str:
    """Text for a table's cell: one line, no control characters, cut with an ellipsis."""
    flat = printable(text.replace("\n", " ⏎ "))
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
