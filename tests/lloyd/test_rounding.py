"""Error feedback and coordinate descent, replayed column by column in f64: every choice is the best at its moment."""

from __future__ import annotations

import numpy as np
import pytest
from lanes_problem import Problem, problem
from mq_quant.lloyd.hessian import identity
from mq_quant.lloyd.rounding import descend, feedback

CASES = [(4, 0.0), (4, 1.0), (8, 0.6), (16, 0.3), (16, 1.5)]


def fed_back(p: Problem) -> tuple[np.ndarray, np.ndarray]:
    codes, work, errors = (np.full((256, 16), np.nan, np.float32) for _ in range(3))
    feedback(p.y, p.h.feedback, p.levels, p.mids, codes, work, errors)
    return codes, errors


def descended(p: Problem, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes, errors = codes.copy(), (p.y - p.decode(codes)).astype(np.float32)
    descend(p.y, p.h.matrix, p.levels, p.mids, codes, errors, np.empty((8, 16), np.float32))
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
    np.testing.assert_array_equal(descended(p, p.nearest())[0], want)


@pytest.mark.parametrize(("count", "sigma"), CASES)
def test_a_sweep_of_descent_never_costs_more(count: int, sigma: float) -> None:
    for seed in range(3):
        p = problem(count, sigma, seed)
        for codes in (p.nearest(), fed_back(p)[0], np.zeros((256, 16), np.float32)):
            before = p.energy(codes)
            for _ in range(3):
                codes, errors = descended(p, codes)
                assert_valid(codes, count)
                np.testing.assert_allclose(errors, p.y - p.decode(codes), atol=2e-5 * np.abs(p.y).max())
                after = p.energy(codes)
                assert (after <= before * (1 + 1e-5)).all()
                before = after


@pytest.mark.parametrize(("count", "sigma"), CASES)
def test_each_step_of_descent_is_the_best_level_given_all_others(count: int, sigma: float) -> None:
    p = problem(count, sigma)
    start = p.nearest()
    codes, _ = descended(p, start)
    e = p.y - p.decode(start)
    final = p.y - p.decode(codes)
    for column in range(256):
        others = p.h64[column] @ e - p.h64[column, column] * e[column]
        candidates = p.y[column] - p.levels.astype(np.float64)
        cost = p.h64[column, column] * candidates**2 + 2 * candidates * others
        e[column] = final[column]
        paid = p.h64[column, column] * e[column] ** 2 + 2 * e[column] * others
        assert (paid <= cost.min(axis=0) + 1e-3).all(), column


def test_descent_ends_where_no_single_change_helps() -> None:
    p = problem(4, 1.0)
    codes = p.nearest()
    for _ in range(40):
        again, _ = descended(p, codes)
        if (again == codes).all():
            break
        codes = again
    best = p.energy(codes)
    for column in range(0, 256, 17):
        for level in range(4):
            changed = codes.copy()
            changed[column] = level
            assert (p.energy(changed) >= best * (1 - 1e-5)).all()


@pytest.mark.parametrize("step", [fed_back, lambda p: descended(p, p.nearest())], ids=["feedback", "descent"])
def test_lanes_do_not_see_each_other(step) -> None:
    p = problem(8, 0.8)
    want, want_errors = step(p)
    order = np.random.default_rng(0).permutation(16)
    turned = Problem(
        np.ascontiguousarray(p.y[:, order]), p.h, p.h64, np.ascontiguousarray(p.levels[:, order])
    )
    codes, errors = step(turned)
    np.testing.assert_array_equal(codes, want[:, order])
    np.testing.assert_array_equal(errors, want_errors[:, order])
