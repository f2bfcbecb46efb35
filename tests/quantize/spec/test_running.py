"""The memory that a file runs in: the engine's own context and cache, not the model's."""

from __future__ import annotations

import pytest
from mq_quant.formats.minimax import parse_config
from mq_quant.quantize.spec.places import model_files
from mq_quant.quantize.spec.recipe import load_model
from mq_quant.quantize.spec.running import cache_bytes, machine_for, run_bytes

M27 = parse_config(model_files(load_model("minimax-m2.7")).config)


def test_the_cache_is_what_the_engine_keeps_of_12288_tokens() -> None:
    """A token's keys and values: 62 layers, 2 x 8 heads x 128, 8 bits and half a bit of scale each."""
    assert cache_bytes(M27) == 12288 * 62 * 2 * 8 * 128 * 17 // 16
    short = parse_config({**model_files(load_model("minimax-m2.7")).config, "max_position_embeddings": 4096})
    assert cache_bytes(short) == cache_bytes(M27) // 3


@pytest.mark.parametrize(
    ("gigabytes", "memory"),
    [(67.5, "80 GB"), (102.6, "112 GB"), (108.3, "112 GB"), (108.5, "128 GB"), (300, "304 GB")],
)
def test_the_smallest_machine_that_holds_it(gigabytes: float, memory: str) -> None:
    assert machine_for(int(gigabytes * 1e9), M27) == memory
    assert run_bytes(0, M27) == cache_bytes(M27) + 2 * 10**9
