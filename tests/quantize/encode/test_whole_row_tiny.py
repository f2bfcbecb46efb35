"""Whole rows on the tiny source, whose rows are of several groups: less is lost than group by group, on new tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mq_quant.awq.importance import Importance
from mq_quant.formats.blocks import BY_NAME
from mq_quant.formats.checkpoint.local import open_checkpoint
from mq_quant.formats.fwht import rotate, unrotate
from mq_quant.formats.minimax import expert_name
from mq_quant.lloyd.encode import encode_rotated
from mq_quant.lloyd.hessian.row import RowHessian, from_moment
from mq_quant.quantize.tiny.folder import ensure_tiny
from mq_quant.verify.model.reference import Observer, Routing, embed, layer_forward

ROWS = 48


class Inputs(Observer):
    """The inputs of gate and up [n, hidden]."""

    def routed(self, layer: int, inputs: torch.Tensor, routing: Routing) -> None:
        self.rows = inputs.double().numpy()


@pytest.fixture(scope="module")
def seen() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Some rows of a gate matrix of the first layer, and its inputs on two sets of tokens."""
    source = open_checkpoint(ensure_tiny())
    tokens = np.random.default_rng(0).integers(0, source.config.vocab_size, (24, 64))
    inputs = Inputs()
    with torch.inference_mode():
        layer_forward(source, source.config, 0, embed(source, tokens), inputs)
    weights = source.weight(expert_name(0, 1, "w1"))[:ROWS]
    return weights, inputs.rows[: 20 * 64], inputs.rows[20 * 64 :]


@pytest.mark.parametrize("name", ["MQ2-Lloyd", "MQ3-Lloyd", "MQ4"])
def test_whole_rows_lose_less_of_the_output(name: str, seen: tuple[np.ndarray, ...]) -> None:
    weights, gathered, unseen = seen
    k, fmt = weights.shape[1], BY_NAME[name]
    assert k >= 512
    moment = gathered.T @ gathered / len(gathered)
    rotated = Importance(np.diag(moment).copy(), moment, len(gathered)).rotated_moment()
    whole = from_moment(rotated)
    alone = [from_moment(rotated[i : i + 256, i : i + 256]).groups[0] for i in range(0, k, 256)]
    y = rotate(weights)

    def lost(hessian: RowHessian) -> float:
        stored = fmt.decode(encode_rotated(y, fmt, "hessian", hessian, gain=False)).reshape(y.shape)
        return float(np.square(unseen @ (unrotate(stored) - weights).T.astype(np.float64)).sum())

    together, apart = lost(whole), lost(RowHessian(factors=tuple(alone)))
    assert together < 0.92 * apart
