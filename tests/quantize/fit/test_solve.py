"""The allocation is the minimum: held against all choices; ties go to fewer bytes; what cannot be is refused."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mq_quant.formats.errors import BudgetError
from mq_quant.quantize.fit.solve import Choice, solve

SIZES = (72, 112, 136, 200)
LOSSES = st.lists(st.integers(0, 1000), min_size=4, max_size=4)
"""Whole numbers, whose sums are exact in any order."""


def pieces_of(losses: list[list[int]]) -> list[list[Choice]]:
    """Pieces of which every other one is twice as large."""
    return [
        [
            Choice(f"f{j}", (2 - i % 2) * size, float(loss))
            for j, (size, loss) in enumerate(zip(SIZES, row, strict=True))
        ]
        for i, row in enumerate(losses)
    ]


@settings(max_examples=150, deadline=None)
@given(st.lists(LOSSES, min_size=1, max_size=4), st.floats(0, 1))
def test_it_is_the_least_of_all_choices_and_of_equals_the_smallest(
    losses: list[list[int]], share: float
) -> None:
    pieces = pieces_of(losses)
    smallest, largest = (sum(which(c.nbytes for c in row) for row in pieces) for which in (min, max))
    limit = int(smallest + share * (largest - smallest))
    found = solve(pieces, limit)
    best = min(
        (sum(c.loss for c in some), nbytes)
        for some in itertools.product(*pieces)
        if (nbytes := sum(c.nbytes for c in some)) <= limit
    )
    assert (sum(c.loss for c in found), sum(c.nbytes for c in found)) == best
    assert solve(pieces, limit) == found


def test_a_limit_below_the_smallest_is_refused() -> None:
    pieces = pieces_of([[4, 3, 2, 1], [4, 3, 2, 1]])
    assert [c.name for c in solve(pieces, 216)] == ["f0", "f0"]
    with pytest.raises(BudgetError, match="216 bytes, more than 215"):
        solve(pieces, 215)


def test_more_room_than_the_largest_takes_changes_nothing() -> None:
    pieces = pieces_of([[4, 3, 2, 1], [9, 3, 2, 1]])
    assert solve(pieces, 10**15) == solve(pieces, 600) == (pieces[0][3], pieces[1][3])


def test_equal_choices_are_decided_by_bytes_and_then_by_order() -> None:
    same = [Choice("a", 20, 1.0), Choice("b", 10, 1.0), Choice("c", 10, 1.0)]
    assert [c.name for c in solve([same, same], 100)] == ["b", "b"]


def test_sizes_without_a_common_step_are_refused() -> None:
    odd = [Choice("a", 10**9 + 7, 1.0), Choice("b", 2 * 10**9 + 11, 0.5)]
    with pytest.raises(BudgetError, match="no common step"):
        solve([odd] * 3, 10**10)
