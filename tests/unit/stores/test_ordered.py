from __future__ import annotations

from bisect import bisect_left, bisect_right

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.stores import ordered
from millpond.stores.ordered import SortedSet


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 60))), st.integers(-1, 61))
def test_behaves_like_a_sorted_list(steps: list[tuple[bool, int]], bound: int) -> None:
    block, ordered._BLOCK = ordered._BLOCK, 3
    try:
        values: SortedSet[int] = SortedSet()
        model: list[int] = []
        for add, value in steps:
            if add and value not in model:
                values.add(value)
                model.append(value)
            elif not add and value in model:
                values.remove(value)
                model.remove(value)
        model.sort()
        assert list(values) == model
        assert len(values) == len(model)
        assert values.first == (model[0] if model else None)
        assert [value in values for value in range(61)] == [value in model for value in range(61)]
        assert values.below(bound) == bisect_left(model, bound)
        assert list(values.since(bound)) == model[bisect_left(model, bound) :]
        assert list(values.after(bound)) == model[bisect_right(model, bound) :]
    finally:
        ordered._BLOCK = block


def test_splits_and_shrinks_blocks() -> None:
    values: SortedSet[int] = SortedSet()
    for value in range(5000):
        values.add(value * 7919 % 5000)
    assert list(values) == list(range(5000))
    assert values.below(2500) == 2500
    for value in range(4999):
        values.remove(value)
    assert list(values) == [4999]
    assert len(values._blocks) == 1


@pytest.mark.parametrize("missing", [0, 2, 9])
def test_removing_what_is_not_there(missing: int) -> None:
    values: SortedSet[int] = SortedSet()
    with pytest.raises(KeyError):
        values.remove(missing)
    values.add(1)
    values.add(3)
    with pytest.raises(KeyError):
        values.remove(missing)
    assert list(values) == [1, 3]
