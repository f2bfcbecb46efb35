"""Predictions of a file against the source's: exact where weights are, honest about few positions, and held to bars."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from mq_quant.formats.checkpoint.local import Checkpoint
from mq_quant.formats.errors import CheckError
from mq_quant.formats.hfq import open_hfq
from mq_quant.formats.minimax import awq_scale_name
from mq_quant.verify.bars import Bars
from mq_quant.verify.stages import predictions
from mq_quant.verify.stages.predictions import check_predictions
from plainfile import Build, Tensors, by_name

NONE = Bars()


@pytest.fixture(scope="module")
def tokens(checkpoint: Checkpoint) -> np.ndarray:
    ids: np.ndarray = np.load(checkpoint.path / "eval_tokens.npy")[:, :5].astype(np.int64)
    return ids


def judged(
    build: Build,
    checkpoint: Checkpoint,
    tokens: np.ndarray,
    bars: Bars = NONE,
    **given: Any,
) -> Any:
    with open_hfq(build(**given)) as file:
        return check_predictions(file, checkpoint, checkpoint.config, tokens, bars, fewest=1)


def test_exact_weights_give_the_source(build: Build, checkpoint: Checkpoint, tokens: np.ndarray) -> None:
    bars = Bars(cosine_mean=0.999999, cosine_min=0.999999, routing=1.0, kld_mean=1e-6, top1=1.0)
    stage = judged(build, checkpoint, tokens, bars, gate_up="F32", down="F32", exact=True)
    assert stage.ok, stage.complaints
    assert stage.seen == tokens.size == len(stage.as_json()["kld"])
    assert stage.as_json()["ppl_test"] == pytest.approx(stage.as_json()["ppl_reference"], rel=1e-4)


def test_too_few_positions_are_refused_unless_told_so(
    build: Build, checkpoint: Checkpoint, tokens: np.ndarray
) -> None:
    with open_hfq(build()) as file:
        with pytest.raises(CheckError, match="10 positions, too few to judge by: 512 are the fewest") as e:
            check_predictions(file, checkpoint, checkpoint.config, tokens, Bars())
        assert e.value.hint == "give more tokens, or --tokens 10 to judge by these"
        assert check_predictions(file, checkpoint, checkpoint.config, tokens, Bars(), fewest=10).seen == 10


def test_a_judgement_by_few_positions_says_so(
    build: Build, checkpoint: Checkpoint, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the standard error of the mean KLD, as numpy has it."""
    stage = judged(build, checkpoint, tokens, down="MQ3-Lloyd")
    kld = np.array(stage.as_json()["kld"])
    error = kld.std(ddof=1) / np.sqrt(kld.size)
    (note,) = stage.notes
    assert f"judged by {tokens.size} positions only" in note and f"± {error:.2g};" in note
    monkeypatch.setattr(predictions, "FIRM", tokens.size)
    assert judged(build, checkpoint, tokens).notes == ()


def test_bars_that_do_not_hold_are_named(build: Build, checkpoint: Checkpoint, tokens: np.ndarray) -> None:
    bars = Bars(cosine_mean=0.999999, cosine_min=0.999999, kld_mean=0.0, top1=1.0, routing=1.0)
    stage = judged(build, checkpoint, tokens, bars, down="MQ3-Lloyd")
    assert not stage.ok
    for expected in ("layer 0: cosine_mean", "layer 1: cosine_min", "mean KL divergence"):
        assert any(expected in text for text in stage.complaints), stage.complaints
    assert 0 < stage.as_json()["kld_mean"] < stage.as_json()["kld_max"]


@pytest.mark.parametrize("layer", [0, 1])
def test_predictions_that_are_not_numbers_fail_without_any_bar(
    build: Build, checkpoint: Checkpoint, tokens: np.ndarray, layer: int
) -> None:
    def change(_: object, tensors: Tensors) -> None:
        by_name(tensors)[awq_scale_name(layer)].view("<f2")[0] = math.nan

    with pytest.raises(CheckError, match=f"layer {layer}: .* not a number"):
        judged(build, checkpoint, tokens[:1, :3], change=change)


@pytest.mark.parametrize("ids", [np.zeros((0, 4)), np.array([[520]])])
def test_tokens_that_cannot_be_run_are_refused(build: Build, checkpoint: Checkpoint, ids: np.ndarray) -> None:
    with pytest.raises(CheckError, match="token"):
        judged(build, checkpoint, ids.astype(np.int64))
