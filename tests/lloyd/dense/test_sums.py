"""Sums of the rows of H by code: those that follow moves are those that are added up anew, and equations follow."""

from __future__ import annotations

import numpy as np
import pytest
from mq_quant.lloyd.codes.descent import BLOCKS, CODE
from mq_quant.lloyd.dense.sums import add_up, equations, follow, members, row_sums, sort
from mq_quant.lloyd.dense.tile import Dense, Tile, dense_of, tile_for, to_rows
from mq_quant.lloyd.group_fit import SIGNS
from mq_quant.lloyd.simd.vec import LANES

CASES = [(4, False), (8, False), (16, True), (64, True)]


def whole(random: np.random.Generator) -> np.ndarray:
    """A symmetric H of whole numbers, whose sums f32 holds exactly."""
    mix = random.integers(-3, 4, (256, 256))
    return np.float32(mix + mix.T + 50 * np.eye(256))


def tile(h: np.ndarray, codes: np.ndarray, count: int, grid: bool) -> tuple[Dense, Tile]:
    """H and a tile with codes f32 [256, 16] that are added up."""
    dense, t = dense_of(h, SIGNS, grid), tile_for(count, grid)
    to_rows(codes, np.float32(1), t.codes)
    add_up(dense, codes, t)
    return dense, t


def summed(h: np.ndarray, codes: np.ndarray, count: int, grid: bool) -> np.ndarray:
    """What a tile keeps, f64 [16, m, 256]."""
    if grid:
        return (h @ codes).T[:, None, :]
    return np.stack([[h[codes[:, r] == k].sum(axis=0) for k in range(count)] for r in range(LANES)])


@pytest.mark.parametrize(("count", "grid"), CASES)
@pytest.mark.parametrize("moved", [0, 1, 16, 256])
def test_sums_follow_the_columns_that_move(count: int, grid: bool, moved: int) -> None:
    random = np.random.default_rng(moved)
    h, codes = whole(random), np.float32(random.integers(0, count, (256, LANES)))
    dense, t = tile(h, codes, count, grid)
    np.testing.assert_array_equal(t.sums.reshape(LANES, -1, 256), summed(h, codes, count, grid))
    after = codes.copy()
    for r in range(LANES):
        after[random.choice(256, moved, replace=False), r] = random.integers(0, count, moved)
        t.row[CODE : CODE + BLOCKS] = after[:, r].reshape(BLOCKS, LANES)
        follow(dense, t, r)
    np.testing.assert_array_equal(t.codes.reshape(LANES, 256), after.T)
    np.testing.assert_array_equal(t.sums.reshape(LANES, -1, 256), summed(h, after, count, grid))


@pytest.mark.parametrize(("count", "grid"), CASES)
@pytest.mark.parametrize("used", ["all", "one"])
def test_equations_are_those_of_the_definition(count: int, grid: bool, used: str) -> None:
    random = np.random.default_rng(count)
    h, y = whole(random), random.integers(-5, 6, (256, LANES))
    codes = np.float32(random.integers(0, count, (256, LANES)) if used == "all" else np.ones((256, LANES)))
    dense, t = tile(h, codes, count, grid)
    to_rows(np.float32(h @ y), np.float32(1), t.ys)
    for r in range(LANES):
        equations(dense, t, r)
        a = np.stack([np.ones(256), codes[:, r]], 1) if grid else codes[:, r, None] == np.arange(count)
        np.testing.assert_array_equal(np.tril(t.gram[:, :, r]), np.tril(a.T @ h @ a))
        np.testing.assert_array_equal(t.rhs[:, r], a.T @ h @ y[:, r])


def test_levels_are_sorted_and_codes_and_sums_follow() -> None:
    random = np.random.default_rng(5)
    codes = np.float32(random.integers(0, 8, (256, LANES)))
    h = whole(random)
    _, t = tile(h, codes, 8, False)
    levels = np.float32(random.permuted(np.tile(np.arange(8.0), (LANES, 1)), axis=1).T)
    levels[:, 3] = np.arange(8)
    levels[:, 4] = 1.0
    t.levels[:] = levels
    sort(t)
    np.testing.assert_array_equal(t.levels, np.sort(levels, axis=0))
    order = np.argsort(levels, axis=0, kind="stable")
    after = t.codes.reshape(LANES, 256).T
    np.testing.assert_array_equal(np.take_along_axis(order, after.astype(int), 0), codes)
    np.testing.assert_array_equal(t.sums.reshape(LANES, 8, 256), summed(h, after, 8, False))


def test_each_lane_lists_its_columns_by_code() -> None:
    codes = np.random.default_rng(2).integers(0, 8, (256, LANES)).astype(np.float32)
    codes[:, 5] = 3  # one list has all, the others none
    order, bounds = np.empty((LANES, 256), np.uint8), np.empty((LANES, 8, 3), np.int64)
    members(codes, order, bounds)
    for r in range(LANES):
        for k in range(8):
            first, half, last = bounds[r, k]
            want = np.flatnonzero(codes[:, r] == k)
            np.testing.assert_array_equal(order[r, first:last], want)
            assert half - first == (want < 128).sum()


@pytest.mark.parametrize("pitch", [256, 272])
def test_row_sums_take_rows_at_any_pitch(pitch: int) -> None:
    random = np.random.default_rng(3)
    codes = random.integers(0, 4, (256, LANES)).astype(np.float32)
    matrix = random.standard_normal((256, pitch), np.float32)
    order, bounds = np.empty((LANES, 256), np.uint8), np.empty((LANES, 4, 3), np.int64)
    sums = np.empty((LANES * 4 * BLOCKS, LANES), np.float32)
    members(codes, order, bounds)
    row_sums(matrix, matrix[:, :256].sum(axis=0).reshape(16, 16), order, bounds, sums)
    of = np.stack([[matrix[codes[:, r] == k, :256].sum(axis=0) for k in range(4)] for r in range(LANES)])
    np.testing.assert_allclose(sums.reshape(LANES, 4, 256), of, atol=1e-4)
