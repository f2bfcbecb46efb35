"""A vocabulary that is taken part by part gives what the whole of it gives, whatever the parts are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from linear_heads import VOCABULARY, WIDTH, Linear, heads
from mq_quant.verify.evaluate import head
from mq_quant.verify.evaluate.dense import of_source
from mq_quant.verify.evaluate.head import Head, judge
from mq_quant.verify.model.metrics import Divergence, Positions, joined


def whole(reference: Head, test: Head, tokens: np.ndarray) -> Positions:
    found = Divergence()
    for head_ in (reference, test):
        head_.load(0, VOCABULARY)
    for s, ids in enumerate(tokens):
        found.add(reference.logits(s, range(11)), test.logits(s, range(11)), ids)
    return joined(found.found)


@pytest.mark.parametrize("rows", [1, 7, 96, 97, 4096])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_parts_give_what_the_whole_gives(rows: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where probabilities of whole parts vanish."""
    monkeypatch.setattr(head, "ROWS", rows)
    reference, test, tokens = heads(scale=scale)
    (found,) = judge(of_source(reference, tokens, VOCABULARY, 1), [test])
    expected = whole(reference, test, tokens)
    for name in ("kld", "nll_reference", "nll_test"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found.top1, expected.top1)
    np.testing.assert_allclose(found.top8, expected.top8)


def test_several_models_at_once_give_what_each_gives_alone() -> None:
    reference, near, tokens = heads()
    _, far, _ = heads(noise=2.0)
    both = judge(of_source(reference, tokens, VOCABULARY, 2), [near, far])
    for model, found in zip((near, far), both, strict=True):
        (alone,) = judge(of_source(reference, tokens, VOCABULARY, 1), [model])
        assert found.summary() == alone.summary()


def test_a_model_is_no_distance_from_itself() -> None:
    reference, _, tokens = heads()
    (found,) = judge(of_source(reference, tokens, VOCABULARY, 1), [heads()[0]])
    assert (found.kld == 0).all() and found.top1.all() and (found.top8 == 1).all()


def test_what_is_not_a_number_stays_one() -> None:
    """A broken model is no good model, in whichever part of the vocabulary it breaks."""
    for row in (0, VOCABULARY - 1):
        reference, test, tokens = heads()
        test.model.rows[row, 0] = math.nan  # type: ignore[attr-defined]
        (found,) = judge(of_source(reference, tokens, VOCABULARY, 1), [test])
        assert np.isnan(found.kld).all()


def test_equal_logits_agree_on_the_first_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "ROWS", 10)
    flat = Head(Linear(torch.zeros(VOCABULARY, WIDTH)), torch.ones(1, 4, WIDTH))  # type: ignore[arg-type]
    (found,) = judge(of_source(flat, np.zeros((1, 4), int), VOCABULARY, 1), [flat])
    assert found.top1.all() and found.summary().ppl_test == pytest.approx(VOCABULARY)
