"""Durations on the command line, as `millpond.model.durations` reads and writes them."""

from __future__ import annotations

from typing import Any

import click

from millpond.model.durations import format_duration, parse_duration

__all__ = ["Duration", "format_duration", "parse_duration"]


class Duration(click.ParamType[Any]):
    """A click type: seconds as float. ``positive`` refuses 0; ``word`` is one word that stands for None."""

    name = "duration"

    def __init__(self, *, positive: bool = False, word: str | None = None) -> None:
        self.positive = positive
        self.word = word

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, int | float):
            return float(value)
        if self.word is not None and value == self.word:
            return value
        try:
            seconds = parse_duration(value)
        except ValueError as error:
            self.fail(str(error) + (f", or {self.word}" if self.word else ""), param, ctx)
        if self.positive and seconds <= 0:
            self.fail("must be more than 0", param, ctx)
        return seconds
