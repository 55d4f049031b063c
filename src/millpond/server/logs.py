"""The server's log: text for people at a terminal, JSON lines elsewhere.

Handlers are put on the loggers ``millpond`` and ``uvicorn`` alone, for as long as the server runs; the root logger is
not touched. Each line of a request carries its correlation id.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal, Protocol, TextIO

import msgspec


class HasCorrelation(Protocol):
    """A request, as far as the log is concerned."""

    @property
    def correlation_id(self) -> str:
        """Its correlation id."""


current: ContextVar[HasCorrelation | None] = ContextVar("millpond_request", default=None)
"""The request that is being answered. Not its correlation id: that is made when somebody wants to know it."""

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
LOGGERS = ("millpond", "uvicorn.error")

_USUAL = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = {name: value for name, value in vars(record).items() if name not in _USUAL}
    if "correlation_id" not in fields and (request := current.get()) is not None:
        fields["correlation_id"] = request.correlation_id
    return fields


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JsonLines(logging.Formatter):
    """One JSON object a line: ``at``, ``level``, ``logger``, ``event``, and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "at": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        # A field never takes the place of one of these.
        entry |= {f"{name}_" if name in entry else name: value for name, value in _fields(record).items()}
        if record.exc_info and record.exc_info[0] is not None:
            entry["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return msgspec.json.encode(entry, enc_hook=str).decode()


class Text(logging.Formatter):
    """A line for people; what a client sent cannot begin another one, or move their cursor."""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={_plain(value)}" for name, value in _fields(record).items() if value != "")
        line = f"{_time(record)} {record.levelname:<7} {_plain(record.getMessage())} {fields}".rstrip()
        if record.exc_info and record.exc_info[0] is not None:
            line += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
        return line


def _plain(value: Any) -> str:
    text = str(value)
    return text if text.isprintable() else repr(text)


log = logging.getLogger("millpond.access")


def access(client: str, identity: str, method: str, route: str, status: int, seconds: float) -> None:
    """A line for a request that is over. Neither its query nor its headers: those hold what is not for logs."""
    log.info(
        "millpond.server.request",
        extra={
            "client": client,
            "identity": identity,
            "method": method,
            "route": route,
            "status": status,
            "seconds": round(seconds, 6),
        },
    )


@contextlib.contextmanager
def logging_to(
    stream: TextIO | None = None, *, form: Literal["auto", "text", "json"] = "auto", level: str = "info"
) -> Iterator[None]:
    """Log to ``stream`` (stderr) while the block runs. What the program had configured is as before afterwards."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    as_text = form == "text" or (form == "auto" and stream.isatty())
    handler.setFormatter(Text() if as_text else JsonLines())
    before: list[tuple[logging.Logger, int, bool]] = []
    for name in LOGGERS:
        logger = logging.getLogger(name)
        before.append((logger, logger.level, logger.propagate))
        logger.setLevel(LEVELS[level] if name == "millpond" else max(LEVELS[level], logging.WARNING))
        logger.propagate = False  # else a handler on the root logger would write each line again
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, old_level, propagate in before:
            logger.removeHandler(handler)
            logger.setLevel(old_level)
            logger.propagate = propagate
        handler.close()
