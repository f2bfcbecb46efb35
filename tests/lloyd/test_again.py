"""Whole rows again: targets by their definition, rows whose cost never rises, unbiased levels, hostile moments."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from lanes_problem import EMPTY, heavy_rows
from mq_quant.formats.blocks import MQ2_LLOYD, MQ4, AffineFormat, LloydFormat
from mq_quant.formats.fwht import SIGNS2, rotate
from mq_quant.lloyd import again
from mq_quant.lloyd.again import error_tiles, improve_tiles, keep_better, target_tiles
from mq_quant.lloyd.constants import PASSES, WHOLE
from mq_quant.lloyd.encode import ENCODED, encode_rotated
from mq_quant.lloyd.group import Problem
from mq_quant.lloyd.group_fit import SIGNS, Rotated, expand
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


def test_targets_are_those_of_the_definition() -> None:
    width, random = 768, np.random.default_rng(1)
    h = moment(width)
    rows = heavy_rows(ROWS, width)
    errors = random.standard_normal((ROWS, width)).astype(np.float32)
    tiles = np.zeros((3, 2, 256, 16), np.float32)
    for g in range(3):
        for r in range(ROWS):
            tiles[g, r // 16, :, r % 16] = errors[r, 256 * g : 256 * (g + 1)]
    for g in range(3):
        part = slice(256 * g, 256 * (g + 1))
        others = errors.astype(np.float64)
        others[:, part] = 0
        want = rows[:, part] + np.linalg.solve(h[part, part], h[part] @ others.T).T
        found = np.empty((2, 256, 16), np.float32)
        target_tiles(rows, 256 * g, tiles, g, coupling(width).pulls[g], found)
        got = found.transpose(0, 2, 1).reshape(32, 256)
        np.testing.assert_allclose(got[:ROWS], want, atol=1e-3)
        np.testing.assert_array_equal(got[ROWS:], 0)


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
    """Where new and old are equal, the new is far worse, or the target is not a number, the old codes stand."""
    fmt, matrix = MQ2_LLOYD, coupling(512).blocks[0]
    problem = Problem(matrix, matrix, EMPTY, SIGNS2, SIGNS, False)
    rows = heavy_rows(16)
    rows[3, 7] = np.nan
    fits = fit_whole_rows(np.nan_to_num(np.concatenate([rows, rows], axis=1)), fmt, hessian(512))
    old = expand(fmt, fits[0].stored), fits[0].codes
    targets, turned = np.ascontiguousarray(rows.T)[None], np.empty((1, 256, 16), np.float32)
    levels, codes = old[0].copy(), old[1].copy()
    improve_tiles(targets, problem, 0, levels, codes, turned)
    levels[[1, 3]] = old[0][[1, 3]]
    codes[[1, 3]] = old[1][[1, 3]]
    levels[2] += 9
    better, gains = np.empty(16, np.uint8), np.empty(16, np.float32)
    keep_better(targets, turned, problem, old, (levels, codes), better, gains)
    np.testing.assert_array_equal(better[[2, 3]], 0)
    np.testing.assert_array_equal(codes[[2, 3]], old[1][[2, 3]])
    assert gains[3] == 1 and np.isfinite(gains).all()
    y, h64 = rows.astype(np.float64), matrix.astype(np.float64)

    def cost(levels: np.ndarray, codes: np.ndarray) -> np.ndarray:
        e = y - np.take_along_axis(levels, codes.astype(np.int64), 1)
        return np.einsum("ri,ij,rj->r", e, h64, e)

    kept = np.where(better[:, None] > 0, levels, old[0])
    now, before = cost(kept, codes), cost(*old)
    sound = np.arange(16) != 3
    assert (now[sound] <= before[sound]).all() and better.sum() > 8


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
