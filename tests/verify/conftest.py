"""A checkpoint of one layout and little weight, made once for all tests of verify."""

from __future__ import annotations

import pytest
from mq_quant.formats.checkpoint import Checkpoint, open_checkpoint
from mq_quant.quantize.tiny import TinySpec, write_tiny

SPEC = TinySpec(
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_local_experts=12,
    num_experts_per_tok=8,
    vocab_size=520,
    calib_shape=(2, 32),
    eval_shape=(2, 32),
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tiny(folder, SPEC)
    return open_checkpoint(folder)
