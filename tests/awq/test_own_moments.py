"""The layer's share in an expert's moment: all without tokens, little with many, and less the more they differ."""

from __future__ import annotations

import numpy as np
import pytest
from mq_quant.awq.importance import Importance
from mq_quant.awq.own_moments import layer_share, mixed, own_moment, whitening

WIDTH = 48


def spectrum(rng: np.random.Generator) -> np.ndarray:
    """A moment f64 [48, 48] whose eigenvalues fall from 1 to 0.01."""
    basis = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]
    return (basis * np.geomspace(1, 0.01, WIDTH)) @ basis.T


def draw(moment: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Rows f32 [count, 48] of that second moment."""
    return (rng.standard_normal((count, WIDTH)) @ np.linalg.cholesky(moment).T).astype(np.float32)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(9)


@pytest.mark.parametrize("count", [0, 1])
def test_an_expert_without_tokens_takes_the_layers_moment(count: int, rng: np.random.Generator) -> None:
    layer = spectrum(rng)
    white = whitening(layer)
    assert white is not None
    shared = Importance(np.diag(layer).copy(), layer, 1e6)
    got = mixed(draw(layer, count, rng), shared, white)
    assert got.moment is not None
    np.testing.assert_array_equal(got.moment, layer)
    assert got.count == count


def test_a_moment_of_the_layers_own_kind_is_never_trusted_much(rng: np.random.Generator) -> None:
    layer = spectrum(rng)
    white = whitening(layer)
    assert white is not None
    for count in (20, 200, 2000):
        assert layer_share(draw(layer, count, rng), white) > 0.8


def test_the_share_falls_with_tokens_where_the_expert_differs(rng: np.random.Generator) -> None:
    layer, own = spectrum(rng), spectrum(rng)
    white = whitening(layer)
    assert white is not None
    shares = [layer_share(draw(own, count, rng), white) for count in (16, 64, 256, 4096)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.02 < shares[0]


def test_the_mixture_is_nearer_to_the_truth_than_both_its_parts(rng: np.random.Generator) -> None:
    layer = spectrum(rng)
    own = 0.5 * layer + 0.5 * spectrum(rng)
    white = whitening(layer)
    assert white is not None
    inverse = np.linalg.inv(np.linalg.cholesky(layer))

    def distance(moment: np.ndarray) -> float:
        return float(np.square(inverse @ (moment - own) @ inverse.T).sum())

    rows = draw(own, 150, rng)
    got = mixed(rows, Importance(np.diag(layer).copy(), layer, 1e6), white).moment
    assert got is not None
    assert distance(got) < min(distance(own_moment(rows)), distance(layer))


def test_a_layer_without_energy_has_no_whitening_and_stays_as_it_is(rng: np.random.Generator) -> None:
    assert whitening(np.zeros((4, 4))) is None
    assert whitening(np.full((4, 4), np.nan)) is None
    shared = Importance(np.zeros(4), np.zeros((4, 4)), 10)
    got = mixed(np.ones((5, 4), np.float32), shared, None)
    np.testing.assert_array_equal(got.moment, shared.moment)


def test_an_own_moment_is_exactly_symmetric(rng: np.random.Generator) -> None:
    rows = draw(spectrum(rng), 5000, rng)
    got = own_moment(rows)
    np.testing.assert_array_equal(got, got.T)
    np.testing.assert_allclose(got, rows.T.astype(np.float64) @ rows / len(rows), rtol=1e-4, atol=1e-5)


def test_rows_that_all_point_one_way_are_told_from_the_layer(rng: np.random.Generator) -> None:
    layer = spectrum(rng)
    white = whitening(layer)
    assert white is not None
    same = np.tile(draw(layer, 1, rng), (500, 1))
    assert layer_share(same, white) < 0.01
