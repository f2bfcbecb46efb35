"""Whole rows again: pulls by their definition, rows whose cost never rises, unbiased levels, hostile moments."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from lanes_problem import heavy_rows
from mq_quant.formats.blocks import MQ2_LLOYD, MQ4, AffineFormat, LloydFormat
from mq_quant.formats.fwht import rotate
from mq_quant.lloyd import again
from mq_quant.lloyd.again import error_tiles, fit_group_again, pull_tile
from mq_quant.lloyd.constants import PASSES, SWEEPS, WHOLE
from mq_quant.lloyd.encode import ENCODED, encode_rotated
from mq_quant.lloyd.group_fit import SIGNS, GroupFit, Rotated, expand
from mq_quant.lloyd.hessian.row import Coupling, RowHessian, from_moment
from mq_quant.lloyd.whole_row import fit_whole_rows

ROWS = 21
FORMATS = [pytest.param(fmt, id=fmt.name) for fmt in ENCODED]


@cache
def moment(width: int) -> np.ndarray:
    """A damped second moment f64 [K, K] whose spectrum falls as a power, in the stored basis."""
    random = np.random.default_rng(width)
    basis = np.linalg.qr(random.standard_normal((width, width)))[0] * np.arange(1, width + 1) ** -0.5
    basis *= np.exp(random.normal(0, 0.5, (width, 1)))
    turned = rotate(np.ascontiguousarray(basis.T).astype(np.float32)).astype(np.float64)
    m: np.ndarray = turned.T @ turned
    return 0.95 * m + 0.05 * np.trace(m) / width * np.eye(width)


@cache
def hessian(width: int) -> RowHessian:
    return from_moment(moment(width))


def coupling(width: int) -> Coupling:
    found = hessian(width).coupling
    assert found is not None
    return found


def costs(rows: np.ndarray, fmt: Rotated, h: np.ndarray, given: RowHessian) -> np.ndarray:
    """eᵀ h e of every row without gain, f64."""
    decoded = fmt.decode(encode_rotated(rows, fmt, "hessian", given, 0.0)).reshape(rows.shape)
    e = rows.astype(np.float64) - decoded
    return np.asarray(((e @ h) * e).sum(axis=1))


def test_every_pass_has_shakes_of_its_own() -> None:
    assert 1 <= PASSES <= len(WHOLE)


@pytest.mark.parametrize("width", [512, 768, 1536])
@pytest.mark.parametrize("fmt", FORMATS)
def test_no_row_costs_more_after_a_pass(monkeypatch: pytest.MonkeyPatch, fmt: Rotated, width: int) -> None:
    """And the rows together cost less, by each of three passes."""
    rows, h = heavy_rows(ROWS, width, seed=width), moment(width)
    before = None
    for passes in range(4):
        monkeypatch.setattr(again, "PASSES", passes)
        after = costs(rows, fmt, h, hessian(width))
        if before is not None:
            assert (after <= before * (1 + 1e-5)).all()
            assert after.sum() < before.sum() * (0.998 if passes == 1 else 1)
        before = after


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_gain_leaves_outputs_unbiased(fmt: Rotated) -> None:
    """Of rows whose groups answer each other, yᵀHŷ is yᵀHy in the mean; without the gain it is less."""
    rows, h = heavy_rows(64, 768, seed=9), moment(768)
    y = rows.astype(np.float64)

    def slope(gain: float) -> float:
        decoded = fmt.decode(encode_rotated(rows, fmt, "hessian", hessian(768), gain)).reshape(rows.shape)
        return float(((y @ h) * decoded).sum() / ((y @ h) * y).sum())

    assert slope(1.0) == pytest.approx(1, abs=4e-3)
    assert slope(0.0) < slope(1.0)


def tiles_of(errors: np.ndarray) -> np.ndarray:
    """Errors f32 [R, 256 · G] as tiles f32 [G, tiles, 256, 16]."""
    count, width = errors.shape
    tiles = np.zeros((width // 256, -(-count // 16), 256, 16), np.float32)
    for r, row in enumerate(errors):
        tiles[:, r // 16, :, r % 16] = row.reshape(-1, 256)
    return tiles


def test_pulls_are_those_of_the_definition() -> None:
    width, random = 768, np.random.default_rng(1)
    errors = random.standard_normal((ROWS, width)).astype(np.float32)
    tiles, h = tiles_of(errors), coupling(width).lines.transpose(0, 2, 1, 3).reshape(3, 256, width)
    for g in range(3):
        want = errors @ h[g].astype(np.float64).T
        for tile in range(2):
            found = np.empty((256, 16), np.float32)
            pull_tile(tiles, tile, coupling(width).lines[g], found)
            got, left = found.T[: ROWS - 16 * tile], want[16 * tile : 16 * tile + 16]
            np.testing.assert_allclose(got, left, atol=1e-3 * np.abs(want).max())


@pytest.mark.parametrize("count", [1, 15, 16, 17])
def test_errors_are_what_the_decoder_lacks(count: int) -> None:
    random = np.random.default_rng(count)
    rows = random.standard_normal((count, 768)).astype(np.float32)
    levels = np.sort(random.standard_normal((count, 4)).astype(np.float32), axis=1)
    codes = random.integers(0, 4, (count, 256)).astype(np.uint8)
    found = np.full((-(-count // 16), 256, 16), np.nan, np.float32)
    error_tiles(rows, 256, levels, codes, found)
    got = found.transpose(0, 2, 1).reshape(-1, 256)
    np.testing.assert_array_equal(
        got[:count], rows[:, 256:512] - np.take_along_axis(levels, codes.astype(np.int64), 1)
    )
    np.testing.assert_array_equal(got[count:], 0)


def test_what_does_not_cost_less_is_put_back() -> None:
    """Where the errors are not numbers, or nothing is gained, the old codes and levels stand; nothing costs more."""
    fmt, h = MQ2_LLOYD, moment(512)
    rows = heavy_rows(16, 512)
    fits = fit_whole_rows(rows, fmt, hessian(512))

    def tiles(found: Sequence[GroupFit]) -> np.ndarray:
        out = np.empty((2, 1, 256, 16), np.float32)
        for g, fit in enumerate(found):
            error_tiles(rows, 256 * g, expand(fmt, fit.stored), fit.codes, out[g])
        return out

    def cost(errors: np.ndarray) -> np.ndarray:
        e = errors[:, 0].transpose(2, 0, 1).reshape(16, 512).astype(np.float64)
        return np.asarray(((e @ h) * e).sum(axis=1))

    errors = tiles(fits)
    before, broken = cost(errors), errors.copy()
    broken[1, 0, 7, 3] = np.nan
    stored, codes, gains = fits[0].stored.copy(), fits[0].codes.copy(), np.empty(16, np.float32)
    of = (coupling(512).lines[0], coupling(512).inverses[0])
    fit_group_again(broken, 0, *of, SIGNS, 0, SWEEPS, 4, stored, codes, gains)
    np.testing.assert_array_equal(codes[3], fits[0].codes[3])
    np.testing.assert_array_equal(stored[3], fits[0].stored[3])
    assert gains[3] == 1 and np.isfinite(gains).all()
    after = cost(tiles([GroupFit(stored, codes, gains), fits[1]]))
    assert (after <= before * (1 + 1e-5)).all()
    changed = (codes != fits[0].codes).any(axis=1) | (stored != fits[0].stored).any(axis=1)
    assert changed.any() and (after[changed] < before[changed]).all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_one_group_and_independent_groups_have_no_pass(monkeypatch: pytest.MonkeyPatch, fmt: Rotated) -> None:
    """A single group has no other, and dense groups that do not answer each other have nothing to answer again."""
    alone = hessian(256)
    assert alone.coupling is None
    apart = RowHessian(factors=hessian(512).factors)
    rows = heavy_rows(ROWS, 512, seed=2)
    want = [encode_rotated(rows[:, :256], fmt, "hessian", alone), encode_rotated(rows, fmt, "hessian", apart)]
    monkeypatch.setattr(again, "PASSES", 3)
    monkeypatch.setattr(again, "fit_again", None)
    for rows_of, given, payload in ((rows[:, :256], alone, want[0]), (rows, apart, want[1])):
        np.testing.assert_array_equal(encode_rotated(rows_of, fmt, "hessian", given), payload)


DEGENERATE = {
    "rank one": np.ones((768, 768)),
    "one dead group": np.diag(np.where(np.arange(768) // 256 == 1, 0.0, 1.0)),
    "uncoupled": np.eye(768),
    "nearly singular": np.ones((768, 768)) + 1e-9 * np.eye(768),
}


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_moments_give_sound_levels(kind: str, fmt: Rotated) -> None:
    found = from_moment(DEGENERATE[kind])
    rows = heavy_rows(ROWS, 768, seed=3)
    rows[4], rows[5, :300], rows[6] = 0, 0, 1e15
    payload = encode_rotated(rows, fmt, "hessian", found)
    assert np.isfinite(fmt.decode(payload)).all()
    if isinstance(fmt, LloydFormat):
        assert (np.diff(fmt.unpack(payload)[0].astype(np.float32), axis=1) >= 0).all()
    else:
        assert isinstance(fmt, AffineFormat) and (fmt.unpack(payload)[0] >= 0).all()


@pytest.mark.parametrize("fmt", [MQ2_LLOYD, MQ4], ids=lambda f: f.name)
def test_rows_give_the_same_bytes_in_any_company(fmt: Rotated) -> None:
    rows = heavy_rows(37, 768, seed=4)
    before = rows.copy()
    want = encode_rotated(rows, fmt, "hessian", hessian(768)).reshape(37, -1)
    np.testing.assert_array_equal(rows, before)
    for cuts in ((1, 2, 3), (16, 32), (15, 17, 33), (36,)):
        parts = [encode_rotated(part, fmt, "hessian", hessian(768)) for part in np.split(rows, cuts)]
        np.testing.assert_array_equal(np.concatenate(parts).reshape(37, -1), want)
    turned = encode_rotated(rows[::-1].copy(), fmt, "hessian", hessian(768))
    np.testing.assert_array_equal(turned.reshape(37, -1), want[::-1])
