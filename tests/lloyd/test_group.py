"""The stages in the order of a build, for whole matrices: the energy falls from each to the next."""

from __future__ import annotations

import numpy as np
import pytest
from lanes_problem import NO_CODES, heavy_rows, unequal_weights
from mq_quant.formats.fwht import SIGNS2
from mq_quant.lloyd.constants import GRID_STEPS, INDEPENDENT
from mq_quant.lloyd.group import Problem, fit_rows, nearest_rows, settle_rows
from mq_quant.lloyd.group_fit import SIGNS
from mq_quant.lloyd.hessian.group import GroupHessian, from_diagonal
from mq_quant.lloyd.levels.affine import affine_rows
from mq_quant.lloyd.levels.kmeans import kmeans_rows

ROWS = 37
CASES = [(4, False), (8, False), (16, True), (64, True)]


def initial(rows: np.ndarray, count: int, grid: bool) -> np.ndarray:
    if grid:
        params = np.empty((len(rows), 2), np.float32)
        affine_rows(rows, 0, count, GRID_STEPS, params, NO_CODES)
        return params[:, :1] + params[:, 1:] * np.arange(count, dtype=np.float32)
    levels = np.empty((len(rows), count), np.float32)
    kmeans_rows(rows, 0, False, levels)
    return levels


def energy(rows: np.ndarray, levels: np.ndarray, codes: np.ndarray, h: GroupHessian) -> np.ndarray:
    e = rows.astype(np.float64) - np.take_along_axis(levels, codes.astype(np.int64), 1)
    return np.einsum("ri,ij,rj->r", e, h.matrix.astype(np.float64), e)


def problem_of(h: GroupHessian, grid: bool) -> Problem:
    return Problem(h.matrix, h.feedback, h.diagonal, SIGNS2, SIGNS, grid)


def shakes(rounds: int) -> np.ndarray:
    """Those of a build's last rounds: warm but for the last one."""
    return np.array(INDEPENDENT[len(INDEPENDENT) - rounds :], np.float32)


def fitted(
    rows: np.ndarray, h: GroupHessian, count: int, grid: bool, rounds: int
) -> tuple[np.ndarray, np.ndarray]:
    levels, codes = initial(rows, count, grid), np.full((len(rows), 256), 255, np.uint8)
    fit_rows(rows, 0, problem_of(h, grid), shakes(rounds), levels, codes)
    return levels, codes


def settled(
    rows: np.ndarray, h: GroupHessian, stored: np.ndarray, codes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    codes, gains = codes.copy(), np.full(len(rows), np.nan, np.float32)
    settle_rows(rows, 0, problem_of(h, False), stored, codes, gains)
    return codes, gains


@pytest.mark.parametrize("sigma", [0.0, 0.6, 1.2])
@pytest.mark.parametrize(("count", "grid"), CASES)
def test_the_energy_falls_from_stage_to_stage(count: int, grid: bool, sigma: float) -> None:
    rows, h = heavy_rows(ROWS), from_diagonal(unequal_weights(sigma))
    levels = initial(rows, count, grid)
    codes = np.empty((ROWS, 256), np.uint8)
    nearest_rows(rows, 0, levels, codes)
    nearest = energy(rows, levels, codes, h)
    levels, codes = fitted(rows, h, count, grid, 0)
    fed_back = energy(rows, levels, codes, h)
    # Feedback is greedy: better on the whole, not in every single row.
    assert fed_back.sum() <= nearest.sum() * (1 + 1e-5) and (fed_back <= nearest * 1.1).all()
    levels, codes = fitted(rows, h, count, grid, 1)
    assert codes.max() < count and (np.diff(levels, axis=1) >= 0).all()
    descended = energy(rows, levels, codes, h)
    assert (descended <= fed_back * (1 + 1e-4)).all()
    stored = levels.astype(np.float16).astype(np.float32)
    rounded = energy(rows, stored, codes, h)
    codes, _ = settled(rows, h, stored, codes)
    after = energy(rows, stored, codes, h)
    assert (after <= rounded * (1 + 1e-4)).all()
    assert (after <= nearest * (1.001 if sigma else 1.01)).all()


@pytest.mark.parametrize(("count", "grid"), CASES)
def test_warm_rounds_find_a_lower_minimum(count: int, grid: bool) -> None:
    """On the whole, by more than 1 %, though not in every row."""
    rows, h = heavy_rows(200), from_diagonal(unequal_weights(0.6))
    one, more = (energy(rows, *fitted(rows, h, count, grid, n), h) for n in (1, len(INDEPENDENT)))
    assert more.sum() < 0.99 * one.sum() and (more < one * 1.5).all()


@pytest.mark.parametrize(("count", "grid"), CASES)
def test_gains_are_the_inverse_slope(count: int, grid: bool) -> None:
    rows, h = heavy_rows(ROWS, seed=1), from_diagonal(unequal_weights(0.8))
    levels, codes = fitted(rows, h, count, grid, 1)
    codes, gains = settled(rows, h, levels, codes)
    y, q = rows.astype(np.float64), np.take_along_axis(levels, codes.astype(np.int64), 1).astype(np.float64)
    h64 = h.matrix.astype(np.float64)
    want = np.einsum("ri,ij,rj->r", y, h64, y) / np.einsum("ri,ij,rj->r", y, h64, q)
    np.testing.assert_allclose(gains, want, rtol=2e-4)
    assert (gains > 1).mean() > 0.9


def test_a_group_without_signal_takes_no_gain() -> None:
    rows = np.zeros((3, 256), np.float32)
    rows[1] = 1e-3 * heavy_rows(1)[0]
    h = from_diagonal(unequal_weights(0.5))
    far = np.tile(np.float32([[-5, -4, 4, 5]]), (3, 1))
    _, gains = settled(rows, h, far, np.zeros((3, 256), np.uint8))
    np.testing.assert_array_equal(gains[[0, 2]], [1, 1])
    assert np.isfinite(gains).all() and (gains > 0).all() and (gains <= 2).all()


@pytest.mark.parametrize("count", [1, 15, 16, 17])
def test_no_row_beyond_the_last_is_read_or_written(count: int) -> None:
    h = from_diagonal(unequal_weights(0.5))
    rows = heavy_rows(40, 768, seed=3)
    want = None
    for padding in (0.0, 1e30):
        wide = rows.copy()
        wide[count:] = padding
        wide[:, :256] = wide[:, 512:] = padding
        levels = np.full((40, 4), -7, np.float32)
        levels[:count] = initial(np.ascontiguousarray(rows[:count, 256:512]), 4, False)
        codes = np.full((40, 256), 99, np.uint8)
        fit_rows(wide[:count], 256, problem_of(h, False), shakes(1), levels[:count], codes[:count])
        assert (codes[count:] == 99).all() and (levels[count:] == -7).all()
        assert codes[:count].max() < 4
        want = codes if want is None else want
        np.testing.assert_array_equal(codes, want)


def test_nearest_is_the_nearest_and_a_tie_the_lower() -> None:
    rows = heavy_rows(18)
    rows[0] = np.tile(np.float32([-0.5, 0.5, 2.0, 9.0]), 64)
    levels = np.tile(np.float32([[-1, 0, 1, 3]]), (18, 1))
    codes = np.empty((18, 256), np.uint8)
    nearest_rows(rows, 0, levels, codes)
    np.testing.assert_array_equal(codes[0], np.tile([0, 1, 2, 3], 64))
    distance = np.abs(rows[:, :, None] - levels[:, None, :])
    np.testing.assert_array_equal(codes, distance.argmin(axis=2))
