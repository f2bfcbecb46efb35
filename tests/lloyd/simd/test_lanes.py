"""Primitives on lanes against numpy: edges of a matrix, ties, and levels that have crossed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mq_quant.lloyd.codes.feedback import product, residual
from mq_quant.lloyd.simd.lanes import gather, hadamard, lined_up, midpoints, scatter, sort_lanes, sort_levels
from rotation import matrix

RANDOM = np.random.default_rng(21)


def block(rows: int = 256) -> np.ndarray:
    return RANDOM.standard_normal((rows, 16)).astype(np.float32)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 40])
def test_gather_and_scatter_stay_inside_the_matrix(count: int) -> None:
    rows = RANDOM.standard_normal((count, 512)).astype(np.float32)
    codes = np.full((count, 256), 99, np.uint8)
    for first in range(0, count, 16):
        lanes = np.full((256, 16), np.nan, np.float32)
        gather(rows, first, 256, lanes)
        live = min(16, count - first)
        np.testing.assert_array_equal(lanes[:, :live], rows[first : first + live, 256:].T)
        assert not lanes[:, live:].any()
        whole = np.float32(RANDOM.integers(0, 64, (256, 16)))
        scatter(whole, codes, first)
        np.testing.assert_array_equal(codes[first : first + live], whole[:, :live].T)
    assert codes.max() < 64


def test_hadamard_is_the_matrix() -> None:
    x = block()
    y = x.copy()
    hadamard(y)
    h = np.sign(matrix()) * np.sign(matrix()[:1] * matrix()[:, :1]) * np.sign(matrix()[0, 0])
    np.testing.assert_allclose(y, h @ x.astype(np.float64), atol=1e-3)
    hadamard(y)
    np.testing.assert_allclose(y / 256, x, atol=1e-5)


def test_midpoints_are_halfway() -> None:
    levels = np.sort(block(8), axis=0)
    mids = np.empty((7, 16), np.float32)
    midpoints(levels, mids)
    np.testing.assert_array_equal(mids, np.float32(0.5) * (levels[:-1] + levels[1:]))


@pytest.mark.parametrize("count", [0, 1, 48, 256])
def test_product_subtracts_eight_rows_of_a_matrix_product(count: int) -> None:
    out, errors = block(), block()
    factors = RANDOM.standard_normal((256, 256)).astype(np.float32)
    want = out.astype(np.float64)
    want[8:16] -= factors[100:108, :count].astype(np.float64) @ errors[:count].astype(np.float64)
    errors[count:] = np.nan
    product(out, 8, factors, 100, errors, count)
    np.testing.assert_allclose(out, want, atol=1e-4)


def test_rows_of_a_lined_up_copy_begin_at_cache_lines_and_end_in_an_empty_one() -> None:
    for rows in (1, 3, 256):
        matrix = block(rows)
        copy = lined_up(matrix)
        assert copy.ctypes.data % 64 == 0 and copy.strides == (128, 4) and not np.shares_memory(copy, matrix)
        np.testing.assert_array_equal(copy[:, :16], matrix)
        assert not copy[:, 16:].any()


@pytest.mark.parametrize("count", [2, 4, 16, 64])
def test_residual_is_what_decoding_loses(count: int) -> None:
    y, levels, errors = block(), block(count), block()
    codes = np.float32(RANDOM.integers(0, count, (256, 16)))
    residual(y, levels, codes, errors)
    np.testing.assert_array_equal(errors, y - np.take_along_axis(levels, codes.astype(int), axis=0))


@pytest.mark.parametrize("count", [4, 8, 16])
def test_sorting_levels_moves_codes_along(count: int) -> None:
    levels = np.float32(RANDOM.integers(-3, 4, (count, 16)))
    levels[:, 3] = np.arange(count)
    codes = np.float32(RANDOM.integers(0, count, (256, 16)))
    before, codes_before = levels.copy(), codes.copy()
    sort_levels(levels, codes)
    np.testing.assert_array_equal(levels, np.sort(before, axis=0))
    np.testing.assert_array_equal(
        np.take_along_axis(levels, codes.astype(int), 0),
        np.take_along_axis(before, codes_before.astype(int), 0),
    )
    np.testing.assert_array_equal(codes[:, 3], codes_before[:, 3])


@given(
    hnp.arrays(
        np.float32, (256, 16), elements=st.floats(width=32, allow_nan=False), fill=st.floats(-1, 1, width=32)
    )
)
def test_every_lane_is_sorted(values: np.ndarray) -> None:
    want = np.sort(values, axis=0)
    sort_lanes(values)
    np.testing.assert_array_equal(values, want)


def test_any_number_of_ones_among_zeros_is_sorted() -> None:
    """A network that sorts every sequence of zeros and ones sorts everything; here is one of each number of ones."""
    random = np.random.default_rng(0)
    for first in range(0, 256, 16):
        ones = np.arange(256)[:, None] < first + np.arange(16)
        block = random.permuted(ones, axis=0).astype(np.float32)
        sort_lanes(block)
        np.testing.assert_array_equal(block, ones[::-1])
