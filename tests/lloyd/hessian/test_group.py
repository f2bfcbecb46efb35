"""The Hessian of one group: against R diag(d) Rᵀ and its inverse's factor in f64, and hostile importances."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.lloyd.constants import WEIGHT_RANGE
from mq_quant.lloyd.hessian.group import GroupHessian, cholesky_upper, from_diagonal, identity
from rotation import matrix

R = matrix()


def check(h: GroupHessian) -> None:
    """What the rounding kernels rely on, whatever the importance was."""
    assert h.matrix.dtype == h.feedback.dtype == h.diagonal.dtype == np.float32
    assert np.isfinite(h.matrix).all() and np.isfinite(h.feedback).all()
    np.testing.assert_array_equal(h.matrix, h.matrix.T)
    np.testing.assert_allclose(np.diag(h.matrix), 1, rtol=1e-5)
    np.testing.assert_array_equal(np.diag(h.feedback), np.ones(256))
    np.testing.assert_array_equal(np.triu(h.feedback, 1), np.zeros((256, 256)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_entry_that_is_not_finite_gives_the_identity_and_says_so(bad: float) -> None:
    weights = np.ones(256)
    weights[17] = bad
    h = from_diagonal(weights)
    check(h)
    np.testing.assert_array_equal(h.matrix, np.eye(256))
    assert h.note


@pytest.mark.parametrize("weights", [np.zeros(256), np.full(256, -1.0), -np.arange(256.0)])
def test_weights_without_a_positive_one_give_the_identity_and_say_so(weights: np.ndarray) -> None:
    h = from_diagonal(weights)
    np.testing.assert_array_equal(h.matrix, np.eye(256))
    np.testing.assert_array_equal(h.feedback, np.eye(256))
    np.testing.assert_array_equal(h.diagonal, np.ones(256))
    assert h.note


@pytest.mark.parametrize(
    "weights",
    [
        np.where(np.arange(256) == 3, 1e300, 1e-300),
        np.where(np.arange(256) < 128, 0.0, 1.0),
        np.where(np.arange(256) == 255, 1.0, 0.0),
        np.geomspace(1e-30, 1e30, 256),
        np.full(256, 1e-310),
        np.full(256, 1e308),
        np.where(np.arange(256) % 2, 2.0**-1074, 1.0),
    ],
    ids=[
        "one enormous",
        "half zero",
        "all but one zero",
        "sixty decades",
        "subnormal",
        "near overflow",
        "ratio 2^1074",
    ],
)
def test_singular_and_enormous_weights_are_bounded(weights: np.ndarray) -> None:
    h = from_diagonal(weights)
    check(h)
    assert not h.note
    assert h.diagonal.max() / h.diagonal.min() <= WEIGHT_RANGE * 1.001
    assert h.diagonal.mean() == pytest.approx(1, rel=1e-5)
    assert np.linalg.eigvalsh(h.matrix.astype(np.float64)).min() > -1e-4
    assert np.abs(h.feedback).max() < 1e4


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.0, 2.0])
def test_matrix_and_feedback_are_those_of_the_definition(sigma: float) -> None:
    d = np.exp(np.random.default_rng(4).normal(0, 2 * sigma, 256))
    d = np.maximum(d, d.max() / WEIGHT_RANGE)
    h = from_diagonal(d)
    check(h)
    assert not h.note
    dense = R @ np.diag(d / d.mean()) @ R.T
    np.testing.assert_allclose(h.matrix, dense, atol=1e-5)
    np.testing.assert_allclose(h.diagonal, d / d.mean(), rtol=1e-5)
    upper = np.linalg.cholesky(R @ np.diag(d.mean() / d) @ R.T).T
    np.testing.assert_allclose(h.feedback, (upper / np.diag(upper)[:, None]).T, atol=2e-4, rtol=1e-3)


def test_errors_fed_back_cost_what_they_are_worth() -> None:
    """E(q) is a sum of squares: with e_j the error of column j against its moved target, Σ e_j² / U_jj²."""
    random = np.random.default_rng(5)
    d = np.exp(random.normal(0, 1.2, 256))
    h = from_diagonal(d)
    y, q = random.standard_normal((2, 256))
    factor = h.feedback.astype(np.float64)
    errors = np.linalg.solve(factor, y - q)  # y - q = factor · e
    upper = np.linalg.cholesky(R @ np.diag(d.mean() / d) @ R.T).T
    energy = np.square(errors / np.diag(upper)).sum()
    assert energy == pytest.approx((y - q) @ h.matrix.astype(np.float64) @ (y - q), rel=1e-3)


@given(st.integers(0, 2**32 - 1), st.floats(-200, 200))
def test_only_ratios_matter(seed: int, power: float) -> None:
    d = np.exp(np.random.default_rng(seed).normal(0, 1, 256))
    one, other = from_diagonal(d), from_diagonal(d * 2.0 ** round(power))
    np.testing.assert_array_equal(one.matrix, other.matrix)
    np.testing.assert_array_equal(one.feedback, other.feedback)


def test_equal_weights_are_the_identity() -> None:
    for h in (identity(), from_diagonal(np.full(256, 3.0))):
        check(h)
        np.testing.assert_allclose(h.matrix, np.eye(256), atol=1e-6)
        np.testing.assert_allclose(h.feedback, np.eye(256), atol=1e-6)
        np.testing.assert_allclose(h.diagonal, 1)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_cholesky_is_numpys(size: int) -> None:
    a = np.random.default_rng(size).standard_normal((size, size + 3))
    a = a @ a.T
    upper = a.copy()
    assert cholesky_upper(upper)
    np.testing.assert_allclose(np.triu(upper), np.linalg.cholesky(a).T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "a", [[[0.0]], [[-1.0]], [[np.nan]], [[1.0, 2.0], [2.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]]
)
def test_cholesky_says_when_there_is_none(a: list[list[float]]) -> None:
    assert not cholesky_upper(np.array(a))


def test_the_input_is_left_alone() -> None:
    d = np.exp(np.random.default_rng(0).normal(0, 1, 256))
    before = d.copy()
    from_diagonal(d)
    np.testing.assert_array_equal(d, before)
