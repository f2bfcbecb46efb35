"""What is expected of a file follows from the sums of its pieces and from the models that were measured whole."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from measurement_document import document
from mq_quant.formats.minimax import ModelConfig
from mq_quant.quantize.fit.allocation import Allocation
from mq_quant.quantize.fit.generic import generic
from mq_quant.quantize.fit.losses import Losses, measured
from mq_quant.quantize.fit.measurement import EXPERT_NAMES, PROJECTIONS, Measurement


def two(*formats: str) -> Allocation:
    return Allocation(((formats[0], formats[1]),) * 2)


def losses(**changes: Any) -> Losses:
    return measured(Measurement.model_validate(document(**changes)))


def test_what_was_measured_whole_is_expected_as_it_was_measured() -> None:
    found = losses(rest=0.01)
    assert found.total(two("MQ2-Lloyd", "MQ2-Lloyd")) == pytest.approx(0.15)
    assert found.expected(two("MQ2-Lloyd", "MQ2-Lloyd")) == pytest.approx(0.17)
    assert found.expected(two("MQ2-Lloyd", "MQ4")) == pytest.approx(0.14)


def test_beyond_what_was_measured_the_last_ratio_holds() -> None:
    found = losses(rest=0.01)
    low = found.expected(two("MQ4", "MQ4"))
    ratio = 0.13 / found.total(two("MQ2-Lloyd", "MQ4"))
    assert low == pytest.approx(0.01 + ratio * found.total(two("MQ4", "MQ4")))


def test_more_loss_never_means_less_kld() -> None:
    """Even where the models that were measured whole contradict their pieces."""
    found = losses(rest=0.01, whole={"MQ2-Lloyd": 0.05, "MQ4": 0.09})
    some = [two(a, b) for a in ("MQ2-Lloyd", "MQ3-Lloyd", "MQ4") for b in ("MQ2-Lloyd", "MQ3-Lloyd", "MQ4")]
    ordered = sorted(some, key=found.total)
    klds = [found.expected(a) or 0 for a in ordered]
    assert klds == sorted(klds)


def test_nothing_is_expected_where_nothing_whole_was_measured() -> None:
    found = losses(rest=0.01)
    assert replace(found, known=()).expected(two("MQ4", "MQ4")) is None
    assert replace(found, known=((0.1, 0.005),)).expected(two("MQ4", "MQ4")) is None


def test_pieces_without_loss_leave_the_rest() -> None:
    nothing = tuple(dict.fromkeys(("MQ2-Lloyd", "MQ4"), 0.0) for _ in range(4))
    assert Losses(nothing, "", 0.01, ((0.1, 0.2),)).expected(two("MQ4", "MQ4")) == 0.01


@pytest.mark.parametrize("layers", [1, 3, 62])
def test_typical_losses_fall_with_bits_at_every_piece(layers: int) -> None:
    found = generic(cast(ModelConfig, SimpleNamespace(num_hidden_layers=layers)))
    assert len(found.pieces) == layers * len(PROJECTIONS)
    for piece in found.pieces:
        values = [piece[name] for name in EXPERT_NAMES]
        assert values == sorted(values, reverse=True) and all(map(math.isfinite, values))
