"""A sorted set in plain Python, for the memory store.

A list of sorted blocks: insert, remove and rank cost a bisection over the blocks plus a shift within one, so a queue
of a million records is worked off from the front without moving a million pointers each time.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T", bound=Any)

_BLOCK = 512
"""A block splits at twice this: small enough that a shift stays within a few KiB, large enough that a million entries
are about a thousand blocks to bisect."""


class SortedSet(Generic[T]):
    """Distinct comparable values in rising order. Not to be changed while it is iterated."""

    __slots__ = ("_blocks", "_count", "_last")

    def __init__(self) -> None:
        self._blocks: list[list[T]] = []
        self._last: list[T] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        for block in self._blocks:
            yield from block

    def __contains__(self, value: T) -> bool:
        index = bisect_left(self._last, value)
        if index == len(self._last):
            return False
        block = self._blocks[index]
        return bool(block[bisect_left(block, value)] == value)

    @property
    def first(self) -> T | None:
        """The smallest value; None when empty."""
        return self._blocks[0][0] if self._blocks else None

    def add(self, value: T) -> None:
        """Insert a value that is not there yet."""
        self._count += 1
        if not self._blocks:
            self._blocks.append([value])
            self._last.append(value)
            return
        index = min(bisect_left(self._last, value), len(self._blocks) - 1)
        block = self._blocks[index]
        insort(block, value)
        if len(block) > 2 * _BLOCK:
            self._blocks.insert(index, block[:_BLOCK])
            self._last.insert(index, block[_BLOCK - 1])
            del block[:_BLOCK]
            index += 1
        self._last[index] = block[-1]

    def remove(self, value: T) -> None:
        """Take out a value. Raises KeyError when it is not there."""
        index = bisect_left(self._last, value)
        if index == len(self._last):
            raise KeyError(value)
        block = self._blocks[index]
        at = bisect_left(block, value)
        if block[at] != value:
            raise KeyError(value)
        del block[at]
        self._count -= 1
        if block:
            self._last[index] = block[-1]
        else:
            del self._blocks[index], self._last[index]

    def below(self, bound: T) -> int:
        """How many values are < bound."""
        index = bisect_left(self._last, bound)
        count = sum(map(len, self._blocks[:index]))
        return count if index == len(self._blocks) else count + bisect_left(self._blocks[index], bound)

    def since(self, bound: T) -> Iterator[T]:
        """The values ≥ bound, rising."""
        index = bisect_left(self._last, bound)
        if index < len(self._blocks):
            block = self._blocks[index]
            yield from block[bisect_left(block, bound) :]
            for block in self._blocks[index + 1 :]:
                yield from block

    def after(self, bound: T) -> Iterator[T]:
        """The values > bound, rising."""
        index = bisect_right(self._last, bound)
        if index < len(self._blocks):
            block = self._blocks[index]
            yield from block[bisect_right(block, bound) :]
            for block in self._blocks[index + 1 :]:
                yield from block
