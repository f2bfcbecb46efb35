"""The device's encoder gives the bytes of the CPU's: every format, fit and kind of Hessian, on hostile rows too."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hostile_rows import HOSTILE, IMPORTANCES
from lanes_problem import heavy_rows, unequal_weights
from mq_quant.formats.blocks import MQ2_LLOYD, MQ3_LLOYD, MQ4, MQ4_LLOYD
from mq_quant.formats.errors import BackendError
from mq_quant.formats.fwht import rotate, unrotate
from mq_quant.formats.hfq.stored import StoredForm
from mq_quant.kernels.encode.device_encoder import DeviceEncoder
from mq_quant.kernels.encode.hessians import DenseFactors
from mq_quant.kernels.encode.shares import Shares
from mq_quant.lloyd.encode import ENCODED, encode_rotated
from mq_quant.lloyd.group_fit import expand
from mq_quant.lloyd.hessian.row import RowHessian, from_moment, from_weights
from mq_quant.lloyd.row_blocks import RowAnswers, encode_blocks

FORMATS = ENCODED
K = 512
KINDS = ("none", "unequal", "nearly equal", "dense")


@pytest.fixture(scope="module")
def encoder(backend):
    return DeviceEncoder(backend)


@cache
def weights_of(kind: str) -> np.ndarray:
    sigma = (1.0, 0.02) if kind == "nearly equal" else (1.0, 0.6)
    return np.concatenate([unequal_weights(s, seed) for seed, s in enumerate(sigma)])


@cache
def moment() -> np.ndarray:
    rng = np.random.default_rng(7)
    x = rng.standard_t(5, (900, K)) @ (np.eye(K) + 0.1 * rng.standard_normal((K, K)))
    return x.T @ x / len(x) + 0.05 * np.eye(K)


@cache
def hessian_of(kind: str) -> RowHessian | None:
    if kind == "none":
        return None
    return from_moment(moment()) if kind == "dense" else from_weights(weights_of(kind))


def assert_equal_bytes(
    encoder: DeviceEncoder, weights: np.ndarray, fmt, kind: str, gain: float = 1.0
) -> None:
    hessian = hessian_of(kind)
    fit = "hessian" if hessian else "exact"
    want = encode_rotated(rotate(weights), fmt, fit, hessian, gain)
    np.testing.assert_array_equal(encoder.encode(weights, StoredForm(fmt), fit, hessian, gain), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_bytes_are_those_of_the_cpu(encoder, fmt, kind):
    """45 rows: tiles of 32 and blocks of 8 are cut short."""
    assert_equal_bytes(encoder, unrotate(heavy_rows(45, K)), fmt, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_hostile_rows_give_the_same_bytes(encoder, fmt, kind):
    """All kinds in one matrix, so that each has the others for neighbours; in the rotated basis and before it."""
    rows = np.concatenate([np.tile(rows[:3], 2) for rows in HOSTILE.values()]).astype(np.float32)
    few = np.round(np.float32(heavy_rows(11, K)))
    for weights, gain in (
        (rows, 1),
        (unrotate(rows), 1),
        (unrotate(few), 0),
        (few[:, ::-1], 0),
        (few, 0.9375),
    ):
        with np.errstate(all="ignore"):
            assert_equal_bytes(encoder, np.ascontiguousarray(weights), fmt, kind, gain)


@pytest.mark.parametrize("fmt", [MQ2_LLOYD, MQ4], ids=lambda f: f.name)
@pytest.mark.parametrize("kind", IMPORTANCES)
def test_hostile_importances_give_the_same_bytes(encoder, fmt, kind):
    rows, weights = unrotate(heavy_rows(9)), IMPORTANCES[kind]
    hessian = from_weights(weights)
    want = encode_rotated(rotate(rows), fmt, "hessian", hessian)
    np.testing.assert_array_equal(encoder.encode(rows, StoredForm(fmt), "hessian", hessian), want)


@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_whole_rows_of_any_number_of_groups_give_the_same_bytes(encoder, fmt, groups):
    rng = np.random.default_rng(groups)
    x = rng.standard_normal((2 * K, 256 * groups)) * np.arange(1, 256 * groups + 1) ** -0.5
    hessian = from_moment(x.T @ x / len(x) + 1e-4 * np.eye(256 * groups))
    assert (hessian.coupling is None) == (groups == 1)
    for count, gain in ((35, 1.0), (1, 0.0)):
        rows = unrotate(heavy_rows(count, 256 * groups, seed=groups))
        want = encode_rotated(rotate(rows), fmt, "hessian", hessian, gain)
        np.testing.assert_array_equal(encoder.encode(rows, StoredForm(fmt), "hessian", hessian, gain), want)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("kind", ["rank one", "one dead group", "not symmetric"])
def test_degenerate_moments_give_the_same_bytes(encoder, fmt, kind):
    given = {
        "rank one": np.ones((K, K)),
        "one dead group": np.diag(np.where(np.arange(K) < 256, 1.0, 0.0)),
        "not symmetric": np.triu(moment()) + np.tril(moment(), -1) * (1 + 1e-6),
    }[kind]
    rows, hessian = unrotate(heavy_rows(19, K)), from_moment(given)
    rows[3], rows[4, :300], rows[5] = 0, 0, 1e15
    with np.errstate(all="ignore"):
        want = encode_rotated(rotate(rows), fmt, "hessian", hessian)
        np.testing.assert_array_equal(encoder.encode(rows, StoredForm(fmt), "hessian", hessian), want)


def test_a_scale_and_a_fold_are_applied_before_the_rotation(encoder, rng):
    weights, scale = heavy_rows(5, K), rng.uniform(0.1, 9, K).astype(np.float32)
    fold = np.exp2(rng.integers(-3, 4, 5)).astype(np.float32)
    want = encode_rotated(rotate(weights / fold[:, None] * scale), MQ2_LLOYD, "exact")
    form = StoredForm(MQ2_LLOYD, scale, fold)
    np.testing.assert_array_equal(encoder.encode(weights, form, "exact"), want)


def test_one_encoder_serves_matrices_of_any_shape_and_many_hessians(encoder):
    for seed, width in enumerate((256, 1024, 512, 256, 768)):
        weights = unequal_weights(0.7, seed, width)
        rows = unrotate(heavy_rows(3 + seed, width, seed))
        hessian = from_weights(weights)
        want = encode_rotated(rotate(rows), MQ2_LLOYD, "hessian", hessian)
        for _ in range(2):
            got = encoder.encode(rows, StoredForm(MQ2_LLOYD), "hessian", hessian)
            np.testing.assert_array_equal(got, want)


def test_no_rows_are_no_bytes(encoder):
    assert encoder.encode(np.empty((0, K), np.float32), StoredForm(MQ4), "exact").shape == (0,)


def test_the_engines_own_fit_is_refused(encoder):
    with pytest.raises(BackendError, match="'reference' does not run on a device"):
        encoder.encode(heavy_rows(1), StoredForm(MQ4), "reference")


def test_a_format_that_is_only_decoded_is_refused(encoder):
    with pytest.raises(BackendError, match="MQ4-Lloyd is only decoded"):
        encoder.encode(heavy_rows(1), StoredForm(MQ4_LLOYD), "exact")


@pytest.mark.parametrize("fmt", [MQ2_LLOYD, MQ4], ids=lambda f: f.name)
def test_launches_that_were_recorded_give_the_same_bytes_for_other_weights_and_hessians(encoder, fmt):
    """The first matrix of a shape is launched, the second one recorded, the third one done again from the recording;
    a wider one in between moves memory, after which nothing recorded may be used."""
    hessians = [from_moment(moment() + n * np.eye(K)) for n in range(5)]
    for seed, hessian in enumerate(hessians):
        if seed == 3:
            encoder.encode(heavy_rows(90, 2 * K), StoredForm(fmt), "exact")
        rows = unrotate(heavy_rows(21, K, seed))
        want = encode_rotated(rotate(rows), fmt, "hessian", hessian)
        np.testing.assert_array_equal(encoder.encode(rows, StoredForm(fmt), "hessian", hessian), want)


def turned(matrices: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.swapaxes(matrices, -1, -2))


@pytest.mark.parametrize("fmt", [MQ2_LLOYD, MQ3_LLOYD, MQ4], ids=lambda f: f.name)
def test_factors_on_the_device_give_the_bytes_of_those_that_were_brought_there(encoder, fmt):
    backend, fold = encoder.backend, np.float32(0.5)
    for seed in range(3):
        hessian = from_moment(moment() + seed * np.eye(K))
        weights = unrotate(heavy_rows(21, K, seed))
        scale = np.full(K, 2, np.float32)
        want = encode_rotated(rotate(weights / fold * scale), fmt, "hessian", hessian)
        assert hessian.coupling is not None
        factors = DenseFactors(
            backend.upload(np.stack([f.matrix for f in hessian.factors])),
            backend.upload(np.stack([f.feedback for f in hessian.factors])),
            backend.upload(turned(np.concatenate(hessian.answers[1:]))),
            backend.upload(np.stack([lines[g] for g, lines in enumerate(hessian.coupling.lines)])),
            backend.upload(turned(hessian.coupling.lines)),
            backend.upload(turned(hessian.coupling.inverses)),
        )
        given = backend.upload(weights / fold)
        coded = encoder.encode_here(given, fmt, backend.upload(scale), factors)
        np.testing.assert_array_equal(backend.download(coded.payload), want)
        values = np.take_along_axis(
            expand(fmt, backend.download(coded.params).reshape(-1, coded.params.shape[2])),
            backend.download(coded.codes).reshape(-1, 256).astype(np.int64),
            axis=1,
        )
        np.testing.assert_array_equal(values.reshape(-1), fmt.decode(want).reshape(-1))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("fmt", [MQ2_LLOYD, MQ3_LLOYD, MQ4], ids=lambda f: f.name)
def test_matrices_side_by_side_give_the_bytes_of_each(encoder, fmt, groups):
    """Each has a Hessian and a scale of its own; their groups follow each other in turns. Nine rows cut
    blocks of four and of eight short."""
    backend, width, count, rows = encoder.backend, 256 * groups, 3, 9
    rng = np.random.default_rng(groups)
    moments = [
        np.cov(rng.standard_t(5, (width, 900)) * rng.uniform(0.5, 2, (width, 1))) for _ in range(count)
    ]
    hessians = [from_moment(m + 0.05 * np.eye(width)) for m in moments]
    weights = [unrotate(heavy_rows(rows, width, seed)) for seed in range(count)]
    scales = [np.full(width, s, np.float32) for s in (1, 2, 0.5)]
    want = [
        encode_rotated(rotate(w * s), fmt, "hessian", h)
        for w, s, h in zip(weights, scales, hessians, strict=True)
    ]

    def in_turns(given: list[np.ndarray], axis: int) -> np.ndarray:
        return np.ascontiguousarray(np.stack(given, axis))

    coupled = [h.coupling for h in hessians if h.coupling is not None]
    square = (groups * count, 256, 256)
    factors = DenseFactors(
        *(
            backend.upload(in_turns(given, 1).reshape(square))
            for given in (
                [np.stack([f.matrix for f in h.factors]) for h in hessians],
                [np.stack([f.feedback for f in h.factors]) for h in hessians],
            )
        ),
        backend.upload(
            in_turns([turned(np.concatenate(h.answers)) for h in hessians], 1).reshape(-1, 256, 256)
        ),
    )
    if coupled:
        blocks = [np.stack([c.lines[g, g] for g in range(groups)]) for c in coupled]
        factors = replace(
            factors,
            blocks=backend.upload(in_turns(blocks, 1).reshape(square)),
            lines=backend.upload(in_turns([turned(c.lines) for c in coupled], 2)),
            inverses=backend.upload(in_turns([turned(c.inverses) for c in coupled], 1).reshape(square)),
        )
    beside = in_turns([w.reshape(rows, groups, 256) for w in weights], 2).reshape(rows, -1)
    scale = backend.upload(in_turns([s.reshape(groups, 256) for s in scales], 1).reshape(-1))
    for _ in range(3):  # launched, recorded, and done again
        coded = encoder.encode_here(backend.upload(beside), fmt, scale, factors, beside=count)
        got = backend.download(coded.payload).reshape(rows, groups, count, -1)
        for n in range(count):
            np.testing.assert_array_equal(got[:, :, n].reshape(-1), want[n])


def row_answers(sizes: tuple[int, ...], seed: int) -> RowAnswers:
    random, stops = np.random.default_rng(seed), np.cumsum(sizes).tolist()
    return [
        (slice(stop - size, stop), random.normal(0, 0.05, (size, stop - size)).astype(np.float32))
        for size, stop in zip(sizes, stops, strict=True)
    ]


@pytest.mark.parametrize("kind", ["dense", "unequal"])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_rows_that_answer_each_other_give_the_bytes_of_the_cpu(encoder, fmt, kind):
    """Several times, since launches are recorded; of other answers, and of more rows than a tile of a product has."""
    hessian, scale = hessian_of(kind), np.linspace(0.5, 2, K, dtype=np.float32)
    for seed, (sizes, times) in enumerate([((16, 16, 16), 3), ((16, 16, 16), 1), ((80, 7), 1)]):
        answers = row_answers(sizes, seed)
        for again in range(times):
            weights = unrotate(heavy_rows(sum(sizes), K, seed + again))
            want = encode_blocks(rotate(weights * scale), answers, fmt, "hessian", hessian, 0.5)
            form = StoredForm(fmt, scale)
            got = encoder.encode(weights, form, "hessian", hessian, 0.5, answers=answers)
            np.testing.assert_array_equal(got, want)


def test_answers_are_brought_once_for_as_long_as_they_are_asked_for(encoder):
    brought = []

    def bring(name, share):
        brought.append(name)
        return encoder.backend.upload(share)

    shares, first, second = Shares(), row_answers((16, 16), 0), row_answers((16, 16), 1)
    for answers in (first, first, second, list(second), first):
        found = shares.of(answers, bring)
        for (rows, here), (wanted, share) in zip(found, answers, strict=True):
            assert rows == wanted
            np.testing.assert_array_equal(encoder.backend.download(here), share)
    assert brought == ["share 0", "share 1"] * 3
