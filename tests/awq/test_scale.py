"""The scales: the published formula, its limits, and channels without energy; folds that the model undoes exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mq_quant.awq.scale import REFERENCE_ALPHA, down_fold, gate_up_scale

RANDOM = np.random.default_rng(41)
ENERGY = np.exp(RANDOM.normal(3, 2, 512))
ANY = hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(0, 1e300))


@given(ANY, st.floats(0, 2))
def test_any_energy_gives_a_scale_the_runtime_can_divide_by(energy: np.ndarray, alpha: float) -> None:
    s = gate_up_scale(energy, alpha)
    assert s.dtype == np.float16 and s.shape == energy.shape
    assert np.isfinite(s).all()
    assert (s >= np.float16(1e-2)).all() and (s <= np.float16(1e2)).all()


@given(ANY, st.floats(0, 4))
def test_any_energy_gives_a_bounded_fold(energy: np.ndarray, exponent: float) -> None:
    t = down_fold(energy, exponent)
    assert t.dtype == np.float32 and t.shape == energy.shape
    mantissa, _ = np.frexp(t)
    assert (mantissa == 0.5).all()
    assert (t >= 2.0**-8).all() and (t <= 2.0**8).all()


def test_the_formula() -> None:
    for alpha in (0.15, 0.5, REFERENCE_ALPHA):
        log_s = alpha / 2 * np.log(ENERGY)
        want = np.exp(log_s - log_s.mean())
        assert want.min() > 1e-2 and want.max() < 1e2
        np.testing.assert_array_equal(gate_up_scale(ENERGY, alpha), want.astype(np.float16))
    assert REFERENCE_ALPHA == 0.55


def test_loud_channels_are_scaled_up() -> None:
    s = gate_up_scale(ENERGY, 0.5).astype(np.float64)
    order = np.argsort(ENERGY)
    assert (np.diff(s[order]) >= 0).all() and s[order[-1]] > s[order[0]]
    t = down_fold(ENERGY, 0.5)
    assert (np.diff(t[order]) >= 0).all() and t[order[-1]] > t[order[0]]


def test_no_exponent_is_no_scale() -> None:
    assert (gate_up_scale(ENERGY, 0.0) == 1).all()
    assert (down_fold(ENERGY, 0.0) == 1).all()


def test_equal_energies_are_no_scale() -> None:
    assert (gate_up_scale(np.full(8, 7.0), 0.55) == 1).all()
    assert (gate_up_scale(np.zeros(8), 0.55) == 1).all()
    assert (down_fold(np.zeros(8), 1.0) == 1).all()


def test_only_ratios_of_energy_matter() -> None:
    np.testing.assert_allclose(
        gate_up_scale(ENERGY * 1e6, 0.5).astype(float), gate_up_scale(ENERGY, 0.5).astype(float), rtol=1e-3
    )
    np.testing.assert_array_equal(down_fold(ENERGY * 4.0**9, 1.0), down_fold(ENERGY, 1.0))


def test_a_silent_channel_counts_as_the_quietest() -> None:
    energy = np.array([0.0, 1.0, 4.0, 16.0])
    s = gate_up_scale(energy, 1.0)
    assert s[0] == s[1] < s[2] < s[3]


def test_limits() -> None:
    energy = np.array([1e-30, 1.0, 1e30])
    s = gate_up_scale(energy, 1.0)
    assert s.tolist() == [np.float16(1e-2), 1.0, 100.0]
    assert down_fold(energy, 1.0).tolist() == [2.0**-8, 1.0, 2.0**8]


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_a_fold_cancels_in_the_expert_to_the_last_bit(exponent: float) -> None:
    """down(silu(gate x) · up x) with rows of up divided and columns of down multiplied by powers of two."""
    width, inter = 64, 512
    w1, w3 = RANDOM.standard_normal((2, inter, width)).astype(np.float32)
    w2 = RANDOM.standard_normal((width, inter)).astype(np.float32)
    x = RANDOM.standard_normal(width).astype(np.float32)
    t = down_fold(ENERGY, exponent)
    assert len(np.unique(t)) > 3

    def products(up: np.ndarray, down: np.ndarray) -> np.ndarray:
        gate = (w1 @ x).astype(np.float64)
        hidden = (gate / (1 + np.exp(-gate))).astype(np.float32) * (up @ x)
        return down * hidden[None, :]

    np.testing.assert_array_equal(products(w3 / t[:, None], w2 * t[None, :]), products(w3, w2))
