"""Error feedback, replayed column by column in f64: every choice is the best at its moment."""

from __future__ import annotations

import numpy as np
import pytest
from lanes_problem import Problem, problem
from mq_quant.lloyd.codes.feedback import feedback, residual
from mq_quant.lloyd.hessian.group import identity

CASES = [(4, 0.0), (4, 1.0), (8, 0.6), (16, 0.3), (16, 1.5)]


def fed_back(p: Problem) -> tuple[np.ndarray, np.ndarray]:
    codes, work, errors = (np.full((256, 16), np.nan, np.float32) for _ in range(3))
    feedback(p.y, p.h.feedback, p.levels, p.mids, codes, work, errors)
    return codes, errors


def assert_valid(codes: np.ndarray, count: int) -> None:
    assert np.isin(codes, np.arange(count)).all()


@pytest.mark.parametrize(("count", "sigma"), CASES)
def test_feedback_takes_the_level_nearest_to_each_moved_target(count: int, sigma: float) -> None:
    p = problem(count, sigma)
    codes, errors = fed_back(p)
    assert_valid(codes, count)
    factor, q = p.h.feedback.astype(np.float64), p.decode(codes)
    exact = np.linalg.solve(factor, p.y - q)
    np.testing.assert_allclose(errors, exact, atol=1e-3 * np.abs(p.y).max())
    targets = exact + q
    chosen = np.abs(targets - q)
    possible = np.abs(targets[:, None, :] - p.levels[None, :, :]).min(axis=1)
    assert (chosen <= possible + 1e-3).all()


@pytest.mark.parametrize(("count", "sigma"), CASES)
def test_feedback_costs_less_than_nearest(count: int, sigma: float) -> None:
    for seed in range(4):
        p = problem(count, sigma, seed)
        ratio = p.energy(fed_back(p)[0]).sum() / p.energy(p.nearest()).sum()
        assert ratio <= {0.0: 1.0 + 1e-6, 0.3: 0.98, 0.6: 0.9, 1.0: 0.8, 1.5: 0.6}[sigma]


def test_feedback_without_couplings_is_nearest() -> None:
    p = problem(8, 0.0)
    white = Problem(p.y, identity(), np.eye(256), p.levels)
    np.testing.assert_array_equal(fed_back(white)[0], p.nearest())


def test_a_tie_takes_the_lower_code() -> None:
    levels = np.repeat(np.float32([[-1], [0], [1], [3]]), 16, axis=1)
    y = np.tile(np.float32([[-0.5], [0.5], [2.0], [-7.0]]), (64, 16))
    p = Problem(y, identity(), np.eye(256), levels)
    want = np.tile(np.float32([[0], [1], [2], [0]]), (64, 16))
    np.testing.assert_array_equal(fed_back(p)[0], want)


def test_residuals_are_what_the_levels_miss() -> None:
    p = problem(8, 0.6)
    errors = np.full((256, 16), np.nan, np.float32)
    residual(p.y, p.levels, p.nearest(), errors)
    np.testing.assert_array_equal(errors, p.y - np.float32(p.decode(p.nearest())))


def test_lanes_do_not_see_each_other() -> None:
    p = problem(8, 0.8)
    want, want_errors = fed_back(p)
    order = np.random.default_rng(0).permutation(16)
    turned = Problem(
        np.ascontiguousarray(p.y[:, order]), p.h, p.h64, np.ascontiguousarray(p.levels[:, order])
    )
    codes, errors = fed_back(turned)
    np.testing.assert_array_equal(codes, want[:, order])
    np.testing.assert_array_equal(errors, want_errors[:, order])
