"""Questions asked of sixteen lanes at once, each against the same question asked of one after another."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mq_quant.lloyd.simd.vec import LANES, count_gt, first_outside, load, pick
from numba import njit

FEW = st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 1e-45, 0.5, 1.0, np.inf, np.nan])
"""Values that often meet, and all that are special."""
BLOCKS = arrays(np.float32, (3, LANES), elements=FEW.map(np.float32))


@njit
def outside(block, start):
    return first_outside(load(block, 0), load(block, 1), load(block, 2), start)


@njit
def above(block):
    return count_gt(load(block, 0), load(block, 1))


@njit
def lane_of(block, lane):
    return pick(load(block, 1), lane)


@given(BLOCKS, st.integers(0, LANES - 1))
def test_the_first_lane_that_its_bounds_do_not_hold(block: np.ndarray, start: int) -> None:
    value, low, high = block
    held = (low < value) & (value <= high)
    want = next((lane for lane in range(start, LANES) if not held[lane]), LANES)
    assert outside(block, start) == want


def test_no_lane_is_outside_where_bounds_hold() -> None:
    block = np.repeat(np.float32([[1.0], [-np.inf], [1.0]]), LANES, axis=1)
    assert all(outside(block, start) == LANES for start in range(LANES))


@given(BLOCKS)
def test_lanes_that_are_greater_are_counted(block: np.ndarray) -> None:
    assert above(block) == (block[0] > block[1]).sum()


@given(BLOCKS, st.integers(0, LANES - 1))
def test_a_lane_is_picked(block: np.ndarray, lane: int) -> None:
    np.testing.assert_array_equal(np.float32(lane_of(block, lane)), block[1, lane])
