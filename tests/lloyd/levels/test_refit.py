"""Moving levels under a Hessian: against the normal equations in f64, dense and diagonal, and singular systems."""

from __future__ import annotations

import numpy as np
import pytest
from lanes_problem import Problem, problem
from mq_quant.formats.fwht import SIGNS2
from mq_quant.lloyd import group as lloyd
from mq_quant.lloyd.constants import RIDGE
from mq_quant.lloyd.dense.sums import add_up, equations
from mq_quant.lloyd.dense.sums import refit as refit_tile
from mq_quant.lloyd.dense.tile import dense_of, tile_for, to_rows
from mq_quant.lloyd.group_fit import SIGNS
from mq_quant.lloyd.levels.refit import multiply


def refit(p: Problem, codes: np.ndarray, grid: bool, dense: bool) -> tuple[np.ndarray, np.ndarray]:
    """Levels f32 [K, 16] and codes after one refit."""
    if dense:
        return refit_dense(p, codes, grid)
    hessian = lloyd.Problem(p.h.matrix, p.h.feedback, p.h.diagonal, SIGNS2, SIGNS, grid)
    s = lloyd.scratch_for(len(p.levels), grid)
    s.levels[:], s.codes[:] = p.levels, codes
    lloyd.turned(hessian, p.y, s.ys)
    lloyd.refit_levels(hessian, s)
    return s.levels, s.codes


def refit_dense(p: Problem, codes: np.ndarray, grid: bool) -> tuple[np.ndarray, np.ndarray]:
    h, t = dense_of(p.h.matrix, SIGNS, grid), tile_for(len(p.levels), grid)
    t.levels[:], t.line[:] = p.levels, [p.levels[0], p.levels[1] - p.levels[0]]
    for block, rows in ((np.float32(p.h64 @ p.y), t.ys), (np.float32(codes), t.codes)):
        to_rows(block, np.float32(1), rows)
    add_up(h, np.float32(codes), t)
    for r in range(16):
        equations(h, t, r)
    refit_tile(h, t)
    return t.levels, np.ascontiguousarray(t.codes.reshape(16, 256).T)


def columns(codes: np.ndarray, count: int, grid: bool) -> np.ndarray:
    """A f64 [256, unknowns] of one lane."""
    if grid:
        return np.stack([np.ones(256), codes], axis=1)
    return (codes[:, None] == np.arange(count)).astype(np.float64)


def solved(p: Problem, codes: np.ndarray) -> np.ndarray:
    """The levels that the normal equations with the ridge give, f64 [K, 16]."""
    out = np.empty(p.levels.shape)
    for r in range(16):
        a = columns(codes[:, r], len(p.levels), False)
        gram = a.T @ p.h64 @ a
        tie = float(RIDGE) * np.trace(gram) / len(gram)
        rhs = a.T @ p.h64 @ p.y[:, r] + tie * p.levels[:, r]
        out[:, r] = np.linalg.solve(gram + tie * np.eye(len(gram)), rhs)
    return out


def some_codes(p: Problem, wrong: int = 30) -> np.ndarray:
    """Nearest codes, some of them moved, so that there is something to refit."""
    random = np.random.default_rng(9)
    codes = p.nearest()
    codes[random.choice(256, wrong, replace=False)] = random.integers(0, len(p.levels), (wrong, 16))
    return codes


@pytest.mark.parametrize("dense", [False, True], ids=["diagonal", "dense"])
@pytest.mark.parametrize(("count", "sigma"), [(4, 0.0), (4, 1.0), (8, 0.6), (16, 1.0)])
def test_levels_solve_the_normal_equations(count: int, sigma: float, dense: bool) -> None:
    p = problem(count, sigma)
    codes = some_codes(p)
    levels, moved = refit(p, codes, False, dense)
    want = solved(p, codes)
    np.testing.assert_allclose(levels, np.sort(want, axis=0), atol=2e-3 * np.abs(want).max())
    after = Problem(p.y, p.h, p.h64, levels)
    assert (after.energy(moved) <= p.energy(codes) * (1 + 1e-5)).all()
    assert after.energy(moved).sum() < 0.99 * p.energy(codes).sum()


