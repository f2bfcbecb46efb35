"""Importances: damping, tempering, scales, and the moment in the stored basis."""

from __future__ import annotations

import numpy as np
import pytest
from mq_quant.awq.importance import DAMPING, TEMPER, Importance
from rotation import matrix


def energies(experts: int = 4, width: int = 256, seed: int = 0) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(0, 1.5, (experts, width))).astype(np.float32)


def test_damping_lifts_zeros_and_keeps_the_mean() -> None:
    d = np.where(np.arange(256) % 2, 4.0, 0.0)
    weights = Importance(d).channel_weights(temper=1.0)
    assert weights.mean() == pytest.approx(d.mean())
    assert weights.min() == pytest.approx(DAMPING * d.mean())
    np.testing.assert_allclose(Importance(d).channel_weights(damping=0.0, temper=1.0), d)


def test_tempering_brings_energies_closer_and_leaves_zeros_and_a_full_moment_alone() -> None:
    d = np.where(np.arange(256) % 3, np.geomspace(1e-6, 1e6, 256), 0.0)
    weights = Importance(d).channel_weights(damping=0.0)
    np.testing.assert_allclose(weights, d**TEMPER)
    assert 0 < TEMPER < 1 and (weights[d == 0] == 0).all()
    moment = np.diag(d) + 0.1
    plain = Importance(np.diag(moment).copy(), moment).rotated_moment(damping=0.0)
    assert np.trace(plain) == pytest.approx(np.trace(moment))


def test_weights_see_the_input_divided_by_the_scale() -> None:
    d = energies(1)[0].astype(np.float64)
    scale = np.float32(np.linspace(0.5, 2, 256))
    want = Importance(d).channel_weights() / scale.astype(np.float64) ** 2
    np.testing.assert_allclose(Importance(d).channel_weights(scale), want)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_rotated_moment_is_that_of_rotated_inputs(scaled: bool) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((600, 16)) @ random.standard_normal((16, 512)) + random.standard_normal(
        (600, 512)
    )
    moment = x.T @ x / len(x)
    scale = random.uniform(0.5, 2, 512).astype(np.float32) if scaled else None
    seen = x if scale is None else x / scale
    r = np.kron(np.eye(2), matrix())
    turned = seen @ r.T
    got = Importance(np.diag(moment).copy(), moment).rotated_moment(scale, damping=0.0)
    np.testing.assert_allclose(got, turned.T @ turned / len(x), atol=1e-9 * np.abs(got).max())
    damped = Importance(np.diag(moment).copy(), moment).rotated_moment(scale)
    inverse = np.ones(512) if scale is None else 1.0 / scale.astype(np.float64)
    extra = DAMPING * np.diag(moment).mean() * (r * inverse**2) @ r.T
    np.testing.assert_allclose(damped, (1 - DAMPING) * got + extra, atol=1e-9 * np.abs(got).max())


def test_a_moment_of_nothing_but_its_diagonal_is_the_diagonal_importance() -> None:
    d = energies(1, 512)[0].astype(np.float64)
    scale = np.float32(np.geomspace(0.3, 3, 512))
    got = Importance(d).rotated_moment(scale)
    r = np.kron(np.eye(2), matrix())
    want = (r * Importance(d).channel_weights(scale)) @ r.T
    np.testing.assert_allclose(got, want, atol=1e-9 * np.abs(want).max())
    want = (r * Importance(d).channel_weights(scale, temper=1.0)) @ r.T
    np.testing.assert_allclose(
        Importance(d, np.diag(d)).rotated_moment(scale), want, atol=1e-9 * np.abs(want).max()
    )


def test_inputs_are_left_alone() -> None:
    moment = np.eye(256)
    Importance(np.ones(256), moment).rotated_moment(np.full(256, 2, np.float32))
    np.testing.assert_array_equal(moment, np.eye(256))


def test_a_moment_is_turned_where_it_lies() -> None:
    random = np.random.default_rng(3)
    x = random.standard_normal((700, 512))
    moment, scale = x.T @ x / len(x), np.float32(np.geomspace(0.3, 3, 512))
    want = Importance(np.diag(moment).copy(), moment).rotated_moment(scale)
    room = np.full(512 * 512 + 7, np.nan)
    lying = room[: 512 * 512].reshape(512, 512)
    lying[:] = moment
    got = Importance(np.diag(moment).copy(), lying).rotated_moment(scale, room=room)
    assert got.base is room and np.isnan(room[-7:]).all()
    np.testing.assert_array_equal(got, want)
