"""Exact k-means of one group: against the whole dynamic programme and scikit-learn with many restarts."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mq_quant.lloyd.levels.kmeans import kmeans_rows
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

COUNTS = (4, 8, 16)


def fit(groups: np.ndarray, count: int, exact: bool = True) -> np.ndarray:
    levels = np.full((len(groups), count), np.nan, np.float32)
    kmeans_rows(np.ascontiguousarray(groups, np.float32), 0, exact, levels)
    return levels


def cost(group: np.ndarray, levels: np.ndarray) -> float:
    """Σ of squared distances to the nearest level, f64."""
    x, c = group.astype(np.float64), levels.astype(np.float64)
    return float(np.square(x[:, None] - c[None, :]).min(axis=1).sum())


def best_cost(group: np.ndarray, count: int) -> float:
    """The least cost of `count` intervals of the sorted values, by trying every boundary: O(K n²), f64."""
    x = np.sort(group.astype(np.float64))
    x = x - x.mean()
    n = len(x)
    total, squares = (np.concatenate([[0.0], np.cumsum(v)]) for v in (x, x * x))
    length = np.arange(n + 1)[None, :] - np.arange(n + 1)[:, None]
    sums = total[None, :] - total[:, None]
    interval = squares[None, :] - squares[:, None] - sums**2 / np.maximum(length, 1)
    interval = np.where(length > 0, np.maximum(interval, 0.0), np.where(length == 0, 0.0, np.inf))
    best = interval[0]
    for _ in range(count - 1):
        best = (best[:, None] + interval).min(axis=0)
    return float(best[n])


def roundoff(group: np.ndarray) -> float:
    """What storing the levels as f32 may cost."""
    return 256 * (float(np.abs(group).max()) * 2.0**-23 + 2.0**-149) ** 2


def assert_optimal(groups: np.ndarray, count: int) -> None:
    for group, levels in zip(groups, fit(groups, count), strict=True):
        assert np.isfinite(levels).all()
        assert (np.diff(levels) >= 0).all()
        wanted = best_cost(group, count)
        assert cost(group, levels) <= wanted * (1 + 1e-6) + roundoff(group)


RANDOM = np.random.default_rng(7)
FAMILIES = {
    "normal": RANDOM.standard_normal((6, 256)),
    "heavy-tailed": RANDOM.standard_t(2, (6, 256)),
    "cauchy": RANDOM.standard_cauchy((6, 256)),
    "one huge outlier": np.where(np.arange(256) == 77, 1e6, RANDOM.standard_normal((3, 256))),
    "two clusters": RANDOM.choice([-3.0, 3.0], (4, 256)) + 1e-3 * RANDOM.standard_normal((4, 256)),
    "ties": RANDOM.integers(-6, 7, (6, 256)).astype(float),
    "ties, fewer than levels": RANDOM.choice([-1.0, 0.5, 2.0], (4, 256)),
    "constant": np.array([[0.0] * 256, [-0.0] * 256, [3.25] * 256, [-1e-30] * 256]),
    "signed zeros": np.where(RANDOM.random((2, 256)) < 0.5, 0.0, -0.0),
    "far from zero": 1000 + RANDOM.standard_normal((4, 256)),
    "tiny": 1e-18 * RANDOM.standard_normal((4, 256)),
    "huge": 1e18 * RANDOM.standard_normal((4, 256)),
    "subnormal": RANDOM.integers(-50, 50, (3, 256)) * 2.0**-149,
    "sorted": np.sort(RANDOM.standard_normal((2, 256))),
    "even": np.tile(np.arange(256.0), (1, 1)),
    "powers": np.tile(np.ldexp(1.0, np.arange(256) % 60), (1, 1)),
}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_levels_cost_no_more_than_any_intervals(family: str, count: int) -> None:
    assert_optimal(FAMILIES[family].astype(np.float32), count)


@pytest.mark.parametrize("count", COUNTS)
@given(data=st.data())
def test_exact_levels_are_optimal_for_any_values(count: int, data: st.DataObject) -> None:
    """A few different values, placed anywhere: ties and gaps of every size."""
    few = data.draw(hnp.arrays(np.float32, st.integers(1, 12), elements=st.floats(-1e4, 1e4, width=32)))
    seed = data.draw(st.integers(0, 2**32 - 1))
    assert_optimal(np.random.default_rng(seed).choice(few, (1, 256)), count)


@pytest.mark.parametrize("count", COUNTS)
def test_exact_is_never_worse_than_scikit_learn(count: int) -> None:
    groups = np.concatenate(
        [
            FAMILIES[f][:1]
            for f in ("normal", "heavy-tailed", "two clusters", "ties", "ties, fewer than levels")
        ]
    ).astype(np.float32)
    for group, levels in zip(groups, fit(groups, count), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different values than levels
            referee = KMeans(count, n_init=10, random_state=0).fit(group.astype(np.float64)[:, None])
        assert cost(group, levels) <= referee.inertia_ * (1 + 1e-6) + roundoff(group)


@pytest.mark.parametrize("count", COUNTS)
def test_lloyd_from_quantiles_is_close_and_never_better(count: int) -> None:
    groups = FAMILIES["normal"].astype(np.float32)
    exact = sum(cost(g, c) for g, c in zip(groups, fit(groups, count), strict=True))
    quick = sum(cost(g, c) for g, c in zip(groups, fit(groups, count, exact=False), strict=True))
    assert exact <= quick * (1 + 1e-9) <= exact * 1.35


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_levels_are_ascending_within_the_values(family: str, exact: bool) -> None:
    groups = FAMILIES[family].astype(np.float32)
    for count in COUNTS:
        levels = fit(groups, count, exact)
        assert (np.diff(levels, axis=1) >= 0).all()
        slack = np.abs(groups).max(axis=1) * np.float32(1e-6)
        assert (levels >= groups.min(axis=1)[:, None] - slack[:, None]).all()
        assert (levels <= groups.max(axis=1)[:, None] + slack[:, None]).all()


def test_order_of_values_and_place_in_the_row_do_not_matter() -> None:
    group = FAMILIES["heavy-tailed"][:1].astype(np.float32)
    want = fit(group, 8)
    shuffled = RANDOM.permutation(group[0])[None]
    np.testing.assert_array_equal(fit(shuffled, 8), want)
    wide = np.concatenate([np.zeros((1, 256), np.float32), shuffled, np.ones((1, 256), np.float32)], axis=1)
    levels = np.empty((1, 8), np.float32)
    kmeans_rows(wide, 256, True, levels)
    np.testing.assert_array_equal(levels, want)
    np.testing.assert_array_equal(wide[:, 256:512], shuffled)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("count", COUNTS)
def test_no_row_sees_its_neighbours(count: int, exact: bool) -> None:
    """Rows of every kind next to each other, ties included, in any order and number, give what they give alone."""
    random = np.random.default_rng(5)
    rows = np.concatenate([f.astype(np.float32) for f in FAMILIES.values()])
    few = random.choice(np.float32([-1, -0.5, 0, 0.5, 1]), (60, 256))
    symmetric = np.concatenate([few[:, :128], -few[:, :128]], axis=1)
    rows = np.concatenate([rows, few, symmetric, random.integers(-20, 21, (60, 256)).astype(np.float32)])
    alone = np.concatenate([fit(rows[i : i + 1], count, exact) for i in range(len(rows))])
    for _ in range(3):
        order = random.permutation(len(rows))[: random.integers(1, len(rows))]
        np.testing.assert_array_equal(fit(rows[order], count, exact), alone[order])


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("outlier", [1e3, -1e5, 1e6])
def test_a_huge_outlier_takes_one_level_and_the_rest_stay_optimal(count: int, outlier: float) -> None:
    groups = np.random.default_rng(6).standard_normal((9, 256)).astype(np.float32)
    groups[:, 33] = outlier
    for group, levels in zip(groups, fit(groups, count), strict=True):
        rest = np.delete(group, 33)
        assert outlier in levels
        assert cost(rest, levels) <= best_cost(rest, count - 1) * (1 + 1e-6)
