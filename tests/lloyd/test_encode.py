"""Rows to bytes, every format by every fit: hostile groups, then quality, unbiased levels, and rows cut anywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hostile_rows import HOSTILE, IMPORTANCES, RANDOM
from lanes_problem import heavy_rows, unequal_weights
from mq_quant.formats.blocks import (
    BY_NAME,
    EXPERT_FORMATS,
    F16_FORMAT,
    F32_FORMAT,
    MQ2_LLOYD,
    MQ4,
    MQ4_LLOYD,
    Q8F16,
    AffineFormat,
    Format,
    LloydFormat,
)
from mq_quant.formats.errors import WeightError
from mq_quant.formats.fwht import rotate, unrotate
from mq_quant.lloyd.encode import ENCODED, Fit, encode_plain, encode_rotated, partial_gains
from mq_quant.lloyd.hessian.row import RowHessian, from_weights

GOLDEN = np.load(Path(__file__).parents[1] / "golden/encode_vectors.npz")
FITS: tuple[Fit, ...] = ("reference", "exact", "hessian")


def encode(
    rows: np.ndarray, fmt: Format, fit: Fit, hessian: RowHessian | None = None, gain: float = 1.0
) -> np.ndarray:
    if fit == "hessian" and hessian is None:
        hessian = from_weights(unequal_weights(0.8, width=rows.shape[1]))
    return encode_rotated(np.ascontiguousarray(rows, np.float32), fmt, fit, hessian, gain)


def codes_of(payload: np.ndarray, fmt: Format) -> np.ndarray:
    assert isinstance(fmt, LloydFormat | AffineFormat)
    return fmt.unpack(payload)[-1]


def assert_sound(payload: np.ndarray, fmt: Format, rows: np.ndarray) -> np.ndarray:
    """Every level finite, levels ascending, and nothing decoded further out than the values can be."""
    assert payload.dtype == np.uint8 and payload.shape == (fmt.nbytes(rows.size),)
    decoded = fmt.decode(payload).reshape(rows.shape)
    assert np.isfinite(decoded).all()
    if isinstance(fmt, LloydFormat):
        levels, codes = fmt.unpack(payload)
        assert np.isfinite(levels).all()
        assert (np.diff(levels.astype(np.float32), axis=1) >= 0).all()
    else:
        assert isinstance(fmt, AffineFormat)
        scale, zero, codes = fmt.unpack(payload)
        assert np.isfinite(scale).all() and np.isfinite(zero).all() and (scale > 0).all()
    assert codes.max(initial=0) < fmt.levels
    if rows.size:
        assert np.abs(decoded).max() <= 2.5 * np.abs(rows).max() + 2.0**-24
    return decoded


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("fmt", ENCODED, ids=lambda f: f.name)
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_groups_give_finite_ascending_levels(kind: str, fmt: Format, fit: Fit) -> None:
    rows = HOSTILE[kind].astype(np.float32)
    for gain in (1, 0.5, 0):
        decoded = assert_sound(encode(rows, fmt, fit, gain=gain), fmt, rows)
        if kind in ("zero", "minus zero"):
            assert not decoded.any()
        if kind == "constant":
            np.testing.assert_allclose(decoded, rows, rtol=2e-3)


@pytest.mark.parametrize("fmt", ENCODED, ids=lambda f: f.name)
@pytest.mark.parametrize("kind", IMPORTANCES)
def test_hostile_importances_give_finite_ascending_levels(kind: str, fmt: Format) -> None:
    hessian = from_weights(IMPORTANCES[kind])
    for rows in (heavy_rows(18), np.float32(HOSTILE["one huge outlier"]), np.float32(HOSTILE["constant"])):
        assert_sound(encode(rows, fmt, "hessian", hessian), fmt, rows)
    assert bool(hessian.notes) == (kind in ("zero", "not finite"))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("fmt", [MQ2_LLOYD, MQ4], ids=lambda f: f.name)
def test_hostile_groups_do_not_touch_their_neighbours(fmt: Format, fit: Fit) -> None:
    """In rows of the same matrix, and in the next group of the same row."""
    rows = heavy_rows(16, 512)
    hostile = rows.copy()
    hostile[5, :256], hostile[7, 256:] = 1e20, 0
    want, got = (encode(r, fmt, fit).reshape(16, 2, -1) for r in (rows, hostile))
    others = np.ones((16, 2), bool)
    others[5, 0] = others[7, 1] = False
    np.testing.assert_array_equal(got[others], want[others])


@pytest.mark.parametrize("fmt", [F16_FORMAT, F32_FORMAT, Q8F16], ids=lambda f: f.name)
def test_plain_formats_are_not_rotated_ones(fmt: Format) -> None:
    with pytest.raises(TypeError, match=fmt.name):
        encode_rotated(np.zeros((1, 256), np.float32), fmt, "exact")
    with pytest.raises(TypeError, match="MQ4"):
        encode_plain(np.zeros(256, np.float32), MQ4, "exact")


def test_a_format_that_the_engine_runs_in_no_expert_is_only_decoded() -> None:
    assert {f.quant_type for f in ENCODED} == EXPERT_FORMATS
    with pytest.raises(TypeError, match="MQ4-Lloyd is only decoded"):
        encode_rotated(np.zeros((1, 256), np.float32), MQ4_LLOYD, "exact")


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-8, 1.0, 3e4, 1e6, 5e6, 1e30])
@pytest.mark.parametrize("fit", FITS)
def test_q8_at_any_size(size: float, fit: Fit) -> None:
    values = (size * RANDOM.standard_normal((4, 64))).astype(np.float32)
    scale, codes = Q8F16.unpack(encode_plain(values, Q8F16, fit))
    assert np.isfinite(scale).all() and (scale >= 0).all()
    assert codes.min(initial=0) >= -127
    if 1e-8 < size < 1e6:
        decoded = Q8F16.decode(encode_plain(values, Q8F16, fit)).reshape(4, 64)
        assert np.abs(decoded - values).max() <= np.abs(values).max() * 0.01


def test_q8_with_a_rounded_scale_is_better_than_the_reference() -> None:
    values = RANDOM.standard_normal((200, 256)).astype(np.float32)
    lost = {
        f: np.square(Q8F16.decode(encode_plain(values, Q8F16, f)).reshape(200, 256) - values).sum()
        for f in FITS
    }
    assert lost["exact"] < lost["reference"]
    assert lost["hessian"] == lost["exact"]


def test_floats_are_stored_as_they_are() -> None:
    values = RANDOM.standard_normal((3, 5)).astype(np.float32)
    for fit in FITS:
        assert encode_plain(values, F32_FORMAT, fit).tobytes() == values.tobytes()
        assert encode_plain(values, F16_FORMAT, fit).tobytes() == values.astype(np.float16).tobytes()
        with pytest.raises(WeightError):
            encode_plain(values * 1e6, F16_FORMAT, fit)


def plain_error(rows: np.ndarray, fmt: Format, fit: Fit) -> float:
    error = fmt.decode(encode(rows, fmt, fit)).reshape(rows.shape).astype(np.float64) - rows
    return float(np.square(error).sum())


@pytest.mark.parametrize(("name", "decibels"), [("MQ2-Lloyd", 9.4), ("MQ3-Lloyd", 15.0), ("MQ4", 20)])
def test_exact_fits_reach_what_the_format_can_hold(name: str, decibels: float) -> None:
    rows = rotate(np.random.default_rng(1).standard_normal((64, 512)).astype(np.float32))
    fmt = BY_NAME[name]
    exact, reference = plain_error(rows, fmt, "exact"), plain_error(rows, fmt, "reference")
    assert 10 * np.log10(np.square(rows.astype(np.float64)).sum() / exact) >= decibels
    assert exact < reference


@pytest.mark.parametrize("key", ["mq2l:MQ2-Lloyd", "mq3l:MQ3-Lloyd", "mq4:MQ4", "mq6:MQ6"])
def test_exact_is_no_worse_than_golden_block_by_block(key: str) -> None:
    stored, name = key.split(":")
    fmt, rows = BY_NAME[name], GOLDEN["rotated"]
    fits = np.abs(rows).max(axis=1) < 6e4
    ours, theirs = (
        np.square(fmt.decode(p).astype(np.float64) - rows).sum(axis=1)[fits]
        for p in (encode(rows, fmt, "exact"), GOLDEN[stored])
    )
    precision = (
        2.0**-11 if isinstance(fmt, LloydFormat) else 2.0**-17
    )  # of stored levels; of least squares in f32
    slack = 256 * np.square(np.abs(rows[fits]).max(axis=1) * precision + 2.0**-25)
    assert (ours <= theirs * 1.0001 + slack).all()


@pytest.mark.parametrize("fmt", ENCODED, ids=lambda f: f.name)
def test_exact_codes_are_the_nearest_of_the_stored_levels(fmt: Format) -> None:
    """Far from zero, where f16 is coarse, levels before and after rounding have different midpoints."""
    rows = np.concatenate([heavy_rows(20), 40 + heavy_rows(20)])
    payload = encode(rows, fmt, "exact")
    if isinstance(fmt, LloydFormat):
        levels = fmt.unpack(payload)[0].astype(np.float64)
    else:
        assert isinstance(fmt, AffineFormat)
        scale, zero, _ = fmt.unpack(payload)
        levels = zero[:, None] + scale[:, None] * np.arange(fmt.levels, dtype=np.float64)
    lost = np.abs(fmt.decode(payload) - rows.astype(np.float64))
    possible = np.abs(rows[:, :, None] - levels[:, None, :]).min(axis=2)
    assert (lost <= possible + 1e-5).all()


def output_error(rows: np.ndarray, payload: np.ndarray, fmt: Format, weights: np.ndarray) -> np.ndarray:
    """Σ_j d_j (w - ŵ)_j² per row in the source's basis, where no rotation and no Hessian appear."""
    error = unrotate(fmt.decode(payload).reshape(rows.shape) - rows)
    return (np.square(error.astype(np.float64)) * weights).sum(axis=1)


