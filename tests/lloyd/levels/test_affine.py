"""Evenly spaced levels: against the full range, a slow search, and groups with nothing to solve."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from lanes_problem import NO_CODES
from mq_quant.lloyd.constants import GRID_STEPS
from mq_quant.lloyd.group import nearest_rows
from mq_quant.lloyd.levels.affine import affine_rows, nearest_grid
from mq_quant.lloyd.simd.lanes import gather, scatter

RANDOM = np.random.default_rng(11)
COUNTS = (16, 64)
FAMILIES = {
    "normal": RANDOM.standard_normal((40, 256)),
    "heavy-tailed": RANDOM.standard_t(3, (40, 256)),
    "far from zero": 500 + RANDOM.standard_normal((20, 256)),
    "one huge outlier": np.where(np.arange(256) == 9, 1e6, RANDOM.standard_normal((17, 256))),
    "two values": RANDOM.choice([-1.0, 2.0], (16, 256)),
    "tiny": 1e-12 * RANDOM.standard_normal((5, 256)),
    "huge": 1e12 * RANDOM.standard_normal((5, 256)),
}
FLAT = {"zero": 0.0, "minus zero": -0.0, "positive": 3.5, "negative": -2e-20, "subnormal": 2.0**-149}


def fit(groups: np.ndarray, count: int, steps: int = GRID_STEPS) -> np.ndarray:
    params = np.full((len(groups), 2), np.nan, np.float32)
    affine_rows(np.ascontiguousarray(groups, np.float32), 0, count, steps, params, NO_CODES)
    return params


def errors(groups: np.ndarray, zero: np.ndarray, scale: np.ndarray, count: int) -> np.ndarray:
    """Σ of squared errors per group, codes to nearest, f64."""
    x, zero, scale = groups.astype(np.float64), zero.astype(np.float64), scale.astype(np.float64)
    codes = np.clip(np.rint((x - zero[:, None]) / scale[:, None]), 0, count - 1)
    return np.square(x - zero[:, None] - scale[:, None] * codes).sum(axis=1)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("value", FLAT.values(), ids=FLAT)
def test_constant_groups_keep_their_value(value: float, count: int) -> None:
    params = fit(np.full((17, 256), value), count)
    np.testing.assert_array_equal(params[:, 0], np.float32(value))
    assert np.isfinite(params).all() and (params[:, 1] > 0).all()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_never_worse_than_the_full_range(family: str, count: int) -> None:
    groups = FAMILIES[family].astype(np.float32)
    params = fit(groups, count)
    assert np.isfinite(params).all() and (params[:, 1] > 0).all()
    low, high = groups.min(axis=1), groups.max(axis=1)
    whole = errors(groups, low, (high - low) / np.float32(count - 1), count)
    slack = 256 * np.square(np.abs(groups).max(axis=1) * 2.0**-22)
    assert (errors(groups, params[:, 0], params[:, 1], count) <= whole * (1 + 1e-4) + slack).all()


@pytest.mark.parametrize("count", COUNTS)
def test_each_least_squares_step_helps(count: int) -> None:
    groups = FAMILIES["heavy-tailed"].astype(np.float32)
    found = [errors(groups, *fit(groups, count, steps).T, count) for steps in range(4)]
    for before, after in pairwise(found):
        assert (after <= before * (1 + 1e-4)).all()


def test_close_to_a_slow_search() -> None:
    """Both ends in steps of 1 % of the range, in f64: no more than 0.1 dB better."""
    groups = FAMILIES["normal"][:12].astype(np.float32)
    x = groups.astype(np.float64)
    low, width = x.min(axis=1), np.ptp(x, axis=1)
    best = np.full(len(x), np.inf)
    for a in np.arange(0, 0.3, 0.01):
        for b in np.arange(0, 0.3, 0.01):
            zero, scale = low + a * width, width * (1 - a - b) / 15
            best = np.minimum(best, errors(x, zero, scale, 16))
    ours = errors(groups, *fit(groups, 16).T, 16)
    assert ours.sum() <= best.sum() * 10**0.01


def test_rows_do_not_depend_on_their_neighbours() -> None:
    groups = FAMILIES["heavy-tailed"].astype(np.float32)
    want = fit(groups, 16)
    for part in (1, 3, 16, 17):
        np.testing.assert_array_equal(fit(groups[:part], 16), want[:part])
    np.testing.assert_array_equal(fit(groups[5:], 16), want[5:])


def test_groups_inside_a_row_are_read_at_their_column() -> None:
    groups = FAMILIES["normal"][:3].astype(np.float32)
    rows = np.concatenate([np.zeros_like(groups), groups], axis=1)
    params = np.empty((3, 2), np.float32)
    codes = np.empty((3, 256), np.uint8)
    affine_rows(rows, 256, 16, GRID_STEPS, params, codes)
    np.testing.assert_array_equal(params, fit(groups, 16))
    np.testing.assert_array_equal(codes, nearest(groups, params, 16))


def nearest(groups: np.ndarray, params: np.ndarray, count: int) -> np.ndarray:
    """Codes u8 [R, 256] by nearest_grid, sixteen rows at a time."""
    out = np.empty((len(groups), 256), np.uint8)
    y, codes = np.empty((256, 16), np.float32), np.empty((256, 16), np.float32)
    levels, mids = np.empty((count, 16), np.float32), np.empty((count - 1, 16), np.float32)
    for first in range(0, len(groups), 16):
        live = min(16, len(groups) - first)
        grid = np.zeros((2, 16), np.float32)
        grid[:, :live] = params[first : first + live].T
        gather(groups, first, 0, y)
        nearest_grid(y, grid, live, levels, mids, codes)
        scatter(codes, out, first)
    return out


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("family", [*FAMILIES, "levels that f32 hardly tells apart", "ties"])
def test_codes_are_those_of_the_nearest_level(family: str, count: int) -> None:
    if family == "ties":
        groups = np.tile(np.arange(256) / 2, (17, 1)).astype(np.float32)
        params = np.tile(np.float32([3, 1]), (17, 1))
    elif family in FAMILIES:
        groups = FAMILIES[family].astype(np.float32)
        params = fit(groups, count)
    else:
        groups = (2.0**20 + RANDOM.integers(0, 16, (33, 256)) / 8).astype(np.float32)
        params = np.stack([groups.min(axis=1), np.full(33, 0.031)], axis=1).astype(np.float32)
    levels = params[:, :1] + params[:, 1:] * np.arange(count, dtype=np.float32)
    want = np.empty((len(groups), 256), np.uint8)
    nearest_rows(groups, 0, levels, want)
    np.testing.assert_array_equal(nearest(groups, params, count), want)
