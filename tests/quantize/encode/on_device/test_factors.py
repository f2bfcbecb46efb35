"""Moments and factors in torch beside those of numpy and LAPACK: the same numbers but for the order of sums, and for
given factors the same bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mq_quant.awq import own_moments
from mq_quant.awq.importance import Importance
from mq_quant.formats.blocks import MQ2_LLOYD, MQ4
from mq_quant.formats.fwht import rotate
from mq_quant.kernels.encode.device_encoder import DeviceEncoder
from mq_quant.kernels.runtime.host import open_backend
from mq_quant.lloyd.encode import encode_rotated
from mq_quant.lloyd.hessian.row import RowHessian, from_moment
from mq_quant.quantize.encode import answering
from mq_quant.quantize.encode.on_device import answering as answering_there
from mq_quant.quantize.encode.on_device import moments
from mq_quant.quantize.encode.on_device.factors import Factors, borrowed, factors_of

K = 768


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def rows_of(rng, count, width=K):
    """Rows f32 whose channels are correlated and of unequal size."""
    mix = np.eye(width) + rng.normal(0, 0.3 / width**0.5, (width, width))
    return ((rng.standard_t(5, (count, width)) * np.geomspace(3, 0.1, width)) @ mix).astype(np.float32)


def there(array):
    return torch.from_numpy(np.array(array))


def close(got, want, share=1e-9):
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=share * np.abs(want).max())


@pytest.fixture
def prior(rng):
    return own_moments.own_moment(rows_of(rng, 6000))


@pytest.mark.parametrize("count", [2, 60, 3000])
def test_mixtures_are_those_of_the_cpu(rng, prior, count):
    rows = rows_of(rng, count)
    want = own_moments.mixed(rows, Importance(np.diag(prior), prior, 1.0), own_moments.whitening(prior))
    white = moments.whitening(there(prior))
    close(moments.mixed(there(rows), there(prior), white), want.moment, 1e-6)


@pytest.mark.parametrize("count", [0, 1])
def test_an_expert_without_a_pair_of_tokens_takes_the_prior(rng, prior, count):
    white = moments.whitening(there(prior))
    assert moments.mixed(there(rows_of(rng, count)), there(prior), white).numpy() is not None
    close(moments.mixed(there(rows_of(rng, count)), there(prior), white), prior, 0)


@pytest.mark.parametrize("broken", ["zero", "nan", "indefinite"])
def test_what_cannot_be_whitened_is_not(prior, broken):
    given = {"zero": np.zeros((K, K)), "nan": prior * np.nan, "indefinite": -prior}[broken]
    assert moments.whitening(there(given)) is None
    assert own_moments.whitening(given) is None


def test_an_own_moment_is_exactly_symmetric(rng):
    found = moments.own_moment(there(rows_of(rng, 500)))
    assert torch.equal(found, found.mT)
    close(found, own_moments.own_moment(rows_of(np.random.default_rng(5), 500)), 1e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_rotated_moments_are_those_of_the_importance(rng, prior, scaled):
    scale = rng.uniform(0.5, 2, K).astype(np.float32) if scaled else None
    want = Importance(np.diag(prior), prior, 1.0, damping=0.1).rotated_moment(scale)
    got = moments.rotated_moment(there(prior), 0.1, None if scale is None else there(scale))
    close(got, want, 1e-12)
    assert torch.equal(got, got.mT)


def usual(rng, width=K):
    return Importance(np.ones(width), own_moments.own_moment(rows_of(rng, 4000, width)), 1.0).rotated_moment()


@pytest.mark.parametrize("width", [256, 512, K])
def test_factors_are_those_of_lapack(rng, width):
    moment = usual(rng, width)
    want, got = from_moment(moment.copy()), factors_of(there(moment))
    assert isinstance(got, Factors)
    brought = got.on_cpu()
    for mine, theirs in zip(brought.factors, want.factors, strict=True):
        np.testing.assert_allclose(mine.matrix, theirs.matrix, atol=1e-6 * np.abs(theirs.matrix).max())
        np.testing.assert_array_equal(mine.matrix, mine.matrix.T)
        np.testing.assert_allclose(mine.feedback, theirs.feedback, atol=1e-6)
    for mine, theirs in zip(brought.answers, want.answers, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert (brought.coupling is None) == (want.coupling is None) == (width == 256)
    if brought.coupling and want.coupling:
        np.testing.assert_allclose(brought.coupling.lines, want.coupling.lines, rtol=1e-6, atol=1e-6)
        size = np.abs(want.coupling.inverses).max()
        np.testing.assert_allclose(brought.coupling.inverses, want.coupling.inverses, atol=1e-6 * size)


@pytest.mark.parametrize("broken", ["rank one", "zero", "nan", "negative"])
def test_what_cannot_be_factored_is_replaced_as_on_the_cpu(broken):
    one = np.outer(np.arange(1.0, 513), np.arange(1.0, 513))
    given = {"rank one": one, "zero": 0 * one, "nan": np.nan * one, "negative": -np.eye(512)}[broken]
    want, got = from_moment(given.copy()), factors_of(there(given))
    assert got.notes == want.notes
    assert isinstance(got, RowHessian) == (broken != "rank one")


@pytest.mark.parametrize("fmt", [MQ2_LLOYD, MQ4], ids=lambda f: f.name)
def test_the_device_gives_the_bytes_of_the_cpu_for_the_same_factors(rng, fmt):
    weights = rng.standard_t(5, (40, K)).astype(np.float32)
    factors = factors_of(there(usual(rng)))
    assert isinstance(factors, Factors)
    want = encode_rotated(rotate(weights), fmt, "hessian", factors.on_cpu(), 0.9375)
    with open_backend("cpu") as backend:
        encoder = DeviceEncoder(backend)
        given, ones = (borrowed(backend, t) for t in (there(weights), torch.ones(K)))
        coded = encoder.encode_here(given, fmt, ones, factors.on(backend), 0.9375)
        np.testing.assert_array_equal(backend.download(coded.payload), want)


@pytest.mark.parametrize("lost", [0, 7, 300])
def test_down_answers_as_on_the_cpu(rng, lost):
    rows, w1, w3 = rows_of(rng, 300, 64), *(rng.standard_normal((2, 48, 64)) / 8).astype(np.float32)
    w2 = rng.standard_normal((64, 48)).astype(np.float32)
    exact, near = answering.product(rows, w1, w3), answering.product(rows, w1 * 1.1, np.round(8 * w3) / 8)
    close(answering_there.product(there(rows), there(w1), there(w3)), exact, 1e-5)
    near[:lost] = np.inf
    with np.errstate(invalid="ignore"):
        want = answering.answering_down(w2, exact, near)
    close(answering_there.answering_down(there(w2), there(exact), there(near)), want, 1e-5)