@pytest.mark.parametrize("dense", [False, True], ids=["diagonal", "dense"])
@pytest.mark.parametrize(("count", "sigma"), [(16, 0.0), (16, 1.0), (64, 0.6)])
def test_a_grid_solves_for_zero_and_scale(count: int, sigma: float, dense: bool) -> None:
    p = problem(count, sigma, grid=True)
    codes = p.nearest()
    levels, same = refit(p, codes, True, dense)
    np.testing.assert_array_equal(same, codes)
    for r in range(16):
        a = columns(codes[:, r].astype(np.float64), count, True)
        zero, scale = np.linalg.solve(a.T @ p.h64 @ a, a.T @ p.h64 @ p.y[:, r])
        np.testing.assert_allclose(
            levels[:, r], zero + scale * np.arange(count), atol=2e-3 * np.abs(p.y).max()
        )
    assert (Problem(p.y, p.h, p.h64, levels).energy(codes) <= p.energy(codes) * (1 + 1e-4)).all()


@pytest.mark.parametrize(("count", "grid"), [(4, False), (16, False), (16, True)])
def test_dense_and_diagonal_agree(count: int, grid: bool) -> None:
    p = problem(count, 0.8, grid=grid)
    codes = p.nearest() if grid else some_codes(p)
    (one, one_codes), (other, other_codes) = (refit(p, codes, grid, dense) for dense in (False, True))
    np.testing.assert_allclose(one, other, atol=1e-3 * np.abs(p.y).max())
    np.testing.assert_array_equal(one_codes, other_codes)


@pytest.mark.parametrize("dense", [False, True], ids=["diagonal", "dense"])
def test_levels_that_no_code_uses_stay(dense: bool) -> None:
    p = problem(8, 0.6)
    codes = p.nearest()
    codes[codes == 3] = 4
    levels, _ = refit(p, codes, False, dense)
    assert np.isfinite(levels).all()
    gap = np.abs(levels[:, None, :] - p.levels[None, 3:4, :]).min(axis=0)
    assert gap.max() <= 1e-3 * np.abs(p.levels).max()


@pytest.mark.parametrize("dense", [False, True], ids=["diagonal", "dense"])
@pytest.mark.parametrize("grid", [False, True])
def test_one_code_for_all_is_a_singular_system(grid: bool, dense: bool) -> None:
    p = problem(16, 0.6, grid=grid)
    codes = np.full((256, 16), 5, np.float32)
    levels, moved = refit(p, codes, grid, dense)
    assert np.isfinite(levels).all() and (np.diff(levels, axis=0) >= 0).all()
    assert (Problem(p.y, p.h, p.h64, levels).energy(moved) <= p.energy(codes) * (1 + 1e-4)).all()


def test_levels_that_cross_are_sorted_and_codes_follow() -> None:
    """Codes that are the wrong way round pull the levels past each other."""
    p = problem(4, 0.3)
    codes = 3 - p.nearest()
    levels, moved = refit(p, codes, False, False)
    assert (np.diff(levels, axis=0) >= 0).all()
    want = np.take_along_axis(solved(p, codes), codes.astype(int), axis=0)
    got = np.take_along_axis(levels, moved.astype(int), axis=0)
    np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(p.y).max())


def test_a_broken_lane_stays_alone() -> None:
    p = problem(8, 0.6)
    codes = some_codes(p)
    want, _ = refit(p, codes, False, False)
    broken = Problem(p.y.copy(), p.h, p.h64, p.levels)
    broken.y[:, 3] = 0
    got, _ = refit(broken, codes, False, False)
    others = np.arange(16) != 3
    np.testing.assert_array_equal(got[:, others], want[:, others])


def test_multiply_is_minus_the_product() -> None:
    p = problem(4, 1.0)
    out = np.empty((256, 16), np.float32)
    multiply(p.h.matrix, p.y, out)
    np.testing.assert_allclose(out, -(p.h64 @ p.y.astype(np.float64)), atol=1e-4 * np.abs(p.y).max())
