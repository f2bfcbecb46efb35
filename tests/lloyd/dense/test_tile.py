"""Blocks of rows, and levels in the precision in which the file stores them."""

from __future__ import annotations

import numpy as np
import pytest
from mq_quant.formats.blocks import MQ2_LLOYD, MQ4
from mq_quant.lloyd.dense.tile import gather_params, gather_rows, round_halves, tile_for, to_rows, to_stored
from mq_quant.lloyd.group_fit import as_stored, even_levels, expand


def test_levels_are_rounded_as_f16() -> None:
    """Every exponent, ties, numbers beyond the range, the smallest ones, and zeros of either sign."""
    random = np.random.default_rng(0)
    exact = random.integers(0, 0x7C00, 4096).astype(np.uint16).view(np.float16).astype(np.float32)
    above = np.nextafter(exact.astype(np.float16), np.float16(np.inf)).astype(np.float32)
    ties = np.where(np.isfinite(above), (exact.astype(np.float64) + above) / 2, 65504).astype(np.float32)
    near = [np.nextafter(ties, np.float32(to)) for to in (-np.inf, np.inf)]
    odd = np.float32([0, 2**-24, 2**-25, 2**-26, 1e-30, 1e-45, 65504, 65519, 65520, 1e30, np.inf, 2**-14])
    found = np.concatenate([exact, ties, *near, np.resize(odd, 16)])
    values = np.concatenate([found, -found]).reshape(-1, 16)
    want = as_stored(MQ2_LLOYD, values)
    round_halves(values)
    np.testing.assert_array_equal(values.view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("grid", [False, True])
def test_a_tile_is_stored_as_the_format_stores_it(grid: bool) -> None:
    fmt, random = MQ4 if grid else MQ2_LLOYD, np.random.default_rng(1)
    t = tile_for(fmt.levels, grid)
    t.levels[:] = np.sort(random.standard_normal((fmt.levels, 16)), axis=0)
    rows = np.ascontiguousarray(t.levels.T)
    stored = as_stored(fmt, even_levels(rows) if grid else rows)
    to_stored(grid, t)
    np.testing.assert_array_equal(t.levels.T, expand(fmt, stored))
    if grid:
        np.testing.assert_array_equal(t.line.T, stored)
    again = tile_for(fmt.levels, grid)
    gather_params(stored, 0, grid, again)
    np.testing.assert_array_equal(again.levels, t.levels)


@pytest.mark.parametrize("count", [1, 15, 16, 17])
def test_rows_beyond_the_last_are_zero(count: int) -> None:
    rows = np.random.default_rng(count).integers(1, 9, (count, 768)).astype(np.uint8)
    block = np.full((256, 16), np.nan, np.float32)
    gather_rows(rows, count // 16 * 16, 256, block)
    left = rows[count // 16 * 16 :, 256:512]
    np.testing.assert_array_equal(block.reshape(16, 256)[: len(left)], left)
    np.testing.assert_array_equal(block.reshape(16, 256)[len(left) :], 0)


def test_lanes_become_rows() -> None:
    lanes = np.random.default_rng(2).standard_normal((256, 16)).astype(np.float32)
    rows = np.empty((256, 16), np.float32)
    to_rows(lanes, np.float32(-1), rows)
    np.testing.assert_array_equal(rows.reshape(16, 256), -lanes.T)
