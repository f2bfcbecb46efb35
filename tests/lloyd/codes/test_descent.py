"""Coordinate descent, replayed column by column in f64: every choice is the best at its moment, or shifted as asked."""

from __future__ import annotations

import numpy as np
import pytest
from lanes_problem import Problem, problem
from mq_quant.lloyd.codes.descent import descend, heat, shake_signs
from mq_quant.lloyd.constants import SHAKE, SWEEPS
from mq_quant.lloyd.hessian.group import identity

CASES = [(4, 0.0), (4, 1.0), (8, 0.6), (16, 0.3), (16, 1.5)]
COLD = np.float32(0)


def pull_of(p: Problem, codes: np.ndarray) -> np.ndarray:
    """H·(y - q) f32 [256, 16]."""
    return np.float32(p.h64 @ (p.y - p.decode(codes)))


def shifts_of(p: Problem, codes: np.ndarray, share: np.float32) -> np.ndarray:
    """f32 [1, 16]."""
    out = np.empty((1, 16), np.float32)
    heat(np.float32(p.y - p.decode(codes)), pull_of(p, codes), share, out)
    return out


def descended(
    p: Problem, codes: np.ndarray, sweeps: int = 1, share: np.float32 = COLD, first: int = 0
) -> np.ndarray:
    codes = codes.copy()
    signs, shifts = shake_signs(first + sweeps), shifts_of(p, codes, share)
    descend(codes, pull_of(p, codes), p.levels, p.h.matrix, signs, first, sweeps, shifts)
    return codes


def replayed(p: Problem, codes: np.ndarray, shifts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes after sweeps with shifts f64 [sweeps, 256, 16] of the targets, all in f64, and the least distance of a
    target to a midpoint, f64 [16]: what is nearer than f32 can tell may go either way.
    """
    codes, levels = codes.astype(np.int64), p.levels.astype(np.float64)
    mids, lanes = (levels[1:] + levels[:-1]) / 2, np.arange(16)
    closest = np.full(16, np.inf)
    for shift in shifts:
        for i in range(256):
            pull = p.h64[i] @ (p.y - levels[codes, lanes])
            target = levels[codes[i], lanes] + pull / p.h64[i, i] + shift[i]
            closest = np.minimum(closest, np.abs(target - mids).min(axis=0))
            codes[i] = (target > mids).sum(axis=0)
    return codes.astype(np.float32), closest


@pytest.mark.parametrize("share", [0.0, SHAKE, 1.5])
@pytest.mark.parametrize(("count", "sigma"), CASES)
def test_every_column_takes_the_level_nearest_to_its_shifted_target(
    count: int, sigma: float, share: float
) -> None:
    p = problem(count, sigma)
    first, sweeps, share = 3, 2, np.float32(share)
    signs = shake_signs(first + sweeps)[first:].reshape(sweeps, 256, 1)
    shifts = shifts_of(p, p.nearest(), share).astype(np.float64)
    want, closest = replayed(p, p.nearest(), shifts * signs)
    got = descended(p, p.nearest(), sweeps, share, first)
    clear = closest > 1e-5 * (p.levels[-1] - p.levels[0]) / (count - 1)
    assert clear.sum() >= 12
    np.testing.assert_array_equal(got[:, clear], want[:, clear])
    assert np.isin(got, np.arange(count)).all()


@pytest.mark.parametrize(("count", "sigma"), CASES)
def test_heat_is_a_share_of_the_error_that_a_column_has_under_h(count: int, sigma: float) -> None:
    p = problem(count, sigma)
    want = 0.3 * np.sqrt(p.energy(p.nearest()) / 256)
    np.testing.assert_allclose(shifts_of(p, p.nearest(), np.float32(0.3))[0], want, rtol=1e-3)
    out = np.empty((1, 16), np.float32)
    heat(p.y, np.float32(-1e-9) * p.y, SHAKE, out)  # an energy that rounding has driven below zero
    np.testing.assert_array_equal(out, 0)


@pytest.mark.parametrize(("count", "sigma"), CASES)
def test_a_cold_sweep_never_costs_more(count: int, sigma: float) -> None:
    for seed in range(3):
        p = problem(count, sigma, seed)
        for codes in (p.nearest(), np.zeros((256, 16), np.float32)):
            before = p.energy(codes)
            for _ in range(3):
                codes = descended(p, codes)
                after = p.energy(codes)
                assert (after <= before * (1 + 1e-5)).all()
                before = after


def test_cold_sweeps_end_where_no_single_change_helps() -> None:
    p = problem(4, 1.0)
    codes = descended(p, p.nearest(), 60)
    np.testing.assert_array_equal(descended(p, codes), codes)
    best = p.energy(codes)
    for column in range(0, 256, 17):
        for level in range(4):
            changed = codes.copy()
            changed[column] = level
            assert (p.energy(changed) >= best * (1 - 1e-5)).all()


@pytest.mark.parametrize(("count", "sigma"), [c for c in CASES if c[1] > 0])
def test_warm_sweeps_lead_to_a_lower_end(count: int, sigma: float) -> None:
    """On the whole, not in every lane: what they find is another minimum."""
    cold = warm = 0.0
    for seed in range(4):
        p = problem(count, sigma, seed)
        start = descended(p, p.nearest(), 60)
        cold += p.energy(start).sum()
        warm += p.energy(descended(p, descended(p, start, SWEEPS, SHAKE), 60)).sum()
    assert warm < cold


def test_a_warm_sweep_may_move_where_a_cold_one_rests() -> None:
    p = problem(4, 1.0)
    codes = descended(p, p.nearest(), 60)
    assert (descended(p, codes, 1, np.float32(2)) != codes).any(axis=0).all()


def test_levels_that_are_one_are_left_alone() -> None:
    """A constant group: every code is as good, so none moves, even where the pull is not zero."""
    p = problem(4, 1.0)
    flat = Problem(p.y, p.h, p.h64, np.ones((4, 16), np.float32))
    codes = np.tile(np.float32([[0], [3]]), (128, 16))
    np.testing.assert_array_equal(descended(flat, codes, 2, SHAKE), codes)


def test_a_tie_takes_the_lower_code() -> None:
    levels = np.repeat(np.float32([[-1], [0], [1], [3]]), 16, axis=1)
    y = np.tile(np.float32([[-0.5], [0.5], [2.0], [-7.0]]), (64, 16))
    p = Problem(y, identity(), np.eye(256), levels)
    want = np.tile(np.float32([[0], [1], [2], [0]]), (64, 16))
    for start in (0, 3):
        np.testing.assert_array_equal(descended(p, np.full((256, 16), start, np.float32)), want)


def test_lanes_do_not_see_each_other() -> None:
    p = problem(8, 0.8)
    order = np.random.default_rng(0).permutation(16)
    turned = Problem(
        np.ascontiguousarray(p.y[:, order]), p.h, p.h64, np.ascontiguousarray(p.levels[:, order])
    )
    want = descended(p, p.nearest(), SWEEPS, SHAKE)
    np.testing.assert_array_equal(descended(turned, turned.nearest(), SWEEPS, SHAKE), want[:, order])


def test_signs_are_balanced_and_their_beginning_does_not_depend_on_their_number() -> None:
    signs = shake_signs(24)
    assert set(np.unique(signs)) == {-1.0, 1.0} and abs(signs.mean()) < 0.03
    np.testing.assert_array_equal(shake_signs(5), signs[:5])
