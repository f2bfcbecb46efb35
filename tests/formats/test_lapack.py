"""Factors in place, against their definition, and what cannot be factored."""

from __future__ import annotations

import numpy as np
import pytest
from mq_quant.formats.lapack import add_products, cholesky, divide, invert_lower


def positive(size: int) -> np.ndarray:
    inputs = np.random.default_rng(size).standard_normal((size, size))
    out: np.ndarray = inputs @ inputs.T / size + np.eye(size)
    return out


@pytest.mark.parametrize("size", [1, 2, 5, 256, 700])
def test_the_lower_triangle_becomes_the_factor_and_then_its_inverse(size: int) -> None:
    given = positive(size)
    a = given.copy()
    assert cholesky(a)
    factor = np.tril(a)
    np.testing.assert_allclose(factor @ factor.T, given, atol=1e-12 * size)
    assert invert_lower(a)
    np.testing.assert_allclose(np.tril(a) @ factor, np.eye(size), atol=1e-12 * size)
    np.testing.assert_array_equal(np.triu(a, 1), np.triu(given, 1))


def test_only_the_lower_triangle_is_read() -> None:
    given = positive(64)
    spoilt = np.tril(given) + np.triu(np.full((64, 64), np.nan), 1)
    assert cholesky(given) and cholesky(spoilt)
    np.testing.assert_array_equal(np.tril(spoilt), np.tril(given))


@pytest.mark.parametrize("bad", [np.zeros((4, 4)), -np.eye(4), np.diag([1.0, 1.0, -1.0, 1.0])])
def test_what_is_not_positive_definite_has_no_factor(bad: np.ndarray) -> None:
    assert not cholesky(bad.copy())


def test_a_triangle_with_a_zero_on_its_diagonal_has_no_inverse() -> None:
    assert not invert_lower(np.diag([1.0, 0.0, 1.0]))


@pytest.mark.parametrize(
    "wrong",
    [np.eye(4, dtype=np.float16), np.eye(8)[::2, ::2], np.ones((2, 3)), np.asfortranarray(positive(3))],
)
def test_memory_that_lapack_would_misread_is_refused(wrong: np.ndarray) -> None:
    for routine in (cholesky, invert_lower):
        with pytest.raises(AssertionError):
            routine(wrong)


def test_a_factor_is_made_in_f64_only() -> None:
    with pytest.raises(AssertionError):
        cholesky(np.eye(4, dtype=np.float32))  # type: ignore[arg-type]


@pytest.mark.parametrize(("count", "width"), [(0, 4), (1, 1), (70, 33), (500, 256)])
def test_products_are_added_to_the_lower_triangle(count: int, width: int) -> None:
    random = np.random.default_rng(width)
    rows, given = (random.standard_normal((n, width), np.float32) for n in (count, width))
    out = given.copy()
    add_products(rows, out)
    want = given + rows.T.astype(np.float64) @ rows
    np.testing.assert_allclose(np.tril(out), np.tril(want), atol=1e-3)
    np.testing.assert_array_equal(np.triu(out, 1), np.triu(given, 1))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("count", "width"), [(0, 4), (1, 1), (70, 33), (5, 256)])
def test_rows_are_divided_by_the_factor(count: int, width: int, transposed: bool) -> None:
    rows = np.random.default_rng(width).standard_normal((count, width), np.float32)
    lower = np.linalg.cholesky(positive(width)).astype(np.float32)
    spoilt = lower + np.triu(np.full((width, width), np.nan, np.float32), 1)
    got = rows.copy()
    divide(got, spoilt, transposed)
    np.testing.assert_allclose(got @ (lower if transposed else lower.T), rows, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "square"),
    [
        (np.ones((3, 4)), np.eye(4, dtype=np.float32)),
        (np.ones((3, 4), np.float32), np.eye(4)),
        (np.ones((3, 5), np.float32), np.eye(4, dtype=np.float32)),
        (np.ones((4, 6), np.float32)[:, ::2], np.eye(3, dtype=np.float32)),
    ],
)
def test_rows_that_blas_would_misread_are_refused(rows: np.ndarray, square: np.ndarray) -> None:
    for routine in (add_products, divide):
        with pytest.raises(AssertionError):
            routine(rows, square)
