"""The Hessian of whole rows: hostile moments, factors against their definition, and answered errors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
from lanes_problem import heavy_rows, unequal_weights
from mq_quant.formats.blocks import BY_NAME, LloydFormat
from mq_quant.lloyd.encode import ENCODED, encode_rotated
from mq_quant.lloyd.hessian import row
from mq_quant.lloyd.hessian.group import GroupHessian, from_diagonal
from mq_quant.lloyd.hessian.row import (
    RowHessian,
    from_fresh_moment,
    from_moment,
    from_weights,
    reversed_factor,
)
from rotation import matrix

WIDTH = 768


@cache
def moment(width: int = WIDTH, seed: int = 0, damping: float = 0.05) -> np.ndarray:
    """A damped second moment f64 [K, K] of correlated inputs, in the stored basis."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((width, width // 2)) * np.exp(random.normal(0, 0.5, (width, 1)))
    m = mix @ np.diag(1.0 / np.arange(1, width // 2 + 1)) @ mix.T
    m = (1 - damping) * m + damping * np.trace(m) / width * np.eye(width)
    r = np.kron(np.eye(width // 256), matrix())
    turned: np.ndarray = r @ m @ r.T
    turned.flags.writeable = False
    return turned


def check(h: RowHessian, groups: int) -> None:
    assert len(h.groups) == groups
    for g in h.groups:
        assert np.isfinite(g.matrix).all() and np.isfinite(g.feedback).all()
        np.testing.assert_array_equal(np.diag(g.feedback), np.ones(256, np.float32))
        assert np.trace(g.matrix) == pytest.approx(256, rel=1e-4)
    for a in h.answers:
        assert np.isfinite(a).all()


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (np.zeros((512, 512)), "not usable"),
        (np.full((512, 512), np.nan), "not usable"),
        (np.where(np.eye(512) > 0, np.inf, 0.0), "not usable"),
        (-np.eye(512), "not usable"),
        (np.ones((512, 512)), "further"),
        (np.diag(np.where(np.arange(512) < 256, 1.0, 0.0)), "further"),
        (np.eye(512) - 1.05 * np.outer(np.eye(512)[0], np.eye(512)[0]), "further"),
    ],
    ids=["zero", "NaN", "infinite", "negative", "rank one", "half zero", "indefinite"],
)
def test_moments_that_cannot_be_factored_fall_back_with_a_reason(bad: np.ndarray, says: str) -> None:
    h = from_moment(bad)
    check(h, 2)
    assert len(h.notes) == 1 and says in h.notes[0]
    rows = heavy_rows(17, 512)
    for fmt in ENCODED:
        decoded = fmt.decode(encode_rotated(rows, fmt, "hessian", h))
        assert np.isfinite(decoded).all()
        if isinstance(fmt, LloydFormat):
            levels = fmt.unpack(encode_rotated(rows, fmt, "hessian", h))[0].astype(np.float32)
            assert (np.diff(levels, axis=1) >= 0).all()


@pytest.mark.parametrize("size", [1e-300, 1e-30, 1e30, 1e290])
def test_only_ratios_matter(size: float) -> None:
    one, other = from_moment(moment(512)), from_moment(moment(512) * size)
    assert not one.notes and not other.notes
    for a, b in zip(one.groups, other.groups, strict=True):
        np.testing.assert_allclose(a.matrix, b.matrix, atol=1e-5)
        np.testing.assert_allclose(a.feedback, b.feedback, atol=1e-4)


def test_the_reversed_factor() -> None:
    h = moment(512)
    factor = reversed_factor(h.copy(), 2.0, 0.5)
    assert factor is not None
    upper = np.triu(factor)
    np.testing.assert_allclose(upper @ upper.T, h / 2 + 0.5 * np.eye(512), atol=1e-12 * np.abs(h).max())
    assert reversed_factor(-h) is None
    assert reversed_factor(np.ones((3, 3))) is None


def test_groups_and_answers_are_those_of_the_definition() -> None:
    """S_g is the Schur complement over everything later, and a target answers earlier errors as what is left says."""
    h = moment()
    found = from_moment(h)
    check(found, 3)
    assert not found.notes
    for g in range(3):
        left = h[256 * g :, 256 * g :]  # what is not yet rounded
        own, cross, rest = left[:256, :256], left[:256, 256:], left[256:, 256:]
        schur = own - cross @ np.linalg.solve(rest, cross.T) if len(rest) else own
        want = schur / np.trace(schur) * 256
        np.testing.assert_allclose(found.groups[g].matrix, want, atol=1e-4 * np.abs(want).max())
        upper = np.linalg.cholesky(np.linalg.inv(schur)).T
        np.testing.assert_allclose(
            found.groups[g].feedback, (upper / np.diag(upper)[:, None]).T, atol=1e-3 * np.abs(upper).max()
        )
        assert found.answers[g].shape == (g, 256, 256)
        earlier, later = h[256 * g : 256 * (g + 1), : 256 * g], h[256 * (g + 1) :]
        if len(rest):
            earlier = earlier - cross @ np.linalg.solve(rest, later[:, : 256 * g])
        answer = -np.linalg.solve(schur, earlier)
        got = found.answers[g].transpose(1, 0, 2).reshape(256, -1)
        np.testing.assert_allclose(got, answer, atol=1e-4 * (1 + np.abs(answer).max(initial=0)))


def test_the_coupling_is_that_of_the_definition() -> None:
    h = moment()
    found = from_moment(h).coupling
    assert found is not None and found.lines.dtype == found.inverses.dtype == np.float32
    for g in range(3):
        own = slice(256 * g, 256 * (g + 1))
        line = h[own] / np.trace(h[own, own]) * 256
        for r in range(3):
            np.testing.assert_allclose(found.lines[g, r], line[:, 256 * r : 256 * (r + 1)], atol=1e-5)
        want = -np.linalg.inv(line[:, own])
        np.testing.assert_allclose(found.inverses[g], want, atol=1e-4 * (1 + np.abs(want).max()))


def test_further_damping_is_part_of_the_coupling() -> None:
    h = np.ones((512, 512))
    found, given = from_moment(h).coupling, h.copy()
    np.testing.assert_array_equal(h, given)
    assert found is not None
    want = (h[:256, :256] + 1e-3 * np.eye(256)) / 1.001
    np.testing.assert_allclose(found.lines[0, 0], want, atol=1e-6)


def test_a_moment_that_may_be_overwritten_is_asked_for_before_each_damping() -> None:
    for h in (moment(512), np.ones((512, 512)), np.full((512, 512), np.nan)):
        room, asked = np.empty((512, 512)), []

        def made(h: np.ndarray = h, room: np.ndarray = room, asked: list[None] = asked) -> np.ndarray:
            asked.append(None)
            room[:] = h
            return room

        want, got = from_moment(h), from_fresh_moment(made)
        room[:] = np.nan  # nothing of it is kept
        assert got.notes == want.notes and len(asked) == (1 if "further" not in str(want.notes) else 2)
        for a, b in zip(want.groups, got.groups, strict=True):
            np.testing.assert_array_equal(a.matrix, b.matrix)
            np.testing.assert_array_equal(a.feedback, b.feedback)
        for a, b in zip(want.answers, got.answers, strict=True):
            np.testing.assert_array_equal(a, b)
        if want.coupling is not None:
            assert got.coupling is not None
            np.testing.assert_array_equal(want.coupling.lines, got.coupling.lines)
            np.testing.assert_array_equal(want.coupling.inverses, got.coupling.inverses)


def test_one_group_is_coupled_to_none() -> None:
    assert from_moment(moment(256)).coupling is None
    assert from_weights(np.ones(512)).coupling is None


def test_a_diagonal_moment_leaves_groups_independent() -> None:
    weights = unequal_weights(0.8, width=512)
    r = np.kron(np.eye(2), matrix())
    dense, diagonal = from_moment((r * weights) @ r.T), from_weights(weights)
    assert diagonal.answers == () and diagonal.notes == ()
    for a, b, part in zip(dense.groups, diagonal.groups, (weights[:256], weights[256:]), strict=True):
        np.testing.assert_allclose(a.matrix, b.matrix, atol=1e-4)
        np.testing.assert_allclose(a.feedback, b.feedback, atol=1e-3)
        np.testing.assert_array_equal(b.matrix, from_diagonal(part).matrix)
    for a in dense.answers:
        np.testing.assert_allclose(a, 0, atol=1e-6)


def test_unusable_groups_are_counted() -> None:
    weights = np.ones(768)
    weights[256:512] = 0
    h = from_weights(weights)
    assert h.notes == ("no usable importance in 1 of 3 groups",)


@pytest.mark.parametrize("name", ["MQ2-Lloyd", "MQ3-Lloyd", "MQ4", "MQ6"])
def test_whole_rows_lose_less_than_their_groups_alone(name: str) -> None:
    fmt, h, rows = BY_NAME[name], moment(), heavy_rows(33, WIDTH, seed=4)
    whole = from_moment(h)
    blocks = RowHessian(
        factors=tuple(from_moment(h[i : i + 256, i : i + 256]).groups[0] for i in range(0, WIDTH, 256))
    )

    def lost(hessian: RowHessian | None) -> float:
        fit = "exact" if hessian is None else "hessian"
        e = fmt.decode(encode_rotated(rows, fmt, fit, hessian, gain=False)).reshape(rows.shape) - rows
        return float(((e @ h) * e).sum())

    exact, alone, together = lost(None), lost(blocks), lost(whole)
    assert together < 0.9 * alone < 0.9 * exact


def test_rows_of_a_moment_give_the_same_bytes_in_any_company() -> None:
    fmt, h, rows = BY_NAME["MQ2-Lloyd"], from_moment(moment(512)), heavy_rows(21, 512, seed=5)
    before = rows.copy()
    want = encode_rotated(rows, fmt, "hessian", h).reshape(21, -1)
    np.testing.assert_array_equal(rows, before)
    for cuts in ((1, 3), (16,), (20,)):
        parts = [encode_rotated(p, fmt, "hessian", h) for p in np.split(rows, cuts)]
        np.testing.assert_array_equal(np.concatenate(parts).reshape(21, -1), want)


def test_channel_weights_are_factored_once_and_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    real, made = row.from_bounded, []

    def counted(weights: np.ndarray) -> GroupHessian:
        made.append(weights)
        return real(weights)

    monkeypatch.setattr(row, "from_bounded", counted)
    h = from_weights(unequal_weights(0.8, width=768))
    assert h.weights is not None and h.weights.shape == (3, 256)
    np.testing.assert_allclose(h.weights.mean(axis=1), 1)
    assert h.nearly_white == [False] * 3 and not h.notes and not made
    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(lambda _: h.groups, range(32)))
    assert len(made) == 3
    assert all(a is b for groups in seen for a, b in zip(groups, seen[0], strict=True))
    assert h.nearly_white == [group.nearly_white for group in h.groups]


def test_a_group_without_usable_weights_is_white() -> None:
    weights = unequal_weights(0.8, width=512)
    weights[256:] = np.nan
    h = from_weights(weights)
    assert h.nearly_white == [False, True]
    np.testing.assert_array_equal(h.groups[1].matrix, np.eye(256))
    np.testing.assert_array_equal(h.groups[1].feedback, np.eye(256))
