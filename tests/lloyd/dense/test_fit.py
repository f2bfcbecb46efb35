"""A group of all rows under a dense H: as good as under the diagonal that H came from, gains, and rows left alone."""

from __future__ import annotations

import numpy as np
import pytest
from lanes_problem import heavy_rows, unequal_weights
from mq_quant.formats.blocks import MQ2_LLOYD, MQ4
from mq_quant.lloyd.constants import INDEPENDENT, SWEEPS
from mq_quant.lloyd.dense.fit import fit_dense
from mq_quant.lloyd.encode import ENCODED
from mq_quant.lloyd.group_fit import SIGNS, GroupFit, Rotated, expand, fit_group, initial_levels
from mq_quant.lloyd.hessian.group import GroupHessian, from_diagonal

FORMATS = [pytest.param(fmt, id=fmt.name) for fmt in ENCODED]
ROWS = 37


def dense(seed: int = 0) -> tuple[GroupHessian, GroupHessian]:
    """A Hessian of channel weights, and the same without its diagonal."""
    h = from_diagonal(unequal_weights(0.8, seed))
    return h, GroupHessian(h.matrix, h.feedback, np.empty(0, np.float32))


def decoded(fmt: Rotated, fit: GroupFit) -> np.ndarray:
    return np.take_along_axis(expand(fmt, fit.stored), fit.codes.astype(np.int64), 1).astype(np.float64)


def energy(rows: np.ndarray, fmt: Rotated, fit: GroupFit, h: GroupHessian) -> np.ndarray:
    e = rows - decoded(fmt, fit)
    return np.einsum("ri,ij,rj->r", e, h.matrix.astype(np.float64), e)


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_dense_way_is_as_good_as_the_diagonal(fmt: Rotated) -> None:
    """Not the same codes: sums are rounded in another order, and a tie broken otherwise moves what follows."""
    rows, (diagonal, without) = heavy_rows(100, seed=2), dense()
    one, other = (energy(rows, fmt, fit_group(rows, 0, fmt, h), diagonal) for h in (diagonal, without))
    assert one.sum() == pytest.approx(other.sum(), rel=5e-3)


@pytest.mark.parametrize("fmt", FORMATS)
def test_rounds_find_a_lower_minimum(fmt: Rotated) -> None:
    """On the whole, by more than 1 %, though not in every row."""
    rows, (diagonal, without) = heavy_rows(100), dense()
    one, more = (
        energy(rows, fmt, fit_group(rows, 0, fmt, without, shakes), diagonal)
        for shakes in (INDEPENDENT[-1:], INDEPENDENT)
    )
    assert more.sum() < 0.99 * one.sum() and (more < one * 1.5).all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_gains_are_the_inverse_slope(fmt: Rotated) -> None:
    rows, (_, h) = heavy_rows(ROWS, seed=1), dense()
    fit = fit_group(rows, 0, fmt, h)
    y, q, h64 = rows.astype(np.float64), decoded(fmt, fit), h.matrix.astype(np.float64)
    want = np.einsum("ri,ij,rj->r", y, h64, y) / np.einsum("ri,ij,rj->r", y, h64, q)
    np.testing.assert_allclose(fit.gains, want, rtol=2e-4)
    assert not fit_group(rows, 0, fmt, h, coupled=True).gains.size


@pytest.mark.parametrize("fmt", [MQ2_LLOYD, MQ4], ids=lambda f: f.name)
@pytest.mark.parametrize("count", [1, 15, 16, 17])
def test_no_row_beyond_the_last_is_read_or_written(fmt: Rotated, count: int) -> None:
    rows, (_, h) = heavy_rows(40, 768, seed=3), dense()
    initial = initial_levels(rows, 256, fmt, exact=False)
    want = None
    for padding in (0.0, 1e30):
        wide = rows.copy()
        wide[count:] = padding
        wide[:, :256] = wide[:, 512:] = padding
        params, codes = np.full_like(initial, -7), np.full((40, 256), 99, np.uint8)
        params[:count] = initial[:count]
        of = (h.matrix, h.feedback, SIGNS, np.array(INDEPENDENT), SWEEPS, fmt.levels)
        gains = np.zeros(40, np.float32)
        fit_dense(wide[:count], 256, *of, params[:count], codes[:count], gains[:count])
        assert (codes[count:] == 99).all() and (params[count:] == -7).all() and not gains[count:].any()
        assert codes[:count].max() < fmt.levels
        want = codes if want is None else want
        np.testing.assert_array_equal(codes, want)