@pytest.mark.parametrize("sigma", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("fmt", ENCODED, ids=lambda f: f.name)
def test_the_hessian_fit_loses_less_of_the_output(fmt: Format, sigma: float) -> None:
    rows, weights = heavy_rows(48, 512, seed=2), unequal_weights(sigma, width=512)
    found = {
        fit: output_error(rows, encode(rows, fmt, fit, from_weights(weights), gain=0), fmt, weights)
        for fit in FITS
    }
    assert found["hessian"].sum() < {0.3: 0.97, 0.6: 0.85, 1.0: 0.66}[sigma] * found["exact"].sum()
    assert (found["hessian"] < found["exact"]).mean() > 0.95
    assert found["hessian"].sum() < found["reference"].sum()


def slope(rows: np.ndarray, payload: np.ndarray, fmt: Format, weights: np.ndarray) -> np.ndarray:
    """(yᵀH ŷ)/(yᵀH y) of every group, f64."""
    y = rows.astype(np.float64).reshape(-1, 256)
    d = np.tile(weights.reshape(-1, 256), (len(rows), 1))
    turned, decoded = (unrotate(v.astype(np.float32)).astype(np.float64) for v in (y, fmt.decode(payload)))
    return (turned * decoded * d).sum(axis=1) / (turned * turned * d).sum(axis=1)


@pytest.mark.parametrize("fmt", ENCODED, ids=lambda f: f.name)
def test_the_gain_makes_levels_unbiased_and_moves_no_code(fmt: Format) -> None:
    rows, weights = heavy_rows(33, 512, seed=3), unequal_weights(0.7, width=512)
    hessian = from_weights(weights)
    plain, half, unbiased = (encode(rows, fmt, "hessian", hessian, gain) for gain in (0, 0.5, 1))
    np.testing.assert_array_equal(codes_of(plain, fmt), codes_of(unbiased, fmt))
    np.testing.assert_array_equal(codes_of(plain, fmt), codes_of(half, fmt))
    tolerance = 1e-3 if isinstance(fmt, LloydFormat) else 1e-4
    np.testing.assert_allclose(slope(rows, unbiased, fmt, weights), 1, atol=tolerance)
    before = slope(rows, plain, fmt, weights)
    lost = 1 - before
    np.testing.assert_allclose(slope(rows, half, fmt, weights), before / (1 - lost / 2), atol=tolerance)
    assert before.mean() < 1 - 0.3 * 10 ** (-{4: 0.95, 8: 1.5, 16: 2.1, 64: 3.2}[fmt.levels])


@pytest.mark.parametrize("share", [0.0, 0.0625, 0.5, 1.0])
def test_a_partial_gain_is_the_best_factor_where_a_share_of_the_noise_counts(share: float) -> None:
    """ŷ = (1 - D) y + n with E[n²] = D (1 - D) E[y²]; the error is the bias and that share of the noise."""
    lost = np.array([0.01, 0.1, 0.4])
    found = partial_gains((1 / (1 - lost)).astype(np.float32), 1 - share).astype(np.float64)

    def error(c: np.ndarray) -> np.ndarray:
        return (1 - c * (1 - lost)) ** 2 + share * c**2 * lost * (1 - lost)

    for other in (0.99, 1.01):
        assert (error(found) < error(other * found)).all()


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("fmt", ENCODED, ids=lambda f: f.name)
def test_rows_give_the_same_bytes_in_any_company(fmt: Format, fit: Fit) -> None:
    rows = heavy_rows(37, 512, seed=4)
    hessian = from_weights(unequal_weights(0.6, width=512))
    want = encode(rows, fmt, fit, hessian).reshape(37, -1)
    for cuts in ((1, 2, 3), (16, 32), (15, 17, 33), (36,)):
        parts = [encode(part, fmt, fit, hessian) for part in np.split(rows, cuts)]
        np.testing.assert_array_equal(np.concatenate(parts).reshape(37, -1), want)
    np.testing.assert_array_equal(encode(rows[::-1], fmt, fit, hessian).reshape(37, -1), want[::-1])


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("fmt", ENCODED, ids=lambda f: f.name)
def test_groups_are_encoded_as_rows_of_their_own(fmt: Format, fit: Fit) -> None:
    rows, weights = heavy_rows(5, 768, seed=5), unequal_weights(0.6, width=768)
    want = encode(rows, fmt, fit, from_weights(weights)).reshape(5, 3, -1)
    for g in range(3):
        part = slice(256 * g, 256 * (g + 1))
        got = encode(rows[:, part], fmt, fit, from_weights(weights[part]))
        np.testing.assert_array_equal(got.reshape(5, -1), want[:, g])


@pytest.mark.parametrize("fit", FITS)
def test_rows_are_left_alone(fit: Fit) -> None:
    rows = heavy_rows(3)
    before = rows.copy()
    for fmt in ENCODED:
        encode(rows, fmt, fit)
    np.testing.assert_array_equal(rows, before)


def test_without_a_hessian_the_hessian_fit_is_exact() -> None:
    rows = heavy_rows(3)
    for fmt in ENCODED:
        np.testing.assert_array_equal(
            encode_rotated(rows, fmt, "hessian"), encode_rotated(rows, fmt, "exact")
        )
