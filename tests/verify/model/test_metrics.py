"""Distances on values that are known, and on the edges where a formula would divide by zero."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mq_quant.formats.errors import CheckError
from mq_quant.verify.model.metrics import (
    DB_CEILING,
    Divergence,
    cosine,
    kl_divergence,
    layer_figures,
    perplexity,
    snr_db,
    standard_error,
)


def test_cosine_of_known_vectors() -> None:
    a = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    b = torch.tensor([[0.0, 2.0], [2.0, 2.0], [0.0, 0.0], [1.0, 0.0], [-3.0, -4.0]])
    np.testing.assert_allclose(cosine(a, b), [0, 1, 1, 0, -1], atol=1e-15)


def test_cosine_does_not_hide_nan() -> None:
    assert np.isnan(cosine(torch.tensor([[math.nan, 1.0]]), torch.ones(1, 2))).all()


def test_snr() -> None:
    assert snr_db(100.0, 1.0) == pytest.approx(20)
    assert snr_db(1.0, 0.0) == DB_CEILING and snr_db(0.0, 0.0) == DB_CEILING
    assert snr_db(0.0, 1.0) == -DB_CEILING
    assert math.isnan(snr_db(1.0, math.nan))


def test_kl_divergence_of_two_coins() -> None:
    p, q = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kl_divergence(p, q)[0] == pytest.approx(expected, rel=1e-6)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 30))
def test_kl_divergence_is_zero_for_equals_and_ignores_shifts(seed: int, spread: float) -> None:
    logits = torch.from_numpy(np.random.default_rng(seed).normal(0, spread, (3, 17))).float()
    assert (kl_divergence(logits, logits) == 0).all()
    np.testing.assert_allclose(kl_divergence(logits, logits.double() + 5), 0, atol=1e-9)
    assert (kl_divergence(logits, logits.flip(-1)) >= 0).all()


def test_summary_of_identical_models() -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(1))
    divergence = Divergence()
    divergence.add(logits, logits, np.array([1, 2, 3, 4, 5]))
    divergence.add(logits, logits, np.array([5, 4, 3, 2, 1]))
    s = divergence.summary()
    assert (s.positions, s.kld_mean, s.kld_max, s.top1) == (10, 0, 0, 1)
    assert s.ppl_reference == s.ppl_test


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    divergence = Divergence()
    divergence.add(torch.zeros(4, 9), torch.zeros(4, 9), np.array([0, 3, 8, 2]))
    assert divergence.summary().ppl_test == pytest.approx(9)


def test_a_single_token_has_no_perplexity_but_a_divergence() -> None:
    divergence = Divergence()
    divergence.add(torch.zeros(1, 4), torch.tensor([[9.0, 0, 0, 0]]), np.array([2]))
    s = divergence.summary()
    assert math.isnan(s.ppl_test) and s.kld_mean > 1


def test_nothing_scored_is_an_error() -> None:
    with pytest.raises(CheckError, match="no position was scored"):
        Divergence().summary()
    divergence = Divergence()
    divergence.add(torch.zeros(0, 4), torch.zeros(0, 4), np.zeros(0, np.int64))
    with pytest.raises(CheckError, match="no position was scored"):
        divergence.summary()


def test_the_error_of_a_mean_and_of_a_perplexity() -> None:
    values = np.array([1.0, 2.0, 3.0, 6.0])
    assert standard_error(values) == pytest.approx(values.std(ddof=1) / 2)
    value, error = perplexity(values)
    assert value == pytest.approx(math.exp(3)) and error == pytest.approx(value * standard_error(values))
    assert math.isnan(standard_error(values[:1])) and all(map(math.isnan, perplexity(values[:0])))


def test_figures_of_a_layer() -> None:
    reference = torch.tensor([[[3.0, 4.0], [0.0, 5.0]]])
    test = torch.tensor([[[3.0, 4.0], [0.0, 4.0]]])
    ids = torch.tensor([[0, 1], [2, 3]])
    found = layer_figures(7, reference, test, ids, torch.tensor([[1, 0], [2, 5]]))
    assert (found.layer, found.cosine_mean, found.routing) == (7, pytest.approx(1), 0.75)
    assert found.error == pytest.approx(1 / 50)
    assert math.isnan(layer_figures(0, reference, test, None, None).routing)
    nothing = torch.zeros_like(reference)
    assert layer_figures(0, nothing, nothing, ids, ids).error == 0
    assert layer_figures(0, nothing, test, ids, ids).error == 1


def test_the_eight_most_likely_tokens_are_counted_as_a_set() -> None:
    reference = torch.arange(16.0)[None]
    divergence = Divergence()
    divergence.add(reference, torch.roll(reference, 4, -1), np.array([1]))
    assert divergence.summary().top8 == 0.5 and divergence.summary().top1 == 0
